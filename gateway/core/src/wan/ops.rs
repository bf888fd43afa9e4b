//! The program of a batch: which records its contents become again.
//!
//! A run is a row of adjacent pages of the same kind; only its first record may spell out the name of
//! its block. Positions are relative to the page after the previous run, from zero in each batch.

use bytes::{BufMut, BytesMut};

use super::places::Place;
use super::shadow::{Blocks, PageKey, Shadow, Slot};
use super::{MAX_KNOWN_PAGES, MAX_RECORDS, decode::DecodeError};
use crate::memory::PAGE_BYTES;

const OP_VERBATIM: u8 = 0;
const OP_PAGES: u8 = 1;
const OP_ZEROS: u8 = 2;
const OP_SAME: u8 = 3;
const OP_DELTAS: u8 = 4;
const OP_COPIES: u8 = 5;
const OP_ON_DISK: u8 = 6;
const OP_NAMED: u8 = 0x80;
const FLAG_ZERO: u64 = 0x002;
const FLAG_PAGE: u64 = 0x008;
const FLAG_CONTINUE: u64 = 0x020;

/// The most bytes one record can add to a program: tag, name, two integers.
pub(super) const MAX_OP_BYTES: usize = 1 + 1 + 255 + 10 + 10;

/// Writes a program, joining what can be joined.
#[derive(Debug, Default)]
pub(super) struct OpsWriter {
    ops: Vec<u8>,
    open: Option<Run>,
    expected_page: u64,
}

#[derive(Debug)]
struct Run {
    op: u8,
    name: Option<bytes::Bytes>,
    first_page: u64,
    count: u64,
}

/// What kind of memory record a run is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RecordKind {
    /// Its contents follow.
    Page,
    /// It holds zeros.
    Zero,
    /// It is what it was.
    Same,
    /// What it is XOR what it was follows.
    Delta,
    /// The place in the shadow follows of a page that holds the same.
    Copy,
    /// The place on a disk follows that holds the same.
    OnDisk,
}

/// Bytes by which a copy names its place.
pub(super) const COPY_BYTES: usize = 4;
/// Bytes by which a page names its place on a disk.
pub(super) const PLACE_BYTES: usize = 5;

impl Place {
    pub(super) fn to_bytes(self) -> [u8; PLACE_BYTES] {
        let mut bytes = [self.disk; PLACE_BYTES];
        bytes[1..].copy_from_slice(&self.part.to_be_bytes());
        bytes
    }

    fn take(contents: &mut &[u8]) -> Result<Self, DecodeError> {
        let disk = take(contents, 1)?[0];
        let part = take(contents, PLACE_BYTES - 1)?.try_into().map_err(|_| DecodeError::Program)?;
        Ok(Self { disk, part: u32::from_be_bytes(part) })
    }
}

impl RecordKind {
    /// How much of a batch's contents one record of this kind takes.
    fn contents_bytes(self) -> usize {
        match self {
            Self::Page | Self::Delta => PAGE_BYTES,
            Self::Zero | Self::Same => 0,
            Self::Copy => COPY_BYTES,
            Self::OnDisk => PLACE_BYTES,
        }
    }

    /// Whether a page comes of it that is not in the batch.
    fn is_known(self) -> bool {
        match self {
            Self::Same | Self::Copy | Self::OnDisk => true,
            Self::Page | Self::Zero | Self::Delta => false,
        }
    }
}

impl OpsWriter {
    /// Length so far, without the run that is still open.
    pub(super) fn len(&self) -> usize {
        self.ops.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ops.is_empty() && self.open.is_none()
    }

    pub(super) fn verbatim(&mut self, len: usize) {
        if let Some(run) = self.open.as_mut().filter(|run| run.op == OP_VERBATIM) {
            run.count += len as u64;
            return;
        }
        self.close();
        self.open = Some(Run { op: OP_VERBATIM, name: None, first_page: 0, count: len as u64 });
    }

