//! The TUN device: opened with virtio-net headers, so that the kernel hands over super-packets and takes
//! them, and leaves checksums to whoever sends a packet on. What they mean is the core's business.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use longhaul_core::tunnel::coalesce::{MAX_JOINED, Train};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::debug;

use super::config::TunnelConfig;
use super::error::TunnelError;

/// What we finish for the kernel (`linux/if_tun.h`): checksums, TCP segments, those with ECN.
const TCP_OFFLOADS: libc::c_uint = 0x01 | 0x02 | 0x04 | 0x08;
/// And, from Linux 6.2, UDP datagrams of one length.
const UDP_OFFLOADS: libc::c_uint = 0x20 | 0x40;

/// A device that is taken away is an error and no more: whoever waited for packets alone would wait for ever.
const WAKES: Interest = Interest::READABLE.add(Interest::ERROR);

nix::ioctl_write_int_bad!(
    /// Says which unfinished packets the program behind the device takes.
    set_offloads,
    libc::TUNSETOFFLOAD
);

/// The open device.
pub(super) struct TunDevice {
    device: AsyncFd<Open>,
    takes_udp: bool,
}

struct Open(tun::Device);

impl AsRawFd for Open {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Open {
    #[allow(unsafe_code)]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device is open as long as `self` lives, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl TunDevice {
    /// Opens the device, not yet up.
    pub fn open(config: &TunnelConfig) -> Result<Self, TunnelError> {
        let failed = |source| TunnelError::Device { name: config.device.clone(), source };
        let mut configuration = tun::Configuration::default();
        configuration.tun_name(&config.device).mtu(config.mtu);
        configuration.platform_config(|platform| {
            platform.vnet_hdr(true);
        });
        let mut device = tun::create(&configuration).map_err(failed)?;
        if config.persistent {
            device.persist().map_err(failed)?;
        }
        let opened = device.set_nonblock().and_then(|()| {
            let takes_udp = offer(&device)?;
            debug!(device = config.device, takes_udp, "tunnel device is open with offloads");
            Ok(Self { device: register(device)?, takes_udp })
        });
        opened.map_err(|error| failed(error.into()))
    }

    /// Whether the kernel takes UDP super-packets.
    pub fn takes_udp(&self) -> bool {
        self.takes_udp
    }

    /// Waits for a packet and reads it with its header. Cancel-safe.
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.device.ready(WAKES).await?;
            if let Ok(read) = ready.try_io(|_| self.read(buffer)) {
                return read;
            }
        }
    }

    /// Reads a packet with its header, if there is one now.
    pub fn try_recv(&self, buffer: &mut [u8]) -> Option<usize> {
        self.read(buffer).ok().filter(|len| *len > 0)
    }

    /// Writes packets that were joined, without copying them together.
    pub fn send(&self, train: &Train) -> io::Result<()> {
        train.write(|head, data, rest| {
            let mut pieces = [IoSlice::new(&[]); MAX_JOINED + 1];
            pieces[0] = IoSlice::new(head);
            pieces[1] = IoSlice::new(data);
            for (piece, bytes) in pieces[2..].iter_mut().zip(rest) {
                *piece = IoSlice::new(bytes);
            }
            self.write(&pieces[..2 + rest.len()])
        })
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::read(self.device.get_ref(), buffer) {
                Err(nix::Error::EINTR) => {}
                read => return read.map_err(io::Error::from),
            }
        }
    }

    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        nix::sys::uio::writev(self.device.get_ref(), pieces).map(drop).map_err(io::Error::from)
    }
}

/// Lets the runtime watch the device.
#[allow(unsafe_code)]
fn register(device: tun::Device) -> io::Result<AsyncFd<Open>> {
    // SAFETY: the descriptor is the same as long as the device is open, and the device is closed only with the
    // `AsyncFd` that owns it.
    unsafe { AsyncFd::register_with_interest(Open(device), WAKES) }.map_err(io::Error::from)
}

/// Offers the kernel what we finish for it; says whether it knows UDP super-packets.
#[allow(unsafe_code)]
fn offer(device: &tun::Device) -> io::Result<bool> {
    let with_udp = (TCP_OFFLOADS | UDP_OFFLOADS) as libc::c_int;
    // SAFETY: the descriptor is open, and the call takes a plain number.
    if unsafe { set_offloads(device.as_raw_fd(), with_udp) }.is_ok() {
        return Ok(true);
    }
    // SAFETY: as above.
    unsafe { set_offloads(device.as_raw_fd(), TCP_OFFLOADS as libc::c_int) }?;
    Ok(false)
}
