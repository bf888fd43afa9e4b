//! A file system whose device fails to read from a place on: ext4 on a loop device whose backing file lost its end. The
//! end can be put back. Where in a file the failing begins is up to whoever lays files out on it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use netns_tests::exec::run;

const MIB: u64 = 1 << 20;

/// It is mounted until it is dropped.
pub struct FailingDisk {
    mount: PathBuf,
    backing: PathBuf,
    device: String,
    lost: Option<(u64, Vec<u8>)>,
}

impl FailingDisk {
    /// Mounts an empty one at `mount`, which must be a folder; its backing file is made beside it.
    pub fn mount(mount: &Path, size_bytes: u64) -> Self {
        let backing = mount.with_extension("backing");
        File::create(&backing).unwrap().set_len(size_bytes).unwrap();
        let backing_text = backing.to_str().unwrap();
        // Without a journal nothing is written but what is asked for.
        run("mkfs.ext4", &["-q", "-O", "^has_journal", backing_text]).unwrap();
        // Only with direct I/O does the loop device report what its backing file does not have.
        let device = run("losetup", &["--direct-io=on", "--show", "-f", backing_text]).unwrap();
        let disk = Self { mount: mount.to_owned(), backing, device: device.trim().to_owned(), lost: None };
        disk.mount_again();
        disk
    }

    fn mount_again(&self) {
        run("mount", &[&self.device, self.mount.to_str().unwrap()]).unwrap();
    }

    /// Copies `image` to it, with its last `tail_bytes` changed to what is not zero. Every block has its place, and
    /// nothing of it is in memory.
    pub fn copy(&self, image: &Path, name: &str, tail_bytes: u64) -> PathBuf {
        let to = self.mount.join(name);
        let (from, file) = (File::open(image).unwrap(), File::create_new(&to).unwrap());
        let size_bytes = from.metadata().unwrap().len();
        let mut block = vec![0; MIB as usize];
        for at in (0..size_bytes).step_by(block.len()) {
            from.read_exact_at(&mut block, at).unwrap();
            if at + MIB > size_bytes - tail_bytes {
                block.fill(0x5a);
            }
            file.write_all_at(&block, at).unwrap();
        }
        file.sync_all().unwrap();
        drop(file);
        run("umount", &[self.mount.to_str().unwrap()]).unwrap();
        self.mount_again();
        to
    }

    /// The last `tail_bytes` of a file cannot be read any more, if it lies in one piece at the end of the device.
    pub fn fail(&mut self, file: &Path, tail_bytes: u64) {
        let extents = run("filefrag", &["-b1", "-v", file.to_str().unwrap()]).unwrap();
        let size_bytes = fs::metadata(file).unwrap().len();
        let from =
            place_of(&extents, size_bytes - tail_bytes).unwrap_or_else(|| panic!("no extent in {extents}"));
        let backing = File::options().read(true).write(true).open(&self.backing).unwrap();
        let mut lost = vec![0; (backing.metadata().unwrap().len() - from) as usize];
        backing.read_exact_at(&mut lost, from).unwrap();
        backing.set_len(from).unwrap();
        self.lost = Some((from, lost));
    }

    /// Everything can be read again.
    pub fn heal(&mut self) {
        let (from, lost) = self.lost.take().unwrap();
        let backing = File::options().write(true).open(&self.backing).unwrap();
        assert_eq!(backing.metadata().unwrap().len(), from, "something was written behind what failed");
        backing.write_all_at(&lost, from).unwrap();
    }
}

impl Drop for FailingDisk {
    fn drop(&mut self) {
        drop(run("umount", &["--lazy", self.mount.to_str().unwrap_or_default()]));
        drop(run("losetup", &["--detach", &self.device]));
    }
}

/// Where on the device a byte of a file lies, by `filefrag`'s list of extents: `0: 0.. 8191: 16385.. 24576: 8192:`, in
/// bytes.
fn place_of(extents: &str, offset: u64) -> Option<u64> {
    extents.lines().find_map(|line| {
        let mut numbers = line.split([':', '.', ' ']).filter(|part| !part.is_empty()).map(str::parse::<u64>);
        let (_, from, to, place) =
            (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        (from..=to).contains(&offset).then(|| place + offset - from)
    })
}
