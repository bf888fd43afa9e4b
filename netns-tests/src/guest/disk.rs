//! Raw disk images with an ext4 file system, made and read without mounting them.
//!
//! Uses e2fsprogs (`mke2fs -d`, `debugfs`, `e2fsck`) on image files. Knows nothing of what lies on the disk.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::packages::run;

/// Fixed so that images made from the same tree differ only in times.
const ROOT_UUID: &str = "6c6f6e67-6861-756c-4c41-420000000001";

/// Makes a sparse raw image of `bytes` with an ext4 file system holding a copy of `tree`.
///
/// Inode tables and journal are written at once: otherwise the guest's kernel would do it in the background and every
/// measurement of a migration would count it as the guest's own writing.
///
/// # Errors
/// `mke2fs` is missing or the tree does not fit.
pub fn format(image: &Path, bytes: u64, label: &str, tree: &Path) -> Result<()> {
    ensure!(bytes.is_multiple_of(4096), "A disk's size must be a multiple of 4096 bytes, not {bytes}");
    let file = File::create(image).with_context(|| format!("Cannot make {}", image.display()))?;
    file.set_len(bytes)?;
    drop(file);
    run(Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-N", "8192", "-J", "size=16"])
        .args(["-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0", "-U", ROOT_UUID])
        .args(["-L", label, "-d"])
        .arg(tree)
        .arg(image)
        .arg(format!("{}k", bytes / 1024)))
    .map(drop)
}

/// Copies a raw image, sharing or skipping what is empty. The copy is independent of the original.
///
/// # Errors
/// The source is missing or the target's file system is full.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    run(Command::new("cp").args(["--reflink=auto", "--sparse=always"]).arg(from).arg(to)).map(drop)
}

/// Replays the journal and checks the file system. Changes the image: call it on a copy.
///
/// # Errors
/// The file system has errors (the text says which), or `e2fsck` is missing.
pub fn check(image: &Path) -> Result<()> {
    // 0: clean; 1: the journal was replayed or small counters corrected by -p, as at every boot after a crash.
    let replay = Command::new("e2fsck").arg("-p").arg(image).output().context("Cannot run e2fsck")?;
    if !matches!(replay.status.code(), Some(0 | 1)) {
        bail!("File system is damaged: {}", String::from_utf8_lossy(&replay.stdout).trim());
    }
    let output =
        Command::new("e2fsck").args(["-f", "-n"]).arg(image).output().context("Cannot run e2fsck")?;
    if !output.status.success() {
        bail!("File system is damaged: {}", String::from_utf8_lossy(&output.stdout).trim());
    }
    Ok(())
}

/// Copies the file at `path` of the image's file system out to `target`.
///
/// # Errors
/// There is no such file, or the image has no file system.
pub fn extract(image: &Path, path: &str, target: &Path) -> Result<()> {
    // debugfs exits with 0 even when it fails, so the target is what counts.
    let _ = fs::remove_file(target);
    debugfs(image, &format!("dump {path} {}", target.display()))?;
    ensure!(target.is_file(), "The disk {} has no file {path}", image.display());
    Ok(())
}

/// Physical blocks (of 4096 bytes) that hold `path`, in the order of the file, holes left out. `path` may also be
/// `<N>` for inode N.
///
/// # Errors
/// `debugfs` is missing or cannot read the image.
pub fn blocks_of(image: &Path, path: &str) -> Result<Vec<u64>> {
    Ok(debugfs(image, &format!("blocks {path}"))?
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .filter(|block| *block != 0)
        .collect())
}

fn debugfs(image: &Path, request: &str) -> Result<String> {
    run(Command::new("debugfs").arg("-R").arg(request).arg(image))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_put_on_a_disk_is_found_there_again_with_its_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("note"), vec![7_u8; 10_000]).unwrap();
        let image = folder.path().join("disk.img");
        format(&image, 64 << 20, "test", &tree).unwrap();
        let copied = folder.path().join("copies/disk.img");
        copy(&image, &copied).unwrap();
        assert_eq!(fs::metadata(&copied).unwrap().len(), 64 << 20);
        check(&copied).unwrap();
        let out = folder.path().join("note.out");
        extract(&copied, "/note", &out).unwrap();
        assert_eq!(fs::read(&out).unwrap(), vec![7_u8; 10_000]);
        assert_eq!(blocks_of(&copied, "/note").unwrap().len(), 3);
        assert!(extract(&copied, "/absent", &out).is_err());
    }

    #[test]
    fn a_size_that_is_no_multiple_of_a_block_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(format(&folder.path().join("x"), 1000, "x", folder.path()).is_err());
    }
}
