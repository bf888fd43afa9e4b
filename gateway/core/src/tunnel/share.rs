//! How much of a tunnel one machine may take: a token bucket for each direction.
//!
//! A bucket holds `burst` bytes at most and is filled at the rate; a packet that finds too little in it does not travel and
//! takes nothing. It delays nothing: the transports inside slow down by what they lose, and the others' packets meet no
//! queue. One packet costs an addition and a multiplication.

use std::collections::BTreeMap;
use std::time::Duration;

use super::packet::Side;
use crate::ids::VmName;
use crate::units::Rate;

const NANO: u64 = 1_000_000_000;

/// What one machine may take of the tunnel, in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareLimit {
    /// In the long run. Zero: whatever it wants.
    pub rate: Rate,
    /// At once, in bytes; no packet larger than this travels. Default 1 MiB, 65,536 at least.
    pub burst_bytes: u32,
}

impl Default for ShareLimit {
    fn default() -> Self {
        Self { rate: Rate::mbit(0), burst_bytes: 1 << 20 }
    }
}

/// A token bucket.
#[derive(Debug, Clone)]
struct Bucket {
    /// Bytes per second, and billionths of a byte per nanosecond.
    rate: u64,
    /// Billionths of bytes, so that nothing is lost to rounding.
    most: u64,
    left: u64,
    filled: Duration,
}

impl Bucket {
    /// A full one.
    fn new(now: Duration, limit: ShareLimit) -> Self {
        let most = u64::from(limit.burst_bytes) * NANO;
        Self { rate: limit.rate.0, most, left: most, filled: now }
    }

    fn take(&mut self, now: Duration, bytes: usize) -> bool {
        let passed = u64::try_from(now.saturating_sub(self.filled).as_nanos()).unwrap_or(u64::MAX);
        self.filled = self.filled.max(now);
        self.left = self.left.saturating_add(passed.saturating_mul(self.rate)).min(self.most);
        let wanted = (bytes as u64).saturating_mul(NANO);
        let fits = wanted <= self.left;
        if fits {
            self.left -= wanted;
        }
        fits
    }
}

/// One machine's two buckets, and what did not fit.
#[derive(Debug)]
struct Share {
    machine: VmName,
    ports: usize,
    to_guest: Bucket,
    from_guest: Bucket,
    dropped: u64,
}

/// A machine, as a number that is cheap to copy per packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ShareSlot(u32);

/// The shares of all machines.
#[derive(Debug)]
pub struct Shares {
    limit: ShareLimit,
    shares: BTreeMap<ShareSlot, Share>,
    next: u32,
}

impl Shares {
    /// No machine yet.
    pub fn new(limit: ShareLimit) -> Self {
        Self { limit, shares: BTreeMap::new(), next: 0 }
    }

    /// One more NIC of a machine. All of them have one share. `None`: there is no limit.
    pub fn enter(&mut self, machine: &VmName) -> Option<ShareSlot> {
        if self.limit.rate.0 == 0 {
            return None;
        }
        if let Some((slot, share)) = self.shares.iter_mut().find(|(_, share)| share.machine == *machine) {
            share.ports += 1;
            return Some(*slot);
        }
        self.next += 1;
        let bucket = Bucket::new(Duration::ZERO, self.limit);
        let (machine, slot) = (machine.clone(), ShareSlot(self.next));
        let share = Share { machine, ports: 1, to_guest: bucket.clone(), from_guest: bucket, dropped: 0 };
        self.shares.insert(slot, share);
        Some(slot)
    }

    /// One NIC less.
    pub fn leave(&mut self, slot: Option<ShareSlot>) {
        let Some((slot, share)) = slot.and_then(|slot| Some((slot, self.shares.get_mut(&slot)?))) else {
            return;
        };
        share.ports -= 1;
        if share.ports == 0 {
            self.shares.remove(&slot);
        }
    }

    /// Whether a packet of this length, sent by `sender`, still fits its machine's share, of which it takes it.
    pub fn admits(&mut self, now: Duration, slot: Option<ShareSlot>, sender: Side, bytes: usize) -> bool {
        let Some(share) = slot.and_then(|slot| self.shares.get_mut(&slot)) else { return true };
        let bucket = match sender {
            Side::Guest => &mut share.from_guest,
            Side::Remote => &mut share.to_guest,
        };
        let fits = bucket.take(now, bytes);
        share.dropped += u64::from(!fits);
        fits
    }

