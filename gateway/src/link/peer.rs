//! One peer: the task that owns its connection, its channels and everything waiting for it.
//!
//! ```text
//!                 dial / accept               newer connection: replaces
//!      Down ------------------------> Up ---------------------------.
//!       ^   backoff, or the other      |  ^                          |
//!       |   side's turn                |  '--------------------------'
//!       '------------------------------'  idle, reset, closed, protocol error
//! ```
//!
//! The side with the smaller key dials if it has an address; the other one only after `dial_after`, or when its
//! gateway has just begun: a peer that still believes in the connection of before dials nobody. The end of a connection is an event: bulk channels wait and go on with the next one. What messages mean
//! is not known here.

use std::future::{Future, pending};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use longhaul_core::ids::SiteName;
use longhaul_core::wire::{MAX_FRAME_BYTES, Message};
use quinn::{ConnectionError, Endpoint};
use rand::Rng;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::bulk::BulkCommand;
use super::channels::{Channels, Class};
use super::config::{LinkConfig, PeerConfig};
use super::connection::{ConnectionEvent, ProtocolError, Running, Verdict, stream_bytes};
use super::handle::{Command, Current, LinkState};
use super::handshake::{CloseCode, Established, HandshakeError, Introduction};
use super::model::Pace;
use super::pacing::Paths;
use super::stats::Counters;
use super::transport;
use super::waiting::{Waiting, message_bytes};
use super::{DownReason, LinkEvent};

/// How often what a connection may change by itself is looked up again: the length of datagrams that fit, and its path.
const REFRESH: Duration = Duration::from_secs(1);

/// What a peer's task is made of: fixed things.
pub(super) struct PeerContext {
    pub(super) config: Arc<LinkConfig>,
    pub(super) peer: PeerConfig,
    /// This side's key is the smaller one: it dials first.
    pub(super) dials_first: bool,
    pub(super) endpoint: Endpoint,
    pub(super) paths: Arc<Paths>,
    pub(super) client: quinn::ClientConfig,
    pub(super) introduction: Introduction,
    pub(super) counters: Arc<Counters>,
    pub(super) events: mpsc::Sender<LinkEvent>,
    pub(super) datagrams: watch::Receiver<Option<mpsc::Sender<bytes::Bytes>>>,
}

/// Where a peer's task hears from.
pub(super) struct PeerInputs {
    pub(super) accepted: mpsc::Receiver<Established>,
    pub(super) messages: mpsc::Receiver<Message>,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) bulk_commands: mpsc::UnboundedReceiver<BulkCommand>,
}

type Dial = Pin<Box<dyn Future<Output = Result<Established, HandshakeError>> + Send>>;

/// The task's state.
pub(super) struct Peer {
    began: Instant,
    context: PeerContext,
    state: watch::Sender<LinkState>,
    channels: Channels,
    link: Option<Up>,
    dialing: Option<Dial>,
    next_dial: Option<Instant>,
    backoff: Duration,
    last_failure: Option<String>,
    peer_instance: Option<u64>,
    outbox: Waiting<Message>,
    event_queue: Waiting<LinkEvent>,
}

struct Up {
    running: Running,
    since: Instant,
    dialled_by_smaller: bool,
    instance: u64,
    under_way: [UnderWay; 2],
    /// What each of them may be.
    window_bytes: u64,
    /// The address that its controller paces.
    paced: SocketAddr,
}

/// Bulk data handed to QUIC and not done with, per class.
#[derive(Debug, Clone, Copy, Default)]
struct UnderWay {
    streams: u32,
    bytes: u64,
}

enum Input {
    Accepted(Established),
    Dialled(Result<Established, HandshakeError>),
    DialNow,
    Connection(ConnectionEvent),
    ConnectionEnded(ConnectionError),
    ControlReady,
    Unthrottled,
    Message(Message),
    Command(Command),
    Bulk(BulkCommand),
    EventSlot(mpsc::OwnedPermit<LinkEvent>),
    Refresh,
    Stop,
}

