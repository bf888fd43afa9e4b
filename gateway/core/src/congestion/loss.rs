//! Loss that says something: more than the path loses anyway.
//!
//! A long path loses packets at random, and slowing down does not help. A full queue loses more than that, and all at
//! once. So losses of a round count only when they exceed what the path loses while its queue is empty, plus 2 %
//! (draft-ietf-ccwg-bbr's threshold), plus four standard deviations: a round of ten packets loses one or two by chance.
//! What is done about it is not decided here.
//!
//! At most 5 % is taken for usual, so random loss is borne up to about 8 %. Beyond that it passes for a full path, and the
//! rate falls. Seen on simulated paths of 20 Mbit/s, at round trips of 20 and 100 ms (`tests/overestimate.rs`): with 5 %
//! lost 18.5 and 18.9 Mbit/s arrive, with 8 % 17.2 and 17.6, with 12 % 10.3 and 6.8, with 20 % 3.8 and 1.6.

/// Loss beyond what is usual, in per mille, that is no accident.
const THRESHOLD_PER_MILLE: u64 = 20;

/// The same while nothing is known of what is usual, and a full queue shows by losing a third.
const STARTUP_THRESHOLD_PER_MILLE: u64 = 100;

/// The most that is taken for the path's own loss, in per mille.
const MAX_USUAL_PER_MILLE: u64 = 50;

/// After so many packets the older half of the usual loss is forgotten.
const MEMORY_PACKETS: u64 = 4096;

/// Packets delivered and lost.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    packets: u64,
    lost: u64,
}

/// Counts losses by round.
#[derive(Debug, Clone)]
pub(super) struct LossMeter {
    packet_bytes: u64,
    delivered_bytes: u64,
    lost_bytes: u64,
    usual: Tally,
}

impl LossMeter {
    pub(super) fn new(packet_bytes: u64) -> Self {
        Self { packet_bytes: packet_bytes.max(1), delivered_bytes: 0, lost_bytes: 0, usual: Tally::default() }
    }

    pub(super) fn set_packet_bytes(&mut self, packet_bytes: u64) {
        self.packet_bytes = packet_bytes.max(1);
    }

    pub(super) fn handle_delivered(&mut self, bytes: u64) {
        self.delivered_bytes = self.delivered_bytes.saturating_add(bytes);
    }

    pub(super) fn handle_lost(&mut self, bytes: u64) {
        self.lost_bytes = self.lost_bytes.saturating_add(bytes);
    }

    /// A round ends. With `queue_was_empty` its losses are the path's own.
    pub(super) fn end_round(&mut self, queue_was_empty: bool) {
        let round = self.round();
        if queue_was_empty {
            self.usual.packets = self.usual.packets.saturating_add(round.packets);
            self.usual.lost = self.usual.lost.saturating_add(round.lost);
            while self.usual.packets > MEMORY_PACKETS {
                self.usual = Tally { packets: self.usual.packets / 2, lost: self.usual.lost / 2 };
            }
        }
        (self.delivered_bytes, self.lost_bytes) = (0, 0);
    }

    /// Whether this round lost more than chance explains.
    pub(super) fn is_excess(&self) -> bool {
        self.exceeds(THRESHOLD_PER_MILLE + self.usual_per_mille())
    }

    /// The same for a path of which nothing is known.
    pub(super) fn is_excess_in_startup(&self) -> bool {
        self.exceeds(STARTUP_THRESHOLD_PER_MILLE)
    }

    fn exceeds(&self, threshold_per_mille: u64) -> bool {
        let round = self.round();
        let tolerated = round.packets.saturating_mul(threshold_per_mille) / 1000;
        let deviation = (16 * tolerated.max(1)).isqrt();
        round.lost > tolerated.saturating_add(deviation)
    }

    fn usual_per_mille(&self) -> u64 {
        (self.usual.lost.saturating_mul(1000) / self.usual.packets.max(1)).min(MAX_USUAL_PER_MILLE)
    }

    fn round(&self) -> Tally {
        let lost = self.lost_bytes.div_ceil(self.packet_bytes);
        Tally { packets: self.delivered_bytes.div_ceil(self.packet_bytes).saturating_add(lost), lost }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(meter: &mut LossMeter, packets: u64, lost: u64) -> bool {
        meter.handle_delivered((packets - lost) * 1000);
        meter.handle_lost(lost * 1000);
        let excess = meter.is_excess();
        meter.end_round(false);
        excess
    }

    #[test]
    fn small_rounds_may_lose_some_and_large_ones_their_share() {
        let mut meter = LossMeter::new(1000);
        assert!(!round(&mut meter, 10, 4));
        assert!(round(&mut meter, 10, 5));
        assert!(!round(&mut meter, 10_000, 200));
        assert!(round(&mut meter, 10_000, 300));
        assert!(!round(&mut meter, 100, 7));
        assert!(round(&mut meter, 100, 20));
    }

    #[test]
    fn what_the_path_loses_anyway_is_learned_up_to_a_bound() {
        let mut meter = LossMeter::new(1000);
        for _ in 0..20 {
            meter.handle_delivered(970_000);
            meter.handle_lost(30_000);
            meter.end_round(true);
        }
        assert!(!round(&mut meter, 10_000, 450));
        assert!(round(&mut meter, 10_000, 700));
        for _ in 0..20 {
            meter.handle_delivered(500_000);
            meter.handle_lost(500_000);
            meter.end_round(true);
        }
        assert!(round(&mut meter, 10_000, 1000));
    }
}
