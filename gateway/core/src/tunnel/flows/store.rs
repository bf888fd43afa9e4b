//! Where flows are kept: found by hash, and queued by class in the order of their last packets.
//!
//! Every flow of a class has the same idle time, so the oldest of a queue is the next one due and the newest says
//! whether any is left. A packet moves its flow to the newest end. It does not know what an idle time is.
//!
//! ```text
//!  buckets  [ . | 7 | . | 2 | ... ]  as many as flows fit, never grown: no packet pays for a new size
//!                 |       |
//!  chunks   [ 1 2 3 ... 1024 ] [ 1025 ... ]      a flow keeps its number; a chunk is added when one is full
//!                 ^---- chain of one bucket, queue of one class, or list of unused numbers
//! ```

use std::fmt;
use std::hash::{DefaultHasher, Hasher};
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use super::super::handover::FlowTuple;
use super::state::{Class, Flow};

/// Flows per allocation: 128 KiB, so that the packet that needs one more waits for no large copy.
const CHUNK: usize = 1024;

/// What makes the places of flows unknown to those who send packets. A sender who knew it could put all its flows in
/// one place, and each of its packets would then search through all of them.
///
/// The core draws nothing, so the gateway does, once per start. The default is for tests and simulations, where every
/// run shall be like the last.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct HashKey(pub [u64; 2]);

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey(..)")
    }
}

impl HashKey {
    /// The standard library's hasher is SipHash-1-3 of a fixed key. The secret goes in first, so that what follows meets
    /// a state that only its owner knows.
    fn hash(self, tuple: &FlowTuple) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.iter().for_each(|word| hasher.write_u64(*word));
        let ports = u64::from(tuple.local_port) << 16 | u64::from(tuple.remote_port);
        hasher.write_u64(u64::from(tuple.protocol) << 32 | ports);
        match (tuple.local, tuple.remote) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => {
                hasher.write_u64(u64::from(local.to_bits()) << 32 | u64::from(remote.to_bits()));
            }
            (local, remote) => {
                write_v6(&mut hasher, local);
                write_v6(&mut hasher, remote);
            }
        }
        hasher.finish()
    }
}

fn write_v6(hasher: &mut DefaultHasher, address: IpAddr) {
    let bits = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    };
    hasher.write_u64((bits >> 64) as u64);
    hasher.write_u64(bits as u64);
}

/// A flow's number, as long as it is kept.
pub(super) type Id = NonZeroU32;

#[derive(Debug)]
struct Slot {
    flow: Flow,
    /// The next flow of the same bucket.
    chain: Option<Id>,
    older: Option<Id>,
    /// Of a number that is not in use: the next one of those.
    newer: Option<Id>,
    used: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Queue {
    oldest: Option<Id>,
    newest: Option<Id>,
    len: usize,
}

/// All flows of a table.
#[derive(Debug)]
pub(super) struct Store {
    key: HashKey,
    buckets: Vec<Option<Id>>,
    chunks: Vec<Vec<Slot>>,
    unused: Option<Id>,
    queues: [Queue; Class::ALL.len()],
    len: usize,
    /// Slots looked at or written: what a test counts in place of time.
    #[cfg(test)]
    pub(super) touched: std::cell::Cell<u64>,
}

impl Store {
    /// No flow, and room for the buckets of `max_flows`: 4 to 8 bytes each, in pages that cost nothing before they
    /// are used.
    pub fn new(key: HashKey, max_flows: usize) -> Self {
        Self {
            key,
            buckets: vec![None; max_flows.clamp(1, 1 << 31).next_power_of_two()],
            chunks: Vec::new(),
            unused: None,
            queues: Default::default(),
            len: 0,
            #[cfg(test)]
            touched: Default::default(),
        }
    }

    /// Flows kept.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Flows kept of one class.
    pub fn class_len(&self, class: Class) -> usize {
        self.queue(class).len
    }

    /// The number of a flow.
    pub fn find(&self, tuple: &FlowTuple) -> Option<Id> {
        let mut next = self.buckets[self.bucket(tuple)];
        while let Some(id) = next {
            let slot = self.slot(id);
            if slot.flow.tuple == *tuple {
                return Some(id);
            }
            next = slot.chain;
        }
        None
    }

    /// The flow with this number.
    pub fn flow(&self, id: Id) -> &Flow {
        &self.slot(id).flow
    }

    /// The flow of a class that has been without a packet for the longest.
    pub fn oldest(&self, class: Class) -> Option<Id> {
        self.queue(class).oldest
    }

    /// When a class last had a packet.
    pub fn newest(&self, class: Class) -> Option<Duration> {
        self.queue(class).newest.map(|id| self.flow(id).last_seen)
    }

    /// The flow of the same class whose last packet came next.
    pub fn newer(&self, id: Id) -> Option<Id> {
        self.slot(id).newer
    }

    /// The flow with this number, or with the next one in use among `limit` numbers.
    pub fn scan(&self, from: Id, limit: usize) -> impl Iterator<Item = (Id, &Flow)> {
        let ids = (from.get()..).take(limit).map_while(Id::new);
        let slots = ids.map_while(|id| self.chunks.get(chunk(id))?.get(place(id)).map(|slot| (id, slot)));
        slots.filter(|(_, slot)| slot.used).map(|(id, slot)| (id, &slot.flow))
    }

