//! The flows whose clients dialled this site, and when none is left.
//!
//! Seeded with the flows the source saw before the move, then learned from the packets that pass. A packet costs the
//! same however many flows there are, and forgetting looks only at flows whose time is over. It forwards nothing and
//! refuses nothing: forgetting a flow only means that the tunnel may end.
//!
//! The states of a flow are drawn in `state`. When the table is full, the oldest closed connection makes room, then the
//! oldest attempt that nobody has taken up; flows in use never do.
//!
//! ICMP belongs to no flow here: a monitor's pings shall not keep a tunnel open for ever.

mod held;
mod limit;
mod one_way;
#[cfg(test)]
mod one_way_tests;
mod state;
mod store;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod timer_tests;

use std::time::Duration;

pub use held::{FlowCounts, FlowCursor, FlowEntry, FlowPage, HeldBy};
pub use limit::{HoldLimit, NoHoldLimit};
pub use one_way::OneWay;
pub use state::{FlowOrigin, FlowState};
pub use store::HashKey;

use super::datapath::Traffic;
use super::handover::FlowTuple;
use super::packet::{ICMP, ICMPV6, Packet, Side, TcpFlags};
use held::idle_time;
use one_way::Pass;
use state::{Class, Flow, State, class};
use store::{Id, Store};

/// Due flows that one new flow makes the table forget: more than one, so that it does not fall behind.
const FORGET_PER_NEW: usize = 2;

/// How long flows count as alive, and when the tunnel may end.
#[derive(Debug, Clone)]
pub struct FlowConfig {
    /// Flows tracked per NIC, 2^31 at most. Default 65536: 9 MiB when full, 0.5 MiB with a thousand flows. Packets of
    /// flows beyond it keep the tunnel for the longest idle time instead, so that no flow is ever cut for lack of room.
    pub max_flows: usize,
    /// A TCP connection without a packet for this long is dead. Default 2 h 4 min (RFC 5382, 5).
    pub tcp_idle: Duration,
    /// A TCP connection that was asked for and not taken up. Default 60 s.
    pub tcp_opening: Duration,
    /// A TCP connection that one end has closed, as far as was seen, without a packet for this long is over. The other
    /// end may have closed it before the move. Default 4 min (RFC 5382, 5: transitory).
    pub tcp_closing: Duration,
    /// A UDP flow without a packet for this long is over. Default 5 min (RFC 4787, 4.3).
    pub udp_idle: Duration,
    /// The same for other protocols (SCTP, ESP, GRE). Default 30 min.
    pub other_idle: Duration,
    /// How long the tunnel stays after the last packet of a closed connection, for a lost last acknowledgement.
    /// Default 3 s.
    pub closed_linger: Duration,
    /// How long a closed connection is remembered, so that a segment that comes late is not taken for an open
    /// one. Default 2 min (RFC 9293, 3.4.2: the maximum segment lifetime).
    pub closed_memory: Duration,
    /// No new flow for this long before the tunnel may end. Default 24 h: some clients have the home address written down and
    /// dial it once a day, and a guest asks its home LAN's servers from time to time. Of flows from outside only those that
    /// the guest answers count: somebody knocks at every public address all day.
    pub quiet: Duration,
    /// A flow of which one end has sent for this long, and the other is silent, counts as heard from one side only.
    /// Default 30 s. Shorter names flows that are only waiting for a slow answer.
    pub one_way: Duration,
    /// The tunnel may end after this time whatever is left. Default none.
    pub limit: Option<Duration>,
    /// Flows that one [`FlowTable::expire`] forgets at most. Default 1024: less than a millisecond in which no packet
    /// passes, of a million flows too.
    pub expire_batch: usize,
    /// What hides the places of flows from their senders. Draw it at random at start; the default is known to all.
    pub hash_key: HashKey,
}

impl Default for FlowConfig {
    fn default() -> Self {
        Self {
            max_flows: 65_536,
            tcp_idle: Duration::from_secs(7440),
            tcp_opening: Duration::from_secs(60),
            tcp_closing: Duration::from_secs(240),
            udp_idle: Duration::from_secs(300),
            other_idle: Duration::from_secs(1800),
            closed_linger: Duration::from_secs(3),
            closed_memory: Duration::from_secs(120),
            quiet: Duration::from_secs(24 * 3600),
            one_way: Duration::from_secs(30),
            limit: None,
            expire_batch: 1024,
            hash_key: HashKey::default(),
        }
    }
}

