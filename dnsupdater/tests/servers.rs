//! Several servers: who is behind, who is silent, who claims to be another primary; and a BIND that is killed.

mod support;

use std::time::Duration;

use dnsupdater::test_server::{TestServer, TestZone};
use dnsupdater::{Epoch, Error, Outcome, Scope, ServerState, Shape, Swap, Updater};
use support::named::Named;
use support::*;

const PATIENCE: Duration = Duration::from_secs(20);

async fn another(text: &str) -> TestServer {
    let zone = TestZone { origin: name("vm.example"), text: text.to_owned() };
    TestServer::start(loopback(0), &[zone], &[]).await.expect("starts")
}

#[tokio::test]
async fn servers_that_are_behind_or_silent_are_named() {
    let world = World::hickory().await;
    let stale = another(ZONE).await;
    let silent = {
        let gone = another(ZONE).await;
        let address = gone.address();
        gone.shutdown().await;
        address
    };
    let mut config = config(vec![world.address, stale.address(), silent], site_a());
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
    assert_eq!(view.behind().count(), 2);
}

#[tokio::test]
async fn the_zones_own_name_servers_are_found() {
    let world = World::hickory().await;
    let mut config = config(vec![world.address], site_a());
    config.ns_port = world.address.port();
    let updater = Updater::new(config).expect("valid");
    let view = updater.verify(&app(), &ips(&[HOME]), Scope::All).await.expect("asked");
    assert_eq!(view.servers.len(), 1, "the listed server is the zone's own");
    assert_eq!(view.servers[0].host.as_deref(), Some("ns1.vm.example."));
    assert!(view.is_complete());
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

#[tokio::test]
async fn a_notified_secondary_catches_up_and_verification_waits_for_it() {
    // The secondary's port has to be known to the primary, the primary's to the secondary: the primary comes twice.
    let Some(quiet) = Named::primary(loopback(0)).await else { return };
    let Some(secondary) = Named::secondary(quiet.address).await else { return };
    let updater = Updater::new(config(vec![quiet.address, secondary.address], site_a())).expect("valid");
    let both = ips(&[HOME]);
    let view = updater.verify_until(&app(), &both, Scope::Listed, PATIENCE).await.expect("asked");
    assert!(view.is_complete(), "the first transfer: {view:?}\n{}", secondary.log());
    assert_eq!(updater.swap(&first_swap()).await.expect("answered"), Outcome::Won);
    let view = updater.verify(&app(), &ips(&[AWAY]), Scope::Listed).await.expect("asked");
    assert_eq!(view.behind().count(), 1, "nobody notified it: {view:?}");

    let Some(primary) = Named::notifying(quiet, secondary.address).await else { return };
    let updater = Updater::new(config(vec![primary.address, secondary.address], site_a())).expect("valid");
    let home = Swap::new(app(), ips(&[AWAY]), ips(&[HOME]), 30, "site-a").epochs(Epoch(1), Epoch(2));
    assert_eq!(updater.swap(&home).await.expect("answered"), Outcome::Won);
    let view = updater.verify_until(&app(), &both, Scope::Listed, PATIENCE).await.expect("asked");
    assert!(view.is_complete(), "{view:?}\n{}", secondary.log());
}

#[tokio::test]
async fn a_swap_that_bind_confirmed_survives_its_sigkill() {
    let Some(mut primary) = Named::primary(loopback(0)).await else { return };
    let updater = Updater::new(config(vec![primary.address], site_a())).expect("valid");
    let mut at = ips(&[HOME]);
    for epoch in 0..8_u64 {
        let new = ips(&[&format!("203.0.113.{}", epoch + 1)]);
        let swap = Swap::new(app(), at, new.clone(), 30, "site-b").epochs(Epoch(epoch), Epoch(epoch + 1));
        assert_eq!(updater.swap(&swap).await.expect("answered"), Outcome::Won);
        primary.kill_and_restart().await;
        let found = updater.read(&app()).await.expect("readable");
        assert_eq!(found.ownership(), Some(&swap.ownership().expect("valid")), "round {epoch}");
        assert!(found.has(&new));
        at = new;
    }
}
