//! A QMP client: one task owns the socket, callers send it commands and wait for their answers.
//!
//! ```text
//!   connect --greeting--> negotiate --> ready --EOF, error--> gone
//!                |                        |  ^
//!                | none in 2 s            +--+ command out, answer or event in
//!                v
//!          "taken by another owner"
//! ```
//!
//! A monitor serves one client. A second one can connect, but is greeted only after the first has left,
//! which is how a monitor that somebody else owns is told from one that is free. Answers carry the
//! command's id; an answer that comes after its limit is dropped, for then the outcome is unknown to
//! the caller, who must ask for the state. The client does not know what the commands mean.
//! Protocol: QEMU docs/interop/qmp-spec.

mod connection;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::{timeout, timeout_at};

use connection::{Command, Connection, Lines, Message, parse};

/// Limits of a QMP connection.
#[derive(Debug, Clone)]
pub struct QmpConfig {
    /// How long a monitor may take to greet. 2 s: a free one greets within a millisecond, and a longer
    /// wait only delays the message that it is taken.
    pub greeting_limit: Duration,
    /// How long a command may take. 10 s: QEMU answers in milliseconds unless its main loop hangs.
    pub command_limit: Duration,
    /// Events kept for a reader that lags. 256, about 100 KB; a slower reader is told how many it lost.
    pub event_queue: usize,
    /// The longest message taken from QEMU. 4 MiB: `query-qmp-schema` has 0.2 MiB, and a longer one
    /// costs this much memory once per guest.
    pub max_message_bytes: usize,
    /// Commands without an answer yet. 64; the next caller gets an error.
    pub max_pending: usize,
}

impl Default for QmpConfig {
    fn default() -> Self {
        Self {
            greeting_limit: Duration::from_secs(2),
            command_limit: Duration::from_secs(10),
            event_queue: 256,
            max_message_bytes: 4 << 20,
            max_pending: 64,
        }
    }
}

/// Why a command was not carried out, or why that is not known.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket is not there or nobody listens.
    #[error("No QEMU answers at {}; is the machine running?", path.display())]
    Connect {
        /// The monitor's socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else is connected to the monitor.
    #[error(
        "The monitor {peer} does not greet within {} s: another owner, perhaps libvirt, holds it. \
         Stop that one, or start the machine with a monitor of its own for Longhaul",
        limit.as_secs_f32()
    )]
    Taken {
        /// The monitor's socket.
        peer: String,
        /// How long was waited.
        limit: Duration,
    },
    /// QEMU refused the command; nothing was done.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// The error class (`GenericError`, `CommandNotFound`, `DeviceNotFound`, ...).
        class: String,
        /// QEMU's own words.
        desc: String,
    },
    /// No answer came in time. The command may still be carried out.
    #[error("QEMU did not answer {command} within {} s; it may still act on it", limit.as_secs_f32())]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        limit: Duration,
    },
    /// The connection ended: QEMU quit, crashed, or closed the monitor.
    #[error("QEMU at {peer} is gone")]
    Gone {
        /// The monitor's socket.
        peer: String,
    },
    /// What came is not QMP.
    #[error("{peer} does not speak QMP: {reason}")]
    Protocol {
        /// The monitor's socket.
        peer: String,
        /// What was wrong.
        reason: String,
    },
    /// An answer to `command` that does not have the documented form.
    #[error("QEMU answered {command} with something unexpected: {reason}")]
    Answer {
        /// The command.
        command: String,
        /// What was wrong.
        reason: String,
    },
    /// Too many commands wait for an answer.
    #[error("{pending} commands wait for QEMU at {peer} already")]
    Busy {
        /// The monitor's socket.
        peer: String,
        /// How many wait.
        pending: usize,
    },
}

impl QmpError {
    /// Whether QEMU refused the command with this error class.
    pub fn is_class(&self, wanted: &str) -> bool {
        matches!(self, Self::Refused { class, .. } if class == wanted)
    }
}

/// An event that QEMU sent by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct QmpEvent {
    /// Its name: `STOP`, `MIGRATION`, `BLOCK_JOB_READY`, ...
    pub name: String,
    /// What belongs to it.
    pub data: Value,
    /// When it happened by QEMU's clock, as time since the Unix epoch.
    pub at: Duration,
}

/// Why an event stream has a hole or an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventLoss {
    /// The reader was too slow; ask for the state instead.
    #[error("{0} events were lost to a slow reader")]
    Missed(u64),
    /// QEMU is gone.
    #[error("QEMU is gone")]
    Gone,
}

/// The events of one guest from the moment of subscription.
#[derive(Debug)]
pub struct Events(broadcast::Receiver<QmpEvent>);

impl From<broadcast::Receiver<QmpEvent>> for Events {
    fn from(receiver: broadcast::Receiver<QmpEvent>) -> Self {
        Self(receiver)
    }
}

