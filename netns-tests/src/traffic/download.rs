//! The download: an HTTP body whose SHA-256 is known beforehand.

use std::io;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::mpsc::Sender;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep};

use super::clock::Clock;
use super::event::{DownloadReport, Event};
use super::plan::DownloadPlan;
use super::run::switched_on;
use crate::agent::pattern::Stream;

const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Downloads to the end; once `close` says so, it has `close_timeout` left.
pub async fn download(
    plan: DownloadPlan,
    clock: Clock,
    close_timeout: Duration,
    open: oneshot::Sender<()>,
    close: watch::Receiver<bool>,
    events: Sender<Event>,
) -> DownloadReport {
    let mut body = Body::new(plan.seed);
    let result = tokio::select! {
        result = body.fetch(&plan, clock, open, &events) => result,
        () = too_late(close, close_timeout) => Err(io::Error::new(io::ErrorKind::TimedOut, "The body did not end")),
    };
    let (sha256, expected_sha256) =
        (hex::encode(body.hash.finalize()), hex::encode(body.expected_hash.finalize()));
    let content_ok = result.is_ok() && body.bytes == plan.bytes && sha256 == expected_sha256;
    DownloadReport {
        bytes: body.bytes,
        ended_ms: clock.now_ms(),
        sha256,
        expected_sha256,
        content_ok,
        error: result.err().map(|error| error.to_string()),
    }
}

async fn too_late(mut close: watch::Receiver<bool>, limit: Duration) {
    switched_on(&mut close).await;
    sleep(limit).await;
}

/// The body as it comes, and beside it the body as it should come: hashing both as they go leaves no work for the
/// end, when the other measurements still run.
struct Body {
    hash: Sha256,
    expected: Stream,
    expected_hash: Sha256,
    bytes: u64,
    told: Instant,
}

impl Body {
    fn new(seed: u64) -> Self {
        Self {
            hash: Sha256::new(),
            expected: Stream::new(seed),
            expected_hash: Sha256::new(),
            bytes: 0,
            told: Instant::now(),
        }
    }

    fn take(&mut self, part: &mut [u8]) {
        self.hash.update(&*part);
        self.bytes += part.len() as u64;
        self.expected.fill(part);
        self.expected_hash.update(&*part);
    }

    async fn fetch(
        &mut self,
        plan: &DownloadPlan,
        clock: Clock,
        open: oneshot::Sender<()>,
        events: &Sender<Event>,
    ) -> io::Result<()> {
        let mut stream = TcpStream::connect(plan.address).await?;
        let path = format!("/blob?bytes={}&rate={}&seed={}", plan.bytes, plan.rate_bytes_per_s, plan.seed);
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", plan.address);
        stream.write_all(request.as_bytes()).await?;
        let mut stream = BufReader::new(stream);
        skip_head(&mut stream).await?;
        let _ = open.send(());
        let mut part = vec![0; 64 << 10];
        loop {
            let count = stream.read(&mut part).await?;
            if count == 0 {
                break;
            }
            self.take(&mut part[..count]);
            if self.told.elapsed() >= PROGRESS_EVERY {
                self.told = Instant::now();
                let _ = events.send(Event::Progress { at_ms: clock.now_ms(), bytes: self.bytes }).await;
            }
        }
        if self.bytes < plan.bytes {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "The body ended early"));
        }
        Ok(())
    }
}

async fn skip_head(stream: &mut BufReader<TcpStream>) -> io::Result<()> {
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    if line.split(' ').nth(1) != Some("200") {
        return Err(io::Error::other(format!("The server answered {}", line.trim())));
    }
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.trim().is_empty() {
            return Ok(());
        }
    }
}
