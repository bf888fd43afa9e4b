//! The command line: what was typed becomes a request to the daemon, the answer becomes text.
//!
//! Exit codes: 0 done, 1 not done (the machine stayed, a check failed), 2 wrong usage, definition or
//! configuration, 3 the daemon cannot be reached.

mod flows;
mod journal;
mod key;
mod migrate;
mod show;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use axum::http::StatusCode;
use clap::{Parser, Subcommand};

use longhaul_core::ids::{SiteName, VmName};
use longhaul_core::migration::resolve::Keep;

use crate::api::client::{Client, ClientError};
use crate::api::types::{MovedRequest, ResolveRequest};
use crate::config::Config;

/// Move running virtual machines between sites
#[derive(Debug, Parser)]
#[command(name = "longhaul", version)]
pub struct Cli {
    /// The API's socket
    #[arg(long, global = true, env = "LONGHAUL_SOCKET", default_value = "/run/longhaul/api.sock")]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon
    Serve {
        /// The configuration file
        #[arg(long)]
        config: PathBuf,
        /// Log as JSON, a line each
        #[arg(long)]
        log_json: bool,
    },
    /// Machines this site runs
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Move a running machine to another site
    Migrate(MigrateArgs),
    /// Sites, machines, migrations, tunnels
    Status {
        /// Print the API's JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the status again and again
    Watch,
    /// What is still held here for connections of a machine that left: who, since when, how much, how long silent
    Flows {
        /// The machine
        vm: VmName,
        /// Print the API's JSON
        #[arg(long)]
        json: bool,
    },
    /// End what is held here for a machine that left. Its old connections by this site end; its name goes on following it
    Release {
        /// The machine
        vm: VmName,
    },
    /// Say where a machine is that left, when the site it went to has handed it on and is gone for good. The packets of its
    /// connections follow, its name does not, and it may come home from there. If another site runs it, two copies may run
    Moved {
        /// The machine
        vm: VmName,
        /// The site that has it
        #[arg(long)]
        to: SiteName,
    },
    /// Find what would make a migration fail, and the remedy
    Doctor {
        /// Look at this machine too
        vm: Option<VmName>,
        /// Print the API's JSON
        #[arg(long)]
        json: bool,
    },
    /// What was decided in each migration, who owns the machine, and what is done next
    Journal {
        /// Only this machine's
        vm: Option<VmName>,
        /// Read this file (state_dir/journal.redb) instead of asking the daemon, which must not run on it
        #[arg(long)]
        file: Option<PathBuf>,
        /// Print the API's JSON
        #[arg(long)]
        json: bool,
    },
    /// Make this site's key if there is none, and print the public half
    Key {
        /// Where the private key is kept
        #[arg(long, default_value = "/etc/longhaul/key")]
        file: PathBuf,
    },
    /// Exit 0 if something else may start this machine here (for systemd and libvirt hooks)
    MayRun {
        /// The machine
        vm: VmName,
    },
    /// Decide a move whose other site is gone for good. While that site can be reached, this is refused
    Resolve {
        /// The machine
        vm: VmName,
        /// Where it is to be
        #[arg(long, value_enum)]
        keep: Place,
        /// What `--keep here` wants: the site whose copy you have destroyed. If it is not, two copies run
        #[arg(long, value_name = "SITE")]
        i_have_destroyed_the_other_copy: Option<SiteName>,
    },
    /// Limit what is sent while it is sent: all that goes to a peer, or one migration's memory and disks until its guest is
    /// stopped. Holds until it is changed or the gateway begins anew
    Limit(LimitArgs),
    /// End a migration that has not committed
    Abort {
        /// The migration's id
        id: String,
    },
}

#[derive(Debug, clap::Args)]
struct LimitArgs {
    /// The migration's id, at the site that the machine leaves
    #[arg(required_unless_present = "peer")]
    id: Option<String>,
    /// Limit all that is sent to this site instead
    #[arg(long, conflicts_with = "id")]
    peer: Option<SiteName>,
    /// Mbit/s
    #[arg(long, required_unless_present = "none")]
    mbit: Option<u64>,
    /// No limit but the configured one
    #[arg(long, conflicts_with = "mbit")]
    none: bool,
}

/// A place, as it is typed.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Place {
    Here,
    There,
}

