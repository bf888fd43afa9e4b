//! Packets that arrived while their machine stood still, kept in order until it runs again.
//!
//! Bounded in packets and bytes; when full the oldest go first, because a transport repeats what it
//! sent first and the newest carry the newest acknowledgements.

#[cfg(test)]
mod properties;

use std::collections::VecDeque;

use bytes::Bytes;

/// Bounds of one NIC's hold.
#[derive(Debug, Clone)]
pub struct HoldConfig {
    /// Packets kept. Default 16384.
    pub max_packets: usize,
    /// Bytes kept. Default 16 MiB: 1.3 s at 100 Mbit/s. Costs that much memory per NIC on the move.
    pub max_bytes: usize,
}

impl Default for HoldConfig {
    fn default() -> Self {
        Self { max_packets: 16_384, max_bytes: 16 << 20 }
    }
}

/// A bounded queue of packets.
#[derive(Debug)]
pub struct Hold {
    config: HoldConfig,
    queue: VecDeque<Bytes>,
    bytes: usize,
}

impl Hold {
    /// An empty hold.
    pub fn new(config: HoldConfig) -> Self {
        Self { config, queue: VecDeque::new(), bytes: 0 }
    }

    /// Keeps `packet`; returns how many packets were dropped for it (itself, if it never fits).
    pub fn push(&mut self, packet: Bytes) -> u64 {
        if packet.len() > self.config.max_bytes || self.config.max_packets == 0 {
            return 1;
        }
        self.bytes += packet.len();
        self.queue.push_back(packet);
        let mut dropped = 0;
        while self.queue.len() > self.config.max_packets || self.bytes > self.config.max_bytes {
            if self.pop().is_none() {
                break;
            }
            dropped += 1;
        }
        dropped
    }

    /// The oldest packet.
    pub fn pop(&mut self) -> Option<Bytes> {
        let packet = self.queue.pop_front()?;
        self.bytes -= packet.len();
        Some(packet)
    }

    /// Puts the packet that [`Hold::pop`] gave back in front, because it could not leave yet; returns how many packets were
    /// dropped for it: itself, if others took its room meanwhile.
    pub fn return_first(&mut self, packet: Bytes) -> u64 {
        if self.queue.len() >= self.config.max_packets || self.bytes + packet.len() > self.config.max_bytes {
            return 1;
        }
        self.bytes += packet.len();
        self.queue.push_front(packet);
        0
    }

    /// Packets held.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Nothing held.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_leave_in_the_order_they_came() {
        let mut hold = Hold::new(HoldConfig::default());
        for i in 0..5u8 {
            assert_eq!(hold.push(Bytes::copy_from_slice(&[i])), 0);
        }
        let first = hold.pop().unwrap();
        assert_eq!(hold.return_first(first), 0);
        let order: Vec<u8> = std::iter::from_fn(|| hold.pop()).map(|p| p[0]).collect();
        assert_eq!((order, hold.bytes()), (vec![0, 1, 2, 3, 4], 0));
    }

    #[test]
    fn the_oldest_are_dropped_at_the_limit_of_packets() {
        let mut hold = Hold::new(HoldConfig { max_packets: 2, max_bytes: 100 });
        assert_eq!((0..3u8).map(|i| hold.push(Bytes::copy_from_slice(&[i]))).sum::<u64>(), 1);
        assert_eq!(hold.pop().unwrap()[0], 1);
    }

    #[test]
    fn the_oldest_are_dropped_at_the_limit_of_bytes() {
        let mut hold = Hold::new(HoldConfig { max_packets: 10, max_bytes: 100 });
        assert_eq!(hold.push(vec![1; 60].into()), 0);
        assert_eq!(hold.push(vec![2; 60].into()), 1);
        assert_eq!(hold.push(vec![3; 101].into()), 1);
        assert_eq!((hold.len(), hold.bytes()), (1, 60));
    }
}
