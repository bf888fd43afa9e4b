//! Migrations as they begin: requests of the operator, messages of peers.

use std::collections::BTreeSet;
use std::net::IpAddr;

use longhaul_core::ids::{Epoch, MigrationId, SiteName, VmName};
use longhaul_core::migration::Attempt;
use longhaul_core::migration::late;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{Carried, MigrationMessage, Proposal, Refusal, Reservation};
use longhaul_core::migration::record::{DestinationRecord, Record};
use longhaul_core::tunnel::policy::PortKey;
use longhaul_core::wire::{AnchorMessage, Message};
use tokio::sync::{mpsc, watch};

use super::proposals::Begun;
use super::retries::Following;
use super::{Admitted, Daemon, Ended, Machine, Running};
use crate::api::RequestError;
use crate::api::types::{MigrateRequest, Progressing, Started};
use crate::config::ArbiterChoice;
use crate::hypervisor::Guest;
use crate::journal::{History, Journal, JournalError};
use crate::migration::anchor::{Anchor, AnchorCommand, tell};
use crate::migration::source::SourceOptions;
use crate::migration::{DestinationDriver, Inbound, MachineRow, SourceDriver, admission};

/// Messages that may wait for one driver.
const INBOX: usize = 64;

impl Daemon {
    /// `longhaul migrate`.
    pub(super) async fn migrate(&mut self, request: MigrateRequest) -> Result<Started, RequestError> {
        let vm = request.vm.clone();
        self.movable(&request)?;
        if !self.edges.peer(&request.to).is_some_and(|peer| peer.is_up()) {
            let text = format!("Site {} is not connected; `longhaul status` shows when it is", request.to);
            return Err(RequestError::Conflict(text));
        }
        let started = self.begin(request, None).await?;
        self.forget_retries(&vm);
        Ok(started)
    }

    /// Begins an attempt: the operator's own, or the one that follows another.
    pub(super) async fn begin(
        &mut self,
        request: MigrateRequest,
        follows: Option<&Following>,
    ) -> Result<Started, RequestError> {
        let (machine, guest, epoch) = self.movable(&request)?;
        let commit = self.edges.config.commit_mode(&request.to);
        let vm = &request.vm;
        let attempt = Attempt {
            id: MigrationId(rand::random()),
            vm: vm.clone(),
            peer: request.to.clone(),
            epoch: epoch.next(),
            commit,
        };
        let options = SourceOptions {
            without_dns: request.without_dns,
            max_downtime: request.max_downtime_ms.map(std::time::Duration::from_millis),
            no_throttle: request.no_throttle,
            retry: follows.map_or(0, |following| following.number),
        };
        let (inbox, outbox) = mpsc::channel(INBOX);
        let row = machine.row.clone();
        let anchors = self.anchors.clone();
        let driver = SourceDriver::new(
            self.edges.clone(),
            attempt.clone(),
            Some(guest),
            row,
            options,
            outbox,
            anchors,
        );
        let (viewer, guest) = (driver.viewer(), driver.guest());
        viewer.change(|view| {
            view.follows = follows.map(|following| following.id.to_string());
        });
        let up = self.edges.peer(&request.to).is_some_and(|peer| peer.is_up());
        if !up {
            drop(inbox.try_send(Inbound::LinkDown));
        }
        let retry = follows.map_or(0, |following| following.number);
        tracing::info!(%vm, to = %request.to, id = %attempt.id, retry, "migration begins");
        let id = attempt.id;
        self.spawn(attempt, inbox, viewer, guest, async move { driver.run().await.err() });
        if let Some(running) = self.migrations.get_mut(&id) {
            running.request = Some(request);
        }
        self.keep_limit(id, follows).await;
        Ok(Started { id: id.to_string() })
    }

