//! The sending half: numbers datagrams, keeps them for a while, and repeats what is asked for.
//!
//! ```text
//!           oldest kept                     next
//!   ... gone | sent | sent | sent | sent |  not yet sent
//!                     '-- back --'  (the same flow's)
//! ```
//!
//! Nothing is ever delayed here: a datagram is numbered and leaves. A peer's report is judged against what was
//! sent, and its work and its answer are bounded whatever it claims.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::RepairError;
use super::config::{RepairConfig, Timing, WINDOW};
use super::flow::FlowBucket;
use super::format::{DataHeader, Gone, HEADER, Incarnation, Kind, Number, Range, Report};
use super::parity::ParityWriter;

/// Datagrams share allocations of this size, in bytes.
const CHUNK: usize = 64 << 10;
/// Further behind than `back` can say, and far from wrapping to something it can.
const NO_PREDECESSOR: u32 = 1 << 31;

/// What the sending half did since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SenderCounters {
    /// Datagrams numbered.
    pub sent: u64,
    /// Repeats because the peer asked.
    pub repeated: u64,
    /// Repeats of the last datagram because nothing was heard about it.
    pub probes: u64,
    /// Datagrams of parity.
    pub parity: u64,
    /// Datagrams forgotten for want of room before the peer had acknowledged them.
    pub crowded_out: u64,
}

/// A datagram that may be asked for.
#[derive(Debug)]
struct Sent {
    datagram: Bytes,
    at: Duration,
    repeated_at: Duration,
    repeats: u8,
    queued: bool,
}

/// The sending half of one peer's repair, bounded by [`RepairConfig`].
#[derive(Debug)]
pub struct Sender {
    config: RepairConfig,
    timing: Timing,
    incarnation: Incarnation,
    next: Number,
    sent: VecDeque<Sent>,
    sent_bytes: usize,
    /// The last number of every flow.
    last: Box<[Number]>,
    chunk: BytesMut,
    /// What [`Sender::take_back`] undoes.
    newest: Option<(FlowBucket, u16)>,
    repeats: VecDeque<Number>,
    /// The `next` that the peer reported last.
    seen: Number,
    probes: u8,
    probed_at: Duration,
    gone_due: bool,
    parity: ParityWriter,
    counters: SenderCounters,
}

impl Sender {
    /// Nothing sent yet in this `incarnation`.
    pub fn new(config: RepairConfig, incarnation: Incarnation) -> Self {
        Self::starting_at(config, incarnation, Number(0))
    }

    /// Begins anew with a peer that has forgotten what it had: nothing sent before is repeated.
    pub fn restart(&mut self, incarnation: Incarnation) {
        let counters = self.counters;
        let timing = self.timing;
        *self = Self { counters, timing, ..Self::new(self.config.clone(), incarnation) };
    }

    /// The path's round trip, whenever it is measured anew.
    pub fn set_rtt(&mut self, rtt: Duration) {
        self.timing = Timing::new(&self.config, rtt);
    }

    /// Numbers a datagram of `flow` whose payload is `pieces` one after another. It is [`HEADER`] bytes longer;
    /// leave [`ROOM`](super::ROOM).
    pub fn wrap(&mut self, now: Duration, flow: FlowBucket, pieces: &[&[u8]]) -> Bytes {
        let number = self.next;
        let last = std::mem::replace(&mut self.last[flow.index()], number);
        let back = number.after(last).and_then(|distance| u16::try_from(distance).ok()).unwrap_or(0);
        let len = HEADER + pieces.iter().map(|piece| piece.len()).sum::<usize>();
        if self.chunk.capacity() < len {
            self.chunk = BytesMut::with_capacity(CHUNK.max(len));
        }
        let covered = self.parity.covers(now, number);
        let header = DataHeader { incarnation: self.incarnation, number, back, covered };
        header.encode(&mut self.chunk);
        for piece in pieces {
            self.chunk.extend_from_slice(piece);
        }
        let datagram = self.chunk.split().freeze();
        if covered {
            self.parity.push(header, datagram.slice(HEADER..));
        }
        self.next = number.plus(1);
        self.newest = Some((flow, back));
        self.probes = 0;
        self.counters.sent += 1;
        self.keep(now, datagram.clone());
        datagram
    }

