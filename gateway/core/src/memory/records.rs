//! The stream's numbers and the shapes of its pieces, read from the front of a buffer.
//!
//! Nothing is consumed here: a reader says how long a piece is, or that more bytes are needed.
//! Names follow QEMU (`migration/savevm.h`, `migration/ram.h`).

use super::OpaqueReason;

/// The size of a target page in bytes on every machine type that is understood.
pub const PAGE_BYTES: usize = 4096;

pub(super) const FILE_HEADER: [u8; 8] = [b'Q', b'E', b'V', b'M', 0, 0, 0, 3];
pub(super) const SECTION_START: u8 = 0x01;
pub(super) const SECTION_PART: u8 = 0x02;
pub(super) const SECTION_END: u8 = 0x03;
pub(super) const SUBSECTION: u8 = 0x05;
pub(super) const CONFIGURATION: u8 = 0x07;
pub(super) const COMMAND: u8 = 0x08;
pub(super) const SECTION_FOOTER: u8 = 0x7e;

pub(super) const FLAG_ZERO: u16 = 0x002;
pub(super) const FLAG_MEM_SIZE: u16 = 0x004;
pub(super) const FLAG_PAGE: u16 = 0x008;
pub(super) const FLAG_EOS: u16 = 0x010;
pub(super) const FLAG_CONTINUE: u16 = 0x020;

/// Commands after which the stream reads on as before: open return path, ping, switchover start.
const HARMLESS_COMMANDS: [u16; 3] = [1, 2, 11];
const RAM_VERSION: u32 = 4;
const MAX_MACHINE_NAME_BYTES: usize = 256;

/// The answer of a reader: complete, not yet, or not ours.
pub(super) type Read<T> = Result<Option<T>, OpaqueReason>;

/// Reads big-endian integers and short strings from a slice, without consuming it.
#[derive(Clone, Copy)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(taken)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    pub(super) fn be16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }

    pub(super) fn be32(&mut self) -> Option<u32> {
        self.take(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }

    pub(super) fn be64(&mut self) -> Option<u64> {
        self.take(8).map(|b| u64::from_be_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
    }

    pub(super) fn name(&mut self) -> Option<&'a [u8]> {
        let len = self.u8()?;
        self.take(usize::from(len))
    }
}

/// Length of the configuration section without its subsections.
pub(super) fn configuration_len(bytes: &[u8]) -> Read<usize> {
    let mut cursor = Cursor::new(bytes);
    let (Some(_), Some(len)) = (cursor.u8(), cursor.be32()) else { return Ok(None) };
    if len as usize > MAX_MACHINE_NAME_BYTES {
        return Err(OpaqueReason::Configuration);
    }
    Ok(cursor.take(len as usize).map(|_| cursor.position()))
}

/// Length of one subsection of the configuration. Their lengths are not on the wire, so that only the
/// known ones can be passed.
pub(super) fn subsection_len(bytes: &[u8]) -> Read<usize> {
    let mut cursor = Cursor::new(bytes);
    cursor.u8();
    let Some(name) = cursor.name() else { return Ok(None) };
    let Some(_version) = cursor.be32() else { return Ok(None) };
    let body = match name {
        b"configuration/uuid" => cursor.take(16).map(|_| ()),
        b"configuration/capabilities" => return capabilities_len(cursor),
        b"configuration/target-page-bits" => match cursor.be32() {
            Some(bits) if 1usize.checked_shl(bits) == Some(PAGE_BYTES) => Some(()),
            Some(_) => return Err(OpaqueReason::Configuration),
            None => None,
        },
        _ => return Err(OpaqueReason::Configuration),
    };
    Ok(body.map(|()| cursor.position()))
}

/// Capabilities that QEMU lists here change the memory records (`x-ignore-shared`, `mapped-ram`), so
/// that only an empty list is understood.
fn capabilities_len(mut cursor: Cursor<'_>) -> Read<usize> {
    match cursor.be32() {
        None => Ok(None),
        Some(0) => Ok(Some(cursor.position())),
        Some(_) => Err(OpaqueReason::Configuration),
    }
}

/// Length of a command with its data.
pub(super) fn command_len(bytes: &[u8]) -> Read<usize> {
    let mut cursor = Cursor::new(bytes);
    let (Some(_), Some(command)) = (cursor.u8(), cursor.be16()) else { return Ok(None) };
    if !HARMLESS_COMMANDS.contains(&command) {
        return Err(OpaqueReason::Command(command));
    }
    let Some(len) = cursor.be16() else { return Ok(None) };
    Ok(cursor.take(usize::from(len)).map(|_| cursor.position()))
}

/// The head of the section that begins the memory: its length and the section's number.
pub(super) fn ram_start(bytes: &[u8]) -> Read<(usize, u32)> {
    let mut cursor = Cursor::new(bytes);
    let (Some(_), Some(id), Some(name)) = (cursor.u8(), cursor.be32(), cursor.name()) else {
        return Ok(None);
    };
    if name != b"ram" {
        return Err(OpaqueReason::ForeignSection);
    }
    let (Some(_instance), Some(version)) = (cursor.be32(), cursor.be32()) else { return Ok(None) };
    if version != RAM_VERSION {
        return Err(OpaqueReason::ForeignSection);
    }
    Ok(Some((cursor.position(), id)))
}

/// The head of a later section, or a footer: a type byte and the section's number.
pub(super) fn section_number(bytes: &[u8]) -> Option<u32> {
    let mut cursor = Cursor::new(bytes);
    cursor.u8()?;
    cursor.be32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_size_other_than_four_kib_is_not_understood() {
        let mut section = vec![SUBSECTION, 30];
        section.extend(b"configuration/target-page-bits");
        section.extend([0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(subsection_len(&section), Ok(None));
        section.push(12);
        assert_eq!(subsection_len(&section), Ok(Some(section.len())));
        section.pop();
        section.push(16);
        assert_eq!(subsection_len(&section), Err(OpaqueReason::Configuration));
    }

    #[test]
    fn commands_that_change_the_reading_are_not_understood() {
        assert_eq!(command_len(&[COMMAND, 0, 2, 0, 4, 0, 0, 0, 1]), Ok(Some(9)));
        assert_eq!(command_len(&[COMMAND, 0, 2, 0, 4]), Ok(None));
        assert_eq!(command_len(&[COMMAND, 0, 7]), Err(OpaqueReason::Command(7)));
    }
}
