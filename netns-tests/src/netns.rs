//! Named network namespaces of one lab, and work, processes and sockets inside them.
//!
//! A [`Namespace`] is only a name under `/run/netns` (so `ip netns exec` works on it too). It holds no descriptor: what
//! keeps a namespace alive after its deletion is a process or a socket inside, never this handle. Deleting is
//! [`crate::cleanup`]'s business.

use std::fs::File;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::{cleanup, exec};

/// The environment variable that marks every process a lab starts; its value is the lab's id.
pub const LAB_VARIABLE: &str = "LONGHAUL_LAB";

/// Where `ip netns` keeps the names.
pub const NAMESPACE_FOLDER: &str = "/run/netns";

/// The id of one running laboratory: `lh` and four hexadecimal digits. Everything it makes carries it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LabId(String);

impl LabId {
    /// A fresh random id; labs that run side by side do not meet.
    pub fn random() -> Self {
        Self(format!("lh{:04x}", rand::random::<u16>()))
    }

    /// The id in this text, if it is one.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("lh")?;
        let valid =
            digits.len() == 4 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        valid.then(|| Self(text.to_owned()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the names of this lab's namespaces begin with.
    pub fn prefix(&self) -> String {
        format!("{}-", self.0)
    }
}

impl std::fmt::Display for LabId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A named network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    name: String,
    lab: LabId,
}

impl Namespace {
    /// Makes the namespace `<lab>-<role>` with its loopback up.
    pub fn create(lab: &LabId, role: &str) -> Result<Self> {
        if cleanup::is_closing() {
            bail!("The laboratory is being removed; nothing new is made");
        }
        let namespace = Self { name: format!("{}{role}", lab.prefix()), lab: lab.clone() };
        exec::run("ip", &["netns", "add", &namespace.name])?;
        namespace.ip(&["link set lo up"])?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(NAMESPACE_FOLDER).join(&self.name)
    }

    /// The inode that identifies it; equal to that of `/proc/PID/ns/net` of the processes inside.
    pub fn inode(&self) -> Result<u64> {
        Ok(self.path().metadata().with_context(|| format!("Namespace {} is gone", self.name))?.ino())
    }

