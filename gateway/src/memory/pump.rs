//! The task that owns QEMU's connection at the source, the encoder and the channel.
//!
//! ```text
//! accept -> pump: read | sent | mode | linger | question | tick -> end of stream -> drain -> held until the handle goes
//! ```

use std::time::Duration;

use bytes::BytesMut;
use longhaul_core::memory::StreamPhase;
use longhaul_core::units::Bytes;
use longhaul_core::wan::{Effort, EncoderCounters, Remembered, StreamEncoder, StreamEnd};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::outlet::Outlet;
use super::progress::{Meter, SourceProgress};
use super::source::{MemorySource, SourceConfig, SourceError, SourceMode};
use crate::chunk::{ChunkClosed, ChunkSend, PackingSeen};
use crate::naming::{NamedBy, Overwriting};

const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// How often it is looked whether a disk that waits may go on: acknowledgements arrive at the channel alone.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// A QEMU that writes at all writes more often than this.
const SILENCE: Duration = Duration::from_millis(20);

type Ended = Result<StreamEnd, SourceError>;
type Told = Result<(StreamEnd, Remembered), SourceError>;

pub(super) struct Pump<S> {
    /// `None` once QEMU has closed its side.
    stream: Option<UnixStream>,
    config: SourceConfig,
    buffer: BytesMut,
    encoder: StreamEncoder,
    /// How hard to pack, and what that is judged by.
    effort: Effort,
    seen: PackingSeen,
    outlet: Outlet<S>,
    /// Bytes of all chunks that went to the outlet.
    pushed_bytes: u64,
    /// What disks ask before they overwrite what pages are named by; none when nothing is named any more.
    questions: Option<mpsc::Receiver<Overwriting>>,
    /// Those that wait until so much is acknowledged.
    held: Vec<(Bytes, Overwriting)>,
    mode: watch::Receiver<SourceMode>,
    progress: watch::Sender<SourceProgress>,
    /// When the last byte came, and when QEMU last began to write after a silence.
    read_at: Option<Instant>,
    /// Something came since [`SourceMode::Listening`] began.
    heard: bool,
    woke: watch::Sender<Option<Instant>>,
    meter: Meter,
    began: Instant,
    /// When the oldest and the newest byte came that a flush would send.
    gathered: Option<(Instant, Instant)>,
    end: Option<StreamEnd>,
    warned: bool,
}

impl<S: ChunkSend> Pump<S> {
    /// Runs until the handle is dropped.
    pub(super) async fn run(
        source: MemorySource,
        channel: S,
        mut mode: watch::Receiver<SourceMode>,
        seen: (watch::Sender<SourceProgress>, watch::Sender<Option<Instant>>),
        end: oneshot::Sender<Told>,
    ) {
        let (ended, kept) = match Self::accept(source, channel, &mut mode, seen).await {
            Ok(mut pump) => {
                let ended = pump.pump().await;
                pump.publish();
                pump.say_what_it_took();
                // QEMU's socket is closed here, the channel is not: what was sent may still be on its way. Nor are the disks let
                // go of, unless nobody will prove what was sent.
                let disks = ended.is_ok().then_some((pump.questions, pump.held));
                (ended.map(|end| (end, pump.encoder.into_remembered())), Some((pump.outlet, disks)))
            }
            Err(error) => (Err(error), None),
        };
        match &ended {
            Ok((end, _)) => info!(bytes = end.bytes.0, digest = %end.digest, "Memory stream sent"),
            Err(error) => debug!(%error, "Memory stream not sent"),
        }
        if end.send(ended).is_ok() {
            while mode.changed().await.is_ok() {}
        }
        drop(kept);
    }

