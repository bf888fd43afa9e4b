//! What this host's QEMU can do, asked of QEMU itself by a run without a machine.
//!
//! No version is assumed to bring anything: commands and their arguments are looked up in QMP's own
//! schema. What this host may do by policy is merged in by [`super::Hypervisor::capabilities`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use longhaul_core::machine::{CpuSupport, MachineSupport, QemuVersion};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::process::Command;

use super::accelerator::Accelerator;
use super::qmp::{QmpClient, QmpConfig, QmpError};

/// The features that the gateway looks for: a command, or `command.argument`.
///
/// `block-job-change` makes a mirror write synchronously (8.2); `avail-switchover-bandwidth` tells QEMU
/// what the WAN carries (8.2); `exit-on-error` keeps a destination alive after a failed load (9.1);
/// `blockdev-set-active` (10.0); `target-is-zero` spares a full copy onto an empty disk (10.1).
pub const KNOWN_FEATURES: [&str; 11] = [
    "block-job-change",
    "blockdev-mirror",
    "blockdev-mirror.target-is-zero",
    "blockdev-set-active",
    "block-dirty-bitmap-add",
    "block-export-add",
    "migrate-continue",
    "migrate-incoming.exit-on-error",
    "migrate-set-parameters.avail-switchover-bandwidth",
    "set-vcpu-dirty-limit",
    "yank",
];

/// Why QEMU could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The program cannot be started.
    #[error("Cannot start {}; install QEMU or name its program in the configuration", qemu.display())]
    Start {
        /// The program.
        qemu: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It was started but does not answer as QEMU does.
    #[error("{} does not answer as QEMU does", qemu.display())]
    Qmp {
        /// The program.
        qemu: PathBuf,
        /// What went wrong.
        #[source]
        source: QmpError,
    },
}

/// What QEMU says of itself.
#[derive(Debug, Clone)]
pub(super) struct Probed {
    pub version: QemuVersion,
    pub machines: BTreeMap<String, MachineSupport>,
    pub cpus: BTreeMap<String, CpuSupport>,
    pub features: BTreeSet<String>,
}

/// Starts QEMU without a machine, asks and ends it.
pub(super) async fn probe(
    qemu: &Path,
    accelerator: Accelerator,
    config: &QmpConfig,
) -> Result<Probed, ProbeError> {
    let start = |source| ProbeError::Start { qemu: qemu.to_owned(), source };
    let mut child = Command::new(qemu)
        .args(["-M", "none", "-accel", accelerator.as_str(), "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-S", "-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(start)?;
    let missing = || start(io::Error::other("no pipe to it"));
    let writer = child.stdin.take().ok_or_else(missing)?;
    let reader = child.stdout.take().ok_or_else(missing)?;
    // A cold QEMU reads its libraries from disk first; nobody else can hold this monitor.
    let config = QmpConfig { greeting_limit: Duration::from_secs(15), ..config.clone() };
    let asked = async {
        let qmp = QmpClient::over(reader, writer, qemu.display().to_string(), config).await?;
        let probed = ask(&qmp).await?;
        qmp.execute("quit", json!({})).await?;
        Ok(probed)
    };
    let probed = asked.await.map_err(|source| ProbeError::Qmp { qemu: qemu.to_owned(), source })?;
    child.wait().await.map_err(start)?;
    Ok(probed)
}

async fn ask(qmp: &QmpClient) -> Result<Probed, QmpError> {
    let version: Version = qmp.query("query-version", json!({})).await?;
    let machines: Vec<Machine> = qmp.query("query-machines", json!({})).await?;
    let cpus: Vec<Cpu> = qmp.query("query-cpu-definitions", json!({})).await?;
    let schema: Vec<Entity> = qmp.query("query-qmp-schema", json!({})).await?;
    let versioned =
        |machine: &Machine| machine.name.starts_with("pc-q35-") || machine.name.starts_with("pc-i440fx-");
    Ok(Probed {
        version: version.qemu,
        machines: machines.into_iter().filter(versioned).map(Machine::into_support).collect(),
        cpus: cpus.into_iter().map(Cpu::into_support).collect(),
        features: features(&schema),
    })
}

#[derive(Deserialize)]
struct Version {
    qemu: QemuVersion,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Machine {
    name: String,
    cpu_max: u16,
    #[serde(default)]
    deprecated: bool,
}

impl Machine {
    fn into_support(self) -> (String, MachineSupport) {
        (self.name, MachineSupport { max_vcpus: self.cpu_max, deprecated: self.deprecated })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cpu {
    name: String,
    /// Absent where QEMU cannot tell.
    #[serde(default)]
    unavailable_features: Vec<String>,
    #[serde(default)]
    migration_safe: bool,
}

impl Cpu {
    fn into_support(self) -> (String, CpuSupport) {
        (
            self.name,
            CpuSupport { missing_features: self.unavailable_features, migration_safe: self.migration_safe },
        )
    }
}

/// An entry of `query-qmp-schema`, which names types by opaque numbers.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Entity {
    name: String,
    meta_type: String,
    #[serde(default)]
    arg_type: Option<String>,
    #[serde(default)]
    members: Vec<Value>,
}

fn features(schema: &[Entity]) -> BTreeSet<String> {
    let by_name: BTreeMap<&str, &Entity> =
        schema.iter().map(|entity| (entity.name.as_str(), entity)).collect();
    let has = |feature: &str| {
        let (command, argument) = feature.split_once('.').map_or((feature, None), |(c, a)| (c, Some(a)));
        let Some(entity) = by_name.get(command).filter(|entity| entity.meta_type == "command") else {
            return false;
        };
        let Some(argument) = argument else { return true };
        let arguments = entity.arg_type.as_deref().and_then(|name| by_name.get(name));
        arguments.is_some_and(|object| object.members.iter().any(|member| member["name"] == argument))
    };
    KNOWN_FEATURES.iter().filter(|feature| has(feature)).map(|&feature| feature.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_is_a_command_or_one_of_its_arguments() {
        let schema: Vec<Entity> = serde_json::from_value(json!([
            { "name": "yank", "meta-type": "command", "arg-type": "1", "ret-type": "0" },
            { "name": "blockdev-mirror", "meta-type": "command", "arg-type": "2", "ret-type": "0" },
            { "name": "2", "meta-type": "object", "members": [{ "name": "target-is-zero", "type": "bool" }] },
            { "name": "migrate-incoming", "meta-type": "event", "arg-type": "2" },
        ]))
        .unwrap();
        let found = features(&schema);
        assert_eq!(
            found.iter().collect::<Vec<_>>(),
            ["blockdev-mirror", "blockdev-mirror.target-is-zero", "yank"]
        );
    }
}
