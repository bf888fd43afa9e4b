//! Whether another host uses an address that this site attracts for a machine which is away (RFC 5227, RFC 4862).
//!
//! ```text
//!             somebody else claims it                silent for long enough, although asked
//!   ours ------------------------------> taken -----------------------------------------> ours
//!    ^                                     ^
//!    |  nobody answers three probes        |  somebody answers
//!    '--------- asking (after a restart) --'
//! ```
//!
//! What this host and the machine's own network card say is no claim; nor is a question whose asker has no address yet, as
//! it is answered like any other. An address that is taken is asked for again and again: its new owner may have nothing
//! to say by itself. It receives nothing, sends nothing and gives way to nobody: the gateway does.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::handover::Mac;
use super::policy::PortKey;

/// Probes before an address counts as nobody's (RFC 5227, 1.1: PROBE_NUM).
const PROBES: u32 = 3;
/// Between two of them. RFC 5227 has one to two seconds; connections stall for as long as this takes.
const PROBE_INTERVAL: Duration = Duration::from_millis(200);
/// Of the time in which somebody must answer, an address that is taken is asked for this often.
const PROBES_WHILE_TAKEN: u32 = 6;

/// Somebody says that an address is theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The address.
    pub address: IpAddr,
    /// Who says so.
    pub mac: Mac,
}

impl Claim {
    /// What an ARP packet claims (RFC 826), its Ethernet header left out: the sender has the sender's address. A probe
    /// names none.
    pub fn of_arp(packet: &[u8]) -> Option<Self> {
        let packet = packet.first_chunk::<28>()?;
        let [0, 1, 8, 0, 6, 4, 0, 1 | 2, ..] = packet else { return None };
        let mac = mac(packet[8..14].first_chunk()?)?;
        let address = Ipv4Addr::from(*packet[14..18].first_chunk::<4>()?);
        (!address.is_unspecified()).then_some(Self { address: address.into(), mac })
    }

    /// What a neighbour message claims (RFC 4861): an advertisement its target, a solicitation its source. Both only with
    /// the link-layer address beside it, and from this link.
    pub fn of_neighbour(source: Ipv6Addr, hop_limit: u8, message: &[u8]) -> Option<Self> {
        const FROM_THIS_LINK: u8 = 255;
        let header = message.first_chunk::<24>().filter(|_| hop_limit == FROM_THIS_LINK)?;
        let (address, option) = match header[0] {
            NEIGHBOUR_ADVERTISEMENT => {
                (Ipv6Addr::from(*header[8..24].first_chunk::<16>()?), TARGET_LINK_LAYER)
            }
            NEIGHBOUR_SOLICITATION => (source, SOURCE_LINK_LAYER),
            _ => return None,
        };
        let mac = link_layer(&message[24..], option)?;
        (!address.is_unspecified() && !address.is_multicast())
            .then_some(Self { address: address.into(), mac })
    }
}

/// ICMPv6's type of a neighbour solicitation.
pub const NEIGHBOUR_SOLICITATION: u8 = 135;
/// ICMPv6's type of a neighbour advertisement.
pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;

/// Options are a type, a length in units of eight bytes, and what they say.
fn link_layer(mut options: &[u8], wanted: u8) -> Option<Mac> {
    while let [kind, units, ..] = *options {
        if units == 0 {
            return None;
        }
        let option = options.get(..usize::from(units) * 8)?;
        if kind == wanted {
            return mac(option[2..8].first_chunk()?);
        }
        options = &options[option.len()..];
    }
    None
}

/// A host's own: neither nobody's nor a group's.
fn mac(bytes: &[u8; 6]) -> Option<Mac> {
    let is_group = bytes[0] & 1 == 1;
    (!is_group && *bytes != [0; 6]).then_some(Mac(*bytes))
}

/// What has been found out about an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The NIC it is attracted for.
    pub key: PortKey,
    /// The address.
    pub address: IpAddr,
    /// Who else has it; `None`: nobody, or nobody any more.
    pub taken_by: Option<Mac>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Ask on this device who has the address.
    Probe {
        /// The LAN's device.
        device: u32,
        /// The address.
        address: IpAddr,
        /// What this host answers with there.
        from: Mac,
    },
    /// Something has been found out.
    Found(Finding),
}

#[derive(Debug)]
struct Watched {
    key: PortKey,
    ours: [Mac; 2],
    state: State,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Asking { left: u32, next: Duration },
    Ours,
    Taken { by: Mac, heard: Duration, next: Duration },
}

/// A NIC whose addresses are attracted.
#[derive(Debug, Clone)]
pub struct Attracted {
    /// The NIC.
    pub key: PortKey,
    /// The LAN's device.
    pub device: u32,
    /// What this host answers with there, and the machine's own.
    pub ours: [Mac; 2],
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Nobody knows who has had them lately: ask.
    pub ask: bool,
}

/// The addresses that this site attracts.
#[derive(Debug)]
pub struct Duplicates {
    silent: Duration,
    watched: BTreeMap<(u32, IpAddr), Watched>,
}

