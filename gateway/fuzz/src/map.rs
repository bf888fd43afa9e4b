//! The map of its disk that a destination tells: chunks of a peer that lies about versions, places, runs and hints, to a source
//! that reads its own disk meanwhile.
//!
//! No read is outside of the disk. What is sent is what the disk holds, and whatever the map says, all of the disk is sent, or
//! said to be there by a hash of what it holds. What is queued is bounded; the memory of the map itself is bounded by what a
//! fuzzer may take.

use std::sync::LazyLock;

use bytes::Bytes;
use longhaul_core::disk::{
    BLOCK, ChunkReader, Content, MapWriter, MirrorSource, ReadRun, Record, SourceConfig, TargetDisk,
};

use crate::input::Input;

/// Five blocks, the last one of two parts.
const SIZE: u64 = 4 * BLOCK + 5000;
/// The block that holds zeros.
const EMPTY: u64 = 1;
const PART: u64 = 4096;
/// The longest range that is read at once.
const RUN: u64 = 2 * BLOCK;
const MAX_READS: usize = 2;
/// Of what is queued beside content, for each read: more than a record for each part takes.
const RECORDS: u64 = 4096;
const WINDOW_LOG: u32 = 17;

/// The source's disk. No two parts hold the same, but for zeros.
static DISK: LazyLock<Bytes> = LazyLock::new(|| {
    let byte = |at: u64| if at / BLOCK == EMPTY { 0 } else { (at / PART) as u8 + 1 };
    (0..SIZE).map(byte).collect::<Vec<u8>>().into()
});

/// What came of an input.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// A chunk of the map was refused.
    pub refused: bool,
    /// Content that was sent, in bytes.
    pub written_bytes: u64,
    /// Content that was said to be there, in bytes.
    pub same_bytes: u64,
    /// Zeros that were sent, in bytes.
    pub zero_bytes: u64,
}

/// Plays `data` as chunks of a map, reads of the disk and chunks that are taken.
pub fn run(data: &[u8]) {
    play(data);
}

/// The same, and what came of it when the disk is sent.
pub fn play(data: &[u8]) -> Seen {
    let mut mirror = Mirror::new();
    let mut input = Input(data);
    while !input.is_empty() {
        match input.byte() & 7 {
            0 | 1 => {
                let len = usize::from(input.u16());
                let chunk = Bytes::copy_from_slice(input.take(len));
                mirror.seen.refused |= mirror.source.handle_map(chunk).is_err();
            }
            2 => mirror.source.handle_map_end(),
            3 | 4 => mirror.read(),
            5 => mirror.answer(input.byte()),
            _ => {
                mirror.send();
            }
        }
        let most = BLOCK + MAX_READS as u64 * (RUN + RECORDS);
        assert!(mirror.source.queued_bytes() <= most);
    }
    mirror.finish()
}

struct Mirror {
    source: MirrorSource,
    reader: ChunkReader,
    reads: Vec<ReadRun>,
    seen: Seen,
}

impl Mirror {
    fn new() -> Self {
        let config = SourceConfig {
            read_ahead_bytes: BLOCK,
            max_reads: MAX_READS,
            max_chunk: 2 * BLOCK as usize,
            target: TargetDisk::Told,
            // Little, so that it runs short.
            map_bytes: 2 << 10,
            window_log: WINDOW_LOG,
            ..SourceConfig::default()
        };
        Self {
            source: MirrorSource::new(SIZE, config),
            reader: ChunkReader::new(WINDOW_LOG),
            reads: Vec::new(),
            seen: Seen::default(),
        }
    }

    fn read(&mut self) {
        let Some(run) = self.source.poll_read(RUN) else { return };
        assert!(run.offset.is_multiple_of(BLOCK) && 0 < run.len && run.len <= RUN);
        assert!(run.offset.checked_add(run.len).is_some_and(|end| end <= SIZE));
        self.reads.push(run);
    }

    /// One of the reads comes back, some of them half.
    fn answer(&mut self, choice: u8) {
        if self.reads.is_empty() {
            return;
        }
        let run = self.reads.swap_remove(usize::from(choice & 0x0f) % self.reads.len());
        let len = if choice & 0x80 == 0 { run.len } else { run.len / 2 };
        self.source.handle_read(run, &found(run.offset, len));
    }