    pub(super) fn record(&mut self, kind: RecordKind, offset_bytes: u64, name: Option<&bytes::Bytes>) {
        let op = match kind {
            RecordKind::Page => OP_PAGES,
            RecordKind::Zero => OP_ZEROS,
            RecordKind::Same => OP_SAME,
            RecordKind::Delta => OP_DELTAS,
            RecordKind::Copy => OP_COPIES,
            RecordKind::OnDisk => OP_ON_DISK,
        };
        let page = offset_bytes / PAGE_BYTES as u64;
        let joined = self
            .open
            .as_mut()
            .filter(|run| name.is_none() && run.op == op && run.first_page.wrapping_add(run.count) == page);
        if let Some(run) = joined {
            run.count += 1;
            return;
        }
        self.close();
        self.open = Some(Run { op, name: name.cloned(), first_page: page, count: 1 });
    }

    /// Appends the finished program to `out` and starts over; returns its length.
    pub(super) fn finish_into(&mut self, out: &mut Vec<u8>) -> usize {
        self.close();
        let len = self.ops.len();
        out.append(&mut self.ops);
        self.expected_page = 0;
        len
    }

    fn close(&mut self) {
        let Some(run) = self.open.take() else { return };
        let named = if run.name.is_some() { OP_NAMED } else { 0 };
        self.ops.push(run.op | named);
        if let Some(name) = &run.name {
            self.ops.push(name.len() as u8);
            self.ops.extend_from_slice(name);
        }
        if run.op != OP_VERBATIM {
            put_varint(&mut self.ops, zigzag(run.first_page.wrapping_sub(self.expected_page) as i64));
            self.expected_page = run.first_page.wrapping_add(run.count);
        }
        put_varint(&mut self.ops, run.count);
    }
}

/// One step of a batch's program.
pub(super) enum Op<'a> {
    Verbatim(usize),
    Records(RecordKind, PageRun<'a>),
}

/// Reads a program, and holds it to what a batch may stand for.
pub(super) struct OpsReader<'a> {
    ops: &'a [u8],
    expected_page: u64,
    records: u64,
    known: u64,
}

impl<'a> OpsReader<'a> {
    pub(super) fn new(ops: &'a [u8]) -> Self {
        Self { ops, expected_page: 0, records: 0, known: 0 }
    }

    pub(super) fn next(&mut self) -> Result<Option<Op<'a>>, DecodeError> {
        let Some((&tag, rest)) = self.ops.split_first() else { return Ok(None) };
        self.ops = rest;
        let name = if tag & OP_NAMED != 0 { Some(take_name(&mut self.ops)?) } else { None };
        if tag == OP_VERBATIM {
            let len = take_varint(&mut self.ops)?;
            return usize::try_from(len).map(|len| Some(Op::Verbatim(len))).map_err(|_| DecodeError::Program);
        }
        let delta = unzigzag(take_varint(&mut self.ops)?) as u64;
        let first_page = self.expected_page.wrapping_add(delta);
        let run = PageRun { name, first_page, count: take_varint(&mut self.ops)? };
        let kind = kind_of(tag & !OP_NAMED)?;
        self.records = self.records.saturating_add(run.count);
        if kind.is_known() {
            self.known = self.known.saturating_add(run.count);
        }
        if self.records > MAX_RECORDS || self.known > MAX_KNOWN_PAGES {
            return Err(DecodeError::TooManyRecords);
        }
        self.expected_page = run.first_page.wrapping_add(run.count);
        Ok(Some(Op::Records(kind, run)))
    }
}

/// The places that a batch names, in their order.
pub(super) fn places(ops: &[u8], mut contents: &[u8]) -> Result<Vec<Place>, DecodeError> {
    let (mut ops, mut places) = (OpsReader::new(ops), Vec::new());
    while let Some(op) = ops.next()? {
        match op {
            Op::Verbatim(len) => {
                take(&mut contents, len)?;
            }
            Op::Records(RecordKind::OnDisk, run) => {
                for _ in 0..run.count {
                    places.push(Place::take(&mut contents)?);
                }
            }
            Op::Records(kind, run) => {
                // At most 65,536 records were allowed.
                take(&mut contents, kind.contents_bytes() * run.count as usize)?;
            }
        }
    }
    Ok(places)
}

