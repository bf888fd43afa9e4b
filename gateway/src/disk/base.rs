//! A copy of a disk that is kept, or the template that it was cloned from, read beside the new disk of its machine: a raw
//! file that nothing writes.
//!
//! What it holds is proven by nobody and trusted by nobody: it is hashed, and gets onto the new disk only where the
//! source has the same hash. A machine's user may have owned the file, so that no link is followed, nothing but a
//! regular file of the right size and owner is opened, and all reads lie within that size. It is opened once:
//! whoever deletes or replaces it afterwards changes nothing here. Who may be told of what it holds is not decided here.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Whence, geteuid, lseek};

/// Why a kept copy or a template is not used. The disk is copied anew, then.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// It is not there, is a link, or may not be read.
    #[error("The image cannot be opened")]
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
    /// It is a folder, a device or a pipe, or not only root and this process's user may write to it.
    #[error(
        "The template is no regular file that only root or the gateway's user may write: chown it and chmod go-w it"
    )]
    NotTrusted,
    /// Nothing is cloned from what is longer.
    #[error(
        "The template has {found} bytes, its disk only {disk}: name the image that the disk was cloned from"
    )]
    Longer {
        /// The disk's size in bytes.
        disk: u64,
        /// The file's length in bytes.
        found: u64,
    },
}

/// An open copy or template. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Base {
    file: Arc<File>,
    size: u64,
    /// The file's length; the disk may be longer.
    held: u64,
}

impl Base {
    /// Opens the raw image of a disk of `size` bytes, which the user `owner` must have.
    pub fn open(path: &Path, size: u64, owner: u32) -> Result<Self, BaseError> {
        let (file, about) = opened(path)?;
        if !about.is_file() || about.uid() != owner {
            return Err(BaseError::NotOurs);
        }
        if about.len() != size {
            return Err(BaseError::Size { expected: size, found: about.len() });
        }
        Ok(Self { file: Arc::new(file), size, held: size })
    }

    /// Opens the raw image that a disk of `size` bytes was cloned from. Only root and this process's user may be able to
    /// write to it. A clone that was grown is longer: what it has more is read as zeros, as it was when it was made.
    pub fn of_template(path: &Path, size: u64) -> Result<Self, BaseError> {
        let (file, about) = opened(path)?;
        if !about.is_file() || !only_ours(&about) {
            return Err(BaseError::NotTrusted);
        }
        if about.len() > size {
            return Err(BaseError::Longer { disk: size, found: about.len() });
        }
        Ok(Self { file: Arc::new(file), size, held: about.len() })
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
        let held = self.held.saturating_sub(offset).min(u64::from(len)) as usize;
        let read = move || {
            let mut content = vec![0; len as usize];
            file.read_exact_at(&mut content[..held], offset)?;
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
    /// the file is read with its offset: one task at a time asks. Behind the end of a template there are only holes.
    pub fn next_data(&self, offset: u64) -> io::Result<u64> {
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        match lseek(self.file.as_fd(), offset, Whence::SeekData) {
            Ok(at) => Ok((at as u64).min(self.size)),
            Err(Errno::ENXIO) => Ok(self.size),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether only root and this process's user may write to a file or into a folder.
pub(crate) fn only_ours(about: &Metadata) -> bool {
    let owner = about.uid();
    (owner == 0 || owner == geteuid().as_raw()) && about.mode() & 0o022 == 0
}

fn opened(path: &Path) -> io::Result<(File, Metadata)> {
    // A pipe in its place must not hold up whoever opens it.
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let about = file.metadata()?;
    Ok((file, about))
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use nix::sys::stat::Mode;
    use nix::unistd::{Uid, chown, mkfifo};

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

    #[tokio::test]
    async fn behind_a_template_that_is_shorter_than_its_disk_are_zeros() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("template");
        let file = File::create(&path).unwrap();
        set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        file.write_all_at(b"content", SIZE - 7).unwrap();
        let base = Base::of_template(&path, 2 * SIZE).unwrap();
        assert_eq!(base.size(), 2 * SIZE);
        assert_eq!(base.read(SIZE - 7, 10).await.unwrap(), &b"content\0\0\0"[..]);
        assert_eq!(base.read(2 * SIZE - 3, 3).await.unwrap(), &[0; 3][..]);
        assert!(base.read(2 * SIZE - 3, 4).await.is_err(), "beyond the disk");
        assert_eq!(base.next_data(SIZE).unwrap(), 2 * SIZE);
        file.write_all_at(b"grown", SIZE).unwrap();
        assert_eq!(base.read(SIZE, 5).await.unwrap(), &[0; 5][..], "it is what it was when it was opened");
        file.set_len(1).unwrap();
        assert!(base.read(SIZE - 7, 10).await.is_err(), "cut meanwhile");
    }

    #[test]
    fn a_template_is_a_regular_file_that_nobody_else_writes_and_no_longer_than_its_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mode = |mode| set_permissions(path("template"), Permissions::from_mode(mode)).unwrap();
        File::create(path("template")).unwrap().set_len(SIZE).unwrap();
        symlink(path("template"), path("link")).unwrap();
        mkfifo(&path("pipe"), Mode::S_IRWXU).unwrap();
        let template = |name: &str, size| Base::of_template(&path(name), size);
        mode(0o644);
        assert!(template("template", SIZE).is_ok() && template("template", SIZE + 512).is_ok());
        assert!(matches!(
            template("template", SIZE - 512),
            Err(BaseError::Longer { disk, found: SIZE }) if disk == SIZE - 512
        ));
        assert!(matches!(template("link", SIZE), Err(BaseError::Open(_))));
        assert!(matches!(template("absent", SIZE), Err(BaseError::Open(_))));
        assert!(matches!(template("pipe", SIZE), Err(BaseError::NotTrusted)));
        assert!(matches!(Base::of_template(folder.path(), SIZE), Err(BaseError::NotTrusted)));
        for others in [0o664, 0o646, 0o666] {
            mode(others);
            assert!(matches!(template("template", SIZE), Err(BaseError::NotTrusted)), "{others:o}");
        }
        mode(0o644);
        if !geteuid().is_root() {
            return println!("skipped: only root can give a file away");
        }
        chown(&path("template"), Some(Uid::from_raw(65_534)), None).unwrap();
        assert!(matches!(template("template", SIZE), Err(BaseError::NotTrusted)));
    }
}
