//! Anchors at work, at sites whose tunnel writes down what it is asked for. Nothing of the host is changed.

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
pub(super) fn left_home() -> Anchor {
    let nics = visited().nics.into_iter().map(|nic| AnchorNic { from: Leaving::Home, ..nic }).collect();
    Anchor { epoch: Epoch(5), nics, tell: Vec::new(), name: None, names: NameState::None, ..anchor("b") }
}

/// Whether it is seen within `limit`.
pub(super) async fn within(limit: Duration, seen: impl Fn() -> bool) -> bool {
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
    assert_eq!(at(), Some(("b".to_owned(), Epoch(5))), "the word of a site that it is not known to be at");
    assert!(say("web1").await);
    assert!(within(PATIENCE, || at() == Some(("c".to_owned(), Epoch(6)))).await);

    let (done, ended) = oneshot::channel();
    commands.send(AnchorCommand::End(vm.clone(), done)).await.unwrap();
    ended.await.unwrap();
    assert_eq!(at(), None, "its operator forgets it");
}

#[tokio::test]
async fn the_operators_limit_counts_from_the_move_and_holds_although_the_name_cannot_be_moved() {
    let site =
        TestSite::open("a", &Identity::generate().unwrap(), &[("b", &Identity::generate().unwrap(), None)])
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
async fn the_quiet_time_goes_on_when_the_gateway_is_started_anew() {
    let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
    let left = Anchor { since_unix_ms: 1, ..left_home() };
    let quiet_s = async |needed_ms: Option<u64>| {
        site.edges.journal.remove_anchor(&left.vm).unwrap();
        put(&site.edges, &left);
        if let Some(needed_ms) = needed_ms {
            site.edges.journal.note_anchor_needed(&left.vm, needed_ms).unwrap();
        }
        let mut running = restore(&site.edges, &watch::channel(BTreeMap::new()).0).await;
        running.end(&left.vm).await;
        let asked = site.asked.borrow();
        let said = asked.iter().rev().find_map(|said| said.strip_prefix("attract_again web1/lan after "));
        said.and_then(|said| said.strip_suffix(" s")?.parse::<u64>().ok()).expect("it attracts again")
    };
    let (hour_s, now_ms) = (3600, unix_ms());
    let quiet = quiet_s(Some(now_ms - 23 * hour_s * 1000)).await;
    assert!((23 * hour_s - 60..23 * hour_s).contains(&quiet), "{quiet} s: what is noted may be a minute old");
    assert_eq!(quiet_s(None).await, 0, "nobody knows");
    assert_eq!(quiet_s(Some(now_ms + hour_s * 1000)).await, 0, "the clock was put back");
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

#[tokio::test]
async fn a_name_that_is_owed_follows_a_machine_that_leaves_again_without_it() {
    let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
    let edges = Edges { names: Some(Arc::new(silent_names())), ..site.edges.clone() };
    let (home, at_b, at_c) = (ip("203.0.113.10"), ip("192.0.2.20"), ip("192.0.2.30"));
    // It came home from b, and its name still says so nowhere.
    put(&edges, &Anchor { moves: vec![(at_b, home)], ..anchor("a") });
    let leaves =
        Anchor { epoch: Epoch(7), peer: "c".parse().unwrap(), moves: vec![(home, at_c)], ..left_home() };
    let vm = leaves.vm.clone();
    let commands = at_work(&edges);
    commands.send(AnchorCommand::Attract(Box::new(Anchor { runs_there: false, ..leaves }))).await.unwrap();
    assert!(within(PATIENCE, || row(&edges, &vm).is_some_and(|row| row.epoch == Epoch(7))).await);
    let written = row(&edges, &vm).unwrap();
    assert_eq!((written.name, written.ttl_s), (Some("web1.vm.example".to_owned()), 3600));
    assert!(!matches!(written.names, NameState::None | NameState::Settled { .. }), "{:?}", written.names);
    assert_eq!(written.moves, [(home, at_c), (at_b, at_c)]);

    // The move is undone.
    let (done, ended) = oneshot::channel();
    commands.send(AnchorCommand::Forget(vm.clone(), Epoch(7), done)).await.unwrap();
    assert!(ended.await.is_err(), "it says so by being dropped");
    assert!(within(PATIENCE, || row(&edges, &vm).is_none_or(|row| row.epoch == Epoch(6))).await);
    let written = row(&edges, &vm).expect("the name is owed on");
    assert_eq!((written.peer.as_str(), written.ttl_s, written.owes_name()), ("a", 3600, true));
    assert_eq!(written.moves, [(at_b, home)]);
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
