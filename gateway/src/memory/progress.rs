//! What a memory transfer tells about itself: totals, rounds and the rate over the last second.

use std::collections::VecDeque;
use std::time::Duration;

use longhaul_core::memory::StreamPhase;
use longhaul_core::units::{Bytes, Rate};
use longhaul_core::wan::EncoderCounters;

/// The most rounds that are told apart; the last one collects all later ones.
const MAX_ROUNDS: usize = 1024;
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// One round over the machine's memory, exact to one read of the socket (128 KiB by default).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Round {
    /// Bytes of QEMU's stream.
    pub bytes: Bytes,
    /// Bytes of the chunks made of them.
    pub wire_bytes: Bytes,
    /// Pages, those of zeros included.
    pub pages: u64,
    /// How long it took.
    pub elapsed: Duration,
}

/// Where a source stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceProgress {
    /// How far into the stream it is, and whether the stream is understood.
    pub phase: StreamPhase,
    /// QEMU has connected.
    pub connected: bool,
    /// Bytes that QEMU wrote.
    pub original: Bytes,
    /// Bytes of the chunks made of them.
    pub wire: Bytes,
    /// Pages with contents.
    pub pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Device state as QEMU wrote it.
    pub device_state: Bytes,
    /// Device state as it travels.
    pub device_wire: Bytes,
    /// The rounds, the one that runs included as the last.
    pub rounds: Vec<Round>,
    /// How fast QEMU wrote over the last second.
    pub original_rate: Rate,
    /// How fast chunks were made over the last second.
    pub wire_rate: Rate,
    /// Bytes of chunks that the other side has not acknowledged; while a send waits, as many as when it began.
    pub backlog: Bytes,
    /// Pages are named by disks, or were, and not all of those are known to be read.
    pub names_unread: bool,
}

impl SourceProgress {
    pub(crate) fn new() -> Self {
        Self {
            phase: StreamPhase::Memory,
            connected: false,
            original: Bytes(0),
            wire: Bytes(0),
            pages: 0,
            zero_pages: 0,
            device_state: Bytes(0),
            device_wire: Bytes(0),
            rounds: Vec::new(),
            original_rate: Rate(0),
            wire_rate: Rate(0),
            backlog: Bytes(0),
            names_unread: false,
        }
    }
}

/// Counters at a moment, as a time since the transfer began.
#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    at: Duration,
    bytes: u64,
    wire_bytes: u64,
    pages: u64,
}

impl Mark {
    fn new(at: Duration, counters: &EncoderCounters) -> Self {
        let stream = counters.stream;
        let pages = stream.pages + stream.zero_pages;
        Self { at, bytes: stream.bytes, wire_bytes: counters.wire_bytes, pages }
    }

    fn until(self, end: Self) -> Round {
        Round {
            bytes: Bytes(end.bytes - self.bytes),
            wire_bytes: Bytes(end.wire_bytes - self.wire_bytes),
            pages: end.pages - self.pages,
            elapsed: end.at.saturating_sub(self.at),
        }
    }
}

/// Turns counters into rounds and rates. Time comes from the caller.
#[derive(Debug, Default)]
pub(super) struct Meter {
    finished: Vec<Round>,
    round_began: Mark,
    rounds_seen: u64,
    /// Fixed when the memory is complete: device state belongs to no round.
    rounds_ended: bool,
    samples: VecDeque<Mark>,
}

impl Meter {
    /// Looks for the beginning of a round or the end of the last one.
    pub(super) fn observe(&mut self, at: Duration, counters: &EncoderCounters, phase: StreamPhase) {
        let here = Mark::new(at, counters);
        if self.rounds_ended {
            return;
        }
        let begins = counters.stream.rounds > self.rounds_seen;
        if begins && self.rounds_seen > 0 {
            self.finish_round(here);
        }
        self.rounds_seen = counters.stream.rounds;
        if phase == StreamPhase::DeviceState {
            self.finish_round(here);
            self.rounds_ended = true;
        }
    }

