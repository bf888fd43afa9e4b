//! A machine's memory as QEMU 7.2 writes it when it migrates, section by section. Which page is written when is the
//! caller's affair. Deliberately not here: devices, of which there is no more than a name, and reading it again.

use longhaul_core::memory::PAGE_BYTES;

/// The machine's blocks of memory: name and length in pages.
pub const BLOCKS: [(&str, u64); 2] = [("pc.ram", 20), ("vga.vram", 4)];
const SECTION_NUMBER: [u8; 4] = [0, 0, 0, 2];

/// A stream, as far as it was written.
pub struct Stream {
    pub bytes: Vec<u8>,
    /// The block of the last page.
    block: Option<usize>,
}

impl Stream {
    /// What comes before the first page.
    pub fn begin() -> Self {
        let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\x0dpc-i440fx-7.2\x01".to_vec();
        bytes.extend(SECTION_NUMBER);
        bytes.extend(b"\x03ram\0\0\0\0\0\0\0\x04");
        let pages: u64 = BLOCKS.iter().map(|(_, pages)| pages).sum();
        bytes.extend(((pages * PAGE_BYTES as u64) | 4).to_be_bytes());
        for (name, pages) in BLOCKS {
            bytes.push(name.len() as u8);
            bytes.extend(name.as_bytes());
            bytes.extend((pages * PAGE_BYTES as u64).to_be_bytes());
        }
        let mut stream = Self { bytes, block: None };
        stream.end_section();
        stream
    }

    /// Pages and what they hold, counted through all blocks.
    pub fn section<'a>(&mut self, last: bool, pages: impl IntoIterator<Item = (usize, &'a [u8])>) {
        self.bytes.push(if last { 3 } else { 2 });
        self.bytes.extend(SECTION_NUMBER);
        for (page, content) in pages {
            self.page(page as u64, content);
        }
        self.end_section();
    }

    /// What comes after the last page.
    pub fn end(&mut self) {
        self.bytes.extend(b"\x04\0\0\0\x05device state");
    }

    fn page(&mut self, page: u64, content: &[u8]) {
        let first = BLOCKS[0].1;
        let (block, page) = if page < first { (0, page) } else { (1, page - first) };
        let is_zero = content.iter().all(|byte| *byte == 0);
        let continued = self.block == Some(block);
        let flags = if is_zero { 2 } else { 8 } | if continued { 0x20 } else { 0 };
        self.bytes.extend(((page * PAGE_BYTES as u64) | flags).to_be_bytes());
        if !continued {
            self.bytes.push(BLOCKS[block].0.len() as u8);
            self.bytes.extend(BLOCKS[block].0.as_bytes());
        }
        self.block = Some(block);
        if is_zero {
            self.bytes.push(0);
        } else {
            self.bytes.extend_from_slice(content);
        }
    }

    fn end_section(&mut self) {
        self.bytes.extend(0x10u64.to_be_bytes());
        self.bytes.push(0x7e);
        self.bytes.extend(SECTION_NUMBER);
    }
}
