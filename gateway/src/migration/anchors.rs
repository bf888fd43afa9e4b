//! The anchors of this site at work: a task each, and what other sites say of them.
//!
//! ```text
//!  attract ---> packets go to the machine's new place ------------------------> end, when no old
//!     |   ^                                                                     flow is left
//!     |   '-- it has moved on, as the site that it left says
//!     `-- machine runs there --> name moved --> every name server has it --> old answers expired --> TTL restored
//!                        `-----> other sites that attract an address of it are told, also after the end
//! ```
//!
//! A gateway that restarts takes its anchors up again before it listens. The name is owed until it has moved: a name
//! server that is away delays new clients, it does not lose them. What an anchor is made of is [`super::anchor`]'s, what one
//! does by itself `task`'s.

mod attract;
mod ended;
mod names;
mod needed;
mod task;
mod telling;

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
    for (vm, anchor) in rows.into_iter().filter(|(_, anchor)| has_work(edges, anchor)) {
        if has_come_since(edges, &vm) {
            tracing::error!(%vm, "the journal is older than the machine's last arrival here: nothing of its earlier leave is taken up");
            continue;
        }
        running.insert(vm, start(edges, anchor, Begin::Restored, views).await);
    }
    running
}

/// Neither here nor in doubt.
fn is_away(edges: &Edges, vm: &VmName) -> bool {
    matches!(edges.journal.ownership(vm), Ok(Some(Ownership::Away { .. })))
}

fn has_work(edges: &Edges, anchor: &Anchor) -> bool {
    !anchor.ended || anchor.owes_name() || telling::is_owed(edges, anchor)
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
                let anchor = match row(&edges, &anchor.vm) {
                    Some(left) => anchor.in_place_of(&left),
                    None => *anchor,
                };
                begin(&edges, &mut anchors, &views, anchor).await;
            }
            AnchorCommand::MoveNames(vm) => anchors.move_names(&vm),
            // What is left of an earlier stay, such as a name on its way home, is not this attempt's.
            AnchorCommand::Forget(vm, epoch, _) if row(&edges, &vm).is_none_or(|row| row.epoch != epoch) => {}
            AnchorCommand::Forget(vm, _, _done) => {
                anchors.end(&vm).await;
                views.send_modify(|views| drop(views.remove(&vm)));
                match row(&edges, &vm).and_then(|row| row.stayed(edges.site())) {
                    Some(anchor) => begin(&edges, &mut anchors, &views, anchor).await,
                    None => forget(&edges, &vm),
                }
            }
            AnchorCommand::CameBack { vm, names, done } => {
                came_back(&edges, &mut anchors, &views, &vm, names).await;
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
            AnchorCommand::Said { vm, to, done } => {
                let anchor = row(&edges, &vm).filter(|anchor| anchor.runs_there && is_away(&edges, &vm));
                // Who asked may have gone.
                let _ = done.send(anchor.is_some());
                if let Some(anchor) = anchor {
                    tracing::warn!(%vm, from = %anchor.peer, %to, "its operator says that the machine was handed on");
                    let (epoch, care_of) = (anchor.epoch.next(), Vec::new());
                    let message = AnchorMessage::Moved { vm, epoch, to, care_of };
                    heard(&edges, &mut anchors, &views, &anchor.peer, message).await;
                }
            }
            AnchorCommand::End(vm, done) => {
                forget_now(&edges, &mut anchors, &views, &vm).await;
                // Who asked may have gone.
                let _ = done.send(());
            }
        }
    }
}

/// The machine is here again: nothing is held for it, and its name may be owed.
async fn came_back(
    edges: &Edges,
    anchors: &mut Anchors,
    views: &watch::Sender<BTreeMap<VmName, AnchorView>>,
    vm: &VmName,
    names: Option<Box<Anchor>>,
) {
    anchors.end(vm).await;
    views.send_modify(|views| drop(views.remove(vm)));
    let Some(anchor) = names else { return forget(edges, vm) };
    let anchor = match row(edges, vm) {
        Some(left) => anchor.of_return(&left),
        None => *anchor,
    };
    // In the other's place at once: a crash in between would leave nobody who owes the name.
    begin(edges, anchors, views, anchor).await;
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
    let heard = anchors.end(vm).await;
    // Its task may have written it again.
    let mut anchor = row(edges, vm).unwrap_or(anchor);
    anchor.forget_told(&heard);
    if !release(edges, &anchor).await {
        anchors.insert(vm.clone(), start(edges, anchor, Begin::Held, views).await);
        return Released::StillMoving;
    }
    leave(edges, &mut anchor);
    tracing::info!(%vm, "released by the operator; its address here is free");
    if has_work(edges, &anchor) {
        anchors.insert(vm.clone(), start(edges, anchor, Begin::Held, views).await);
    }
    views.send_modify(|views| {
        if let Some(view) = views.get_mut(vm) {
            (view.flows, view.closed_ms) = (0, Some(unix_ms()));
        }
    });
    Released::Ended
}