    /// Whether there was something to send.
    fn send(&mut self) -> bool {
        let Some(chunk) = self.source.poll_chunk() else { return false };
        let chunk = self.reader.read(chunk).expect("our own chunk can be read");
        chunk.records.iter().for_each(|record| self.see(record));
        true
    }

    fn see(&mut self, record: &Record) {
        match record {
            Record::Write { offset, data } => {
                assert!(held(*offset, data.len() as u64) == data);
                self.seen.written_bytes += data.len() as u64;
            }
            Record::Zero { offset, len } => {
                assert!(held(*offset, *len).iter().all(|byte| *byte == 0));
                self.seen.zero_bytes += len;
            }
            Record::Same { offset, len, hash } => {
                assert!(blake3::hash(held(*offset, u64::from(*len))) == *hash);
                self.seen.same_bytes += u64::from(*len);
            }
            Record::Flush => {}
            Record::Barrier(barrier) => assert_eq!(self.source.barrier(), Some(*barrier)),
        }
    }

    /// The destination tells nothing more, and the rest is sent.
    fn finish(mut self) -> Seen {
        self.source.handle_map_end();
        while self.source.owed_bytes() > 0 {
            self.read();
            while !self.reads.is_empty() {
                self.answer(0);
            }
            while self.send() {}
        }
        self.source.handle_finish();
        while self.send() {}
        assert!(self.source.barrier().is_some(), "nothing is owed and nothing is queued");
        assert_eq!(self.seen.written_bytes + self.seen.same_bytes, SIZE - BLOCK, "all but the empty block");
        self.seen
    }
}

/// What the disk holds there; a place that it does not have is a fault.
fn held(offset: u64, len: u64) -> &'static [u8] {
    &DISK[offset as usize..][..len as usize]
}

/// What a read finds.
fn found(offset: u64, len: u64) -> Vec<Content> {
    let (mut found, mut at, end) = (Vec::new(), offset, offset + len);
    while at < end {
        let next = ((at / BLOCK + 1) * BLOCK).min(end);
        found.push(match at / BLOCK {
            EMPTY => Content::Zero(next - at),
            _ => Content::Data(DISK.slice(at as usize..next as usize)),
        });
        at = next;
    }
    found
}

const SALT: u64 = 7;

/// The whole map of a disk that holds the same but for one part of a block and all of another, in two chunks; what a copy
/// beside a new disk holds; a map that is not told to its end; a new disk's.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let block = |number: u64| held(number * BLOCK, BLOCK.min(SIZE - number * BLOCK));
    let mut map = MapWriter::new(SIZE, SALT);
    map.tell(block(0));
    map.skip(1);
    let first = told(&map.finish());
    let mut changed = block(2).to_vec();
    changed[..PART as usize].fill(0xee);
    map.tell(&changed);
    map.tell(&vec![0xee; BLOCK as usize]);
    map.tell(block(4));
    let whole = [&first[..], READING, &told(&map.finish()), READING, READING].concat();
    let mut beside = MapWriter::of_copy_beside_new_disk(SIZE, SALT);
    beside.tell(block(0));
    beside.skip(4);
    let mut incomplete = MapWriter::new(SIZE, SALT);
    incomplete.tell(block(0));
    incomplete.tell(block(1));
    let incomplete = [&told(&incomplete.finish())[..], READING, READING, &[2], READING].concat();
    vec![
        ("whole", whole),
        ("beside", [&told(&beside.finish())[..], READING].concat()),
        ("incomplete", incomplete),
        ("new", [&told(&MapWriter::of_new_disk())[..], READING].concat()),
    ]
}

/// Two reads, of which the first comes back half; what they gave is sent.
const READING: &[u8] = &[3, 4, 5, 0x80, 5, 0, 6];

fn told(chunk: &[u8]) -> Vec<u8> {
    [&[0][..], &(chunk.len() as u16).to_be_bytes(), chunk].concat()
}