    /// Undoes the [`Sender::wrap`] just made, because the link did not take the datagram; after anything else
    /// was called it does nothing. A packet that our own queue refused must stay lost: it is how the connections
    /// inside learn what the path can carry.
    pub fn take_back(&mut self) {
        let Some((flow, back)) = self.newest.take() else { return };
        self.parity.take_back();
        let number = self.next.minus(1);
        self.next = number;
        self.last[flow.index()] = number.minus(if back == 0 { NO_PREDECESSOR } else { u32::from(back) });
        self.counters.sent -= 1;
        if let Some(sent) = self.sent.pop_back() {
            self.sent_bytes -= sent.datagram.len();
        }
    }

    /// Takes the peer's report: forgets what it has, queues what it asks for.
    pub fn handle_report(&mut self, now: Duration, datagram: &[u8]) -> Result<(), RepairError> {
        self.newest = None;
        let report = Report::decode(datagram)?;
        if report.incarnation != self.incarnation {
            return Err(RepairError::Stale);
        }
        let unseen = self.next.after(report.next).ok_or(RepairError::Contradiction)?;
        let undone = self.next.after(report.floor).ok_or(RepairError::Contradiction)?;
        if undone < unseen {
            return Err(RepairError::Contradiction);
        }
        while self.sent.len() > undone as usize {
            self.forget_oldest();
        }
        if report.next.after(self.seen).is_some_and(|progress| progress > 0) {
            self.seen = report.next;
            self.probes = 0;
        }
        if report.ranges().next().is_some() {
            self.parity.handle_loss(now + self.config.parity_hold);
        }
        let mut budget = u32::from(self.config.max_jump);
        for range in report.ranges() {
            self.handle_range(now, range, &mut budget);
        }
        Ok(())
    }

    /// The next datagram to send beside new ones: a repeat, parity, a probe, or that something is gone.
    pub fn poll_transmit(&mut self, now: Duration) -> Option<Bytes> {
        self.newest = None;
        while let Some(number) = self.repeats.pop_front() {
            if let Some(repeat) = self.repeat(now, number) {
                self.counters.repeated += 1;
                return Some(repeat);
            }
        }
        if let Some(parity) = self.parity.poll() {
            self.counters.parity += 1;
            return Some(parity);
        }
        if std::mem::take(&mut self.gone_due) {
            return Some(Gone { incarnation: self.incarnation, oldest: self.oldest() }.encode());
        }
        if self.probe_at().is_some_and(|at| at <= now) {
            return self.probe(now);
        }
        None
    }

    /// Takes back what [`Sender::poll_transmit`] gave, because the link did not take it; it comes first the
    /// next time. Parity does not: it would be late, and a full link has no room for it.
    pub fn return_transmit(&mut self, datagram: &Bytes) {
        match Kind::of(datagram) {
            Kind::Gone => self.gone_due = true,
            Kind::Data => {
                let Ok(header) = DataHeader::decode(datagram) else { return };
                let Some(sent) = self.sent_mut(header.number).filter(|sent| !sent.queued) else { return };
                sent.queued = true;
                sent.repeats = sent.repeats.saturating_sub(1);
                self.repeats.push_front(header.number);
            }
            Kind::Report | Kind::Parity | Kind::Unnumbered => {}
        }
    }

    /// Forgets what is too old to be worth repeating, once nothing newer does it.
    pub fn handle_timeout(&mut self, now: Duration) {
        while self.sent.front().is_some_and(|sent| now >= sent.at + self.timing.deadline) {
            self.forget_oldest();
        }
    }

