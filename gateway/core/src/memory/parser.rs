//! The incremental parser: bytes in, items out, in any split and without losing one.
//!
//! ```text
//!  Header -> Boundary <-> Records <-> Blocks          (START, PART: back to Boundary at EOS)
//!               |             |
//!               |             +- EOS of END -> Tail -> Rest(DeviceState)
//!               +- configuration, commands, footers
//!  any state -- something not understood --> Rest(Opaque)      (never left again)
//! ```
//!
//! It holds at most what the caller put in plus one incomplete piece (at most 64 KiB, a command's
//! longest data), provided that the caller takes all items before it puts in more.

use bytes::{Buf, Bytes, BytesMut};

use super::records::{self, Cursor, Read};
use super::{BlockIndex, Item, OpaqueReason, PAGE_BYTES, PageHead, StreamCounters, StreamPhase};

/// The most RAM blocks a machine may have to be understood; QEMU's memory slots alone allow 256.
const MAX_BLOCKS: usize = 1024;

/// Parses one migration stream. See the module's diagram.
#[derive(Debug)]
pub struct StreamParser {
    buffer: BytesMut,
    state: State,
    blocks: Vec<Block>,
    /// The block that "same block as before" means.
    current: Option<BlockIndex>,
    /// Where QEMU's scan stands: block and offset of the last page.
    scan: Option<(BlockIndex, u64)>,
    ram_section: Option<u32>,
    ended: bool,
    counters: StreamCounters,
}

#[derive(Debug)]
struct Block {
    name: Bytes,
    len_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Header,
    Subsections,
    Boundary,
    Records { last: bool },
    Blocks { last: bool, remaining_bytes: u64 },
    Tail,
    Rest(Rest),
}

#[derive(Debug, Clone, Copy)]
enum Rest {
    DeviceState,
    Opaque(OpaqueReason),
}

impl Default for StreamParser {
    fn default() -> Self {
        Self::new()
    }
}

impl StreamParser {
    /// A parser at the beginning of a stream.
    pub fn new() -> Self {
        Self {
            buffer: BytesMut::new(),
            state: State::Header,
            blocks: Vec::new(),
            current: None,
            scan: None,
            ram_section: None,
            ended: false,
            counters: StreamCounters::default(),
        }
    }

