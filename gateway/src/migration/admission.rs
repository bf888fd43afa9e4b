//! What a destination answers to a proposal: policy, capabilities, room. Holds nothing, but room that
//! partial disks take is made.
//!
//! Everything is denied that the peer's table does not allow. The answer names the rule or the figure,
//! so that the operator at the other site knows what to change and where.

use std::collections::BTreeSet;
use std::net::IpAddr;

use longhaul_core::ids::{Epoch, SiteName, VmName};
use longhaul_core::machine::MachineDefinition;
use longhaul_core::memory::PAGE_BYTES;
use longhaul_core::migration::CommitMode;
use longhaul_core::migration::arbiter::Arbiter;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{CareOf, Carried, Proposal, Refusal, Reservation};
use longhaul_core::units::Bytes;
use longhaul_core::wan::MAX_SHADOW_PAGES;

use super::{Edges, MachineRow, descriptors, host, journal_room, neighbourhood, partial};
use crate::config::Config;

/// What this host has left.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Memory that machines may take.
    pub memory: Bytes,
    /// Space in the pool.
    pub disk: Bytes,
}

/// Whether `peer` may bring this machine here, by the configuration alone.
pub fn check_policy(config: &Config, peer: &SiteName, proposal: &Proposal) -> Result<(), Refusal> {
    let vm = &proposal.definition.name;
    let denied = |rule: String| Refusal::NotAllowed { site: config.site.name.clone(), rule };
    let Some(policy) = config.peer(peer) else {
        return Err(denied(format!("[[peer]] {peer} is not configured")));
    };
    if !policy.may_send(vm.as_str()) {
        return Err(denied(format!("peer.{peer}.may_send does not name {vm}")));
    }
    if proposal.definition.memory_mib > policy.max_memory_mib {
        return Err(denied(format!("peer.{peer}.max_memory_mib is {}", policy.max_memory_mib)));
    }
    let disk: u64 = proposal.definition.volumes().map(|volume| volume.size_bytes).sum();
    if disk > policy.max_disk_gib << 30 {
        return Err(denied(format!("peer.{peer}.max_disk_gib is {}", policy.max_disk_gib)));
    }
    Ok(())
}

/// Whether both sites mean the same by a hand-over.
fn check_arbiter(config: &Config, peer: &SiteName, proposal: &Proposal) -> Result<(), Refusal> {
    let here = config.peer(peer).and_then(|policy| policy.arbiter.arbiter());
    if here == proposal.commit.arbiter() {
        return Ok(());
    }
    let rule = format!("peer.{peer}.arbiter is not what the other site has: set it to the same at both");
    Err(Refusal::NotAllowed { site: config.site.name.clone(), rule })
}

/// With an arbiter this site must be able to win the register, not only the source.
async fn check_register(edges: &Edges, proposal: &Proposal) -> Result<(), Refusal> {
    match proposal.commit {
        CommitMode::Confirmed | CommitMode::Pipelined => Ok(()),
        CommitMode::Arbitrated(Arbiter::Dns) => check_name(edges, proposal).await,
        CommitMode::Arbitrated(Arbiter::Etcd) => check_etcd(edges, proposal).await,
    }
}

async fn check_name(edges: &Edges, proposal: &Proposal) -> Result<(), Refusal> {
    let Some(names) = &edges.names else { return Ok(()) };
    let definition = &proposal.definition;
    let Some(name) = &definition.dns_name else {
        return Err(Refusal::Names("with this arbiter the machine needs a dns_name".into()));
    };
    let home: Vec<_> = definition.nics.iter().flat_map(|nic| nic.home.iter().map(|home| home.addr)).collect();
    names.check(name, &home, proposal.epoch.next()).await.map(drop).map_err(|error| {
        Refusal::Names(Refusal::text(format!("site {}: {}", edges.site(), super::chain(&error))))
    })
}

async fn check_etcd(edges: &Edges, proposal: &Proposal) -> Result<(), Refusal> {
    let Some(registers) = &edges.etcd else {
        return Err(Refusal::Other(format!(
            "Arbiter is etcd, but site {} has no [etcd]; add it",
            edges.site()
        )));
    };
    let checked = registers.check(&proposal.definition.name, proposal.epoch.next()).await;
    checked.map(drop).map_err(|error| {
        let text = format!("Arbiter would not decide at site {}: {}", edges.site(), super::chain(&error));
        Refusal::Other(Refusal::text(text))
    })
}

