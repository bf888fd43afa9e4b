//! What a client does that no transport repairs: datagrams, echoes, connections that are over at once. Each is a thread
//! or process inside the client's namespace until it is ended.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use netns_tests::netns::Namespace;

/// How long the answer to a short connection may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Short connections that are open at once.
const WORKERS: usize = 8;

/// Numbered datagrams to an echo.
pub struct Datagrams {
    state: Arc<Mutex<Exchange>>,
    quit: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Exchange {
    sent_at: BTreeMap<u64, SystemTime>,
    answered: BTreeSet<u64>,
    corrupt: u64,
    doubled: u64,
}

/// What became of them.
#[derive(Debug, Clone, Copy)]
pub struct Tally {
    pub answered: u64,
    pub corrupt: u64,
    pub doubled: u64,
}

impl Datagrams {
    /// Sends one of `bytes` every `interval`.
    pub fn start(from: &Namespace, to: SocketAddr, bytes: usize, interval: Duration) -> Self {
        let any: IpAddr =
            if to.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let socket = from.udp_socket(SocketAddr::new(any, 0)).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (state, quit) = (Arc::<Mutex<Exchange>>::default(), Arc::<AtomicBool>::default());
        let receiver = socket.try_clone().unwrap();
        let (s, q) = (state.clone(), quit.clone());
        let sending = std::thread::spawn(move || send_numbered(&socket, bytes, interval, &s, &q));
        let (s, q) = (state.clone(), quit.clone());
        let receiving = std::thread::spawn(move || receive_numbered(&receiver, bytes, &s, &q));
        Self { state, quit, threads: vec![sending, receiving] }
    }

    /// Those without an answer, of all that were sent more than a second ago: number and when it was sent.
    pub fn missing(&self) -> Vec<(u64, SystemTime)> {
        let state = self.state.lock().unwrap();
        let settled = SystemTime::now() - Duration::from_secs(1);
        let old = state.sent_at.iter().filter(|(_, at)| **at < settled);
        old.filter(|(number, _)| !state.answered.contains(number))
            .map(|(number, at)| (*number, *at))
            .collect()
    }

    pub fn tally(&self) -> Tally {
        let state = self.state.lock().unwrap();
        Tally { answered: state.answered.len() as u64, corrupt: state.corrupt, doubled: state.doubled }
    }

    pub fn end(&self) -> Tally {
        self.quit.store(true, Ordering::Relaxed);
        self.tally()
    }
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn datagram(number: u64, bytes: usize) -> Vec<u8> {
    let mut datagram = number.to_be_bytes().to_vec();
    datagram.extend((8..bytes).map(|index| (index as u64 ^ number) as u8));
    datagram
}

fn send_numbered(
    socket: &UdpSocket,
    bytes: usize,
    interval: Duration,
    state: &Mutex<Exchange>,
    quit: &AtomicBool,
) {
    for number in 1.. {
        if quit.load(Ordering::Relaxed) {
            return;
        }
        // Counted only if the client's own kernel took it.
        let mut state = state.lock().unwrap();
        if socket.send(&datagram(number, bytes)).is_ok() {
            state.sent_at.insert(number, SystemTime::now());
        }
        drop(state);
        std::thread::sleep(interval);
    }
}

fn receive_numbered(socket: &UdpSocket, bytes: usize, state: &Mutex<Exchange>, quit: &AtomicBool) {
    let mut buffer = vec![0; 65_536];
    while !quit.load(Ordering::Relaxed) {
        let Ok(length) = socket.recv(&mut buffer) else { continue };
        let number = buffer[..length].first_chunk().map_or(0, |head| u64::from_be_bytes(*head));
        let mut state = state.lock().unwrap();
        if buffer[..length] != datagram(number, bytes) {
            state.corrupt += 1;
        } else if !state.answered.insert(number) {
            state.doubled += 1;
        }
    }
}

/// Echoes that must not be split on their way.
pub struct Pings {
    child: Child,
    answered: Arc<AtomicU64>,
    silent_ms: Arc<AtomicU64>,
}

impl Pings {
    pub fn start(from: &Namespace, to: IpAddr) -> Self {
        let mut command = Command::new("ping");
        // With the time before each line, and a line for each that was not answered (`-D`, `-O`).
        command.args(["-n", "-D", "-O", "-i", "0.2", "-M", "do", "-s", "1200", &to.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = from.spawn(&mut command).unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let answered = Arc::<AtomicU64>::default();
        let silent_ms = Arc::<AtomicU64>::default();
        let (counter, silence) = (answered.clone(), silent_ms.clone());
        std::thread::spawn(move || {
            let answers = lines.map_while(Result::ok).filter(|line| line.contains("time="));
            let mut last = Instant::now();
            for _answer in answers {
                counter.fetch_add(1, Ordering::Relaxed);
                silence.fetch_max(last.elapsed().as_millis() as u64, Ordering::Relaxed);
                last = Instant::now();
            }
        });
        Self { child, answered, silent_ms }
    }

    /// The longest time between two answers so far.
    pub fn longest_silence(&self) -> Duration {
        Duration::from_millis(self.silent_ms.load(Ordering::Relaxed))
    }

    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    pub fn end(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Connections that ask once.
pub struct Requests {
    quit: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Answers>>,
}

/// What became of them.
#[derive(Debug, Default)]
pub struct Answers {
    pub answered: u64,
    pub failed: Vec<String>,
}

impl Requests {
    /// Opens one every `interval`, as long as answers come as fast.
    pub fn start(from: &Namespace, to: SocketAddr, interval: Duration) -> Self {
        let quit = Arc::<AtomicBool>::default();
        let work = |_| {
            let (quit, from) = (quit.clone(), from.clone());
            std::thread::spawn(move || {
                let asking = || ask_until(to, interval * WORKERS as u32, &quit);
                from.run(asking).unwrap()
            })
        };
        let threads = (0..WORKERS).map(work).collect();
        Self { quit, threads }
    }

    pub fn end(self) -> Answers {
        self.quit.store(true, Ordering::Relaxed);
        let mut all = Answers::default();
        for thread in self.threads {
            let answers = thread.join().unwrap();
            all.answered += answers.answered;
            all.failed.extend(answers.failed);
        }
        all
    }
}

fn ask_until(to: SocketAddr, interval: Duration, quit: &AtomicBool) -> Answers {
    let mut answers = Answers::default();
    while !quit.load(Ordering::Relaxed) {
        let began = Instant::now();
        match ask_once(to) {
            Ok(()) => answers.answered += 1,
            Err(error) => answers.failed.push(error.to_string()),
        }
        std::thread::sleep(interval.saturating_sub(began.elapsed()));
    }
    answers
}

fn ask_once(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = std::net::TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"short\n")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.ends_with(" short\n") { Ok(()) } else { Err(std::io::Error::other(answer)) }
}
