//! One task per disk at the source: it owns the [`MirrorSource`] and is the only one to touch it.
//!
//! ```text
//!  NbdServer ──changes──▶ ┌────────────┐ ──chunks──▶ ChunkSend
//!  NbdClient ◀──runs───── │ MirrorSource│
//!            ──content──▶ └────────────┘ ◀──begin, finish, reopen── DiskSource
//!  ChunkRecv ──map of the destination's disk──▶
//! ```
//!
//! A channel that stalls stops nothing here: changes are taken in and answered, only chunks wait. The
//! sends are cancelled and repeated, which needs what a bounded queue gives: [`ChunkSend::send`] that
//! is dropped before it is ready has queued nothing. Mirror jobs and exports are started by others, in
//! this order: mirror job, then [`DiskSource::begin`]. A read before the mirror runs could miss a write.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use longhaul_core::disk::{
    BLOCK, Barrier, Content, MirrorSource, ReadRun, SourceConfig, SourceCounters, SourceError,
};
use longhaul_core::units::Bytes as Amount;
use longhaul_core::wan::{Effort, GivenPlaces, Level};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::nbd::{Extent, GuestChange, NbdClient, NbdError, NbdExport};
use crate::chunk::{ChunkClosed, ChunkRecv, ChunkSend, MAX_CHUNK, PackingSeen};
use crate::naming::Overwriting;

/// Data read by one request of ours, in bytes.
pub(super) const READ_UNIT: u64 = 1 << 20;
/// Changes between server and task. Each holds at most one NBD request (2 MiB).
const CHANGES: usize = 8;

const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Limits of one disk's way out.
#[derive(Debug, Clone, Copy)]
pub struct DiskSourceConfig {
    /// Limits of the mirror.
    pub mirror: SourceConfig,
    /// Largest range asked about at once where the disk is empty, in bytes. More finds the end of an
    /// empty disk sooner; less sees guest writes overtake less of it.
    pub zero_run_bytes: u64,
}

impl Default for DiskSourceConfig {
    fn default() -> Self {
        Self { mirror: SourceConfig::default(), zero_run_bytes: 64 << 20 }
    }
}

/// How far one disk is. Amounts in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourceProgress {
    /// The disk's size.
    pub total_bytes: u64,
    /// Content that was queued or sent in its present state.
    pub copied_bytes: u64,
    /// Content still to be read.
    pub owed_bytes: u64,
    /// Records waiting for the channel.
    pub queued_bytes: u64,
    /// Chunks that are made and that the other end has not acknowledged.
    pub unacknowledged_bytes: u64,
    /// What has happened so far.
    pub counters: SourceCounters,
    /// How hard its content is packed.
    pub level: Level,
    /// The barrier, once sent.
    pub barrier: Option<Barrier>,
}

