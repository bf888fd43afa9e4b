//! Runs a plan: starts its connections, obeys orders, owns the report.

use std::io;
use std::thread::JoinHandle as ThreadHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::clock::Clock;
use super::event::{DownloadReport, Event, IdleReport, RecordReport, TrafficReport};
use super::plan::TrafficPlan;
use super::{download, idle, prober, record};

/// What a caller may ask of a running client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// End the old connections: the idle one speaks, the record one says End, the download comes to its end.
    /// Requests by name go on. Answered by [`Event::Closed`].
    Close,
    /// An [`Event::Report`] of what is known so far.
    Report,
    /// As [`Order::Close`], then end the requests, then the final report.
    Finish,
}

/// Events that may wait for a slow reader; more slow the client down.
const EVENTS_WAITING: usize = 4096;

/// Runs `plan` until [`Order::Finish`], or until the sender of orders is gone.
///
/// Every event is also sent to `told`; a closed receiver is no reason to end.
///
/// # Errors
/// None for what happens to connections: that is what the report is for. A task of its own broke.
pub async fn run(
    plan: TrafficPlan,
    mut orders: Receiver<Order>,
    told: Sender<Event>,
) -> Result<TrafficReport> {
    let clock = Clock::since(plan.epoch_unix_ms);
    let (events, mut happened) = channel(EVENTS_WAITING);
    let mut client = Client::start(&plan, clock, events);
    let (mut finishing, mut drained) = (false, false);
    while !(finishing && drained && client.old.none_left()) {
        tokio::select! {
            order = orders.recv(), if !finishing => {
                finishing = matches!(order, None | Some(Order::Finish));
                client.obey(order.unwrap_or(Order::Finish), &told).await;
            }
            event = happened.recv(), if !drained => match event {
                Some(event) => client.apply(event, &told).await,
                // Every task that could tell something has ended.
                None => drained = true,
            },
            result = client.old.next() => client.ended(result?, &told).await,
        }
        if finishing && client.old.none_left() {
            client.finish.send_replace(true);
        }
    }
    client.report.end_ms = clock.now_ms();
    let _ = told.send(Event::Report(Box::new(client.report.clone()))).await;
    Ok(client.report)
}

/// Runs `plan` in a thread of its own, after `enter` has put that thread into a network namespace.
///
/// # Errors
/// The system has no more threads. What `enter` says comes out of the thread's result.
pub fn run_in(
    enter: impl FnOnce() -> io::Result<()> + Send + 'static,
    plan: TrafficPlan,
    orders: Receiver<Order>,
    told: Sender<Event>,
) -> io::Result<ThreadHandle<Result<TrafficReport>>> {
    std::thread::Builder::new().name("traffic".to_owned()).spawn(move || {
        enter().context("Cannot enter the client's namespace")?;
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(plan, orders, told))
    })
}

struct Client {
    clock: Clock,
    report: TrafficReport,
    old: OldConnections,
    close: watch::Sender<bool>,
    finish: watch::Sender<bool>,
}

impl Client {
    fn start(plan: &TrafficPlan, clock: Clock, events: Sender<Event>) -> Self {
        let (close, closing) = watch::channel(false);
        let (finish, finishing) = watch::channel(false);
        let old = OldConnections::start(plan, clock, &closing, &events);
        if let Some(http) = plan.http.clone() {
            tokio::spawn(prober::probe(http, clock, finishing, events));
        }
        let report = TrafficReport {
            epoch_unix_ms: plan.epoch_unix_ms,
            start_ms: clock.now_ms(),
            connections_planned: old.count(),
            ..TrafficReport::default()
        };
        Self { clock, report, old, close, finish }
    }

    async fn obey(&mut self, order: Order, told: &Sender<Event>) {
        match order {
            Order::Report => {
                self.report.end_ms = self.clock.now_ms();
                let _ = told.send(Event::Report(Box::new(self.report.clone()))).await;
            }
            Order::Close | Order::Finish => {
                self.close.send_replace(true);
                if self.old.none_left() && self.report.connections_planned == 0 {
                    let _ = told.send(Event::Closed { at_ms: self.clock.now_ms() }).await;
                }
            }
        }
    }

