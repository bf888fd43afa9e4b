//! Measures an emulated WAN from outside the emulator, with its own packets, before anybody relies on it: the round
//! trip by echoed datagrams, the rate by a paced blast a little above the rate asked for. Its threads run with real-time
//! priority like the emulator's: the network is measured, not how busy the machine is.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{setsockopt, sockopt};

use super::line::raise_priority;
use super::{Wan, WanProfile};

/// Echoed datagrams; the median counts.
const ECHOES: u64 = 20;

/// Time between two echoes.
const ECHO_INTERVAL: Duration = Duration::from_millis(10);

/// How long the blast is, and how much of its beginning is not counted.
const BLAST: Duration = Duration::from_millis(1500);
const WARM_UP: Duration = Duration::from_millis(200);

/// The blast is this much faster than the rate asked for, so that the line is always busy.
const OVERLOAD: f64 = 1.05;

/// UDP payload of a full packet on a 1500-byte MTU, and the IPv4 and UDP headers before it.
const PAYLOAD_BYTES: usize = 1472;
const HEADER_BYTES: usize = 28;

/// What was seen, in the direction to the far end.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Measured {
    /// Median round trip in milliseconds.
    pub rtt_ms: f64,
    /// Megabits of IP packets per second.
    pub rate_mbit: f64,
}

/// Measures round trip and rate between the two ends' IPv4 addresses. Takes about two seconds and then sets the WAN's
/// counters to zero.
pub fn measure(wan: &Wan, profile: &WanProfile, near: IpAddr, far: IpAddr) -> Result<Measured> {
    let rtt = measure_rtt(wan, near, far)?;
    let rate_mbit = match profile.to_far.rate_bits_per_second {
        Some(rate) => measure_rate(wan, near, far, rate as f64 * OVERLOAD, rtt)?,
        None => f64::INFINITY,
    };
    wan.reset_counters()?;
    Ok(Measured { rtt_ms: rtt.as_secs_f64() * 1e3, rate_mbit })
}

fn measure_rtt(wan: &Wan, near: IpAddr, far: IpAddr) -> Result<Duration> {
    let here = wan.near().namespace.udp_socket(SocketAddr::new(near, 0))?;
    let there = wan.far().namespace.udp_socket(SocketAddr::new(far, 0))?;
    here.connect(there.local_addr()?)?;
    there.connect(here.local_addr()?)?;
    let done = AtomicBool::new(false);
    let mut times = std::thread::scope(|scope| {
        scope.spawn(|| echo(&there, &done));
        let collecting = scope.spawn(|| collect_echoes(&here));
        let times = collecting.join().unwrap_or_else(|_| bail!("The echoing thread panicked"));
        done.store(true, Ordering::Relaxed);
        times
    })?;
    times.sort();
    if times.len() < ECHOES as usize / 2 {
        bail!("The WAN returned only {} of {ECHOES} datagrams", times.len());
    }
    Ok(times[times.len() / 2])
}

fn echo(socket: &UdpSocket, done: &AtomicBool) {
    raise_priority();
    let mut buffer = [0; 64];
    // Without a timeout a lost datagram would leave this thread waiting for ever.
    if socket.set_read_timeout(Some(Duration::from_millis(50))).is_err() {
        return;
    }
    while !done.load(Ordering::Relaxed) {
        if let Ok(length) = socket.recv(&mut buffer) {
            let _ = socket.send(&buffer[..length]);
        }
    }
}

/// Sends numbered datagrams at a steady pace and notes when each is back.
fn collect_echoes(socket: &UdpSocket) -> Result<Vec<Duration>> {
    raise_priority();
    let start = Instant::now();
    let sent_at = |number: u64| ECHO_INTERVAL * number as u32;
    let mut times = Vec::new();
    let mut sent = Vec::new();
    let mut buffer = [0; 64];
    let deadline = sent_at(ECHOES) + Duration::from_secs(3);
    while times.len() < ECHOES as usize && start.elapsed() < deadline {
        let next = sent.len() as u64;
        if next < ECHOES && start.elapsed() >= sent_at(next) {
            sent.push(Instant::now());
            socket.send(&next.to_be_bytes())?;
        }
        let until = if next + 1 < ECHOES { sent_at(next + 1) } else { deadline };
        let wait = until.saturating_sub(start.elapsed()).max(Duration::from_micros(100));
        socket.set_read_timeout(Some(wait))?;
        match socket.recv(&mut buffer) {
            Ok(8) => {
                let number = u64::from_be_bytes(buffer[..8].try_into().context("8 bytes")?);
                times.extend(sent.get(number as usize).map(Instant::elapsed));
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error).context("The WAN refused a datagram"),
        }
    }
    Ok(times)
}

