//! A path between two UDP addresses with rate, delay, loss and a switch, in a thread of its own.
//!
//! Both directions are shaped alike: one packet after the other at the rate (IP headers counted), a
//! drop-tail queue before, then the delay. It counts what it carries, as an observer outside would.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use longhaul_core::units::{Bytes, Rate};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

const IP_HEADER_BYTES: u64 = 28;
const MAX_DATAGRAM: usize = 65_536;

/// How a path treats packets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) rate: Rate,
    pub(super) one_way: Duration,
    pub(super) loss: f64,
    /// How long the queue before the rate may become.
    pub(super) queue: Duration,
}

impl Shape {
    /// Does nothing but carry.
    pub(super) fn clear() -> Self {
        Self { rate: Rate::mbit(10_000), one_way: Duration::ZERO, loss: 0.0, queue: Duration::from_secs(1) }
    }
}

/// What passed in one direction.
#[derive(Debug, Default)]
pub(super) struct Passed {
    pub(super) datagrams: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) longest_queue_us: AtomicU64,
}

/// A running path; it ends when dropped.
pub(super) struct Path {
    pub(super) address: SocketAddr,
    /// What went from the listener to the dialler.
    pub(super) back: Arc<Passed>,
    cut: Arc<AtomicBool>,
    _stop: DropGuard,
}

impl Path {
    /// A path whose one end is `address` and whose other end is `to`.
    pub(super) fn to(to: SocketAddr, shape: Shape) -> Self {
        let stop = CancellationToken::new();
        let back = Arc::new(Passed::default());
        let cut = Arc::new(AtomicBool::new(false));
        let (near, far) = (socket(), socket());
        let address = near.local_addr().unwrap();
        let (stopped, counted, switch) = (stop.clone(), back.clone(), cut.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(stopped.run_until_cancelled(carry(near, far, to, shape, counted, switch)));
        });
        Self { address, back, cut, _stop: stop.drop_guard() }
    }

    /// From now on nothing passes, or everything again.
    pub(super) fn set_cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }
}

fn socket() -> std::net::UdpSocket {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let wanted_bytes = 16 << 20;
    if nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &wanted_bytes).is_err() {
        socket2::SockRef::from(&socket).set_recv_buffer_size(wanted_bytes).unwrap();
    }
    socket
}

async fn carry(
    near: std::net::UdpSocket,
    far: std::net::UdpSocket,
    to: SocketAddr,
    shape: Shape,
    back: Arc<Passed>,
    cut: Arc<AtomicBool>,
) {
    let near = Arc::new(UdpSocket::from_std(near).unwrap());
    let far = Arc::new(UdpSocket::from_std(far).unwrap());
    let (dialler, last_dialler) = watch::channel(None);
    let (_listener, listener_address) = watch::channel(Some(to));
    let out = Direction {
        from: near.clone(),
        seen: Some(dialler),
        to: far.clone(),
        address: listener_address,
        shape,
        passed: Arc::default(),
        cut: cut.clone(),
        seed: 1,
    };
    let home = Direction {
        from: far,
        seen: None,
        to: near,
        address: last_dialler,
        shape,
        passed: back,
        cut,
        seed: 2,
    };
    tokio::join!(out.run(), home.run());
}

struct Direction {
    from: Arc<UdpSocket>,
    /// Told who sent last.
    seen: Option<watch::Sender<Option<SocketAddr>>>,
    to: Arc<UdpSocket>,
    address: watch::Receiver<Option<SocketAddr>>,
    shape: Shape,
    passed: Arc<Passed>,
    cut: Arc<AtomicBool>,
    seed: u64,
}

impl Direction {
    async fn run(self) {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut buffer = vec![0; MAX_DATAGRAM];
        let mut queue: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let mut free_at = Instant::now();
        loop {
            let due = queue.front().map(|(at, _)| *at);
            tokio::select! {
                Ok(()) = self.from.readable() => {
                    while let Ok((length, source)) = self.from.try_recv_from(&mut buffer) {
                        if let Some(seen) = &self.seen {
                            seen.send_if_modified(|last| last.replace(source) != Some(source));
                        }
                        self.enqueue(&buffer[..length], &mut queue, &mut free_at, &mut random);
                    }
                }
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
            while queue.front().is_some_and(|(at, _)| *at <= Instant::now()) {
                let Some((_, packet)) = queue.pop_front() else { break };
                let Some(address) = *self.address.borrow() else { continue };
                let _ = self.to.try_send_to(&packet, address); // a full socket is loss, as on any path
            }
        }
    }

    fn enqueue(
        &self,
        packet: &[u8],
        queue: &mut VecDeque<(Instant, Vec<u8>)>,
        free_at: &mut Instant,
        random: &mut StdRng,
    ) {
        let now = Instant::now();
        self.passed.datagrams.fetch_add(1, Ordering::Relaxed);
        self.passed.bytes.fetch_add(packet.len() as u64, Ordering::Relaxed);
        let waits = free_at.saturating_duration_since(now);
        self.passed.longest_queue_us.fetch_max(waits.as_micros() as u64, Ordering::Relaxed);
        let lost = random.random_bool(self.shape.loss);
        if lost || waits > self.shape.queue || self.cut.load(Ordering::SeqCst) {
            self.passed.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let takes = self.shape.rate.time_for(Bytes(packet.len() as u64 + IP_HEADER_BYTES)).unwrap();
        *free_at = now.max(*free_at) + takes;
        queue.push_back((*free_at + self.shape.one_way, packet.to_vec()));
    }
}
