//! Hides the path's loss from the connections inside the tunnel: numbered datagrams, repeats on request, order
//! within a flow, a deadline.
//!
//! ```text
//!  Sender -- data (number, distance to the flow's previous one) ~~~ loses, doubles, reorders ~~~> Receiver
//!    ^  `--- parity, repeat, probe of a lost tail, "gone" ----------------------------------------> | |
//!    '------ report: floor, next, ranges asked for ------------------------------------------------'  '-> in order
//!                                                                                                  per flow
//! ```
//!
//! * Nothing waits for anything while nothing is missing, and only packets of the flow that lost one wait when
//!   something is. After the deadline they go on without it.
//! * A datagram names its flow's previous datagram by distance and not by a number per flow: the receiver then
//!   keeps no table of flows, a header has 11 bytes, and a flow's first packet needs no agreement.
//! * While the path loses, every 32 datagrams are followed by their parity: most losses then cost less than a
//!   millisecond and not a round trip. Exclusive or needs no crate; what it cannot undo is repeated.
//! * What the gateway's own queue refuses is not repaired (see [`Sender::take_back`]): it is the only sign of a
//!   full path that the connections inside get.
//! * Flows that prefer loss to delay are not numbered at all.
//!
//! Below fragmentation: each datagram is repaired on its own. Above the link: its datagrams may be lost when a
//! connection ends, and are repeated on the next. No clock, no I/O; when a link is full is the gateway's to say.

mod config;
mod flow;
mod format;
mod gaps;
mod parity;
mod receiver;
mod sender;
mod shelf;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use config::RepairConfig;
pub use flow::{FlowBucket, RepairPolicy, Treatment};
pub use format::{HEADER, Incarnation, Kind, ROOM};
pub use receiver::{Receiver, ReceiverCounters};
pub use sender::{Sender, SenderCounters};

/// A datagram that repair does not accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RepairError {
    /// Not one of repair's formats: another version, or cut short.
    #[error("Datagram of an unknown repair format")]
    UnknownFormat,
    /// Of an incarnation that has ended. Some are normal after a restart.
    #[error("Datagram of an earlier incarnation")]
    Stale,
    /// A report about datagrams that were never sent.
    #[error("Report about datagrams that were never sent")]
    Contradiction,
}

impl From<format::Malformed> for RepairError {
    fn from(_: format::Malformed) -> Self {
        Self::UnknownFormat
    }
}

/// What both halves did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairCounters {
    /// Towards the peer.
    pub sender: SenderCounters,
    /// From the peer.
    pub receiver: ReceiverCounters,
}

/// Both halves of one peer's repair.
///
/// After every `handle_*` call the caller takes all of [`Repair::poll_packet`] and sends all of
/// [`Repair::poll_transmit`]; when [`Repair::poll_timeout`] comes, it calls [`Repair::handle_timeout`] first.
#[derive(Debug)]
pub struct Repair {
    sender: Sender,
    receiver: Receiver,
    /// A report that the link did not take.
    returned: Option<Bytes>,
}

impl Repair {
    /// Nothing sent and nothing received; `incarnation` is this side's.
    pub fn new(config: RepairConfig, incarnation: Incarnation) -> Self {
        let sender = Sender::new(config.clone(), incarnation);
        Self { sender, receiver: Receiver::new(config), returned: None }
    }

    /// The peer's gateway was started anew: it has forgotten what it had, so our numbers begin anew too.
    pub fn handle_peer_restart(&mut self, incarnation: Incarnation) {
        self.sender.restart(incarnation);
    }

    /// The path's round trip, whenever it is measured anew.
    pub fn set_rtt(&mut self, rtt: Duration) {
        self.sender.set_rtt(rtt);
        self.receiver.set_rtt(rtt);
    }

    /// See [`Sender::wrap`].
    pub fn wrap(&mut self, now: Duration, flow: FlowBucket, pieces: &[&[u8]]) -> Bytes {
        self.sender.wrap(now, flow, pieces)
    }

    /// See [`Sender::take_back`].
    pub fn take_back(&mut self) {
        self.sender.take_back();
    }

    /// Takes whatever datagram the peer sent. One that is not numbered goes on at once.
    pub fn handle_datagram(&mut self, now: Duration, datagram: Bytes) -> Result<(), RepairError> {
        match Kind::of(&datagram) {
            Kind::Data => self.receiver.handle_datagram(now, datagram),
            Kind::Report => self.sender.handle_report(now, &datagram),
            Kind::Gone => self.receiver.handle_gone(&datagram),
            Kind::Parity => self.receiver.handle_parity(now, &datagram),
            Kind::Unnumbered => {
                self.receiver.pass(datagram);
                Ok(())
            }
        }
    }

    /// The next payload that goes on, in order within its flow.
    pub fn poll_packet(&mut self) -> Option<Bytes> {
        self.receiver.poll_packet()
    }

    /// The next datagram to send beside wrapped ones. It goes before them: others wait for it.
    pub fn poll_transmit(&mut self, now: Duration) -> Option<Bytes> {
        let report = self.returned.take().or_else(|| self.receiver.poll_report(now));
        report.or_else(|| self.sender.poll_transmit(now))
    }

    /// Takes back what [`Repair::poll_transmit`] gave, because the link did not take it.
    pub fn return_transmit(&mut self, datagram: Bytes) {
        match Kind::of(&datagram) {
            Kind::Report => self.returned = Some(datagram),
            Kind::Data | Kind::Gone | Kind::Parity | Kind::Unnumbered => {
                self.sender.return_transmit(&datagram)
            }
        }
    }

    /// Gives up and forgets what is too late.
    pub fn handle_timeout(&mut self, now: Duration) {
        self.sender.handle_timeout(now);
        self.receiver.handle_timeout(now);
    }

    /// When to call [`Repair::handle_timeout`] and [`Repair::poll_transmit`] next; `None`: not before
    /// something happens.
    pub fn poll_timeout(&self) -> Option<Duration> {
        [self.sender.poll_timeout(), self.receiver.poll_timeout()].into_iter().flatten().min()
    }

    /// What both halves did.
    pub fn counters(&self) -> RepairCounters {
        RepairCounters { sender: *self.sender.counters(), receiver: *self.receiver.counters() }
    }

    /// The sending half.
    pub fn sender(&self) -> &Sender {
        &self.sender
    }

    /// The receiving half.
    pub fn receiver(&self) -> &Receiver {
        &self.receiver
    }
}
