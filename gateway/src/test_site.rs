//! A site for tests of what meets in `migration` and `daemon`: a journal, a link over loopback, and a tunnel that writes
//! down what it is asked for.
//!
//! Nothing of the host is changed, and there is neither a QEMU nor a name server that answers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dnsupdater::test_server::{Grant, TestServer, TestZone};
use dnsupdater::{Algorithm, Key, UpdaterConfig};
use longhaul_core::ids::{Epoch, MigrationId, SiteName};
use longhaul_core::machine::MachineDefinition;
use longhaul_core::migration::CommitMode;
use longhaul_core::migration::message::{MigrationMessage, Proposal};
use longhaul_core::wire::Message;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};

use crate::config::Config;
use crate::dns::Names;
use crate::hypervisor::{Hypervisor, HypervisorConfig};
use crate::identity::Identity;
use crate::journal::Journal;
use crate::link::{Link, LinkConfig, LinkEvent, PeerConfig};
use crate::migration::anchor::{Anchor, NameState};
use crate::migration::{Edges, MachineRow};
use crate::tunnel::{Tunnel, TunnelConfig};

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// A site, what its link hears and what its tunnel was asked for.
pub(crate) struct TestSite {
    /// What it works with.
    pub edges: Edges,
    /// What the link says.
    pub events: mpsc::Receiver<LinkEvent>,
    /// What the tunnel was asked for, in order.
    pub asked: watch::Receiver<Vec<String>>,
    folder: TempDir,
}

/// Another site: its name, its key and where it is dialled.
pub(crate) type Peer<'a> = (&'a str, &'a Identity, Option<SocketAddr>);

impl TestSite {
    /// Site `name` with these peers; its LAN is called `lan`.
    pub async fn open(name: &str, identity: &Identity, peers: &[Peer<'_>]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = Arc::new(config(name, &folder, peers));
        let peer_config = |(peer, key, address): &Peer<'_>| PeerConfig {
            name: peer.parse().unwrap(),
            key: key.public_key(),
            address: *address,
        };
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let peers = peers.iter().map(peer_config).collect();
        let (link, events) =
            Link::open(LinkConfig::new(name.parse().unwrap(), loopback, peers), identity).await.unwrap();
        let run_dir = folder.path().join("run");
        let hypervisor = HypervisorConfig { run_dir, ..HypervisorConfig::default() };
        let (tunnel, asked) = Tunnel::noted();
        let edges = Edges {
            journal: Journal::open(&folder.path().join("journal.redb")).unwrap(),
            hypervisor: Arc::new(Hypervisor::new(hypervisor).unwrap()),
            link: Arc::new(link),
            tunnel,
            tunnel_config: Arc::new(TunnelConfig::default()),
            names: None,
            etcd: None,
            start: Instant::now(),
            config,
        };
        Self { edges, events, asked, folder }
    }

    /// Sites a and b; b is dialled by a.
    pub async fn pair() -> (Self, Self) {
        let [key_a, key_b] = [(); 2].map(|()| Identity::generate().unwrap());
        let b = Self::open("b", &key_b, &[("a", &key_a, None)]).await;
        let mut a = Self::open("a", &key_a, &[("b", &key_b, Some(b.address()))]).await;
        a.up().await;
        (a, b)
    }

    /// Where its link listens.
    pub fn address(&self) -> SocketAddr {
        self.edges.link.local_addr().unwrap()
    }

