//! The anchors of this site at work: a task each, and what other sites say of them.
//!
//! ```text
//!  attract ---> packets go to the machine's new place ------------------------> end, when no old
//!     |   ^                                                                     flow is left
//!     |   '-- it has moved on, as the site that it left says
//!     `-- machine runs there --> name moved --> every name server has it --> old answers expired --> TTL restored
//!                        `-----> other sites that attract an address of it are told
//! ```
//!
//! A gateway that restarts takes its anchors up again before it listens. The name is owed until it has moved: a name
//! server that is away delays new clients, it does not lose them. What an anchor is made of is [`super::anchor`]'s, what one
//! does by itself `task`'s.

mod names;
mod task;

use std::collections::{BTreeMap, BTreeSet};

use longhaul_core::ids::{Epoch, SiteName, VmName};
use longhaul_core::migration::generation::behind;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::wire::{AnchorMessage, Message};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::anchor::{Anchor, AnchorCommand, NameState, Released};
use super::{Edges, chain};
use crate::api::types::AnchorView;
use crate::generation::arrivals;
use crate::journal::unix_ms;
use crate::tunnel::TunnelError;
use task::AnchorTask;

/// Takes up every anchor that the journal holds. When it returns their home addresses are attracted, so that
/// connections stalled for the gateway's absence only.
pub async fn restore(edges: &Edges, views: &watch::Sender<BTreeMap<VmName, AnchorView>>) -> Anchors {
    let rows: Vec<(VmName, Anchor)> = edges.journal.anchors().unwrap_or_else(|error| {
        tracing::error!(
            error = chain(&error),
            "anchors could not be read; old connections of machines that left stall"
        );
        Vec::new()
    });
    let mut running = Anchors::default();
    let owes_name = |anchor: &Anchor| {
        anchor.name.is_some() && !matches!(anchor.names, NameState::None | NameState::Settled { .. })
    };
    for (vm, anchor) in rows.into_iter().filter(|(_, anchor)| !anchor.ended || owes_name(anchor)) {
        if has_come_since(edges, &vm) {
            tracing::error!(%vm, "the journal is older than the machine's last arrival here: nothing of its earlier leave is taken up");
            continue;
        }
        running.insert(vm, start(edges, anchor, Begin::Restored, views).await);
    }
    running
}

/// A disk in the pool says that the machine has been here in an epoch of which the ledger does not know.
fn has_come_since(edges: &Edges, vm: &VmName) -> bool {
    let came = arrivals(&edges.config.storage.pool, vm, edges.site());
    let owner = edges.journal.ownership(vm).unwrap_or_default();
    owner.is_some_and(|owner| behind(&owner, vm, &came).is_err())
}

/// Runs every anchor of this site, beginning with those that were restored; `views` shows them.
pub async fn run(
    edges: Edges,
    mut anchors: Anchors,
    mut commands: mpsc::Receiver<AnchorCommand>,
    views: watch::Sender<BTreeMap<VmName, AnchorView>>,
) {
    while let Some(command) = commands.recv().await {
        match command {
            AnchorCommand::Attract(anchor) if !anchors.is_news(&anchor.vm, anchor.epoch) => {}
            AnchorCommand::Attract(anchor) => {
                anchors.end(&anchor.vm).await;
                put(&edges, &anchor);
                anchors.insert(anchor.vm.clone(), start(&edges, *anchor, Begin::Held, &views).await);
            }
            AnchorCommand::MoveNames(vm) => anchors.move_names(&vm),
            // What is left of an earlier stay, such as a name on its way home, is not this attempt's.
            AnchorCommand::Forget(vm, epoch) if row(&edges, &vm).is_none_or(|row| row.epoch != epoch) => {}
            AnchorCommand::Forget(vm, _) => {
                anchors.end(&vm).await;
                forget(&edges, &vm);
                views.send_modify(|views| drop(views.remove(&vm)));
            }
            AnchorCommand::CameBack { vm, names, done } => {
                anchors.end(&vm).await;
                views.send_modify(|views| drop(views.remove(&vm)));
                match names {
                    // In the other's place at once: a crash in between would leave nobody who owes the name.
                    Some(mut anchor) => {
                        anchor.ttl_s = row(&edges, &vm).and_then(|left| left.owed_ttl_s()).unwrap_or(0);
                        put(&edges, &anchor);
                        anchors.insert(vm, start(&edges, *anchor, Begin::Held, &views).await);
                    }
                    None => forget(&edges, &vm),
                }
                // Who asked may have gone.
                let _ = done.send(());
            }
            AnchorCommand::Release(vm, done) => {
                // Who asked may have gone.
                let _ = done.send(release_now(&edges, &mut anchors, &views, &vm).await);
            }
            AnchorCommand::Heard { from, message } => {
                heard(&edges, &mut anchors, &views, &from, message).await;
            }
            AnchorCommand::End(vm, done) => {
                anchors.end(&vm).await;
                if let Some(anchor) = row(&edges, &vm) {
                    if !release(&edges, &anchor).await {
                        tracing::warn!(%vm, "its tunnel is left to the machine, which is on its way back");
                    }
                    forget(&edges, &vm);
                }
                views.send_modify(|views| drop(views.remove(&vm)));
                // Who asked may have gone.
                let _ = done.send(());
            }
        }
    }
}

