//! A client's bulk upload to the guest: it lasts until it is ended, and the guest says what came.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_tests::agent::pattern::Stream;
use netns_tests::agent::upload::receipt;
use netns_tests::netns::Namespace;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

const SEED: u64 = 11;
const PART_BYTES: usize = 16 << 10;
/// 1 MiB a second: as fast as it goes it would leave a guest without hardware help no time for anything else.
const EVERY: Duration = Duration::from_micros(15_625);

/// The connection at work.
pub struct Upload {
    sent: Arc<AtomicU64>,
    quit: Arc<AtomicBool>,
    task: JoinHandle<Result<u64>>,
}

impl Upload {
    /// Opens the connection; it is open when this returns.
    pub async fn start(from: &Namespace, to: SocketAddr) -> Self {
        let stream = from.tcp_socket_async(to).unwrap().connect(to).await.unwrap();
        let (sent, quit) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let task = tokio::spawn(upload(stream, sent.clone(), quit.clone()));
        Self { sent, quit, task }
    }

    /// Bytes that the client's kernel has taken.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Ends it; gives its length if every byte came.
    pub async fn end(self) -> Result<u64> {
        self.quit.store(true, Ordering::Relaxed);
        self.task.await?
    }
}

async fn upload(mut stream: TcpStream, sent: Arc<AtomicU64>, quit: Arc<AtomicBool>) -> Result<u64> {
    let (mut content, mut hash) = (Stream::new(SEED), Sha256::new());
    let mut part = vec![0; PART_BYTES];
    let mut clock = interval(EVERY);
    // A stopped machine must not come back to a burst of what was not sent.
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !quit.load(Ordering::Relaxed) {
        clock.tick().await;
        content.fill(&mut part);
        stream.write_all(&part).await?;
        hash.update(&part);
        sent.fetch_add(PART_BYTES as u64, Ordering::Relaxed);
    }
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let bytes = sent.load(Ordering::Relaxed);
    ensure!(answer == receipt(bytes, hash), "of {bytes} bytes came {answer:?}");
    Ok(bytes)
}
