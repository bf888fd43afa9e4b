//! The bulk channels of one peer: who has which end open, what to send next and what to announce.
//!
//! ```text
//!  register receiver -> BulkOpen ------------------> peer's sender may send from `next`
//!  connection lost   -> nothing may be sent --> connected -> BulkOpen again, for every open receiver
//!  consumer leaves   -> BulkClose (now and on every connection) -> peer's sender is closed
//!  BulkOpen of a channel that was closed here -> BulkClose
//! ```
//!
//! A channel whose receiving end is not registered holds nothing here: its chunks are refused before they
//! are read. Owned by the peer's task; it touches no socket and waits for nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::time::Duration;

use bytes::Bytes;
use longhaul_core::bulk::{
    Acknowledged, Admission, BulkId, Channel, ChunkHeader, Delivery, ReceiveError, Receiver, SendWindow,
    Sender, Throttle,
};
use longhaul_core::ids::MigrationId;
use longhaul_core::units::{Bytes as Amount, Rate};
use longhaul_core::wire::Message;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::bulk::{BulkCommand, BulkReceiver, BulkSender, Delivered, ReceiveEnd};
use super::connection::{Outcome, ProtocolError, Verdict};

/// How many closed channels are remembered, so that their ids are not used again.
const RETIRED_LIMIT: usize = 1024;

/// Why a channel was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BulkError {
    /// The id is or was in use on this side.
    #[error("The bulk channel {0} was used before; each attempt needs an id of its own")]
    Used(BulkId),
    /// Too many channels.
    #[error("{0} bulk channels are open with this peer, no more are allowed")]
    TooMany(usize),
    /// The gateway is stopping.
    #[error("The link is closed")]
    LinkClosed,
}

/// Memory or disk: what limits bulk data under way is kept apart for the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Memory,
    Disk,
}

impl Class {
    pub(super) const BY_URGENCY: [Self; 2] = [Self::Memory, Self::Disk];

    pub(super) fn of(channel: Channel) -> Self {
        match channel {
            Channel::Memory => Self::Memory,
            Channel::Disk(_) | Channel::Map(_) => Self::Disk,
        }
    }
}

/// All bulk channels of one peer.
#[derive(Debug)]
pub(super) struct Channels {
    limit: usize,
    commands: mpsc::UnboundedSender<BulkCommand>,
    senders: BTreeMap<BulkId, SendSide>,
    receivers: BTreeMap<BulkId, ReceiveSide>,
    retired: VecDeque<BulkId>,
    announced: BTreeMap<BulkId, Announced>,
    messages: VecDeque<Message>,
    acks: BTreeSet<BulkId>,
    last_served: Option<BulkId>,
    /// What somebody limited, by migration; as many as have channels at most.
    throttles: BTreeMap<MigrationId, Throttle>,
    connected: bool,
}

#[derive(Debug)]
struct SendSide {
    sender: Sender,
    acknowledged: watch::Sender<Acknowledged>,
    /// Breaks off what is under way when the channel is closed.
    closed: CancellationToken,
    _close: DropGuard,
}

/// A chunk to be sent now.
#[derive(Debug)]
pub(super) struct Transmit {
    pub(super) header: ChunkHeader,
    pub(super) bytes: Bytes,
    /// Cancelled when the channel is closed before the chunk is through.
    pub(super) closed: CancellationToken,
}

#[derive(Debug)]
struct ReceiveSide {
    receiver: Receiver,
    /// `None` once the consumer left before the end.
    consumer: Option<mpsc::UnboundedSender<Delivered>>,
}

/// A receiving end that the peer announced on this connection.
#[derive(Debug, Clone, Copy)]
struct Announced {
    taken: u64,
    next: u64,
    window_bytes: u64,
}

impl Channels {
    pub(super) fn new(limit: usize, commands: mpsc::UnboundedSender<BulkCommand>) -> Self {
        Self {
            limit,
            commands,
            senders: BTreeMap::new(),
            receivers: BTreeMap::new(),
            retired: VecDeque::new(),
            announced: BTreeMap::new(),
            messages: VecDeque::new(),
            acks: BTreeSet::new(),
            last_served: None,
            throttles: BTreeMap::new(),
            connected: false,
        }
    }

