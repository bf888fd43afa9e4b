//! A UDP socket for quinn that sends to each address no faster than the operator's rate, nor than the pace of its controller.
//!
//! ```text
//!  quinn connection -> poll_writable -> try_send -> token buckets of that address -> kernel
//!                          ^                            | one is empty: WouldBlock
//!                          '---- wakes when refilled ---'
//! ```
//!
//! quinn paces by `1.25 * window / round trip`, so what limits the rate in the end is how fast
//! acknowledgements return: the pace is uneven, and on short paths there is none. Here the bytes
//! themselves are counted: stream data, datagrams, retransmissions and acknowledgements alike. The operator's rate counts
//! their IP and UDP headers too; a controller's pace counts UDP payload, as the controller does. quinn makes packets only
//! when the socket takes them, so priorities among streams hold until the last moment, and a slow path gets small batches.
//! Which packet goes next is not decided here, nor the pace.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use longhaul_core::units::Rate;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::time::Sleep;

use super::model::Pace;

/// How much of the configured rate is used. A path loaded to its last bit never drains its queue.
const UTILISATION: f64 = 0.98;

/// How long a bucket saves up. Whoever wakes up later than that on a busy machine loses rate; more would
/// be a burst that long in the path's queue.
const BURST_TIME: Duration = Duration::from_millis(10);

/// The least a bucket holds, so that slow links still send whole batches.
const MIN_BURST_BYTES: f64 = 4.0 * 1500.0;

/// How long one batch may take on the path: it arrives there at once, and is a queue that long.
const BATCH_TIME: Duration = Duration::from_millis(2);

/// A full packet with its headers.
const FULL_PACKET_BYTES: u64 = 1500;

/// The longest wait for a bucket before it is looked at again, in seconds: its pace may have risen.
const MAX_WAIT_S: f64 = 0.1;

/// How many addresses have buckets before full ones are dropped.
const MAX_BUCKETS: usize = 64;

thread_local! {
    /// Until when the bucket refused the last `try_send` on this thread. quinn calls `poll_writable` of
    /// the same connection right after a refusal, on the same thread, but does not pass the address.
    static REFUSED_UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The socket.
pub(super) struct PacedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    paths: Arc<Paths>,
}

/// The buckets of all addresses, and which controller steers which.
#[derive(Debug)]
pub(super) struct Paths {
    cap: Rate,
    // quinn calls the socket from every connection's task; the lock is held for a few additions.
    buckets: Mutex<BTreeMap<SocketAddr, Buckets>>,
}

/// What limits one address.
#[derive(Debug)]
struct Buckets {
    cap: Bucket,
    /// What an operator allows at present, if that is less than the configured rate.
    limit: Option<Rate>,
    steered: Option<(Arc<Pace>, Bucket)>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens_bytes: f64,
    filled: Instant,
}

impl Paths {
    /// Nobody is sent to faster than `cap`.
    pub(super) fn new(cap: Rate) -> Arc<Self> {
        Arc::new(Self { cap, buckets: Mutex::new(BTreeMap::new()) })
    }

    /// From now on `pace` decides how fast `to` is sent to; without one only the operator's rate does.
    pub(super) fn follow(&self, to: SocketAddr, pace: Option<Arc<Pace>>) {
        let now = Instant::now();
        let mut buckets = self.lock();
        let path = buckets.entry(to).or_insert_with(|| Buckets::new(now, self.cap_per_second()));
        let same = matches!((&path.steered, &pace), (Some((old, _)), Some(new)) if Arc::ptr_eq(old, new));
        if !same {
            path.steered = pace.map(|pace| (pace, Bucket { tokens_bytes: MIN_BURST_BYTES, filled: now }));
        }
    }

    /// `to` is sent to no faster than `limit`, until that is changed.
    pub(super) fn limit(&self, to: SocketAddr, limit: Option<Rate>) {
        let now = Instant::now();
        let cap_per_second = self.cap_per_second();
        let mut buckets = self.lock();
        buckets.entry(to).or_insert_with(|| Buckets::new(now, cap_per_second)).limit = limit;
    }

    fn cap_per_second(&self) -> f64 {
        self.cap.0 as f64 * UTILISATION
    }

