//! What the rest of the gateway holds of a peer: cheap handles that talk to the peer's task.
//!
//! No handle owns state of the link; all stay valid while connections come and go, until the link is
//! closed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use longhaul_core::bulk::BulkId;
use longhaul_core::ids::{MigrationId, SiteName};
use longhaul_core::units::{Bytes as Amount, Rate};
use longhaul_core::wire::{Message, Version};
use quinn::Connection;
use tokio::sync::{mpsc, oneshot, watch};

use super::bulk::{BulkReceiver, BulkSender, SLACK};
use super::channels::BulkError;
use super::model::Pace;
use super::stats::{Counters, Kind, LinkStats, PastConnections};
use crate::identity::PublicKey;

/// There is no connection with the peer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The peer is not connected")]
pub struct NotConnected;

/// Why a control message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsent {
    /// The link is down.
    #[error("The peer is not connected")]
    NotConnected,
    /// As many wait already as may.
    #[error("The peer does not read what it is sent")]
    Full,
}

/// Why a datagram was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DatagramDropped {
    /// The link is down.
    #[error("The peer is not connected")]
    NotConnected,
    /// It does not fit a packet.
    #[error("The datagram is longer than the {max_len} bytes that fit a packet")]
    TooLong {
        /// What fits.
        max_len: usize,
    },
    /// More wait to be sent than the buffer holds.
    #[error("The datagram buffer is full")]
    Full,
}

/// The connection as handles see it.
#[derive(Debug, Clone)]
pub(super) struct Current {
    pub(super) connection: Connection,
    pub(super) version: Version,
    pub(super) remote: SocketAddr,
    pub(super) max_datagram_len: usize,
    /// What its controller estimates, if it does.
    pub(super) pace: Option<Arc<Pace>>,
}

impl Current {
    /// What the path is believed to hold, with so much more time than its shortest round trip; `None` where that is not known.
    pub(super) fn held(&self, slack: Duration) -> Option<Amount> {
        let pace = self.pace.as_ref()?;
        Some(pace.bandwidth()?.bytes_in(pace.min_rtt()? + slack))
    }
}

/// What the peer's task publishes.
#[derive(Debug, Clone, Default)]
pub(super) struct LinkState {
    pub(super) current: Option<Current>,
    pub(super) past: PastConnections,
    /// What bulk data of one kind may have under way on the newest connection; zero before the first.
    pub(super) window_bytes: u64,
    /// What an operator lets be sent to the peer at most, below what is configured.
    pub(super) limit: Option<Rate>,
}

/// What handles ask of the peer's task.
#[derive(Debug)]
pub(super) enum Command {
    OpenSender {
        id: BulkId,
        window_bytes: u64,
        reply: oneshot::Sender<Result<BulkSender, BulkError>>,
    },
    OpenReceiver {
        id: BulkId,
        window_bytes: u64,
        reply: oneshot::Sender<Result<BulkReceiver, BulkError>>,
    },
    CloseBulk {
        migration: MigrationId,
        reply: oneshot::Sender<()>,
    },
    LimitMigration {
        migration: MigrationId,
        rate: Option<Rate>,
        reply: oneshot::Sender<Result<(), BulkError>>,
    },
    Limit {
        rate: Option<Rate>,
    },
}

/// A bulk channel of less holds a fast local path back.
const LEAST_BULK_WINDOW_BYTES: u64 = 4 << 20;

/// One peer.
#[derive(Debug, Clone)]
pub struct PeerHandle {
    pub(super) name: SiteName,
    pub(super) key: PublicKey,
    pub(super) messages: mpsc::Sender<Message>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) state: watch::Receiver<LinkState>,
    pub(super) counters: Arc<Counters>,
    pub(super) datagram_taker: Arc<watch::Sender<Option<mpsc::Sender<Bytes>>>>,
    pub(super) datagram_queue: usize,
    pub(super) datagram_buffer: DatagramBuffer,
}

/// How many bytes of datagrams may wait to be sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct DatagramBuffer {
    /// Whatever the path holds.
    pub(super) least: usize,
    /// Whatever it holds.
    pub(super) most: usize,
}

