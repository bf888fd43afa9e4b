//! One machine moves while a client uses it in every way there is; then the path between the sites narrows, is cut, and
//! the gateways are started anew. Two machines that talk to each other move to one site and to different ones, from behind
//! NATs whose tables are lost and whose addresses change. What must live, lives; what no transport repeats is not lost either.
//!
//! One scene for each. Machines that move more than once are `journeys`' affair.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

#[path = "support/advertiser.rs"]
mod advertiser;
#[path = "support/beside.rs"]
mod beside;
#[path = "support/elsewhere.rs"]
mod elsewhere;
#[path = "support/lease.rs"]
mod lease;
#[path = "support/probes.rs"]
mod probes;
#[path = "support/quic.rs"]
mod quic;
#[path = "support/scenes.rs"]
mod scenes;
#[path = "support/strangers.rs"]
mod strangers;
#[path = "support/upload.rs"]
mod upload;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gateway::api::types::{MigrationView, Progressing};
use longhaul_core::migration::Stage;
use netns_tests::agent::{DOWNLOAD_PORT, IDLE_PORT, RECORD_PORT, UDP_PORT, UPLOAD_PORT};
use netns_tests::scenario::options::SceneOptions;
use netns_tests::scenario::scene::{SECOND_VM, Scene, VM};
use netns_tests::scenario::traffic::Client;
use netns_tests::topology::{CLIENT, CLIENT6, Watch};
use netns_tests::traffic::{CLOSE_AFTER_CUT_MS, DownloadPlan, IdlePlan, RecordPlan, TrafficPlan};
use netns_tests::wan::PacketMatch;

use advertiser::Advertiser;
use beside::{Beside, lived, through};
use elsewhere::Elsewhere;
use probes::{Answers, Datagrams, Pings, Requests};
use scenes::{build, close, state, state_of, turn, wait};
use strangers::Strangers;
use upload::Upload;

const SECOND: Duration = Duration::from_secs(1);
const MOVE_LIMIT: Duration = Duration::from_secs(120);
/// The path that is narrowed behind the core: below the guest's 1500 bytes.
const NARROW_MTU: u32 = 1300;
/// For how long the guest may use the IPv6 router of its home after it has heard it: that one is not heard at b.
const ROUTER_LIFETIME: Duration = Duration::from_secs(15);
const DOWNLOAD_BYTES: u64 = 12 << 20;
const DOWNLOAD_RATE: u64 = 256 << 10;

/// Connections that were opened at `to`: records both ways, a download that lasts, one that is silent until the end.
async fn connect(scene: &Scene, to: IpAddr) -> Client {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut plan = TrafficPlan::new(now.as_millis() as u64);
    plan.close_timeout_ms = CLOSE_AFTER_CUT_MS;
    let address = SocketAddr::new(to, RECORD_PORT);
    plan.record = Some(RecordPlan { address, through: None, interval_ms: 10, gap_ms: 200 });
    plan.idle = Some(IdlePlan { address: SocketAddr::new(to, IDLE_PORT) });
    plan.download = Some(DownloadPlan {
        address: SocketAddr::new(to, DOWNLOAD_PORT),
        bytes: DOWNLOAD_BYTES,
        rate_bytes_per_s: DOWNLOAD_RATE,
        seed: 7,
    });
    Client::start(&scene.world.client, plan).await.unwrap()
}

/// What came to the guest's tap before packets were held, and was not read when the guest was stopped, stays in the old
/// QEMU: where the host is so busy that QEMU does not run for some milliseconds, a datagram or two of the last moment. All
/// others are answered.
fn assert_only_what_the_guest_held_is_missing(missing: &[(u64, SystemTime)], view: &MigrationView) {
    let stopping = view.stages.iter().find(|stage| stage.stage == Stage::StopAndCopy).unwrap();
    let since_stopping = |at: &SystemTime| {
        at.duration_since(UNIX_EPOCH).unwrap().as_millis() as i64 - stopping.start_ms as i64
    };
    let at_another_time = |(_, at): &&(u64, SystemTime)| !(-100..200).contains(&since_stopping(at));
    assert_eq!(missing.iter().filter(at_another_time).collect::<Vec<_>>(), [] as [&(u64, SystemTime); 0]);
    assert!(missing.len() <= 3, "{missing:?}");
}

