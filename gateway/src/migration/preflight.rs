//! Stage 0 at the source: everything that can be known before anything is held anywhere.
//!
//! Changes nothing, so a failure costs nothing. The machine's definition travels without any of this
//! site's paths and names.

use longhaul_core::ids::Epoch;
use longhaul_core::machine::Nic;
use longhaul_core::migration::arbiter::Arbiter;
use longhaul_core::migration::message::{Proposal, Refusal};
use longhaul_core::migration::source::Event;
use longhaul_core::tunnel::handover::{Neighbour, NicHandover, Prefix};

use super::anchor::{Anchor, NameState};
use super::park::tunnel_failed;
use super::source::{SourceLeaf, SourceOptions};
use super::stay::takes_along;
use super::{
    MachineRow, chain, descriptors, home_servers, host, hypervisor_failed, journal_room, neighbourhood,
};
use crate::dns::{NamesError, Standing};
use crate::hypervisor::Guest;

/// Checks, and reports what is to be proposed.
pub(super) async fn run(leaf: SourceLeaf, guest: Guest, row: MachineRow, options: SourceOptions) {
    let event = match check(&leaf, &guest, &row, &options).await {
        Ok(proposal) => Event::PreflightPassed(Box::new(proposal)),
        Err(why) => Event::Failed(why),
    };
    leaf.report(event).await;
}

async fn check(
    leaf: &SourceLeaf,
    guest: &Guest,
    row: &MachineRow,
    options: &SourceOptions,
) -> Result<Proposal, Refusal> {
    journal_room::check(&leaf.edges.config)?;
    descriptors::check(&leaf.edges.config)?;
    let travel = guest.what_cannot_travel().await.map_err(hypervisor_failed)?;
    if let Some(first) = travel.obstacles.first() {
        return Err(Refusal::CannotTravel(Refusal::text(first.to_string())));
    }
    leaf.viewer.change(|view| view.notices.extend(travel.notes));
    let needs = host::as_home(&leaf.edges).await.map_err(tunnel_failed)?;
    host::check(&needs, &row.definition).map_err(|needed| Refusal::CannotTravel(needed.to_string()))?;
    check_names(leaf, row, options).await?;
    check_etcd(leaf).await?;
    let host = leaf.edges.hypervisor.capabilities().await.map_err(hypervisor_failed)?;
    let status = guest.status().await.map_err(hypervisor_failed)?;
    let mut nics = Vec::new();
    for nic in &row.definition.nics {
        let neighbours = neighbours(leaf, row, nic).await?;
        let home_prefixes = home_prefixes(leaf, row, nic, &neighbours).await?;
        nics.push(NicHandover {
            nic: nic.name.clone(),
            mac: nic.mac,
            home: nic.home.clone(),
            neighbours,
            home_prefixes,
            flows: Vec::new(),
        });
    }
    neighbourhood::check_leaving(&leaf.edges, row, &nics)?;
    Ok(Proposal {
        definition: row.definition.clone(),
        home_site: row.home_site.clone(),
        hypervisor: host.qemu.to_string(),
        epoch: Epoch(leaf.attempt.epoch.0 - 1),
        running: status.is_running(),
        commit: leaf.attempt.commit,
        nics,
        carried: takes_along(leaf.edges.site(), row),
    })
}

async fn check_names(leaf: &SourceLeaf, row: &MachineRow, options: &SourceOptions) -> Result<(), Refusal> {
    let Some(name) = arbitrated_name(leaf, row, options)? else { return Ok(()) };
    if row.visits(leaf.edges.site()) && leaf.attempt.commit.arbiter() != Some(Arbiter::Dns) {
        // Its home has the key, and moves the name.
        return Ok(());
    }
    let Some(names) = &leaf.edges.names else {
        let text =
            format!("{name} is to follow, but this site has no [dns]; use --without-dns to move without");
        return Err(Refusal::Names(text));
    };
    let owed = leaf.edges.journal.anchor::<Anchor>(&leaf.attempt.vm).ok().flatten();
    let owed = owed.filter(|anchor| anchor.names == NameState::Pending);
    let homes = row.definition.nics.iter().flat_map(|nic| nic.home.iter().map(|home| home.addr));
    // What has no stand-in here is what clients know, and its home attracts.
    let homes = homes.filter(|home| row.care_of.iter().all(|care_of| care_of.home.addr != *home));
    let here: Vec<_> = homes.chain(row.care_of.iter().map(|care_of| care_of.addr)).collect();
    let checked = names.check(name, &here, leaf.attempt.epoch).await;
    expect_home(name, owed.as_ref(), checked).and_then(|standing| match leaf.attempt.commit.arbiter() {
        Some(Arbiter::Dns) => {
            let record = format!("the TXT record _longhaul.{name}");
            not_behind(leaf, Arbiter::Dns, &record, standing.epoch()).map_err(Refusal::Names)
        }
        None | Some(Arbiter::Etcd) => Ok(()),
    })
}

/// The next anchor takes the place of one that owes the name: were that one forgotten, nobody would. What is owed once the
/// primary has it are other name servers and the TTL, and those the next move waits for and restores as well.
fn expect_home(
    name: &str,
    owed: Option<&Anchor>,
    checked: Result<Standing, NamesError>,
) -> Result<Standing, Refusal> {
    let on_its_way =
        || Refusal::Names(format!("{name} is still on its way home; try again when it is there"));
    match (owed, checked) {
        (Some(_), Err(NamesError::Elsewhere { .. })) => Err(on_its_way()),
        (Some(anchor), Ok(standing)) if standing.epoch() < anchor.epoch => Err(on_its_way()),
        (Some(_) | None, checked) => checked.map_err(|error| Refusal::Names(Refusal::text(chain(&error)))),
    }
}

