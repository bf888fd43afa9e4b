//! The tunnels that are compared: how each is installed and started between the two hosts.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::end;
use super::install::{self, Pin};
use super::place::{A, B, HOME_HOST, Place, ip};
use super::report::Outcome;
use crate::exec;
use crate::netns::Namespace;

/// How long a tunnel has to come up.
const START_TIME: Duration = Duration::from_secs(20);
/// Where WireGuard's user-space programs listen for their configuration (`wg(8)`).
const WIREGUARD_SOCKETS: &str = "/var/run/wireguard";

const BORINGTUN: Pin = Pin { name: "boringtun-cli", program: "boringtun-cli", version: "0.7.1" };
const GOTATUN: Pin = Pin { name: "gotatun-cli", program: "gotatun", version: "0.10.2" };
const QUINCY_SERVER: Pin = Pin { name: "quincy-server", program: "quincy-server", version: "3.1.1" };
const QUINCY_CLIENT: Pin = Pin { name: "quincy-client", program: "quincy-client", version: "3.1.1" };

/// One of the tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Plain,
    WireguardGo,
    Boringtun,
    Gotatun,
    Quincy,
    Longhaul,
}

impl Kind {
    /// In the order of the table.
    pub const ALL: [Self; 6] =
        [Self::Plain, Self::WireguardGo, Self::Boringtun, Self::Gotatun, Self::Quincy, Self::Longhaul];

    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::WireguardGo => "wireguard-go",
            Self::Boringtun => "boringtun",
            Self::Gotatun => "gotatun",
            Self::Quincy => "quincy",
            Self::Longhaul => "longhaul",
        }
    }
}

/// A tunnel that can be started.
#[derive(Debug, Clone)]
pub(super) struct Installed {
    pub kind: Kind,
    pub version: String,
    programs: Vec<PathBuf>,
}

/// A tunnel that stands; dropping it ends it.
#[derive(Debug)]
pub(super) struct Running {
    pub kind: Kind,
    pub version: String,
    /// What is reached through it.
    pub to: IpAddr,
    /// The first host's address inside of it.
    pub from: IpAddr,
    processes: Vec<Child>,
    sockets: Vec<PathBuf>,
}

/// Installs the tunnels that are wanted; what cannot be is put down as skipped on both paths.
pub(super) fn install(kinds: &[Kind], outcome: &mut Outcome) -> Result<Vec<Installed>> {
    install::tools()?;
    let mut ready = Vec::new();
    for kind in kinds {
        match install_one(*kind) {
            Ok(installed) => ready.push(installed),
            Err(error) => outcome.skip_everywhere(*kind, &format!("{error:#}")),
        }
    }
    Ok(ready)
}

fn install_one(kind: Kind) -> Result<Installed> {
    let pinned = |pins: &[Pin]| -> Result<(Vec<PathBuf>, String)> {
        let programs = pins.iter().map(|pin| install::program(*pin)).collect::<Result<_>>()?;
        Ok((programs, pins[0].version.to_owned()))
    };
    let (programs, version) = match kind {
        Kind::Plain => (Vec::new(), exec::run("uname", &["-r"])?.trim().to_owned()),
        Kind::WireguardGo => {
            install::wireguard_tools()?;
            let (program, version) = install::wireguard_go()?;
            (vec![program], version)
        }
        Kind::Boringtun | Kind::Gotatun => {
            install::wireguard_tools()?;
            pinned(&[if kind == Kind::Boringtun { BORINGTUN } else { GOTATUN }])?
        }
        Kind::Quincy => {
            install::wireguard_tools()?; // its Noise keys are X25519 keys like WireGuard's
            pinned(&[QUINCY_SERVER, QUINCY_CLIENT])?
        }
        Kind::Longhaul => (vec![std::env::current_exe()?], env!("CARGO_PKG_VERSION").to_owned()),
    };
    Ok(Installed { kind, version, programs })
}

/// Starts a tunnel and waits until it carries a ping. `index` keeps the addresses of several apart.
pub(super) fn start(place: &Place, installed: &Installed, index: u8) -> Result<Running> {
    let inner = |last| ip(Ipv4Addr::new(10, 98, index, last));
    let mut running = Running {
        kind: installed.kind,
        version: installed.version.clone(),
        to: inner(2),
        from: inner(1),
        processes: Vec::new(),
        sockets: Vec::new(),
    };
    match installed.kind {
        Kind::Plain => (running.from, running.to) = (ip(A), ip(B)),
        Kind::WireguardGo => wireguard(place, &mut running, &installed.programs[0], &["--foreground"])?,
        Kind::Boringtun | Kind::Gotatun => {
            let arguments = ["--foreground", "--disable-drop-privileges"];
            wireguard(place, &mut running, &installed.programs[0], &arguments)?;
        }
        Kind::Quincy => quincy(place, &mut running, &installed.programs, index)?,
        Kind::Longhaul => {
            (running.from, running.to) = (ip(HOME_HOST), ip(super::place::GUEST));
            end::start(place, &installed.programs[0], &mut running.processes)?;
        }
    }
    wait_for_ping(place, &mut running)?;
    Ok(running)
}