    /// When something may be sent to `to`, if not now.
    fn refused_until(&self, to: SocketAddr, now: Instant) -> Option<Instant> {
        let cap_per_second = self.cap_per_second();
        let mut buckets = self.lock();
        if buckets.len() >= MAX_BUCKETS && !buckets.contains_key(&to) {
            buckets.retain(|_, path| path.is_used(now, cap_per_second));
        }
        if buckets.len() >= MAX_BUCKETS && !buckets.contains_key(&to) {
            return None; // strangers' handshakes: the handshake limit bounds what they are answered
        }
        let path = buckets.entry(to).or_insert_with(|| Buckets::new(now, cap_per_second));
        let limit_per_second = path.limit.map_or(cap_per_second, |limit| cap_per_second.min(limit.0 as f64));
        let capped_until = path.cap.refused_until(now, limit_per_second);
        let paced_until = path.steered.as_mut().and_then(|(pace, bucket)| {
            let per_second = pace.rate().0 as f64;
            bucket.refused_until(now, per_second)
        });
        capped_until.max(paced_until)
    }

    /// Counts what was sent. A bucket may go below zero by one batch and then stays shut that much longer.
    fn spend(&self, transmit: &Transmit<'_>, now: Instant) {
        let mut buckets = self.lock();
        let Some(path) = buckets.get_mut(&transmit.destination) else { return };
        path.cap.tokens_bytes -= wire_bytes(transmit) as f64;
        if let Some((pace, bucket)) = &mut path.steered {
            bucket.tokens_bytes -= transmit.contents.len() as f64;
            pace.handle_departed(now);
        }
    }

    /// How many packets to hand over at once: what the fastest path takes in a moment. quinn asks before it says where to.
    fn batch_packets(&self) -> usize {
        let steered = |path: &Buckets| path.steered.as_ref().map(|(pace, _)| pace.rate());
        let fastest = self.lock().values().filter_map(steered).max().unwrap_or(self.cap);
        (fastest.min(self.cap).bytes_in(BATCH_TIME).0 / FULL_PACKET_BYTES).max(1) as usize
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SocketAddr, Buckets>> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PacedSocket {
    /// Paces what goes through `inner`.
    pub(super) fn new(inner: Arc<dyn AsyncUdpSocket>, paths: Arc<Paths>) -> Self {
        Self { inner, paths }
    }
}

impl Buckets {
    fn new(now: Instant, cap_per_second: f64) -> Self {
        let cap = Bucket { tokens_bytes: burst_bytes(cap_per_second), filled: now };
        Self { cap, limit: None, steered: None }
    }

    /// Whether something is forgotten with it.
    fn is_used(&mut self, now: Instant, cap_per_second: f64) -> bool {
        self.steered.is_some() || self.cap.refill(now, cap_per_second) < burst_bytes(cap_per_second)
    }
}

impl Bucket {
    fn refill(&mut self, now: Instant, bytes_per_second: f64) -> f64 {
        let earned = now.saturating_duration_since(self.filled).as_secs_f64() * bytes_per_second;
        self.tokens_bytes = (self.tokens_bytes + earned).min(burst_bytes(bytes_per_second));
        self.filled = now;
        self.tokens_bytes
    }

    fn refused_until(&mut self, now: Instant, bytes_per_second: f64) -> Option<Instant> {
        let tokens_bytes = self.refill(now, bytes_per_second);
        let wait_s = (1.0 - tokens_bytes) / bytes_per_second.max(1.0);
        (tokens_bytes <= 0.0).then(|| now + Duration::from_secs_f64(wait_s.min(MAX_WAIT_S)))
    }
}

fn unmarked<'a>(transmit: &Transmit<'a>) -> Transmit<'a> {
    let Transmit { destination, ecn: _, contents, segment_size, src_ip } = *transmit;
    Transmit { destination, ecn: None, contents, segment_size, src_ip }
}

fn burst_bytes(bytes_per_second: f64) -> f64 {
    (bytes_per_second * BURST_TIME.as_secs_f64()).max(MIN_BURST_BYTES)
}

/// A transmit's bytes on the wire, with IP and UDP headers for each datagram in it.
fn wire_bytes(transmit: &Transmit<'_>) -> usize {
    let length = transmit.contents.len();
    let datagrams = transmit.segment_size.map_or(1, |segment| length.div_ceil(segment.max(1)));
    let mapped_ipv4 = match transmit.destination {
        SocketAddr::V4(_) => true,
        SocketAddr::V6(address) => address.ip().to_ipv4_mapped().is_some(),
    };
    length + datagrams * if mapped_ipv4 { 28 } else { 48 }
}

impl AsyncUdpSocket for PacedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        let inner = self.inner.clone().create_io_poller();
        Box::pin(PacedPoller { inner, refused: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let now = Instant::now();
        if let Some(until) = self.paths.refused_until(transmit.destination, now) {
            REFUSED_UNTIL.set(Some(until));
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // No controller here heeds marks, so packets must not ask for them instead of being dropped (RFC 9000, section 13.4).
        self.inner.try_send(&unmarked(transmit))?;
        self.paths.spend(transmit, now);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.paths.batch_packets())
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

impl fmt::Debug for PacedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacedSocket").field("cap", &self.paths.cap).finish_non_exhaustive()
    }
}

