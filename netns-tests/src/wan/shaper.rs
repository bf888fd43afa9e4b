//! Decides the fate and the moment of every packet in one direction. No clock, no device: time is a parameter (since
//! the WAN was built), frames come in by [`Shaper::handle_frame`] and out by [`Shaper::poll_release`].
//!
//! ```text
//! frame -> cut? -> random loss -> queue full? -> line (rate) -> delay, jitter, late, twice -> cut? -> out
//! ```
//!
//! Super-packets stay whole as long as the line needs at most [`MAX_RUN_TIME`] for them and no segment is taken out of
//! the middle; otherwise they leave as several runs. A changed profile holds for what arrives afterwards.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::counters::{DropCause, Ledger, PacketClass, PathCounters, Sample, Tally};
use super::frame::{Frame, Segments};
use super::profile::PathProfile;

/// How long a run of segments may occupy the line and still be delivered as one.
pub const MAX_RUN_TIME: Duration = Duration::from_millis(1);

/// What may be on its way at most, whatever rate and delay say: a bound on memory, in bytes.
pub const MAX_IN_FLIGHT_BYTES: u64 = 256 * 1024 * 1024;

/// One direction.
#[derive(Debug)]
pub(super) struct Shaper {
    profile: PathProfile,
    cut: bool,
    random: StdRng,
    line_free: Duration,
    last_release: Duration,
    in_flight: VecDeque<Departure>,
    in_flight_bytes: u64,
    ledger: Ledger,
}

#[derive(Debug)]
struct Departure {
    at: Duration,
    class: usize,
    tally: Tally,
    frame: Frame,
}

/// A run of segments that leave together.
struct Run {
    segments: Range<usize>,
    line_start: Duration,
    line_end: Duration,
    tally: Tally,
    fate: Fate,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    OnTime,
    Late,
    Twice,
}

impl Shaper {
    pub fn new(profile: PathProfile, seed: u64, classes: Vec<PacketClass>) -> Self {
        Self {
            profile,
            cut: false,
            random: StdRng::seed_from_u64(seed),
            line_free: Duration::ZERO,
            last_release: Duration::ZERO,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            ledger: Ledger::new(classes),
        }
    }

    pub fn set_profile(&mut self, profile: PathProfile) {
        self.profile = profile;
    }

    /// A cut takes what arrives and what is on its way, until it is healed.
    pub fn set_cut(&mut self, cut: bool) {
        self.cut = cut;
    }

    pub fn counters(&self) -> &PathCounters {
        self.ledger.counters()
    }

    pub fn samples(&self) -> Vec<Sample> {
        self.ledger.samples()
    }

    pub fn reset_counters(&mut self) {
        self.ledger.reset();
    }

    pub fn write_failed(&mut self, tally: Tally) {
        self.ledger.write_failed(tally);
    }

    pub fn handle_frame(&mut self, now: Duration, frame: Frame) {
        let segments = frame.segments();
        let header = frame.header();
        let class = self.ledger.classify(header.as_ref());
        let mut offered = Tally::default();
        (0..segments.count).for_each(|index| offered.add(segments.length(index)));
        self.ledger.offered(now, class, header.as_ref(), offered);
        let runs = self.admit(now, &segments);
        self.ledger.queued(now, self.profile.bytes_in(self.line_free.saturating_sub(now)));
        let whole = runs.len() == 1 && runs[0].segments == (0..segments.count);
        if whole {
            return self.depart(&runs[0], class, frame);
        }
        for run in &runs {
            self.depart(run, class, frame.cut(&segments, run.segments.clone()));
        }
    }

    /// The next frame whose time has come, in order of time.
    pub fn poll_release(&mut self, now: Duration) -> Option<(Frame, Tally)> {
        loop {
            if self.in_flight.front()?.at > now {
                return None;
            }
            let departure = self.in_flight.pop_front()?;
            self.in_flight_bytes -= departure.tally.bytes;
            if self.cut {
                self.ledger.dropped_many(now, departure.tally);
                continue;
            }
            self.ledger.delivered(now, departure.class, departure.tally);
            return Some((departure.frame, departure.tally));
        }
    }

