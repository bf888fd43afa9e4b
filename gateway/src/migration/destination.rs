//! The destination's driver: one loop around the destination machine, like the source's.
//!
//! Decides nothing. What is held for the machine is handed from leaf to leaf.

use std::time::Duration;

use tokio::sync::{mpsc, watch};

use longhaul_core::migration::Attempt;
use longhaul_core::migration::arbiter::Request;
use longhaul_core::migration::destination::{
    Action, Destination, DestinationLimits, Event, Outcome, Remains, WaitsFor,
};
use longhaul_core::migration::message::{Handover, Proposal, Reservation};
use longhaul_core::migration::record::DestinationRecord;
use longhaul_core::migration::step::Step;

use super::anchor::AnchorCommand;
use super::arbitrate::{Questions, Register};
use super::prepare::Held;
use super::source::WAITS_LONG;
use super::view::Viewer;
use super::work::Work;
use super::{Edges, Inbound, Leaf, activate, discard, prepare, standing};
use crate::api::types::Progressing;
use crate::hypervisor::Guest;
use crate::journal::JournalError;

/// What the destination's leaves work with.
pub(super) type DestinationLeaf = Leaf<Event>;

/// Drives one migration to this site to its end.
pub struct DestinationDriver {
    leaf: DestinationLeaf,
    proposal: Proposal,
    reservation: Reservation,
    inbox: mpsc::Receiver<Inbound>,
    events: mpsc::Receiver<Event>,
    work: Work<Held>,
    questions: Option<Questions>,
    anchors: mpsc::Sender<AnchorCommand>,
    /// Since when a machine stands still that may have been given to this site.
    waits_since: Option<Duration>,
}

impl DestinationDriver {
    /// A driver for a machine that was admitted. `anchors` is told when it is here: it may have left something.
    pub fn new(
        edges: Edges,
        attempt: Attempt,
        proposal: Proposal,
        reservation: Reservation,
        inbox: mpsc::Receiver<Inbound>,
        anchors: mpsc::Sender<AnchorCommand>,
    ) -> Self {
        let viewer = Viewer::new(&attempt, &attempt.peer, edges.site());
        let (sender, events) = mpsc::channel(64);
        let leaf = Leaf { edges, attempt, viewer, events: sender, guest: watch::Sender::new(None) };
        Self {
            leaf,
            proposal,
            reservation,
            inbox,
            events,
            work: Work::default(),
            questions: None,
            anchors,
            waits_since: None,
        }
    }

    /// What it shows of itself.
    pub fn viewer(&self) -> Viewer {
        self.leaf.viewer.clone()
    }

    /// The machine's QEMU here, once it runs.
    pub fn guest(&self) -> watch::Receiver<Option<Guest>> {
        self.leaf.guest.subscribe()
    }

    /// Runs a new migration to its end.
    pub async fn run(self) -> Result<Outcome, JournalError> {
        let (machine, step) = Destination::begin(
            self.leaf.attempt.clone(),
            Box::new(self.proposal.clone()),
            self.reservation.clone(),
            self.limits(),
            self.leaf.edges.now(),
        );
        self.drive(machine, step).await
    }

    /// Goes on with one that a restart of the gateway interrupted; `guest` is the QEMU that was found. One
    /// that is there and did not answer is not in it, but `qemu_found`.
    pub async fn resume(
        mut self,
        guest: Option<Guest>,
        qemu_found: bool,
        last: DestinationRecord,
    ) -> Result<Outcome, JournalError> {
        self.work = Work::Idle(Box::new(Held::found(guest)));
        if matches!(last, DestinationRecord::Loaded) {
            let leaf = self.leaf.clone();
            self.work.hand_on(|held, stop| prepare::watch(leaf, held, stop));
        }
        let site = self.leaf.edges.site().clone();
        let (machine, step) = Destination::recover(
            self.leaf.attempt.clone(),
            Remains {
                nics: self.proposal.nics.clone(),
                reservation: self.reservation.clone(),
                last,
                qemu_found,
            },
            self.limits(),
            &site,
            self.leaf.edges.now(),
        );
        self.drive(machine, step).await
    }

    async fn drive(
        mut self,
        mut machine: Destination,
        mut step: Step<Action>,
    ) -> Result<Outcome, JournalError> {
        loop {
            for action in self.leaf.edges.journal.commit(&self.leaf.attempt, step).await? {
                self.perform(action).await;
            }
            self.show(&machine);
            self.alarm(&machine);
            if machine.is_settled_here() {
                // The register may still have to be told; for the operator it is over.
                self.end(&Outcome::Active);
            }
            if let Some(outcome) = machine.outcome() {
                let outcome = outcome.clone();
                self.end(&outcome);
                return Ok(outcome);
            }
            let event = self.select(machine.deadline()).await;
            tracing::debug!(vm = %self.leaf.attempt.vm, ?event, "event");
            (machine, step) = machine.handle(event, self.leaf.edges.now());
        }
    }

