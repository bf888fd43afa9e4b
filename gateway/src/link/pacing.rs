//! A UDP socket for quinn that sends to each address no faster than the configured rate.
//!
//! ```text
//!  quinn connection -> poll_writable -> try_send -> token bucket of that address -> kernel
//!                          ^                            | empty: WouldBlock
//!                          '---- wakes when refilled ---'
//! ```
//!
//! quinn paces by `1.25 * window / round trip`, so what limits the rate in the end is how fast
//! acknowledgements return: the pace is uneven, and on short paths there is none. Here the bytes
//! themselves are counted: stream data, datagrams, retransmissions and acknowledgements alike, with
//! their IP and UDP headers. quinn makes packets only when the socket takes them, so priorities among
//! streams hold until the last moment. Which packet goes next is not decided here.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use longhaul_core::units::Rate;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::time::Sleep;

/// How much of the configured rate is used. A path loaded to its last bit never drains its queue.
const UTILISATION: f64 = 0.98;

/// How long a bucket saves up. Whoever wakes up later than that on a busy machine loses rate; more would
/// be a burst that long in the path's queue.
const BURST_TIME: Duration = Duration::from_millis(10);

/// The least a bucket holds, so that slow links still send whole batches.
const MIN_BURST_BYTES: f64 = 4.0 * 1500.0;

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
    bytes_per_second: f64,
    // quinn calls the socket from every connection's task; the lock is held for a few additions.
    buckets: Mutex<BTreeMap<SocketAddr, Bucket>>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens_bytes: f64,
    filled: Instant,
}

impl PacedSocket {
    /// Paces what goes through `inner` to `rate` per address.
    pub(super) fn new(inner: Arc<dyn AsyncUdpSocket>, rate: Rate) -> Self {
        let bytes_per_second = rate.0 as f64 * UTILISATION;
        Self { inner, bytes_per_second, buckets: Mutex::new(BTreeMap::new()) }
    }

    fn burst_bytes(&self) -> f64 {
        (self.bytes_per_second * BURST_TIME.as_secs_f64()).max(MIN_BURST_BYTES)
    }

    /// When something may be sent to `to`, if not now.
    fn refused_until(&self, to: SocketAddr, now: Instant) -> Option<Instant> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let burst_bytes = self.burst_bytes();
        if buckets.len() >= MAX_BUCKETS && !buckets.contains_key(&to) {
            buckets.retain(|_, bucket| bucket.refill(now, self.bytes_per_second, burst_bytes) < burst_bytes);
        }
        if buckets.len() >= MAX_BUCKETS && !buckets.contains_key(&to) {
            return None; // strangers' handshakes: the handshake limit bounds what they are answered
        }
        let bucket = buckets.entry(to).or_insert(Bucket { tokens_bytes: burst_bytes, filled: now });
        let tokens_bytes = bucket.refill(now, self.bytes_per_second, burst_bytes);
        (tokens_bytes <= 0.0)
            .then(|| now + Duration::from_secs_f64((1.0 - tokens_bytes) / self.bytes_per_second))
    }

    /// Counts what was sent. A bucket may go below zero by one batch and then stays shut that much longer.
    fn spend(&self, transmit: &Transmit<'_>) {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = buckets.get_mut(&transmit.destination) {
            bucket.tokens_bytes -= wire_bytes(transmit) as f64;
        }
    }
}

impl Bucket {
    fn refill(&mut self, now: Instant, bytes_per_second: f64, burst_bytes: f64) -> f64 {
        let earned = now.saturating_duration_since(self.filled).as_secs_f64() * bytes_per_second;
        self.tokens_bytes = (self.tokens_bytes + earned).min(burst_bytes);
        self.filled = now;
        self.tokens_bytes
    }
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
        if let Some(until) = self.refused_until(transmit.destination, Instant::now()) {
            REFUSED_UNTIL.set(Some(until));
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.inner.try_send(transmit)?;
        self.spend(transmit);
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
        self.inner.max_transmit_segments()
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
        f.debug_struct("PacedSocket")
            .field("bytes_per_second", &self.bytes_per_second)
            .finish_non_exhaustive()
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
    use quinn::Runtime;

    use super::*;

    fn paced(rate: Rate) -> PacedSocket {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        PacedSocket::new(quinn::TokioRuntime.wrap_udp_socket(socket).unwrap(), rate)
    }

    fn transmit(contents: &[u8], destination: SocketAddr) -> Transmit<'_> {
        Transmit { destination, ecn: None, contents, segment_size: None, src_ip: None }
    }

    #[tokio::test]
    async fn two_seconds_carry_the_rate_and_one_burst() {
        let socket = paced(Rate(1_000_000));
        let to: SocketAddr = "127.0.0.1:9".parse().unwrap();
        let contents = [0; 972];
        let mut now = Instant::now();
        let end = now + Duration::from_secs(2);
        let mut sent_bytes = 0;
        while now < end {
            match socket.refused_until(to, now) {
                Some(until) => now = until,
                None => {
                    socket.spend(&transmit(&contents, to));
                    sent_bytes += 1000;
                }
            }
        }
        let burst_bytes = socket.burst_bytes() as i32;
        assert!((1_960_000..=1_961_000 + burst_bytes).contains(&sent_bytes), "{sent_bytes}");
    }

    #[tokio::test]
    async fn one_address_does_not_slow_another_and_idle_buckets_are_dropped() {
        let socket = paced(Rate(1000));
        let now = Instant::now();
        for port in 1..500 {
            let to = SocketAddr::from(([127, 0, 0, 1], port));
            assert_eq!(socket.refused_until(to, now), None);
        }
        assert!(socket.buckets.lock().unwrap().len() <= MAX_BUCKETS);
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