    /// The machine that is asked for, if it may and can move now.
    fn movable(&self, request: &MigrateRequest) -> Result<(&Machine, Guest, Epoch), RequestError> {
        let vm = &request.vm;
        let Some(machine) = self.machines.get(vm) else {
            return Err(RequestError::NotFound(format!(
                "No machine {vm} at this site; `longhaul vm list` lists them"
            )));
        };
        let config = &self.edges.config;
        let Some(peer) = config.peer(&request.to) else {
            let known: Vec<&str> = config.peer.iter().map(|peer| peer.name.as_str()).collect();
            let text = format!("No site {}; configured are: {}", request.to, known.join(", "));
            return Err(RequestError::NotFound(text));
        };
        if !peer.may_receive(vm.as_str()) {
            let text = format!("peer.{}.may_receive does not name {vm}", request.to);
            return Err(RequestError::Conflict(text));
        }
        if let Some(held) = super::machines::held(&self.edges, &machine.row) {
            return Err(RequestError::Conflict(format!("{}; {}", held.why, held.remedy)));
        }
        let epoch = self.owned_epoch(vm)?;
        if self.migration_of(vm).is_some() {
            return Err(RequestError::Conflict(format!("Machine {vm} is already moving")));
        }
        if self.owes_register(vm) {
            return Err(RequestError::Conflict(format!(
                "The arbiter's register does not say yet that {vm} is here; it moves on when the register has answered"
            )));
        }
        self.expect_idle(vm)?;
        if machine.row.visits(self.edges.site()) && peer.arbiter == ArbiterChoice::Dns {
            let text = format!(
                "Machine {vm} is visiting, and with peer.{}.arbiter = \"dns\" only its home {} can move its name; set the \
                 arbiter to \"none\" or \"etcd\" at both sites",
                request.to, machine.row.home_site
            );
            return Err(RequestError::Conflict(text));
        }
        if machine.silent {
            return Err(super::machines::silent(vm));
        }
        let Some(guest) = machine.guest.clone() else {
            return Err(RequestError::Conflict(format!(
                "Machine {vm} is not running; start it, or copy its disk"
            )));
        };
        Ok((machine, guest, epoch))
    }

    /// Its arrival is over, but for the register's word.
    fn owes_register(&self, vm: &VmName) -> bool {
        self.migrations.values().any(|running| {
            let arrives = running.attempt.vm == *vm && running.viewer.current().to == *self.edges.site();
            arrives && running.inbox.is_some()
        })
    }

    fn owned_epoch(&self, vm: &VmName) -> Result<Epoch, RequestError> {
        match self.edges.journal.ownership(vm) {
            Ok(Some(Ownership::Here { epoch })) => Ok(epoch),
            Ok(Some(Ownership::Away { site, .. })) => {
                Err(RequestError::Conflict(format!("Machine {vm} is at site {site}; move it from there")))
            }
            Ok(Some(Ownership::Arriving { .. })) => {
                Err(RequestError::Conflict(format!("Machine {vm} is just arriving here")))
            }
            Ok(Some(Ownership::Offered { site, .. })) => {
                Err(RequestError::Conflict(format!("Machine {vm} is just being handed over to site {site}")))
            }
            Ok(None) => Err(RequestError::NotFound(format!("No machine {vm} at this site"))),
            Err(error) => Err(RequestError::Failed(error.to_string())),
        }
    }

    /// Runs a driver as a task of its own.
    pub(super) fn spawn(
        &mut self,
        attempt: Attempt,
        inbox: mpsc::Sender<Inbound>,
        viewer: crate::migration::view::Viewer,
        guest: watch::Receiver<Option<Guest>>,
        drive: impl Future<Output = Option<JournalError>> + Send + 'static,
    ) {
        let (id, ended, settled) = (attempt.id, self.ended.clone(), self.settled.clone());
        let mut view = viewer.watch();
        let span = tracing::info_span!("migration", vm = %attempt.vm, id = %attempt.id);
        tokio::spawn(tracing::Instrument::instrument(
            async move {
                let mut drive = std::pin::pin!(drive);
                let over = async {
                    // A view that is gone goes with its driver.
                    let _ = view.wait_for(|view| view.progressing != Progressing::Running).await;
                };
                let failed = tokio::select! {
                    biased;
                    failed = &mut drive => failed,
                    () = over => {
                        // Its peer, or the register, may still have to be told: nobody waits for that.
                        let _ = settled.send(id).await;
                        drive.await
                    }
                };
                // The daemon's task outlives every driver.
                drop(ended.send(Ended { id, failed }).await);
            },
            span,
        ));
        let (request, limit_mbit, inbox, guest) = (None, None, Some(inbox), Some(guest));
        self.migrations.insert(id, Running { attempt, request, limit_mbit, inbox, viewer, guest });
    }

