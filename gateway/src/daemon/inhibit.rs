//! Holds off a reboot of the host while connections of machines that left go through it.
//!
//! ```text
//!   no flow <---- flows gone: the pipe is closed ---- held: a child `systemd-inhibit ... cat` reads from a pipe
//!      '--------- flows: the child is started ----------^
//! ```
//!
//! The kernel closes the pipe if the gateway dies, so nothing is held off for one that is not there. It holds off what asks
//! logind; whoever insists reboots. Where there is no such program, or no logind, it is said once and that is all.

use std::path::PathBuf;
use std::process::Stdio;

use longhaul_core::tunnel::policy::Role;
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::tunnel::TunnelStatus;

/// Holds off shutdowns with this program for as long as the tunnel has flows; ends with the tunnel.
pub(super) async fn run(program: PathBuf, mut status: watch::Receiver<TunnelStatus>) {
    if program.as_os_str().is_empty() {
        return;
    }
    loop {
        if !becomes(&mut status, has_flows).await {
            return;
        }
        let Some(mut child) = begin(&program) else { return };
        // Waiting for a child closes its pipe, unless it is held apart.
        let pipe = child.stdin.take();
        tokio::select! {
            ended = child.wait() => {
                let ended = ended.map_or_else(|error| error.to_string(), |ended| ended.to_string());
                tracing::info!(program = %program.display(), ended, "reboots of this host are not held off while connections go through it");
                return;
            }
            is_over = becomes(&mut status, |status| !has_flows(status)) => {
                drop(pipe);
                // How it ends does not matter any more.
                drop(child.wait().await);
                if !is_over {
                    return;
                }
                tracing::info!("no connection goes through this host any more; reboots are not held off");
            }
        }
    }
}

/// Waits until the tunnel is so; `false`: there is none any more. Cancel safe.
async fn becomes(
    status: &mut watch::Receiver<TunnelStatus>,
    is_so: impl Fn(&TunnelStatus) -> bool + Send,
) -> bool {
    status.wait_for(|status| is_so(status)).await.is_ok()
}

fn has_flows(status: &TunnelStatus) -> bool {
    status
        .ports
        .iter()
        .any(|port| port.role == Role::Away && port.flows_alive().is_some_and(|flows| flows > 0))
}

fn begin(program: &PathBuf) -> Option<Child> {
    let why = "--why=Connections of machines that moved away go through this host (longhaul status)";
    let child = Command::new(program)
        .args(["--what=shutdown", "--mode=block", "--who=longhaul", why, "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match child {
        Ok(child) => {
            tracing::info!("connections go through this host; reboots are held off");
            Some(child)
        }
        Err(error) => {
            tracing::info!(program = %program.display(), %error, "reboots of this host are not held off while connections go through it");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::time::{Duration, Instant};

    use longhaul_core::tunnel::datapath::{Phase, PortStatus};
    use longhaul_core::tunnel::flows::{FlowCounts, HeldBy, OneWay};
    use longhaul_core::tunnel::policy::PortKey;

    use super::*;

    fn with_flows(flows: u64) -> TunnelStatus {
        let port = PortStatus {
            key: PortKey { machine: "web1".parse().unwrap(), nic: "net0".parse().unwrap() },
            role: Role::Away,
            peer: "b".parse().unwrap(),
            phase: Phase::Passing,
            held_packets: 0,
            held_bytes: 0,
            held_by: Some(HeldBy {
                flows: FlowCounts { tcp_open: flows, ..FlowCounts::default() },
                linger_left: Duration::ZERO,
                untracked_left: Duration::ZERO,
                names_left: None,
                quiet_left: Duration::ZERO,
                limit_left: None,
                released: false,
            }),
            unneeded_for: None,
            one_way: OneWay::default(),
            over_share: 0,
            may_end: false,
        };
        TunnelStatus { ports: vec![port], ..TunnelStatus::default() }
    }

    /// Stands in for systemd-inhibit: notes its arguments, runs the command, and notes that it has ended.
    fn stand_in(folder: &Path, then: &str) -> PathBuf {
        let program = folder.join("inhibit");
        let log = folder.join("log");
        let text = format!(
            "#!/bin/sh\necho \"began $1 $2 $3\" >> {log}\n{then}\necho ended >> {log}\n",
            log = log.display()
        );
        fs::write(&program, text).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        program
    }

    async fn said(folder: &Path, lines: &[&str]) {
        let began = Instant::now();
        loop {
            let text = fs::read_to_string(folder.join("log")).unwrap_or_default();
            if text.lines().eq(lines.iter().copied()) {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{text}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    const BEGAN: &str = "began --what=shutdown --mode=block --who=longhaul";

    #[tokio::test]
    async fn a_reboot_is_held_off_exactly_while_there_are_flows_and_not_by_a_gateway_that_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let program = stand_in(folder.path(), "shift 4; \"$@\"");
        let (show, status) = watch::channel(with_flows(0));
        let task = tokio::spawn(run(program, status));
        show.send_replace(with_flows(2));
        said(folder.path(), &[BEGAN]).await;
        show.send_replace(with_flows(1));
        show.send_replace(with_flows(0));
        said(folder.path(), &[BEGAN, "ended"]).await;
        show.send_replace(with_flows(1));
        said(folder.path(), &[BEGAN, "ended", BEGAN]).await;
        // As when the gateway ends: nothing is tidied, its end of the pipe is closed.
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
        said(folder.path(), &[BEGAN, "ended", BEGAN, "ended"]).await;
    }

    #[tokio::test]
    async fn without_the_program_or_logind_it_goes_on_without() {
        let folder = tempfile::tempdir().unwrap();
        let (_show, status) = watch::channel(with_flows(1));
        run(folder.path().join("nowhere"), status.clone()).await;
        run(PathBuf::new(), status.clone()).await;
        run(stand_in(folder.path(), "exit 1"), status).await;
        said(folder.path(), &[BEGAN]).await;
    }
}