impl DatagramBuffer {
    /// Whether so many bytes may wait on a path that holds so much.
    fn takes(self, bytes: usize, held: impl FnOnce() -> Option<Amount>) -> bool {
        bytes <= self.least || held().is_some_and(|held| bytes as u64 <= (held.0 / 2).min(self.most as u64))
    }
}

impl PeerHandle {
    /// The peer's site.
    pub fn name(&self) -> &SiteName {
        &self.name
    }

    /// The peer's key.
    pub fn key(&self) -> PublicKey {
        self.key
    }

    /// Whether there is a connection now.
    pub fn is_up(&self) -> bool {
        self.state.borrow().current.is_some()
    }

    /// Where the peer is and which protocol version is spoken, while there is a connection.
    pub fn remote(&self) -> Option<(SocketAddr, Version)> {
        self.state.borrow().current.as_ref().map(|current| (current.remote, current.version))
    }

    /// Waits until there is a connection; at once if there is one.
    pub async fn up(&self) -> Result<(), NotConnected> {
        let mut state = self.state.clone();
        state.wait_for(|state| state.current.is_some()).await.map(|_| ()).map_err(|_closed| NotConnected)
    }

    /// Sends a control message, waiting while many wait already. It may be lost when the connection ends:
    /// whoever needs an answer repeats it after [`super::LinkEvent::Up`].
    pub async fn send(&self, message: Message) -> Result<(), NotConnected> {
        if !self.is_up() {
            return Err(NotConnected);
        }
        self.messages.send(message).await.map_err(|_closed| NotConnected)
    }

    /// Sends a control message if it need not wait for that. It may be lost like one of [`PeerHandle::send`].
    pub fn try_send(&self, message: Message) -> Result<(), Unsent> {
        if !self.is_up() {
            return Err(Unsent::NotConnected);
        }
        self.messages.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Unsent::Full,
            mpsc::error::TrySendError::Closed(_) => Unsent::NotConnected,
        })
    }

    /// Opens the sending end of a bulk channel; nothing is transmitted before the peer opens its receiving
    /// end. `window_bytes` bounds what is queued and not yet taken at the other site.
    pub async fn bulk_sender(&self, id: BulkId, window_bytes: u64) -> Result<BulkSender, BulkError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::OpenSender { id, window_bytes, reply }).await?;
        let opened = answer.await.map_err(|_closed| BulkError::LinkClosed)?;
        opened.map(|sender| sender.with_path(self.state.clone()))
    }

    /// Opens the receiving end of a bulk channel. `window_bytes` bounds what is held here and what the
    /// peer may send ahead; below rate times round trip it limits the throughput.
    pub async fn bulk_receiver(&self, id: BulkId, window_bytes: u64) -> Result<BulkReceiver, BulkError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::OpenReceiver { id, window_bytes, reply }).await?;
        answer.await.map_err(|_closed| BulkError::LinkClosed)?
    }

    /// A channel's window that keeps this path full, in bytes: half more than what is under way on it, for what waits at
    /// either end, but no more than `most_bytes`.
    pub fn bulk_window_bytes(&self, most_bytes: u64) -> u64 {
        let under_way_bytes = self.state.borrow().window_bytes;
        (under_way_bytes * 3 / 2).max(LEAST_BULK_WINDOW_BYTES).min(most_bytes)
    }

    /// Breaks off all bulk channels of a migration, on both sides if connected, and forgets them. To be
    /// called when a migration is over, also after a good end.
    pub async fn close_bulk(&self, migration: MigrationId) {
        let (reply, done) = oneshot::channel();
        if self.ask(Command::CloseBulk { migration, reply }).await.is_ok() {
            let _ = done.await; // a closed link has no channels
        }
    }

    /// From now on no more is sent to the peer than `rate`, everything counted, or than is configured. The data of guests'
    /// connections goes first all the same.
    pub async fn limit(&self, rate: Option<Rate>) -> Result<(), BulkError> {
        self.ask(Command::Limit { rate }).await
    }

    /// From now on the memory and disks of a migration leave this site no faster than `rate`, or as fast as the link is,
    /// until its channels are closed.
    pub async fn limit_migration(&self, migration: MigrationId, rate: Option<Rate>) -> Result<(), BulkError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::LimitMigration { migration, rate, reply }).await?;
        answer.await.map_err(|_closed| BulkError::LinkClosed)?
    }

    /// The limit that [`PeerHandle::limit`] set.
    pub fn limited_to(&self) -> Option<Rate> {
        self.state.borrow().limit
    }

    /// A handle for sending datagrams.
    pub fn datagram_sender(&self) -> DatagramSender {
        let buffer = self.datagram_buffer;
        DatagramSender { state: self.state.clone(), counters: self.counters.clone(), buffer }
    }

    /// Datagrams from the peer, from now on. Who calls last gets them; without a taker they are dropped.
    pub fn take_datagrams(&self) -> mpsc::Receiver<Bytes> {
        let (taker, datagrams) = mpsc::channel(self.datagram_queue);
        self.datagram_taker.send_replace(Some(taker));
        datagrams
    }

    /// The figures so far.
    pub fn stats(&self) -> LinkStats {
        let state = self.state.borrow().clone();
        self.counters.stats(&state.past, state.current.as_ref())
    }

    /// What the path is believed to hold, acknowledgements on their way back included; `None` where that is not known.
    pub fn path_holds(&self) -> Option<Amount> {
        self.state.borrow().current.as_ref()?.held(SLACK)
    }

    async fn ask(&self, command: Command) -> Result<(), BulkError> {
        self.commands.send(command).await.map_err(|_closed| BulkError::LinkClosed)
    }
}

