//! The whole mirror against a model: guest, QEMU's mirror job, reader, channel and target disk, with
//! every step at an arbitrary moment. The target must end equal to the source, always, whatever its disk
//! held before, whatever copy is kept beside it, and whatever was told of them.

use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;

use super::map::PART;
use super::*;

const GRANULE: usize = 16 << 10;
const SIZE: usize = 6 * BLOCK as usize + 5 * 512;

/// One event: what, where, and how much or which.
type Event = (u8, u16, u16);

/// QEMU at the source: its disk, what its mirror job still owes us, and a mirrored write on its way.
struct Qemu {
    disk: Vec<u8>,
    dirty: Vec<bool>,
    under_way: Vec<(usize, Vec<u8>)>,
}

struct World {
    qemu: Qemu,
    source: MirrorSource,
    /// Runs under way, with the content once the disk was sampled.
    reads: Vec<(ReadRun, Option<Vec<u8>>)>,
    channel: Vec<Bytes>,
    target: MirrorTarget,
    /// Steps under way, with whether the disk has them already.
    steps: Vec<(Step, bool)>,
    target_disk: Vec<u8>,
    /// A copy of earlier that is kept beside it.
    base: Option<Vec<u8>>,
    /// What of the target's disk is still to be told to the source.
    map: Option<MapWriter>,
    refused: Option<TargetError>,
    now: Duration,
    proven: Option<Barrier>,
}

/// What a block of the target's disk holds of an earlier attempt.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kept {
    Nothing,
    Same,
    Older,
    Foreign,
}

impl World {
    fn new(config: SourceConfig, kept: &[Kept]) -> Self {
        let disk: Vec<u8> = (0..SIZE).map(|at| if at / 50_000 % 2 == 0 { 0 } else { at as u8 | 1 }).collect();
        let dirty = vec![config.existing == Existing::Mirrored; SIZE.div_ceil(GRANULE)];
        let target = TargetConfig { max_in_flight: 5, flush_bytes: 100_000, ..TargetConfig::default() };
        let mut target_disk = vec![if config.target == TargetDisk::Unknown { 0xEE } else { 0 }; SIZE];
        hold(&mut target_disk, &disk, kept);
        Self {
            target_disk,
            base: None,
            map: (config.target == TargetDisk::Told).then(|| MapWriter::new(SIZE as u64, 7)),
            refused: None,
            qemu: Qemu { disk, dirty, under_way: Vec::new() },
            source: MirrorSource::new(SIZE as u64, config),
            reads: Vec::new(),
            channel: Vec::new(),
            target: MirrorTarget::new(SIZE as u64, target),
            steps: Vec::new(),
            now: Duration::ZERO,
            proven: None,
        }
    }

    /// A disk that holds `kept`, or is new if that is nothing, beside a copy that holds `base`.
    fn with_base(config: SourceConfig, kept: &[Kept], base: &[Kept]) -> Self {
        let mut world = Self::new(config, kept);
        let mut copy = vec![0; SIZE];
        hold(&mut copy, &world.qemu.disk, base);
        world.target = world.target.with_base();
        world.base = Some(copy);
        if kept.is_empty() {
            world.map = Some(MapWriter::of_copy_beside_new_disk(SIZE as u64, 7));
        }
        world
    }

    fn step(&mut self, (what, place, amount): Event) {
        match what % 11 {
            0 | 1 => self.guest_write(place as usize * 512 % SIZE, amount),
            2 => self.mirror_reads(place as usize),
            3 => self.mirror_writes(place as usize, amount),
            4 => self.read_starts(u64::from(amount % 4) * BLOCK),
            5 => self.read_samples(place as usize),
            6 => self.read_ends(place as usize, amount),
            7 => self.chunk_travels(),
            8 => self.target_starts(amount),
            9 => self.target_answers(place as usize),
            _ => self.map_travels(amount),
        }
    }

