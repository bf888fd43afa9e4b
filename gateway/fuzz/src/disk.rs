//! The disk mirror's records: chunks of a peer that lies about numbers, lengths, offsets and barriers.
//!
//! No step writes outside the disk, and after an error nothing of the chunk is applied. The proof of each chunk is made right
//! before it is given: an input that was altered would come no further than to its proof. That a wrong one is refused is not
//! tried here.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use longhaul_core::disk::{
    Chunk, ChunkReader, Existing, MAX_BODY, MAX_RECORDS, MirrorSource, MirrorTarget, RunningDigest,
    SourceConfig, Step, TargetConfig,
};

use crate::input::Input;

const SIZE: u64 = 1 << 20;
/// Where a chunk has its proof.
const PROOF: Range<usize> = 18..34;

/// Gives `data` to a destination as chunks, each behind its length in two bytes.
pub fn run(data: &[u8]) {
    run_on(MirrorTarget::new(SIZE, TargetConfig::default()), data);
    run_on(MirrorTarget::new(SIZE, TargetConfig::default()).with_base(), data);
}

fn run_on(mut target: MirrorTarget, data: &[u8]) {
    let mut input = Input(data);
    let mut reader = ChunkReader::new(TargetConfig::default().max_window_log);
    let mut digest = RunningDigest::default();
    while !input.is_empty() {
        let len = usize::from(input.u16());
        let mut chunk = Bytes::copy_from_slice(input.take(len));
        let read = reader.read(chunk.clone());
        if let Ok(read) = &read {
            assert!(read.records.len() <= MAX_RECORDS);
            assert!(read.records.iter().map(|record| record.encoded_len()).sum::<usize>() <= MAX_BODY);
            chunk = sealed(&chunk, read, &mut digest);
        }
        let taken = target.handle_chunk(chunk);
        assert!(read.is_ok() || taken.is_err(), "what is no chunk is refused");
        if taken.is_err() {
            return;
        }
        if !carry_out(&mut target) {
            return;
        }
    }
}

/// The chunk with the right proof.
fn sealed(chunk: &[u8], read: &Chunk, digest: &mut RunningDigest) -> Bytes {
    read.records.iter().for_each(|record| digest.add(record));
    let mut chunk = chunk.to_vec();
    chunk[PROOF].copy_from_slice(&digest.proof().to_bytes());
    chunk.into()
}

/// Does what the target asks for; false when that showed that the disk is not the source's.
fn carry_out(target: &mut MirrorTarget) -> bool {
    while let Some(step) = target.poll_step(Duration::from_secs(1)) {
        match step {
            Step::Write { number, offset, data } => {
                assert!(offset.checked_add(data.len() as u64).is_some_and(|end| end <= SIZE));
                target.handle_applied(number);
            }
            Step::Zero { number, offset, len } => {
                assert!(offset.checked_add(len).is_some_and(|end| end <= SIZE));
                target.handle_applied(number);
            }
            Step::Hash { number, offset, len } => {
                assert!(offset.checked_add(u64::from(len)).is_some_and(|end| end <= SIZE));
                if target.handle_hashed(number, [0; 32]).is_err() {
                    return false;
                }
            }
            Step::Fetch { number, offset, len } => {
                assert!(offset.checked_add(u64::from(len)).is_some_and(|end| end <= SIZE));
                let hash = [0; 32];
                let content = (number % 2 == 0).then(|| (vec![7; len as usize].into(), hash));
                target.handle_fetched(number, content);
            }
            Step::Flush => target.handle_flushed(),
            Step::Proven(barrier) => assert_eq!(target.proven(), Some(barrier)),
        }
    }
    assert!(target.wants_chunk(), "a carried out chunk leaves room for the next");
    true
}

/// A mirror with writes, zeros, a flush and a barrier.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let config = SourceConfig { existing: Existing::Mirrored, ..SourceConfig::default() };
    let mut source = MirrorSource::new(SIZE, config);
    source.handle_write(4096, vec![7; 4096].into()).expect("inside");
    source.handle_write(8192, Bytes::from_static(b"changed")).expect("inside");
    source.handle_zero(65536, 65536).expect("inside");
    source.handle_flush();
    source.handle_finish();
    let mut whole = Vec::new();
    while let Some(chunk) = source.poll_chunk() {
        whole.extend((chunk.len() as u16).to_be_bytes());
        whole.extend(chunk);
    }
    vec![("whole", whole)]
}
