//! The task that owns a monitor's socket: frames and parses messages, pairs answers with questions.
//!
//! It does not wait for anything on behalf of a caller; limits in time are the caller's.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{QmpError, QmpEvent};

/// Commands that a hanging QEMU has not read, in bytes, beyond what the socket holds.
const MAX_UNSENT_BYTES: usize = 64 << 10;

/// A command on its way to the task that owns the socket.
#[derive(Debug)]
pub(super) struct Command {
    pub name: String,
    pub arguments: Value,
    pub out_of_band: bool,
    pub answer: oneshot::Sender<Result<Value, QmpError>>,
}

/// Everything QEMU sends.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Message {
    Greeting {
        #[serde(rename = "QMP")]
        hello: Hello,
    },
    Event {
        event: String,
        #[serde(default)]
        data: Value,
        timestamp: Timestamp,
    },
    Failure {
        error: Failure,
        #[serde(default)]
        id: Option<u64>,
    },
    Success {
        #[serde(rename = "return")]
        value: Value,
        #[serde(default)]
        id: Option<u64>,
    },
}

#[derive(Debug, Deserialize)]
pub(super) struct Hello {
    pub version: Value,
    pub capabilities: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Timestamp {
    /// QEMU writes -1 in both when its clock fails.
    seconds: i64,
    microseconds: i64,
}

#[derive(Debug, Deserialize)]
pub(super) struct Failure {
    class: String,
    desc: String,
}

pub(super) fn parse(line: &[u8], peer: &str) -> Result<Message, QmpError> {
    serde_json::from_slice(line)
        .map_err(|error| QmpError::Protocol { peer: peer.to_owned(), reason: error.to_string() })
}

/// What the owning task has: the socket, and who waits for which answer.
pub(super) struct Connection<R, W> {
    peer: String,
    lines: Lines<R>,
    writer: W,
    outgoing: Vec<u8>,
    queue: mpsc::Receiver<Command>,
    events: broadcast::Sender<QmpEvent>,
    pending: BTreeMap<u64, (String, oneshot::Sender<Result<Value, QmpError>>)>,
    next_id: u64,
    max_pending: usize,
}

/// What happened last.
enum Happened {
    Line(io::Result<Option<Vec<u8>>>),
    Wrote(io::Result<usize>),
    Asked(Option<Command>),
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Connection<R, W> {
    pub fn new(
        peer: String,
        lines: Lines<R>,
        writer: W,
        queue: mpsc::Receiver<Command>,
        events: broadcast::Sender<QmpEvent>,
        max_pending: usize,
    ) -> Self {
        let (outgoing, pending) = (Vec::new(), BTreeMap::new());
        Self { peer, lines, writer, outgoing, queue, events, pending, next_id: 1, max_pending }
    }

    /// Serves the monitor until it closes or nobody is left to ask it something.
    pub async fn run(mut self) {
        loop {
            let happened = tokio::select! {
                line = self.lines.next() => Happened::Line(line),
                wrote = self.writer.write(&self.outgoing), if !self.outgoing.is_empty() => Happened::Wrote(wrote),
                asked = self.queue.recv() => Happened::Asked(asked),
            };
            let go_on = match happened {
                Happened::Line(Ok(Some(line))) => self.handle_line(&line),
                Happened::Wrote(Ok(written)) if written > 0 => {
                    self.outgoing.drain(..written);
                    true
                }
                Happened::Asked(Some(command)) => {
                    self.handle_command(command);
                    true
                }
                Happened::Line(Ok(None) | Err(_)) | Happened::Wrote(_) | Happened::Asked(None) => false,
            };
            if !go_on {
                break;
            }
        }
        tracing::debug!(peer = self.peer, "monitor closed");
        for (_, (_, answer)) in self.pending {
            // Whoever gave up waiting needs no answer.
            let _ = answer.send(Err(QmpError::Gone { peer: self.peer.clone() }));
        }
    }

    fn handle_command(&mut self, command: Command) {
        self.pending.retain(|_, (_, answer)| !answer.is_closed());
        if self.pending.len() >= self.max_pending || self.outgoing.len() > MAX_UNSENT_BYTES {
            let busy = QmpError::Busy { peer: self.peer.clone(), pending: self.pending.len() };
            let _ = command.answer.send(Err(busy));
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        let verb = if command.out_of_band { "exec-oob" } else { "execute" };
        let mut message = json!({ verb: command.name, "id": id });
        if !command.arguments.is_null() {
            message["arguments"] = command.arguments;
        }
        tracing::trace!(peer = self.peer, %message, "to QEMU");
        self.outgoing.extend_from_slice(message.to_string().as_bytes());
        self.outgoing.push(b'\n');
        self.pending.insert(id, (command.name, command.answer));
    }

    /// Applies one message; false when what comes is no longer QMP.
    fn handle_line(&mut self, line: &[u8]) -> bool {
        match parse(line, &self.peer) {
            Ok(Message::Event { event, data, timestamp }) => {
                let at = Duration::from_secs(timestamp.seconds.max(0).unsigned_abs())
                    + Duration::from_micros(timestamp.microseconds.max(0).unsigned_abs());
                tracing::trace!(peer = self.peer, event, %data, "from QEMU");
                // Nobody has to listen.
                let _ = self.events.send(QmpEvent { name: event, data, at });
            }
            Ok(Message::Success { value, id }) => self.answer(id, |_| Ok(value)),
            Ok(Message::Failure { error, id }) => self.answer(id, |command| {
                Err(QmpError::Refused { command, class: error.class, desc: error.desc })
            }),
            Ok(Message::Greeting { .. }) => tracing::warn!(peer = self.peer, "QEMU greeted twice"),
            Err(error) => {
                tracing::warn!(peer = self.peer, %error, "giving the monitor up");
                return false;
            }
        }
        true
    }

    fn answer(&mut self, id: Option<u64>, result: impl FnOnce(String) -> Result<Value, QmpError>) {
        if let Some((command, answer)) = id.and_then(|id| self.pending.remove(&id)) {
            // Whoever gave up waiting needs no answer.
            let _ = answer.send(result(command));
        }
    }
}

/// Lines of bounded length; `next` can be cancelled without losing bytes.
pub(super) struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
    max: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub fn new(reader: R, max: usize) -> Self {
        Self { reader: BufReader::new(reader), line: Vec::new(), max }
    }

    pub async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let available = self.reader.fill_buf().await?;
            if available.is_empty() {
                return Ok(None);
            }
            let (taken, ended) = match available.iter().position(|&byte| byte == b'\n') {
                Some(at) => (at + 1, true),
                None => (available.len(), false),
            };
            if self.line.len() + taken > self.max {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"));
            }
            self.line.extend_from_slice(&available[..taken]);
            self.reader.consume(taken);
            if ended {
                return Ok(Some(std::mem::take(&mut self.line)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::super::{EventLoss, QmpClient, QmpConfig, QmpError};

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}"#;

    /// The far end of a monitor, played by the test.
    struct Far(DuplexStream);

    impl Far {
        async fn say(&mut self, line: &str) {
            self.0.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
        }

        async fn hear(&mut self) -> serde_json::Value {
            let mut line = Vec::new();
            loop {
                match self.0.read_u8().await.unwrap() {
                    b'\n' => return serde_json::from_slice(&line).unwrap(),
                    byte => line.push(byte),
                }
            }
        }
    }

    fn config() -> QmpConfig {
        QmpConfig { greeting_limit: Duration::from_millis(50), ..QmpConfig::default() }
    }

    async fn connected(config: QmpConfig) -> (QmpClient, Far) {
        let (near, far) = duplex(64 << 10);
        let mut far = Far(far);
        let (reader, writer) = tokio::io::split(near);
        let client = QmpClient::over(reader, writer, "test".to_owned(), config);
        let answer = async {
            far.say(GREETING).await;
            let asked = far.hear().await;
            assert_eq!(asked["arguments"]["enable"], json!(["oob"]));
            far.say(&json!({ "return": {}, "id": asked["id"] }).to_string()).await;
            far
        };
        let (client, far) = tokio::join!(client, answer);
        (client.unwrap(), far)
    }

    #[tokio::test]
    async fn a_monitor_that_does_not_greet_is_called_taken() {
        let (near, _far) = duplex(1024);
        let (reader, writer) = tokio::io::split(near);
        let error = QmpClient::over(reader, writer, "test".to_owned(), config()).await.unwrap_err();
        assert!(matches!(error, QmpError::Taken { .. }) && error.to_string().contains("libvirt"), "{error}");
    }

    #[tokio::test]
    async fn answers_reach_whoever_asked_in_any_order() {
        let (client, mut far) = connected(config()).await;
        let far_end = async {
            let (first, second) = (far.hear().await, far.hear().await);
            far.say(r#"{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 500000}}"#).await;
            for asked in [second, first] {
                far.say(&json!({ "return": asked["execute"], "id": asked["id"] }).to_string()).await;
            }
            far
        };
        let mut events = client.events();
        let (one, two) = (client.execute("one", json!({})), client.execute("two", json!(null)));
        let (one, two, _far) = tokio::join!(one, two, far_end);
        assert_eq!((one.unwrap(), two.unwrap()), (json!("one"), json!("two")));
        let event = events.next().await.unwrap();
        assert_eq!((event.name.as_str(), event.at), ("STOP", Duration::from_millis(1500)));
    }

    #[tokio::test]
    async fn a_refusal_keeps_class_and_words() {
        let (client, mut far) = connected(config()).await;
        let far_end = async {
            let id = far.hear().await["id"].clone();
            far.say(
                &json!({ "error": { "class": "CommandNotFound", "desc": "no such thing" }, "id": id })
                    .to_string(),
            )
            .await;
            far
        };
        let (result, _far) = tokio::join!(client.execute("x", json!({})), far_end);
        let error = result.unwrap_err();
        assert!(error.is_class("CommandNotFound") && error.to_string().contains("no such thing"), "{error}");
    }

    #[tokio::test]
    async fn the_end_of_qemu_fails_what_waits_and_ends_the_events() {
        let (client, far) = connected(config()).await;
        let mut events = client.events();
        let (result, ()) = tokio::join!(client.execute("x", json!({})), async {
            let mut far = far;
            far.hear().await;
        });
        assert!(matches!(result, Err(QmpError::Gone { .. })));
        client.closed().await;
        assert_eq!(events.next().await, Err(EventLoss::Gone));
        assert_eq!(client.events().next().await, Err(EventLoss::Gone));
        assert!(matches!(client.execute("x", json!({})).await, Err(QmpError::Gone { .. })));
    }

    #[tokio::test]
    async fn a_late_answer_is_dropped_and_the_next_one_heard() {
        let config = QmpConfig { command_limit: Duration::from_millis(30), ..config() };
        let (client, mut far) = connected(config).await;
        let late = client.execute("slow", json!({})).await;
        assert!(matches!(late, Err(QmpError::Timeout { .. })));
        let slow = far.hear().await["id"].clone();
        let far_end = async {
            let next = far.hear().await["id"].clone();
            for (id, value) in [(slow, "slow"), (next, "next")] {
                far.say(&json!({ "return": value, "id": id }).to_string()).await;
            }
            far
        };
        let next = client.execute_within("next", json!({}), Duration::from_secs(5));
        let (next, _far) = tokio::join!(next, far_end);
        assert_eq!(next.unwrap(), json!("next"));
    }

    #[tokio::test]
    async fn a_message_longer_than_the_limit_ends_the_connection() {
        let (client, mut far) = connected(QmpConfig { max_message_bytes: 200, ..config() }).await;
        // With the line's end, which `say` adds in two bytes.
        let line = |length: usize| {
            let frame = r#"{"return": "", "id": 2}"#.len() + 2;
            format!(r#"{{"return": "{}", "id": 2}}"#, "x".repeat(length - frame))
        };
        let (fits, far) = tokio::join!(client.execute("x", json!({})), async {
            far.hear().await;
            far.say(&line(200)).await;
            far
        });
        assert!(fits.is_ok(), "{fits:?}");
        let mut far = far;
        far.say(&line(201)).await;
        client.closed().await;
    }

    #[tokio::test]
    async fn one_command_too_many_is_refused_at_once() {
        let (client, mut far) = connected(QmpConfig { max_pending: 2, ..config() }).await;
        let (a, b) = (client.execute("a", json!({})), client.execute("b", json!({})));
        let third = async {
            far.hear().await;
            far.hear().await;
            let third = client.execute("c", json!({})).await;
            drop(far);
            third
        };
        let (a, b, third) = tokio::join!(a, b, third);
        assert!(matches!(third, Err(QmpError::Busy { pending: 2, .. })), "{third:?}");
        assert!(matches!((a, b), (Err(QmpError::Gone { .. }), Err(QmpError::Gone { .. }))));
    }
}
