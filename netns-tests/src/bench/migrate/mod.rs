//! `cargo lab bench migrate`: the same guest and the same work, moved by QEMU as operators use it today and by this gateway,
//! over the same emulated WANs.
//!
//! ```text
//! a list of runs ── those that the link holds up: several at once ──┐
//!               └─ the others: one at a time, nothing beside them ──┴─> medians ─> table, migrate.json, migrate.html
//! ```
//!
//! Each run is a process of its own with its own namespaces, WAN, guest and client (`bench-migrate-run`, hidden); it is given
//! up when its time is over. Everything is counted from outside: bytes at the emulator, the pause by QEMU's events, silence
//! by the client. The peers' LANs are joined by VXLAN, because their clients' connections would end otherwise; the gateway's
//! are not. libvirt is not raced: it drives QEMU as `qemu-tcp` does and adds its own round trips.

mod cell;
mod client;
mod cpu;
mod ours;
mod page;
mod plain;
mod report;
mod stretch;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use cell::{Control, Profile, Racer, Run, Workload};
use report::{Measured, Outcome};

use crate::guest::image::{GuestImage, ImageSpec, lab_folder};
use crate::scenario::programs::Programs;

/// How many slow runs of peers go on at once. Each is two QEMUs that mostly wait for the link; the gateway always runs alone.
const AT_ONCE: usize = 4;
/// What a run may take beside the move: boot, the client's end, taking everything down.
const AROUND: Duration = Duration::from_secs(240);

/// What is raced.
#[derive(Debug, Clone, clap::Args)]
pub struct RaceArguments {
    /// Only this WAN; may be given more than once
    #[arg(long, value_enum)]
    profile: Vec<Profile>,
    /// Only this work of the guest [default: web]; may be given more than once
    #[arg(long, value_enum)]
    workload: Vec<Workload>,
    /// Only this racer; may be given more than once
    #[arg(long, value_enum)]
    only: Vec<Racer>,
    /// How often each run is repeated [default: 1 on bradford and lossy, 3 elsewhere]
    #[arg(long)]
    rounds: Option<u32>,
    /// When a move is given up
    #[arg(long, default_value_t = 15)]
    minutes: u64,
    /// Every workload, every congestion control, three rounds: many hours
    #[arg(long)]
    full: bool,
}

/// One run, in its own process.
#[derive(Debug, Clone, clap::Args)]
pub struct RunArguments {
    #[arg(long, value_enum)]
    profile: Profile,
    #[arg(long, value_enum)]
    workload: Workload,
    #[arg(long, value_enum)]
    racer: Racer,
    #[arg(long, value_enum)]
    control: Option<Control>,
    #[arg(long)]
    limit_s: u64,
    #[arg(long)]
    result: PathBuf,
}

/// Races, prints the tables, writes `migrate.json` and `migrate.html`, or both as `migrate-part` if only a part was wanted.
pub fn run(arguments: &RaceArguments) -> Result<()> {
    // Built once, before processes ask for them at the same time.
    let programs = Programs::build()?;
    GuestImage::ensure(&ImageSpec::new(&programs.guest_agent))?;
    let outcome = Mutex::new(Outcome::default());
    let left_out = |what: &str, reason: &str| lock(&outcome).leave_out(what, reason);
    if arguments.only.is_empty() {
        left_out(
            "virsh",
            "libvirt is not driven: its moves are QEMU's, as in qemu-tcp, with its own round trips added",
        );
    }
    let bbr = has_bbr();
    if !bbr {
        left_out("bbr", "this kernel has no BBR");
    }
    let (slow, quick): (Vec<Run>, Vec<Run>) = arguments.runs(bbr).into_iter().partition(Run::is_slow);
    race_at_once(slow, arguments, &outcome);
    for run in quick {
        race_one(&run, arguments, &outcome);
    }
    let outcome = lock(&outcome);
    println!("{}", outcome.table());
    let json = outcome.json();
    let partial =
        !(arguments.profile.is_empty() && arguments.workload.is_empty() && arguments.only.is_empty());
    super::keep(&super::results("migrate", partial, "json")?, serde_json::to_vec_pretty(&json)?)?;
    super::keep(&super::results("migrate", partial, "html")?, page::render(&json))
}

