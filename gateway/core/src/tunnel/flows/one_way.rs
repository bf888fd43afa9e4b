//! Which flows are heard from one end only: the sign of a firewall that lost its state, or of a tunnel that is cut in one
//! direction.
//!
//! A flow counts as such when one end has sent repeatedly for `one_way` and the other, which was heard before, has said
//! nothing; and for as long as the one still tries. Each packet notes it in its own flow; how many there are is counted in
//! passes of bounded steps, so that a large table costs the packets nothing. Nothing is refused or ended because of it.

use std::num::NonZeroU32;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::packet::Side;
use super::state::{Flow, FlowOrigin};
use super::store::Id;
use super::{FlowConfig, FlowTable};

/// Packets of one end that make a row: one that was repeated, and was repeated again.
const REPEATEDLY: u8 = 3;

/// What one end has sent since the other was last heard.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    sender: Side,
    packets: u8,
    /// From its first packet to its last, an hour at most.
    micros: u32,
}

impl Row {
    /// Nobody has sent anything.
    pub const NONE: Self = Self { sender: Side::Guest, packets: 0, micros: 0 };

    /// After packets of `sender`, the first of them `since_last` after the flow's last one.
    pub fn next(self, sender: Side, packets: u64, since_last: Duration) -> Self {
        let more = u8::try_from(packets).unwrap_or(u8::MAX);
        if self.packets == 0 || self.sender != sender {
            return Self { sender, packets: more, micros: 0 };
        }
        let micros = u32::try_from(since_last.as_micros()).unwrap_or(u32::MAX);
        Self {
            sender,
            packets: self.packets.saturating_add(more),
            micros: self.micros.saturating_add(micros),
        }
    }
}

/// Flows of a table that had packets lately, at the last pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OneWay {
    /// All of them.
    pub active: u64,
    /// Those of which only the guest is heard.
    pub only_guest: u64,
    /// Those of which only the other end is heard.
    pub only_remote: u64,
}

impl OneWay {
    /// Flows that are heard from one end only.
    pub fn flows(&self) -> u64 {
        self.only_guest + self.only_remote
    }

    /// At least half of what is active is heard from one end only.
    pub fn is_most(&self) -> bool {
        self.flows() > 0 && 2 * self.flows() >= self.active
    }
}

/// A pass over the table: how far it is, what it has counted, and what the one before it did.
#[derive(Debug, Default)]
pub(super) struct Pass {
    next: Option<Id>,
    counting: OneWay,
    last: OneWay,
}

impl FlowTable {
    /// Goes on counting, over as many places as [`FlowTable::expire`] forgets flows at most; what the last whole pass
    /// counted.
    pub fn count_one_way(&mut self, now: Duration) -> OneWay {
        let now = self.advance(now);
        let limit = self.config.expire_batch;
        let from = self.pass.next.unwrap_or(NonZeroU32::MIN);
        let mut counting = self.pass.counting;
        for (_, flow) in self.store.scan(from, limit) {
            if now.saturating_sub(flow.last_seen) >= self.config.one_way || flow.state.is_over() {
                continue;
            }
            counting.active += 1;
            match heard_only(&self.config, now, flow) {
                Some(Side::Guest) => counting.only_guest += 1,
                Some(Side::Remote) => counting.only_remote += 1,
                None => {}
            }
        }
        let next = u32::try_from(limit).ok().and_then(|limit| from.checked_add(limit));
        match next.filter(|next| self.store.last().is_some_and(|last| *next <= last)) {
            Some(next) => (self.pass.next, self.pass.counting) = (Some(next), counting),
            None => self.pass = Pass { next: None, counting: OneWay::default(), last: counting },
        }
        self.pass.last
    }
}

/// The only end of a flow that is heard, if the other was heard before.
pub(super) fn heard_only(config: &FlowConfig, now: Duration, flow: &Flow) -> Option<Side> {
    let Row { sender, packets, micros } = flow.row;
    let long_enough = packets >= REPEATEDLY && Duration::from_micros(micros.into()) >= config.one_way;
    let still_tries = now.saturating_sub(flow.last_seen) < config.one_way;
    let was_two_way = match (flow.origin, sender) {
        // Both ends had been heard before the move.
        (FlowOrigin::Seeded | FlowOrigin::Underway, _) => true,
        (FlowOrigin::New, Side::Guest) => flow.to_guest.packets > 0,
        (FlowOrigin::New, Side::Remote) => flow.from_guest.packets > 0,
    };
    let is_one_way = long_enough && still_tries && was_two_way && !flow.state.is_over();
    is_one_way.then_some(sender)
}
