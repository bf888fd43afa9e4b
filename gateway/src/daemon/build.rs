//! Makes the edges from the configuration. The only place that knows how each of them is configured.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use tokio::sync::mpsc;

use longhaul_core::tunnel::flows::HashKey;
use longhaul_core::tunnel::repair::{Incarnation, Treatment};
use longhaul_core::units::Rate;

use crate::api::server::ApiSocket;
use crate::config::{Config, CongestionChoice, UIDS};
use crate::dns::Names;
use crate::etcd::Registers;
use crate::hypervisor::{AcceleratorChoice, Hypervisor, HypervisorConfig, KernelPaths, UidRange};
use crate::identity::Identity;
use crate::journal::Journal;
use crate::link::{CongestionControl, DatagramSender, Link, LinkConfig, LinkEvent, PeerConfig};
use crate::migration::Edges;
use crate::tunnel::{DatagramPath, Tunnel, TunnelConfig};

/// What a daemon begins with.
pub(super) struct Opened {
    pub edges: Edges,
    pub link_events: mpsc::Receiver<LinkEvent>,
    pub api: ApiSocket,
}

/// Opens everything: journal, the API's socket, hypervisor, link, tunnel, names.
pub(super) async fn open(config: Config) -> anyhow::Result<Opened> {
    for folder in [&config.site.state_dir, &config.site.run_dir] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(folder)
            .with_context(|| format!("Cannot make {}", folder.display()))?;
    }
    let journal = Journal::open(&config.site.state_dir.join("journal.redb"))?;
    // After the journal, which no other gateway has open then.
    let api = config.site.api_socket();
    let api = ApiSocket::bind(&api).with_context(|| {
        format!("Cannot listen at {} for the command line; set site.api_socket to a path in a folder that is there", api.display())
    })?;
    let identity = Identity::load(&config.site.key_file).with_context(|| {
        format!("Cannot use {}; `longhaul key` makes a key", config.site.key_file.display())
    })?;
    let hypervisor = Hypervisor::new(hypervisor(&config)?)?;
    let names = config.dns.as_ref().map(Names::open).transpose()?.map(Arc::new);
    let etcd = config.etcd.as_ref().map(Registers::open).transpose()?.map(Arc::new);
    let tunnel_config = Arc::new(tunnel(&config));
    let tunnel = Tunnel::start((*tunnel_config).clone()).await.context("Cannot start the tunnel")?;
    let (link, link_events) = Link::open(link(&config)?, &identity).await.context("Cannot start the link")?;
    for peer in link.peers() {
        let path = Arc::new(LinkPath(peer.datagram_sender()));
        tunnel.add_peer(peer.name().clone(), path, peer.take_datagrams()).await?;
    }
    let edges = Edges {
        config: Arc::new(config),
        journal,
        hypervisor: Arc::new(hypervisor),
        link: Arc::new(link),
        tunnel,
        tunnel_config,
        names,
        etcd,
        start: Instant::now(),
    };
    Ok(Opened { edges, link_events, api })
}

fn hypervisor(config: &Config) -> anyhow::Result<HypervisorConfig> {
    let section = &config.hypervisor;
    let mut kernels = BTreeMap::new();
    for (name, kernel) in &config.kernel {
        let paths = KernelPaths { kernel: kernel.image.clone(), initrd: kernel.initrd.clone() };
        kernels.insert(name.parse().with_context(|| format!("kernel.{name}"))?, paths);
    }
    let accelerator = match section.accel.as_str() {
        "kvm" => AcceleratorChoice::Kvm,
        "tcg" => AcceleratorChoice::Tcg,
        // The configuration was checked: nothing else is left.
        _ => AcceleratorChoice::Auto,
    };
    Ok(HypervisorConfig {
        qemu: section.qemu.clone(),
        run_dir: config.site.run_dir.clone(),
        uids: (section.uid_base > 0).then_some(UidRange { first: section.uid_base, count: UIDS }),
        accelerator,
        allow_host_cpu: section.allow_host_cpu,
        kernels,
        uefi_code: section.uefi_code.clone(),
        ..HypervisorConfig::default()
    })
}

