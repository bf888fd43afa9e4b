//! An emulated WAN between two namespaces: rate, delay, jitter, loss, reordering, duplicates, a bounded queue, cuts; all
//! of it changeable while it runs, everything that passes counted.
//!
//! Two emulators behind one handle. The userspace one (two TUN devices, a thread per direction) works on every kernel and
//! sees most. netem is used where the kernel has it; see [`netem`] for what it cannot tell.

pub mod counters;
mod device;
pub mod frame;
mod line;
pub mod measure;
pub mod netem;
pub mod profile;
mod shaper;

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;

pub use counters::{ClassCounters, PacketClass, PacketMatch, PathCounters, Sample, Tally};
pub use measure::{Measured, measure};
pub use profile::{PathProfile, WanProfile};

use crate::netns::Namespace;
use line::Line;
use netem::Netem;
use shaper::Shaper;

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From the near end (the internet core) to the far end (the site).
    ToFar,
    /// From the far end to the near end.
    ToNear,
}

impl Direction {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::ToFar, Self::ToNear];
}

/// What emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulator {
    /// Two TUN devices and a thread per direction.
    Userspace,
    /// The kernel's netem qdisc on a veth pair.
    Netem,
}

impl Emulator {
    /// netem where the kernel has it, else the userspace emulator.
    pub fn detect() -> Result<Self> {
        Ok(if netem::is_available()? { Self::Netem } else { Self::Userspace })
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Userspace => "userspace",
            Self::Netem => "netem",
        }
    }
}

/// One end of the WAN: the device `device` that will appear in `namespace`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WanEnd {
    /// Where.
    pub namespace: Namespace,
    /// The interface's name there, at most 15 bytes.
    pub device: String,
}

/// What to build.
#[derive(Clone, Debug)]
pub struct WanSpec {
    /// The internet core's end.
    pub near: WanEnd,
    /// The site's end.
    pub far: WanEnd,
    /// What it does to packets at first.
    pub profile: WanProfile,
    /// What is counted apart.
    pub classes: Vec<PacketClass>,
    /// What emulates; see [`Emulator::detect`].
    pub emulator: Emulator,
}

/// A WAN that runs until it is dropped. Its two devices are up and have no addresses.
#[derive(Debug)]
pub struct Wan {
    near: WanEnd,
    far: WanEnd,
    started: Instant,
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Userspace { to_far: Line, to_near: Line },
    Netem(Netem),
}

impl Wan {
    /// Makes the two devices and starts carrying packets between them.
    pub fn build(spec: WanSpec) -> Result<Self> {
        let started = Instant::now();
        let backend = match spec.emulator {
            Emulator::Userspace => userspace(&spec, started)?,
            Emulator::Netem => {
                Backend::Netem(Netem::build(spec.near.clone(), spec.far.clone(), spec.classes)?)
            }
        };
        let wan = Self { near: spec.near, far: spec.far, started, backend };
        wan.set_profile(&spec.profile)?;
        Ok(wan)
    }

    /// What emulates.
    pub fn emulator(&self) -> Emulator {
        match self.backend {
            Backend::Userspace { .. } => Emulator::Userspace,
            Backend::Netem(_) => Emulator::Netem,
        }
    }

    /// The end at the internet core.
    pub fn near(&self) -> &WanEnd {
        &self.near
    }

    /// The end at the site.
    pub fn far(&self) -> &WanEnd {
        &self.far
    }

    /// The moment that [`Sample::at`] counts from.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Changes both directions. Packets on their way keep the fate they were given; the seed stays.
    pub fn set_profile(&self, profile: &WanProfile) -> Result<()> {
        self.set_path(Direction::ToFar, &profile.to_far)?;
        self.set_path(Direction::ToNear, &profile.to_near)
    }

    /// Changes one direction.
    pub fn set_path(&self, direction: Direction, profile: &PathProfile) -> Result<()> {
        match self.path(direction) {
            Path::Line(line) => {
                let profile = profile.clone();
                line.ask(move |shaper| shaper.set_profile(profile))
            }
            Path::Netem(netem) => netem.set_profile(direction, profile),
        }
    }

