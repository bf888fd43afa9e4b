//! What an operator lets migrations take of the link, changed while they run.
//!
//! ```text
//!  longhaul limit --peer b --mbit 50   everything that is sent to b; guests' packets go first
//!  longhaul limit ID --mbit 20         memory and disks of one attempt, until its guest is stopped, and of those that follow it
//! ```
//!
//! Neither is written down: a gateway that begins anew has what its configuration says. Pacing is the link's.

use longhaul_core::ids::{MigrationId, SiteName};
use longhaul_core::migration::Stage;
use longhaul_core::units::Rate;

use super::Daemon;
use super::retries::Following;
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
        &mut self,
        id: MigrationId,
        request: LimitRequest,
    ) -> Result<(), RequestError> {
        let rate = rate(request)?;
        let running = self.migrations.get(&id).ok_or_else(|| no_such_migration(id))?;
        if running.inbox.is_none() {
            return match self.limit_retry_after(id, request.rate_mbit) {
                true => Ok(()),
                false => Err(RequestError::Conflict(format!("Migration {id} is over"))),
            };
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
        // A guest that stands still is not held back; an attempt that follows is.
        if view.stage < Stage::StopAndCopy {
            handle
                .limit_migration(id, rate)
                .await
                .map_err(|error| RequestError::Failed(error.to_string()))?;
            running.viewer.change(|view| view.limit_mbit = request.rate_mbit);
        }
        tracing::info!(vm = %view.vm, %id, rate_mbit = request.rate_mbit, "what the migration sends is limited");
        if let Some(running) = self.migrations.get_mut(&id) {
            running.limit_mbit = request.rate_mbit;
        }
        Ok(())
    }

    /// What was asked for of an attempt holds for the one that follows it.
    pub(super) async fn keep_limit(&mut self, id: MigrationId, follows: Option<&Following>) {
        let Some(rate_mbit) = follows.and_then(|following| following.limit_mbit) else { return };
        if let Some(running) = self.migrations.get_mut(&id) {
            running.limit_mbit = Some(rate_mbit);
        }
        let request = LimitRequest { rate_mbit: Some(rate_mbit) };
        if let Err(error) = self.limit_migration(id, request).await {
            tracing::warn!(%id, rate_mbit, %error, "what the retry sends is not limited");
        }
    }

    /// The link forgets it with the attempt's channels, and one that was declined had none.
    pub(super) async fn forget_limit(&self, id: MigrationId) {
        let Some(running) = self.migrations.get(&id).filter(|running| running.limit_mbit.is_some()) else {
            return;
        };
        if let Some(peer) = self.edges.link.peer(&running.attempt.peer) {
            // A link that is closed limits nothing.
            let _ = peer.limit_migration(id, None).await;
        }
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
    use longhaul_core::ids::{Epoch, VmName};
    use longhaul_core::migration::ledger::Ownership;
    use longhaul_core::migration::{Attempt, CommitMode};
    use serde_json::json;
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::api::types::{MigrateRequest, MigrationView, RetryView};
    use crate::daemon::Machine;
    use crate::hypervisor::Guest;
    use crate::migration::view::Viewer;
    use crate::test_site::{TestSite, machine_row};

    fn mbit(rate_mbit: u64) -> LimitRequest {
        LimitRequest { rate_mbit: Some(rate_mbit) }
    }

    /// An attempt of web1 to go to b that has been limited, was paused, and stayed.
    async fn stayed(daemon: &mut Daemon, vm: &VmName, id: MigrationId) -> Viewer {
        let (vm, peer) = (vm.clone(), "b".parse().unwrap());
        let attempt = Attempt { id, vm: vm.clone(), peer, epoch: Epoch(1), commit: CommitMode::Confirmed };
        let viewer = Viewer::new(&attempt, daemon.edges.site(), &attempt.peer);
        let request = MigrateRequest {
            vm,
            to: attempt.peer.clone(),
            without_dns: true,
            max_downtime_ms: None,
            no_throttle: false,
        };
        let (inbox, guest) = (mpsc::channel(1).0, watch::channel(None).1);
        daemon.spawn(attempt, inbox, viewer.clone(), guest, std::future::pending());
        daemon.limit_migration(id, mbit(20)).await.unwrap();
        viewer.change(|view| view.limit_mbit = None);
        viewer.retry(Some(RetryView { number: 1, of: 3, delay_ms: 0, id: None }));
        viewer.end(crate::api::types::Progressing::Stayed, None);
        let running = daemon.migrations.get_mut(&id).unwrap();
        (running.request, running.inbox) = (Some(request), None);
        daemon.plan_retry(id);
        viewer
    }

    async fn retried(daemon: &mut Daemon, before: &Viewer) -> MigrationView {
        daemon.begin_retries().await;
        let retry = before.current().retry.expect("it is tried again").id.expect("it has begun");
        let views = daemon.migrations.values().map(|running| running.viewer.current());
        views.into_iter().find(|view| view.id == retry).unwrap()
    }

    #[tokio::test]
    async fn a_limit_follows_the_machine_through_its_retries_although_the_pause_lifts_it() {
        let (site, _peer) = TestSite::pair().await;
        let (mut daemon, vm) = (Daemon::idle(site.edges.clone()), "web1".parse::<VmName>().unwrap());
        let row = machine_row(&site.edges);
        site.edges.journal.define(&vm, &Ownership::Here { epoch: Epoch(0) }).unwrap();
        site.edges.journal.put_machine(&vm, &row).unwrap();
        let (guest, _) = Guest::answered_by(|_| json!({ "status": "running" })).await;
        daemon.machines.insert(vm.clone(), Machine { row, guest: Some(guest), silent: false });
        let first = stayed(&mut daemon, &vm, MigrationId(1)).await;
        assert_eq!(retried(&mut daemon, &first).await.limit_mbit, Some(20));
        daemon.migrations.clear();
        let second = stayed(&mut daemon, &vm, MigrationId(2)).await;
        daemon.limit_migration(MigrationId(2), mbit(5)).await.expect("what follows can be limited already");
        assert_eq!(retried(&mut daemon, &second).await.limit_mbit, Some(5));
        let over = daemon.limit_migration(MigrationId(2), mbit(7)).await;
        assert!(matches!(over, Err(RequestError::Conflict(_))), "what follows it has an id of its own");
    }

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
