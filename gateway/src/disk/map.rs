//! One task per disk at the destination that tells the source what the disk holds already, as hashes.
//!
//! ```text
//!  NbdClient ◀──reads── block hashes ──map chunks──▶ ChunkSend
//! ```
//!
//! It reads while the mirror writes: what it says of a block that is being written is out of date when it
//! arrives, and the source knows that. A disk that cannot be read is told of no further, which costs
//! only that it is copied anew. Nothing is trusted that is told here, see [`longhaul_core::disk`].

use std::path::PathBuf;

use longhaul_core::disk::{BLOCK, Content, MapWriter, ReadRun};
use tokio::task::JoinHandle;

use super::nbd::{NbdClient, NbdError};
use super::source::read_run;
use crate::chunk::{ChunkClosed, ChunkSend};

/// Largest range asked about at once where the disk is empty, in bytes.
const RUN: u64 = 64 << 20;

/// The handle of one disk's task; dropping it ends the telling.
#[derive(Debug)]
pub struct DiskMap {
    task: JoinHandle<()>,
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("Disk cannot be read")]
    Read(#[from] NbdError),
    #[error("Disk cannot be made durable")]
    Sync(#[from] std::io::Error),
    #[error(transparent)]
    Channel(#[from] ChunkClosed),
}

impl DiskMap {
    /// Tells that a disk was made just now.
    pub fn of_new_disk<C: ChunkSend>(mut channel: C) -> Self {
        let telling = async move {
            // A channel that is closed belongs to a migration that is over.
            let _ = channel.send(MapWriter::of_new_disk()).await;
        };
        Self { task: tokio::spawn(telling) }
    }

    /// Tells what a disk holds that was kept from an earlier attempt. `image` is its file, `disk` QEMU's
    /// export of it.
    pub fn of_kept_disk<C: ChunkSend>(image: PathBuf, disk: NbdClient, channel: C) -> Self {
        let telling = async move {
            match tell(image, disk, channel).await {
                Ok(()) | Err(Failed::Channel(_)) => {}
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, "what a kept disk holds cannot be told, it is copied anew");
                }
            }
        };
        Self { task: tokio::spawn(telling) }
    }
}

impl Drop for DiskMap {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn tell<C: ChunkSend>(image: PathBuf, disk: NbdClient, mut channel: C) -> Result<(), Failed> {
    // QEMU flushes what it wrote itself; what is only read must be durable before it counts.
    let synced = tokio::task::spawn_blocking(move || std::fs::File::open(image)?.sync_all()).await;
    synced.unwrap_or_else(|panicked| Err(std::io::Error::other(panicked)))?;
    let mut map = MapWriter::new(disk.size());
    while let Some(block) = map.next() {
        let offset = block * BLOCK;
        let run = ReadRun { offset, len: RUN.min(disk.size() - offset) };
        for part in read_run(&disk, run).await? {
            match part {
                Content::Zero(len) => map.skip(len.div_ceil(BLOCK)),
                Content::Data(data) => {
                    for content in data.chunks(BLOCK as usize) {
                        map.tell(blake3::hash(content).as_bytes());
                    }
                }
            }
        }
        if map.is_due() {
            channel.send(map.finish()).await?;
        }
    }
    Ok(())
}
