//! The sending end of a chunk channel, and the window that its producer keeps to.
//!
//! ```text
//!            poll_transmit           handle_sent
//!  Waiting ----------------> InFlight ----------> Arrived      any state: handle_ack forgets it
//!     ^                         |
//!     '-- handle_lost, handle_refused, handle_disconnected
//! ```
//!
//! A chunk is kept until the consumer took it: a connection that carried it completely may still end
//! before the other gateway used it.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;

use super::{MAX_CHUNK_BYTES, cost};

/// How much a producer may have under way: a plain account, kept where the producer is.
#[derive(Debug, Clone)]
pub struct SendWindow {
    window_bytes: u64,
    queued: Acknowledged,
    acknowledged: Acknowledged,
}

/// Chunks and bytes since the channel began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Acknowledged {
    /// Chunks.
    pub chunks: u64,
    /// Their bytes, without headers.
    pub bytes: u64,
}

impl SendWindow {
    /// A window of `window_bytes`, counted with [`cost`].
    pub fn new(window_bytes: u64) -> Self {
        Self { window_bytes, queued: Acknowledged::default(), acknowledged: Acknowledged::default() }
    }

    /// Whether a chunk may be queued now. Into an empty window a chunk of any size may.
    pub fn has_room(&self, length_bytes: u64) -> bool {
        self.has_room_within(length_bytes, self.window_bytes)
    }

    /// The same in a window that is at present no larger than `bound_bytes`.
    pub fn has_room_within(&self, length_bytes: u64, bound_bytes: u64) -> bool {
        let chunks = self.queued.chunks - self.acknowledged.chunks;
        let used = self.unacknowledged_bytes() + cost(0) * chunks;
        chunks == 0 || used + cost(length_bytes) <= self.window_bytes.min(bound_bytes)
    }

    /// Counts a chunk that was queued, with room or without.
    pub fn handle_queued(&mut self, length_bytes: u64) {
        self.queued.chunks += 1;
        self.queued.bytes += length_bytes;
    }

    /// Sets what was acknowledged since the channel began.
    pub fn handle_acknowledged(&mut self, acknowledged: Acknowledged) {
        self.acknowledged = acknowledged;
    }

    /// Bytes queued and not acknowledged, without headers.
    pub fn unacknowledged_bytes(&self) -> u64 {
        self.queued.bytes - self.acknowledged.bytes
    }
}

/// Why the sending end gives up. Both come from a peer that broke the protocol or forgot the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// More was acknowledged than was sent.
    #[error("The peer acknowledged chunk {taken} of a bulk channel that has only {queued}")]
    NeverSent {
        /// What was acknowledged.
        taken: u64,
        /// How many chunks the channel has.
        queued: u64,
    },
    /// The peer wants to begin where this end no longer can.
    #[error(
        "The peer asks for chunk {next} again, which it had acknowledged; it lost its state, retry the migration"
    )]
    Forgotten {
        /// What the peer wants.
        next: u64,
        /// The lowest that is still held.
        oldest: u64,
    },
    /// A chunk longer than [`MAX_CHUNK_BYTES`].
    #[error("A chunk is longer than {MAX_CHUNK_BYTES} bytes")]
    TooLong,
    /// The channel was ended before.
    #[error("The bulk channel was ended before this chunk")]
    Ended,
}

/// A chunk to be sent now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Its number.
    pub number: u64,
    /// Its bytes; empty when it ends the channel.
    pub bytes: Bytes,
    /// Nothing comes after it.
    pub end: bool,
}

/// The sending end: numbers chunks, holds them until they were taken, and says which to send next.
#[derive(Debug)]
pub struct Sender {
    oldest: u64,
    held: VecDeque<Held>,
    waiting: BTreeSet<u64>,
    under_way_bytes: u64,
    peer_window_bytes: Option<u64>,
    acknowledged: Acknowledged,
    ended: bool,
}

#[derive(Debug)]
struct Held {
    bytes: Bytes,
    end: bool,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    InFlight,
    Arrived,
}

impl Sender {
    /// An empty channel whose receiving end is not known to be open.
    pub fn new() -> Self {
        Self {
            oldest: 0,
            held: VecDeque::new(),
            waiting: BTreeSet::new(),
            under_way_bytes: 0,
            peer_window_bytes: None,
            acknowledged: Acknowledged::default(),
            ended: false,
        }
    }

    /// Takes a chunk whatever is held already (the producer keeps a [`SendWindow`]); gives its number.
    pub fn push(&mut self, bytes: Bytes) -> Result<u64, SendError> {
        if bytes.len() > MAX_CHUNK_BYTES as usize {
            return Err(SendError::TooLong);
        }
        self.hold(bytes, false)
    }

    /// Nothing more will be pushed. The end travels as a last, empty chunk.
    pub fn end(&mut self) -> Result<u64, SendError> {
        let number = self.hold(Bytes::new(), true)?;
        self.ended = true;
        Ok(number)
    }

