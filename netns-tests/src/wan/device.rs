//! Opens a TUN device inside a namespace, with the offloads that let super-packets through whole. Addresses and routes
//! are the caller's business.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, bail};

use crate::netns::Namespace;

/// `TUN_F_CSUM | TSO4 | TSO6 | TSO_ECN` and, from Linux 6.2, `USO4 | USO6` (`linux/if_tun.h`).
const OFFLOADS_TCP: libc::c_uint = 0x01 | 0x02 | 0x04 | 0x08;
const OFFLOADS_UDP: libc::c_uint = 0x20 | 0x40;

nix::ioctl_write_ptr_bad!(
    /// Gives a just opened `/dev/net/tun` its name and mode.
    set_interface,
    libc::TUNSETIFF,
    libc::ifreq
);
nix::ioctl_write_int_bad!(
    /// Says which unfinished packets the program behind the device accepts.
    set_offloads,
    libc::TUNSETOFFLOAD
);

/// A non-blocking TUN device `name` in `namespace`; it is gone when the file is closed.
pub(super) fn open_tun(namespace: &Namespace, name: &str) -> Result<File> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        bail!("Interface name {name:?} must have 1 to {} bytes", libc::IFNAMSIZ - 1);
    }
    let opened = namespace.run(|| open_here(name))?;
    let file = opened.with_context(|| format!("Cannot make TUN device {name} in {}", namespace.name()))?;
    namespace.ip(&[format!("link set {name} txqueuelen 20000 up")])?;
    Ok(file)
}

#[allow(unsafe_code)]
fn open_here(name: &str) -> Result<File> {
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, source) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = source as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open and `request` outlives the call, which only reads it.
    unsafe { set_interface(file.as_raw_fd(), &request) }.context("TUNSETIFF")?;
    // SAFETY: takes a plain number.
    let with_udp = unsafe { set_offloads(file.as_raw_fd(), (OFFLOADS_TCP | OFFLOADS_UDP) as libc::c_int) };
    if with_udp.is_err() {
        // SAFETY: as above; a kernel before 6.2 knows only the TCP ones.
        unsafe { set_offloads(file.as_raw_fd(), OFFLOADS_TCP as libc::c_int) }.context("TUNSETOFFLOAD")?;
    }
    Ok(file)
}