/// Plays one run and writes what it showed.
pub async fn run_main(arguments: &RunArguments) -> Result<()> {
    let RunArguments { profile, workload, racer, control, limit_s, result } = arguments.clone();
    let run = Run { profile, workload, racer, control };
    let (limit, name) = (Duration::from_secs(limit_s), format!("bench/{}", file_name(&run)));
    let programs = Programs::find()?;
    let measured = match racer {
        Racer::Longhaul => ours::race(&run, limit, name, &programs).await?,
        Racer::QemuTcp | Racer::QemuMultifd | Racer::QemuXbzrle => {
            vec![plain::race(&run, limit, &name, &programs).await?]
        }
    };
    std::fs::write(&result, serde_json::to_vec(&measured)?)
        .with_context(|| format!("Cannot write {}", result.display()))
}

impl RaceArguments {
    fn runs(&self, bbr: bool) -> Vec<Run> {
        let chosen =
            |asked: &[Profile]| if asked.is_empty() { Profile::ALL.to_vec() } else { asked.to_vec() };
        let workloads = match (&self.workload[..], self.full) {
            ([], true) => Workload::ALL.to_vec(),
            ([], false) => vec![Workload::Web],
            (asked, _) => asked.to_vec(),
        };
        let mut runs = Vec::new();
        for profile in chosen(&self.profile) {
            for workload in &workloads {
                for racer in Racer::ALL.into_iter().filter(|racer| self.wants(*racer)) {
                    for control in self.controls(profile, racer, bbr) {
                        let run = Run { profile, workload: *workload, racer, control };
                        runs.extend(std::iter::repeat_n(run, self.rounds_of(&run) as usize));
                    }
                }
            }
        }
        runs
    }

    fn wants(&self, racer: Racer) -> bool {
        self.only.is_empty() || self.only.contains(&racer)
    }

    /// Where nothing is lost the two are alike, and the second is left to `--full`.
    fn controls(&self, profile: Profile, racer: Racer, bbr: bool) -> Vec<Option<Control>> {
        let (_, _, loss) = profile.path();
        match racer {
            Racer::Longhaul => vec![None],
            Racer::QemuTcp | Racer::QemuMultifd | Racer::QemuXbzrle => match bbr && (loss > 0.0 || self.full)
            {
                true => vec![Some(Control::Bbr), Some(Control::Cubic)],
                false => vec![Some(Control::Cubic)],
            },
        }
    }

    /// A sender that takes loss for congestion needs up to a quarter of an hour: once is enough, unless all is asked for.
    fn rounds_of(&self, run: &Run) -> u32 {
        let usual = if run.is_slow() { 1 } else { run.profile.rounds() };
        self.rounds.unwrap_or(if self.full { 3 } else { usual })
    }
}

fn race_at_once(runs: Vec<Run>, arguments: &RaceArguments, outcome: &Mutex<Outcome>) {
    let waiting = Mutex::new(VecDeque::from(runs));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop_front();
                    let Some(run) = next else { return };
                    race_one(&run, arguments, outcome);
                }
            });
        }
    });
}

fn race_one(run: &Run, arguments: &RaceArguments, outcome: &Mutex<Outcome>) {
    println!("{} {} {}: begins", run.profile.name(), run.workload.name(), run.racer_name());
    match in_own_process(run, arguments.minutes) {
        Ok(measured) => {
            for (way, one) in ["", " back"].iter().zip(&measured) {
                println!(
                    "{} {} {}{way}: {:.1} MiB, {}",
                    run.profile.name(),
                    run.workload.name(),
                    run.racer_name(),
                    one.wan_bytes as f64 / f64::from(1 << 20),
                    one.total_ms.map_or("did not finish".to_owned(), |ms| format!("{:.1} s", ms / 1e3))
                );
            }
            lock(outcome).add(run, measured);
        }
        Err(error) => {
            let what = format!("{} {} {}", run.profile.name(), run.workload.name(), run.racer_name());
            lock(outcome).leave_out(&what, &format!("{error:#}"));
        }
    }
}

