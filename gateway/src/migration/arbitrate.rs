//! One migration's questions to its arbiter, one after the other.
//!
//! Decides nothing: the answer is the machine's, and so is asking again. A question that waits behind another one
//! is enough; more are dropped. What was seen in the register is durable before the machine hears of it.

use std::time::Duration;

use tokio::sync::mpsc;

use longhaul_core::ids::SiteName;
use longhaul_core::migration::arbiter::{Request, Verdict};
use longhaul_core::migration::message::Reservation;

use super::{Leaf, chain};
use crate::dns::{Contest, Names};

/// A question without an answer for this long is answered with `Unknown`; it may still be applied.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// The questions of one migration, in order.
pub(super) struct Questions(mpsc::Sender<Request>);

impl Questions {
    /// Answers questions until it is dropped. Without a name or a name server every answer is `Unknown`.
    pub(super) fn open<E: Send + 'static>(
        leaf: &Leaf<E>,
        contest: Option<Contest>,
        event: fn(Verdict) -> E,
    ) -> Self {
        let (sender, mut requests) = mpsc::channel(1);
        let leaf = leaf.clone();
        tokio::spawn(async move {
            while let Some(request) = requests.recv().await {
                let verdict = ask(&leaf, contest.as_ref(), request).await;
                leaf.report(event(verdict)).await;
            }
        });
        Self(sender)
    }

    /// Asks, unless one question waits already.
    pub(super) fn ask(&self, request: Request) {
        if self.0.try_send(request).is_err() {
            tracing::debug!(?request, "the arbiter has not answered yet");
        }
    }
}

/// What is decided at the register of `name`.
pub(super) fn contest<E>(
    leaf: &Leaf<E>,
    name: Option<&String>,
    reservation: Option<&Reservation>,
    source: &SiteName,
    destination: &SiteName,
) -> Option<Contest> {
    let care_of = reservation.map(|reservation| reservation.care_of.as_slice()).unwrap_or_default();
    Some(Contest {
        name: name?.clone(),
        addresses: care_of.iter().map(|care_of| (care_of.home.addr, care_of.addr)).collect(),
        epoch: leaf.attempt.epoch,
        source: source.clone(),
        destination: destination.clone(),
    })
}

async fn ask<E>(leaf: &Leaf<E>, contest: Option<&Contest>, request: Request) -> Verdict {
    let (Some(contest), Some(names)) = (contest, &leaf.edges.names) else {
        tracing::error!(vm = %leaf.attempt.vm, "the machine has no arbiter here; restore [dns]");
        return Verdict::Unknown;
    };
    let asked = tokio::time::timeout(ASK_LIMIT, answer(leaf, names, contest, request)).await;
    let verdict = asked.unwrap_or(Verdict::Unknown);
    tracing::info!(vm = %leaf.attempt.vm, name = contest.name, ?request, ?verdict, "arbiter was asked");
    verdict
}

async fn answer<E>(leaf: &Leaf<E>, names: &Names, contest: &Contest, request: Request) -> Verdict {
    let vm = &leaf.attempt.vm;
    let seen = match leaf.edges.journal.register_epoch(vm) {
        Ok(seen) => seen,
        Err(error) => {
            tracing::error!(%vm, error = chain(&error), "journal cannot be read; nothing follows from the arbiter");
            return Verdict::Unknown;
        }
    };
    let said = match names.arbitrate(contest, request, seen).await {
        Ok(said) => said,
        Err(error) => {
            tracing::warn!(%vm, error = chain(&error), "arbiter did not answer");
            return Verdict::Unknown;
        }
    };
    if said.verdict == Verdict::Behind {
        tracing::error!(
            %vm, name = contest.name, epoch = %said.epoch, %seen,
            "the register does not fit what was seen in it: was the zone restored? The machine is held"
        );
        return said.verdict;
    }
    if let Err(error) = leaf.edges.journal.saw_register(vm, said.epoch) {
        tracing::error!(%vm, error = chain(&error), "journal cannot be written; nothing follows from the arbiter");
        return Verdict::Unknown;
    }
    said.verdict
}
