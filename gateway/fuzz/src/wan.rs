//! What crosses the WAN in place of memory: chunks of a peer that lies about lengths, programs, proofs and what it remembers.
//!
//! What one chunk becomes is bounded by its frames, and after the first error nothing more comes out.

use bytes::Bytes;
use longhaul_core::memory::PAGE_BYTES;
use longhaul_core::wan::{
    DecodeError, Decoded, DiskPlaces, EncoderConfig, GivenPlaces, MAX_CONTENTS, MAX_KNOWN_PAGES, MAX_OPS,
    MAX_RECORDS, Remembered, StreamDecoder, StreamEncoder,
};

use crate::input::Input;
use crate::sample;

/// The most that one batch becomes.
const MAX_BATCH: usize = MAX_CONTENTS + MAX_OPS + 9 * MAX_RECORDS as usize + 4096 * MAX_KNOWN_PAGES as usize;
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
    /// Chunks that came behind it.
    pub late_chunks: usize,
}

/// Decodes `data` behind its first byte as chunks, each behind its length in two bytes.
pub fn run(data: &[u8]) {
    play(data);
}

/// The same, and what came of it.
pub fn play(data: &[u8]) -> Seen {
    let mut seen = Seen::default();
    let Some((choice, chunks)) = data.split_first() else { return seen };
    let Ok(decoder) = StreamDecoder::new(SHADOW_PAGES) else { return seen };
    let mut decoder = decoder.with_base((choice & BASED != 0).then(base));
    let mut input = Input(chunks);
    while !input.is_empty() {
        let len = usize::from(input.u16());
        seen.late_chunks += usize::from(seen.error.is_some());
        decoder.handle_chunk(Bytes::copy_from_slice(input.take(len)));
        decode(&mut decoder, &mut seen);
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
    chunk.extend(contents);
    chunk.extend(ops);
    let mut seed = vec![BASED];
    seed.extend((chunk.len() as u16).to_be_bytes());
    seed.extend(chunk);
    seed
}
