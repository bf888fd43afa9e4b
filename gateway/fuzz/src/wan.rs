//! What crosses the WAN in place of memory: chunks of a peer that lies about lengths, programs, proofs and what it remembers.
//!
//! What one chunk becomes is bounded by its frames, and after the first error nothing more comes out. A batch whose proof does
//! not fit is given one that does, and all is played again: an input that was altered would come no further than to its first
//! batch. That a wrong proof is refused is not tried here.

use bytes::Bytes;
use longhaul_core::memory::PAGE_BYTES;
use longhaul_core::proof::Proof;
use longhaul_core::wan::{
    DecodeError, Decoded, DiskPlaces, EncoderConfig, GivenPlaces, MAX_CONTENTS, MAX_KNOWN_PAGES, MAX_OPS,
    MAX_RECORDS, Remembered, StreamDecoder, StreamEncoder,
};

use crate::input::Input;
use crate::sample;

/// The most that one batch becomes.
const MAX_BATCH: usize = MAX_CONTENTS + MAX_OPS + 9 * MAX_RECORDS as usize + 4096 * MAX_KNOWN_PAGES as usize;
/// How many batches are given another proof.
const MAX_SEALED: usize = 16;
/// What stands before a batch's data, and where its proof is in it.
const BATCH_HEADER: usize = 14 + Proof::BYTES;
const BATCH_PROOF: usize = 14;
/// Pages that may be remembered.
const SHADOW_PAGES: u32 = 16;
/// In the first byte: both ends remember an earlier stream.
const BASED: u8 = 1;

/// What came of an input.
#[derive(Debug, Default)]
pub struct Seen {
    /// Bytes of the stream that were made.
    pub made_bytes: u64,
    /// Pages that were asked for on a disk.
    pub wanted_pages: usize,
    /// The stream was complete and proven.
    pub proven: bool,
    /// The first error.
    pub error: Option<DecodeError>,
    /// Chunks that came before the one with the error, and the batches of that one that became something.
    chunks: usize,
    batches: usize,
    /// Chunks that came behind it.
    pub late_chunks: usize,
}

/// Decodes `data` behind its first byte as chunks, each behind its length in two bytes.
pub fn run(data: &[u8]) {
    play(data);
}

/// The same, and what came of it.
pub fn play(data: &[u8]) -> Seen {
    let Some((choice, rest)) = data.split_first() else { return Seen::default() };
    let (mut input, mut chunks) = (Input(rest), Vec::new());
    while !input.is_empty() {
        let len = usize::from(input.u16());
        chunks.push(input.take(len).to_vec());
    }
    for _ in 0..MAX_SEALED {
        let seen = play_chunks(*choice, &chunks);
        let Some(DecodeError::Damaged { made, .. }) = &seen.error else { return seen };
        seal(&mut chunks[seen.chunks], seen.batches, *made);
    }
    play_chunks(*choice, &chunks)
}

/// Gives a chunk's batch this proof.
fn seal(chunk: &mut [u8], batch: usize, proof: Proof) {
    let (mut at, mut before) = (0, batch);
    loop {
        let len = match chunk[at] {
            1 if before == 0 => break,
            1 => {
                before -= 1;
                let data_len = u32::from_be_bytes([2, 3, 4, 5].map(|byte| chunk[at + byte]));
                BATCH_HEADER + data_len as usize
            }
            3 => 38,
            4 => 2 + 8 * usize::from(chunk[at + 1]),
            other => panic!("no batch comes behind a frame of type {other}"),
        };
        at += len;
    }
    chunk[at + BATCH_PROOF..at + BATCH_HEADER].copy_from_slice(&proof.to_bytes());
}

fn play_chunks(choice: u8, chunks: &[Vec<u8>]) -> Seen {
    let mut seen = Seen::default();
    let Ok(decoder) = StreamDecoder::new(SHADOW_PAGES) else { return seen };
    let mut decoder = decoder.with_base((choice & BASED != 0).then(base));
    for chunk in chunks {
        match seen.error {
            Some(_) => seen.late_chunks += 1,
            None => seen.batches = 0,
        }
        decoder.handle_chunk(Bytes::copy_from_slice(chunk));
        decode(&mut decoder, &mut seen);
        seen.chunks += usize::from(seen.error.is_none());
    }
    assert!(decoder.into_remembered().pages().count() <= SHADOW_PAGES as usize);
    seen
}

