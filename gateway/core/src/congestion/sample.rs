//! Delivery-rate samples: how fast the network took what was sent, measured over each packet's time in flight.
//!
//! As in draft-cheng-iccrg-delivery-rate-estimation: what was delivered between a packet's departure and its
//! acknowledgement, over the longer of the time in which that was sent and the time in which it was acknowledged, so that
//! neither a burst of acknowledgements nor one of packets passes for a fast path. Samples that the sender itself kept low
//! are marked. What follows from a sample is not decided here.

use std::collections::VecDeque;
use std::time::Duration;

use crate::units::Rate;

/// Batches sent within this time of one another share a record. At a round trip of 20 ms that is half a per cent of a
/// sample's length.
const SAME_BATCH: Duration = Duration::from_micros(100);

/// How many batches in flight are remembered, at about 100 bytes each. Older ones give no sample.
const MAX_RECORDS: usize = 1 << 15;

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// One batch as it was sent.
#[derive(Debug, Clone, Copy)]
struct Record {
    sent: Duration,
    /// When the first of it left, if that was told.
    departed: Option<Duration>,
    delivered_bytes: u64,
    delivered_at: Duration,
    first_sent: Duration,
    in_flight_bytes: u64,
    app_limited: bool,
}

/// What one batch of acknowledgements says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sample {
    /// The newest acknowledged packet's round trip.
    pub(super) rtt: Duration,
    /// The delivery rate over its flight; `None` if that was too short to tell.
    pub(super) bandwidth: Option<Rate>,
    /// The sender had nothing more to send then: the path may be faster.
    pub(super) app_limited: bool,
    /// How many bytes had been delivered, in all, when that packet was sent.
    pub(super) delivered_before_bytes: u64,
}

/// Keeps what is needed for samples.
#[derive(Debug, Clone)]
pub(super) struct Sampler {
    delivered_bytes: u64,
    delivered_at: Duration,
    first_sent: Duration,
    app_limited_until_bytes: Option<u64>,
    records: VecDeque<Record>,
    newest_acked: Option<Record>,
}

impl Sampler {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            delivered_bytes: 0,
            delivered_at: now,
            first_sent: now,
            app_limited_until_bytes: None,
            records: VecDeque::new(),
            newest_acked: None,
        }
    }

    /// All that was delivered so far.
    pub(super) fn delivered_bytes(&self) -> u64 {
        self.delivered_bytes
    }

    /// A batch leaves; `in_flight_bytes` does not count it yet.
    pub(super) fn handle_sent(&mut self, now: Duration, bytes: u64, in_flight_bytes: u64) {
        if in_flight_bytes == 0 {
            (self.first_sent, self.delivered_at) = (now, now);
        }
        let in_flight_bytes = in_flight_bytes.saturating_add(bytes);
        if let Some(last) = self.records.back_mut()
            && now.saturating_sub(last.sent) < SAME_BATCH
        {
            last.in_flight_bytes = in_flight_bytes;
            return;
        }
        if self.records.len() == MAX_RECORDS {
            self.records.pop_front();
        }
        self.records.push_back(Record {
            sent: now,
            departed: None,
            delivered_bytes: self.delivered_bytes,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
            in_flight_bytes,
            app_limited: self.app_limited_until_bytes.is_some(),
        });
    }

    /// The newest batch was held back before the network and left only now. If several were made at the same moment, the
    /// first counts: a later one would make the round trips of those before it too short.
    pub(super) fn handle_departed(&mut self, at: Duration) {
        if let Some(last) = self.records.back_mut() {
            last.departed.get_or_insert(at.max(last.sent));
        }
    }

    /// A packet that was sent at `sent` is acknowledged.
    pub(super) fn handle_acked(&mut self, sent: Duration, bytes: u64) {
        self.delivered_bytes = self.delivered_bytes.saturating_add(bytes);
        let Some(record) = self.record(sent) else { return };
        if self.newest_acked.is_none_or(|newest| newest.sent < record.sent) {
            self.newest_acked = Some(record);
        }
    }

    /// The acknowledgements that came together end. `in_flight_bytes` is what is left; `app_limited`: nothing waits to
    /// be sent. Samples shorter than `shortest` have no bandwidth.
    pub(super) fn handle_acks_end(
        &mut self,
        now: Duration,
        in_flight_bytes: u64,
        app_limited: bool,
        shortest: Duration,
    ) -> Option<Sample> {
        if self.app_limited_until_bytes.is_some_and(|until| self.delivered_bytes > until) {
            self.app_limited_until_bytes = None;
        }
        if app_limited {
            self.app_limited_until_bytes = Some(self.delivered_bytes.saturating_add(in_flight_bytes));
        }
        let newest = self.newest_acked.take()?;
        self.delivered_at = now;
        self.first_sent = newest.sent;
        let rtt = now.saturating_sub(newest.departed.unwrap_or(newest.sent));
        let sending = newest.sent.saturating_sub(newest.first_sent);
        let acknowledging = now.saturating_sub(newest.delivered_at);
        let interval = sending.max(acknowledging);
        let bytes = self.delivered_bytes - newest.delivered_bytes;
        let bandwidth = (interval >= shortest).then(|| rate(bytes, interval)).flatten();
        self.forget_before(newest.sent.saturating_sub(2 * rtt));
        let delivered_before_bytes = newest.delivered_bytes;
        Some(Sample { rtt, bandwidth, app_limited: newest.app_limited, delivered_before_bytes })
    }

    /// How much was in flight right after the batch of that time was sent.
    pub(super) fn in_flight_at_bytes(&self, sent: Duration) -> Option<u64> {
        self.record(sent).map(|record| record.in_flight_bytes)
    }

    fn record(&self, sent: Duration) -> Option<Record> {
        let after = self.records.partition_point(|record| record.sent <= sent);
        let before = after.checked_sub(1).and_then(|index| self.records.get(index))?;
        // Another batch's record would make a round trip of the time between the two.
        (sent - before.sent < SAME_BATCH).then_some(*before)
    }

    fn forget_before(&mut self, sent: Duration) {
        while self.records.front().is_some_and(|oldest| oldest.sent < sent) {
            self.records.pop_front();
        }
    }
}

