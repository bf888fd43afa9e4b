//! A copy of a disk that is kept, read beside the new disk of its machine: a raw file that nothing writes.
//!
//! What it holds is proven by nobody and trusted by nobody: it is hashed, and gets onto the new disk only where the
//! source has the same hash. A machine's user may have owned the file, so that no link is followed, nothing but a
//! regular file of the right size and owner is opened, and all reads lie within that size. It is opened once:
//! whoever deletes or replaces it afterwards changes nothing here.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};

/// Why a kept copy is not used. The disk is copied anew, then.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// It is not there, or may not be read.
    #[error("The kept disk cannot be opened")]
    Open(#[from] io::Error),
    /// It is a folder, a device, a pipe, or was given away since.
    #[error("The kept disk is no regular file of its owner any more")]
    NotOurs,
    /// An image in another format has another length than its disk, as has one that was cut or grown.
    #[error("The kept disk is no raw image of {expected} bytes: it has {found}")]
    Size {
        /// The disk's size in bytes.
        expected: u64,
        /// The file's length in bytes.
        found: u64,
    },
}

/// An open copy. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Base {
    file: Arc<File>,
    size: u64,
}

impl Base {
    /// Opens the raw image of a disk of `size` bytes, which the user `owner` must have.
    pub fn open(path: &Path, size: u64, owner: u32) -> Result<Self, BaseError> {
        // A pipe in its place must not hold up whoever opens it.
        let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        let about = file.metadata()?;
        if !about.is_file() || about.uid() != owner {
            return Err(BaseError::NotOurs);
        }
        if about.len() != size {
            return Err(BaseError::Size { expected: size, found: about.len() });
        }
        Ok(Self { file: Arc::new(file), size })
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads `len` bytes at `offset`.
    pub async fn read(&self, offset: u64, len: u32) -> io::Result<Bytes> {
        if offset.checked_add(u64::from(len)).is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let file = self.file.clone();
        let read = move || {
            let mut content = vec![0; len as usize];
            file.read_exact_at(&mut content, offset)?;
            Ok(content.into())
        };
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|ended| Err(io::Error::other(ended)))
    }

    /// Reads `len` bytes at `offset` and hashes them with BLAKE3.
    pub async fn read_hashed(&self, offset: u64, len: u32) -> io::Result<(Bytes, [u8; 32])> {
        let content = self.read(offset, len).await?;
        let hash = *blake3::hash(&content).as_bytes();
        Ok((content, hash))
    }

    /// Where content begins at or behind `offset`, in bytes; the size where only holes follow. Every other part of
    /// the file is read with its offset: one task at a time asks.
    pub fn next_data(&self, offset: u64) -> io::Result<u64> {
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        match lseek(self.file.as_fd(), offset, Whence::SeekData) {
            Ok(at) => Ok((at as u64).min(self.size)),
            Err(Errno::ENXIO) => Ok(self.size),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;
    use nix::unistd::{geteuid, mkfifo};

    use super::*;

    const SIZE: u64 = 3 << 20;

    fn owner() -> u32 {
        geteuid().as_raw()
    }

    #[tokio::test]
    async fn what_is_read_lies_within_the_file_and_holes_are_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        let file = File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        file.write_all_at(b"content", 2 << 20).unwrap();
        let base = Base::open(&path, SIZE, owner()).unwrap();
        assert_eq!(base.read(2 << 20, 7).await.unwrap(), "content");
        assert_eq!(base.read_hashed(0, 3).await.unwrap().1, *blake3::hash(&[0; 3]).as_bytes());
        for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 2)] {
            assert!(base.read(offset, len).await.is_err(), "{len} bytes at {offset}");
        }
        assert!(base.next_data(0).unwrap() <= 2 << 20);
        assert_eq!(base.next_data(SIZE).unwrap(), SIZE);
        file.set_len(1 << 20).unwrap();
        assert!(base.read(2 << 20, 7).await.is_err(), "cut meanwhile");
    }

    #[test]
    fn nothing_is_opened_but_a_regular_file_of_its_owner_and_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        File::create(path("kept")).unwrap().set_len(SIZE).unwrap();
        symlink(path("kept"), path("link")).unwrap();
        mkfifo(&path("pipe"), Mode::S_IRWXU).unwrap();
        assert!(Base::open(&path("kept"), SIZE, owner()).is_ok());
        assert!(matches!(Base::open(&path("link"), SIZE, owner()), Err(BaseError::Open(_))));
        assert!(matches!(Base::open(&path("pipe"), SIZE, owner()), Err(BaseError::NotOurs)));
        assert!(matches!(Base::open(folder.path(), SIZE, owner()), Err(BaseError::NotOurs)));
        assert!(matches!(Base::open(&path("kept"), SIZE, owner() + 1), Err(BaseError::NotOurs)));
        assert!(matches!(Base::open(&path("kept"), SIZE + 1, owner()), Err(BaseError::Size { .. })));
    }
}
