//! What one flow is, and what a packet makes of it.
//!
//! ```text
//!            SYN                segment without SYN
//!  (unknown) ----> Opening ---------------------------> Open --- FIN both ways -----------> Closed
//!      |             ^                                  ^  ^ \                               |
//!      |             +-- SYN|ACK (unknown)              |  |  '- RST --> Reset                |
//!      |                                                |  '------------'  | its sender goes on
//!      +------- any other packet, or seeded ------------'                  |                  |
//!  every state ends by its idle time; Closed and Reset are remembered, linger for late segments, and are Opening
//!  again with a SYN
//! ```
//!
//! An answer alone does not open: a guest answers a SYN whose sender does not exist. Sequence numbers are not
//! looked at, so a forged segment counts like a true one. But whoever has really reset a connection sends nothing more of it:
//! a reset whose sender goes on was forged, or not believed (RFC 5961).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::datapath::Traffic;
use super::super::handover::FlowTuple;
use super::super::packet::{Side, TCP, TcpFlags, UDP};
use super::one_way::Row;

/// How far a flow is, as far as its packets tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlowState {
    /// TCP: asked for, and not yet taken up.
    Opening,
    /// In use.
    Open,
    /// TCP: one end has closed it.
    Closing,
    /// Over, and remembered for late segments. It holds nothing.
    Closed,
}

/// How a flow came to be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlowOrigin {
    /// The source saw it before the move.
    Seeded,
    /// A TCP connection first seen in its middle: older than the move, and not among those the source saw.
    Underway,
    /// It began after the move.
    New,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Opening,
    Open {
        guest_fin: bool,
        remote_fin: bool,
    },
    Closed,
    /// By whom.
    Reset(Side),
}

impl State {
    pub const OPEN: Self = Self::Open { guest_fin: false, remote_fin: false };

    /// Of a flow that was not known. `None`: a reset of a connection that nobody has is not one.
    pub fn first(flags: Option<TcpFlags>, sender: Side) -> Option<Self> {
        match flags {
            Some(flags) if flags.rst() => None,
            Some(flags) if flags.syn() => Some(Self::Opening),
            Some(flags) => Some(Self::Open {
                guest_fin: flags.fin() && sender == Side::Guest,
                remote_fin: flags.fin() && sender == Side::Remote,
            }),
            None => Some(Self::OPEN),
        }
    }

    /// It holds nothing any more.
    pub fn is_over(self) -> bool {
        match self {
            Self::Closed | Self::Reset(_) => true,
            Self::Opening | Self::Open { .. } => false,
        }
    }

    /// After one more packet.
    pub fn next(self, flags: Option<TcpFlags>, sender: Side) -> Self {
        let Some(flags) = flags else { return self };
        let (guest_fin, remote_fin) = match self {
            Self::Closed | Self::Reset(_) if flags.opens() => return Self::Opening,
            Self::Closed => return Self::Closed,
            Self::Reset(by) if by != sender || flags.rst() || flags.syn() => return self,
            Self::Opening | Self::Open { .. } if flags.rst() => return Self::Reset(sender),
            Self::Reset(_) => (false, false),
            Self::Opening if flags.syn() => return Self::Opening,
            Self::Opening => (false, false),
            Self::Open { guest_fin, remote_fin } => (guest_fin, remote_fin),
        };
        let guest_fin = guest_fin || (flags.fin() && sender == Side::Guest);
        let remote_fin = remote_fin || (flags.fin() && sender == Side::Remote);
        if guest_fin && remote_fin { Self::Closed } else { Self::Open { guest_fin, remote_fin } }
    }
}

/// Flows with the same idle time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    TcpOpening,
    TcpOpen,
    TcpClosing,
    Udp,
    Other,
    Closed,
}

impl Class {
    pub const ALL: [Self; 6] =
        [Self::TcpOpening, Self::TcpOpen, Self::TcpClosing, Self::Udp, Self::Other, Self::Closed];

    /// Those that hold the tunnel.
    pub const ALIVE: [Self; 5] = [Self::TcpOpening, Self::TcpOpen, Self::TcpClosing, Self::Udp, Self::Other];
}

/// One flow.
#[derive(Debug, Clone)]
pub(super) struct Flow {
    pub tuple: FlowTuple,
    pub state: State,
    pub origin: FlowOrigin,
    pub since: Duration,
    pub last_seen: Duration,
    pub to_guest: Traffic,
    pub from_guest: Traffic,
    pub row: Row,
}

impl Flow {
    pub fn new(now: Duration, tuple: FlowTuple, state: State, origin: FlowOrigin) -> Self {
        let none = Traffic::default();
        let (to_guest, from_guest, row) = (none, none, Row::NONE);
        Self { tuple, state, origin, since: now, last_seen: now, to_guest, from_guest, row }
    }

    pub fn class(&self) -> Class {
        class(self.tuple.protocol, self.state)
    }

    /// Packets that come `now`.
    pub fn count(&mut self, now: Duration, sender: Side, traffic: Traffic) {
        self.row = self.row.next(sender, traffic.packets, now.saturating_sub(self.last_seen));
        self.last_seen = now;
        let way = match sender {
            Side::Guest => &mut self.from_guest,
            Side::Remote => &mut self.to_guest,
        };
        way.packets += traffic.packets;
        way.bytes += traffic.bytes;
    }

    pub fn shown(&self) -> FlowState {
        match self.state {
            State::Opening => FlowState::Opening,
            State::Open { guest_fin: false, remote_fin: false } => FlowState::Open,
            State::Open { .. } => FlowState::Closing,
            State::Closed | State::Reset(_) => FlowState::Closed,
        }
    }

    /// Whether it began after the move and both ends have spoken since, TCP beyond its handshake: what was refused, or never
    /// answered, is nobody who needs the address.
    pub fn is_taken_up(&self) -> bool {
        self.origin == FlowOrigin::New && self.is_in_use()
    }

    /// The same of one that may have begun before the move without the source having seen it.
    pub fn is_in_use(&self) -> bool {
        let both_spoke = self.from_guest.packets > 0 && self.to_guest.packets > 0;
        self.origin != FlowOrigin::Seeded && both_spoke && matches!(self.state, State::Open { .. })
    }
}

pub(super) fn class(protocol: u8, state: State) -> Class {
    match (protocol, state) {
        (_, State::Closed | State::Reset(_)) => Class::Closed,
        (TCP, State::Opening) => Class::TcpOpening,
        (TCP, State::Open { guest_fin: false, remote_fin: false }) => Class::TcpOpen,
        (TCP, State::Open { .. }) => Class::TcpClosing,
        (UDP, State::Opening | State::Open { .. }) => Class::Udp,
        (_, State::Opening | State::Open { .. }) => Class::Other,
    }
}
