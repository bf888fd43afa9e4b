//! The emulated WAN against real packets. Each test makes its own namespaces and removes them; without root it is
//! skipped. The tests of one process take turns, since each of them measures time on shared cores.

#![allow(
    clippy::unwrap_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use netns_tests::cleanup::Lab;
use netns_tests::wan::{
    Direction, Emulator, Measured, PacketClass, PacketMatch, Wan, WanEnd, WanProfile, WanSpec, measure,
};
use nix::sys::socket::{setsockopt, sockopt};

const NEAR: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1));
const FAR: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 2));

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Two namespaces and a userspace WAN between them; the WAN ends before the lab removes the namespaces.
struct Line {
    wan: Wan,
    lab: Lab,
}

impl Line {
    fn build(profile: &WanProfile, classes: Vec<PacketClass>) -> Result<Self> {
        Self::build_with(Emulator::Userspace, profile, classes)
    }

    fn build_with(emulator: Emulator, profile: &WanProfile, classes: Vec<PacketClass>) -> Result<Self> {
        let lab = Lab::start()?;
        let end = |role: &str| -> Result<WanEnd> {
            let namespace = lab.namespace(role)?;
            namespace.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
            Ok(WanEnd { namespace, device: "wan".to_owned() })
        };
        let (near, far) = (end("near")?, end("far")?);
        let profile = profile.clone();
        let wan = Wan::build(WanSpec { near, far, profile, classes, emulator })?;
        wan.near().namespace.ip(&["addr add 198.18.0.1/30 dev wan"])?;
        wan.far().namespace.ip(&["addr add 198.18.0.2/30 dev wan"])?;
        Ok(Self { wan, lab })
    }

    fn close(self) {
        drop(self.wan);
        let left = self.lab.close();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn not_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return false;
    }
    println!("skipped: network namespaces need root");
    true
}

fn measured(rate_mbit: f64, rtt_ms: u64, loss: f64) -> Result<Measured> {
    let profile = WanProfile::symmetric(rate_mbit, Duration::from_millis(rtt_ms), loss);
    let line = Line::build(&profile, Vec::new())?;
    let measured = measure(&line.wan, &profile, NEAR, FAR)?;
    println!("asked {rate_mbit} Mbit/s {rtt_ms} ms: {measured:?}, emulator used {:?}", emulator_time());
    line.close();
    Ok(measured)
}

