//! Starts machines so that they outlive the gateway, and finds them again.
//!
//! ```text
//!   <run>/vm/NAME/       qmp.sock  observer.sock  pid  console.log  qemu.log    the gateway's; QEMU passes through
//!   <run>/vm/NAME/own/   what QEMU makes while it runs                          the machine's user's
//! ```
//!
//! QEMU runs in a session of its own, not as QEMU's own daemon: its system call filter then forbids it
//! to start programs, which daemonizing would need (`-daemonize` with `spawn=deny` dies of SIGSYS,
//! measured on 7.2). Under systemd it runs in a transient unit, outside the gateway's control group and
//! restrictions. Where a site keeps disks and which taps it has is not decided here.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use longhaul_core::ids::{DeviceName, VmName};
use longhaul_core::machine::{Firmware, HostCapabilities, KernelFiles, MachineDefinition, Sha256Digest};
use longhaul_core::units::Bytes;
use nix::libc::O_NOFOLLOW;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;

use super::accelerator::{self, Accelerator};
use super::adopt::{self, AdoptError};
use super::command_line::{self, CONSOLE_LOG, HostSide, PID_FILE, Placement, QMP_SOCKET, StartMode};
use super::config::{HypervisorConfig, HypervisorError, files};
use super::console;
use super::guest::{Guest, Home, VolumeNode};
use super::probe;
use super::process::QemuProcess;
use super::qmp::QmpClient;
use super::run_dir;

/// What QEMU itself prints.
const QEMU_LOG: &str = "qemu.log";
const LOGS: &[&str] = &[CONSOLE_LOG, QEMU_LOG];

/// The machines of this host.
#[derive(Debug)]
pub struct Hypervisor {
    config: HypervisorConfig,
    accelerator: OnceCell<Accelerator>,
    claiming: Mutex<()>,
}

impl Hypervisor {
    /// Prepares the run directory. Nothing is started yet.
    pub fn new(config: HypervisorConfig) -> Result<Self, HypervisorError> {
        let vms = config.run_dir.join("vm");
        DirBuilder::new().recursive(true).mode(0o711).create(&vms).map_err(files("make the folder", &vms))?;
        // Machines' users go through, but do not look around.
        fs::set_permissions(&vms, Permissions::from_mode(0o711)).map_err(files("open the folder", &vms))?;
        Ok(Self { config, accelerator: OnceCell::new(), claiming: Mutex::new(()) })
    }

    /// The configuration.
    pub fn config(&self) -> &HypervisorConfig {
        &self.config
    }

    /// What guests run with here. The first call tries KVM, if the configuration leaves it open.
    pub async fn accelerator(&self) -> Accelerator {
        let config = &self.config;
        let choose =
            || accelerator::choose(config.accelerator, &config.qemu, &config.run_dir, config.kvm_limit);
        *self.accelerator.get_or_init(choose).await
    }

    /// What this host can run, asked of QEMU (0.3 s) and of the configuration.
    pub async fn capabilities(&self) -> Result<HostCapabilities, HypervisorError> {
        let accelerator = self.accelerator().await;
        let probed = probe::probe(&self.config.qemu, accelerator, &self.config.qmp).await?;
        let mut kernels = BTreeMap::new();
        for (name, paths) in &self.config.kernels {
            let kernel_sha256 = sha256(&paths.kernel).await?;
            let initrd_sha256 = match &paths.initrd {
                Some(initrd) => Some(sha256(initrd).await?),
                None => None,
            };
            kernels.insert(name.clone(), KernelFiles { kernel_sha256, initrd_sha256 });
        }
        let size = |path: &PathBuf| fs::metadata(path).map(|it| Bytes(it.len())).map_err(files("read", path));
        Ok(HostCapabilities {
            qemu: probed.version,
            machines: probed.machines,
            cpus: probed.cpus,
            allow_host_cpu: self.config.allow_host_cpu,
            free_memory: free_memory()?,
            kernels,
            uefi_code: self.config.uefi_code.as_ref().map(size).transpose()?,
            features: probed.features,
        })
    }

    /// The run directory of a machine, whether it exists or not.
    pub fn machine_dir(&self, name: &VmName) -> PathBuf {
        self.config.run_dir.join("vm").join(name.as_str())
    }

