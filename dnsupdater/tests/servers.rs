//! Several servers of one zone: who is behind, silent, dead or without an address, who claims to be another primary; and
//! servers that are killed.

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use dnsupdater::test_server::{TestServer, TestZone};
use dnsupdater::{Epoch, Error, Outcome, Scope, ServerState, Shape, Swap, Updater};
use support::daemon::{Daemon, Role, free_port};
use support::*;

const PATIENCE: Duration = Duration::from_secs(20);

on_every_server!(
    servers_that_are_behind_or_silent_are_named,
    a_server_that_is_right_by_chance_is_behind_by_its_serial,
    the_zones_own_name_servers_are_found_also_the_dead_and_the_nameless,
    a_secondary_that_hears_catches_up_and_one_that_does_not_is_named,
    a_swap_that_was_confirmed_survives_a_sigkill,
);

async fn another_at(bind: SocketAddr, text: &str) -> TestServer {
    let zone = TestZone { origin: name("vm.example"), text: text.to_owned() };
    TestServer::start(bind, &[zone], &[]).await.expect("starts")
}

async fn another(text: &str) -> TestServer {
    another_at(loopback(0), text).await
}

/// An address where nobody listens any more.
async fn dead() -> SocketAddr {
    let gone = another(ZONE).await;
    let address = gone.address();
    gone.shutdown().await;
    address
}

async fn servers_that_are_behind_or_silent_are_named(world: &World) {
    let stale = another(ZONE).await;
    let mut config = config(vec![world.address, stale.address(), dead().await], site_a());
    config.retries = 0;
    let updater = Updater::new(config).expect("valid");
    updater.preflight(&app(), &ips(&[AWAY])).await.expect("a silent secondary is no obstacle");
    assert_eq!(updater.swap(&first_swap()).await.expect("answered"), Outcome::Won);
    let view = updater.verify(&app(), &ips(&[AWAY]), Scope::Listed).await.expect("asked");
    let [first, second, third] = view.servers.as_slice() else { panic!("{view:?}") };
    assert_eq!(first.state, ServerState::Current { serial: 2, ttl_s: Some(30) });
    assert_eq!(second.state, ServerState::Behind { serial: 1, addresses: ips(&[HOME]) });
    assert!(matches!(&third.state, ServerState::Silent { reason } if reason.contains("cannot be reached")));
    assert!(!view.is_complete());
    assert_eq!((view.behind().count(), view.serial), (2, Some(2)));
}

/// The name went away and came back; the secondary has heard of neither.
async fn a_server_that_is_right_by_chance_is_behind_by_its_serial(world: &World) {
    let stale = another(ZONE).await;
    let updater = Updater::new(config(vec![world.address, stale.address()], site_a())).expect("valid");
    let view = updater.verify(&app(), &ips(&[HOME]), Scope::Listed).await.expect("asked");
    assert!(view.is_complete(), "{view:?}");
    assert_eq!(updater.swap(&first_swap()).await.expect("answered"), Outcome::Won);
    assert_eq!(updater.swap(&second_swap()).await.expect("answered"), Outcome::Won);
    let view = updater.verify(&app(), &ips(&[HOME]), Scope::Listed).await.expect("asked");
    assert_eq!(view.servers[1].state, ServerState::Behind { serial: 1, addresses: ips(&[HOME]) });
    assert_eq!((view.behind().count(), view.serial), (1, Some(3)));
}

/// The zone names the primary, a secondary that lags, a dead one and one that has no address.
async fn the_zones_own_name_servers_are_found_also_the_dead_and_the_nameless(world: &World) {
    let port = world.address.port();
    let stale = another_at(SocketAddr::from(([127, 0, 0, 3], port)), ZONE).await;
    let mut config = config(vec![world.address], site_a());
    (config.ns_port, config.retries) = (port, 0);
    let updater = Updater::new(config).expect("valid");
    assert_eq!(updater.swap(&first_swap()).await.expect("answered"), Outcome::Won);
    let view = updater.verify(&app(), &ips(&[AWAY]), Scope::All).await.expect("asked");
    let state = |host: &str| {
        let found = view.servers.iter().find(|view| view.host.as_deref() == Some(host));
        &found.expect("it is in the zone").state
    };
    assert_eq!(view.servers.len(), 3, "the listed server is one of the zone's own: {view:?}");
    assert!(matches!(state("ns1.vm.example."), ServerState::Current { .. }), "{view:?}");
    assert!(matches!(state("dead.vm.example."), ServerState::Silent { .. }), "{view:?}");
    assert_eq!(state("stale.vm.example."), &ServerState::Behind { serial: 1, addresses: ips(&[HOME]) });
    let [nameless] = view.unasked.as_slice() else { panic!("{view:?}") };
    assert!(nameless.host == "nowhere.invalid." && nameless.reason.contains("resolver"), "{view:?}");
    assert!(!view.is_complete());
    drop(stale);
}

