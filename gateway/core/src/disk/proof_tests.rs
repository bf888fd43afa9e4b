//! A chunk that is not what the source sent is refused before anything of it is applied, and the range is named; whatever it
//! is that differs, and wherever it is.

use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;

use super::pack::ChunkPacker;
use super::record::{Record, RunningDigest};
use super::*;
use crate::proof::Proof;

const SIZE: u64 = 1 << 20;

/// What becomes of a chunk's records between the source and the destination.
#[derive(Debug, Clone, Copy)]
enum Tamper {
    /// One byte of what the record carries.
    Content,
    Place,
    Length,
    Kind,
    Lost,
    Doubled,
    /// With the one behind it.
    Swapped,
}

fn any_tamper() -> impl Strategy<Value = Tamper> {
    prop_oneof![
        4 => Just(Tamper::Content),
        1 => Just(Tamper::Place),
        1 => Just(Tamper::Length),
        1 => Just(Tamper::Kind),
        1 => Just(Tamper::Lost),
        1 => Just(Tamper::Doubled),
        1 => Just(Tamper::Swapped),
    ]
}

/// Records within the disk.
fn any_record() -> impl Strategy<Value = Record> {
    let place = (0..SIZE - 8192, 1..8192u64);
    prop_oneof![
        4 => (place.clone(), any::<u8>()).prop_map(|((offset, len), byte)| {
            Record::Write { offset, data: vec![byte; len as usize].into() }
        }),
        1 => place.clone().prop_map(|(offset, len)| Record::Zero { offset, len }),
        1 => (place, any::<[u8; 32]>())
            .prop_map(|((offset, _), hash)| Record::Same { offset: offset & !4095, len: 4096, hash }),
        1 => Just(Record::Flush),
    ]
}

/// Another record in the place of this one.
fn other(record: &Record, tamper: Tamper, flip: u8) -> Record {
    match (record.clone(), tamper) {
        (Record::Write { offset, data }, Tamper::Content) => {
            let mut data = data.to_vec();
            let at = usize::from(flip) * 31 % data.len();
            data[at] ^= flip;
            Record::Write { offset, data: data.into() }
        }
        (Record::Same { offset, len, mut hash }, Tamper::Content) => {
            hash[usize::from(flip) % 32] ^= flip;
            Record::Same { offset, len, hash }
        }
        (Record::Write { offset, data }, Tamper::Length) => {
            Record::Write { offset, data: [&data[..], &[0]].concat().into() }
        }
        (Record::Same { offset, len, hash }, Tamper::Length) => Record::Same { offset, len: len ^ 1, hash },
        (Record::Write { data, .. }, Tamper::Place) => Record::Write { offset: u64::MAX, data },
        (Record::Same { offset, len, hash }, Tamper::Place) => Record::Same { offset: offset ^ 1, len, hash },
        (Record::Zero { offset, len }, Tamper::Place) => Record::Zero { offset: offset ^ (1 << 63), len },
        (Record::Zero { offset, len }, Tamper::Length) => Record::Zero { offset, len: len ^ 1 },
        (Record::Flush, _) => Record::Zero { offset: 0, len: 1 },
        (_, _) => Record::Flush,
    }
}

/// The chunk's records as they arrive, or `None` if they are the same.
fn tampered(records: &[Record], tamper: Tamper, at: usize, flip: u8) -> Option<Vec<Record>> {
    let mut arrived = records.to_vec();
    match tamper {
        Tamper::Lost => drop(arrived.remove(at)),
        Tamper::Doubled => arrived.insert(at, records[at].clone()),
        Tamper::Swapped => {
            let last = arrived.len() - 1;
            arrived.swap(at, (at + 1).min(last));
        }
        Tamper::Content | Tamper::Place | Tamper::Length | Tamper::Kind => {
            arrived[at] = other(&records[at], tamper, flip);
        }
    }
    (arrived != records).then_some(arrived)
}

/// A chunk of these records, with this proof.
fn chunk(first: u64, records: &[Record], proof: Proof) -> Bytes {
    let mut packer = ChunkPacker::stored(1 << 20);
    records.iter().for_each(|record| packer.push(record));
    packer.finish(first, proof)
}

