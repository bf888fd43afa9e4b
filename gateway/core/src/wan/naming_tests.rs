//! A disk's mirror and the memory that is named by it, over two channels that know nothing of each other: whatever comes first,
//! what is decoded is what was encoded (`no_name_of_what_is_overwritten`), and each of the rules that this rests on is needed.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use super::*;
use crate::disk::{BLOCK, Content, MirrorSource, MirrorTarget, SourceConfig, Step, TargetConfig, TargetDisk};
use crate::memory::PAGE_BYTES;
use crate::memory::sample::{PLAIN, Record, contents, sample};
use crate::units::Bytes as ByteCount;

const PARTS: u64 = 128;
const PER_BLOCK: u64 = BLOCK / PAGE_BYTES as u64;
/// In place of a seed: zeros.
const EMPTY: u32 = u32::MAX;
const SEEDS: u32 = 24;

/// The rules that can be broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// The disk does not ask before it overwrites.
    DoesNotAsk,
    /// What was sent counts as read.
    AcknowledgesWhatWasSent,
    /// The destination reads before its disk is as far as when the places were given.
    ReadsTooEarly,
}

/// Numbers in a fixed order for each seed (Steele, Lea and Flood 2014).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// What a part of the disk holds.
fn held(seed: u32) -> Vec<u8> {
    if seed == EMPTY { vec![0; PAGE_BYTES] } else { contents(seed) }
}

struct World {
    broken: Broken,
    dice: Dice,
    disk: Vec<u32>,
    mirror: MirrorSource,
    target: MirrorTarget,
    target_disk: Vec<u8>,
    steps: Vec<Step>,
    disk_channel: VecDeque<Bytes>,
    encoder: Option<StreamEncoder>,
    decoder: StreamDecoder,
    memory_channel: VecDeque<Bytes>,
    /// The disk asked, and may overwrite once so much of the memory's stream is acknowledged.
    asked: Option<ByteCount>,
    /// Of the memory's stream: the chunk that is being decoded, and all before it.
    taking_bytes: u64,
    taken_bytes: u64,
    floor: u64,
    wanted: Option<Vec<Place>>,
    stream: Vec<u8>,
    proven: bool,
}

impl World {
    fn new(seed: u64, broken: Broken) -> Self {
        let mut dice = Dice(seed);
        let size = PARTS * PAGE_BYTES as u64;
        let config = SourceConfig {
            max_chunk: 2 * BLOCK as usize,
            target: TargetDisk::Unknown,
            places_bytes: DiskPlaces::BYTES_PER_PAGE * PARTS,
            ..SourceConfig::default()
        };
        let disk = (0..PARTS).map(|_| dice.below(SEEDS.into()) as u32).collect();
        Self {
            broken,
            dice,
            disk,
            mirror: MirrorSource::new(size, config),
            target: MirrorTarget::new(size, TargetConfig::default()),
            target_disk: vec![0; size as usize],
            steps: Vec::new(),
            disk_channel: VecDeque::new(),
            encoder: None,
            decoder: StreamDecoder::new(4).unwrap(),
            memory_channel: VecDeque::new(),
            asked: None,
            taking_bytes: 0,
            taken_bytes: 0,
            floor: 0,
            wanted: None,
            stream: Vec::new(),
            proven: false,
        }
    }

    /// A write, zeros, or a part given up, which the guest finds empty.
    fn guest_changes(&mut self) {
        match self.dice.below(4) {
            0 => self.guest_empties(true),
            1 => self.guest_empties(false),
            _ => self.guest_writes(),
        }
    }

    /// Neighbours often enough that records join.
    fn guest_empties(&mut self, by_zeros: bool) {
        let blocks = self.dice.below(3) + 1;
        let first = self.dice.below(PARTS / PER_BLOCK - blocks + 1) * PER_BLOCK;
        self.disk[first as usize..(first + blocks * PER_BLOCK) as usize].fill(EMPTY);
        for block in first / PER_BLOCK..first / PER_BLOCK + blocks {
            match by_zeros {
                true => self.mirror.handle_zero(block * BLOCK, BLOCK).unwrap(),
                false => self.mirror.handle_trim(block * BLOCK, BLOCK).unwrap(),
            }
        }
    }

