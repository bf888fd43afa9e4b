//! Where payloads lie while they wait, so that a slot of the ring stays small.
//!
//! A payload is copied: the link's datagram may be a piece of a buffer of 64 KiB, and one small packet that
//! waits would keep all of it. The shelf counts; keeping its bounds is the receiver's.

use bytes::Bytes;

/// Numbered places for payloads.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    places: Vec<Option<Bytes>>,
    free: Vec<u32>,
    bytes: usize,
}

impl Shelf {
    /// Lays a copy of `payload` somewhere.
    pub(super) fn put(&mut self, payload: &[u8]) -> u32 {
        self.bytes += payload.len();
        let payload = Some(Bytes::copy_from_slice(payload));
        match self.free.pop() {
            Some(at) => {
                self.places[at as usize] = payload;
                at
            }
            None => {
                self.places.push(payload);
                (self.places.len() - 1) as u32
            }
        }
    }

    /// Takes what lies there.
    pub(super) fn take(&mut self, at: u32) -> Option<Bytes> {
        let payload = self.places.get_mut(at as usize)?.take()?;
        self.bytes -= payload.len();
        self.free.push(at);
        if self.free.len() == self.places.len() {
            self.places.clear();
            self.free.clear();
        }
        Some(payload)
    }

    /// Payloads that lie here.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Their bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
