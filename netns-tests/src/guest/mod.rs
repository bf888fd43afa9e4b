//! The laboratory's guest: Debian's cloud kernel, an initramfs and a root disk with a real web server.
//!
//! Everything is made from extracted packages, without installing, mounting or downloading an image, and works
//! without root. Kernel, initramfs and a template of each disk are cached under a hash of their inputs; every run
//! gets its own sparse copy of the disks. Does not start QEMU: the caller passes these files to whoever does.
//!
//! ```text
//! packages ──▶ tree ──▶ disk (mke2fs -d)   ──▶ template ──▶ copy per run
//!    │            ▲
//!    ├──▶ kernel, modules ──▶ initramfs (cpio)
//!    └──▶ busybox, nginx, libc   + guest-agent
//! ```

pub mod boot;
pub mod cpio;
pub mod disk;
pub mod image;
pub mod initramfs;
pub mod modules;
pub mod packages;
pub mod tree;
pub mod verify;

pub use boot::{BootOptions, Nic, READY};
pub use image::{GuestDisks, GuestImage, ImageSpec};
