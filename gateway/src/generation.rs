//! The note beside each disk: `IMAGE.generation`, which says whose the disk's machine is and since when.
//!
//! Written and made durable, with its folder, when a machine has come and before its guest runs, and again
//! when it has left. It is no part of the journal, so that a journal restored from a backup is noticed. What a
//! difference means is decided in `longhaul_core::migration::generation`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use longhaul_core::ids::{SiteName, VmName};
use longhaul_core::migration::generation::Generation;

/// Why a note could not be used. The machine of that disk is held.
#[derive(Debug, thiserror::Error)]
#[error("Cannot {action} the note {path}, which says whose the disk beside it is")]
pub struct NoteError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The notes beside `images`; a disk without one says nothing.
pub fn read_notes(images: &[PathBuf]) -> Result<Vec<Generation>, NoteError> {
    let notes = images.iter().map(|image| read_note(image));
    notes.filter_map(Result::transpose).collect()
}

/// The note beside one disk.
pub fn read_note(image: &Path) -> Result<Option<Generation>, NoteError> {
    let path = note_path(image);
    let failed = |source| NoteError { action: "read", path: path.clone(), source };
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let note = toml::from_str(&text).map_err(|error| failed(io::Error::other(error.to_string())));
    note.map(Some)
}

/// Every disk in `folder` that has a note, and what it says. One that cannot be read is left out.
pub fn notes_in(folder: &Path) -> Vec<(PathBuf, Generation)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let images = entries.map(|entry| entry.path()).filter(|path| path.is_file());
    images.filter_map(|image| read_note(&image).ok().flatten().map(|note| (image, note))).collect()
}

/// What stands beside disks in `pool` with which `vm` has come to `site`, also beside those of which no row knows.
pub fn arrivals(pool: &Path, vm: &VmName, site: &SiteName) -> Vec<Generation> {
    let came = |note: &Generation| note.vm == *vm && note.owner == *site;
    notes_in(pool).into_iter().map(|(_, note)| note).filter(came).collect()
}

/// Writes the note beside each of `images`; durable when it returns. Blocks for the disks' flushes.
pub fn write_notes(images: &[PathBuf], note: &Generation) -> Result<(), NoteError> {
    images.iter().try_for_each(|image| write_note(image, note))
}

/// Where the note of a disk stands.
pub fn note_path(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".generation");
    PathBuf::from(name)
}

fn write_note(image: &Path, note: &Generation) -> Result<(), NoteError> {
    let path = note_path(image);
    let write = || -> io::Result<()> {
        let text = toml::to_string(note).map_err(io::Error::other)?;
        let mut fresh = path.clone().into_os_string();
        fresh.push(".new");
        let mut file = File::create(&fresh)?;
        file.write_all(b"# Whose the disk beside this file is. Kept by longhaul; see its README, Safety.\n")?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|source| NoteError { action: "write", path: path.clone(), source })
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::Epoch;

    use super::*;

    #[test]
    fn only_disks_with_a_note_are_found_in_a_folder() {
        let pool = tempfile::tempdir().unwrap();
        let image = pool.path().join("web1-root.raw");
        fs::write(&image, "").unwrap();
        assert!(notes_in(pool.path()).is_empty());
        let note = Generation { vm: "web1".parse().unwrap(), epoch: Epoch(2), owner: "b".parse().unwrap() };
        write_notes(std::slice::from_ref(&image), &note).unwrap();
        assert_eq!(notes_in(pool.path()), [(image, note)]);
    }

    #[test]
    fn a_note_says_after_a_rewrite_what_was_written_last_and_a_damaged_one_is_no_note() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("web1.raw");
        assert_eq!(read_note(&image).unwrap(), None);
        for (epoch, owner) in [(1, "b"), (2, "a")] {
            let note = Generation {
                vm: "web1".parse().unwrap(),
                epoch: Epoch(epoch),
                owner: owner.parse().unwrap(),
            };
            write_notes(std::slice::from_ref(&image), &note).unwrap();
            assert_eq!(read_notes(std::slice::from_ref(&image)).unwrap(), [note]);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing but the note is left");
        fs::write(note_path(&image), "epoch = -1").unwrap();
        assert!(read_notes(&[image]).is_err());
    }
}
