//! One migration's questions to its arbiter, one after the other.
//!
//! Decides nothing: the answer is the machine's, and so is asking again. A question that waits behind another one
//! is enough; more are dropped. What was seen in the register is durable before the machine hears of it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use longhaul_core::ids::{Epoch, SiteName, VmName};
use longhaul_core::migration::arbiter::{Arbiter, Contest, Request, Said, Verdict};
use longhaul_core::migration::message::Reservation;

use super::{Edges, Leaf, chain};
use crate::dns::{Names, NamesError, Prize};
use crate::etcd::{EtcdError, Registers};

/// A question without an answer for this long is answered with `Unknown`; it may still be applied.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// The questions of one migration, in order.
pub(super) struct Questions(mpsc::Sender<Request>);

impl Questions {
    /// Answers questions until it is dropped. Without a register every answer is `Unknown`.
    pub(super) fn open<E: Send + 'static>(
        leaf: &Leaf<E>,
        register: Option<Register>,
        event: fn(Verdict) -> E,
    ) -> Self {
        let (sender, mut requests) = mpsc::channel(1);
        let leaf = leaf.clone();
        tokio::spawn(async move {
            while let Some(request) = requests.recv().await {
                let verdict = ask(&leaf, register.as_ref(), request).await;
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

/// The register of one migration, and what is decided in it.
pub(super) struct Register {
    contest: Contest,
    kind: Arbiter,
    place: Place,
}

/// Where it is.
enum Place {
    /// Beside the machine's name.
    Dns(Arc<Names>, Prize),
    /// A key of the machine's.
    Etcd(Arc<Registers>, VmName),
}

/// Why a register said nothing.
#[derive(Debug, thiserror::Error)]
enum Silence {
    #[error(transparent)]
    Dns(#[from] NamesError),
    #[error(transparent)]
    Etcd(#[from] EtcdError),
}

impl Register {
    /// The register of the leaf's machine, whose name is `name`; nothing where this site cannot ask it.
    pub(super) fn of<E>(
        leaf: &Leaf<E>,
        name: Option<&String>,
        reservation: Option<&Reservation>,
        source: &SiteName,
        destination: &SiteName,
    ) -> Option<Self> {
        let kind = leaf.attempt.commit.arbiter()?;
        let epoch = leaf.attempt.epoch;
        let contest = Contest { epoch, source: source.clone(), destination: destination.clone() };
        let place = match kind {
            Arbiter::Dns => Place::Dns(leaf.edges.names.clone()?, prize(name?, reservation)),
            Arbiter::Etcd => Place::Etcd(leaf.edges.etcd.clone()?, leaf.attempt.vm.clone()),
        };
        Some(Self { contest, kind, place })
    }

    async fn arbitrate(&self, request: Request, seen: Epoch) -> Result<Said, Silence> {
        match &self.place {
            Place::Dns(names, prize) => {
                names.arbitrate(prize, &self.contest, request, seen).await.map_err(Silence::from)
            }
            Place::Etcd(registers, vm) => {
                registers.arbitrate(vm, &self.contest, request, seen).await.map_err(Silence::from)
            }
        }
    }
}

fn prize(name: &str, reservation: Option<&Reservation>) -> Prize {
    let care_of = reservation.map(|reservation| reservation.care_of.as_slice()).unwrap_or_default();
    let addresses = care_of.iter().map(|care_of| (care_of.home.addr, care_of.addr)).collect();
    Prize { name: name.to_owned(), addresses }
}

async fn ask<E>(leaf: &Leaf<E>, register: Option<&Register>, request: Request) -> Verdict {
    let vm = &leaf.attempt.vm;
    let Some(register) = register else {
        tracing::error!(%vm, "the machine's arbiter is not configured here any more; restore [dns] or [etcd]");
        return Verdict::Unknown;
    };
    let asked = tokio::time::timeout(ASK_LIMIT, answer(&leaf.edges, vm, register, request)).await;
    let verdict = asked.unwrap_or(Verdict::Unknown);
    tracing::info!(%vm, arbiter = ?register.kind, ?request, ?verdict, "arbiter was asked");
    verdict
}

async fn answer(edges: &Edges, vm: &VmName, register: &Register, request: Request) -> Verdict {
    let seen = match edges.journal.register_epoch(register.kind, vm) {
        Ok(seen) => seen,
        Err(error) => {
            tracing::error!(%vm, error = chain(&error), "journal cannot be read; nothing follows from the arbiter");
            return Verdict::Unknown;
        }
    };
    let said = match register.arbitrate(request, seen).await {
        Ok(said) => said,
        Err(error) => {
            tracing::warn!(%vm, error = chain(&error), "arbiter did not answer");
            return Verdict::Unknown;
        }
    };
    if said.verdict == Verdict::Behind {
        tracing::error!(
            %vm, arbiter = ?register.kind, epoch = %said.epoch, %seen,
            "the register does not fit what was seen in it: was it restored from a backup? The machine is held"
        );
        return said.verdict;
    }
    if let Err(error) = edges.journal.saw_register(register.kind, vm, said.epoch) {
        tracing::error!(%vm, error = chain(&error), "journal cannot be written; nothing follows from the arbiter");
        return Verdict::Unknown;
    }
    said.verdict
}