/// Why a disk is no longer mirrored. The guest is not affected; the attempt has to be given up.
#[derive(Debug, thiserror::Error)]
pub enum DiskSourceError {
    /// Reading from QEMU's export.
    #[error("Reading the disk from QEMU's export failed")]
    Read(#[from] NbdError),
    /// QEMU's mirror did what it may not.
    #[error("QEMU's mirror broke its contract")]
    Mirror(#[from] SourceError),
    /// The link's channel.
    #[error("The disk's channel to the peer was closed")]
    Channel(#[from] ChunkClosed),
    /// The export is not the disk that was announced.
    #[error(
        "The export holds {found} bytes, the machine's definition says {expected}: correct the definition"
    )]
    Size {
        /// The disk's size in bytes.
        expected: u64,
        /// The export's.
        found: u64,
    },
    /// `finish` without `begin`.
    #[error("The disk's copy was never begun")]
    NotBegun,
    /// The task is gone without a reason of its own.
    #[error("The disk's mirror has ended")]
    Ended,
}

enum Command {
    Begin(NbdClient, oneshot::Sender<()>),
    Finish(oneshot::Sender<Barrier>),
    Reopen(oneshot::Sender<()>),
    Give(u8, mpsc::Sender<Overwriting>, oneshot::Sender<GivenPlaces>),
}

/// The handle of one disk's task; dropping it ends the mirror.
#[derive(Debug)]
pub struct DiskSource {
    size: u64,
    commands: mpsc::Sender<Command>,
    progress: watch::Receiver<SourceProgress>,
    task: JoinHandle<Result<(), DiskSourceError>>,
}

impl DiskSource {
    /// Starts the task of the disk `name` of `size` bytes. The export is for an
    /// [`super::nbd::NbdServer`]; QEMU's mirror job writes into it.
    ///
    /// `map` is what the destination tells of its disk, where [`SourceConfig::target`] says that it does.
    pub fn spawn<C: ChunkSend, M: ChunkRecv>(
        name: &str,
        size: u64,
        config: DiskSourceConfig,
        channel: C,
        map: Option<M>,
    ) -> (NbdExport, Self) {
        let (changes, changed) = mpsc::channel(CHANGES);
        let (commands, commanded) = mpsc::channel(1);
        let max_chunk = config.mirror.max_chunk.min(MAX_CHUNK);
        let mirror = MirrorSource::new(size, SourceConfig { max_chunk, ..config.mirror });
        let (published, progress) =
            watch::channel(SourceProgress { total_bytes: size, ..Default::default() });
        let task = Task {
            config,
            mirror,
            channel,
            map,
            changes: changed,
            commands: commanded,
            progress: published,
            reader: None,
            reads: FuturesUnordered::new(),
            run_bytes: READ_UNIT,
            chunk: None,
            effort: Effort::default(),
            seen: PackingSeen::new(),
            asking: None,
            finishing: None,
        };
        let task = tokio::spawn(task.run());
        let export = NbdExport { name: name.to_owned(), size, changes };
        (export, Self { size, commands, progress, task })
    }

    /// Begins to copy what the disk holds, from a read-only export of the source QEMU. The mirror job
    /// must be running. Without it ([`longhaul_core::disk::Existing::Mirrored`]) what found no room could not be read again.
    pub async fn begin(&mut self, socket: &Path, export: &str) -> Result<(), DiskSourceError> {
        let client = NbdClient::connect(socket, export).await?;
        if client.size() != self.size {
            return Err(DiskSourceError::Size { expected: self.size, found: client.size() });
        }
        self.ask(|done| Command::Begin(client, done)).await
    }

    /// How far it is; the channel closes when the task ends.
    pub fn progress(&self) -> watch::Receiver<SourceProgress> {
        self.progress.clone()
    }

    /// Hands all that is left, and the barrier, to the channel without waiting for the WAN. Called when
    /// the guest is stopped and the mirror job has completed. What is owed is read from the export
    /// meanwhile, so the export must still answer.
    pub async fn finish(&mut self) -> Result<Barrier, DiskSourceError> {
        self.ask(Command::Finish).await
    }

    /// Takes changes again after [`Self::finish`], because the guest stays. The new mirror job must run
    /// before the guest does.
    pub async fn reopen(&mut self) -> Result<(), DiskSourceError> {
        self.ask(Command::Reopen).await
    }

    /// Memory begins: what its pages may be named by. The disk has this index in the machine's definition, and asks
    /// `questions` before it overwrites any of it; there must be room for one from each disk.
    pub async fn give_places(
        &mut self,
        index: u8,
        questions: mpsc::Sender<Overwriting>,
    ) -> Result<GivenPlaces, DiskSourceError> {
        self.ask(|done| Command::Give(index, questions, done)).await
    }

    /// Ends the mirror at once. Changes that QEMU still sends are answered with an error.
    pub fn abort(self) {}

    /// Waits until the task has ended, and says why.
    pub async fn ended(&mut self) -> DiskSourceError {
        match (&mut self.task).await {
            Ok(Err(error)) => error,
            Ok(Ok(())) | Err(_) => DiskSourceError::Ended,
        }
    }

