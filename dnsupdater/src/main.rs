//! The `dnsupdater` tool: the library's operations for operators and scripts, without the gateway.
//!
//! Exit codes: 0 done; 1 lost, or a server is behind; 2 wrong usage, configuration or shape of the name; 3 unreachable
//! or outcome unknown; 4 refused. It never prints the key, and takes it from a file or the environment only, because
//! arguments are visible to every user of the machine.

use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use dnsupdater::{
    DnsName, Epoch, Error, Key, Outcome, Records, Register, Scope, ServerState, Swap, Transport, Updater,
    UpdaterConfig, Verification,
};
use serde_json::{Value, json};

const LOST: u8 = 1;
const USAGE: u8 = 2;
const UNREACHABLE: u8 = 3;
const REFUSED: u8 = 4;

/// Changes DNS names atomically (RFC 2136 with prerequisites and TSIG).
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 lost or behind, 2 usage, 3 unreachable or unknown, 4 refused"
)]
struct Cli {
    #[command(flatten)]
    access: Access,
    /// Answer in JSON, one object.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Access {
    /// Name server, ADDRESS or ADDRESS:PORT; the primary first, repeat for the others.
    #[arg(long = "server", global = true, env = "DNSUPDATER_SERVERS", value_delimiter = ',', value_parser = server)]
    servers: Vec<SocketAddr>,
    /// Zone that holds the name.
    #[arg(long, global = true, env = "DNSUPDATER_ZONE")]
    zone: Option<DnsName>,
    /// File with the TSIG key: BIND's key "NAME" { ... }; or NAME:ALGORITHM:BASE64. Without it: DNSUPDATER_KEY.
    #[arg(long, global = true, env = "DNSUPDATER_KEY_FILE")]
    key_file: Option<PathBuf>,
    /// Use UDP, and TCP only for truncated answers.
    #[arg(long, global = true)]
    udp: bool,
    /// Seconds one exchange may take.
    #[arg(long, global = true, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300))]
    timeout: u64,
    /// How often a failed exchange is repeated.
    #[arg(long, global = true, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=20))]
    retries: u32,
    /// Seconds the clocks may differ.
    #[arg(long, global = true, default_value_t = 300, value_parser = clap::value_parser!(u16).range(1..))]
    fudge: u16,
    /// Accept unsigned answers to reads, for servers that sign answers to updates only.
    #[arg(long, global = true)]
    unsigned_reads: bool,
    /// Port of the zone's own name servers for `verify --all`.
    #[arg(long, global = true, default_value_t = 53)]
    ns_port: u16,
}

#[derive(Subcommand)]
enum Command {
    /// Show a name: addresses, time to live, ownership record.
    Read {
        /// The name.
        name: DnsName,
    },
    /// Prove that a swap would work, changing nothing.
    Preflight {
        /// The name.
        name: DnsName,
        /// Addresses it will get, to rehearse their record types.
        #[arg(long = "to", value_delimiter = ',')]
        to: Vec<IpAddr>,
    },
    /// Give a name these addresses, whatever it has now; create it if it has none.
    Set {
        /// The name.
        name: DnsName,
        /// Its addresses.
        #[arg(required = true)]
        addresses: Vec<IpAddr>,
        /// Time to live in seconds.
        #[arg(long, default_value_t = 300)]
        ttl: u32,
        /// Owner to record; default: the present one.
        #[arg(long)]
        owner: Option<String>,
    },
    /// Change a name only if it is as you say; lose otherwise.
    Swap {
        /// The name.
        name: DnsName,
        /// Addresses it must have, all of them.
        #[arg(long, required = true, value_delimiter = ',')]
        from: Vec<IpAddr>,
        /// Addresses it gets.
        #[arg(long, required = true, value_delimiter = ',')]
        to: Vec<IpAddr>,
        /// Time to live in seconds.
        #[arg(long, default_value_t = 30)]
        ttl: u32,
        /// Owner to record.
        #[arg(long)]
        owner: String,
        /// Epoch it must have; default: the present one.
        #[arg(long)]
        epoch: Option<u64>,
    },
    /// Ask every server whether it answers these addresses.
    Verify {
        /// The name.
        name: DnsName,
        /// Addresses it should have, all of them.
        #[arg(long, required = true, value_delimiter = ',')]
        expect: Vec<IpAddr>,
        /// Ask the zone's own name servers too.
        #[arg(long)]
        all: bool,
        /// Seconds to wait until all have caught up.
        #[arg(long, default_value_t = 0)]
        wait: u64,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| "error".into()))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let report = match run(&cli).await {
        Ok(report) => report,
        Err(error) => {
            eprintln!("dnsupdater: {error}");
            Report { code: exit_code(&error), text: String::new(), json: failure(&error) }
        }
    };
    if cli.json {
        println!("{}", report.json);
    } else if !report.text.is_empty() {
        println!("{}", report.text);
    }
    ExitCode::from(report.code)
}

