//! The whole mirror against a model: guest, QEMU's mirror job, reader, channel and target disk, with
//! every step at an arbitrary moment. The target must end equal to the source, always.

use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;

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
    now: Duration,
    proven: Option<Barrier>,
}

impl World {
    fn new(config: SourceConfig) -> Self {
        let disk: Vec<u8> = (0..SIZE).map(|at| if at / 50_000 % 2 == 0 { 0 } else { at as u8 | 1 }).collect();
        let dirty = vec![config.existing == Existing::Mirrored; SIZE.div_ceil(GRANULE)];
        let target = TargetConfig { max_in_flight: 5, flush_bytes: 100_000, ..TargetConfig::default() };
        Self {
            target_disk: vec![if config.target_is_zero { 0 } else { 0xEE }; SIZE],
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

    fn step(&mut self, (what, place, amount): Event) {
        match what % 10 {
            0 | 1 => self.guest_write(place as usize * 512 % SIZE, amount),
            2 => self.mirror_reads(place as usize),
            3 => self.mirror_writes(place as usize, amount),
            4 => self.read_starts(u64::from(amount % 4) * BLOCK),
            5 => self.read_samples(place as usize),
            6 => self.read_ends(place as usize, amount),
            7 => self.chunk_travels(),
            8 => self.target_starts(amount),
            _ => self.target_answers(place as usize),
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

    fn target_starts(&mut self, amount: u16) {
        if self.target.wants_chunk() && !self.channel.is_empty() {
            self.target.handle_chunk(self.channel.remove(0)).unwrap();
        }
        self.now += Duration::from_millis(u64::from(amount % 1000));
        match self.target.poll_step(self.now) {
            Some(Step::Proven(barrier)) => self.proven = Some(barrier),
            Some(step @ (Step::Write { .. } | Step::Zero { .. } | Step::Flush)) => {
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
            if self.proven.is_some() {
                break;
            }
            for what in 4..10 {
                self.step((what, round, round % 4 * 2 + 1));
            }
        }
    }
}

fn apply(disk: &mut [u8], step: &Step) {
    match step {
        Step::Write { offset, data, .. } => disk[*offset as usize..][..data.len()].copy_from_slice(data),
        Step::Zero { offset, len, .. } => disk[*offset as usize..][..*len as usize].fill(0),
        Step::Flush | Step::Proven(_) => {}
    }
}

/// Runs the events, finishes, runs on after a reopening and finishes again; true if all is equal.
fn converges(config: SourceConfig, mutant: bool, first: &[Event], second: &[Event]) -> bool {
    let mut world = World::new(config);
    world.source.mutant_ignores_overtaking = mutant;
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
    (sizes, existing, any::<bool>()).prop_map(|(sizes, existing, target_is_zero)| {
        let (buffer_bytes, read_ahead_bytes, max_reads) = sizes;
        let max_chunk = 150_000;
        SourceConfig { buffer_bytes, read_ahead_bytes, max_reads, max_chunk, existing, target_is_zero }
    })
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
