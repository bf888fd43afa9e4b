//! Builds and caches the guest's kernel, initramfs and disk templates.
//!
//! The cache key is a hash of every input: package files, scripts, the service's binary, sizes. A lock on the cache
//! folder lets several test processes ask at once. Keeps the last few builds and removes older ones.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{disk, initramfs, modules, packages, tree};

/// What to build.
#[derive(Debug, Clone)]
pub struct ImageSpec {
    /// Size of the root disk. Default 1 GiB; the file is sparse.
    pub disk_bytes: u64,
    /// Size of an empty second disk, mounted at `/srv/second`, where the service then keeps a second log.
    pub second_disk_bytes: Option<u64>,
    /// Size of the file whose blocks the service rewrites. Default 64 MiB, written in full into the image.
    pub dirt_bytes: u64,
    /// The `guest-agent` binary. It must be linked against this machine's Debian release.
    pub agent: PathBuf,
    /// Where packages and images are kept. Default `target/lab/cache`.
    pub cache: PathBuf,
}

impl ImageSpec {
    /// The default guest with the service's binary at `agent`.
    #[must_use]
    pub fn new(agent: impl Into<PathBuf>) -> Self {
        Self {
            disk_bytes: 1 << 30,
            second_disk_bytes: None,
            dirt_bytes: 64 << 20,
            agent: agent.into(),
            cache: lab_folder().join("cache"),
        }
    }
}

/// `target/lab`: everything the laboratory writes lies below it.
#[must_use]
pub fn lab_folder() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    fs::canonicalize(&target).unwrap_or(target).join("lab")
}

/// A built guest: shared, read-only files. Disks are copied from templates with [`GuestImage::copy_disks`].
#[derive(Debug, Clone)]
pub struct GuestImage {
    /// The kernel, for QEMU's `-kernel`.
    pub kernel: PathBuf,
    /// The initramfs, for `-initrd`.
    pub initrd: PathBuf,
    /// SHA-256 of the kernel, hex.
    pub kernel_sha256: String,
    /// SHA-256 of the initramfs, hex.
    pub initrd_sha256: String,
    /// The kernel's version, for example `6.1.0-56-cloud-amd64`.
    pub kernel_version: String,
    /// Template of the root disk. Never run a machine on it.
    pub root_template: PathBuf,
    /// Template of the second disk, if one was asked for.
    pub second_template: Option<PathBuf>,
    /// How long [`GuestImage::ensure`] took.
    pub took: Duration,
    /// Whether the image was in the cache.
    pub cached: bool,
}

/// One run's own disks, raw images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDisks {
    /// `/dev/vda` of the guest.
    pub root: PathBuf,
    /// `/dev/vdb` of the guest.
    pub second: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
struct Stamp {
    kernel_sha256: String,
    initrd_sha256: String,
    kernel_version: String,
}

/// How many builds stay in the cache; each is about 120 MiB on disk.
const BUILDS_KEPT: usize = 4;
/// What the packages, the service and the file system's own tables take of the root disk.
const SYSTEM_BYTES: u64 = 160 << 20;

impl GuestImage {
    /// Gives the image that `spec` describes, building it if its inputs have changed.
    ///
    /// # Errors
    /// Packages cannot be fetched, a tool is missing, or the disk is too small. The text names the remedy.
    pub fn ensure(spec: &ImageSpec) -> Result<Self> {
        ensure!(cfg!(target_arch = "x86_64"), "The laboratory's guest is built for amd64 only");
        let needed = SYSTEM_BYTES + spec.dirt_bytes;
        ensure!(spec.disk_bytes >= needed, "The root disk needs at least {} MiB", needed >> 20);
        let started = Instant::now();
        fs::create_dir_all(&spec.cache)?;
        let lock = File::create(spec.cache.join("lock"))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .context("Cannot lock the image cache")?;
        let packages = packages::fetch(&spec.cache.join("packages"))?;
        let images = spec.cache.join("images");
        let folder = images.join(key(spec, &packages)?);
        let cached = folder.join("stamp.json").is_file();
        if !cached {
            build(spec, &packages, &folder)?;
            remove_old(&images)?;
        }
        // A used build counts as young, so that the clean-up takes others first.
        File::open(folder.join("stamp.json"))?.set_modified(std::time::SystemTime::now())?;
        Self::open(&folder, spec, started.elapsed(), cached)
    }

    /// Copies the disk templates into `folder` for one run: `root.img` and `second.img`.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn copy_disks(&self, folder: &Path) -> Result<GuestDisks> {
        let root = folder.join("root.img");
        disk::copy(&self.root_template, &root)?;
        let second = self.second_template.as_ref().map(|template| {
            let path = folder.join("second.img");
            disk::copy(template, &path).map(|()| path)
        });
        Ok(GuestDisks { root, second: second.transpose()? })
    }

    fn open(folder: &Path, spec: &ImageSpec, took: Duration, cached: bool) -> Result<Self> {
        let stamp: Stamp = serde_json::from_slice(&fs::read(folder.join("stamp.json"))?)?;
        Ok(Self {
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd.img"),
            kernel_sha256: stamp.kernel_sha256,
            initrd_sha256: stamp.initrd_sha256,
            kernel_version: stamp.kernel_version,
            root_template: folder.join("root.img"),
            second_template: spec.second_disk_bytes.map(|_| folder.join("second.img")),
            took,
            cached,
        })
    }
}