    async fn apply(&mut self, event: Event, told: &Sender<Event>) {
        self.report.apply(&event);
        let _ = told.send(event).await;
    }

    async fn ended(&mut self, ended: Ended, told: &Sender<Event>) {
        let lost = match ended {
            Ended::Record(report) => {
                let lost = report.error.clone().map(|error| ("record", error));
                self.report.record = Some(report);
                lost
            }
            Ended::Download(report) => {
                let lost = report.error.clone().map(|error| ("download", error));
                self.report.download = Some(report);
                lost
            }
            Ended::Idle(report) => {
                let lost = report.error.clone().map(|error| ("idle", error));
                self.report.idle = Some(report);
                lost
            }
        };
        let at_ms = self.clock.now_ms();
        if let Some((connection, error)) = lost {
            let _ = told.send(Event::Lost { at_ms, connection: connection.to_owned(), error }).await;
        }
        if self.old.none_left() {
            let _ = told.send(Event::Closed { at_ms }).await;
        }
    }
}

enum Ended {
    Record(RecordReport),
    Download(DownloadReport),
    Idle(IdleReport),
}

#[derive(Default)]
struct OldConnections {
    record: Option<JoinHandle<RecordReport>>,
    download: Option<JoinHandle<DownloadReport>>,
    idle: Option<JoinHandle<IdleReport>>,
}

impl OldConnections {
    fn start(
        plan: &TrafficPlan,
        clock: Clock,
        closing: &watch::Receiver<bool>,
        events: &Sender<Event>,
    ) -> Self {
        let limit = Duration::from_millis(plan.close_timeout_ms);
        let mut opened = Vec::new();
        let mut open = || {
            let (tell, wait) = oneshot::channel();
            opened.push(wait);
            tell
        };
        let record = plan.record.clone().map(|plan| {
            tokio::spawn(record::exchange(plan, clock, limit, open(), closing.clone(), events.clone()))
        });
        let download = plan.download.clone().map(|plan| {
            tokio::spawn(download::download(plan, clock, limit, open(), closing.clone(), events.clone()))
        });
        let idle = plan
            .idle
            .clone()
            .map(|plan| tokio::spawn(idle::idle(plan, clock, limit, open(), closing.clone())));
        let wait = Duration::from_millis(plan.open_timeout_ms);
        tokio::spawn(tell_ready(opened, wait, clock, events.clone()));
        Self { record, download, idle }
    }

    fn count(&self) -> u64 {
        u64::from(self.record.is_some()) + u64::from(self.download.is_some()) + u64::from(self.idle.is_some())
    }

    fn none_left(&self) -> bool {
        self.count() == 0
    }

    /// The next connection that ends; never, if none is left.
    async fn next(&mut self) -> Result<Ended> {
        tokio::select! {
            report = ended(&mut self.record) => report.map(Ended::Record),
            report = ended(&mut self.download) => report.map(Ended::Download),
            report = ended(&mut self.idle) => report.map(Ended::Idle),
        }
    }
}

/// Waits until the switch is on, or its owner gone.
pub(super) async fn switched_on(switch: &mut watch::Receiver<bool>) {
    let _ = switch.wait_for(|on| *on).await;
}

async fn ended<T>(handle: &mut Option<JoinHandle<T>>) -> Result<T> {
    let Some(task) = handle else { return std::future::pending().await };
    let result = task.await;
    *handle = None;
    result.map_err(|error| anyhow!("A connection's task broke: {error}"))
}

async fn tell_ready(
    opened: Vec<oneshot::Receiver<()>>,
    limit: Duration,
    clock: Clock,
    events: Sender<Event>,
) {
    for wait in opened {
        // One that cannot be opened tells so itself, by Lost.
        if !matches!(timeout(limit, wait).await, Ok(Ok(()))) {
            return;
        }
    }
    let _ = events.send(Event::Ready { at_ms: clock.now_ms() }).await;
}
