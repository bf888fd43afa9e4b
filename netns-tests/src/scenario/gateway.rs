//! One site's gateway as its operator runs it: a configuration file, a key, the daemon as a process.

use std::fmt::Write as _;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gateway::api::client::Client;
use gateway::config::ArbiterChoice;
use gateway::identity::Identity;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::etcd::Etcd;
use super::options::SceneOptions;
use crate::guest::GuestImage;
use crate::netns::Namespace;
use crate::topology::{BRIDGE, SiteSpec};

/// The gateways' UDP port.
pub const PORT: u16 = 4789;

/// The number of the first care-of address on a site's LAN.
pub const CARE_OF: u8 = 200;

/// What belongs to one site before its daemon runs.
pub struct SiteFiles {
    /// The site.
    pub spec: SiteSpec,
    /// Its folder: key, configuration, state, sockets, disks, log.
    pub folder: PathBuf,
    /// Its key.
    pub identity: Identity,
}

/// A running gateway.
pub struct Gateway {
    /// Its files.
    pub folder: PathBuf,
    namespace: Namespace,
    program: PathBuf,
    child: Option<Child>,
}

impl SiteFiles {
    /// Makes a site's folder and key.
    pub fn make(spec: &SiteSpec, parent: &Path) -> Result<Self> {
        let folder = parent.join(&spec.name);
        // Machines' users go through to their own folders.
        for each in [folder.clone(), folder.join("disks"), folder.join("state"), folder.join("templates")] {
            std::fs::create_dir_all(&each)?;
            let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&each, open)?;
        }
        let identity = Identity::generate()?;
        identity.save(&folder.join("key"))?;
        Ok(Self { spec: spec.clone(), folder, identity })
    }

    /// Writes the site's configuration; `dns_key` where it updates names.
    pub fn configure(
        &self,
        others: &[&SiteFiles],
        image: &GuestImage,
        options: &SceneOptions,
        dns_key: Option<&Path>,
    ) -> Result<()> {
        let folder = self.folder.display();
        let last = CARE_OF + 9;
        let mut care_of = format!("\"{}-{}\"", self.spec.address(CARE_OF), self.spec.address(last));
        if options.dual_stack {
            care_of += &format!(", \"{}-{}\"", self.spec.address6(CARE_OF), self.spec.address6(last));
        }
        let rate = options.rate_mbit.max(1.0) as u64;
        let (templates, told) = match options.cloned {
            true => (format!("templates = \"{folder}/templates\"\n"), "templates = [\"*\"]\n"),
            false => (String::new(), ""),
        };
        let mut text = format!(
            "[site]\nname = \"{name}\"\nkey_file = \"{folder}/key\"\nstate_dir = \"{folder}/state\"\n\
             run_dir = \"{folder}/run\"\n\
             [link]\nlisten = \"{host}:{PORT}\"\nrate_mbit = {rate}\n{link}\n\
             [lan.lan]\nbridge = \"{BRIDGE}\"\ncare_of = [{care_of}]\n\
             [storage]\npool = \"{folder}/disks\"\nkeep_free_gib = 0\n{templates}\
             [hypervisor]\nuid_base = 200000\n\
             [kernel.lab]\nimage = \"{kernel}\"\ninitrd = \"{initrd}\"\n\
             [tunnel]\nquiet_s = {quiet_s}\nclosing_s = {closing_s}\n{tunnel}\n",
            name = self.spec.name,
            host = self.spec.host_address(),
            kernel = image.kernel.display(),
            initrd = image.initrd.display(),
            quiet_s = options.quiet_s,
            closing_s = options.closing_s,
            link = options.link.join("\n"),
            tunnel = options.tunnel.join("\n"),
        );
        if !options.migration.is_empty() {
            writeln!(text, "[migration]\n{}", options.migration.join("\n"))?;
        }
        if let Some(key) = dns_key {
            let server = super::names::Names::address();
            writeln!(
                text,
                "[dns]\nservers = [\"{server}\"]\nzone = \"{}.\"\nkey_file = \"{}\"\nmove_ttl_s = 2",
                super::names::ZONE,
                key.display()
            )?;
        }
        if options.arbiter == ArbiterChoice::Etcd {
            writeln!(text, "[etcd]\nendpoints = [\"{}\"]", Etcd::endpoint())?;
        }
        for other in others {
            writeln!(
                text,
                "[[peer]]\nname = \"{}\"\nkey = \"{}\"\n{}{told}may_send = [\"*\"]\n\
                 may_receive = [\"*\"]\nmax_memory_mib = 16384\nmax_disk_gib = 100",
                other.spec.name,
                other.identity.public_key(),
                self.address_of(other, options)
            )?;
            match options.arbiter {
                ArbiterChoice::None => {}
                ArbiterChoice::Dns => writeln!(text, "arbiter = \"dns\"")?,
                ArbiterChoice::Etcd => writeln!(text, "arbiter = \"etcd\"")?,
            }
        }
        std::fs::write(self.folder.join("site.toml"), text)?;
        Ok(())
    }

    /// The line that says where to dial another site. Behind a NAT it is dialled by those who are behind one themselves,
    /// so that each opens its own NAT for the other; to others it comes.
    fn address_of(&self, other: &SiteFiles, options: &SceneOptions) -> String {
        let hidden = |site: &SiteFiles| options.behind_nat.contains(&site.spec.name);
        let address = match (hidden(other), hidden(self)) {
            (false, _) => other.spec.host_address(),
            (true, true) => other.spec.uplink_address(),
            (true, false) => return String::new(),
        };
        format!("address = \"{}\"\n", SocketAddr::new(address.into(), PORT))
    }
}