impl Peer {
    pub(super) fn new(context: PeerContext, state: watch::Sender<LinkState>, channels: Channels) -> Self {
        let backoff = context.config.backoff;
        let (control_queue, bytes) = (context.config.control_queue, context.config.control_queue_bytes);
        let mut peer = Self {
            began: Instant::now(),
            context,
            state,
            channels,
            link: None,
            dialing: None,
            next_dial: None,
            backoff,
            last_failure: None,
            peer_instance: None,
            outbox: Waiting::new(control_queue, bytes),
            event_queue: Waiting::new(control_queue, bytes),
        };
        peer.dial_in(jittered(backoff / 4));
        peer
    }

    /// Runs until `stop`.
    pub(super) async fn run(mut self, mut inputs: PeerInputs, stop: CancellationToken) {
        let mut refresh = tokio::time::interval(REFRESH);
        loop {
            let input = self.next_input(&mut inputs, &mut refresh, &stop).await;
            match input {
                Input::Stop => break,
                Input::Accepted(established) => self.handle_established(established),
                Input::Dialled(result) => self.handle_dialled(result),
                Input::DialNow => self.dial(),
                Input::Connection(event) => self.handle_connection_event(event),
                Input::ConnectionEnded(error) => self.disconnect(DownReason::from(error)),
                Input::ControlReady | Input::Unthrottled => {}
                Input::Message(message) => self.queue_message(message),
                Input::Command(command) => self.handle_command(command),
                Input::Bulk(command) => self.channels.handle_command(command),
                Input::EventSlot(slot) => {
                    if let Some(event) = self.event_queue.pop_front() {
                        slot.send(event);
                    }
                }
                Input::Refresh => {
                    self.refresh_max_datagram_len();
                    self.follow_path();
                }
            }
            self.transmit();
        }
        if let Some(link) = &self.link {
            CloseCode::Shutdown.close(&link.running.connection, "The gateway stops");
        }
    }

    async fn next_input(
        &mut self,
        inputs: &mut PeerInputs,
        refresh: &mut tokio::time::Interval,
        stop: &CancellationToken,
    ) -> Input {
        let outbox_has_room = self.outbox.has_room(MAX_FRAME_BYTES);
        let has_event = !self.event_queue.is_empty();
        let has_message = !self.outbox.is_empty() || self.channels.has_message();
        let next_dial = self.next_dial.filter(|_| self.dialing.is_none());
        let events = self.context.events.clone();
        let throttled_until = self.channels.throttled_until(self.began.elapsed()).map(|at| self.began + at);
        tokio::select! {
            () = stop.cancelled() => Input::Stop,
            Some(established) = inputs.accepted.recv() => Input::Accepted(established),
            result = dialled(&mut self.dialing) => Input::Dialled(result),
            () = sleep_until(next_dial) => Input::DialNow,
            () = sleep_until(throttled_until) => Input::Unthrottled,
            input = connection_input(&mut self.link, has_message) => input,
            Some(message) = inputs.messages.recv(), if outbox_has_room => Input::Message(message),
            Some(command) = inputs.commands.recv() => Input::Command(command),
            Some(command) = inputs.bulk_commands.recv() => Input::Bulk(command),
            Ok(slot) = events.reserve_owned(), if has_event => Input::EventSlot(slot),
            _ = refresh.tick() => Input::Refresh,
        }
    }

    fn handle_established(&mut self, established: Established) {
        if let Some(link) = &self.link
            && !self.is_better(link, &established)
        {
            CloseCode::Duplicate.close(&established.connection, "An older connection is kept");
            return;
        }
        if let Some(link) = &self.link {
            CloseCode::Replaced.close(&link.running.connection, "A newer connection takes over");
            self.disconnect(DownReason::Replaced);
        }
        self.connect(established);
    }