    /// Starts a machine, paused, and checks that it is as defined. Its disk files go over to its user.
    pub async fn start(
        &self,
        definition: &MachineDefinition,
        placement: &Placement,
        mode: StartMode,
    ) -> Result<Guest, HypervisorError> {
        let name = &definition.name;
        let dir = self.machine_dir(name);
        if let Some(process) = self.process(name)? {
            return Err(HypervisorError::Runs { name: name.clone(), pid: process.pid });
        }
        let kernel = match &definition.firmware {
            Firmware::Kernel(boot) => self.config.kernels.get(&boot.name),
            Firmware::Bios | Firmware::Uefi(_) => None,
        };
        run_dir::expect_disks(placement)?;
        let accelerator = self.accelerator().await;
        let run_as = self.claim(&dir)?;
        let host = HostSide {
            accelerator,
            dir: &dir,
            kernel,
            uefi_code: self.config.uefi_code.as_deref(),
            run_as,
            sandbox: self.config.sandbox,
        };
        let arguments = command_line::command_line(definition, placement, &host, mode).inspect_err(|_| {
            // Nothing of a machine that is refused stays; the refusal is what counts.
            let _ = fs::remove_dir_all(&dir);
        })?;
        let launched = self.launch(name, &dir, &arguments).await?;
        let started = self.started(name, &dir, run_as, launched).await?;
        let refused = match adopt::verify(&started.qmp, definition).await {
            // Only now: QEMU holds the locks of its disks, so they are no other machine's.
            Ok(volumes) => match run_dir::give_disks(placement, run_as) {
                Ok(()) => return Ok(Guest { volumes, ..started }),
                Err(error) => error,
            },
            Err(source) => HypervisorError::NotAsDefined { name: name.clone(), source },
        };
        let _ = started.quit(self.config.start_limit).await;
        let _ = fs::remove_dir_all(&dir);
        Err(refused)
    }

    /// Makes the machine's folder, which holds a user for it.
    fn claim(&self, dir: &Path) -> Result<Option<(u32, u32)>, HypervisorError> {
        // Two machines that start at once must not find the same user free.
        let _one_at_a_time = self.claiming.lock().unwrap_or_else(PoisonError::into_inner);
        let run_as = run_dir::user_for(self.config.uids, &self.config.run_dir.join("vm"), dir)?;
        run_dir::prepare_dir(dir, run_as)?;
        Ok(run_as)
    }

    /// The machine of this name if its QEMU runs, with a new connection to its monitor. The machine's other
    /// handles must be gone, for a monitor serves one client.
    pub async fn find(&self, name: &VmName) -> Result<Option<Guest>, HypervisorError> {
        let Some(process) = self.process(name)? else { return Ok(None) };
        let dir = self.machine_dir(name);
        let unreachable = |source| HypervisorError::Qmp { name: name.clone(), source };
        let qmp =
            QmpClient::connect(&dir.join(QMP_SOCKET), self.config.qmp.clone()).await.map_err(unreachable)?;
        let volumes = adopt::volumes_by_name(&qmp).await.map_err(unreachable)?;
        let group = fs::metadata(&dir).map_err(files("read", &dir))?.gid();
        let run_as = self.config.uids.map(|_| (group, group));
        Ok(Some(self.guest(name, qmp, dir, process, run_as, volumes)))
    }

