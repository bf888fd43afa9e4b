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
                    Some(anchor) => {
                        let anchor = match row(&edges, &vm) {
                            Some(left) => anchor.of_return(&left),
                            None => *anchor,
                        };
                        put(&edges, &anchor);
                        anchors.insert(vm, start(&edges, anchor, Begin::Held, &views).await);
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
    let (vm, to) = (anchor.vm.clone(), anchor.peer.clone());
    for hold in anchor.holds() {
        if let Err(error) = edges.tunnel.retarget(hold.key, to.clone()).await {
            tracing::debug!(%vm, error = chain(&error), "nothing is attracted for it any more");
        }
    }
    tracing::info!(%vm, %to, "machine has moved on");
    if !has_work(edges, &anchor) {
        return keep_rest(edges, &anchor);
    }
    put(edges, &anchor);
    anchors.insert(vm, start(edges, anchor, Begin::Held, views).await);
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
    let task = AnchorTask { edges, anchor, views, told, heard, over, unattracted };
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
    use std::time::Duration;

    use longhaul_core::tunnel::handover::Mac;
    use tokio::sync::oneshot;

    use super::*;
    use crate::identity::Identity;
    use crate::migration::anchor::AnchorNic;
    use crate::test_site::{TestSite, anchor, silent_names};
    use crate::tunnel::Leaving;

    /// The anchors of a site at work.
    fn at_work(edges: &Edges) -> mpsc::Sender<AnchorCommand> {
        let (commands, outbox) = mpsc::channel(4);
        tokio::spawn(run(edges.clone(), Anchors::default(), outbox, watch::channel(BTreeMap::new()).0));
        commands
    }

    /// How an anchor comes to its end before everybody has heard.
    #[derive(Debug, Clone, Copy)]
    enum Way {
        Released,
        Forgotten,
        Restarted,
    }

    /// Of a visit to b that went on to c in epoch 6, while a could not be reached.
    fn visited() -> Anchor {
        let nic = AnchorNic {
            nic: "lan".parse().unwrap(),
            mac: Mac([0x52, 0x54, 0, 0, 0, 1]),
            from: Leaving::Visit,
            addresses: vec!["203.0.113.10".parse().unwrap()],
            bridge: "br-lan".to_owned(),
            port: "lh-web1".to_owned(),
            flows: Vec::new(),
        };
        let tell = vec!["a".parse().unwrap(), "nobody".parse().unwrap()];
        let (name, names) = (None, NameState::None);
        Anchor { epoch: Epoch(6), nics: vec![nic], name, names, tell, ..anchor("c") }
    }

    async fn ended(site: &TestSite, way: Way) -> mpsc::Sender<AnchorCommand> {
        let (vm, edges) = (visited().vm, &site.edges);
        if let Way::Restarted = way {
            put(edges, &Anchor { ended: true, ..visited() });
            let views = watch::channel(BTreeMap::new()).0;
            let (commands, outbox) = mpsc::channel(4);
            tokio::spawn(run(edges.clone(), restore(edges, &views).await, outbox, views));
            return commands;
        }
        let commands = at_work(edges);
        commands.send(AnchorCommand::Attract(Box::new(visited()))).await.unwrap();
        match way {
            Way::Released => {
                let (done, ended) = oneshot::channel();
                commands.send(AnchorCommand::Release(vm, done)).await.unwrap();
                assert_eq!(ended.await.unwrap(), Released::Ended);
            }
            Way::Forgotten | Way::Restarted => {
                let (done, ended) = oneshot::channel();
                commands.send(AnchorCommand::End(vm, done)).await.unwrap();
                ended.await.unwrap();
            }
        }
        assert!(site.asked.borrow().contains(&"let_go web1/lan".to_owned()), "its address is free");
        commands
    }

    #[tokio::test]
    async fn a_site_that_could_not_be_reached_hears_of_the_move_after_the_anchor_has_ended() {
        for way in [Way::Released, Way::Forgotten, Way::Restarted] {
            let [key_a, key_b, key_c] = [(); 3].map(|()| Identity::generate().unwrap());
            let b = TestSite::open("b", &key_b, &[("a", &key_a, None), ("c", &key_c, None)]).await;
            let (vm, commands) = (visited().vm, ended(&b, way).await);
            assert!(row(&b.edges, &vm).is_some_and(|row| row.ended), "{way:?}");
            let mut a = TestSite::open("a", &key_a, &[("b", &key_b, Some(b.address()))]).await;
            let (_, message) = a.heard().await;
            let (epoch, to) = (Epoch(6), "c".parse().unwrap());
            let moved = AnchorMessage::Moved { vm: vm.clone(), epoch, to, care_of: Vec::new() };
            assert_eq!(message, Message::Anchor(moved), "{way:?}");
            let (from, noted) = ("a".parse().unwrap(), AnchorMessage::Noted { vm: vm.clone(), epoch });
            commands.send(AnchorCommand::Heard { from, message: noted }).await.unwrap();
            // Who is no peer cannot be told, and is not waited for.
            while row(&b.edges, &vm).is_some() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    #[tokio::test]
    async fn an_anchor_that_everybody_has_heard_of_ends_when_it_is_released() {
        let (_a, b) = TestSite::pair().await;
        let (vm, commands) = (visited().vm, at_work(&b.edges));
        commands.send(AnchorCommand::Attract(Box::new(visited()))).await.unwrap();
        let noted = AnchorMessage::Noted { vm: vm.clone(), epoch: Epoch(6) };
        commands.send(AnchorCommand::Heard { from: "a".parse().unwrap(), message: noted }).await.unwrap();
        let (done, ended) = oneshot::channel();
        commands.send(AnchorCommand::Release(vm.clone(), done)).await.unwrap();
        assert_eq!(ended.await.unwrap(), Released::Ended);
        assert!(row(&b.edges, &vm).is_none());
    }

    /// What web1 left at its home when it went to b in epoch 5. It has no name.
    fn left_home() -> Anchor {
        let nics = visited().nics.into_iter().map(|nic| AnchorNic { from: Leaving::Home, ..nic }).collect();
        Anchor { epoch: Epoch(5), nics, tell: Vec::new(), name: None, names: NameState::None, ..anchor("b") }
    }

    /// Whether it is seen within `limit`.
    async fn within(limit: Duration, seen: impl Fn() -> bool) -> bool {
        let looking = async {
            while !seen() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(limit, looking).await.is_ok()
    }

    const PATIENCE: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_home_remembers_where_its_machine_is_and_an_operator_may_say_that_it_was_handed_on() {
        let [key_a, key_b, key_c] = [(); 3].map(|()| Identity::generate().unwrap());
        let a = TestSite::open("a", &key_a, &[("b", &key_b, None), ("c", &key_c, None)]).await;
        let (vm, commands) = (left_home().vm, at_work(&a.edges));
        let at = || row(&a.edges, &vm).map(|row| (row.peer.to_string(), row.epoch));
        commands.send(AnchorCommand::Attract(Box::new(left_home()))).await.unwrap();
        let (done, ended) = oneshot::channel();
        commands.send(AnchorCommand::Release(vm.clone(), done)).await.unwrap();
        assert_eq!(ended.await.unwrap(), Released::Ended);
        assert_eq!(
            at(),
            Some(("b".to_owned(), Epoch(5))),
            "it attracts nothing and has no name, and is remembered"
        );

        let from_c = AnchorMessage::Moved {
            vm: vm.clone(),
            epoch: Epoch(6),
            to: "c".parse().unwrap(),
            care_of: Vec::new(),
        };
        commands.send(AnchorCommand::Heard { from: "c".parse().unwrap(), message: from_c }).await.unwrap();
        let say = async |vm: &str| {
            let (done, known) = oneshot::channel();
            let (vm, to) = (vm.parse().unwrap(), "c".parse().unwrap());
            commands.send(AnchorCommand::Said { vm, to, done }).await.unwrap();
            known.await.unwrap()
        };
        assert!(!say("web9").await);
        assert!(!say("web1").await, "it is in doubt whether it left");
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(5) };
        a.edges.journal.define(&vm, &away).unwrap();
        assert_eq!(
            at(),
            Some(("b".to_owned(), Epoch(5))),
            "the word of a site that it is not known to be at"
        );
        assert!(say("web1").await);
        assert!(within(PATIENCE, || at() == Some(("c".to_owned(), Epoch(6)))).await);

        let (done, ended) = oneshot::channel();
        commands.send(AnchorCommand::End(vm.clone(), done)).await.unwrap();
        ended.await.unwrap();
        assert_eq!(at(), None, "its operator forgets it");
    }

    #[tokio::test]
    async fn the_operators_limit_counts_from_the_move_and_holds_although_the_name_cannot_be_moved() {
        let site = TestSite::open(
            "a",
            &Identity::generate().unwrap(),
            &[("b", &Identity::generate().unwrap(), None)],
        )
        .await;
        let mut config = (*site.edges.config).clone();
        config.tunnel.hold = "24h".parse().unwrap();
        let edges =
            Edges { names: Some(Arc::new(silent_names())), config: Arc::new(config), ..site.edges.clone() };
        let let_go = || site.asked.borrow().contains(&"let_go web1/lan".to_owned());
        let left = |since_unix_ms| {
            let left = Anchor { since_unix_ms, ..left_home() };
            Anchor { name: Some("web1.vm.example".to_owned()), names: NameState::Pending, ..left }
        };
        let an_hour_ago = unix_ms() - 3_600_000;
        put(&edges, &left(an_hour_ago));
        let views = watch::channel(BTreeMap::new()).0;
        let mut running = restore(&edges, &views).await;
        assert!(!within(Duration::from_millis(300), let_go).await, "it is held for a day");
        running.end(&left(0).vm).await;

        put(&edges, &left(unix_ms() - 25 * 3_600_000));
        let _running = restore(&edges, &views).await;
        assert!(within(PATIENCE, let_go).await);
        let owed = || row(&edges, &left(0).vm).is_some_and(|row| row.ended && row.owes_name());
        assert!(within(PATIENCE, owed).await);
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

    #[tokio::test]
    async fn the_home_address_of_a_machine_whose_name_does_not_follow_never_becomes_quiet() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        put(&site.edges, &left_home());
        let _running = restore(&site.edges, &watch::channel(BTreeMap::new()).0).await;
        let expires = || site.asked.borrow().contains(&"names_expire web1/lan".to_owned());
        assert!(!within(Duration::from_millis(300), expires).await, "clients know nothing else");
    }

    #[tokio::test]
    async fn a_ttl_that_cannot_be_restored_is_shown_and_does_not_keep_the_tunnel() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let edges = Edges { names: Some(Arc::new(silent_names())), ..site.edges.clone() };
        let name = Some("web1.vm.example".to_owned());
        put(&edges, &Anchor { name, ttl_s: 60, names: NameState::Moved { at_unix_ms: 1 }, ..left_home() });
        let views = watch::channel(BTreeMap::new()).0;
        let _running = restore(&edges, &views).await;
        let expires = || site.asked.borrow().contains(&"names_expire web1/lan".to_owned());
        assert!(within(PATIENCE, expires).await);
        let is_shown = || views.borrow()[&left_home().vm].names_error.is_some();
        assert!(within(PATIENCE, is_shown).await);
        assert_eq!(views.borrow()[&left_home().vm].names, "moved");
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_attracted_is_shown_and_not_given_up() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let elsewhere = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (tunnel, _asked) = {
            let _entered = elsewhere.enter();
            crate::tunnel::Tunnel::noted()
        };
        // Nobody answers its commands any more.
        elsewhere.shutdown_background();
        let edges = Edges { tunnel, ..site.edges.clone() };
        put(&edges, &left_home());
        let views = watch::channel(BTreeMap::new()).0;
        let running = restore(&edges, &views).await;
        let text = views.borrow()[&left_home().vm].attract_error.clone();
        assert!(text.is_some_and(|text| text.contains("tunnel")), "it is shown at once");
        assert!(!running.known[&left_home().vm].task.is_finished());
        assert!(row(&edges, &left_home().vm).is_some_and(|row| !row.ended));
    }

    fn ip(text: &str) -> std::net::IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn a_name_that_comes_home_is_looked_for_where_an_earlier_move_may_have_left_it() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let edges = Edges { names: Some(Arc::new(silent_names())), ..site.edges.clone() };
        let (home, at_b, at_c) = (ip("198.51.100.10"), ip("192.0.2.20"), ip("192.0.2.30"));
        let vm: VmName = "web1".parse().unwrap();
        put(&edges, &Anchor { moves: vec![(home, at_c), (at_b, at_c)], ..anchor("c") });
        let names = Anchor { epoch: Epoch(2), moves: vec![(at_c, home)], ..anchor("a") };
        let (done, ended) = oneshot::channel();
        let back = AnchorCommand::CameBack { vm: vm.clone(), names: Some(Box::new(names)), done };
        at_work(&edges).send(back).await.unwrap();
        ended.await.unwrap();
        assert_eq!(row(&edges, &vm).unwrap().moves, [(at_c, home), (at_b, home)]);
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
