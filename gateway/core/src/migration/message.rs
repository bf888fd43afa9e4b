//! What the two machines of one migration say to each other, and why something is refused.
//!
//! Every message may be lost, doubled or late: a machine repeats what it still needs answered and
//! ignores what no longer fits. Local errors never travel; they are mapped to [`Refusal`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::ids::{DeviceName, Epoch, SiteName};
use crate::machine::MachineDefinition;
use crate::migration::CommitMode;
use crate::tunnel::handover::{NeighbourKind, NicHandover, Prefix};
use crate::tunnel::routers::MAX_ADVERTISERS;

/// The longest text a refusal carries, in bytes; longer ones are cut.
pub const MAX_REASON: usize = 512;

/// One message of one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationMessage {
    /// Source, stage 0: may this machine come, and could it run?
    Propose(Box<Proposal>),
    /// Destination: yes. Nothing is held yet.
    Accept,
    /// Source, stage 1: hold what it needs.
    Reserve {
        /// The epoch this migration would create.
        epoch: Epoch,
    },
    /// Destination: everything is held and a QEMU waits for the machine. Also the answer to a pipelined Commit that was there
    /// before the last byte.
    Reserved(Reservation),
    /// Destination: no, or not any more. Not durable, and only before `Loaded`.
    Decline(Refusal),
    /// Destination, stage 3: state and disks are here and proven.
    Loaded {
        /// The epoch that would begin.
        epoch: Epoch,
    },
    /// Source, stage 4: the machine is yours. Sent only after `Committed`, or with an arbiter `Promised`, is
    /// durable.
    Commit {
        /// The epoch that begins.
        epoch: Epoch,
        /// What keeps its connections alive.
        handover: Box<Handover>,
    },
    /// Destination: the guest runs here. Sent only after `Activated` is durable.
    Activated {
        /// The epoch that began.
        epoch: Epoch,
    },
    /// Destination: durably refused or handed back. It will never run the machine under this epoch.
    Refused {
        /// The refused epoch.
        epoch: Epoch,
        /// Why.
        why: Refusal,
    },
    /// Source: the attempt is over; forget it. After `Committed`, pipelined, a question: a destination that does
    /// not own the machine yet is to refuse it.
    Abort {
        /// The epoch that will not begin.
        epoch: Epoch,
        /// Why.
        why: Refusal,
    },
    /// Destination: it has no record of this migration. Not a refusal.
    Unknown,
    /// Source: an operator took the machine back while the destination was gone.
    TakenBack {
        /// The epoch that began at the source.
        epoch: Epoch,
    },
    /// Source, stage 4 with an arbiter: win the epoch at the register and the machine is yours. Sent only after
    /// `Offered` is durable.
    Offer {
        /// The epoch that would begin.
        epoch: Epoch,
        /// What keeps its connections alive.
        handover: Box<Handover>,
    },
}

/// What the source asks the destination to take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The machine, without anything of the source's own paths and names.
    pub definition: MachineDefinition,
    /// The site at which the home addresses live.
    pub home_site: SiteName,
    /// The source's hypervisor version, for the destination's check.
    pub hypervisor: String,
    /// The epoch the machine is in now.
    pub epoch: Epoch,
    /// The user had not paused it: it is to run at the other side.
    pub running: bool,
    /// How it is handed over.
    pub commit: CommitMode,
    /// Its NICs' addresses and neighbours; flows come with [`Handover`].
    pub nics: Vec<NicHandover>,
    /// Addresses that it had at sites it has visited, and at which clients may still reach it.
    pub carried: Vec<Carried>,
}

/// A care-of address of an earlier visit. Its site attracts it, and packets to it travel to the machine, wherever it
/// is, for as long as connections are left that were opened there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// The NIC in the machine's definition.
    pub nic: DeviceName,
    /// The address the guest believes it has.
    pub home: IpAddr,
    /// The address its clients dialled.
    pub addr: IpAddr,
    /// The site that attracts it.
    pub site: SiteName,
}

/// Addresses of earlier visits that one machine may take along. More are left behind, oldest first.
pub const MAX_CARRIED: usize = 16;

/// What the destination holds for the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// The address at the visited site for each home address that gets one.
    pub care_of: Vec<CareOf>,
    /// How many pages of its memory this site remembers while they travel ([`crate::wan`]).
    pub shadow_pages: u32,
    /// How much of each disk's stream it remembers, as the exponent of two.
    pub disk_window_log: u32,
    /// The digest of the memory that it remembers of the machine from an earlier move ([`crate::wan::Remembered`]).
    pub memory_base: Option<[u8; 32]>,
}

/// One home address and its stand-in at the visited site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CareOf {
    /// The NIC in the machine's definition.
    pub nic: DeviceName,
    /// The address the guest believes it has.
    pub home: Prefix,
    /// The address new clients are sent to.
    pub addr: IpAddr,
}

/// What travels with the commitment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// Per NIC: neighbours and flows as they were when the guest stopped.
    pub nics: Vec<NicHandover>,
}

