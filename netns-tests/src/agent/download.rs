//! The download: a deterministic body, sent no faster than asked, so that it cannot end before the machine moves.

use std::io;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::http::{head, read_request, respond};
use super::pattern::Stream;

/// Bytes sent at once.
const PART_BYTES: usize = 16 << 10;

/// Answers one connection: `GET /blob?bytes=N&rate=BYTES_PER_SECOND&seed=S`; without `rate` as fast as it goes.
///
/// # Errors
/// The connection ends.
pub async fn serve(mut stream: TcpStream) -> io::Result<()> {
    let request = read_request(&mut stream).await?;
    let (Some(bytes), "/blob") = (request.number("bytes"), request.path.as_str()) else {
        return respond(&mut stream, "404 Not Found", "text/plain", b"GET /blob?bytes=N&rate=R&seed=S\n")
            .await;
    };
    let rate = request.number("rate").filter(|rate| *rate > 0);
    stream.write_all(head("200 OK", "application/octet-stream", bytes).as_bytes()).await?;
    let mut content = Stream::new(request.number("seed").unwrap_or(0));
    let mut part = vec![0; PART_BYTES];
    let (mut left, mut due) = (bytes, Instant::now());
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(PART_BYTES);
        content.fill(&mut part[..length]);
        stream.write_all(&part[..length]).await?;
        left -= length as u64;
        if let Some(rate) = rate {
            due = paced(due, Duration::from_secs_f64(length as f64 / rate as f64));
            tokio::time::sleep_until(due).await;
        }
    }
    stream.shutdown().await
}

/// After a pause the pace goes on from now: making up for it would only be a burst.
fn paced(due: Instant, time: Duration) -> Instant {
    let now = Instant::now();
    if now > due + Duration::from_secs(1) { now + time } else { due + time }
}
