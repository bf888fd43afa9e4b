//! What a destination answers to a proposal: policy, capabilities, room. Holds nothing, but room that
//! partial disks take is made.
//!
//! Everything is denied that the peer's table does not allow. The answer names the rule or the figure,
//! so that the operator at the other site knows what to change and where.

use std::collections::BTreeSet;
use std::net::IpAddr;

use longhaul_core::ids::SiteName;
use longhaul_core::migration::message::{CareOf, Proposal, Refusal, Reservation};
use longhaul_core::units::Bytes;

use super::{Edges, partial};
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

/// A care-of address for every home address that can have one, none of them `taken`.
pub fn reserve(
    config: &Config,
    taken: &BTreeSet<IpAddr>,
    proposal: &Proposal,
) -> Result<Reservation, Refusal> {
    let mut taken = taken.clone();
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
            let Some(addr) = family.into_iter().find(|addr| !taken.contains(addr)) else {
                return Err(Refusal::NotEnough {
                    what: format!("free care-of addresses in lan.{}", nic.lan),
                    wanted: "1".into(),
                    available: "0".into(),
                });
            };
            taken.insert(*addr);
            care_of.push(CareOf { nic: nic.name.clone(), home: *home, addr: *addr });
        }
    }
    if care_of.is_empty() && proposal.definition.dns_name.is_some() {
        return Err(Refusal::NotEnough {
            what: "care-of addresses".into(),
            wanted: "1".into(),
            available: "0".into(),
        });
    }
    Ok(Reservation { care_of })
}

/// Everything that is asked before a proposal is accepted.
pub async fn admit(edges: &Edges, peer: &SiteName, proposal: &Proposal) -> Result<(), Refusal> {
    check_policy(&edges.config, peer, proposal)?;
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

fn room(edges: &Edges) -> Result<Room, Refusal> {
    let pool = &edges.config.storage.pool;
    let space = nix::sys::statvfs::statvfs(pool).map_err(|error| {
        Refusal::Other(format!("the pool of site {} cannot be looked at: {error}", edges.site()))
    })?;
    let disk = Bytes(space.blocks_available() * space.fragment_size());
    Ok(Room { memory: available_memory(), disk })
}

/// What the kernel says can be taken without swapping (`MemAvailable` of `/proc/meminfo`).
fn available_memory() -> Bytes {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Bytes(kib.unwrap_or(0) << 10)
}
