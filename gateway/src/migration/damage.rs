//! What the destination says when a machine's disks or memory did not come whole. Damaged is only what is not what was sent:
//! that passes when it is sent again. What this host could not do with it is said by its own name. Nothing is undone here.

use std::path::Path;

use longhaul_core::disk::TargetError;
use longhaul_core::ids::{DeviceName, SiteName};
use longhaul_core::migration::message::Refusal;
use longhaul_core::units::Bytes;
use nix::errno::Errno;

use super::chain;
use crate::disk::DiskTargetError;
use crate::disk::nbd::NbdError;
use crate::memory::MemoryEnd;

/// Why this disk of `size` bytes, which is to lie in `pool`, did not come to `site`.
pub(super) fn of_disk(
    site: &SiteName,
    pool: &Path,
    (disk, size): (&DeviceName, Bytes),
    error: &DiskTargetError,
) -> Refusal {
    let text = || Refusal::text(format!("disk {disk}: {}", chain(error)));
    let failed = || Refusal::Other(Refusal::text(format!("Site {site} cannot receive {}", text())));
    match error {
        DiskTargetError::Records(
            TargetError::Chunk(_)
            | TargetError::Number { .. }
            | TargetError::Damaged { .. }
            | TargetError::Differs { .. }
            | TargetError::Count { .. }
            | TargetError::Digest { .. },
        ) => Refusal::Verification(text()),
        DiskTargetError::Records(
            TargetError::Bounds { .. } | TargetError::Block { .. } | TargetError::Part { .. },
        ) => Refusal::PeerMisbehaved(text()),
        DiskTargetError::Write(error) if is_full(error) => Refusal::NotEnough {
            what: format!("space in the pool of site {site} for disk {disk}"),
            wanted: size.to_string(),
            available: free(pool),
        },
        DiskTargetError::Write(_)
        | DiskTargetError::Export { .. }
        | DiskTargetError::Unproven
        | DiskTargetError::Ended => failed(),
    }
}

/// Why memory did not come to `site`; these are the machine's disks, by which its pages may be named.
pub(super) fn of_memory(site: &SiteName, disks: &[DeviceName], end: &MemoryEnd) -> Refusal {
    let text = || Refusal::text(format!("memory: {}", chain(end)));
    let failed = |text: String| Refusal::Other(Refusal::text(format!("Site {site} cannot receive {text}")));
    match end {
        MemoryEnd::Mismatch(_) => Refusal::Verification(text()),
        MemoryEnd::QemuClosed { .. } | MemoryEnd::Unreachable { .. } => Refusal::Hypervisor(text()),
        MemoryEnd::Disk { disk, source } => match disks.get(usize::from(*disk)) {
            Some(name) => {
                failed(format!("memory: QEMU does not read disk {name}, by which pages are named: {source}"))
            }
            None => failed(text()),
        },
        MemoryEnd::Proven(_)
        | MemoryEnd::ChannelClosed { .. }
        | MemoryEnd::Decoder(_)
        | MemoryEnd::Aborted => failed(text()),
    }
}

fn is_full(error: &NbdError) -> bool {
    let full = [Errno::ENOSPC, Errno::EDQUOT].map(|errno| errno as u32);
    matches!(error, NbdError::Request { errno, .. } if full.contains(errno))
}

fn free(pool: &Path) -> String {
    match nix::sys::statvfs::statvfs(pool) {
        Ok(space) => Bytes(space.blocks_available() * space.fragment_size()).to_string(),
        Err(error) => format!("an unknown amount ({error})"),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use longhaul_core::disk::ChunkError;
    use longhaul_core::proof::Proof;
    use longhaul_core::wan::{DecodeError, ToldPages};

    use super::*;

    fn of_root(error: &DiskTargetError) -> Refusal {
        let (site, disk) = ("b".parse().unwrap(), "root".parse().unwrap());
        of_disk(&site, Path::new("/"), (&disk, Bytes::mib(64)), error)
    }

    fn of_pages(end: &MemoryEnd) -> Refusal {
        of_memory(&"b".parse().unwrap(), &["root".parse().unwrap()], end)
    }

    #[test]
    fn what_is_not_what_was_sent_is_damaged_and_says_where() {
        let differs = TargetError::Differs { offset: 65536, len: 4096 };
        let damaged = TargetError::Damaged { first: 3, last: 9, range: Some((65536, 131072)) };
        let errors =
            [differs, damaged, TargetError::Digest { records: 7 }, TargetError::Chunk(ChunkError::Zstd)];
        for error in errors {
            let why = of_root(&error.into());
            let said = why.to_string();
            assert!(matches!(why, Refusal::Verification(_)), "{said}");
            assert!(said.contains("disk root") && said.contains(&chain(&error)), "{said}");
        }
        assert!(of_root(&differs.into()).to_string().contains("4096 bytes at 65536"));
        assert!(of_root(&damaged.into()).to_string().contains("bytes 65536 to 131072"));
        let bounds = TargetError::Bounds { number: 1, offset: 0, len: 2, size: 1 };
        assert!(matches!(of_root(&bounds.into()), Refusal::PeerMisbehaved(_)));
        let (start, end, pages) = (Bytes(4096), Bytes(9000), ToldPages::default());
        let made = Proof::from_bytes([0; Proof::BYTES]);
        let why = of_pages(&MemoryEnd::Mismatch(DecodeError::Damaged { start, end, pages, made }));
        let said = why.to_string();
        assert!(matches!(why, Refusal::Verification(_)) && said.contains("Bytes 4096 to 9000"), "{said}");
        let why = of_pages(&MemoryEnd::Mismatch(DecodeError::OtherBase));
        let said = why.to_string();
        assert!(matches!(why, Refusal::Verification(_)) && said.contains("not remembered here"), "{said}");
    }

    #[test]
    fn what_this_host_cannot_do_is_no_damage() {
        let request =
            |errno: Errno| NbdError::Request { command: "a write", offset: 8192, errno: errno as u32 };
        let full = of_root(&request(Errno::ENOSPC).into());
        let said = full.to_string();
        assert!(matches!(full, Refusal::NotEnough { .. }), "{said}");
        assert!(said.contains("pool of site b for disk root"), "{said}");
        for error in [request(Errno::EIO).into(), DiskTargetError::Unproven, DiskTargetError::Ended] {
            let why = of_root(&error);
            let said = why.to_string();
            assert!(matches!(why, Refusal::Other(_)) && said.contains("Site b"), "{said}");
            assert!(said.contains("disk root") && said.contains(&chain(&error)), "{said}");
        }
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        let closed = MemoryEnd::QemuClosed { written: Bytes(9), proven: false, source: broken() };
        assert!(matches!(of_pages(&closed), Refusal::Hypervisor(_)));
        let unread = of_pages(&MemoryEnd::Disk { disk: 0, source: broken() });
        let said = unread.to_string();
        assert!(matches!(unread, Refusal::Other(_)) && said.contains("disk root"), "{said}");
    }
}
