//! Attempts that follow one that failed, begun without being asked.
//!
//! Whether one follows is the core's decision, which the ended attempt shows. Here it waits for its
//! time and for the link, and is forgotten when an operator says otherwise or this daemon ends.

use std::time::Duration;

use longhaul_core::ids::{MigrationId, VmName};
use tokio::time::Instant;

use super::Daemon;
use crate::api::types::MigrateRequest;

/// How often a retry that is due looks for the link.
const LOOK: Duration = Duration::from_millis(500);

/// An attempt that waits for its time.
pub(super) struct PlannedRetry {
    request: MigrateRequest,
    follows: Following,
    due: Instant,
    give_up_at: Instant,
}

/// Which attempt it follows, and which retry it is.
#[derive(Clone, Copy)]
pub(super) struct Following {
    /// The attempt before.
    pub id: MigrationId,
    /// From 1.
    pub number: u32,
}

impl Daemon {
    /// Plans what an ended attempt says will follow.
    pub(super) fn plan_retry(&mut self, id: MigrationId) {
        let Some(running) = self.migrations.get(&id) else { return };
        let (Some(request), Some(retry)) = (&running.request, running.viewer.current().retry) else { return };
        let now = Instant::now();
        let cut_limit = Duration::from_secs(self.edges.config.migration.cut_limit_s);
        let planned = PlannedRetry {
            request: request.clone(),
            follows: Following { id, number: retry.number },
            due: now + Duration::from_millis(retry.delay_ms),
            give_up_at: now + cut_limit,
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
                self.no_retry(planned.follows.id, Some("the link did not come back in time"));
            }
        }
    }

    /// An operator moves the machine, or wants it to stay.
    pub(super) fn forget_retries(&mut self, vm: &VmName) {
        if let Some(planned) = self.retries.remove(vm) {
            self.no_retry(planned.follows.id, None);
        }
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
