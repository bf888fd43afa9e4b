//! The receiving side of a disk mirror: what may be written when, and when the barrier is proven.
//!
//! ```text
//!  chunk ─▶ numbers, proof, bounds ─▶ queue ─▶ in flight ─▶ applied ─▶ flushed
//!                     │                                                   │
//!                     └── any of them wrong: refused, nothing after it    └── barrier first in the queue,
//!                         is applied                                          nothing unflushed: Proven
//! ```
//!
//! Content that is said to be here is looked for in the base, if there is one, and written from there; else, and
//! where the base does not hold it, it must be on the disk. The base is a kept copy that is only read.
//!
//! Records whose ranges overlap are never in flight together, because an NBD server may reorder them.
//! Time is a parameter. A barrier that was proven says nothing about records that come after it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;

use super::BLOCK;
use super::map::PART;
use super::pack::{ChunkReader, DEFAULT_WINDOW_LOG};
use super::record::{Barrier, Record, RunningDigest};
use super::refused::TargetError;

/// Limits of one mirror at the destination.
#[derive(Debug, Clone, Copy)]
pub struct TargetConfig {
    /// Bytes being written at the same time. More hides a slow disk's latency, and costs memory.
    pub max_in_flight_bytes: u64,
    /// Writes under way at the same time.
    pub max_in_flight: usize,
    /// The disk is flushed after this many bytes. Less makes the last flush shorter, and with it the
    /// pause; more costs a spinning disk less.
    pub flush_bytes: u64,
    /// The disk is flushed at least this often while there is something to flush.
    pub flush_interval: Duration,
    /// How far back what came is remembered at most, as the exponent of two: memory.
    pub max_window_log: u32,
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self {
            max_in_flight_bytes: 8 << 20,
            max_in_flight: 64,
            flush_bytes: 4 << 20,
            flush_interval: Duration::from_millis(100),
            max_window_log: DEFAULT_WINDOW_LOG,
        }
    }
}

/// What the destination's disk is asked to do next. Each is answered, in any order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write `data` at byte `offset`; answer with [`MirrorTarget::handle_applied`].
    Write {
        /// The record's number.
        number: u64,
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: Bytes,
    },
    /// Make `len` bytes at `offset` zero; answer with [`MirrorTarget::handle_applied`].
    Zero {
        /// The record's number.
        number: u64,
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Read `len` bytes at `offset` and hash them; answer with [`MirrorTarget::handle_hashed`].
    Hash {
        /// The record's number.
        number: u64,
        /// Where, in bytes.
        offset: u64,
        /// How many bytes, at most a block.
        len: u32,
    },
    /// Read `len` bytes at `offset` of the base and hash them; answer with [`MirrorTarget::handle_fetched`].
    Fetch {
        /// The record's number.
        number: u64,
        /// Where, in bytes.
        offset: u64,
        /// How many bytes, at most a block.
        len: u32,
    },
    /// Make all that was answered durable; answer with [`MirrorTarget::handle_flushed`].
    Flush,
    /// Everything before this barrier is on the disk, durable and digested alike.
    Proven(Barrier),
}

/// What has happened so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TargetCounters {
    /// Records received and found right.
    pub records: u64,
    /// Disk content in them in bytes, zeros included.
    pub received_bytes: u64,
    /// Of it, content that was here already and has the source's hash.
    pub same_bytes: u64,
    /// Of that, content that was copied from the base.
    pub base_bytes: u64,
    /// Disk content applied in bytes.
    pub applied_bytes: u64,
    /// Of those, bytes that a flush has made durable. What is missing here is what a barrier waits for.
    pub durable_bytes: u64,
    /// Flushes of the disk.
    pub flushes: u64,
}

/// A step that was handed out and not answered.
#[derive(Debug, Clone, Copy)]
struct InFlight {
    start: u64,
    end: u64,
    /// Payload in memory; zeros have none.
    bytes: u64,
    /// What must be found there.
    hash: Option<[u8; 32]>,
}

