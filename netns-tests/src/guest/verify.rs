//! Checks a stopped guest's disk from outside, by the service's own records.
//!
//! For the promise "the disk is right": blocks that did not change after the move are compared by the caller with
//! the source's disk; the changed ones are attributed here to files ([`BlockOwners`]), and the service's files are
//! checked against their own checksums and versions ([`DiskVerdict`]). Works on a copy of the image and never mounts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::disk;
use super::tree::STATE_FOLDER;
use crate::agent::dirt::{DATA_FILE, DirtVerdict, INDEX_FILE, verify_files};
use crate::agent::log::{LogVerdict, verify_bytes};

/// What a root disk proves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskVerdict {
    /// The append-only log.
    pub log: LogVerdict,
    /// The rewritten blocks.
    pub dirt: DirtVerdict,
    /// What the file system check found wrong, if anything.
    pub file_system: Option<String>,
}

impl DiskVerdict {
    /// File system, log and blocks are all right.
    #[must_use]
    pub fn sound(&self) -> bool {
        self.log.sound() && self.dirt.sound() && self.file_system.is_none()
    }
}

/// To whom a block of 4096 bytes belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// The append-only log: checked by checksums and numbers.
    Log,
    /// The file of rewritten blocks: checked by versions. Carries the block's number in the file.
    Dirt(u32),
    /// The index of versions.
    Index,
    /// The web server's logs.
    WebLog,
    /// The file system's journal.
    Journal,
    /// Anything else: file system tables, other files; checked by the file system check alone.
    Other,
}

/// The owners of a disk's blocks.
#[derive(Debug, Clone, Default)]
pub struct BlockOwners {
    owners: BTreeMap<u64, Owner>,
}

impl BlockOwners {
    /// Reads them from the file system in `image`. Its journal must have been replayed: blocks that files got since
    /// the last checkpoint are known there only. [`root_disk`] does it.
    ///
    /// # Errors
    /// `debugfs` is missing or cannot read the image.
    pub fn read(image: &Path) -> Result<Self> {
        let mut owners = BTreeMap::new();
        let state = |name: &str| format!("{STATE_FOLDER}/{name}");
        let files = [
            (state("log"), Owner::Log),
            (state(INDEX_FILE), Owner::Index),
            ("/var/log/nginx/access.log".to_owned(), Owner::WebLog),
            ("/var/log/nginx/error.log".to_owned(), Owner::WebLog),
            ("<8>".to_owned(), Owner::Journal),
        ];
        for (path, owner) in files {
            owners.extend(disk::blocks_of(image, &path)?.into_iter().map(|block| (block, owner)));
        }
        let dirt = disk::blocks_of(image, &state(DATA_FILE))?;
        owners.extend((0..).zip(dirt).map(|(number, block)| (block, Owner::Dirt(number))));
        Ok(Self { owners })
    }

    /// The owner of physical block `block`, counted in 4096 bytes from the disk's beginning.
    #[must_use]
    pub fn owner(&self, block: u64) -> Owner {
        self.owners.get(&block).copied().unwrap_or(Owner::Other)
    }
}

/// Checks a copy of the root disk at `image` in `work`, a folder of the caller's, and says whose its blocks are.
///
/// The image may be one whose machine was just killed: the journal is replayed in the copy first, as a boot would.
///
/// # Errors
/// The service's files are missing, or a tool is. Damage is no error but part of the verdict.
pub fn root_disk(image: &Path, work: &Path) -> Result<(DiskVerdict, BlockOwners)> {
    let copy = work.join("checked.img");
    disk::copy(image, &copy)?;
    let verdict = checked_copy(&copy, work);
    let _ = fs::remove_file(&copy);
    verdict
}

fn checked_copy(copy: &Path, work: &Path) -> Result<(DiskVerdict, BlockOwners)> {
    let file_system = disk::check(copy).err().map(|error| error.to_string());
    let extract = |name: &str| -> Result<std::path::PathBuf> {
        let target = work.join(format!("checked.{name}"));
        disk::extract(copy, &format!("{STATE_FOLDER}/{name}"), &target)?;
        Ok(target)
    };
    let (log, data, index) = (extract("log")?, extract(DATA_FILE)?, extract(INDEX_FILE)?);
    let verdict = DiskVerdict {
        log: verify_bytes(&fs::read(&log)?),
        dirt: verify_files(&File::open(&data)?, &File::open(&index)?)?,
        file_system,
    };
    for path in [log, data, index] {
        fs::remove_file(path)?;
    }
    Ok((verdict, BlockOwners::read(copy)?))
}