struct Report {
    code: u8,
    text: String,
    json: Value,
}

async fn run(cli: &Cli) -> Result<Report, Error> {
    let updater = Updater::new(config(&cli.access)?)?;
    match &cli.command {
        Command::Read { name } => updater.read(name).await.map(|records| Report {
            code: 0,
            text: records_text(&records),
            json: json!({ "outcome": "read", "records": records }),
        }),
        Command::Preflight { name, to } => updater.preflight(name, to).await.map(|found| Report {
            code: 0,
            text: format!(
                "{}\nready: reachable in {} ms, key and clock accepted, nothing changed",
                records_text(&found.records),
                found.round_trip.as_millis()
            ),
            json: json!({
                "outcome": "ready", "records": found.records,
                "round_trip_ms": found.round_trip.as_secs_f64() * 1e3
            }),
        }),
        Command::Set { name, addresses, ttl, owner } => {
            set(&updater, name, addresses, *ttl, owner.as_deref()).await
        }
        Command::Swap { name, from, to, ttl, owner, epoch } => {
            let swap = Swap::new(name.clone(), from.clone(), to.clone(), *ttl, owner);
            swap_from(&updater, swap, epoch.map(Epoch)).await
        }
        Command::Verify { name, expect, all, wait } => {
            let scope = if *all { Scope::All } else { Scope::Listed };
            let patience = Duration::from_secs(*wait);
            Ok(verified(&updater.verify_until(name, expect, scope, patience).await?))
        }
    }
}

fn config(access: &Access) -> Result<UpdaterConfig, Error> {
    let missing = |what: &str| Error::Config(format!("{what} is missing: see dnsupdater --help"));
    let key = match &access.key_file {
        Some(path) => Key::from_file(path)?,
        None => std::env::var("DNSUPDATER_KEY").map_err(|_| missing("The key (--key-file)"))?.parse()?,
    };
    let zone = access.zone.clone().ok_or_else(|| missing("The zone (--zone)"))?;
    Ok(UpdaterConfig {
        transport: if access.udp { Transport::Udp } else { Transport::Tcp },
        timeout: Duration::from_secs(access.timeout),
        retries: access.retries,
        fudge_s: access.fudge,
        signed_reads: !access.unsigned_reads,
        ns_port: access.ns_port,
        ..UpdaterConfig::new(access.servers.clone(), zone, key)
    })
}

async fn set(
    updater: &Updater,
    name: &DnsName,
    addresses: &[IpAddr],
    ttl_s: u32,
    owner: Option<&str>,
) -> Result<Report, Error> {
    let current = updater.read(name).await?;
    let present = current.ownership().map(|ownership| ownership.owner().to_owned());
    let owner =
        owner.map(str::to_owned).or(present).unwrap_or_else(|| dnsupdater::ownership::NOBODY.to_owned());
    let swap = Swap::new(name.clone(), current.addresses.clone(), addresses.to_vec(), ttl_s, &owner);
    finish(updater, swap.epochs(current.epoch(), next(current.epoch())?)).await
}

