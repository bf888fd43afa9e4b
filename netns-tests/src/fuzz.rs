//! `cargo lab fuzz`: builds the fuzz targets with coverage counters and lets libFuzzer loose on each of them.
//!
//! ```text
//!  gateway/fuzz/corpus/TARGET (seeds, read only) --.
//!  target/lab/fuzz/corpus/TARGET (grows) -----------+-> libFuzzer -> target/lab/fuzz/found/TARGET-crash-...
//! ```
//!
//! What is checked stands in `gateway/fuzz/src`. It needs a stable compiler and a C++ compiler, nothing else:
//! only this workspace's crates are built anew for it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::install::{self, Need, need};

/// What fuzzing needs beside the laboratory's own.
const NEEDS: &[Need] = &[need("c++", "g++", "libFuzzer's runtime")];
/// Memory of one fuzzer, in MiB: a decoder that takes what a length in its input says is found by it.
const RSS_LIMIT_MIB: u32 = 1024;
/// One input may take this long, in seconds.
const INPUT_LIMIT_S: u32 = 10;
/// Where seeds are, relative to the workspace.
const SEEDS: &str = "gateway/fuzz/corpus";
/// Where everything else of fuzzing is kept, relative to the workspace.
const KEPT: &str = "target/lab/fuzz";

/// Fuzzes every target, or the one called `wanted`, for `seconds` each; whether nothing was found.
pub fn run(wanted: Option<&str>, seconds: u64) -> Result<bool> {
    install::ensure(NEEDS)?;
    let targets: Vec<String> =
        targets()?.into_iter().filter(|target| wanted.is_none_or(|wanted| wanted == target)).collect();
    if targets.is_empty() {
        bail!(
            "There is no fuzz target {}; there are {}",
            wanted.unwrap_or("at all"),
            self::targets()?.join(", ")
        );
    }
    let programs = build(&targets)?;
    let mut well = true;
    for (target, program) in targets.iter().zip(programs) {
        well &= fuzz(target, &program, seconds)?;
    }
    Ok(well)
}

/// Every target has a folder of seeds.
fn targets() -> Result<Vec<String>> {
    let folders = std::fs::read_dir(workspace().join(SEEDS)).context("There is no corpus")?;
    let mut names: Vec<String> =
        folders.flatten().map(|folder| folder.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

fn build(targets: &[String]) -> Result<Vec<PathBuf>> {
    let mut command = crate::cargo::command();
    // The whole workspace is selected, although only these programs are built: with fewer packages the dependencies
    // would have other features than in every other build, and would be built once more.
    command.args(["build", "--locked", "--quiet", "--workspace", "--features", "longhaul-fuzz/libfuzzer"]);
    for target in targets {
        command.args(["--bin", target]);
    }
    command.env("RUSTC_WORKSPACE_WRAPPER", workspace().join("gateway/fuzz/instrument"));
    let status = command.current_dir(workspace()).status().context("Cannot run cargo build")?;
    if !status.success() {
        bail!("The fuzz targets do not build");
    }
    let folder =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from);
    Ok(targets.iter().map(|target| folder.join("debug").join(target)).collect())
}

fn fuzz(target: &str, program: &Path, seconds: u64) -> Result<bool> {
    let kept = workspace().join(KEPT);
    let (corpus, found) = (kept.join("corpus").join(target), kept.join("found"));
    for folder in [&corpus, &found] {
        std::fs::create_dir_all(folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    }
    let mut command = Command::new(program);
    command.args([&corpus, &workspace().join(SEEDS).join(target)]);
    command.arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-max_len={}", max_bytes(target)));
    command.arg(format!("-rss_limit_mb={RSS_LIMIT_MIB}"));
    command.arg(format!("-timeout={INPUT_LIMIT_S}"));
    command.arg(format!("-artifact_prefix={}/{target}-", found.display()));
    command.args(["-print_final_stats=1", "-verbosity=1"]).stdin(Stdio::null());
    let output = command.output().with_context(|| format!("Cannot run {}", program.display()))?;
    let log = String::from_utf8_lossy(&output.stderr);
    println!("fuzz {target}: {}", summary(&log));
    if !output.status.success() {
        let from = log.len().saturating_sub(4000);
        let tail = log.char_indices().find(|(at, _)| *at >= from).map_or("", |(at, _)| &log[at..]);
        println!("{tail}\nfuzz {target}: FOUND something, kept in {}", found.display());
    }
    Ok(output.status.success())
}

/// Larger than any seed, and no larger than what a target can use.
fn max_bytes(target: &str) -> usize {
    longhaul_fuzz::TARGETS.iter().find(|known| known.name == target).map_or(4096, |known| known.max_bytes)
}

/// libFuzzer's own account in one line.
fn summary(log: &str) -> String {
    let figure = |name: &str| {
        let line = log.lines().rev().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
        line.map_or("?", |rest| rest.trim_start_matches(':').trim()).to_owned()
    };
    let edges = log.lines().rev().find_map(|line| line.split(" cov: ").nth(1)?.split(' ').next());
    format!(
        "{} inputs, {} a second, {} edges, {} MiB at most",
        figure("number_of_executed_units"),
        figure("average_exec_per_sec"),
        edges.unwrap_or("?"),
        figure("peak_rss_mb"),
    )
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_account_of_a_run_is_read() {
        let log = "#65536\tpulse  cov: 812 ft: 3000 corp: 90/9Kb exec/s: 21845 rss: 60Mb\n\
            stat::number_of_executed_units: 99000\nstat::average_exec_per_sec:     19800\nstat::peak_rss_mb: 61\n";
        assert_eq!(summary(log), "99000 inputs, 19800 a second, 812 edges, 61 MiB at most");
    }

    #[test]
    fn every_target_has_seeds_and_a_bound() {
        let names: Vec<&str> = longhaul_fuzz::TARGETS.iter().map(|target| target.name).collect();
        let mut sorted = names.clone();
        sorted.sort_unstable();
        assert_eq!(targets().unwrap(), sorted);
    }
}