impl Running {
    /// Processor time of its processes so far.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.processes.iter().map(|process| cpu_time_of(process.id())).sum()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // It may have ended by itself.
            let _ = process.kill();
            let _ = process.wait();
        }
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// User and system time of a process with all its threads (`proc_pid_stat(5)`, fields 14 and 15).
fn cpu_time_of(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("A tunnel has ended")?;
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

fn wait_for_ping(place: &Place, running: &mut Running) -> Result<()> {
    let deadline = Instant::now() + START_TIME;
    let (to, from) = (running.to.to_string(), running.from.to_string());
    while place.a.output("ping", &["-n", "-c", "1", "-W", "1", "-I", &from, &to]).is_err() {
        for process in &mut running.processes {
            if let Some(status) = process.try_wait()? {
                bail!("it ended at once ({status}); see {}", place.scratch().display());
            }
        }
        if Instant::now() > deadline {
            bail!("no ping came through in {START_TIME:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Starts a program in a namespace with its output in a file.
pub(super) fn spawn(place: &Place, namespace: &Namespace, command: &mut Command, log: &str) -> Result<Child> {
    let log = std::fs::File::create(place.scratch().join(log))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    namespace.spawn(command)
}

fn wireguard(place: &Place, running: &mut Running, program: &Path, arguments: &[&str]) -> Result<()> {
    let name = running.kind.name();
    let keys = [Key::make(place, &format!("{name}-a"))?, Key::make(place, &format!("{name}-b"))?];
    let port = 51_820 + running.kind as u16;
    let ends = [(&place.a, A, running.from), (&place.b, B, running.to)];
    for (index, (namespace, _, inside)) in ends.iter().enumerate() {
        let device = place.device(&format!("{}{index}", &name[..2]));
        let mut command = Command::new(program);
        command.args(arguments).arg(&device);
        running.processes.push(spawn(place, namespace, &mut command, &format!("{device}.log"))?);
        let socket = Path::new(WIREGUARD_SOCKETS).join(format!("{device}.sock"));
        running.sockets.push(socket.clone());
        wait_until(&format!("{} does not appear", socket.display()), || Ok(socket.exists()))?;
        let (own, other) = (&keys[index], &keys[1 - index]);
        let endpoint = format!("{}:{port}", ends[1 - index].1);
        let (port, key) = (port.to_string(), own.file.to_string_lossy());
        namespace.output(
            "wg",
            &[
                "set",
                &device,
                "listen-port",
                &port,
                "private-key",
                &key,
                "peer",
                &other.public,
                "endpoint",
                &endpoint,
                "allowed-ips",
                "0.0.0.0/0",
            ],
        )?;
        namespace
            .ip(&[format!("addr add {inside}/24 dev {device}"), format!("link set {device} mtu 1420 up")])?;
    }
    Ok(())
}

fn quincy(place: &Place, running: &mut Running, programs: &[PathBuf], index: u8) -> Result<()> {
    let [server, client] = [Key::make(place, "quincy-server")?, Key::make(place, "quincy-client")?];
    let write = |name: &str, text: String| -> Result<PathBuf> {
        let path = place.scratch().join(name);
        std::fs::write(&path, text)?;
        Ok(path)
    };
    let users =
        write("quincy-users.toml", format!("[users.bench]\nauthorized_keys = [\"{}\"]\n", client.public))?;
    // Its network's first address is the server's: here that is the far end.
    (running.from, running.to) = (running.to, running.from);
    let server_config = write(
        "quincy-server.toml",
        format!(
            "name = \"bench\"\ninterface_name = \"{device}\"\nbind_address = \"{B}\"\nbind_port = 55555\n\
             tunnel_network = \"10.98.{index}.1/24\"\nusers_file = \"{users}\"\n\
             [protocol]\nmode = \"noise\"\nkey_exchange = \"standard\"\nprivate_key = \"{key}\"\n\
             [log]\nlevel = \"warn\"\n",
            device = place.device("qs"),
            users = users.display(),
            key = server.private,
        ),
    )?;
    let client_config = write(
        "quincy-client.toml",
        format!(
            "connection_string = \"{B}:55555\"\n\
             [protocol]\nmode = \"noise\"\nkey_exchange = \"standard\"\nserver_public_key = \"{}\"\n\
             private_key = \"{}\"\n\
             [network]\nroutes = []\ndns_servers = []\ninterface_name = \"{}\"\n\
             [log]\nlevel = \"warn\"\n",
            server.public,
            client.private,
            place.device("qc"),
        ),
    )?;
    let mut begin = |namespace: &Namespace, program: &Path, config: &Path| -> Result<()> {
        let mut command = Command::new(program);
        command.arg("--config-path").arg(config);
        let log = format!("{}.log", program.file_name().unwrap_or_default().to_string_lossy());
        running.processes.push(spawn(place, namespace, &mut command, &log)?);
        Ok(())
    };
    begin(&place.b, &programs[0], &server_config)?;
    // The client tries once.
    let bound = || Ok(!place.b.output("ss", &["-Hun", "-a", "sport", "=", ":55555"])?.is_empty());
    wait_until("quincy's server does not listen", bound)?;
    begin(&place.a, &programs[1], &client_config)
}

/// An X25519 key pair, in base64 as WireGuard has it.
struct Key {
    file: PathBuf,
    private: String,
    public: String,
}

impl Key {
    fn make(place: &Place, name: &str) -> Result<Self> {
        let private = exec::run("wg", &["genkey"])?.trim().to_owned();
        let public = exec::run_with_input("wg", &["pubkey"], &private)?.trim().to_owned();
        let file = place.scratch().join(format!("{name}.key"));
        std::fs::write(&file, &private)?;
        Ok(Self { file, private, public })
    }
}

fn wait_until(otherwise: &str, ready: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + START_TIME;
    while !ready()? {
        if Instant::now() > deadline {
            bail!("{otherwise}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
