//! The receiving end of a chunk channel: orders, drops what came twice, and stays within its window.
//!
//! ```text
//!  admit -> reading -> handle_chunk -> early (a gap before it) -> ready -> handed out -> taken
//!              |                                                 poll_delivery     handle_taken
//!              '-- handle_abandoned, handle_disconnected: forgotten, it will be sent again
//! ```
//!
//! All that was admitted and not taken counts against the window, so a consumer that stalls stops the
//! sender and holds no more memory than the window and one chunk.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::{ChunkHeader, cost};

/// What to do with a chunk whose header has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Read its bytes; they are accounted for.
    Read,
    /// It is here already or on its way on another stream: read no further, it counts as arrived.
    Duplicate,
}

/// What a peer did that no correct peer does. Its connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// More than the announced window.
    #[error("The peer sends chunk {number} beyond the window of {window_bytes} bytes that it was given")]
    BeyondWindow {
        /// The chunk.
        number: u64,
        /// The window.
        window_bytes: u64,
    },
    /// A chunk after the one that ended the channel.
    #[error("The peer sends chunk {number} after the end of the channel")]
    AfterEnd {
        /// The chunk.
        number: u64,
    },
}

/// What the consumer gets next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// A chunk.
    Chunk(Bytes),
    /// The end of the channel; nothing follows.
    End,
}

/// The receiving end.
#[derive(Debug)]
pub struct Receiver {
    window_bytes: u64,
    taken: u64,
    handed_out: VecDeque<u64>,
    next: u64,
    early: BTreeMap<u64, Early>,
    reading: BTreeMap<u64, u64>,
    held_bytes: u64,
    end: Option<u64>,
}

#[derive(Debug)]
struct Early {
    bytes: Bytes,
    end: bool,
}

impl Receiver {
    /// A channel from its beginning. A window below one chunk lets one chunk through at a time.
    pub fn new(window_bytes: u64) -> Self {
        Self {
            window_bytes,
            taken: 0,
            handed_out: VecDeque::new(),
            next: 0,
            early: BTreeMap::new(),
            reading: BTreeMap::new(),
            held_bytes: 0,
            end: None,
        }
    }

    /// Decides on a chunk by its header, before any of its bytes is held.
    pub fn admit(&mut self, header: &ChunkHeader) -> Result<Admission, ReceiveError> {
        let number = header.number;
        if number < self.next || self.early.contains_key(&number) || self.reading.contains_key(&number) {
            return Ok(Admission::Duplicate);
        }
        if self.end.is_some_and(|end| number > end) {
            return Err(ReceiveError::AfterEnd { number });
        }
        let cost = cost(u64::from(header.length_bytes));
        // The chunk at the head passes always: without it nothing that waits behind it could leave.
        if self.held_bytes + cost > self.window_bytes && number != self.next {
            return Err(ReceiveError::BeyondWindow { number, window_bytes: self.window_bytes });
        }
        self.reading.insert(number, cost);
        self.held_bytes += cost;
        Ok(Admission::Read)
    }

    /// The bytes of an admitted chunk are here. One that is no longer awaited is dropped.
    pub fn handle_chunk(&mut self, number: u64, bytes: Bytes, end: bool) {
        let Some(admitted) = self.reading.remove(&number) else { return };
        self.held_bytes = self.held_bytes - admitted + cost(bytes.len() as u64);
        if end {
            self.end = Some(number);
        }
        self.early.insert(number, Early { bytes, end });
    }

    /// An admitted chunk broke off; it will come again.
    pub fn handle_abandoned(&mut self, number: u64) {
        if let Some(cost) = self.reading.remove(&number) {
            self.held_bytes -= cost;
        }
    }

    /// The connection ended: everything half read will come again.
    pub fn handle_disconnected(&mut self) {
        self.held_bytes -= self.reading.values().sum::<u64>();
        self.reading.clear();
    }

    /// The next chunk in order for the consumer.
    pub fn poll_delivery(&mut self) -> Option<Delivery> {
        let early = self.early.remove(&self.next)?;
        self.next += 1;
        self.handed_out.push_back(cost(early.bytes.len() as u64));
        Some(match early.end {
            true => Delivery::End,
            false => Delivery::Chunk(early.bytes),
        })
    }

    /// The consumer is done with all below `taken`; more than was handed out is not believed.
    pub fn handle_taken(&mut self, taken: u64) {
        while self.taken < taken {
            let Some(cost) = self.handed_out.pop_front() else { return };
            self.held_bytes -= cost;
            self.taken += 1;
        }
    }

    /// The lowest number that was not taken: what an acknowledgement says.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// The lowest number that must still be sent or is being read.
    pub fn next(&self) -> u64 {
        let mut next = self.next;
        while self.early.contains_key(&next) {
            next += 1;
        }
        next
    }

    /// The window in bytes, counted with [`cost`].
    pub fn window_bytes(&self) -> u64 {
        self.window_bytes
    }

    /// Bytes admitted and not taken, counted with [`cost`].
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Whether the end was taken.
    pub fn is_finished(&self) -> bool {
        self.end.is_some_and(|end| self.taken > end)
    }
}
