//! The link: one QUIC connection with each peer over one UDP port, and what keeps it alive.
//!
//! ```text
//!   Link -- acceptor task ----.        PeerHandle, BulkSender, BulkReceiver, DatagramSender
//!     |                       v              |
//!     '---- one task per peer: Peer <--------'
//!                  |  owns Channels (bulk) and Up (the connection there is now)
//!                  '-- tasks of the connection: control, chunks, datagrams
//! ```
//!
//! | file | what |
//! |---|---|
//! | `config` | what may be set, defaults, costs |
//! | `acceptor`, `tls`, `handshake` | who may dial, who a peer is, and the version both speak |
//! | `transport`, `pacing`, `model`, `controller` | quinn made fit for a long path |
//! | `peer`, `connection`, `channels`, `waiting` | a peer's task, the tasks of a connection, its bulk channels, what waits |
//! | `handle`, `bulk`, `stats` | what the rest of the gateway sees |
//!
//! The end of a connection is an event here and no failure: bulk channels wait and resume, control
//! messages may be lost and are repeated by whoever sent them. What is carried is not looked into.

mod acceptor;
mod bulk;
mod channels;
mod config;
mod connection;
mod controller;
mod handle;
mod handshake;
mod model;
mod pacing;
mod peer;
mod stats;
mod tls;
mod transport;
mod waiting;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use longhaul_core::ids::SiteName;
use longhaul_core::wire::{Hello, Message, Software, Version};
use quinn::{ConnectionError, Endpoint};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::identity::{Fingerprint, Identity, PublicKey};
use acceptor::Acceptor;
use channels::Channels;
use handle::LinkState;
use handshake::{CloseCode, Established, Introduction};
use pacing::Paths;
use peer::{Peer, PeerContext, PeerInputs};
use stats::Counters;
use tls::{RefusedKey, Tls};

pub use bulk::{BulkReceiver, BulkSender, OnItsWay, ReceiveEnd};
pub use channels::BulkError;
pub use config::{CongestionControl, LinkConfig, MIN_MTU_BYTES, PeerConfig};
pub use handle::{DatagramDropped, DatagramSender, NotConnected, PeerHandle, Unsent};
pub use stats::{LinkStats, Traffic, UdpTraffic};

/// How many events may wait for the gateway, over all peers; behind them each peer's own queue. Few, because
/// each can be a frame of the largest size.
const EVENT_QUEUE: usize = 16;

/// How many refused keys may wait to be logged.
const REFUSED_QUEUE: usize = 64;

/// How many refused keys are remembered so that each is logged once.
const REMEMBERED_KEYS: usize = 1024;

/// How many requests of handles may wait for one peer's task.
const COMMAND_QUEUE: usize = 64;

/// How long closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A value that does not work.
    #[error("The link configuration does not work: {expected}")]
    Config {
        /// What was expected.
        expected: String,
    },
    /// The UDP port cannot be opened.
    #[error("Cannot listen on UDP {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The identity does not work for TLS.
    #[error("The site's key does not work for TLS 1.3")]
    Tls(#[source] rustls::Error),
    /// The TLS provider is incomplete.
    #[error("The TLS provider lacks the cipher that QUIC begins with")]
    NoInitialCipherSuite,
}