impl Gateway {
    /// Starts the daemon and waits until its API answers.
    pub async fn start(namespace: &Namespace, program: &Path, folder: &Path) -> Result<Self> {
        let mut gateway = Self {
            folder: folder.to_owned(),
            namespace: namespace.clone(),
            program: program.to_owned(),
            child: None,
        };
        gateway.launch().await?;
        Ok(gateway)
    }

    /// Starts it again after [`Self::kill`].
    pub async fn launch(&mut self) -> Result<()> {
        let mut log = File::options().create(true).append(true).open(self.log())?;
        // A write past `limit_files` is an error then, and not the daemon's end.
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; exec \"$@\"", "sh"]).arg(&self.program);
        command.arg("serve").arg("--config").arg(self.folder.join("site.toml"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.env(
            "LONGHAUL_LOG",
            std::env::var("LONGHAUL_LOG").unwrap_or_else(|_| "info,gateway=debug".into()),
        );
        let mut child = self.namespace.spawn(&mut command)?;
        // Through a pipe, so that a daemon that cannot write files still says why.
        let mut said = child.stderr.take().context("The gateway has no standard error")?;
        std::thread::spawn(move || std::io::copy(&mut said, &mut log));
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if self.client().status().await.is_ok() {
                break;
            }
            if let Some(status) = child.try_wait()? {
                bail!("The gateway ended at once ({status}):\n{}", self.log_tail());
            }
            if Instant::now() > deadline {
                bail!("The gateway's API does not answer:\n{}", self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.child = Some(child);
        Ok(())
    }

    /// The API's client.
    pub fn client(&self) -> Client {
        Client::new(&self.socket())
    }

    /// The API's socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("run/api.sock")
    }

    /// What must outlive the daemon.
    pub fn journal(&self) -> PathBuf {
        self.folder.join("state/journal.redb")
    }

    /// The daemon's log.
    pub fn log(&self) -> PathBuf {
        self.folder.join("gateway.log")
    }

    /// How long the log is; a mark for [`Self::told`].
    pub fn log_bytes(&self) -> usize {
        std::fs::metadata(self.log()).map_or(0, |file| file.len() as usize)
    }

    /// What the daemon has logged since the mark, until it said this. The log comes through a pipe, so that its newest
    /// lines may be behind what the API has already answered.
    pub async fn told(&self, since_bytes: usize, until: &str) -> Result<String> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let log = std::fs::read(self.log())?;
            let said = String::from_utf8_lossy(&log[since_bytes.min(log.len())..]).into_owned();
            if let Some((before, _)) = said.split_once(until) {
                return Ok(before.to_owned());
            }
            ensure!(Instant::now() < deadline, "The gateway never said {until:?}:\n{said}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Its last lines.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// The second monitor's socket of a machine's QEMU here.
    pub fn observer(&self, vm: &str) -> PathBuf {
        self.folder.join("run/vm").join(vm).join("observer.sock")
    }

    /// The machine's console here.
    pub fn console(&self, vm: &str) -> PathBuf {
        self.folder.join("run/vm").join(vm).join("console.log")
    }

    /// From now on the daemon cannot write to files, as on a disk that is full or broken.
    pub fn limit_files(&self) -> Result<()> {
        let child = self.child.as_ref().context("The gateway does not run")?;
        crate::exec::run("prlimit", &["--fsize=1:1", "--pid", &child.id().to_string()]).map(drop)
    }

    /// Whether the daemon has ended by itself, and with which code.
    pub fn ended(&mut self) -> Result<Option<i32>> {
        let Some(child) = &mut self.child else { return Ok(None) };
        let Some(status) = child.try_wait()? else { return Ok(None) };
        self.child = None;
        Ok(Some(status.code().unwrap_or(-1)))
    }

    /// Kills the daemon without warning; machines live on.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("The gateway does not run")?;
        kill(Pid::from_raw(child.id().cast_signed()), signal).context("The gateway is gone")
    }

    /// Asks the daemon to end, and waits until it has.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).context("The gateway is gone")?;
            child.wait()?;
        }
        Ok(())
    }
}
