//! What is decoded is what was encoded, byte for byte; what was damaged is never proven.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::memory::sample::{PLAIN, Record, any_sample, sample};
use crate::memory::{PAGE_BYTES, StreamPhase};

const MAX_CHUNK: usize = (1 << 20) - 1024;

/// Encodes with the stream cut in parts and a flush after every part whose flag is set.
fn encode(config: EncoderConfig, parts: &[(&[u8], bool)]) -> (Vec<Bytes>, StreamEnd, EncoderCounters) {
    let mut encoder = StreamEncoder::new(config).unwrap();
    let mut chunks = Vec::new();
    for (part, flush) in parts {
        encoder.handle_bytes(part);
        if *flush {
            encoder.handle_flush();
            assert!(encoder.is_idle());
        }
        chunks.extend(std::iter::from_fn(|| encoder.poll_chunk()));
    }
    let end = encoder.handle_end();
    chunks.extend(std::iter::from_fn(|| encoder.poll_chunk()));
    (chunks, end, encoder.counters())
}

fn decode(chunks: &[Bytes]) -> Result<(Vec<u8>, Option<StreamEnd>), DecodeError> {
    let mut decoder = StreamDecoder::new().unwrap();
    let (mut stream, mut end) = (Vec::new(), None);
    for chunk in chunks {
        decoder.handle_chunk(chunk.clone());
        while let Some(decoded) = decoder.poll_decoded()? {
            match decoded {
                Decoded::Bytes(bytes) => stream.extend_from_slice(&bytes),
                Decoded::End(proof) => end = Some(proof),
            }
        }
    }
    Ok((stream, end))
}

fn cut<'a>(bytes: &'a [u8], cuts: &[(usize, bool)]) -> Vec<(&'a [u8], bool)> {
    let mut at: Vec<(usize, bool)> =
        cuts.iter().map(|(at, flush)| (at % (bytes.len() + 1), *flush)).collect();
    at.extend([(0, false), (bytes.len(), false)]);
    at.sort_unstable();
    at.windows(2).map(|pair| (&bytes[pair[0].0..pair[1].0], pair[1].1)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_stream_comes_out_as_it_went_in(
        sample in any_sample(),
        cuts in vec(any::<(usize, bool)>(), 0..20),
        max_chunk in prop_oneof![Just(EncoderConfig::MIN_CHUNK), EncoderConfig::MIN_CHUNK..MAX_CHUNK],
        batch in 0usize..1 << 20,
    ) {
        let config = EncoderConfig { batch, ..EncoderConfig::for_chunks_of(max_chunk) };
        let (chunks, sent, counters) = encode(config, &cut(&sample.bytes, &cuts));
        prop_assert!(chunks.iter().all(|chunk| chunk.len() <= max_chunk));
        prop_assert_eq!(counters.wire_bytes, chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>());
        let (stream, end) = decode(&chunks).unwrap();
        prop_assert!(stream == sample.bytes);
        prop_assert_eq!(end, Some(sent));
    }

    #[test]
    fn what_is_not_a_stream_comes_out_as_it_went_in(bytes: Vec<u8>, cuts in vec(any::<(usize, bool)>(), 0..8)) {
        let (chunks, sent, _) = encode(EncoderConfig::for_chunks_of(MAX_CHUNK), &cut(&bytes, &cuts));
        let (stream, end) = decode(&chunks).unwrap();
        prop_assert!(stream == bytes);
        prop_assert_eq!(end, Some(sent));
    }

    #[test]
    fn a_damaged_chunk_is_never_proven(sample in any_sample(), which: usize, at: usize, flip in 1u8..) {
        let (mut chunks, _, _) = encode(EncoderConfig::for_chunks_of(MAX_CHUNK), &[(&sample.bytes, true)]);
        let which = which % chunks.len();
        let mut damaged = chunks[which].to_vec();
        let at = at % damaged.len();
        damaged[at] ^= flip;
        chunks[which] = damaged.into();
        // A bit that zstd ignores may change nothing; but then the stream is right.
        if let Ok((stream, Some(_))) = decode(&chunks) {
            prop_assert!(stream == sample.bytes);
        }
    }

    #[test]
    fn a_lost_or_swapped_chunk_is_never_proven(sample in any_sample(), which: usize, swap: bool) {
        let config = EncoderConfig::for_chunks_of(EncoderConfig::MIN_CHUNK);
        let (mut chunks, _, _) = encode(config, &[(&sample.bytes, true)]);
        let which = which % chunks.len();
        if swap {
            let other = (which + 1) % chunks.len();
            chunks.swap(which, other);
        } else {
            chunks.remove(which);
        }
        if let Ok((stream, Some(_))) = decode(&chunks) {
            prop_assert!(stream == sample.bytes);
        }
    }

    #[test]
    fn any_chunk_is_decoded_or_refused(chunk: Vec<u8>, typed in 0u8..4, encoding in 0u8..3) {
        let chunk = [&[typed, encoding][..], &chunk].concat();
        let _ = decode(&[chunk.into()]);
    }
}

fn batch_frame(encoding: u8, data: &[u8], contents_len: u32, ops_len: u32) -> Bytes {
    let mut frame = vec![FRAME_BATCH, encoding];
    frame.extend((data.len() as u32).to_be_bytes());
    frame.extend(contents_len.to_be_bytes());
    frame.extend(ops_len.to_be_bytes());
    frame.extend(data);
    frame.into()
}

#[test]
fn a_decompression_bomb_is_refused_at_the_limit() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let within = batch_frame(ENCODING_ZSTD, &bomb, MAX_CONTENTS as u32, 0);
    assert!(matches!(decode(&[within]), Err(DecodeError::Compressed(Some(_)))));
    let beyond = batch_frame(ENCODING_ZSTD, &bomb, MAX_CONTENTS as u32 + 1, 0);
    assert!(matches!(decode(&[beyond]), Err(DecodeError::TooLong(_))));
    let beyond = batch_frame(ENCODING_ZSTD, &bomb, 0, MAX_OPS as u32 + 1);
    assert!(matches!(decode(&[beyond]), Err(DecodeError::TooLong(_))));
}