    /// Opens a sending end.
    pub(super) fn open_sender(&mut self, id: BulkId, window_bytes: u64) -> Result<BulkSender, BulkError> {
        self.check(id, self.senders.len(), self.senders.contains_key(&id))?;
        let (acknowledged, watched) = watch::channel(Acknowledged::default());
        let closed = CancellationToken::new();
        let _close = closed.clone().drop_guard();
        self.senders.insert(id, SendSide { sender: Sender::new(), acknowledged, closed, _close });
        if let Some(announced) = self.announced.get(&id).copied() {
            self.handle_open(id, announced);
        }
        let window = SendWindow::new(window_bytes);
        Ok(BulkSender::new(id, window, watched, self.commands.clone()))
    }

    /// Opens a receiving end and announces it.
    pub(super) fn open_receiver(&mut self, id: BulkId, window_bytes: u64) -> Result<BulkReceiver, BulkError> {
        self.check(id, self.receivers.len(), self.receivers.contains_key(&id))?;
        let (consumer, chunks) = mpsc::unbounded_channel();
        let side = ReceiveSide { receiver: Receiver::new(window_bytes), consumer: Some(consumer) };
        self.announce(id, &side);
        self.receivers.insert(id, side);
        let commands = self.commands.clone();
        Ok(BulkReceiver { id, chunks, commands, received: 0, reported: 0, end: ReceiveEnd::Open })
    }

    /// Lets the bulk data of a migration leave no faster than `rate`, or as fast as the link is. Forgotten when its channels
    /// are closed.
    pub(super) fn limit(
        &mut self,
        migration: MigrationId,
        rate: Option<Rate>,
        now: Duration,
    ) -> Result<(), BulkError> {
        let Some(rate) = rate else {
            self.throttles.remove(&migration);
            return Ok(());
        };
        if self.throttles.len() >= self.limit && !self.throttles.contains_key(&migration) {
            return Err(BulkError::TooMany(self.limit));
        }
        let throttle = self.throttles.entry(migration).or_insert_with(|| Throttle::new(rate, now));
        throttle.set_rate(rate, now);
        Ok(())
    }

    /// When a migration that is limited may send again, if one may not now.
    pub(super) fn throttled_until(&self, now: Duration) -> Option<Duration> {
        self.throttles.values().filter_map(|throttle| throttle.refused_until(now)).min()
    }

    /// Closes all channels of a migration at once, here and at the peer.
    pub(super) fn close_migration(&mut self, migration: MigrationId) {
        self.throttles.remove(&migration);
        let of_it = |id: &&BulkId| id.migration == migration;
        let ids: BTreeSet<BulkId> =
            self.senders.keys().filter(of_it).chain(self.receivers.keys().filter(of_it)).copied().collect();
        for id in ids {
            self.close(id);
        }
    }

    /// What an end said.
    pub(super) fn handle_command(&mut self, command: BulkCommand) {
        match command {
            BulkCommand::Queue { id, chunk } => {
                let Some(side) = self.senders.get_mut(&id) else { return };
                if let Err(error) = side.sender.push(chunk) {
                    self.give_up(id, &error);
                }
            }
            BulkCommand::End { id } => {
                let Some(side) = self.senders.get_mut(&id) else { return };
                if let Err(error) = side.sender.end() {
                    self.give_up(id, &error);
                }
            }
            BulkCommand::Taken { id, taken } => {
                let Some(side) = self.receivers.get_mut(&id) else { return };
                side.receiver.handle_taken(taken);
                self.acks.insert(id);
            }
            BulkCommand::Abandon { id } => {
                let Some(side) = self.receivers.get_mut(&id) else { return };
                side.consumer = None;
                self.announce_close(id);
            }
        }
    }

    /// A connection is there: announces every receiving end.
    pub(super) fn handle_connected(&mut self) {
        self.connected = true;
        let receivers = std::mem::take(&mut self.receivers);
        for (id, side) in &receivers {
            self.announce(*id, side);
        }
        self.receivers = receivers;
    }