    /// The highest number ever given.
    pub fn last(&self) -> Option<Id> {
        let full = self.chunks.len().saturating_sub(1) * CHUNK;
        Id::new((full + self.chunks.last().map_or(0, Vec::len)) as u32)
    }

    /// Keeps a flow that is not kept yet, as the newest of its class.
    pub fn insert(&mut self, flow: Flow) {
        let bucket = self.bucket(&flow.tuple);
        let class = flow.class();
        let chain = self.buckets[bucket];
        let id = self.place(Slot { flow, chain, older: None, newer: None, used: true });
        self.buckets[bucket] = Some(id);
        self.append(class, id);
        self.len += 1;
    }

    /// Changes a flow, which becomes the newest of its class.
    pub fn update(&mut self, id: Id, change: impl FnOnce(&mut Flow)) {
        let before = self.flow(id).class();
        let flow = &mut self.slot_mut(id).flow;
        change(flow);
        let after = flow.class();
        if before == after && self.queue(after).newest == Some(id) {
            return;
        }
        self.unqueue(before, id);
        self.append(after, id);
    }

    /// Forgets a flow.
    pub fn remove(&mut self, id: Id) -> Flow {
        let flow = self.flow(id).clone();
        self.unchain(id);
        self.unqueue(flow.class(), id);
        let unused = self.unused.replace(id);
        let slot = self.slot_mut(id);
        (slot.used, slot.newer) = (false, unused);
        self.len -= 1;
        flow
    }

    fn bucket(&self, tuple: &FlowTuple) -> usize {
        self.key.hash(tuple) as usize & (self.buckets.len() - 1)
    }

    fn queue(&self, class: Class) -> &Queue {
        &self.queues[class as usize]
    }

    fn place(&mut self, slot: Slot) -> Id {
        if let Some(id) = self.unused {
            self.unused = self.slot(id).newer;
            *self.slot_mut(id) = slot;
            return id;
        }
        if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        if let Some(chunk) = self.chunks.last_mut() {
            chunk.push(slot);
        }
        // A table has at most 2^31 flows, and one was just added.
        self.last().unwrap_or(Id::MAX)
    }

    fn append(&mut self, class: Class, id: Id) {
        let queue = &mut self.queues[class as usize];
        let older = queue.newest.replace(id);
        queue.len += 1;
        match older {
            Some(older) => self.slot_mut(older).newer = Some(id),
            None => self.queues[class as usize].oldest = Some(id),
        }
        let slot = self.slot_mut(id);
        (slot.older, slot.newer) = (older, None);
    }

    fn unqueue(&mut self, class: Class, id: Id) {
        let (older, newer) = (self.slot(id).older, self.slot(id).newer);
        match older {
            Some(older) => self.slot_mut(older).newer = newer,
            None => self.queues[class as usize].oldest = newer,
        }
        match newer {
            Some(newer) => self.slot_mut(newer).older = older,
            None => self.queues[class as usize].newest = older,
        }
        self.queues[class as usize].len -= 1;
    }

    fn unchain(&mut self, id: Id) {
        let after = self.slot(id).chain;
        let bucket = self.bucket(&self.flow(id).tuple);
        let Some(mut before) = self.buckets[bucket] else { return };
        if before == id {
            self.buckets[bucket] = after;
            return;
        }
        while let Some(next) = self.slot(before).chain {
            if next == id {
                self.slot_mut(before).chain = after;
                return;
            }
            before = next;
        }
    }

    fn slot(&self, id: Id) -> &Slot {
        #[cfg(test)]
        self.touched.set(self.touched.get() + 1);
        &self.chunks[chunk(id)][place(id)]
    }

    fn slot_mut(&mut self, id: Id) -> &mut Slot {
        #[cfg(test)]
        self.touched.set(self.touched.get() + 1);
        &mut self.chunks[chunk(id)][place(id)]
    }
}

fn chunk(id: Id) -> usize {
    (id.get() as usize - 1) / CHUNK
}

fn place(id: Id) -> usize {
    (id.get() as usize - 1) % CHUNK
}

#[cfg(test)]
impl Store {
    /// Everything allocated, in bytes.
    pub fn bytes(&self) -> usize {
        let slots: usize = self.chunks.iter().map(Vec::capacity).sum();
        slots * size_of::<Slot>()
            + self.chunks.capacity() * size_of::<Vec<Slot>>()
            + self.buckets.capacity() * size_of::<Option<Id>>()
    }

    /// Every queue, bucket and number agree. Panics where they do not.
    pub fn check(&self) {
        let last = self.last().map_or(0, Id::get);
        let used: Vec<_> = self.scan(Id::MIN, last as usize).map(|(id, _)| id).collect();
        assert_eq!(used.len(), self.len);
        let mut queued = Vec::new();
        for class in Class::ALL {
            let mut next = self.oldest(class);
            let mut seen = Duration::ZERO;
            let before = queued.len();
            while let Some(id) = next {
                let flow = self.flow(id);
                assert!(flow.class() == class && flow.last_seen >= seen);
                assert_eq!(self.find(&flow.tuple), Some(id));
                seen = flow.last_seen;
                queued.push(id);
                next = self.newer(id);
            }
            assert_eq!(queued.len() - before, self.class_len(class));
            assert_eq!(self.newest(class), self.queue(class).len.gt(&0).then_some(seen));
        }
        queued.sort_unstable();
        assert_eq!(queued, used);
    }
}
