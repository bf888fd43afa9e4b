//! Streams as QEMU writes them, generated for tests.

use proptest::collection::vec;
use proptest::prelude::*;

use super::PAGE_BYTES;

/// The sample machine's blocks: name and length in pages.
const BLOCKS: [(&str, u64); 3] = [("pc.ram", 64), ("/rom@etc/acpi/tables", 8), ("pc.bios", 4)];
const SECTION_NUMBER: [u8; 4] = [0, 0, 0, 2];

/// A generated stream and what it contains.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sample {
    pub bytes: Vec<u8>,
    pub pages: u64,
    pub zero_pages: u64,
    pub sections: u64,
    pub device_state: Vec<u8>,
}

/// One memory record to generate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record {
    pub block: usize,
    pub page: u64,
    /// The contents' seed; `None` for a zero page.
    pub seed: Option<u32>,
    /// Names the block even where it need not.
    pub spelled: bool,
}

/// What a stream begins with and whether its sections have footers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub configuration: bool,
    pub uuid: bool,
    pub command: bool,
    pub footers: bool,
}

/// A shape as QEMU 7.2 writes it for a versioned PC.
pub(crate) const PLAIN: Shape = Shape { configuration: true, uuid: false, command: false, footers: true };

/// Whole streams of every shape that is understood.
pub(crate) fn any_sample() -> impl Strategy<Value = Sample> {
    let shape = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>())
        .prop_map(|(configuration, uuid, command, footers)| Shape { configuration, uuid, command, footers });
    (shape, vec(vec(any_record(), 0..24), 0..5), vec(any::<u8>(), 0..2000))
        .prop_map(|(shape, sections, state)| sample(shape, &sections, &state))
}

fn any_record() -> impl Strategy<Value = Record> {
    let seed = (0u32..8, any::<bool>()).prop_map(|(seed, nearly)| if nearly { seed | NEARLY } else { seed });
    (0..BLOCKS.len(), 0u64..64, proptest::option::of(seed), any::<bool>()).prop_map(
        |(block, page, seed, spelled)| Record { block, page: page % BLOCKS[block].1, seed, spelled },
    )
}

/// The stream of these sections of memory (the last is the end) and this device state.
pub(crate) fn sample(shape: Shape, sections: &[Vec<Record>], device_state: &[u8]) -> Sample {
    let mut sample = Sample { bytes: b"QEVM\0\0\0\x03".to_vec(), ..Sample::default() };
    begin(&mut sample.bytes, shape);
    sample.end_section(shape);
    let mut before = None;
    for (index, records) in sections.iter().enumerate() {
        let last = index + 1 == sections.len();
        sample.bytes.push(if last { 3 } else { 2 });
        sample.bytes.extend(SECTION_NUMBER);
        for record in records {
            sample.record(*record, before == Some(record.block) && !record.spelled);
            before = Some(record.block);
        }
        sample.end_section(shape);
    }
    if !sections.is_empty() {
        sample.device_state = [&[4, 0, 0, 0, 0][..], device_state].concat();
        sample.bytes.extend(&sample.device_state);
    }
    sample
}

fn begin(bytes: &mut Vec<u8>, shape: Shape) {
    if shape.configuration {
        bytes.extend(b"\x07\0\0\0\x0dpc-i440fx-7.2");
        if shape.uuid {
            bytes.extend(b"\x05\x12configuration/uuid\0\0\0\x01");
            bytes.extend([0x7e; 16]);
        }
    }
    if shape.command {
        bytes.extend(b"\x08\0\x02\0\x04\0\0\0\x01");
    }
    bytes.push(1);
    bytes.extend(SECTION_NUMBER);
    bytes.extend(b"\x03ram\0\0\0\0\0\0\0\x04");
    let pages: u64 = BLOCKS.iter().map(|(_, pages)| pages).sum();
    bytes.extend(((pages * PAGE_BYTES as u64) | 4).to_be_bytes());
    for (name, pages) in BLOCKS {
        bytes.push(name.len() as u8);
        bytes.extend(name.as_bytes());
        bytes.extend((pages * PAGE_BYTES as u64).to_be_bytes());
    }
}

impl Sample {
    fn end_section(&mut self, shape: Shape) {
        self.sections += 1;
        self.bytes.extend(0x10u64.to_be_bytes());
        if shape.footers {
            self.bytes.push(0x7e);
            self.bytes.extend(SECTION_NUMBER);
        }
    }

    fn record(&mut self, record: Record, same_block: bool) {
        let kind = if record.seed.is_some() { 8 } else { 2 };
        let continued = if same_block { 0x20 } else { 0 };
        self.bytes.extend(((record.page * PAGE_BYTES as u64) | kind | continued).to_be_bytes());
        if !same_block {
            let (name, _) = BLOCKS[record.block];
            self.bytes.push(name.len() as u8);
            self.bytes.extend(name.as_bytes());
        }
        match record.seed {
            Some(seed) => self.bytes.extend(contents(seed)),
            None => self.bytes.push(0),
        }
        self.pages += u64::from(record.seed.is_some());
        self.zero_pages += u64::from(record.seed.is_none());
    }
}

/// A seed with this bit gives the page without it, but for a few bytes.
pub(crate) const NEARLY: u32 = 1 << 16;

/// A page's contents: even seeds compress, odd ones do not.
pub(crate) fn contents(seed: u32) -> Vec<u8> {
    if seed & NEARLY != 0 {
        let mut page = contents(seed & !NEARLY);
        page[100..120].fill(0x5a);
        page[PAGE_BYTES - 1] ^= 1;
        return page;
    }
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        if seed.is_multiple_of(2) { (state & 3) as u8 } else { state as u8 }
    };
    (0..PAGE_BYTES).map(next).collect()
}
