//! Which pages of the machine's memory a batch tells, in words for the operator: said of one that is not what was sent.
//!
//! Names come from the peer and are cut, and few blocks are named, so that the text is short whatever a batch holds.

use std::fmt;

use super::ops::{Op, OpsReader};
use crate::memory::PAGE_BYTES;

/// Blocks that are named; of more it is said that there are.
const MAX_NAMED: usize = 3;
/// Characters of a block's name; QEMU's are shorter.
const MAX_NAME: usize = 32;

/// Pages of the machine's memory, by where they lie.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ToldPages {
    blocks: Vec<ToldBlock>,
    more: bool,
}

/// Pages of one block: from the lowest to the end of the highest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ToldBlock {
    name: String,
    start_bytes: u64,
    end_bytes: u64,
}

impl ToldPages {
    /// What the program `ops` tells, where its first record is of `block` if it names none.
    pub(super) fn of(ops: &[u8], block: Option<&[u8]>) -> Self {
        let (mut ops, mut name, mut told) = (OpsReader::new(ops), shown(block), Self::default());
        while let Ok(Some(op)) = ops.next() {
            match op {
                Op::Verbatim(_) => {}
                Op::Records(_, run) => {
                    name = if run.name.is_some() { shown(run.name) } else { name };
                    told.add(&name, run.first_page, run.first_page.saturating_add(run.count));
                }
            }
        }
        told
    }

    fn add(&mut self, name: &str, first_page: u64, end_page: u64) {
        let bytes = |page: u64| page.saturating_mul(PAGE_BYTES as u64);
        let (start_bytes, end_bytes) = (bytes(first_page), bytes(end_page));
        if let Some(block) = self.blocks.iter_mut().find(|block| block.name == name) {
            block.start_bytes = block.start_bytes.min(start_bytes);
            block.end_bytes = block.end_bytes.max(end_bytes);
            return;
        }
        self.more |= self.blocks.len() == MAX_NAMED;
        if self.blocks.len() < MAX_NAMED {
            self.blocks.push(ToldBlock { name: name.to_owned(), start_bytes, end_bytes });
        }
    }
}

/// Something that can be shown, whatever a peer calls it.
fn shown(name: Option<&[u8]>) -> String {
    match name {
        Some(name) => name.escape_ascii().take(MAX_NAME).map(char::from).collect(),
        None => "a block without a name".to_owned(),
    }
}

impl fmt::Display for ToldPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.blocks.is_empty() {
            return f.write_str("no page of memory");
        }
        for (index, ToldBlock { name, start_bytes, end_bytes }) in self.blocks.iter().enumerate() {
            let before = if index > 0 { "; " } else { "" };
            write!(f, "{before}{name}, {start_bytes:#x} to {end_bytes:#x}")?;
        }
        f.write_str(if self.more { "; and others" } else { "" })
    }
}
