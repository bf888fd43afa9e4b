//! The `lab` binary: shows, tests and measures Longhaul on one machine.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use gateway::config::ArbiterChoice;
use netns_tests::bench::{
    self,
    link::{LinkEndArguments, LinkOptions, link_end_main},
    migrate::{RaceArguments, RunArguments},
    tunnel::{self, BenchOptions, EndArguments, end_main},
};
use netns_tests::faults::setting::{Leg, Setting};
use netns_tests::faults::{self, FaultOptions};
use netns_tests::record::{self, RecordArguments};
use netns_tests::scenario::options::{DnsServer, parse_rate, parse_share, parse_time};
use netns_tests::scenario::programs::Programs;
use netns_tests::scenario::{SceneOptions, demo};
use netns_tests::traffic::command::{ClientArguments, client_main};
use netns_tests::{cleanup, fuzz, install, suite};

/// Longhaul's laboratory: two sites, a WAN, clients, name servers and real QEMU guests on one machine
#[derive(Debug, Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab")]
struct Lab {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Move a running web server from site a to site b while a client uses it
    Demo(DemoArgs),
    /// Break everything in every stage of a move, and judge what is left from outside
    Faults(FaultArgs),
    /// Install what is missing and run every test
    Test {
        /// Only tests whose name contains this
        filter: Option<String>,
    },
    /// Feed every decoder what a fuzzer thinks of
    Fuzz {
        /// Only this target
        target: Option<String>,
        /// How long each target is fuzzed
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Record a migration stream of the installed QEMU as a fixture of the core's tests
    RecordStream(RecordArguments),
    /// Build the demo's world and guest, and open a shell in it
    Shell(DemoArgs),
    /// Measure side by side with what others have built
    #[command(subcommand)]
    Bench(BenchCommand),
    /// One end of the benchmark's own tunnel
    #[command(hide = true)]
    BenchEnd(EndArguments),
    /// One end of the benchmark of links
    #[command(hide = true)]
    BenchLinkEnd(LinkEndArguments),
    /// One run of the benchmark of moves
    #[command(hide = true)]
    BenchMigrateRun(RunArguments),
    /// The client of the laboratory
    #[command(hide = true)]
    Traffic(ClientArguments),
}

#[derive(Debug, Clone, clap::Args)]
struct DemoArgs {
    /// Rate of the WAN
    #[arg(long, default_value = "100mbit", value_parser = parse_rate)]
    rate: f64,
    /// Round trip of the WAN
    #[arg(long, default_value = "100ms", value_parser = parse_time)]
    rtt: Duration,
    /// Random loss on the WAN
    #[arg(long, default_value = "0.1%", value_parser = parse_share)]
    loss: f64,
    /// Jitter of the WAN, one way
    #[arg(long, default_value = "0ms", value_parser = parse_time)]
    jitter: Duration,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 256)]
    memory: u64,
    /// The guest's disk in MiB
    #[arg(long, default_value_t = 1024)]
    disk: u64,
    /// KiB of memory that the guest dirties per second [default: 8 % of the WAN's rate, at most 1024]
    #[arg(long)]
    dirty_memory: Option<u64>,
    /// KiB of disk that the guest rewrites per second [default: 1 % of the WAN's rate, at most 128]
    #[arg(long)]
    dirty_disk: Option<u64>,
    /// The name server
    #[arg(long, value_enum, default_value = "hickory")]
    dns: DnsServer,
}

impl DemoArgs {
    fn options(&self) -> SceneOptions {
        let usual = SceneOptions::default();
        let share = |share: f64, most: u64| (kib_per_s(self.rate) * share).ceil().min(most as f64) as u64;
        SceneOptions {
            rate_mbit: self.rate,
            rtt: self.rtt,
            loss: self.loss,
            jitter: self.jitter,
            memory_mib: self.memory,
            disk_bytes: self.disk << 20,
            dirty_memory_kib_per_s: self
                .dirty_memory
                .unwrap_or_else(|| share(0.08, usual.dirty_memory_kib_per_s)),
            dirty_disk_kib_per_s: self.dirty_disk.unwrap_or_else(|| share(0.01, usual.dirty_disk_kib_per_s)),
            dns: self.dns,
            ..usual
        }
    }
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// This tunnel, plain routing, and user-space tunnels of the package registries
    Tunnel(BenchTunnelArgs),
    /// This link, kernel TCP, quinn's congestion controllers and s2n-quic's BBR on an emulated WAN
    Link(BenchLinkArgs),
    /// Moves of a whole machine: this gateway, and QEMU as operators use it today
    Migrate(RaceArguments),
}

#[derive(Debug, Clone, clap::Args)]
struct BenchLinkArgs {
    /// Length of one measurement, after the time to find the rate; three times that for pairs
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// How often each measurement is repeated
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Two paths only
    #[arg(long)]
    quick: bool,
    /// Every combination of rate, round trip, loss and queue: hours
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// Only the sender of this name; may be given more than once
    #[arg(long)]
    only: Vec<String>,
    /// Only pairs that share a path
    #[arg(long)]
    shared_only: bool,
}