    /// A peer said something.
    pub(super) async fn on_message(&mut self, peer: SiteName, message: Message) {
        let (id, body) = match message {
            Message::Migration { id, body } => (id, body),
            Message::Anchor(message) => return self.on_anchor(peer, message).await,
            // The link's own.
            Message::BulkOpen { .. } | Message::BulkAck { .. } | Message::BulkClose { .. } => return,
        };
        let message = match MigrationMessage::from_wire(&body) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(%peer, %error, "message ignored");
                return;
            }
        };
        tracing::debug!(%peer, %id, ?message, "heard");
        if let Some(running) = self.migrations.get(&id) {
            if running.attempt.peer != peer {
                tracing::warn!(%peer, %id, "message about somebody else's migration ignored");
                return;
            }
            if let Some(inbox) = &running.inbox {
                // Full or just ended: what matters is repeated.
                drop(inbox.try_send(Inbound::Message(message)));
                return;
            }
        }
        match message {
            MigrationMessage::Propose(proposal) => self.on_proposal(id, peer, proposal),
            MigrationMessage::Reserve { .. } => self.on_reserve(id, peer, &message),
            MigrationMessage::Commit { .. }
            | MigrationMessage::Offer { .. }
            | MigrationMessage::Abort { .. }
            | MigrationMessage::Reserved(_)
            | MigrationMessage::Loaded { .. } => self.answer_from_journal(id, peer, &message),
            MigrationMessage::TakenBack { .. } => self.on_taken_back(id, &peer).await,
            MigrationMessage::Activated { .. } => self.on_second_copy(id, &peer),
            // An answer to a driver that has ended, and nothing waits for one to it.
            MigrationMessage::Accept
            | MigrationMessage::Decline(_)
            | MigrationMessage::Refused { .. }
            | MigrationMessage::Unknown => {}
        }
    }

    /// A site that attracts addresses of a machine, or has left one here, says something.
    async fn on_anchor(&mut self, peer: SiteName, message: AnchorMessage) {
        if !message.is_bounded() {
            return tracing::warn!(%peer, "message about an anchor ignored: too many addresses");
        }
        match message {
            AnchorMessage::Ended { vm, addresses } => self.on_anchor_ended(&peer, &vm, &addresses).await,
            message @ (AnchorMessage::Moved { .. } | AnchorMessage::Noted { .. }) => {
                tell(&self.anchors, AnchorCommand::Heard { from: peer, message }).await;
            }
        }
    }

    /// No connection is left by these addresses.
    async fn on_anchor_ended(&mut self, peer: &SiteName, vm: &VmName, addresses: &[IpAddr]) {
        let Some(machine) = self.machines.get_mut(vm) else { return };
        let over = |carried: &Carried| carried.site == *peer && addresses.contains(&carried.addr);
        let known = &machine.row.over;
        let is_news = |carried: &&Carried| over(carried) && !known.contains(&carried.addr);
        let ended: Vec<Carried> = machine.row.carried.iter().filter(is_news).cloned().collect();
        if ended.is_empty() {
            return;
        }
        let add = |row: &mut MachineRow| row.over.extend(ended.iter().map(|carried| carried.addr));
        add(&mut machine.row);
        // A migration that is under way writes to the same row.
        if let Err(error) = self.edges.journal.change_machine(vm, add) {
            tracing::warn!(%vm, %error, "the end of an anchor could not be written down");
        }
        for Carried { nic, addr, .. } in ended {
            let key = PortKey { machine: vm.clone(), nic };
            if let Err(error) = self.edges.tunnel.forget_address(key, addr).await {
                tracing::warn!(%vm, %error, "tunnel lost the machine");
            }
        }
        tracing::info!(%vm, at = %peer, "no connection is left by an address of an earlier visit");
    }

    fn on_proposal(&mut self, id: MigrationId, peer: SiteName, proposal: Box<Proposal>) {
        match self.proposals.begin(&peer, id) {
            Begun::Look => {}
            Begun::Accepted => return self.say(id, &peer, MigrationMessage::Accept),
            Begun::Dropped => {
                tracing::debug!(%peer, %id, "proposal dropped; the peer repeats it");
                return;
            }
        }
        let busy = self.busy(&peer, &proposal);
        let (edges, admitted) = (self.edges.clone(), self.admitted.clone());
        tokio::spawn(async move {
            let verdict = match busy {
                Some(why) => Err(why),
                None => admission::admit(&edges, &peer, &proposal).await,
            };
            // The daemon's task outlives this one.
            drop(admitted.send(Admitted { id, peer, proposal, verdict }).await);
        });
    }

    fn busy(&self, peer: &SiteName, proposal: &Proposal) -> Option<Refusal> {
        let vm = &proposal.definition.name;
        if let Err(why) = admission::check_arriving(&self.edges.config, peer, self.arriving_from(peer)) {
            return Some(why);
        }
        if self.migration_of(vm).is_some() {
            return Some(Refusal::Busy(format!("{vm} is already moving at site {}", self.edges.site())));
        }
        if self.working.contains(vm) {
            return Some(Refusal::Busy(format!(
                "site {} is just taking up a machine {vm}",
                self.edges.site()
            )));
        }
        match self.edges.journal.ownership(vm) {
            Ok(Some(Ownership::Here { .. })) => {
                Some(Refusal::Busy(format!("site {} has a machine {vm} of its own", self.edges.site())))
            }
            Ok(Some(Ownership::Offered { .. })) => {
                Some(Refusal::Busy(format!("{vm} is being handed over at site {}", self.edges.site())))
            }
            Ok(known @ (Some(Ownership::Away { .. } | Ownership::Arriving { .. }) | None)) => {
                let anchor: Option<Anchor> = match self.edges.journal.anchor(vm) {
                    Ok(anchor) => anchor,
                    Err(error) => return Some(Refusal::Other(error.to_string())),
                };
                // What a visited site heard last of a machine may be long past.
                let at = anchor.as_ref().filter(|anchor| !anchor.is_of_visit()).map(|anchor| &anchor.peer);
                admission::check_epoch(known.as_ref(), at, peer, proposal).err()
            }
            Err(error) => Some(Refusal::Other(error.to_string())),
        }
    }

    /// How many machines of `peer` are on their way here.
    fn arriving_from(&self, peer: &SiteName) -> usize {
        let here = self.edges.site();
        let arriving = self.migrations.values().filter(|running| {
            running.inbox.is_some() && running.attempt.peer == *peer && running.viewer.current().to == *here
        });
        arriving.count()
    }

    /// The answer to a proposal is known.
    pub(super) fn on_admitted(&mut self, admitted: Admitted) {
        let Admitted { id, peer, proposal, verdict } = admitted;
        let answer = match verdict {
            Ok(()) => {
                self.proposals.end(&peer, id, Some(*proposal));
                MigrationMessage::Accept
            }
            Err(why) => {
                tracing::info!(%peer, vm = %proposal.definition.name, %why, "proposal declined");
                self.proposals.end(&peer, id, None);
                MigrationMessage::Decline(why)
            }
        };
        self.say(id, &peer, answer);
    }

    fn on_reserve(&mut self, id: MigrationId, peer: SiteName, message: &MigrationMessage) {
        // One that cannot be read is answered like one that is there: not at all, and it is logged.
        if !self.edges.journal.entries(id).is_ok_and(|known| known.is_empty()) {
            return self.answer_from_journal(id, peer, message);
        }
        let Some(proposal) = self.proposals.take(&peer, id) else {
            let why = Refusal::Restarted(self.edges.site().clone());
            return self.say(id, &peer, MigrationMessage::Decline(why));
        };
        let vm = proposal.definition.name.clone();
        if let Some(why) = self.busy(&peer, &proposal) {
            return self.say(id, &peer, MigrationMessage::Decline(why));
        }
        let taken = self.taken_addresses(&vm);
        let mut reservation = match admission::reserve(&self.edges.config, &taken, &proposal) {
            Ok(reservation) => reservation,
            Err(why) => return self.say(id, &peer, MigrationMessage::Decline(why)),
        };
        let free = admission::available_memory();
        admission::fit_memory(&self.edges.config, free, &proposal.definition, &mut reservation);
        reservation.memory_base = crate::memory::kept::digest(&self.edges.kept_memory(&vm));
        let (epoch, commit) = (proposal.epoch.next(), proposal.commit);
        let attempt = Attempt { id, vm: vm.clone(), peer: peer.clone(), epoch, commit };
        let (inbox, outbox) = mpsc::channel(INBOX);
        let anchors = self.anchors.clone();
        let driver = DestinationDriver::new(
            self.edges.clone(),
            attempt.clone(),
            proposal,
            reservation,
            outbox,
            anchors,
        );
        let (viewer, guest) = (driver.viewer(), driver.guest());
        tracing::info!(%vm, from = %peer, %id, "machine is coming");
        self.spawn(attempt, inbox, viewer, guest, async move { driver.run().await.err() });
    }

    /// A late word about a migration that has no driver any more.
    fn answer_from_journal(&self, id: MigrationId, peer: SiteName, message: &MigrationMessage) {
        match late_answer(&self.edges.journal, id, &peer, message) {
            Ok(Some(answer)) => self.say(id, &peer, answer),
            Ok(None) => {}
            Err(error) => tracing::error!(%id, %error, "journal cannot be read; the peer gets no answer"),
        }
    }

    fn say(&self, id: MigrationId, peer: &SiteName, message: MigrationMessage) {
        self.edges.send(peer, id, &message);
    }

    /// Care-of addresses that machines have here, or are about to have, or had, and at which clients may still ask for
    /// them; for `vm`, which comes, not its own of before.
    fn taken_addresses(&self, vm: &VmName) -> BTreeSet<IpAddr> {
        let rows = self.machines.values().flat_map(|machine| machine.row.care_of.iter());
        let mut taken: BTreeSet<IpAddr> = rows.map(|care_of| care_of.addr).collect();
        let anchors = self.anchor_views.borrow();
        let others = anchors.iter().filter(|(name, view)| *name != vm && view.closed_ms.is_none());
        taken.extend(others.flat_map(|(_, view)| view.home.iter().copied()));
        drop(anchors);
        // Reservations of migrations that are under way, or ended and not yet written down.
        for history in self.edges.journal.histories().unwrap_or_default() {
            let ownership = self.edges.journal.ownership(&history.attempt.vm).unwrap_or_default();
            if let Some(reservation) = held(&history, ownership.as_ref()) {
                taken.extend(reservation.care_of.iter().map(|care_of| care_of.addr));
            }
        }
        taken
    }
}

