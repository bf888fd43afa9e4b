//! QEMU's migration stream: parsed, packed for the WAN and made again, bit for bit, whatever the bytes are.

use bytes::Bytes;
use longhaul_core::memory::StreamParser;
use longhaul_core::wan::{Decoded, EncoderConfig, StreamDecoder, StreamEncoder};

use crate::sample;

/// Reads `data` as a migration stream, in pieces whose length its first byte decides.
pub fn run(data: &[u8]) {
    let Some((piece, stream)) = data.split_first() else { return };
    let piece = 1 + usize::from(*piece) * 16;
    parse(stream, piece);
    let chunks = encode(stream, piece);
    decode(&chunks, stream);
}

fn parse(stream: &[u8], piece: usize) {
    let mut parser = StreamParser::new();
    let mut seen = Vec::with_capacity(stream.len());
    let mut drain = |parser: &mut StreamParser| {
        while let Some(item) = parser.poll_item() {
            seen.extend_from_slice(item.bytes());
        }
    };
    for bytes in stream.chunks(piece) {
        parser.handle_bytes(bytes);
        drain(&mut parser);
    }
    parser.handle_end();
    drain(&mut parser);
    assert!(seen == stream, "the parser changed the stream");
}

/// Few, so that pages are forgotten.
const SHADOW_PAGES: u32 = 4;

fn encode(stream: &[u8], piece: usize) -> Vec<Bytes> {
    const MAX_CHUNK: usize = EncoderConfig::MIN_CHUNK;
    let config = EncoderConfig { shadow_pages: SHADOW_PAGES, ..EncoderConfig::for_chunks_of(MAX_CHUNK) };
    let mut encoder = StreamEncoder::new(config).expect("zstd starts");
    let mut chunks = Vec::new();
    for bytes in stream.chunks(piece) {
        encoder.handle_bytes(bytes);
        chunks.extend(std::iter::from_fn(|| encoder.poll_chunk()));
    }
    encoder.handle_end();
    chunks.extend(std::iter::from_fn(|| encoder.poll_chunk()));
    assert!(chunks.iter().all(|chunk| chunk.len() <= MAX_CHUNK));
    chunks
}

fn decode(chunks: &[Bytes], mut expected: &[u8]) {
    let mut decoder = StreamDecoder::new(SHADOW_PAGES).expect("zstd starts");
    let mut proven = false;
    for chunk in chunks {
        decoder.handle_chunk(chunk.clone());
        while let Some(decoded) = decoder.poll_decoded().expect("our own chunks decode") {
            match decoded {
                Decoded::Bytes(bytes) => {
                    expected = expected.strip_prefix(&bytes[..]).expect("bit for bit the same");
                }
                Decoded::Disks(_) | Decoded::Wanted(_) => panic!("no disk was given"),
                Decoded::End(_) => proven = true,
            }
        }
    }
    assert!(proven && expected.is_empty());
}

/// A whole stream, its beginning, and one with an unknown section.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let stream = |pages| [&[255][..], &sample::memory_stream(pages)].concat();
    let unknown = [&stream(1)[..], &[0x55; 64]].concat();
    vec![("whole", stream(3)), ("begins", stream(1)[..80].to_vec()), ("unknown", unknown)]
}