    fn guest_write(&mut self, offset: usize, amount: u16) {
        let end = (offset + (amount as usize % 100 + 1) * 512).min(SIZE);
        let byte = if amount.is_multiple_of(3) { 0 } else { amount as u8 };
        self.qemu.disk[offset..end].fill(byte);
        for granule in offset / GRANULE..end.div_ceil(GRANULE) {
            self.qemu.dirty[granule] = true;
        }
    }

    fn mirror_reads(&mut self, place: usize) {
        let granules = self.qemu.dirty.len();
        let found = (place..place + granules).map(|at| at % granules).find(|at| self.qemu.dirty[*at]);
        // QEMU never has two operations on one granule under way.
        let busy = |granule: usize| self.qemu.under_way.iter().any(|(offset, _)| offset / GRANULE == granule);
        if let Some(granule) = found.filter(|granule| !busy(*granule)) {
            self.qemu.dirty[granule] = false;
            let start = granule * GRANULE;
            let data = self.qemu.disk[start..(start + GRANULE).min(SIZE)].to_vec();
            self.qemu.under_way.push((start, data));
        }
    }

    fn mirror_writes(&mut self, place: usize, amount: u16) {
        if self.qemu.under_way.is_empty() {
            return;
        }
        let (offset, data) = self.qemu.under_way.swap_remove(place % self.qemu.under_way.len());
        let (offset, len, zero) = (offset as u64, data.len() as u64, data.iter().all(|byte| *byte == 0));
        match amount % 3 {
            0 if zero => self.source.handle_zero(offset, len).unwrap(),
            1 if zero => self.source.handle_trim(offset, len).unwrap(),
            _ => self.source.handle_write(offset, data.into()).unwrap(),
        }
        self.source.handle_flush();
    }

    fn read_starts(&mut self, max_len: u64) {
        if let Some(run) = self.source.poll_read(max_len) {
            self.reads.push((run, None));
        }
    }

    fn read_samples(&mut self, place: usize) {
        let count = self.reads.len().max(1);
        if let Some((run, content @ None)) = self.reads.get_mut(place % count) {
            *content = Some(self.qemu.disk[run.offset as usize..][..run.len as usize].to_vec());
        }
    }

    /// Answers a read that has been sampled: as data, as zeros where it is zero, or in part.
    fn read_ends(&mut self, place: usize, amount: u16) {
        let count = self.reads.len().max(1);
        if !matches!(self.reads.get(place % count), Some((_, Some(_)))) {
            return;
        }
        let (run, data) = self.reads.swap_remove(place % count);
        let mut parts = Vec::new();
        for block in data.unwrap_or_default().chunks(BLOCK as usize) {
            let zero = block.iter().all(|byte| *byte == 0) && amount.is_multiple_of(2);
            parts.push(if zero {
                Content::Zero(block.len() as u64)
            } else {
                Content::Data(Bytes::copy_from_slice(block))
            });
        }
        if amount.is_multiple_of(5) {
            parts.pop();
        }
        self.source.handle_read(run, &parts);
    }

    fn chunk_travels(&mut self) {
        if let Some(chunk) = self.source.poll_chunk() {
            self.channel.push(chunk);
        }
    }

    /// Blocks are hashed as they are at this moment, while the mirror writes.
    fn map_travels(&mut self, amount: u16) {
        let Some(map) = &mut self.map else { return };
        let first = map.next();
        for _ in 0..amount % 5 {
            let Some(block) = map.next() else { break };
            let at = block as usize * BLOCK as usize;
            let range = at..(at + BLOCK as usize).min(SIZE);
            let held = [Some(&self.target_disk), self.base.as_ref()];
            let mut held = held.into_iter().flatten().map(|disk| &disk[range.clone()]);
            match held.find(|content| content.iter().any(|byte| *byte != 0)) {
                Some(content) if !amount.is_multiple_of(7) => map.tell(content),
                Some(_) | None => map.skip(1),
            }
        }
        let complete = map.next().is_none();
        // A chunk without runs would be the whole map of a disk that is new.
        if map.next() != first {
            self.source.handle_map(map.finish()).unwrap();
        }
        if complete || amount.is_multiple_of(29) {
            self.source.handle_map_end();
            self.map = None;
        }
    }

