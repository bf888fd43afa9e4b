//! Attempts that follow one that failed, begun without being asked.
//!
//! Whether one follows is the core's decision, which the ended attempt shows. Here it waits for its
//! time and for the link, and is forgotten when an operator says otherwise or this daemon ends.

use std::time::Duration;

use longhaul_core::ids::{MigrationId, VmName};
use tokio::time::Instant;

use super::Daemon;
use crate::api::types::{MigrateRequest, MigrationView};
use crate::journal::unix_ms;

/// How often a retry that is due looks for the link.
const LOOK: Duration = Duration::from_millis(500);

const TOO_LATE: &str = "the link did not come back in time";

/// An attempt that waits for its time.
pub(super) struct PlannedRetry {
    request: MigrateRequest,
    follows: Following,
    due: Instant,
    give_up_at: Instant,
}

/// Which attempt it follows, which retry it is, and what an operator lets it take of the link.
#[derive(Clone, Copy)]
pub(super) struct Following {
    /// The attempt before.
    pub id: MigrationId,
    /// From 1.
    pub number: u32,
    /// In Mbit/s, if it is limited.
    pub limit_mbit: Option<u64>,
}

impl Daemon {
    /// Plans what an ended attempt says will follow.
    pub(super) fn plan_retry(&mut self, id: MigrationId) {
        let Some(running) = self.migrations.get(&id) else { return };
        let (Some(request), Some(retry)) = (&running.request, running.viewer.current().retry) else { return };
        let now = Instant::now();
        let cut_limit = Duration::from_secs(self.edges.config.migration.cut_limit_s);
        // An attempt that was over may have waited for days until its peer heard of it.
        let ended_ms = running.viewer.current().ended_ms.unwrap_or_else(unix_ms);
        let left = time_left(cut_limit, Duration::from_millis(unix_ms().saturating_sub(ended_ms)));
        let Some(left) = left else { return self.no_retry(id, Some(TOO_LATE)) };
        let planned = PlannedRetry {
            request: request.clone(),
            follows: Following { id, number: retry.number, limit_mbit: running.limit_mbit },
            due: now + Duration::from_millis(retry.delay_ms),
            give_up_at: now + left,
        };
        tracing::info!(vm = %request.vm, number = retry.number, of = retry.of, "machine stayed, trying again");
        self.retries.insert(request.vm.clone(), planned);
    }

    /// When [`Self::begin_retries`] has something to do.
    pub(super) fn next_retry_at(&self) -> Option<Instant> {
        self.retries.values().map(|planned| planned.due).min()
    }

    /// Begins what is due, if the link is up.
    pub(super) async fn begin_retries(&mut self) {
        let now = Instant::now();
        let due: Vec<VmName> =
            self.retries.iter().filter(|(_, planned)| planned.due <= now).map(|(vm, _)| vm.clone()).collect();
        for vm in due {
            let Some(mut planned) = self.retries.remove(&vm) else { continue };
            let up = self.edges.peer(&planned.request.to).is_some_and(|peer| peer.is_up());
            if up {
                self.begin_retry(planned).await;
            } else if now < planned.give_up_at {
                planned.due = now + LOOK;
                self.retries.insert(vm, planned);
            } else {
                self.no_retry(planned.follows.id, Some(TOO_LATE));
            }
        }
    }

    /// An operator moves the machine, or wants it to stay. Also of an attempt that still has to tell its peer that it is
    /// over: a retry is planned after that only.
    pub(super) fn forget_retries(&mut self, vm: &VmName) {
        self.retries.remove(vm);
        let of_vm = self.migrations.iter().filter(|(_, running)| running.attempt.vm == *vm);
        let waits = |view: &MigrationView| view.retry.as_ref().is_some_and(|retry| retry.id.is_none());
        let waiting: Vec<MigrationId> =
            of_vm.filter(|(_, running)| waits(&running.viewer.current())).map(|(id, _)| *id).collect();
        for id in waiting {
            self.no_retry(id, None);
        }
    }

