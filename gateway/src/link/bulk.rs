//! The two ends of a bulk channel as memory and disk see them.
//!
//! Both talk to the peer's task through one unbounded queue. What it holds is bounded all the same: by the
//! windows of the channels, since a producer waits for room and a consumer reports each chunk once.
//! [`BulkSender::absorb`] alone goes beyond, on purpose. Nothing here knows whether the link is up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use longhaul_core::bulk::{Acknowledged, BulkId, SendWindow};
use longhaul_core::units::Rate;
use tokio::sync::{mpsc, watch};

use super::handle::LinkState;
use crate::chunk::{ChunkClosed, ChunkRecv, ChunkSend, MAX_CHUNK};

/// What an end of a channel tells the peer's task.
#[derive(Debug)]
pub(super) enum BulkCommand {
    /// Send this chunk.
    Queue { id: BulkId, chunk: Bytes },
    /// Nothing more will be sent.
    End { id: BulkId },
    /// The consumer is done with all below `taken`.
    Taken { id: BulkId, taken: u64 },
    /// The consumer went away before the end.
    Abandon { id: BulkId },
}

/// What arrives at a consumer.
#[derive(Debug)]
pub(super) enum Delivered {
    Chunk(Bytes),
    End,
}

/// The sending end of a bulk channel.
///
/// Dropping it ends the channel in order: what was queued is still delivered, then the other end's `recv`
/// gives `None`. To break a channel off, close the migration's channels with
/// [`super::PeerHandle::close_bulk`].
#[derive(Debug)]
pub struct BulkSender {
    id: BulkId,
    window: SendWindow,
    acknowledged: watch::Receiver<Acknowledged>,
    commands: mpsc::UnboundedSender<BulkCommand>,
    /// The path, once it is known.
    path: Option<watch::Receiver<LinkState>>,
    /// No more than a few times what the path holds may wait.
    short: bool,
    /// What the path carries by the operator's word.
    told: Option<Rate>,
    /// Bytes queued since the channel began, for whoever looks on.
    queued_bytes: Arc<AtomicU64>,
}

/// What a channel has on its way, for somebody who does not send on it.
#[derive(Debug, Clone)]
pub struct OnItsWay {
    id: BulkId,
    queued_bytes: Arc<AtomicU64>,
    acknowledged: watch::Receiver<Acknowledged>,
}

impl OnItsWay {
    /// The channel.
    pub fn id(&self) -> BulkId {
        self.id
    }

    /// Bytes queued or sent that the consumer at the other site has not taken.
    pub fn bytes(&self) -> u64 {
        // In this order: what is acknowledged was queued before.
        let taken = self.taken_bytes();
        self.queued_bytes().saturating_sub(taken)
    }

    /// Bytes queued since the channel began.
    pub fn queued_bytes(&self) -> u64 {
        self.queued_bytes.load(Ordering::Acquire)
    }

    /// Those of them that the consumer at the other site has taken.
    pub fn taken_bytes(&self) -> u64 {
        self.acknowledged.borrow().bytes
    }

    /// Waits until some of it is taken. Cancel-safe.
    ///
    /// # Errors
    ///
    /// When the channel is closed.
    pub async fn taken(&mut self) -> Result<(), ChunkClosed> {
        self.acknowledged.changed().await.map_err(|_closed| ChunkClosed)
    }
}

/// How many times what the path holds may wait in a channel that is kept short: enough to keep it full and to find that it
/// carries more.
const AHEAD: u64 = 3;
/// At least this much may wait in it, in bytes, and for this long: acknowledgements come late, and an estimate is low at first.
const LEAST_AHEAD_BYTES: u64 = 256 << 10;
pub(super) const SLACK: Duration = Duration::from_millis(10);

impl BulkSender {
    /// The end of a channel of which nothing was queued yet.
    pub(super) fn new(
        id: BulkId,
        window: SendWindow,
        acknowledged: watch::Receiver<Acknowledged>,
        commands: mpsc::UnboundedSender<BulkCommand>,
    ) -> Self {
        Self {
            id,
            window,
            acknowledged,
            commands,
            path: None,
            short: false,
            told: None,
            queued_bytes: Arc::default(),
        }
    }

    /// The channel.
    pub fn id(&self) -> BulkId {
        self.id
    }

    /// From now on no more waits in it than a few times what its path is believed to hold, for data of which what
    /// waits costs time in the end. Where nothing is estimated its window is the only bound.
    pub fn keep_short(&mut self) {
        self.short = true;
    }

    /// The path carries this by the operator's word, where nothing is estimated.
    pub fn told(mut self, carries: Option<Rate>) -> Self {
        self.told = carries;
        self
    }

    pub(super) fn with_path(mut self, path: watch::Receiver<LinkState>) -> Self {
        self.path = Some(path);
        self
    }