    fn tell_all(&mut self) {
        while self.map.is_some() {
            self.map_travels(4);
        }
    }

    fn target_starts(&mut self, amount: u16) {
        if self.target.wants_chunk() && !self.channel.is_empty() {
            self.target.handle_chunk(self.channel.remove(0)).unwrap();
        }
        self.now += Duration::from_millis(u64::from(amount % 1000));
        match self.target.poll_step(self.now) {
            Some(Step::Proven(barrier)) => self.proven = Some(barrier),
            Some(
                step @ (Step::Write { .. }
                | Step::Zero { .. }
                | Step::Hash { .. }
                | Step::Fetch { .. }
                | Step::Flush),
            ) => {
                // The server may do the work at once and answer late, or do both late.
                let early = amount.is_multiple_of(2);
                if early {
                    apply(&mut self.target_disk, &step);
                }
                self.steps.push((step, early));
            }
            None => {}
        }
    }

    fn target_answers(&mut self, place: usize) {
        if self.steps.is_empty() {
            return;
        }
        let (step, done) = self.steps.swap_remove(place % self.steps.len());
        if !done {
            apply(&mut self.target_disk, &step);
        }
        match step {
            Step::Write { number, .. } | Step::Zero { number, .. } => self.target.handle_applied(number),
            Step::Hash { number, offset, len } => {
                let found = blake3::hash(&self.target_disk[offset as usize..][..len as usize]);
                if let Err(error) = self.target.handle_hashed(number, *found.as_bytes()) {
                    self.refused = Some(error);
                }
            }
            Step::Fetch { number, offset, len } => {
                let base = self.base.as_ref().expect("asked only where there is one");
                let data = Bytes::copy_from_slice(&base[offset as usize..][..len as usize]);
                let found = *blake3::hash(&data).as_bytes();
                self.target.handle_fetched(number, Some((data, found)));
            }
            Step::Flush => self.target.handle_flushed(),
            Step::Proven(_) => unreachable!("never under way"),
        }
    }

    /// The guest stops, the mirror job ends, all that is owed travels.
    fn finish(&mut self) {
        while self.qemu.dirty.contains(&true) || !self.qemu.under_way.is_empty() {
            self.mirror_reads(0);
            self.mirror_writes(0, 2);
        }
        self.source.handle_finish();
        self.proven = None;
        for round in 0..10_000 {
            if self.proven.is_some() || self.refused.is_some() {
                break;
            }
            for what in 4..11 {
                self.step((what, round, round % 4 * 2 + 1));
            }
        }
    }
}

fn apply(disk: &mut [u8], step: &Step) {
    match step {
        Step::Write { offset, data, .. } => disk[*offset as usize..][..data.len()].copy_from_slice(data),
        Step::Zero { offset, len, .. } => disk[*offset as usize..][..*len as usize].fill(0),
        Step::Hash { .. } | Step::Fetch { .. } | Step::Flush | Step::Proven(_) => {}
    }
}

/// Makes blocks of `disk` what `kept` says of them, beside what the source has `now`.
fn hold(disk: &mut [u8], now: &[u8], kept: &[Kept]) {
    for (index, block) in disk.chunks_mut(BLOCK as usize).enumerate() {
        let now = &now[index * BLOCK as usize..][..block.len()];
        match kept.get(index) {
            Some(Kept::Same) => block.copy_from_slice(now),
            Some(Kept::Older) => block.iter_mut().zip(now).for_each(|(old, new)| *old = new / 2),
            Some(Kept::Foreign) => block.fill(0xAB),
            Some(Kept::Nothing) | None => {}
        }
    }
}