/// Whether one more machine of `peer` may come while `arriving` of them are on their way.
pub fn check_arriving(config: &Config, peer: &SiteName, arriving: usize) -> Result<(), Refusal> {
    let limit = config.peer(peer).map_or(0, |policy| policy.max_arriving);
    if arriving < limit as usize {
        return Ok(());
    }
    Err(Refusal::Busy(format!(
        "{arriving} machines are coming from {peer}; peer.{peer}.max_arriving is {limit}"
    )))
}

/// Whether `peer` can be the machine's owner, by what this site `known` of it: nobody gives away what he
/// handed over himself in a later epoch, or never had. `at`: where its anchor here looks for it, until that site says
/// that it handed it on; another's word for that is not enough.
pub fn check_epoch(
    known: Option<&Ownership>,
    at: Option<&SiteName>,
    peer: &SiteName,
    proposal: &Proposal,
) -> Result<(), Refusal> {
    let (vm, epoch) = (&proposal.definition.name, proposal.epoch);
    let (owner, known) = match known {
        Some(Ownership::Away { site, epoch }) => (Some(site), *epoch),
        Some(
            Ownership::Here { epoch } | Ownership::Arriving { epoch } | Ownership::Offered { epoch, .. },
        ) => (None, *epoch),
        None => (None, Epoch(0)),
    };
    if epoch > Epoch::MAX_FROM_PEER {
        return Err(Refusal::PeerMisbehaved(format!(
            "{vm} is proposed in epoch {epoch}, which no machine reaches"
        )));
    }
    if epoch < known && owner.is_some() {
        return Err(Refusal::PeerMisbehaved(format!(
            "{vm} is proposed in epoch {epoch}, and was in {known} since"
        )));
    }
    match owner {
        Some(owner) if epoch == known && owner != peer => Err(Refusal::PeerMisbehaved(format!(
            "{vm} was handed over to {owner} in epoch {epoch}, not to {peer}"
        ))),
        Some(_) => check_whereabouts(at, peer, vm),
        None => Ok(()),
    }
}

/// Busy and not misbehaviour: the other site's word may be late.
fn check_whereabouts(at: Option<&SiteName>, peer: &SiteName, vm: &VmName) -> Result<(), Refusal> {
    match at {
        Some(at) if at != peer => Err(Refusal::Busy(Refusal::text(format!(
            "{vm} is known to be at site {at}, which has not said that it handed it on to {peer}; if {at} is gone for \
             good, say here: longhaul moved {vm} --to {peer}"
        )))),
        Some(_) | None => Ok(()),
    }
}

/// Whether there is room.
pub fn check_room(config: &Config, room: Room, proposal: &Proposal) -> Result<(), Refusal> {
    let not_enough = |what: &str, wanted: Bytes, available: Bytes| Refusal::NotEnough {
        what: what.into(),
        wanted: wanted.to_string(),
        available: available.to_string(),
    };
    let memory = proposal.definition.memory();
    let free = Bytes(room.memory.0.saturating_sub(config.hypervisor.keep_free_mib << 20));
    if memory > free {
        return Err(not_enough("memory", memory, free));
    }
    let disk = Bytes(proposal.definition.volumes().map(|volume| volume.size_bytes).sum());
    let free = Bytes(room.disk.0.saturating_sub(config.storage.keep_free_gib << 30));
    if disk > free {
        return Err(not_enough("disk space", disk, free));
    }
    Ok(())
}

/// How many pages of a machine's memory are remembered here while it travels.
pub fn shadow_pages(config: &Config, definition: &MachineDefinition) -> u32 {
    let allowed = u64::from(config.migration.shadow_mib) << 20;
    let pages = allowed.min(definition.memory().0) / PAGE_BYTES as u64;
    // The configuration was checked: 16 GiB at most.
    u32::try_from(pages).unwrap_or(MAX_SHADOW_PAGES).min(MAX_SHADOW_PAGES)
}

/// How much of a disk's stream is remembered here, as the exponent of two.
pub fn disk_window_log(config: &Config) -> u32 {
    (u64::from(config.migration.disk_window_mib.max(1)) << 20).ilog2()
}