    async fn ask<T>(
        &mut self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, DiskSourceError> {
        let (answer, answered) = oneshot::channel();
        if self.commands.send(command(answer)).await.is_ok()
            && let Ok(answer) = answered.await
        {
            return Ok(answer);
        }
        Err(self.ended().await)
    }
}

impl Drop for DiskSource {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type ReadDone = Result<(ReadRun, Vec<Content>), NbdError>;

struct Task<C, M> {
    config: DiskSourceConfig,
    mirror: MirrorSource,
    channel: C,
    /// What the destination has, as long as it tells more.
    map: Option<M>,
    changes: mpsc::Receiver<GuestChange>,
    commands: mpsc::Receiver<Command>,
    progress: watch::Sender<SourceProgress>,
    reader: Option<NbdClient>,
    reads: FuturesUnordered<BoxFuture<'static, ReadDone>>,
    run_bytes: u64,
    /// The chunk that is being sent.
    chunk: Option<Bytes>,
    /// How hard chunks are packed, and what that was judged by.
    effort: Effort,
    seen: PackingSeen,
    /// Whom to ask before what pages are named by is overwritten.
    asking: Option<Asking>,
    finishing: Option<oneshot::Sender<Barrier>>,
}

struct Asking {
    index: u8,
    questions: mpsc::Sender<Overwriting>,
    /// The question that is not answered yet.
    asked: Option<oneshot::Receiver<()>>,
}

impl<C: ChunkSend, M: ChunkRecv> Task<C, M> {
    async fn run(mut self) -> Result<(), DiskSourceError> {
        loop {
            self.start_reads();
            self.ask_before_overwriting();
            if self.finishing.is_some() {
                self.absorb_all()?;
            }
            if self.chunk.is_none() {
                let before = self.mirror.counters().body_bytes;
                self.chunk = self.seen.while_packing(|| self.mirror.poll_chunk());
                self.seen.packed(Amount(self.mirror.counters().body_bytes - before));
            }
            self.weigh();
            self.publish();
            let (full, since) = (self.chunk.is_some(), Instant::now());
            let sending = self.chunk.clone();
            tokio::select! {
                Some(change) = self.changes.recv() => self.take_change(change)?,
                told = next_of(&mut self.map), if self.map.is_some() => self.take_map(told),
                Some(read) = self.reads.next(), if !self.reads.is_empty() => self.take_read(read)?,
                sent = self.channel.send(sending.unwrap_or_default()), if self.chunk.is_some() => {
                    sent?;
                    self.chunk = None;
                }
                released = released(&mut self.asking), if self.asking.is_some() => self.take_released(released),
                command = self.commands.recv() => match command {
                    Some(command) => self.take_command(command)?,
                    None => return Ok(()),
                },
                // Acknowledgements arrive at the channel alone: look at it now and then.
                () = tokio::time::sleep(LOOK_AGAIN), if self.channel.unacknowledged() > 0 => {}
            }
            if full {
                self.seen.waiting += since.elapsed();
            }
        }
    }

    /// Packs harder from now on, or less hard. What is seen while a level is not in force yet, or only just, is not judged.
    fn weigh(&mut self) {
        if !self.mirror.is_level_tried() {
            return;
        }
        if let Some(level) = self.seen.judge(&mut self.effort, self.channel.carries()) {
            self.mirror.set_level(level);
        }
    }

    fn ask_before_overwriting(&mut self) {
        let Some(asking) = &mut self.asking else { return };
        let Some(blocks) = self.mirror.poll_overwriting() else { return };
        let (released, asked) = oneshot::channel();
        let question = Overwriting { disk: asking.index, blocks, released };
        match asking.questions.try_send(question) {
            Ok(()) => asking.asked = Some(asked),
            // There is room for one of each disk, and this one's was taken: nobody takes any more.
            Err(_) => self.end_naming(),
        }
    }

    fn take_released(&mut self, released: bool) {
        if !released {
            return self.end_naming();
        }
        self.mirror.handle_released();
        if let Some(asking) = &mut self.asking {
            asking.asked = None;
        }
    }

    fn end_naming(&mut self) {
        self.mirror.handle_naming_end();
        self.asking = None;
    }

    fn start_reads(&mut self) {
        let Some(reader) = &self.reader else { return };
        while let Some(run) = self.mirror.poll_read(self.run_bytes) {
            let reader = reader.clone();
            self.reads.push(Box::pin(async move { Ok((run, read_run(&reader, run).await?)) }));
        }
    }