    fn bound_bytes(&self) -> u64 {
        if !self.short {
            return u64::MAX;
        }
        let held = self.path.as_ref().and_then(|path| path.borrow().current.as_ref()?.held(SLACK));
        held.map_or(u64::MAX, |held| held.0.saturating_mul(AHEAD).max(LEAST_AHEAD_BYTES))
    }

    /// For somebody who waits until what was sent is on its way.
    pub fn on_its_way(&self) -> OnItsWay {
        let (queued_bytes, acknowledged) = (self.queued_bytes.clone(), self.acknowledged.clone());
        OnItsWay { id: self.id, queued_bytes, acknowledged }
    }

    /// Waits until all that was queued is acknowledged: taken by the consumer at the other site.
    pub async fn drained(&mut self) -> Result<(), ChunkClosed> {
        while self.refresh()? > 0 {
            self.acknowledged.changed().await.map_err(|_closed| ChunkClosed)?;
        }
        Ok(())
    }

    /// Takes over what was acknowledged; gives what is left.
    fn refresh(&mut self) -> Result<u64, ChunkClosed> {
        self.acknowledged.has_changed().map_err(|_closed| ChunkClosed)?;
        let acknowledged = *self.acknowledged.borrow_and_update();
        self.window.handle_acknowledged(acknowledged);
        Ok(self.window.unacknowledged_bytes())
    }
}

impl ChunkSend for BulkSender {
    async fn send(&mut self, chunk: Bytes) -> Result<(), ChunkClosed> {
        self.refresh()?;
        while !self.window.has_room_within(chunk.len() as u64, self.bound_bytes()) {
            self.acknowledged.changed().await.map_err(|_closed| ChunkClosed)?;
            self.refresh()?;
        }
        self.absorb(chunk)
    }

    fn absorb(&mut self, chunk: Bytes) -> Result<(), ChunkClosed> {
        self.refresh()?;
        if chunk.len() > MAX_CHUNK {
            tracing::error!(id = %self.id, length_bytes = chunk.len(), "A chunk is too long; it was not sent");
            return Err(ChunkClosed);
        }
        self.window.handle_queued(chunk.len() as u64);
        self.queued_bytes.fetch_add(chunk.len() as u64, Ordering::Release);
        let queue = BulkCommand::Queue { id: self.id, chunk };
        self.commands.send(queue).map_err(|_link_closed| ChunkClosed)
    }

    fn unacknowledged(&self) -> u64 {
        let mut window = self.window.clone();
        window.handle_acknowledged(*self.acknowledged.borrow());
        window.unacknowledged_bytes()
    }

    fn carries(&self) -> Option<Rate> {
        let estimated = || self.path.as_ref()?.borrow().current.as_ref()?.pace.as_ref()?.bandwidth();
        estimated().or(self.told)
    }
}

impl Drop for BulkSender {
    fn drop(&mut self) {
        // The link may be closed already; then there is nothing to end.
        let _ = self.commands.send(BulkCommand::End { id: self.id });
    }
}

/// The receiving end of a bulk channel. Dropping it before the end closes the channel at both sites.
#[derive(Debug)]
pub struct BulkReceiver {
    pub(super) id: BulkId,
    pub(super) chunks: mpsc::UnboundedReceiver<Delivered>,
    pub(super) commands: mpsc::UnboundedSender<BulkCommand>,
    pub(super) received: u64,
    pub(super) reported: u64,
    pub(super) end: ReceiveEnd,
}

/// How the receiving end stands; for the last question a consumer has when `recv` gives `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceiveEnd {
    /// More may come.
    Open,
    /// The sender ended the channel, and everything was delivered.
    Complete,
    /// The channel was broken off; something may be missing.
    Broken,
}

impl BulkReceiver {
    /// The channel.
    pub fn id(&self) -> BulkId {
        self.id
    }

    /// Whether the channel ended in order or was broken off.
    pub fn end(&self) -> ReceiveEnd {
        self.end
    }

    fn report(&mut self) {
        if self.reported == self.received {
            return;
        }
        self.reported = self.received;
        let taken = BulkCommand::Taken { id: self.id, taken: self.received };
        let _ = self.commands.send(taken); // a closed link needs no report
    }
}

impl ChunkRecv for BulkReceiver {
    async fn recv(&mut self) -> Option<Bytes> {
        if self.end != ReceiveEnd::Open {
            return None;
        }
        self.report();
        match self.chunks.recv().await {
            Some(Delivered::Chunk(chunk)) => {
                self.received += 1;
                Some(chunk)
            }
            Some(Delivered::End) => {
                self.received += 1;
                self.report();
                self.end = ReceiveEnd::Complete;
                None
            }
            None => {
                self.end = ReceiveEnd::Broken;
                None
            }
        }
    }
}

impl Drop for BulkReceiver {
    fn drop(&mut self) {
        if self.end != ReceiveEnd::Complete {
            // The link may be closed already; then there is nothing to abandon.
            let _ = self.commands.send(BulkCommand::Abandon { id: self.id });
        }
    }
}
