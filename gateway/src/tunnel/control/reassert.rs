//! What others remove from this host's network while it is in force is made again, with the flows of before the move.
//!
//! Flows that were learned since are learned again from their packets.

use std::collections::BTreeSet;

use longhaul_core::tunnel::handover::FlowTuple;
use tracing::{debug, warn};

use super::super::change::{Change, Reasserted, name};
use super::super::error::TunnelError;
use super::super::tap::port_id;
use super::super::{nft, plan};
use super::{Carry, Control, Visit};

impl Control {
    /// One look. What cannot be made again is said once, and tried with each look.
    pub(super) async fn reassert(&mut self) {
        let Reasserted { made, failed } = match self.changes.reassert().await {
            Ok(found) => found,
            Err(error) => return debug!(%error, "the host's network could not be looked at"),
        };
        let names = |changes: &[Change]| changes.iter().map(name).collect::<Vec<_>>().join(", ");
        if !made.is_empty() {
            warn!(
                gone = names(&made),
                "something on this host removed rules or routes of this gateway, as a reload of its firewall does; they stand again, and packets were lost meanwhile"
            );
        }
        if !failed.is_empty() && self.not_standing != failed {
            warn!(
                gone = names(&failed),
                "something on this host removed rules or routes of this gateway, and they cannot be made again; see the log at debug for why"
            );
        }
        self.not_standing = failed;
        if let Err(error) = self.refill(&made).await {
            warn!(%error, "flows of before the move are not known any more; those in which the guest speaks first may break");
        }
    }

    /// Puts the flows of before the move into tables that were made again.
    async fn refill(&self, made: &[Change]) -> Result<(), TunnelError> {
        let tables: BTreeSet<&str> = made
            .iter()
            .filter_map(|change| match change {
                Change::Table(table) => Some(table.name.as_str()),
                Change::Sysctl { .. }
                | Change::Route { .. }
                | Change::Rule(_)
                | Change::Proxy { .. }
                | Change::Fixed { .. }
                | Change::BridgeAddress { .. }
                | Change::OwnAddress { .. }
                | Change::Routed { .. }
                | Change::DummyAddress { .. } => None,
            })
            .collect();
        let is_anew = |name: String| tables.contains(name.as_str());
        let mut script = String::new();
        for (key, Visit { request, flows, .. }) in &self.visits {
            if is_anew(plan::visit_table_name(&self.config, key)) {
                let flows: Vec<FlowTuple> = flows.iter().copied().collect();
                script += &plan::visit_flows(&self.config, request, &flows);
            }
        }
        for (key, Carry { request, flows, .. }) in &self.carries {
            if nft::carry_names(&self.config, &port_id(key)).into_iter().any(is_anew) {
                script += &plan::carry_flows(&self.config, request, flows);
            }
        }
        if script.is_empty() { Ok(()) } else { nft::run(&script).await }
    }
}