/// What the table learns from a packet. Packets of one flow that differ only in their data are equal here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    tuple: FlowTuple,
    flags: Option<TcpFlags>,
    sender: Side,
}

impl Seen {
    /// What `packet`, sent by `sender`, teaches; nothing if it is of no flow that is tracked.
    pub fn of(packet: &Packet<'_>, sender: Side) -> Option<Self> {
        let tuple = packet.flow(sender).filter(|tuple| is_tracked(tuple.protocol))?;
        Some(Self { tuple, flags: packet.tcp_flags(), sender })
    }
}

/// What a table had no room for, since its beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowPressure {
    /// Flows forgotten before their time to make room: closed ones, and attempts that were not taken up.
    pub recycled: u64,
    /// Packets and seeds of flows that found no room.
    pub untracked: u64,
}

/// The flows of one NIC's home addresses.
#[derive(Debug)]
pub struct FlowTable {
    config: FlowConfig,
    store: Store,
    pressure: FlowPressure,
    /// The latest time that was said; an earlier one counts as this.
    clock: Duration,
    started: Duration,
    released: bool,
    /// When a closed connection last had a packet.
    last_closed: Option<Duration>,
    last_new: Duration,
    /// How long nobody new had come before this table began. Nothing once somebody has.
    quiet_before: Duration,
    /// The last packet of a flow that is in use and that the source did not see.
    last_used: Option<Duration>,
    untracked_until: Duration,
    names_expire_at: Option<Duration>,
    pass: Pass,
}

impl FlowTable {
    /// An empty table of a tunnel that begins `now`.
    pub fn new(config: FlowConfig, now: Duration) -> Self {
        Self::continued(config, now, Duration::ZERO)
    }

    /// An empty table of a tunnel that an earlier gateway has had, and that nobody had needed for `quiet` by `now`.
    pub fn continued(config: FlowConfig, now: Duration, quiet: Duration) -> Self {
        let store = Store::new(config.hash_key, config.max_flows);
        Self {
            config,
            store,
            pressure: FlowPressure::default(),
            clock: now,
            started: now,
            released: false,
            last_closed: None,
            last_new: now,
            quiet_before: quiet,
            last_used: None,
            untracked_until: Duration::ZERO,
            names_expire_at: None,
            pass: Pass::default(),
        }
    }

    /// Adds flows seen before the move.
    pub fn seed(&mut self, now: Duration, flows: &[FlowTuple]) {
        let now = self.advance(now);
        for tuple in flows.iter().filter(|tuple| is_tracked(tuple.protocol)) {
            if self.find(now, tuple).is_none() {
                self.open(Flow::new(now, *tuple, State::OPEN, FlowOrigin::Seeded));
            }
        }
    }

    /// When the last resolver forgets the old address. Until this is said the tunnel may not end.
    pub fn set_names_expire_at(&mut self, at: Duration) {
        self.names_expire_at = Some(at);
    }

    /// The tunnel may end this long after its beginning whatever is left; `None`: only when nobody needs it.
    pub fn set_limit(&mut self, limit: Option<Duration>) {
        self.config.limit = limit;
    }

    /// The operator ends the tunnel, whatever is left. There is no way back.
    pub fn release(&mut self) {
        self.released = true;
    }

    /// Learns from a packet that passes, sent by `sender`.
    pub fn handle_packet(&mut self, now: Duration, packet: &Packet<'_>, sender: Side) {
        if let Some(seen) = Seen::of(packet, sender) {
            self.handle_seen(now, seen, Traffic { packets: 1, bytes: packet.total_len() as u64 });
        }
    }

    /// Learns from packets that have passed, all alike but for their data.
    pub fn handle_seen(&mut self, now: Duration, seen: Seen, traffic: Traffic) {
        let now = self.advance(now);
        match self.find(now, &seen.tuple) {
            Some(id) => self.handle_known(now, id, seen, traffic),
            None => self.handle_unknown(now, seen, traffic),
        }
    }

    /// Forgets flows whose time is over, `expire_batch` at most; `true`: there are more.
    pub fn expire(&mut self, now: Duration) -> bool {
        let now = self.advance(now);
        self.forget_due(now, self.config.expire_batch)
    }

    /// Flows that are not closed, at the latest time that was said.
    pub fn alive(&self) -> usize {
        self.held_by(self.clock).flows.alive() as usize
    }

    /// Flows in the table, closed ones and due ones too.
    pub fn len(&self) -> usize {
        self.store.len()
    }

