//! Composes the initramfs: busybox, the modules that a virtio machine needs, and a script that mounts the root disk.
//!
//! The archive is not compressed: the kernel unpacks it faster under TCG, and it is small.

use anyhow::Result;

use super::cpio::Archive;
use super::modules::Module;

/// Needed by every guest.
pub const REQUIRED_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_net", "ext4"];
/// Loaded where the kernel has them: entropy, the power button, the machine's balloon.
pub const OPTIONAL_MODULES: [&str; 5] = ["virtio_rng", "virtio_balloon", "button", "evdev", "crc32c_generic"];

const INIT: &str = include_str!("files/initramfs-init");

/// The initramfs as an uncompressed cpio archive.
///
/// # Errors
/// None today; an archive that would not fit the format's 32-bit sizes would be one.
pub fn compose(busybox: &[u8], modules: &[Module]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for folder in ["bin", "dev", "proc", "sys", "modules", "root"] {
        archive.folder(folder);
    }
    archive.character_device("dev/console", 5, 1);
    archive.character_device("dev/null", 1, 3);
    archive.file("bin/busybox", 0o755, busybox);
    archive.link("bin/sh", "busybox");
    let mut order = String::new();
    for module in modules {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.content);
        order.push_str(&module.name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    Ok(archive.finish())
}