fn decode(decoder: &mut StreamDecoder, seen: &mut Seen) {
    loop {
        let decoded = match decoder.poll_decoded() {
            Ok(Some(decoded)) => decoded,
            Ok(None) => return,
            Err(error) => {
                seen.error.get_or_insert(error);
                return;
            }
        };
        assert!(seen.error.is_none() && !seen.proven, "nothing comes behind an error or the end");
        match decoded {
            Decoded::Bytes(bytes) => {
                assert!(bytes.len() <= MAX_BATCH);
                seen.batches += 1;
                seen.made_bytes += bytes.len() as u64;
            }
            Decoded::Disks(_) => {}
            Decoded::Wanted(places) => {
                assert!(places.len() as u64 <= MAX_KNOWN_PAGES);
                seen.wanted_pages += places.len();
                decoder.handle_found(vec![Bytes::from_static(&[1; PAGE_BYTES]); places.len()]);
            }
            Decoded::End(end) => {
                assert_eq!((end.bytes, end.bytes.0), (decoder.made(), seen.made_bytes));
                seen.proven = true;
            }
        }
    }
}

/// What both ends remember of an earlier stream: of [`sample::memory_stream`]'s pages one as it is there and one of which a
/// little changed, and one that is not there.
fn base() -> Remembered {
    let mut base = Remembered::with_room(SHADOW_PAGES);
    let mut changed = [3; PAGE_BYTES];
    changed[..8].fill(9);
    for (page, content) in [(0, [1; PAGE_BYTES]), (2, changed), (9, [5; PAGE_BYTES])] {
        assert!(base.put(b"pc.ram", page, &content), "there is room for it");
    }
    base
}

/// A stream that was encoded, as it is, with its last byte changed, with pages that a disk holds, and with pages that are
/// remembered of an earlier one; and a page that is a copy of one of these.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let config = EncoderConfig {
        shadow_pages: SHADOW_PAGES,
        ..EncoderConfig::for_chunks_of(EncoderConfig::MIN_CHUNK)
    };
    let encoder = |base| StreamEncoder::based_on(config, base).expect("zstd starts");
    let whole = encoded(0, encoder(None));
    let mut places = DiskPlaces::with_room(8);
    places.note(1 << 16, &[1; PAGE_BYTES]);
    let given = vec![GivenPlaces { places, after_records: 3 }];
    let on_disk = encoded(0, encoder(None).with_disks(given));
    let based = encoded(BASED, encoder(Some(base())));
    let mut unproven = whole.clone();
    if let Some(last) = unproven.last_mut() {
        *last ^= 1;
    }
    vec![
        ("whole", whole),
        ("unproven", unproven),
        ("on_disk", on_disk),
        ("based", based),
        ("copied", copied()),
    ]
}

fn encoded(choice: u8, mut encoder: StreamEncoder) -> Vec<u8> {
    encoder.handle_bytes(&sample::memory_stream(4));
    encoder.handle_end();
    let mut whole = vec![choice];
    while let Some(chunk) = encoder.poll_chunk() {
        whole.extend((chunk.len() as u16).to_be_bytes());
        whole.extend(chunk);
    }
    whole
}

/// Page 4 is what the earlier stream's third page was. No encoder says this: it looks for twins among what it sent itself.
fn copied() -> Vec<u8> {
    let mut chunk = vec![3];
    chunk.extend(SHADOW_PAGES.to_be_bytes());
    chunk.push(1);
    chunk.extend(base().digest());
    let (contents, ops) = (2u32.to_be_bytes(), *b"\x85\x06pc.ram\x08\x01");
    chunk.extend([1, 0]);
    for len in [contents.len() + ops.len(), contents.len(), ops.len()] {
        chunk.extend((len as u32).to_be_bytes());
    }
    let head = ((4 * PAGE_BYTES as u64) | 8).to_be_bytes();
    let made = [&head[..], b"\x06pc.ram", &[5; PAGE_BYTES]].concat();
    chunk.extend(&blake3::hash(&made).as_bytes()[..16]);
    chunk.extend(contents);
    chunk.extend(ops);
    let mut seed = vec![BASED];
    seed.extend((chunk.len() as u16).to_be_bytes());
    seed.extend(chunk);
    seed
}