impl BenchLinkArgs {
    fn options(self) -> LinkOptions {
        let Self { seconds, rounds, quick, full, only, shared_only } = self;
        LinkOptions { seconds, rounds, quick, full, only, shared_only }
    }
}

#[derive(Debug, Clone, clap::Args)]
struct BenchTunnelArgs {
    /// Length of one measurement; five times that on the long path, after 8 s that do not count
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// How often each measurement is repeated
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Only the tunnel of this name; may be given more than once
    #[arg(long)]
    only: Vec<String>,
    /// Only this path; both by default
    #[arg(long)]
    path: Option<tunnel::Path>,
}

impl BenchTunnelArgs {
    fn options(self) -> BenchOptions {
        let Self { seconds, rounds, only, path } = self;
        BenchOptions { seconds, rounds, only, path }
    }
}

#[derive(Debug, Clone, clap::Args)]
struct FaultArgs {
    /// How many cases
    #[arg(long, default_value_t = 200)]
    cases: u64,
    /// Their order and moments; a case is a function of this and of its number
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only the case of this number; may be given more than once
    #[arg(long)]
    only: Vec<u64>,
    /// Who decides when the sites do not hear each other; a cut is one between the gateways alone then
    #[arg(long, default_value = "none", value_parser = arbiter)]
    arbiter: ArbiterChoice,
    /// Which way the machine moves; in a case's name, a is the site that it leaves
    #[arg(long, value_enum, default_value_t)]
    leg: Leg,
    /// Begin no case after so many minutes
    #[arg(long)]
    minutes: Option<u64>,
}

impl FaultArgs {
    fn options(&self) -> FaultOptions {
        FaultOptions {
            cases: self.cases,
            seed: self.seed,
            only: self.only.clone(),
            setting: Setting { arbiter: self.arbiter, leg: self.leg },
            limit: self.minutes.map(|minutes| Duration::from_secs(minutes * 60)),
        }
    }
}

fn arbiter(text: &str) -> Result<ArbiterChoice, String> {
    match text {
        "none" => Ok(ArbiterChoice::None),
        "dns" => Ok(ArbiterChoice::Dns),
        "etcd" => Ok(ArbiterChoice::Etcd),
        _ => Err("one of none, dns and etcd".to_owned()),
    }
}

fn kib_per_s(rate_mbit: f64) -> f64 {
    rate_mbit * 1e6 / 8.0 / 1024.0
}

fn main() -> ExitCode {
    let lab = Lab::parse();
    match run(lab.command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<bool> {
    if let Command::Traffic(arguments) = &command {
        client_main(arguments)?;
        return Ok(true);
    }
    if let Command::BenchEnd(arguments) = &command {
        end_main(arguments)?;
        return Ok(true);
    }
    if let Command::BenchLinkEnd(arguments) = &command {
        link_end_main(arguments)?;
        return Ok(true);
    }
    if let Command::RecordStream(arguments) = &command {
        record::run(arguments)?;
        return Ok(true);
    }
    install::ensure_root();
    install::ensure(install::LAB_NEEDS)?;
    match command {
        Command::Demo(args) => {
            cleanup::remove_on_signals()?;
            let programs = Programs::build()?;
            runtime()?.block_on(demo::run(args.options(), &programs))
        }
        Command::Faults(args) => {
            cleanup::remove_on_signals()?;
            let programs = Programs::build()?;
            let report = runtime()?.block_on(faults::run(&args.options(), &programs))?;
            Ok(report.held_everywhere())
        }
        Command::Test { filter } => suite::run(filter.as_deref()),
        Command::Fuzz { target, seconds } => fuzz::run(target.as_deref(), seconds),
        Command::Shell(args) => {
            cleanup::remove_on_signals()?;
            let programs = Programs::build()?;
            runtime()?.block_on(demo::shell(args.options(), &programs))
        }
        Command::Bench(BenchCommand::Tunnel(args)) => {
            bench::ensure_release()?;
            cleanup::remove_on_signals()?;
            tunnel::run(&args.options())?;
            Ok(true)
        }
        Command::Bench(BenchCommand::Link(args)) => {
            bench::ensure_release()?;
            cleanup::remove_on_signals()?;
            bench::link::run(&args.options())?;
            Ok(true)
        }
        Command::Bench(BenchCommand::Migrate(args)) => {
            bench::ensure_release()?;
            cleanup::remove_on_signals()?;
            bench::migrate::run(&args)?;
            Ok(true)
        }
        Command::BenchMigrateRun(args) => {
            cleanup::remove_on_signals()?;
            runtime()?.block_on(bench::migrate::run_main(&args))?;
            Ok(true)
        }
        Command::BenchEnd(_) | Command::BenchLinkEnd(_) | Command::Traffic(_) | Command::RecordStream(_) => {
            Ok(true)
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}