/// Waits for two seconds' worth of answers: all that was sent before has had its time.
async fn later(datagrams: &Datagrams) {
    let before = datagrams.tally().answered;
    let goes_on = || (datagrams.tally().answered > before + 100).then_some(());
    wait("datagrams go on", 20 * SECOND, goes_on).await;
}

/// Between two datagrams of one flow.
const BEAT: Duration = Duration::from_millis(20);
/// What a gateway that is started anew may cost a flow, on a busy machine.
const RESTART: Duration = Duration::from_secs(3);

/// The path between the sites is cut and heals; then both gateways end without warning and are started anew, and each of
/// that is a short silence of `datagrams`.
async fn cut_and_restart(scene: &mut Scene, datagrams: &Datagrams) {
    scene.world.wan.cut().unwrap();
    // The length of the cut, not a wait for anything.
    tokio::time::sleep(5 * SECOND).await;
    scene.world.wan.heal().unwrap();
    scene.wait_for_link().await.unwrap();
    later(datagrams).await;
    for site in ["b", "a"] {
        let before = datagrams.missing().len();
        let gateway = if site == "b" { &mut scene.b } else { &mut scene.a };
        gateway.kill().unwrap();
        gateway.launch().await.unwrap();
        scene.wait_for_link().await.unwrap();
        later(datagrams).await;
        let silent = BEAT * (datagrams.missing().len() - before) as u32;
        println!("the gateway at {site} was started anew: {silent:?} of datagrams are lost");
        assert!(silent < RESTART, "{site}: {silent:?}");
    }
    assert_eq!(state(&scene.b).as_deref(), Some("running"));
}

/// Packets of the same IP version as `like` that the core had to refuse because they must not be split, and said so
/// (`FragFails`, RFC 4293).
fn refused_as_too_large(scene: &Scene, like: IpAddr) -> u64 {
    let text = scene.world.net.output("cat", &["/proc/net/snmp", "/proc/net/snmp6"]).unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Ip: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut fields = names.split(' ').zip(values.split(' '));
    let v4 = fields.find(|(name, _)| *name == "FragFails").unwrap().1;
    let v6 = text.lines().find_map(|line| line.strip_prefix("Ip6FragFails")).unwrap();
    if like.is_ipv6() { v6.trim() } else { v4 }.parse().unwrap()
}

/// What the machine always reaches through the tunnel in one scene: the half of its home LAN with `beside`'s neighbour.
const HOME_PREFIX: &str = "198.51.100.0/25";
/// The number of a host in the other half.
const OUTSIDE: u8 = 130;

/// A host in the home LAN, but outside of [`HOME_PREFIX`].
struct Outside(Elsewhere);

impl Outside {
    fn serve(scene: &Scene) -> Self {
        let lan = scene.world.add_lan_host("a", "outside", OUTSIDE).unwrap();
        let address = scene.world.site("a").unwrap().spec.address(OUTSIDE);
        Self(Elsewhere::serve(&lan, SocketAddr::new(address.into(), RECORD_PORT)))
    }

    /// Asked at `asked`, the guest opens a connection to it, which comes from `from`.
    async fn called(&self, scene: &Scene, asked: IpAddr, from: IpAddr) -> (String, Client) {
        let client = through(scene, asked, self.0.address).await;
        let what = format!("the guest's own to {}, from {from}", self.0.address);
        assert_eq!(self.0.seen().last(), Some(&from), "{what}");
        (what, client)
    }
}

/// What no transport repeats, to one of the machine's addresses.
struct Unrepeated {
    to: IpAddr,
    small: Datagrams,
    /// Three fragments each way, at 1500 bytes.
    large: Datagrams,
    pings: Pings,
}

