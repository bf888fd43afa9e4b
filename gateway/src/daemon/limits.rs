//! What an operator lets migrations take of the link, changed while they run.
//!
//! ```text
//!  longhaul limit --peer b --mbit 50   everything that is sent to b; guests' packets go first
//!  longhaul limit ID --mbit 20         memory and disks of one attempt, until its guest is stopped
//! ```
//!
//! Neither is written down: a gateway that begins anew has what its configuration says. Pacing is the link's.

use longhaul_core::ids::{MigrationId, SiteName};
use longhaul_core::units::Rate;

use super::Daemon;
use super::status::no_such_migration;
use crate::api::RequestError;
use crate::api::types::LimitRequest;
use crate::config::MAX_RATE_MBIT;

impl Daemon {
    pub(super) async fn limit_peer(
        &self,
        peer: &SiteName,
        request: LimitRequest,
    ) -> Result<(), RequestError> {
        let rate = rate(request)?;
        let Some(handle) = self.edges.link.peer(peer) else {
            return Err(RequestError::NotFound(format!("No site {peer}; `longhaul status` lists them")));
        };
        handle.limit(rate).await.map_err(|error| RequestError::Failed(error.to_string()))?;
        tracing::info!(%peer, rate_mbit = request.rate_mbit, "what is sent to the peer is limited");
        Ok(())
    }

    pub(super) async fn limit_migration(
        &self,
        id: MigrationId,
        request: LimitRequest,
    ) -> Result<(), RequestError> {
        let rate = rate(request)?;
        let running = self.migrations.get(&id).ok_or_else(|| no_such_migration(id))?;
        if running.inbox.is_none() {
            return Err(RequestError::Conflict(format!("Migration {id} is over")));
        }
        let view = running.viewer.current();
        if view.from != *self.edges.site() {
            return Err(RequestError::Conflict(format!(
                "Machine {} leaves site {}; limit it there",
                view.vm, view.from
            )));
        }
        let Some(handle) = self.edges.link.peer(&running.attempt.peer) else {
            return Err(RequestError::NotFound(format!("No site {}", running.attempt.peer)));
        };
        handle.limit_migration(id, rate).await.map_err(|error| RequestError::Failed(error.to_string()))?;
        running.viewer.change(|view| view.limit_mbit = request.rate_mbit);
        tracing::info!(vm = %view.vm, %id, rate_mbit = request.rate_mbit, "what the migration sends is limited");
        Ok(())
    }
}

fn rate(request: LimitRequest) -> Result<Option<Rate>, RequestError> {
    match request.rate_mbit {
        Some(mbit) if !(1..=MAX_RATE_MBIT).contains(&mbit) => {
            Err(RequestError::Invalid(format!("A limit is 1 to {MAX_RATE_MBIT} Mbit/s, not {mbit}")))
        }
        Some(mbit) => Ok(Some(Rate::mbit(mbit))),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_rate_that_a_configuration_may_have() {
        let asked = |mbit| rate(LimitRequest { rate_mbit: mbit });
        assert_eq!(asked(None).unwrap(), None);
        assert_eq!(asked(Some(1)).unwrap(), Some(Rate::mbit(1)));
        assert!(asked(Some(MAX_RATE_MBIT)).is_ok());
        for wrong in [0, MAX_RATE_MBIT + 1] {
            assert!(matches!(asked(Some(wrong)), Err(RequestError::Invalid(_))), "{wrong}");
        }
    }
}