/// Flows of all NICs together that are handed over: what fits a frame, all of them of IPv6 with the longest encoding
/// (42 bytes). The machine's guest stands still until they have travelled: 1 MB for 65,000 of IPv4.
pub const MAX_HANDED_FLOWS: usize = 98_000;

impl Handover {
    /// Leaves out the flows beyond [`MAX_HANDED_FLOWS`]; says how many. Those connections live on if their other end
    /// is the next to send.
    pub fn bound_flows(&mut self) -> usize {
        let mut room = MAX_HANDED_FLOWS;
        let mut left_out = 0;
        for nic in &mut self.nics {
            left_out += nic.flows.len().saturating_sub(room);
            nic.flows.truncate(room);
            room -= nic.flows.len();
        }
        left_out
    }
}

/// Why one side does not take part: the closed set that travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Policy: this peer may not send or receive this machine.
    #[error("Site {site} does not allow this machine: {rule}")]
    NotAllowed {
        /// The refusing site.
        site: SiteName,
        /// The rule, by its configuration key.
        rule: String,
    },
    /// The machine is already moving or already there.
    #[error("Machine is busy: {0}")]
    Busy(String),
    /// Not enough of something.
    #[error("Not enough {what}: {wanted} wanted, {available} available")]
    NotEnough {
        /// Memory, disk or care-of addresses.
        what: String,
        /// As text with unit.
        wanted: String,
        /// As text with unit.
        available: String,
    },
    /// The hypervisor or the site's configuration cannot run it.
    #[error("Cannot run this machine: {0}")]
    Incompatible(String),
    /// Something in it cannot travel.
    #[error("Machine cannot travel: {0}")]
    CannotTravel(String),
    /// The name service would not follow.
    #[error("Names cannot follow: {0}")]
    Names(String),
    /// The state that arrived is not the state that left.
    #[error("Verification failed: {0}")]
    Verification(String),
    /// The link was away too long.
    #[error("Link to the other site was down too long: {0}")]
    Link(String),
    /// The hypervisor failed.
    #[error("Hypervisor failed: {0}")]
    Hypervisor(String),
    /// An operator ended it.
    #[error("Aborted by the operator")]
    Operator,
    /// A gateway was restarted in the middle.
    #[error("Gateway at site {0} was restarted during the attempt")]
    Restarted(SiteName),
    /// The peer sent what its state does not allow.
    #[error("Peer misbehaved: {0}")]
    PeerMisbehaved(String),
    /// Anything local that has no name of its own.
    #[error("{0}")]
    Other(String),
    /// The guest was paused for longer than it may be, and runs again at the source.
    #[error("Guest stood still past its pause budget and was resumed")]
    PauseBudget,
    /// The guest changes itself faster than the link carries it, and may not be slowed down.
    #[error("The copy never ends, because {0}: allow it to be slowed down, or move it when it does less")]
    Diverges(String),
}

impl Proposal {
    /// Whether what is said of the machine's NICs fits its definition: routes are made from the one, and the
    /// other is what was checked.
    ///
    /// # Errors
    ///
    /// [`Refusal::PeerMisbehaved`] with the NIC that differs.
    pub fn check_nics(&self) -> Result<(), Refusal> {
        self.check_carried()?;
        let defined = &self.definition.nics;
        if self.nics.len() != defined.len() {
            let text = format!("{} NICs are defined, {} are described", defined.len(), self.nics.len());
            return Err(Refusal::PeerMisbehaved(text));
        }
        for (nic, handed) in defined.iter().zip(&self.nics) {
            if (&nic.name, nic.mac, &nic.home) != (&handed.nic, handed.mac, &handed.home) {
                let text = format!("NIC {} has other addresses than it is defined with", nic.name);
                return Err(Refusal::PeerMisbehaved(text));
            }
            check_advertisers(handed)?;
        }
        Ok(())
    }
}

impl Proposal {
    /// Each carried address stands for a home address of the machine, of the same IP version, and is given once.
    fn check_carried(&self) -> Result<(), Refusal> {
        if self.carried.len() > MAX_CARRIED {
            let text = format!("{} carried addresses; {MAX_CARRIED} are allowed", self.carried.len());
            return Err(Refusal::PeerMisbehaved(text));
        }
        let mut known: BTreeSet<IpAddr> =
            self.definition.nics.iter().flat_map(|nic| nic.home.iter().map(|home| home.addr)).collect();
        for carried in &self.carried {
            let nic = self.definition.nics.iter().find(|nic| nic.name == carried.nic);
            let stands = nic.is_some_and(|nic| nic.home.iter().any(|home| home.addr == carried.home));
            let same_version = carried.home.is_ipv4() == carried.addr.is_ipv4();
            if !stands || !same_version || !known.insert(carried.addr) {
                let text = format!("Carried address {} stands for no address of the machine", carried.addr);
                return Err(Refusal::PeerMisbehaved(text));
            }
        }
        Ok(())
    }
}

