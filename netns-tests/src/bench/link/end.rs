//! One end of one transfer, a process of its own: it sends without end, or receives and says ten times a second how many
//! bytes of payload have arrived.
//!
//! ```text
//!  lab bench-link-end PLAN.json      runs until it is killed
//! ```
//!
//! All carry the same: chunks of just under 1 MiB. Over QUIC each is a stream of its own.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use gateway::chunk::{ChunkRecv, ChunkSend, MAX_CHUNK};
use gateway::identity::Identity;
use gateway::link::{CongestionControl, Link, LinkConfig, PeerConfig, PeerHandle};
use longhaul_core::bulk::{BulkId, Channel};
use longhaul_core::ids::MigrationId;
use longhaul_core::units::Rate;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::sender::Sender;
use super::{quic, s2n_quic};

const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// Arguments of one end.
#[derive(Debug, Clone, clap::Args)]
pub struct LinkEndArguments {
    /// File with the plan, JSON
    plan: PathBuf,
}

/// What one end does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Plan {
    pub sender: Sender,
    pub sends: bool,
    pub listen: SocketAddr,
    pub remote: SocketAddr,
    pub rate_mbit: u64,
    pub rtt_ms: u64,
    pub key_file: PathBuf,
    pub peer_key: String,
}

impl Plan {
    /// What is on the way at the path's rate, in bytes.
    pub fn held_bytes(&self) -> u64 {
        Rate::mbit(self.rate_mbit).bytes_in(Duration::from_millis(self.rtt_ms)).0
    }
}

/// Counts what arrives.
pub(super) type Arrived = Arc<AtomicU64>;

/// Runs one end until it is killed.
pub fn link_end_main(arguments: &LinkEndArguments) -> Result<()> {
    let text = std::fs::read(&arguments.plan)
        .with_context(|| format!("Cannot read {}", arguments.plan.display()))?;
    let plan: Plan = serde_json::from_slice(&text).context("The plan is not valid")?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(&plan))
}

async fn run(plan: &Plan) -> Result<()> {
    let arrived = Arrived::default();
    let work = async {
        match plan.sender {
            Sender::Ours => ours(plan, &arrived, 2, CongestionControl::Model).await,
            Sender::OursExact => ours(plan, &arrived, 1, CongestionControl::Model).await,
            Sender::Fixed => ours(plan, &arrived, 1, CongestionControl::Fixed).await,
            Sender::TcpCubic | Sender::TcpBbr => tcp(plan, &arrived).await,
            Sender::QuinnCubic | Sender::QuinnReno | Sender::QuinnBbr => quic::run(plan, &arrived).await,
            Sender::S2nQuicBbr => Err(s2n_quic::become_it(plan)),
        }
    };
    tokio::select! {
        done = work => done,
        reported = report(&arrived), if !plan.sends => reported,
    }
}

async fn report(arrived: &Arrived) -> Result<()> {
    let mut ticks = tokio::time::interval(REPORT_INTERVAL);
    loop {
        ticks.tick().await;
        let mut out = std::io::stdout();
        writeln!(out, "{}", arrived.load(Ordering::Relaxed))?;
        out.flush()?;
    }
}

async fn ours(plan: &Plan, arrived: &Arrived, overrated: u64, congestion: CongestionControl) -> Result<()> {
    let (own, other) = if plan.sends { ("a", "b") } else { ("b", "a") };
    let peer = PeerConfig { name: other.parse()?, key: plan.peer_key.parse()?, address: Some(plan.remote) };
    let mut config = LinkConfig::new(own.parse()?, plan.listen, vec![peer]);
    config.rate = Rate::mbit(plan.rate_mbit * overrated);
    config.rtt = Duration::from_millis(plan.rtt_ms);
    config.congestion = congestion;
    config.idle_timeout = Duration::from_secs(20);
    let (link, mut events) = Link::open(config, &Identity::load(&plan.key_file)?).await?;
    let peer = link.peer(&other.parse()?).context("The peer is configured")?;
    peer.up().await?;
    let window_bytes = (3 * plan.held_bytes()).max(8 << 20);
    let carry = async {
        if plan.sends { send(&peer, window_bytes).await } else { receive(&peer, window_bytes, arrived).await }
    };
    tokio::select! {
        done = carry => done,
        () = async { while events.recv().await.is_some() {} } => bail!("The link was closed"),
    }
}

fn channel() -> BulkId {
    BulkId { migration: MigrationId(1), channel: Channel::Memory }
}

async fn send(peer: &PeerHandle, window_bytes: u64) -> Result<()> {
    let mut sender = peer.bulk_sender(channel(), window_bytes).await?;
    let chunk = bytes::Bytes::from(vec![0x5a; MAX_CHUNK]);
    loop {
        sender.send(chunk.clone()).await?;
    }
}

async fn receive(peer: &PeerHandle, window_bytes: u64, arrived: &Arrived) -> Result<()> {
    let mut receiver = peer.bulk_receiver(channel(), window_bytes).await?;
    while let Some(chunk) = receiver.recv().await {
        arrived.fetch_add(chunk.len() as u64, Ordering::Relaxed);
    }
    bail!("The channel was closed")
}

async fn tcp(plan: &Plan, arrived: &Arrived) -> Result<()> {
    let mut buffer = vec![0x5a; MAX_CHUNK];
    if !plan.sends {
        let listener = tokio::net::TcpListener::bind(plan.listen).await?;
        let (mut stream, _) = listener.accept().await?;
        loop {
            let length = stream.read(&mut buffer).await?;
            if length == 0 {
                bail!("The sender is gone");
            }
            arrived.fetch_add(length as u64, Ordering::Relaxed);
        }
    }
    let socket = tokio::net::TcpSocket::new_v4()?;
    let control = plan.sender.kernel_control().context("It is TCP")?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::TcpCongestion, &control.into())?;
    let mut stream = socket.connect(plan.remote).await?;
    loop {
        stream.write_all(&buffer).await?;
    }
}
