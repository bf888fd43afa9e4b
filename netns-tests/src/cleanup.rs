//! The life of one laboratory on this machine, and its removal on every exit path: the normal one, errors and panics
//! ([`Lab`]'s drop), Ctrl-C and SIGTERM ([`remove_on_signals`]), and after a crash or SIGKILL (the next [`Lab::start`]).
//!
//! ```text
//! start -> /run/longhaul-lab/<id>/ (locked while its process lives) -> namespaces, processes, files -> removal
//!                     lock free at the next start = that lab crashed ----------------------------------^
//! ```
//!
//! What belongs to a lab is found by looking at the machine (namespaces by name; processes by namespace and by
//! environment; mounts and links by name), never from a list kept in memory. Other labs are not touched.

mod inspect;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub use inspect::{Snapshot, left_behind};

use crate::exec;
use crate::netns::{self, LAB_VARIABLE, LabId, Namespace};

/// One folder per live lab; tmpfs on Debian, so a reboot leaves nothing.
pub const STATE_FOLDER: &str = "/run/longhaul-lab";

/// How long the kernel may take to release the lock of a process that is gone (a tenth of a second seen on a busy machine).
const RELEASE_TIME: Duration = Duration::from_secs(2);

/// How long processes have after SIGTERM, and then after SIGKILL.
const TERM_TIME: Duration = Duration::from_secs(3);
const KILL_TIME: Duration = Duration::from_secs(5);

static CLOSING: AtomicBool = AtomicBool::new(false);
static LIVE: Mutex<BTreeSet<LabId>> = Mutex::new(BTreeSet::new());
static REMOVAL: Mutex<()> = Mutex::new(());

/// A laboratory; dropping it removes everything that it made.
#[derive(Debug)]
pub struct Lab {
    id: LabId,
    scratch: PathBuf,
    before: Snapshot,
    lock: Option<Flock<File>>,
}

impl Lab {
    /// Removes crashed labs, then starts a new one with its files under the system's temporary folder.
    pub fn start() -> Result<Self> {
        Self::start_in(&std::env::temp_dir())
    }

    /// Like [`Lab::start`], with the lab's files in a folder of its own below `parent`.
    pub fn start_in(parent: &Path) -> Result<Self> {
        create_private(Path::new(STATE_FOLDER))?;
        let _starting = lock_states(FlockArg::LockExclusive)?;
        for id in recover_crashed()? {
            tracing::info!(lab = %id, "Removed what a crashed laboratory had left");
        }
        let id = unused_id();
        let scratch = std::path::absolute(parent)?.join(format!("longhaul-{id}"));
        let before = Snapshot::take()?;
        create_private(&state_folder(&id))?;
        let mut lock = lock_file(&lock_path(&id), FlockArg::LockExclusiveNonblock)?;
        write!(lock, "{}", std::process::id())?;
        std::fs::write(state_folder(&id).join("scratch"), scratch.as_os_str().as_encoded_bytes())?;
        std::fs::create_dir_all(parent)?;
        std::fs::DirBuilder::new().mode(0o755).create(&scratch)?;
        live().insert(id.clone());
        Ok(Self { id, scratch, before, lock: Some(lock) })
    }

    /// The id that everything of this lab carries.
    pub fn id(&self) -> &LabId {
        &self.id
    }

    /// The folder for its files; removed with it.
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Makes the namespace `<id>-<role>`.
    pub fn namespace(&self, role: &str) -> Result<Namespace> {
        Namespace::create(&self.id, role)
    }

    /// Removes everything and says what is left nevertheless; empty is good.
    pub fn close(mut self) -> Vec<String> {
        self.end()
    }

    fn end(&mut self) -> Vec<String> {
        let Some(lock) = self.lock.take() else {
            return Vec::new();
        };
        let _removing = removal();
        let removed = remove(&self.id);
        drop(lock);
        remove_empty_states();
        live().remove(&self.id);
        let mut left = left_behind(&self.id, &self.scratch, &self.before);
        left.extend(removed.err().map(|error| format!("{error:#}")));
        left
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for left in self.end() {
            // The last words of a lab; a broken standard error must not turn them into a panic.
            let _ = writeln!(std::io::stderr(), "Left behind: {left}");
        }
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP remove all labs of this process and end it with 128 plus the signal's number.
/// To be called once, at the start of `main`.
pub fn remove_on_signals() -> Result<()> {
    let (ready, started) = sync_channel(1);
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let waited = wait_for_signal(|| {
            let _ = ready.send(());
        });
        if let Ok(number) = waited {
            remove_all_and_exit(number);
        }
    })?;
    started.recv().context("Cannot wait for signals")
}

/// Whether a signal has begun the removal; then nothing new is made.
pub fn is_closing() -> bool {
    CLOSING.load(Ordering::Relaxed)
}

/// Removes what labs left whose process is gone, and says which.
pub fn recover_crashed() -> Result<Vec<LabId>> {
    let mut recovered = Vec::new();
    let Ok(entries) = std::fs::read_dir(STATE_FOLDER) else {
        return Ok(recovered);
    };
    for entry in entries.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(LabId::parse) else {
            continue;
        };
        if let Some(_lock) = take_over(&id) {
            remove(&id).with_context(|| format!("Cannot remove the crashed laboratory {id}"))?;
            recovered.push(id);
        }
    }
    Ok(recovered)
}

