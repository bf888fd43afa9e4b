//! The source's driver: one loop around the source machine.
//!
//! ```text
//!   select an event -> machine -> journal the record -> perform the actions -> ...
//! ```
//!
//! Decides nothing. What a stage does stands in its leaf; the transfer (disks, memory) is handed from
//! leaf to leaf, so that whoever works on it owns it.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use longhaul_core::migration::arbiter::Request;
use longhaul_core::migration::message::{Handover, MigrationMessage, Refusal, Reservation};
use longhaul_core::migration::permit::RunPermit;
use longhaul_core::migration::record::{Record, SourceRecord};
use longhaul_core::migration::source::{Action, Event, Outcome, Source, SourceLimits};
use longhaul_core::migration::step::Step;
use longhaul_core::migration::{Attempt, CommitMode, Stage};

use super::admission::{disk_window_log, shadow_pages};
use super::arbitrate::{Questions, Register};
use super::precopy::Transfer;
use super::view::Viewer;
use super::work::Work;
use super::{
    Edges, Inbound, Leaf, MachineRow, chain, park, precopy, preflight, release, remembered, rollback,
};
use crate::api::types::{Progressing, RetryView, WanBytes};
use crate::hypervisor::Guest;
use crate::journal::JournalError;
use crate::link::PeerHandle;
use crate::migration::anchor::{self, Anchor, AnchorCommand};

/// What the source's leaves work with.
pub(super) type SourceLeaf = Leaf<Event>;

/// How it was asked for.
#[derive(Debug, Clone, Default)]
pub struct SourceOptions {
    /// Go although names cannot follow.
    pub without_dns: bool,
    /// The pause to aim at instead of the configured one.
    pub max_downtime: Option<Duration>,
    /// The guest is not slowed down, however fast it changes its memory.
    pub no_throttle: bool,
    /// Which retry it is; 0 is the operator's own attempt.
    pub retry: u32,
}

/// How long undoing may take when the journal has failed.
const UNDO_LIMIT: Duration = Duration::from_secs(30);

/// Drives one migration away from this site to its end.
pub struct SourceDriver {
    leaf: SourceLeaf,
    guest: Option<Guest>,
    row: MachineRow,
    options: SourceOptions,
    inbox: mpsc::Receiver<Inbound>,
    events: mpsc::Receiver<Event>,
    anchors: mpsc::Sender<AnchorCommand>,
    work: Work<Transfer>,
    reservation: Option<Reservation>,
    ttl_before_s: watch::Sender<Option<u32>>,
    wan_before: WanBytes,
    questions: Option<Questions>,
    /// The operator wants no attempt to follow.
    ended_by_operator: bool,
    /// Since when the guest stands still for a word from elsewhere.
    waits_since: Option<Duration>,
    /// Beside its disks is being written that the machine is elsewhere.
    noting: Option<JoinHandle<()>>,
}

/// A hand-over takes round trips; what waits longer than this wants looking at.
pub(super) const WAITS_LONG: Duration = Duration::from_secs(5);

impl SourceDriver {
    /// A driver for a guest that runs here; `None` after a restart that did not find it. `anchors` is told
    /// when the home address is to be attracted.
    pub fn new(
        edges: Edges,
        attempt: Attempt,
        guest: Option<Guest>,
        row: MachineRow,
        options: SourceOptions,
        inbox: mpsc::Receiver<Inbound>,
        anchors: mpsc::Sender<AnchorCommand>,
    ) -> Self {
        let viewer = Viewer::new(&attempt, edges.site(), &attempt.peer);
        let (sender, events) = mpsc::channel(64);
        let wan_before = edges.peer(&attempt.peer).map(|peer| wan_bytes(&peer)).unwrap_or_default();
        let leaf = Leaf { edges, attempt, viewer, events: sender, guest: watch::Sender::new(guest.clone()) };
        Self {
            leaf,
            guest,
            row,
            options,
            inbox,
            events,
            anchors,
            work: Work::default(),
            reservation: None,
            ttl_before_s: watch::Sender::new(None),
            wan_before,
            questions: None,
            ended_by_operator: false,
            waits_since: None,
            noting: None,
        }
    }

