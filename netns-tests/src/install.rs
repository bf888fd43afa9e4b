//! Brings what the laboratory needs onto a Debian machine: programs by apt, and packages that are only unpacked into a
//! folder because installing them would start a service or touch the boot loader. On other systems it only says what is
//! missing. Also sees to it that the lab runs as root.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::exec::{self, find_program};

/// Where unpacked packages are kept between runs, relative to the workspace.
pub const PACKAGE_CACHE: &str = "target/lab/packages";

/// A program, the Debian package that has it, and what the lab wants it for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// The program's name.
    pub program: &'static str,
    /// Debian's package; several with spaces between them, the program's own first.
    pub package: &'static str,
    /// A few words for the user.
    pub why: &'static str,
}

/// What every laboratory needs.
pub const LAB_NEEDS: &[Need] = &[
    need("ip", "iproute2", "namespaces and links"),
    need("tc", "iproute2", "to see whether the kernel has netem"),
    need("ping", "iputils-ping", "whether the sites reach each other"),
    need("nft", "nftables", "the routers' firewalls and the counters"),
    need("sysctl", "procps", "the routers' and hosts' switches"),
    need("qemu-system-x86_64", "qemu-system-x86", "the machines that move"),
    need("qemu-img", "qemu-utils", "disk images"),
    need("named", "bind9", "the name server of `--dns bind9`"),
    need("knotd", "knot", "conformance of dnsupdater"),
    need("pdns_server", "pdns-server pdns-backend-sqlite3", "conformance of dnsupdater"),
    need("sqlite3", "sqlite3", "the database of PowerDNS"),
    need("yadifad", "yadifa", "conformance of dnsupdater"),
    need("etcd", "etcd-server", "the arbiter `etcd`"),
    need("mke2fs", "e2fsprogs", "the guest's root disk"),
    need("losetup", "mount", "a disk that cannot be read"),
    need("cpio", "cpio", "the guest's first file system"),
    need("dpkg-deb", "dpkg", "unpacking the guest's kernel and web server"),
];

/// One [`Need`].
pub const fn need(program: &'static str, package: &'static str, why: &'static str) -> Need {
    Need { program, package, why }
}

/// Installs what is missing, saying what and why; on a system that is no Debian, fails with the list of it.
pub fn ensure(needs: &[Need]) -> Result<()> {
    // A package can push out another one that was there: QEMU's machines of one release, its tools of another.
    for _ in 0..2 {
        let missing = missing_of(needs);
        if missing.is_empty() {
            return Ok(());
        }
        install_missing(&missing)?;
    }
    let still = missing_of(needs);
    still
        .first()
        .map_or(Ok(()), |need| bail!("{} is installed but {} is not there", need.package, need.program))
}

fn missing_of(needs: &[Need]) -> Vec<&Need> {
    needs.iter().filter(|need| find_program(need.program).is_none()).collect()
}

fn install_missing(missing: &[&Need]) -> Result<()> {
    let list = missing.iter().map(|need| format!("{} ({}: {})", need.package, need.program, need.why));
    let list = list.collect::<Vec<_>>().join(", ");
    if !is_debian() {
        bail!("Missing, and this is no Debian to install it on: {list}");
    }
    say(&format!("Installing from Debian: {list}"));
    install(&missing.iter().flat_map(|need| need.package.split(' ')).collect())
}

/// Downloads Debian packages and unpacks them, without their scripts, into `<into>/<name>`: `name` itself and the
/// `dependencies` that its programs need at run time. Returns that folder. What is unpacked already is taken as it is,
/// without asking the network.
pub fn extract_package(name: &str, dependencies: &[&str], into: &Path) -> Result<PathBuf> {
    let folder = into.join(name);
    let list = std::iter::once(name).chain(dependencies.iter().copied()).collect::<Vec<_>>().join(" ");
    let marker = folder.join(".unpacked");
    if std::fs::read_to_string(&marker).is_ok_and(|unpacked| unpacked == list) {
        return Ok(folder);
    }
    if !is_debian() {
        bail!("Debian's package {name} is needed and this is no Debian");
    }
    say(&format!("Unpacking from Debian, without installing: {list}"));
    remove_if_there(&folder)?;
    let downloads = folder.join(".downloads");
    std::fs::create_dir_all(&downloads).with_context(|| format!("Cannot create {}", downloads.display()))?;
    let packages: Vec<&str> = list.split(' ').collect();
    refresh_lists_for(&packages)?;
    download(&packages, &downloads)?;
    for entry in std::fs::read_dir(&downloads)?.flatten() {
        let (archive, target) = (entry.path(), folder.as_path());
        exec::run("dpkg-deb", &["-x", &archive.to_string_lossy(), &target.to_string_lossy()])?;
    }
    remove_if_there(&downloads)?;
    std::fs::write(marker, list)?;
    Ok(folder)
}

/// What a package depends on directly, first alternatives only: `linux-image-cloud-amd64` names the kernel it stands for.
pub fn dependencies(package: &str) -> Result<Vec<String>> {
    refresh_lists_for(&[package])?;
    let options = ["depends", "--important", "--no-suggests", "--no-recommends", package];
    let text = exec::run("apt-cache", &options)?;
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(names.filter(|name| !name.starts_with('<')).map(str::to_owned).collect())
}

/// Goes on as root: at once if this is root, else by starting the same command again through sudo, else by one line and
/// exit code 2.
pub fn ensure_root() {
    if nix::unistd::geteuid().is_root() {
        return;
    }
    let Some(sudo) = find_program("sudo").filter(|sudo| may_use(sudo)) else {
        say("The laboratory needs root (namespaces, network devices); run it as root or with sudo");
        std::process::exit(2);
    };
    let error = again_with(&sudo).map(|mut command| command.exec());
    say(&format!("Cannot start sudo: {error:?}; run the laboratory as root"));
    std::process::exit(2);
}

