//! The memory of a machine that left or came, as both sites remember it, in a file of this site: so that its way back costs
//! what changed since.
//!
//! ```text
//!  file = "LHMEMORY" version u8 | digest [32] | record...        record = name length u8 | name | page u64 | content [4096]
//! ```
//!
//! What is read is proven by its digest, and the other site must name the same one: a file that is damaged, or older than the
//! other's, is not used. All files together are bounded, and the oldest go first. They hold what guests had in their memory: root
//! alone may read them.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use longhaul_core::memory::PAGE_BYTES;
use longhaul_core::wan::Remembered;

const MAGIC: &[u8; 9] = b"LHMEMORY\x01";
/// Left free on the file system, in bytes: the journal may be on it.
const LEAVE_FREE: u64 = 1 << 30;

/// What the names of files end with that are whole.
const SUFFIX: &str = "pages";
/// And those of which something is missing.
const UNFINISHED: &str = "unfinished";

/// A file that is kept.
#[derive(Debug, Clone)]
pub struct KeptFile {
    /// Where.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
    /// When it was written.
    pub since: SystemTime,
}

/// A file that is about to be kept: what was kept before is gone already, which the other site has no longer.
#[derive(Debug)]
pub struct Keeping {
    path: PathBuf,
    unfinished: PathBuf,
    file: File,
}

/// Begins to keep something at `path`. Who begins later there, or forgets what is kept there, ends this.
pub fn begin(path: &Path) -> io::Result<Keeping> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)?;
    // One that a crash left may have other rights.
    forget(path)?;
    let unfinished = path.with_extension(UNFINISHED);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    Ok(Keeping { path: path.to_owned(), unfinished, file })
}

impl Keeping {
    /// Keeps it. All files of its folder together take `most_bytes` at most: older ones go for it. Without room for it nothing
    /// is kept.
    pub fn write(self, remembered: &Remembered, most_bytes: u64) -> io::Result<()> {
        let _turn = turn();
        if !self.is_wanted() {
            return Ok(());
        }
        let written = self.write_whole(remembered, most_bytes);
        if !self.is_wanted() {
            return Ok(());
        }
        match written {
            Ok(()) => std::fs::rename(&self.unfinished, &self.path),
            Err(error) => remove(&self.unfinished).and(Err(error)),
        }
    }

    /// The name is still this file's.
    fn is_wanted(&self) -> bool {
        let identity = |metadata: &std::fs::Metadata| (metadata.dev(), metadata.ino());
        match (self.file.metadata(), self.unfinished.symlink_metadata()) {
            (Ok(ours), Ok(named)) => identity(&ours) == identity(&named),
            (Ok(_) | Err(_), Ok(_) | Err(_)) => false,
        }
    }

    fn write_whole(&self, remembered: &Remembered, most_bytes: u64) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let size = size_bytes(remembered);
        if size > most_bytes {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "more than migration.keep_memory_gib"));
        }
        make_room(folder, most_bytes - size)?;
        let space = nix::sys::statvfs::statvfs(folder)?;
        if space.blocks_available() * space.fragment_size() < size.saturating_add(LEAVE_FREE) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "not enough room beside the journal"));
        }
        let mut out = BufWriter::with_capacity(1 << 20, &self.file);
        write_to(&mut out, remembered)?;
        out.flush()?;
        // Before its name, so that no crash leaves a file of that name whose pages are not there.
        self.file.sync_all()
    }
}

/// Writes all that its file holds.
pub fn write_to(out: &mut impl Write, remembered: &Remembered) -> io::Result<()> {
    out.write_all(MAGIC)?;
    out.write_all(&remembered.digest())?;
    for (name, page, content) in remembered.pages() {
        out.write_all(&[name.len() as u8])?;
        out.write_all(name)?;
        out.write_all(&page.to_be_bytes())?;
        out.write_all(content)?;
    }
    Ok(())
}

/// Removes the oldest files of a folder until the others take `most_bytes` at most.
pub fn bound(folder: &Path, most_bytes: u64) -> io::Result<()> {
    let _turn = turn();
    make_room(folder, most_bytes)
}

fn make_room(folder: &Path, most_bytes: u64) -> io::Result<()> {
    let files = files(folder);
    let mut taken: u64 = files.iter().map(|file| file.bytes).sum();
    for file in files {
        if taken <= most_bytes {
            return Ok(());
        }
        tracing::info!(file = %file.path.display(), "kept memory removed for what is newer");
        remove(&file.path)?;
        taken -= file.bytes;
    }
    Ok(())
}

/// What is kept in a folder and whole, the oldest first.
pub fn list(folder: &Path) -> Vec<KeptFile> {
    let is_whole = |file: &KeptFile| file.path.extension().is_some_and(|extension| extension == SUFFIX);
    files(folder).into_iter().filter(is_whole).collect()
}

