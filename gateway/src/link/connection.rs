//! The tasks of one connection: they move bytes between quinn and the peer's task and decide nothing.
//!
//! ```text
//!  control reader --.                                   .-- control writer
//!  stream readers ---> ConnectionEvent -> peer task ---<
//!  chunk senders  --'                                   '-- one sender per chunk
//!  datagram reader -----------------------------------------> whoever takes datagrams
//! ```
//!
//! All of them end when the connection does; the peer's task drops the receiving end of their events and
//! hears no more of them.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use longhaul_core::bulk::{BulkId, Channel, ChunkHeader, HeaderError};
use longhaul_core::wire::{FRAME_PREFIX_BYTES, Message, WireError};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::handshake::{CONTROL_PRIORITY, ControlReader, Established};
use super::stats::{Counters, Kind};

/// How many events of one connection may wait for the peer's task.
const EVENT_QUEUE: usize = 64;

/// How many frames may wait for the control stream; behind them the peer's task coalesces.
const WRITER_QUEUE: usize = 8;

/// A stream was stopped because nothing receives on its channel.
const STOP_UNWANTED: u32 = 1;

/// A stream was stopped because its chunk is here already.
const STOP_DUPLICATE: u32 = 2;

/// A stream was broken off because its channel was closed.
const RESET_CLOSED: u32 = 3;

/// What to do with a chunk that begins to arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Read it.
    Read,
    /// It is here.
    Duplicate,
    /// Nobody receives on its channel.
    Unwanted,
}

/// What became of a chunk that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It arrived.
    Sent,
    /// Nobody receives on its channel.
    Refused,
    /// It did not arrive.
    Lost,
}

/// What the tasks of a connection report.
#[derive(Debug)]
pub(super) enum ConnectionEvent {
    /// A control message.
    Message(Message),
    /// A chunk begins; its bytes are read after the verdict.
    ChunkBegins { header: ChunkHeader, verdict: oneshot::Sender<Verdict> },
    /// A chunk is complete.
    Chunk { header: ChunkHeader, bytes: Bytes },
    /// A chunk broke off after its verdict.
    ChunkBroke { header: ChunkHeader },
    /// A chunk of this side is done with, one way or the other.
    ChunkDone { id: BulkId, number: u64, stream_bytes: u64, outcome: Outcome },
    /// The peer sent what no correct gateway sends.
    Broken(ProtocolError),
}

/// What no correct gateway sends.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProtocolError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error(transparent)]
    Receive(#[from] longhaul_core::bulk::ReceiveError),
    #[error("The peer sends a chunk that is longer or shorter than its header says")]
    ChunkLength,
    #[error("The peer closed its control stream")]
    ControlClosed,
    #[error("The peer announces more than {limit} bulk channels")]
    TooManyChannels { limit: usize },
}

/// A running connection. Dropping it ends its readers and its writer.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) connection: Connection,
    pub(super) events: mpsc::Receiver<ConnectionEvent>,
    pub(super) control: mpsc::Sender<Message>,
    reports: mpsc::Sender<ConnectionEvent>,
    counters: Arc<Counters>,
    chunks_begun: i32,
    _tasks: JoinSet<()>,
}

impl Running {
    /// Starts the tasks of `established`. Datagrams go to whoever `datagrams` names at the time.
    pub(super) fn start(
        established: Established,
        counters: &Arc<Counters>,
        datagrams: watch::Receiver<Option<mpsc::Sender<Bytes>>>,
    ) -> Self {
        let connection = established.connection;
        let (reports, events) = mpsc::channel(EVENT_QUEUE);
        let (control, frames) = mpsc::channel(WRITER_QUEUE);
        let mut tasks = JoinSet::new();
        tasks.spawn(read_control(established.control_receive, reports.clone(), counters.clone()));
        tasks.spawn(write_control(established.control_send, frames, counters.clone()));
        tasks.spawn(accept_chunks(connection.clone(), reports.clone(), counters.clone()));
        tasks.spawn(read_datagrams(connection.clone(), datagrams, counters.clone()));
        let counters = counters.clone();
        Self { connection, events, control, reports, counters, chunks_begun: 0, _tasks: tasks }
    }