    async fn accept(
        source: MemorySource,
        channel: S,
        mode: &mut watch::Receiver<SourceMode>,
        (progress, woke): (watch::Sender<SourceProgress>, watch::Sender<Option<Instant>>),
    ) -> Result<Self, SourceError> {
        let MemorySource { listener, path, config, base, named_by } = source;
        let stream = tokio::select! {
            () = dropped(mode) => return Err(SourceError::Aborted),
            accepted = timeout(config.accept_deadline, listener.accept()) => match accepted {
                Err(_) => return Err(SourceError::NotConnected(config.accept_deadline)),
                Ok(Err(error)) => return Err(SourceError::Read(Bytes(0), error)),
                Ok(Ok((stream, _))) => stream,
            },
        };
        drop((listener, path));
        tokio::select! {
            () = sleep(config.first_read_after) => {}
            absorb = mode.wait_for(|mode| *mode == SourceMode::Absorb) => {
                absorb.map_err(|_| SourceError::Aborted)?;
            }
        }
        progress.send_modify(|progress| progress.connected = true);
        let encoder = StreamEncoder::based_on(config.encoder, base).map_err(SourceError::Encoder)?;
        let (encoder, questions) = match named_by {
            Some(NamedBy { given, questions }) => (encoder.with_disks(given), Some(questions)),
            None => (encoder, None),
        };
        Ok(Self {
            stream: Some(stream),
            config,
            buffer: BytesMut::new(),
            encoder,
            effort: Effort::beginning_with(config.encoder.memory_level),
            seen: PackingSeen::new(),
            outlet: Outlet::new(channel),
            pushed_bytes: 0,
            questions,
            held: Vec::new(),
            mode: mode.clone(),
            progress,
            read_at: None,
            heard: false,
            woke,
            meter: Meter::default(),
            began: Instant::now(),
            gathered: None,
            end: None,
            warned: false,
        })
    }