    /// Packets of a machine that did not fit.
    pub fn dropped(&self, slot: Option<ShareSlot>) -> u64 {
        slot.and_then(|slot| self.shares.get(&slot)).map_or(0, |share| share.dropped)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limit(mbit: u64, burst_bytes: u32) -> ShareLimit {
        ShareLimit { rate: Rate::mbit(mbit), burst_bytes }
    }

    #[test]
    fn the_burst_passes_at_once_and_not_a_byte_more() {
        let mut bucket = Bucket::new(Duration::ZERO, limit(8, 65_536));
        assert!(bucket.take(Duration::ZERO, 65_536));
        assert!(!bucket.take(Duration::ZERO, 1));
        assert!(!bucket.take(Duration::from_nanos(999), 1), "a byte takes a microsecond");
        assert!(bucket.take(Duration::from_micros(1), 1));
        assert!(!bucket.take(Duration::from_secs(3600), 65_537), "larger than the bucket");
        assert!(bucket.take(Duration::ZERO, 65_536), "a clock that goes back takes nothing away");
    }

    #[test]
    fn the_nics_of_a_machine_share_and_machines_do_not() {
        let mut shares = Shares::new(limit(8, 65_536));
        let (web, db): (VmName, VmName) = ("web1".parse().unwrap(), "db".parse().unwrap());
        let (first, second, other) = (shares.enter(&web), shares.enter(&web), shares.enter(&db));
        assert!(first == second && first != other);
        let mut admits = |slot, sender| shares.admits(Duration::ZERO, slot, sender, 65_536);
        assert!(admits(first, Side::Guest) && !admits(second, Side::Guest));
        assert!(admits(second, Side::Remote), "the other direction has its own");
        assert!(admits(other, Side::Guest));
        assert_eq!((shares.dropped(first), shares.dropped(other)), (1, 0));
        shares.leave(first);
        assert_eq!(shares.dropped(second), 1);
        shares.leave(second);
        assert_eq!(shares.shares.len(), 1);
    }

    #[test]
    fn without_a_rate_everything_passes() {
        let mut shares = Shares::new(ShareLimit::default());
        let slot = shares.enter(&"web1".parse().unwrap());
        assert_eq!(slot, None);
        assert!((0..100).all(|_| shares.admits(Duration::ZERO, slot, Side::Guest, 1 << 20)));
    }

    proptest! {
        /// Over every stretch of time, whatever comes: at most the burst and what the rate gives.
        #[test]
        fn never_more_than_the_rate_and_the_burst(
            mbit in 1_u64..20_000,
            burst in 65_536_u32..4_000_000,
            packets in prop::collection::vec((0_u64..2_000_000, 1_usize..65_536), 1..200),
        ) {
            let mut bucket = Bucket::new(Duration::ZERO, limit(mbit, burst));
            let mut passed: Vec<(u64, u128)> = Vec::new();
            let mut now_ns = 0;
            for (step, bytes) in packets {
                now_ns += step;
                if bucket.take(Duration::from_nanos(now_ns), bytes) {
                    passed.push((now_ns, bytes as u128));
                }
            }
            for (first, (from, _)) in passed.iter().enumerate() {
                let mut sum = 0;
                for (at, bytes) in &passed[first..] {
                    sum += bytes;
                    let given = u128::from(at - from) * u128::from(mbit) * 125_000 / u128::from(NANO);
                    prop_assert!(sum <= u128::from(burst) + given + 1);
                }
            }
        }

        /// Under a load that never ends: all that the rate gives, but for what is less than one packet.
        #[test]
        fn never_less_than_the_rate_under_constant_load(
            mbit in 1_u64..1000,
            bytes in 40_usize..1500,
            step_ns in 1_000_u64..40_000,
        ) {
            let mut bucket = Bucket::new(Duration::ZERO, limit(mbit, 65_536));
            while bucket.take(Duration::ZERO, 1) {}
            let offered = bytes as u128 * u128::from(NANO / step_ns);
            let rate = u128::from(mbit) * 125_000;
            let (mut passed, steps) = (0_u128, 5_000);
            for step in 1..=steps {
                if bucket.take(Duration::from_nanos(step * step_ns), bytes) {
                    passed += bytes as u128;
                }
            }
            let time = u128::from(steps * step_ns);
            let given = rate.min(offered) * time / u128::from(NANO);
            prop_assert!(passed + 2 * bytes as u128 >= given, "{passed} of {given}");
        }
    }
}
