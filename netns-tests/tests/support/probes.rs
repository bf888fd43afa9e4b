//! What a client does that no transport repairs: datagrams, echoes, connections that are over at once. Each is a thread
//! or process inside the client's namespace until it is ended.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use netns_tests::netns::Namespace;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// How long the answer to a short connection may take.
const PATIENCE: Duration = Duration::from_secs(20);

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

/// Connections that ask once, each opened when its time has come, however many are still waiting.
pub struct Requests {
    quit: Arc<AtomicBool>,
    thread: JoinHandle<Answers>,
}

/// What became of them.
#[derive(Debug, Default)]
pub struct Answers {
    /// When each was opened.
    pub opened: Vec<SystemTime>,
    /// From the first one's opening to the last one's answer.
    pub took: Duration,
    pub answered: u64,
    pub slowest: Duration,
    pub failed: Vec<String>,
}

impl Requests {
    /// Opens one every `interval`.
    pub fn start(from: &Namespace, to: SocketAddr, interval: Duration) -> Self {
        let quit = Arc::<AtomicBool>::default();
        let (ended, from) = (quit.clone(), from.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            from.run(|| runtime.block_on(ask_until(to, interval, &ended))).unwrap()
        });
        Self { quit, thread }
    }

    /// Opens no more, and waits for what is still to be answered.
    pub fn end(self) -> Answers {
        self.quit.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

impl Answers {
    /// Answers a second, from the first opening to the last answer.
    pub fn rate(&self) -> f64 {
        self.answered as f64 / self.took.as_secs_f64()
    }

    fn take(&mut self, answer: std::io::Result<Duration>) {
        match answer {
            Ok(took) => {
                self.answered += 1;
                self.slowest = self.slowest.max(took);
            }
            Err(error) => self.failed.push(error.to_string()),
        }
    }
}

async fn ask_until(to: SocketAddr, interval: Duration, quit: &AtomicBool) -> Answers {
    let mut answers = Answers::default();
    let began = Instant::now();
    // Those that were due while this thread did not run are opened at once: the rate holds.
    let mut clock = tokio::time::interval(interval);
    let mut asked = JoinSet::new();
    while !quit.load(Ordering::Relaxed) {
        clock.tick().await;
        answers.opened.push(SystemTime::now());
        asked.spawn(ask_once(to));
        while let Some(answer) = asked.try_join_next() {
            answers.take(answer.unwrap());
        }
    }
    while let Some(answer) = asked.join_next().await {
        answers.take(answer.unwrap());
    }
    answers.took = began.elapsed();
    answers
}

async fn ask_once(to: SocketAddr) -> std::io::Result<Duration> {
    let began = Instant::now();
    let exchange = async {
        let mut stream = TcpStream::connect(to).await?;
        stream.write_all(b"short\n").await?;
        stream.shutdown().await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        if answer.ends_with(" short\n") { Ok(()) } else { Err(std::io::Error::other(answer)) }
    };
    tokio::time::timeout(PATIENCE, exchange).await??;
    Ok(began.elapsed())
}