    async fn pump(&mut self) -> Ended {
        let mut tick = interval(PROGRESS_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Whoever set it before QEMU connected is not told of a change.
        self.switch();
        loop {
            let (full, since) = (!self.outlet.has_room(), Instant::now());
            let event = self.event(&mut tick).await;
            if full {
                self.seen.waiting += since.elapsed();
            }
            self.apply(event)?;
            self.release();
            self.dispatch()?;
            if let Some(end) = self.end.filter(|_| self.outlet.is_drained()) {
                return Ok(end);
            }
        }
    }

    /// What happens next. Cancel-safe in every branch.
    async fn event(&mut self, tick: &mut Interval) -> Event {
        let may_read = self.may_read();
        // Disks may wait for names that are among what is gathered.
        let flush_at = self.flush_at().filter(|_| may_read || (self.holds() && self.outlet.has_room()));
        tokio::select! {
            biased;
            changed = self.mode.changed() => changed.map_or(Event::Aborted, |()| Event::ModeChanged),
            sent = self.outlet.sent() => Event::Sent(sent),
            question = asked(&mut self.questions) => Event::Asked(question),
            // Before reading: a stream that never pauses must not silence the progress.
            _ = tick.tick() => Event::Tick,
            read = read_some(&mut self.stream, &mut self.buffer, self.config.read_buffer), if may_read => {
                Event::Read(read)
            }
            () = wait_until(flush_at) => Event::Idle,
            () = sleep(LOOK_AGAIN), if !self.held.is_empty() => Event::LookAgain,
        }
    }

    fn apply(&mut self, event: Event) -> Result<(), SourceError> {
        match event {
            Event::Aborted => return Err(SourceError::Aborted),
            Event::ModeChanged => self.switch(),
            Event::Asked(Some(question)) => self.take_question(question),
            Event::Asked(None) => self.let_disks_go(),
            Event::LookAgain => {}
            Event::Sent(sent) => sent.map_err(|ChunkClosed| self.channel_closed())?,
            Event::Read(Err(error)) => return Err(SourceError::Read(self.taken(), error)),
            Event::Read(Ok(0)) => self.stream_ended()?,
            Event::Read(Ok(_)) => self.take_buffer(),
            Event::Idle => {
                self.encoder.handle_flush();
                self.collect();
            }
            Event::Tick => {
                self.weigh();
                self.publish();
            }
        }
        Ok(())
    }

    fn switch(&mut self) {
        let mode = *self.mode.borrow_and_update();
        debug!(?mode, "Memory source switched");
        match mode {
            SourceMode::Absorb => {
                self.encoder.handle_disks_end();
                self.encoder.shorten_chunks(self.config.chunk_in_pause);
                self.collect();
            }
            SourceMode::Listening => self.heard = false,
            SourceMode::Streaming | SourceMode::Held => {}
        }
    }

    fn take_buffer(&mut self) {
        self.seen.while_packing(|| self.encoder.handle_bytes(&self.buffer));
        self.seen.packed(Bytes(self.buffer.len() as u64));
        self.buffer.clear();
        self.note_silence();
        self.collect();
        self.meter.observe(self.began.elapsed(), &self.encoder.counters(), self.encoder.phase());
    }

    fn note_silence(&mut self) {
        let now = Instant::now();
        let before = self.read_at.replace(now);
        let first = self.listens() && !std::mem::replace(&mut self.heard, true);
        if first || before.is_none_or(|before| now - before >= SILENCE) {
            self.woke.send_replace(Some(now));
        }
    }

    fn take_question(&mut self, question: Overwriting) {
        match self.encoder.handle_overwriting(question.disk, &question.blocks) {
            Some(until) => self.held.push((until, question)),
            // A disk that is gone needs no answer.
            None => drop(question.released.send(())),
        }
        self.collect();
    }

    /// Lets disks go on whose blocks no name is on its way to, and all of them once there are no names.
    fn release(&mut self) {
        if self.questions.is_none() {
            return;
        }
        // What is sent again later is what changes: the disks are not asked about that.
        if self.encoder.counters().stream.rounds > 1 {
            self.encoder.handle_disks_end();
        }
        let acknowledged = Bytes(self.pushed_bytes.saturating_sub(self.outlet.backlog_bytes()));
        self.encoder.handle_acknowledged(acknowledged);
        self.collect();
        for (until, question) in std::mem::take(&mut self.held) {
            if acknowledged >= until {
                let _ = question.released.send(());
            } else {
                self.held.push((until, question));
            }
        }
        if self.encoder.is_done_with_disks() {
            debug!("Nothing is named by disks any more");
            self.let_disks_go();
        }
    }

    /// Without an answer a disk goes on, too, and asks no more.
    fn let_disks_go(&mut self) {
        self.encoder.handle_disks_end();
        self.questions = None;
        self.held.clear();
    }

    fn stream_ended(&mut self) -> Result<(), SourceError> {
        if self.encoder.phase() == StreamPhase::Memory {
            return Err(SourceError::Truncated(self.taken()));
        }
        self.stream = None;
        self.end = Some(self.encoder.handle_end());
        self.collect();
        Ok(())
    }

    /// Moves finished chunks to the outlet and notes how old what remains is.
    fn collect(&mut self) {
        let mut left = false;
        while let Some(chunk) = self.encoder.poll_chunk() {
            self.pushed_bytes += chunk.len() as u64;
            self.outlet.push(chunk);
            left = true;
        }
        let now = Instant::now();
        self.gathered = match self.gathered {
            _ if self.encoder.is_idle() => None,
            Some((oldest, _)) if !left => Some((oldest, now)),
            Some(_) | None => Some((now, now)),
        };
    }

    fn dispatch(&mut self) -> Result<(), SourceError> {
        let absorb_below = self.absorbing().then_some(self.config.absorb_limit.0);
        self.outlet.dispatch(absorb_below).map_err(|ChunkClosed| self.channel_closed())?;
        if absorb_below.is_some_and(|limit| self.outlet.backlog_bytes() >= limit) && !self.warned {
            self.warned = true;
            warn!(limit_bytes = self.config.absorb_limit.0, "Too much memory on its way; QEMU has to wait");
        }
        Ok(())
    }

    fn may_read(&self) -> bool {
        let takes = self.absorbing() || self.listens();
        let room = takes && self.outlet.backlog_bytes() < self.config.absorb_limit.0;
        self.stream.is_some() && !self.holds() && (room || self.outlet.has_room())
    }

    fn holds(&self) -> bool {
        let holds = match *self.mode.borrow() {
            SourceMode::Held => true,
            SourceMode::Listening => self.heard,
            SourceMode::Streaming | SourceMode::Absorb => false,
        };
        holds && self.encoder.phase() != StreamPhase::DeviceState
    }

    fn listens(&self) -> bool {
        *self.mode.borrow() == SourceMode::Listening
    }

    fn absorbing(&self) -> bool {
        *self.mode.borrow() == SourceMode::Absorb || self.encoder.phase() == StreamPhase::DeviceState
    }

    fn flush_at(&self) -> Option<Instant> {
        let (oldest, newest) = self.gathered?;
        Some((newest + self.config.linger).min(oldest + self.config.gather_limit))
    }

    fn channel_closed(&self) -> SourceError {
        SourceError::ChannelClosed(self.taken())
    }

    fn taken(&self) -> Bytes {
        Bytes(self.encoder.counters().stream.bytes)
    }

    fn say_what_it_took(&self) {
        let EncoderCounters { stream, wire_bytes, known_pages, disk_pages, .. } = self.encoder.counters();
        let (pages, level, level_changes) =
            (stream.pages, self.encoder.memory_level(), self.effort.changes());
        debug!(
            bytes = stream.bytes,
            wire_bytes, pages, known_pages, disk_pages, %level, level_changes, "Memory was packed"
        );
    }

    /// Packs harder from now on, or less hard.
    fn weigh(&mut self) {
        let Some(level) = self.seen.judge(&mut self.effort, self.outlet.carries()) else { return };
        if level != self.encoder.memory_level() {
            debug!(%level, "Memory is packed at another level");
            self.encoder.set_memory_level(level);
        }
    }

    fn publish(&mut self) {
        let (at, counters) = (self.began.elapsed(), self.encoder.counters());
        let (original_rate, wire_rate) = self.meter.sample(at, &counters);
        let rounds = self.meter.rounds(at, &counters);
        let phase = self.encoder.phase();
        let backlog = Bytes(self.outlet.backlog_bytes());
        let names_unread = self.questions.is_some();
        self.progress.send_modify(|progress| {
            *progress = SourceProgress {
                phase,
                connected: true,
                original: Bytes(counters.stream.bytes),
                wire: Bytes(counters.wire_bytes),
                pages: counters.stream.pages,
                zero_pages: counters.stream.zero_pages,
                device_state: Bytes(counters.stream.device_state_bytes),
                device_wire: Bytes(counters.wire_device_bytes),
                rounds,
                original_rate,
                wire_rate,
                backlog,
                names_unread,
            };
        });
    }
}

enum Event {
    Aborted,
    ModeChanged,
    Sent(Result<(), ChunkClosed>),
    /// A disk wants to go on; `None` if none will any more.
    Asked(Option<Overwriting>),
    LookAgain,
    Read(std::io::Result<usize>),
    /// QEMU paused with bytes gathered.
    Idle,
    Tick,
}

async fn read_some(
    stream: &mut Option<UnixStream>,
    buffer: &mut BytesMut,
    limit: Bytes,
) -> std::io::Result<usize> {
    let Some(stream) = stream else { return std::future::pending().await };
    buffer.reserve(limit.0 as usize);
    stream.read_buf(buffer).await
}

async fn asked(questions: &mut Option<mpsc::Receiver<Overwriting>>) -> Option<Overwriting> {
    match questions {
        Some(questions) => questions.recv().await,
        None => std::future::pending().await,
    }
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Waits until the handle is dropped.
async fn dropped(mode: &mut watch::Receiver<SourceMode>) {
    while mode.changed().await.is_ok() {}
}