/// What happens on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// A connection is there. Control messages from before may have been lost.
    Up {
        /// The peer.
        peer: SiteName,
        /// The protocol version both speak.
        version: Version,
        /// Where the peer is.
        remote: SocketAddr,
        /// The peer's gateway is another process than last time: its unjournaled state is gone.
        restarted: bool,
    },
    /// The connection is gone; a new one is being tried.
    Down {
        /// The peer.
        peer: SiteName,
        /// Why.
        reason: DownReason,
    },
    /// A control message that is not the link's own.
    Control {
        /// The peer.
        peer: SiteName,
        /// The message.
        message: Message,
    },
    /// Dialling fails; told once per reason, while the link keeps trying.
    Unreachable {
        /// The peer.
        peer: SiteName,
        /// Why, in words for the operator.
        reason: String,
    },
    /// Somebody without a configured key was refused; told once per key.
    Refused {
        /// The key, when it was an Ed25519 key.
        key: Option<PublicKey>,
    },
}

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownReason {
    /// Nothing arrived for the idle timeout.
    Silent,
    /// The peer's gateway does not know the connection: it was started anew.
    Reset,
    /// The peer's gateway stops.
    PeerStopped,
    /// A newer connection took its place.
    Replaced,
    /// The peer broke the protocol.
    Protocol(String),
    /// The peer sends more control messages than are handled.
    Overrun,
    /// Anything else, in words.
    Other(String),
}

impl fmt::Display for DownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent => f.write_str("nothing arrived from the peer"),
            Self::Reset => f.write_str("the peer's gateway was started anew"),
            Self::PeerStopped => f.write_str("the peer's gateway stops"),
            Self::Replaced => f.write_str("a newer connection took over"),
            Self::Protocol(error) => write!(f, "the peer broke the protocol: {error}"),
            Self::Overrun => f.write_str("the peer sends too many control messages"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl From<ConnectionError> for DownReason {
    fn from(error: ConnectionError) -> Self {
        match &error {
            ConnectionError::TimedOut => Self::Silent,
            ConnectionError::Reset => Self::Reset,
            _ if CloseCode::Shutdown.is_in(&error) => Self::PeerStopped,
            _ if CloseCode::Replaced.is_in(&error) || CloseCode::Duplicate.is_in(&error) => Self::Replaced,
            ConnectionError::VersionMismatch
            | ConnectionError::TransportError(_)
            | ConnectionError::ConnectionClosed(_)
            | ConnectionError::ApplicationClosed(_)
            | ConnectionError::LocallyClosed
            | ConnectionError::CidsExhausted => Self::Other(peer::describe(&error)),
        }
    }
}

/// The link of this site with all its peers. Dropping it ends all tasks and connections.
#[derive(Debug)]
pub struct Link {
    endpoint: Endpoint,
    peers: Arc<BTreeMap<SiteName, PeerHandle>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    _stop_on_drop: DropGuard,
}

impl Link {
    /// Opens the UDP port and begins to link with all peers. Events must be read: control messages of a
    /// peer whose queue is full end its connection.
    pub async fn open(
        config: LinkConfig,
        identity: &Identity,
    ) -> Result<(Self, mpsc::Receiver<LinkEvent>), LinkError> {
        config.check().map_err(|expected| LinkError::Config { expected })?;
        let config = Arc::new(config);
        let (refused, refusals) = mpsc::channel(REFUSED_QUEUE);
        let tls = Tls::new(identity, refused)?;
        let transport = transport::transport_config(&config)?;
        let keys = config.peers.iter().map(|peer| peer.key).collect();
        let paths = Paths::new(config.rate);
        let endpoint = transport::open(&config, identity, tls.server(keys)?, &transport, &paths)?;
        let introduction = introduction(&config)?;
        let (events, event_receiver) = mpsc::channel(EVENT_QUEUE);
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();

        let mut peers = BTreeMap::new();
        let mut accepted = BTreeMap::new();
        for peer in &config.peers {
            let (taker, datagrams) = watch::channel(None);
            let context = PeerContext {
                config: config.clone(),
                peer: peer.clone(),
                dials_first: identity.public_key() < peer.key,
                endpoint: endpoint.clone(),
                paths: paths.clone(),
                client: transport::client_config(tls.client(peer.key)?, &transport),
                introduction: introduction.clone(),
                counters: Arc::new(Counters::default()),
                events: events.clone(),
                datagrams,
            };
            let (handle, accepts) = start_peer(context, taker, &tasks, &stop);
            accepted.insert(peer.name.clone(), accepts);
            peers.insert(peer.name.clone(), handle);
        }
        let acceptor = Acceptor { config: config.clone(), introduction, accepted };
        tasks.spawn(stop.clone().run_until_cancelled_owned(acceptor.run(endpoint.clone())));
        tasks.spawn(stop.clone().run_until_cancelled_owned(report_refused_keys(refusals, events)));
        let guard = stop.clone().drop_guard();
        let link = Self { endpoint, peers: Arc::new(peers), tasks, stop, _stop_on_drop: guard };
        Ok((link, event_receiver))
    }

    /// The handle of a configured peer.
    pub fn peer(&self, name: &SiteName) -> Option<PeerHandle> {
        self.peers.get(name).cloned()
    }

    /// All configured peers, by name.
    pub fn peers(&self) -> impl Iterator<Item = &PeerHandle> {
        self.peers.values()
    }

    /// The UDP address this link listens on.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Takes leave of all peers and waits until that is sent, at most a second.
    pub async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        let idle = async {
            self.tasks.wait().await;
            self.endpoint.close((CloseCode::Shutdown as u32).into(), b"The gateway stops");
            self.endpoint.wait_idle().await;
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, idle).await; // the peers then learn it from silence
    }
}

