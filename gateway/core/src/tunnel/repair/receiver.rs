//! The receiving half: what came, what is missing, what waits for it.
//!
//! ```text
//!           floor                                         next
//!   ... done | missing | done | waiting -> waiting | done |
//!                 '---- successor ----^
//! ```
//!
//! One ring of small slots holds what is known from the oldest missing number on; it is empty while nothing
//! is missing. A datagram waits only if the previous one of its own flow is missing or waits itself. Gaps are
//! given up in the order of their numbers, so that nothing of a flow overtakes. It asks; it never sends.

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::RepairError;
use super::config::{RepairConfig, Timing, WINDOW};
use super::format::{DataHeader, Gone, Incarnation, Number, ReportWriter};
use super::gaps::Gaps;
use super::parity::{Parity, ParityReader};
use super::shelf::Shelf;

/// What the receiving half did since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverCounters {
    /// Missing datagrams that came, or that parity found, after they were asked for.
    pub repaired: u64,
    /// Missing datagrams that came, or that parity found, before they were asked for.
    pub reordered: u64,
    /// Datagrams that parity found.
    pub recovered: u64,
    /// Missing datagrams that did not come in time, or that there was no room to wait for.
    pub given_up: u64,
    /// Datagrams that had come before, or came after they were given up.
    pub duplicates: u64,
    /// Datagrams that waited for an earlier one of their flow.
    pub waited: u64,
    /// Jumps of the numbers that were too long to repair.
    pub jumps: u64,
    /// Reports written.
    pub reports: u64,
}

/// What becomes of a number from the oldest missing one on.
#[derive(Debug, Clone, Copy)]
enum Slot {
    Done,
    Missing(Successor),
    Waiting { at: u32, successor: Successor },
}

/// The distance to the datagram that waits for this one.
type Successor = Option<NonZeroU16>;

/// The receiving half of one peer's repair. What it holds is bounded by [`RepairConfig`], provided that the
/// caller takes everything from [`Receiver::poll_packet`] before it hands in the next datagram.
#[derive(Debug)]
pub struct Receiver {
    config: RepairConfig,
    timing: Timing,
    incarnation: Option<Incarnation>,
    previous: Option<Incarnation>,
    floor: Number,
    slots: VecDeque<Slot>,
    gaps: Gaps,
    shelf: Shelf,
    parity: ParityReader,
    ready: VecDeque<Bytes>,
    report_at: Option<Duration>,
    quiet_until: Duration,
    counters: ReceiverCounters,
}

impl Receiver {
    /// Nothing received yet.
    pub fn new(config: RepairConfig) -> Self {
        Self {
            timing: Timing::initial(&config),
            config,
            incarnation: None,
            previous: None,
            floor: Number(0),
            slots: VecDeque::new(),
            gaps: Gaps::default(),
            shelf: Shelf::default(),
            parity: ParityReader::default(),
            ready: VecDeque::new(),
            report_at: None,
            quiet_until: Duration::ZERO,
            counters: ReceiverCounters::default(),
        }
    }

    /// The path's round trip, whenever it is measured anew.
    pub fn set_rtt(&mut self, rtt: Duration) {
        self.timing = Timing::new(&self.config, rtt);
    }

    /// Takes a numbered datagram. What may go on then is at [`Receiver::poll_packet`].
    pub fn handle_datagram(&mut self, now: Duration, mut datagram: Bytes) -> Result<(), RepairError> {
        let header = DataHeader::take(&mut datagram)?;
        self.handle_timeout(now);
        if self.incarnation != Some(header.incarnation) {
            self.begin(header)?;
        }
        self.report_at.get_or_insert(now + self.config.report_delay);
        let found = if header.covered { self.parity.handle_data(header, &datagram) } else { None };
        self.handle_numbered(now, header, datagram);
        if let Some((header, payload)) = found {
            self.handle_found(now, header, payload);
        }
        Ok(())
    }

    /// Takes the parity of a group; the one missing of it goes on.
    pub fn handle_parity(&mut self, now: Duration, datagram: &[u8]) -> Result<(), RepairError> {
        let parity = Parity::decode(datagram)?;
        if self.incarnation != Some(parity.incarnation) {
            return Err(RepairError::Stale);
        }
        self.handle_timeout(now);
        if let Some((header, payload)) = self.parity.handle_parity(parity) {
            self.handle_found(now, header, payload);
        }
        Ok(())
    }

    /// Takes a datagram that was not numbered: it goes on at once.
    pub fn pass(&mut self, datagram: Bytes) {
        self.ready.push_back(datagram);
    }

