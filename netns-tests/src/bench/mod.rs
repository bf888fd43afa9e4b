//! Benchmarks against what others have built. Each compares in one run, on the same namespaces, taking turns;
//! what cannot be installed is named with the reason. Nothing here is a test: a slow machine fails nothing.

pub mod link;
pub mod migrate;
pub mod tunnel;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::guest::image::lab_folder;

/// Where results are written: a run of only a part does not replace what the whole said.
fn results(name: &str, partial: bool, extension: &str) -> Result<PathBuf> {
    let folder = lab_folder().join("bench");
    std::fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    let part = if partial { "-part" } else { "" };
    Ok(folder.join(format!("{name}{part}.{extension}")))
}

/// Writes a file of results and says where it is.
fn keep(file: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    std::fs::write(file, content).with_context(|| format!("Cannot write {}", file.display()))?;
    println!("{}", file.display());
    Ok(())
}

/// Goes on in a build of this program with all optimisations, as the others are: at once if this is one.
pub fn ensure_release() -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let mut command = crate::cargo::command();
    command.args(["build", "--quiet", "--release", "--locked", "--package", "netns-tests", "--bin", "lab"]);
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    if !command.status().context("Cannot run cargo to build the laboratory")?.success() {
        bail!("The laboratory does not build in the release profile");
    }
    let program = lab_folder().join("../release/lab");
    let error = Command::new(&program).args(std::env::args_os().skip(1)).exec();
    Err(error).with_context(|| format!("Cannot start {}", program.display()))
}

/// The middle one of what was measured, or the mean of the two in the middle; `None` of nothing.
pub fn median(measured: &[f64]) -> Option<f64> {
    let mut sorted = measured.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_does_not_mind_an_outlier() {
        assert_eq!(median(&[1.0, 100.0, 2.0]), Some(2.0));
        assert_eq!(median(&[1.0, 3.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }
}
