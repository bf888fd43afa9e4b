//! A chunk channel inside the process: ordered, bounded, with a valve that stands for a cut link.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use gateway::chunk::{ChunkClosed, ChunkRecv, ChunkSend};
use tokio::sync::{Semaphore, mpsc, watch};

/// The sending end: `window` chunks may be on their way.
pub struct QueueSend {
    chunks: mpsc::UnboundedSender<Chunk>,
    window: Arc<Semaphore>,
    unacknowledged: Arc<AtomicU64>,
}

/// The receiving end.
pub struct QueueRecv {
    chunks: mpsc::UnboundedReceiver<Chunk>,
    window: Arc<Semaphore>,
    unacknowledged: Arc<AtomicU64>,
    open: watch::Receiver<bool>,
    before: Option<Chunk>,
    /// Which chunk gets a bit flipped.
    pub damage: Damage,
    taken: u64,
}

/// What happens to a chunk on its way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    None,
    /// In the middle of the chunk with this number, from 0.
    Chunk(u64),
    /// In the last byte of a chunk behind which none waits.
    Last,
}

/// Closed, nothing passes and nothing is acknowledged.
pub struct Valve(watch::Sender<bool>);

#[derive(Clone)]
struct Chunk {
    bytes: Bytes,
    counted: bool,
}

/// A channel with room for `window` chunks.
pub fn queue(window: usize) -> (QueueSend, QueueRecv, Valve) {
    let (send, recv) = mpsc::unbounded_channel();
    let window = Arc::new(Semaphore::new(window));
    let unacknowledged = Arc::new(AtomicU64::new(0));
    let (valve, open) = watch::channel(true);
    let sender = QueueSend { chunks: send, window: window.clone(), unacknowledged: unacknowledged.clone() };
    let receiver = QueueRecv {
        chunks: recv,
        window,
        unacknowledged,
        open,
        before: None,
        damage: Damage::None,
        taken: 0,
    };
    (sender, receiver, Valve(valve))
}

impl Valve {
    pub fn set_open(&self, open: bool) {
        self.0.send_replace(open);
    }
}

impl QueueSend {
    fn put(&self, bytes: Bytes, counted: bool) -> Result<(), ChunkClosed> {
        self.unacknowledged.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        self.chunks.send(Chunk { bytes, counted }).map_err(|_| ChunkClosed)
    }
}

impl ChunkSend for QueueSend {
    async fn send(&mut self, chunk: Bytes) -> Result<(), ChunkClosed> {
        self.window.acquire().await.map_err(|_| ChunkClosed)?.forget();
        self.put(chunk, true)
    }

    fn absorb(&mut self, chunk: Bytes) -> Result<(), ChunkClosed> {
        self.put(chunk, false)
    }

    fn unacknowledged(&self) -> u64 {
        self.unacknowledged.load(Ordering::SeqCst)
    }
}

impl ChunkRecv for QueueRecv {
    async fn recv(&mut self) -> Option<Bytes> {
        self.open.wait_for(|open| *open).await.ok()?;
        if let Some(before) = self.before.take() {
            self.unacknowledged.fetch_sub(before.bytes.len() as u64, Ordering::SeqCst);
            if before.counted {
                self.window.add_permits(1);
            }
        }
        let mut chunk = self.chunks.recv().await?;
        self.open.wait_for(|open| *open).await.ok()?;
        self.before = Some(chunk.clone());
        let len = chunk.bytes.len();
        match self.damage {
            Damage::Chunk(number) if number == self.taken => chunk.flip(len / 2),
            Damage::Last if self.chunks.is_empty() => chunk.flip(len - 1),
            Damage::None | Damage::Chunk(_) | Damage::Last => {}
        }
        self.taken += 1;
        Some(chunk.bytes)
    }
}

impl Chunk {
    fn flip(&mut self, at: usize) {
        let mut bytes = self.bytes.to_vec();
        bytes[at] ^= 1;
        self.bytes = bytes.into();
    }
}

impl Drop for QueueRecv {
    fn drop(&mut self) {
        self.window.close();
    }
}
