//! Debian's name servers as child processes on a high port of the loopback, each in a directory of its own.
//!
//! What a server's configuration looks like is in `named`, `knotd`, `pdns` and `yadifad`.

use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dnsupdater::{Scope, ServerState, Updater};
use tempfile::TempDir;

use super::{app, config, ips, loopback, site_a};

const START_LIMIT: Duration = Duration::from_secs(20);

/// A name server program and how it is told what to do.
pub struct Program {
    /// What is started.
    pub name: &'static str,
    /// Debian's package.
    pub package: &'static str,
    /// Other programs and files that it takes to prepare it, with their packages.
    pub besides: &'static [(&'static str, &'static str)],
    /// Writes zones and configuration.
    pub prepare: fn(&Path, SocketAddr, Role),
    /// Its arguments.
    pub arguments: fn(&Path) -> Vec<String>,
}

/// What a server is for the test zones.
#[derive(Clone, Copy)]
pub enum Role {
    /// It takes updates, and tells the server at this address of each (port 0: nobody).
    Primary { notify: SocketAddr },
    /// It copies from this primary.
    Secondary { of: SocketAddr },
}

/// A running name server; killed when dropped.
pub struct Daemon {
    pub address: SocketAddr,
    program: &'static Program,
    directory: TempDir,
    child: Child,
}

/// Where a server that writes each update through does not wait for a disk that is busy with something else: what is asked of
/// it has a limit of 300 ms. A server that is killed loses nothing there.
fn in_memory() -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    if shared.is_dir() { shared } else { std::env::temp_dir() }
}

impl Daemon {
    /// None, with the reason printed, where it is not installed. Port 0 takes a free one.
    pub async fn start(program: &'static Program, bind: SocketAddr, role: Role) -> Option<Daemon> {
        let own = [(program.name, program.package)];
        if let Some((name, package)) = own.iter().chain(program.besides).find(|(name, _)| !installed(name)) {
            println!("skipped: {name} is not installed (Debian package {package})");
            return None;
        }
        for _ in 0..8 {
            let directory =
                tempfile::Builder::new().prefix("lhdns-").tempdir_in(in_memory()).expect("a directory");
            let address = if bind.port() == 0 { free_port(bind) } else { bind };
            (program.prepare)(directory.path(), address, role);
            let child = spawn(program, directory.path());
            let mut daemon = Daemon { address, program, directory, child };
            if daemon.ready().await {
                return Some(daemon);
            }
            println!("{} ended at once, another port is tried: {}", program.name, daemon.log());
        }
        panic!("{} does not start", program.name);
    }

    /// SIGKILL, then the same server again on the same files.
    pub async fn kill_and_restart(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it was started here");
        self.child = spawn(self.program, self.directory.path());
        assert!(self.ready().await, "{} does not come back: {}", self.program.name, self.log());
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// False if it ended, for instance because somebody else took the port.
    async fn ready(&mut self) -> bool {
        let mut config = config(vec![self.address], site_a());
        (config.retries, config.timeout) = (0, Duration::from_secs(2));
        let probe = Updater::new(config).expect("a valid configuration");
        let started = Instant::now();
        while started.elapsed() < START_LIMIT {
            if self.child.try_wait().expect("it was started here").is_some() {
                return false;
            }
            let view = probe.verify(&app(), &ips(&[]), Scope::Listed).await.expect("valid arguments");
            if !matches!(view.servers[0].state, ServerState::Silent { .. }) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{} is not ready after {START_LIMIT:?}: {}", self.program.name, self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("What {} logged:\n{}", self.program.name, self.log());
        }
    }
}

fn spawn(program: &Program, directory: &Path) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(directory.join("log")).expect("writable");
    Command::new(program.name)
        .args((program.arguments)(directory))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("open"))
        .stderr(log)
        .spawn()
        .expect("it is installed")
}

fn installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian's servers are in a folder that is not in every user's path.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    folders.map(|folder| folder.join(name)).any(|file| file.is_file())
}

/// A port that is free for TCP and UDP now; a server fails to start if it is not any more, and another is tried.
pub fn free_port(bind: SocketAddr) -> SocketAddr {
    loop {
        let tcp = TcpListener::bind(SocketAddr::new(bind.ip(), 0)).expect("the loopback has ports");
        let address = tcp.local_addr().expect("bound");
        if UdpSocket::bind(address).is_ok() {
            return address;
        }
    }
}

/// The nobody of [`Role::Primary`].
pub fn nobody() -> SocketAddr {
    loopback(0)
}