    /// What it shows of itself.
    pub fn viewer(&self) -> Viewer {
        self.leaf.viewer.clone()
    }

    /// The machine's QEMU here, as long as there is one.
    pub fn guest(&self) -> watch::Receiver<Option<Guest>> {
        self.leaf.guest.subscribe()
    }

    /// Runs a new migration to its end.
    pub async fn run(mut self) -> Result<Outcome, JournalError> {
        // Paused by its operator is how it is wanted: an attempt that fails does not wake it.
        if let Some(guest) = &self.guest {
            self.row.wanted = guest.status().await.map_or(self.row.wanted, |state| state.is_running());
        }
        let (attempt, limits, now) = (self.leaf.attempt.clone(), self.limits(), self.leaf.edges.now());
        let (machine, step) = Source::begin(attempt, limits, self.options.without_dns, now);
        self.drive(machine, step).await
    }

    /// Goes on with one that a restart of the gateway interrupted, from what its journal holds.
    pub async fn resume(
        mut self,
        reservation: Option<Reservation>,
        last: SourceRecord,
    ) -> Result<Outcome, JournalError> {
        let (attempt, limits, now) = (self.leaf.attempt.clone(), self.limits(), self.leaf.edges.now());
        self.reservation = reservation;
        if self.guest.is_none() && matches!(last, SourceRecord::Offered { .. }) {
            self.leaf.report(Event::GuestLost).await;
        }
        let site = self.leaf.edges.site().clone();
        let (machine, step) = Source::recover(attempt, last, limits, &site, now);
        self.drive(machine, step).await
    }

