//! Machines that could not be told apart at this site, because their homes have the same private addresses: one visits,
//! and another is away from here. Gathers who they are; whether they can be told apart is the core's to say.

use longhaul_core::ids::VmName;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{Proposal, Refusal};
use longhaul_core::tunnel::handover::NicHandover;
use longhaul_core::tunnel::neighbourhood::Neighbourhood;

use super::anchor::Anchor;
use super::{Edges, MachineRow, chain, home_servers};
use crate::journal::JournalError;

/// Asked about a machine that would visit: is one of ours away that it would be mistaken for?
pub(super) fn check_visitor(edges: &Edges, proposal: &Proposal) -> Result<(), Refusal> {
    if proposal.home_site == *edges.site() {
        return Ok(());
    }
    let visitor = of_nics(&proposal.nics);
    for (vm, row) in machines(edges)? {
        if !is_away(edges, &vm, &row).map_err(|error| failed(&error))? {
            continue;
        }
        if let Some(address) = visitor.shared(&of_definition(edges, &row)?) {
            return Err(Refusal::Incompatible(format!(
                "the homes of {} and {vm} have the same private addresses ({address}), and {vm} is away from site {}: \
                 bring it home first, or release it",
                proposal.definition.name,
                edges.site()
            )));
        }
    }
    Ok(())
}

/// Asked about a machine that would leave its home: does one visit that it would be mistaken for?
pub(super) fn check_leaving(edges: &Edges, row: &MachineRow, nics: &[NicHandover]) -> Result<(), Refusal> {
    if row.visits(edges.site()) {
        return Ok(());
    }
    let leaving = of_nics(nics);
    for (vm, other) in machines(edges)? {
        let here = edges.journal.ownership(&vm).map_err(|error| failed(&error))?;
        let visits = other.visits(edges.site()) && matches!(here, Some(Ownership::Here { .. }));
        let Some(handover) = other.handover.filter(|_| visits) else { continue };
        if let Some(address) = leaving.shared(&of_nics(&handover.nics)) {
            return Err(Refusal::CannotTravel(format!(
                "its home and that of {vm}, which visits this site, have the same private addresses ({address}); \
                 move {vm} first"
            )));
        }
    }
    Ok(())
}

fn machines(edges: &Edges) -> Result<Vec<(VmName, MachineRow)>, Refusal> {
    edges.journal.machines().map_err(|error| failed(&error))
}

fn failed(error: &JournalError) -> Refusal {
    Refusal::Other(Refusal::text(chain(error)))
}

/// One of ours whose packets this site attracts.
fn is_away(edges: &Edges, vm: &VmName, row: &MachineRow) -> Result<bool, JournalError> {
    let anchor = edges.journal.anchor::<Anchor>(vm)?;
    Ok(!row.visits(edges.site()) && anchor.is_some_and(|anchor| !anchor.ended))
}

fn of_nics(nics: &[NicHandover]) -> Neighbourhood {
    Neighbourhood {
        own: nics.iter().flat_map(|nic| nic.home.iter().map(|home| home.addr)).collect(),
        reached: nics.iter().flat_map(|nic| nic.home_prefixes.iter().copied()).collect(),
    }
}

/// As the machine was told when it left, but for the servers that it alone was seen to ask or routers advertised.
fn of_definition(edges: &Edges, row: &MachineRow) -> Result<Neighbourhood, Refusal> {
    let mut of = Neighbourhood::default();
    for nic in &row.definition.nics {
        of.own.extend(nic.home.iter().map(|home| home.addr));
        of.reached.extend(home_servers::known(edges, nic)?);
    }
    Ok(of)
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::Epoch;
    use longhaul_core::migration::message::Handover;
    use longhaul_core::tunnel::handover::Mac;

    use super::*;
    use crate::identity::Identity;
    use crate::test_site::{TestSite, anchor, definition, machine_row, proposal};

    fn coming_from(site: &str, home: &str) -> Proposal {
        let mut definition = definition();
        definition.name = "db1".parse().unwrap();
        definition.nics[0].home = vec![crate::config::parse_prefix(home).unwrap()];
        let nics = vec![NicHandover {
            nic: definition.nics[0].name.clone(),
            mac: Mac([0x52, 0x54, 0, 0, 0, 2]),
            home: definition.nics[0].home.clone(),
            neighbours: Vec::new(),
            home_prefixes: definition.nics[0].home.clone(),
            flows: Vec::new(),
        }];
        Proposal { home_site: site.parse().unwrap(), nics, ..proposal(definition) }
    }

    #[tokio::test]
    async fn machines_of_homes_with_the_same_addresses_do_not_change_places() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let (edges, row) = (&site.edges, machine_row(&site.edges));
        let vm = row.definition.name.clone();
        edges.journal.put_machine(&vm, &row).unwrap();
        let (same, other) = (coming_from("b", "198.51.100.20/24"), coming_from("b", "203.0.113.20/24"));
        // It is at home: a stranger is no matter.
        check_visitor(edges, &same).unwrap();
        edges.journal.put_anchor(&vm, &anchor("b")).unwrap();
        let text = check_visitor(edges, &same).unwrap_err().to_string();
        assert!(
            text.contains("db1") && text.contains("web1 is away") && text.contains("198.51.100."),
            "{text}"
        );
        check_visitor(edges, &other).unwrap();
        // Its own way home.
        check_visitor(edges, &coming_from("a", "198.51.100.10/24")).unwrap();
        edges.journal.put_anchor(&vm, &Anchor { ended: true, ..anchor("b") }).unwrap();
        check_visitor(edges, &same).unwrap();

        let visiting = "db1".parse().unwrap();
        let handover = Some(Handover { nics: same.nics.clone() });
        let visitor = MachineRow {
            definition: same.definition,
            home_site: "b".parse().unwrap(),
            handover,
            ..row.clone()
        };
        edges.journal.put_machine(&visiting, &visitor).unwrap();
        check_leaving(edges, &row, &coming_from("a", "198.51.100.10/24").nics).unwrap();
        edges.journal.define(&visiting, &Ownership::Here { epoch: Epoch(1) }).unwrap();
        let leaving = coming_from("a", "198.51.100.10/24").nics;
        let text = check_leaving(edges, &row, &leaving).unwrap_err().to_string();
        assert!(text.contains("db1, which visits"), "{text}");
        check_leaving(edges, &row, &other.nics).unwrap();
    }
}