    /// The newest connection wins, with one exception: when both sides dialled at the same time, each has
    /// the other's as the newer one. Then both keep the one that the smaller key dialled.
    fn is_better(&self, link: &Up, new: &Established) -> bool {
        let restarted = new.peer.instance != link.instance;
        let crossed = link.dialled_by_smaller
            && new.dialled != self.context.dials_first
            && link.since.elapsed() < self.context.config.dial_after;
        restarted || !crossed
    }

    fn connect(&mut self, established: Established) {
        let connection = established.connection.clone();
        let (peer, version) = (established.peer.clone(), established.version);
        let dialled_by_smaller = established.dialled == self.context.dials_first;
        let remote = connection.remote_address();
        let running = Running::start(established, &self.context.counters, self.context.datagrams.clone());
        self.link = Some(Up {
            running,
            since: Instant::now(),
            dialled_by_smaller,
            instance: peer.instance,
            under_way: [UnderWay::default(); 2],
            window_bytes: self.context.config.window_bytes(),
            paced: remote,
        });
        let max_datagram_len = connection.max_datagram_size().unwrap_or(0);
        self.state.send_modify(|state| {
            state.current = Some(Current { connection, version, remote, max_datagram_len, pace: None });
        });
        self.follow_path();
        self.channels.handle_connected();
        self.next_dial = None;
        self.backoff = self.context.config.backoff;
        self.last_failure = None;
        let restarted = self.peer_instance.replace(peer.instance).is_some_and(|known| known != peer.instance);
        tracing::info!(peer = %self.name(), %remote, %version, software = peer.software.as_str(), "Link is up");
        self.tell(LinkEvent::Up { peer: self.name().clone(), version, remote, restarted });
    }

    fn disconnect(&mut self, reason: DownReason) {
        let Some(link) = self.link.take() else { return };
        let stats = link.running.connection.stats();
        self.context.paths.follow(link.paced, None);
        self.state.send_modify(|state| {
            state.current = None;
            state.past.add(&stats);
        });
        self.channels.handle_disconnected();
        self.outbox.clear();
        self.schedule_first_dial();
        tracing::info!(peer = %self.name(), %reason, "Link is down");
        self.tell(LinkEvent::Down { peer: self.name().clone(), reason });
    }

    fn handle_connection_event(&mut self, event: ConnectionEvent) {
        let result = match event {
            ConnectionEvent::Message(message) => self.handle_message(message),
            ConnectionEvent::ChunkBegins { header, verdict } => {
                let decided = self.channels.handle_chunk_begins(&header);
                // A reader that is gone needs no answer.
                let _ = verdict.send(*decided.as_ref().unwrap_or(&Verdict::Unwanted));
                decided.map(|_verdict| ()).map_err(ProtocolError::from)
            }
            ConnectionEvent::Chunk { header, bytes } => {
                self.channels.handle_chunk(&header, bytes);
                Ok(())
            }
            ConnectionEvent::ChunkBroke { header } => {
                self.channels.handle_chunk_broke(&header);
                Ok(())
            }
            ConnectionEvent::ChunkDone { id, number, stream_bytes, outcome } => {
                if let Some(link) = &mut self.link {
                    let under_way = &mut link.under_way[Class::of(id.channel) as usize];
                    under_way.streams -= 1;
                    under_way.bytes -= stream_bytes;
                }
                self.channels.handle_chunk_done(id, number, outcome);
                Ok(())
            }
            ConnectionEvent::Broken(error) => Err(error),
        };
        if let Err(error) = result {
            self.handle_broken(&error);
        }
    }

    fn handle_message(&mut self, message: Message) -> Result<(), ProtocolError> {
        match message {
            Message::BulkOpen { id, taken, next, window_bytes } => {
                self.channels.handle_peer_open(id, taken, next, window_bytes)
            }
            Message::BulkAck { id, taken } => {
                self.channels.handle_peer_ack(id, taken);
                Ok(())
            }
            Message::BulkClose { id } => {
                self.channels.handle_peer_close(id);
                Ok(())
            }
            message @ (Message::Migration { .. } | Message::Anchor(_)) => {
                self.deliver(message);
                Ok(())
            }
        }
    }

