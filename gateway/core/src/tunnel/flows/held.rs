//! What a flow table shows: its flows in pages, and what holds the tunnel.
//!
//! All times are differences to the moment of the question, so that they mean the same on another host. It decides
//! nothing but the sum: whether what holds the tunnel still does.

use std::num::NonZeroU32;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::datapath::Traffic;
use super::super::handover::FlowTuple;
use super::super::packet::Side;
use super::one_way::heard_only;
use super::state::{Class, Flow, FlowOrigin, FlowState};
use super::{FlowConfig, FlowTable};

/// One flow, as `longhaul flows` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowEntry {
    /// Who speaks with whom.
    pub tuple: FlowTuple,
    /// How far it is.
    pub state: FlowState,
    /// How it came to be known.
    pub origin: FlowOrigin,
    /// Since it is known here; of a seeded one, since the hand-over.
    pub age: Duration,
    /// Since its last packet; of a seeded one without any, since the hand-over.
    pub idle: Duration,
    /// Until it is forgotten, if no packet comes.
    pub idle_left: Duration,
    /// To the guest, since it is known. Fragments other than the first are in no flow.
    pub to_guest: Traffic,
    /// From the guest.
    pub from_guest: Traffic,
    /// The only end that is heard, although the other was before.
    #[serde(default)]
    pub heard_only: Option<Side>,
}

/// Where a listing goes on. The default is its beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowCursor(Option<NonZeroU32>);

/// A part of a listing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowPage {
    /// In no order that means anything. May be fewer than were asked for, even none, and not the end.
    pub flows: Vec<FlowEntry>,
    /// Where the next page begins; `None` after the last.
    pub next: Option<FlowCursor>,
}

/// How many flows there are of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowCounts {
    /// TCP connections that were asked for and not taken up.
    pub tcp_opening: u64,
    /// TCP connections in use.
    pub tcp_open: u64,
    /// TCP connections that one end has closed.
    pub tcp_closing: u64,
    /// UDP flows.
    pub udp: u64,
    /// Pairs of addresses that speak another protocol.
    pub other: u64,
    /// Closed TCP connections that are remembered. They hold nothing.
    pub closed: u64,
}

impl FlowCounts {
    /// Flows that hold the tunnel.
    pub fn alive(&self) -> u64 {
        self.tcp_opening + self.tcp_open + self.tcp_closing + self.udp + self.other
    }
}

/// What holds a tunnel. Each thing that is zero (and `names_left` known) holds it no longer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldBy {
    /// The flows that are known.
    pub flows: FlowCounts,
    /// Until the last packets of a closed connection have had their time.
    pub linger_left: Duration,
    /// Until flows for which there was no room would have been forgotten.
    pub untracked_left: Duration,
    /// Until resolvers have forgotten the old address; `None`: nobody has said when that is.
    pub names_left: Option<Duration>,
    /// Until there was no new flow to the home address for long enough.
    pub quiet_left: Duration,
    /// Until the operator's limit, which ends the tunnel whatever else holds it; `None`: no limit.
    pub limit_left: Option<Duration>,
    /// The operator has ended it.
    pub released: bool,
}

impl HeldBy {
    /// Nothing holds the tunnel, or the operator says so.
    pub fn may_end(&self) -> bool {
        let drained = self.flows.alive() == 0 && self.linger_left.is_zero() && self.untracked_left.is_zero();
        let forgotten = self.names_left.is_some_and(|left| left.is_zero());
        let limit_reached = self.limit_left.is_some_and(|left| left.is_zero());
        self.released || limit_reached || (drained && forgotten && self.quiet_left.is_zero())
    }
}

impl FlowTable {
    /// What holds the tunnel `now`: a handful of comparisons, however many flows there are.
    pub fn held_by(&self, now: Duration) -> HeldBy {
        let now = now.max(self.clock);
        let until = |at: Duration| at.saturating_sub(now);
        let quiet = self.config.quiet.saturating_sub(self.quiet_before);
        let linger = self.last_closed.map(|at| at.saturating_add(self.config.closed_linger));
        HeldBy {
            flows: self.counts(now),
            linger_left: linger.map(until).unwrap_or_default(),
            untracked_left: until(self.untracked_until),
            names_left: self.names_expire_at.map(until),
            quiet_left: until(self.last_new.saturating_add(quiet)),
            limit_left: self.config.limit.map(|limit| until(self.started.saturating_add(limit))),
            released: self.released,
        }
    }

