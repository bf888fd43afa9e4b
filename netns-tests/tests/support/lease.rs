//! A DHCP server (RFC 2131) in a home LAN that gives one address, again and again, and keeps what it was asked.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use netns_tests::netns::Namespace;

const MAGIC: [u8; 4] = [99, 130, 83, 99];
const MESSAGE_TYPE: u8 = 53;
const OFFER: u8 = 2;
const ACK: u8 = 5;
/// An answer that comes at once is lost on busybox's client: it goes to the socket that asked, which is only closed.
const ANSWER_AFTER: Duration = Duration::from_millis(300);
/// Where a message's options begin.
const OPTIONS: usize = 240;

/// One question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    pub kind: Kind,
    /// From where: no address before there is a lease.
    pub from: SocketAddr,
}

/// What it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Discover,
    /// For an address that the client does not have yet.
    Request,
    /// For the one that it has, to this server alone.
    Renewal,
}

/// The server at work.
pub struct Leases {
    asked: Arc<Mutex<Vec<Asked>>>,
    quit: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Leases {
    /// Serves in `namespace`, which has the address `own`.
    pub fn serve(namespace: &Namespace, own: Ipv4Addr, given: Ipv4Addr, lease_s: u32) -> Self {
        let socket = namespace.udp_socket("0.0.0.0:67".parse().unwrap()).unwrap();
        socket.set_broadcast(true).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (asked, quit) = (Arc::<Mutex<Vec<Asked>>>::default(), Arc::<AtomicBool>::default());
        let (heard, ended) = (asked.clone(), quit.clone());
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                answer_one(&socket, own, given, lease_s, &heard);
            }
        });
        Self { asked, quit, thread: Some(thread) }
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the DHCP server was asked {:?}", self.asked());
        }
        self.quit.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn answer_one(socket: &UdpSocket, own: Ipv4Addr, given: Ipv4Addr, lease_s: u32, asked: &Mutex<Vec<Asked>>) {
    let mut buffer = [0; 1500];
    let (length, from) = match socket.recv_from(&mut buffer) {
        Ok(received) => received,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return,
        Err(error) => panic!("the DHCP server's socket: {error}"),
    };
    let question = &buffer[..length];
    let Some(kind) = kind_of(question) else { return };
    asked.lock().unwrap().push(Asked { kind, from });
    let to = match kind {
        Kind::Discover | Kind::Request => Ipv4Addr::BROADCAST,
        Kind::Renewal => given,
    };
    let said = if kind == Kind::Discover { OFFER } else { ACK };
    std::thread::sleep(ANSWER_AFTER);
    socket.send_to(&answer(question, said, own, given, lease_s), (to, 68)).unwrap();
}

fn kind_of(question: &[u8]) -> Option<Kind> {
    if question.get(236..OPTIONS)? != MAGIC {
        return None;
    }
    let has_address = question[12..16] != [0; 4];
    let mut options = &question[OPTIONS..];
    while let [code, length, rest @ ..] = options {
        let value = rest.get(..usize::from(*length))?;
        match (*code, value) {
            (MESSAGE_TYPE, [1]) => return Some(Kind::Discover),
            (MESSAGE_TYPE, [3]) if has_address => return Some(Kind::Renewal),
            (MESSAGE_TYPE, [3]) => return Some(Kind::Request),
            (_, _) => options = &rest[value.len()..],
        }
    }
    None
}

fn answer(question: &[u8], said: u8, own: Ipv4Addr, given: Ipv4Addr, lease_s: u32) -> Vec<u8> {
    let mut answer = question[..236].to_vec();
    answer[0] = 2;
    answer[16..20].copy_from_slice(&given.octets());
    answer[20..24].copy_from_slice(&own.octets());
    answer.extend(MAGIC);
    answer.extend([MESSAGE_TYPE, 1, said]);
    for (code, value) in [(54, own.octets()), (51, lease_s.to_be_bytes()), (1, [255, 255, 255, 0])] {
        answer.extend([code, 4]);
        answer.extend(value);
    }
    answer.push(255);
    answer.resize(300, 0);
    answer
}
