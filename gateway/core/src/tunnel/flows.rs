//! The flows whose clients dialled this site, and when none is left.
//!
//! Seeded with the flows the source saw before the move, then learned from the packets that pass.
//! It forwards nothing and refuses nothing: forgetting a flow only means that the tunnel may end.
//!
//! ```text
//!            SYN                other segment
//!  (unknown) ----> Opening ---------------------> Open --- FIN both ways, or RST ---> Closed
//!      |                                           ^                                    |
//!      +------- any other packet, or seeded -------+          SYN: Opening again        |
//!  every state ends by its idle time; Closed is remembered, and lingers for late segments <----+
//! ```
//!
//! ICMP belongs to no flow here: a monitor's pings shall not keep a tunnel open for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::handover::FlowTuple;
use super::packet::{ICMP, ICMPV6, Packet, Side, TCP, TcpFlags, UDP};

/// How long flows count as alive, and when the tunnel may end.
#[derive(Debug, Clone)]
pub struct FlowConfig {
    /// Flows tracked per NIC. Default 65536, about 10 MiB when full. Packets of flows beyond it keep
    /// the tunnel for the longest idle time instead, so that no flow is ever cut for lack of room.
    pub max_flows: usize,
    /// A TCP connection without a packet for this long is dead. Default 2 h 4 min (RFC 5382, 5).
    pub tcp_idle: Duration,
    /// A TCP connection that was asked for and not answered. Default 60 s.
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
    /// No new flow to the home address for this long before the tunnel may end. Default 60 s.
    pub quiet: Duration,
    /// The tunnel may end after this time whatever is left. Default none.
    pub limit: Option<Duration>,
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
            quiet: Duration::from_secs(60),
            limit: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Opening,
    Open { guest_fin: bool, remote_fin: bool },
    Closed,
}

#[derive(Debug, Clone, Copy)]
struct Flow {
    state: State,
    last_seen: Duration,
    /// Where the flow stands in `due`; its true deadline may be later, never earlier.
    due: Duration,
}

/// The flows of one NIC's home addresses.
#[derive(Debug)]
pub struct FlowTable {
    config: FlowConfig,
    flows: BTreeMap<FlowTuple, Flow>,
    due: BTreeSet<(Duration, FlowTuple)>,
    closed: usize,
    /// When a closed connection last had a packet.
    last_closed: Option<Duration>,
    started: Duration,
    last_new: Duration,
    untracked_until: Duration,
    names_expire_at: Option<Duration>,
}

impl FlowTable {
    /// An empty table of a tunnel that begins `now`.
    pub fn new(config: FlowConfig, now: Duration) -> Self {
        Self {
            config,
            flows: BTreeMap::new(),
            due: BTreeSet::new(),
            closed: 0,
            last_closed: None,
            started: now,
            last_new: now,
            untracked_until: Duration::ZERO,
            names_expire_at: None,
        }
    }

    /// Adds flows seen before the move.
    pub fn seed(&mut self, now: Duration, flows: &[FlowTuple]) {
        for flow in flows.iter().filter(|flow| is_tracked(flow.protocol)) {
            self.open(now, *flow, State::Open { guest_fin: false, remote_fin: false });
        }
    }

    /// When the last resolver forgets the old address. Until this is said the tunnel may not end.
    pub fn set_names_expire_at(&mut self, at: Duration) {
        self.names_expire_at = Some(at);
    }

    /// Learns from a packet that passes, sent by `sender`.
    pub fn handle_packet(&mut self, now: Duration, packet: &Packet<'_>, sender: Side) {
        let Some(tuple) = packet.flow(sender).filter(|tuple| is_tracked(tuple.protocol)) else { return };
        let flags = packet.tcp_flags();
        let Some(flow) = self.flows.get(&tuple).copied() else {
            return self.handle_unknown(now, tuple, flags, sender);
        };
        let state = match flags {
            Some(flags) => next_state(flow.state, flags, sender),
            None => flow.state,
        };
        self.update(tuple, Flow { state, last_seen: now, due: flow.due });
    }

    /// Forgets flows whose time is over.
    pub fn expire(&mut self, now: Duration) {
        while let Some((_, tuple)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            self.due.pop_first();
            let Some(flow) = self.flows.get_mut(&tuple) else { continue };
            let deadline = flow.last_seen + idle_time(&self.config, tuple.protocol, flow.state);
            if deadline > now {
                flow.due = deadline;
                self.due.insert((deadline, tuple));
                continue;
            }
            self.closed -= usize::from(flow.state == State::Closed);
            self.flows.remove(&tuple);
        }
    }

