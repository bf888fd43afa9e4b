//! s2n-quic with its BBR, by a program of its own: builds it when the bench begins, and becomes it in one end of a transfer.
//! How it sends stands in `peers/s2n-quic`, which has its own lock file: no other build takes a second QUIC stack. Nothing
//! is installed for it; where it does not build, the bench goes on without.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Error};

use super::end::Plan;
use crate::guest::image::lab_folder;

/// Its crate, relative to this package.
const FOLDER: &str = "peers/s2n-quic";
const PROGRAM: &str = "s2n-quic-peer";
/// What cargo said while it was built, beside the program.
const LOG: &str = "s2n-quic.log";

/// Builds it with all optimisations; else why it does not build.
pub(super) fn build() -> Result<(), String> {
    println!("building s2n-quic (netns-tests/{FOLDER})");
    build_in(&folder(), &kept())
}

/// Becomes the program, with what the plan says; returns only if it cannot.
pub(super) fn become_it(plan: &Plan) -> Error {
    let program = kept().join("release").join(PROGRAM);
    let mut command = Command::new(&program);
    command.arg(if plan.sends { "send" } else { "receive" });
    command.args([plan.listen.to_string(), plan.remote.to_string()]);
    command.args([plan.held_bytes(), plan.rtt_ms].map(|number| number.to_string()));
    Error::new(command.exec()).context(format!("Cannot start {}", program.display()))
}

fn build_in(folder: &Path, kept: &Path) -> Result<(), String> {
    let mut command = crate::cargo::command();
    command.args(["build", "--release", "--locked", "--color", "never"]).stdin(Stdio::null());
    command.arg("--manifest-path").arg(folder.join("Cargo.toml")).arg("--target-dir").arg(kept);
    let output = command.output().context("Cannot run cargo build").map_err(|error| format!("{error:#}"))?;
    if output.status.success() {
        return Ok(());
    }
    let log = kept.join(LOG);
    // The reason is in what follows too.
    let _ = std::fs::create_dir_all(kept).and_then(|()| std::fs::write(&log, &output.stderr));
    let reason = reason(&String::from_utf8_lossy(&output.stderr));
    Err(format!("its program does not build: {reason}; cargo's words are in {}", log.display()))
}

/// The first error that cargo names, and the last cause of it.
fn reason(log: &str) -> String {
    let error = log.lines().find_map(|line| line.strip_prefix("error")?.split_once(": "));
    let cause = log.rsplit_once("Caused by:\n").and_then(|(_, rest)| rest.lines().next());
    let error = error.map_or("cargo does not say why", |(_, what)| what);
    cause.map_or_else(|| error.to_owned(), |cause| format!("{error}: {}", cause.trim()))
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(FOLDER)
}

fn kept() -> PathBuf {
    lab_folder().join("peers")
}

#[cfg(test)]
mod tests {
    use super::super::report::Outcome;
    use super::super::sender::Sender;
    use super::*;

    #[test]
    fn a_bench_goes_on_without_it_and_says_why() {
        let empty = tempfile::tempdir().unwrap();
        let kept = empty.path().join("peers");
        let prepare = |sender| match sender == Sender::S2nQuicBbr {
            true => build_in(empty.path(), &kept),
            false => Ok(()),
        };
        let mut outcome = Outcome::new(1);
        let ready = super::super::ready(Sender::ALL.into_iter(), prepare, &mut outcome);
        assert_eq!(ready, Sender::ALL.into_iter().filter(|s| *s != Sender::S2nQuicBbr).collect::<Vec<_>>());
        let said = outcome.left_out["s2n-quic-bbr"].clone();
        assert!(said.starts_with("its program does not build: manifest path"), "{said}");
        assert!(outcome.table().contains(&format!("left out: s2n-quic-bbr: {said}")));
        assert_eq!(outcome.json()["left_out"]["s2n-quic-bbr"], said);
        let log = std::fs::read_to_string(kept.join(LOG)).unwrap();
        assert!(log.contains("error: "), "{log}");
    }

    #[test]
    fn the_reason_is_the_first_error_and_its_last_cause() {
        let offline = "    Updating the index\n\
            error: failed to download from `https://registry.example/x`\n\n\
            Caused by:\n  download of config.json failed\n\n\
            Caused by:\n  [6] Could not resolve hostname\n";
        assert_eq!(
            reason(offline),
            "failed to download from `https://registry.example/x`: [6] Could not resolve hostname"
        );
        assert_eq!(
            reason("error[E0432]: unresolved import\n  --> x\nerror: could not\n"),
            "unresolved import"
        );
        assert_eq!(reason(""), "cargo does not say why");
    }

    #[test]
    fn only_its_own_lock_file_has_it() {
        let lock = |folder: &Path| std::fs::read_to_string(folder.join("Cargo.lock")).unwrap();
        assert!(lock(&folder()).contains("name = \"s2n-quic\"\n"));
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        assert!(!lock(&workspace).contains("name = \"s2n-quic"));
    }
}