    /// The last second's rates: of the stream and of the chunks.
    pub(super) fn sample(&mut self, at: Duration, counters: &EncoderCounters) -> (Rate, Rate) {
        let here = Mark::new(at, counters);
        while self.samples.len() > 1 && at.saturating_sub(self.samples[1].at) >= RATE_WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back(here);
        let since = self.samples[0].until(here);
        let per_second = |bytes: Bytes| match since.elapsed.as_micros() {
            0 => Rate(0),
            micros => Rate((u128::from(bytes.0) * 1_000_000 / micros) as u64),
        };
        (per_second(since.bytes), per_second(since.wire_bytes))
    }

    /// All rounds, the one that runs included.
    pub(super) fn rounds(&self, at: Duration, counters: &EncoderCounters) -> Vec<Round> {
        let running = self.round_began.until(Mark::new(at, counters));
        let running = (self.rounds_seen > 0 && !self.rounds_ended).then_some(running);
        self.finished.iter().copied().chain(running).collect()
    }

    fn finish_round(&mut self, here: Mark) {
        let round = self.round_began.until(here);
        self.round_began = here;
        match self.finished.get_mut(MAX_ROUNDS - 1) {
            Some(last) => {
                last.bytes.0 += round.bytes.0;
                last.wire_bytes.0 += round.wire_bytes.0;
                last.pages += round.pages;
                last.elapsed += round.elapsed;
            }
            None => self.finished.push(round),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(rounds: u64, pages: u64, bytes: u64) -> EncoderCounters {
        let mut counters = EncoderCounters { wire_bytes: bytes / 2, ..EncoderCounters::default() };
        counters.stream.rounds = rounds;
        counters.stream.pages = pages;
        counters.stream.bytes = bytes;
        counters
    }

    #[test]
    fn rounds_end_where_the_next_begins_and_device_state_is_in_none() {
        let mut meter = Meter::default();
        let second = Duration::from_secs;
        meter.observe(second(0), &counters(0, 0, 0), StreamPhase::Memory);
        meter.observe(second(1), &counters(1, 40, 400), StreamPhase::Memory);
        meter.observe(second(3), &counters(2, 100, 1000), StreamPhase::Memory);
        meter.observe(second(4), &counters(2, 110, 1100), StreamPhase::DeviceState);
        meter.observe(second(5), &counters(2, 110, 5000), StreamPhase::DeviceState);
        let rounds = meter.rounds(second(6), &counters(2, 110, 5000));
        let told: Vec<_> = rounds.iter().map(|r| (r.bytes.0, r.pages, r.elapsed.as_secs())).collect();
        assert_eq!(told, [(1000, 100, 3), (100, 10, 1)]);
    }

    #[test]
    fn rounds_beyond_the_limit_are_added_to_the_last() {
        let mut meter = Meter::default();
        for round in 1..=MAX_ROUNDS as u64 + 5 {
            meter.observe(
                Duration::from_secs(round),
                &counters(round, round, round * 10),
                StreamPhase::Memory,
            );
        }
        let rounds = meter.rounds(Duration::ZERO, &counters(2000, 2000, 20_000));
        assert_eq!(rounds.len(), MAX_ROUNDS + 1, "the finished ones and the running one");
        assert_eq!(rounds[MAX_ROUNDS - 1].pages, 5);
    }

    #[test]
    fn the_rate_forgets_what_is_older_than_a_second() {
        let mut meter = Meter::default();
        let tenth = |n: u64| Duration::from_millis(n * 100);
        for n in 0..20 {
            meter.sample(tenth(n), &counters(1, 0, n * 1000));
        }
        let (rate, wire) = meter.sample(tenth(20), &counters(1, 0, 19_000));
        assert!((8_000..=10_000).contains(&rate.0), "{rate:?}");
        assert!(wire.0 >= rate.0 / 2 - 1 && wire.0 <= rate.0 / 2 + 1);
        let later = meter.sample(tenth(60), &counters(1, 0, 19_000));
        assert!(later.0.0 < 2_000, "{later:?}");
    }
}
