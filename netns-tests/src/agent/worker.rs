//! Threads that own one piece of the service's state each, and work on it at a rate.
//!
//! A thread alternates between its steps and the jobs others send it; nobody else touches its state. Threads rather
//! than tasks, because every step waits for a disk or fills pages.

use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::dirt::Dirt;
use super::log::Log;
use super::memory::Region;

/// Something that is done again and again.
pub trait Task: Send + 'static {
    /// Time between two steps, or nothing to rest until the next job.
    fn interval(&self) -> Option<Duration>;
    /// One step.
    ///
    /// # Errors
    /// The task cannot go on; it rests from then on and keeps the error for its status.
    fn step(&mut self) -> io::Result<()>;
    /// Keeps an error for the status.
    fn failed(&mut self, error: &io::Error);
}

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// The way to a task's thread.
#[derive(Debug)]
pub struct Worker<S> {
    jobs: SyncSender<Job<S>>,
}

impl<S> Clone for Worker<S> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone() }
    }
}

/// Jobs that may wait for a task; more callers block, which costs them time and nobody else.
const JOBS_WAITING: usize = 16;

impl<S: Task> Worker<S> {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no more threads.
    pub fn start(name: &str, state: S) -> io::Result<Self> {
        let (jobs, inbox) = sync_channel(JOBS_WAITING);
        thread::Builder::new().name(name.to_owned()).spawn(move || work(state, &inbox))?;
        Ok(Self { jobs })
    }

    /// Runs `job` on the state, in its thread, and gives what it answers.
    ///
    /// # Errors
    /// The thread has ended, or as many jobs as it takes are waiting.
    pub async fn ask<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut S) -> R + Send + 'static,
    ) -> io::Result<R> {
        let (answer, wait) = tokio::sync::oneshot::channel();
        let job: Job<S> = Box::new(move |state| {
            let _ = answer.send(job(state));
        });
        self.jobs.try_send(job).map_err(|error| io::Error::other(error.to_string()))?;
        wait.await.map_err(io::Error::other)
    }
}

fn work<S: Task>(mut state: S, inbox: &Receiver<Job<S>>) {
    let mut broken = false;
    let mut due = Instant::now();
    loop {
        let interval = state.interval().filter(|_| !broken);
        let received = match interval {
            Some(_) => inbox.recv_timeout(due.saturating_duration_since(Instant::now())),
            None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(job) => job(&mut state),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                if let Err(error) = state.step() {
                    state.failed(&error);
                    broken = true;
                }
                due = next_due(due, interval.unwrap_or_default());
            }
        }
    }
}

/// Keeps the rate over short delays, but never makes up for a pause of the machine with a burst.
fn next_due(due: Instant, interval: Duration) -> Instant {
    let now = Instant::now();
    let next = due + interval;
    if now > next + Duration::from_secs(1) { now + interval } else { next }
}

/// Appends to a log `per_s` times a second.
#[derive(Debug)]
pub struct LogTask {
    /// The log.
    pub log: Log,
    /// Records a second; 0 rests.
    pub per_s: u64,
    /// Why it stopped.
    pub error: Option<String>,
}

impl LogTask {
    /// Opens the log at `path`.
    ///
    /// # Errors
    /// See [`Log::open`].
    pub fn open(path: &Path, per_s: u64) -> io::Result<Self> {
        Ok(Self { log: Log::open(path)?, per_s, error: None })
    }
}

impl Task for LogTask {
    fn interval(&self) -> Option<Duration> {
        (self.per_s > 0).then(|| Duration::from_micros(1_000_000 / self.per_s))
    }

    fn step(&mut self) -> io::Result<()> {
        self.log.append(unix_ms()).map(drop)
    }

    fn failed(&mut self, error: &io::Error) {
        self.error = Some(error.to_string());
    }
}

/// Rewrites blocks at `kib_per_s`.
#[derive(Debug)]
pub struct DiskTask {
    /// The blocks.
    pub dirt: Dirt,
    /// KiB a second, index included; 0 rests.
    pub kib_per_s: u64,
    /// Why it stopped.
    pub error: Option<String>,
}

const TICK: Duration = Duration::from_millis(100);
const SMALLEST_BATCH_BYTES: u64 = 16 << 10;

impl DiskTask {
    fn tick(&self) -> Duration {
        TICK.max(Duration::from_micros(SMALLEST_BATCH_BYTES * 1_000_000 / (self.kib_per_s.max(1) * 1024)))
    }
}

impl Task for DiskTask {
    fn interval(&self) -> Option<Duration> {
        (self.kib_per_s > 0).then(|| self.tick())
    }

    fn step(&mut self) -> io::Result<()> {
        self.dirt.rewrite(bytes_in(self.tick(), self.kib_per_s)).map(drop)
    }

    fn failed(&mut self, error: &io::Error) {
        self.error = Some(error.to_string());
    }
}

/// Touches pages at `kib_per_s`.
#[derive(Debug)]
pub struct MemoryTask {
    /// The pages.
    pub region: Region,
    /// KiB a second; 0 rests.
    pub kib_per_s: u64,
}

impl Task for MemoryTask {
    fn interval(&self) -> Option<Duration> {
        (self.kib_per_s > 0).then_some(TICK)
    }

    fn step(&mut self) -> io::Result<()> {
        self.region.touch(bytes_in(TICK, self.kib_per_s));
        Ok(())
    }

    fn failed(&mut self, _error: &io::Error) {}
}

fn bytes_in(time: Duration, kib_per_s: u64) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX).saturating_mul(kib_per_s * 1024) / 1_000_000
}

/// This machine's clock, milliseconds since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
