//! Chunks of records: bounded in size, and packed as one zstd stream per disk.
//!
//! ```text
//!  chunk = version u8 | flags u8 | first number u64 | records u32 | body length u32 | proof [16] | body
//! ```
//!
//! The proof is of all records up to the chunk's last one ([`crate::proof`]): it binds their content, their order and all that
//! came before, so that a chunk that is not what was sent is known before anything of it is applied. Whoever applies it checks
//! it. It is of the records and not of the bytes here, because what a source means is the records.
//!
//! Integers are little-endian; the length is that of the body before packing. With flag 1 the body is the next piece of a zstd
//! stream that all chunks of the disk make up, flushed at the chunk's end: what a disk holds twice, a long way apart, is found
//! within the window that both sites keep. It rests on the bulk channel, which brings each chunk once and in order. A change of
//! the level ends a frame of the stream and begins another, without what was in the window: zstd takes a level within a frame
//! only where it packs with threads of its own, and those begin anew at each flush. At a level below its first nothing is looked for
//! that is a long way off: that takes more time than the packing. A body without the flag is as it is, and no part of the stream.

use bytes::{Buf, Bytes};
use zstd::stream::raw::{CParameter, DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

use super::record::{Chunk, ChunkError, Record};
use crate::proof::Proof;
use crate::wan::Level;

/// The longest body of a chunk in bytes, before packing. Bounds what a receiver allocates.
pub const MAX_BODY: usize = 1 << 20;
/// The most records in one chunk.
pub const MAX_RECORDS: usize = 16 << 10;
/// The window of a mirror whose sites agreed on none: 8 MiB, as the exponent of two.
pub const DEFAULT_WINDOW_LOG: u32 = 23;

pub(super) const VERSION: u8 = 3;
const FLAG_ZSTD: u8 = 1;
const CHUNK_HEADER: usize = 18 + Proof::BYTES;
/// What packing may add to a body that does not shrink: three bytes for each of its blocks of 128 KiB, the ends of a frame.
const SLACK: usize = 256;
/// zstd's first level of its own: those below it leave out what takes time.
const FIRST_LEVEL: i32 = 1;
/// A change of level forgets the window: it must be worth that. In bytes.
const LEAST_AT_A_LEVEL: u64 = if cfg!(test) { 1 << 16 } else { 16 << 20 };

/// Packs records into chunks of bounded size.
pub(super) struct ChunkPacker {
    /// `None` after zstd failed: bodies then travel as they are.
    stream: Option<Stream>,
    level: Level,
    wanted_level: Level,
    /// What was packed at this level, in bytes.
    packed: u64,
    level_changes: u64,
    body: Vec<u8>,
    records: u32,
    max_body: usize,
}

struct Stream {
    encoder: Encoder<'static>,
    level: i32,
}

impl ChunkPacker {
    /// A packer of chunks of at most `max_chunk` bytes, with a window of two to the power of `window_log` bytes.
    pub(super) fn new(max_chunk: usize, window_log: u32) -> Self {
        // A context that cannot be made only costs the compression.
        let stream = Stream::new(window_log).ok();
        let max_body = max_chunk.saturating_sub(CHUNK_HEADER + SLACK).min(MAX_BODY);
        Self {
            stream,
            level: Level::FIRST,
            wanted_level: Level::FIRST,
            packed: 0,
            level_changes: 0,
            body: Vec::new(),
            records: 0,
            max_body,
        }
    }

    /// One whose chunks are not packed, and so do not belong together.
    #[cfg(test)]
    pub(super) fn stored(max_chunk: usize) -> Self {
        Self { stream: None, ..Self::new(max_chunk, DEFAULT_WINDOW_LOG) }
    }

    /// From the next chunk on, another level.
    pub(super) fn set_level(&mut self, level: Level) {
        self.wanted_level = level;
    }

    /// Whether the level that was set last is in force, and for long enough to judge it by what it took.
    pub(super) fn is_level_tried(&self) -> bool {
        self.stream.is_some() && self.level == self.wanted_level && self.packed >= LEAST_AT_A_LEVEL
    }

    /// How often another level came into force.
    pub(super) fn level_changes(&self) -> u64 {
        self.level_changes
    }

    /// Whether `record` still fits. One record always fits an empty chunk of reasonable size.
    pub(super) fn fits(&self, record: &Record) -> bool {
        self.body.len() + record.encoded_len() <= self.max_body && (self.records as usize) < MAX_RECORDS
    }

    /// What the records of the next chunk take before packing, in bytes.
    pub(super) fn body_bytes(&self) -> u64 {
        self.body.len() as u64
    }

    /// Appends a record that [`Self::fits`].
    pub(super) fn push(&mut self, record: &Record) {
        record.encode(&mut self.body);
        self.records += 1;
    }

    /// The chunk of all records since the last call; the first of them has `first_number`, and `proof` stands behind the last.
    pub(super) fn finish(&mut self, first_number: u64, proof: Proof) -> Bytes {
        let mut chunk = Vec::with_capacity(CHUNK_HEADER + SLACK + self.body.len());
        chunk.extend([VERSION, FLAG_ZSTD]);
        chunk.extend(first_number.to_le_bytes());
        chunk.extend(self.records.to_le_bytes());
        chunk.extend((self.body.len() as u32).to_le_bytes());
        chunk.extend(proof.to_bytes());
        if !self.pack_into(&mut chunk) {
            chunk.truncate(CHUNK_HEADER);
            chunk[1] = 0;
            chunk.extend_from_slice(&self.body);
        }
        self.body.clear();
        self.records = 0;
        chunk.into()
    }
}

impl ChunkPacker {
    /// Appends the body as a piece of the stream, if it is to be one.
    fn pack_into(&mut self, chunk: &mut Vec<u8>) -> bool {
        if self.level != self.wanted_level && self.packed >= LEAST_AT_A_LEVEL {
            (self.level, self.packed) = (self.wanted_level, 0);
            self.level_changes += 1;
        }
        self.packed += self.body.len() as u64;
        let (Level::Zstd(level), Some(stream)) = (self.level, &mut self.stream) else { return false };
        let packed = stream.pack(&self.body, level, chunk).is_ok();
        if !packed {
            // What the stream did last nobody will read.
            self.stream = None;
        }
        packed
    }
}

impl Stream {
    fn new(window_log: u32) -> std::io::Result<Self> {
        let mut encoder = Encoder::new(FIRST_LEVEL)?;
        encoder.set_parameter(CParameter::WindowLog(window_log))?;
        encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
        Ok(Self { encoder, level: FIRST_LEVEL })
    }

    /// Appends the body's piece of the stream.
    fn pack(&mut self, body: &[u8], level: i32, chunk: &mut Vec<u8>) -> std::io::Result<()> {
        chunk.reserve(body.len() + SLACK);
        let at = chunk.len();
        let mut output = OutBuffer::around_pos(chunk, at);
        if self.level != level {
            if self.encoder.finish(&mut output, true)? > 0 {
                return Err(too_long());
            }
            self.encoder.set_parameter(CParameter::CompressionLevel(level))?;
            self.encoder.set_parameter(CParameter::EnableLongDistanceMatching(level >= FIRST_LEVEL))?;
            self.level = level;
        }
        let mut input = InBuffer::around(body);
        while input.pos() < body.len() {
            let before = (input.pos(), output.pos());
            self.encoder.run(&mut input, &mut output)?;
            if before == (input.pos(), output.pos()) {
                return Err(too_long());
            }
        }
        if self.encoder.flush(&mut output)? > 0 { Err(too_long()) } else { Ok(()) }
    }
}

fn too_long() -> std::io::Error {
    std::io::Error::other("zstd made more of a body than there is room for")
}

/// Takes the chunks of one disk apart, in their order.
pub struct ChunkReader {
    decoder: Option<Decoder<'static>>,
    max_window_log: u32,
}

impl std::fmt::Debug for ChunkReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkReader").field("max_window_log", &self.max_window_log).finish_non_exhaustive()
    }
}