    fn deliver(&mut self, message: Message) {
        let bytes = message_bytes(&message);
        if self.event_queue.has_room(bytes) {
            self.event_queue.push_back(LinkEvent::Control { peer: self.name().clone(), message }, bytes);
            return;
        }
        tracing::warn!(peer = %self.name(), "The peer sends control messages faster than they are handled");
        self.close(CloseCode::Overrun, "Too many control messages", DownReason::Overrun);
    }

    /// Tells the gateway about the link. If it does not listen, only the last such event is kept for it.
    fn tell(&mut self, event: LinkEvent) {
        if self.event_queue.len() > self.context.config.control_queue {
            self.event_queue.retain(|queued| matches!(queued, LinkEvent::Control { .. }));
        }
        self.event_queue.push_back(event, 0);
    }

    fn handle_broken(&mut self, error: &ProtocolError) {
        let Some(link) = &self.link else { return };
        // The control stream also ends when the connection does; then that is the reason.
        if let Some(ended) = link.running.connection.close_reason() {
            return self.disconnect(DownReason::from(ended));
        }
        let description = describe(error);
        tracing::warn!(peer = %self.name(), error = description, "The peer broke the protocol");
        self.close(CloseCode::Protocol, &description, DownReason::Protocol(description.clone()));
    }

    fn close(&mut self, code: CloseCode, text: &str, reason: DownReason) {
        if let Some(link) = &self.link {
            code.close(&link.running.connection, text);
        }
        self.disconnect(reason);
    }

    fn queue_message(&mut self, message: Message) {
        if self.link.is_some() {
            let bytes = message_bytes(&message);
            self.outbox.push_back(message, bytes);
        }
    }

    fn handle_command(&mut self, command: Command) {
        // Whoever asked may have gone; a channel opened for nobody is dropped with the answer.
        match command {
            Command::OpenSender { id, window_bytes, reply } => {
                let _ = reply.send(self.channels.open_sender(id, window_bytes));
            }
            Command::OpenReceiver { id, window_bytes, reply } => {
                let _ = reply.send(self.channels.open_receiver(id, window_bytes));
            }
            Command::CloseBulk { migration, reply } => {
                self.channels.close_migration(migration);
                let _ = reply.send(());
            }
            Command::LimitMigration { migration, rate, reply } => {
                let _ = reply.send(self.channels.limit(migration, rate, self.began.elapsed()));
            }
            Command::Limit { rate } => {
                self.state.send_modify(|state| state.limit = rate);
                self.follow_path();
            }
        }
    }

    /// Hands to the connection what it takes now: control messages, then memory, then disks.
    fn transmit(&mut self) {
        let Some(link) = &mut self.link else { return };
        while let Ok(slot) = link.running.control.try_reserve() {
            let Some(message) = self.channels.poll_message().or_else(|| self.outbox.pop_front()) else {
                break;
            };
            slot.send(message);
        }
        let now = self.began.elapsed();
        let stream_limit = self.context.config.stream_limit.div_ceil(2);
        for class in Class::BY_URGENCY {
            let under_way = &mut link.under_way[class as usize];
            while under_way.streams < stream_limit && under_way.bytes < link.window_bytes {
                let Some(chunk) = self.channels.poll_transmit(class, now) else { break };
                under_way.streams += 1;
                under_way.bytes += stream_bytes(&chunk.bytes);
                link.running.send_chunk(chunk.header, chunk.bytes, chunk.closed);
            }
        }
    }

    fn schedule_first_dial(&mut self) {
        let wait = match self.context.dials_first {
            true => jittered(self.context.config.backoff / 4),
            false => jittered(self.context.config.dial_after),
        };
        self.dial_in(wait);
    }

    fn dial_in(&mut self, wait: Duration) {
        self.next_dial = self.context.peer.address.map(|_| Instant::now() + wait);
    }