    /// Flows that are not closed.
    pub fn alive(&self) -> usize {
        self.flows.len() - self.closed
    }

    /// No flow is left, resolvers have forgotten the old address, and nobody new came for `quiet`; or
    /// the operator's limit is reached.
    pub fn may_end(&mut self, now: Duration) -> bool {
        self.expire(now);
        let limit_reached = self.config.limit.is_some_and(|limit| now >= self.started + limit);
        let names_expired = self.names_expire_at.is_some_and(|at| now >= at);
        let quiet = now >= self.last_new + self.config.quiet;
        let lingers = self.last_closed.is_some_and(|at| now < at + self.config.closed_linger);
        let nobody_left = self.alive() == 0 && !lingers && now >= self.untracked_until;
        limit_reached || (nobody_left && names_expired && quiet)
    }

    fn handle_unknown(&mut self, now: Duration, tuple: FlowTuple, flags: Option<TcpFlags>, sender: Side) {
        let state = match flags {
            Some(flags) if flags.rst() => return,
            Some(flags) if flags.opens() => State::Opening,
            Some(flags) => State::Open {
                guest_fin: flags.fin() && sender == Side::Guest,
                remote_fin: flags.fin() && sender == Side::Remote,
            },
            None => State::Open { guest_fin: false, remote_fin: false },
        };
        let is_new = flags.is_none_or(TcpFlags::opens);
        if is_new && sender == Side::Remote {
            self.last_new = now;
        }
        self.open(now, tuple, state);
    }

    fn open(&mut self, now: Duration, tuple: FlowTuple, state: State) {
        let idle = idle_time(&self.config, tuple.protocol, state);
        if self.flows.contains_key(&tuple) {
            return;
        }
        if self.flows.len() >= self.config.max_flows {
            self.forget_closed();
        }
        if self.flows.len() >= self.config.max_flows {
            self.untracked_until = self.untracked_until.max(now + idle);
            return;
        }
        let due = now + idle;
        self.due.insert((due, tuple));
        self.flows.insert(tuple, Flow { state, last_seen: now, due });
    }

    /// Makes room: an eighth of the table at a time, so that the search costs each flow little.
    fn forget_closed(&mut self) {
        let share = (self.config.max_flows / 8).max(1);
        if self.closed < share {
            return;
        }
        let is_closed =
            |tuple: &FlowTuple| self.flows.get(tuple).is_some_and(|flow| flow.state == State::Closed);
        let oldest: Vec<_> =
            self.due.iter().filter(|(_, tuple)| is_closed(tuple)).take(share).copied().collect();
        for entry in oldest {
            self.due.remove(&entry);
            self.flows.remove(&entry.1);
            self.closed -= 1;
        }
    }

    /// Stores `flow`; queues it anew only if its deadline came closer.
    fn update(&mut self, tuple: FlowTuple, mut flow: Flow) {
        let deadline = flow.last_seen + idle_time(&self.config, tuple.protocol, flow.state);
        if deadline < flow.due {
            self.due.remove(&(flow.due, tuple));
            self.due.insert((deadline, tuple));
            flow.due = deadline;
        }
        let is_closed = flow.state == State::Closed;
        if is_closed {
            self.last_closed = Some(flow.last_seen);
        }
        let was_closed = self.flows.insert(tuple, flow).is_some_and(|old| old.state == State::Closed);
        self.closed = self.closed + usize::from(is_closed) - usize::from(was_closed);
    }
}

fn is_tracked(protocol: u8) -> bool {
    !matches!(protocol, ICMP | ICMPV6)
}

fn next_state(state: State, flags: TcpFlags, sender: Side) -> State {
    if flags.rst() {
        return State::Closed;
    }
    if flags.opens() {
        return match state {
            State::Opening | State::Closed => State::Opening,
            State::Open { .. } => state,
        };
    }
    let (guest_fin, remote_fin) = match state {
        State::Closed => return State::Closed,
        State::Opening => (false, false),
        State::Open { guest_fin, remote_fin } => (guest_fin, remote_fin),
    };
    let guest_fin = guest_fin || (flags.fin() && sender == Side::Guest);
    let remote_fin = remote_fin || (flags.fin() && sender == Side::Remote);
    if guest_fin && remote_fin { State::Closed } else { State::Open { guest_fin, remote_fin } }
}