    fn take_change(&mut self, change: GuestChange) -> Result<(), SourceError> {
        match change {
            GuestChange::Write { offset, data } => self.mirror.handle_write(offset, data),
            GuestChange::Zero { offset, len } => self.mirror.handle_zero(offset, len),
            GuestChange::Trim { offset, len } => self.mirror.handle_trim(offset, len),
            GuestChange::Flush => {
                self.mirror.handle_flush();
                Ok(())
            }
        }
    }

    fn take_map(&mut self, told: Option<Bytes>) {
        match told.map(|chunk| self.mirror.handle_map(chunk)) {
            Some(Ok(())) => return,
            Some(Err(error)) => tracing::warn!(%error, "the rest of the destination's map is not used"),
            None => self.mirror.handle_map_end(),
        }
        self.map = None;
    }

    fn take_read(&mut self, read: ReadDone) -> Result<(), DiskSourceError> {
        let (run, content) = read?;
        let all_zero = matches!(content[..], [Content::Zero(len)] if len == run.len);
        // Empty stretches are asked about in ever larger steps, content is read in small ones.
        self.run_bytes = match all_zero {
            true => (self.run_bytes * 2).min(self.config.zero_run_bytes.max(READ_UNIT)),
            false => READ_UNIT,
        };
        self.mirror.handle_read(run, &content);
        Ok(())
    }

    fn take_command(&mut self, command: Command) -> Result<(), DiskSourceError> {
        match command {
            Command::Begin(reader, done) => {
                self.reader = Some(reader);
                // Whoever asked may have given up waiting; the answer is then of no use.
                let _ = done.send(());
            }
            Command::Finish(done) => {
                // What QEMU was answered is in this channel already, since the answer follows it.
                while let Ok(change) = self.changes.try_recv() {
                    self.take_change(change)?;
                }
                if self.reader.is_none() && self.mirror.owed_bytes() > 0 {
                    return Err(DiskSourceError::NotBegun);
                }
                self.mirror.handle_finish();
                self.finishing = Some(done);
            }
            Command::Give(index, questions, done) => {
                self.asking = Some(Asking { index, questions, asked: None });
                let _ = done.send(self.mirror.give_places());
            }
            Command::Reopen(done) => {
                self.mirror.handle_reopen();
                let _ = done.send(());
            }
        }
        Ok(())
    }

    fn absorb_all(&mut self) -> Result<(), ChunkClosed> {
        while let Some(chunk) = self.chunk.take().or_else(|| self.mirror.poll_chunk()) {
            self.channel.absorb(chunk)?;
        }
        if let Some(barrier) = self.mirror.barrier()
            && let Some(done) = self.finishing.take()
        {
            let SourceCounters { sent_bytes, same_bytes, chunk_bytes, level_changes, .. } =
                self.mirror.counters();
            tracing::debug!(
                sent_bytes,
                same_bytes,
                chunk_bytes,
                level = %self.effort.level(),
                level_changes,
                "disk was packed"
            );
            let _ = done.send(barrier);
        }
        Ok(())
    }