    /// When [`Sender::handle_timeout`] and [`Sender::poll_transmit`] have something to do.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let stale = self.sent.back().map(|newest| newest.at + self.timing.deadline);
        [self.probe_at(), stale].into_iter().flatten().min()
    }

    /// What it did.
    pub fn counters(&self) -> &SenderCounters {
        &self.counters
    }

    /// Datagrams kept, and their bytes.
    pub fn kept(&self) -> (usize, usize) {
        (self.sent.len(), self.sent_bytes)
    }

    pub(super) fn starting_at(config: RepairConfig, incarnation: Incarnation, first: Number) -> Self {
        Self {
            timing: Timing::initial(&config),
            config,
            incarnation,
            next: first,
            sent: VecDeque::new(),
            sent_bytes: 0,
            last: vec![first.minus(NO_PREDECESSOR); FlowBucket::COUNT].into_boxed_slice(),
            chunk: BytesMut::new(),
            newest: None,
            repeats: VecDeque::new(),
            seen: first,
            probes: 0,
            probed_at: Duration::ZERO,
            gone_due: false,
            parity: ParityWriter::default(),
            counters: SenderCounters::default(),
        }
    }

    fn oldest(&self) -> Number {
        self.next.minus(self.sent.len() as u32)
    }

    fn keep(&mut self, now: Duration, datagram: Bytes) {
        self.sent_bytes += datagram.len();
        self.sent.push_back(Sent { datagram, at: now, repeated_at: now, repeats: 0, queued: false });
        let most = self.config.max_sent.min(WINDOW);
        while self.sent.len() > most || self.sent_bytes > self.config.max_sent_bytes {
            self.forget_oldest();
            self.counters.crowded_out += 1;
        }
        self.handle_timeout(now);
    }

    fn forget_oldest(&mut self) {
        if let Some(sent) = self.sent.pop_front() {
            self.sent_bytes -= sent.datagram.len();
        }
    }

    fn sent_mut(&mut self, number: Number) -> Option<&mut Sent> {
        let ahead = number.after(self.oldest())?;
        self.sent.get_mut(ahead as usize)
    }

    fn handle_range(&mut self, now: Duration, range: Range, budget: &mut u32) {
        let oldest = self.oldest();
        let (mut first, mut len) = (range.first, u32::from(range.len));
        if let Some(gone) = oldest.after(first).filter(|gone| *gone > 0) {
            self.gone_due = true;
            first = oldest;
            len = len.saturating_sub(gone);
        }
        len = len.min(self.next.after(first).unwrap_or(0)).min(*budget);
        *budget -= len;
        for distance in 0..len {
            self.queue_repeat(now, first.plus(distance));
        }
    }

    fn queue_repeat(&mut self, now: Duration, number: Number) {
        // Only a link that takes nothing fills it: with what was forgotten in the meantime.
        let full = self.repeats.len() >= WINDOW;
        let (most, spacing) = (self.config.max_repeats, self.timing.repeat_spacing);
        let Some(sent) = self.sent_mut(number) else { return };
        let just_repeated = sent.repeats > 0 && now < sent.repeated_at + spacing;
        if full || sent.queued || sent.repeats >= most || just_repeated {
            return;
        }
        sent.queued = true;
        self.repeats.push_back(number);
    }

    fn repeat(&mut self, now: Duration, number: Number) -> Option<Bytes> {
        let sent = self.sent_mut(number)?;
        sent.queued = false;
        sent.repeats += 1;
        sent.repeated_at = now;
        Some(sent.datagram.clone())
    }

    /// Each probe waits twice as long as the one before (RFC 9002, 6.2.1).
    fn probe_at(&self) -> Option<Duration> {
        let newest = self.sent.back()?;
        if self.seen == self.next || self.probes >= self.config.max_probes {
            return None;
        }
        Some(newest.at.max(self.probed_at) + self.timing.probe * (1 << self.probes.min(16)))
    }

    fn probe(&mut self, now: Duration) -> Option<Bytes> {
        self.probes += 1;
        self.probed_at = now;
        let probe = self.repeat(now, self.next.minus(1))?;
        self.counters.probes += 1;
        Some(probe)
    }
}