/// Runs the events, finishes, runs on after a reopening and finishes again; true if all is equal.
fn converges(config: SourceConfig, mutant: bool, first: &[Event], second: &[Event]) -> bool {
    let mut world = World::new(config, &[]);
    world.source.mutant_ignores_overtaking = mutant;
    ends_equal(&mut world, first, second)
}

fn ends_equal(world: &mut World, first: &[Event], second: &[Event]) -> bool {
    first.iter().for_each(|event| world.step(*event));
    world.finish();
    let once = world.proven.is_some() && world.target_disk == world.qemu.disk;
    assert_eq!(world.proven, world.source.barrier(), "the barrier is the source's");
    assert_eq!(world.target.proven(), world.proven);
    assert_eq!(world.source.owed_bytes() + world.source.queued_bytes(), 0);
    world.source.handle_reopen();
    second.iter().for_each(|event| world.step(*event));
    world.finish();
    once && world.proven.is_some() && world.target_disk == world.qemu.disk
}

fn any_config() -> impl Strategy<Value = SourceConfig> {
    let existing = prop_oneof![Just(Existing::Reread), Just(Existing::Mirrored)];
    let sizes = (prop_oneof![Just(0), Just(100_000), Just(64 << 20)], 0..300_000u64, 1..4usize);
    let target = prop_oneof![Just(TargetDisk::Unknown), Just(TargetDisk::Zero), Just(TargetDisk::Told)];
    (sizes, existing, target).prop_map(|(sizes, existing, target)| {
        let (buffer_bytes, read_ahead_bytes, max_reads) = sizes;
        let max_chunk = 150_000;
        let sizes = SourceConfig { buffer_bytes, read_ahead_bytes, max_reads, max_chunk, ..TOLD };
        SourceConfig { existing, target, ..sizes }
    })
}

fn any_kept() -> impl Strategy<Value = Vec<Kept>> {
    let kept = prop_oneof![Just(Kept::Nothing), Just(Kept::Same), Just(Kept::Older), Just(Kept::Foreign)];
    prop::collection::vec(kept, 0..8)
}

fn any_events(most: usize) -> impl Strategy<Value = Vec<Event>> {
    prop::collection::vec(any::<Event>(), 0..most)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_target_ends_equal_to_the_source(
        config in any_config(), first in any_events(250), second in any_events(100),
    ) {
        prop_assert!(converges(config, false, &first, &second));
    }

    #[test]
    fn the_target_ends_equal_whatever_it_held_before(
        sizes in any_config(), kept in any_kept(), first in any_events(250), second in any_events(100),
    ) {
        let config = SourceConfig { target: TargetDisk::Told, existing: Existing::Reread, ..sizes };
        let mut world = World::new(config, &kept);
        prop_assert!(ends_equal(&mut world, &first, &second));
        prop_assert_eq!(world.refused, None);
        let counted = (world.target.counters().same_bytes, world.source.counters().same_bytes);
        prop_assert!(counted.0 <= counted.1, "{:?}", counted);
    }

    #[test]
    fn the_target_ends_equal_whatever_copy_is_kept_beside_it(
        sizes in any_config(), base in any_kept(),
        kept in prop_oneof![Just(Vec::new()), any_kept()],
        first in any_events(250), second in any_events(100),
    ) {
        let config = SourceConfig { target: TargetDisk::Told, existing: Existing::Reread, ..sizes };
        let mut world = World::with_base(config, &kept, &base);
        let copy = world.base.clone();
        prop_assert!(ends_equal(&mut world, &first, &second));
        prop_assert_eq!(world.refused, None);
        prop_assert_eq!(world.base, copy, "nothing is written to it");
        let counters = world.target.counters();
        prop_assert!(counters.base_bytes <= counters.same_bytes);
        prop_assert!(counters.same_bytes <= world.source.counters().same_bytes);
    }

    #[test]
    fn the_target_ends_equal_without_any_buffer(first in any_events(250), second in any_events(50)) {
        let config = SourceConfig { buffer_bytes: 0, ..SourceConfig::default() };
        prop_assert!(converges(config, false, &first, &second));
    }
}

