//! What is decoded is what was encoded, byte for byte; what was damaged is never proven.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::memory::sample::{NEARLY, PLAIN, Record, any_sample, contents, sample};
use crate::memory::{PAGE_BYTES, StreamPhase};

const MAX_CHUNK: usize = (1 << 20) - 1024;

/// Encodes with the stream cut in parts and a flush after every part whose flag is set.
pub(super) fn encode(
    config: EncoderConfig,
    parts: &[(&[u8], bool)],
) -> (Vec<Bytes>, StreamEnd, EncoderCounters) {
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

/// More pages than any sample has.
pub(super) const ALLOWED: u32 = 1 << 10;

fn decode(chunks: &[Bytes]) -> Result<(Vec<u8>, Option<StreamEnd>), DecodeError> {
    let mut decoder = StreamDecoder::new(ALLOWED).unwrap();
    let (mut stream, mut end) = (Vec::new(), None);
    for chunk in chunks {
        decoder.handle_chunk(chunk.clone());
        while let Some(decoded) = decoder.poll_decoded()? {
            match decoded {
                Decoded::Bytes(bytes) => stream.extend_from_slice(&bytes),
                Decoded::Disks(_) => {}
                Decoded::Wanted(places) => {
                    decoder.handle_found(vec![Bytes::from_static(&[0; PAGE_BYTES]); places.len()]);
                }
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
        shadow_pages in prop_oneof![Just(0), 1u32..12, Just(ALLOWED)],
    ) {
        let config = EncoderConfig { batch, shadow_pages, ..EncoderConfig::for_chunks_of(max_chunk) };
        let (chunks, sent, counters) = encode(config, &cut(&sample.bytes, &cuts));
        prop_assert!(chunks.iter().all(|chunk| chunk.len() <= max_chunk));
        prop_assert_eq!(counters.wire_bytes, chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>());
        let (stream, end) = decode(&chunks).unwrap();
        prop_assert!(stream == sample.bytes);
        prop_assert_eq!(end, Some(sent));
    }

    #[test]
    fn chunks_are_short_from_the_moment_at_which_they_are_to_be(
        sample in any_sample(),
        cuts in vec(any::<(usize, bool)>(), 1..20),
        at in any::<prop::sample::Index>(),
        shorter in EncoderConfig::MIN_CHUNK..MAX_CHUNK,
    ) {
        let mut encoder = StreamEncoder::new(EncoderConfig::for_chunks_of(MAX_CHUNK)).unwrap();
        let (parts, mut chunks) = (cut(&sample.bytes, &cuts), Vec::new());
        let at = at.index(parts.len());
        for (number, (part, _)) in parts.into_iter().enumerate() {
            if number == at {
                encoder.shorten_chunks(shorter);
                chunks.extend(std::iter::from_fn(|| encoder.poll_chunk()));
            }
            encoder.handle_bytes(part);
            let made: Vec<Bytes> = std::iter::from_fn(|| encoder.poll_chunk()).collect();
            prop_assert!(number < at || made.iter().all(|chunk| chunk.len() <= shorter));
            chunks.extend(made);
        }
        encoder.handle_end();
        chunks.extend(std::iter::from_fn(|| encoder.poll_chunk()));
        prop_assert!(decode(&chunks).unwrap().0 == sample.bytes);
    }

    /// `stores_identical` and `no_page_from_an_unacknowledged_base`: whenever all that was sent has been decoded, both ends
    /// remember the same, whatever was forgotten; and what is decoded rests on nothing later.
    #[test]
    fn both_ends_remember_the_same_at_every_moment(
        sample in any_sample(),
        cuts in vec(any::<(usize, bool)>(), 0..20),
        shadow_pages in 1u32..40,
        level in 0i32..6,
    ) {
        let config = EncoderConfig { shadow_pages, ..EncoderConfig::for_chunks_of(EncoderConfig::MIN_CHUNK) };
        let mut encoder = StreamEncoder::new(config).unwrap();
        let mut decoder = StreamDecoder::new(shadow_pages).unwrap();
        let mut stream = Vec::new();
        for (part, flush) in cut(&sample.bytes, &cuts) {
            encoder.handle_bytes(part);
            encoder.set_memory_level(if level == 0 { Level::Stored } else { Level::Zstd(level) });
            if flush {
                encoder.handle_flush();
            }
            while let Some(chunk) = encoder.poll_chunk() {
                decoder.handle_chunk(chunk);
                while let Some(decoded) = decoder.poll_decoded().unwrap() {
                    let Decoded::Bytes(bytes) = decoded else { panic!("the end came too early") };
                    stream.extend_from_slice(&bytes);
                }
            }
            if flush {
                prop_assert!(encoder.shadow() == decoder.shadow());
                prop_assert!(sample.bytes.starts_with(&stream));
            }
        }
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
    fn any_chunk_is_decoded_or_refused(chunk: Vec<u8>, typed in 0u8..5, encoding in 0u8..3) {
        let chunk = [&[typed, encoding][..], &chunk].concat();
        let _ = decode(&[chunk.into()]);
    }
}

/// The first batch of a stream that begins with `made`.
fn batch_frame(encoding: u8, data: &[u8], contents_len: u32, ops_len: u32, made: &[u8]) -> Bytes {
    let mut frame = vec![FRAME_BATCH, encoding];
    frame.extend((data.len() as u32).to_be_bytes());
    frame.extend(contents_len.to_be_bytes());
    frame.extend(ops_len.to_be_bytes());
    frame.extend(Proof::of(blake3::Hasher::new().update(made)).to_bytes());
    frame.extend(data);
    frame.into()
}

#[test]
fn a_decompression_bomb_is_refused_at_the_limit() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let within = batch_frame(ENCODING_ZSTD, &bomb, MAX_CONTENTS as u32, 0, &[]);
    assert!(matches!(decode(&[within]), Err(DecodeError::Compressed(Some(_)))));
    let beyond = batch_frame(ENCODING_ZSTD, &bomb, MAX_CONTENTS as u32 + 1, 0, &[]);
    assert!(matches!(decode(&[beyond]), Err(DecodeError::TooLong(_))));
    let beyond = batch_frame(ENCODING_ZSTD, &bomb, 0, MAX_OPS as u32 + 1, &[]);
    assert!(matches!(decode(&[beyond]), Err(DecodeError::TooLong(_))));
}

#[test]
fn the_largest_batch_is_decoded() {
    let mut data = vec![7; MAX_CONTENTS];
    data.extend([0, 0x80, 0x80, 0x40]);
    let packed = zstd::bulk::compress(&data, 1).unwrap();
    let frame = batch_frame(ENCODING_ZSTD, &packed, MAX_CONTENTS as u32, 4, &data[..MAX_CONTENTS]);
    let (stream, _) = decode(&[frame]).unwrap();
    assert_eq!(stream.len(), MAX_CONTENTS);
}

#[test]
fn nothing_comes_after_the_end() {
    let (mut chunks, _, _) = encode(EncoderConfig::for_chunks_of(MAX_CHUNK), &[(b"not a stream", false)]);
    chunks.push(batch_frame(ENCODING_STORED, &[1, 0, 1], 1, 2, &[1]));
    assert!(matches!(decode(&chunks), Err(DecodeError::AfterEnd)));
}

#[test]
fn nothing_comes_after_an_error_whatever_is_left_of_its_chunk() {
    let mut decoder = StreamDecoder::new(0).unwrap();
    let batch = batch_frame(ENCODING_STORED, b"verbatim\x00\x08", 8, 2, b"verbatim");
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

fn wire_of(sections: &[Vec<Record>], shadow_pages: u32) -> (usize, EncoderCounters) {
    let bytes = sample(PLAIN, sections, &[]).bytes;
    // Small batches: what one batch holds twice zstd finds by itself.
    let config =
        EncoderConfig { shadow_pages, batch: 2 * PAGE_BYTES, ..EncoderConfig::for_chunks_of(MAX_CHUNK) };
    let (chunks, _, counters) = encode(config, &[(&bytes, false)]);
    assert!(decode(&chunks).unwrap().0 == bytes);
    (chunks.iter().map(Bytes::len).sum(), counters)
}

#[test]
fn a_page_that_is_sent_again_costs_what_changed_and_a_twin_next_to_nothing() {
    let page = |page: u64, seed: u32| Record { block: 0, page, seed: Some(seed), spelled: false };
    // Incompressible pages, sent once, then as they were, a little changed, and elsewhere.
    let first: Vec<Record> = (0..16).map(|number| page(number, number as u32 * 2 + 1)).collect();
    let again: Vec<Record> = first.clone();
    let changed: Vec<Record> = (0..16).map(|number| page(number, (number as u32 * 2 + 1) | NEARLY)).collect();
    let twins: Vec<Record> = (16..32).map(|number| page(number, number as u32 * 2 - 31)).collect();
    let (once, _) = wire_of(&[first.clone(), vec![]], ALLOWED);
    assert!((16 * PAGE_BYTES..17 * PAGE_BYTES).contains(&once), "{once} bytes");
    for (what, more, limit, known) in
        [("same", again, 100, 16), ("changed", changed, 16 * 60, 16), ("twins", twins, 16 * 20, 16)]
    {
        let (both, counters) = wire_of(&[first.clone(), more.clone(), vec![]], ALLOWED);
        assert!(both - once < limit, "{what}: {} bytes more", both - once);
        assert_eq!(counters.known_pages, known, "{what}");
        let (without, _) = wire_of(&[first.clone(), more, vec![]], 0);
        assert!(
            without - once > 15 * PAGE_BYTES,
            "{what}: {} bytes more if nothing is remembered",
            without - once
        );
    }
}

#[test]
fn no_more_is_remembered_than_the_destination_allows_and_nothing_later_than_the_beginning() {
    let record = Record { block: 0, page: 1, seed: Some(1), spelled: false };
    let bytes = sample(PLAIN, &[vec![record], vec![]], &[]).bytes;
    let config = EncoderConfig { shadow_pages: ALLOWED + 1, ..EncoderConfig::for_chunks_of(MAX_CHUNK) };
    let (chunks, _, _) = encode(config, &[(&bytes, false)]);
    let refused = decode(&chunks);
    assert!(matches!(refused, Err(DecodeError::Shadow { asked, allowed }) if asked == allowed + 1));
    let late = [&[FRAME_SHADOW, 0, 0, 0, 9][..], &[0; 33]].concat();
    let verbatim = batch_frame(ENCODING_STORED, b"x\x00\x01", 1, 2, b"x");
    let refused = decode(&[verbatim, late.clone().into()]);
    assert!(matches!(refused, Err(DecodeError::Shadow { asked: 9, .. })));
    assert!(
        matches!(decode(&[[&late[..], &late].concat().into()]), Err(DecodeError::Shadow { .. })),
        "twice"
    );
    assert!(matches!(decode(&[late[..4].to_vec().into()]), Err(DecodeError::Truncated)));
}

#[test]
fn a_machine_that_comes_back_costs_what_changed_since_it_left() {
    let page = |page: u64, seed: u32| Record { block: 0, page, seed: Some(seed), spelled: false };
    let left: Vec<Record> = (0..16).map(|number| page(number, number as u32 * 2 + 1)).collect();
    let mut back = left.clone();
    back[3] = page(3, 7 | NEARLY);
    let stream = |records: Vec<Record>| sample(PLAIN, &[records, vec![]], &[]).bytes;
    let config = EncoderConfig { shadow_pages: ALLOWED, ..EncoderConfig::for_chunks_of(MAX_CHUNK) };
    let run = |bytes: &[u8], bases: [Option<Remembered>; 2]| {
        let [ours, theirs] = bases;
        let mut encoder = StreamEncoder::based_on(config, ours).unwrap();
        let mut decoder = StreamDecoder::new(ALLOWED).unwrap().with_base(theirs);
        encoder.handle_bytes(bytes);
        encoder.handle_end();
        let (mut made, mut wire) = (Vec::new(), 0);
        while let Some(chunk) = encoder.poll_chunk() {
            wire += chunk.len();
            decoder.handle_chunk(chunk);
            while let Some(decoded) = decoder.poll_decoded()? {
                if let Decoded::Bytes(bytes) = decoded {
                    made.extend_from_slice(&bytes);
                }
            }
        }
        assert!(made == bytes);
        Ok::<_, DecodeError>((wire, [encoder.into_remembered(), decoder.into_remembered()]))
    };
    let (there, [ours, theirs]) = run(&stream(left), [None, None]).unwrap();
    assert!(there > 16 * PAGE_BYTES && ours == theirs && ours.pages().count() == 16);
    // The other way round: who decoded encodes.
    let (wire, [ours, theirs]) = run(&stream(back.clone()), [Some(theirs), Some(ours)]).unwrap();
    assert!(wire < 350, "{wire} bytes for a page that changed a little");
    assert!(ours == theirs);
    let refused = run(&stream(back), [Some(ours), None]);
    assert!(matches!(refused, Err(DecodeError::OtherBase)));
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

/// A stream with one page that a disk holds at part 5, and the decoder behind its first words about disks.
fn with_a_page_on_disk(disks: usize) -> (Vec<Bytes>, Vec<u8>) {
    let record = Record { block: 0, page: 1, seed: Some(3), spelled: false };
    let bytes = sample(PLAIN, &[vec![record], vec![]], &[]).bytes;
    let mut places = DiskPlaces::with_room(1);
    places.note(5 * PAGE_BYTES as u64, &contents(3));
    let mut given: Vec<GivenPlaces> = std::iter::repeat_with(GivenPlaces::default).take(disks - 1).collect();
    given.push(GivenPlaces { places, after_records: 9 });
    let encoder = StreamEncoder::new(EncoderConfig::for_chunks_of(MAX_CHUNK)).unwrap();
    let mut encoder = encoder.with_disks(given);
    encoder.handle_bytes(&bytes);
    encoder.handle_end();
    (std::iter::from_fn(|| encoder.poll_chunk()).collect(), bytes)
}

#[test]
fn a_page_that_stands_on_a_disk_is_asked_for_there_and_refused_if_it_is_not_found() {
    let (chunks, bytes) = with_a_page_on_disk(2);
    let answered = |found: Vec<Bytes>| {
        let mut decoder = StreamDecoder::new(0).unwrap();
        decoder.handle_chunk(chunks[0].clone());
        assert_eq!(decoder.poll_decoded().unwrap(), Some(Decoded::Disks(vec![0, 9])));
        let wanted = Decoded::Wanted(vec![Place { disk: 1, part: 5 }]);
        assert_eq!(decoder.poll_decoded().unwrap(), Some(wanted));
        decoder.handle_found(found);
        decoder.poll_decoded()
    };
    assert_eq!(chunks.len(), 1);
    assert!(chunks[0].len() < 700, "{} bytes for a page on a disk", chunks[0].len());
    let made = answered(vec![contents(3).into()]).unwrap();
    assert!(matches!(made, Some(Decoded::Bytes(made)) if bytes.starts_with(&made)));
    let other = answered(vec![contents(5).into()]);
    assert!(
        matches!(&other, Err(DecodeError::Damaged { pages, .. }) if pages.to_string() == "pc.ram, 0x1000 to 0x2000"),
        "{other:?}"
    );
    for found in [vec![], vec![Bytes::from_static(&[1; 7])], vec![contents(3).into(), contents(3).into()]] {
        assert!(matches!(answered(found), Err(DecodeError::NotFound)));
    }
}

#[test]
fn places_are_of_disks_that_the_stream_is_named_by() {
    let (chunks, _) = with_a_page_on_disk(1);
    let first = |chunk: Vec<u8>| {
        let mut decoder = StreamDecoder::new(0).unwrap();
        decoder.handle_chunk(chunk.into());
        std::iter::repeat_with(|| decoder.poll_decoded()).find(|decoded| !matches!(decoded, Ok(Some(_))))
    };
    // The frame of one disk has ten bytes.
    let without = chunks[0][10..].to_vec();
    assert!(matches!(first(without), Some(Err(DecodeError::NotFound))), "no disk was told of");
    let twice = [&chunks[0][..10], &chunks[0][..]].concat();
    assert!(matches!(first(twice), Some(Err(DecodeError::Program))));
    assert!(matches!(first(vec![FRAME_DISKS, 0]), Some(Err(DecodeError::Program))));
    assert!(matches!(first(vec![FRAME_DISKS, 2, 0, 0]), Some(Err(DecodeError::Truncated))));
    let (of_two, _) = with_a_page_on_disk(2);
    let of_one = [&chunks[0][..10], &of_two[0][18..]].concat();
    assert!(matches!(first(of_one), Some(Err(DecodeError::NotFound))), "the second of one");
}