    fn hold(&mut self, bytes: Bytes, end: bool) -> Result<u64, SendError> {
        if self.ended {
            return Err(SendError::Ended);
        }
        let number = self.next_number();
        self.held.push_back(Held { bytes, end, state: State::Waiting });
        self.waiting.insert(number);
        Ok(number)
    }

    /// The peer announced its receiving end: it took all below `taken`, has all below `next`, and
    /// accepts `window_bytes` beyond `taken`. Everything it lacks waits to be sent, whatever was sent
    /// before.
    pub fn handle_open(&mut self, taken: u64, next: u64, window_bytes: u64) -> Result<(), SendError> {
        let next = next.max(taken);
        if next < self.oldest {
            return Err(SendError::Forgotten { next, oldest: self.oldest });
        }
        self.handle_ack(taken)?;
        self.rewind();
        let arrived: Vec<u64> = self.waiting.range(..next).copied().collect();
        for number in arrived {
            self.waiting.remove(&number);
            self.set_state(number, State::Arrived);
        }
        self.peer_window_bytes = Some(window_bytes);
        Ok(())
    }

    /// The connection ended, or the peer closed and may announce the channel again: nothing is sent
    /// until [`Sender::handle_open`].
    pub fn handle_disconnected(&mut self) {
        self.rewind();
        self.peer_window_bytes = None;
    }

    /// The chunk has reached the other gateway.
    pub fn handle_sent(&mut self, number: u64) {
        if self.state(number) == Some(State::InFlight) {
            self.set_state(number, State::Arrived);
        }
    }

    /// The chunk did not arrive; it is sent again.
    pub fn handle_lost(&mut self, number: u64) {
        if self.state(number) == Some(State::InFlight) {
            self.set_state(number, State::Waiting);
            self.waiting.insert(number);
        }
    }

    /// The peer refused the chunk because it has no such channel (yet): all waits until it announces one.
    pub fn handle_refused(&mut self, number: u64) {
        if self.state(number) == Some(State::InFlight) {
            self.handle_disconnected();
        }
    }

    /// The consumer took all below `taken`. Older acknowledgements than the last change nothing.
    pub fn handle_ack(&mut self, taken: u64) -> Result<(), SendError> {
        let queued = self.next_number();
        if taken > queued {
            return Err(SendError::NeverSent { taken, queued });
        }
        while self.oldest < taken {
            self.set_state(self.oldest, State::Waiting);
            self.waiting.remove(&self.oldest);
            let Some(held) = self.held.pop_front() else { break };
            self.oldest += 1;
            self.acknowledged.chunks += u64::from(!held.end);
            self.acknowledged.bytes += held.bytes.len() as u64;
        }
        Ok(())
    }

    /// The next chunk to send, lowest number first; `None` while the receiving end is not open, its
    /// window is full or nothing waits. The oldest chunk passes whatever the window says.
    pub fn poll_transmit(&mut self) -> Option<Outgoing> {
        let window_bytes = self.peer_window_bytes?;
        let number = *self.waiting.first()?;
        let held = &self.held[self.index(number)?];
        let fits = self.under_way_bytes + cost(held.bytes.len() as u64) <= window_bytes;
        if !fits && number != self.oldest {
            return None;
        }
        let outgoing = Outgoing { number, bytes: held.bytes.clone(), end: held.end };
        self.waiting.remove(&number);
        self.set_state(number, State::InFlight);
        Some(outgoing)
    }

    /// What was acknowledged since the channel began; the ending chunk is not counted.
    pub fn acknowledged(&self) -> Acknowledged {
        self.acknowledged
    }

    /// Whether the channel was ended and all of it was taken.
    pub fn is_finished(&self) -> bool {
        self.ended && self.held.is_empty()
    }

    fn next_number(&self) -> u64 {
        self.oldest + self.held.len() as u64
    }

    fn rewind(&mut self) {
        for number in self.oldest..self.next_number() {
            self.set_state(number, State::Waiting);
            self.waiting.insert(number);
        }
    }

    fn index(&self, number: u64) -> Option<usize> {
        let index = usize::try_from(number.checked_sub(self.oldest)?).ok()?;
        (index < self.held.len()).then_some(index)
    }

    fn state(&self, number: u64) -> Option<State> {
        Some(self.held[self.index(number)?].state)
    }

    fn set_state(&mut self, number: u64, state: State) {
        let Some(index) = self.index(number) else { return };
        let held = &mut self.held[index];
        let cost = cost(held.bytes.len() as u64);
        match (held.state == State::Waiting, state == State::Waiting) {
            (true, false) => self.under_way_bytes += cost,
            (false, true) => self.under_way_bytes -= cost,
            (true, true) | (false, false) => {}
        }
        held.state = state;
    }
}

impl Default for Sender {
    fn default() -> Self {
        Self::new()
    }
}
