//! The scene's name server: hickory in this process, or Debian's BIND as a process of its own, both on
//! sockets in the name server's namespace.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dnsupdater::test_server::{Grant, TestServer, TestZone};
use dnsupdater::{DnsName, Key, Ownership, Records, Updater, UpdaterConfig};

use super::options::DnsServer;
use crate::netns::Namespace;
use crate::topology::NAME_SERVER;

/// The zone of every scene.
pub const ZONE: &str = "example.net";
/// The TSIG key's name.
pub const KEY_NAME: &str = "longhaul-a";
/// Its secret, known to this laboratory only.
const KEY_SECRET: &str = "bGFib3JhdG9yeS1vbmx5LXNlY3JldC1rZXktMzItYnl0ZXM=";
const PORT: u16 = 53;
/// An address is free again within this.
const FREE: Duration = Duration::from_secs(5);

/// A running name server.
pub struct Names {
    kind: DnsServer,
    server: Running,
    namespace: Namespace,
    key_file: PathBuf,
}

enum Running {
    Hickory(Option<TestServer>),
    Bind9(Child),
}

impl Names {
    /// Starts it with `name` pointing at `address`.
    pub fn start(
        kind: DnsServer,
        namespace: &Namespace,
        folder: &Path,
        name: &str,
        address: IpAddr,
        ttl_s: u32,
    ) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let key_file = folder.join("key");
        let text =
            format!("key \"{KEY_NAME}\" {{\n  algorithm hmac-sha256;\n  secret \"{KEY_SECRET}\";\n}};\n");
        std::fs::write(&key_file, text)?;
        let zone = zone(name, &[address], ttl_s, None)?;
        let server = run(kind, namespace, &key_file, zone)?;
        Ok(Self { kind, server, namespace: namespace.clone(), key_file })
    }

    /// Starts it again after [`Self::stop`], with what it said of `name` then.
    pub fn start_again(&mut self, name: &str, said: &Records) -> Result<()> {
        self.serve(name, zone(name, &said.addresses, said.ttl_s().unwrap_or(300), said.ownership())?)
    }

    /// Starts it anew with `name` pointing at `address`, as if it had never moved.
    pub fn start_anew(&mut self, name: &str, address: IpAddr, ttl_s: u32) -> Result<()> {
        self.stop()?;
        self.serve(name, zone(name, &[address], ttl_s, None)?)
    }

    fn serve(&mut self, name: &str, zone: String) -> Result<()> {
        // BIND's own record of changes belongs to the zone file of before.
        let _ = std::fs::remove_file(self.key_file.with_file_name("zone.jnl"));
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match run(self.kind, &self.namespace, &self.key_file, zone.clone()) {
                Ok(server) => break self.server = server,
                Err(error) if Instant::now() > deadline => return Err(error),
                // The sockets of the one that was stopped are just being closed.
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        self.wait(name)
    }

    /// Where it answers.
    pub fn address() -> SocketAddr {
        SocketAddr::new(NAME_SERVER.into(), PORT)
    }

    /// The key as a file.
    pub fn key_file(&self) -> &Path {
        &self.key_file
    }

    /// What it says of `name`, asked from beside it.
    pub fn read(&self, name: &str) -> Result<Records> {
        self.reader().read(name)
    }

    /// Somebody who can go on asking it.
    pub fn reader(&self) -> NameReader {
        NameReader { namespace: self.namespace.clone(), key_file: self.key_file.clone() }
    }

    /// Waits until it answers; not for one that has ended.
    pub fn wait(&mut self, name: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.read(name) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context("The name server does not answer"));
                }
                Err(_) => {
                    self.still_runs()?;
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// A secondary beside it, at another port, that hears of nothing by itself: it says of `name` what it is given.
    pub fn lagging_secondary(&self, name: &str, address: IpAddr, ttl_s: u32) -> Result<Secondary> {
        let zone = zone(name, &[address], ttl_s, None)?;
        let server = Some(hickory_at(Secondary::address(), &self.namespace, &self.key_file, zone)?);
        Ok(Secondary { server, namespace: self.namespace.clone(), key_file: self.key_file.clone() })
    }

    fn still_runs(&mut self) -> Result<()> {
        let Running::Bind9(child) = &mut self.server else { return Ok(()) };
        let Some(status) = child.try_wait()? else { return Ok(()) };
        let log = std::fs::read_to_string(self.key_file.with_file_name("named.log")).unwrap_or_default();
        bail!("named has ended ({status}):\n{log}")
    }

    /// Stops it: updates and questions meet nobody.
    pub fn stop(&mut self) -> Result<()> {
        match &mut self.server {
            Running::Hickory(server) => drop(server.take()),
            Running::Bind9(child) => {
                child.kill()?;
                child.wait()?;
            }
        }
        Ok(())
    }
}

/// A name server that lags behind the scene's.
pub struct Secondary {
    server: Option<TestServer>,
    namespace: Namespace,
    key_file: PathBuf,
}

