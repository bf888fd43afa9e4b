//! One task per disk at the destination that tells the source what the disk holds already, as hashes.
//!
//! ```text
//!  NbdClient, Base ◀──reads── block hashes ──map chunks──▶ ChunkSend
//! ```
//!
//! It reads while the mirror writes: what it says of a block that is being written is out of date when it
//! arrives, and the source knows that. A disk that cannot be read is told of no further, which costs
//! only that it is copied anew. Nothing is trusted that is told here, see [`longhaul_core::disk`].

use std::path::PathBuf;

use longhaul_core::disk::{BLOCK, Content, MapWriter, ReadRun};
use tokio::task::JoinHandle;

use super::base::Base;
use super::nbd::{NbdClient, NbdError};
use super::source::{READ_UNIT, read_run};
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
    Sync(#[source] std::io::Error),
    #[error("Copy beside it cannot be read")]
    Base(#[from] std::io::Error),
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

    /// Tells what can be put from a kept copy or a template onto a disk that was made just now.
    pub fn of_copy_beside_new_disk<C: ChunkSend>(base: Base, channel: C) -> Self {
        let map = MapWriter::of_copy_beside_new_disk(base.size(), rand::random());
        Self { task: tokio::spawn(say_failure(Telling { map, channel }.tell_copy(base))) }
    }

    /// Tells what a disk holds that was kept from an earlier attempt, and where it holds nothing, what `base` does.
    /// `image` is its file, `disk` QEMU's export of it.
    pub fn of_kept_disk<C: ChunkSend>(
        image: PathBuf,
        disk: NbdClient,
        base: Option<Base>,
        channel: C,
    ) -> Self {
        let map = MapWriter::new(disk.size(), rand::random());
        Self { task: tokio::spawn(say_failure(Telling { map, channel }.tell(image, disk, base))) }
    }
}

impl Drop for DiskMap {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn say_failure(telling: impl Future<Output = Result<(), Failed>>) {
    match telling.await {
        Ok(()) | Err(Failed::Channel(_)) => {}
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, cause, "what is here of a disk cannot be told, it is copied anew");
        }
    }
}

struct Telling<C> {
    map: MapWriter,
    channel: C,
}

impl<C: ChunkSend> Telling<C> {
    async fn tell_copy(mut self, base: Base) -> Result<(), Failed> {
        let size = base.size();
        self.tell_range(Some(&base), 0, size).await
    }

    async fn tell(mut self, image: PathBuf, disk: NbdClient, base: Option<Base>) -> Result<(), Failed> {
        // QEMU flushes what it wrote itself; what is only read must be durable before it counts.
        let synced = tokio::task::spawn_blocking(move || std::fs::File::open(image)?.sync_all()).await;
        synced.unwrap_or_else(|panicked| Err(std::io::Error::other(panicked))).map_err(Failed::Sync)?;
        while let Some(block) = self.map.next() {
            let mut at = block * BLOCK;
            let run = ReadRun { offset: at, len: RUN.min(disk.size() - at) };
            for part in read_run(&disk, run).await? {
                match &part {
                    Content::Zero(len) => self.tell_range(base.as_ref(), at, at + len).await?,
                    Content::Data(data) => {
                        for content in data.chunks(BLOCK as usize) {
                            self.map.tell(content);
                        }
                    }
                }
                at += part.len();
            }
            self.send_if_due().await?;
        }
        Ok(())
    }

    /// Tells what the copy holds of whole blocks of the disk.
    async fn tell_range(&mut self, base: Option<&Base>, start: u64, end: u64) -> Result<(), Failed> {
        let mut at = start;
        while at < end {
            let data = base.map_or(Ok(end), |base| base.next_data(at))?.min(end);
            let empty = if data == end { (end - at).div_ceil(BLOCK) } else { (data - at) / BLOCK };
            self.map.skip(empty);
            at += empty * BLOCK;
            if let Some(base) = base.filter(|_| at < end) {
                let len = READ_UNIT.min(end - at);
                for content in base.read(at, len as u32).await?.chunks(BLOCK as usize) {
                    match content.iter().all(|byte| *byte == 0) {
                        true => self.map.skip(1),
                        false => self.map.tell(content),
                    }
                }
                at += len;
            }
            self.send_if_due().await?;
        }
        Ok(())
    }

    async fn send_if_due(&mut self) -> Result<(), ChunkClosed> {
        if self.map.is_due() {
            self.channel.send(self.map.finish()).await?;
        }
        Ok(())
    }
}