/// A read begins, sees the old content, the guest's new write passes it, the read ends.
const OVERTAKING: [Event; 6] = [(4, 0, 1), (5, 0, 0), (0, 0, 1), (2, 0, 0), (3, 0, 2), (6, 0, 1)];

#[test]
fn a_read_that_a_write_overtook_is_discarded() {
    assert!(converges(SourceConfig::default(), false, &OVERTAKING, &[]));
}

#[test]
fn without_the_overtaking_rule_the_target_differs() {
    assert!(!converges(SourceConfig::default(), true, &OVERTAKING, &[]));
}

const TOLD: SourceConfig = SourceConfig {
    buffer_bytes: 64 << 20,
    read_ahead_bytes: 4 << 20,
    max_reads: 4,
    max_chunk: 1 << 20,
    existing: Existing::Reread,
    target: TargetDisk::Told,
    map_bytes: 1 << 20,
    window_log: DEFAULT_WINDOW_LOG,
    places_bytes: 0,
};

/// Of the third block an older state holds the same in its first four parts: zeros.
const SAME_OF_OLDER: u64 = 4 * PART;

#[test]
fn only_what_differs_travels() {
    let mut world = World::new(TOLD, &[Kept::Same, Kept::Same, Kept::Older, Kept::Same, Kept::Foreign]);
    world.qemu.disk[4 * BLOCK as usize..5 * BLOCK as usize].fill(0);
    world.finish();
    assert!(world.target_disk == world.qemu.disk && world.proven.is_some());
    let (source, target) = (world.source.counters(), world.target.counters());
    let same = 3 * BLOCK + SAME_OF_OLDER;
    assert_eq!((target.same_bytes, source.same_bytes), (same, same));
    assert_eq!((source.zero_bytes, target.applied_bytes), (BLOCK, SIZE as u64), "zeros are made zero");
}

#[test]
fn a_new_disk_is_sent_no_zeros() {
    let mut world = World::new(TOLD, &[]);
    world.qemu.disk[..BLOCK as usize].fill(0);
    world.source.handle_map(MapWriter::of_new_disk()).unwrap();
    world.map = None;
    world.finish();
    assert!(world.target_disk == world.qemu.disk && world.proven.is_some());
    assert_eq!(world.target.counters().applied_bytes, SIZE as u64 - BLOCK);
}

#[test]
fn of_a_machine_that_comes_back_only_what_changed_travels() {
    let base = [Kept::Same, Kept::Same, Kept::Older, Kept::Same, Kept::Foreign, Kept::Same, Kept::Same];
    let mut world = World::with_base(TOLD, &[], &base);
    world.tell_all();
    world.qemu.disk[4 * BLOCK as usize..5 * BLOCK as usize].fill(0);
    world.finish();
    assert!(world.target_disk == world.qemu.disk && world.proven.is_some());
    let (source, target) = (world.source.counters(), world.target.counters());
    let same = SIZE as u64 - 2 * BLOCK + SAME_OF_OLDER;
    assert_eq!((source.same_bytes, target.same_bytes, target.base_bytes), (same, same, same));
    assert_eq!(
        (source.zero_bytes, source.sent_bytes),
        (BLOCK, SIZE as u64 - BLOCK),
        "a new disk needs no zeros"
    );
}

