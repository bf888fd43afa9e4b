//! Migrations as they begin: requests of the operator, messages of peers.

use std::collections::BTreeSet;
use std::net::IpAddr;

use longhaul_core::ids::{Epoch, MigrationId, SiteName, VmName};
use longhaul_core::migration::Attempt;
use longhaul_core::migration::late;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{MigrationMessage, Proposal, Refusal, Reservation};
use longhaul_core::migration::record::{DestinationRecord, Record};
use longhaul_core::wire::Message;
use tokio::sync::{mpsc, watch};

use super::{Admitted, Daemon, Ended, MAX_ACCEPTED, Running};
use crate::api::RequestError;
use crate::api::types::{MigrateRequest, Started};
use crate::hypervisor::Guest;
use crate::journal::History;
use crate::migration::source::SourceOptions;
use crate::migration::{DestinationDriver, Inbound, MachineRow, SourceDriver, admission};

/// Messages that may wait for one driver.
const INBOX: usize = 64;

impl Daemon {
    /// `longhaul migrate`.
    pub(super) async fn migrate(&mut self, request: MigrateRequest) -> Result<Started, RequestError> {
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
        if let Some(held) = self.held(&machine.row) {
            return Err(RequestError::Conflict(format!("{}; {}", held.why, held.remedy)));
        }
        let epoch = self.owned_epoch(vm)?;
        if self.migration_of(vm).is_some() {
            return Err(RequestError::Conflict(format!("Machine {vm} is already moving")));
        }
        if machine.row.handover.is_some() {
            let text = format!(
                "Machine {vm} is visiting; this version moves machines from their home site {} only",
                machine.row.home_site
            );
            return Err(RequestError::Conflict(text));
        }
        let Some(guest) = machine.guest.clone() else {
            return Err(RequestError::Conflict(format!(
                "Machine {vm} is not running; start it, or copy its disk"
            )));
        };
        let attempt = Attempt {
            id: MigrationId(rand::random()),
            vm: vm.clone(),
            peer: request.to.clone(),
            epoch: epoch.next(),
        };
        let options = SourceOptions {
            without_dns: request.without_dns,
            max_downtime: request.max_downtime_ms.map(std::time::Duration::from_millis),
        };
        let (inbox, outbox) = mpsc::channel(INBOX);
        // Paused by its operator is how it is wanted: an attempt that fails does not wake it.
        let wanted = guest.status().await.map_or(machine.row.wanted, |state| state.is_running());
        let row = MachineRow { wanted, ..machine.row.clone() };
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
        let up = self.edges.peer(&request.to).is_some_and(|peer| peer.is_up());
        if !up {
            drop(inbox.try_send(Inbound::LinkDown));
        }
        tracing::info!(%vm, to = %request.to, id = %attempt.id, "migration begins");
        self.spawn(attempt.clone(), inbox, viewer, guest, async move { driver.run().await.err() });
        Ok(Started { id: attempt.id.to_string() })
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
        drive: impl Future<Output = Option<crate::journal::JournalError>> + Send + 'static,
    ) {
        let (id, ended) = (attempt.id, self.ended.clone());
        let span = tracing::info_span!("migration", vm = %attempt.vm, id = %attempt.id);
        tokio::spawn(tracing::Instrument::instrument(
            async move {
                let failed = drive.await;
                // The daemon's task outlives every driver.
                drop(ended.send(Ended { id, failed }).await);
            },
            span,
        ));
        self.migrations.insert(id, Running { attempt, inbox: Some(inbox), viewer, guest });
    }

