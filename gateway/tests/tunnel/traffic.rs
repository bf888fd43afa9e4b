//! Programs of the guest and the client: echo servers, and connections that number what they say.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::lab::Lab;

pub const PORT: u16 = 7000;
const PATIENCE: Duration = Duration::from_secs(8);

/// Serves TCP and UDP echo on [`PORT`] in a namespace; ready when it returns.
pub fn serve_echo(lab: &Lab, namespace: &str) {
    let bound = lab.within(namespace, || {
        let tcp = TcpListener::bind("[::]:7000").expect("the port is free");
        let udp = UdpSocket::bind("[::]:7000").expect("the port is free");
        std::thread::spawn(move || {
            for stream in tcp.incoming().flatten() {
                std::thread::spawn(move || echo(stream));
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((len, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(&buffer[..len], from);
            }
        });
    });
    bound.join().expect("the server starts");
}

fn echo(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut buffer = vec![0; 65_536];
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..len]).is_err() {
            return;
        }
    }
}

/// Serves TCP and UDP on [`PORT`] in a namespace and answers with the address that asked.
pub fn serve_who_am_i(lab: &Lab, namespace: &str) {
    let bound = lab.within(namespace, || {
        let tcp = TcpListener::bind("0.0.0.0:7000").expect("the port is free");
        let udp = UdpSocket::bind("0.0.0.0:7000").expect("the port is free");
        std::thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                std::thread::spawn(move || {
                    let peer = stream.peer_addr().expect("it is connected").to_string();
                    let mut question = [0];
                    while stream.read_exact(&mut question).is_ok() {
                        let _ = stream.write_all(format!("{peer:>21}").as_bytes());
                    }
                });
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(from.to_string().as_bytes(), from);
            }
        });
    });
    bound.join().expect("the server starts");
}

/// Asks over TCP which address the server sees.
pub fn ask_tcp(stream: &mut TcpStream) -> String {
    stream.write_all(&[1]).expect("the question leaves");
    let mut answer = [0; 21];
    stream.read_exact(&mut answer).expect("an answer");
    String::from_utf8_lossy(&answer).trim().to_owned()
}

/// Asks over UDP which address the server sees.
pub fn ask_udp(socket: &UdpSocket) -> String {
    let mut answer = [0; 64];
    socket.send(&[1]).expect("the question leaves");
    let len = socket.recv(&mut answer).expect("an answer");
    String::from_utf8_lossy(&answer[..len]).into_owned()
}

/// A UDP socket that speaks to `server` and does not wait for ever.
pub fn udp_to(server: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a port");
    socket.connect(server).expect("a route");
    socket.set_read_timeout(Some(PATIENCE)).expect("a limit");
    socket
}

/// What a connection of numbered records saw.
#[derive(Debug)]
pub struct Outcome {
    pub records: u64,
    /// The longest wait for an answer, and when it began.
    pub longest: Duration,
}

/// A connection that says a numbered record every 10 ms and checks the echo.
pub struct Records {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<Outcome>>,
}

impl Records {
    /// Connects from a namespace to `server`; the connection is open and has spoken when it returns.
    pub fn start(lab: &Lab, namespace: &str, server: SocketAddr, record_len: usize) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopping, counting) = (stop.clone(), count.clone());
        let thread = lab.within(namespace, move || run_records(server, record_len, &stopping, &counting));
        let records = Self { stop, count, thread };
        records.wait_for(3);
        records
    }

    /// Waits until so many more records were answered.
    pub fn wait_for(&self, more: u64) {
        let until = self.count.load(Ordering::Relaxed) + more;
        let (mut seen, mut since) = (0, Instant::now());
        while self.count.load(Ordering::Relaxed) < until {
            let now = self.count.load(Ordering::Relaxed);
            if std::mem::replace(&mut seen, now) != now {
                since = Instant::now();
            }
            assert!(!self.thread.is_finished() && since.elapsed() < PATIENCE, "no answers any more");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn finish(self) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the client does not panic").expect("the connection lives")
    }
}

fn run_records(
    server: SocketAddr,
    record_len: usize,
    stop: &AtomicBool,
    count: &AtomicU64,
) -> std::io::Result<Outcome> {
    let mut stream = connect(server)?;
    let mut outcome = Outcome { records: 0, longest: Duration::ZERO };
    let mut answer = vec![0; record_len];
    while !stop.load(Ordering::Relaxed) {
        let mut record = vec![outcome.records as u8; record_len];
        record[..8].copy_from_slice(&outcome.records.to_be_bytes());
        let asked = Instant::now();
        stream.write_all(&record)?;
        stream.read_exact(&mut answer)?;
        if answer != record {
            return Err(std::io::Error::new(ErrorKind::InvalidData, "another record came back"));
        }
        outcome.longest = outcome.longest.max(asked.elapsed());
        outcome.records = count.fetch_add(1, Ordering::Relaxed) + 1;
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(outcome)
}

/// Opens a connection with a limit on every wait.
pub fn connect(server: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Says `len` bytes and expects them back.
pub fn exchange(stream: &mut TcpStream, len: usize) {
    let bytes: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
    let mut writer = stream.try_clone().expect("a second handle");
    let sent = bytes.clone();
    let writing = std::thread::spawn(move || writer.write_all(&sent));
    let mut answer = vec![0; len];
    stream.read_exact(&mut answer).expect("an answer");
    writing.join().expect("no panic").expect("all was sent");
    assert!(answer == bytes, "what came back differs");
}

/// Attaches to a tap as a machine does.
pub fn plug_into(name: &str) -> tun::Device {
    let mut configuration = tun::Configuration::default();
    configuration.tun_name(name).layer(tun::Layer::L2);
    configuration.platform_config(|platform| {
        platform.ensure_root_privileges(false);
    });
    // Whoever made it may be just about to close it.
    let begun = Instant::now();
    loop {
        match tun::create(&configuration) {
            Err(tun::Error::Io(error))
                if error.kind() == ErrorKind::ResourceBusy && begun.elapsed() < PATIENCE =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            made => return made.expect("the tap is free"),
        }
    }
}

/// The next frame a tap gets that ends with `text`.
pub fn frame_with(tap: &tun::Device, text: &[u8]) -> Vec<u8> {
    let begun = Instant::now();
    let mut frame = [0; 2048];
    while begun.elapsed() < PATIENCE {
        let len = tap.recv_timeout(&mut frame, PATIENCE).expect("a frame");
        if frame[..len].ends_with(text) {
            return frame[..len].to_vec();
        }
    }
    panic!("no such frame");
}

/// A UDP frame sent back to where it came from, to a link-layer address of the guest's choice.
pub fn echo_of(question: &[u8], to: [u8; 6]) -> Vec<u8> {
    let mut answer = question.to_vec();
    answer[..6].copy_from_slice(&to);
    answer[6..12].copy_from_slice(&question[..6]);
    // Swapping both pairs leaves the checksums right.
    answer[26..30].copy_from_slice(&question[30..34]);
    answer[30..34].copy_from_slice(&question[26..30]);
    answer[34..36].copy_from_slice(&question[36..38]);
    answer[36..38].copy_from_slice(&question[34..36]);
    answer
}
