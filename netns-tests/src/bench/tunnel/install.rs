//! Brings the programs that are compared: from Debian, and from crates.io in pinned versions into
//! `target/lab/peers`.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::exec;
use crate::guest::image::lab_folder;
use crate::install::{self, need};

/// A program of crates.io.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pin {
    /// The crate.
    pub name: &'static str,
    /// The program in it.
    pub program: &'static str,
    /// Exactly this version.
    pub version: &'static str,
}

/// Installs what measures. Without it there is no benchmark.
pub(super) fn tools() -> Result<()> {
    install::ensure(&[need("iperf3", "iperf3", "the traffic of the benchmark")])
}

/// Installs `wg`, which configures everything that speaks WireGuard.
pub(super) fn wireguard_tools() -> Result<()> {
    install::ensure(&[need("wg", "wireguard-tools", "keys and peers of WireGuard")])
}

/// Installs Debian's wireguard-go; its path and version.
pub(super) fn wireguard_go() -> Result<(PathBuf, String)> {
    install::ensure(&[need("wireguard-go", "wireguard-go", "a tunnel to compare with")])?;
    let version = exec::run("dpkg-query", &["-W", "-f", "${Version}", "wireguard-go"])?;
    let path = exec::find_program("wireguard-go").context("wireguard-go is not there")?;
    Ok((path, version))
}

/// Builds a program of crates.io unless it is there in this version; its path.
pub(super) fn program(pin: Pin) -> Result<PathBuf> {
    let root = lab_folder().join("peers").join(format!("{}-{}", pin.name, pin.version));
    let program = root.join("bin").join(pin.program);
    if program.exists() {
        return Ok(program);
    }
    println!("Building {} {} from crates.io", pin.name, pin.version);
    let log = lab_folder().join("peers").join(format!("{}.log", pin.name));
    build(pin, &root, &log).with_context(|| format!("{} says why", log.display()))?;
    if !program.exists() {
        bail!("{} {} has no program {}", pin.name, pin.version, pin.program);
    }
    Ok(program)
}

fn build(pin: Pin, root: &Path, log: &Path) -> Result<()> {
    std::fs::create_dir_all(root)?;
    let mut command = crate::cargo::command();
    command.args(["install", "--locked", "--root"]).arg(root);
    command.args([pin.name, "--version", &format!("={}", pin.version)]);
    // One folder for all of them: they share most of what they are made of.
    command.env("CARGO_TARGET_DIR", lab_folder().join("peers/target"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(log)?);
    if !command.status().context("Cannot run cargo install")?.success() {
        bail!("{} {} does not build", pin.name, pin.version);
    }
    Ok(())
}