/// Processor time of the emulator's two threads.
fn emulator_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(|entry| entry.path());
    let of_wan = |task: &PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("wan-to"))
    };
    let nanoseconds = |task: PathBuf| -> u64 {
        let text = std::fs::read_to_string(task.join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(tasks.filter(of_wan).map(nanoseconds).sum())
}

fn assert_within(what: &str, got: f64, asked: f64, percent: f64) {
    let off = (got / asked - 1.0).abs() * 100.0;
    assert!(off <= percent, "{what}: asked {asked}, got {got} ({off:.1} % off)");
}

#[test]
fn a_hundred_megabits_and_a_hundred_milliseconds_are_what_is_measured() {
    if not_root() {
        return;
    }
    let _turn = turn();
    measured_undisturbed(100.0, 100, 5.0);
}

/// How often a line is measured at most before its figure counts as its own and not as the machine's.
const MEASUREMENTS: usize = 10;

/// The share of the processors that somebody outside may take meanwhile without being the reason of a wrong figure.
const UNDISTURBED: f64 = 0.01;

/// Measures until the figures are right. A host that takes the processors away makes a line late and slow, and faster
/// right after that: such a machine is reported as one that cannot run this, if it never let a measurement be.
fn measured_undisturbed(rate_mbit: f64, rtt_ms: u64, percent: f64) {
    undisturbed(rate_mbit, rtt_ms, percent, || measured(rate_mbit, rtt_ms, 0.0).unwrap());
}

fn undisturbed(rate_mbit: f64, rtt_ms: u64, percent: f64, measure: impl Fn() -> Measured) {
    let mut figures = Vec::new();
    for _ in 0..MEASUREMENTS {
        let before = ProcessorTime::now();
        let seen = measure();
        let taken = before.taken_since();
        let rate_off = (seen.rate_mbit / rate_mbit - 1.0).abs() * 100.0;
        let rtt_off = (seen.rtt_ms / rtt_ms as f64 - 1.0).abs() * 100.0;
        if rate_off <= percent && rtt_off <= 3.0 {
            return;
        }
        figures.push((seen, taken));
    }
    if figures.iter().all(|(_, taken)| *taken > UNDISTURBED) {
        println!("skipped: the host took this machine's processors away in every measurement: {figures:?}");
        return;
    }
    panic!("asked {rate_mbit} Mbit/s and {rtt_ms} ms, got (with the share of time taken away) {figures:?}");
}

/// The processors' time in ticks: all of it, and what the host gave to others (proc_stat(5), `steal`).
struct ProcessorTime {
    all: f64,
    stolen: f64,
}

impl ProcessorTime {
    fn now() -> Self {
        let text = std::fs::read_to_string("/proc/stat").unwrap();
        let line = text.lines().next().unwrap();
        let ticks: Vec<f64> =
            line.split_whitespace().skip(1).take(8).map(|one| one.parse().unwrap()).collect();
        Self { all: ticks.iter().sum(), stolen: ticks[7] }
    }

    fn taken_since(&self) -> f64 {
        let now = Self::now();
        (now.stolen - self.stolen) / (now.all - self.all).max(1.0)
    }
}

#[test]
fn five_megabits_are_five_and_a_gigabit_is_a_gigabit() {
    if not_root() {
        return;
    }
    let _turn = turn();
    measured_undisturbed(5.0, 100, 5.0);
    measured_undisturbed(1000.0, 20, 15.0);
}

#[test]
fn netem_is_used_where_the_kernel_has_it_and_measures_the_same() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let emulator = Emulator::detect().unwrap();
    if emulator != Emulator::Netem {
        println!("skipped: this kernel has no netem");
        return;
    }
    let profile = WanProfile::symmetric(100.0, Duration::from_millis(100), 0.0);
    let line = Line::build_with(emulator, &profile, Vec::new()).unwrap();
    let measured = measure(&line.wan, &profile, NEAR, FAR).unwrap();
    assert_within("round trip", measured.rtt_ms, 100.0, 3.0);
    assert_within("rate", measured.rate_mbit, 100.0, 5.0);
    line.close();
}

#[test]
fn one_percent_of_loss_is_one_percent() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let mut profile = WanProfile::symmetric(1000.0, Duration::from_millis(2), 0.01);
    // Neither a full queue nor a full socket may pass for random loss on a busy machine.
    profile.to_far.queue_bytes = 64 << 20;
    let line = Line::build(&profile, vec![PacketClass::new("blast", PacketMatch::udp_port(4433))]).unwrap();
    let from = line.wan.near().namespace.udp_socket(SocketAddr::new(NEAR, 0)).unwrap();
    let to = line.wan.far().namespace.udp_socket(SocketAddr::new(FAR, 4433)).unwrap();
    setsockopt(&to, sockopt::RcvBufForce, &(64 << 20)).unwrap();
    to.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let receiving = std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        let mut received = 0u64;
        while to.recv(&mut buffer).is_ok() {
            received += 1;
        }
        received
    });
    const SENT: u64 = 60_000;
    for number in 0..SENT {
        from.send_to(&[0; 100], SocketAddr::new(FAR, 4433)).unwrap();
        if number % 50 == 0 {
            std::thread::sleep(Duration::from_micros(500));
        }
    }
    let received = receiving.join().unwrap();
    let counters = line.wan.counters(Direction::ToFar).unwrap();
    println!("sent {SENT}, received {received}, {counters:?}");
    assert_eq!(counters.kernel_dropped, 0);
    let class = counters.class("blast").unwrap();
    assert_eq!(class.offered.packets, SENT);
    assert_eq!(class.offered.bytes, SENT * 128);
    assert_eq!(class.pairs[&(NEAR, FAR)].packets, SENT);
    assert_eq!(class.offered.packets - class.delivered.packets, counters.lost.packets);
    let lost = (SENT - received) as f64 / SENT as f64 * 100.0;
    assert!((0.7..1.3).contains(&lost), "{lost} %");
    let sampled: u64 =
        line.wan.samples(Direction::ToFar).unwrap().iter().map(|sample| sample.class_bytes[0]).sum();
    assert_eq!(sampled, class.delivered.bytes);
    line.close();
}