    fn dial(&mut self) {
        self.next_dial = None;
        let Some(address) = self.context.peer.address else { return };
        let dial = self.context.introduction.clone().dial(
            self.context.endpoint.clone(),
            self.context.client.clone(),
            address,
            self.name().clone(),
        );
        let timeout = self.context.config.handshake_timeout;
        self.dialing = Some(Box::pin(async move {
            tokio::time::timeout(timeout, dial).await.unwrap_or(Err(HandshakeError::TimedOut))
        }));
    }

    fn handle_dialled(&mut self, result: Result<Established, HandshakeError>) {
        self.dialing = None;
        match result {
            Ok(established) => self.handle_established(established),
            Err(error) => self.handle_dial_failed(&error),
        }
    }

    fn handle_dial_failed(&mut self, error: &HandshakeError) {
        if self.link.is_some() {
            return; // the other side's dial was faster
        }
        self.next_dial = Some(Instant::now() + jittered(self.backoff));
        self.backoff = (self.backoff * 2).min(self.context.config.backoff_limit);
        let reason = describe(error);
        if self.last_failure.as_ref() == Some(&reason) {
            return;
        }
        match error.is_lasting() {
            true => tracing::warn!(peer = %self.name(), reason, "The peer cannot be linked with"),
            false => tracing::info!(peer = %self.name(), reason, "The peer does not answer yet"),
        }
        self.last_failure = Some(reason.clone());
        self.tell(LinkEvent::Unreachable { peer: self.name().clone(), reason });
    }

    fn refresh_max_datagram_len(&mut self) {
        self.state.send_if_modified(|state| {
            let Some(current) = &mut state.current else { return false };
            let max_len = current.connection.max_datagram_size().unwrap_or(0);
            let changed = max_len != current.max_datagram_len;
            current.max_datagram_len = max_len;
            changed
        });
    }

    /// Lets the connection's controller pace the address it sends to, and its windows hold what the path does. A peer behind
    /// a NAT can get another address, and a controller that knows nothing, at any time.
    fn follow_path(&mut self) {
        let Some(link) = &mut self.link else { return };
        let connection = &link.running.connection;
        let pace = Pace::of(connection.congestion_state());
        let left = std::mem::replace(&mut link.paced, connection.remote_address());
        if left != link.paced {
            self.context.paths.follow(left, None);
        }
        let rtt = pace.as_ref().and_then(|pace| pace.min_rtt()).unwrap_or_else(|| connection.rtt());
        let window_bytes = self.context.config.window_at(rtt);
        if window_bytes > link.window_bytes {
            link.window_bytes = window_bytes;
            transport::widen(connection, window_bytes);
        }
        self.context.paths.follow(link.paced, pace.clone());
        self.context.paths.limit(link.paced, self.state.borrow().limit);
        self.state.send_if_modified(|state| {
            if let Some(current) = &mut state.current {
                current.pace = pace;
            }
            state.window_bytes = link.window_bytes;
            false // nobody waits for that
        });
    }

    fn name(&self) -> &SiteName {
        &self.context.peer.name
    }
}

async fn dialled(dialing: &mut Option<Dial>) -> Result<Established, HandshakeError> {
    match dialing {
        Some(dial) => dial.await,
        None => pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => pending().await,
    }
}

async fn connection_input(link: &mut Option<Up>, has_message: bool) -> Input {
    let Some(link) = link else { return pending().await };
    tokio::select! {
        biased;
        Some(event) = link.running.events.recv() => Input::Connection(event),
        error = link.running.connection.closed() => Input::ConnectionEnded(error),
        Ok(_slot) = link.running.control.reserve(), if has_message => Input::ControlReady,
    }
}

/// `wait` and up to half of it more, so that sites which lost each other together do not return together.
fn jittered(wait: Duration) -> Duration {
    wait + wait.mul_f64(rand::rng().random_range(0.0..0.5))
}

/// An error with its sources in one line.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