/// What a migration to this site holds still: not one that was refused, nor one whose machine has been
/// forgotten or moved since.
fn held<'a>(history: &'a History, ownership: Option<&Ownership>) -> Option<&'a Reservation> {
    let holds = match &history.entries.last()?.record {
        Record::Destination(
            DestinationRecord::Reserved { .. }
            | DestinationRecord::Loaded
            | DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. },
        ) => true,
        Record::Destination(DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. }) => {
            ownership == Some(&Ownership::Here { epoch: history.attempt.epoch })
        }
        Record::Destination(
            DestinationRecord::Refused { .. }
            | DestinationRecord::Overruled
            | DestinationRecord::HandedBack { .. },
        )
        | Record::Source(_) => false,
    };
    let reservation = history.entries.iter().find_map(|entry| match &entry.record {
        Record::Destination(DestinationRecord::Reserved { reservation, .. }) => Some(reservation),
        Record::Destination(
            DestinationRecord::Loaded
            | DestinationRecord::Activated { .. }
            | DestinationRecord::Refused { .. }
            | DestinationRecord::TakenOver { .. }
            | DestinationRecord::Overruled
            | DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. }
            | DestinationRecord::HandedBack { .. },
        )
        | Record::Source(_) => None,
    });
    reservation.filter(|_| holds)
}

