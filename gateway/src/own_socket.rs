//! Connecting to a UNIX socket that a machine's QEMU has made in a folder of its own.
//!
//! Whoever broke out of a guest can put a link there that leads to another machine's socket, or to one that is open to
//! root only. The name is looked up once, nothing but a socket is taken, and that same one is connected to. What speaks
//! behind it is not looked at.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use tokio::net::UnixStream;

/// Connects to the socket at `path`, which no link may lead to.
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = (OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits();
    let found = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !found.metadata()?.file_type().is_socket() {
        let text =
            format!("{} is no socket; what runs in the machine's QEMU may have put it there", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    UnixStream::connect(format!("/proc/self/fd/{}", found.as_raw_fd())).await
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_connected_to_and_a_link_to_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, link) = (folder.path().join("nbd.sock"), folder.path().join("link.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        let (connected, accepted) = tokio::join!(connect(&socket), listener.accept());
        assert!(connected.is_ok() && accepted.is_ok());
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        assert_eq!(connect(&link).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[tokio::test]
    async fn what_is_not_there_yet_is_not_found() {
        let folder = tempfile::tempdir().unwrap();
        let missing = connect(&folder.path().join("nbd.sock")).await;
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