/// The state of one disk's mirror at the destination.
#[derive(Debug)]
pub struct MirrorTarget {
    size: u64,
    config: TargetConfig,
    reader: ChunkReader,
    digest: RunningDigest,
    queue: VecDeque<(u64, Record)>,
    in_flight: BTreeMap<u64, InFlight>,
    /// What follows from an answer, for records that are in flight.
    next: VecDeque<Step>,
    has_base: bool,
    in_flight_bytes: u64,
    unflushed_bytes: u64,
    unflushed: bool,
    flushing: bool,
    /// [`TargetCounters::applied_bytes`] when the flush under way was asked for.
    flushing_to: u64,
    flush_asked: bool,
    last_flush: Duration,
    proven: Option<Barrier>,
    counters: TargetCounters,
}

impl MirrorTarget {
    /// The destination of a disk of `size` bytes.
    pub fn new(size: u64, config: TargetConfig) -> Self {
        Self {
            size,
            reader: ChunkReader::new(config.max_window_log),
            config,
            digest: RunningDigest::default(),
            queue: VecDeque::new(),
            in_flight: BTreeMap::new(),
            next: VecDeque::new(),
            has_base: false,
            in_flight_bytes: 0,
            unflushed_bytes: 0,
            unflushed: false,
            flushing: false,
            flushing_to: 0,
            flush_asked: false,
            last_flush: Duration::ZERO,
            proven: None,
            counters: TargetCounters::default(),
        }
    }

    /// The same with a base: a copy of the disk from earlier that can be read beside it, and is never written.
    pub fn with_base(self) -> Self {
        Self { has_base: true, ..self }
    }

    /// Whether to take another chunk: at most one chunk is held beside what is in flight.
    pub fn wants_chunk(&self) -> bool {
        self.queue.is_empty()
    }

    /// A chunk arrived. After an error the mirror is over: nothing of this chunk is applied.
    pub fn handle_chunk(&mut self, chunk: Bytes) -> Result<(), TargetError> {
        let chunk = self.reader.read(chunk)?;
        let expected = self.digest.records() + 1;
        if chunk.first_number != expected {
            return Err(TargetError::Number { expected, found: chunk.first_number });
        }
        let (before, mut wrong) = (self.digest.clone(), None);
        for record in &chunk.records {
            wrong = wrong.or_else(|| self.check(record).err());
            self.digest.add(record);
        }
        // What is not what was sent is said to be that, whatever else is wrong with it.
        let is_proven = self.digest.proof() == chunk.proof;
        let refused = if is_proven { wrong } else { Some(TargetError::damaged(&chunk)) };
        if let Some(refused) = refused {
            self.digest = before;
            return Err(refused);
        }
        self.counters.records = self.digest.records();
        for (number, record) in (expected..).zip(chunk.records) {
            self.counters.received_bytes += record.range().map_or(0, |(start, end)| end - start);
            self.queue.push_back((number, record));
        }
        Ok(())
    }

    /// The next thing to do, or `None` until an answer, a chunk or [`Self::flush_at`].
    pub fn poll_step(&mut self, now: Duration) -> Option<Step> {
        if let Some(step) = self.next.pop_front() {
            return Some(step);
        }
        loop {
            if self.flush_due(now) {
                return Some(self.begin_flush(now));
            }
            let (number, record) = self.queue.front()?;
            match record {
                // May make a flush due at once.
                Record::Flush => self.flush_asked = true,
                Record::Barrier(barrier) => return self.poll_proven(*barrier),
                Record::Write { .. } | Record::Zero { .. } | Record::Same { .. } => {
                    return self.poll_apply(*number);
                }
            }
            self.queue.pop_front();
        }
    }

    /// The write or zero with this number is done.
    pub fn handle_applied(&mut self, number: u64) {
        if let Some(InFlight { start, end, bytes, hash }) = self.in_flight.remove(&number) {
            self.counters.applied_bytes += end - start;
            self.in_flight_bytes -= bytes;
            // What was only read costs a flush nothing.
            self.unflushed_bytes += if hash.is_none() { bytes } else { 0 };
            self.unflushed = true;
        }
    }

    /// What was asked for by [`Step::Hash`]: the BLAKE3 hash of what is there. After an error the mirror is
    /// over.
    pub fn handle_hashed(&mut self, number: u64, found: [u8; 32]) -> Result<(), TargetError> {
        if let Some(InFlight { start, end, hash: Some(hash), .. }) = self.in_flight.get(&number) {
            if *hash != found {
                return Err(TargetError::Differs { offset: *start, len: end - start });
            }
            self.counters.same_bytes += end - start;
        }
        self.handle_applied(number);
        Ok(())
    }