impl ChunkReader {
    /// A reader that keeps a window of up to two to the power of `max_window_log` bytes, once the source wants one.
    pub fn new(max_window_log: u32) -> Self {
        Self { decoder: None, max_window_log }
    }

    /// Takes a chunk apart. Allocates at most [`MAX_BODY`] bytes and [`MAX_RECORDS`] records, whatever the bytes say, and
    /// the window. After an error the disk's stream is over.
    pub fn read(&mut self, mut chunk: Bytes) -> Result<Chunk, ChunkError> {
        if chunk.len() < CHUNK_HEADER {
            return Err(ChunkError::Short);
        }
        let (version, flags) = (chunk.get_u8(), chunk.get_u8());
        if version != VERSION {
            return Err(ChunkError::Version(version));
        }
        let first_number = chunk.get_u64_le();
        let (count, body_len) = (chunk.get_u32_le(), chunk.get_u32_le());
        if count as usize > MAX_RECORDS || body_len as usize > MAX_BODY {
            return Err(ChunkError::TooLarge { records: count, body: body_len });
        }
        let mut proof = [0; Proof::BYTES];
        chunk.copy_to_slice(&mut proof);
        let body = match flags {
            0 => chunk,
            FLAG_ZSTD => self.unpack(&chunk, body_len as usize)?,
            flags => return Err(ChunkError::Flags(flags)),
        };
        let records = read_records(body, body_len as usize, count as usize)?;
        Ok(Chunk { first_number, records, proof: Proof::from_bytes(proof) })
    }