fn measure_rate(wan: &Wan, near: IpAddr, far: IpAddr, bits_per_second: f64, rtt: Duration) -> Result<f64> {
    let here = wan.near().namespace.udp_socket(SocketAddr::new(near, 0))?;
    let there = wan.far().namespace.udp_socket(SocketAddr::new(far, 0))?;
    here.connect(there.local_addr()?)?;
    setsockopt(&there.as_fd(), sockopt::RcvBufForce, &(32 << 20)).context("SO_RCVBUFFORCE")?;
    // Both only save system calls; without them every datagram is a call of its own.
    let offloaded =
        setsockopt(&here.as_fd(), sockopt::UdpGsoSegment, &(PAYLOAD_BYTES as libc::c_int)).is_ok();
    let _ = setsockopt(&there.as_fd(), sockopt::UdpGroSegment, &true);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let counting = scope.spawn(|| count(&there, &done, rtt));
        let blasting = scope.spawn(|| blast(&here, bits_per_second, offloaded));
        let sent = blasting.join().unwrap_or_else(|_| bail!("The sending thread panicked"));
        done.store(true, Ordering::Relaxed);
        let counted = counting.join().unwrap_or_else(|_| bail!("The counting thread panicked"));
        sent.and(counted)
    })
}

/// Sends at a steady rate, catching up when it was held up; bursts last at most a millisecond of line time.
fn blast(socket: &UdpSocket, bits_per_second: f64, offloaded: bool) -> Result<()> {
    raise_priority();
    let packet_seconds = ((PAYLOAD_BYTES + HEADER_BYTES) * 8) as f64 / bits_per_second;
    let burst = ((1e-3 / packet_seconds) as usize).clamp(1, if offloaded { 44 } else { 1 });
    let data = vec![0x4c; burst * PAYLOAD_BYTES];
    let start = Instant::now();
    let mut bursts = 0u32;
    loop {
        let due = Duration::from_secs_f64(packet_seconds * burst as f64 * f64::from(bursts));
        if due > BLAST {
            return Ok(());
        }
        if let Some(early) = due.checked_sub(start.elapsed()) {
            std::thread::sleep(early);
        }
        match socket.send(&data) {
            Ok(_) => bursts += 1,
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => bursts += 1,
            Err(error) => return Err(error).context("The blast was refused"),
        }
    }
}

/// Counts what arrives after the warm-up, until the sender is done and the line is silent.
fn count(socket: &UdpSocket, done: &AtomicBool, rtt: Duration) -> Result<f64> {
    raise_priority();
    let silence = rtt.max(Duration::from_millis(100));
    socket.set_read_timeout(Some(silence))?;
    let mut buffer = vec![0; 65_536];
    let mut first: Option<Instant> = None;
    let mut counted_from: Option<Instant> = None;
    let (mut bytes, mut last) = (0u64, Instant::now());
    loop {
        match socket.recv(&mut buffer) {
            Ok(length) => {
                last = Instant::now();
                let begun = *first.get_or_insert(last);
                if counted_from.is_some() {
                    bytes += (length + length.div_ceil(PAYLOAD_BYTES) * HEADER_BYTES) as u64;
                } else if last - begun >= WARM_UP {
                    counted_from = Some(last);
                }
            }
            Err(_) if done.load(Ordering::Relaxed) => break,
            Err(_) => {}
        }
    }
    let begun = counted_from.context("The blast did not arrive")?;
    Ok(bytes as f64 * 8.0 / (last - begun).as_secs_f64() / 1e6)
}