/// Whether this is Debian or made from it.
pub fn is_debian() -> bool {
    std::fs::read_to_string("/etc/os-release").is_ok_and(|text| describes_debian(&text))
}

fn describes_debian(os_release: &str) -> bool {
    let values = os_release.lines().filter_map(|line| line.split_once('='));
    values
        .filter(|(key, _)| *key == "ID" || *key == "ID_LIKE")
        .any(|(_, value)| value.trim_matches('"').split(' ').any(|word| word == "debian"))
}

/// Without a terminal sudo cannot ask for a password.
fn may_use(sudo: &Path) -> bool {
    let quiet = || Command::new(sudo).args(["-n", "true"]).stderr(std::process::Stdio::null()).status();
    std::io::stdin().is_terminal() || quiet().is_ok_and(|status| status.success())
}

/// The same binary, arguments and folder, with what cargo and rustup need to be found again.
fn again_with(sudo: &Path) -> Result<Command> {
    let mut command = Command::new(sudo);
    command.args(["-E", "--", "env"]);
    let wanted = |name: &str| {
        let prefixes = ["CARGO", "RUST", "LONGHAUL", "LC_"];
        ["PATH", "HOME", "TERM", "LANG", "NO_COLOR"].contains(&name)
            || prefixes.iter().any(|p| name.starts_with(p))
    };
    for (name, value) in std::env::vars_os() {
        if name.to_str().is_some_and(wanted) {
            let mut assignment = name;
            assignment.push("=");
            assignment.push(value);
            command.arg(assignment);
        }
    }
    command.arg(std::env::current_exe().context("Cannot find the running program")?);
    command.args(std::env::args_os().skip(1));
    Ok(command)
}

fn install(packages: &BTreeSet<&str>) -> Result<()> {
    let packages: Vec<&str> = packages.iter().copied().collect();
    refresh_lists_for(&packages)?;
    let _quiet = ServiceGuard::raise(Path::new(ServiceGuard::PATH))?;
    let mut arguments = vec!["install", "--yes", "--quiet", "--no-install-recommends"];
    arguments.extend(&packages);
    apt_get(&arguments, None)
}

/// Updates apt's lists if one of the packages is not in them.
fn refresh_lists_for(packages: &[&str]) -> Result<()> {
    let known = |package: &&str| {
        let policy = exec::run("apt-cache", &["policy", package]).unwrap_or_default();
        policy.lines().any(|line| line.trim().starts_with("Candidate:") && !line.contains("(none)"))
    };
    if packages.iter().all(known) {
        return Ok(());
    }
    apt_get(&["update", "--quiet"], None)
}

/// Lists that are older than the archive name files that are gone: then update and try once more.
fn download(packages: &[&str], folder: &Path) -> Result<()> {
    let mut arguments = vec!["-o", "APT::Sandbox::User=root", "download"];
    arguments.extend(packages);
    if apt_get(&arguments, Some(folder)).is_ok() {
        return Ok(());
    }
    apt_get(&["update", "--quiet"], None)?;
    apt_get(&arguments, Some(folder))
}

fn apt_get(arguments: &[&str], folder: Option<&Path>) -> Result<()> {
    let mut command = Command::new(find_program("apt-get").context("apt-get is not there")?);
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    if let Some(folder) = folder {
        command.current_dir(folder);
    }
    exec::finish(&mut command, "apt-get", arguments).map(drop)
}

/// While it stands, installing a package starts no service (Debian policy 9.3.3.2). An administrator's own is respected.
struct ServiceGuard {
    placed: Option<PathBuf>,
}

impl ServiceGuard {
    const PATH: &str = "/usr/sbin/policy-rc.d";

    fn raise(path: &Path) -> Result<Self> {
        let Ok(mut file) = File::create_new(path) else {
            return Ok(Self { placed: None });
        };
        let guard = Self { placed: Some(path.to_owned()) };
        file.write_all(b"#!/bin/sh\nexit 101\n")?;
        file.set_permissions(std::fs::Permissions::from_mode(0o755))?;
        Ok(guard)
    }
}

impl Drop for ServiceGuard {
    fn drop(&mut self) {
        if let Some(path) = self.placed.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn remove_if_there(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Cannot remove {}", folder.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// For the user, before any logging is set up.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_and_its_children_are_recognised() {
        assert!(describes_debian("NAME=\"Debian GNU/Linux\"\nID=debian\n"));
        assert!(describes_debian("ID=ubuntu\nID_LIKE=debian\n"));
        assert!(describes_debian("ID=mint\nID_LIKE=\"ubuntu debian\"\n"));
        assert!(!describes_debian("ID=fedora\nNAME=debian\n"));
    }

    #[test]
    fn what_is_there_already_needs_nothing() {
        ensure(&[need("sh", "dash", "a test")]).unwrap();
    }

    #[test]
    fn an_unpacked_package_is_taken_without_the_network() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("no-such-package");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join(".unpacked"), "no-such-package other").unwrap();
        assert_eq!(extract_package("no-such-package", &["other"], cache.path()).unwrap(), folder);
    }

    #[test]
    fn the_guard_against_services_goes_again_and_respects_one_that_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy-rc.d");
        let guard = ServiceGuard::raise(&path).unwrap();
        assert_eq!(Command::new(&path).status().unwrap().code(), Some(101));
        drop(ServiceGuard::raise(&path).unwrap());
        assert!(path.exists(), "somebody else's is left alone");
        drop(guard);
        assert!(!path.exists());
    }
}
