//! The destination's side: chunks from the channel become the stream that the waiting QEMU reads.
//!
//! The stream's last byte is held back until the end frame has proven all of it. QEMU cannot finish
//! loading without that byte, so that no copy exists, even for a moment, that was built of anything but
//! what the source's QEMU wrote.
//!
//! ```text
//! connect -> receive -> decode -> write (all but one byte) -> proven  -> write, shut down -> Proven
//!    |          |          |         |                          |
//! Unreachable   |       Mismatch  QemuClosed                 Mismatch
//!         ChannelClosed            (after each of these, QEMU's socket stays open until the handle goes)
//! ```

use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use futures_util::stream::{StreamExt, TryStreamExt, iter};
use longhaul_core::memory::PAGE_BYTES;
use longhaul_core::units::Bytes;
use longhaul_core::wan::{DecodeError, Decoded, Place, Remembered, StreamDecoder, StreamEnd};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use crate::chunk::ChunkRecv;
use crate::naming::NamedDisk;
use crate::own_socket;

/// Pages that are read from a disk by one request, and requests at the same time.
const READ_PAGES: usize = 64;
const READS_AT_ONCE: usize = 16;

/// How a target finds its QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetConfig {
    /// How long QEMU may take to listen. Default 10 s.
    pub connect_deadline: Duration,
    /// How long to wait between two attempts. Default 20 ms.
    pub connect_retry: Duration,
    /// How many pages are remembered at most, as this site told the source. Each costs 4.2 KiB. Default 0.
    pub shadow_pages: u32,
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self {
            connect_deadline: Duration::from_secs(10),
            connect_retry: Duration::from_millis(20),
            shadow_pages: 0,
        }
    }
}

/// How the memory's way ended. Whether QEMU has *loaded* it is for QEMU's monitor to say.
#[derive(Debug, thiserror::Error)]
pub enum MemoryEnd {
    /// All of it was written to QEMU, and it is what the source's QEMU wrote.
    #[error("The memory stream is complete and proven: {} bytes, {}", .0.bytes.0, .0.digest)]
    Proven(StreamEnd),
    /// What arrived is not what was sent. QEMU has not had the last byte and has not been told the end.
    #[error("The memory stream was damaged on its way; this copy must be discarded")]
    Mismatch(#[source] DecodeError),
    /// QEMU closed its socket.
    #[error("QEMU closed its migration socket after {written}: see its log for why it refused the state")]
    QemuClosed {
        /// How much had been written.
        written: Bytes,
        /// The stream had been proven: only its last byte was missing.
        proven: bool,
        /// What writing said.
        #[source]
        source: io::Error,
    },
    /// The channel was closed without an end frame. QEMU has not been told the end.
    #[error("The bulk channel was closed after {written} of the memory stream, before its end")]
    ChannelClosed {
        /// How much had been written.
        written: Bytes,
    },
    /// A page is named by a disk of the machine, and that cannot be read.
    #[error("Pages of memory are named by disk {disk} of this site, which cannot be read")]
    Disk {
        /// Its index in the machine's definition.
        disk: u8,
        /// What reading said.
        #[source]
        source: io::Error,
    },
    /// QEMU was not listening in time.
    #[error("Cannot reach QEMU's migration socket {path}: was it started with -incoming?")]
    Unreachable {
        /// Where it should listen.
        path: PathBuf,
        /// What the last attempt said.
        #[source]
        source: io::Error,
    },
    /// zstd has no memory for its state.
    #[error("Cannot start decompressing the memory stream: is this host out of memory?")]
    Decoder(#[source] io::Error),
    /// The target was aborted, or its end has been told already.
    #[error("The memory transfer was aborted")]
    Aborted,
}

/// Where a target stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TargetProgress {
    /// QEMU is connected.
    pub connected: bool,
    /// Bytes of the chunks received.
    pub wire: Bytes,
    /// Bytes of the stream written to QEMU.
    pub written: Bytes,
}

/// Starts targets.
#[derive(Debug)]
pub struct MemoryTarget;

impl MemoryTarget {
    /// Connects to QEMU's incoming socket at `path` and feeds it what comes from `channel`. Needs a tokio runtime.
    ///
    /// `base` is what this site remembers of the machine, if the source may begin with it; `disks` are the machine's, by
    /// which its pages may be named.
    pub fn start<R: ChunkRecv, D: NamedDisk>(
        path: PathBuf,
        channel: R,
        config: TargetConfig,
        base: Option<Remembered>,
        disks: Vec<D>,
    ) -> TargetHandle {
        let (held, mut released) = watch::channel(());
        let (progress, progress_seen) = watch::channel(TargetProgress::default());
        let (end, ended) = oneshot::channel();
        let (remember, remembered) = oneshot::channel();
        tokio::spawn(async move {
            let handle_dropped = async { while released.changed().await.is_ok() {} };
            tokio::select! {
                () = handle_dropped => {}
                () = feed_and_hold(path, (channel, disks), (config, base), progress, (end, remember)) => {}
            }
        });
        TargetHandle { _held: held, progress: progress_seen, ended: Some(ended), remembered }
    }
}

/// Governs a running target. Dropping it closes QEMU's socket: stop that QEMU first, unless the end is
/// [`MemoryEnd::Proven`]; it exits by itself otherwise.
#[derive(Debug)]
pub struct TargetHandle {
    _held: watch::Sender<()>,
    progress: watch::Receiver<TargetProgress>,
    ended: Option<oneshot::Receiver<MemoryEnd>>,
    remembered: oneshot::Receiver<Remembered>,
}

impl TargetHandle {
    /// Where the transfer stands, renewed with every chunk.
    pub fn progress(&self) -> watch::Receiver<TargetProgress> {
        self.progress.clone()
    }