    /// Takes the stream's next bytes. Call [`Self::poll_item`] until it returns `None` before the next.
    pub fn handle_bytes(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The stream has ended: what is left over, an incomplete piece, comes out as it is.
    pub fn handle_end(&mut self) {
        self.ended = true;
    }

    /// The next piece of the stream; `None` until more bytes arrive.
    pub fn poll_item(&mut self) -> Option<Item> {
        loop {
            if self.buffer.is_empty() {
                return None;
            }
            match self.step() {
                Ok(Step::Item(item)) => return Some(self.count(item)),
                Ok(Step::Again) => {}
                Ok(Step::Starved) if self.ended => return Some(self.leftover()),
                Ok(Step::Starved) => return None,
                Err(reason) => self.state = State::Rest(Rest::Opaque(reason)),
            }
        }
    }

    /// How far into the stream the items handed out reach.
    pub fn phase(&self) -> StreamPhase {
        match self.state {
            State::Rest(Rest::DeviceState) => StreamPhase::DeviceState,
            State::Rest(Rest::Opaque(reason)) => StreamPhase::Opaque(reason),
            State::Header
            | State::Subsections
            | State::Boundary
            | State::Records { .. }
            | State::Blocks { .. }
            | State::Tail => StreamPhase::Memory,
        }
    }

    /// What the items handed out so far contained.
    pub fn counters(&self) -> StreamCounters {
        self.counters
    }

    fn step(&mut self) -> Result<Step, OpaqueReason> {
        match self.state {
            State::Header => self.header(),
            State::Subsections => self.subsection(),
            State::Boundary => self.boundary(),
            State::Records { last } => self.record(last),
            State::Blocks { last, remaining_bytes } => self.block(last, remaining_bytes),
            State::Tail => self.tail(),
            State::Rest(Rest::DeviceState) => Ok(Step::Item(Item::DeviceState(self.buffer.split().freeze()))),
            State::Rest(Rest::Opaque(_)) => Ok(Step::Item(Item::Opaque(self.buffer.split().freeze()))),
        }
    }

    fn header(&mut self) -> Result<Step, OpaqueReason> {
        let seen = self.buffer.len().min(records::FILE_HEADER.len());
        if self.buffer[..seen] != records::FILE_HEADER[..seen] {
            return Err(OpaqueReason::Header);
        }
        // The byte after the header tells whether there is a configuration.
        let Some(&next) = self.buffer.get(records::FILE_HEADER.len()) else { return Ok(Step::Starved) };
        if next != records::CONFIGURATION {
            return Ok(self.framing(records::FILE_HEADER.len(), State::Boundary));
        }
        let body = records::configuration_len(&self.buffer[records::FILE_HEADER.len()..])?;
        Ok(self.framing_if(body.map(|len| records::FILE_HEADER.len() + len), State::Subsections))
    }

    fn subsection(&mut self) -> Result<Step, OpaqueReason> {
        if self.buffer[0] != records::SUBSECTION {
            self.state = State::Boundary;
            return Ok(Step::Again);
        }
        let len = records::subsection_len(&self.buffer)?;
        Ok(self.framing_if(len, State::Subsections))
    }

    fn boundary(&mut self) -> Result<Step, OpaqueReason> {
        match self.buffer[0] {
            records::COMMAND => {
                let len = records::command_len(&self.buffer)?;
                Ok(self.framing_if(len, State::Boundary))
            }
            records::SECTION_START if self.ram_section.is_none() => self.ram_start(),
            records::SECTION_PART => self.section_head(State::Records { last: false }),
            records::SECTION_END => self.section_head(State::Records { last: true }),
            records::SECTION_FOOTER => self.footer(State::Boundary),
            other => Err(OpaqueReason::Section(other)),
        }
    }

    fn ram_start(&mut self) -> Result<Step, OpaqueReason> {
        let Some((len, number)) = records::ram_start(&self.buffer)? else { return Ok(Step::Starved) };
        self.ram_section = Some(number);
        Ok(self.framing(len, State::Records { last: false }))
    }

    fn section_head(&mut self, next: State) -> Result<Step, OpaqueReason> {
        match records::section_number(&self.buffer) {
            None => Ok(Step::Starved),
            Some(number) if Some(number) == self.ram_section => Ok(self.framing(5, next)),
            Some(_) => Err(OpaqueReason::ForeignSection),
        }
    }

    fn footer(&mut self, next: State) -> Result<Step, OpaqueReason> {
        match records::section_number(&self.buffer) {
            None => Ok(Step::Starved),
            Some(number) if Some(number) == self.ram_section => Ok(self.framing(5, next)),
            Some(_) => Err(OpaqueReason::Footer),
        }
    }

    /// After the memory's last section: its footer, where the machine type writes footers.
    fn tail(&mut self) -> Result<Step, OpaqueReason> {
        if self.buffer[0] == records::SECTION_FOOTER {
            return self.footer(State::Rest(Rest::DeviceState));
        }
        self.state = State::Rest(Rest::DeviceState);
        Ok(Step::Again)
    }

    fn record(&mut self, last: bool) -> Result<Step, OpaqueReason> {
        let mut cursor = Cursor::new(&self.buffer);
        let Some(word) = cursor.be64() else { return Ok(Step::Starved) };
        let flags = (word & (PAGE_BYTES as u64 - 1)) as u16;
        let addr = word & !(PAGE_BYTES as u64 - 1);
        match flags & !records::FLAG_CONTINUE {
            records::FLAG_PAGE | records::FLAG_ZERO => self.page(flags, addr),
            records::FLAG_EOS if flags == records::FLAG_EOS && addr == 0 => Ok(self.end_of_section(last)),
            records::FLAG_MEM_SIZE if flags == records::FLAG_MEM_SIZE && self.blocks.is_empty() => {
                Ok(self.framing(8, State::Blocks { last, remaining_bytes: addr }))
            }
            _ => Err(OpaqueReason::Record { flags }),
        }
    }

    fn end_of_section(&mut self, last: bool) -> Step {
        self.counters.sections += 1;
        self.framing(8, if last { State::Tail } else { State::Boundary })
    }

    fn block(&mut self, last: bool, remaining_bytes: u64) -> Result<Step, OpaqueReason> {
        if remaining_bytes == 0 {
            self.state = State::Records { last };
            return Ok(Step::Again);
        }
        let mut cursor = Cursor::new(&self.buffer);
        let (Some(name), Some(len_bytes)) = (cursor.name(), cursor.be64()) else { return Ok(Step::Starved) };
        let remaining_bytes = remaining_bytes.checked_sub(len_bytes).ok_or(OpaqueReason::Blocks)?;
        if self.blocks.len() == MAX_BLOCKS {
            return Err(OpaqueReason::Blocks);
        }
        let len = cursor.position();
        self.blocks.push(Block { name: Bytes::copy_from_slice(name), len_bytes });
        Ok(self.framing(len, State::Blocks { last, remaining_bytes }))
    }

    fn page(&mut self, flags: u16, offset_bytes: u64) -> Result<Step, OpaqueReason> {
        let unknown = OpaqueReason::Record { flags };
        let named = flags & records::FLAG_CONTINUE == 0;
        let Some((head_len, block, name)) = self.named_block(named, unknown)? else {
            return Ok(Step::Starved);
        };
        if offset_bytes >= self.blocks[usize::from(block.0)].len_bytes {
            return Err(unknown);
        }
        let zero = flags & records::FLAG_ZERO != 0;
        let len = head_len + if zero { 1 } else { PAGE_BYTES };
        if self.buffer.len() < len {
            return Ok(Step::Starved);
        }
        if zero && self.buffer[head_len] != 0 {
            return Err(unknown);
        }
        self.current = Some(block);
        self.advance_scan(block, offset_bytes);
        let head = PageHead { block, offset_bytes, name };
        let record = self.buffer.split_to(len).freeze();
        Ok(Step::Item(if zero { Item::ZeroPage { head, record } } else { Item::Page { head, record } }))
    }

    /// The length of a record's head, the block it speaks of and the name if it spells one.
    fn named_block(&self, named: bool, unknown: OpaqueReason) -> Read<(usize, BlockIndex, Option<Bytes>)> {
        if !named {
            return self.current.map(|block| Some((8, block, None))).ok_or(unknown);
        }
        let mut cursor = Cursor::new(&self.buffer);
        let (Some(_), Some(name)) = (cursor.be64(), cursor.name()) else { return Ok(None) };
        let index = self.blocks.iter().position(|block| block.name == name).ok_or(unknown)?;
        let name = self.blocks[index].name.clone();
        Ok(Some((cursor.position(), BlockIndex(index as u16), Some(name))))
    }

    fn advance_scan(&mut self, block: BlockIndex, offset_bytes: u64) {
        let here = (block, offset_bytes);
        if self.scan.is_none_or(|before| here <= before) {
            self.counters.rounds += 1;
        }
        self.scan = Some(here);
    }

    fn framing_if(&mut self, len: Option<usize>, next: State) -> Step {
        match len {
            Some(len) => self.framing(len, next),
            None => Step::Starved,
        }
    }

    fn framing(&mut self, len: usize, next: State) -> Step {
        self.state = next;
        Step::Item(Item::Framing(self.buffer.split_to(len).freeze()))
    }

    fn leftover(&mut self) -> Item {
        let rest = self.buffer.copy_to_bytes(self.buffer.len());
        self.count(Item::Opaque(rest))
    }

    fn count(&mut self, item: Item) -> Item {
        self.counters.bytes += item.bytes().len() as u64;
        match &item {
            Item::Page { .. } => self.counters.pages += 1,
            Item::ZeroPage { .. } => self.counters.zero_pages += 1,
            Item::DeviceState(bytes) => self.counters.device_state_bytes += bytes.len() as u64,
            Item::Framing(_) | Item::Opaque(_) => {}
        }
        item
    }
}

enum Step {
    /// A piece was taken from the buffer.
    Item(Item),
    /// The state changed without taking anything.
    Again,
    /// The piece at the front is incomplete.
    Starved,
}

#[cfg(test)]
mod tests;
