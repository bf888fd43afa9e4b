//! The control service: tells the laboratory what the guest has done, as JSON, and takes a few orders.
//!
//! | path | answer |
//! |---|---|
//! | `/status` | [`AgentStatus`] |
//! | `/log/tail?count=N` | list of [`super::log::Record`], oldest first |
//! | `/log/verify`, `/second-log/verify` | [`super::log::LogVerdict`] |
//! | `/disk/verify` | [`super::dirt::DirtVerdict`] |
//! | `/memory/verify` | [`super::memory::MemoryVerdict`] |
//! | `/set?log_per_s=&disk_kib_per_s=&memory_kib_per_s=` | changes rates; 0 rests |
//! | `/write?runs=N&blocks=M` | rewrites N runs of M blocks of 4 KiB; answers [`AgentStatus`] when they are on the disk |
//! | `/poweroff`, `/reboot` | the guest ends cleanly |

use std::io;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use super::http::{Request, read_request, respond};
use super::worker::{DiskTask, LogTask, MemoryTask, Worker, unix_ms};

/// Connections the service has seen.
#[derive(Debug, Default)]
pub struct Counters {
    /// Accepted since start.
    pub accepted: AtomicU64,
    /// Open now.
    pub open: AtomicU64,
}

/// The service as the control port sees it.
#[derive(Debug, Clone)]
pub struct Control {
    /// The kernel's boot id.
    pub boot_id: Arc<str>,
    /// The log on the root disk.
    pub log: Worker<LogTask>,
    /// The log on the second disk.
    pub second_log: Option<Worker<LogTask>>,
    /// The rewritten blocks.
    pub disk: Worker<DiskTask>,
    /// The touched pages.
    pub memory: Worker<MemoryTask>,
    /// Connections to the other ports.
    pub counters: Arc<Counters>,
}

/// What `/status` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The kernel's boot id: the same before and after a move, another after a reboot.
    pub boot_id: String,
    /// Time since the guest's kernel started, by its own clock.
    pub uptime_ms: u64,
    /// The guest's clock, milliseconds since 1970.
    pub unix_ms: u64,
    /// Number of the last log record.
    pub log_last: u64,
    /// Bytes of a torn record that the last start removed.
    pub log_cut_bytes: u64,
    /// Number of the last record of the second disk's log.
    pub second_log_last: Option<u64>,
    /// Bytes written by the disk dirtier since its start.
    pub disk_written_bytes: u64,
    /// Its rate.
    pub disk_kib_per_s: u64,
    /// Bytes touched by the memory dirtier since its start.
    pub memory_touched_bytes: u64,
    /// Its rate.
    pub memory_kib_per_s: u64,
    /// Connections accepted since start, control ones left out.
    pub connections_accepted: u64,
    /// Connections open now, control ones left out.
    pub connections_open: u64,
    /// What failed, if anything did.
    pub errors: Vec<String>,
}

impl Control {
    /// Answers one connection.
    ///
    /// # Errors
    /// The connection ends.
    pub async fn serve(self, mut stream: TcpStream) -> io::Result<()> {
        let request = read_request(&mut stream).await?;
        match self.answer(&request).await {
            Ok(Some(body)) => respond(&mut stream, "200 OK", "application/json", &body).await,
            Ok(None) => respond(&mut stream, "404 Not Found", "text/plain", b"No such path\n").await,
            Err(error) => {
                respond(&mut stream, "500 Internal Server Error", "text/plain", error.to_string().as_bytes())
                    .await
            }
        }
    }

    async fn answer(&self, request: &Request) -> io::Result<Option<Vec<u8>>> {
        match request.path.as_str() {
            "/status" => json(&self.status().await?),
            "/log/tail" => {
                let count = usize::try_from(request.number("count").unwrap_or(10)).unwrap_or(10).min(10_000);
                json(&self.log.ask(move |task| task.log.tail(count)).await??)
            }
            "/log/verify" => json(&self.log.ask(|task| task.log.verify()).await??),
            "/second-log/verify" => match &self.second_log {
                Some(log) => json(&log.ask(|task| task.log.verify()).await??),
                None => Ok(None),
            },
            "/disk/verify" => json(&self.disk.ask(|task| task.dirt.verify()).await??),
            "/memory/verify" => json(&self.memory.ask(|task| task.region.verify()).await?),
            "/set" => self.set(request).await,
            "/write" => {
                let number = |name| u32::try_from(request.number(name).unwrap_or(1)).unwrap_or(u32::MAX);
                let (runs, blocks) = (number("runs"), number("blocks"));
                self.disk.ask(move |task| task.dirt.rewrite_runs(runs, blocks)).await??;
                json(&self.status().await?)
            }
            "/poweroff" => order("poweroff"),
            "/reboot" => order("reboot"),
            _ => Ok(None),
        }
    }

    async fn status(&self) -> io::Result<AgentStatus> {
        let (log_last, log_cut_bytes, log_error) =
            self.log.ask(|task| (task.log.last(), task.log.cut_bytes, task.error.clone())).await?;
        let second = match &self.second_log {
            Some(log) => Some(log.ask(|task| (task.log.last(), task.error.clone())).await?),
            None => None,
        };
        let (disk_written_bytes, disk_kib_per_s, disk_error) =
            self.disk.ask(|task| (task.dirt.written_bytes, task.kib_per_s, task.error.clone())).await?;
        let (memory_touched_bytes, memory_kib_per_s) =
            self.memory.ask(|task| (task.region.touched_bytes, task.kib_per_s)).await?;
        let second_error = second.as_ref().and_then(|(_, error)| error.clone());
        Ok(AgentStatus {
            boot_id: self.boot_id.to_string(),
            uptime_ms: uptime_ms(),
            unix_ms: unix_ms(),
            log_last,
            log_cut_bytes,
            second_log_last: second.map(|(last, _)| last),
            disk_written_bytes,
            disk_kib_per_s,
            memory_touched_bytes,
            memory_kib_per_s,
            connections_accepted: self.counters.accepted.load(Ordering::Relaxed),
            connections_open: self.counters.open.load(Ordering::Relaxed),
            errors: [log_error, second_error, disk_error].into_iter().flatten().collect(),
        })
    }

    async fn set(&self, request: &Request) -> io::Result<Option<Vec<u8>>> {
        if let Some(rate) = request.number("log_per_s") {
            self.log.ask(move |task| task.per_s = rate).await?;
            if let Some(second) = &self.second_log {
                second.ask(move |task| task.per_s = rate).await?;
            }
        }
        if let Some(rate) = request.number("disk_kib_per_s") {
            self.disk.ask(move |task| task.kib_per_s = rate).await?;
        }
        if let Some(rate) = request.number("memory_kib_per_s") {
            self.memory.ask(move |task| task.kib_per_s = rate).await?;
        }
        json(&self.status().await?)
    }
}

fn json<T: Serialize>(value: &T) -> io::Result<Option<Vec<u8>>> {
    Ok(Some(serde_json::to_vec(value)?))
}

/// Lets init end the guest; the answer goes out first, because init waits a moment before it kills.
fn order(tool: &str) -> io::Result<Option<Vec<u8>>> {
    Command::new(tool).args(["-d", "1"]).spawn()?;
    json(&tool)
}

fn uptime_ms() -> u64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    (seconds * 1000.0) as u64
}
