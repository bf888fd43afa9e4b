//! Composes the tree of files that becomes the guest's root disk.
//!
//! Takes unpacked packages and merges what the guest uses of them (no documentation, no locales) into a merged-/usr
//! layout, then adds configuration, static web files and the laboratory's service. Runs nothing of what it copies,
//! but busybox's own list of its commands.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::packages::run;
use crate::agent::pattern;

/// What `GET /` answers.
pub const INDEX_HTML: &str =
    "<!doctype html><title>web1</title><h1>web1</h1><p>This machine moves while you read it.\n";
/// Path and size of a larger static file: [`pattern::Stream`] with the seed [`STATIC_SEED`].
pub const STATIC_FILE: (&str, u64) = ("/static/8m.bin", 8 << 20);
/// The seed of the static file's content.
pub const STATIC_SEED: u64 = 8;
/// Where the service keeps its state on the root disk.
pub const STATE_FOLDER: &str = "/var/lib/lab";

const SCRIPTS: [(&str, &str); 7] = [
    ("start", include_str!("files/start")),
    ("agent", include_str!("files/agent")),
    ("web", include_str!("files/web")),
    ("power", include_str!("files/power")),
    ("ready", include_str!("files/ready")),
    ("shell", include_str!("files/shell")),
    ("stop", include_str!("files/stop")),
];
const CONFIGURATION: [(&str, &str); 5] = [
    ("etc/inittab", include_str!("files/inittab")),
    ("etc/nginx/nginx.conf", include_str!("files/nginx.conf")),
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/srv/www:/bin/false\n"),
    ("etc/group", "root:x:0:\nwww-data:x:33:\n"),
    ("etc/acpi/PWRF/00000080", "#!/bin/sh\nexec poweroff\n"),
];
const FOLDERS: [&str; 17] = [
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "root",
    "etc/lab",
    "etc/nginx",
    "etc/acpi/PWRF",
    "srv/www/static",
    "srv/second",
    "var/log/nginx",
    "var/lib/nginx",
    "var/lib/lab",
    "usr/bin",
    "usr/sbin",
    "usr/lib",
];
const SKIPPED: [&str; 7] = [
    "usr/share",
    "boot",
    "etc/init.d",
    "etc/logrotate.d",
    "etc/ufw",
    "usr/lib/modules",
    "usr/lib/x86_64-linux-gnu/gconv",
];

/// All that makes up a change of the tree's content, apart from packages and the service: for the cache's hash.
#[must_use]
pub fn fixed_inputs() -> Vec<&'static str> {
    SCRIPTS.iter().chain(&CONFIGURATION).map(|(_, text)| *text).chain([INDEX_HTML]).collect()
}

/// Builds the tree below `root` from unpacked packages, with the service's binary and a file of `dirt_bytes` for it.
///
/// # Errors
/// A file cannot be read or written, or a library that a program needs is in no package.
pub fn compose(root: &Path, unpacked: &[PathBuf], agent: &Path, dirt_bytes: u64) -> Result<()> {
    for folder in FOLDERS {
        fs::create_dir_all(root.join(folder))?;
    }
    for folder in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(root.join("usr").join(folder))?;
        symlink(format!("usr/{folder}"), root.join(folder))?;
    }
    for package in unpacked {
        merge(package, Path::new(""), root)?;
    }
    busybox_commands(root)?;
    for (path, text) in CONFIGURATION {
        write(root, path, text.as_bytes(), 0o644)?;
    }
    for (name, text) in SCRIPTS {
        write(root, &format!("etc/lab/{name}"), text.as_bytes(), 0o755)?;
    }
    write(root, "etc/acpi/PWRF/00000080", CONFIGURATION[4].1.as_bytes(), 0o755)?;
    write(
        root,
        "usr/bin/guest-agent",
        &fs::read(agent).with_context(|| agent.display().to_string())?,
        0o755,
    )?;
    write(root, "srv/www/index.html", INDEX_HTML.as_bytes(), 0o644)?;
    let file = format!("srv/www{}", STATIC_FILE.0);
    write(root, &file, &pattern::stream_bytes(STATIC_SEED, STATIC_FILE.1), 0o644)?;
    crate::agent::dirt::create(&root.join(&STATE_FOLDER[1..]), dirt_bytes)?;
    open_folders(root)?;
    libraries_present(root, "usr/sbin/nginx")?;
    libraries_present(root, "usr/bin/guest-agent")
}

/// Copies what lies below `package/at` into the tree; `lib`, `bin` and the like land below `usr`.
fn merge(package: &Path, at: &Path, root: &Path) -> Result<()> {
    let folder = package.join(at);
    for entry in fs::read_dir(&folder).with_context(|| format!("Cannot list {}", folder.display()))? {
        let entry = entry?;
        let at = at.join(entry.file_name());
        let place = merged(&at);
        if SKIPPED.iter().any(|skipped| place.starts_with(skipped)) {
            continue;
        }
        let target = root.join(&place);
        let kind = entry.file_type()?;
        if kind.is_dir() {
            fs::create_dir_all(&target)?;
            merge(package, &at, root)?;
            continue;
        }
        let _ = fs::remove_file(&target);
        if kind.is_symlink() {
            symlink(fs::read_link(entry.path())?, &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

fn merged(path: &Path) -> PathBuf {
    let first = path.components().next().map(|part| part.as_os_str().to_owned()).unwrap_or_default();
    if ["bin", "sbin", "lib", "lib64"].iter().any(|name| first == **name) {
        return Path::new("usr").join(path);
    }
    path.to_path_buf()
}

fn busybox_commands(root: &Path) -> Result<()> {
    let busybox = root.join("usr/bin/busybox");
    let list =
        run(Command::new(&busybox).arg("--list-full")).context("Cannot run the guest's busybox here")?;
    for path in list.lines() {
        let target = root.join(merged(Path::new(path.trim())));
        if target.symlink_metadata().is_ok() {
            continue;
        }
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        symlink("/bin/busybox", &target)?;
    }
    for (path, target) in [("usr/sbin/init", "/bin/busybox"), ("usr/bin/sh", "/bin/busybox")] {
        let path = root.join(path);
        let _ = fs::remove_file(&path);
        symlink(target, path)?;
    }
    Ok(())
}

fn write(root: &Path, path: &str, content: &[u8], permissions: u32) -> Result<()> {
    let path = root.join(path);
    fs::write(&path, content).with_context(|| format!("Cannot write {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(permissions))?;
    Ok(())
}

/// Whatever umask the laboratory was started with must not hide folders from the guest's web server.
fn open_folders(folder: &Path) -> Result<()> {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_folders(&entry.path())?;
        }
    }
    Ok(())
}

/// Asks the tree's own loader whether it finds every library, before a guest has to find out.
fn libraries_present(root: &Path, program: &str) -> Result<()> {
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let loader = [libraries.join("ld-linux-x86-64.so.2"), root.join("usr/lib64/ld-linux-x86-64.so.2")]
        .into_iter()
        .find(|path| path.is_file())
        .context("The package libc6 carries no loader")?;
    run(Command::new(loader)
        .args(["--inhibit-cache", "--library-path"])
        .arg(&libraries)
        .arg("--list")
        .arg(root.join(program)))
    .with_context(|| format!("The guest would lack a library of {program}"))
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_move_below_usr_once() {
        assert_eq!(merged(Path::new("lib/x")), Path::new("usr/lib/x"));
        assert_eq!(merged(Path::new("usr/lib/x")), Path::new("usr/lib/x"));
        assert_eq!(merged(Path::new("etc/x")), Path::new("etc/x"));
    }
}
