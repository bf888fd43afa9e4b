//! A queue of control messages, bounded in number and in bytes: a peer decides about both.
//!
//! It only keeps the account. What happens to something that does not fit is its user's decision.

use std::collections::VecDeque;

use longhaul_core::wire::{MAX_ADDRESSES, Message};

/// What waits, oldest first.
#[derive(Debug)]
pub(super) struct Waiting<T> {
    queue: VecDeque<(T, usize)>,
    bytes: usize,
    max_len: usize,
    max_bytes: usize,
}

impl<T> Waiting<T> {
    /// Room for `max_len` items of `max_bytes` together.
    pub(super) fn new(max_len: usize, max_bytes: usize) -> Self {
        Self { queue: VecDeque::new(), bytes: 0, max_len, max_bytes }
    }

    /// Whether an item of `bytes` fits. Into an empty queue one of any size does.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.queue.is_empty() || self.queue.len() < self.max_len && self.bytes + bytes <= self.max_bytes
    }

    /// Appends an item of `bytes`, with room or without.
    pub(super) fn push_back(&mut self, item: T, bytes: usize) {
        self.bytes += bytes;
        self.queue.push_back((item, bytes));
    }

    /// The oldest item.
    pub(super) fn pop_front(&mut self) -> Option<T> {
        let (item, bytes) = self.queue.pop_front()?;
        self.bytes -= bytes;
        Some(item)
    }

    /// Keeps what `wanted` says.
    pub(super) fn retain(&mut self, wanted: impl Fn(&T) -> bool) {
        self.queue.retain(|(item, _)| wanted(item));
        self.bytes = self.queue.iter().map(|(_, bytes)| bytes).sum();
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.bytes = 0;
    }

    /// How many items wait.
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

/// What a message takes, in bytes: its body, and something for the rest of it.
pub(super) fn message_bytes(message: &Message) -> usize {
    const ENVELOPE: usize = 64;
    match message {
        Message::Migration { body, .. } => ENVELOPE + body.as_slice().len(),
        // Each address takes less than 32 bytes.
        Message::Anchor(_) => ENVELOPE + 64 * MAX_ADDRESSES,
        Message::BulkOpen { .. } | Message::BulkAck { .. } | Message::BulkClose { .. } => ENVELOPE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_full_at_the_limit_of_items_and_at_that_of_bytes() {
        let mut waiting = Waiting::new(2, 100);
        assert!(waiting.has_room(1000), "one of any size");
        waiting.push_back('a', 60);
        assert!(waiting.has_room(40) && !waiting.has_room(41));
        waiting.push_back('b', 1);
        assert!(!waiting.has_room(0), "two is the limit");
        assert_eq!(
            (waiting.pop_front(), waiting.has_room(99), waiting.has_room(100)),
            (Some('a'), true, false)
        );
        waiting.retain(|_| false);
        assert!(waiting.is_empty() && waiting.has_room(100));
    }
}