    /// The next event. Cancel safe: nothing is taken without being returned.
    async fn select(&mut self, deadline: Option<Duration>) -> Event {
        let now = self.leaf.edges.now();
        let wait = deadline.map_or(Duration::from_secs(3600), |at| at.saturating_sub(now));
        tokio::select! {
            biased;
            Some(inbound) = self.inbox.recv() => match inbound {
                Inbound::LinkUp => Event::LinkUp,
                Inbound::LinkDown => Event::LinkDown,
                Inbound::Message(message) => Event::Peer(message),
                Inbound::Abort => Event::AbortRequested,
                // Its flows went with the source; its neighbours are known.
                Inbound::Resolve(resolution) => {
                    let handover = Handover { nics: self.proposal.nics.clone() };
                    Event::Resolved(resolution, Box::new(handover))
                }
            },
            Some(event) = self.events.recv() => event,
            () = tokio::time::sleep(wait) => Event::Tick,
        }
    }

    async fn perform(&mut self, action: Action) {
        match action {
            Action::Send(message) => {
                let attempt = &self.leaf.attempt;
                self.leaf.edges.send(&attempt.peer, attempt.id, &message);
            }
            Action::Prepare => {
                let (leaf, proposal) = (self.leaf.clone(), self.proposal.clone());
                let reservation = self.reservation.clone();
                self.work.hand_on(move |held, stop| prepare::run(leaf, proposal, reservation, held, stop));
            }
            Action::Arbitrate(request) => self.ask(request),
            Action::CheckGuest => {
                let leaf = self.leaf.clone();
                self.work.hand_on(move |held, _stop| standing::run(leaf, held));
            }
            Action::Activate(permit, handover) => {
                let (leaf, proposal) = (self.leaf.clone(), self.proposal.clone());
                let (reservation, anchors) = (self.reservation.clone(), self.anchors.clone());
                self.work.hand_on(move |held, _stop| {
                    activate::run(leaf, proposal, reservation, *handover, held, permit, anchors)
                });
            }
            Action::Discard => {
                let (leaf, proposal) = (self.leaf.clone(), self.proposal.clone());
                let reservation = self.reservation.clone();
                self.work.hand_on(move |held, _stop| discard::run(leaf, proposal, reservation, held));
            }
        }
    }

    fn show(&self, machine: &Destination) {
        match machine.refusing() {
            Some(why) => self.leaf.viewer.reason(why.to_string()),
            None => self.leaf.viewer.enter(machine.stage()),
        }
    }

    /// Tells the operator of a machine that stands still between the sites, and takes it back when it does no more.
    fn alarm(&mut self, machine: &Destination) {
        let vm = &self.leaf.attempt.vm;
        let Some(waits_for) = machine.waits_for() else {
            if self.waits_since.take().is_some() {
                self.leaf.viewer.take_notices_back(&format!("{vm} stands still"));
            }
            return;
        };
        let now = self.leaf.edges.now();
        if now < *self.waits_since.get_or_insert(now) + WAITS_LONG {
            return;
        }
        let notice = format!("{vm} stands still: {}", self.explain(waits_for));
        if !self.leaf.viewer.current().notices.contains(&notice) {
            let peer = &self.leaf.attempt.peer;
            tracing::warn!(%vm, %peer, ?waits_for, "machine stands still between the sites");
            self.leaf.viewer.notice_once(notice);
        }
    }

    fn explain(&self, waits_for: WaitsFor) -> String {
        let Attempt { vm, peer, id, .. } = &self.leaf.attempt;
        match waits_for {
            WaitsFor::Rest => {
                let minutes = self.limits().cut_limit.as_secs().div_ceil(60);
                format!(
                    "site {peer} has given it away, and its last bytes have not come. They come when the link is back, unless \
                     the gateway of site {peer} was started anew: then that asks for its machine. After {minutes} minutes without \
                     a link, or with `longhaul abort {id}` here, it is refused, and goes on at site {peer} when that hears of it"
                )
            }
            WaitsFor::Word => format!(
                "it is all here, and site {peer} has not said yet that it may run. It is asked again and again; look at site \
                 {peer}, and at `longhaul journal {vm}`. If that site is gone for good, `longhaul resolve {vm}` decides"
            ),
            WaitsFor::Register => format!(
                "it is all here, and the arbiter's register has not said yet whose it is. It is asked again and again; \
                 `longhaul journal {vm}` says how it stands"
            ),
        }
    }

    fn ask(&mut self, request: Request) {
        let open = || {
            let name = self.proposal.definition.dns_name.as_ref();
            let (peer, site) = (&self.leaf.attempt.peer, self.leaf.edges.site());
            let register = Register::of(&self.leaf, name, Some(&self.reservation), peer, site);
            Questions::open(&self.leaf, register, Event::Arbiter)
        };
        self.questions.get_or_insert_with(open).ask(request);
    }

    fn end(&self, outcome: &Outcome) {
        let vm = &self.leaf.attempt.vm;
        match outcome {
            Outcome::Active => self.leaf.viewer.end(Progressing::Moved, None),
            Outcome::Refused(why) => {
                tracing::info!(%vm, %why, "machine did not come");
                self.leaf.viewer.end(Progressing::Stayed, Some(why.to_string()));
            }
        }
    }

    fn limits(&self) -> DestinationLimits {
        let cut_limit = Duration::from_secs(self.leaf.edges.config.migration.cut_limit_s + 60);
        DestinationLimits { cut_limit, ..DestinationLimits::default() }
    }
}