fn in_own_process(run: &Run, minutes: u64) -> Result<Vec<Measured>> {
    let parent = lab_folder().join("bench");
    std::fs::create_dir_all(&parent)?;
    let folder = tempfile::Builder::new().prefix(&format!("{}-", file_name(run))).tempdir_in(&parent)?;
    let (result, log) = (folder.path().join("result.json"), folder.path().join("log"));
    let limit = Duration::from_secs(minutes * 60);
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("bench-migrate-run").args(["--profile", run.profile.name()]);
    command.args(["--workload", run.workload.name()]).arg("--racer").arg(run.racer.argument());
    if let Some(control) = run.control {
        command.args(["--control", control.name()]);
    }
    command.args(["--limit-s", &limit.as_secs().to_string()]).arg("--result").arg(&result);
    let said = std::fs::File::create(&log)?;
    command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
    let mut child = command.spawn().context("Cannot start a run")?;
    // The run gives up by itself; this is for one that hangs. The gateway's has two moves.
    let longest = limit * 2 + AROUND * 2;
    let begun = std::time::Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > longest {
            terminate(&mut child)?;
            bail!("It hung: see {}", folder.keep().join("log").display());
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    if !status.success() {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let said = text.lines().find(|line| line.starts_with("lab: ")).unwrap_or("It said nothing of why");
        bail!("{said} (see {})", folder.keep().join("log").display());
    }
    read(&result)
}

/// Lets it remove what it made.
fn terminate(child: &mut std::process::Child) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    child.wait()?;
    Ok(())
}

fn read(path: &Path) -> Result<Vec<Measured>> {
    let bytes = std::fs::read(path).with_context(|| format!("Cannot read {}", path.display()))?;
    Ok(serde_json::from_slice(&bytes)?)
}

fn file_name(run: &Run) -> String {
    format!("migrate-{}-{}-{}", run.profile.name(), run.workload.name(), run.racer_name())
}

fn has_bbr() -> bool {
    let known = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control");
    known.is_ok_and(|names| names.split_whitespace().any(|name| name == "bbr"))
}

fn lock(outcome: &Mutex<Outcome>) -> std::sync::MutexGuard<'_, Outcome> {
    outcome.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(full: bool) -> RaceArguments {
        RaceArguments {
            profile: Vec::new(),
            workload: Vec::new(),
            only: Vec::new(),
            rounds: None,
            minutes: 15,
            full,
        }
    }

    #[test]
    fn the_usual_race_is_the_web_server_everywhere_and_repeats_what_is_quick() {
        let runs = arguments(false).runs(true);
        assert!(runs.iter().all(|run| run.workload == Workload::Web));
        let count = |profile, racer, control| {
            let run = Run { profile, workload: Workload::Web, racer, control };
            runs.iter().filter(|one| **one == run).count()
        };
        assert_eq!(count(Profile::Metro, Racer::Longhaul, None), 3);
        assert_eq!(count(Profile::Bradford, Racer::QemuTcp, Some(Control::Cubic)), 1);
        assert_eq!(count(Profile::Bradford, Racer::QemuTcp, Some(Control::Bbr)), 0);
        assert_eq!(count(Profile::Transatlantic, Racer::QemuMultifd, Some(Control::Bbr)), 3);
        assert_eq!(count(Profile::Transatlantic, Racer::QemuMultifd, Some(Control::Cubic)), 1);
        assert!(arguments(true).runs(true).len() > 3 * runs.len());
    }
}
