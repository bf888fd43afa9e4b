//! The source's side: a UNIX socket that QEMU migrates into, and the handle by which it is governed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul_core::units::Bytes;
use longhaul_core::wan::{EncoderConfig, Remembered, StreamEnd};
use tokio::net::UnixListener;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::SourceProgress;
use super::pump::Pump;
use crate::chunk::{ChunkSend, MAX_CHUNK};
use crate::naming::NamedBy;

/// How a source reads and packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceConfig {
    /// How much is read at once. Default 128 KiB: small enough that QEMU feels a slow link at once; less
    /// costs system calls.
    pub read_buffer: Bytes,
    /// When QEMU has written nothing for this long, what is gathered is sent. Default 2 ms; longer makes
    /// fuller chunks and a later last byte when QEMU pauses.
    pub linger: Duration,
    /// What is gathered is sent after this long even if QEMU keeps trickling. Default 50 ms.
    pub gather_limit: Duration,
    /// How many bytes may be on their way while QEMU must not wait. Beyond it QEMU waits after all, its
    /// monitor with it, so that this gateway's memory stays bounded. Default 1 GiB.
    pub absorb_limit: Bytes,
    /// How long to wait for QEMU to connect. Default 30 s.
    pub accept_deadline: Duration,
    /// How long QEMU is kept waiting before the first byte is read. Default 150 ms. QEMU 7.2 first measures
    /// its bandwidth after 100 ms (`migration_update_counters`) and until then takes any first pass for the
    /// last: a small guest would be stopped with everything still dirty. Costs nothing: the guest runs.
    pub first_read_after: Duration,
    /// The longest chunk while QEMU must not wait, in bytes. Default 64 KiB, a twentieth of a second at 10 Mbit/s: a chunk is
    /// acknowledged whole, and a machine is given away when what is not acknowledged is on its way. Shorter ones pack worse.
    pub chunk_in_pause: usize,
    /// How the stream is packed.
    pub encoder: EncoderConfig,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            read_buffer: Bytes(128 << 10),
            linger: Duration::from_millis(2),
            gather_limit: Duration::from_millis(50),
            absorb_limit: Bytes::mib(1024),
            accept_deadline: Duration::from_secs(30),
            first_read_after: Duration::from_millis(150),
            chunk_in_pause: 64 << 10,
            encoder: EncoderConfig::for_chunks_of(MAX_CHUNK),
        }
    }
}

/// Whether QEMU may be made to wait, or has to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceMode {
    /// The guest runs: a full channel slows QEMU down, so that it sees what the link really carries.
    Streaming,
    /// The guest runs, and the link is needed for something else: nothing more is read, so that QEMU waits. What is read
    /// already goes out. Device state is read in spite of it.
    Held,
    /// The guest is about to be stopped: what QEMU writes first is read, by which it is seen to be awake, and nothing more.
    /// QEMU has written at most that and what a socket holds when it waits.
    Listening,
    /// The guest is stopped, or about to be: QEMU's writes are taken at once, up to
    /// [`SourceConfig::absorb_limit`]; a reader that stalled now would hang its monitor.
    Absorb,
}

/// Why a source did not get the whole stream out.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The socket cannot be made.
    #[error("Cannot listen on {path}: is its directory there and writable?")]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// zstd has no memory for its state.
    #[error("Cannot start compressing the memory stream: is this host out of memory?")]
    Encoder(#[source] io::Error),
    /// QEMU did not connect in time.
    #[error("QEMU did not connect to its migration socket within {0:?}: ask query-migrate why")]
    NotConnected(Duration),
    /// The socket failed.
    #[error("Reading QEMU's migration stream failed after {0}")]
    Read(Bytes, #[source] io::Error),
    /// QEMU closed the socket before the memory was complete; no end was sent, the destination loads nothing.
    #[error(
        "QEMU ended its migration stream after {0}, before the memory was complete: ask query-migrate why"
    )]
    Truncated(Bytes),
    /// The bulk channel was closed; QEMU's socket is closed, too, so that its migration fails.
    #[error("The bulk channel was closed after {0} of the memory stream")]
    ChannelClosed(Bytes),
    /// The source was aborted, or its end has been told already.
    #[error("The memory transfer was aborted")]
    Aborted,
}

