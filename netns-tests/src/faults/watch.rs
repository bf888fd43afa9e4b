//! Watches the machine's QEMUs at both sites by their second monitors for as long as a case lasts, and says when each ran.
//!
//! What proves that a QEMU ran is its own events and what it answers, by the one clock of this machine. Judges nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};
use tokio::sync::watch;

use crate::agent::worker::unix_ms;
use crate::scenario::monitor::{GuestEvent, Monitor};

/// Between two questions to a QEMU.
const POLL: Duration = Duration::from_millis(50);

/// A time in which a QEMU ran its guest, milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ran {
    /// From here on.
    pub from_ms: f64,
    /// Up to here, for certain.
    pub until_ms: f64,
}

/// Asks one QEMU all the time, also the one that comes after it.
pub struct Watcher {
    ended: Arc<AtomicBool>,
    state: watch::Receiver<Option<String>>,
    thread: JoinHandle<Vec<Ran>>,
}

impl Watcher {
    /// Begins; `socket` is the second monitor's and need not be there yet.
    pub fn start(socket: PathBuf) -> Result<Self> {
        let (told, state) = watch::channel(None);
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let thread = std::thread::Builder::new()
            .name("watcher".into())
            .spawn(move || observe(&socket, &end, &told))?;
        Ok(Self { ended, state, thread })
    }

    /// The run state as it was last seen; `None` when there was no QEMU.
    pub fn state(&self) -> Option<String> {
        self.state.borrow().clone()
    }

    /// Ends, and says when the guest ran. The monitor is free then.
    pub async fn finish(self) -> Result<Vec<Ran>> {
        self.ended.store(true, Ordering::Relaxed);
        let joined = tokio::task::spawn_blocking(move || self.thread.join()).await?;
        joined.map_err(|_| anyhow!("The watcher broke"))
    }
}

/// How often a guest ran at one site while it ran at the other.
pub fn overlaps(one: &[Ran], other: &[Ran]) -> u64 {
    let overlap =
        |left: &Ran, right: &Ran| left.from_ms.max(right.from_ms) <= left.until_ms.min(right.until_ms);
    one.iter().map(|left| other.iter().filter(|right| overlap(left, right)).count() as u64).sum()
}

fn observe(socket: &Path, ended: &AtomicBool, told: &watch::Sender<Option<String>>) -> Vec<Ran> {
    let mut log = RunLog::default();
    let mut monitor: Option<Monitor> = None;
    while !ended.load(Ordering::Relaxed) {
        if monitor.is_none() {
            monitor = Monitor::connect(socket, Duration::ZERO).ok();
        }
        let asked_ms = unix_ms() as f64;
        let answer = monitor.as_mut().map(Monitor::state);
        for event in monitor.iter().flat_map(Monitor::events) {
            log.event(&event);
        }
        let state = match answer {
            Some(Ok(state)) => {
                log.answer(asked_ms, state == "running");
                Some(state)
            }
            Some(Err(_)) | None => {
                log.gone();
                monitor = None;
                None
            }
        };
        told.send_replace(state);
        std::thread::sleep(POLL);
    }
    log.gone();
    log.runs
}

/// Folds events and answers into times.
#[derive(Debug, Default)]
struct RunLog {
    runs: Vec<Ran>,
    since_ms: Option<f64>,
    confirmed_ms: f64,
    stopped_ms: f64,
}

impl RunLog {
    fn event(&mut self, event: &GuestEvent) {
        match event.name.as_str() {
            "RESUME" => {
                self.since_ms.get_or_insert(event.unix_ms);
                self.confirmed_ms = event.unix_ms;
            }
            "STOP" | "SHUTDOWN" => {
                self.stopped_ms = event.unix_ms;
                if let Some(from_ms) = self.since_ms.take() {
                    self.runs.push(Ran { from_ms, until_ms: event.unix_ms });
                }
            }
            _ => {}
        }
    }

    fn answer(&mut self, asked_ms: f64, running: bool) {
        if !running {
            return self.gone();
        }
        // The answer may be older than the event that came with it.
        if asked_ms > self.stopped_ms {
            self.since_ms.get_or_insert(asked_ms);
            self.confirmed_ms = asked_ms.max(self.confirmed_ms);
        }
    }

    fn gone(&mut self) {
        if let Some(from_ms) = self.since_ms.take() {
            self.runs.push(Ran { from_ms, until_ms: self.confirmed_ms });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, unix_ms: f64) -> GuestEvent {
        GuestEvent { name: name.into(), unix_ms }
    }

    #[test]
    fn a_hand_over_is_no_overlap_and_a_copy_that_runs_beside_it_is_one() {
        let mut source = RunLog::default();
        source.answer(100.0, true);
        source.answer(150.0, true);
        source.event(&event("STOP", 180.0));
        source.answer(170.0, true);
        source.gone();
        assert_eq!(source.runs, [Ran { from_ms: 100.0, until_ms: 180.0 }]);
        let mut destination = RunLog::default();
        destination.event(&event("RESUME", 300.0));
        destination.answer(320.0, true);
        destination.gone();
        assert_eq!(overlaps(&source.runs, &destination.runs), 0);
        source.event(&event("RESUME", 310.0));
        source.event(&event("STOP", 315.0));
        assert_eq!(overlaps(&source.runs, &destination.runs), 1);
    }
}