/// Ends an anchor whatever it still holds.
async fn release_now(
    edges: &Edges,
    anchors: &mut Anchors,
    views: &watch::Sender<BTreeMap<VmName, AnchorView>>,
    vm: &VmName,
) -> Released {
    let Some(anchor) = row(edges, vm).filter(|anchor| !anchor.ended) else { return Released::Nothing };
    if !anchors.known.get(vm).is_some_and(|known| *known.runs_there.borrow()) {
        return Released::StillMoving;
    }
    anchors.end(vm).await;
    if !release(edges, &anchor).await {
        anchors.insert(vm.clone(), start(edges, anchor, Begin::Held, views).await);
        return Released::StillMoving;
    }
    let left = leave(edges, anchor);
    views.send_modify(|views| {
        if let Some(view) = views.get_mut(vm) {
            (view.flows, view.closed_ms) = (0, Some(unix_ms()));
        }
    });
    tracing::info!(%vm, "released by the operator; its address here is free");
    if let Some(anchor) = left.filter(|anchor| !matches!(anchor.names, NameState::Settled { .. })) {
        anchors.insert(vm.clone(), start(edges, anchor, Begin::Held, views).await);
    }
    Released::Ended
}

/// Nothing is attracted any more: what is left of an anchor is its name, if it has one, which may have to follow the
/// machine again.
fn leave(edges: &Edges, mut anchor: Anchor) -> Option<Anchor> {
    anchor.ended = true;
    if anchor.is_of_visit() {
        let (vm, addresses) = (anchor.vm.clone(), anchor.addresses());
        say(edges, &anchor.peer, AnchorMessage::Ended { vm, addresses });
    }
    let has_name = anchor.name.is_some() && !anchor.nics.is_empty();
    match has_name {
        true => put(edges, &anchor),
        false => forget(edges, &anchor.vm),
    }
    has_name.then_some(anchor)
}

/// Another site's word about an anchor. `Moved` counts from the site that the machine was at only.
async fn heard(
    edges: &Edges,
    anchors: &mut Anchors,
    views: &watch::Sender<BTreeMap<VmName, AnchorView>>,
    from: &SiteName,
    message: AnchorMessage,
) {
    match message {
        AnchorMessage::Noted { vm, epoch } => anchors.noted(&vm, epoch, from),
        AnchorMessage::Ended { .. } => {}
        AnchorMessage::Moved { vm, epoch, to, care_of } => {
            let Some(anchor) = row(edges, &vm).filter(|anchor| anchor.epoch < epoch) else {
                if let Ok(Some(Ownership::Offered { .. })) = edges.journal.ownership(&vm) {
                    // Not noted: it is said again once this site knows that the machine left, and has an anchor.
                    return tracing::debug!(%vm, %from, "word of a machine that may not have left ignored");
                }
                // It is known, or none of ours.
                return say(edges, from, AnchorMessage::Noted { vm, epoch });
            };
            if anchor.peer != *from || epoch > Epoch::MAX_FROM_PEER {
                return tracing::warn!(%vm, %from, at = %anchor.peer, "word of a machine that is elsewhere ignored");
            }
            if edges.link.peer(&to).is_none() && to != *edges.site() {
                // Not noted: the site that it left says it again, and passes packets on meanwhile.
                return tracing::warn!(%vm, %to, "the machine moved to a site that is no peer of this one; add it as a [[peer]]");
            }
            if to != *edges.site() {
                anchors.end(&vm).await;
                follow(edges, anchors, views, anchor.moved_on(epoch, &to, &care_of)).await;
            }
            say(edges, from, AnchorMessage::Noted { vm, epoch });
        }
    }
}

