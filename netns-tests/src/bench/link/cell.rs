//! The conditions under which senders are compared: rate, round trip, loss and queue of the path, and which of them a run
//! goes through. Nothing is measured here.

use std::time::Duration;

use serde::Serialize;

use crate::wan::{PathProfile, WanProfile};

/// The longest line time of one packet that an emulator on two cores keeps up with: beyond, it says so itself.
const PACKET_BYTES: u64 = 1500;

/// One path.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Cell {
    /// Mbit/s of IP packets.
    pub rate_mbit: u64,
    /// Both ways together.
    pub rtt_ms: u64,
    /// Of a hundred packets each way.
    pub loss_percent: f64,
    /// The bottleneck's queue in bandwidth-delay products.
    pub queue: f64,
}

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// A few cells, some minutes.
    Quick,
    /// Each condition varied alone.
    Usual,
    /// Every combination.
    Full,
}

impl Cell {
    const fn new(rate_mbit: u64, rtt_ms: u64, loss_percent: f64, queue: f64) -> Self {
        Self { rate_mbit, rtt_ms, loss_percent, queue }
    }

    /// Those of a run.
    pub fn of(extent: Extent) -> Vec<Self> {
        match extent {
            Extent::Quick => vec![Self::new(100, 100, 0.1, 1.0), Self::new(100, 20, 1.0, 1.0)],
            Extent::Usual => vec![
                Self::new(100, 100, 0.0, 1.0),
                Self::new(100, 100, 0.01, 1.0),
                Self::new(100, 100, 0.1, 1.0),
                Self::new(100, 100, 1.0, 1.0),
                Self::new(100, 100, 0.1, 0.25),
                Self::new(100, 100, 0.1, 4.0),
                Self::new(100, 20, 0.1, 1.0),
                Self::new(100, 300, 0.1, 1.0),
                Self::new(1000, 20, 0.1, 1.0),
                Self::new(1000, 100, 0.1, 1.0),
            ],
            Extent::Full => Self::all(),
        }
    }

    /// Those in which two senders share the path.
    pub fn shared(extent: Extent) -> Vec<Self> {
        match extent {
            Extent::Quick => Vec::new(),
            Extent::Usual => vec![Self::new(100, 20, 0.0, 1.0), Self::new(100, 100, 0.0, 1.0)],
            Extent::Full => [20, 100, 300]
                .into_iter()
                .flat_map(|rtt| [0.25, 1.0, 4.0].map(|queue| Self::new(100, rtt, 0.0, queue)))
                .collect(),
        }
    }

    fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for rate in [100, 1000] {
            for rtt in [20, 100, 300] {
                for loss in [0.0, 0.01, 0.1, 1.0] {
                    cells.extend([0.25, 1.0, 4.0].map(|queue| Self::new(rate, rtt, loss, queue)));
                }
            }
        }
        cells
    }

    /// What it is called.
    pub fn name(&self) -> String {
        let Self { rate_mbit, rtt_ms, loss_percent, queue } = self;
        format!("{rate_mbit} Mbit/s, {rtt_ms} ms, {loss_percent} % lost, queue {queue} BDP")
    }

    /// The round trip.
    pub fn rtt(&self) -> Duration {
        Duration::from_millis(self.rtt_ms)
    }

    /// For the emulator: the same both ways.
    pub fn profile(&self) -> WanProfile {
        let mut path =
            PathProfile::new(Some(self.rate_mbit * 1_000_000), self.rtt(), self.loss_percent / 100.0);
        let held_bytes = path.bytes_in(self.rtt());
        path.queue_bytes = ((held_bytes as f64 * self.queue) as u64).max(4 * PACKET_BYTES);
        WanProfile { to_far: path.clone(), to_near: path, seed: 1 }
    }

    /// How long a sender has to find the rate before it is measured.
    pub fn warm_up(&self) -> Duration {
        Duration::from_secs(3) + 20 * self.rtt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_grid_has_every_combination_and_queues_are_as_asked() {
        assert_eq!(Cell::of(Extent::Full).len(), 72);
        let profile = Cell::new(100, 100, 1.0, 0.25).profile();
        assert_eq!(profile.to_far.queue_bytes, 312_500);
        assert_eq!(profile.to_near.loss, 0.01);
        assert_eq!(profile.rtt(), Duration::from_millis(100));
    }
}
