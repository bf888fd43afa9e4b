//! Processor time of those who move a machine: the gateways, and QEMU without the threads that are the guest's processors.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;

use crate::netns::Namespace;

/// Between two looks: what a process does after the last one, before it ends, is not counted.
const LOOK: Duration = Duration::from_millis(100);

/// `USER_HZ`, the unit of the kernel's figures for programs (proc_pid_stat(5)).
const TICKS_PER_S: f64 = 100.0;

/// Looks on until it is asked.
pub struct CpuWatch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<f64>,
}

impl CpuWatch {
    /// Begins to count for the processes in these hosts' namespaces.
    pub fn begin(hosts: &[&Namespace]) -> Result<Self> {
        let inodes = hosts.iter().map(|host| host.inode()).collect::<Result<Vec<_>>>()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut seen = BTreeMap::new();
            look(&inodes, &mut seen);
            let before = seen.clone();
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
                look(&inodes, &mut seen);
            }
            let since = |(pid, ticks): (&u32, &Ticks)| ticks.own() - before.get(pid).map_or(0, Ticks::own);
            seen.iter().map(since).sum::<i64>() as f64 / TICKS_PER_S
        });
        Ok(Self { stop, thread })
    }

    /// Seconds since the beginning.
    pub fn end(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or(f64::NAN)
    }
}

/// A process's time, and the part of it that the guest's processors took. While a process ends its threads are gone one by
/// one, but their time is still in its own: what they had taken before counts on.
#[derive(Clone, Copy, Default)]
struct Ticks {
    all: u64,
    guest: u64,
}

impl Ticks {
    fn own(&self) -> i64 {
        self.all as i64 - self.guest as i64
    }
}

fn look(inodes: &[u64], seen: &mut BTreeMap<u32, Ticks>) {
    let Ok(entries) = std::fs::read_dir("/proc") else { return };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process that ends meanwhile has been counted at the look before.
        let _: Option<()> = (|| {
            let folder = entry.path();
            let name = std::fs::read_to_string(folder.join("comm")).ok()?;
            let counts = name.starts_with("longhaul") || name.starts_with("qemu-system");
            let inside = inodes.contains(&std::fs::metadata(folder.join("ns/net")).ok()?.ino());
            if counts && inside {
                let (all, guest) = (ticks(&folder)?, guest_ticks(&folder));
                let known: &mut Ticks = seen.entry(pid).or_default();
                (known.all, known.guest) = (known.all.max(all), known.guest.max(guest));
            }
            Some(())
        })();
    }
}

/// Ticks of the threads that are the guest's processors; QEMU names them `CPU N/TCG` or `CPU N/KVM` (`debug-threads=on`).
fn guest_ticks(process: &Path) -> u64 {
    let Ok(threads) = std::fs::read_dir(process.join("task")) else { return 0 };
    let of_guest = |thread: &Path| {
        std::fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.starts_with("CPU "))
    };
    let threads = threads.flatten().map(|thread| thread.path());
    threads.filter(|thread| of_guest(thread)).filter_map(|thread| ticks(&thread)).sum()
}

/// User and system time, fields 14 and 15 of `stat`; those before them may be counted from the name's closing bracket.
fn ticks(folder: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(folder.join("stat")).ok()?;
    let mut fields = text[text.rfind(')')? + 2..].split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}