    /// Waits for the end. Cancel-safe; tells it once, [`MemoryEnd::Aborted`] when called again.
    pub async fn ended(&mut self) -> MemoryEnd {
        let Some(ended) = self.ended.as_mut() else { return MemoryEnd::Aborted };
        let end = ended.await;
        self.ended = None;
        end.unwrap_or(MemoryEnd::Aborted)
    }

    /// What both sites remember of the machine, after its stream was proven; once.
    pub fn take_remembered(&mut self) -> Option<Remembered> {
        self.remembered.try_recv().ok()
    }

    /// Closes the socket to QEMU and the channel.
    pub fn abort(self) {}
}

/// Tells the end, then keeps QEMU's socket and the channel until it is cancelled.
async fn feed_and_hold<R: ChunkRecv, D: NamedDisk>(
    path: PathBuf,
    (mut channel, disks): (R, Vec<D>),
    (config, base): (TargetConfig, Option<Remembered>),
    progress: watch::Sender<TargetProgress>,
    (end, remember): (oneshot::Sender<MemoryEnd>, oneshot::Sender<Remembered>),
) {
    let mut stream = match connect(path, config).await {
        Ok(stream) => stream,
        Err(unreachable) => {
            let _ = end.send(unreachable);
            return std::future::pending().await;
        }
    };
    progress.send_modify(|progress| progress.connected = true);
    let decoder = StreamDecoder::new(config.shadow_pages).map(|decoder| decoder.with_base(base));
    let ended = match decoder {
        Ok(mut decoder) => {
            let (stream, channel, progress) = (&mut stream, &mut channel, &progress);
            // The disks are let go of with the end: their exports are closed then.
            let mut feed = Feed { stream, channel, disks, progress, held_back: None };
            let ended = feed.run(&mut decoder).await.map_or_else(|end| end, MemoryEnd::Proven);
            if matches!(ended, MemoryEnd::Proven(_)) {
                // Whoever wants to know of the end may not want to know this.
                let _ = remember.send(decoder.into_remembered());
            }
            ended
        }
        Err(error) => MemoryEnd::Decoder(error),
    };
    let proven = matches!(ended, MemoryEnd::Proven(_));
    if proven {
        info!(end = %ended, "Memory stream received");
    } else {
        warn!(end = %ended, "Memory stream not received");
    }
    let _ = end.send(ended);
    if proven {
        // Asking for more acknowledges the last chunk.
        while channel.recv().await.is_some() {
            warn!("Chunk after the end of the memory stream ignored");
        }
    }
    std::future::pending().await
}

async fn connect(path: PathBuf, config: TargetConfig) -> Result<UnixStream, MemoryEnd> {
    let deadline = Instant::now() + config.connect_deadline;
    loop {
        match own_socket::connect(&path).await {
            Ok(stream) => return Ok(stream),
            Err(source) if Instant::now() >= deadline => return Err(MemoryEnd::Unreachable { path, source }),
            Err(error) => debug!(path = %path.display(), %error, "QEMU does not listen yet"),
        }
        sleep(config.connect_retry).await;
    }
}

struct Feed<'a, R, D> {
    stream: &'a mut UnixStream,
    channel: &'a mut R,
    disks: Vec<D>,
    progress: &'a watch::Sender<TargetProgress>,
    /// The stream's last byte so far.
    held_back: Option<u8>,
}

