//! The guest, its service, the traffic against it, and the report: each on its own, without a gateway.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hickory_proto::op::Message;
use hickory_proto::rr::{RData, Record};
use netns_tests::agent::UDP_PORT;
use netns_tests::agent::client::{ask, fetch};
use netns_tests::agent::control::AgentStatus;
use netns_tests::agent::dirt::{self, DirtVerdict};
use netns_tests::agent::log::LogVerdict;
use netns_tests::agent::memory::MemoryVerdict;
use netns_tests::agent::pattern;
use netns_tests::agent::worker::unix_ms;
use netns_tests::guest::boot::DOWN;
use netns_tests::guest::tree::{INDEX_HTML, STATIC_FILE, STATIC_SEED};
use netns_tests::guest::verify::{BlockOwners, Owner, root_disk};
use netns_tests::guest::{BootOptions, GuestDisks, GuestImage, ImageSpec, Nic, READY, disk};
use netns_tests::report::{Report, Round, Series, Stage};
use netns_tests::traffic::command::ClientArguments;
use netns_tests::traffic::{Event, Order, Outcome, TrafficPlan, TrafficReport, client_main, run, run_in};
use nix::sched::{CloneFlags, setns};
use tokio::sync::mpsc::{Receiver, Sender, channel};

const AGENT: &str = env!("CARGO_BIN_EXE_guest-agent");
const SECOND: Duration = Duration::from_secs(1);
/// Generous: the machine that tests may be busy with other things, and the guest has no hardware help.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// A network namespace with one tap, removed when it goes.
struct Namespace {
    name: String,
}

impl Namespace {
    fn new(purpose: &str, taps: &[(&str, &str)]) -> Self {
        let namespace = Self { name: format!("lhguest{}{purpose}", std::process::id()) };
        tool("ip", &["netns", "add", &namespace.name]);
        namespace.ip(&["link", "set", "lo", "up"]);
        for (tap, address) in taps {
            namespace.ip(&["tuntap", "add", tap, "mode", "tap"]);
            namespace.ip(&["addr", "add", address, "dev", tap]);
            namespace.ip(&["link", "set", tap, "up"]);
        }
        namespace
    }

    fn ip(&self, arguments: &[&str]) {
        tool("ip", &[&["-n", self.name.as_str()], arguments].concat());
    }

    fn enter(&self) -> impl FnOnce() -> std::io::Result<()> + Send + 'static {
        let path = Path::new("/run/netns").join(&self.name);
        move || setns(File::open(path)?, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
    }

