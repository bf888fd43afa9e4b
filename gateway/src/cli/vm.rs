//! `longhaul vm`: machines this site runs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;

use longhaul_core::ids::VmName;

use crate::api::client::{Client, ClientError};
use crate::api::types::{AdoptRequest, DefineRequest};
use crate::hypervisor::parse_definition;

/// What can be done with a machine.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Take a machine's definition
    Define {
        /// The definition, TOML
        definition: PathBuf,
        /// An image for each disk, in the definition's order
        #[arg(long = "disk", required = true)]
        disks: Vec<PathBuf>,
    },
    /// Start a machine
    Start {
        /// The machine
        vm: VmName,
    },
    /// Stop a machine as if its power was cut
    Stop {
        /// The machine
        vm: VmName,
    },
    /// Take a QEMU that is already running
    Adopt {
        /// Its QMP socket
        #[arg(long)]
        qmp: PathBuf,
        /// What it is expected to be, TOML
        #[arg(long)]
        definition: PathBuf,
    },
    /// Forget a machine; its disks stay
    Undefine {
        /// The machine
        vm: VmName,
        /// Forget it although it is at another site: nothing keeps it from being started here as well then
        #[arg(long)]
        forget: bool,
    },
    /// Throw away the disks kept of a machine that did not come
    Discard {
        /// The machine
        vm: VmName,
        /// Instead, the memory and the disks kept of one that left: its way back sends all of it then
        #[arg(long)]
        kept: bool,
    },
    /// List machines
    List,
}

/// Runs one of them.
pub async fn run(client: &Client, command: VmCommand) -> Result<ExitCode, ClientError> {
    match command {
        VmCommand::Define { definition, disks } => {
            let Some(definition) = read(&definition) else { return Ok(ExitCode::from(2)) };
            let disks = disks.into_iter().map(|disk| std::path::absolute(&disk).unwrap_or(disk)).collect();
            client.define(&DefineRequest { definition, disks }).await?;
        }
        VmCommand::Start { vm } => client.start(&vm).await?,
        VmCommand::Stop { vm } => client.stop(&vm).await?,
        VmCommand::Undefine { vm, forget } => client.undefine(&vm, forget).await?,
        VmCommand::Adopt { qmp, definition } => {
            let Some(definition) = read(&definition) else { return Ok(ExitCode::from(2)) };
            let qmp = std::path::absolute(&qmp).unwrap_or(qmp);
            client.adopt(&AdoptRequest { definition, qmp }).await?;
        }
        VmCommand::Discard { vm, kept: false } => client.discard(&vm).await?,
        VmCommand::Discard { vm, kept: true } => client.discard_kept(&vm).await?,
        VmCommand::List => super::show::machines(&client.status().await?),
    }
    Ok(ExitCode::SUCCESS)
}

/// The text of a definition that is sound. The gateway checks it again; here the file's name is known.
fn read(path: &Path) -> Option<String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("longhaul: cannot read {}: {error}", path.display());
            return None;
        }
    };
    match parse_definition(&text, path) {
        Ok(_) => Some(text),
        Err(error) => {
            eprintln!("longhaul: {error}");
            None
        }
    }
}