/// Offers no more to remember than there is memory for beside the machine itself: half of what is left, and of that the
/// smaller part for disks.
pub fn fit_memory(config: &Config, free: Bytes, definition: &MachineDefinition, offer: &mut Reservation) {
    let taken = (config.hypervisor.keep_free_mib << 20).saturating_add(definition.memory().0);
    let room = free.0.saturating_sub(taken) / 2;
    let disks = definition.volumes().count() as u64;
    while offer.disk_window_log > 20 && disks << offer.disk_window_log > room / 4 {
        offer.disk_window_log -= 1;
    }
    let room = room.saturating_sub(disks << offer.disk_window_log);
    offer.shadow_pages = offer.shadow_pages.min(u32::try_from(room / SHADOW_PAGE_BYTES).unwrap_or(u32::MAX));
}

/// What a remembered page takes with its place in the index, in bytes.
const SHADOW_PAGE_BYTES: u64 = 4300;

/// A care-of address for every home address that can have one, none of them `taken`; the same as at an earlier visit if
/// that is still attracted here. A machine that comes home needs none.
pub fn reserve(
    config: &Config,
    taken: &BTreeSet<IpAddr>,
    proposal: &Proposal,
) -> Result<Reservation, Refusal> {
    let (shadow_pages, disk_window_log) =
        (shadow_pages(config, &proposal.definition), disk_window_log(config));
    if proposal.home_site == config.site.name {
        return Ok(Reservation { care_of: Vec::new(), shadow_pages, disk_window_log, memory_base: None });
    }
    let mut taken = taken.clone();
    // Another site may have the same private addresses.
    let elsewhere = proposal.carried.iter().filter(|carried| carried.site != config.site.name);
    taken.extend(elsewhere.map(|carried| carried.addr));
    let mut care_of = Vec::new();
    for nic in &proposal.definition.nics {
        let Some(lan) = config.lan.get(nic.lan.as_str()) else {
            return Err(Refusal::Incompatible(format!("site {} has no [lan.{}]", config.site.name, nic.lan)));
        };
        let pool = lan.care_of_addresses().map_err(Refusal::Other)?;
        for home in &nic.home {
            let family: Vec<&IpAddr> =
                pool.iter().filter(|addr| addr.is_ipv4() == home.addr.is_ipv4()).collect();
            if family.is_empty() {
                // No pool of this family: old connections follow, new clients use the other family.
                continue;
            }
            let had = |addr: &&IpAddr| {
                let mine = |carried: &Carried| (carried.home, carried.addr) == (home.addr, **addr);
                proposal.carried.iter().any(|carried| carried.site == config.site.name && mine(carried))
            };
            let mut free = family.iter().filter(|addr| !taken.contains(**addr));
            let again = family.iter().find(|addr| had(addr) && !taken.contains(**addr));
            let Some(addr) = again.or_else(|| free.next()) else {
                return Err(Refusal::NotEnough {
                    what: format!("free care-of addresses in lan.{}", nic.lan),
                    wanted: "1".into(),
                    available: "0".into(),
                });
            };
            taken.insert(**addr);
            care_of.push(CareOf { nic: nic.name.clone(), home: *home, addr: **addr });
        }
    }
    if care_of.is_empty() && proposal.definition.dns_name.is_some() {
        return Err(Refusal::NotEnough {
            what: "care-of addresses".into(),
            wanted: "1".into(),
            available: "0".into(),
        });
    }
    Ok(Reservation { care_of, shadow_pages, disk_window_log, memory_base: None })
}

/// A machine has one home. What comes home is what has left there, with the same addresses and the same name: it gets
/// a place on the LAN's bridge, and this site's key moves its name.
pub fn check_home(known: Option<&MachineRow>, site: &SiteName, proposal: &Proposal) -> Result<(), Refusal> {
    let home_is_here = proposal.home_site == *site;
    let known = known.filter(|row| row.home_site == *site);
    let (known, definition) = match (known, home_is_here) {
        (None, false) => return Ok(()),
        (None, true) => {
            let text = format!("site {site} is not the home of a machine {}", proposal.definition.name);
            return Err(Refusal::PeerMisbehaved(text));
        }
        (Some(known), _) => (&known.definition, &proposal.definition),
    };
    let same_name = known.dns_name == definition.dns_name;
    let nics = |definition: &MachineDefinition| -> Vec<_> {
        definition.nics.iter().map(|nic| (nic.name.clone(), nic.mac, nic.home.clone())).collect()
    };
    if home_is_here && same_name && nics(known) == nics(definition) {
        return Ok(());
    }
    let text = format!(
        "{} left its home {site} with other addresses, another name or another home",
        definition.name
    );
    Err(Refusal::PeerMisbehaved(text))
}

