//! The client as a process: a plan comes in as JSON, events go out as JSON lines, orders come in as words.
//!
//! ```text
//! lab traffic PLAN.json      stdin: close | report | finish, one a line; its end means finish
//!                            stdout: one Event a line; the last one is the final report
//! ```

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, stdin, stdout};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::event::Event;
use super::plan::TrafficPlan;
use super::run::{Order, run};

/// Arguments of the client.
#[derive(Debug, Clone, Parser)]
#[command(name = "traffic", about = "The laboratory's client: traffic against a guest")]
pub struct ClientArguments {
    /// File with the plan, JSON; `-` for the first line of the standard input
    pub plan: PathBuf,
}

/// Runs the client until it is told to finish. Call it before any other thread exists.
///
/// # Errors
/// The plan cannot be read, or the caller has closed the standard output.
pub fn client_main(arguments: &ClientArguments) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(serve(arguments));
    // A thread of the runtime may still wait for a line of standard input.
    runtime.shutdown_background();
    result
}

async fn serve(arguments: &ClientArguments) -> Result<()> {
    let mut lines = BufReader::new(stdin()).lines();
    let text = if arguments.plan.as_os_str() == "-" {
        lines.next_line().await?.context("The standard input ended before the plan")?
    } else {
        std::fs::read_to_string(&arguments.plan)
            .with_context(|| format!("Cannot read {}", arguments.plan.display()))?
    };
    let plan: TrafficPlan = serde_json::from_str(&text).context("The plan is not valid")?;
    let (orders, ordered) = channel(8);
    let (told, events) = channel(4096);
    tokio::spawn(read_orders(lines, orders));
    let writer = tokio::spawn(write_events(events));
    run(plan, ordered, told).await?;
    writer.await?
}

async fn read_orders(mut lines: tokio::io::Lines<BufReader<tokio::io::Stdin>>, orders: Sender<Order>) {
    while let Ok(Some(line)) = lines.next_line().await {
        let order = match line.trim() {
            "close" => Order::Close,
            "report" => Order::Report,
            "finish" => Order::Finish,
            _ => continue,
        };
        if orders.send(order).await.is_err() {
            return;
        }
    }
}

async fn write_events(mut events: Receiver<Event>) -> Result<()> {
    let mut out = stdout();
    while let Some(event) = events.recv().await {
        let mut line = serde_json::to_vec(&event)?;
        line.push(b'\n');
        out.write_all(&line).await.context("The reader of the events is gone")?;
        if events.is_empty() {
            out.flush().await?;
        }
    }
    out.flush().await?;
    Ok(())
}