/// Makes the stream's bytes again from a batch's contents and its program, and remembers its pages.
pub(super) fn replay(
    ops: &[u8],
    sources: Sources<'_>,
    blocks: &mut Blocks,
    shadow: &mut Shadow,
) -> Result<BytesMut, DecodeError> {
    let mut sources = sources;
    let len = sources.contents.len();
    let mut out = BytesMut::with_capacity(len + len / PAGE_BYTES * 8 + 64);
    let mut ops = OpsReader::new(ops);
    while let Some(op) = ops.next()? {
        match op {
            Op::Verbatim(len) => out.extend_from_slice(take(&mut sources.contents, len)?),
            Op::Records(kind, run) => {
                blocks.enter(run.name);
                run.replay(kind, &mut sources, &mut out, blocks, shadow)?;
            }
        }
    }
    if sources.contents.is_empty() { Ok(out) } else { Err(DecodeError::Program) }
}

/// What a batch's pages are made of: its contents, and what was found at the places that it names.
pub(super) struct Sources<'a> {
    pub(super) contents: &'a [u8],
    pub(super) found: &'a [bytes::Bytes],
}

fn kind_of(op: u8) -> Result<RecordKind, DecodeError> {
    match op {
        OP_PAGES => Ok(RecordKind::Page),
        OP_ZEROS => Ok(RecordKind::Zero),
        OP_SAME => Ok(RecordKind::Same),
        OP_DELTAS => Ok(RecordKind::Delta),
        OP_COPIES => Ok(RecordKind::Copy),
        OP_ON_DISK => Ok(RecordKind::OnDisk),
        _ => Err(DecodeError::Program),
    }
}

/// Adjacent pages of one kind.
pub(super) struct PageRun<'a> {
    /// The block's, if it is spelled out.
    pub(super) name: Option<&'a [u8]>,
    pub(super) first_page: u64,
    pub(super) count: u64,
}

impl PageRun<'_> {
    fn replay(
        mut self,
        kind: RecordKind,
        sources: &mut Sources<'_>,
        out: &mut BytesMut,
        blocks: &Blocks,
        shadow: &mut Shadow,
    ) -> Result<(), DecodeError> {
        let flag = if kind == RecordKind::Zero { FLAG_ZERO } else { FLAG_PAGE };
        for page in self.first_page..self.first_page.saturating_add(self.count) {
            let address = page.checked_mul(PAGE_BYTES as u64).ok_or(DecodeError::Program)?;
            match self.name.take() {
                Some(name) => {
                    out.put_u64(address | flag);
                    out.put_u8(name.len() as u8);
                    out.extend_from_slice(name);
                }
                None => out.put_u64(address | flag | FLAG_CONTINUE),
            }
            make_page(kind, blocks.key(page), sources, out, shadow)?;
        }
        Ok(())
    }
}

/// Appends what a record holds after its head, and remembers it.
fn make_page(
    kind: RecordKind,
    key: Option<PageKey>,
    Sources { contents, found }: &mut Sources<'_>,
    out: &mut BytesMut,
    shadow: &mut Shadow,
) -> Result<(), DecodeError> {
    let begin = out.len();
    let remembered = || shadow.page(shadow.slot(key?)?);
    match kind {
        RecordKind::Zero => {
            out.put_u8(0);
            if let Some(key) = key {
                shadow.clear(key);
            }
            return Ok(());
        }
        RecordKind::Page => out.extend_from_slice(take(contents, PAGE_BYTES)?),
        RecordKind::Same => {
            out.extend_from_slice(remembered().ok_or(DecodeError::NotRemembered)?);
            return Ok(());
        }
        RecordKind::Delta => {
            out.extend_from_slice(remembered().ok_or(DecodeError::NotRemembered)?);
            let difference = take(contents, PAGE_BYTES)?;
            out[begin..].iter_mut().zip(difference).for_each(|(byte, difference)| *byte ^= difference);
        }
        RecordKind::Copy => {
            let place = take(contents, COPY_BYTES)?.try_into().map_err(|_| DecodeError::Program)?;
            let slot = Slot(u32::from_be_bytes(place));
            out.extend_from_slice(shadow.page(slot).ok_or(DecodeError::NotRemembered)?);
        }
        RecordKind::OnDisk => {
            Place::take(contents)?;
            let (page, rest) = found.split_first().ok_or(DecodeError::NotFound)?;
            *found = rest;
            out.extend_from_slice(page);
        }
    }
    if let Some(key) = key {
        shadow.put(key, &out[begin..]);
    }
    Ok(())
}