struct PacedPoller {
    inner: Pin<Box<dyn UdpPoller>>,
    refused: Option<Pin<Box<Sleep>>>,
}

impl UdpPoller for PacedPoller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(until) = REFUSED_UNTIL.take() {
            self.refused = Some(Box::pin(tokio::time::sleep_until(until.into())));
        }
        if let Some(sleep) = &mut self.refused {
            ready!(sleep.as_mut().poll(cx));
            self.refused = None;
        }
        self.inner.as_mut().poll_writable(cx)
    }
}

impl fmt::Debug for PacedPoller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacedPoller").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::Model;
    use super::*;
    use quinn_proto::congestion::ControllerFactory;

    fn transmit(contents: &[u8], destination: SocketAddr) -> Transmit<'_> {
        Transmit { destination, ecn: None, contents, segment_size: None, src_ip: None }
    }

    /// How much leaves in two seconds, in packets of 972 bytes that are 1000 with headers.
    fn packets_in_two_seconds(paths: &Paths, to: SocketAddr) -> u64 {
        let contents = [0; 972];
        let mut now = Instant::now();
        let end = now + Duration::from_secs(2);
        let mut packets = 0;
        while now < end {
            match paths.refused_until(to, now) {
                Some(until) => now = until,
                None => {
                    paths.spend(&transmit(&contents, to), now);
                    packets += 1;
                }
            }
        }
        packets
    }

    fn address() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 9))
    }

    #[test]
    fn two_seconds_carry_the_rate_and_one_burst() {
        let paths = Paths::new(Rate(1_000_000));
        let sent_bytes = 1000 * packets_in_two_seconds(&paths, address());
        let burst_bytes = burst_bytes(paths.cap_per_second()) as u64;
        assert!((1_960_000..=1_961_000 + burst_bytes).contains(&sent_bytes), "{sent_bytes}");
    }

    #[test]
    fn a_controllers_pace_counts_payload_and_the_operators_rate_stays_the_bound() {
        let model = Arc::new(Model { cap: Rate::mbit(8), rtt: Duration::from_secs(1) });
        let pace = Pace::of(model.build(Instant::now(), 1200)).unwrap();
        let expected = pace.rate().0 * 2 / 972;
        let wide = Paths::new(Rate::mbit(1000));
        wide.follow(address(), Some(pace.clone()));
        let packets = packets_in_two_seconds(&wide, address());
        assert!((expected..=expected + 40).contains(&packets), "{packets} at {}", pace.rate());
        assert!(wide.refused_until(SocketAddr::from(([127, 0, 0, 1], 10)), Instant::now()).is_none());
        let narrow = Paths::new(Rate(10_000));
        narrow.follow(address(), Some(pace));
        assert!(packets_in_two_seconds(&narrow, address()) <= 27);
        narrow.follow(address(), None);
        assert!(packets_in_two_seconds(&narrow, address()) <= 27);
    }

    #[test]
    fn slow_paths_get_small_batches() {
        assert_eq!(Paths::new(Rate::mbit(5)).batch_packets(), 1);
        assert_eq!(Paths::new(Rate::mbit(60)).batch_packets(), 10);
        let paths = Paths::new(Rate::mbit(1000));
        let model = Arc::new(Model { cap: Rate::mbit(5), rtt: Duration::from_secs(1) });
        paths.follow(address(), Pace::of(model.build(Instant::now(), 1200)));
        assert_eq!(paths.batch_packets(), 1);
    }

    #[test]
    fn one_address_does_not_slow_another_and_idle_buckets_are_dropped() {
        let paths = Paths::new(Rate(1000));
        let now = Instant::now();
        for port in 1..500 {
            let to = SocketAddr::from(([127, 0, 0, 1], port));
            assert_eq!(paths.refused_until(to, now), None);
        }
        assert!(paths.lock().len() <= MAX_BUCKETS);
    }

    #[test]
    fn headers_are_counted_per_datagram() {
        let contents = [0; 3000];
        let mut batch = transmit(&contents, "[2001:db8::1]:1".parse().unwrap());
        batch.segment_size = Some(1400);
        assert_eq!(wire_bytes(&batch), 3000 + 3 * 48);
        assert_eq!(wire_bytes(&transmit(&contents, "10.0.0.1:1".parse().unwrap())), 3028);
        assert_eq!(wire_bytes(&transmit(&contents, "[::ffff:10.0.0.1]:1".parse().unwrap())), 3028);
    }
}