#[test]
fn a_base_that_was_altered_costs_bytes_where_it_is_known_and_the_attempt_where_it_is_not() {
    let flipped = |told: bool| {
        let mut world = World::with_base(TOLD, &[], &[Kept::Same; 7]);
        let at = world.qemu.disk.iter().position(|byte| *byte != 0).unwrap();
        if !told {
            world.base.as_mut().unwrap()[at] ^= 1;
        }
        world.tell_all();
        if told {
            world.base.as_mut().unwrap()[at] ^= 1;
        }
        world.finish();
        world
    };
    let world = flipped(false);
    assert!(world.proven.is_some() && world.target_disk == world.qemu.disk);
    assert_eq!(world.target.counters().same_bytes, SIZE as u64 - PART);
    let world = flipped(true);
    assert!(matches!(world.refused, Some(TargetError::Differs { .. })), "{:?}", world.refused);
    assert_eq!(world.proven, None);
}

/// A block is taken from the base onto a new disk, and the guest makes it zero.
fn given_and_zeroed(mutant: bool) -> bool {
    let mut world = World::with_base(TOLD, &[], &[Kept::Same; 7]);
    world.source.mutant_thinks_new_stays_empty = mutant;
    world.tell_all();
    world.finish();
    assert!(world.target_disk == world.qemu.disk);
    world.source.handle_reopen();
    let block = world.qemu.disk.iter().position(|byte| *byte != 0).unwrap() / BLOCK as usize;
    let range = block * BLOCK as usize..(block + 1) * BLOCK as usize;
    world.qemu.disk[range].fill(0);
    world.source.handle_zero(block as u64 * BLOCK, BLOCK).unwrap();
    world.finish();
    world.proven.is_some() && world.target_disk == world.qemu.disk
}

#[test]
fn a_new_disk_reads_as_zeros_only_where_nothing_was_given_to_it() {
    assert!(given_and_zeroed(false));
    assert!(!given_and_zeroed(true), "the mutant leaves what was there");
}

#[test]
fn nothing_is_read_ahead_of_the_map_and_all_is_when_it_ends() {
    let mut source = MirrorSource::new(SIZE as u64, TOLD);
    assert_eq!(source.poll_read(BLOCK), None);
    let mut map = MapWriter::new(SIZE as u64, 7);
    map.skip(2);
    source.handle_map(map.finish()).unwrap();
    assert_eq!(source.poll_read(8 * BLOCK), Some(ReadRun { offset: 0, len: 2 * BLOCK }));
    assert_eq!(source.poll_read(8 * BLOCK), None);
    source.handle_map(Bytes::from_static(b"nonsense")).unwrap_err();
    assert_eq!(source.poll_read(2 * BLOCK), Some(ReadRun { offset: 2 * BLOCK, len: 2 * BLOCK }));
}

/// A disk that changed after it was told of must never be believed.
#[test]
fn a_kept_block_that_rots_after_it_was_told_of_is_refused() {
    let mut world = World::new(TOLD, &[Kept::Same; 6]);
    world.tell_all();
    let at = world.qemu.disk.iter().position(|byte| *byte != 0).unwrap();
    world.target_disk[at] ^= 1;
    world.finish();
    assert!(matches!(world.refused, Some(TargetError::Differs { .. })), "{:?}", world.refused);
    assert_eq!(world.proven, None);
}

/// The map says what is there, the guest's write is queued, the block is read again as it was told.
fn written_and_written_back(mutant: bool) -> World {
    let mut world = World::new(TOLD, &[Kept::Same; 6]);
    world.source.mutant_believes_old_news = mutant;
    world.tell_all();
    world.finish();
    world.source.handle_reopen();
    let at = world.qemu.disk.iter().position(|byte| *byte != 0).unwrap() as u64;
    let before = world.qemu.disk[at as usize];
    assert_ne!(before, b'o');
    world.source.handle_write(at, Bytes::from_static(b"other")).unwrap();
    world.chunk_travels();
    world.source.handle_trim(at, 5).unwrap();
    world.finish();
    world
}

#[test]
fn what_was_told_of_a_block_holds_until_something_is_sent_for_it() {
    let world = written_and_written_back(false);
    assert!(world.refused.is_none() && world.target_disk == world.qemu.disk);
    assert!(written_and_written_back(true).refused.is_some(), "the mutant is caught at the target");
}