/// The journal's word for `peer`, if it is the one that the migration is with.
fn late_answer(
    journal: &Journal,
    id: MigrationId,
    peer: &SiteName,
    message: &MigrationMessage,
) -> Result<Option<MigrationMessage>, JournalError> {
    if journal.attempt(id)?.is_some_and(|attempt| attempt.peer != *peer) {
        tracing::warn!(%peer, %id, "message about somebody else's migration ignored");
        return Ok(None);
    }
    let entries = journal.entries(id)?;
    let last = entries.last().map(|entry| (entry.epoch, &entry.record));
    Ok(late::answer(last, message))
}

#[cfg(test)]
mod tests {
    use longhaul_core::migration::CommitMode;
    use longhaul_core::migration::message::{CareOf, Handover};
    use longhaul_core::migration::record::{Entry, SourceRecord};
    use longhaul_core::migration::step::Step;
    use longhaul_core::tunnel::handover::Prefix;

    use super::*;
    use crate::identity::Identity;
    use crate::test_site::{TestSite, machine_row};

    fn history(last: Option<DestinationRecord>) -> History {
        let definition = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n";
        let proposal = Proposal {
            definition: toml::from_str(definition).unwrap(),
            home_site: "a".parse().unwrap(),
            hypervisor: "7.2".into(),
            epoch: Epoch(1),
            running: true,
            commit: CommitMode::Confirmed,
            nics: Vec::new(),
            carried: Vec::new(),
        };
        let care_of = CareOf {
            nic: "lan".parse().unwrap(),
            home: Prefix { addr: "198.51.100.10".parse().unwrap(), len: 24 },
            addr: "203.0.113.200".parse().unwrap(),
        };
        let reserved = DestinationRecord::Reserved {
            peer: "a".parse().unwrap(),
            proposal: Box::new(proposal),
            reservation: Reservation {
                care_of: vec![care_of],
                shadow_pages: 0,
                disk_window_log: 20,
                memory_base: None,
            },
        };
        let entry = |record| Entry {
            vm: "web1".parse().unwrap(),
            epoch: Epoch(2),
            at_unix_ms: 0,
            record: Record::Destination(record),
        };
        let attempt = Attempt {
            id: MigrationId(1),
            vm: "web1".parse().unwrap(),
            peer: "a".parse().unwrap(),
            epoch: Epoch(2),
            commit: CommitMode::Confirmed,
        };
        History { attempt, entries: [Some(reserved), last].into_iter().flatten().map(entry).collect() }
    }

