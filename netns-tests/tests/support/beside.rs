//! What is there beside a client's own connections: ones that the guest opens, to the internet and to a neighbour at home,
//! its DHCP lease from that neighbour, QUIC.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use netns_tests::agent::{QUIC_PORT, RECORD_PORT, RELAY_PORT};
use netns_tests::scenario::scene::{Scene, VM, VM_NUMBER};
use netns_tests::scenario::traffic::Client;
use netns_tests::topology::NAME_SERVER;
use netns_tests::traffic::{CLOSE_AFTER_CUT_MS, RecordPlan, TrafficPlan};

use super::elsewhere::Elsewhere;
use super::lease::{Kind, Leases};
use super::quic::{QuicRecords, QuicReport};
use super::scenes::wait;

const LIMIT: Duration = Duration::from_secs(20);
/// The number of a neighbour in the home LAN; the DHCP server is there too.
pub const NEIGHBOUR: u8 = 67;
const LEASE_S: u32 = 3600;

/// All of it, at work.
pub struct Beside {
    elsewhere: Elsewhere,
    neighbour: Elsewhere,
    leases: Leases,
    quic: QuicRecords,
    opened: Vec<(String, Client)>,
}

impl Beside {
    /// Begins while the machine is at home. The guest needs a DHCP client.
    pub async fn start(scene: &Scene) -> Self {
        let (world, home) = (&scene.world, scene.home().unwrap());
        let spec = &world.site("a").unwrap().spec;
        let lan = world.add_lan_host("a", "lease", NEIGHBOUR).unwrap();
        let address = spec.address(NEIGHBOUR);
        let leases = Leases::serve(&lan, address, spec.address(VM_NUMBER), LEASE_S);
        let neighbour = Elsewhere::serve(&lan, SocketAddr::new(address.into(), RECORD_PORT));
        let elsewhere = Elsewhere::serve(&world.dns, SocketAddr::new(NAME_SERVER.into(), RECORD_PORT));
        let quic = QuicRecords::start(&world.client, SocketAddr::new(home, QUIC_PORT)).await;
        let mut beside = Self { elsewhere, neighbour, leases, quic, opened: Vec::new() };
        beside.goes_on(scene, "a", home, home).await;
        beside
    }

    /// The guest is at `site`. Asked at `asked`, it opens a connection, which comes from `from`, and one to its neighbour at
    /// home, which comes from its home address; its lease is renewed and QUIC goes on.
    pub async fn goes_on(&mut self, scene: &Scene, site: &str, asked: IpAddr, from: IpAddr) {
        let console = scene.gateway(site).unwrap().console(VM);
        let renewed = || {
            let text = std::fs::read_to_string(&console).unwrap_or_default();
            text.matches("obtained from").count()
        };
        let (renewals, answered) = (renewed(), self.quic.answered());
        let home = scene.home().unwrap();
        for (to, from) in [(&self.elsewhere, from), (&self.neighbour, home)] {
            let client = through(scene, asked, to.address).await;
            let what = format!("the guest's own, at {site}, asked at {asked}, from {from} to {}", to.address);
            assert_eq!(to.seen().last(), Some(&from), "{what}");
            self.opened.push((what, client));
        }
        wait("a lease that is renewed", LIMIT, || (renewed() > renewals + 1).then_some(())).await;
        wait("QUIC goes on", LIMIT, || (self.quic.answered() > answered + 10).then_some(())).await;
    }

    /// Ends it all and looks whether it had lived.
    pub async fn end(self, scene: &Scene) {
        let QuicReport { answered, longest, mtu_bytes } = self.quic.end().await;
        println!("QUIC: {answered} records, the longest took {longest:?}, {mtu_bytes} bytes at a time");
        let asked = self.leases.asked();
        let renewals: Vec<_> = asked.iter().skip_while(|asked| asked.kind != Kind::Renewal).collect();
        println!("DHCP: {} questions, {} from the first renewal on", asked.len(), renewals.len());
        let home = SocketAddr::new(scene.home().unwrap(), 68);
        assert!(
            renewals.iter().all(|asked| asked.kind == Kind::Renewal && asked.from == home),
            "the lease was lost: {asked:?}"
        );
        lived(self.opened).await;
    }
}

/// Ends connections of records and looks whether they had lived.
pub async fn lived(clients: Vec<(String, Client)>) {
    for (what, client) in clients {
        let record = client.finish().await.unwrap().record.unwrap();
        println!("{what}: {} records, silences {:?}", record.received, record.gaps);
        assert!(record.content_ok, "{what}: {record:?}");
    }
}

/// Records over a connection that the guest at `relay` opens to `to`.
pub async fn through(scene: &Scene, relay: IpAddr, to: SocketAddr) -> Client {
    let relay = SocketAddr::new(relay, RELAY_PORT);
    Client::start(&scene.world.client, records(to, Some(relay))).await.unwrap()
}

/// Records to `address`, at a leisurely pace.
pub fn records(address: SocketAddr, through: Option<SocketAddr>) -> TrafficPlan {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut plan = TrafficPlan::new(now.as_millis() as u64);
    plan.close_timeout_ms = CLOSE_AFTER_CUT_MS;
    plan.record = Some(RecordPlan { address, through, interval_ms: 50, gap_ms: 300 });
    plan
}
