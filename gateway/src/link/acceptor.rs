//! Answers those who dial: how many at a time, and who has to prove where he is first.
//!
//! ```text
//!  incoming -> too many in all, or of its address: refused
//!           -> half of all slots taken, address unproven: Retry (RFC 9000, 8.1.2)
//!           -> a slot: QUIC handshake, Hello, at most `handshake_timeout`
//! ```
//!
//! A slot is held until the peer's task has the connection, so somebody who begins handshakes and does not
//! go on keeps others out for the timeout at most, and never from more than a quarter of the slots.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use longhaul_core::ids::SiteName;
use quinn::{Endpoint, Incoming};
use tokio::sync::mpsc;

use super::config::LinkConfig;
use super::handshake::{Established, Introduction};
use super::peer::describe;
use crate::identity::PublicKey;

/// Takes connections and hands them to the peers' tasks.
pub(super) struct Acceptor {
    pub(super) config: Arc<LinkConfig>,
    pub(super) introduction: Introduction,
    pub(super) accepted: BTreeMap<SiteName, mpsc::Sender<Established>>,
}

impl Acceptor {
    /// Runs until the endpoint is closed.
    pub(super) async fn run(self, endpoint: Endpoint) {
        let (mut slots, mut returned) = Slots::new(self.config.handshake_limit);
        let acceptor = Arc::new(self);
        loop {
            let incoming = tokio::select! {
                biased;
                Some(network) = returned.recv() => {
                    slots.handle_returned(network);
                    continue;
                }
                incoming = endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { return };
            let Some(slot) = slots.take(incoming.remote_address().ip()) else {
                incoming.refuse();
                continue;
            };
            if slots.are_crowded() && !incoming.remote_address_validated() {
                let _ = incoming.retry(); // fails only for validated addresses
                continue;
            }
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                acceptor.answer(incoming).await;
                drop(slot);
            });
        }
    }

    async fn answer(&self, incoming: Incoming) {
        let remote = incoming.remote_address();
        let name_of = |key: &PublicKey| {
            self.config.peers.iter().find(|peer| peer.key == *key).map(|peer| peer.name.clone())
        };
        let answer = self.introduction.clone().answer(incoming, name_of);
        match tokio::time::timeout(self.config.handshake_timeout, answer).await {
            Ok(Ok((name, established))) => {
                if let Some(peer) = self.accepted.get(&name) {
                    let _ = peer.send(established).await; // the link is being closed
                }
            }
            Ok(Err(error)) => tracing::debug!(%remote, error = describe(&error), "A handshake failed"),
            Err(_elapsed) => tracing::debug!(%remote, "A handshake took too long"),
        }
    }
}

/// Handshakes under way, per address.
struct Slots {
    limit: usize,
    taken: BTreeMap<IpAddr, usize>,
    returns: mpsc::UnboundedSender<IpAddr>,
}

/// One handshake's place; dropping it gives it back.
struct Slot {
    network: IpAddr,
    returns: mpsc::UnboundedSender<IpAddr>,
}

impl Slots {
    /// Slots, and where those that are given back arrive: at most as many as there are.
    fn new(limit: usize) -> (Self, mpsc::UnboundedReceiver<IpAddr>) {
        let (returns, returned) = mpsc::unbounded_channel();
        (Self { limit, taken: BTreeMap::new(), returns }, returned)
    }

    fn take(&mut self, address: IpAddr) -> Option<Slot> {
        let network = network(address);
        let of_network = self.taken.get(&network).copied().unwrap_or(0);
        if self.in_use() >= self.limit || of_network >= self.limit.div_ceil(4) {
            return None;
        }
        self.taken.insert(network, of_network + 1);
        Some(Slot { network, returns: self.returns.clone() })
    }

    fn handle_returned(&mut self, network: IpAddr) {
        match self.taken.get(&network).copied() {
            Some(2..) => *self.taken.entry(network).or_default() -= 1,
            Some(_) | None => drop(self.taken.remove(&network)),
        }
    }

    fn are_crowded(&self) -> bool {
        self.in_use() > self.limit / 2
    }

    fn in_use(&self) -> usize {
        self.taken.values().sum()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let _ = self.returns.send(self.network); // the acceptor has ended
    }
}

/// Who has one IPv6 address has its /64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_address_takes_a_quarter_of_the_slots_and_others_the_rest() {
        let (mut slots, mut returned) = Slots::new(8);
        let liar: Vec<Slot> = (0..10).filter_map(|_| slots.take(address("192.0.2.1"))).collect();
        assert_eq!(liar.len(), 2);
        assert!(!slots.are_crowded());
        let honest = slots.take(address("192.0.2.2")).expect("a slot for somebody else");
        drop((liar, honest));
        while let Ok(network) = returned.try_recv() {
            slots.handle_returned(network);
        }
        assert!(slots.taken.is_empty(), "nothing is remembered of whom is gone");
        assert!(slots.take(address("192.0.2.1")).is_some());
    }

    #[test]
    fn no_number_of_addresses_takes_more_than_the_limit() {
        let (mut slots, _returned) = Slots::new(8);
        let taken: Vec<Slot> = (0..100u8).filter_map(|last| slots.take([192, 0, 2, last].into())).collect();
        assert_eq!((taken.len(), slots.taken.len()), (8, 8));
        assert!(slots.are_crowded());
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_and_a_mapped_address_as_its_own() {
        assert_eq!(network(address("2001:db8::1")), network(address("2001:db8::2:3:4:5")));
        assert_ne!(network(address("2001:db8::1")), network(address("2001:db8:0:1::1")));
        assert_eq!(network(address("::ffff:192.0.2.1")), address("192.0.2.1"));
    }
}