fn take<'a>(from: &mut &'a [u8], len: usize) -> Result<&'a [u8], DecodeError> {
    let (taken, rest) = from.split_at_checked(len).ok_or(DecodeError::Program)?;
    *from = rest;
    Ok(taken)
}

fn take_name<'a>(ops: &mut &'a [u8]) -> Result<&'a [u8], DecodeError> {
    let len = take(ops, 1)?[0];
    take(ops, usize::from(len))
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take_varint(ops: &mut &[u8]) -> Result<u64, DecodeError> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(ops, 1)?[0];
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return Err(DecodeError::Program);
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(DecodeError::Program)
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn replay_afresh(ops: &[u8], contents: &[u8]) -> Result<BytesMut, DecodeError> {
        replay(ops, Sources { contents, found: &[] }, &mut Blocks::default(), &mut Shadow::new(16))
    }

    proptest! {
        #[test]
        fn integers_survive_their_encoding(value: u64, signed: i64) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            put_varint(&mut out, zigzag(signed));
            let mut rest = out.as_slice();
            prop_assert_eq!(take_varint(&mut rest).unwrap(), value);
            prop_assert_eq!(unzigzag(take_varint(&mut rest).unwrap()), signed);
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn any_program_is_replayed_or_refused_within_bounds(ops: Vec<u8>, contents: Vec<u8>) {
            if let Ok(out) = replay_afresh(&ops, &contents) {
                let known = MAX_KNOWN_PAGES as usize * PAGE_BYTES;
                prop_assert!(out.len() <= contents.len() + ops.len() + 9 * MAX_RECORDS as usize + known);
            }
        }
    }

    #[test]
    fn a_run_of_zero_pages_takes_a_handful_of_bytes() {
        let mut writer = OpsWriter::default();
        for page in 0..30_000 {
            writer.record(RecordKind::Zero, page * PAGE_BYTES as u64, None);
        }
        let mut ops = Vec::new();
        assert!(writer.finish_into(&mut ops) <= 5, "{} bytes", ops.len());
        assert_eq!(replay_afresh(&ops, &[]).unwrap().len(), 30_000 * 9);
    }

    #[test]
    fn a_program_that_would_expand_without_bound_is_refused() {
        let mut ops = vec![OP_ZEROS];
        put_varint(&mut ops, 0);
        put_varint(&mut ops, MAX_RECORDS + 1);
        assert!(matches!(replay_afresh(&ops, &[]), Err(DecodeError::TooManyRecords)));
        let mut ops = vec![OP_ZEROS];
        put_varint(&mut ops, 0);
        put_varint(&mut ops, MAX_RECORDS);
        assert_eq!(replay_afresh(&ops, &[]).unwrap().len(), 9 * MAX_RECORDS as usize);
    }

    #[test]
    fn known_pages_are_bounded_in_one_batch_and_must_be_known() {
        let program = |count: u64| {
            let mut ops = vec![OP_PAGES | OP_NAMED, 1, b'r'];
            put_varint(&mut ops, 0);
            put_varint(&mut ops, 1);
            for _ in 0..count {
                ops.push(OP_SAME);
                put_varint(&mut ops, zigzag(-1));
                put_varint(&mut ops, 1);
            }
            ops
        };
        let page = [5; PAGE_BYTES];
        let most = replay_afresh(&program(MAX_KNOWN_PAGES), &page).unwrap();
        assert_eq!(most.len() as u64, 2 + 8 + 4096 + MAX_KNOWN_PAGES * (8 + 4096));
        let refused = replay_afresh(&program(MAX_KNOWN_PAGES + 1), &page);
        assert!(matches!(refused, Err(DecodeError::TooManyRecords)));
        assert!(matches!(replay_afresh(&[OP_SAME, 0, 1], &[]), Err(DecodeError::NotRemembered)));
        assert!(matches!(replay_afresh(&[OP_COPIES, 0, 1], &[0; 4]), Err(DecodeError::NotRemembered)));
        assert!(matches!(replay_afresh(&[OP_DELTAS, 0, 1], &page), Err(DecodeError::NotRemembered)));
    }
}