    /// The connection is gone: nothing is sent until the peer announces its ends again.
    pub(super) fn handle_disconnected(&mut self) {
        self.connected = false;
        self.announced.clear();
        self.messages.retain(|message| matches!(message, Message::BulkClose { .. }));
        self.acks.clear();
        for side in self.senders.values_mut() {
            side.sender.handle_disconnected();
        }
        for side in self.receivers.values_mut() {
            side.receiver.handle_disconnected();
        }
    }

    /// The peer receives on `id`.
    pub(super) fn handle_peer_open(
        &mut self,
        id: BulkId,
        taken: u64,
        next: u64,
        window_bytes: u64,
    ) -> Result<(), ProtocolError> {
        // Ids that were closed on this side may still be announced while the peer has not heard of it.
        if self.announced.len() >= self.limit + RETIRED_LIMIT && !self.announced.contains_key(&id) {
            return Err(ProtocolError::TooManyChannels { limit: self.limit + RETIRED_LIMIT });
        }
        let announced = Announced { taken, next, window_bytes };
        self.announced.insert(id, announced);
        match self.retired.contains(&id) {
            true => self.announce_close(id),
            false => self.handle_open(id, announced),
        }
        Ok(())
    }

    /// The peer's consumer took all below `taken`.
    pub(super) fn handle_peer_ack(&mut self, id: BulkId, taken: u64) {
        let Some(side) = self.senders.get_mut(&id) else { return };
        match side.sender.handle_ack(taken) {
            Ok(()) => self.publish(id),
            Err(error) => self.give_up(id, &error),
        }
    }

    /// The peer closed its end.
    pub(super) fn handle_peer_close(&mut self, id: BulkId) {
        self.announced.remove(&id);
        self.forget(id);
    }

    /// A chunk begins to arrive.
    pub(super) fn handle_chunk_begins(&mut self, header: &ChunkHeader) -> Result<Verdict, ReceiveError> {
        let Some(side) = self.receivers.get_mut(&header.id).filter(|side| side.consumer.is_some()) else {
            return Ok(Verdict::Unwanted);
        };
        Ok(match side.receiver.admit(header)? {
            Admission::Read => Verdict::Read,
            Admission::Duplicate => Verdict::Duplicate,
        })
    }

    /// A chunk is here; hands out what is now in order.
    pub(super) fn handle_chunk(&mut self, header: &ChunkHeader, bytes: Bytes) {
        let Some(side) = self.receivers.get_mut(&header.id) else { return };
        side.receiver.handle_chunk(header.number, bytes, header.end);
        while let Some(delivery) = side.receiver.poll_delivery() {
            let delivered = match delivery {
                Delivery::Chunk(bytes) => Delivered::Chunk(bytes),
                Delivery::End => Delivered::End,
            };
            if let Some(consumer) = &side.consumer {
                let _ = consumer.send(delivered); // it left; its Abandon is on the way
            }
        }
    }

    /// A chunk broke off.
    pub(super) fn handle_chunk_broke(&mut self, header: &ChunkHeader) {
        if let Some(side) = self.receivers.get_mut(&header.id) {
            side.receiver.handle_abandoned(header.number);
        }
    }

    /// A chunk of this side is done with.
    pub(super) fn handle_chunk_done(&mut self, id: BulkId, number: u64, outcome: Outcome) {
        let Some(side) = self.senders.get_mut(&id) else { return };
        match outcome {
            Outcome::Sent => side.sender.handle_sent(number),
            Outcome::Refused => side.sender.handle_refused(number),
            Outcome::Lost => side.sender.handle_lost(number),
        }
    }

    /// Whether [`Channels::poll_message`] has something.
    pub(super) fn has_message(&self) -> bool {
        !self.messages.is_empty() || !self.acks.is_empty()
    }

    /// The next control message; acknowledgements that waited together become one.
    pub(super) fn poll_message(&mut self) -> Option<Message> {
        if let Some(message) = self.messages.pop_front() {
            return Some(message);
        }
        while let Some(id) = self.acks.pop_first() {
            if let Some(side) = self.receivers.get(&id) {
                return Some(Message::BulkAck { id, taken: side.receiver.taken() });
            }
        }
        None
    }