/// Sends datagrams to one peer. Cheap to clone; one per task is meant.
#[derive(Debug, Clone)]
pub struct DatagramSender {
    state: watch::Receiver<LinkState>,
    counters: Arc<Counters>,
    buffer: DatagramBuffer,
}

impl DatagramSender {
    /// Sends a datagram or drops it, and counts both.
    pub fn try_send(&self, datagram: Bytes) -> Result<(), DatagramDropped> {
        let length = datagram.len();
        let result = self.offer(datagram);
        match result {
            Ok(()) => self.counters.sent(Kind::Datagram, length),
            Err(_) => self.counters.datagram_dropped(),
        }
        result
    }

    /// The longest datagram in bytes; `None` while the link is down.
    pub fn max_len(&self) -> Option<usize> {
        self.state.borrow().current.as_ref().map(|current| current.max_datagram_len)
    }

    /// Waits until the link comes, goes or changes the length that fits; gives [`DatagramSender::max_len`].
    pub async fn changed(&mut self) -> Result<Option<usize>, NotConnected> {
        self.state.changed().await.map_err(|_closed| NotConnected)?;
        Ok(self.max_len())
    }

    /// The path's round trip; `None` while the link is down.
    pub fn rtt(&self) -> Option<Duration> {
        self.state.borrow().current.as_ref().map(|current| current.connection.rtt())
    }

    fn offer(&self, datagram: Bytes) -> Result<(), DatagramDropped> {
        let state = self.state.borrow();
        let current = state.current.as_ref().ok_or(DatagramDropped::NotConnected)?;
        let max_len = current.max_datagram_len;
        if datagram.len() > max_len {
            return Err(DatagramDropped::TooLong { max_len });
        }
        // quinn would make room by dropping the oldest, which nobody would count.
        let waiting = self.buffer.most.saturating_sub(current.connection.datagram_send_buffer_space());
        if !self.buffer.takes(waiting + datagram.len(), || current.held(Duration::ZERO)) {
            return Err(DatagramDropped::Full);
        }
        current.connection.send_datagram(datagram).map_err(|error| match error {
            quinn::SendDatagramError::TooLarge => DatagramDropped::TooLong { max_len },
            quinn::SendDatagramError::ConnectionLost(_)
            | quinn::SendDatagramError::UnsupportedByPeer
            | quinn::SendDatagramError::Disabled => DatagramDropped::NotConnected,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_datagrams_wait_as_half_the_path_holds_within_the_bounds() {
        let buffer = DatagramBuffer { least: 1000, most: 8000 };
        let largest = |held: Option<u64>| {
            (0..20_000).take_while(|bytes| buffer.takes(*bytes, || held.map(Amount))).last().unwrap()
        };
        assert_eq!(largest(None), 1000, "a path that nothing is known of");
        assert_eq!(largest(Some(500)), 1000);
        assert_eq!(largest(Some(6000)), 3000);
        assert_eq!(largest(Some(1 << 40)), 8000);
    }
}
