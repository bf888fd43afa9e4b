//! Who races where with what: names, figures of the WANs, what the guest does meanwhile. Nothing is run here.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::scenario::SceneOptions;

/// A WAN between the sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// 5 Mbit/s, 100 ms: the path of Bradford et al. (VEE 2007).
    Bradford,
    /// 1 Gbit/s, 5 ms.
    Metro,
    /// 100 Mbit/s, 100 ms, 0.1 % loss.
    Transatlantic,
    /// 50 Mbit/s, 200 ms, 1 % loss.
    Lossy,
    /// Faster than this machine emulates, 0.2 ms: the processors decide. Only if it is asked for.
    Unshaped,
}

impl Profile {
    /// All that are raced if nothing else is asked for.
    pub const ALL: [Self; 4] = [Self::Metro, Self::Transatlantic, Self::Lossy, Self::Bradford];

    /// Its name in commands and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bradford => "bradford",
            Self::Metro => "metro",
            Self::Transatlantic => "transatlantic",
            Self::Lossy => "lossy",
            Self::Unshaped => "unshaped",
        }
    }

    /// Rate in Mbit/s, round trip, random loss from 0 to 1.
    pub const fn path(self) -> (f64, Duration, f64) {
        match self {
            Self::Bradford => (5.0, Duration::from_millis(100), 0.0),
            Self::Metro => (1000.0, Duration::from_millis(5), 0.0),
            Self::Transatlantic => (100.0, Duration::from_millis(100), 0.001),
            Self::Lossy => (50.0, Duration::from_millis(200), 0.01),
            Self::Unshaped => (10_000.0, Duration::from_micros(200), 0.0),
        }
    }

    /// How often a run is repeated if nothing else is asked for.
    pub const fn rounds(self) -> u32 {
        match self {
            Self::Bradford | Self::Lossy => 1,
            Self::Metro | Self::Transatlantic | Self::Unshaped => 3,
        }
    }
}

/// What the guest does while it moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// Only what every guest does.
    Idle,
    /// A web server that is asked ten times a second, writes a log and touches memory at 8 % of the WAN's rate, 1 MiB/s at most.
    Web,
    /// Random blocks of the disk at 30 % of the WAN's rate, 8 MiB/s at most.
    Database,
    /// Memory at twice the WAN's rate, 64 MiB/s at most: it never converges by itself.
    Memory,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Web, Self::Idle, Self::Database, Self::Memory];

    /// Its name in commands and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Web => "web",
            Self::Database => "database",
            Self::Memory => "memory",
        }
    }

    /// KiB a second of memory and of disk that the guest dirties on a WAN of `rate_mbit`.
    pub fn dirt_kib_per_s(self, rate_mbit: f64) -> (u64, u64) {
        let share = |share: f64, most: f64| (rate_mbit * 1e6 / 8.0 / 1024.0 * share).ceil().min(most) as u64;
        match self {
            Self::Idle => (0, 0),
            Self::Web => (share(0.08, 1024.0), share(0.01, 128.0)),
            Self::Database => (share(0.08, 1024.0), share(0.3, 8192.0)),
            Self::Memory => (share(2.0, 65_536.0), share(0.01, 128.0)),
        }
    }
}

/// Who moves the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Racer {
    /// QEMU over plain TCP, the disk by a mirror into the other QEMU's NBD server.
    QemuTcp,
    /// QEMU with multifd, zstd and TLS; the disk's mirror in TLS too.
    QemuMultifd,
    /// QEMU with an XBZRLE cache of 64 MiB.
    QemuXbzrle,
    /// This gateway: there, and back again.
    Longhaul,
}

impl Racer {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Longhaul, Self::QemuTcp, Self::QemuMultifd, Self::QemuXbzrle];

    /// Its name in commands and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QemuTcp => "qemu-tcp",
            Self::QemuMultifd => "qemu-multifd-zstd-tls",
            Self::QemuXbzrle => "qemu-xbzrle",
            Self::Longhaul => "longhaul",
        }
    }

    /// As the command line names it.
    pub fn argument(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// The congestion control of the kernel's TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Control {
    /// The usual one.
    Cubic,
    /// The one that does not mind random loss, where the kernel has it.
    Bbr,
}

impl Control {
    /// As the kernel calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cubic => "cubic",
            Self::Bbr => "bbr",
        }
    }
}

/// One run: one racer, one WAN, one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// The WAN.
    pub profile: Profile,
    /// The guest's work.
    pub workload: Workload,
    /// Who.
    pub racer: Racer,
    /// By which congestion control; the gateway has its own.
    pub control: Option<Control>,
}

impl Run {
    /// The racer's name in the report.
    pub fn racer_name(&self) -> String {
        match self.control {
            Some(control) => format!("{}-{}", self.racer.name(), control.name()),
            None => self.racer.name().to_owned(),
        }
    }

    /// Whether it takes many minutes and little of the machine, so that several of its kind may run at once: the link is
    /// slow, or the sender takes the link's losses for congestion. The gateway, whose figures are looked at most closely, never does.
    pub fn is_slow(&self) -> bool {
        let (rate_mbit, _, loss) = self.profile.path();
        if self.racer == Racer::Longhaul {
            return false;
        }
        rate_mbit < 60.0 || (loss > 0.0 && self.control == Some(Control::Cubic))
    }

    /// The scene it is played in.
    pub fn scene(&self, name: String) -> SceneOptions {
        let (rate_mbit, rtt, loss) = self.profile.path();
        let (memory, disk) = self.workload.dirt_kib_per_s(rate_mbit);
        SceneOptions {
            name,
            rate_mbit,
            rtt,
            loss,
            dirty_memory_kib_per_s: memory,
            dirty_disk_kib_per_s: disk,
            ..SceneOptions::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_link_holds_up_runs_beside_others() {
        let run = |profile, control| Run { profile, workload: Workload::Web, racer: Racer::QemuTcp, control };
        assert!(run(Profile::Bradford, Some(Control::Bbr)).is_slow());
        assert!(run(Profile::Transatlantic, Some(Control::Cubic)).is_slow());
        assert!(!run(Profile::Transatlantic, Some(Control::Bbr)).is_slow());
        assert!(!run(Profile::Metro, Some(Control::Cubic)).is_slow());
    }

    #[test]
    fn a_memory_writer_outruns_every_link_but_the_fastest() {
        for profile in [Profile::Bradford, Profile::Lossy, Profile::Transatlantic] {
            let (rate_mbit, ..) = profile.path();
            let (memory, _) = Workload::Memory.dirt_kib_per_s(rate_mbit);
            assert!(memory as f64 * 1024.0 * 8.0 > rate_mbit * 1e6);
        }
    }
}