    /// The next chunk of this class, channel after channel, of migrations that may send now.
    pub(super) fn poll_transmit(&mut self, class: Class, now: Duration) -> Option<Transmit> {
        let after = self.last_served.map_or(Bound::Unbounded, Bound::Excluded);
        let later: Vec<BulkId> = self.senders.range((after, Bound::Unbounded)).map(|(id, _)| *id).collect();
        let earlier = self.senders.keys().copied().take(self.senders.len() - later.len());
        let turn: Vec<BulkId> = later.iter().copied().chain(earlier).collect();
        for id in turn.into_iter().filter(|id| Class::of(id.channel) == class) {
            let throttle = self.throttles.get_mut(&id.migration);
            if throttle.as_ref().is_some_and(|throttle| throttle.refused_until(now).is_some()) {
                continue;
            }
            let Some(side) = self.senders.get_mut(&id) else { continue };
            let Some(outgoing) = side.sender.poll_transmit() else { continue };
            self.last_served = Some(id);
            if let Some(throttle) = throttle {
                throttle.handle_sent(Amount(outgoing.bytes.len() as u64), now);
            }
            let length_bytes = outgoing.bytes.len() as u32;
            let header = ChunkHeader { id, number: outgoing.number, length_bytes, end: outgoing.end };
            return Some(Transmit { header, bytes: outgoing.bytes, closed: side.closed.clone() });
        }
        None
    }

    fn check(&self, id: BulkId, open: usize, taken: bool) -> Result<(), BulkError> {
        if taken || self.retired.contains(&id) {
            return Err(BulkError::Used(id));
        }
        if open >= self.limit {
            return Err(BulkError::TooMany(self.limit));
        }
        Ok(())
    }

    fn announce(&mut self, id: BulkId, side: &ReceiveSide) {
        if !self.connected {
            return;
        }
        let receiver = &side.receiver;
        self.messages.push_back(match side.consumer {
            Some(_) => Message::BulkOpen {
                id,
                taken: receiver.taken(),
                next: receiver.next(),
                window_bytes: receiver.window_bytes(),
            },
            None => Message::BulkClose { id },
        });
    }

    fn handle_open(&mut self, id: BulkId, announced: Announced) {
        let Some(side) = self.senders.get_mut(&id) else { return };
        match side.sender.handle_open(announced.taken, announced.next, announced.window_bytes) {
            Ok(()) => self.publish(id),
            Err(error) => self.give_up(id, &error),
        }
    }

    /// Tells the producer what was acknowledged; a channel that is through is closed.
    fn publish(&mut self, id: BulkId) {
        let Some(side) = self.senders.get(&id) else { return };
        let now = side.sender.acknowledged();
        side.acknowledged.send_if_modified(|acknowledged| {
            let changed = *acknowledged != now;
            *acknowledged = now;
            changed
        });
        if side.sender.is_finished() {
            self.senders.remove(&id);
            self.retire(id);
        }
    }

    fn give_up(&mut self, id: BulkId, error: &dyn std::error::Error) {
        tracing::warn!(%id, %error, "A bulk channel is closed");
        self.close(id);
    }

    fn close(&mut self, id: BulkId) {
        self.announce_close(id);
        self.forget(id);
    }

    /// Also kept for the next connection, within a bound. Said once, however often the peer asks for it while
    /// it reads nothing.
    fn announce_close(&mut self, id: BulkId) {
        let close = Message::BulkClose { id };
        if self.messages.contains(&close) {
            return;
        }
        if !self.connected && self.messages.len() >= RETIRED_LIMIT {
            self.messages.pop_front();
        }
        self.messages.push_back(close);
    }

    fn forget(&mut self, id: BulkId) {
        let known = self.senders.remove(&id).is_some() | self.receivers.remove(&id).is_some();
        if known {
            self.retire(id);
        }
    }

    fn retire(&mut self, id: BulkId) {
        if self.retired.len() >= RETIRED_LIMIT {
            self.retired.pop_front();
        }
        self.retired.push_back(id);
    }
}