/// Packets go to the machine's new place, and the name follows.
async fn follow(
    edges: &Edges,
    anchors: &mut Anchors,
    views: &watch::Sender<BTreeMap<VmName, AnchorView>>,
    anchor: Anchor,
) {
    let (vm, to) = (anchor.vm.clone(), anchor.peer.clone());
    for hold in anchor.holds() {
        if let Err(error) = edges.tunnel.retarget(hold.key, to.clone()).await {
            tracing::debug!(%vm, error = chain(&error), "nothing is attracted for it any more");
        }
    }
    put(edges, &anchor);
    tracing::info!(%vm, %to, "machine has moved on");
    if !anchor.ended || anchor.name.is_some() {
        anchors.insert(vm, start(edges, anchor, Begin::Held, views).await);
    }
}

fn say(edges: &Edges, to: &SiteName, message: AnchorMessage) {
    let Some(peer) = edges.link.peer(to) else { return };
    if let Err(error) = peer.try_send(Message::Anchor(message)) {
        tracing::debug!(%to, %error, "message lost");
    }
}

fn row(edges: &Edges, vm: &VmName) -> Option<Anchor> {
    edges.journal.anchor(vm).unwrap_or_else(|error| {
        tracing::error!(%vm, error = chain(&error), "anchor could not be read");
        None
    })
}

fn put(edges: &Edges, anchor: &Anchor) {
    if let Err(error) = edges.journal.put_anchor(&anchor.vm, anchor) {
        tracing::error!(vm = %anchor.vm, error = chain(&error), "anchor could not be written down");
    }
}

/// The anchors that were begun, ended or not.
#[derive(Default)]
pub struct Anchors {
    known: BTreeMap<VmName, Known>,
}

struct Known {
    epoch: Epoch,
    runs_there: watch::Sender<bool>,
    /// The sites that have heard where it is.
    noted: watch::Sender<BTreeSet<SiteName>>,
    task: JoinHandle<()>,
}

impl Anchors {
    /// Nothing is known of a hand-over as late as this. One that has ended is not begun again by a late
    /// word, so it stays known; the machine's next move has a higher epoch.
    fn is_news(&self, vm: &VmName, epoch: Epoch) -> bool {
        self.known.get(vm).is_none_or(|known| known.epoch < epoch)
    }

    fn insert(&mut self, vm: VmName, known: Known) {
        self.known.insert(vm, known);
    }

    fn move_names(&self, vm: &VmName) {
        if let Some(known) = self.known.get(vm) {
            known.runs_there.send_replace(true);
        }
    }

    fn noted(&self, vm: &VmName, epoch: Epoch, by: &SiteName) {
        if let Some(known) = self.known.get(vm).filter(|known| known.epoch == epoch) {
            known.noted.send_if_modified(|noted| noted.insert(by.clone()));
        }
    }

    /// Ends the task of an anchor: when this returns it does nothing more. What it changed stays.
    async fn end(&mut self, vm: &VmName) {
        let Some(known) = self.known.remove(vm) else { return };
        known.task.abort();
        // Only that it has ended matters, not how.
        drop(known.task.await);
    }
}

/// What the tunnel knows when an anchor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begin {
    /// Packets are held already.
    Held,
    /// Nothing: the gateway was restarted.
    Restored,
}

