//! `cargo lab test`: every test, cheapest first, in two runs of cargo with a short run of the fuzzer between.
//!
//! The real-machine tests take turns: a machine with two cores runs one world at a time. What a
//! machine cannot run says `skipped:` and why; the summary counts those lines. What failed is said once more at the end.

mod failed;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::fuzz;
use crate::guest::image::{GuestImage, ImageSpec};
use crate::scenario::programs::Programs;

use failed::Failed;

/// How long each fuzz target runs. A longer run is `cargo lab fuzz --seconds N`.
const FUZZ_S: u64 = 4;

/// Runs them all, or those whose name contains `filter`.
pub fn run(filter: Option<&str>) -> Result<bool> {
    let programs = Programs::build()?;
    let image = GuestImage::ensure(&ImageSpec::new(&programs.guest_agent))?;
    println!("guest image ready ({}, {:.1} s)", image.kernel_version, image.took.as_secs_f64());
    let runs: [&[&str]; 2] = [
        &["test", "--locked", "--workspace", "--exclude", "netns-tests", "--no-fail-fast"],
        &["test", "--locked", "--package", "netns-tests", "--no-fail-fast"],
    ];
    let mut well = true;
    let (mut skipped, mut failed) = (Vec::new(), Failed::default());
    for arguments in runs {
        let alone = arguments.contains(&"netns-tests") && !arguments.contains(&"--exclude");
        if alone && filter.is_none() {
            well &= fuzz::run(None, FUZZ_S)?;
        }
        let read = |line: &str| {
            failed.read(line);
            if line.contains("skipped:") {
                skipped.push(line.to_owned());
            }
        };
        well &= cargo(arguments, filter, alone, read)?;
    }
    for line in skipped.iter().map(String::as_str).chain(failed.lines()) {
        println!("{line}");
    }
    println!(
        "{} tests skipped; everything else {}",
        skipped.len(),
        if well { "passed" } else { "did NOT pass" }
    );
    Ok(well)
}

fn cargo(arguments: &[&str], filter: Option<&str>, alone: bool, mut read: impl FnMut(&str)) -> Result<bool> {
    let mut command = crate::cargo::command();
    command.args(arguments).args(filter).arg("--").arg("--show-output");
    if alone {
        command.arg("--test-threads=1");
    }
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).stdout(Stdio::piped());
    let mut child = command.spawn().context("Cannot run cargo test")?;
    let output = child.stdout.take().context("cargo test has no output")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        read(&line);
    }
    Ok(child.wait()?.success())
}