#[tokio::test]
async fn two_primaries_are_refused_because_they_cannot_order_swaps() {
    let world = World::hickory().await;
    let other = another(&ZONE.replace("SOA ns1.vm.example.", "SOA ns2.vm.example.")).await;
    let updater = Updater::new(config(vec![world.address, other.address()], site_a())).expect("valid");
    let error = updater.preflight(&app(), &[]).await.expect_err("two primaries");
    let primaries = "ns1.vm.example., ns2.vm.example.".to_owned();
    assert!(
        matches!(&error, Error::Shape { shape: Shape::SeveralPrimaries { primaries: found }, .. } if *found == primaries),
        "{error:?}"
    );
}

/// BIND as the secondary of each primary, once told of changes and once not.
async fn a_secondary_that_hears_catches_up_and_one_that_does_not_is_named(quiet: &World) {
    if quiet.kind == Kind::Hickory {
        println!("skipped: the embedded server transfers no zones and notifies nobody");
        return;
    }
    let unheard = Role::Secondary { of: quiet.address };
    let Some(secondary) = Daemon::start(&NAMED, loopback(0), unheard).await else { return };
    let updater = Updater::new(config(vec![quiet.address, secondary.address], site_a())).expect("valid");
    let home = ips(&[HOME]);
    let view = updater.verify_until(&app(), &home, Scope::Listed, PATIENCE).await.expect("asked");
    assert!(view.is_complete(), "the first transfer: {view:?}\n{}", secondary.log());
    assert_eq!(updater.swap(&first_swap()).await.expect("answered"), Outcome::Won);
    let patience = Duration::from_millis(500);
    let view = updater.verify_until(&app(), &ips(&[AWAY]), Scope::Listed, patience).await.expect("asked");
    assert_eq!(view.servers[1].state, ServerState::Behind { serial: 1, addresses: home.clone() });

    // The secondary's port has to be known to the primary, the primary's to the secondary.
    let told = free_port(loopback(0));
    let Some(primary) = World::notifying(quiet.kind, told).await else { return };
    let heard = Role::Secondary { of: primary.address };
    let Some(secondary) = Daemon::start(&NAMED, told, heard).await else { return };
    let updater = Updater::new(config(vec![primary.address, secondary.address], site_a())).expect("valid");
    let view = updater.verify_until(&app(), &home, Scope::Listed, PATIENCE).await.expect("asked");
    assert!(view.is_complete(), "the first transfer: {view:?}\n{}", secondary.log());
    assert_eq!(updater.swap(&first_swap()).await.expect("answered"), Outcome::Won);
    let view = updater.verify_until(&app(), &ips(&[AWAY]), Scope::Listed, PATIENCE).await.expect("asked");
    assert!(view.is_complete(), "{view:?}\n{}", secondary.log());
}

async fn a_swap_that_was_confirmed_survives_a_sigkill(world: &World) {
    if world.kind == Kind::Hickory {
        println!("skipped: the embedded server keeps its zones in memory");
        return;
    }
    let mut world = world.another().await;
    let updater = world.updater(site_a());
    let mut at = ips(&[HOME]);
    for epoch in 0..4_u64 {
        let new = ips(&[&format!("203.0.113.{}", epoch + 1)]);
        let swap = Swap::new(app(), at, new.clone(), 30, "site-b").epochs(Epoch(epoch), Epoch(epoch + 1));
        assert_eq!(updater.swap(&swap).await.expect("answered"), Outcome::Won);
        let Backend::Daemon(daemon) = &mut world.server else { panic!("it is a process") };
        daemon.kill_and_restart().await;
        let found = updater.read(&app()).await.expect("readable");
        assert_eq!(found.ownership(), Some(&swap.ownership().expect("valid")), "round {epoch}");
        assert!(found.has(&new));
        at = new;
    }
}