    /// Sends one chunk on a stream of its own; what became of it arrives as an event. When `closed` is
    /// cancelled the stream is broken off.
    pub(super) fn send_chunk(&mut self, header: ChunkHeader, bytes: Bytes, closed: CancellationToken) {
        let priority = priority(header.id.channel, self.chunks_begun);
        self.chunks_begun = self.chunks_begun.saturating_add(1);
        let (connection, reports, counters) =
            (self.connection.clone(), self.reports.clone(), self.counters.clone());
        tokio::spawn(async move {
            let stream_bytes = stream_bytes(&bytes);
            let outcome = carry(&connection, priority, &header, bytes, &counters, &closed).await;
            let done =
                ConnectionEvent::ChunkDone { id: header.id, number: header.number, stream_bytes, outcome };
            let _ = reports.send(done).await; // nobody listens any more: the connection was replaced
        });
    }
}

/// What a chunk takes on its stream, in bytes.
pub(super) fn stream_bytes(bytes: &Bytes) -> u64 {
    (ChunkHeader::LEN + bytes.len()) as u64
}

async fn carry(
    connection: &Connection,
    priority: i32,
    header: &ChunkHeader,
    bytes: Bytes,
    counters: &Counters,
    closed: &CancellationToken,
) -> Outcome {
    let Some(Ok(mut stream)) = closed.run_until_cancelled(connection.open_uni()).await else {
        return Outcome::Lost;
    };
    let _ = stream.set_priority(priority); // fails only for a stream that has ended
    let carried = closed.run_until_cancelled(write_chunk(&mut stream, header, bytes, counters)).await;
    carried.unwrap_or_else(|| {
        let _ = stream.reset(VarInt::from_u32(RESET_CLOSED)); // it may have ended just now
        Outcome::Lost
    })
}

async fn write_chunk(
    stream: &mut SendStream,
    header: &ChunkHeader,
    bytes: Bytes,
    counters: &Counters,
) -> Outcome {
    let mut parts = [Bytes::copy_from_slice(&header.encode()), bytes];
    let length: usize = parts.iter().map(Bytes::len).sum();
    match stream.write_all_chunks(&mut parts).await {
        Ok(()) => {
            counters.sent(Kind::from(header.id.channel), length);
            let _ = stream.finish(); // fails only for a stream that was stopped, as seen below
        }
        Err(quinn::WriteError::Stopped(code)) => return outcome_of(code),
        Err(
            quinn::WriteError::ConnectionLost(_)
            | quinn::WriteError::ClosedStream
            | quinn::WriteError::ZeroRttRejected,
        ) => return Outcome::Lost,
    }
    // Acknowledged by the other end's QUIC in full, or stopped by the gateway there.
    match stream.stopped().await {
        Ok(None) => Outcome::Sent,
        Ok(Some(code)) => outcome_of(code),
        Err(_lost) => Outcome::Lost,
    }
}

fn outcome_of(code: VarInt) -> Outcome {
    match u32::try_from(code.into_inner()) {
        Ok(STOP_DUPLICATE) => Outcome::Sent,
        Ok(STOP_UNWANTED) => Outcome::Refused,
        Ok(_) | Err(_) => Outcome::Lost,
    }
}

/// Memory before disks, and within a class what began earlier first: then retransmissions of an old chunk,
/// for which the consumer waits, are not queued behind everything newer. Control is above all.
fn priority(channel: Channel, chunks_begun: i32) -> i32 {
    let top = match channel {
        Channel::Memory => CONTROL_PRIORITY - 1,
        Channel::Disk(_) | Channel::Map(_) => -1,
    };
    top.saturating_sub(chunks_begun)
}

async fn read_control(
    mut control: ControlReader,
    reports: mpsc::Sender<ConnectionEvent>,
    counters: Arc<Counters>,
) {
    loop {
        let event = match control.next_frame().await {
            Ok(Some(body)) => {
                counters.received(Kind::Control, FRAME_PREFIX_BYTES + body.len());
                match Message::decode(&body) {
                    Ok(message) => ConnectionEvent::Message(message),
                    Err(error) => ConnectionEvent::Broken(error.into()),
                }
            }
            Ok(None) => ConnectionEvent::Broken(ProtocolError::ControlClosed),
            Err(error) => ConnectionEvent::Broken(WireError::from(error).into()),
        };
        let last = matches!(event, ConnectionEvent::Broken(_));
        if reports.send(event).await.is_err() || last {
            return;
        }
    }
}

