//! What crosses the WAN in place of memory: chunks of a peer that lies about lengths, programs and proofs.
//!
//! What one chunk becomes is bounded by its frames, and after the first error nothing more comes out.

use bytes::Bytes;
use longhaul_core::memory::PAGE_BYTES;
use longhaul_core::wan::{
    Decoded, DiskPlaces, EncoderConfig, GivenPlaces, MAX_CONTENTS, MAX_KNOWN_PAGES, MAX_OPS, MAX_RECORDS,
    StreamDecoder, StreamEncoder,
};

use crate::input::Input;
use crate::sample;

/// The most that one batch becomes.
const MAX_BATCH: usize = MAX_CONTENTS + MAX_OPS + 9 * MAX_RECORDS as usize + 4096 * MAX_KNOWN_PAGES as usize;
/// Pages that may be remembered.
const SHADOW_PAGES: u32 = 16;

/// Decodes `data` as chunks, each behind its length in two bytes.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let Ok(mut decoder) = StreamDecoder::new(SHADOW_PAGES) else { return };
    let mut failed = false;
    while !input.is_empty() {
        let len = usize::from(input.u16());
        decoder.handle_chunk(Bytes::copy_from_slice(input.take(len)));
        loop {
            match decoder.poll_decoded() {
                Ok(Some(Decoded::Bytes(bytes))) => assert!(!failed && bytes.len() <= MAX_BATCH),
                Ok(Some(Decoded::Disks(_))) => assert!(!failed),
                Ok(Some(Decoded::Wanted(places))) => {
                    assert!(!failed && places.len() as u64 <= MAX_KNOWN_PAGES);
                    decoder.handle_found(vec![Bytes::from_static(&[1; PAGE_BYTES]); places.len()]);
                }
                Ok(Some(Decoded::End(end))) => assert!(!failed && end.bytes == decoder.made()),
                Ok(None) => break,
                Err(_) => {
                    failed = true;
                    break;
                }
            }
        }
    }
}

/// A stream that was encoded, as it is, with its last byte changed, and with pages that a disk holds.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let config = EncoderConfig {
        shadow_pages: SHADOW_PAGES,
        ..EncoderConfig::for_chunks_of(EncoderConfig::MIN_CHUNK)
    };
    let whole = encoded(StreamEncoder::new(config).expect("zstd starts"));
    let mut places = DiskPlaces::with_room(8);
    places.note(1 << 16, &[1; PAGE_BYTES]);
    let given = vec![GivenPlaces { places, after_records: 3 }];
    let on_disk = encoded(StreamEncoder::new(config).expect("zstd starts").with_disks(given));
    let mut unproven = whole.clone();
    if let Some(last) = unproven.last_mut() {
        *last ^= 1;
    }
    vec![("whole", whole), ("unproven", unproven), ("on_disk", on_disk)]
}

fn encoded(mut encoder: StreamEncoder) -> Vec<u8> {
    encoder.handle_bytes(&sample::memory_stream(4));
    encoder.handle_end();
    let mut whole = Vec::new();
    while let Some(chunk) = encoder.poll_chunk() {
        whole.extend((chunk.len() as u16).to_be_bytes());
        whole.extend(chunk);
    }
    whole
}