/// A socket that waits for QEMU. Dropping it removes the socket.
#[derive(Debug)]
pub struct MemorySource {
    pub(super) listener: UnixListener,
    pub(super) path: SocketPath,
    pub(super) config: SourceConfig,
    pub(super) base: Option<Remembered>,
    pub(super) named_by: Option<NamedBy>,
}

/// Removes the socket's name when it is no longer listened on.
#[derive(Debug)]
pub(super) struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        // Its directory may be gone already; nothing depends on the name.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl MemorySource {
    /// Listens on `path`, replacing a socket that a crash left there. QEMU may be told to migrate as soon
    /// as this returns; give the socket's owner before, if QEMU runs as another user. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`SourceError::Bind`].
    pub fn bind(path: &Path, config: SourceConfig) -> Result<Self, SourceError> {
        let failed = |source| SourceError::Bind { path: path.to_owned(), source };
        remove_stale(path).map_err(failed)?;
        let listener = UnixListener::bind(path).map_err(failed)?;
        Ok(Self { listener, path: SocketPath(path.to_owned()), config, base: None, named_by: None })
    }

    /// Both sites remember this of the machine.
    pub fn with_base(self, base: Option<Remembered>) -> Self {
        Self { base, ..self }
    }

    /// Pages are named by what the machine's disks gave.
    pub fn with_disks(self, named_by: NamedBy) -> Self {
        Self { named_by: Some(named_by), ..self }
    }

    /// Takes QEMU's one connection and carries its stream to `channel`.
    pub fn start<S: ChunkSend>(self, channel: S) -> SourceHandle {
        let (mode, mode_seen) = watch::channel(SourceMode::Streaming);
        let (progress, progress_seen) = watch::channel(SourceProgress::new());
        let (woke, woke_seen) = watch::channel(None);
        let (end, ended) = oneshot::channel();
        tokio::spawn(Pump::run(self, channel, mode_seen, (progress, woke), end));
        SourceHandle { mode, progress: progress_seen, woke: woke_seen, ended: Some(ended), remembered: None }
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path),
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Governs a running source. Dropping it aborts: QEMU's socket is closed and its migration fails.
#[derive(Debug)]
pub struct SourceHandle {
    mode: watch::Sender<SourceMode>,
    progress: watch::Receiver<SourceProgress>,
    woke: watch::Receiver<Option<Instant>>,
    ended: Option<oneshot::Receiver<Result<(StreamEnd, Remembered), SourceError>>>,
    remembered: Option<Remembered>,
}

impl SourceHandle {
    /// Says whether QEMU may be made to wait, or has to. Switch to [`SourceMode::Absorb`] before `stop` is sent. The
    /// source does so itself when the memory is complete.
    pub fn set_mode(&self, mode: SourceMode) {
        self.mode.send_if_modified(|last| std::mem::replace(last, mode) != mode);
    }

    /// Where the transfer stands, renewed every 100 ms and at the end.
    pub fn progress(&self) -> watch::Receiver<SourceProgress> {
        self.progress.clone()
    }

    /// Waits until QEMU begins to write after a silence, or writes its first in [`SourceMode::Listening`], later than this is
    /// called; or is done.
    pub fn wakes(&self) -> impl Future<Output = ()> + use<> {
        let mut woke = self.woke.clone();
        woke.mark_unchanged();
        async move {
            // A pump that has ended reads nothing more.
            let _ = woke.changed().await;
        }
    }

    /// When QEMU last began to write after a silence.
    pub fn woke(&self) -> Option<Instant> {
        *self.woke.borrow()
    }

    /// Waits until QEMU has closed its side and all of it, the proof included, was handed to the channel.
    /// Cancel-safe; tells the end once. The channel stays open until the handle is dropped.
    ///
    /// # Errors
    ///
    /// When the stream did not get through; [`SourceError::Aborted`] when called again.
    pub async fn ended(&mut self) -> Result<StreamEnd, SourceError> {
        let Some(ended) = self.ended.as_mut() else { return Err(SourceError::Aborted) };
        let end = ended.await;
        self.ended = None;
        let (end, remembered) = end.unwrap_or(Err(SourceError::Aborted))?;
        self.remembered = Some(remembered);
        Ok(end)
    }

    /// What both sites remember of the machine, after the end; once.
    pub fn take_remembered(&mut self) -> Option<Remembered> {
        self.remembered.take()
    }

    /// Closes the socket to QEMU and the channel.
    pub fn abort(self) {}
}