#[test]
fn a_cut_stops_everything_and_healing_lets_it_through_again() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let profile = WanProfile::symmetric(100.0, Duration::from_millis(10), 0.0);
    let line = Line::build(&profile, Vec::new()).unwrap();
    let from = line.wan.near().namespace.udp_socket(SocketAddr::new(NEAR, 5000)).unwrap();
    let to = line.wan.far().namespace.udp_socket(SocketAddr::new(FAR, 5000)).unwrap();
    let arrives = |from: &UdpSocket, to: &UdpSocket| {
        to.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        from.send_to(b"packet", to.local_addr().unwrap()).unwrap();
        to.recv(&mut [0; 16]).is_ok()
    };
    assert!(arrives(&from, &to) && arrives(&to, &from));
    line.wan.cut().unwrap();
    assert!(!arrives(&from, &to) && !arrives(&to, &from));
    line.wan.heal().unwrap();
    assert!(arrives(&from, &to) && arrives(&to, &from));
    line.wan.set_cut(Direction::ToFar, true).unwrap();
    assert!(!arrives(&from, &to) && arrives(&to, &from));
    line.wan.heal().unwrap();
    assert!(arrives(&from, &to));
    assert_eq!(line.wan.counters(Direction::ToFar).unwrap().cut_dropped.packets, 2);
    line.close();
}

#[test]
fn a_changed_profile_holds_at_once() {
    if not_root() {
        return;
    }
    let _turn = turn();
    undisturbed(20.0, 60, 5.0, || {
        let line =
            Line::build(&WanProfile::symmetric(100.0, Duration::from_millis(10), 0.0), Vec::new()).unwrap();
        let slower = WanProfile::symmetric(20.0, Duration::from_millis(60), 0.0);
        line.wan.set_profile(&slower).unwrap();
        let measured = measure(&line.wan, &slower, NEAR, FAR).unwrap();
        let left = line.wan.counters(Direction::ToFar).unwrap().offered.packets;
        assert_eq!(left, 0, "measuring leaves no trace");
        line.close();
        measured
    });
}

/// Content through super-packets that are cut, lost and sent again: TCP's checksums must hold for every piece.
#[test]
fn tcp_content_survives_loss_jitter_reordering_and_duplicates() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let mut profile =
        WanProfile::symmetric(400.0, Duration::from_millis(6), 0.003).with_jitter(Duration::from_millis(1));
    profile.to_far.reorder = 0.002;
    profile.to_far.duplicate = 0.002;
    let line = Line::build(&profile, Vec::new()).unwrap();
    let listener = line.wan.far().namespace.tcp_listener(SocketAddr::new(FAR, 80)).unwrap();
    let receiving = std::thread::spawn(move || {
        let mut content = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut content).unwrap();
        content
    });
    let mut stream =
        line.wan.near().namespace.tcp_connect(SocketAddr::new(FAR, 80), Duration::from_secs(5)).unwrap();
    let content: Vec<u8> =
        (0..20_000_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let begun = Instant::now();
    stream.write_all(&content).unwrap();
    drop(stream);
    assert!(receiving.join().unwrap() == content, "the content arrives as it was sent");
    let counters = line.wan.counters(Direction::ToFar).unwrap();
    println!(
        "20 MB in {:?}: {:?} lost, {:?} duplicated",
        begun.elapsed(),
        counters.lost,
        counters.duplicated
    );
    assert!(counters.lost.packets > 10 && counters.duplicated.packets > 5 && counters.reordered.packets > 5);
    assert_eq!(counters.write_failed.packets, 0);
    line.close();
}