/// Routers of the home LAN that the destination would imitate: few, and with addresses that a guest takes one from.
fn check_advertisers(nic: &NicHandover) -> Result<(), Refusal> {
    let advertisers = || nic.neighbours.iter().filter(|it| matches!(it.kind, NeighbourKind::Advertiser(_)));
    let refuse = |what: String| Err(Refusal::PeerMisbehaved(format!("NIC {}: {what}", nic.nic)));
    if advertisers().count() > MAX_ADVERTISERS {
        return refuse(format!("more than {MAX_ADVERTISERS} routers advertise"));
    }
    for advertiser in advertisers() {
        if !advertiser.advertises().is_some_and(|(source, _)| source.is_unicast_link_local()) {
            return refuse(format!("a router advertises from {}", advertiser.addr));
        }
    }
    Ok(())
}

impl Refusal {
    /// Text cut to [`MAX_REASON`] bytes at a character boundary, so that a frame stays bounded.
    pub fn text(reason: impl Into<String>) -> String {
        let mut reason = reason.into();
        if reason.len() > MAX_REASON {
            let end = (0..=MAX_REASON).rev().find(|at| reason.is_char_boundary(*at)).unwrap_or(0);
            reason.truncate(end);
        }
        reason
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::advertisement::Advertisement;
    use crate::tunnel::handover::{Mac, Neighbour};

    fn proposal() -> Proposal {
        let definition = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n\
            [[nics]]\nname = \"lan\"\nmac = \"52:54:00:00:00:01\"\nhome = [\"198.51.100.10/24\"]\n\
            lan = \"lan\"\npci = \"05.0\"\n";
        let definition: MachineDefinition = toml::from_str(definition).unwrap();
        let nics = definition.nics.iter().map(|nic| NicHandover {
            nic: nic.name.clone(),
            mac: nic.mac,
            home: nic.home.clone(),
            neighbours: Vec::new(),
            home_prefixes: Vec::new(),
            flows: Vec::new(),
        });
        Proposal {
            nics: nics.collect(),
            definition,
            home_site: "a".parse().unwrap(),
            hypervisor: "7.2".into(),
            epoch: Epoch(0),
            running: true,
            commit: CommitMode::Confirmed,
            carried: Vec::new(),
        }
    }

    fn carried(home: &str, addr: &str) -> Carried {
        let (home, addr) = (home.parse().unwrap(), addr.parse().unwrap());
        Carried { nic: "lan".parse().unwrap(), home, addr, site: "b".parse().unwrap() }
    }

    #[test]
    fn a_carried_address_stands_for_one_of_the_machines_own_and_is_given_once() {
        let check = |carried: Vec<Carried>| Proposal { carried, ..proposal() }.check_nics();
        let good = || carried("198.51.100.10", "203.0.113.200");
        assert_eq!(check(vec![good()]), Ok(()));
        assert!(check(vec![good(), good()]).is_err(), "twice");
        assert!(check(vec![carried("198.51.100.11", "203.0.113.200")]).is_err(), "another's home");
        assert!(check(vec![carried("198.51.100.10", "2001:db8::1")]).is_err(), "another version");
        assert!(check(vec![carried("198.51.100.10", "198.51.100.10")]).is_err(), "its home address itself");
        let many = |n: u8| (0..n).map(|i| carried("198.51.100.10", &format!("203.0.113.{i}"))).collect();
        assert_eq!(check(many(MAX_CARRIED as u8)), Ok(()));
        assert!(check(many(MAX_CARRIED as u8 + 1)).is_err());
    }

    #[test]
    fn routers_that_advertise_are_few_and_link_local() {
        let header = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        let kind = NeighbourKind::Advertiser(Box::new(Advertisement::parse(&header).unwrap()));
        let check = |addrs: &[String]| {
            let mut proposal = proposal();
            let mac = Mac([2, 0, 0, 0, 0, 1]);
            let neighbour =
                |addr: &String| Neighbour { addr: addr.parse().unwrap(), mac, kind: kind.clone() };
            proposal.nics[0].neighbours = addrs.iter().map(neighbour).collect();
            proposal.check_nics()
        };
        let many = |n: usize| (1..=n).map(|i| format!("fe80::{i}")).collect::<Vec<_>>();
        assert_eq!(check(&many(MAX_ADVERTISERS)), Ok(()));
        assert!(check(&many(MAX_ADVERTISERS + 1)).is_err());
        for other in ["2001:db8::1", "198.51.100.1", "ff02::1"] {
            assert!(check(&[other.to_owned()]).is_err(), "{other}");
        }
    }

    #[test]
    fn nics_that_are_described_otherwise_than_defined_are_refused() {
        assert_eq!(proposal().check_nics(), Ok(()));
        let changes: [fn(&mut Proposal); 5] = [
            |it| it.nics[0].home[0].addr = "198.51.100.2".parse().unwrap(),
            |it| it.nics[0].home.clear(),
            |it| it.nics[0].mac = Mac([2, 0, 0, 0, 0, 9]),
            |it| it.nics[0].nic = "other".parse().unwrap(),
            |it| it.nics.push(it.nics[0].clone()),
        ];
        for change in changes {
            let mut proposal = proposal();
            change(&mut proposal);
            assert!(matches!(proposal.check_nics(), Err(Refusal::PeerMisbehaved(_))), "{proposal:?}");
        }
    }
}