    fn unpack(&mut self, packed: &[u8], body_len: usize) -> Result<Bytes, ChunkError> {
        let failed = |_| ChunkError::Zstd;
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            none => {
                let mut decoder = Decoder::new().map_err(failed)?;
                decoder.set_parameter(DParameter::WindowLogMax(self.max_window_log)).map_err(failed)?;
                none.insert(decoder)
            }
        };
        // One byte more than there may be, so that too much is seen.
        let mut body = vec![0; body_len + 1];
        let (mut input, mut output) = (InBuffer::around(packed), OutBuffer::around(&mut body[..]));
        loop {
            let before = (input.pos(), output.pos());
            decoder.run(&mut input, &mut output).map_err(failed)?;
            if before == (input.pos(), output.pos()) {
                break;
            }
        }
        let (read, made) = (input.pos(), output.pos());
        if read < packed.len() || made != body_len {
            return Err(ChunkError::Zstd);
        }
        body.truncate(made);
        Ok(body.into())
    }
}

/// The records of a body that was announced with this length and number.
fn read_records(mut body: Bytes, body_len: usize, count: usize) -> Result<Vec<Record>, ChunkError> {
    if body.len() < body_len {
        return Err(ChunkError::Short);
    }
    if body.len() > body_len {
        return Err(ChunkError::Trailing(body.len() - body_len));
    }
    let mut records = Vec::with_capacity(count.min(body.len()));
    for _ in 0..count {
        records.push(Record::decode(&mut body)?);
    }
    match body.len() {
        0 => Ok(records),
        trailing => Err(ChunkError::Trailing(trailing)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::record::tests::any_record;
    use super::super::record::{RunningDigest, WRITE_HEADER};
    use super::*;

    /// Where it is not looked at.
    const ANY_PROOF: Proof = Proof::from_bytes([7; Proof::BYTES]);

    fn read(chunks: Vec<Bytes>) -> Vec<Chunk> {
        let mut reader = ChunkReader::new(DEFAULT_WINDOW_LOG);
        chunks.into_iter().map(|chunk| reader.read(chunk).unwrap()).collect()
    }

    fn read_one(chunk: impl Into<Bytes>) -> Result<Chunk, ChunkError> {
        ChunkReader::new(DEFAULT_WINDOW_LOG).read(chunk.into())
    }

    /// With another level for each chunk, where `levels` says so.
    fn pack(records: &[Record], max_chunk: usize, levels: &[Level]) -> Vec<Bytes> {
        let mut packer = ChunkPacker::new(max_chunk, DEFAULT_WINDOW_LOG);
        let (mut chunks, mut first, mut digest) = (vec![], 1, RunningDigest::default());
        for record in records {
            if !packer.fits(record) {
                chunks.push(packer.finish(first, digest.proof()));
                first = digest.records() + 1;
                levels.get(chunks.len()).into_iter().for_each(|level| packer.set_level(*level));
            }
            packer.push(record);
            digest.add(record);
        }
        chunks.push(packer.finish(first, digest.proof()));
        chunks
    }

    fn any_level() -> impl Strategy<Value = Level> {
        prop_oneof![1 => Just(Level::Stored), 4 => (-5..13i32).prop_map(Level::Zstd)]
    }

    proptest! {
        #[test]
        fn records_come_back_bit_exact(
            records in prop::collection::vec(any_record(), 0..40),
            levels in prop::collection::vec(any_level(), 0..20),
        ) {
            let max_chunk = 100_000;
            let chunks = pack(&records, max_chunk, &levels);
            prop_assert!(chunks.iter().all(|chunk| chunk.len() <= max_chunk));
            let (mut digest, mut back) = (RunningDigest::default(), Vec::new());
            for chunk in read(chunks) {
                prop_assert_eq!(chunk.first_number, digest.records() + 1);
                chunk.records.iter().for_each(|record| digest.add(record));
                prop_assert_eq!(chunk.proof, digest.proof());
                back.extend(chunk.records);
            }
            prop_assert_eq!(back, records);
        }

        #[test]
        fn garbage_is_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..300), fix in any::<bool>()) {
            if fix && bytes.len() > CHUNK_HEADER {
                let body = (bytes.len() - CHUNK_HEADER) as u32;
                bytes[..2].copy_from_slice(&[VERSION, 0]);
                bytes[10..14].copy_from_slice(&3u32.to_le_bytes());
                bytes[14..18].copy_from_slice(&body.to_le_bytes());
            }
            let _ = read_one(bytes);
        }

        #[test]
        fn a_damaged_chunk_never_panics(
            records in prop::collection::vec(any_record(), 1..5),
            at in any::<prop::sample::Index>(),
            flip in 1..=255u8,
            cut in any::<bool>(),
        ) {
            let mut bytes = pack(&records, MAX_BODY, &[])[0].to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if cut {
                bytes.truncate(at);
            }
            let _ = read_one(bytes);
        }
    }

    fn noise(seed: u8, len: usize) -> Vec<u8> {
        let mut noise = vec![0; len];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut noise);
        noise
    }

    fn write(offset: u64, data: Vec<u8>) -> Record {
        Record::Write { offset, data: data.into() }
    }

    #[test]
    fn what_the_disk_holds_twice_travels_once_and_noise_costs_next_to_nothing_more() {
        let len = 900_000;
        let chunks = pack(
            &[write(0, noise(1, len)), write(1 << 20, noise(2, len)), write(2 << 20, noise(1, len))],
            MAX_BODY,
            &[],
        );
        assert_eq!(chunks.len(), 3);
        for chunk in &chunks[..2] {
            assert!(chunk.len() < CHUNK_HEADER + WRITE_HEADER + len + 100, "{}", chunk.len());
        }
        assert!(chunks[2].len() < 2000, "{} bytes for what was two chunks before", chunks[2].len());
        assert!(pack(&[write(0, vec![7; 60_000])], MAX_BODY, &[])[0].len() < 200);
    }

    #[test]
    fn a_level_is_tried_before_another_follows_and_one_that_is_taken_back_forgets_nothing() {
        let mut packer = ChunkPacker::new(MAX_BODY, DEFAULT_WINDOW_LOG);
        let pack = |packer: &mut ChunkPacker, offset| {
            packer.push(&write(offset, noise(1, LEAST_AT_A_LEVEL as usize)));
            packer.finish(1, ANY_PROOF).len()
        };
        assert!(!packer.is_level_tried());
        pack(&mut packer, 0);
        assert!(packer.is_level_tried());
        packer.set_level(Level::Zstd(9));
        assert!(!packer.is_level_tried(), "it is not in force yet");
        packer.set_level(Level::FIRST);
        assert!(pack(&mut packer, 1) < 1000, "the window was forgotten for nothing");
        packer.set_level(Level::Zstd(9));
        assert!(pack(&mut packer, 2) > LEAST_AT_A_LEVEL as usize, "a frame of its own");
        assert!(packer.is_level_tried());
        assert_eq!(packer.level_changes(), 1);
    }

    #[test]
    fn the_longest_body_of_noise_fits_its_chunk() {
        let max_chunk = 1 << 20;
        let mut packer = ChunkPacker::new(max_chunk, DEFAULT_WINDOW_LOG);
        let record = write(0, noise(3, packer.max_body - WRITE_HEADER));
        assert!(packer.fits(&record));
        for level in [Level::FIRST, Level::Stored, Level::Zstd(-5), Level::Zstd(12)] {
            packer.set_level(level);
            packer.push(&record);
            assert!(packer.finish(1, ANY_PROOF).len() <= max_chunk);
        }
    }

    #[test]
    fn a_chunk_of_the_middle_is_refused_without_those_before_it() {
        let chunks = pack(&[write(0, noise(1, 90_000)), write(1, noise(1, 90_000))], 100_000, &[]);
        assert_eq!(read_one(chunks[1].clone()), Err(ChunkError::Zstd));
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked_and_a_window_beyond_the_agreed_one_too() {
        let frame = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        let chunk = |body_len: u32, frame: &[u8]| {
            let mut chunk = vec![VERSION, FLAG_ZSTD];
            chunk.extend([0; 12]);
            chunk.extend(body_len.to_le_bytes());
            chunk.extend(ANY_PROOF.to_bytes());
            chunk.extend(frame);
            chunk
        };
        assert_eq!(read_one(chunk(MAX_BODY as u32, &frame)), Err(ChunkError::Zstd));
        let refused = read_one(chunk(MAX_BODY as u32 + 1, &frame));
        assert!(matches!(refused, Err(ChunkError::TooLarge { .. })));
        let mut packer = ChunkPacker::new(MAX_BODY, DEFAULT_WINDOW_LOG + 1);
        packer.push(&Record::Flush);
        assert_eq!(read_one(packer.finish(1, ANY_PROOF)), Err(ChunkError::Zstd));
    }
}