/// Ends an anchor with its name. Other sites are told where the machine is all the same: they attract what is theirs.
async fn forget_now(
    edges: &Edges,
    anchors: &mut Anchors,
    views: &watch::Sender<BTreeMap<VmName, AnchorView>>,
    vm: &VmName,
) {
    let heard = anchors.end(vm).await;
    if let Some(mut anchor) = row(edges, vm) {
        if !anchor.ended && !release(edges, &anchor).await {
            tracing::warn!(%vm, "its tunnel is left to the machine, which is on its way back");
        }
        (anchor.name, anchor.names) = (None, NameState::None);
        anchor.forget_told(&heard);
        leave(edges, &mut anchor);
        // Where it is is forgotten with it.
        anchor.nics.clear();
        match has_work(edges, &anchor) {
            true => anchors.insert(vm.clone(), start(edges, anchor, Begin::Held, views).await),
            false => forget(edges, vm),
        }
    }
    views.send_modify(|views| drop(views.remove(vm)));
}

/// Nothing is attracted any more.
fn leave(edges: &Edges, anchor: &mut Anchor) {
    let was_ended = std::mem::replace(&mut anchor.ended, true);
    if !was_ended && anchor.is_of_visit() {
        let (vm, addresses) = (anchor.vm.clone(), anchor.addresses());
        say(edges, &anchor.peer, AnchorMessage::Ended { vm, addresses });
    }
    keep_rest(edges, anchor);
}

/// What is left of one that attracts nothing. At the machine's home: where it is, for its name, which may have to follow it
/// again, and because nobody else may bring it home. Elsewhere its word for sites that have not heard it, or nothing.
fn keep_rest(edges: &Edges, anchor: &Anchor) {
    let is_of_home = !anchor.nics.is_empty() && !anchor.is_of_visit();
    match is_of_home || telling::is_owed(edges, anchor) {
        true => put(edges, anchor),
        false => forget(edges, &anchor.vm),
    }
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
            if anchor.peer == to && epoch <= Epoch::MAX_FROM_PEER {
                // It is where it is looked for, by whatever way it came there: whoever says so need not go on.
                return say(edges, from, AnchorMessage::Noted { vm, epoch });
            }
            if anchor.peer != *from || epoch > Epoch::MAX_FROM_PEER {
                if anchors.is_first(&vm, from, epoch) {
                    tracing::warn!(%vm, %from, at = %anchor.peer, "word of a machine that is elsewhere ignored");
                }
                return;
            }
            if edges.link.peer(&to).is_none() && to != *edges.site() {
                // Not noted: the site that it left says it again, and passes packets on meanwhile.
                if anchors.is_first(&vm, from, epoch) {
                    tracing::warn!(%vm, %to, "the machine moved to a site that is no peer of this one; add it as a [[peer]]");
                }
                return;
            }
            if to != *edges.site() {
                let heard = anchors.end(&vm).await;
                // Its task may have written it again.
                let mut anchor = row(edges, &vm).unwrap_or(anchor);
                anchor.forget_told(&heard);
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
    let (vm, to) = (&anchor.vm, &anchor.peer);
    for hold in anchor.holds() {
        if let Err(error) = edges.tunnel.retarget(hold.key, to.clone()).await {
            tracing::debug!(%vm, error = chain(&error), "nothing is attracted for it any more");
        }
    }
    tracing::info!(%vm, %to, "machine has moved on");
    if !has_work(edges, &anchor) {
        return keep_rest(edges, &anchor);
    }
    begin(edges, anchors, views, anchor).await;
}

/// Writes an anchor down and lets it work.
async fn begin(
    edges: &Edges,
    anchors: &mut Anchors,
    views: &watch::Sender<BTreeMap<VmName, AnchorView>>,
    anchor: Anchor,
) {
    put(edges, &anchor);
    anchors.insert(anchor.vm.clone(), start(edges, anchor, Begin::Held, views).await);
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
    /// The word that was ignored last, by the machine that left.
    ignored: BTreeMap<VmName, (SiteName, Epoch)>,
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

    /// Whether a word that is ignored has not been just before: it is said again and again.
    fn is_first(&mut self, vm: &VmName, from: &SiteName, epoch: Epoch) -> bool {
        let word = (from.clone(), epoch);
        self.ignored.insert(vm.clone(), word.clone()) != Some(word)
    }

    /// Ends the task of an anchor: when this returns it does nothing more. What it changed stays. Who has heard where the
    /// machine is.
    async fn end(&mut self, vm: &VmName) -> BTreeSet<SiteName> {
        let Some(known) = self.known.remove(vm) else { return BTreeSet::new() };
        known.task.abort();
        // Only that it has ended matters, not how.
        drop(known.task.await);
        known.noted.borrow().clone()
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
    let (edges, views) = (edges.clone(), views.clone());
    let (over, unattracted) = (watch::Sender::default(), watch::Sender::default());
    let needed_ms = match begin {
        Begin::Held => None,
        Begin::Restored => needed::noted_ms(&edges, &anchor),
    };
    let task = AnchorTask { edges, anchor, views, told, heard, over, unattracted, needed_ms };
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
mod tests;