    /// A peer said something.
    pub(super) async fn on_message(&mut self, peer: SiteName, message: Message) {
        let Message::Migration { id, body } = message else { return };
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
            MigrationMessage::Reserve { .. } => self.on_reserve(id, peer, &message).await,
            MigrationMessage::Commit { .. }
            | MigrationMessage::Abort { .. }
            | MigrationMessage::Reserved(_)
            | MigrationMessage::Loaded { .. } => self.answer_from_journal(id, peer, &message).await,
            MigrationMessage::TakenBack { .. } => self.on_taken_back(id, &peer).await,
            // An answer to a driver that has ended, and nothing waits for one to it.
            MigrationMessage::Accept
            | MigrationMessage::Decline(_)
            | MigrationMessage::Activated { .. }
            | MigrationMessage::Refused { .. }
            | MigrationMessage::Unknown => {}
        }
    }

    fn on_proposal(&mut self, id: MigrationId, peer: SiteName, proposal: Box<Proposal>) {
        let vm = proposal.definition.name.clone();
        let busy = self.busy(&vm);
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

    fn busy(&self, vm: &VmName) -> Option<Refusal> {
        if self.migration_of(vm).is_some() {
            return Some(Refusal::Busy(format!("{vm} is already moving at site {}", self.edges.site())));
        }
        match self.edges.journal.ownership(vm) {
            Ok(Some(Ownership::Here { .. })) => {
                Some(Refusal::Busy(format!("site {} has a machine {vm} of its own", self.edges.site())))
            }
            Ok(Some(Ownership::Away { .. } | Ownership::Arriving { .. }) | None) => {
                let anchored =
                    self.anchor_views.borrow().get(vm).is_some_and(|view| view.closed_ms.is_none());
                anchored.then(|| {
                    Refusal::Busy(format!(
                        "site {} still holds old connections of {vm}; this version takes it back when they have ended",
                        self.edges.site()
                    ))
                })
            }
            Err(error) => Some(Refusal::Other(error.to_string())),
        }
    }

    /// The answer to a proposal is known.
    pub(super) async fn on_admitted(&mut self, admitted: Admitted) {
        let Admitted { id, peer, proposal, verdict } = admitted;
        let answer = match verdict {
            Ok(()) => {
                while self.accepted.len() >= MAX_ACCEPTED {
                    self.accepted.pop_first();
                }
                self.accepted.insert(id, (peer.clone(), *proposal));
                MigrationMessage::Accept
            }
            Err(why) => {
                tracing::info!(%peer, vm = %proposal.definition.name, %why, "proposal declined");
                MigrationMessage::Decline(why)
            }
        };
        self.say(id, &peer, answer).await;
    }

    async fn on_reserve(&mut self, id: MigrationId, peer: SiteName, message: &MigrationMessage) {
        let known = self.edges.journal.entries(id).unwrap_or_default();
        if !known.is_empty() {
            return self.answer_from_journal(id, peer, message).await;
        }
        let Some((_, proposal)) = self.accepted.remove(&id).filter(|(from, _)| *from == peer) else {
            let why = Refusal::Restarted(self.edges.site().clone());
            return self.say(id, &peer, MigrationMessage::Decline(why)).await;
        };
        let vm = proposal.definition.name.clone();
        if let Some(why) = self.busy(&vm) {
            return self.say(id, &peer, MigrationMessage::Decline(why)).await;
        }
        let taken = self.taken_addresses();
        let reservation = match admission::reserve(&self.edges.config, &taken, &proposal) {
            Ok(reservation) => reservation,
            Err(why) => return self.say(id, &peer, MigrationMessage::Decline(why)).await,
        };
        let attempt = Attempt { id, vm: vm.clone(), peer: peer.clone(), epoch: proposal.epoch.next() };
        let (inbox, outbox) = mpsc::channel(INBOX);
        let driver =
            DestinationDriver::new(self.edges.clone(), attempt.clone(), proposal, reservation, outbox);
        let (viewer, guest) = (driver.viewer(), driver.guest());
        tracing::info!(%vm, from = %peer, %id, "machine is coming");
        self.spawn(attempt, inbox, viewer, guest, async move { driver.run().await.err() });
    }

    /// A late word about a migration that has no driver any more.
    async fn answer_from_journal(&mut self, id: MigrationId, peer: SiteName, message: &MigrationMessage) {
        let entries = match self.edges.journal.entries(id) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::error!(%id, %error, "journal cannot be read; the peer gets no answer");
                return;
            }
        };
        let last = entries.last().map(|entry| (entry.epoch, &entry.record));
        if let Some(answer) = late::answer(last, message) {
            self.say(id, &peer, answer).await;
        }
    }

    async fn say(&self, id: MigrationId, peer: &SiteName, message: MigrationMessage) {
        self.edges.send(peer, id, &message).await;
    }

    /// Care-of addresses that machines have here, or are about to have.
    fn taken_addresses(&self) -> BTreeSet<IpAddr> {
        let rows = self.machines.values().flat_map(|machine| machine.row.care_of.iter());
        let mut taken: BTreeSet<IpAddr> = rows.map(|care_of| care_of.addr).collect();
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
        Record::Destination(DestinationRecord::Reserved { .. } | DestinationRecord::Loaded) => true,
        Record::Destination(DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. }) => {
            ownership == Some(&Ownership::Here { epoch: history.attempt.epoch })
        }
        Record::Destination(DestinationRecord::Refused { .. } | DestinationRecord::Overruled)
        | Record::Source(_) => false,
    };
    let reservation = history.entries.iter().find_map(|entry| match &entry.record {
        Record::Destination(DestinationRecord::Reserved { reservation, .. }) => Some(reservation),
        Record::Destination(
            DestinationRecord::Loaded
            | DestinationRecord::Activated { .. }
            | DestinationRecord::Refused { .. }
            | DestinationRecord::TakenOver { .. }
            | DestinationRecord::Overruled,
        )
        | Record::Source(_) => None,
    });
    reservation.filter(|_| holds)
}

#[cfg(test)]
mod tests {
    use longhaul_core::migration::CommitMode;
    use longhaul_core::migration::message::{CareOf, Handover};
    use longhaul_core::migration::record::Entry;
    use longhaul_core::tunnel::handover::Prefix;

    use super::*;

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
        };
        let care_of = CareOf {
            nic: "lan".parse().unwrap(),
            home: Prefix { addr: "198.51.100.10".parse().unwrap(), len: 24 },
            addr: "203.0.113.200".parse().unwrap(),
        };
        let reserved = DestinationRecord::Reserved {
            peer: "a".parse().unwrap(),
            proposal: Box::new(proposal),
            reservation: Reservation { care_of: vec![care_of] },
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
}