async fn swap_from(updater: &Updater, swap: Swap, epoch: Option<Epoch>) -> Result<Report, Error> {
    let from = match epoch {
        Some(epoch) => epoch,
        None => updater.read(&swap.name).await?.epoch(),
    };
    finish(updater, swap.epochs(from, next(from)?)).await
}

fn next(epoch: Epoch) -> Result<Epoch, Error> {
    epoch.0.checked_add(1).map(Epoch).ok_or_else(|| Error::Config("The epoch has reached its end".to_owned()))
}

async fn finish(updater: &Updater, swap: Swap) -> Result<Report, Error> {
    match updater.swap(&swap).await? {
        Outcome::Won => Ok(Report {
            code: 0,
            text: format!(
                "{} has {} now, epoch {}, owner {}",
                swap.name,
                list(&swap.new),
                swap.epoch_to,
                swap.owner
            ),
            json: json!({
                "outcome": "won", "name": swap.name, "addresses": swap.new, "ttl_s": swap.ttl_s,
                "epoch": swap.epoch_to, "owner": swap.owner, "txn": swap.txn
            }),
        }),
        Outcome::Lost { current } => Ok(Report {
            code: LOST,
            text: format!(
                "lost: the name is not as expected, nothing was changed\n{}",
                records_text(&current)
            ),
            json: json!({ "outcome": "lost", "current": current }),
        }),
    }
}

fn verified(verification: &Verification) -> Report {
    let line = |view: &dnsupdater::ServerView| {
        let host = view.host.as_deref().map(|host| format!(" ({host})")).unwrap_or_default();
        let state = match &view.state {
            ServerState::Current { serial, ttl_s } => {
                format!("current, serial {serial}, ttl {} s", ttl_s.unwrap_or(0))
            }
            ServerState::Behind { serial, addresses } => {
                format!("BEHIND, serial {serial}, answers {}: does NOTIFY reach it?", list(addresses))
            }
            ServerState::Silent { reason } => format!("SILENT: {reason}"),
        };
        format!("{}{host}: {state}", view.server)
    };
    let complete = verification.is_complete();
    let text = verification.servers.iter().map(line).collect::<Vec<_>>().join("\n");
    let outcome = if complete { "current" } else { "behind" };
    let json = json!({ "outcome": outcome, "verification": verification });
    Report { code: if complete { 0 } else { LOST }, text, json }
}

fn records_text(records: &Records) -> String {
    let register = match &records.register {
        Register::Absent => "none".to_owned(),
        Register::Held(ownership) => ownership.to_string(),
        Register::Foreign(found) => format!("{found:?} (not written by dnsupdater)"),
    };
    let target = match &records.cname {
        Some(target) => format!("CNAME {target}"),
        None => list(&records.addresses),
    };
    let ttl = records.ttl_s().map(|ttl_s| format!(", ttl {ttl_s} s")).unwrap_or_default();
    format!(
        "{} {target}{ttl}\nownership: {register}\nserial {} at {}",
        records.name, records.serial, records.primary
    )
}

fn list(addresses: &[IpAddr]) -> String {
    if addresses.is_empty() {
        return "no address".to_owned();
    }
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
}

fn exit_code(error: &Error) -> u8 {
    match error.kind() {
        "config" | "shape" => USAGE,
        "unreachable" | "outcome-unknown" => UNREACHABLE,
        _refusals => REFUSED,
    }
}

fn failure(error: &Error) -> Value {
    json!({ "outcome": "failed", "kind": error.kind(), "message": error.to_string() })
}

fn server(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, 53));
    address
        .or_else(|_| text.parse())
        .map_err(|_| "expected ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT".to_owned())
}