    /// Limits what will follow this attempt; false if nothing will.
    pub(super) fn limit_retry_after(&mut self, id: MigrationId, limit_mbit: Option<u64>) -> bool {
        let planned = self.retries.values_mut().find(|planned| planned.follows.id == id);
        planned.map(|planned| planned.follows.limit_mbit = limit_mbit).is_some()
    }

    /// Forgets what would follow this attempt; false if nothing would.
    pub(super) fn forget_retry_after(&mut self, id: MigrationId) -> bool {
        let planned = self.retries.iter().find(|(_, planned)| planned.follows.id == id);
        let Some(vm) = planned.map(|(vm, _)| vm.clone()) else { return false };
        self.forget_retries(&vm);
        true
    }

    async fn begin_retry(&mut self, planned: PlannedRetry) {
        let follows = planned.follows;
        match self.begin(planned.request, Some(&follows)).await {
            Ok(started) => {
                if let Some(before) = self.migrations.get(&follows.id) {
                    before.viewer.change(|view| {
                        if let Some(retry) = &mut view.retry {
                            retry.id = Some(started.id);
                        }
                    });
                }
            }
            Err(error) => self.no_retry(follows.id, Some(&error.to_string())),
        }
    }

    /// Nothing follows that attempt after all.
    fn no_retry(&self, id: MigrationId, why: Option<&str>) {
        let Some(before) = self.migrations.get(&id) else { return };
        before.viewer.change(|view| {
            view.retry = None;
            if let Some(why) = why {
                let reason = view.reason.take().unwrap_or_default();
                view.reason = Some(format!("{reason}; not tried again: {why}"));
            }
        });
    }
}

/// How long a link may still be awaited so long after an attempt has ended; `None` if no longer.
fn time_left(cut_limit: Duration, ended_ago: Duration) -> Option<Duration> {
    cut_limit.checked_sub(ended_ago).filter(|left| !left.is_zero())
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::Epoch;
    use longhaul_core::migration::{Attempt, CommitMode};

    use super::*;
    use crate::api::types::RetryView;
    use crate::daemon::Running;
    use crate::identity::Identity;
    use crate::migration::view::Viewer;
    use crate::test_site::TestSite;

    #[tokio::test]
    async fn an_operators_word_also_ends_what_an_attempt_would_plan_that_has_not_told_its_peer_yet() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let mut daemon = Daemon::idle(site.edges.clone());
        let (id, vm, peer) = (MigrationId(1), "web1".parse::<VmName>().unwrap(), "b".parse().unwrap());
        let attempt = Attempt { id, vm: vm.clone(), peer, epoch: Epoch(1), commit: CommitMode::Confirmed };
        let viewer = Viewer::new(&attempt, site.edges.site(), &attempt.peer);
        viewer.retry(Some(RetryView { number: 1, of: 3, delay_ms: 0, id: None }));
        let request = MigrateRequest {
            vm: vm.clone(),
            to: attempt.peer.clone(),
            without_dns: false,
            max_downtime_ms: None,
            no_throttle: false,
        };
        let running = Running {
            attempt,
            request: Some(request),
            limit_mbit: None,
            inbox: None,
            viewer: viewer.clone(),
            guest: None,
        };
        daemon.migrations.insert(id, running);
        daemon.forget_retries(&vm);
        daemon.plan_retry(id);
        assert!(daemon.next_retry_at().is_none() && viewer.current().retry.is_none());
    }

    #[test]
    fn a_peer_that_hears_of_the_end_days_later_begins_nothing_by_that() {
        let limit = Duration::from_secs(600);
        assert_eq!(time_left(limit, Duration::from_secs(60)), Some(Duration::from_secs(540)));
        assert_eq!(time_left(limit, limit), None);
        assert_eq!(time_left(limit, Duration::from_secs(86_400 * 3)), None);
    }
}