impl Unrepeated {
    fn start(scene: &Scene, to: IpAddr) -> Self {
        let client = &scene.world.client;
        let udp = SocketAddr::new(to, UDP_PORT);
        let small = Datagrams::start(client, udp, 200, BEAT);
        let large = Datagrams::start(client, udp, 4000, Duration::from_millis(100));
        Self { to, small, large, pings: Pings::start(client, to) }
    }

    fn datagrams(&self) -> [(&str, &Datagrams); 2] {
        [("datagrams", &self.small), ("fragmented datagrams", &self.large)]
    }

    async fn lived_through(&self, scene: &Scene, view: &MigrationView) {
        let Self { to, pings, .. } = self;
        later(&self.small).await;
        for (what, datagrams) in self.datagrams() {
            let (tally, missing) = (datagrams.tally(), datagrams.missing());
            println!("{what} to {to} during the move: {tally:?}, missing {missing:?}");
            scene.keep_logs();
            assert!(tally.answered > 100, "{what} to {to}: {tally:?}");
            assert_only_what_the_guest_held_is_missing(&missing, view);
        }
        self.pinged(3, "after the move").await;
        println!("pings to {to} were silent for {:?} at most", pings.longest_silence());
        assert!(pings.longest_silence() < RESTART, "{to}: {:?}", pings.longest_silence());
    }

    async fn pinged(&self, more: u64, when: &str) {
        let before = self.pings.answered();
        let answered = || (self.pings.answered() > before + more).then_some(());
        wait(&format!("pings of {} {when}", self.to), 20 * SECOND, answered).await;
    }

    /// All of it goes on, and then ends.
    async fn end(self) {
        let to = self.to;
        for (what, datagrams) in self.datagrams() {
            let before = datagrams.tally().answered;
            let goes_on = || (datagrams.tally().answered > before + 20).then_some(());
            wait(&format!("{what} to {to} after the restarts"), 20 * SECOND, goes_on).await;
            let tally = datagrams.end();
            assert_eq!((tally.corrupt, tally.doubled), (0, 0), "{what} to {to}: {tally:?}");
        }
        self.pinged(10, "after the restarts").await;
        self.pings.end();
    }
}

/// The guest stood still from then, until then at least.
fn pause(view: &MigrationView) -> std::ops::Range<SystemTime> {
    let stage = view.stages.iter().find(|stage| stage.stage == Stage::StopAndCopy).unwrap();
    let at = |ms| UNIX_EPOCH + Duration::from_millis(ms);
    at(stage.start_ms)..at(stage.end_ms.unwrap())
}

/// Short connections by the old address were opened all the time, in the pause too, and each was answered.
fn assert_none_was_refused(requests: &Answers, view: &MigrationView) {
    let pause = pause(view);
    let in_pause = requests.opened.iter().filter(|at| pause.contains(*at)).count();
    let Answers { opened, took, answered, slowest, failed } = requests;
    println!(
        "short connections by the old address: {answered} of {} answered in {took:?}, {:.0} a second, \
         {in_pause} opened in the pause of {:?}, the slowest took {slowest:?}",
        opened.len(),
        requests.rate(),
        pause.end.duration_since(pause.start).unwrap(),
    );
    assert_eq!(*failed, [] as [String; 0]);
    assert_eq!(*answered, opened.len() as u64);
    assert!(requests.rate() > 150.0, "{:.0} a second", requests.rate());
    assert!(in_pause > 0, "none was opened in the pause");
}

/// The client's connections to the machine's address still use what both ends had agreed on: timestamps, selective
/// acknowledgements, window scaling.
fn assert_they_use_their_options(scene: &Scene, to: IpAddr) {
    let told = scene.world.client.output("ss", &["-tineOH", "dst", &to.to_string()]).unwrap();
    let lived: Vec<&str> = told.lines().filter(|line| line.starts_with("ESTAB")).collect();
    assert!(lived.len() >= 3, "{told}");
    for line in lived {
        assert!(line.contains(" ts sack ") && line.contains(" wscale:"), "{line}");
    }
}