/// Arguments of `longhaul migrate`.
#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    /// The machine
    vm: VmName,
    /// The site to move it to
    #[arg(long)]
    to: SiteName,
    /// Move it although its name cannot follow
    #[arg(long)]
    without_dns: bool,
    /// The pause to aim at, in milliseconds
    #[arg(long)]
    max_downtime: Option<u64>,
    /// Do not slow the guest down: a move that would never end without is given up
    #[arg(long)]
    no_throttle: bool,
    /// Print JSON, a line for each look
    #[arg(long)]
    json: bool,
}

/// Runs one command line to its exit code.
pub fn run(cli: Cli) -> ExitCode {
    match cli.command {
        Command::Serve { config, log_json } => return serve(&config, log_json),
        Command::Key { file } => return key::run(&file),
        Command::Journal { vm, file: Some(file), json } => return journal::file(&file, vm.as_ref(), json),
        Command::Vm(_)
        | Command::Migrate(_)
        | Command::Status { .. }
        | Command::Watch
        | Command::Flows { .. }
        | Command::Release { .. }
        | Command::Moved { .. }
        | Command::Doctor { .. }
        | Command::Journal { file: None, .. }
        | Command::MayRun { .. }
        | Command::Resolve { .. }
        | Command::Limit(_)
        | Command::Abort { .. } => {}
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    match runtime.block_on(ask(Client::new(&cli.socket), cli.command)) {
        Ok(code) => code,
        Err(error) => {
            let code = match &error {
                ClientError::Unreachable { .. } => 3,
                ClientError::Refused { status: StatusCode::UNPROCESSABLE_ENTITY, .. } => 2,
                ClientError::Broken(_) | ClientError::Form(_) | ClientError::Refused { .. } => 1,
            };
            fail(&error, code)
        }
    }
}

async fn ask(client: Client, command: Command) -> Result<ExitCode, ClientError> {
    match command {
        Command::Vm(command) => vm::run(&client, command).await,
        Command::Migrate(args) => migrate::run(&client, &args).await,
        Command::Status { json } => show::status(&client, json).await,
        Command::Watch => show::watch(&client).await,
        Command::Flows { vm, json } => flows::run(&client, &vm, json).await,
        Command::Release { vm } => {
            client.release(&vm).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Moved { vm, to } => {
            client.moved(&vm, &MovedRequest { to }).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Doctor { vm, json } => show::doctor(&client, vm.as_ref(), json).await,
        Command::Journal { vm, json, .. } => journal::ask(&client, vm.as_ref(), json).await,
        Command::MayRun { vm } => {
            client.may_run(&vm).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Resolve { vm, keep, i_have_destroyed_the_other_copy: destroyed } => {
            let keep = match keep {
                Place::Here => Keep::Here,
                Place::There => Keep::There,
            };
            client.resolve(&vm, &ResolveRequest { keep, destroyed }).await?;
            println!("decided; `longhaul journal {vm}` shows it");
            Ok(ExitCode::SUCCESS)
        }
        Command::Limit(LimitArgs { id, peer, mbit, none: _ }) => {
            match (id, peer) {
                (Some(id), _) => client.limit_migration(&id, mbit).await?,
                (None, Some(peer)) => client.limit_peer(&peer, mbit).await?,
                (None, None) => {} // the command line asks for one of them
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Abort { id } => {
            client.abort(&id).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Serve { .. } | Command::Key { .. } => Ok(ExitCode::FAILURE),
    }
}

fn serve(path: &std::path::Path, log_json: bool) -> ExitCode {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => return fail(&error, 2),
    };
    if let Err((key, message)) = crate::daemon::check(&config) {
        return fail(&Config::contradicted(path, &key, message), 2);
    }
    crate::daemon::logs(log_json);
    match crate::daemon::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("longhaul: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints an error with its causes.
fn fail(error: &dyn std::error::Error, code: u8) -> ExitCode {
    eprint!("longhaul: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprint!(": {error}");
        cause = error.source();
    }
    eprintln!();
    ExitCode::from(code)
}