/// Everything that is asked before a proposal is accepted.
pub async fn admit(edges: &Edges, peer: &SiteName, proposal: &Proposal) -> Result<(), Refusal> {
    check_policy(&edges.config, peer, proposal)?;
    check_arbiter(&edges.config, peer, proposal)?;
    journal_room::check(&edges.config)?;
    descriptors::check(&edges.config)?;
    proposal.check_nics()?;
    let known = edges.journal.machine(&proposal.definition.name);
    let known = known.map_err(|error| Refusal::Other(Refusal::text(super::chain(&error))))?;
    check_home(known.as_ref(), edges.site(), proposal)?;
    check_homes(edges, proposal).await?;
    neighbourhood::check_visitor(edges, proposal)?;
    check_register(edges, proposal).await?;
    let (storage, vm) = (&edges.config.storage, &proposal.definition.name);
    let kept = partial::kept_for(&storage.pool, vm, peer);
    let disk: u64 = proposal.definition.volumes().map(|volume| volume.size_bytes).sum();
    partial::make_room(storage, Bytes(disk.saturating_sub(kept.0)), Some(vm));
    let mut room = room(edges)?;
    room.disk.0 += kept.0;
    check_room(&edges.config, room, proposal)?;
    let host = edges.hypervisor.capabilities().await.map_err(super::hypervisor_failed)?;
    proposal.definition.check(&host).map_err(|error| Refusal::Incompatible(Refusal::text(error.to_string())))
}

/// A route to a visitor must not take the place of one that this host needs.
async fn check_homes(edges: &Edges, proposal: &Proposal) -> Result<(), Refusal> {
    let host = match proposal.home_site == *edges.site() {
        true => host::as_home(edges).await,
        false => host::as_visited(edges).await,
    };
    let host = host.map_err(super::park::tunnel_failed)?;
    host::check(&host, &proposal.definition)
        .map_err(|needed| Refusal::Incompatible(format!("{needed} (at site {})", edges.site())))
}

fn room(edges: &Edges) -> Result<Room, Refusal> {
    let pool = &edges.config.storage.pool;
    let space = nix::sys::statvfs::statvfs(pool).map_err(|error| {
        Refusal::Other(format!("the pool of site {} cannot be looked at: {error}", edges.site()))
    })?;
    let disk = Bytes(space.blocks_available() * space.fragment_size());
    Ok(Room { memory: available_memory(), disk })
}

/// What the kernel says can be taken without swapping (`MemAvailable` of `/proc/meminfo`).
pub fn available_memory() -> Bytes {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Bytes(kib.unwrap_or(0) << 10)
}

#[cfg(test)]
mod tests {
    use longhaul_core::tunnel::handover::NicHandover;

    use super::*;

    const HOME: &str = "198.51.100.10/24";

    fn config() -> Config {
        let text = include_str!("../../../configs/site-a.toml");
        Config::parse(std::path::Path::new("site-a.toml"), text).unwrap()
    }

    fn site(name: &str) -> SiteName {
        name.parse().unwrap()
    }

    fn proposal(home: &str, epoch: u64) -> Proposal {
        let text = format!(
            "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n\
             [[nics]]\nname = \"net0\"\nmac = \"52:54:00:00:00:01\"\nlan = \"lan\"\npci = \"05.0\"\n\
             home = [\"{home}\"]\n"
        );
        let definition: MachineDefinition = toml::from_str(&text).unwrap();
        let nics = definition.nics.iter().map(|nic| NicHandover {
            nic: nic.name.clone(),
            mac: nic.mac,
            home: nic.home.clone(),
            neighbours: Vec::new(),
            home_prefixes: nic.home.clone(),
            flows: Vec::new(),
        });
        let nics = nics.collect();
        let (home_site, commit) = (site("b"), CommitMode::Confirmed);
        let hypervisor = String::new();
        Proposal {
            definition,
            home_site,
            hypervisor,
            epoch: Epoch(epoch),
            running: true,
            commit,
            nics,
            carried: Vec::new(),
        }
    }