/// The machine moves to site b.
async fn moved_to_b(scene: &Scene) -> MigrationView {
    let id = scene.begin_move().await.unwrap();
    let view = scene.wait_move(&id, MOVE_LIMIT).await.unwrap();
    assert_eq!(view.progressing, Progressing::Moved, "{:?}\n{}", view.reason, scene.a.log_tail());
    view
}

/// Another address of the client's. What the guest has learnt of the path to one says nothing of the other.
const SECOND_CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);

/// From here on the path from the core to the client takes less than the guest sends, which must hear of that by each of
/// its ways: through the tunnel in both IP versions, and by its care-of address. Gives connections opened now.
async fn connect_over_a_narrow_path(scene: &Scene) -> Vec<(String, Client)> {
    let (home, care_of) = (scene.home().unwrap(), scene.care_of("b").unwrap());
    let (client, core) = (&scene.world.client, Ipv4Addr::new(192, 0, 2, 1));
    let second = format!("addr add {SECOND_CLIENT}/24 dev eth0");
    client.ip(&[second, format!("route add {care_of}/32 via {core} src {SECOND_CLIENT}")]).unwrap();
    let ways: [(IpAddr, IpAddr); 3] =
        [(CLIENT.into(), home), (CLIENT6.into(), scene.home6().unwrap()), (SECOND_CLIENT.into(), care_of)];
    let mut clients = Vec::new();
    for (from, to) in ways {
        let len = if from.is_ipv6() { 128 } else { 32 };
        let narrow = format!("route add {from}/{len} dev client0 mtu lock {NARROW_MTU}");
        // What is open already may be refused as well, and then the guest sends nothing too large any more.
        let before = refused_as_too_large(scene, from);
        scene.world.net.ip(&[narrow]).unwrap();
        clients.push((format!("from {from} to {to}, over a narrow path"), connect(scene, to).await));
        let refused = || (refused_as_too_large(scene, from) > before).then_some(());
        wait(&format!("a packet to {from} that the narrow path refused"), 20 * SECOND, refused).await;
    }
    clients
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_traffic_lives_through_a_move_a_narrow_path_a_cut_and_restarts() {
    let Some(_turn) = turn().await else { return };
    let options = SceneOptions {
        ttl_s: 5,
        quiet_s: 60,
        strict_guest: true,
        dhcp_client: true,
        dual_stack: true,
        router_advertised: true,
        tunnel: vec![format!("home_prefixes = [\"{HOME_PREFIX}\"]")],
        ..SceneOptions::small("continuity")
    };
    let mut scene = build(options).await;
    let outside = Outside::serve(&scene);
    let strangers = Strangers::settle(&scene, beside::NEIGHBOUR);
    let advertiser = Advertiser::start(&scene.world.site("a").unwrap().router, ROUTER_LIFETIME);
    scene.start_guest().await.unwrap();
    advertiser.heard_by_the_guest(&scene).await;
    let (home, care_of) = (scene.home().unwrap(), scene.care_of("b").unwrap());
    let mut beside = Beside::start(&scene).await;
    let mut outsiders = vec![outside.called(&scene, home, home).await];
    let old = connect(&scene, home).await;
    let upload = Upload::start(&scene.world.client, SocketAddr::new(home, UPLOAD_PORT)).await;
    let requests =
        Requests::start(&scene.world.client, SocketAddr::new(home, IDLE_PORT), Duration::from_millis(5));
    let unrepeated = [home, scene.home6().unwrap()].map(|to| Unrepeated::start(&scene, to));

    let view = moved_to_b(&scene).await;
    let arrived = Instant::now();
    let uploaded = upload.sent();
    later(&unrepeated[0].small).await;
    assert_none_was_refused(&requests.end(), &view);
    for each in &unrepeated {
        each.lived_through(&scene, &view).await;
    }
    beside.goes_on(&scene, "b", home, care_of).await;
    beside.goes_on(&scene, "b", care_of, care_of).await;
    outsiders.extend(strangers.call(care_of).await);
    outsiders.push(outside.called(&scene, home, care_of).await);

    let narrow = connect_over_a_narrow_path(&scene).await;
    later(&unrepeated[0].small).await;
    cut_and_restart(&mut scene, &unrepeated[0].small).await;
    assert_they_use_their_options(&scene, home);

    assert!(arrived.elapsed() > ROUTER_LIFETIME, "what its home's router said could still hold");
    let all = upload.end().await.unwrap();
    println!("an upload: {uploaded} bytes until the machine had moved, {all} in all");
    assert!(uploaded > 1 << 20 && all > uploaded + (1 << 20), "{uploaded} of {all}");
    for each in unrepeated {
        each.end().await;
    }
    beside.end(&scene).await;
    lived(outsiders).await;
    strangers.are_reached_from_the_host_alone(&scene).await;
    for (what, client) in [("opened before the move".to_owned(), old)].into_iter().chain(narrow) {
        whole(&what, client).await;
    }
    scene.keep_logs();
    close(scene);
}

/// Ends a client's connections of every kind and looks whether they had lived.
async fn whole(what: &str, client: Client) {
    let report = client.finish().await.unwrap();
    let (record, idle, download) = (report.record.unwrap(), report.idle.unwrap(), report.download.unwrap());
    println!("{what}: {} records, silences {:?}", record.received, record.gaps);
    assert!(record.content_ok, "{what}: {:?}", record.error);
    assert!(idle.content_ok, "{what}: {idle:?}");
    assert!(download.content_ok, "{what}: {download:?}");
}

/// Where site a's NAT puts its gateway after its provider has given it another address.
const RENUMBERED: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 250), 40_000);