async fn start(
    edges: &Edges,
    anchor: Anchor,
    begin: Begin,
    views: &watch::Sender<BTreeMap<VmName, AnchorView>>,
) -> Known {
    let (runs_there, told) = watch::channel(anchor.runs_there);
    let (noted, heard) = watch::channel(BTreeSet::new());
    views.send_modify(|views| drop(views.insert(anchor.vm.clone(), anchor.view())));
    let epoch = anchor.epoch;
    let mut task = AnchorTask { edges: edges.clone(), anchor, views: views.clone(), told, heard };
    task.attract(begin).await;
    Known { epoch, runs_there, noted, task: tokio::spawn(task.run()) }
}

/// Takes down what an anchor has on this host. False if the machine is on its way back: then it is what it comes to.
async fn release(edges: &Edges, anchor: &Anchor) -> bool {
    for hold in anchor.holds() {
        match edges.tunnel.let_go(hold).await {
            Ok(()) => {}
            Err(TunnelError::Returning(_)) => return false,
            Err(error) => {
                tracing::warn!(vm = %anchor.vm, error = chain(&error), "tunnel could not be taken down cleanly");
            }
        }
    }
    true
}

fn forget(edges: &Edges, vm: &VmName) {
    if let Err(error) = edges.journal.remove_anchor(vm) {
        tracing::error!(%vm, error = chain(&error), "anchor could not be removed from the journal");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::oneshot;

    use super::*;
    use crate::identity::Identity;
    use crate::test_site::{TestSite, anchor, silent_names};

    /// The anchors of a site at work.
    fn at_work(edges: &Edges) -> mpsc::Sender<AnchorCommand> {
        let (commands, outbox) = mpsc::channel(4);
        tokio::spawn(run(edges.clone(), Anchors::default(), outbox, watch::channel(BTreeMap::new()).0));
        commands
    }

    #[tokio::test]
    async fn a_name_that_comes_home_before_it_has_settled_keeps_its_ttl() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let edges = Edges { names: Some(Arc::new(silent_names())), ..site.edges.clone() };
        for (left, kept) in [(NameState::Pending, 3600), (NameState::Settled { at_unix_ms: 1 }, 0)] {
            let vm: VmName = "web1".parse().unwrap();
            put(&edges, &Anchor { names: left, ..anchor("b") });
            let names = Some(Box::new(Anchor { epoch: Epoch(2), ttl_s: 0, ..anchor("a") }));
            let (done, ended) = oneshot::channel();
            at_work(&edges).send(AnchorCommand::CameBack { vm: vm.clone(), names, done }).await.unwrap();
            ended.await.unwrap();
            let written = row(&edges, &vm).unwrap();
            assert_eq!((written.epoch, written.ttl_s), (Epoch(2), kept), "{left:?}");
        }
    }

    fn known(epoch: u64) -> Known {
        let runs_there = watch::Sender::new(false);
        let mut told = runs_there.subscribe();
        let task = tokio::spawn(async move { drop(told.wait_for(|runs| *runs).await) });
        Known { epoch: Epoch(epoch), runs_there, noted: watch::Sender::default(), task }
    }

    #[tokio::test]
    async fn a_machine_that_left_before_is_anchored_again_when_it_leaves_again() {
        let vm: VmName = "web1".parse().unwrap();
        let mut anchors = Anchors::default();
        assert!(anchors.is_news(&vm, Epoch(1)));
        anchors.insert(vm.clone(), known(1));
        assert!(!anchors.is_news(&vm, Epoch(1)), "the same word again");
        anchors.move_names(&vm);
        (&mut anchors.known.get_mut(&vm).unwrap().task).await.unwrap();
        assert!(!anchors.is_news(&vm, Epoch(1)), "a late word");
        assert!(anchors.is_news(&vm, Epoch(2)), "the machine was moved again");
    }

    #[tokio::test]
    async fn the_task_of_an_anchor_that_is_ended_does_nothing_more() {
        let vm: VmName = "web1".parse().unwrap();
        let mut anchors = Anchors::default();
        let anchor = known(1);
        let runs_there = anchor.runs_there.clone();
        anchors.insert(vm.clone(), anchor);
        anchors.end(&vm).await;
        assert_eq!(runs_there.receiver_count(), 0, "the task is gone");
        assert!(anchors.is_news(&vm, Epoch(1)));
    }
}