    fn guest_writes(&mut self) {
        let part = self.dice.below(PARTS);
        let count = 1 + self.dice.below(3).min(PARTS - part - 1);
        let mut data = Vec::new();
        for part in part..part + count {
            self.disk[part as usize] = self.dice.below(SEEDS.into()) as u32;
            data.extend(held(self.disk[part as usize]));
        }
        self.mirror.handle_write(part * PAGE_BYTES as u64, data.into()).unwrap();
    }

    fn disk_reads(&mut self) {
        let Some(run) = self.mirror.poll_read(BLOCK) else { return };
        let parts = run.offset / PAGE_BYTES as u64..(run.offset + run.len) / PAGE_BYTES as u64;
        let data: Vec<u8> = parts.flat_map(|part| held(self.disk[part as usize])).collect();
        self.mirror.handle_read(run, &[Content::Data(data.into())]);
    }

    fn disk_sends(&mut self) {
        self.ask();
        if let Some(chunk) = self.mirror.poll_chunk() {
            self.disk_channel.push_back(chunk);
        }
    }

    fn ask(&mut self) {
        if self.broken == Broken::DoesNotAsk {
            while self.mirror.poll_overwriting().is_some() {
                self.mirror.handle_released();
            }
        }
        if let Some(blocks) = self.mirror.poll_overwriting() {
            let until = self.encoder.as_mut().and_then(|encoder| encoder.handle_overwriting(0, &blocks));
            self.collect();
            self.asked = Some(until.unwrap_or_default());
        }
        self.acknowledge();
    }

    fn acknowledge(&mut self) {
        let Some(encoder) = &mut self.encoder else { return };
        let taken = match self.broken {
            Broken::AcknowledgesWhatWasSent => ByteCount(encoder.counters().wire_bytes),
            Broken::Nothing | Broken::DoesNotAsk | Broken::ReadsTooEarly => ByteCount(self.taken_bytes),
        };
        encoder.handle_acknowledged(taken);
        self.collect();
        if self.asked.is_some_and(|until| taken >= until) {
            self.asked = None;
            self.mirror.handle_released();
        }
    }

    fn disk_arrives(&mut self) {
        if self.target.wants_chunk()
            && let Some(chunk) = self.disk_channel.pop_front()
        {
            self.target.handle_chunk(chunk).unwrap();
        }
        while let Some(step) = self.target.poll_step(Duration::ZERO) {
            self.steps.push(step);
        }
    }

    fn disk_is_written(&mut self) {
        if self.steps.is_empty() {
            return;
        }
        let which = self.dice.below(self.steps.len() as u64) as usize;
        match self.steps.remove(which) {
            Step::Write { number, offset, data } => {
                self.target_disk[offset as usize..][..data.len()].copy_from_slice(&data);
                self.target.handle_applied(number);
            }
            Step::Zero { number, offset, len } => {
                self.target_disk[offset as usize..][..len as usize].fill(0);
                self.target.handle_applied(number);
            }
            Step::Flush => self.target.handle_flushed(),
            Step::Proven(_) => {}
            Step::Hash { .. } | Step::Fetch { .. } => panic!("nothing was told of"),
        }
    }

    fn memory_begins(&mut self) {
        let given = self.mirror.give_places();
        self.floor = given.after_records;
        let config =
            EncoderConfig { shadow_pages: 4, ..EncoderConfig::for_chunks_of(EncoderConfig::MIN_CHUNK) };
        self.encoder = Some(StreamEncoder::new(config).unwrap().with_disks(vec![given]));
    }

    fn collect(&mut self) {
        while let Some(chunk) = self.encoder.as_mut().and_then(StreamEncoder::poll_chunk) {
            self.memory_channel.push_back(chunk);
        }
    }

