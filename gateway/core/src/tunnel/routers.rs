//! Which routers advertise on the LANs of this host, and when a visitor hears those of its home again.
//!
//! ```text
//!   heard on a LAN of its home ─> Routers ─> the hand-over ─> Imitation ─> the visitor's port
//!                                                                ^
//!                                       the visitor solicits ────┘
//! ```
//!
//! It neither sends nor receives; numbers of devices are the caller's, and time is a parameter.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use super::advertisement::{Advertisement, InvalidAdvertisement, Received};
use super::handover::Mac;

/// Routers remembered per LAN, and handed over per NIC.
pub const MAX_ADVERTISERS: usize = 8;

/// Devices on which routers are remembered. A host has few LANs.
const MAX_DEVICES: usize = 64;
/// The longest time between two advertisements of a router (RFC 4861, 6.2.1): one that is no default router, and so
/// gives no lifetime of its own, says within it that it is there.
const LONGEST_INTERVAL: Duration = Duration::from_secs(1800);
/// MIN_DELAY_BETWEEN_RAS (RFC 4861, 10).
const LEAST_INTERVAL: Duration = Duration::from_secs(3);
/// MAX_INITIAL_RTR_ADVERTISEMENTS and MAX_INITIAL_RTR_ADVERT_INTERVAL (RFC 4861, 10): the first ones come sooner.
const INITIAL: u32 = 3;
const INITIAL_INTERVAL: Duration = Duration::from_secs(16);
/// Advertisements that may be lost before something runs out, and one.
const PER_LIFETIME: u32 = 3;

/// A router that was heard on a LAN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertiser {
    /// Its link-local address.
    pub source: Ipv6Addr,
    /// The link-layer address it says it has, if it says so.
    pub link_layer: Option<Mac>,
    /// What it told the LAN last.
    pub advertisement: Advertisement,
}

/// The routers that were heard and whose word still holds.
#[derive(Debug, Default)]
pub struct Routers {
    /// By device and source, and until when.
    heard: BTreeMap<(u32, Ipv6Addr), (Duration, Advertiser)>,
}

impl Routers {
    /// A message came in by a device. What is no advertisement changes nothing, and of a router beyond
    /// [`MAX_ADVERTISERS`] nothing is remembered.
    pub fn handle_advertisement(
        &mut self,
        now: Duration,
        received: &Received<'_>,
    ) -> Result<(), InvalidAdvertisement> {
        let (advertisement, link_layer) = Advertisement::received(received)?;
        self.heard.retain(|_, (until, _)| *until > now);
        let (source, key) = (received.source, (received.device, received.source));
        if !self.heard.contains_key(&key) && !self.has_room(received.device) {
            return Ok(());
        }
        let lifetime = match advertisement.router_lifetime() {
            Duration::ZERO => LONGEST_INTERVAL,
            lifetime => lifetime,
        };
        self.heard.insert(key, (now + lifetime, Advertiser { source, link_layer, advertisement }));
        Ok(())
    }

    /// The routers of a LAN.
    pub fn on(&self, now: Duration, device: u32) -> Vec<Advertiser> {
        let known = self.heard.range((device, Ipv6Addr::UNSPECIFIED)..);
        let here = known.take_while(|((at, _), _)| *at == device).map(|(_, heard)| heard);
        here.filter(|(until, _)| *until > now).map(|(_, advertiser)| advertiser.clone()).collect()
    }

    fn has_room(&self, device: u32) -> bool {
        let here = self.heard.keys().filter(|(at, _)| *at == device).count();
        here < MAX_ADVERTISERS && self.heard.len() < MAX_DEVICES * MAX_ADVERTISERS
    }
}

/// When a visitor hears the routers of its home: at once, then again and again before anything they say runs out, and
/// soon after it has asked (RFC 4861, 6.2.6). The random delay of answers is left out, as nobody else answers there.
#[derive(Debug, Clone, Copy)]
pub struct Imitation {
    every: Duration,
    sent: u32,
    last: Option<Duration>,
    due: Duration,
}

impl Imitation {
    /// Of a visitor that runs, whose routers say something that runs out after `shortest`; every `at_most`.
    pub fn begin(now: Duration, at_most: Duration, shortest: Option<Duration>) -> Self {
        let needed = shortest.map_or(at_most, |shortest| shortest / PER_LIFETIME);
        Self { every: needed.min(at_most).max(LEAST_INTERVAL), sent: 0, last: None, due: now }
    }

    /// The visitor asks for its routers. However often it does, it is answered no more than every three seconds.
    pub fn handle_solicitation(&mut self, now: Duration) {
        let earliest = self.last.map_or(now, |last| now.max(last + LEAST_INTERVAL));
        self.due = self.due.min(earliest);
    }

    /// When [`Imitation::poll`] is to be called.
    pub fn due(&self) -> Duration {
        self.due
    }