    /// Runs `work` on a thread of its own inside the namespace and waits for it. Sockets and children made there stay
    /// inside; `/proc/sys/net` and `/proc/thread-self/net` are the namespace's own, `/sys/class/net` is not.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(self.path()).with_context(|| format!("Namespace {} is gone", self.name))?;
        let entered = std::thread::scope(|scope| {
            let thread = scope.spawn(|| -> nix::Result<T> {
                setns(&file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            thread.join()
        });
        match entered {
            Ok(result) => {
                result.with_context(|| format!("Cannot enter namespace {} (root needed)", self.name))
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Starts a process inside, in a process group of its own (a Ctrl-C on the terminal is for the lab, which then ends
    /// its processes in order) and marked with the lab's id.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        self.refuse_when_closing()?;
        command.process_group(0).env(LAB_VARIABLE, self.lab.as_str());
        let program = command.get_program().to_string_lossy().into_owned();
        self.run(|| command.spawn())?.with_context(|| format!("Cannot start {program} in {}", self.name))
    }

    /// [`Namespace::spawn`] for tokio's processes. To be called inside a runtime.
    pub fn spawn_async(&self, command: &mut tokio::process::Command) -> Result<tokio::process::Child> {
        self.refuse_when_closing()?;
        command.process_group(0).env(LAB_VARIABLE, self.lab.as_str());
        let runtime = tokio::runtime::Handle::current();
        let spawned = self.run(|| {
            let _context = runtime.enter();
            command.spawn()
        })?;
        spawned.with_context(|| format!("Cannot start a process in {}", self.name))
    }

    /// Runs a program inside to its end and returns its standard output.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let path = exec::find_program(program).unwrap_or_else(|| PathBuf::from(program));
        let mut command = Command::new(path);
        command.args(arguments).env("LC_ALL", "C").env(LAB_VARIABLE, self.lab.as_str());
        self.run(|| exec::finish(&mut command, program, arguments))?
    }

    /// Runs `ip` commands inside, one per line, as one batch: the first failure ends it.
    pub fn ip<S: AsRef<str>>(&self, lines: &[S]) -> Result<()> {
        let batch: String = lines.iter().map(|line| format!("{}\n", line.as_ref())).collect();
        exec::run_with_input("ip", &["-n", &self.name, "-batch", "-"], &batch).map(drop)
    }

    /// Applies an nft ruleset inside, as one transaction.
    pub fn nft(&self, ruleset: &str) -> Result<()> {
        let name = self.name.clone();
        self.run(|| exec::run_with_input("nft", &["-f", "-"], ruleset).map(drop))?
            .with_context(|| format!("nft in {name}"))
    }

    /// Sets a kernel parameter inside, given as under `/proc/sys` with dots or slashes (`net.ipv4.ip_forward`).
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = sysctl_path(key);
        self.run(|| std::fs::write(&path, value))?
            .with_context(|| format!("Cannot set {key} = {value} in {}", self.name))
    }

    /// [`Namespace::sysctl`], but a kernel without this parameter is fine.
    pub fn sysctl_if_present(&self, key: &str, value: &str) -> Result<()> {
        let path = sysctl_path(key);
        match self.run(|| std::fs::write(&path, value))? {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| format!("Cannot set {key} = {value} in {}", self.name)),
        }
    }

    /// A UDP socket inside, bound to `address`.
    pub fn udp_socket(&self, address: SocketAddr) -> Result<UdpSocket> {
        self.run(|| UdpSocket::bind(address))?
            .with_context(|| format!("Cannot bind UDP {address} in {}", self.name))
    }

    /// A UDP socket inside for tokio. To be called inside a runtime.
    pub fn udp_socket_async(&self, address: SocketAddr) -> Result<tokio::net::UdpSocket> {
        let socket = self.udp_socket(address)?;
        socket.set_nonblocking(true)?;
        Ok(tokio::net::UdpSocket::from_std(socket)?)
    }

    /// A TCP listener inside.
    pub fn tcp_listener(&self, address: SocketAddr) -> Result<TcpListener> {
        self.run(|| TcpListener::bind(address))?
            .with_context(|| format!("Cannot listen on {address} in {}", self.name))
    }

    /// A TCP listener inside for tokio. To be called inside a runtime.
    pub fn tcp_listener_async(&self, address: SocketAddr) -> Result<tokio::net::TcpListener> {
        let listener = self.tcp_listener(address)?;
        listener.set_nonblocking(true)?;
        Ok(tokio::net::TcpListener::from_std(listener)?)
    }

    /// A TCP connection from inside.
    pub fn tcp_connect(&self, address: SocketAddr, timeout: Duration) -> Result<TcpStream> {
        self.run(|| TcpStream::connect_timeout(&address, timeout))?
            .with_context(|| format!("Cannot connect from {} to {address}", self.name))
    }

    /// An unconnected tokio TCP socket inside, for the family of `peer`: connect it from wherever you are.
    pub fn tcp_socket_async(&self, peer: SocketAddr) -> Result<tokio::net::TcpSocket> {
        let made = self.run(|| match peer {
            SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4(),
            SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6(),
        })?;
        made.with_context(|| format!("Cannot make a TCP socket in {}", self.name))
    }

    fn refuse_when_closing(&self) -> Result<()> {
        if cleanup::is_closing() {
            bail!("The laboratory is being removed; nothing is started in {}", self.name);
        }
        Ok(())
    }
}

/// The names of all namespaces on this machine.
pub fn names() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(NAMESPACE_FOLDER) else {
        return Vec::new();
    };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn sysctl_path(key: &str) -> PathBuf {
    let relative = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    PathBuf::from("/proc/sys").join(relative)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_recognised_and_foreign_names_are_not() {
        let id = LabId::random();
        assert_eq!(LabId::parse(id.as_str()), Some(id));
        for foreign in ["lh", "lh12g4", "lh12345", "xx1234", "lhABCD"] {
            assert_eq!(LabId::parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn sysctl_keys_may_have_dots_in_interface_names_when_slashes_are_used() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward"), PathBuf::from("/proc/sys/net/ipv4/ip_forward"));
        let dotted = "net/ipv4/conf/eth0.5/rp_filter";
        assert_eq!(sysctl_path(dotted), PathBuf::from("/proc/sys/net/ipv4/conf/eth0.5/rp_filter"));
    }
}