    /// When [`Shaper::poll_release`] will have something.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.in_flight.front().map(|departure| departure.at)
    }

    /// Lets each segment pass the cut, the dice and the queue, and joins neighbours that leave together.
    fn admit(&mut self, now: Duration, segments: &Segments) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::with_capacity(1);
        let mut admitted = 0;
        for index in 0..segments.count {
            let bytes = segments.length(index);
            if let Some(why) = self.obstacle(now, bytes, admitted) {
                self.ledger.dropped(now, why, bytes);
                continue;
            }
            admitted += bytes as u64;
            let line_start = self.line_free.max(now);
            self.line_free = line_start + self.profile.line_time(bytes);
            let fate = self.fate();
            let joins = |run: &Run| {
                run.segments.end == index
                    && (run.fate, fate) == (Fate::OnTime, Fate::OnTime)
                    && self.line_free - run.line_start <= MAX_RUN_TIME
            };
            if runs.last().is_none_or(|run| !joins(run)) {
                let tally = Tally::default();
                runs.push(Run { segments: index..index, line_start, line_end: line_start, tally, fate });
            }
            if let Some(run) = runs.last_mut() {
                run.segments.end = index + 1;
                run.line_end = self.line_free;
                run.tally.add(bytes);
            }
        }
        runs
    }

    fn obstacle(&mut self, now: Duration, bytes: usize, admitted: u64) -> Option<DropCause> {
        if self.cut {
            return Some(DropCause::Cut);
        }
        if self.chance(self.profile.loss) {
            return Some(DropCause::Lost);
        }
        let queued = self.profile.bytes_in(self.line_free.saturating_sub(now)) + bytes as u64;
        let in_flight = self.in_flight_bytes + admitted + bytes as u64;
        let full = queued > self.profile.queue_bytes && self.profile.rate_bits_per_second.is_some();
        (full || in_flight > MAX_IN_FLIGHT_BYTES).then_some(DropCause::QueueFull)
    }

    fn fate(&mut self) -> Fate {
        if self.chance(self.profile.reorder) {
            Fate::Late
        } else if self.chance(self.profile.duplicate) {
            Fate::Twice
        } else {
            Fate::OnTime
        }
    }

    /// A probability of zero asks for no random number, so that it does not shift the seeded sequence of the others.
    fn chance(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.random.random::<f64>() < probability
    }

    fn depart(&mut self, run: &Run, class: usize, frame: Frame) {
        let arrival = run.line_end + self.delay();
        let at = arrival.max(self.last_release);
        let tally = run.tally;
        match run.fate {
            Fate::Late => {
                self.ledger.reordered(tally);
                self.enqueue(Departure { at: at + self.profile.reorder_by, class, tally, frame });
                return;
            }
            Fate::Twice => {
                self.ledger.duplicated(tally);
                self.enqueue(Departure { at, class, tally, frame: frame.clone() });
            }
            Fate::OnTime => {}
        }
        self.last_release = at;
        self.enqueue(Departure { at, class, tally, frame });
    }

    fn delay(&mut self) -> Duration {
        if self.profile.jitter.is_zero() {
            return self.profile.delay;
        }
        let jitter = self.profile.jitter.as_secs_f64() * self.random.random_range(-1.0..1.0);
        Duration::from_secs_f64((self.profile.delay.as_secs_f64() + jitter).max(0.0))
    }

    /// Sorted by time; nearly always at the end.
    fn enqueue(&mut self, departure: Departure) {
        self.in_flight_bytes += departure.tally.bytes;
        if self.in_flight.back().is_none_or(|last| last.at <= departure.at) {
            return self.in_flight.push_back(departure);
        }
        let place = self.in_flight.partition_point(|other| other.at <= departure.at);
        self.in_flight.insert(place, departure);
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::tests::udp_frame;
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn shaper(rate_mbit: u64, rtt_ms: u32, loss: f64) -> Shaper {
        Shaper::new(PathProfile::new(Some(rate_mbit * 1_000_000), MS * rtt_ms, loss), 7, Vec::new())
    }

    fn drain(shaper: &mut Shaper) -> Vec<(Duration, Tally)> {
        let mut out = Vec::new();
        while let Some(at) = shaper.poll_timeout() {
            assert!(at.is_zero() || shaper.poll_release(at - Duration::from_nanos(1)).is_none());
            while let Some((_, tally)) = shaper.poll_release(at) {
                out.push((at, tally));
            }
        }
        out
    }

    #[test]
    fn packets_leave_at_line_rate_after_the_delay() {
        let mut shaper = shaper(100, 100, 0.0);
        for _ in 0..10 {
            shaper.handle_frame(Duration::ZERO, udp_frame(1472, 0));
        }
        let out = drain(&mut shaper);
        assert_eq!(out.len(), 10);
        assert_eq!(out[0].0, MS * 50 + Duration::from_micros(120));
        assert_eq!(out[9].0, MS * 50 + Duration::from_micros(1200));
    }

    #[test]
    fn a_super_packet_stays_whole_while_the_line_is_fast_enough() {
        let mut fast = shaper(1000, 0, 0.0);
        fast.handle_frame(Duration::ZERO, udp_frame(44 * 1472, 1472));
        assert_eq!(drain(&mut fast).iter().map(|one| one.1.packets).collect::<Vec<_>>(), [44]);
        let mut slow = shaper(5, 0, 0.0);
        slow.handle_frame(Duration::ZERO, udp_frame(3 * 1472, 1472));
        assert_eq!(drain(&mut slow).len(), 3, "2.4 ms per packet: each leaves alone");
    }

    #[test]
    fn the_queue_limit_drops_at_the_tail_exactly_when_it_is_full() {
        let mut shaper = shaper(1, 0, 0.0);
        shaper.profile.queue_bytes = 15_000;
        for _ in 0..12 {
            shaper.handle_frame(Duration::ZERO, udp_frame(1472, 0));
        }
        assert_eq!(shaper.counters().tail_dropped.packets, 2);
        assert_eq!(drain(&mut shaper).len(), 10);
        assert_eq!(shaper.samples()[0].queue_bytes, 15_000);
    }

    #[test]
    fn loss_takes_single_segments_out_of_super_packets_and_repeats_with_its_seed() {
        let run = || {
            let mut shaper = shaper(1000, 0, 0.01);
            shaper.profile.queue_bytes = u64::MAX;
            for _ in 0..2000 {
                shaper.handle_frame(Duration::ZERO, udp_frame(40 * 1000, 1000));
            }
            let delivered: u64 = drain(&mut shaper).iter().map(|one| one.1.packets).sum();
            (shaper.counters().lost.packets, delivered)
        };
        let (lost, delivered) = run();
        assert_eq!(lost + delivered, 80_000);
        assert!((700..900).contains(&lost), "{lost}");
        assert_eq!((lost, delivered), run());
    }

    #[test]
    fn a_cut_takes_what_is_on_its_way_and_heals() {
        let mut shaper = shaper(100, 100, 0.0);
        shaper.handle_frame(Duration::ZERO, udp_frame(100, 0));
        shaper.set_cut(true);
        shaper.handle_frame(MS, udp_frame(100, 0));
        assert!(drain(&mut shaper).is_empty());
        shaper.set_cut(false);
        shaper.handle_frame(MS * 200, udp_frame(100, 0));
        assert_eq!(drain(&mut shaper).len(), 1);
        assert_eq!(shaper.counters().cut_dropped.packets, 2);
        assert_eq!(shaper.counters().delivered.packets, 1);
    }

    #[test]
    fn jitter_keeps_the_order_and_reordering_does_not() {
        let mut shaper = shaper(100, 100, 0.0);
        shaper.profile.jitter = MS * 10;
        for step in 0..100 {
            shaper.handle_frame(MS * step, udp_frame(100 + step as usize, 0));
        }
        let bytes: Vec<u64> = drain(&mut shaper).iter().map(|one| one.1.bytes).collect();
        assert!(bytes.is_sorted());
        shaper.profile.jitter = Duration::ZERO;
        shaper.profile.reorder = 0.1;
        shaper.profile.duplicate = 0.1;
        for step in 1000..1100 {
            shaper.handle_frame(MS * step, udp_frame(step as usize, 0));
        }
        let bytes: Vec<u64> = drain(&mut shaper).iter().map(|one| one.1.bytes).collect();
        assert!(!bytes.is_sorted());
        let counters = shaper.counters();
        assert!(counters.reordered.packets > 0 && counters.duplicated.packets > 0);
        assert_eq!(bytes.len() as u64, 100 + counters.duplicated.packets);
    }
}