    /// Whether the advertisements are to be sent now.
    pub fn poll(&mut self, now: Duration) -> bool {
        if now < self.due {
            return false;
        }
        self.sent = self.sent.saturating_add(1);
        let next = if self.sent < INITIAL { self.every.min(INITIAL_INTERVAL) } else { self.every };
        (self.last, self.due) = (Some(now), now + next);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAN: u32 = 3;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn source(number: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, number)
    }

    fn hear(routers: &mut Routers, now: Duration, device: u32, number: u16, lifetime_s: u8) {
        let message = [134, 0, 0, 0, 64, 0, 0, lifetime_s, 0, 0, 0, 0, 0, 0, 0, 0];
        let received = Received { device, source: source(number), hop_limit: 255, message: &message };
        routers.handle_advertisement(now, &received).unwrap();
    }

    #[test]
    fn the_last_word_of_each_router_holds_for_its_lifetime_on_its_lan() {
        let mut routers = Routers::default();
        hear(&mut routers, seconds(0), LAN, 1, 30);
        hear(&mut routers, seconds(5), LAN, 1, 60);
        hear(&mut routers, seconds(5), LAN, 2, 0);
        hear(&mut routers, seconds(5), LAN + 1, 9, 60);
        let sources = |routers: &Routers, now| -> Vec<Ipv6Addr> {
            routers.on(seconds(now), LAN).iter().map(|router| router.source).collect()
        };
        assert_eq!(sources(&routers, 64), [source(1), source(2)]);
        assert_eq!(routers.on(seconds(64), LAN)[0].advertisement.router_lifetime(), seconds(60));
        assert_eq!(sources(&routers, 65), [source(2)], "a router that gives no lifetime is known for longer");
        assert!(sources(&routers, 1805).is_empty());
    }

    #[test]
    fn one_router_too_many_is_not_remembered_until_there_is_room() {
        let mut routers = Routers::default();
        let most = MAX_ADVERTISERS as u16;
        (0..=most).for_each(|number| hear(&mut routers, seconds(0), LAN, number, 30));
        assert_eq!(routers.on(seconds(0), LAN).len(), MAX_ADVERTISERS);
        hear(&mut routers, seconds(1), LAN, most - 1, 60);
        hear(&mut routers, seconds(31), LAN, most, 30);
        let left: Vec<_> = routers.on(seconds(31), LAN).iter().map(|router| router.source).collect();
        assert_eq!(left, [source(most - 1), source(most)]);
        (0..100).for_each(|device| {
            (0..20).for_each(|number| hear(&mut routers, seconds(32), device, number, 30));
        });
        assert_eq!(routers.heard.len(), MAX_DEVICES * MAX_ADVERTISERS);
    }

    #[test]
    fn a_visitor_hears_its_routers_three_times_a_lifetime_the_first_times_sooner() {
        let sent = |shortest, until: u64| -> Vec<u64> {
            let mut imitation = Imitation::begin(seconds(100), seconds(200), shortest);
            (100..100 + until).filter(|now| imitation.poll(seconds(*now))).map(|now| now - 100).collect()
        };
        assert_eq!(sent(Some(seconds(1800)), 500), [0, 16, 32, 232, 432]);
        assert_eq!(sent(None, 300), [0, 16, 32, 232]);
        assert_eq!(sent(Some(seconds(30)), 45), [0, 10, 20, 30, 40]);
        assert_eq!(sent(Some(seconds(3)), 10), [0, 3, 6, 9], "never more often");
    }

    #[test]
    fn a_visitor_that_asks_is_answered_at_once_but_not_twice_in_three_seconds() {
        let mut imitation = Imitation::begin(seconds(0), seconds(200), None);
        let sent = (0..40).filter(|now| imitation.poll(seconds(*now))).count();
        assert_eq!(sent, 3);
        imitation.handle_solicitation(seconds(50));
        assert!(imitation.poll(seconds(50)));
        imitation.handle_solicitation(seconds(51));
        imitation.handle_solicitation(seconds(52));
        assert_eq!(imitation.due(), seconds(53));
        assert!(!imitation.poll(seconds(52)) && imitation.poll(seconds(53)));
        assert_eq!(imitation.due(), seconds(253));
    }

    proptest! {
        #[test]
        fn whatever_a_visitor_asks_its_port_is_not_flooded_and_not_forgotten(
            asks in prop::collection::btree_set(0u64..200_000, 0..200), at_most_s in 4u64..300,
        ) {
            let mut imitation = Imitation::begin(Duration::ZERO, seconds(at_most_s), None);
            let mut sent = vec![0];
            prop_assert!(imitation.poll(Duration::ZERO));
            for now_ms in asks {
                while imitation.due() <= Duration::from_millis(now_ms) {
                    let due = imitation.due();
                    prop_assert!(imitation.poll(due));
                    sent.push(due.as_millis() as u64);
                }
                imitation.handle_solicitation(Duration::from_millis(now_ms));
                prop_assert!(imitation.due() <= Duration::from_millis(now_ms) + LEAST_INTERVAL);
            }
            for pair in sent.windows(2) {
                prop_assert!((3000..=at_most_s * 1000).contains(&(pair[1] - pair[0])), "{:?}", pair);
            }
        }
    }
}