    #[test]
    fn an_address_is_held_while_its_machine_comes_or_is_here_and_no_longer() {
        let here = |epoch| Ownership::Here { epoch: Epoch(epoch) };
        let away = Ownership::Away { site: "a".parse().unwrap(), epoch: Epoch(3) };
        let activated = || {
            let handover = Box::new(Handover { nics: Vec::new() });
            history(Some(DestinationRecord::Activated { handover }))
        };
        let coming = Ownership::Arriving { epoch: Epoch(2) };
        assert!(held(&history(None), Some(&coming)).is_some());
        assert!(held(&history(Some(DestinationRecord::Loaded)), Some(&away)).is_some(), "it comes back");
        assert!(held(&activated(), Some(&here(2))).is_some());
        assert!(held(&activated(), None).is_none(), "forgotten");
        assert!(held(&activated(), Some(&away)).is_none(), "moved on");
        assert!(held(&activated(), Some(&here(4))).is_none(), "it has come again since");
    }

    fn attempt() -> Attempt {
        let (vm, peer) = ("web1".parse().unwrap(), "b".parse().unwrap());
        Attempt { id: MigrationId(7), vm, peer, epoch: Epoch(4), commit: CommitMode::Confirmed }
    }

    fn site(name: &str) -> SiteName {
        name.parse().unwrap()
    }