#[test]
fn the_largest_batch_is_decoded() {
    let mut data = vec![7; MAX_CONTENTS];
    data.extend([0, 0x80, 0x80, 0x40]);
    let packed = zstd::bulk::compress(&data, 1).unwrap();
    let (stream, _) = decode(&[batch_frame(ENCODING_ZSTD, &packed, MAX_CONTENTS as u32, 4)]).unwrap();
    assert_eq!(stream.len(), MAX_CONTENTS);
}

#[test]
fn nothing_comes_after_the_end() {
    let (mut chunks, _, _) = encode(EncoderConfig::for_chunks_of(MAX_CHUNK), &[(b"not a stream", false)]);
    chunks.push(batch_frame(ENCODING_STORED, &[1, 0, 1], 1, 2));
    assert!(matches!(decode(&chunks), Err(DecodeError::AfterEnd)));
}

#[test]
fn nothing_comes_after_an_error_whatever_is_left_of_its_chunk() {
    let mut decoder = StreamDecoder::new().unwrap();
    let batch = batch_frame(ENCODING_STORED, b"verbatim\x00\x08", 8, 2);
    decoder.handle_chunk([&[0x55][..], &batch].concat().into());
    assert!(matches!(decoder.poll_decoded(), Err(DecodeError::UnknownFrame(0x55))));
    decoder.handle_chunk(batch);
    assert!(matches!(decoder.poll_decoded(), Err(DecodeError::AfterEnd)));
}

#[test]
fn incompressible_pages_cost_less_than_one_percent_more() {
    let record = |page| Record { block: 0, page, seed: Some(page as u32 * 2 + 1), spelled: false };
    let bytes = sample(PLAIN, &[(0..64).map(record).collect(), vec![]], &[]).bytes;
    let (chunks, _, _) = encode(EncoderConfig::for_chunks_of(MAX_CHUNK), &[(&bytes, false)]);
    let wire: usize = chunks.iter().map(Bytes::len).sum();
    assert!(wire < 64 * PAGE_BYTES + 64 * PAGE_BYTES / 100, "{wire} bytes");
}

#[test]
fn zero_pages_cost_next_to_nothing() {
    let record = |page: u64| Record { block: 0, page: page % 64, seed: None, spelled: false };
    let bytes = sample(PLAIN, &[(0..6400).map(record).collect(), vec![]], &[]).bytes;
    let (chunks, _, counters) = encode(EncoderConfig::for_chunks_of(MAX_CHUNK), &[(&bytes, false)]);
    assert_eq!(counters.stream.zero_pages, 6400);
    let wire: usize = chunks.iter().map(Bytes::len).sum();
    assert!(wire < 400, "{wire} bytes for 6400 zero pages");
    assert!(decode(&chunks).unwrap().0 == bytes);
}

#[test]
fn device_state_is_compressed_from_the_configured_length_on() {
    let state = vec![b'x'; 10_000];
    let bytes = sample(PLAIN, &[vec![], vec![]], &state).bytes;
    let wire = |device_stored_below| {
        let config = EncoderConfig { device_stored_below, ..EncoderConfig::for_chunks_of(MAX_CHUNK) };
        let (chunks, _, counters) = encode(config, &[(&bytes, false)]);
        assert!(decode(&chunks).unwrap().0 == bytes);
        assert_eq!(counters.stream.device_state_bytes, 10_005);
        counters.wire_device_bytes
    };
    assert!(wire(0) < 200);
    assert!(wire(10_005) < 200, "at the limit");
    assert!(wire(10_006) >= 10_005, "below the limit");
}

#[test]
fn an_encoder_tells_when_the_memory_is_complete() {
    let bytes = sample(PLAIN, &[vec![], vec![]], b"state").bytes;
    let mut encoder = StreamEncoder::new(EncoderConfig::for_chunks_of(MAX_CHUNK)).unwrap();
    encoder.handle_bytes(&bytes[..bytes.len() - 11]);
    assert_eq!(encoder.phase(), StreamPhase::Memory);
    encoder.handle_bytes(&bytes[bytes.len() - 11..]);
    assert_eq!(encoder.phase(), StreamPhase::DeviceState);
}