    /// How long nobody has needed the addresses but flows that the source saw: no new flow came, and none was in use.
    pub fn unneeded_for(&self, now: Duration) -> Duration {
        let now = now.max(self.clock);
        if self.untracked_until > now {
            return Duration::ZERO;
        }
        let quiet = (now - self.last_new).saturating_add(self.quiet_before);
        self.last_used.map_or(quiet, |at| quiet.min(now - at))
    }

    /// The flows from `from` on. Looks at `limit` places at most. A flow that is there from the first page to the last
    /// is shown exactly once.
    pub fn list(&self, now: Duration, from: FlowCursor, limit: usize) -> FlowPage {
        let now = now.max(self.clock);
        let from = from.0.unwrap_or(NonZeroU32::MIN);
        let seen = self.store.scan(from, limit).map(|(_, flow)| flow);
        let flows = seen.filter_map(|flow| self.entry(now, flow)).collect();
        let next = u32::try_from(limit).ok().and_then(|limit| from.checked_add(limit));
        let next = next.filter(|next| self.store.last().is_some_and(|last| *next <= last));
        FlowPage { flows, next: next.map(|next| FlowCursor(Some(next))) }
    }

    /// The flows that hold the tunnel and have been without a packet for the longest, those first; `limit` at most.
    pub fn longest_idle(&self, now: Duration, limit: usize) -> Vec<FlowEntry> {
        let now = now.max(self.clock);
        let mut heads = Class::ALIVE.map(|class| self.store.oldest(class));
        let by_age = std::iter::from_fn(|| {
            let next = heads.iter_mut().filter(|head| head.is_some());
            let next = next.min_by_key(|head| head.map(|id| self.store.flow(id).last_seen))?;
            let id = (*next)?;
            *next = self.store.newer(id);
            Some(self.store.flow(id))
        });
        by_age.take(limit).filter_map(|flow| self.entry(now, flow)).collect()
    }

    /// Flows whose time is over count no more, whether or not they have been forgotten: a class whose newest flow is due
    /// has none left. One that has flows left may count due ones among them.
    fn counts(&self, now: Duration) -> FlowCounts {
        let count = |class| {
            let idle = idle_time(&self.config, class);
            let is_left = self.store.newest(class).is_some_and(|last| now < last.saturating_add(idle));
            if is_left { self.store.class_len(class) as u64 } else { 0 }
        };
        FlowCounts {
            tcp_opening: count(Class::TcpOpening),
            tcp_open: count(Class::TcpOpen),
            tcp_closing: count(Class::TcpClosing),
            udp: count(Class::Udp),
            other: count(Class::Other),
            closed: count(Class::Closed),
        }
    }

    /// `None` for a flow whose time is over.
    fn entry(&self, now: Duration, flow: &Flow) -> Option<FlowEntry> {
        let deadline = flow.last_seen.saturating_add(idle_time(&self.config, flow.class()));
        (now < deadline).then(|| FlowEntry {
            tuple: flow.tuple,
            state: flow.shown(),
            origin: flow.origin,
            age: now - flow.since,
            idle: now - flow.last_seen,
            idle_left: deadline - now,
            to_guest: flow.to_guest,
            from_guest: flow.from_guest,
            heard_only: heard_only(&self.config, now, flow),
        })
    }
}

pub(super) fn idle_time(config: &FlowConfig, class: Class) -> Duration {
    match class {
        Class::TcpOpening => config.tcp_opening,
        Class::TcpOpen => config.tcp_idle,
        Class::TcpClosing => config.tcp_closing,
        Class::Udp => config.udp_idle,
        Class::Other => config.other_idle,
        Class::Closed => config.closed_memory,
    }
}
