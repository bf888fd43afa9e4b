//! Kernel switches under `/proc/sys`, named by path because device names may contain dots.
//!
//! Written through `/proc/sys` and not through netlink: a unit that runs the gateway must not set
//! `ProtectKernelTunables=yes`. Which ones are written, and why, stands in `plan`.

use std::io;

use super::error::TunnelError;

/// What `key` (such as `net/ipv4/conf/br0/forwarding`) says now; `None` if this kernel has no such key.
pub(super) fn read(key: &str) -> Result<Option<String>, TunnelError> {
    match std::fs::read_to_string(path(key)) {
        Ok(value) => Ok(Some(value.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TunnelError::io(format!("read sysctl {key}"))(error)),
    }
}

/// Sets `key`; a key that has gone with its device is no error.
pub(super) fn write(key: &str, value: &str) -> Result<(), TunnelError> {
    match std::fs::write(path(key), value) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(TunnelError::io(format!("set sysctl {key} to {value}; is /proc/sys writable?"))(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn path(key: &str) -> String {
    format!("/proc/sys/{key}")
}