    fn run<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> R {
        let enter = self.enter();
        thread::spawn(move || {
            enter().unwrap();
            work()
        })
        .join()
        .unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A running QEMU, killed when it goes.
struct Machine {
    process: Child,
    console: PathBuf,
    monitor: PathBuf,
    started: Instant,
}

impl Machine {
    fn start(
        folder: &Path,
        namespace: &Namespace,
        image: &GuestImage,
        disks: &GuestDisks,
        boot: &BootOptions,
        taps: &[&str],
    ) -> Self {
        let (console, monitor) = (folder.join("console"), folder.join("qmp"));
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &namespace.name, "qemu-system-x86_64"]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-machine",
            "pc-q35-7.2,accel=tcg",
        ]);
        command.args(["-cpu", "qemu64", "-m", "256"]);
        command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initrd);
        command.arg("-append").arg(boot.cmdline());
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        for (index, path) in [Some(&disks.root), disks.second.as_ref()].into_iter().flatten().enumerate() {
            command.arg("-drive").arg(format!("if=none,id=d{index},format=raw,file={}", path.display()));
            command.arg("-device").arg(format!("virtio-blk-pci,drive=d{index},addr=0x{}", index + 3));
        }
        for (index, tap) in taps.iter().enumerate() {
            command.arg("-netdev").arg(format!("tap,id=n{index},ifname={tap},script=no,downscript=no"));
            command.arg("-device").arg(format!(
                "virtio-net-pci,netdev=n{index},addr=0x{},mac=52:54:00:00:00:0{}",
                index + 8,
                index + 1
            ));
        }
        let process = command.stdin(Stdio::null()).spawn().unwrap();
        Self { process, console, monitor, started: Instant::now() }
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// Waits until the console has said `text` for the `times`th time.
    fn wait_for(&mut self, text: &str, times: usize) -> Duration {
        let begun = Instant::now();
        loop {
            if self.console().matches(text).count() >= times {
                return self.started.elapsed();
            }
            let ended = self.process.try_wait().unwrap();
            let late = begun.elapsed() > BOOT_LIMIT;
            assert!(ended.is_none() && !late, "no {text:?}; ended: {ended:?}; console:\n{}", self.console());
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn reset(&self) {
        self.monitor("{\"execute\":\"system_reset\"}");
    }

    fn press_power_button(&self) {
        self.monitor("{\"execute\":\"system_powerdown\"}");
    }

    fn monitor(&self, command: &str) {
        use std::io::{BufRead, BufReader, Write};
        let stream = UnixStream::connect(&self.monitor).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut stream = stream;
        lines.next().unwrap().unwrap();
        for line in ["{\"execute\":\"qmp_capabilities\"}", command] {
            writeln!(stream, "{line}").unwrap();
            while !lines.next().unwrap().unwrap().contains("\"return\"") {}
        }
    }

    fn wait_for_end(&mut self) {
        let begun = Instant::now();
        while self.process.try_wait().unwrap().is_none() {
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "QEMU did not end; console:\n{}",
                self.console()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Answers every question with an address that can be changed.
struct NameServer {
    second: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
    address: SocketAddr,
}

impl NameServer {
    fn start(socket: UdpSocket, first: IpAddr, then: IpAddr, ttl_s: u32) -> Self {
        let (second, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let address = socket.local_addr().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let asked = Arc::new(AtomicU64::new(0));
        let (switched, stopped, counter) = (Arc::clone(&second), Arc::clone(&stop), Arc::clone(&asked));
        let thread = thread::spawn(move || {
            let mut datagram = [0; 1024];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, peer)) = socket.recv_from(&mut datagram) else { continue };
                counter.fetch_add(1, Ordering::Relaxed);
                let question = Message::from_vec(&datagram[..length]).unwrap();
                let IpAddr::V4(address) = (if switched.load(Ordering::Relaxed) { then } else { first })
                else {
                    continue;
                };
                let name = question.queries[0].name().clone();
                let mut answer = question.into_response();
                answer.add_answer(Record::from_rdata(name, ttl_s, RData::A(address.into())));
                socket.send_to(&answer.to_vec().unwrap(), peer).unwrap();
            }
        });
        Self { second, stop, asked, thread: Some(thread), address }
    }

    fn switch(&self) {
        self.second.store(true, Ordering::Relaxed);
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// The service as an ordinary process, killed when it goes.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn tool(name: &str, arguments: &[&str]) {
    let output = Command::new(name).args(arguments).output().unwrap();
    assert!(output.status.success(), "{name} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn needs_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    let ready = root && Path::new("/dev/net/tun").exists();
    if !ready {
        println!("skipped: root and /dev/net/tun are needed");
    }
    !ready
}

fn guest() -> IpAddr {
    "10.77.0.2".parse().unwrap()
}

fn other() -> IpAddr {
    "10.77.0.3".parse().unwrap()
}

fn wait_until(what: &str, limit: Duration, mut reached: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !reached() {
        assert!(begun.elapsed() < limit, "{what} did not come");
        thread::sleep(Duration::from_millis(50));
    }
}

fn next_event(events: &mut Receiver<Event>, wanted: impl Fn(&Event) -> bool) -> Event {
    loop {
        let event = events.blocking_recv().expect("the client ended before");
        if wanted(&event) {
            return event;
        }
    }
}

#[test]
fn the_image_is_built_once_and_then_found_in_the_cache() {
    let spec = ImageSpec::new(AGENT);
    let first = GuestImage::ensure(&spec).unwrap();
    let second = GuestImage::ensure(&spec).unwrap();
    println!("image: first {:?} (cached: {}), then {:?}", first.took, first.cached, second.took);
    assert!(second.cached);
    assert_eq!(first.kernel_sha256, second.kernel_sha256);
    let work = tempfile::tempdir().unwrap();
    let disks = second.copy_disks(work.path()).unwrap();
    disk::check(&disks.root).unwrap();
    let owners = BlockOwners::read(&disks.root).unwrap();
    let dirt =
        (0..spec.disk_bytes / 4096).filter(|block| matches!(owners.owner(*block), Owner::Dirt(_))).count();
    assert_eq!(dirt as u64, spec.dirt_bytes / 4096);
}

#[test]
fn a_root_disk_too_small_for_its_content_is_refused_before_anything_is_built() {
    let spec = ImageSpec { disk_bytes: 64 << 20, ..ImageSpec::new(AGENT) };
    let error = GuestImage::ensure(&spec).unwrap_err();
    assert!(error.to_string().contains("at least 224 MiB"), "{error}");
}

#[test]
fn a_guest_serves_everything_and_keeps_its_log_over_a_reset_and_a_clean_end() {
    if needs_root() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let image = GuestImage::ensure(&ImageSpec::new(AGENT)).unwrap();
    let disks = image.copy_disks(work.path()).unwrap();
    let namespace = Namespace::new("a", &[("tap0", "10.77.0.1/24")]);
    let mut nic = Nic::new("eth0", guest(), 24, Some("10.77.0.1".parse().unwrap()));
    nic.addresses.push((other(), 24));
    let boot = BootOptions { nics: vec![nic], ..BootOptions::default() };
    let mut machine = Machine::start(work.path(), &namespace, &image, &disks, &boot, &["tap0"]);
    println!("booted in {:?}", machine.wait_for(READY, 1));

    web_server_answers(&namespace);
    let report = traffic_flows(&namespace);
    let before: AgentStatus = namespace.run(|| ask(guest(), "/status", 5 * SECOND)).unwrap();
    assert!(before.errors.is_empty() && before.log_last > 20 && before.disk_written_bytes > 0);
    assert_eq!(report.idle.unwrap().boot_id.unwrap(), before.boot_id);
    assert_eq!(report.boot_ids.keys().collect::<Vec<_>>(), [&before.boot_id]);

    machine.reset();
    machine.wait_for(READY, 2);
    own_state_is_sound(&namespace, &before);
    let answer = namespace.run(|| fetch((guest(), 7000).into(), "/poweroff", 5 * SECOND)).unwrap();
    assert_eq!(answer, b"\"poweroff\"");
    machine.wait_for_end();
    assert!(machine.console().contains(&format!("{DOWN} disks=clean")), "{}", machine.console());
    let (verdict, _) = root_disk(&disks.root, work.path()).unwrap();
    println!("disk: {verdict:?}");
    assert!(verdict.sound() && verdict.dirt.rewritten > 0 && verdict.log.boots == 2, "{verdict:?}");
}

fn web_server_answers(namespace: &Namespace) {
    let index = namespace.run(|| fetch((guest(), 80).into(), "/", 5 * SECOND)).unwrap();
    assert_eq!(index, INDEX_HTML.as_bytes());
    let file = namespace.run(|| fetch((guest(), 80).into(), STATIC_FILE.0, 20 * SECOND)).unwrap();
    assert!(file == pattern::stream_bytes(STATIC_SEED, STATIC_FILE.1));
    let echo = namespace.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(5 * SECOND)).unwrap();
        socket.send_to(b"hello", (guest(), UDP_PORT)).unwrap();
        let mut datagram = [0; 16];
        let length = socket.recv(&mut datagram).unwrap();
        datagram[..length].to_vec()
    });
    assert_eq!(echo, b"hello");
}

fn traffic_flows(namespace: &Namespace) -> TrafficReport {
    let socket = namespace.run(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
    let names = NameServer::start(socket, guest(), other(), 1);
    let plan = TrafficPlan::new(unix_ms())
        .with_old_connections(guest(), 3 << 20, 1 << 20)
        .with_requests("web1.example", names.address);
    let (orders, ordered) = channel(8);
    let (told, mut events) = channel(4096);
    let client = run_in(namespace.enter(), plan, ordered, told).unwrap();
    next_event(&mut events, |event| matches!(event, Event::Ready { .. }));
    thread::sleep(SECOND);
    names.switch();
    next_event(&mut events, |event| matches!(event, Event::NameChanged(change) if change.address == other()));
    orders.blocking_send(Order::Close).unwrap();
    next_event(&mut events, |event| matches!(event, Event::Closed { .. }));
    orders.blocking_send(Order::Finish).unwrap();
    next_event(&mut events, |event| matches!(event, Event::Report(_)));
    let report = client.join().unwrap().unwrap();
    traffic_is_right(&report);
    // With a TTL of one second, a resolver that honours it asks once a second and no more.
    let seconds = (report.end_ms - report.start_ms) / 1000;
    let asked = names.asked.load(Ordering::Relaxed);
    assert!((2..=seconds + 2).contains(&asked), "{asked} questions in {seconds} s");
    report
}

fn traffic_is_right(report: &TrafficReport) {
    let connections = report.connections();
    assert!(connections.content_ok, "{report:?}");
    assert_eq!((connections.before, connections.survived, connections.reset), (3, 3, 0));
    assert_eq!(report.outcomes.keys().collect::<Vec<_>>(), [&Outcome::Ok], "{:?}", report.outcomes);
    assert!(report.http().requests > 10 && report.first_direct_ms(guest()).is_some());
    let record = report.record.as_ref().unwrap();
    println!(
        "records: {} sent, {} received, longest gap {} ms",
        record.sent, record.received, record.longest_gap_ms
    );
    assert!(record.received > 50);
}

fn own_state_is_sound(namespace: &Namespace, before: &AgentStatus) {
    let log: LogVerdict = namespace.run(|| ask(guest(), "/log/verify", 20 * SECOND)).unwrap();
    assert!(log.sound() && log.last >= before.log_last && log.boots == 2, "{log:?}");
    let status = || -> AgentStatus { namespace.run(|| ask(guest(), "/status", 5 * SECOND)).unwrap() };
    let first = status();
    assert_ne!(first.boot_id, before.boot_id);
    wait_until("a growing log", 10 * SECOND, || status().log_last > first.log_last + 5);
    let dirt: DirtVerdict = namespace.run(|| ask(guest(), "/disk/verify", 60 * SECOND)).unwrap();
    assert!(dirt.sound() && dirt.rewritten > 0, "{dirt:?}");
    let memory: MemoryVerdict = namespace.run(|| ask(guest(), "/memory/verify", 60 * SECOND)).unwrap();
    assert_eq!((memory.pages, memory.mismatched), (8192, 0));
}

#[test]
fn a_second_disk_and_a_second_interface_come_up_and_the_power_button_ends_the_guest() {
    if needs_root() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let spec = ImageSpec { second_disk_bytes: Some(128 << 20), ..ImageSpec::new(AGENT) };
    let image = GuestImage::ensure(&spec).unwrap();
    let disks = image.copy_disks(work.path()).unwrap();
    let namespace = Namespace::new("b", &[("tap0", "10.77.0.1/24"), ("tap1", "fd77::1/64")]);
    let second: IpAddr = "fd77::2".parse().unwrap();
    let boot = BootOptions {
        nics: vec![Nic::new("eth0", guest(), 24, None), Nic::new("52:54:00:00:00:02", second, 64, None)],
        sysctls: vec![("net.ipv4.tcp_retries2".into(), "9".into())],
        agent: vec!["--log-per-s".into(), "50".into()],
        ..BootOptions::default()
    };
    let mut machine = Machine::start(work.path(), &namespace, &image, &disks, &boot, &["tap0", "tap1"]);
    println!("two disks, two interfaces: booted in {:?}", machine.wait_for(READY, 1));
    let mut last = None;
    wait_until("an answer over IPv6", 30 * SECOND, || {
        last = namespace.run(move || ask::<AgentStatus>(second, "/status", SECOND)).ok();
        last.as_ref().is_some_and(|status| status.second_log_last > Some(50))
    });
    let log: LogVerdict = namespace.run(|| ask(guest(), "/second-log/verify", 5 * SECOND)).unwrap();
    assert!(log.sound() && log.records > 0);
    machine.press_power_button();
    machine.wait_for_end();
    assert!(machine.console().contains(&format!("{DOWN} disks=clean")), "{}", machine.console());
    disk::check(disks.second.as_ref().unwrap()).unwrap();
}

#[test]
fn a_killed_guest_leaves_a_disk_whose_every_changed_block_is_accounted_for() {
    if needs_root() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let image = GuestImage::ensure(&ImageSpec::new(AGENT)).unwrap();
    let disks = image.copy_disks(work.path()).unwrap();
    let namespace = Namespace::new("c", &[("tap0", "10.77.0.1/24")]);
    let boot = BootOptions {
        nics: vec![Nic::new("eth0", guest(), 24, None)],
        agent: ["--disk-kib-per-s", "2048", "--log-per-s", "100"].map(str::to_owned).to_vec(),
        ..BootOptions::default()
    };
    let mut machine = Machine::start(work.path(), &namespace, &image, &disks, &boot, &["tap0"]);
    machine.wait_for(READY, 1);
    wait_until("a hundred dirty blocks", 60 * SECOND, || {
        let status = namespace.run(|| ask::<AgentStatus>(guest(), "/status", 5 * SECOND));
        status.is_ok_and(|status| status.disk_written_bytes > 2 << 20)
    });
    drop(machine);
    let (verdict, owners) = root_disk(&disks.root, work.path()).unwrap();
    assert!(verdict.sound() && verdict.dirt.rewritten > 100 && verdict.log.records > 10, "{verdict:?}");
    let (before, after) = (fs::read(&image.root_template).unwrap(), fs::read(&disks.root).unwrap());
    let mut changed = BTreeMap::<String, u64>::new();
    for (block, (old, new)) in (0..).zip(before.chunks(4096).zip(after.chunks(4096))) {
        if old != new {
            let owner = format!("{:?}", owners.owner(block));
            *changed.entry(owner.split('(').next().unwrap().to_owned()).or_default() += 1;
        }
    }
    println!("changed blocks by owner: {changed:?}");
    assert!(changed["Log"] > 0, "{changed:?}");
    assert_eq!(changed["Dirt"], verdict.dirt.rewritten - verdict.dirt.unfinished);
}

#[test]
fn a_guest_without_a_root_disk_says_so_and_powers_off() {
    if needs_root() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let image = GuestImage::ensure(&ImageSpec::new(AGENT)).unwrap();
    let disks = image.copy_disks(work.path()).unwrap();
    fs::write(&disks.root, vec![0; 1 << 20]).unwrap();
    let namespace = Namespace::new("d", &[]);
    let mut machine = Machine::start(work.path(), &namespace, &image, &disks, &BootOptions::default(), &[]);
    machine.wait_for("LONGHAUL-GUEST FAILED cannot mount /dev/vda", 1);
    machine.wait_for_end();
}

/// What the test below starts as a process of its own: nothing unless it finds a plan in its environment.
#[test]
fn client_process() {
    let Some(plan) = std::env::var_os("LAB_TEST_PLAN") else { return };
    client_main(&ClientArguments { plan: plan.into() }).unwrap();
}

#[test]
fn the_client_runs_as_a_process_that_takes_words_and_gives_lines() {
    use std::io::{BufRead, BufReader, Write};
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("plan.json");
    fs::write(&path, serde_json::to_vec(&TrafficPlan::new(unix_ms())).unwrap()).unwrap();
    let mut client = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "client_process", "--nocapture"])
        .env("LAB_TEST_PLAN", &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    client.stdin.take().unwrap().write_all(b"report\nfinish\n").unwrap();
    let reports = BufReader::new(client.stdout.take().unwrap())
        .lines()
        .filter(|line| matches!(serde_json::from_str(line.as_ref().unwrap()), Ok(Event::Report(_))))
        .count();
    assert!(client.wait().unwrap().success());
    assert_eq!(reports, 2);
}

#[test]
fn the_client_reports_lost_connections_and_failed_names_instead_of_hanging() {
    let work = tempfile::tempdir().unwrap();
    dirt::create(work.path(), 1 << 20).unwrap();
    // Below the ports that the kernel gives away.
    let offset = 1_000 + u16::try_from(std::process::id() % 20_000).unwrap();
    let mut agent = start_agent(work.path(), offset);
    let at = |port: u16| SocketAddr::new("127.0.0.1".parse().unwrap(), port + offset);
    wait_until("the service", 10 * SECOND, || fetch(at(7000), "/status", SECOND).is_ok());
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut plan = TrafficPlan::new(unix_ms())
        .with_old_connections(at(0).ip(), 1 << 30, 1 << 20)
        .with_requests("web1.example", silent.local_addr().unwrap());
    plan.record.as_mut().unwrap().address = at(7001);
    plan.idle.as_mut().unwrap().address = at(7002);
    plan.download.as_mut().unwrap().address = at(7003);
    plan.http.as_mut().unwrap().timeout_ms = 500;
    let (orders, ordered) = channel(8);
    let (told, mut events): (Sender<Event>, _) = channel(4096);
    let client = run_in(|| Ok(()), plan, ordered, told).unwrap();
    next_event(&mut events, |event| matches!(event, Event::Ready { .. }));
    agent.0.kill().unwrap();
    next_event(
        &mut events,
        |event| matches!(event, Event::Lost { connection, .. } if connection == "record"),
    );
    orders.blocking_send(Order::Finish).unwrap();
    let drain = thread::spawn(move || while events.blocking_recv().is_some() {});
    let report = client.join().unwrap().unwrap();
    drain.join().unwrap();
    let connections = report.connections();
    assert_eq!(
        (connections.before, connections.survived, connections.content_ok),
        (3, 0, false),
        "{report:?}"
    );
    assert!(report.http().requests > 0 && report.http().failed == report.http().requests);
}

fn start_agent(state: &Path, offset: u16) -> Agent {
    let child = Command::new(AGENT)
        .arg("--state")
        .arg(state)
        .args(["--memory-mib", "1", "--port-offset", &offset.to_string()])
        .spawn()
        .unwrap();
    Agent(child)
}

#[test]
fn an_order_to_finish_ends_a_client_that_has_nothing_to_do() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (orders, ordered) = channel(1);
    let (told, _events) = channel(16);
    orders.try_send(Order::Finish).unwrap();
    let report = runtime.block_on(run(TrafficPlan::new(unix_ms()), ordered, told)).unwrap();
    assert_eq!((report.connections_planned, report.requests), (0, 0));
}