impl Duplicates {
    /// None yet. Who takes an address has it until nothing was heard of them for `silent`.
    pub fn new(silent: Duration) -> Self {
        Self { silent, watched: BTreeMap::new() }
    }

    /// These addresses are attracted now. Those that are watched already stay as they are, unless they are to be asked for.
    pub fn watch(&mut self, now: Duration, attracted: &Attracted) {
        let state = if attracted.ask { State::Asking { left: PROBES, next: now } } else { State::Ours };
        for address in &attracted.addresses {
            let (key, ours) = (attracted.key.clone(), attracted.ours);
            let watched = self.watched.entry((attracted.device, *address));
            let watched = watched.or_insert(Watched { key, ours, state });
            if matches!(watched.state, State::Ours) {
                watched.state = state;
            }
        }
    }

    /// A NIC's addresses are no longer attracted.
    pub fn forget(&mut self, key: &PortKey) {
        self.watched.retain(|_, watched| watched.key != *key);
    }

    /// Takes a claim heard on `device`.
    pub fn handle_claim(&mut self, now: Duration, device: u32, claim: Claim) -> Option<Finding> {
        let watched = self.watched.get_mut(&(device, claim.address))?;
        if watched.ours.contains(&claim.mac) {
            return None;
        }
        let (was, next) = match watched.state {
            State::Taken { by, next, .. } => (Some(by), next),
            State::Asking { .. } | State::Ours => (None, now + self.silent / PROBES_WHILE_TAKEN),
        };
        watched.state = State::Taken { by: claim.mac, heard: now, next };
        let finding = Finding { key: watched.key.clone(), address: claim.address, taken_by: Some(claim.mac) };
        (was != Some(claim.mac)).then_some(finding)
    }

    /// What is due.
    pub fn poll(&mut self, now: Duration) -> Vec<Step> {
        let every = (self.silent / PROBES_WHILE_TAKEN).max(PROBE_INTERVAL);
        let mut steps = Vec::new();
        for ((device, address), watched) in &mut self.watched {
            let probe = Step::Probe { device: *device, address: *address, from: watched.ours[0] };
            let free = Finding { key: watched.key.clone(), address: *address, taken_by: None };
            match &mut watched.state {
                State::Asking { left: 0, next } if *next <= now => {
                    watched.state = State::Ours;
                    steps.push(Step::Found(free));
                }
                State::Asking { left, next } if *next <= now => {
                    (*left, *next) = (*left - 1, now + PROBE_INTERVAL);
                    steps.push(probe);
                }
                State::Taken { heard, .. } if now.saturating_sub(*heard) >= self.silent => {
                    watched.state = State::Ours;
                    steps.push(Step::Found(free));
                }
                State::Taken { next, .. } if *next <= now => {
                    *next = now + every;
                    steps.push(probe);
                }
                State::Asking { .. } | State::Ours | State::Taken { .. } => {}
            }
        }
        steps
    }