async fn write_control(mut stream: SendStream, mut frames: mpsc::Receiver<Message>, counters: Arc<Counters>) {
    while let Some(message) = frames.recv().await {
        let frame = match message.encode() {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "A control message cannot be sent");
                continue;
            }
        };
        if stream.write_all(&frame).await.is_err() {
            return;
        }
        counters.sent(Kind::Control, frame.len());
    }
}

async fn accept_chunks(
    connection: Connection,
    reports: mpsc::Sender<ConnectionEvent>,
    counters: Arc<Counters>,
) {
    // The transport's stream limit bounds how many there are.
    let mut readers = JoinSet::new();
    loop {
        tokio::select! {
            stream = connection.accept_uni() => match stream {
                Ok(stream) => { readers.spawn(read_chunk(stream, reports.clone(), counters.clone())); }
                Err(_ended) => return,
            },
            Some(_done) = readers.join_next() => {}
        }
    }
}

async fn read_chunk(mut stream: RecvStream, reports: mpsc::Sender<ConnectionEvent>, counters: Arc<Counters>) {
    let mut header = [0; ChunkHeader::LEN];
    if stream.read_exact(&mut header).await.is_err() {
        return; // broke off before it said what it is
    }
    let header = match ChunkHeader::decode(&header) {
        Ok(header) => header,
        Err(error) => {
            let _ = reports.send(ConnectionEvent::Broken(error.into())).await;
            return;
        }
    };
    let (verdict, answer) = oneshot::channel();
    if reports.send(ConnectionEvent::ChunkBegins { header, verdict }).await.is_err() {
        return;
    }
    match answer.await {
        Ok(Verdict::Read) => {}
        Ok(Verdict::Duplicate) => return stop(&mut stream, STOP_DUPLICATE),
        Ok(Verdict::Unwanted) | Err(_) => return stop(&mut stream, STOP_UNWANTED),
    }
    let mut bytes = BytesMut::zeroed(header.length_bytes as usize);
    let event = match read_body(&mut stream, &mut bytes).await {
        Ok(()) => {
            counters.received(Kind::from(header.id.channel), ChunkHeader::LEN + bytes.len());
            ConnectionEvent::Chunk { header, bytes: bytes.freeze() }
        }
        Err(BodyError::BrokeOff) => ConnectionEvent::ChunkBroke { header },
        Err(BodyError::Length) => ConnectionEvent::Broken(ProtocolError::ChunkLength),
    };
    let _ = reports.send(event).await; // nobody listens any more: the connection was replaced
}

enum BodyError {
    BrokeOff,
    Length,
}

/// Reads a chunk's bytes and the end of its stream. Without the latter quinn would tell the sender that the
/// stream was stopped, which looks like a refusal when the last acknowledgement is lost.
async fn read_body(stream: &mut RecvStream, bytes: &mut [u8]) -> Result<(), BodyError> {
    stream.read_exact(bytes).await.map_err(|error| match error {
        quinn::ReadExactError::FinishedEarly(_) => BodyError::Length,
        quinn::ReadExactError::ReadError(_) => BodyError::BrokeOff,
    })?;
    match stream.read(&mut [0]).await {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(BodyError::Length),
        Err(_broke_off) => Err(BodyError::BrokeOff),
    }
}

fn stop(stream: &mut RecvStream, code: u32) {
    let _ = stream.stop(VarInt::from_u32(code));
}

async fn read_datagrams(
    connection: Connection,
    taker: watch::Receiver<Option<mpsc::Sender<Bytes>>>,
    counters: Arc<Counters>,
) {
    while let Ok(datagram) = connection.read_datagram().await {
        counters.received(Kind::Datagram, datagram.len());
        let taken = taker.borrow().as_ref().is_some_and(|taker| taker.try_send(datagram).is_ok());
        if !taken {
            counters.datagram_dropped();
        }
    }
}