    /// What was asked for by [`Step::Fetch`]: what the base holds there, and its BLAKE3 hash; `None` where it could
    /// not be read. Nothing else of the base gets onto the disk than what the source has.
    pub fn handle_fetched(&mut self, number: u64, fetched: Option<(Bytes, [u8; 32])>) {
        let Some(record) = self.in_flight.get_mut(&number) else { return };
        let (offset, len) = (record.start, record.end - record.start);
        self.next.push_back(match fetched {
            Some((data, found)) if record.hash == Some(found) && data.len() as u64 == len => {
                record.hash = None;
                self.counters.same_bytes += len;
                self.counters.base_bytes += len;
                Step::Write { number, offset, data }
            }
            Some(_) | None => Step::Hash { number, offset, len: len as u32 },
        });
    }

    /// The flush is done.
    pub fn handle_flushed(&mut self) {
        self.flushing = false;
        self.counters.durable_bytes = self.flushing_to;
        self.counters.flushes += 1;
    }

    /// When [`Self::poll_step`] will want to flush, if nothing else happens.
    pub fn flush_at(&self) -> Option<Duration> {
        (self.unflushed && !self.flushing).then(|| self.last_flush + self.config.flush_interval)
    }

    /// Whether all that arrived is applied and durable.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.in_flight.is_empty() && !self.unflushed && !self.flushing
    }

    /// The barrier proven last, if no record came after it.
    pub fn proven(&self) -> Option<Barrier> {
        self.proven.filter(|barrier| barrier.records + 1 == self.digest.records())
    }

    /// How many records, from the first on, are on the disk, be it durable or not.
    pub fn applied_records(&self) -> u64 {
        let waiting = self.queue.front().map(|(number, _)| *number);
        let in_flight = self.in_flight.first_key_value().map(|(number, _)| *number);
        let first = waiting.into_iter().chain(in_flight).min();
        first.map_or(self.digest.records(), |first| first - 1)
    }

    /// What has happened so far.
    pub fn counters(&self) -> TargetCounters {
        self.counters
    }

    fn check(&self, record: &Record) -> Result<(), TargetError> {
        let received = self.digest.records();
        match record {
            Record::Write { offset, data } => self.check_range(*offset, data.len() as u64),
            Record::Zero { offset, len } => self.check_range(*offset, *len),
            Record::Same { len, .. } if u64::from(*len) > BLOCK => {
                Err(TargetError::Block { number: received + 1, len: *len })
            }
            Record::Same { offset, len, .. } => self.check_parts(*offset, *len),
            Record::Flush => Ok(()),
            Record::Barrier(barrier) if barrier.records != received || barrier.last_number != received => {
                Err(TargetError::Count { barrier: barrier.records, received })
            }
            Record::Barrier(barrier) if *barrier != self.digest.barrier() => {
                Err(TargetError::Digest { records: received })
            }
            Record::Barrier(_) => Ok(()),
        }
    }

    /// Whole parts, but for the end of the disk: no source says it of anything else.
    fn check_parts(&self, offset: u64, len: u32) -> Result<(), TargetError> {
        self.check_range(offset, u64::from(len))?;
        let ends = offset + u64::from(len);
        if len > 0 && offset.is_multiple_of(PART) && (ends.is_multiple_of(PART) || ends == self.size) {
            return Ok(());
        }
        Err(TargetError::Part { number: self.digest.records() + 1, offset, len })
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => {
                let number = self.digest.records() + 1;
                Err(TargetError::Bounds { number, offset, len, size: self.size })
            }
        }
    }

    fn flush_due(&self, now: Duration) -> bool {
        let barrier_first = matches!(self.queue.front(), Some((_, Record::Barrier(_))));
        let barrier_waits = barrier_first && self.in_flight.is_empty();
        let asked = self.flush_asked || self.unflushed_bytes >= self.config.flush_bytes;
        let overdue = now >= self.last_flush + self.config.flush_interval;
        self.unflushed && !self.flushing && (barrier_waits || asked || overdue)
    }

    fn begin_flush(&mut self, now: Duration) -> Step {
        self.flushing = true;
        self.flushing_to = self.counters.applied_bytes;
        self.flush_asked = false;
        self.unflushed = false;
        self.unflushed_bytes = 0;
        self.last_flush = now;
        Step::Flush
    }

    fn poll_proven(&mut self, barrier: Barrier) -> Option<Step> {
        if !self.in_flight.is_empty() || self.unflushed || self.flushing {
            return None;
        }
        self.queue.pop_front();
        self.proven = Some(barrier);
        Some(Step::Proven(barrier))
    }

    fn poll_apply(&mut self, number: u64) -> Option<Step> {
        let (_, record) = self.queue.front()?;
        let (start, end) = record.range()?;
        let full = self.in_flight.len() >= self.config.max_in_flight.max(1)
            || self.in_flight_bytes >= self.config.max_in_flight_bytes;
        let overlaps = self.in_flight.values().any(|other| start < other.end && other.start < end);
        if overlaps || full && !self.in_flight.is_empty() {
            return None;
        }
        let (_, record) = self.queue.pop_front()?;
        let (bytes, hash) = match &record {
            Record::Same { len, hash, .. } => (u64::from(*len), Some(*hash)),
            Record::Write { .. } | Record::Zero { .. } | Record::Flush | Record::Barrier(_) => {
                (record.payload_len(), None)
            }
        };
        self.in_flight.insert(number, InFlight { start, end, bytes, hash });
        self.in_flight_bytes += bytes;
        match record {
            Record::Write { offset, data } => Some(Step::Write { number, offset, data }),
            Record::Zero { offset, len } => Some(Step::Zero { number, offset, len }),
            Record::Same { offset, len, .. } if self.has_base => Some(Step::Fetch { number, offset, len }),
            Record::Same { offset, len, .. } => Some(Step::Hash { number, offset, len }),
            Record::Flush | Record::Barrier(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pack::ChunkPacker;
    use super::*;

    const SIZE: u64 = 1 << 20;
    const NOW: Duration = Duration::ZERO;

    fn write(offset: u64, byte: u8) -> Record {
        Record::Write { offset, data: vec![byte; 4096].into() }
    }

    fn chunk(first: u64, records: &[Record]) -> Bytes {
        chunk_behind(RunningDigest::default(), first, records)
    }

    fn chunk_behind(mut digest: RunningDigest, first: u64, records: &[Record]) -> Bytes {
        let mut packer = ChunkPacker::stored(1 << 20);
        for record in records {
            digest.add(record);
            packer.push(record);
        }
        packer.finish(first, digest.proof())
    }

    fn digest_of(records: &[Record]) -> RunningDigest {
        let mut digest = RunningDigest::default();
        records.iter().for_each(|record| digest.add(record));
        digest
    }

    fn barrier_behind(records: &[Record]) -> Record {
        Record::Barrier(digest_of(records).barrier())
    }

    fn target() -> MirrorTarget {
        MirrorTarget::new(SIZE, TargetConfig::default())
    }

    #[test]
    fn a_lost_or_repeated_chunk_is_refused() {
        let mut target = target();
        target.handle_chunk(chunk(1, &[write(0, 1)])).unwrap();
        for found in [1, 3] {
            let error = target.handle_chunk(chunk(found, &[write(0, 1)]));
            assert_eq!(error, Err(TargetError::Number { expected: 2, found }));
        }
    }

    #[test]
    fn records_beyond_the_disk_are_refused() {
        for record in [write(SIZE - 4095, 1), Record::Zero { offset: 1, len: u64::MAX }, write(u64::MAX, 1)] {
            let error = target().handle_chunk(chunk(1, &[record]));
            assert!(matches!(error, Err(TargetError::Bounds { number: 1, .. })), "{error:?}");
        }
        target().handle_chunk(chunk(1, &[write(SIZE - 4096, 1)])).unwrap();
    }

    #[test]
    fn a_barrier_behind_other_records_is_refused() {
        let sent = [write(0, 1), write(4096, 2)];
        let other = [write(0, 1), write(4096, 3), barrier_behind(&sent)];
        assert_eq!(target().handle_chunk(chunk(1, &other)), Err(TargetError::Digest { records: 2 }));
        let fewer = [write(0, 1), barrier_behind(&sent)];
        let count = TargetError::Count { barrier: 2, received: 1 };
        assert_eq!(target().handle_chunk(chunk(1, &fewer)), Err(count));
    }

    #[test]
    fn a_flush_that_is_asked_for_before_a_barrier_does_not_wait_for_its_interval() {
        let records = [write(0, 1), Record::Flush];
        let barrier = digest_of(&records).barrier();
        let mut target = target();
        target.handle_chunk(chunk(1, &[&records[..], &[Record::Barrier(barrier)]].concat())).unwrap();
        assert!(matches!(target.poll_step(NOW), Some(Step::Write { number: 1, .. })));
        target.handle_applied(1);
        assert_eq!(target.poll_step(NOW), Some(Step::Flush));
        target.handle_flushed();
        assert_eq!(target.poll_step(NOW), Some(Step::Proven(barrier)));
    }

    #[test]
    fn a_block_that_is_not_what_the_source_has_is_refused() {
        let records = [write(0, 1), Record::Same { offset: 0, len: 4096, hash: [7; 32] }];
        let asking = || {
            let mut target = target();
            target.handle_chunk(chunk(1, &records)).unwrap();
            assert!(matches!(target.poll_step(NOW), Some(Step::Write { number: 1, .. })));
            assert_eq!(target.poll_step(NOW), None, "it must not be read while it is written");
            target.handle_applied(1);
            assert_eq!(target.poll_step(NOW), Some(Step::Hash { number: 2, offset: 0, len: 4096 }));
            target
        };
        let differs = TargetError::Differs { offset: 0, len: 4096 };
        assert_eq!(asking().handle_hashed(2, [8; 32]), Err(differs));
        let mut target = asking();
        target.handle_hashed(2, [7; 32]).unwrap();
        assert_eq!((target.counters().same_bytes, target.counters().applied_bytes), (4096, 8192));
        let long = Record::Same { offset: 0, len: BLOCK as u32 + 1, hash: [0; 32] };
        let error = target.handle_chunk(chunk_behind(digest_of(&records), 3, &[long]));
        assert_eq!(error, Err(TargetError::Block { number: 3, len: BLOCK as u32 + 1 }));
    }

    #[test]
    fn nobody_guesses_byte_by_byte_what_is_here() {
        let ask = |offset, len| {
            let record = Record::Same { offset, len, hash: [7; 32] };
            target().handle_chunk(chunk(1, &[record]))
        };
        for (offset, len) in [(0, 1), (0, 0), (4095, 1), (1, 4095), (4096, 4095), (512, 4096)] {
            assert_eq!(ask(offset, len), Err(TargetError::Part { number: 1, offset, len }));
        }
        assert_eq!((ask(0, 4096), ask(4096, 8192)), (Ok(()), Ok(())));
        let mut uneven = MirrorTarget::new(8192 + 512, TargetConfig::default());
        let last = Record::Same { offset: 8192, len: 512, hash: [7; 32] };
        assert_eq!(uneven.handle_chunk(chunk(1, &[last])), Ok(()), "the end of the disk");
    }

    #[test]
    fn what_the_base_holds_is_written_and_flushed_and_what_it_does_not_must_be_on_the_disk() {
        let content = Bytes::from(vec![5; 4096]);
        let hash = *blake3::hash(&content).as_bytes();
        let records = [Record::Same { offset: 0, len: 4096, hash }];
        let barrier = barrier_behind(&records);
        let fetching = || {
            let mut target = target().with_base();
            target.handle_chunk(chunk(1, &[records.to_vec(), vec![barrier.clone()]].concat())).unwrap();
            assert_eq!(target.poll_step(NOW), Some(Step::Fetch { number: 1, offset: 0, len: 4096 }));
            assert_eq!(target.poll_step(NOW), None);
            target
        };
        for not_it in [None, Some((content.slice(1..), hash)), Some((content.clone(), [1; 32]))] {
            for (found, is_it) in [(hash, true), ([1; 32], false)] {
                let mut target = fetching();
                target.handle_fetched(1, not_it.clone());
                assert_eq!(target.poll_step(NOW), Some(Step::Hash { number: 1, offset: 0, len: 4096 }));
                assert_eq!(target.handle_hashed(1, found).is_ok(), is_it);
            }
        }
        let mut target = fetching();
        target.handle_fetched(1, Some((content.clone(), hash)));
        assert_eq!(target.poll_step(NOW), Some(Step::Write { number: 1, offset: 0, data: content }));
        assert!(!target.is_idle());
        target.handle_applied(1);
        assert_eq!(target.poll_step(NOW), Some(Step::Flush), "it is content like any other");
        target.handle_flushed();
        assert!(matches!(target.poll_step(NOW), Some(Step::Proven(_))));
        assert_eq!((target.counters().same_bytes, target.counters().base_bytes), (4096, 4096));
    }

    #[test]
    fn overlapping_records_are_never_in_flight_together() {
        let mut target = target();
        target.handle_chunk(chunk(1, &[write(0, 1), write(8192, 2), write(4000, 3)])).unwrap();
        assert!(matches!(target.poll_step(NOW), Some(Step::Write { number: 1, .. })));
        assert!(matches!(target.poll_step(NOW), Some(Step::Write { number: 2, .. })));
        assert_eq!(target.poll_step(NOW), None);
        target.handle_applied(2);
        assert_eq!(target.poll_step(NOW), None);
        target.handle_applied(1);
        assert!(matches!(target.poll_step(NOW), Some(Step::Write { number: 3, .. })));
    }

    #[test]
    fn a_barrier_is_proven_only_behind_a_flush() {
        let mut target = target();
        let records = [write(0, 1), Record::Flush];
        let barrier = barrier_behind(&records);
        let records = [records.to_vec(), vec![barrier.clone()]].concat();
        target.handle_chunk(chunk(1, &records)).unwrap();
        assert!(matches!(target.poll_step(NOW), Some(Step::Write { .. })));
        assert_eq!(target.poll_step(NOW), None);
        target.handle_applied(1);
        assert_eq!(target.poll_step(NOW), Some(Step::Flush));
        assert_eq!(target.poll_step(NOW), None);
        assert_eq!(target.proven(), None);
        target.handle_flushed();
        let Some(Step::Proven(proven)) = target.poll_step(NOW) else { panic!("not proven") };
        assert_eq!(Record::Barrier(proven), barrier);
        assert_eq!(target.proven(), Some(proven));
        target.handle_chunk(chunk_behind(digest_of(&records), 4, &[write(0, 2)])).unwrap();
        assert_eq!(target.proven(), None, "a later record takes the proof back");
    }

    #[test]
    fn writes_in_flight_stay_within_their_limit() {
        let config = TargetConfig { max_in_flight: 2, max_in_flight_bytes: 4096, ..TargetConfig::default() };
        let mut target = MirrorTarget::new(SIZE, config);
        target.handle_chunk(chunk(1, &[write(0, 1), write(4096, 1)])).unwrap();
        assert!(target.poll_step(NOW).is_some());
        assert_eq!(target.poll_step(NOW), None);
        target.handle_applied(1);
        assert!(target.poll_step(NOW).is_some());
    }

    #[test]
    fn the_disk_is_flushed_all_the_time_while_writes_go_on() {
        let config = TargetConfig { flush_interval: Duration::from_secs(1), ..TargetConfig::default() };
        let mut target = MirrorTarget::new(SIZE, config);
        target.handle_chunk(chunk(1, &[write(0, 1)])).unwrap();
        assert!(matches!(target.poll_step(NOW), Some(Step::Write { .. })));
        assert_eq!(target.flush_at(), None);
        target.handle_applied(1);
        assert_eq!(target.flush_at(), Some(Duration::from_secs(1)));
        assert_eq!(target.poll_step(Duration::from_millis(999)), None);
        assert_eq!(target.poll_step(Duration::from_secs(1)), Some(Step::Flush));
        target.handle_flushed();
        assert!(target.is_idle());
    }

    #[test]
    fn what_is_not_durable_stays_within_the_flush_limit() {
        let config = TargetConfig { flush_bytes: 8192, max_in_flight: 1, ..TargetConfig::default() };
        let mut target = MirrorTarget::new(SIZE, config);
        let records: Vec<_> = (0..64).map(|block| write(block * 4096, 1)).collect();
        target.handle_chunk(chunk(1, &records)).unwrap();
        while let Some(step) = target.poll_step(NOW) {
            match step {
                Step::Write { number, .. } => target.handle_applied(number),
                Step::Flush => target.handle_flushed(),
                Step::Zero { .. } | Step::Hash { .. } | Step::Fetch { .. } | Step::Proven(_) => {
                    panic!("{step:?}")
                }
            }
            let counters = target.counters();
            assert!(counters.applied_bytes - counters.durable_bytes <= 8192, "{counters:?}");
        }
        assert_eq!((target.counters().durable_bytes, target.counters().flushes), (64 * 4096, 32));
    }
}