    /// The names of all machines that run here and were started here.
    pub fn running(&self) -> Result<Vec<VmName>, HypervisorError> {
        let vms = self.config.run_dir.join("vm");
        let mut names = Vec::new();
        for entry in fs::read_dir(&vms).map_err(files("list", &vms))? {
            let entry = entry.map_err(files("list", &vms))?;
            let Some(name) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if self.process(&name)?.is_some() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Takes a QEMU that somebody else started, by its monitor's socket, if it equals `definition`.
    pub async fn adopt(&self, socket: &Path, definition: &MachineDefinition) -> Result<Guest, AdoptError> {
        adopt::adopt(socket, definition, self.config.qmp.clone()).await
    }

    /// Ends a machine whatever state it is in and removes its run directory. Disk files stay. No machine
    /// of that name is no error.
    pub async fn discard(&self, name: &VmName) -> Result<(), HypervisorError> {
        let dir = self.machine_dir(name);
        if let Some(process) = self.process(name)? {
            process.kill().map_err(files("end the process of", &dir))?;
            if !process.ended(self.config.start_limit).await {
                let source = io::Error::from(io::ErrorKind::TimedOut);
                return Err(HypervisorError::Files { action: "end the process of", path: dir, source });
            }
        }
        self.remove_dir(name)
    }

    /// Removes the run directory of a machine whose QEMU has ended, and with it the machine's hold on a user id.
    /// One that runs keeps it. Logs go too; disk files stay.
    pub fn remove_dir(&self, name: &VmName) -> Result<(), HypervisorError> {
        let dir = self.machine_dir(name);
        if self.process(name)?.is_some() {
            return Ok(());
        }
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(files("remove", &dir)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn process(&self, name: &VmName) -> Result<Option<QemuProcess>, HypervisorError> {
        let path = self.machine_dir(name).join(PID_FILE);
        QemuProcess::find(&path).map_err(files("read", &path))
    }

    fn guest(
        &self,
        name: &VmName,
        qmp: QmpClient,
        dir: PathBuf,
        process: QemuProcess,
        run_as: Option<(u32, u32)>,
        volumes: BTreeMap<DeviceName, VolumeNode>,
    ) -> Guest {
        let trimming = console::keep_trimmed(dir.clone(), LOGS, self.config.console_limit);
        let log_task = tokio::spawn(trimming).abort_handle();
        let home = Some(Arc::new(Home { dir, process, run_as, log_task }));
        Guest { name: name.clone(), qmp, volumes, home }
    }

    /// Starts the process. QEMU's own words go to its log.
    async fn launch(
        &self,
        name: &VmName,
        dir: &Path,
        arguments: &[String],
    ) -> Result<Child, HypervisorError> {
        let log = dir.join(QEMU_LOG);
        let mut options = File::options();
        options.create(true).append(true).mode(0o600).custom_flags(O_NOFOLLOW);
        let file = options.open(&log).map_err(files("write", &log))?;
        let systemd = self.config.systemd && Path::new("/run/systemd/system").exists();
        let mut command = Command::new(if systemd { "systemd-run" } else { "setsid" });
        if systemd {
            // `--collect`: a unit that failed does not stay in the way of the next start.
            command.args(["--quiet", "--collect", "--service-type=exec"]);
            command.arg(format!("--unit=longhaul-vm@{name}.service"));
            command.arg(format!("--property=StandardError=append:{}", log.display()));
            command.arg("--property=OOMScoreAdjust=-500");
        }
        command.arg(&self.config.qemu).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).current_dir("/");
        tracing::debug!(machine = %name, ?arguments, "starting QEMU");
        let refused = |source: io::Error| {
            let reason = format!("{}: {source}", self.config.qemu.display());
            HypervisorError::Start { name: name.clone(), reason }
        };
        command.spawn().map_err(refused)
    }

    /// Waits until QEMU answers, or has ended, or takes too long.
    async fn started(
        &self,
        name: &VmName,
        dir: &Path,
        run_as: Option<(u32, u32)>,
        mut launched: Child,
    ) -> Result<Guest, HypervisorError> {
        let socket = dir.join(QMP_SOCKET);
        let answers = async {
            let mut ended = None;
            loop {
                if let Ok(qmp) = QmpClient::connect(&socket, self.config.qmp.clone()).await
                    && let Ok(Some(process)) = QemuProcess::find(&dir.join(PID_FILE))
                {
                    return Some(self.guest(name, qmp, dir.to_owned(), process, run_as, BTreeMap::new()));
                }
                // systemd-run ends by itself when the unit has begun.
                let failed = ended.is_some_and(|status: ExitStatus| !status.success());
                if failed {
                    return None;
                }
                tokio::select! {
                    status = launched.wait(), if ended.is_none() => ended = status.ok(),
                    () = tokio::time::sleep(Duration::from_millis(10)) => {}
                }
            }
        };
        let reason = match tokio::time::timeout(self.config.start_limit, answers).await {
            Ok(Some(guest)) => return Ok(guest),
            Ok(None) => String::new(),
            Err(_) => format!("no answer in {} s", self.config.start_limit.as_secs_f32()),
        };
        // It cannot be used; what it printed says why.
        if let Some(process) = self.process(name)? {
            let _ = process.kill();
        }
        let said = run_dir::last_words(&dir.join(QEMU_LOG));
        let _ = fs::remove_dir_all(dir);
        let separator = if reason.is_empty() || said.is_empty() { "" } else { ": " };
        Err(HypervisorError::Start { name: name.clone(), reason: format!("{reason}{separator}{said}") })
    }
}

async fn sha256(path: &Path) -> Result<Sha256Digest, HypervisorError> {
    let mut file = tokio::fs::File::open(path).await.map_err(files("read", path))?;
    let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece).await.map_err(files("read", path))? {
            0 => break,
            length => digest.update(&piece[..length]),
        }
    }
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.finish().as_ref());
    Ok(Sha256Digest(bytes))
}

/// What the kernel says can be allocated without swapping. proc(5), `/proc/meminfo`, `MemAvailable`.
fn free_memory() -> Result<Bytes, HypervisorError> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).map_err(files("read", path))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(Bytes(kib.unwrap_or(0) << 10))
}