    async fn drive(mut self, mut machine: Source, mut step: Step<Action>) -> Result<Outcome, JournalError> {
        loop {
            let record = step.pending_record().cloned();
            match self.leaf.edges.journal.commit(&self.leaf.attempt, step).await {
                Ok(actions) => {
                    for action in actions {
                        self.perform(action).await;
                    }
                }
                Err(error) => {
                    self.journal_failed(record, &error).await;
                    return Err(error);
                }
            }
            self.show(&machine);
            self.alarm(&machine);
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

    /// Puts a machine that cannot have been given away back to work before this gateway stops deciding. After a
    /// restart the journal says the same.
    async fn journal_failed(&mut self, record: Option<Record>, error: &JournalError) {
        // Records out of order say nothing of the disk, and nothing of what was given away.
        let (Some(Record::Source(record)), JournalError::Store(_)) = (record, error) else { return };
        let vm = self.leaf.attempt.vm.clone();
        tracing::error!(%vm, record = record.name(), error = chain(error), "the journal failed");
        let Some(permit) = RunPermit::not_given_away(&self.leaf.attempt, &record) else { return };
        self.perform(Action::Rollback(permit)).await;
        let undone = async {
            while let Some(event) = self.events.recv().await {
                if matches!(event, Event::RolledBack) {
                    return;
                }
            }
        };
        if tokio::time::timeout(UNDO_LIMIT, undone).await.is_err() {
            tracing::error!(%vm, "not all of the attempt was undone");
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
                Inbound::Message(message) => self.heard(message),
                Inbound::Abort => {
                    self.ended_by_operator = true;
                    self.leaf.viewer.retry(None);
                    Event::AbortRequested
                }
                Inbound::Resolve(resolution) => Event::Resolved(resolution),
            },
            Some(event) = self.events.recv() => event,
            () = tokio::time::sleep(wait) => Event::Tick,
        }
    }

    fn heard(&self, message: MigrationMessage) -> Event {
        if let MigrationMessage::Activated { .. } = message {
            // The shortest round trip: what smoothing adds is queueing behind data that is no longer sent.
            let rtt = self.leaf.edges.peer(&self.leaf.attempt.peer).map(|peer| peer.stats().min_rtt);
            self.leaf.viewer.resumed(rtt.unwrap_or_default() / 2);
        }
        Event::Peer(message)
    }

    async fn perform(&mut self, action: Action) {
        match action {
            Action::Preflight => {
                let Some(guest) = self.running_guest().await else { return };
                let (leaf, row, options) = (self.leaf.clone(), self.row.clone(), self.options.clone());
                tokio::spawn(preflight::run(leaf, guest, row, options));
            }
            Action::Send(message) => {
                let attempt = &self.leaf.attempt;
                self.leaf.edges.send(&attempt.peer, attempt.id, &message);
            }
            Action::StartPreCopy(reservation) => {
                let Some(guest) = self.running_guest().await else { return };
                let (leaf, row) = (self.leaf.clone(), self.row.clone());
                let there = reservation.clone();
                self.reservation = Some(reservation);
                // The name of a visitor is its home's to change.
                let ours = !self.options.without_dns && !self.row.visits(self.leaf.edges.site());
                let ttl = ours.then(|| self.ttl_before_s.clone());
                let throttle = !self.options.no_throttle;
                self.work.hand_on(move |mut transfer: Transfer, stop| {
                    let config = &leaf.edges.config;
                    transfer.memory_base = there.memory_base;
                    transfer.shadow_pages = there.shadow_pages.min(shadow_pages(config, &row.definition));
                    let most = config.migration.max_throttle_percent;
                    transfer.max_throttle_percent = Some(most).filter(|most| throttle && *most > 0);
                    transfer.disk_window_log = there.disk_window_log.clamp(20, disk_window_log(config));
                    precopy::run(leaf, guest, row, ttl, transfer, stop)
                });
            }
            Action::Park => {
                let Some(guest) = self.running_guest().await else { return };
                let (leaf, row) = (self.leaf.clone(), self.row.clone());
                self.work.hand_on(move |transfer, stop| park::run(leaf, guest, row, transfer, stop));
            }
            Action::Arbitrate(request) => {
                // What is asked with a dead guest must not bring it back from a destination that has it whole.
                if self.guest.as_ref().is_some_and(|guest| guest.qmp().is_closed()) {
                    self.leaf.report(Event::GuestLost).await;
                }
                self.ask(request);
            }
            Action::Attract(handover) => {
                anchor::tell(&self.anchors, self.attract(&handover)).await;
                let (attempt, images) = (self.leaf.attempt.clone(), self.row.images.clone());
                let noting = async move { super::note(&attempt, images, &attempt.peer).await };
                self.noting = Some(tokio::spawn(noting));
            }
            Action::Release => {
                let vm = self.leaf.attempt.vm.clone();
                anchor::tell(&self.anchors, AnchorCommand::MoveNames(vm)).await;
                let (leaf, guest, row) = (self.leaf.clone(), self.guest.clone(), self.row.clone());
                self.work.hand_on(move |transfer, _stop| release::run(leaf, guest, row, transfer));
            }
            Action::ReportSecondOwner => self.report_second_owner(),
            Action::Rollback(permit) => {
                let (vm, epoch) = (self.leaf.attempt.vm.clone(), self.leaf.attempt.epoch);
                let (done, forgotten) = oneshot::channel();
                anchor::tell(&self.anchors, AnchorCommand::Forget(vm, epoch, done)).await;
                if let Some(noting) = self.noting.take() {
                    // What follows is written over it.
                    let _ = noting.await;
                }
                let (leaf, guest, row) = (self.leaf.clone(), self.guest.clone(), self.row.clone());
                let ttl = self.ttl_before_s.clone();
                self.work.hand_on(move |transfer, _stop| {
                    rollback::run(leaf, guest, row, ttl, transfer, permit, forgotten)
                });
            }
        }
    }

    fn report_second_owner(&self) {
        let (vm, peer) = (&self.leaf.attempt.vm, &self.leaf.attempt.peer);
        tracing::error!(%vm, %peer, "the other site runs the machine by its operator's word, and it is this site's too: do not let two copies run; forget it at one of the sites");
        self.leaf.viewer.notice_once(format!(
            "Site {peer} runs {vm} by its operator's word, and it was never given away here: see that only one copy runs, \
             and forget it at the other site (`longhaul vm undefine {vm}`)"
        ));
    }

    fn ask(&mut self, request: Request) {
        let open = || {
            let (name, reservation) = (self.row.definition.dns_name.as_ref(), self.reservation.as_ref());
            let (site, peer) = (self.leaf.edges.site(), &self.leaf.attempt.peer);
            let register = Register::of(&self.leaf, name, reservation, site, peer);
            Questions::open(&self.leaf, register, Event::Arbiter)
        };
        self.questions.get_or_insert_with(open).ask(request);
    }

    /// The guest; without one the attempt fails.
    async fn running_guest(&self) -> Option<Guest> {
        if self.guest.is_none() {
            let why = Refusal::Hypervisor("QEMU of the machine is not running".into());
            self.leaf.report(Event::Failed(why)).await;
        }
        self.guest.clone()
    }

    fn attract(&self, handover: &Handover) -> AnchorCommand {
        let follows = self.leaf.edges.names.is_some() && !self.options.without_dns;
        let ttl_before_s = self.ttl_before_s.borrow().or(self.row.ttl_before_s);
        let anchor = Anchor::new(
            &self.leaf.edges,
            &self.leaf.attempt,
            &self.row,
            self.reservation.as_ref(),
            handover,
            follows.then_some(ttl_before_s.or(self.row.definition.dns_ttl_s)).map(Option::unwrap_or_default),
        );
        AnchorCommand::Attract(Box::new(anchor))
    }

    /// Tells the operator of a guest that stands still for the other site's word, or the register's, and goes on doing so.
    fn alarm(&mut self, machine: &Source) {
        if machine.stage() != Stage::Commitment || machine.aborting().is_some() {
            if self.waits_since.take().is_some() {
                self.leaf.viewer.take_notices_back(&format!("{} stands still", self.leaf.attempt.vm));
            }
            return;
        }
        let now = self.leaf.edges.now();
        if now < *self.waits_since.get_or_insert(now) + WAITS_LONG {
            return;
        }
        let (vm, peer) = (&self.leaf.attempt.vm, &self.leaf.attempt.peer);
        let back = match self.leaf.attempt.commit {
            CommitMode::Pipelined => format!(
                " If site {peer} has not got all of it, `longhaul abort {}` at either site lets it go on here once the two \
                 hear each other.",
                self.leaf.attempt.id
            ),
            CommitMode::Confirmed | CommitMode::Arbitrated(_) => String::new(),
        };
        let notice = format!(
            "{vm} stands still: nobody has said yet that it runs at site {peer}. It is asked again and again; look at site \
             {peer}, and at `longhaul journal {vm}`.{back} If that site is gone for good, or runs it and has lost its journal, \
             `longhaul resolve {vm}` decides"
        );
        if !self.leaf.viewer.current().notices.contains(&notice) {
            tracing::warn!(%vm, %peer, "machine stands still, waiting for the word of the other site");
            self.leaf.viewer.notice_once(notice);
        }
    }

    fn show(&mut self, machine: &Source) {
        let viewer = &self.leaf.viewer;
        match machine.aborting() {
            Some(why) => viewer.reason(why.to_string()),
            None => viewer.enter(machine.stage()),
        }
        if machine.is_settled_here()
            && let Some(why) = machine.aborting()
        {
            // The peer is still to be told; for the operator it is over.
            self.stay(why);
        }
        if let Some(peer) = self.leaf.edges.peer(&self.leaf.attempt.peer) {
            let now = wan_bytes(&peer);
            let before = self.wan_before;
            viewer.change(|view| {
                view.wan = WanBytes {
                    memory: now.memory.saturating_sub(before.memory),
                    disk: now.disk.saturating_sub(before.disk),
                    tunnel: now.tunnel.saturating_sub(before.tunnel),
                    control: now.control.saturating_sub(before.control),
                };
            });
        }
    }

    fn end(&self, outcome: &Outcome) {
        let vm = &self.leaf.attempt.vm;
        match outcome {
            Outcome::Moved => {
                tracing::info!(%vm, to = %self.leaf.attempt.peer, "machine moved");
                self.leaf.viewer.end(Progressing::Moved, None);
            }
            Outcome::Stayed(why) => {
                tracing::info!(%vm, %why, "machine stayed");
                self.stay(why);
            }
        }
    }

    /// Shows that the machine stayed, and what follows from that: the daemon begins it.
    fn stay(&self, why: &Refusal) {
        let viewer = &self.leaf.viewer;
        if viewer.current().progressing != Progressing::Running {
            return;
        }
        let edges = &self.leaf.edges;
        if matches!(why, Refusal::Verification(_)) {
            // Whatever it was that differed: the next attempt begins with nothing that both sites only believe to have.
            remembered::forget(edges, &self.leaf.attempt.vm);
        }
        let limits = edges.config.migration.retry_limits();
        let retry = limits.after(self.options.retry, why, edges.site()).filter(|_| !self.ended_by_operator);
        // First what follows: who sees the end must see both.
        viewer.retry(retry.map(|retry| RetryView {
            number: retry.number,
            of: limits.retries,
            delay_ms: retry.delay.as_millis() as u64,
            id: None,
        }));
        viewer.end(Progressing::Stayed, Some(why.to_string()));
    }

    fn limits(&self) -> SourceLimits {
        let config = &self.leaf.edges.config.migration;
        let defaults = SourceLimits::default();
        let mut pause = defaults.pause;
        pause.target = self.options.max_downtime.unwrap_or(Duration::from_millis(config.pause_target_ms));
        pause.limit = Duration::from_secs(config.pause_limit_s);
        pause.ways = self.leaf.attempt.commit.ways_in_pause();
        pause.gives_up = self.options.no_throttle || config.max_throttle_percent == 0;
        SourceLimits {
            cut_limit: Duration::from_secs(config.cut_limit_s),
            pause_budget: Duration::from_secs(config.pause_budget_s),
            pause,
            ..defaults
        }
    }
}

/// What this gateway has put on the link, as an observer of UDP payload counts it, by what caused it.
pub fn wan_bytes(peer: &PeerHandle) -> WanBytes {
    let stats = peer.stats();
    let shares = stats.sent.scaled_to(stats.udp_sent.payload_bytes);
    WanBytes {
        memory: shares.memory_bytes,
        disk: shares.disk_bytes,
        tunnel: shares.datagram_bytes,
        control: shares.control_bytes,
    }
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::{Epoch, MigrationId};

    use super::*;
    use crate::identity::Identity;
    use crate::test_site::{TestSite, machine_row};

    #[tokio::test]
    async fn what_came_damaged_is_tried_again_without_the_memory_that_both_sites_kept() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let (row, id, epoch) = (machine_row(&site.edges), MigrationId(1), Epoch(1));
        let (vm, peer) = (row.definition.name.clone(), "b".parse().unwrap());
        let attempt = Attempt { id, vm, peer, epoch, commit: CommitMode::Confirmed };
        let kept = site.edges.kept_memory(&attempt.vm);
        std::fs::create_dir_all(kept.parent().unwrap()).unwrap();
        let stayed = |why: Refusal| {
            std::fs::write(&kept, "").unwrap();
            let (edges, options) = (site.edges.clone(), SourceOptions::default());
            let (inbox, anchors) = (mpsc::channel(1).1, mpsc::channel(1).0);
            let driver =
                SourceDriver::new(edges, attempt.clone(), None, row.clone(), options, inbox, anchors);
            driver.stay(&why);
            (kept.exists(), driver.viewer().current().retry.is_some())
        };
        assert_eq!(stayed(Refusal::PauseBudget), (true, true));
        assert_eq!(stayed(Refusal::Verification("memory: digest".into())), (false, true));
        assert_eq!(stayed(Refusal::Operator), (true, false));
    }
}