async fn moved(scene: &Scene, vm: &str, from: &str, to: &str) {
    let id = scene.begin_move_of(vm, from, to).await.unwrap();
    let view = scene.wait_move_from(from, &id, MOVE_LIMIT).await.unwrap();
    scene.keep_logs();
    assert_eq!(
        view.progressing,
        Progressing::Moved,
        "{vm}: {:?}\n{}",
        view.reason,
        scene.gateway(from).unwrap().log_tail()
    );
    assert_eq!(state_of(scene.gateway(to).unwrap(), vm).as_deref(), Some("running"));
}

/// The two machines change places, each on its way while the other one is.
async fn crossed(scene: &Scene) {
    let (first, second) =
        tokio::try_join!(scene.begin_move_of(VM, "b", "c"), scene.begin_move_of(SECOND_VM, "c", "b"))
            .unwrap();
    let (first, second) = tokio::try_join!(
        scene.wait_move_from("b", &first, MOVE_LIMIT),
        scene.wait_move_from("c", &second, MOVE_LIMIT)
    )
    .unwrap();
    for (vm, view, from, to) in [(VM, first, "b", "c"), (SECOND_VM, second, "c", "b")] {
        scene.keep_logs();
        assert_eq!(view.progressing, Progressing::Moved, "{vm}: {:?}", view.reason);
        let (source, destination) = (scene.gateway(from).unwrap(), scene.gateway(to).unwrap());
        assert_eq!(
            (state_of(source, vm), state_of(destination, vm).as_deref()),
            (None, Some("running")),
            "{vm}"
        );
    }
}

/// Connections that both machines open to each other, by their home addresses.
async fn each_other(scene: &Scene, when: &str) -> Vec<(String, Client)> {
    let called = [scene.home().unwrap(), scene.second_home().unwrap()];
    each_other_by(scene, called, when).await
}

/// The same by the addresses `called`.
async fn each_other_by(scene: &Scene, called: [IpAddr; 2], when: &str) -> Vec<(String, Client)> {
    let (first, second) = (scene.home().unwrap(), scene.second_home().unwrap());
    let to = |address| SocketAddr::new(address, RECORD_PORT);
    vec![
        (format!("{VM} to {SECOND_VM}, {when}"), through(scene, first, to(called[1])).await),
        (format!("{SECOND_VM} to {VM}, {when}"), through(scene, second, to(called[0])).await),
    ]
}