    #[test]
    fn what_the_peers_table_does_not_allow_is_declined_with_the_rule() {
        let declined = |peer: &str, spoil: fn(&mut Proposal)| {
            let mut proposal = proposal(HOME, 0);
            spoil(&mut proposal);
            check_policy(&config(), &site(peer), &proposal).unwrap_err().to_string()
        };
        assert_eq!(check_policy(&config(), &site("b"), &proposal(HOME, 0)), Ok(()));
        assert!(declined("c", |_| {}).contains("c is not configured"));
        assert!(declined("b", |p| p.definition.name = "db1".parse().unwrap()).contains("may_send"));
        assert!(declined("b", |p| p.definition.memory_mib = 8193).contains("max_memory_mib is 8192"));
    }

    #[test]
    fn only_the_owner_of_the_newest_epoch_brings_a_machine_back() {
        let away = Ownership::Away { site: site("b"), epoch: Epoch(5) };
        let at = |at: Option<&str>, peer, epoch| {
            check_epoch(Some(&away), at.map(site).as_ref(), &site(peer), &proposal(HOME, epoch))
        };
        let check = |peer, epoch| at(None, peer, epoch);
        assert_eq!(check("b", 5), Ok(()));
        assert_eq!(check("c", 6), Ok(()), "b has handed it on");
        assert_eq!(at(Some("c"), "c", 6), Ok(()), "and has said so");
        let refused = at(Some("b"), "c", 6).unwrap_err();
        assert!(matches!(&refused, Refusal::Busy(why) if why.contains("moved web1 --to c")), "{refused}");
        assert!(matches!(at(Some("c"), "b", 5), Err(Refusal::Busy(_))), "b has handed it on");
        assert!(check("b", 4).unwrap_err().to_string().contains("was in 5 since"));
        assert!(check("c", 5).unwrap_err().to_string().contains("handed over to b"));
    }

    fn row(home_site: &str, proposal: &Proposal) -> MachineRow {
        MachineRow {
            definition: proposal.definition.clone(),
            images: Vec::new(),
            home_site: site(home_site),
            came_from: None,
            adopted: None,
            care_of: Vec::new(),
            carried: Vec::new(),
            over: Vec::new(),
            handover: None,
            wanted: true,
            settled_in: None,
            ttl_before_s: None,
        }
    }

    #[test]
    fn only_what_has_left_comes_home_and_it_has_one_home() {
        let mut coming = proposal(HOME, 1);
        let check = |known: Option<&MachineRow>, coming: &Proposal| check_home(known, &site("a"), coming);
        assert_eq!(check(None, &coming), Ok(()), "a visitor");
        coming.home_site = site("a");
        assert!(check(None, &coming).is_err(), "never left here");
        let known = row("a", &coming);
        assert_eq!(check(Some(&known), &coming), Ok(()));
        assert!(check(Some(&row("b", &coming)), &coming).is_err(), "it visited");
        let other = Proposal { home_site: site("a"), ..proposal("198.51.100.11/24", 1) };
        assert!(check(Some(&known), &other).is_err(), "another address");
        let mut named = coming.clone();
        named.definition.dns_name = Some("www.example.net".into());
        assert!(check(Some(&known), &named).is_err(), "another's name");
        let elsewhere = Proposal { home_site: site("b"), ..coming.clone() };
        assert!(check(Some(&known), &elsewhere).is_err(), "another home");
    }

    #[test]
    fn a_machine_gets_the_address_of_its_last_visit_again_and_none_at_home() {
        let mut coming = proposal("198.51.100.10/24", 0);
        coming.home_site = site("z");
        let first = reserve(&config(), &BTreeSet::new(), &coming).unwrap().care_of[0].addr;
        let taken = BTreeSet::from([first]);
        let second = reserve(&config(), &taken, &coming).unwrap().care_of[0].addr;
        assert_ne!(first, second);
        let (nic, home) = (coming.definition.nics[0].name.clone(), coming.definition.nics[0].home[0].addr);
        coming.carried = vec![Carried { nic, home, addr: second, site: site("a") }];
        let again = |taken: &[IpAddr]| {
            let taken = taken.iter().copied().collect();
            reserve(&config(), &taken, &coming).unwrap().care_of[0].addr
        };
        assert_eq!(again(&[]), second);
        assert_eq!(again(&[second]), first, "another machine has it by now");
        coming.home_site = site("a");
        assert_eq!(reserve(&config(), &BTreeSet::new(), &coming).unwrap().care_of, []);
    }

