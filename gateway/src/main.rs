//! The `longhaul` binary: parses the command line and hands over to the library.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    gateway::cli::run(gateway::cli::Cli::parse())
}