    /// Takes the sender's word that numbers before one cannot be repeated: they are given up at once.
    pub fn handle_gone(&mut self, datagram: &[u8]) -> Result<(), RepairError> {
        let gone = Gone::decode(datagram)?;
        if self.incarnation != Some(gone.incarnation) {
            return Err(RepairError::Stale);
        }
        while !self.slots.is_empty() && gone.oldest.after(self.floor).is_some_and(|distance| distance > 0) {
            self.gaps.shrink_front();
            self.give_up_floor();
            self.advance();
        }
        Ok(())
    }

    /// Gives up what did not come in time.
    pub fn handle_timeout(&mut self, now: Duration) {
        while self.gaps.front().is_some_and(|gap| gap.deadline <= now) {
            self.give_up_oldest();
        }
    }

    /// The next payload that goes on.
    pub fn poll_packet(&mut self) -> Option<Bytes> {
        self.ready.pop_front()
    }

    /// The next report to send: what is asked for, or that all is well.
    pub fn poll_report(&mut self, now: Duration) -> Option<Bytes> {
        let incarnation = self.incarnation?;
        let asks = self.gaps.due().is_some_and(|due| due <= now) && self.quiet_until <= now;
        if !asks && self.report_at.is_none_or(|at| at > now) {
            return None;
        }
        let mut report = ReportWriter::new(incarnation, self.floor, self.next());
        let mut asked = false;
        if asks {
            let all = self.gaps.ask(now, &self.timing, |range| {
                let room = !report.is_full();
                if room {
                    report.push(range);
                    asked = true;
                }
                room
            });
            if all {
                self.quiet_until = now + self.config.ask_spacing;
            }
        }
        if !asked && self.report_at.is_none_or(|at| at > now) {
            return None;
        }
        self.report_at = None;
        self.counters.reports += 1;
        Some(report.finish())
    }