    #[tokio::test]
    async fn an_address_that_ends_during_a_copy_leaves_the_ttl_that_is_to_be_restored() {
        let key = Identity::generate().unwrap();
        let site = TestSite::open("a", &key, &[]).await;
        let (mut daemon, vm) = (Daemon::idle(site.edges.clone()), "web1".parse().unwrap());
        let (addr, nic) = ("203.0.113.10".parse().unwrap(), "lan".parse().unwrap());
        let (home, from) = ("198.51.100.10".parse().unwrap(), "b".parse().unwrap());
        let carried = vec![Carried { nic, home, addr, site: from }];
        let row = MachineRow { carried, ..machine_row(&site.edges) };
        daemon
            .machines
            .insert(row.definition.name.clone(), Machine { row: row.clone(), guest: None, silent: false });
        // The copy has begun since the daemon looked.
        let lowered = MachineRow { ttl_before_s: Some(3600), ..row };
        site.edges.journal.put_machine(&vm, &lowered).unwrap();
        daemon.on_anchor_ended(&"b".parse().unwrap(), &vm, &[addr]).await;
        let written: MachineRow = site.edges.journal.machine(&vm).unwrap().unwrap();
        assert_eq!((written.over, written.ttl_before_s), (vec![addr], Some(3600)));
        assert_eq!(*site.asked.borrow(), ["forget_address web1/lan 203.0.113.10"]);
    }

    #[tokio::test]
    async fn the_journals_word_is_for_the_peer_of_the_migration_alone() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("journal.redb")).unwrap();
        let proposal = serde_json::from_value(serde_json::json!({
            "definition": {"name": "web1", "machine": "pc-q35-7.2", "vcpus": 1, "memory_mib": 64},
            "home_site": "a", "hypervisor": "", "epoch": 3, "running": true, "commit": "confirmed", "nics": [],
            "carried": [],
        }));
        let peer = site("b");
        let reserved =
            SourceRecord::Reserved { peer, proposal: Box::new(proposal.unwrap()), without_names: false };
        let aborted = SourceRecord::Aborted { why: Refusal::Operator };
        for record in [reserved, aborted] {
            journal.commit(&attempt(), Step::<()>::record(Record::Source(record), Vec::new())).await.unwrap();
        }
        let answer =
            |peer: &str, message| late_answer(&journal, MigrationId(7), &site(peer), message).unwrap();
        let loaded = MigrationMessage::Loaded { epoch: Epoch(4) };
        assert!(matches!(answer("b", &loaded), Some(MigrationMessage::Abort { .. })));
        assert_eq!(answer("c", &loaded), None);
        let handover = Box::new(Handover { nics: Vec::new() });
        let commit = MigrationMessage::Commit { epoch: Epoch(4), handover };
        assert_eq!(answer("b", &commit), None, "it is the source here and takes no machine");
        let unknown = late_answer(&journal, MigrationId(8), &site("c"), &commit).unwrap();
        assert_eq!(
            unknown,
            Some(MigrationMessage::Unknown),
            "a machine that was never reserved is not taken"
        );
    }
}