/// With etcd as the arbiter: it answers, and the machine's register is older than the move.
async fn check_etcd(leaf: &SourceLeaf) -> Result<(), Refusal> {
    match leaf.attempt.commit.arbiter() {
        None | Some(Arbiter::Dns) => return Ok(()),
        Some(Arbiter::Etcd) => {}
    }
    let vm = &leaf.attempt.vm;
    let Some(registers) = &leaf.edges.etcd else {
        return Err(Refusal::Other(format!("Arbiter of {vm} is etcd, but this site has no [etcd]; add it")));
    };
    let failed =
        |error| Refusal::Other(Refusal::text(format!("Arbiter would not decide: {}", chain(&error))));
    let now = registers.check(vm, leaf.attempt.epoch).await.map_err(failed)?;
    let key = format!("etcd's key {}", registers.key(vm));
    not_behind(leaf, Arbiter::Etcd, &key, now).map_err(Refusal::Other)
}

/// The name to look at, if it follows; where the name server arbitrates it must.
fn arbitrated_name<'a>(
    leaf: &SourceLeaf,
    row: &'a MachineRow,
    options: &SourceOptions,
) -> Result<Option<&'a String>, Refusal> {
    let name = row.definition.dns_name.as_ref().filter(|_| !options.without_dns);
    match leaf.attempt.commit.arbiter() {
        None | Some(Arbiter::Etcd) => Ok(name),
        Some(Arbiter::Dns) if name.is_some() => Ok(name),
        Some(Arbiter::Dns) => {
            let text = format!(
                "peer.{}.arbiter is \"dns\", which decides by the machine's dns_name: give it one and move it without \
                 --without-dns, or set the arbiter to \"none\" at both sites",
                leaf.attempt.peer
            );
            Err(Refusal::Names(text))
        }
    }
}

/// A register that was put back to an older state cannot arbitrate: the reason, for an operator.
fn not_behind(leaf: &SourceLeaf, kind: Arbiter, register: &str, now: Epoch) -> Result<(), String> {
    let seen = leaf.edges.journal.register_epoch(kind, &leaf.attempt.vm);
    let seen = seen.map_err(|error| Refusal::text(error.to_string()))?;
    if now >= seen {
        return Ok(());
    }
    Err(format!(
        "{register} says epoch {now}, but {seen} was seen there: it was put back to an older state, and cannot decide \
         who has the machine; write the value of epoch {seen} again"
    ))
}

async fn neighbours(leaf: &SourceLeaf, row: &MachineRow, nic: &Nic) -> Result<Vec<Neighbour>, Refusal> {
    let known = row.handover.as_ref().filter(|_| row.visits(leaf.edges.site()));
    if let Some(known) = known.and_then(|known| known.nics.iter().find(|handed| handed.nic == nic.name)) {
        return Ok(known.neighbours.clone());
    }
    let Some(lan) = leaf.edges.config.lan.get(nic.lan.as_str()) else {
        return Err(Refusal::Incompatible(format!("this site has no [lan.{}]", nic.lan)));
    };
    let failed = |error| Refusal::Other(Refusal::text(chain(&error)));
    if nic.has_ipv6() {
        leaf.edges.tunnel.solicit_routers(lan.bridge.clone()).await.map_err(failed)?;
    }
    leaf.edges.tunnel.home_neighbours(lan.bridge.clone()).await.map_err(failed)
}

/// What the machine always reaches through the tunnel: what its home has said, or says now.
async fn home_prefixes(
    leaf: &SourceLeaf,
    row: &MachineRow,
    nic: &Nic,
    neighbours: &[Neighbour],
) -> Result<Vec<Prefix>, Refusal> {
    let known = row.handover.as_ref().filter(|_| row.visits(leaf.edges.site()));
    if let Some(handed) = known.and_then(|known| known.nics.iter().find(|handed| handed.nic == nic.name)) {
        return Ok(handed.home_prefixes.clone());
    }
    home_servers::prefixes(&leaf.edges, row, nic, neighbours).await
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use longhaul_core::ids::SiteName;

    use super::*;
    use crate::dns::NameMove;
    use crate::test_site::{anchor, names_of};

    const NAME: &str = "web1.vm.example";

    #[tokio::test]
    async fn a_name_that_its_primary_has_does_not_keep_the_machine_whatever_a_secondary_says() {
        let [home, at_b]: [IpAddr; 2] = ["198.51.100.10", "203.0.113.10"].map(|ip| ip.parse().unwrap());
        let (_server, names) = names_of("web1 5 IN A 203.0.113.10\n").await;
        let owed = Anchor { epoch: Epoch(2), ..anchor("a") };
        assert_eq!(owed.names, NameState::Pending);
        let looked = async || expect_home(NAME, Some(&owed), names.check(NAME, &[home], Epoch(3)).await);
        let why = |looked: Result<Standing, Refusal>| looked.expect_err("it is not there").to_string();
        assert!(why(looked().await).contains("still on its way home"));

        let (addresses, owner): (_, SiteName) = ([(at_b, home)], "a".parse().unwrap());
        let back = |epoch| NameMove { name: NAME, addresses: &addresses, ttl_s: 5, epoch, owner: &owner };
        names.swap(&back(Epoch(1))).await.unwrap();
        assert!(why(looked().await).contains("still on its way home"), "an update may be under way");
        names.swap(&back(Epoch(2))).await.unwrap();
        assert!(looked().await.is_ok());

        let other = expect_home(NAME, None, names.check(NAME, &[at_b], Epoch(3)).await);
        assert!(why(other).contains("does not point at the machine"), "nothing is on its way");
    }
}