    fn publish(&self) {
        let unacknowledged = self.channel.unacknowledged();
        let progress = SourceProgress {
            total_bytes: self.mirror.size(),
            copied_bytes: self.mirror.size() - self.mirror.owed_bytes(),
            owed_bytes: self.mirror.owed_bytes(),
            queued_bytes: self.mirror.queued_bytes(),
            unacknowledged_bytes: unacknowledged + self.chunk.as_ref().map_or(0, |chunk| chunk.len() as u64),
            counters: self.mirror.counters(),
            level: self.effort.level(),
            barrier: self.mirror.barrier(),
        };
        self.progress.send_if_modified(|last| std::mem::replace(last, progress) != progress);
    }
}

/// Whether what was asked about may be overwritten; false if nobody names anything any more. For ever if nothing is asked.
async fn released(asking: &mut Option<Asking>) -> bool {
    let Some(Asking { asked, questions, .. }) = asking else { return std::future::pending().await };
    match asked {
        Some(asked) => asked.await.is_ok(),
        None => {
            questions.closed().await;
            false
        }
    }
}

async fn next_of<M: ChunkRecv>(map: &mut Option<M>) -> Option<Bytes> {
    map.as_mut()?.recv().await
}

/// Reads a run, or its beginning: zeros as far as they reach, and up to [`READ_UNIT`] of data.
pub(super) async fn read_run(reader: &NbdClient, run: ReadRun) -> Result<Vec<Content>, NbdError> {
    let extents = reader.block_status(run.offset, run.len).await?;
    let (mut content, mut at, mut read) = (Vec::new(), run.offset, 0);
    for (zero, len) in block_extents(&extents, run.len) {
        if zero {
            content.push(Content::Zero(len));
            at += len;
            continue;
        }
        let len = len.min(READ_UNIT - read);
        for part in parts(len, u64::from(reader.max_request())) {
            content.push(Content::Data(reader.read(at, part as u32).await?));
            at += part;
        }
        read += len;
        if read == READ_UNIT {
            break;
        }
    }
    Ok(content)
}

/// Extents rounded to blocks: a block is zero only if all of it is. Blocks that the extents do not
/// reach are left out, but for the first, which counts as data.
fn block_extents(extents: &[Extent], run_len: u64) -> Vec<(bool, u64)> {
    let known: u64 = extents.iter().map(|extent| extent.len).sum();
    let known = if known >= run_len { run_len } else { (known - known % BLOCK).max(BLOCK).min(run_len) };
    let mut zero = vec![true; known.div_ceil(BLOCK) as usize];
    let mut at = 0;
    for extent in extents {
        // What lies behind the run says nothing of its last block, and an empty extent nothing at all.
        let end = (at + extent.len).min(known);
        if end > at {
            for block in at / BLOCK..end.div_ceil(BLOCK) {
                zero[block as usize] &= extent.zero;
            }
        }
        at = end;
    }
    if at < BLOCK.min(run_len) {
        zero[0] = false;
    }
    let mut start = 0;
    let rounded = zero.chunk_by(|left, right| left == right).map(|same| {
        let len = (same.len() as u64 * BLOCK).min(known - start);
        start += len;
        (same[0], len)
    });
    rounded.collect()
}

/// `len` in parts of at most `most` rounded down to blocks.
fn parts(len: u64, most: u64) -> impl Iterator<Item = u64> {
    let most = (most - most % BLOCK).max(BLOCK);
    (0..len.div_ceil(most)).map(move |index| most.min(len - index * most))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_make_up_the_whole() {
        assert_eq!(parts(300_000, 131_100).collect::<Vec<_>>(), [131_072, 131_072, 37_856]);
        assert_eq!(parts(10, 1).collect::<Vec<_>>(), [10]);
        assert_eq!(parts(0, BLOCK).count(), 0);
    }

    proptest! {
        #[test]
        fn rounding_extents_never_calls_data_zero(
            extents in prop::collection::vec((0..200u64, any::<bool>()), 1..20),
            run in 1..3000u64,
        ) {
            let extents: Vec<_> =
                extents.iter().map(|(len, zero)| Extent { len: len * 1024, zero: *zero }).collect();
            let run_len = run * 512;
            let bytes = |extents: &[(bool, u64)]| -> Vec<bool> {
                extents.iter().flat_map(|(zero, len)| vec![*zero; (*len / 512) as usize]).collect()
            };
            let exact = bytes(&extents.iter().map(|extent| (extent.zero, extent.len)).collect::<Vec<_>>());
            let rounded = block_extents(&extents, run_len);
            let map = bytes(&rounded);
            prop_assert!(!map.is_empty() && map.len() as u64 * 512 <= run_len);
            for (index, block) in map.chunks(BLOCK as usize / 512).enumerate() {
                let start = index * BLOCK as usize / 512;
                let all_zero = (start..start + block.len()).all(|at| exact.get(at) == Some(&true));
                prop_assert!(block.iter().all(|zero| *zero == all_zero), "block {}", index);
            }
            prop_assert!(rounded.windows(2).all(|pair| pair[0].0 != pair[1].0));
        }
    }
}
