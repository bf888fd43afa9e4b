//! The seam between what produces bulk data (memory, disk) and what carries it (link).
//!
//! A chunk channel is ordered, numbered, acknowledged and bounded, and it outlives the connection
//! that carries it: while a link is down, `send` waits and nothing is lost. The traits say nothing of
//! QUIC, so that pumps are tested against a queue.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use longhaul_core::units::{Bytes as Amount, Rate};
use longhaul_core::wan::{Effort, Level, Seen};
use tokio::time::Instant;

/// The largest chunk in bytes. Below 1 MiB, so that chunk and header fit one short QUIC stream that
/// can never hold more than the 1024 gaps at which quinn gives a connection up.
pub const MAX_CHUNK: usize = (1 << 20) - 1024;

/// The channel was closed by its other end or by the end of the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The bulk channel is closed")]
pub struct ChunkClosed;

/// The sending end of a chunk channel.
pub trait ChunkSend: Send + 'static {
    /// Queues one chunk of at most [`MAX_CHUNK`] bytes, waiting while the window is full.
    fn send(&mut self, chunk: Bytes) -> impl Future<Output = Result<(), ChunkClosed>> + Send;

    /// Queues one chunk without waiting, whatever the window says. For the bytes that QEMU still
    /// writes after the guest was stopped: a reader that stalls then would hang its monitor.
    fn absorb(&mut self, chunk: Bytes) -> Result<(), ChunkClosed>;

    /// Bytes queued or sent that the other end has not acknowledged.
    fn unacknowledged(&self) -> u64;

    /// What the path under it carries, where that is estimated or told.
    fn carries(&self) -> Option<Rate> {
        None
    }
}

/// The receiving end of a chunk channel.
pub trait ChunkRecv: Send + 'static {
    /// The next chunk in order; `None` when the channel was closed. Taking a chunk acknowledges the
    /// one before it, so at most the window plus one chunk is held here.
    fn recv(&mut self) -> impl Future<Output = Option<Bytes>> + Send;
}

/// What a pump's time is spent with, by which it is decided how hard to pack.
#[derive(Debug)]
pub struct PackingSeen {
    since: Instant,
    packing: Duration,
    content: Amount,
    /// The channel was full.
    pub waiting: Duration,
}

/// How often it is decided.
const JUDGED_EVERY: Duration = Duration::from_millis(100);

impl PackingSeen {
    /// Nothing yet.
    pub fn new() -> Self {
        let (packing, content, waiting) = (Duration::ZERO, Amount(0), Duration::ZERO);
        Self { since: Instant::now(), packing, content, waiting }
    }

    /// Does what packs.
    pub fn while_packing<T>(&mut self, pack: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let packed = pack();
        self.packing += begun.elapsed();
        packed
    }

    /// So much was packed, counted before it was.
    pub fn packed(&mut self, content: Amount) {
        self.content.0 += content.0;
    }

    /// The level from now on for a link that carries so much, if it was long enough since it was asked for.
    pub fn judge(&mut self, effort: &mut Effort, carries: Option<Rate>) -> Option<Level> {
        let interval = self.since.elapsed();
        if interval < JUDGED_EVERY {
            return None;
        }
        let Self { packing, waiting, content, .. } = *self;
        let level = effort.handle_seen(Seen { time: interval, packing, waiting, content }, carries);
        *self = Self::new();
        Some(level)
    }
}

impl Default for PackingSeen {
    fn default() -> Self {
        Self::new()
    }
}