pub(super) fn rate(bytes: u64, time: Duration) -> Option<Rate> {
    let per_second = (u128::from(bytes) * NANOS_PER_SECOND).checked_div(time.as_nanos())?;
    Some(Rate(u64::try_from(per_second).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Sends 1000 bytes each `every` milliseconds, each acknowledged after 100; gives the last sample.
    fn steady(sampler: &mut Sampler, from: u32, every: u32, count: u32) -> Sample {
        let mut last = None;
        for step in from..from + count * every + 100 {
            if step >= from + 100 && (step - from - 100).is_multiple_of(every) {
                sampler.handle_acked(MS * (step - 100), 1000);
                last = sampler.handle_acks_end(MS * step, 1000, false, 50 * MS).or(last);
            }
            if (step - from).is_multiple_of(every) && step < from + count * every {
                sampler.handle_sent(MS * step, 1000, if step == from { 0 } else { 1000 });
            }
        }
        last.unwrap()
    }

    #[test]
    fn a_steady_sender_measures_its_own_rate() {
        let mut sampler = Sampler::new(Duration::ZERO);
        let sample = steady(&mut sampler, 0, 2, 200);
        assert_eq!(sample.rtt, 100 * MS);
        assert!(!sample.app_limited);
        let rate = sample.bandwidth.unwrap().0;
        assert!((490_000..=500_000).contains(&rate), "{rate}");
    }

    #[test]
    fn acknowledgements_that_come_in_a_burst_do_not_raise_the_rate() {
        let mut sampler = Sampler::new(Duration::ZERO);
        for step in 0..100 {
            sampler.handle_sent(MS * step, 1000, if step == 0 { 0 } else { 1000 });
        }
        let mut most = 0;
        for step in 0..100 {
            sampler.handle_acked(MS * step, 1000);
            let now = 200 * MS + Duration::from_micros(u64::from(step));
            let sample = sampler.handle_acks_end(now, 1000, false, Duration::ZERO).unwrap();
            most = most.max(sample.bandwidth.unwrap().0);
        }
        assert!(most <= 1_000_000, "{most}");
    }

    #[test]
    fn an_idle_time_lowers_no_sample_and_too_short_a_flight_gives_none() {
        let mut sampler = Sampler::new(Duration::ZERO);
        let before = steady(&mut sampler, 0, 2, 200).bandwidth.unwrap();
        let after = steady(&mut sampler, 60_000, 2, 200).bandwidth.unwrap();
        assert!(after.0.abs_diff(before.0) < before.0 / 50, "{before} and {after}");
        sampler.handle_sent(70_000 * MS, 1000, 0);
        sampler.handle_acked(70_000 * MS, 1000);
        let sample = sampler.handle_acks_end(70_001 * MS, 0, false, 50 * MS).unwrap();
        assert_eq!(sample.bandwidth, None);
    }

    #[test]
    fn what_follows_a_pause_of_the_application_is_marked_until_it_is_delivered() {
        let mut sampler = Sampler::new(Duration::ZERO);
        let ack = |sampler: &mut Sampler, at: u32, app_limited| {
            sampler.handle_sent(MS * at, 1000, 1000);
            sampler.handle_acked(MS * at, 1000);
            sampler.handle_acks_end(MS * (at + 1), 1000, app_limited, Duration::ZERO).unwrap().app_limited
        };
        assert!(!ack(&mut sampler, 0, true));
        assert!(ack(&mut sampler, 10, false));
        assert!(ack(&mut sampler, 20, false));
        assert!(!ack(&mut sampler, 30, false));
    }

    #[test]
    fn what_was_held_back_before_the_network_is_no_round_trip() {
        let mut sampler = Sampler::new(Duration::ZERO);
        sampler.handle_sent(Duration::ZERO, 1000, 0);
        sampler.handle_departed(20 * MS);
        sampler.handle_acked(Duration::ZERO, 1000);
        let sample = sampler.handle_acks_end(120 * MS, 0, false, Duration::ZERO).unwrap();
        assert_eq!(sample.rtt, 100 * MS);
    }

    #[test]
    fn of_batches_made_at_once_the_first_to_leave_counts() {
        let mut sampler = Sampler::new(Duration::ZERO);
        for departed in [1, 30] {
            sampler.handle_sent(Duration::ZERO, 1000, 0);
            sampler.handle_departed(departed * MS);
        }
        sampler.handle_acked(Duration::ZERO, 1000);
        let sample = sampler.handle_acks_end(101 * MS, 1000, false, Duration::ZERO).unwrap();
        assert_eq!(sample.rtt, 100 * MS);
    }

    #[test]
    fn a_packet_that_was_not_announced_gives_no_sample() {
        let mut sampler = Sampler::new(Duration::ZERO);
        sampler.handle_sent(Duration::ZERO, 1000, 0);
        sampler.handle_acked(20 * MS, 1000);
        assert_eq!(sampler.handle_acks_end(120 * MS, 0, false, Duration::ZERO), None);
        assert_eq!(sampler.delivered_bytes(), 1000);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut sampler = Sampler::new(Duration::ZERO);
        for step in 0..2 * MAX_RECORDS as u32 {
            sampler.handle_sent(MS * step, 1000, 1000);
        }
        assert_eq!(sampler.records.len(), MAX_RECORDS);
    }
}