    /// When [`Receiver::handle_timeout`] and [`Receiver::poll_report`] have something to do.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let asks = self.gaps.due().map(|due| due.max(self.quiet_until));
        let expires = self.gaps.front().map(|gap| gap.deadline);
        [asks, expires, self.report_at].into_iter().flatten().min()
    }

    /// What it did.
    pub fn counters(&self) -> &ReceiverCounters {
        &self.counters
    }

    /// Packets that wait, and their bytes.
    pub fn waiting(&self) -> (usize, usize) {
        (self.shelf.len(), self.shelf.bytes())
    }

    /// Runs of missing numbers.
    pub fn gaps(&self) -> usize {
        self.gaps.len()
    }

    /// One more than the highest number that came.
    fn next(&self) -> Number {
        self.floor.plus(self.slots.len() as u32)
    }

    /// A new life of the sender: what waited for the old one's goes on. Numbers begin at 0, unless it is
    /// this receiver that is new.
    fn begin(&mut self, header: DataHeader) -> Result<(), RepairError> {
        if self.previous == Some(header.incarnation) {
            return Err(RepairError::Stale);
        }
        self.give_up_all();
        self.previous = self.incarnation.replace(header.incarnation);
        self.parity = ParityReader::default();
        let joined_late = header.number.0 > u32::from(self.config.max_jump);
        self.floor = if joined_late { header.number } else { Number(0) };
        Ok(())
    }

    fn handle_numbered(&mut self, now: Duration, header: DataHeader, datagram: Bytes) {
        let Some(ahead) = header.number.after(self.floor) else {
            self.counters.duplicates += 1;
            return;
        };
        let ahead = ahead as usize;
        if ahead == 0 && self.slots.is_empty() {
            self.floor = self.floor.plus(1);
            self.ready.push_back(datagram);
            return;
        }
        match self.slots.get(ahead) {
            Some(Slot::Done | Slot::Waiting { .. }) => self.counters.duplicates += 1,
            Some(Slot::Missing(successor)) => self.fill(header, *successor, datagram),
            None => self.append(now, header, ahead - self.slots.len(), datagram),
        }
        self.enforce_limits();
    }

    fn handle_found(&mut self, now: Duration, header: DataHeader, payload: Bytes) {
        let duplicates = self.counters.duplicates;
        self.handle_numbered(now, header, payload);
        if self.counters.duplicates == duplicates {
            self.counters.recovered += 1;
        }
    }

    /// A missing number came.
    fn fill(&mut self, header: DataHeader, successor: Successor, payload: Bytes) {
        match self.gaps.fill(header.number) {
            true => self.counters.repaired += 1,
            false => self.counters.reordered += 1,
        }
        self.settle(header, successor, payload);
        self.advance();
    }

    /// A number behind all that are known came, and `skipped` ones before it did not.
    fn append(&mut self, now: Duration, header: DataHeader, skipped: usize, payload: Bytes) {
        if skipped > usize::from(self.config.max_jump) {
            self.counters.jumps += 1;
            self.give_up_all();
            self.floor = header.number.plus(1);
            self.ready.push_back(payload);
            return;
        }
        // Before it is settled: a flow's previous one beyond the window must not be overtaken.
        while self.slots.len() + skipped >= WINDOW && self.gaps.front().is_some() {
            self.give_up_oldest();
        }
        if skipped > 0 {
            self.gaps.open(now, self.next(), skipped as u16, &self.timing);
            self.slots.extend(std::iter::repeat_n(Slot::Missing(None), skipped));
        }
        self.slots.push_back(Slot::Done);
        self.settle(header, None, payload);
        self.advance();
        self.gaps.ripen(now, self.next(), self.config.reorder_threshold);
    }

    /// Lets a datagram go on, or wait for the previous one of its flow.
    fn settle(&mut self, header: DataHeader, successor: Successor, payload: Bytes) {
        let Some(index) = header.number.after(self.floor).map(|ahead| ahead as usize) else { return };
        let previous = NonZeroU16::new(header.back)
            .and_then(|back| Some((back, self.slots.get_mut(index.checked_sub(usize::from(back.get()))?)?)));
        let waits = match previous {
            None | Some((_, Slot::Done)) => false,
            Some((back, Slot::Missing(theirs) | Slot::Waiting { successor: theirs, .. })) => {
                // Only a sender that lies names one predecessor twice; the second then waits for the floor.
                theirs.get_or_insert(back);
                true
            }
        };
        if waits {
            self.counters.waited += 1;
            let at = self.shelf.put(&payload);
            self.slots[index] = Slot::Waiting { at, successor };
        } else {
            self.slots[index] = Slot::Done;
            self.ready.push_back(payload);
            self.release(header.number, successor);
        }
    }

    /// Lets the chain of those go on that waited for `number`.
    fn release(&mut self, mut number: Number, mut successor: Successor) {
        while let Some(distance) = successor {
            number = number.plus(u32::from(distance.get()));
            let slot = number.after(self.floor).and_then(|ahead| self.slots.get_mut(ahead as usize));
            let Some(slot) = slot else { return };
            let Slot::Waiting { at, successor: next } = *slot else { return };
            *slot = Slot::Done;
            self.ready.extend(self.shelf.take(at));
            successor = next;
        }
    }

    /// Moves the floor to the next missing number.
    fn advance(&mut self) {
        while let Some(slot) = self.slots.front() {
            match *slot {
                Slot::Missing(_) => return,
                Slot::Done => self.pop_floor(),
                Slot::Waiting { at, successor } => {
                    let number = self.floor;
                    self.ready.extend(self.shelf.take(at));
                    self.pop_floor();
                    self.release(number, successor);
                }
            }
        }
    }

    fn pop_floor(&mut self) {
        self.slots.pop_front();
        self.floor = self.floor.plus(1);
    }

    /// Gives the missing number at the floor up; its gap must have been shortened by it.
    fn give_up_floor(&mut self) {
        let number = self.floor;
        let Some(Slot::Missing(successor)) = self.slots.front().copied() else { return };
        self.pop_floor();
        self.counters.given_up += 1;
        self.release(number, successor);
    }

    fn give_up_oldest(&mut self) {
        let Some(gap) = self.gaps.pop_front() else { return };
        for _ in 0..gap.len {
            self.give_up_floor();
        }
        self.advance();
    }

    fn give_up_all(&mut self) {
        while self.gaps.front().is_some() {
            self.give_up_oldest();
        }
    }

    fn enforce_limits(&mut self) {
        while self.gaps.front().is_some()
            && (self.gaps.len() > self.config.max_gaps
                || self.shelf.len() > self.config.max_waiting
                || self.shelf.bytes() > self.config.max_waiting_bytes)
        {
            self.give_up_oldest();
        }
    }
}

#[cfg(test)]
impl Receiver {
    /// A receiver that has everything before `number`.
    pub(super) fn continued(config: RepairConfig, incarnation: Incarnation, number: Number) -> Self {
        Self { incarnation: Some(incarnation), floor: number, ..Self::new(config) }
    }
}
