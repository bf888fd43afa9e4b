//! The machine that is moved: what its memory and its disk hold, page by page. There are few contents, so that equal ones,
//! nearly equal ones, empty ones and such as stand on the disk are frequent. It knows nothing of its moves.

use std::sync::LazyLock;

use longhaul_core::memory::PAGE_BYTES;

use crate::schedule::Random;
use crate::stream::BLOCKS;

/// Pages of its memory.
pub const PAGES: usize = (BLOCKS[0].1 + BLOCKS[1].1) as usize;
/// Parts of its disk, each as long as a page: a little more than two of the mirror's blocks.
pub const PARTS: usize = 34;
/// The length of its disk.
pub const DISK_BYTES: u64 = (PARTS * PAGE_BYTES) as u64;
/// Different contents, beside zeros and what is nearly one of them.
const SEEDS: u16 = 20;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page(u16);

const ZEROS: Page = Page(0);

static CONTENTS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| (0..=2 * SEEDS).map(contents).collect());

impl Page {
    fn any(random: &mut Random) -> Self {
        match random.below(8) {
            0 => ZEROS,
            1 => Self::seed(random).nearly(),
            _ => Self::seed(random),
        }
    }

    fn seed(random: &mut Random) -> Self {
        Self(1 + random.below(SEEDS.into()) as u16)
    }

    /// The same but for a few bytes; of zeros nothing is changed.
    fn nearly(self) -> Self {
        match self.0 {
            0 => ZEROS,
            seed if seed > SEEDS => Self(seed - SEEDS),
            seed => Self(seed + SEEDS),
        }
    }

    /// [`PAGE_BYTES`] bytes.
    pub fn bytes(self) -> &'static [u8] {
        &CONTENTS[usize::from(self.0)]
    }
}

/// Even seeds compress, odd ones do not.
fn contents(seed: u16) -> Vec<u8> {
    if seed == 0 {
        return vec![0; PAGE_BYTES];
    }
    if seed > SEEDS {
        let mut page = contents(seed - SEEDS);
        page[100..120].fill(0x5a);
        page[PAGE_BYTES - 1] ^= 1;
        return page;
    }
    let mut state = u32::from(seed).wrapping_mul(0x9e37_79b9) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        if seed.is_multiple_of(2) { (state & 3) as u8 } else { state as u8 }
    };
    (0..PAGE_BYTES).map(next).collect()
}

/// What the machine did.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// It wrote a page of its memory.
    Page(usize),
    /// Parts of its disk, from the first on.
    Written {
        first: usize,
        parts: usize,
    },
    Zeroed {
        first: usize,
        parts: usize,
    },
    /// It finds them empty afterwards.
    Trimmed {
        first: usize,
        parts: usize,
    },
}

pub struct Guest {
    pub memory: Vec<Page>,
    disk: Vec<Page>,
    /// How often it wrote to its memory.
    pub writes: u64,
}

impl Guest {
    pub fn new(random: &mut Random) -> Self {
        let memory = (0..PAGES).map(|_| Page::any(random)).collect();
        let disk = (0..PARTS).map(|_| Page::any(random)).collect();
        Self { memory, disk, writes: 0 }
    }

    /// Does something.
    pub fn changes(&mut self, random: &mut Random) -> Change {
        let first = random.below(PARTS as u64) as usize;
        let parts = (1 + random.below(3) as usize).min(PARTS - first);
        match random.below(10) {
            0 | 1 => {
                self.disk[first..first + parts].fill_with(|| Page::any(random));
                Change::Written { first, parts }
            }
            2 => {
                self.disk[first..first + parts].fill(ZEROS);
                Change::Zeroed { first, parts }
            }
            3 => {
                self.disk[first..first + parts].fill(ZEROS);
                Change::Trimmed { first, parts }
            }
            4 => {
                let read = self.disk[first];
                self.writes_page(random, |_| read)
            }
            5 => self.changes_little(random),
            _ => {
                let new = Page::any(random);
                self.writes_page(random, |_| new)
            }
        }
    }

    /// Writes a few bytes of a page.
    pub fn changes_little(&mut self, random: &mut Random) -> Change {
        self.writes_page(random, Page::nearly)
    }

    fn writes_page(&mut self, random: &mut Random, new: impl Fn(Page) -> Page) -> Change {
        let page = random.below(PAGES as u64) as usize;
        self.memory[page] = new(self.memory[page]);
        self.writes += 1;
        Change::Page(page)
    }

    /// What its disk holds there. Both are multiples of a page.
    pub fn disk_bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        let first = offset as usize / PAGE_BYTES;
        let parts = &self.disk[first..first + len as usize / PAGE_BYTES];
        parts.iter().map(|part| part.bytes()).collect::<Vec<_>>().concat()
    }

    /// All of its disk.
    pub fn image(&self) -> Vec<u8> {
        self.disk_bytes(0, DISK_BYTES)
    }
}
