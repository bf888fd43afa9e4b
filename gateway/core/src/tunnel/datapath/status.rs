//! What the datapath shows of itself: counters, and how each NIC's tunnel stands. Nothing is decided by it.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::super::flows::{HeldBy, OneWay};
use super::super::policy::{DropReason, PortKey, Role};
use crate::ids::SiteName;

/// How far a NIC's tunnel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Packets to the guest are kept.
    Holding,
    /// Kept packets leave in order; new ones queue behind them.
    Releasing,
    /// Packets pass.
    Passing,
}

/// Packets and bytes that went one way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Their bytes, IP headers included, tunnel headers not.
    pub bytes: u64,
}

impl Traffic {
    /// One packet.
    pub fn of(packet: &Bytes) -> Self {
        Self { packets: 1, bytes: packet.len() as u64 }
    }

    pub(super) fn count(&mut self, more: Self) {
        self.packets += more.packets;
        self.bytes += more.bytes;
    }
}

/// What passed and what did not, since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets handed to the link.
    pub to_peers: Traffic,
    /// Packets from the link handed to the device.
    pub from_peers: Traffic,
    /// Packets that had to be split.
    pub split: u64,
    /// Packets that were kept during a pause.
    pub held: u64,
    /// Packets that did not travel, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
}

impl Counters {
    /// Counts `n` packets that did not travel.
    pub fn drop(&mut self, reason: DropReason, n: u64) {
        if n > 0 {
            *self.dropped.entry(reason).or_default() += n;
        }
    }

    /// Packets that did not travel, all reasons together.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.values().sum()
    }
}

/// One NIC's tunnel as the status shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStatus {
    /// The NIC.
    pub key: PortKey,
    /// Which end we are.
    pub role: Role,
    /// The other end.
    pub peer: SiteName,
    /// How far it is.
    pub phase: Phase,
    /// Packets kept now.
    pub held_packets: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// What holds it; `None` where flows are not tracked (visits).
    pub held_by: Option<HeldBy>,
    /// How long nobody has needed its addresses but flows of before the move; `None` like `held_by`.
    pub unneeded_for: Option<Duration>,
    /// Flows that are heard from one end only.
    pub one_way: OneWay,
    /// Packets of the machine, all its NICs together, that were more than its share.
    pub over_share: u64,
    /// The tunnel is needed by nobody any more.
    pub may_end: bool,
}

impl PortStatus {
    /// Flows alive; `None` where they are not tracked (visits).
    pub fn flows_alive(&self) -> Option<u64> {
        self.held_by.as_ref().map(|held| held.flows.alive())
    }
}
