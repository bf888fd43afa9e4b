//! One task per disk at the destination: it owns the [`MirrorTarget`] and writes into QEMU's export.
//!
//! ```text
//!  ChunkRecv ──chunks──▶ MirrorTarget ──steps──▶ NbdClient ─▶ QEMU
//!                             ▲──────answers───────┘
//!                             ▲──content──── Base, a kept copy of the disk or its template, if any
//! ```
//!
//! It takes the next chunk only when the last one is under way, so a slow disk holds the source back
//! through the channel. It does not decide what a proven barrier permits.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use longhaul_core::disk::{Barrier, MirrorTarget, Step, TargetConfig, TargetCounters, TargetError};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::base::Base;
use super::nbd::{NbdClient, NbdError};
use crate::chunk::ChunkRecv;
use crate::naming::NamedDisk;

/// How far one disk is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TargetProgress {
    /// What has happened so far.
    pub counters: TargetCounters,
    /// Records, from the first on, that are on the disk, be it durable or not.
    pub applied_records: u64,
    /// The barrier that is proven, if no record came after it.
    pub proven: Option<Barrier>,
}

/// Why a disk is not received. What it holds must not be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskTargetError {
    /// The source's records are not what they should be.
    #[error("The disk's records are refused")]
    Records(#[from] TargetError),
    /// Writing into QEMU's export.
    #[error("Writing the disk through QEMU's export failed")]
    Write(#[from] NbdError),
    /// The export is not fit.
    #[error("The export is not writable, cannot flush, or holds {found} bytes instead of {expected}")]
    Export {
        /// The disk's size in bytes.
        expected: u64,
        /// The export's.
        found: u64,
    },
    /// The channel closed before a barrier was proven.
    #[error("The disk's channel closed before its barrier was proven")]
    Unproven,
    /// The task is gone without a reason of its own.
    #[error("The disk's writer has ended")]
    Ended,
}

/// The handle of one disk's task. Dropping it ends the task and closes the connection to QEMU; writes
/// under way may or may not happen.
#[derive(Debug)]
pub struct DiskTarget {
    progress: watch::Receiver<TargetProgress>,
    disk: NbdClient,
    task: JoinHandle<Result<(), DiskTargetError>>,
}

impl DiskTarget {
    /// Starts the task of a disk of `size` bytes, which QEMU exports writable to `disk`. What the source says is
    /// here already is copied from `base` where that holds it.
    pub fn spawn<C: ChunkRecv>(
        size: u64,
        config: TargetConfig,
        channel: C,
        disk: NbdClient,
        base: Option<Base>,
    ) -> Result<Self, DiskTargetError> {
        if disk.is_read_only() || !disk.can_flush() || disk.size() != size {
            return Err(DiskTargetError::Export { expected: size, found: disk.size() });
        }
        let (published, progress) = watch::channel(TargetProgress::default());
        let reader = disk.clone();
        let mirror = MirrorTarget::new(size, config);
        let task = Task {
            mirror: if base.is_some() { mirror.with_base() } else { mirror },
            channel,
            open: true,
            disk,
            base,
            work: FuturesUnordered::new(),
            progress: published,
            start: Instant::now(),
        };
        Ok(Self { progress, disk: reader, task: tokio::spawn(task.run()) })
    }

    /// How far it is; the channel closes when the task ends.
    pub fn progress(&self) -> watch::Receiver<TargetProgress> {
        self.progress.clone()
    }

    /// The disk as memory reads it. Holds a connection to QEMU's export.
    pub fn named(&self) -> WrittenDisk {
        WrittenDisk { progress: self.progress.clone(), disk: self.disk.clone() }
    }

    /// Waits until the next barrier is proven: everything before it applied, durable, and digested
    /// alike. After a pause that was given up this may be the barrier of that pause: where more than one
    /// pause was tried, ask for the one that counts with [`Self::proves`].
    pub async fn proven(&mut self) -> Result<Barrier, DiskTargetError> {
        self.until_proven(|_| true).await
    }

    /// Waits until this barrier is proven, and nothing came after it. Never, if it is not the last.
    pub async fn proves(&mut self, barrier: Barrier) -> Result<(), DiskTargetError> {
        self.until_proven(|proven| proven == barrier).await.map(drop)
    }

    /// Waits until the task has ended: `Ok` when the channel was closed behind a proven barrier.
    pub async fn ended(&mut self) -> Result<(), DiskTargetError> {
        (&mut self.task).await.unwrap_or(Err(DiskTargetError::Ended))
    }

    async fn until_proven(&mut self, right: impl Fn(Barrier) -> bool) -> Result<Barrier, DiskTargetError> {
        let mut progress = self.progress.clone();
        let proven = progress.wait_for(|progress| progress.proven.is_some_and(&right)).await;
        match proven.ok().and_then(|progress| progress.proven) {
            Some(barrier) => Ok(barrier),
            None => Err(self.ended().await.err().unwrap_or(DiskTargetError::Ended)),
        }
    }

    /// Ends the task and waits until it has let go of the connection to QEMU.
    pub async fn close(mut self) {
        self.task.abort();
        // Aborted or ended before: either way it is gone.
        let _ = (&mut self.task).await;
    }
}

impl Drop for DiskTarget {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A disk that is being received, read while it is.
#[derive(Debug)]
pub struct WrittenDisk {
    progress: watch::Receiver<TargetProgress>,
    disk: NbdClient,
}

impl NamedDisk for WrittenDisk {
    async fn applied(&mut self, records: u64) -> io::Result<()> {
        let applied = self.progress.wait_for(|progress| progress.applied_records >= records).await;
        applied.map(drop).map_err(|_| io::Error::other(DiskTargetError::Ended))
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size()
    }

    async fn read(&self, offset: u64, len: u32) -> io::Result<Bytes> {
        self.disk.read(offset, len).await.map_err(io::Error::other)
    }
}

enum Done {
    Applied(u64),
    Hashed(u64, [u8; 32]),
    Fetched(u64, Option<(Bytes, [u8; 32])>),
    Flushed,
}

struct Task<C> {
    mirror: MirrorTarget,
    channel: C,
    open: bool,
    disk: NbdClient,
    base: Option<Base>,
    work: FuturesUnordered<BoxFuture<'static, Result<Done, NbdError>>>,
    progress: watch::Sender<TargetProgress>,
    start: Instant,
}

impl<C: ChunkRecv> Task<C> {
    async fn run(mut self) -> Result<(), DiskTargetError> {
        loop {
            while let Some(step) = self.mirror.poll_step(self.start.elapsed()) {
                self.perform(step);
            }
            self.publish();
            if !self.open && self.mirror.is_idle() {
                return self.mirror.proven().map(drop).ok_or(DiskTargetError::Unproven);
            }
            let flush_at = self.mirror.flush_at();
            let flush_time = self.start + flush_at.unwrap_or(Duration::ZERO);
            tokio::select! {
                chunk = self.channel.recv(), if self.open && self.mirror.wants_chunk() => match chunk {
                    Some(chunk) => self.mirror.handle_chunk(chunk)?,
                    None => self.open = false,
                },
                Some(done) = self.work.next(), if !self.work.is_empty() => match done? {
                    Done::Hashed(number, hash) => self.mirror.handle_hashed(number, hash)?,
                    Done::Fetched(number, fetched) => self.mirror.handle_fetched(number, fetched),
                    Done::Applied(number) => self.mirror.handle_applied(number),
                    Done::Flushed => self.mirror.handle_flushed(),
                },
                () = tokio::time::sleep_until(flush_time), if flush_at.is_some() => {}
            }
        }
    }

    fn perform(&mut self, step: Step) {
        let disk = self.disk.clone();
        match step {
            Step::Write { number, offset, data } => self.work.push(Box::pin(async move {
                disk.write(offset, data).await.map(|()| Done::Applied(number))
            })),
            Step::Zero { number, offset, len } => self.work.push(Box::pin(async move {
                disk.write_zeroes(offset, len).await.map(|()| Done::Applied(number))
            })),
            Step::Hash { number, offset, len } => self.work.push(Box::pin(async move {
                let content = disk.read(offset, len).await?;
                Ok(Done::Hashed(number, *blake3::hash(&content).as_bytes()))
            })),
            Step::Fetch { number, offset, len } => {
                let base = self.base.clone();
                self.work
                    .push(Box::pin(async move { Ok(Done::Fetched(number, fetch(base, offset, len).await)) }));
            }
            Step::Flush => {
                self.work.push(Box::pin(async move { disk.flush().await.map(|()| Done::Flushed) }));
            }
            Step::Proven(barrier) => {
                tracing::info!(records = barrier.records, "disk barrier proven");
            }
        }
    }

    fn publish(&self) {
        let (counters, proven) = (self.mirror.counters(), self.mirror.proven());
        let progress = TargetProgress { counters, applied_records: self.mirror.applied_records(), proven };
        self.progress.send_if_modified(|last| std::mem::replace(last, progress) != progress);
    }
}

/// What the base holds there; a base that cannot be read holds nothing.
async fn fetch(base: Option<Base>, offset: u64, len: u32) -> Option<(Bytes, [u8; 32])> {
    let read = base?.read_hashed(offset, len).await;
    read.inspect_err(|error| tracing::warn!(%error, offset, "the copy beside the disk could not be read"))
        .ok()
}
