//! A batch that does not become what was read is refused before a byte of it is handed out, and is named: by its place in the
//! stream, and by the pages of memory that it tells.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use proptest::prelude::*;

use super::tests::{ALLOWED, encode};
use super::*;
use crate::memory::sample::{NEARLY, PLAIN, Record, any_sample, contents, sample};
use crate::memory::{BlockIndex, Item, PAGE_BYTES, StreamParser};
use crate::units::Bytes as ByteCount;

/// A frame on its way, of which a batch is unpacked.
enum Frame {
    Batch { contents: Vec<u8>, ops: Vec<u8>, proof: Vec<u8> },
    Other(Vec<u8>),
}

/// The frames of a stream that remembers nothing and names no disk.
fn frames(chunks: &[Bytes]) -> Vec<Frame> {
    let mut frames = Vec::new();
    for chunk in chunks {
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            if rest[0] != FRAME_BATCH {
                let (end, behind) = rest.split_at(END_FRAME_BYTES);
                frames.push(Frame::Other(end.to_vec()));
                rest = behind;
                continue;
            }
            let len = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap()) as usize;
            let (data_len, contents_len, ops_len) = (len(2), len(6), len(10));
            let data = &rest[BATCH_HEADER_BYTES..][..data_len];
            let mut contents = match rest[1] {
                ENCODING_ZSTD => zstd::bulk::decompress(data, contents_len + ops_len).unwrap(),
                _ => data.to_vec(),
            };
            let ops = contents.split_off(contents_len);
            frames.push(Frame::Batch { contents, ops, proof: rest[14..BATCH_HEADER_BYTES].to_vec() });
            rest = &rest[BATCH_HEADER_BYTES + data_len..];
        }
    }
    frames
}

impl Frame {
    fn to_chunk(&self) -> Bytes {
        match self {
            Self::Other(frame) => frame.clone().into(),
            Self::Batch { contents, ops, proof } => {
                let mut chunk = vec![FRAME_BATCH, ENCODING_STORED];
                for len in [contents.len() + ops.len(), contents.len(), ops.len()] {
                    chunk.extend((len as u32).to_be_bytes());
                }
                [&chunk, proof, contents, ops].map(Vec::as_slice).concat().into()
            }
        }
    }
}

/// What came out, batch by batch, and how it ended.
fn decoded(frames: &[Frame]) -> (Vec<Bytes>, Result<(), DecodeError>) {
    let mut decoder = StreamDecoder::new(0).unwrap();
    let mut made = Vec::new();
    for frame in frames {
        decoder.handle_chunk(frame.to_chunk());
        loop {
            match decoder.poll_decoded() {
                Ok(Some(Decoded::Bytes(bytes))) => made.push(bytes),
                Ok(Some(Decoded::End(_))) => return (made, Ok(())),
                Ok(Some(other @ (Decoded::Disks(_) | Decoded::Wanted(_)))) => panic!("{other:?}"),
                Ok(None) => break,
                Err(error) => return (made, Err(error)),
            }
        }
    }
    panic!("no end came")
}