    /// When [`Duplicates::poll`] has something to say next.
    pub fn due(&self) -> Option<Duration> {
        let due = |watched: &Watched| match watched.state {
            State::Asking { next, .. } => Some(next),
            State::Taken { heard, next, .. } => Some(next.min(heard + self.silent)),
            State::Ours => None,
        };
        self.watched.values().filter_map(due).min()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAN: u32 = 3;
    const HOST: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const GUEST: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 3]);
    const SILENT: Duration = Duration::from_secs(60);

    fn home() -> IpAddr {
        "198.51.100.10".parse().unwrap()
    }

    fn watched(ask: bool) -> Duplicates {
        let mut duplicates = Duplicates::new(SILENT);
        let key = PortKey { machine: "web1".parse().unwrap(), nic: "net0".parse().unwrap() };
        let attracted = Attracted { key, device: LAN, ours: [HOST, GUEST], addresses: vec![home()], ask };
        duplicates.watch(Duration::ZERO, &attracted);
        duplicates
    }

    fn claim(mac: Mac) -> Claim {
        Claim { address: home(), mac }
    }

    fn taken_by(step: &Step) -> Option<Option<Mac>> {
        match step {
            Step::Found(finding) => Some(finding.taken_by),
            Step::Probe { .. } => None,
        }
    }

    fn arp(operation: u8, mac: Mac, address: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation];
        packet.extend(mac.0);
        packet.extend(address);
        packet.extend([0; 10]);
        packet
    }

    fn neighbour(kind: u8, target: &str, option: &[u8]) -> Vec<u8> {
        let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        message.extend(target.parse::<Ipv6Addr>().unwrap().octets());
        message.extend(option);
        message
    }

    #[test]
    fn arp_claims_the_senders_address_and_a_probe_claims_none() {
        let address = [198, 51, 100, 10];
        for operation in [1, 2] {
            assert_eq!(Claim::of_arp(&arp(operation, OTHER, address)), Some(claim(OTHER)));
        }
        assert_eq!(Claim::of_arp(&arp(1, OTHER, [0; 4])), None, "a probe");
        assert_eq!(Claim::of_arp(&arp(3, OTHER, address)), None, "not ARP's");
        assert_eq!(Claim::of_arp(&arp(1, Mac([0xff; 6]), address)), None, "no host's");
        assert_eq!(Claim::of_arp(&arp(1, OTHER, address)[..27]), None, "cut short");
    }

    #[test]
    fn a_neighbour_claims_its_target_or_its_source_but_not_from_another_link() {
        let (at, source): (Ipv6Addr, _) = ("2001:db8::10".parse().unwrap(), "fe80::1".parse().unwrap());
        let option = |kind: u8| [&[14, 1, 0, 0, 0, 0, 0, 0, kind, 1][..], &OTHER.0].concat();
        let said = Some(Claim { address: at.into(), mac: OTHER });
        let advertised = neighbour(NEIGHBOUR_ADVERTISEMENT, "2001:db8::10", &option(TARGET_LINK_LAYER));
        assert_eq!(Claim::of_neighbour(source, 255, &advertised), said);
        assert_eq!(Claim::of_neighbour(source, 254, &advertised), None);
        assert_eq!(Claim::of_neighbour(source, 255, &advertised[..30]), None, "an option cut short");
        let asked = neighbour(NEIGHBOUR_SOLICITATION, "2001:db8::1", &option(SOURCE_LINK_LAYER));
        assert_eq!(Claim::of_neighbour(at, 255, &asked), said);
        let probe = neighbour(NEIGHBOUR_SOLICITATION, "2001:db8::10", &[]);
        assert_eq!(Claim::of_neighbour(Ipv6Addr::UNSPECIFIED, 255, &probe), None);
    }

    #[test]
    fn another_host_is_told_once_and_until_it_was_silent_although_it_was_asked() {
        let mut duplicates = watched(false);
        for mac in [HOST, GUEST] {
            assert_eq!(duplicates.handle_claim(Duration::ZERO, LAN, claim(mac)), None);
        }
        assert_eq!(duplicates.handle_claim(Duration::ZERO, LAN + 1, claim(OTHER)), None, "another LAN");
        assert_eq!(duplicates.due(), None);
        let at = Duration::from_secs(5);
        let found = duplicates.handle_claim(at, LAN, claim(OTHER)).unwrap();
        assert_eq!((found.address, found.taken_by), (home(), Some(OTHER)));
        assert_eq!(duplicates.handle_claim(at, LAN, claim(OTHER)), None, "the same again");
        let mut probes = 0;
        let (over, now) = loop {
            let now = duplicates.due().unwrap();
            match duplicates.poll(now).first() {
                Some(Step::Probe { .. }) => probes += 1,
                Some(Step::Found(finding)) => break (finding.taken_by, now),
                None => panic!("due, and nothing to say"),
            }
        };
        assert_eq!((over, now, probes), (None, at + SILENT, PROBES_WHILE_TAKEN - 1));
    }

    #[test]
    fn after_a_restart_it_is_asked_for_three_times_before_it_is_ours() {
        let mut duplicates = watched(true);
        let mut steps = Vec::new();
        while let Some(due) = duplicates.due() {
            assert!(due <= Duration::from_secs(1), "connections wait for this");
            steps.extend(duplicates.poll(due));
        }
        assert_eq!(steps.iter().map(taken_by).collect::<Vec<_>>(), [None, None, None, Some(None)]);
        let mut duplicates = watched(true);
        duplicates.poll(Duration::ZERO);
        assert!(duplicates.handle_claim(Duration::ZERO, LAN, claim(OTHER)).is_some());
        assert_eq!(duplicates.poll(PROBE_INTERVAL), [], "it is not said to be ours");
    }

    proptest! {
        /// Whatever is heard and when: what was said last is what was last heard, or silence for the whole time.
        #[test]
        fn an_address_is_never_ours_within_the_silence_after_a_claim(
            events in prop::collection::vec((0_u64..40, any::<bool>()), 1..60)
        ) {
            let mut duplicates = watched(false);
            let (mut now, mut heard, mut taken) = (Duration::ZERO, None, false);
            for (step, claims) in events {
                now += Duration::from_secs(step);
                for step in duplicates.poll(now) {
                    if let Some(by) = taken_by(&step) {
                        prop_assert!(taken && by.is_none());
                        taken = false;
                    }
                }
                if claims {
                    let found = duplicates.handle_claim(now, LAN, claim(OTHER));
                    prop_assert_eq!(found.is_some(), !taken);
                    (heard, taken) = (Some(now), true);
                }
                let recently = heard.is_some_and(|at| now - at < SILENT);
                prop_assert_eq!(taken, recently);
            }
        }

        #[test]
        fn whatever_is_heard_is_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Claim::of_arp(&bytes);
            let _ = Claim::of_neighbour(Ipv6Addr::LOCALHOST, 255, &bytes);
        }
    }
}