impl Events {
    /// The next event. Cancel safe.
    pub async fn next(&mut self) -> Result<QmpEvent, EventLoss> {
        self.0.recv().await.map_err(|error| match error {
            broadcast::error::RecvError::Lagged(missed) => EventLoss::Missed(missed),
            broadcast::error::RecvError::Closed => EventLoss::Gone,
        })
    }
}

/// How many connections this process has made.
static CONNECTIONS: AtomicU64 = AtomicU64::new(0);

/// A connection to one monitor. Clones share it; it closes when the last one is dropped.
#[derive(Debug, Clone)]
pub struct QmpClient {
    id: u64,
    peer: String,
    config: QmpConfig,
    commands: mpsc::Sender<Command>,
    /// A template to subscribe from. It never reads, so that it never holds an event back.
    events: broadcast::WeakSender<QmpEvent>,
    version: Value,
}

impl QmpClient {
    /// Connects to a monitor's UNIX socket, waits for its greeting and negotiates.
    pub async fn connect(path: &Path, config: QmpConfig) -> Result<Self, QmpError> {
        let refused = |source| QmpError::Connect { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).await.map_err(refused)?;
        let (reader, writer) = stream.into_split();
        Self::over(reader, writer, path.display().to_string(), config).await
    }

    /// The same over any pair of streams; `peer` is what errors call it.
    pub async fn over<R, W>(reader: R, writer: W, peer: String, config: QmpConfig) -> Result<Self, QmpError>
    where
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let mut lines = Lines::new(reader, config.max_message_bytes);
        let greeting = match timeout(config.greeting_limit, lines.next()).await {
            Err(_) => return Err(QmpError::Taken { peer, limit: config.greeting_limit }),
            Ok(line) => line,
        };
        let greeting = match greeting {
            Err(source) => return Err(QmpError::Protocol { peer, reason: source.to_string() }),
            Ok(None) => return Err(QmpError::Gone { peer }),
            Ok(Some(line)) => parse(&line, &peer)?,
        };
        let Message::Greeting { hello } = greeting else {
            return Err(QmpError::Protocol { peer, reason: "it does not begin with a greeting".to_owned() });
        };
        let (commands, queue) = mpsc::channel(config.max_pending);
        let (events, _) = broadcast::channel(config.event_queue);
        let weak = events.downgrade();
        let connection = Connection::new(peer.clone(), lines, writer, queue, events, config.max_pending);
        tokio::spawn(connection.run());
        let id = CONNECTIONS.fetch_add(1, Ordering::Relaxed);
        let client = Self { id, peer, config, commands, events: weak, version: hello.version };
        let enable: &[&str] =
            if hello.capabilities.iter().any(|name| name == "oob") { &["oob"] } else { &[] };
        client.execute("qmp_capabilities", json!({ "enable": enable })).await?;
        Ok(client)
    }

    /// A number that no other connection of this process has; clones share it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The monitor's name in messages: its socket's path.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// What the greeting says about QEMU's version (the same as `query-version`).
    pub fn version(&self) -> &Value {
        &self.version
    }

    /// Sends a command and waits for its answer, for the configured limit.
    pub async fn execute(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.request(name, arguments, false, self.config.command_limit).await
    }

    /// The same with a limit of its own, for commands that wait for others (`blockdev-add` to a server).
    pub async fn execute_within(
        &self,
        name: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        self.request(name, arguments, false, limit).await
    }

    /// Sends a command out of band: QEMU carries it out even while its main loop hangs. Only few
    /// commands can (`yank`, `migrate-pause`).
    pub async fn execute_out_of_band(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.request(name, arguments, true, self.config.command_limit).await
    }

    /// Sends a command and reads its answer into `T`.
    pub async fn query<T: for<'de> Deserialize<'de>>(
        &self,
        name: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let answer = self.execute(name, arguments).await?;
        serde_json::from_value(answer)
            .map_err(|error| QmpError::Answer { command: name.to_owned(), reason: error.to_string() })
    }

    /// Events from now on.
    pub fn events(&self) -> Events {
        match self.events.upgrade() {
            Some(sender) => Events(sender.subscribe()),
            // The sender is gone with the connection; a receiver of a dropped channel says so.
            None => Events(broadcast::channel(1).1),
        }
    }

    /// Waits until the connection ends, that is until QEMU is gone. Cancel safe.
    pub async fn closed(&self) {
        self.commands.closed().await;
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }

    async fn request(
        &self,
        name: &str,
        arguments: Value,
        out_of_band: bool,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let deadline = tokio::time::Instant::now() + limit;
        let (answer, answered) = oneshot::channel();
        let command = Command { name: name.to_owned(), arguments, out_of_band, answer };
        let gone = || QmpError::Gone { peer: self.peer.clone() };
        let late = || QmpError::Timeout { command: name.to_owned(), limit };
        timeout_at(deadline, self.commands.send(command)).await.map_err(|_| late())?.map_err(|_| gone())?;
        timeout_at(deadline, answered).await.map_err(|_| late())?.map_err(|_| gone())?
    }
}
