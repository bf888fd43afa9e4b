//! The way of the disk in one attempt: the map that the destination tells, the mirror, a channel that brings each chunk once
//! and in order, and the destination's disk with a copy of earlier beside it (`gateway/src/disk`). Deliberately not here: what
//! becomes of the disk and of the copy afterwards.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use longhaul_core::disk::{
    BLOCK, Content, MapWriter, MirrorSource, MirrorTarget, ReadRun, SourceConfig, Step, TargetConfig,
    TargetDisk, TargetError,
};
use longhaul_core::memory::PAGE_BYTES;
use longhaul_core::wan::{DiskPlaces, Place};

use super::broken::Broken;
use super::guest::{Change, DISK_BYTES, Guest, PARTS};
use super::site::Digest;
use crate::schedule::Random;

/// Two blocks and a little want no larger one.
const WINDOW_LOG: u32 = 18;

pub struct DiskWay {
    pub mirror: MirrorSource,
    /// Read from the source's disk, and not yet known to the mirror.
    reads: Vec<(ReadRun, Vec<u8>)>,
    channel: VecDeque<Bytes>,
    flip: Option<u64>,
    /// What is still to be told of the destination's disk.
    map: Option<MapWriter>,
    maps: VecDeque<Bytes>,
    map_ended: bool,
    /// The disk was left by an earlier attempt.
    is_partial: bool,
    target: MirrorTarget,
    pub target_disk: Vec<u8>,
    pub base: Option<Vec<u8>>,
    steps: Vec<Step>,
    /// The hashes that were told, for a gateway that answers by them.
    told: BTreeMap<u64, Digest>,
    broken: Option<Broken>,
    pub refused: Option<TargetError>,
    pub sent_bytes: u64,
}

impl DiskWay {
    /// To a disk that an earlier attempt has left, or to a new one, beside a copy or not.
    pub fn new(
        partial: Option<Vec<u8>>,
        base: Option<Vec<u8>>,
        random: &mut Random,
        broken: Option<Broken>,
    ) -> Self {
        let config = SourceConfig {
            buffer_bytes: [0, 40_000, 64 << 20][random.below(3) as usize],
            read_ahead_bytes: BLOCK,
            max_reads: 2,
            max_chunk: 2 * BLOCK as usize,
            target: TargetDisk::Told,
            map_bytes: 1 << 20,
            window_log: WINDOW_LOG,
            places_bytes: DiskPlaces::BYTES_PER_PAGE * PARTS as u64 * random.below(4).min(1),
            ..SourceConfig::default()
        };
        let salt = random.next();
        let map = match (&partial, &base) {
            (Some(_), _) => Some(MapWriter::new(DISK_BYTES, salt)),
            (None, Some(_)) => Some(MapWriter::of_copy_beside_new_disk(DISK_BYTES, salt)),
            (None, None) => None,
        };
        let target = MirrorTarget::new(
            DISK_BYTES,
            TargetConfig { max_window_log: WINDOW_LOG, ..TargetConfig::default() },
        );
        Self {
            mirror: MirrorSource::new(DISK_BYTES, config),
            reads: Vec::new(),
            channel: VecDeque::new(),
            flip: None,
            maps: if map.is_none() { [MapWriter::of_new_disk()].into() } else { VecDeque::new() },
            map,
            map_ended: false,
            is_partial: partial.is_some(),
            target: if base.is_some() { target.with_base() } else { target },
            target_disk: partial.unwrap_or_else(|| vec![0; DISK_BYTES as usize]),
            base,
            steps: Vec::new(),
            told: BTreeMap::new(),
            broken,
            refused: None,
            sent_bytes: 0,
        }
    }

    /// The machine did something to its disk.
    pub fn changes(&mut self, change: Change, guest: &Guest) {
        let range = |first: usize, parts: usize| ((first * PAGE_BYTES) as u64, (parts * PAGE_BYTES) as u64);
        let taken = match change {
            Change::Page(_) => Ok(()),
            Change::Written { first, parts } => {
                let (offset, len) = range(first, parts);
                self.mirror.handle_write(offset, guest.disk_bytes(offset, len).into())
            }
            Change::Zeroed { first, parts } => {
                let (offset, len) = range(first, parts);
                self.mirror.handle_zero(offset, len)
            }
            Change::Trimmed { first, parts } => {
                let (offset, len) = range(first, parts);
                self.mirror.handle_trim(offset, len)
            }
        };
        taken.expect("a machine that stays within its disk, and is stopped before the barrier");
    }