fn idle_time(config: &FlowConfig, protocol: u8, state: State) -> Duration {
    match (protocol, state) {
        (_, State::Closed) => config.closed_memory,
        (TCP, State::Opening) => config.tcp_opening,
        (TCP, State::Open { guest_fin: false, remote_fin: false }) => config.tcp_idle,
        (TCP, State::Open { .. }) => config.tcp_closing,
        (UDP, State::Opening | State::Open { .. }) => config.udp_idle,
        (_, State::Opening | State::Open { .. }) => config.other_idle,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::packet::tests::{ipv4, tcp};
    use super::*;

    const GUEST: [u8; 4] = [198, 51, 100, 10];
    const CLIENT: [u8; 4] = [192, 0, 2, 1];
    const FIN_ACK: u8 = 0x11;
    const SYN: u8 = 0x02;
    const RST: u8 = 0x04;
    const ACK: u8 = 0x10;

    fn at(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn tuple(port: u16) -> FlowTuple {
        FlowTuple {
            protocol: TCP,
            local: GUEST.into(),
            local_port: 80,
            remote: CLIENT.into(),
            remote_port: port,
        }
    }

    fn table() -> FlowTable {
        let mut table = FlowTable::new(FlowConfig::default(), at(0));
        table.set_names_expire_at(at(30));
        table
    }

    fn from_remote(table: &mut FlowTable, now: u64, port: u16, flags: u8) {
        let bytes = ipv4(CLIENT, GUEST, TCP, &tcp(port, 80, flags));
        table.handle_packet(at(now), &Packet::parse(&bytes).unwrap(), Side::Remote);
    }

    fn from_guest(table: &mut FlowTable, now: u64, port: u16, flags: u8) {
        let bytes = ipv4(GUEST, CLIENT, TCP, &tcp(80, port, flags));
        table.handle_packet(at(now), &Packet::parse(&bytes).unwrap(), Side::Guest);
    }

    #[test]
    fn a_tunnel_without_flows_ends_when_names_have_expired_and_it_was_quiet() {
        let mut table = table();
        assert!(!table.may_end(at(59)));
        assert!(table.may_end(at(60)));
        table.set_names_expire_at(at(90));
        assert!(!table.may_end(at(89)));
        assert!(table.may_end(at(90)));
    }

    #[test]
    fn a_tunnel_whose_names_are_not_known_to_expire_does_not_end() {
        let mut table = FlowTable::new(FlowConfig::default(), at(0));
        assert!(!table.may_end(at(1_000_000)));
    }

    #[test]
    fn a_seeded_connection_holds_the_tunnel_until_both_have_said_fin() {
        let mut table = table();
        table.seed(at(0), &[tuple(1000)]);
        from_remote(&mut table, 100, 1000, FIN_ACK);
        assert!(!table.may_end(at(200)));
        from_guest(&mut table, 201, 1000, FIN_ACK);
        assert_eq!(table.alive(), 0);
        assert!(!table.may_end(at(203)), "the last acknowledgement still has to pass");
        from_remote(&mut table, 203, 1000, ACK);
        assert!(table.may_end(at(206)));
    }

    #[test]
    fn a_segment_that_comes_late_does_not_open_a_closed_connection_again() {
        let mut table = table();
        table.seed(at(0), &[tuple(1000)]);
        from_remote(&mut table, 100, 1000, FIN_ACK);
        from_guest(&mut table, 101, 1000, FIN_ACK);
        assert!(table.may_end(at(104)));
        from_remote(&mut table, 110, 1000, ACK);
        assert_eq!(table.alive(), 0);
        assert!(!table.may_end(at(112)), "it is let pass");
        assert!(table.may_end(at(113)));
        from_remote(&mut table, 120, 1000, SYN);
        assert_eq!(table.alive(), 1, "the same ports, a new connection");
    }

    #[test]
    fn connections_that_are_only_remembered_make_room_for_new_ones() {
        let mut table = FlowTable::new(FlowConfig { max_flows: 16, ..FlowConfig::default() }, at(0));
        table.set_names_expire_at(at(0));
        for port in 1000..1100 {
            from_remote(&mut table, 100, port, SYN);
            from_remote(&mut table, 100, port, RST);
        }
        assert!(table.flows.len() <= 16);
        assert!(table.may_end(at(160)), "none of them was too many to be tracked");
    }

    #[test]
    fn a_connection_that_one_end_has_closed_holds_the_tunnel_for_minutes_and_not_for_hours() {
        let mut table = table();
        table.seed(at(0), &[tuple(1000)]);
        from_remote(&mut table, 100, 1000, FIN_ACK);
        from_guest(&mut table, 200, 1000, ACK);
        assert!(!table.may_end(at(439)), "it may still send");
        assert!(table.may_end(at(440)));
    }

    #[test]
    fn a_reset_closes_and_a_stray_reset_opens_nothing() {
        let mut table = table();
        table.seed(at(0), &[tuple(1000)]);
        from_remote(&mut table, 1, 1000, RST);
        from_remote(&mut table, 1, 2000, RST);
        assert_eq!(table.alive(), 0);
        assert!(table.may_end(at(60)));
    }

    #[test]
    fn an_idle_connection_lives_two_hours_and_four_minutes() {
        let mut table = table();
        table.seed(at(0), &[tuple(1000)]);
        assert!(!table.may_end(at(7439)));
        from_guest(&mut table, 7439, 1000, ACK);
        assert!(!table.may_end(at(7440 + 7438)));
        assert!(table.may_end(at(7439 + 7440)));
    }

    #[test]
    fn a_new_connection_to_the_home_address_restarts_the_quiet_time() {
        let mut table = table();
        from_remote(&mut table, 50, 1000, SYN);
        from_guest(&mut table, 50, 1000, RST | ACK);
        assert!(!table.may_end(at(109)));
        assert!(table.may_end(at(110)));
    }

    #[test]
    fn an_unanswered_attempt_is_forgotten_after_a_minute() {
        let mut table = table();
        from_remote(&mut table, 0, 1000, SYN);
        assert_eq!(table.alive(), 1);
        assert!(table.may_end(at(60)));
    }

    #[test]
    fn a_port_used_again_is_alive_again() {
        let mut table = table();
        from_remote(&mut table, 1, 1000, SYN);
        from_remote(&mut table, 2, 1000, RST);
        from_remote(&mut table, 3, 1000, SYN);
        from_guest(&mut table, 3, 1000, SYN | ACK);
        from_remote(&mut table, 3, 1000, ACK);
        assert_eq!(table.alive(), 1);
        assert!(!table.may_end(at(1000)));
    }

    #[test]
    fn pings_do_not_hold_the_tunnel() {
        let mut table = table();
        let bytes = ipv4(CLIENT, GUEST, ICMP, &[8, 0, 0, 0, 0, 0, 0, 0]);
        table.handle_packet(at(59), &Packet::parse(&bytes).unwrap(), Side::Remote);
        assert!(table.may_end(at(60)));
    }

    #[test]
    fn flows_beyond_the_limit_keep_the_tunnel_instead_of_being_cut() {
        let mut table = FlowTable::new(FlowConfig { max_flows: 2, ..FlowConfig::default() }, at(0));
        table.set_names_expire_at(at(0));
        table.seed(at(0), &[tuple(1), tuple(2), tuple(3)]);
        assert_eq!(table.alive(), 2);
        from_remote(&mut table, 1, 1, RST);
        from_remote(&mut table, 1, 2, RST);
        assert!(!table.may_end(at(7439)));
        assert!(table.may_end(at(7440)));
    }

    #[test]
    fn the_operators_limit_ends_it_whatever_is_left() {
        let config = FlowConfig { limit: Some(at(3600)), ..FlowConfig::default() };
        let mut table = FlowTable::new(config, at(0));
        table.seed(at(0), &[tuple(1)]);
        assert!(!table.may_end(at(3599)));
        assert!(table.may_end(at(3600)));
    }

    proptest! {
        #[test]
        fn the_queue_of_deadlines_and_the_flows_stay_in_step(
            steps in prop::collection::vec((0u64..50, 0u16..6, any::<u8>(), any::<bool>()), 0..300),
        ) {
            let config = FlowConfig { max_flows: 4, tcp_idle: at(40), tcp_opening: at(5), tcp_closing: at(20), ..FlowConfig::default() };
            let mut table = FlowTable::new(config, at(0));
            let mut now = 0;
            for (pause, port, flags, remote) in steps {
                now += pause;
                if remote { from_remote(&mut table, now, port, flags) } else { from_guest(&mut table, now, port, flags) }
                table.expire(at(now));
                prop_assert_eq!(table.due.len(), table.flows.len());
                prop_assert!(table.flows.len() <= 4);
                let closed = table.flows.values().filter(|flow| flow.state == State::Closed).count();
                prop_assert_eq!(closed, table.closed);
            }
        }
    }
}