fn tunnel(config: &Config) -> TunnelConfig {
    let section = &config.tunnel;
    let mut tunnel = TunnelConfig { device: section.device.clone(), ..TunnelConfig::default() };
    tunnel.switches_file = Some(config.site.run_dir.join("tunnel-switches"));
    tunnel.tcp_flow_timeout = Duration::from_secs(section.idle_s);
    tunnel.max_flows = section.max_flows;
    tunnel.udp_flow_timeout = Duration::from_secs(section.udp_idle_s);
    tunnel.duplicate_silent = Duration::from_secs(section.duplicate_silent_s);
    tunnel.datapath.share.rate = Rate::mbit(section.machine_mbit);
    // The configuration was checked: 64 MiB at most.
    tunnel.datapath.share.burst_bytes = (section.machine_burst_kib << 10) as u32;
    tunnel.router_advertisements = Duration::from_secs(section.router_advertisements_s);
    tunnel.datapath.hold.max_bytes = (section.hold_kib << 10) as usize;
    let flows = &mut tunnel.datapath.flows;
    flows.tcp_idle = Duration::from_secs(section.idle_s);
    flows.tcp_closing = Duration::from_secs(section.closing_s);
    flows.udp_idle = Duration::from_secs(section.udp_idle_s);
    flows.other_idle = Duration::from_secs(section.other_idle_s);
    flows.one_way = Duration::from_secs(section.one_way_s);
    flows.max_flows = section.max_flows as usize;
    flows.quiet = Duration::from_secs(section.quiet_s);
    flows.limit = section.hold.limit();
    flows.hash_key = HashKey(rand::random());
    let repair_bytes = (section.repair_kib << 10) as usize;
    (tunnel.datapath.repair.max_sent_bytes, tunnel.datapath.repair.max_waiting_bytes) =
        (repair_bytes, repair_bytes);
    tunnel.datapath.incarnation = Incarnation(rand::random());
    let repair = |repaired: bool| if repaired { Treatment::Repair } else { Treatment::AtOnce };
    let policy = &mut tunnel.datapath.repair_policy;
    (policy.tcp, policy.udp, policy.other) =
        (repair(section.repair_tcp), repair(section.repair_udp), repair(section.repair_other));
    policy.udp_ports =
        section.repair_udp_ports.iter().map(|port| (*port..=*port, Treatment::Repair)).collect();
    tunnel
}

fn link(config: &Config) -> anyhow::Result<LinkConfig> {
    let section = &config.link;
    let mut peers = Vec::new();
    for peer in &config.peer {
        peers.push(PeerConfig {
            name: peer.name.clone(),
            key: peer.key.parse().with_context(|| format!("peer.{}.key", peer.name))?,
            address: peer.address,
        });
    }
    let mut link = LinkConfig::new(config.site.name.clone(), section.listen, peers);
    link.rate = Rate::mbit(section.rate_mbit);
    link.congestion = match section.congestion {
        CongestionChoice::Model => CongestionControl::Model,
        CongestionChoice::Fixed => CongestionControl::Fixed,
    };
    link.mtu_bytes = section.mtu_bytes;
    link.window_limit_bytes = section.window_mib << 20;
    link.udp_buffer_bytes = (section.socket_buffer_mib << 20) as usize;
    link.idle_timeout = Duration::from_secs(section.idle_timeout_s);
    Ok(link)
}

/// The link's datagrams, as the tunnel wants them.
pub struct LinkPath(pub DatagramSender);

impl DatagramPath for LinkPath {
    fn try_send(&self, datagram: Bytes) -> bool {
        self.0.try_send(datagram).is_ok()
    }

    fn max_len(&self) -> usize {
        self.0.max_len().unwrap_or(0)
    }

    fn rtt(&self) -> Option<Duration> {
        self.0.rtt()
    }
}
