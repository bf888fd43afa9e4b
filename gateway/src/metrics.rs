//! Every metric the gateway exports, in one place, for Prometheus to read at `/metrics`.
//!
//! The page is made from the same state that the status shows when it is asked for; nothing is counted
//! twice and no global registry exists.

use longhaul_core::tunnel::flows::{FlowCounts, HeldBy};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// One link's figures.
#[derive(Debug, Clone)]
pub struct LinkFigures {
    /// The peer.
    pub peer: String,
    /// A connection is up.
    pub up: bool,
    /// Round-trip time in seconds.
    pub rtt_s: f64,
    /// The shortest round-trip time of late in seconds.
    pub min_rtt_s: f64,
    /// What the path is believed to carry, in bytes of UDP payload per second; zero if unknown.
    pub bandwidth: u64,
    /// UDP payload sent.
    pub sent_bytes: u64,
    /// UDP payload received.
    pub received_bytes: u64,
}

/// Everything the page shows.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Links.
    pub links: Vec<LinkFigures>,
    /// Machines that this site owns and that run.
    pub machines_running: u64,
    /// Machines that this site owns, that nobody stopped, and whose QEMU is gone.
    pub machines_crashed: u64,
    /// Migrations under way.
    pub migrations_running: u64,
    /// Those of them that have something to tell their operator, such as a guest that stands still.
    pub migrations_with_notices: u64,
    /// Machines whose connections are held here.
    pub anchors: u64,
    /// Name servers that do not have a name that moved yet, for each name.
    pub names_behind: u64,
    /// Addresses of machines that left which other hosts use.
    pub address_conflicts: u64,
    /// Connections of machines that left.
    pub flows: u64,
    /// Those that are heard from one end only.
    pub flows_one_way: u64,
    /// What holds the tunnel of each NIC that left: machine and NIC.
    pub held: Vec<(String, String, HeldBy)>,
    /// Packets beyond a machine's share of the tunnel, by machine.
    pub over_share: Vec<(String, u64)>,
    /// Guests' packets sent to peers.
    pub tunnel_packets_out: u64,
    /// Guests' packets received from peers.
    pub tunnel_packets_in: u64,
    /// Guests' packets dropped, by reason.
    pub tunnel_dropped: Vec<(&'static str, u64)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Peer {
    peer: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Machine {
    machine: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HeldFlows {
    machine: String,
    nic: String,
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Held {
    machine: String,
    nic: String,
    by: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Dropped {
    reason: &'static str,
}

/// The metrics page in OpenMetrics text.
pub fn page(figures: &Figures) -> String {
    let mut registry = Registry::with_prefix("longhaul");
    gauge(&mut registry, "machines_running", "Machines that run here", figures.machines_running);
    let crashed = "Machines of this site whose QEMU is gone although nobody stopped them";
    gauge(&mut registry, "machines_crashed", crashed, figures.machines_crashed);
    gauge(&mut registry, "migrations_running", "Migrations under way", figures.migrations_running);
    let noticed =
        "Migrations under way that tell their operator something, such as that the guest stands still";
    gauge(&mut registry, "migrations_with_notices", noticed, figures.migrations_with_notices);
    gauge(&mut registry, "anchors", "Machines that left and whose connections pass here", figures.anchors);
    let behind =
        "Name servers that do not have the new addresses of a machine that moved, for each such machine";
    gauge(&mut registry, "names_behind", behind, figures.names_behind);
    let conflicts = "Addresses of machines that left which other hosts use";
    gauge(&mut registry, "address_conflicts", conflicts, figures.address_conflicts);
    gauge(&mut registry, "flows", "Connections of machines that left", figures.flows);
    let one_way = "Connections of machines that left which are heard from one end only";
    gauge(&mut registry, "flows_one_way", one_way, figures.flows_one_way);
    let over_share = Family::<Machine, Gauge>::default();
    for (machine, packets) in &figures.over_share {
        over_share.get_or_create(&Machine { machine: machine.clone() }).set(*packets as i64);
    }
    let over = "Packets that did not travel because the machine had had its share of the tunnel";
    registry.register("tunnel_packets_over_share", over, over_share);
    gauge(&mut registry, "tunnel_packets_out", "Guests' packets sent to peers", figures.tunnel_packets_out);
    gauge(
        &mut registry,
        "tunnel_packets_in",
        "Guests' packets received from peers",
        figures.tunnel_packets_in,
    );
    let dropped = Family::<Dropped, Gauge>::default();
    for (reason, packets) in &figures.tunnel_dropped {
        dropped.get_or_create(&Dropped { reason }).set(*packets as i64);
    }
    registry.register("tunnel_packets_dropped", "Guests' packets dropped", dropped);
    register_held(&mut registry, &figures.held);
    let up = Family::<Peer, Gauge>::default();
    let rtt = Family::<Peer, Gauge<f64, std::sync::atomic::AtomicU64>>::default();
    let min_rtt = Family::<Peer, Gauge<f64, std::sync::atomic::AtomicU64>>::default();
    let bandwidth = Family::<Peer, Gauge>::default();
    let sent = Family::<Peer, Gauge>::default();
    let received = Family::<Peer, Gauge>::default();
    for link in &figures.links {
        let peer = Peer { peer: link.peer.clone() };
        up.get_or_create(&peer).set(link.up.into());
        rtt.get_or_create(&peer).set(link.rtt_s);
        min_rtt.get_or_create(&peer).set(link.min_rtt_s);
        bandwidth.get_or_create(&peer).set(link.bandwidth as i64);
        sent.get_or_create(&peer).set(link.sent_bytes as i64);
        received.get_or_create(&peer).set(link.received_bytes as i64);
    }
    registry.register("link_up", "1 while a connection to the peer is up", up);
    registry.register("link_rtt_seconds", "Round-trip time to the peer", rtt);
    registry.register("link_min_rtt_seconds", "Shortest round-trip time to the peer of late", min_rtt);
    let estimated = "What the path to the peer is believed to carry; 0 while that is unknown";
    registry.register("link_estimated_bytes_per_second", estimated, bandwidth);
    registry.register("link_sent_bytes", "UDP payload sent to the peer since the start", sent);
    registry.register("link_received_bytes", "UDP payload received from the peer since the start", received);
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => text,
        Err(error) => format!("# {error}\n"),
    }
}

/// What each tunnel waits for, as `longhaul flows` says it.
fn register_held(registry: &mut Registry, held: &[(String, String, HeldBy)]) {
    let flows = Family::<HeldFlows, Gauge>::default();
    let left = Family::<Held, Gauge>::default();
    let pending = Family::<Machine, Gauge>::default();
    for (machine, nic, held) in held {
        let FlowCounts { tcp_opening, tcp_open, tcp_closing, udp, other, closed: _ } = held.flows;
        let kinds = [
            ("tcp_opening", tcp_opening),
            ("tcp_open", tcp_open),
            ("tcp_closing", tcp_closing),
            ("udp", udp),
            ("other", other),
        ];
        for (kind, count) in kinds {
            let labels = HeldFlows { machine: machine.clone(), nic: nic.clone(), kind };
            flows.get_or_create(&labels).set(count as i64);
        }
        let waits = [
            ("closed_flows", Some(held.linger_left)),
            ("untracked_flows", Some(held.untracked_left)),
            ("quiet", Some(held.quiet_left)),
            ("names", held.names_left),
            ("limit", held.limit_left),
        ];
        for (by, time) in waits {
            let Some(time) = time else { continue };
            let labels = Held { machine: machine.clone(), nic: nic.clone(), by };
            left.get_or_create(&labels).set(time.as_secs() as i64);
        }
        pending.get_or_create(&Machine { machine: machine.clone() }).set(held.names_left.is_none().into());
    }
    registry.register("held_flows", "Connections that hold the tunnel of a machine that left", flows);
    let help = "How long what else holds it will; at the limit it ends whatever is left";
    registry.register("held_left_seconds", help, left);
    let help =
        "1 while the name of a machine that left has not moved, or nobody knows when old answers expire";
    registry.register("held_by_name", help, pending);
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge: Gauge = Gauge::default();
    gauge.set(value as i64);
    registry.register(name, help, gauge);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_page_names_unit_and_peer() {
        let link = LinkFigures {
            peer: "b".into(),
            up: true,
            rtt_s: 0.1,
            min_rtt_s: 0.09,
            bandwidth: 12_000_000,
            sent_bytes: 7,
            received_bytes: 9,
        };
        let over_share = vec![("web1".to_owned(), 3)];
        let held_by = HeldBy {
            flows: FlowCounts { tcp_open: 4, ..FlowCounts::default() },
            linger_left: Duration::ZERO,
            untracked_left: Duration::ZERO,
            names_left: None,
            quiet_left: Duration::from_secs(60),
            limit_left: None,
            released: false,
        };
        let held = vec![("web1".to_owned(), "net0".to_owned(), held_by)];
        let tunnel_dropped = vec![("hold_full", 5)];
        let figures =
            Figures { links: vec![link], anchors: 2, over_share, held, tunnel_dropped, ..Figures::default() };
        let text = page(&figures);
        for line in [
            "longhaul_tunnel_packets_dropped{reason=\"hold_full\"} 5",
            "longhaul_held_flows{machine=\"web1\",nic=\"net0\",kind=\"tcp_open\"} 4",
            "longhaul_held_left_seconds{machine=\"web1\",nic=\"net0\",by=\"quiet\"} 60",
            "longhaul_held_by_name{machine=\"web1\"} 1",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(!text.contains("by=\"limit\""), "there is none: {text}");
        assert!(text.contains("longhaul_tunnel_packets_over_share{machine=\"web1\"} 3"), "{text}");
        assert!(text.contains("longhaul_link_rtt_seconds{peer=\"b\"} 0.1"), "{text}");
        let estimated = "longhaul_link_estimated_bytes_per_second{peer=\"b\"} 12000000";
        assert!(text.contains(estimated), "{text}");
        assert!(text.contains("longhaul_link_min_rtt_seconds{peer=\"b\"} 0.09"), "{text}");
        assert!(text.contains("longhaul_anchors 2") && text.ends_with("# EOF\n"), "{text}");
    }
}
