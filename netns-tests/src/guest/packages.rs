//! Fetches Debian packages and unpacks them into a folder, without installing them.
//!
//! `apt-get download` verifies signatures and picks versions; nothing here speaks to a mirror by itself. The list of
//! files is kept beside them, so a second run needs neither apt nor a network. Does not resolve more than shared
//! libraries: the packages named and, recursively, what they depend on whose name begins with `lib` or `zlib`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Where the packages of one guest lie: package name to `.deb` file.
pub type Packages = BTreeMap<String, PathBuf>;

const MANIFEST: &str = "packages.json";
/// The meta package that names the current kernel.
pub const KERNEL_META: &str = "linux-image-cloud-amd64";
const NAMED: [&str; 4] = ["busybox-static", "nginx", "nginx-common", "libc6"];

/// All packages a guest is made of, from `folder` if they were fetched before, else from the package archive.
///
/// # Errors
/// This is no Debian with apt, or the archive cannot be reached and nothing is cached.
pub fn fetch(folder: &Path) -> Result<Packages> {
    if let Some(known) = cached(folder) {
        return Ok(known);
    }
    fs::create_dir_all(folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    if let Ok(packages) = download_all(folder) {
        return Ok(packages);
    }
    // A fresh container has no package lists, or lists whose files have been superseded since.
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    download_all(folder)
}

/// The one package whose name begins with `prefix`.
///
/// # Errors
/// There is none.
pub fn starting_with<'a>(packages: &'a Packages, prefix: &str) -> Result<&'a Path> {
    packages
        .iter()
        .find(|(name, _)| name.starts_with(prefix))
        .map(|(_, path)| path.as_path())
        .with_context(|| format!("No package {prefix}* was fetched"))
}

/// Unpacks one package below `target`, which is created.
///
/// # Errors
/// `dpkg-deb` is missing or the file is damaged.
pub fn unpack(package: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("Cannot make {}", target.display()))?;
    run(Command::new("dpkg-deb").arg("-x").arg(package).arg(target)).map(drop)
}

/// Runs a tool to its end and gives its standard output; on failure the error carries what it wrote.
///
/// # Errors
/// The tool is missing or exits with a code other than 0.
pub fn run(command: &mut Command) -> Result<String> {
    let tool = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("Cannot run {tool}: install the Debian package that carries it"))?;
    if !output.status.success() {
        bail!("{tool} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn cached(folder: &Path) -> Option<Packages> {
    let names: BTreeMap<String, String> =
        serde_json::from_slice(&fs::read(folder.join(MANIFEST)).ok()?).ok()?;
    let packages: Packages = names.into_iter().map(|(name, file)| (name, folder.join(file))).collect();
    packages.values().all(|path| path.is_file()).then_some(packages)
}

fn download_all(folder: &Path) -> Result<Packages> {
    let mut names: BTreeSet<String> = NAMED.iter().map(|name| (*name).to_owned()).collect();
    names.insert(kernel_package()?);
    add_libraries(&mut names)?;
    let fresh = tempfile::tempdir_in(folder)?;
    run(Command::new("apt-get")
        .current_dir(fresh.path())
        // apt's unprivileged user may not write here; without this it warns and goes on as root anyway.
        .args(["-o", "APT::Sandbox::User=root", "-qq", "download"])
        .args(&names))
    .context("Cannot fetch the guest's packages")?;
    let mut manifest = BTreeMap::new();
    for entry in fs::read_dir(fresh.path())? {
        let file = entry?.file_name().to_string_lossy().into_owned();
        let name = file.split('_').next().unwrap_or_default().to_owned();
        fs::rename(fresh.path().join(&file), folder.join(&file))?;
        manifest.insert(name, file);
    }
    let missing: Vec<_> = names.iter().filter(|name| !manifest.contains_key(*name)).collect();
    ensure!(missing.is_empty(), "apt-get download left no file for {missing:?}");
    fs::write(folder.join(MANIFEST), serde_json::to_vec_pretty(&manifest)?)?;
    cached(folder).context("Packages vanished while they were fetched")
}

fn kernel_package() -> Result<String> {
    depends(&[KERNEL_META.to_owned()])?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{KERNEL_META} names no kernel package"))
}

/// Adds the closure of library packages.
fn add_libraries(names: &mut BTreeSet<String>) -> Result<()> {
    // The laboratory's own service is linked against the unwinder, as every Rust program is.
    names.insert("libgcc-s1".into());
    let mut pending: Vec<String> = vec!["nginx".into(), "libc6".into(), "libgcc-s1".into()];
    while !pending.is_empty() {
        let found = depends(&pending)?;
        pending = found.into_iter().filter(|name| is_library(name) && names.insert(name.clone())).collect();
    }
    Ok(())
}

fn is_library(package: &str) -> bool {
    package.starts_with("lib") || package.starts_with("zlib")
}

/// What any of `packages` depends on, without alternatives that no package carries.
fn depends(packages: &[String]) -> Result<Vec<String>> {
    let text = run(Command::new("apt-cache")
        .args([
            "depends",
            "--no-recommends",
            "--no-suggests",
            "--no-conflicts",
            "--no-breaks",
            "--no-replaces",
        ])
        .arg("--no-enhances")
        .args(packages))?;
    Ok(text
        .lines()
        .filter_map(|line| line.trim_start_matches([' ', '|']).split_once("Depends: "))
        .map(|(_, name)| name.trim().to_owned())
        .filter(|name| !name.starts_with('<'))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_list_is_used_only_while_every_file_is_there() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(MANIFEST), r#"{"a":"a_1.deb","b":"b_1.deb"}"#).unwrap();
        fs::write(folder.path().join("a_1.deb"), "").unwrap();
        assert!(cached(folder.path()).is_none());
        fs::write(folder.path().join("b_1.deb"), "").unwrap();
        let known = cached(folder.path()).unwrap();
        assert!(starting_with(&known, "b").unwrap().ends_with("b_1.deb"));
    }

    #[test]
    fn a_failing_tool_is_reported_with_what_it_wrote() {
        let error = run(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("broken"));
    }
}