    /// Cuts the WAN in both directions; what is on its way is lost too. In force when this returns.
    pub fn cut(&self) -> Result<()> {
        Direction::BOTH.into_iter().try_for_each(|direction| self.set_cut(direction, true))
    }

    /// Ends all cuts.
    pub fn heal(&self) -> Result<()> {
        Direction::BOTH.into_iter().try_for_each(|direction| self.set_cut(direction, false))
    }

    /// Cuts or heals one direction only.
    pub fn set_cut(&self, direction: Direction, cut: bool) -> Result<()> {
        match self.path(direction) {
            Path::Line(line) => line.ask(move |shaper| shaper.set_cut(cut)),
            Path::Netem(netem) => netem.set_cut(direction, cut),
        }
    }

    /// What passed in one direction since the start or the last reset.
    pub fn counters(&self, direction: Direction) -> Result<PathCounters> {
        match self.path(direction) {
            Path::Line(line) => {
                let mut counters = line.ask(|shaper| shaper.counters().clone())?;
                let entrance = match direction {
                    Direction::ToFar => &self.near,
                    Direction::ToNear => &self.far,
                };
                counters.kernel_dropped = kernel_drops(entrance)?;
                Ok(counters)
            }
            Path::Netem(netem) => netem.counters(direction),
        }
    }

    /// What passed over time in one direction, oldest first; empty with netem.
    pub fn samples(&self, direction: Direction) -> Result<Vec<Sample>> {
        match self.path(direction) {
            Path::Line(line) => line.ask(|shaper| shaper.samples()),
            Path::Netem(_) => Ok(Vec::new()),
        }
    }

    /// Sets all counters to zero and forgets the samples (not [`PathCounters::kernel_dropped`]).
    pub fn reset_counters(&self) -> Result<()> {
        match &self.backend {
            Backend::Userspace { to_far, to_near } => {
                to_far.ask(Shaper::reset_counters)?;
                to_near.ask(Shaper::reset_counters)
            }
            Backend::Netem(netem) => netem.reset_counters(),
        }
    }

    fn path(&self, direction: Direction) -> Path<'_> {
        match (&self.backend, direction) {
            (Backend::Userspace { to_far, .. }, Direction::ToFar) => Path::Line(to_far),
            (Backend::Userspace { to_near, .. }, Direction::ToNear) => Path::Line(to_near),
            (Backend::Netem(netem), Direction::ToFar | Direction::ToNear) => Path::Netem(netem),
        }
    }
}

enum Path<'a> {
    Line(&'a Line),
    Netem(&'a Netem),
}

fn userspace(spec: &WanSpec, started: Instant) -> Result<Backend> {
    let near = Arc::new(device::open_tun(&spec.near.namespace, &spec.near.device)?);
    let far = Arc::new(device::open_tun(&spec.far.namespace, &spec.far.device)?);
    let shaper = |path: &PathProfile, seed| Shaper::new(path.clone(), seed, spec.classes.clone());
    let to_far = shaper(&spec.profile.to_far, spec.profile.seed);
    let to_near = shaper(&spec.profile.to_near, !spec.profile.seed);
    Ok(Backend::Userspace {
        to_far: Line::start("wan-to-far", to_far, near.clone(), far.clone(), started)?,
        to_near: Line::start("wan-to-near", to_near, far, near, started)?,
    })
}

/// Packets that the kernel could not queue for the emulator, since the device exists (`/proc/net/dev`, transmit drops).
fn kernel_drops(end: &WanEnd) -> Result<u64> {
    let listing = end.namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
    let prefix = format!("{}:", end.device);
    let line = listing.lines().find_map(|line| line.trim_start().strip_prefix(&prefix));
    let drops = line.and_then(|line| line.split_whitespace().nth(11)).and_then(|field| field.parse().ok());
    Ok(drops.unwrap_or(0))
}
