//! What a site's host shows of machines, seen from outside its gateway: its network's devices, routes and rules, QEMU
//! processes, files. Only looks, but for [`kill_qemu`].

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::gateway::Gateway;
use super::monitor::Monitor;
use super::scene::VM;
use crate::netns::Namespace;

const LOOK: Duration = Duration::from_millis(100);

/// What machines leave in a host's network: devices, routes, rules of both kinds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces {
    lines: BTreeSet<String>,
}

impl Traces {
    /// Looks at a host.
    pub fn of(host: &Namespace) -> Result<Self> {
        let mut lines = BTreeSet::new();
        let commands: [(&str, &[&str]); 6] = [
            ("ip", &["-br", "link"]),
            ("ip", &["route", "show", "table", "all"]),
            ("ip", &["rule"]),
            ("ip", &["neigh", "show", "proxy"]),
            ("bridge", &["fdb", "show"]),
            ("nft", &["-s", "list", "ruleset"]),
        ];
        for (program, arguments) in commands {
            for line in host.output(program, arguments)?.lines() {
                // Sampled flows of a machine at home come with its clients and go by themselves.
                if program == "nft" && line.contains(" timeout ") {
                    continue;
                }
                // A bridge has its link-local address for as long as something is plugged in, and a while longer.
                if line.contains("proto kernel")
                    && ["fe80::", "ff00::/8"].iter().any(|own| line.contains(own))
                {
                    continue;
                }
                // What a bridge has learned by itself comes and goes.
                if program == "bridge" && !line.contains("permanent") {
                    continue;
                }
                // Only a device's name: its state follows the traffic.
                let link = arguments.contains(&"link");
                let kept =
                    if link { line.split_whitespace().next().unwrap_or_default() } else { line.trim() };
                lines.insert(format!("{program}: {kept}"));
            }
        }
        Ok(Self { lines })
    }

    /// What is gone (`-`) and what is new (`+`) now.
    pub fn difference(&self, now: &Self) -> Vec<String> {
        let gone = self.lines.difference(&now.lines).map(|line| format!("- {line}"));
        let new = now.lines.difference(&self.lines).map(|line| format!("+ {line}"));
        gone.chain(new).collect()
    }
}

/// Waits until a host's network is as it was.
pub async fn as_before(host: &Namespace, before: &Traces, limit: Duration) -> Result<()> {
    as_at_one_time(host, &[before], limit).await
}

/// Waits until a host's network is as it was at one of these times.
pub async fn as_at_one_time(host: &Namespace, times: &[&Traces], limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let now = Traces::of(host)?;
        let differences: Vec<_> = times.iter().map(|time| time.difference(&now)).collect();
        if differences.iter().any(Vec::is_empty) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{} is not as before: {differences:#?}", host.name());
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The run state of the machine's QEMU at a site, by the second monitor; `None` when there is no QEMU.
pub fn run_state(gateway: &Gateway) -> Option<String> {
    Monitor::connect(&gateway.observer(VM), Duration::ZERO).ok()?.state().ok()
}

/// Processes of QEMU that work in a gateway's folder.
pub fn qemus(gateway: &Gateway) -> Vec<i32> {
    let folder = gateway.folder.display().to_string();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        let program = line.split('\0').next().unwrap_or_default();
        if program.contains("qemu-system") && line.contains(&folder) {
            found.push(pid);
        }
    }
    found
}

/// Kills the machine's QEMU at a site, as a power cut would.
pub fn kill_qemu(gateway: &Gateway) -> Result<()> {
    let pids = qemus(gateway);
    let [pid] = pids[..] else { bail!("Not one QEMU but {pids:?}") };
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    Ok(())
}

/// Disks in a site's pool, without the notes beside them.
pub fn images(gateway: &Gateway) -> Result<Vec<String>> {
    let mut names = pool(gateway)?;
    // What is kept for the next attempt is no machine's.
    names.retain(|name| !name.ends_with(".generation") && !name.ends_with(".partial"));
    Ok(names)
}

/// Files in a site's pool of disks.
pub fn pool(gateway: &Gateway) -> Result<Vec<String>> {
    let mut names: Vec<String> = std::fs::read_dir(gateway.folder.join("disks"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}