impl<R: ChunkRecv, D: NamedDisk> Feed<'_, R, D> {
    async fn run(&mut self, decoder: &mut StreamDecoder) -> Result<StreamEnd, MemoryEnd> {
        loop {
            let chunk = self.next_chunk().await?;
            self.progress.send_modify(|progress| progress.wire.0 += chunk.len() as u64);
            decoder.handle_chunk(chunk);
            while let Some(decoded) = decoder.poll_decoded().map_err(MemoryEnd::Mismatch)? {
                match decoded {
                    Decoded::Bytes(bytes) => self.write(&bytes).await?,
                    Decoded::Disks(records) => self.wait_for_disks(&records).await?,
                    Decoded::Wanted(places) => decoder.handle_found(find(&self.disks, &places).await?),
                    Decoded::End(end) => return self.finish(end).await,
                }
            }
        }
    }

    /// Waits until the disks are what they were when pages began to be named by them.
    async fn wait_for_disks(&mut self, records: &[u64]) -> Result<(), MemoryEnd> {
        for (index, records) in records.iter().enumerate() {
            let unknown = || Err(io::ErrorKind::NotFound.into());
            let applied = match self.disks.get_mut(index) {
                Some(disk) => disk.applied(*records).await,
                None => unknown(),
            };
            applied.map_err(|source| MemoryEnd::Disk { disk: index as u8, source })?;
        }
        Ok(())
    }

    /// The next chunk, unless QEMU goes away first. A receive that has begun is given up only with everything.
    async fn next_chunk(&mut self) -> Result<bytes::Bytes, MemoryEnd> {
        let written = self.written();
        let receive = pin!(self.channel.recv());
        tokio::select! {
            biased;
            chunk = receive => chunk.ok_or(MemoryEnd::ChannelClosed { written }),
            source = hung_up(self.stream) => Err(MemoryEnd::QemuClosed { written, proven: false, source }),
        }
    }

    /// Writes all but the last byte, which waits for what follows.
    async fn write(&mut self, bytes: &[u8]) -> Result<(), MemoryEnd> {
        let Some((&last, rest)) = bytes.split_last() else { return Ok(()) };
        if let Some(before) = self.held_back.replace(last) {
            self.write_all(&[before], false).await?;
        }
        self.write_all(rest, false).await
    }

    async fn finish(&mut self, end: StreamEnd) -> Result<StreamEnd, MemoryEnd> {
        if let Some(last) = self.held_back.take() {
            self.write_all(&[last], true).await?;
        }
        // QEMU may have read its last byte and closed already.
        let _ = self.stream.shutdown().await;
        Ok(end)
    }

    async fn write_all(&mut self, bytes: &[u8], proven: bool) -> Result<(), MemoryEnd> {
        let written = self.written();
        let wrote = self.stream.write_all(bytes).await;
        wrote.map_err(|source| MemoryEnd::QemuClosed { written, proven, source })?;
        self.progress.send_modify(|progress| progress.written.0 += bytes.len() as u64);
        Ok(())
    }

    fn written(&self) -> Bytes {
        self.progress.borrow().written
    }
}

/// Reads what stands at the places; neighbours at once.
async fn find<D: NamedDisk>(disks: &[D], places: &[Place]) -> Result<Vec<bytes::Bytes>, MemoryEnd> {
    let follows =
        |left: &Place, right: &Place| left.disk == right.disk && left.part.checked_add(1) == Some(right.part);
    let runs = places.chunk_by(follows).flat_map(|run| run.chunks(READ_PAGES));
    let reads: Vec<_> = runs.map(|run| read_run(disks, run[0], run.len())).collect();
    let read: Vec<bytes::Bytes> = iter(reads).buffered(READS_AT_ONCE).try_collect().await?;
    let page = |run: bytes::Bytes| {
        (0..run.len() / PAGE_BYTES).map(move |page| run.slice(page * PAGE_BYTES..(page + 1) * PAGE_BYTES))
    };
    Ok(read.into_iter().flat_map(page).collect())
}

async fn read_run<D: NamedDisk>(disks: &[D], first: Place, pages: usize) -> Result<bytes::Bytes, MemoryEnd> {
    let failed = |source| MemoryEnd::Disk { disk: first.disk, source };
    let disk = disks.get(usize::from(first.disk)).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let (offset, len) = (u64::from(first.part) * PAGE_BYTES as u64, (pages * PAGE_BYTES) as u32);
    if offset + u64::from(len) > disk.size_bytes() {
        // Not the disk's fault: what came is damaged.
        return Err(MemoryEnd::Mismatch(DecodeError::NotFound));
    }
    let read = disk.read(offset, len).await;
    read.map_err(failed)
}

/// Waits until QEMU closes its end. It has nothing to say otherwise: there is no return path.
async fn hung_up(stream: &UnixStream) -> io::Error {
    let mut ignored = [0; 64];
    loop {
        if let Err(error) = stream.readable().await {
            return error;
        }
        match stream.try_read(&mut ignored) {
            Ok(0) => return io::ErrorKind::UnexpectedEof.into(),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return error,
        }
    }
}