    /// The folder of its disks.
    pub fn pool(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// The next message of another site.
    pub async fn heard(&mut self) -> (SiteName, Message) {
        loop {
            match self.event().await {
                LinkEvent::Control { peer, message } => return (peer, message),
                LinkEvent::Up { .. }
                | LinkEvent::Down { .. }
                | LinkEvent::Unreachable { .. }
                | LinkEvent::Refused { .. } => {}
            }
        }
    }

    /// The next message about a migration.
    pub async fn heard_of_migration(&mut self) -> (MigrationId, MigrationMessage) {
        loop {
            if let (_, Message::Migration { id, body }) = self.heard().await {
                return (id, MigrationMessage::from_wire(&body).unwrap());
            }
        }
    }

    /// Waits for the link to a peer.
    pub async fn up(&mut self) {
        while !matches!(self.event().await, LinkEvent::Up { .. }) {}
    }

    async fn event(&mut self) -> LinkEvent {
        let event = tokio::time::timeout(PATIENCE, self.events.recv()).await;
        event.expect("an event in time").expect("the link is open")
    }
}

/// Machine web1 with one disk, and one NIC on `lan` whose home address is 198.51.100.10.
pub(crate) fn definition() -> MachineDefinition {
    let text = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n\
        [[disks]]\nname = \"root\"\nsize_bytes = 1048576\npci = \"03.0\"\n\
        [[nics]]\nname = \"lan\"\nmac = \"52:54:00:00:00:01\"\nlan = \"lan\"\npci = \"05.0\"\n\
        home = [\"198.51.100.10/24\"]\n";
    toml::from_str(text).unwrap()
}

/// What site a says of a machine of its own, before its first move.
pub(crate) fn proposal(definition: MachineDefinition) -> Proposal {
    Proposal {
        definition,
        home_site: "a".parse().unwrap(),
        hypervisor: "7.2".into(),
        epoch: Epoch(0),
        running: true,
        commit: CommitMode::Confirmed,
        nics: Vec::new(),
        carried: Vec::new(),
    }
}

/// The same at its home, which is this site.
pub(crate) fn machine_row(edges: &Edges) -> MachineRow {
    MachineRow {
        definition: definition(),
        images: Vec::new(),
        home_site: edges.site().clone(),
        came_from: None,
        adopted: None,
        care_of: Vec::new(),
        carried: Vec::new(),
        over: Vec::new(),
        handover: None,
        wanted: true,
        settled_in: None,
        ttl_before_s: None,
    }
}

/// What it left when it went to `peer`: no packets, but its name, whose TTL was an hour.
pub(crate) fn anchor(peer: &str) -> Anchor {
    Anchor {
        vm: "web1".parse().unwrap(),
        epoch: Epoch(1),
        peer: peer.parse().unwrap(),
        nics: Vec::new(),
        care_of: Vec::new(),
        name: Some("web1.vm.example".to_owned()),
        moves: Vec::new(),
        ttl_s: 3600,
        names: NameState::Pending,
        since_unix_ms: 0,
        tell: Vec::new(),
        runs_there: true,
        ended: false,
    }
}

/// A name server that does not answer.
pub(crate) fn silent_names() -> Names {
    let key = Key::new("site-a".parse().unwrap(), Algorithm::HmacSha256, vec![7; 32]).unwrap();
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    let config = UpdaterConfig::new(vec![nobody], "vm.example".parse().unwrap(), key);
    Names::at(UpdaterConfig { retries: 0, timeout: Duration::from_millis(50), ..config }, 5)
}

/// A name server of the zone `vm.example` with these records in it, and who changes them.
pub(crate) async fn names_of(records: &str) -> (TestServer, Names) {
    let key = Key::new("site-a".parse().unwrap(), Algorithm::HmacSha256, vec![7; 32]).unwrap();
    let text = format!(
        "$TTL 300\n@ IN SOA ns1 admin 1 3600 600 86400 5\n@ IN NS ns1\nns1 IN A 127.0.0.1\n{records}"
    );
    let zone = TestZone { origin: "vm.example".parse().unwrap(), text };
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = TestServer::start(loopback, &[zone], &[Grant::everything(key.clone())]).await.unwrap();
    let config = UpdaterConfig::new(vec![server.address()], "vm.example".parse().unwrap(), key);
    (server, Names::at(config, 5))
}

fn config(name: &str, folder: &TempDir, peers: &[Peer<'_>]) -> Config {
    let path = folder.path().display();
    let mut text = format!(
        "[site]\nname = \"{name}\"\nstate_dir = \"{path}\"\nrun_dir = \"{path}/run\"\n\
         [storage]\npool = \"{path}\"\n[lan.lan]\nbridge = \"br-lan\"\n"
    );
    for (peer, key, _) in peers {
        text +=
            &format!("[[peer]]\nname = \"{peer}\"\nkey = \"{}\"\nmay_receive = [\"*\"]\n", key.public_key());
    }
    Config::parse(std::path::Path::new("site.toml"), &text).unwrap()
}
