//! One end of our own tunnel: a process with the gateway's `Link` and `Tunnel`, wired as the daemon wires
//! them, in which a machine's address is away (the first host) or visits (the second).
//!
//! ```text
//!  lab bench-end PLAN.json      runs until it is killed
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result};
use gateway::daemon::LinkPath;
use gateway::identity::Identity;
use gateway::link::{Link, LinkConfig, PeerConfig};
use gateway::tunnel::{HoldRequest, Leaving, Tunnel, TunnelConfig, VisitRequest};
use longhaul_core::tunnel::handover::{Mac, Neighbour, NeighbourKind, NicHandover, Prefix};
use longhaul_core::tunnel::policy::PortKey;
use longhaul_core::units::Rate;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

use super::peers::spawn;
use super::place::{
    A, B, BRIDGE, GUEST, GUEST_MAC, GUEST_PORT, HOME_HOST, LOSSY_MBIT, Path as BenchPath, Place, ip,
};

const PORT: u16 = 4789;
/// More than any path here carries: the clean one is not to be paced.
const CLEAN_MBIT: u64 = 10_000;
/// What a path of 1500 bytes carries of UDP over IPv4.
const MTU_BYTES: u16 = 1472;

/// Arguments of one end.
#[derive(Debug, Clone, clap::Args)]
pub struct EndArguments {
    /// File with the plan, JSON
    plan: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    is_home: bool,
    key_file: PathBuf,
    peer_key: String,
    rate_mbit: u64,
}

/// Starts both ends in their namespaces.
pub(super) fn start(place: &Place, program: &Path, processes: &mut Vec<Child>) -> Result<()> {
    let rate_mbit = match place.path {
        BenchPath::Clean => CLEAN_MBIT,
        BenchPath::Lossy => LOSSY_MBIT,
    };
    let keys = [Identity::generate()?, Identity::generate()?];
    for (index, namespace) in [&place.a, &place.b].into_iter().enumerate() {
        let key_file = place.scratch().join(format!("longhaul-{index}.key"));
        keys[index].save(&key_file)?;
        let peer_key = keys[1 - index].public_key().to_string();
        let plan = Plan { is_home: index == 0, key_file, peer_key, rate_mbit };
        let file = place.scratch().join(format!("longhaul-{index}.json"));
        std::fs::write(&file, serde_json::to_vec(&plan)?)?;
        let mut command = Command::new(program);
        command.arg("bench-end").arg(file);
        processes.push(spawn(place, namespace, &mut command, &format!("longhaul-{index}.log"))?);
    }
    Ok(())
}

/// Runs one end until it is killed.
pub fn end_main(arguments: &EndArguments) -> Result<()> {
    let text = std::fs::read(&arguments.plan)
        .with_context(|| format!("Cannot read {}", arguments.plan.display()))?;
    let plan: Plan = serde_json::from_slice(&text).context("The plan is not valid")?;
    // As the daemon's.
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(plan))
}

async fn run(plan: Plan) -> Result<()> {
    let (own, other) = if plan.is_home { ("a", "b") } else { ("b", "a") };
    let (listen, remote) = if plan.is_home { (A, B) } else { (B, A) };
    let peer = PeerConfig {
        name: other.parse()?,
        key: plan.peer_key.parse()?,
        address: Some(SocketAddr::new(ip(remote), PORT)),
    };
    let mut config = LinkConfig::new(own.parse()?, SocketAddr::new(ip(listen), PORT), vec![peer]);
    config.rate = Rate::mbit(plan.rate_mbit);
    config.mtu_bytes = MTU_BYTES;
    let tunnel = Tunnel::start(TunnelConfig { persistent: false, ..TunnelConfig::default() }).await?;
    let (link, mut events) = Link::open(config, &Identity::load(&plan.key_file)?).await?;
    for peer in link.peers() {
        let path = Arc::new(LinkPath(peer.datagram_sender()));
        tunnel.add_peer(peer.name().clone(), path, peer.take_datagrams()).await?;
    }
    match plan.is_home {
        true => {
            tunnel.hold_begin(hold()?).await?;
            tunnel.hold_end_attract(key()?, Vec::new()).await?;
        }
        false => {
            tunnel.visit_prepare(visit()?).await?;
            tunnel.visit_resumed(key()?).await?;
        }
    }
    while events.recv().await.is_some() {}
    Ok(())
}

fn key() -> Result<PortKey> {
    Ok(PortKey { machine: "bench".parse()?, nic: "net0".parse()? })
}

fn hold() -> Result<HoldRequest> {
    Ok(HoldRequest {
        key: key()?,
        peer: "b".parse()?,
        mac: Mac(GUEST_MAC),
        from: Leaving::Home,
        addresses: vec![ip(GUEST)],
        port: GUEST_PORT.to_owned(),
        lan: BRIDGE.to_owned(),
    })
}

fn visit() -> Result<VisitRequest> {
    let lan = Prefix { addr: ip(GUEST), len: 24 };
    let router =
        Neighbour { addr: ip(HOME_HOST), mac: Mac([0x52, 0x54, 0, 0x90, 0, 1]), kind: NeighbourKind::Router };
    Ok(VisitRequest {
        key: key()?,
        peer: "a".parse()?,
        from: None,
        carried: Vec::new(),
        nic: NicHandover {
            nic: "net0".parse()?,
            mac: Mac(GUEST_MAC),
            home: vec![lan],
            neighbours: vec![router],
            home_prefixes: vec![lan],
            flows: Vec::new(),
        },
        others: Vec::new(),
        port: GUEST_PORT.to_owned(),
        lan: BRIDGE.to_owned(),
        care_of: Vec::new(),
    })
}
