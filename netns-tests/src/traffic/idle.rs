//! The idle connection: opened at the start, silent until the end, then one question.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout};

use super::clock::{Clock, milliseconds};
use super::event::IdleReport;
use super::plan::IdlePlan;
use super::run::switched_on;

/// Waits for `close`, then speaks and expects the answer within `close_timeout`.
pub async fn idle(
    plan: IdlePlan,
    clock: Clock,
    close_timeout: Duration,
    open: oneshot::Sender<()>,
    mut close: watch::Receiver<bool>,
) -> IdleReport {
    let mut report = IdleReport::default();
    let stream = match TcpStream::connect(plan.address).await {
        Ok(stream) => stream,
        Err(error) => return IdleReport { error: Some(error.to_string()), ..report },
    };
    let _ = open.send(());
    let since = Instant::now();
    switched_on(&mut close).await;
    report.silent_ms = milliseconds(since.elapsed());
    let question = format!("still there after {} ms, {}?", report.silent_ms, clock.now_ms());
    let asked = Instant::now();
    let answer = timeout(close_timeout, speak(stream, &question)).await;
    report.answer_ms = milliseconds(asked.elapsed());
    match answer {
        Ok(Ok((boot_id, echo))) => {
            report.content_ok = echo == question;
            report.boot_id = Some(boot_id);
        }
        Ok(Err(error)) => report.error = Some(error.to_string()),
        Err(_) => report.error = Some("No answer came".to_owned()),
    }
    report
}

async fn speak(mut stream: TcpStream, question: &str) -> io::Result<(String, String)> {
    stream.write_all(format!("{question}\n").as_bytes()).await?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await?;
    let (boot_id, echo) = line.trim_end().split_once(' ').ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((boot_id.to_owned(), echo.to_owned()))
}