#[test]
fn a_report_comes_back_as_it_was_and_its_page_shows_every_promise() {
    let mut report = Report::new("round-trip");
    report.stages.push(Stage { stage: "2 pre-copy".into(), start_ms: 0, end_ms: None });
    report.rounds.push(Round { bytes: 1 << 20, pages: 256, ms: 90 });
    report.downtime_ms = Some(81.5);
    report.promise("exactly one copy runs, at b", true, "a: none, b: running");
    report.promise("a <b> & c", false, "3 \"records\" lost");
    let folder = tempfile::tempdir().unwrap();
    let written = report.write(folder.path(), &Series::default()).unwrap();
    assert_eq!(Report::read(&written.join("report.json")).unwrap(), report);
    let page = fs::read_to_string(written.join("report.html")).unwrap();
    for text in [
        "exactly one copy runs, at b",
        "a &lt;b&gt; &amp; c",
        "3 &quot;records&quot; lost",
        "not every promise held",
    ] {
        assert!(page.contains(text), "{text}");
    }
    for outside in ["http://", "https://", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn a_report_of_another_version_or_with_other_fields_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    let mut value = serde_json::to_value(Report::new("x")).unwrap();
    value["schema"] = 2.into();
    fs::write(&path, value.to_string()).unwrap();
    assert!(Report::read(&path).unwrap_err().to_string().contains("version 2"));
    value["extra"] = 1.into();
    fs::write(&path, value.to_string()).unwrap();
    assert!(Report::read(&path).is_err());
}