    #[test]
    fn an_epoch_that_could_overflow_is_refused_at_the_limit() {
        let at = Epoch::MAX_FROM_PEER.0;
        assert_eq!(check_epoch(None, None, &site("b"), &proposal(HOME, at)), Ok(()));
        assert!(check_epoch(None, None, &site("b"), &proposal(HOME, at + 1)).is_err());
        assert!(check_epoch(None, None, &site("b"), &proposal(HOME, u64::MAX)).is_err());
    }

    #[test]
    fn what_is_remembered_fits_beside_the_machine() {
        let (config, coming) = (config(), proposal(HOME, 0));
        let kept = config.hypervisor.keep_free_mib << 20;
        let memory = coming.definition.memory().0;
        let offered = |left: u64| {
            let mut offer = reserve(&config, &BTreeSet::new(), &coming).unwrap();
            fit_memory(&config, Bytes(kept + memory + left), &coming.definition, &mut offer);
            (offer.shadow_pages, offer.disk_window_log)
        };
        let all = (shadow_pages(&config, &coming.definition), disk_window_log(&config));
        assert_eq!(offered(64 << 30), all);
        assert_eq!(offered(0), (0, if coming.definition.volumes().count() > 0 { 20 } else { all.1 }));
        let (pages, _) = offered(20 << 20);
        assert!(u64::from(pages) * SHADOW_PAGE_BYTES <= 10 << 20);
    }

    #[test]
    fn as_many_machines_as_allowed_come_at_once_and_one_more_is_refused() {
        assert_eq!(check_arriving(&config(), &site("b"), 3), Ok(()));
        let refused = check_arriving(&config(), &site("b"), 4).unwrap_err().to_string();
        assert!(refused.contains("max_arriving is 4"), "{refused}");
    }

    fn config_with(arbiter: &str) -> Config {
        let text = format!(
            "[site]\nname = \"a\"\n[storage]\npool = \"/disks\"\n\
             [dns]\nservers = [\"192.0.2.53:53\"]\nzone = \"example.net.\"\nkey_file = \"/k\"\n\
             [etcd]\nendpoints = [\"http://192.0.2.21:2379\"]\n\
             [[peer]]\nname = \"b\"\nkey = \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"\narbiter = \"{arbiter}\"\n"
        );
        Config::parse(std::path::Path::new("site.toml"), &text).unwrap()
    }

    #[test]
    fn a_site_with_another_arbiter_for_this_link_is_refused_by_the_keys_name() {
        let definition = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n\
            [[disks]]\nname = \"root\"\nsize_bytes = 1048576\npci = \"03.0\"\n";
        let proposal = |commit| Proposal {
            definition: toml::from_str(definition).unwrap(),
            home_site: "b".parse().unwrap(),
            hypervisor: "7.2".into(),
            epoch: Epoch(0),
            running: true,
            commit,
            nics: Vec::new(),
            carried: Vec::new(),
        };
        let peer = "b".parse().unwrap();
        let (dns, etcd) = (CommitMode::Arbitrated(Arbiter::Dns), CommitMode::Arbitrated(Arbiter::Etcd));
        for (here, there) in [
            ("none", dns),
            ("none", etcd),
            ("dns", CommitMode::Confirmed),
            ("dns", CommitMode::Pipelined),
            ("dns", etcd),
            ("etcd", CommitMode::Confirmed),
            ("etcd", dns),
        ] {
            let refused = check_arbiter(&config_with(here), &peer, &proposal(there)).unwrap_err().to_string();
            assert!(refused.contains("peer.b.arbiter"), "{refused}");
        }
        let [confirmed, pipelined] = [CommitMode::Confirmed, CommitMode::Pipelined];
        for (here, there) in [("dns", dns), ("etcd", etcd), ("none", confirmed), ("none", pipelined)] {
            assert_eq!(check_arbiter(&config_with(here), &peer, &proposal(there)), Ok(()));
        }
    }
}
