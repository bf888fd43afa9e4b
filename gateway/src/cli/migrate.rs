//! `longhaul migrate`: begins a migration and shows it until it is over.
//!
//! A bar on a terminal, plain lines elsewhere, JSON lines by flag. Ctrl-C asks before it aborts: a
//! second one within five seconds aborts, and only what has not committed can be aborted. An attempt
//! that another one follows by itself is not the end: that one is shown.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use longhaul_core::migration::Stage;
use longhaul_core::units::{Bytes, Rate};

use super::MigrateArgs;
use crate::api::client::{Client, ClientError};
use crate::api::types::{MigrateRequest, MigrationView, Progressing, RetryView};

/// How often the daemon is asked.
const LOOK: Duration = Duration::from_millis(200);
/// Plain lines come at most this often while nothing but numbers change.
const LINE: Duration = Duration::from_secs(2);
/// A second Ctrl-C within this time aborts.
const CONFIRM: Duration = Duration::from_secs(5);

/// Runs it. Exit 0 if the machine moved, 1 if it stayed.
pub async fn run(client: &Client, args: &MigrateArgs) -> Result<ExitCode, ClientError> {
    let request = MigrateRequest {
        vm: args.vm.clone(),
        to: args.to.clone(),
        without_dns: args.without_dns,
        max_downtime_ms: args.max_downtime,
        no_throttle: args.no_throttle,
    };
    let mut id = client.migrate(&request).await?.id;
    let mut display = Display::new(args.json);
    let mut asked: Option<Instant> = None;
    let mut told = 0;
    let mut retried = false;
    loop {
        let view = client.migration(&id).await?;
        if !args.json {
            view.notices.iter().skip(told).for_each(|notice| display.say(notice));
        }
        told = view.notices.len();
        display.show(&view);
        match &view.retry {
            Some(retry) if view.progressing == Progressing::Stayed => {
                if !retried && !args.json {
                    display.say(&trying_again(&view, retry));
                }
                retried = true;
                if let Some(next) = &retry.id {
                    id = next.clone();
                    retried = false;
                    continue;
                }
            }
            Some(_) | None if view.progressing == Progressing::Running => {}
            Some(_) | None => return Ok(display.finish(&view)),
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = tokio::signal::ctrl_c() => match asked {
                Some(at) if at.elapsed() < CONFIRM => {
                    display.say("aborting");
                    if let Err(error) = client.abort(&id).await {
                        display.say(&error.to_string());
                    }
                }
                Some(_) | None => {
                    asked = Some(Instant::now());
                    display.say("Ctrl-C again within 5 s aborts the migration; it goes on otherwise");
                }
            },
        }
    }
}

enum Display {
    Bar(ProgressBar),
    Lines { last: Option<(Stage, u64, Instant)> },
    Json,
}

impl Display {
    fn new(json: bool) -> Self {
        if json {
            return Self::Json;
        }
        if !std::io::stderr().is_terminal() {
            return Self::Lines { last: None };
        }
        let bar = ProgressBar::new(1000);
        let template = "{bar:30} {msg}";
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        Self::Bar(bar)
    }

    fn show(&mut self, view: &MigrationView) {
        match self {
            Self::Json => {
                if let Ok(line) = serde_json::to_string(view) {
                    println!("{line}");
                }
            }
            Self::Bar(bar) => {
                bar.set_position((view.percent * 10.0) as u64);
                bar.set_message(line(view));
            }
            Self::Lines { last } => {
                let due = match last {
                    None => true,
                    Some((stage, round, at)) => {
                        *stage != view.stage || *round != view.round || at.elapsed() >= LINE
                    }
                };
                if due {
                    *last = Some((view.stage, view.round, Instant::now()));
                    println!("{}", line(view));
                }
            }
        }
    }

    fn say(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.println(text),
            Self::Lines { .. } => println!("{text}"),
            Self::Json => eprintln!("{text}"),
        }
    }

    fn finish(self, view: &MigrationView) -> ExitCode {
        if let Self::Bar(bar) = &self {
            bar.finish_and_clear();
        }
        let json = matches!(self, Self::Json);
        let moved = view.progressing == Progressing::Moved;
        if !json && moved {
            let seconds =
                view.ended_ms.unwrap_or(view.started_ms).saturating_sub(view.started_ms) as f64 / 1e3;
            let pause = view.pause_ms.map_or("unknown".to_owned(), |pause| format!("{pause:.0} ms"));
            let wan = Bytes(view.wan.memory + view.wan.disk + view.wan.control + view.wan.tunnel);
            let kept = match view.disk_kept {
                0 => String::new(),
                bytes => format!("; {} of disk was there already", Bytes(bytes)),
            };
            println!(
                "{} runs at {} after {seconds:.1} s; paused {pause}; {wan} sent{kept}",
                view.vm, view.to
            );
        }
        if !json && !moved {
            let reason = view.reason.as_deref().unwrap_or("no reason given");
            eprintln!("longhaul: {} stayed at {}: {reason}", view.vm, view.from);
        }
        if moved { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn trying_again(view: &MigrationView, retry: &RetryView) -> String {
    let why = view.reason.as_deref().unwrap_or("It stayed");
    format!("{why}; trying again ({} of {}), Ctrl-C twice ends that", retry.number, retry.of)
}

fn line(view: &MigrationView) -> String {
    let mut line = format!("{} {:<14} {:>3.0} %", view.stage.number(), view.stage.name(), view.percent);
    line += &format!("  {}", Rate(view.rate));
    if view.round > 0 {
        line += &format!("  round {} dirty {}", view.round, Rate(view.dirty_rate));
        if view.throttle_percent > 0 {
            line += &format!("  guest slowed by {} %", view.throttle_percent);
        }
    }
    if let Some(limit) = view.disk_limit {
        line += &format!("  disk writes limited to {}", Rate(limit));
    }
    if let Some(mbit) = view.limit_mbit {
        line += &format!("  limited to {mbit} Mbit/s");
    }
    if let Some(eta) = view.eta_s {
        line += &format!("  ETA {eta} s");
    }
    if let Some(reason) = &view.reason {
        line += &format!("  {reason}");
    }
    line
}