/// Does what the target asks for at once; what is said to be there already, is. Says how much is applied then.
fn applied(target: &mut MirrorTarget, first: u64, records: &[Record]) -> u64 {
    while let Some(step) = target.poll_step(Duration::ZERO) {
        match step {
            Step::Write { number, .. } | Step::Zero { number, .. } => target.handle_applied(number),
            Step::Hash { number, .. } => {
                let Record::Same { hash, .. } = records[(number - first) as usize] else {
                    panic!("{number}")
                };
                target.handle_hashed(number, hash).expect("it is what was said");
            }
            Step::Flush => target.handle_flushed(),
            Step::Fetch { .. } | Step::Proven(_) => panic!("{step:?}"),
        }
    }
    target.applied_records()
}

fn ends(records: &[Record]) -> Option<(u64, u64)> {
    let starts = records.iter().filter_map(Record::range).map(|(start, _)| start).min();
    let ends = records.iter().filter_map(Record::range).map(|(_, end)| end).max();
    starts.zip(ends)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_is_not_what_was_sent_is_refused_with_its_range_and_nothing_of_it_is_applied(
        chunks in prop::collection::vec(prop::collection::vec(any_record(), 1..12), 1..8),
        which in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        tamper in any_tamper(),
        flip in 1u8..,
    ) {
        let mut target = MirrorTarget::new(SIZE, TargetConfig::default());
        let (mut digest, which) = (RunningDigest::default(), which.index(chunks.len()));
        for (index, records) in chunks.iter().enumerate() {
            let first = digest.records() + 1;
            records.iter().for_each(|record| digest.add(record));
            let arrived = tampered(records, tamper, at.index(records.len()), flip);
            let Some(arrived) = arrived.filter(|_| index == which) else {
                prop_assert_eq!(target.handle_chunk(chunk(first, records, digest.proof())), Ok(()));
                prop_assert_eq!(applied(&mut target, first, records), digest.records());
                continue;
            };
            let last = first + arrived.len() as u64 - 1;
            let refused = target.handle_chunk(chunk(first, &arrived, digest.proof()));
            prop_assert_eq!(refused, Err(TargetError::Damaged { first, last, range: ends(&arrived) }));
            prop_assert_eq!(target.applied_records(), first - 1);
            let step = target.poll_step(Duration::from_secs(60));
            prop_assert!(matches!(step, None | Some(Step::Flush)), "{step:?}");
            break;
        }
    }

    /// The proof is of the records' order and of all before them, too.
    #[test]
    fn chunks_that_change_places_are_refused_even_if_their_numbers_do_not(
        one in any_record(), other in any_record(),
    ) {
        prop_assume!(one != other);
        let mut digest = RunningDigest::default();
        let proofs = [&one, &other].map(|record| {
            digest.add(record);
            digest.proof()
        });
        let mut target = MirrorTarget::new(SIZE, TargetConfig::default());
        let refused = target.handle_chunk(chunk(1, std::slice::from_ref(&other), proofs[0]));
        let is_damaged = matches!(refused, Err(TargetError::Damaged { first: 1, last: 1, .. }));
        prop_assert!(is_damaged, "{refused:?}");
        let mut target = MirrorTarget::new(SIZE, TargetConfig::default());
        prop_assert_eq!(target.handle_chunk(chunk(1, std::slice::from_ref(&one), proofs[0])), Ok(()));
        let refused = target.handle_chunk(chunk(2, std::slice::from_ref(&one), proofs[1]));
        let is_damaged = matches!(refused, Err(TargetError::Damaged { first: 2, last: 2, .. }));
        prop_assert!(is_damaged, "{refused:?}");
    }
}

#[test]
fn the_message_names_the_records_and_the_range() {
    let said = |range| TargetError::Damaged { first: 17, last: 42, range }.to_string();
    let text = said(Some((65_536, 1_048_576)));
    assert!(
        text.starts_with("Disk records 17 to 42, of the disk's bytes 65536 to 1048576, are not"),
        "{text}"
    );
    assert!(said(None).starts_with("Disk records 17 to 42 are not"), "{}", said(None));
    assert!(said(Some((u64::MAX, u64::MAX))).len() < 300);
}
