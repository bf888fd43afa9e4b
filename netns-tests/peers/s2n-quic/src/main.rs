//! One end of one transfer by s2n-quic with its BBR, for `cargo lab bench link`: it sends without end, or receives and says
//! ten times a second how many bytes of payload have arrived. It measures nothing and does not end by itself.
//!
//! ```text
//!  s2n-quic-peer send|receive LISTEN REMOTE HELD_BYTES RTT_MS      runs until it is killed
//! ```
//!
//! `HELD_BYTES` is what the path holds at its rate. All else is as in the bench's `quic.rs`: windows of three times that,
//! large socket buffers, chunks on short streams, a known packet size.

mod tls;

use std::env;
use std::io::Write as _;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use nix::sys::socket::{setsockopt, sockopt};
use s2n_quic::client::Connect;
use s2n_quic::provider::congestion_controller::Bbr;
use s2n_quic::provider::{io, limits::Limits};
use s2n_quic::{Client, Connection, Server};
use tokio::task::JoinSet;

const REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// As large as the gateway's largest.
const CHUNK_BYTES: usize = (1 << 20) - 1024;
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// With the headers of IPv4 and UDP: 1400 bytes of QUIC.
const MTU_BYTES: u16 = 1428;
/// As many chunks as the gateway has under way.
const MAX_STREAMS: u64 = 512;

/// What this end does.
#[derive(Debug, Clone, Copy)]
struct Plan {
    sends: bool,
    listen: SocketAddr,
    remote: SocketAddr,
    held_bytes: u64,
    rtt: Duration,
}

/// Counts what arrives.
type Arrived = Arc<AtomicU64>;

#[tokio::main]
async fn main() -> Result<()> {
    let plan = Plan::parse(env::args().skip(1)).context(
        "Call it as: s2n-quic-peer send|receive LISTEN REMOTE HELD_BYTES RTT_MS, as `cargo lab bench link` does",
    )?;
    let socket = socket(plan.listen)?;
    if plan.sends {
        return send(&plan, socket).await;
    }
    let arrived = Arrived::default();
    tokio::select! {
        done = receive(&plan, socket, &arrived) => done,
        reported = report(&arrived) => reported,
    }
}

impl Plan {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut next = |name: &str| arguments.next().with_context(|| format!("{name} is missing"));
        let sends = match next("send or receive")?.as_str() {
            "send" => true,
            "receive" => false,
            other => bail!("{other} is neither send nor receive"),
        };
        Ok(Self {
            sends,
            listen: next("LISTEN")?.parse().context("LISTEN is no address with a port")?,
            remote: next("REMOTE")?.parse().context("REMOTE is no address with a port")?,
            held_bytes: next("HELD_BYTES")?.parse().context("HELD_BYTES is no number")?,
            rtt: Duration::from_millis(next("RTT_MS")?.parse().context("RTT_MS is no number")?),
        })
    }

    fn limits(&self) -> Result<Limits> {
        let window_bytes = (3 * self.held_bytes).max(8 << 20);
        Ok(Limits::new()
            .with_unidirectional_data_window(STREAM_WINDOW_BYTES.into())?
            .with_data_window(window_bytes)?
            .with_max_send_buffer_size(STREAM_WINDOW_BYTES)?
            .with_max_open_local_unidirectional_streams(MAX_STREAMS)?
            .with_max_open_remote_unidirectional_streams(MAX_STREAMS)?
            .with_initial_round_trip_time(self.rtt)?)
    }
}

async fn send(plan: &Plan, socket: UdpSocket) -> Result<()> {
    let client = Client::builder()
        .with_tls(tls::client()?)?
        .with_io(io(socket)?)?
        .with_limits(plan.limits()?)?
        .with_congestion_controller(Bbr::default())?
        .start()?;
    let connection = client.connect(Connect::new(plan.remote).with_server_name("bench")).await?;
    let chunk = Bytes::from(vec![0x5a; CHUNK_BYTES]);
    let streams = (2 * plan.held_bytes / CHUNK_BYTES as u64 + 2).min(MAX_STREAMS);
    let mut sending = JoinSet::new();
    for _ in 0..streams {
        let (mut handle, chunk) = (connection.handle(), chunk.clone());
        sending.spawn(async move {
            loop {
                let mut stream = handle.open_send_stream().await?;
                stream.send(chunk.clone()).await?;
                stream.close().await?;
            }
        });
    }
    let ended: Result<()> = sending.join_next().await.context("Nothing is sent")??;
    ended
}

async fn receive(plan: &Plan, socket: UdpSocket, arrived: &Arrived) -> Result<()> {
    let mut server = Server::builder()
        .with_tls(tls::server()?)?
        .with_io(io(socket)?)?
        .with_limits(plan.limits()?)?
        .with_congestion_controller(Bbr::default())?
        .start()?;
    let connection = server.accept().await.context("The endpoint was closed")?;
    count(connection, arrived).await
}

async fn count(mut connection: Connection, arrived: &Arrived) -> Result<()> {
    while let Some(mut stream) = connection.accept_receive_stream().await? {
        let arrived = arrived.clone();
        tokio::spawn(async move {
            // A stream ends with its connection, which ends this process.
            while let Ok(Some(chunk)) = stream.receive().await {
                arrived.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
        });
    }
    bail!("The connection has ended")
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

fn socket(address: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(address).with_context(|| format!("Cannot listen on {address}"))?;
    setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES).context("Run it as root")?;
    setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES).context("Run it as root")?;
    Ok(socket)
}

fn io(socket: UdpSocket) -> Result<io::tokio::Provider> {
    let builder = io::tokio::Builder::default().with_rx_socket(socket)?;
    Ok(builder.with_max_mtu(MTU_BYTES)?.with_initial_mtu(MTU_BYTES)?.with_base_mtu(MTU_BYTES)?.build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read_and_what_is_missing_is_named() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>().into_iter();
        let plan = Plan::parse(words("send 10.0.0.1:1 10.0.0.2:2 37500000 300")).unwrap();
        assert!(plan.sends && plan.remote.port() == 2 && plan.rtt == Duration::from_millis(300), "{plan:?}");
        plan.limits().unwrap();
        let error = Plan::parse(words("receive 10.0.0.1:1")).unwrap_err();
        assert_eq!(error.to_string(), "REMOTE is missing");
        assert!(Plan::parse(words("both 10.0.0.1:1 10.0.0.2:2 1 1")).is_err());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn more_than_one_round_of_streams_arrives() {
        let socket = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let (near, far) = (socket(), socket());
        let (listen, remote) = (near.local_addr().unwrap(), far.local_addr().unwrap());
        let plan = Plan { sends: true, listen, remote, held_bytes: 0, rtt: Duration::from_millis(1) };
        let arrived = Arrived::default();
        let enough = async {
            while arrived.load(Ordering::Relaxed) < 5 * CHUNK_BYTES as u64 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(())
        };
        let done = tokio::select! {
            done = receive(&plan, far, &arrived) => done,
            done = send(&plan, near) => done,
            done = enough => done,
        };
        done.unwrap();
    }
}
