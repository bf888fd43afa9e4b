//! The memory of a machine that left or came, as both sites remember it, in a file of this site: so that its way back costs
//! what changed since.
//!
//! ```text
//!  file = "LHMEMORY" version u8 | digest [32] | record...        record = name length u8 | name | page u64 | content [4096]
//! ```
//!
//! What is read is proven by its digest, and the other site must name the same one: a file that is damaged, or older than the
//! other's, is not used. It holds what the guest had in its memory: root alone may read it.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use longhaul_core::memory::PAGE_BYTES;
use longhaul_core::wan::Remembered;

const MAGIC: &[u8; 9] = b"LHMEMORY\x01";
/// Left free on the file system, in bytes: the journal may be on it.
const LEAVE_FREE: u64 = 1 << 30;

/// Keeps it in place of what was kept before. Without room for it nothing is kept.
pub fn write(path: &Path, remembered: &Remembered) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)?;
    let size = (remembered.pages().count() * (PAGE_BYTES + 32)) as u64;
    let space = nix::sys::statvfs::statvfs(folder)?;
    if space.blocks_available() * space.fragment_size() < size + LEAVE_FREE {
        forget(path)?;
        return Err(io::Error::new(io::ErrorKind::StorageFull, "not enough room beside the journal"));
    }
    let unfinished = path.with_extension("unfinished");
    // One that a crash left may have other rights.
    forget(&unfinished)?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(MAGIC)?;
    out.write_all(&remembered.digest())?;
    for (name, page, content) in remembered.pages() {
        out.write_all(&[name.len() as u8])?;
        out.write_all(name)?;
        out.write_all(&page.to_be_bytes())?;
        out.write_all(content)?;
    }
    // Before its name, so that no crash leaves a file of that name whose pages are not there.
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    std::fs::rename(&unfinished, path)
}

/// What is said of it to the other site; nothing if nothing is kept.
pub fn digest(path: &Path) -> Option<[u8; 32]> {
    head(&mut File::open(path).ok()?).ok()
}

/// Reads what has this digest, if that is at most so many pages.
///
/// # Errors
///
/// [`io::ErrorKind::FileTooLarge`] if it is more; any other if what is there cannot be what was kept.
pub fn read(path: &Path, wanted: [u8; 32], max_pages: u32) -> io::Result<Remembered> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
    let damaged = || io::Error::from(io::ErrorKind::InvalidData);
    if head(&mut file)? != wanted {
        return Err(damaged());
    }
    let mut remembered = Remembered::with_room(max_pages);
    let (mut name, mut number, mut content) = ([0; 255], [0; 8], vec![0; PAGE_BYTES]);
    for page in 0.. {
        let mut length = [0];
        if file.read(&mut length)? == 0 {
            break;
        }
        if page == max_pages {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let name = &mut name[..usize::from(length[0])];
        file.read_exact(name)?;
        file.read_exact(&mut number)?;
        file.read_exact(&mut content)?;
        if !remembered.put(name, u64::from_be_bytes(number), &content) {
            return Err(damaged());
        }
    }
    if remembered.digest() == wanted { Ok(remembered) } else { Err(damaged()) }
}

/// Keeps nothing any more.
pub fn forget(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn head(from: &mut impl Read) -> io::Result<[u8; 32]> {
    let (mut magic, mut digest) = ([0; MAGIC.len()], [0; 32]);
    from.read_exact(&mut magic)?;
    from.read_exact(&mut digest)?;
    if magic == *MAGIC { Ok(digest) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_kept_is_read_again_by_root_alone_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory").join("web1.pages");
        let mut remembered = Remembered::with_room(8);
        for page in 0..3u64 {
            assert!(remembered.put(b"pc.ram", page * 7, &[page as u8; PAGE_BYTES]));
        }
        assert_eq!(digest(&path), None);
        write(&path, &remembered).unwrap();
        write(&path, &remembered).unwrap();
        let known = digest(&path).unwrap();
        assert_eq!(known, remembered.digest());
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(&path, known, 8).unwrap().digest(), known);
        assert!(read(&path, [1; 32], 8).is_err(), "another is meant");
        let more = read(&path, known, 2).err().map(|error| error.kind());
        assert_eq!(more, Some(io::ErrorKind::FileTooLarge));
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(read(&path, known, 8).is_err());
        forget(&path).unwrap();
        forget(&path).unwrap();
        assert_eq!(digest(&path), None);
    }
}