    /// No flow at all, not even a closed one.
    pub fn is_empty(&self) -> bool {
        self.store.len() == 0
    }

    /// What there was no room for.
    pub fn pressure(&self) -> FlowPressure {
        self.pressure
    }

    /// No flow is left, resolvers have forgotten the old address, and nobody new came for `quiet`; or the
    /// operator's limit is reached, or the operator has ended it. [`FlowTable::held_by`] says what is missing.
    pub fn may_end(&mut self, now: Duration) -> bool {
        self.expire(now);
        self.held_by(now).may_end()
    }

    fn advance(&mut self, now: Duration) -> Duration {
        self.clock = self.clock.max(now);
        self.clock
    }

    /// A flow that is known and not due. A due one is forgotten here: what comes after is another flow.
    fn find(&mut self, now: Duration, tuple: &FlowTuple) -> Option<Id> {
        let id = self.store.find(tuple)?;
        if self.deadline(id) > now {
            return Some(id);
        }
        self.store.remove(id);
        None
    }

    fn handle_known(&mut self, now: Duration, id: Id, seen: Seen, traffic: Traffic) {
        let (old, was_taken_up) = (self.store.flow(id).state, self.store.flow(id).is_taken_up());
        let state = old.next(seen.flags, seen.sender);
        let is_reused = old.is_over() && state == State::Opening;
        if state.is_over() {
            self.last_closed = Some(now);
        }
        let (mut is_taken_up, mut is_in_use) = (false, false);
        self.store.update(id, |flow| {
            if is_reused {
                *flow = Flow::new(now, flow.tuple, state, FlowOrigin::New);
            }
            flow.state = state;
            flow.count(now, seen.sender, traffic);
            (is_taken_up, is_in_use) = (flow.is_taken_up(), flow.is_in_use());
        });
        let is_asked_for = is_reused && seen.sender == Side::Guest;
        if is_asked_for || !was_taken_up && is_taken_up {
            self.note_new(now);
        }
        if is_in_use {
            self.last_used = Some(now);
        }
    }

    fn handle_unknown(&mut self, now: Duration, seen: Seen, traffic: Traffic) {
        let Seen { tuple, flags, sender } = seen;
        let Some(state) = State::first(flags, sender) else { return };
        if flags.is_none_or(TcpFlags::opens) && sender == Side::Guest {
            self.note_new(now);
        }
        let origin = if flags.is_none_or(TcpFlags::syn) { FlowOrigin::New } else { FlowOrigin::Underway };
        let mut flow = Flow::new(now, tuple, state, origin);
        flow.count(now, sender, traffic);
        self.open(flow);
    }

    fn note_new(&mut self, now: Duration) {
        (self.last_new, self.quiet_before) = (now, Duration::ZERO);
    }

    /// Keeps a flow that is not known, or keeps the tunnel for it.
    fn open(&mut self, flow: Flow) {
        self.forget_due(flow.last_seen, FORGET_PER_NEW);
        if self.make_room() {
            return self.store.insert(flow);
        }
        self.pressure.untracked += 1;
        let idle = idle_time(&self.config, class(flow.tuple.protocol, flow.state));
        self.untracked_until = self.untracked_until.max(flow.last_seen.saturating_add(idle));
    }

    /// An attempt that makes room may be taken up all the same, so the tunnel stays for as long as it would have.
    fn make_room(&mut self) -> bool {
        if self.store.len() < self.config.max_flows {
            return true;
        }
        let attempt = || self.store.oldest(Class::TcpOpening);
        let Some(id) = self.store.oldest(Class::Closed).or_else(attempt) else { return false };
        if self.store.flow(id).state == State::Opening {
            self.untracked_until = self.untracked_until.max(self.deadline(id));
        }
        self.store.remove(id);
        self.pressure.recycled += 1;
        true
    }

    fn forget_due(&mut self, now: Duration, mut budget: usize) -> bool {
        for class in Class::ALL {
            while let Some(id) = self.store.oldest(class).filter(|id| self.deadline(*id) <= now) {
                if budget == 0 {
                    return true;
                }
                budget -= 1;
                self.store.remove(id);
            }
        }
        false
    }

    fn deadline(&self, id: Id) -> Duration {
        let flow = self.store.flow(id);
        flow.last_seen.saturating_add(idle_time(&self.config, flow.class()))
    }
}

fn is_tracked(protocol: u8) -> bool {
    !matches!(protocol, ICMP | ICMPV6)
}