    /// A chunk is acknowledged by asking for the one behind it.
    fn memory_arrives(&mut self) -> Result<(), DecodeError> {
        if let Some(wanted) = &self.wanted {
            if self.target.applied_records() < self.floor && self.broken != Broken::ReadsTooEarly {
                return Ok(());
            }
            let at = |place: &Place| place.part as usize * PAGE_BYTES;
            let found = wanted.iter().map(|place| &self.target_disk[at(place)..][..PAGE_BYTES]);
            self.decoder.handle_found(found.map(Bytes::copy_from_slice).collect());
            self.wanted = None;
        } else if let Some(chunk) = self.memory_channel.pop_front() {
            self.taken_bytes += self.taking_bytes;
            self.taking_bytes = chunk.len() as u64;
            self.decoder.handle_chunk(chunk);
        }
        while let Some(decoded) = self.decoder.poll_decoded()? {
            match decoded {
                Decoded::Bytes(bytes) => self.stream.extend_from_slice(&bytes),
                Decoded::Disks(floors) => assert_eq!(floors, [self.floor]),
                Decoded::Wanted(places) => {
                    self.wanted = Some(places);
                    return Ok(());
                }
                // Asking for more acknowledges the last chunk.
                Decoded::End(_) => {
                    self.proven = true;
                    self.taken_bytes += self.taking_bytes;
                }
            }
        }
        Ok(())
    }

    /// Anything that can happen without more of the stream.
    fn something(&mut self) -> Result<(), DecodeError> {
        match self.dice.below(12) {
            0 => self.guest_changes(),
            1 => self.disk_reads(),
            2 | 3 => self.disk_sends(),
            4 | 5 => self.disk_arrives(),
            6..9 => self.disk_is_written(),
            _ => return self.memory_arrives(),
        }
        Ok(())
    }
}

/// How many pages were named; an error if something was not decoded as it was encoded.
fn play(seed: u64, broken: Broken) -> Result<u64, String> {
    let mut world = World::new(seed, broken);
    for _ in 0..40 {
        world.disk_reads();
        world.something().map_err(|error| error.to_string())?;
    }
    world.memory_begins();
    let mut records = Vec::new();
    for _ in 0..120 {
        let (page, seed) = (world.dice.below(64), world.dice.below(SEEDS.into()) as u32);
        records.push(Record { block: 0, page, seed: Some(seed), spelled: false });
    }
    let bytes = sample(PLAIN, &[records], b"devices").bytes;
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let (now, later) = rest.split_at((world.dice.below(30_000) as usize).min(rest.len()));
        rest = later;
        let encoder = world.encoder.as_mut().unwrap();
        encoder.handle_bytes(now);
        if world.dice.below(3) == 0 {
            encoder.handle_flush();
        }
        world.collect();
        for _ in 0..world.dice.below(20) {
            world.something().map_err(|error| error.to_string())?;
        }
    }
    finish(&mut world).map_err(|error| error.to_string())?;
    if !world.proven || world.stream != bytes {
        return Err("another stream came out".into());
    }
    Ok(world.encoder.unwrap().counters().disk_pages)
}

fn finish(world: &mut World) -> Result<(), DecodeError> {
    let encoder = world.encoder.as_mut().unwrap();
    encoder.handle_disks_end();
    encoder.handle_end();
    world.collect();
    world.mirror.handle_finish();
    for _ in 0..2000 {
        world.disk_reads();
        world.disk_sends();
        world.disk_arrives();
        world.disk_is_written();
        world.memory_arrives()?;
        if world.proven && world.target.proven().is_some() {
            let disk: Vec<u8> = world.disk.iter().flat_map(|seed| held(*seed)).collect();
            assert!(world.target_disk == disk, "the disk differs");
            // What was named behind the last chunk that was known to be read is known to be now.
            world.acknowledge();
            world.acknowledge();
            assert!(world.encoder.as_ref().unwrap().is_done_with_disks(), "names are left");
            return Ok(());
        }
    }
    Ok(())
}

#[test]
fn memory_that_is_named_by_a_disk_under_change_is_decoded_as_it_was_encoded() {
    let mut named = 0;
    for seed in 0..300 {
        named += play(seed, Broken::Nothing).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    assert!(named > 300 * 5, "only {named} pages were named");
}

#[test]
fn each_rule_of_naming_is_needed() {
    for broken in [Broken::DoesNotAsk, Broken::AcknowledgesWhatWasSent, Broken::ReadsTooEarly] {
        let caught = (0..300).filter(|seed| play(*seed, broken).is_err()).count();
        assert!(caught > 0, "{broken:?} is not noticed");
        println!("{broken:?}: noticed in {caught} of 300");
    }
}