fn introduction(config: &LinkConfig) -> Result<Introduction, LinkError> {
    let software = Software::try_from(format!("longhaul {}", env!("CARGO_PKG_VERSION")))
        .map_err(|invalid| LinkError::Config { expected: invalid.to_string() })?;
    let hello =
        Hello { versions: config.versions, site: config.site.clone(), instance: rand::random(), software };
    Ok(Introduction { hello })
}

fn start_peer(
    context: PeerContext,
    taker: watch::Sender<Option<mpsc::Sender<bytes::Bytes>>>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> (PeerHandle, mpsc::Sender<Established>) {
    let (accepts, accepted) = mpsc::channel(1);
    let (messages, message_receiver) = mpsc::channel(COMMAND_QUEUE);
    let (commands, command_receiver) = mpsc::channel(COMMAND_QUEUE);
    let (bulk_commands, bulk_receiver) = mpsc::unbounded_channel();
    let (state, state_receiver) = watch::channel(LinkState::default());
    let handle = PeerHandle {
        name: context.peer.name.clone(),
        key: context.peer.key,
        messages,
        commands,
        state: state_receiver,
        counters: context.counters.clone(),
        datagram_taker: Arc::new(taker),
        datagram_queue: context.config.datagram_queue,
        datagram_buffer: context.config.datagram_buffer(),
    };
    let inputs = PeerInputs {
        accepted,
        messages: message_receiver,
        commands: command_receiver,
        bulk_commands: bulk_receiver,
    };
    let channels = Channels::new(context.config.channel_limit, bulk_commands);
    tasks.spawn(Peer::new(context, state, channels).run(inputs, stop.clone()));
    (handle, accepts)
}

/// Logs and reports each refused key once.
async fn report_refused_keys(mut refusals: mpsc::Receiver<RefusedKey>, events: mpsc::Sender<LinkEvent>) {
    let mut known: BTreeSet<Option<Fingerprint>> = BTreeSet::new();
    while let Some(refused) = refusals.recv().await {
        let key = match refused {
            RefusedKey::Unknown(key) => Some(key),
            RefusedKey::NotEd25519 => None,
        };
        let fingerprint = key.map(|key| key.fingerprint());
        if known.len() >= REMEMBERED_KEYS || !known.insert(fingerprint) {
            continue;
        }
        match (key, fingerprint) {
            (Some(key), Some(fingerprint)) => tracing::warn!(
                %fingerprint, %key,
                "Refused a peer with an unknown key; if it is one of yours, add the key to [[peer]]"
            ),
            (None, _) | (_, None) => tracing::warn!("Refused a peer whose key is not Ed25519"),
        }
        if events.send(LinkEvent::Refused { key }).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
