//! Which accelerator guests of this host run with, found out by trying.
//!
//! That `/dev/kvm` opens proves nothing: nested and restricted hosts have one on which no ordinary guest
//! gets through its boot. So a tiny guest goes the way that every guest goes (firmware, real mode,
//! paging, long mode, a loop) and must report within a limit. It touches nothing but its own memory.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// What the operator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    /// KVM where a guest really runs with it, else TCG.
    #[default]
    Auto,
    /// Emulation, always.
    Tcg,
    /// KVM, without trying.
    Kvm,
}

/// What guests run with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Emulation by QEMU.
    Tcg,
    /// The processor itself.
    Kvm,
}

impl Accelerator {
    /// QEMU's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }
}

/// Enters long mode on an identity map of 2 MiB, counts 50 million down, writes 0x2a to port 0x501.
///
/// ```text
/// .code16  cli; ds = es = 0; edi = 0x1000; ecx = 0xc00; eax = 0; rep stosd        three empty tables
///          [0x1000] = 0x2003; [0x2000] = 0x3003; [0x3000] = 0x83                 one page of 2 MiB
///          cr4 = 0xa0 (PAE, PGE); cr3 = 0x1000; EFER |= LME; lgdt
///          cr0 |= 0x80000001 (PG, PE); ljmp 8:long
/// .code64  long: ecx = 50000000; 1: dec ecx; jnz 1b; dx = 0x501; al = 0x2a; out dx, al; hlt
/// ```
const TINY_GUEST: [u8; 142] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x66, 0xbf, 0x00, 0x10, 0x00, 0x00, 0x66, 0xb9, 0x00, 0x0c,
    0x00, 0x00, 0x66, 0x31, 0xc0, 0xfc, 0x67, 0x66, 0xf3, 0xab, 0xc7, 0x06, 0x00, 0x10, 0x03, 0x20, 0xc7,
    0x06, 0x00, 0x20, 0x03, 0x30, 0xc7, 0x06, 0x00, 0x30, 0x83, 0x00, 0x66, 0xb8, 0xa0, 0x00, 0x00, 0x00,
    0x0f, 0x22, 0xe0, 0x66, 0xb8, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8, 0x66, 0xb9, 0x80, 0x00, 0x00,
    0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x01, 0x0f, 0x30, 0x0f, 0x01, 0x16, 0x88, 0x7c, 0x0f, 0x20, 0xc0, 0x66,
    0x0d, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, 0xea, 0x62, 0x7c, 0x08, 0x00, 0xb9, 0x80, 0xf0, 0xfa,
    0x02, 0xff, 0xc9, 0x75, 0xfc, 0x66, 0xba, 0x01, 0x05, 0xb0, 0x2a, 0xee, 0xf4, 0x0f, 0x1f, 0x44, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x9a, 0x20, 0x00,
    0x0f, 0x00, 0x78, 0x7c, 0x00, 0x00,
];

/// What QEMU exits with when the tiny guest has reported (`isa-debug-exit`: twice the value, plus one).
const REPORTED: i32 = (0x2a << 1) | 1;

/// The accelerator for `choice`, trying KVM with a guest in `dir` for at most `limit`.
pub(super) async fn choose(
    choice: AcceleratorChoice,
    qemu: &Path,
    dir: &Path,
    limit: Duration,
) -> Accelerator {
    match choice {
        AcceleratorChoice::Tcg => Accelerator::Tcg,
        AcceleratorChoice::Kvm => Accelerator::Kvm,
        AcceleratorChoice::Auto if !Path::new("/dev/kvm").exists() => Accelerator::Tcg,
        AcceleratorChoice::Auto => match runs_a_guest(Accelerator::Kvm, qemu, dir, limit).await {
            Ok(true) => Accelerator::Kvm,
            Ok(false) => {
                tracing::warn!("KVM is there but runs no guest; guests are emulated");
                Accelerator::Tcg
            }
            Err(error) => {
                tracing::warn!(%error, "KVM could not be tried; guests are emulated");
                Accelerator::Tcg
            }
        },
    }
}

/// Whether a guest gets through its boot with `accelerator` within `limit`.
pub(super) async fn runs_a_guest(
    accelerator: Accelerator,
    qemu: &Path,
    dir: &Path,
    limit: Duration,
) -> io::Result<bool> {
    let image = BootSector::write(dir.join(format!("try-{}.img", accelerator.as_str())))?;
    let drive = serde_json::json!({ "driver": "raw", "node-name": "boot", "file": { "driver": "file", "filename": image.0 } });
    let mut child = Command::new(qemu)
        .args(["-M", &format!("pc,accel={}", accelerator.as_str()), "-cpu", "qemu64,enforce", "-m", "32M"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=1"])
        .args(["-blockdev", &drive.to_string(), "-device", "ide-hd,drive=boot"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    match tokio::time::timeout(limit, child.wait()).await {
        Ok(status) => Ok(status?.code() == Some(REPORTED)),
        Err(_) => {
            child.kill().await?;
            Ok(false)
        }
    }
}

/// A disk with nothing but its first sector, removed when it is dropped.
struct BootSector(PathBuf);

impl BootSector {
    fn write(path: PathBuf) -> io::Result<Self> {
        let mut sector = [0; 512];
        sector[..TINY_GUEST.len()].copy_from_slice(&TINY_GUEST);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(&path, sector)?;
        // SeaBIOS boots from no disk as small as one sector.
        std::fs::File::options().write(true).open(&path)?.set_len(1 << 20)?;
        Ok(Self(path))
    }
}

impl Drop for BootSector {
    fn drop(&mut self) {
        // A leftover of one sector is harmless and overwritten the next time.
        let _ = std::fs::remove_file(&self.0);
    }
}