fn build(spec: &ImageSpec, packages: &packages::Packages, folder: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(&spec.cache)?;
    let mut unpacked = Vec::new();
    for (name, file) in packages {
        let target = work.path().join("packages").join(name);
        packages::unpack(file, &target)?;
        if !name.starts_with("linux-image-") {
            unpacked.push(target);
        }
    }
    let kernel_package = packages::starting_with(packages, "linux-image-").map(package_name)?;
    let kernel_tree = work.path().join("packages").join(kernel_package);
    let out = work.path().join("out");
    fs::create_dir_all(&out)?;
    let (kernel_version, kernel) = find_kernel(&kernel_tree)?;
    fs::copy(&kernel, out.join("vmlinuz"))?;
    let module_folder = [&kernel_tree.join("lib/modules"), &kernel_tree.join("usr/lib/modules")]
        .into_iter()
        .map(|path| path.join(&kernel_version))
        .find(|path| path.is_dir())
        .context("The kernel package carries no modules")?;
    let loaded =
        modules::closure(&module_folder, &initramfs::REQUIRED_MODULES, &initramfs::OPTIONAL_MODULES)?;
    let tree = work.path().join("tree");
    fs::create_dir_all(&tree)?;
    tree::compose(&tree, &unpacked, &spec.agent, spec.dirt_bytes)?;
    let initrd = initramfs::compose(&fs::read(tree.join("usr/bin/busybox"))?, &loaded)?;
    fs::write(out.join("initrd.img"), &initrd)?;
    disk::format(&out.join("root.img"), spec.disk_bytes, "lab-root", &tree)?;
    if let Some(bytes) = spec.second_disk_bytes {
        let empty = work.path().join("empty");
        fs::create_dir_all(&empty)?;
        disk::format(&out.join("second.img"), bytes, "lab-second", &empty)?;
    }
    let stamp = Stamp {
        kernel_sha256: sha256_file(&out.join("vmlinuz"))?,
        initrd_sha256: hex::encode(Sha256::digest(&initrd)),
        kernel_version,
    };
    fs::write(out.join("stamp.json"), serde_json::to_vec_pretty(&stamp)?)?;
    // The rename is the moment the build counts: a half-built one stays in the temporary folder and goes with it.
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder.parent().context("The cache folder has no parent")?)?;
    fs::rename(&out, folder).context("Cannot move the finished image into the cache")
}

fn package_name(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.split('_').next().unwrap_or_default().to_owned()
}

fn find_kernel(tree: &Path) -> Result<(String, PathBuf)> {
    for entry in fs::read_dir(tree.join("boot")).context("The kernel package has no /boot")? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(version) = name.strip_prefix("vmlinuz-") {
            return Ok((version.to_owned(), path));
        }
    }
    anyhow::bail!("The kernel package carries no vmlinuz")
}

fn key(spec: &ImageSpec, packages: &packages::Packages) -> Result<String> {
    let mut hash = Sha256::new();
    let sizes = [spec.disk_bytes, spec.second_disk_bytes.unwrap_or(0), spec.dirt_bytes];
    for size in sizes {
        hash.update(size.to_le_bytes());
    }
    for path in packages.values() {
        hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        hash.update(fs::metadata(path)?.len().to_le_bytes());
    }
    for text in tree::fixed_inputs() {
        hash.update(text.as_bytes());
    }
    hash.update(include_bytes!("files/initramfs-init"));
    // The tools that build the image are an input too, as far as this program is them.
    for source in [
        include_str!("image.rs"),
        include_str!("tree.rs"),
        include_str!("initramfs.rs"),
        include_str!("disk.rs"),
    ] {
        hash.update(source.as_bytes());
    }
    hash.update(
        sha256_file(&spec.agent).context("Build the guest's service first: cargo build --bin guest-agent")?,
    );
    Ok(hex::encode(&hash.finalize()[..12]))
}

/// SHA-256 of a file's content, hex.
///
/// # Errors
/// The file cannot be read.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("Cannot read {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex::encode(hash.finalize()));
        }
        hash.update(&buffer[..count]);
    }
}

fn remove_old(images: &Path) -> Result<()> {
    let mut builds: Vec<_> = fs::read_dir(images)?
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let used = fs::metadata(path.join("stamp.json")).ok()?.modified().ok()?;
            Some((used, path))
        })
        .collect();
    builds.sort();
    let surplus = builds.len().saturating_sub(BUILDS_KEPT);
    for (_, path) in builds.into_iter().take(surplus) {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}
