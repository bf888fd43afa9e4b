//! The `dnsupdater` tool: the library's operations for operators and scripts, without the gateway.
//!
//! It never prints the key, and takes it from a file or the environment only, because arguments are visible to every
//! user of the machine. What it does is in `tool/commands`, what it remembers between runs in `tool/memory`.

mod tool;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;

use tool::args::Cli;
use tool::report::Report;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| "error".into()))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let report = tool::commands::run(&cli).await.unwrap_or_else(|error| {
        eprintln!("dnsupdater: {error}");
        Report::failure(&error)
    });
    if cli.json {
        println!("{}", report.json);
    } else if !report.text.is_empty() {
        println!("{}", report.text);
    }
    ExitCode::from(report.code)
}