/// The address that a machine has at site b besides its home address.
fn care_of_at_b(scene: &Scene, vm: &str) -> IpAddr {
    let rules = scene.world.site("b").unwrap().host.output("nft", &["list", "ruleset"]).unwrap();
    let home = if vm == VM { scene.home() } else { scene.second_home() }.unwrap();
    let translated = format!(" dnat ip to {home}");
    let rule = rules.lines().find(|line| line.ends_with(&translated)).unwrap_or_else(|| panic!("{rules}"));
    rule.trim_end_matches(&translated).split("ip daddr ").nth(1).unwrap().parse().unwrap()
}

/// `change` happens to the path of `datagrams`: at most for two seconds none is answered.
async fn outlives(what: &str, datagrams: &Datagrams, change: impl FnOnce() -> anyhow::Result<()>) {
    let before = datagrams.missing().len();
    change().unwrap();
    later(datagrams).await;
    let lost = datagrams.missing().len() - before;
    println!("{what}: {lost} datagrams of one every 20 ms are lost");
    assert!(lost < 100, "{what}: {lost}");
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_that_talk_to_each_other_move_to_one_site_and_to_two_from_behind_nats_that_change() {
    let Some(_turn) = turn().await else { return };
    let scene = build(SceneOptions {
        ttl_s: 5,
        quiet_s: 60,
        third_site: true,
        behind_nat: vec!["a".into(), "b".into()],
        dirty_memory_kib_per_s: 256,
        ..SceneOptions::small("nats")
    })
    .await;
    tokio::try_join!(scene.start_guest(), scene.start_second_guest()).unwrap();
    let (home, second) = (scene.home().unwrap(), scene.second_home().unwrap());
    let client = &scene.world.client;
    let mut clients = each_other(&scene, "opened while both were at home").await;
    let to_first = Datagrams::start(client, SocketAddr::new(home, UDP_PORT), 200, Duration::from_millis(20));
    let to_second =
        Datagrams::start(client, SocketAddr::new(second, UDP_PORT), 200, Duration::from_millis(20));

    moved(&scene, VM, "a", "b").await;
    clients.extend(each_other(&scene, "opened while one was away").await);
    moved(&scene, SECOND_VM, "a", "b").await;
    clients.extend(each_other(&scene, "opened while both were at one site").await);
    let called = [VM, SECOND_VM].map(|vm| care_of_at_b(&scene, vm));
    lived(each_other_by(&scene, called, "by their addresses there").await).await;
    moved(&scene, SECOND_VM, "b", "c").await;
    clients.extend(each_other(&scene, "opened while they were at two sites").await);
    for (what, client) in &clients {
        assert_eq!(client.lost(), None, "{what}");
    }

    let forget = |site| scene.world.forget_translations(site);
    outlives("a NAT forgets, between two", &to_first, || forget("a").and_then(|()| forget("b"))).await;
    let c = scene.world.site("c").unwrap().host_address();
    let renumbered = scene.world.watch(&Watch {
        name: "renumbered".into(),
        place: scene.world.net.clone(),
        from_device: Some("up-a".into()),
        to_device: Some("up-c".into()),
        packets: PacketMatch {
            source: Some((*RENUMBERED.ip()).into()),
            ..PacketMatch::udp_port(RENUMBERED.port())
        },
    });
    let renumbered = renumbered.unwrap();
    outlives("a NAT gets another address", &to_second, || scene.world.renumber("a", c.into(), RENUMBERED))
        .await;
    assert!(renumbered.tally().unwrap().packets > 100, "it has another address");
    crossed(&scene).await;
    clients.extend(each_other(&scene, "opened after they had changed places").await);
    scene.keep_logs();
    lived(clients).await;
    for (what, datagrams) in [(VM, &to_first), (SECOND_VM, &to_second)] {
        let tally = datagrams.end();
        println!("{what}: {tally:?}");
        assert_eq!((tally.corrupt, tally.doubled), (0, 0), "{what}: {tally:?}");
    }
    close(scene);
}