    /// Of the next block is told what the disk of an earlier attempt holds, or else the copy.
    pub fn tells(&mut self) {
        let Some(mut map) = self.map.take() else { return };
        let Some(block) = map.next() else { return };
        let at = (block * BLOCK) as usize;
        let range = at..(at + BLOCK as usize).min(DISK_BYTES as usize);
        let held = [self.is_partial.then_some(&self.target_disk), self.base.as_ref()];
        let mut held = held.into_iter().flatten().map(|disk| &disk[range.clone()]);
        match held.find(|content| content.iter().any(|byte| *byte != 0)) {
            Some(content) => {
                if self.broken == Some(Broken::AnswersByItsMap) {
                    self.told.insert(block, *blake3::hash(content).as_bytes());
                }
                map.tell(content);
            }
            None => map.skip(1),
        }
        self.maps.push_back(map.finish());
        self.map = map.next().is_some().then_some(map);
    }

    pub fn map_arrives(&mut self) {
        match self.maps.pop_front() {
            Some(chunk) => self.mirror.handle_map(chunk).expect("a map of its own disk"),
            None if self.map.is_none() && !self.map_ended => {
                self.map_ended = true;
                self.mirror.handle_map_end();
            }
            None => {}
        }
    }

    /// The destination cannot read its disk any further.
    pub fn map_fails(&mut self) {
        self.map = None;
    }

    pub fn reads(&mut self, guest: &Guest) {
        if let Some(run) = self.mirror.poll_read(BLOCK) {
            self.reads.push((run, guest.disk_bytes(run.offset, run.len)));
        }
    }

    pub fn read_ends(&mut self, random: &mut Random) {
        if self.reads.is_empty() {
            return;
        }
        let (run, data) = self.reads.swap_remove(random.below(self.reads.len() as u64) as usize);
        self.mirror.handle_read(run, &[Content::Data(data.into())]);
    }

    pub fn sends(&mut self) {
        if let Some(chunk) = self.mirror.poll_chunk() {
            self.sent_bytes += chunk.len() as u64;
            self.channel.push_back(chunk);
        }
    }

    pub fn arrives(&mut self, now: Duration) {
        if self.refused.is_some() {
            return;
        }
        if self.target.wants_chunk()
            && let Some(chunk) = self.channel.pop_front()
        {
            self.refused = self.target.handle_chunk(arrived(chunk, self.flip.take())).err();
        }
        while let Some(step) = self.target.poll_step(now) {
            self.steps.push(step);
        }
    }

    /// One of the writes and reads that are under way at the destination ends.
    pub fn is_written(&mut self, random: &mut Random) {
        if self.steps.is_empty() || self.refused.is_some() {
            return;
        }
        match self.steps.swap_remove(random.below(self.steps.len() as u64) as usize) {
            Step::Write { number, offset, data } => {
                self.target_disk[offset as usize..][..data.len()].copy_from_slice(&data);
                self.target.handle_applied(number);
            }
            Step::Zero { number, offset, len } => {
                self.target_disk[offset as usize..][..len as usize].fill(0);
                self.target.handle_applied(number);
            }
            Step::Hash { number, offset, len } => {
                let found = blake3::hash(&self.target_disk[offset as usize..][..len as usize]);
                self.refused = self.target.handle_hashed(number, *found.as_bytes()).err();
            }
            Step::Fetch { number, offset, len } => {
                let fetched = self.fetched(offset, len);
                self.target.handle_fetched(number, fetched);
            }
            Step::Flush => self.target.handle_flushed(),
            Step::Proven(_) => {}
        }
    }

    fn fetched(&self, offset: u64, len: u32) -> Option<(Bytes, Digest)> {
        let data = self.base.as_ref()?[offset as usize..][..len as usize].to_vec();
        let whole = u64::from(len) == BLOCK.min(DISK_BYTES - offset);
        let told = self.told.get(&(offset / BLOCK)).filter(|_| whole);
        let hash = told.copied().unwrap_or_else(|| *blake3::hash(&data).as_bytes());
        Some((data.into(), hash))
    }

    pub fn applied_records(&self) -> u64 {
        self.target.applied_records()
    }

    /// What the destination's disk holds at these places, if they are on it.
    pub fn pages_at(&self, places: &[Place]) -> Option<Vec<Bytes>> {
        let page = |place: &Place| {
            let at = place.part as usize * PAGE_BYTES;
            let content = self.target_disk.get(at..at + PAGE_BYTES).filter(|_| place.disk == 0)?;
            Some(Bytes::copy_from_slice(content))
        };
        places.iter().map(page).collect()
    }

    /// The destination has proven that it has what the source has.
    pub fn is_proven(&self) -> bool {
        self.mirror.barrier().is_some_and(|barrier| self.target.proven() == Some(barrier))
    }

    /// A bit of the chunk that arrives next is another one.
    pub fn flips(&mut self, random: &mut Random) {
        self.flip = Some(random.next());
    }
}

/// A chunk as it arrives, of which a bit may be another one.
pub fn arrived(chunk: Bytes, flip: Option<u64>) -> Bytes {
    let Some(number) = flip else { return chunk };
    let mut bytes = chunk.to_vec();
    let at = (number >> 3) as usize % bytes.len();
    bytes[at] ^= 1 << (number & 7);
    bytes.into()
}
