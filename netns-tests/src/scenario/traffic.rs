//! The client in its namespace: a thread of this process that plays a traffic plan.

use std::fs::File;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use tokio::sync::{mpsc, watch};

use crate::netns::Namespace;
use crate::traffic::{Event, Order, TrafficPlan, TrafficReport, run_in};

/// A client at work.
pub struct Client {
    orders: mpsc::Sender<Order>,
    seen: watch::Receiver<Seen>,
    thread: JoinHandle<Result<TrafficReport>>,
    /// The client's own limit for ending, and room to say so.
    close_limit: Duration,
}

/// How far the client is.
#[derive(Debug, Clone, Default)]
struct Seen {
    ready: bool,
    closed: bool,
    lost: Option<String>,
}

impl Client {
    /// Starts `plan` in `namespace` and waits until every old connection is open.
    pub async fn start(namespace: &Namespace, plan: TrafficPlan) -> Result<Self> {
        let close_limit = Duration::from_millis(plan.close_timeout_ms) + Duration::from_secs(60);
        let path = namespace.path();
        let enter = move || {
            let file = File::open(path)?;
            setns(file, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
        };
        let (orders, ordered) = mpsc::channel(8);
        let (told, events) = mpsc::channel(4096);
        let (see, mut seen) = watch::channel(Seen::default());
        let thread = run_in(enter, plan, ordered, told)?;
        // Events are taken all the time: a full channel would slow the client down.
        tokio::spawn(collect(events, see));
        let ready = seen.wait_for(|seen| seen.ready || seen.lost.is_some());
        let first = tokio::time::timeout(Duration::from_secs(30), ready).await;
        let first = first.context("The client does not get ready")??.clone();
        if let Some(lost) = first.lost {
            bail!("The client lost a connection before the move: {lost}");
        }
        Ok(Self { orders, seen, thread, close_limit })
    }

    /// What became of a connection that was lost, if one was.
    pub fn lost(&self) -> Option<String> {
        self.seen.borrow().lost.clone()
    }

    /// Lets the old connections end; requests by name go on.
    pub async fn close_old(&mut self) -> Result<()> {
        self.orders.send(Order::Close).await.map_err(|_| anyhow!("The client is gone"))?;
        let closed = self.seen.wait_for(|seen| seen.closed);
        tokio::time::timeout(self.close_limit, closed).await.context("Old connections do not end")??;
        Ok(())
    }

    /// Ends everything and gives the report.
    pub async fn finish(self) -> Result<TrafficReport> {
        // A client that has ended by itself has its report ready too.
        let _ = self.orders.send(Order::Finish).await;
        let joined = tokio::task::spawn_blocking(move || self.thread.join()).await?;
        joined.map_err(|_| anyhow!("The client broke"))?
    }
}

async fn collect(mut events: mpsc::Receiver<Event>, seen: watch::Sender<Seen>) {
    while let Some(event) = events.recv().await {
        match event {
            Event::Ready { .. } => seen.send_modify(|seen| seen.ready = true),
            Event::Closed { .. } => seen.send_modify(|seen| seen.closed = true),
            Event::Lost { connection, error, .. } => {
                seen.send_modify(|seen| seen.lost = Some(format!("{connection}: {error}")));
            }
            Event::Gap(_)
            | Event::Progress { .. }
            | Event::Probe(_)
            | Event::NameChanged(_)
            | Event::Report(_) => {}
        }
    }
}