/// The processes of a lab: those inside its namespaces and those that carry its mark. Never this process.
pub fn processes(id: &LabId) -> Vec<Pid> {
    let inodes: BTreeSet<u64> = namespaces(id)
        .iter()
        .filter_map(|name| Path::new(netns::NAMESPACE_FOLDER).join(name).metadata().ok())
        .map(|metadata| metadata.ino())
        .collect();
    let mark = format!("{LAB_VARIABLE}={id}");
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let own = std::process::id() as i32;
    pids.filter(|pid| *pid != own && belongs(*pid, &inodes, mark.as_bytes())).map(Pid::from_raw).collect()
}

/// The names of a lab's namespaces.
pub fn namespaces(id: &LabId) -> Vec<String> {
    let prefix = id.prefix();
    netns::names().into_iter().filter(|name| name.starts_with(&prefix)).collect()
}

fn belongs(pid: i32, inodes: &BTreeSet<u64>, mark: &[u8]) -> bool {
    let inside = std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| inodes.contains(&ns.ino()));
    let marked = || {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark)
    };
    inside || marked()
}

/// Removes a lab. Each step is tried whatever the others did; the first failure is reported.
fn remove(id: &LabId) -> Result<()> {
    end_processes(id);
    let mut steps = Vec::new();
    for name in namespaces(id) {
        steps.push(exec::run("ip", &["netns", "del", &name]).map(drop));
    }
    let scratch = std::fs::read_to_string(state_folder(id).join("scratch")).map(PathBuf::from).ok();
    for target in inspect::mounts(id, scratch.as_deref()).iter().rev() {
        let unmounted = nix::mount::umount2(target, nix::mount::MntFlags::MNT_DETACH);
        steps.push(unmounted.with_context(|| format!("Cannot unmount {}", target.display())));
    }
    for link in inspect::links_of(id) {
        steps.push(exec::run("ip", &["link", "del", &link]).map(drop));
    }
    if let Some(scratch) = scratch.filter(|folder| folder.ends_with(format!("longhaul-{id}"))) {
        steps.push(remove_folder(&scratch));
    }
    steps.push(remove_folder(&state_folder(id)));
    steps.into_iter().collect()
}

/// The last lab takes the common folder along, unless another one is just starting.
fn remove_empty_states() {
    if let Ok(_lock) = lock_states(FlockArg::LockExclusiveNonblock) {
        let _ = std::fs::remove_dir(STATE_FOLDER);
    }
}

/// The lock of a lab whose process is gone; `None` if it lives.
fn take_over(id: &LabId) -> Option<Flock<File>> {
    let path = lock_path(id);
    let owner = || std::fs::read_to_string(&path).unwrap_or_default();
    let lives = |pid: String| pid.is_empty() || Path::new("/proc").join(pid).exists();
    let deadline = Instant::now() + RELEASE_TIME;
    loop {
        if let Ok(lock) = lock_file(&path, FlockArg::LockExclusiveNonblock) {
            return Some(lock);
        }
        if lives(owner()) || Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn end_processes(id: &LabId) {
    for (signal, patience) in [(Signal::SIGTERM, TERM_TIME), (Signal::SIGKILL, KILL_TIME)] {
        let deadline = Instant::now() + patience;
        let mut told = BTreeSet::new();
        loop {
            let pids = processes(id);
            if pids.is_empty() {
                return;
            }
            for pid in pids {
                if told.insert(pid) {
                    // It may have ended by itself meanwhile.
                    let _ = kill(pid, signal);
                }
            }
            if Instant::now() > deadline {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("Cannot remove {}", folder.display())),
    }
}

fn wait_for_signal(ready: impl FnOnce()) -> Result<i32> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        ready();
        Ok(tokio::select! {
            _ = interrupt.recv() => libc::SIGINT,
            _ = terminate.recv() => libc::SIGTERM,
            _ = hang_up.recv() => libc::SIGHUP,
        })
    })
}

/// Keeps the removal lock to the end, so that a `Lab` dropped meanwhile by `main` waits and dies here too.
fn remove_all_and_exit(signal: i32) -> ! {
    CLOSING.store(true, Ordering::Relaxed);
    let mut stderr = std::io::stderr();
    let _ = writeln!(stderr, "\nInterrupted: removing the laboratory");
    let _removing = removal();
    let ids = live().clone();
    for id in ids {
        if let Err(error) = remove(&id) {
            let _ = writeln!(stderr, "Left behind: {error:#}");
        }
    }
    remove_empty_states();
    std::process::exit(128 + signal)
}

fn unused_id() -> LabId {
    loop {
        let id = LabId::random();
        if !state_folder(&id).exists() && namespaces(&id).is_empty() {
            return id;
        }
    }
}

fn state_folder(id: &LabId) -> PathBuf {
    Path::new(STATE_FOLDER).join(id.as_str())
}

fn lock_path(id: &LabId) -> PathBuf {
    state_folder(id).join("lock")
}

fn create_private(folder: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.with_context(|| format!("Cannot create {} (root needed)", folder.display()))
}

fn lock_file(path: &Path, how: FlockArg) -> Result<Flock<File>> {
    lock(File::options().create(true).truncate(false).write(true).open(path), path, how)
}

/// Locks the folder of all labs: whoever starts or recovers one.
fn lock_states(how: FlockArg) -> Result<Flock<File>> {
    let path = Path::new(STATE_FOLDER);
    lock(File::open(path), path, how)
}

fn lock(file: std::io::Result<File>, path: &Path, how: FlockArg) -> Result<Flock<File>> {
    let file = file.with_context(|| format!("Cannot open {}", path.display()))?;
    Flock::lock(file, how)
        .map_err(|(_, error)| error)
        .with_context(|| format!("Cannot lock {}", path.display()))
}

fn live() -> MutexGuard<'static, BTreeSet<LabId>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn removal() -> MutexGuard<'static, ()> {
    REMOVAL.lock().unwrap_or_else(PoisonError::into_inner)
}
