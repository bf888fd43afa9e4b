//! A second monitor on a guest's QEMU: the pause as QEMU's own events tell it, independent of the
//! gateway.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// One event of one QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestEvent {
    /// QMP's name: `STOP`, `RESUME`, `SHUTDOWN`, `RESET`, ...
    pub name: String,
    /// By QEMU's clock, milliseconds since the UNIX epoch.
    pub unix_ms: f64,
}

/// A monitor that collects events and answers questions.
pub struct Monitor {
    writer: UnixStream,
    answers: Receiver<Value>,
    events: Receiver<GuestEvent>,
    reader: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Connects as soon as the socket is there.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self> {
        let stream = wait_for(socket, limit)?;
        let writer = stream.try_clone()?;
        let (answer, answers) = channel();
        let (event, events) = channel();
        let reader = std::thread::spawn(move || read(stream, &answer, &event));
        let mut monitor = Self { writer, answers, events, reader: Some(reader) };
        monitor.answers.recv_timeout(Duration::from_secs(5)).context("The monitor does not greet")?;
        monitor.ask("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Asks QEMU; an error of QEMU's is an error here.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{line}")?;
        let answer = self.answers.recv_timeout(Duration::from_secs(30)).context("QEMU does not answer")?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => bail!("{command}: {answer}"),
        }
    }

    /// The run state.
    pub fn state(&mut self) -> Result<String> {
        let status = self.ask("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Events since the last call.
    pub fn events(&self) -> Vec<GuestEvent> {
        self.events.try_iter().collect()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // A QEMU that is gone has closed it already.
        let _ = self.writer.shutdown(std::net::Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn wait_for(socket: &Path, limit: Duration) -> Result<UnixStream> {
    let deadline = Instant::now() + limit;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("No monitor at {}", socket.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn read(stream: UnixStream, answers: &Sender<Value>, events: &Sender<GuestEvent>) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
        let Some(name) = value["event"].as_str() else {
            if answers.send(value).is_err() {
                return;
            }
            continue;
        };
        let stamp = &value["timestamp"];
        let seconds = stamp["seconds"].as_f64().unwrap_or(0.0);
        let unix_ms = seconds * 1e3 + stamp["microseconds"].as_f64().unwrap_or(0.0) / 1e3;
        if events.send(GuestEvent { name: name.to_owned(), unix_ms }).is_err() {
            return;
        }
    }
}

/// Waits in the background for the QEMU that a destination starts, so that its first event is seen.
pub fn connect_later(socket: PathBuf, limit: Duration) -> JoinHandle<Result<Monitor>> {
    std::thread::spawn(move || Monitor::connect(&socket, limit))
}
