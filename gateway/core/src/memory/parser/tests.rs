//! Whatever is put in comes out, in any split; what QEMU writes is really understood.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::sample::{PLAIN, Record, Sample, any_sample, sample};
use super::*;

fn parse(parts: &[&[u8]]) -> (Vec<Item>, StreamParser) {
    let mut parser = StreamParser::new();
    let mut items = Vec::new();
    for part in parts {
        parser.handle_bytes(part);
        items.extend(std::iter::from_fn(|| parser.poll_item()));
        assert!(parser.buffer.len() <= 64 << 10, "{} bytes kept", parser.buffer.len());
    }
    parser.handle_end();
    items.extend(std::iter::from_fn(|| parser.poll_item()));
    (items, parser)
}

fn joined(items: &[Item]) -> Vec<u8> {
    items.iter().flat_map(|item| item.bytes().to_vec()).collect()
}

fn split<'a>(bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    at.extend([0, bytes.len()]);
    at.sort_unstable();
    at.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect()
}

fn assert_understood(sample: &Sample, parser: &StreamParser) {
    let counters = parser.counters();
    assert_eq!(counters.pages, sample.pages);
    assert_eq!(counters.zero_pages, sample.zero_pages);
    assert_eq!(counters.sections, sample.sections);
    assert_eq!(counters.bytes, sample.bytes.len() as u64);
    assert_eq!(counters.device_state_bytes, sample.device_state.len() as u64);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_stream_is_understood_and_whole_in_any_split(sample in any_sample(), cuts in vec(any::<usize>(), 0..40)) {
        let (items, parser) = parse(&split(&sample.bytes, &cuts));
        prop_assert!(joined(&items) == sample.bytes);
        assert_understood(&sample, &parser);
        prop_assert!(!matches!(parser.phase(), StreamPhase::Opaque(_)));
    }

    #[test]
    fn garbage_passes_untouched(garbage: Vec<u8>, valid_start: bool, cuts in vec(any::<usize>(), 0..10)) {
        let mut bytes = if valid_start { sample(PLAIN, &[vec![], vec![]], &[]).bytes } else { vec![] };
        bytes.truncate(bytes.len().saturating_sub(13));
        bytes.extend(garbage);
        let (items, _) = parse(&split(&bytes, &cuts));
        prop_assert!(joined(&items) == bytes);
    }

    #[test]
    fn a_damaged_stream_passes_untouched(
        sample in any_sample(),
        at: usize,
        flip in 1u8..,
        cuts in vec(any::<usize>(), 0..10),
    ) {
        let mut bytes = sample.bytes;
        let at = at % bytes.len();
        bytes[at] ^= flip;
        let (items, _) = parse(&split(&bytes, &cuts));
        prop_assert!(joined(&items) == bytes);
    }
}

fn small_sample() -> Sample {
    let record = |block, page, seed, spelled| Record { block, page, seed, spelled };
    let first = vec![record(0, 0, None, false), record(0, 1, Some(3), false), record(1, 0, None, false)];
    let second = vec![record(0, 5, None, true), record(0, 6, None, false)];
    sample(PLAIN, &[first, second], b"device state")
}

#[test]
fn a_stream_cut_at_every_byte_loses_nothing() {
    let sample = small_sample();
    for len in 0..=sample.bytes.len() {
        let (items, _) = parse(&[&sample.bytes[..len]]);
        assert!(joined(&items) == sample.bytes[..len], "cut at {len}");
    }
}

#[test]
fn a_stream_byte_by_byte_is_understood() {
    let sample = small_sample();
    let bytes: Vec<&[u8]> = sample.bytes.chunks(1).collect();
    let (items, parser) = parse(&bytes);
    assert!(joined(&items) == sample.bytes);
    assert_understood(&sample, &parser);
    assert_eq!(parser.phase(), StreamPhase::DeviceState);
}

#[test]
fn items_say_which_page_they_are() {
    let (items, _) = parse(&[&small_sample().bytes]);
    let zero = |item: &Item| match item {
        Item::ZeroPage { head, .. } => Some((head.block.0, head.offset_bytes, head.name.is_some())),
        Item::Framing(_) | Item::Page { .. } | Item::DeviceState(_) | Item::Opaque(_) => None,
    };
    let zeros: Vec<_> = items.iter().filter_map(zero).collect();
    assert_eq!(zeros, [(0, 0, true), (1, 0, true), (0, 5 * 4096, true), (0, 6 * 4096, false)]);
}

#[test]
fn a_round_begins_where_the_scan_starts_over() {
    let record = |page| Record { block: 0, page, seed: None, spelled: false };
    let parts = [vec![record(0), record(9)], vec![record(10), record(3)], vec![record(4), record(4)]];
    let (_, parser) = parse(&[&sample(PLAIN, &parts, &[]).bytes]);
    assert_eq!(parser.counters().rounds, 3);
}

#[test]
fn what_is_not_understood_makes_the_rest_opaque_with_its_reason() {
    let sample = small_sample();
    let ram_start =
        sample.bytes.windows(4).position(|bytes| bytes == b"\x03ram").expect("the section's name") - 5;
    let reason_of = |at: usize, byte: u8| {
        let mut bytes = sample.bytes.clone();
        bytes[at] = byte;
        let (items, parser) = parse(&[&bytes]);
        assert!(joined(&items) == bytes);
        match parser.phase() {
            StreamPhase::Opaque(reason) => Some(reason),
            StreamPhase::Memory | StreamPhase::DeviceState => None,
        }
    };
    assert_eq!(reason_of(0, b'X'), Some(OpaqueReason::Header));
    assert_eq!(reason_of(9, 1), Some(OpaqueReason::Configuration));
    assert_eq!(reason_of(ram_start, 4), Some(OpaqueReason::Section(4)));
    assert_eq!(reason_of(ram_start + 6, b'x'), Some(OpaqueReason::ForeignSection));
    assert_eq!(reason_of(ram_start + 16, 5), Some(OpaqueReason::ForeignSection));
    assert_eq!(reason_of(ram_start + 24, 0x40), Some(OpaqueReason::Record { flags: 0x40 }));
}

#[test]
fn a_page_outside_its_block_is_not_understood() {
    let record = Record { block: 2, page: 4, seed: None, spelled: false };
    let bytes = sample(PLAIN, &[vec![record], vec![]], &[]).bytes;
    let (items, parser) = parse(&[&bytes]);
    assert!(joined(&items) == bytes);
    assert_eq!(parser.phase(), StreamPhase::Opaque(OpaqueReason::Record { flags: 2 }));
}
