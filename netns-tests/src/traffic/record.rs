//! The record connection: sends and receives numbered records, and measures every silence.

use std::io;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc::Sender;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::clock::{Clock, milliseconds};
use super::event::{Event, GAPS_LISTED, Gap, RecordReport};
use super::plan::RecordPlan;
use super::run::switched_on;
use crate::agent::exchange::read_frame;
use crate::agent::frame::{Frame, Kind, Tally};
use crate::agent::worker::unix_ms;

/// Opens the connection, exchanges records until `close` says so, and ends it properly.
///
/// `open` is told when the first record has come.
pub async fn exchange(
    plan: RecordPlan,
    clock: Clock,
    close_timeout: Duration,
    open: oneshot::Sender<()>,
    close: watch::Receiver<bool>,
    events: Sender<Event>,
) -> RecordReport {
    let mut receiver = Receiver {
        clock,
        interval_ms: plan.interval_ms,
        gap_ms: plan.gap_ms,
        last: None,
        tally: Tally::default(),
        report: RecordReport::default(),
        open: Some(open),
        events,
    };
    let result = run(&plan, close_timeout, close, &mut receiver).await;
    let mut report = receiver.report;
    report.received = receiver.tally.received;
    report.lost += receiver.tally.lost;
    report.doubled += receiver.tally.doubled;
    report.corrupt += receiver.tally.corrupt;
    match result {
        Ok((sent, end)) => {
            report.sent = sent;
            report.lost += end.tally.lost + sent.saturating_sub(end.tally.received);
            report.doubled += end.tally.doubled;
            report.corrupt += end.tally.corrupt;
            report.content_ok = receiver.tally.complete(end.number)
                && end.tally.received == sent
                && report.lost + report.doubled + report.corrupt == 0;
        }
        Err(error) => report.error = Some(error.to_string()),
    }
    report
}

struct Receiver {
    clock: Clock,
    interval_ms: u64,
    gap_ms: u64,
    last: Option<Instant>,
    tally: Tally,
    report: RecordReport,
    open: Option<oneshot::Sender<()>>,
    events: Sender<Event>,
}

async fn run(
    plan: &RecordPlan,
    close_timeout: Duration,
    close: watch::Receiver<bool>,
    receiver: &mut Receiver,
) -> io::Result<(u64, Frame)> {
    let stream = connect(plan).await?;
    stream.set_nodelay(true)?;
    let (mut from, to) = stream.into_split();
    let sender = tokio::spawn(send(to, plan.interval_ms, close.clone()));
    let end = tokio::select! {
        end = receiver.until_end(&mut from) => end?,
        () = closing_took_too_long(close, close_timeout) => {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "The other side's End did not come"));
        }
    };
    // The sender has written its End before the other side could answer it.
    let sent =
        timeout(close_timeout, sender).await.map_err(io::Error::other)?.map_err(io::Error::other)??;
    Ok((sent, end))
}

async fn connect(plan: &RecordPlan) -> io::Result<TcpStream> {
    let Some(relay) = plan.through else { return TcpStream::connect(plan.address).await };
    let mut stream = TcpStream::connect(relay).await?;
    stream.write_all(format!("{}\n", plan.address).as_bytes()).await?;
    Ok(stream)
}

async fn closing_took_too_long(mut close: watch::Receiver<bool>, limit: Duration) {
    switched_on(&mut close).await;
    tokio::time::sleep(limit).await;
}

async fn send(mut to: OwnedWriteHalf, interval_ms: u64, mut close: watch::Receiver<bool>) -> io::Result<u64> {
    to.write_all(&Frame::new(Kind::Hello, interval_ms, unix_ms()).encode()).await?;
    let mut clock = interval(Duration::from_millis(interval_ms));
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut number = 0;
    loop {
        tokio::select! {
            () = switched_on(&mut close) => {
                to.write_all(&Frame::new(Kind::End, number, unix_ms()).encode()).await?;
                return Ok(number);
            }
            _ = clock.tick() => {
                number += 1;
                to.write_all(&Frame::new(Kind::Record, number, unix_ms()).encode()).await?;
            }
        }
    }
}

impl Receiver {
    async fn until_end(&mut self, from: &mut OwnedReadHalf) -> io::Result<Frame> {
        loop {
            let Some(frame) = read_frame(from).await? else {
                self.tally.corrupt += 1;
                continue;
            };
            match frame.kind {
                Kind::Record => self.record(frame.number).await,
                Kind::Hello => self.tally.corrupt += 1,
                Kind::End => return Ok(frame),
            }
        }
    }

    async fn record(&mut self, number: u64) {
        self.tally.record(number);
        if let Some(open) = self.open.take() {
            let _ = open.send(());
        }
        let now = Instant::now();
        let Some(last) = self.last.replace(now) else { return };
        let silence_ms = milliseconds(now - last);
        self.report.longest_gap_ms =
            self.report.longest_gap_ms.max(silence_ms.saturating_sub(self.interval_ms));
        if silence_ms <= self.gap_ms {
            return;
        }
        let gap = Gap { start_ms: self.clock.at_ms(last), end_ms: self.clock.at_ms(now) };
        if self.report.gaps.len() < GAPS_LISTED {
            self.report.gaps.push(gap);
        }
        let _ = self.events.send(Event::Gap(gap)).await;
    }
}
