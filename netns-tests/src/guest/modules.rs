//! Finds the kernel modules a guest needs and the order in which they must be loaded.
//!
//! Debian's kernel package carries no `modules.dep` (it is made when the package is installed, and here it is only
//! extracted), so dependencies are read where `depmod` itself reads them: from each module's `.modinfo` strings.
//! Does not load anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// One module to load, with its uncompressed content.
#[derive(Debug, Clone)]
pub struct Module {
    /// Canonical name, with underscores, for example `virtio_blk`.
    pub name: String,
    /// The ELF object.
    pub content: Vec<u8>,
}

/// The modules below `folder` (`lib/modules/VERSION`) named in `wanted`, and all they depend on, in loading order.
///
/// A wanted module that is neither a file nor listed in `modules.builtin` is left out when it is in `optional`,
/// and an error otherwise.
///
/// # Errors
/// A required module is missing, or a file cannot be read.
pub fn closure(folder: &Path, wanted: &[&str], optional: &[&str]) -> Result<Vec<Module>> {
    let files = module_files(folder)?;
    let builtin = builtin_names(folder)?;
    let mut search =
        Search { files: &files, builtin: &builtin, visited: BTreeSet::new(), ordered: Vec::new() };
    for name in wanted {
        search.visit(name)?;
    }
    for name in optional {
        if files.contains_key(&canonical(name)) {
            search.visit(name)?;
        }
    }
    Ok(search.ordered)
}

struct Search<'a> {
    files: &'a BTreeMap<String, PathBuf>,
    builtin: &'a BTreeSet<String>,
    visited: BTreeSet<String>,
    ordered: Vec<Module>,
}

impl Search<'_> {
    fn visit(&mut self, name: &str) -> Result<()> {
        let name = canonical(name);
        if self.builtin.contains(&name) || !self.visited.insert(name.clone()) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name) else {
            bail!("The kernel package has no module {name}, and it is not built in");
        };
        let content = read_module(path)?;
        for dependency in dependencies(&content) {
            self.visit(&dependency)?;
        }
        self.ordered.push(Module { name, content });
        Ok(())
    }
}

/// Hard dependencies from `.modinfo`: `depends=a,b`. The strings are NUL-terminated.
fn dependencies(content: &[u8]) -> Vec<String> {
    content
        .split(|byte| *byte == 0)
        .filter_map(|text| text.strip_prefix(b"depends="))
        .filter_map(|list| std::str::from_utf8(list).ok())
        .flat_map(|list| list.split(',').map(str::to_owned).collect::<Vec<_>>())
        .filter(|name| !name.is_empty())
        .collect()
}

fn module_files(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![folder.join("kernel")];
    while let Some(folder) = pending.pop() {
        let entries = fs::read_dir(&folder).with_context(|| format!("Cannot list {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                pending.push(path);
                continue;
            }
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some((stem, _)) = file.split_once(".ko") {
                found.insert(canonical(stem), path);
            }
        }
    }
    Ok(found)
}

fn builtin_names(folder: &Path) -> Result<BTreeSet<String>> {
    let path = folder.join("modules.builtin");
    let text = fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
    Ok(text
        .lines()
        .filter_map(|line| line.rsplit('/').next()?.split_once(".ko").map(|(stem, _)| canonical(stem)))
        .collect())
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// Reads a module, through `xz` or `zstd` where the distribution compresses them (Debian 13 does).
fn read_module(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|end| end.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some(_) | None => return fs::read(path).with_context(|| format!("Cannot read {}", path.display())),
    };
    let output =
        Command::new(tool).arg("-dc").arg(path).output().with_context(|| format!("Cannot run {tool}"))?;
    if !output.status.success() {
        bail!("{tool} could not unpack {}", path.display());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake_kernel(modules: &[(&str, &str)], builtin: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("kernel/drivers")).unwrap();
        fs::write(folder.path().join("modules.builtin"), builtin).unwrap();
        for (name, depends) in modules {
            let content = format!("ELF\0license=GPL\0depends={depends}\0name={name}\0");
            fs::write(folder.path().join(format!("kernel/drivers/{name}.ko")), content).unwrap();
        }
        folder
    }

    #[test]
    fn dependencies_come_before_the_module_and_built_in_ones_are_left_out() {
        let folder = fake_kernel(
            &[
                ("virtio-net", "virtio,net_failover"),
                ("virtio", ""),
                ("net_failover", "failover,virtio"),
                ("failover", ""),
            ],
            "kernel/fs/ext4/ext4.ko\n",
        );
        let found = closure(folder.path(), &["ext4", "virtio_net"], &["absent"]).unwrap();
        let names: Vec<_> = found.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["virtio", "failover", "net_failover", "virtio_net"]);
    }

    #[test]
    fn a_required_module_that_is_missing_is_an_error_that_names_it() {
        let folder = fake_kernel(&[], "");
        let error = closure(folder.path(), &["virtio_blk"], &[]).unwrap_err();
        assert!(error.to_string().contains("virtio_blk"));
    }
}