/// The pages whose records begin in this range of a stream, as the parser finds them.
fn told(stream: &[u8], range: Range<u64>) -> String {
    let mut parser = StreamParser::new();
    parser.handle_bytes(stream);
    let (mut at, mut names, mut blocks) = (0, BTreeMap::new(), Vec::<(BlockIndex, u64, u64)>::new());
    while let Some(item) = parser.poll_item() {
        let begins = at;
        at += item.bytes().len() as u64;
        let head = match item {
            Item::Page { head, .. } | Item::ZeroPage { head, .. } => head,
            Item::Framing(_) | Item::DeviceState(_) | Item::Opaque(_) => continue,
        };
        if let Some(name) = head.name {
            names.insert(head.block, String::from_utf8(name.to_vec()).unwrap());
        }
        let (start, end) = (head.offset_bytes, head.offset_bytes + PAGE_BYTES as u64);
        if !range.contains(&begins) {
            continue;
        }
        match blocks.iter_mut().find(|(block, ..)| *block == head.block) {
            Some((_, lowest, highest)) => (*lowest, *highest) = (start.min(*lowest), end.max(*highest)),
            None => blocks.push((head.block, start, end)),
        }
    }
    let said = blocks.iter().map(|(block, start, end)| format!("{}, {start:#x} to {end:#x}", names[block]));
    let said: Vec<String> = said.collect();
    if said.is_empty() { "no page of memory".to_owned() } else { said.join("; ") }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_byte_that_changed_is_refused_with_its_batch_and_the_pages_are_named(
        sample in any_sample(),
        batch in 0usize..40_000,
        which in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        flip in 1u8..,
    ) {
        let config = EncoderConfig { batch, ..EncoderConfig::for_chunks_of(EncoderConfig::MIN_CHUNK) };
        let mut frames = frames(&encode(config, &[(&sample.bytes, false)]).0);
        let (made, whole) = decoded(&frames);
        prop_assert!(whole.is_ok() && made.concat() == sample.bytes);
        let which = which.index(made.len());
        let Frame::Batch { contents, .. } = &mut frames[which] else { panic!("the end is the last") };
        prop_assume!(!contents.is_empty());
        let at = at.index(contents.len());
        contents[at] ^= flip;
        let (proven, refused) = decoded(&frames);
        prop_assert!(proven == made[..which], "what came before came out, and no more");
        let Err(DecodeError::Damaged { start, end, pages, .. }) = refused else { panic!("{refused:?}") };
        let before: usize = made[..which].iter().map(Bytes::len).sum();
        prop_assert_eq!((start.0, end.0), (before as u64, (before + made[which].len()) as u64));
        prop_assert_eq!(pages.to_string(), told(&sample.bytes, start.0..end.0));
    }

    #[test]
    fn a_batch_that_is_lost_shows_in_the_one_behind_it(
        sample in any_sample(), which in any::<prop::sample::Index>(), doubled: bool,
    ) {
        let config = EncoderConfig { batch: 0, ..EncoderConfig::for_chunks_of(EncoderConfig::MIN_CHUNK) };
        let mut frames = frames(&encode(config, &[(&sample.bytes, false)]).0);
        let (made, _) = decoded(&frames);
        prop_assume!(made.len() > 1);
        let which = which.index(made.len() - 1);
        if doubled {
            frames[which + 1] = Frame::Other(frames[which].to_chunk().to_vec());
        } else {
            frames.remove(which);
        }
        let right = which + usize::from(doubled);
        let (proven, refused) = decoded(&frames);
        prop_assert!(proven == made[..right]);
        let begins: usize = made[..right].iter().map(Bytes::len).sum();
        let is_named = matches!(refused, Err(DecodeError::Damaged { start, .. }) if start.0 == begins as u64);
        prop_assert!(is_named, "{refused:?}");
    }
}

#[test]
fn a_page_that_is_remembered_otherwise_at_the_destination_is_named_where_it_is_used_next() {
    let page = |page: u64, seed: u32| Record { block: 0, page, seed: Some(seed), spelled: false };
    let first: Vec<Record> = (0..16).map(|number| page(number, number as u32 * 2 + 1)).collect();
    let begin = sample(PLAIN, std::slice::from_ref(&first), &[]);
    let split = begin.bytes.len() - begin.device_state.len();
    for (again, named) in [
        (page(3, 7), "pc.ram, 0x3000 to 0x4000"),
        (page(7, 15 | NEARLY), "pc.ram, 0x7000 to 0x8000"),
        (page(40, 11), "pc.ram, 0x28000 to 0x29000"),
    ] {
        let bytes = sample(PLAIN, &[first.clone(), vec![again], vec![]], &[]).bytes;
        let config = EncoderConfig { shadow_pages: ALLOWED, ..EncoderConfig::for_chunks_of(1 << 20) };
        let mut encoder = StreamEncoder::new(config).unwrap();
        let mut decoder = StreamDecoder::new(ALLOWED).unwrap();
        let mut travel = |part: &[u8], decoder: &mut StreamDecoder| {
            encoder.handle_bytes(part);
            encoder.handle_flush();
            while let Some(chunk) = encoder.poll_chunk() {
                decoder.handle_chunk(chunk);
                while decoder.poll_decoded()?.is_some() {}
            }
            Ok::<_, DecodeError>(())
        };
        travel(&bytes[..split], &mut decoder).unwrap();
        // Page 40 is told by page 5, which is the same.
        [3, 5, 7].into_iter().for_each(|page| decoder.misremember(page, &contents(99)));
        let refused = travel(&bytes[split..], &mut decoder);
        let Err(DecodeError::Damaged { start, pages, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!((start, &*pages.to_string()), (ByteCount(split as u64), named));
        assert_eq!(decoder.made(), start);
    }
}

#[test]
fn the_message_is_short_whatever_the_blocks_are_called() {
    let program: Vec<u8> =
        (b'a'..=b'e').flat_map(|name| [&[0x82, 255, name][..], &[0xff; 254], &[0, 1]].concat()).collect();
    let pages = ToldPages::of(&program, None);
    let most = ByteCount(u64::MAX);
    let made = Proof::of(&blake3::Hasher::new());
    let said = DecodeError::Damaged { start: most, end: most, pages, made }.to_string();
    assert!(said.contains("c\\xff\\xff") && !said.contains("d\\xff"), "{said}");
    assert!(said.contains("; and others) are not what the source sent"), "{said}");
    assert!(said.len() < 350 && said.is_ascii(), "{} bytes: {said}", said.len());
}