impl Secondary {
    /// Where it answers.
    pub fn address() -> SocketAddr {
        SocketAddr::new(NAME_SERVER.into(), PORT + 1)
    }

    /// It has the zone that the primary has now.
    pub fn catch_up(&mut self, name: &str, said: &Records) -> Result<()> {
        drop(self.server.take());
        let zone =
            zone_of(said.serial, name, &said.addresses, said.ttl_s().unwrap_or(300), said.ownership())?;
        self.server = Some(hickory_at(Self::address(), &self.namespace, &self.key_file, zone)?);
        Ok(())
    }
}

/// Asks a name server from beside it.
#[derive(Debug, Clone)]
pub struct NameReader {
    namespace: Namespace,
    key_file: PathBuf,
}

impl NameReader {
    /// What the server says of `name`.
    pub fn read(&self, name: &str) -> Result<Records> {
        let key = Key::from_file(&self.key_file)?;
        let zone: DnsName = ZONE.parse()?;
        let name: DnsName = name.parse()?;
        self.namespace.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let updater = Updater::new(UpdaterConfig::new(vec![Names::address()], zone, key))?;
            runtime.block_on(async { Ok(updater.read(&name).await?) })
        })?
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        // Nothing to do about a name server that cannot be stopped: the namespace goes with it.
        let _ = self.stop();
    }
}

/// The text of a zone that nobody has changed yet.
fn zone(name: &str, addresses: &[IpAddr], ttl_s: u32, ownership: Option<&Ownership>) -> Result<String> {
    zone_of(1, name, addresses, ttl_s, ownership)
}

/// The zone's text: one machine's name, and its ownership record if it has one.
fn zone_of(
    serial: u32,
    name: &str,
    addresses: &[IpAddr],
    ttl_s: u32,
    ownership: Option<&Ownership>,
) -> Result<String> {
    let label = name.strip_suffix(&format!(".{ZONE}")).context("The name is outside the zone")?;
    let mut zone = format!(
        "$TTL 300\n@ IN SOA ns1 admin {serial} 3600 600 86400 5\n@ IN NS ns1\nns1 IN A {NAME_SERVER}\n"
    );
    for address in addresses {
        writeln!(zone, "{label} {ttl_s} IN {} {address}", if address.is_ipv4() { "A" } else { "AAAA" })?;
    }
    if let Some(ownership) = ownership {
        writeln!(zone, "_longhaul.{label} 0 IN TXT \"{ownership}\"")?;
    }
    Ok(zone)
}

fn run(kind: DnsServer, namespace: &Namespace, key_file: &Path, zone: String) -> Result<Running> {
    let folder = key_file.parent().context("The key has no folder")?;
    Ok(match kind {
        DnsServer::Hickory => {
            Running::Hickory(Some(hickory_at(Names::address(), namespace, key_file, zone)?))
        }
        DnsServer::Bind9 => Running::Bind9(bind9(namespace, folder, &zone)?),
    })
}

fn hickory_at(
    address: SocketAddr,
    namespace: &Namespace,
    key_file: &Path,
    zone: String,
) -> Result<TestServer> {
    // The tasks of one that was just stopped may hold the address for a moment more.
    let deadline = Instant::now() + FREE;
    let udp = loop {
        match namespace.udp_socket_async(address) {
            Ok(udp) => break udp,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let tcp = loop {
        match namespace.tcp_listener_async(address) {
            Ok(tcp) => break tcp,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let zone = TestZone { origin: ZONE.parse()?, text: zone };
    Ok(TestServer::start_on(udp, tcp, &[zone], &[Grant::everything(Key::from_file(key_file)?)])?)
}

fn bind9(namespace: &Namespace, folder: &Path, zone: &str) -> Result<Child> {
    let folder = folder.canonicalize()?;
    std::fs::write(folder.join("zone"), zone)?;
    let configuration = format!(
        "include \"{key}\";\noptions {{ directory \"{folder}\"; pid-file none; session-keyfile none; lock-file none;\n  \
         listen-on port {PORT} {{ {NAME_SERVER}; }}; listen-on-v6 {{ none; }}; recursion no;\n  \
         dnssec-validation no; allow-transfer {{ none; }}; notify no; }};\ncontrols {{ }};\n\
         zone \"{ZONE}\" {{ type primary; file \"{folder}/zone\";\n  \
         update-policy {{ grant {KEY_NAME} zonesub A AAAA TXT; }}; }};\n",
        key = folder.join("key").display(),
        folder = folder.display(),
    );
    let path = folder.join("named.conf");
    std::fs::write(&path, configuration)?;
    let log = std::fs::File::create(folder.join("named.log"))?;
    let mut command = Command::new("named");
    command.args(["-c", &path.display().to_string(), "-g", "-n", "1"]).stderr(log).stdout(Stdio::null());
    namespace.spawn(&mut command)
}