/// All files of a folder, those too that a crash has left; the oldest first.
fn files(folder: &Path) -> Vec<KeptFile> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let look = |entry: std::fs::DirEntry| {
        let about = entry.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some(KeptFile { path: entry.path(), bytes: about.len(), since: about.modified().ok()? })
    };
    let mut found: Vec<KeptFile> = entries.filter_map(look).collect();
    found.sort_by_key(|file| file.since);
    found
}

/// How long the file of it is.
fn size_bytes(remembered: &Remembered) -> u64 {
    let record = |(name, _, content): (&[u8], u64, &[u8])| 1 + name.len() + size_of::<u64>() + content.len();
    let head = MAGIC.len() + remembered.digest().len();
    (head + remembered.pages().map(record).sum::<usize>()) as u64
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
    read_from(&mut BufReader::with_capacity(1 << 20, File::open(path)?), wanted, max_pages)
}

/// The same of what a file holds. Takes no more memory than so many pages need, whatever the bytes say.
///
/// # Errors
///
/// As [`read`].
pub fn read_from(file: &mut impl Read, wanted: [u8; 32], max_pages: u32) -> io::Result<Remembered> {
    let damaged = || io::Error::from(io::ErrorKind::InvalidData);
    if head(file)? != wanted {
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

/// Keeps nothing any more; what is just being written will have no name.
pub fn forget(path: &Path) -> io::Result<()> {
    remove(&path.with_extension(UNFINISHED))?;
    remove(path)
}

/// One at a time writes or makes room: each counts on what it has seen of the others' files.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove(path: &Path) -> io::Result<()> {
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
        keep(&path, &remembered, u64::MAX).unwrap();
        keep(&path, &remembered, u64::MAX).unwrap();
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

    fn keep(path: &Path, remembered: &Remembered, most_bytes: u64) -> io::Result<()> {
        begin(path)?.write(remembered, most_bytes)
    }

    #[test]
    fn who_begins_later_or_forgets_ends_what_was_begun_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web1.pages");
        let of = |content: u8| {
            let mut remembered = Remembered::with_room(1);
            assert!(remembered.put(b"pc.ram", 0, &[content; PAGE_BYTES]));
            remembered
        };
        keep(&path, &of(1), u64::MAX).unwrap();
        let first = begin(&path).unwrap();
        assert_eq!(digest(&path), None, "the other site has that no longer");
        let second = begin(&path).unwrap();
        second.write(&of(2), u64::MAX).unwrap();
        first.write(&of(3), u64::MAX).unwrap();
        assert_eq!(digest(&path), Some(of(2).digest()));
        let third = begin(&path).unwrap();
        forget(&path).unwrap();
        third.write(&of(4), u64::MAX).unwrap();
        assert_eq!((digest(&path), folder.path().read_dir().unwrap().count()), (None, 0));
    }

    #[test]
    fn the_oldest_are_removed_before_a_new_one_is_more_than_all_may_take() {
        let folder = tempfile::tempdir().unwrap();
        let mut remembered = Remembered::with_room(1);
        assert!(remembered.put(b"pc.ram", 0, &[7; PAGE_BYTES]));
        let size = size_bytes(&remembered);
        let keep = |name: &str, most_bytes| {
            let path = folder.path().join(name).with_extension(SUFFIX);
            let written = begin(&path).and_then(|keeping| keeping.write(&remembered, most_bytes));
            let age = std::time::Duration::from_secs(match name {
                "web1" => 300,
                "web2" => 200,
                _ => 100,
            });
            if let Ok(file) = File::options().write(true).open(&path) {
                file.set_modified(SystemTime::now() - age).unwrap();
            }
            written
        };
        let kept = || -> Vec<String> {
            let name = |file: KeptFile| file.path.file_stem().unwrap().to_str().unwrap().to_owned();
            list(folder.path()).into_iter().map(name).collect()
        };
        keep("web2", 3 * size).unwrap();
        keep("web1", 3 * size).unwrap();
        std::fs::write(folder.path().join("web4.unfinished"), vec![0; size as usize]).unwrap();
        assert_eq!(list(folder.path())[0].bytes, size);
        assert_eq!(kept(), ["web1", "web2"], "what a crash left is not kept, but takes room");
        keep("web3", 3 * size).unwrap();
        assert_eq!(kept(), ["web2", "web3"]);
        keep("web3", 3 * size).unwrap();
        assert_eq!(kept(), ["web2", "web3"], "it takes the place of its own");
        let refused = keep("web3", size - 1).unwrap_err();
        assert_eq!((refused.kind(), kept()), (io::ErrorKind::StorageFull, vec!["web2".to_owned()]));
        keep("web3", size).unwrap();
        assert_eq!(kept(), ["web3"]);
        bound(folder.path(), size).unwrap();
        assert_eq!(kept(), ["web3"]);
        bound(folder.path(), size - 1).unwrap();
        assert!(kept().is_empty());
    }
}
