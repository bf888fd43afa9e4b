//! The register in etcd, against a real etcd on this machine's loopback: one member, a folder of its own.
//!
//! Where there is no etcd (Debian's `etcd-server`) the tests are skipped. A cluster that loses its leader is etcd's
//! to test; a member that does not answer stands for it.

#![allow(clippy::unwrap_used, reason = "a step that fails here fails the test")]

#[path = "etcd/server.rs"]
mod server;

use std::time::{Duration, Instant};

use gateway::config::EtcdConfig;
use gateway::etcd::{EtcdError, Registers};
use longhaul_core::ids::{Epoch, VmName};
use longhaul_core::migration::arbiter::{Contest, Request, Said, Verdict};
use server::{Certificates, Etcd, Loses, Proxy, silent};

/// Long enough for a busy machine; a member that is there answers in a few milliseconds.
const TIMEOUT_MS: u64 = 3000;

fn config(endpoints: &[String], more: &str) -> EtcdConfig {
    let timeout =
        if more.contains("timeout_ms") { String::new() } else { format!("timeout_ms = {TIMEOUT_MS}") };
    toml::from_str(&format!("endpoints = {endpoints:?}\n{timeout}\n{more}")).unwrap()
}

fn registers(endpoint: &str) -> Registers {
    Registers::open(&config(&[endpoint.to_owned()], "")).unwrap()
}

fn vm() -> VmName {
    "web1".parse().unwrap()
}

fn contest(epoch: u64) -> Contest {
    let (source, destination) = ("a".parse().unwrap(), "b".parse().unwrap());
    Contest { epoch: Epoch(epoch), source, destination }
}

async fn asked(registers: &Registers, epoch: u64, request: Request) -> Said {
    registers.arbitrate(&vm(), &contest(epoch), request, Epoch(0)).await.unwrap()
}

fn said(epoch: u64, verdict: Verdict) -> Said {
    Said { epoch: Epoch(epoch), verdict }
}

#[tokio::test]
async fn an_epoch_is_won_once_and_only_a_way_back_changes_its_owner() {
    let Some(etcd) = Etcd::start().await else { return };
    let registers = registers(&etcd.endpoint);
    assert_eq!(registers.check(&vm(), Epoch(1)).await.unwrap(), Epoch(0));
    assert_eq!(asked(&registers, 1, Request::Read).await, said(0, Verdict::Open));
    assert_eq!(registers.read(&vm()).await.unwrap(), None, "a read changes nothing");
    assert_eq!(asked(&registers, 1, Request::ForDestination).await, said(1, Verdict::Destination));
    let won = registers.read(&vm()).await.unwrap();
    assert_eq!(asked(&registers, 1, Request::ForSource).await, said(1, Verdict::Destination));
    assert_eq!(asked(&registers, 1, Request::ForDestination).await, said(1, Verdict::Destination));
    assert_eq!(registers.read(&vm()).await.unwrap(), won, "what is decided is not written again");
    assert_eq!(asked(&registers, 1, Request::BackToSource).await, said(1, Verdict::Source));
    assert_eq!(asked(&registers, 1, Request::ForDestination).await, said(1, Verdict::Source));
    assert_eq!(asked(&registers, 2, Request::ForSource).await, said(2, Verdict::Source));
    let ahead = registers.check(&vm(), Epoch(2)).await.unwrap_err().to_string();
    assert!(ahead.contains("longhaul/vm/web1") && ahead.contains("epoch 2 of site a"), "{ahead}");
    assert_eq!(registers.check(&vm(), Epoch(3)).await.unwrap(), Epoch(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_ask_at_once_both_hear_the_same_winner() {
    let Some(etcd) = Etcd::start().await else { return };
    let (a, b) = (registers(&etcd.endpoint), registers(&etcd.endpoint));
    for epoch in 1..=50 {
        let both =
            tokio::join!(asked(&a, epoch, Request::ForSource), asked(&b, epoch, Request::ForDestination));
        assert_eq!(both.0, both.1, "epoch {epoch}");
        assert!(matches!(both.0.verdict, Verdict::Source | Verdict::Destination), "{both:?}");
    }
}

#[tokio::test]
async fn a_lost_answer_is_read_back() {
    let Some(etcd) = Etcd::start().await else { return };
    let proxy = Proxy::start(&etcd.endpoint, Loses::Answers).await;
    let more = "timeout_ms = 500";
    let through = Registers::open(&config(std::slice::from_ref(&proxy.endpoint), more)).unwrap();
    assert_eq!(asked(&through, 1, Request::ForDestination).await, said(1, Verdict::Destination));
    assert_eq!(proxy.transactions(), 1, "it is not sent again");
    let held = registers(&etcd.endpoint).read(&vm()).await.unwrap().unwrap();
    assert_eq!((held.epoch().0, held.owner()), (1, "b"));
}

#[tokio::test]
async fn a_transaction_that_may_still_be_applied_is_no_answer() {
    let Some(etcd) = Etcd::start().await else { return };
    let proxy = Proxy::start(&etcd.endpoint, Loses::Requests).await;
    let more = "timeout_ms = 500";
    let through = Registers::open(&config(std::slice::from_ref(&proxy.endpoint), more)).unwrap();
    let error = through.arbitrate(&vm(), &contest(1), Request::ForDestination, Epoch(0)).await.unwrap_err();
    assert!(matches!(error, EtcdError::Late { .. }), "{error:?}");
    let direct = registers(&etcd.endpoint);
    assert_eq!(asked(&direct, 1, Request::ForSource).await, said(1, Verdict::Source));
    // The one that was held back comes late, to another value than it was made for.
    assert_eq!(proxy.let_go().await, 1);
    assert_eq!(asked(&direct, 1, Request::Read).await, said(1, Verdict::Source));
}

#[tokio::test]
async fn a_register_that_was_emptied_or_overwritten_decides_nothing_and_stays_so() {
    let Some(etcd) = Etcd::start().await else { return };
    let registers = registers(&etcd.endpoint);
    assert_eq!(asked(&registers, 4, Request::ForDestination).await, said(4, Verdict::Destination));
    etcd.delete("longhaul/vm/web1").await;
    for request in [Request::Read, Request::ForSource, Request::ForDestination, Request::BackToSource] {
        let answer = registers.arbitrate(&vm(), &contest(5), request, Epoch(4)).await.unwrap();
        assert_eq!(answer, said(0, Verdict::Behind), "{request:?}");
    }
    assert_eq!(registers.read(&vm()).await.unwrap(), None);
    etcd.put("longhaul/vm/web1", "somebody else's").await;
    let error = registers.arbitrate(&vm(), &contest(5), Request::ForSource, Epoch(0)).await.unwrap_err();
    assert!(error.to_string().contains("longhaul/vm/web1"), "{error}");
    assert!(matches!(error, EtcdError::NoRegister { found, .. } if found == "somebody else's"));
    assert!(registers.check(&vm(), Epoch(5)).await.is_err());
}

#[tokio::test]
async fn a_cluster_that_cannot_be_reached_is_an_error_in_time() {
    let begun = Instant::now();
    let silent = silent().await;
    let more = "timeout_ms = 300";
    let late = Registers::open(&config(std::slice::from_ref(&silent.endpoint), more)).unwrap();
    assert!(matches!(late.round_trip().await.unwrap_err(), EtcdError::Late { .. }));
    let closed = server::free_endpoint();
    let unreachable = registers(&closed).check(&vm(), Epoch(1)).await.unwrap_err();
    assert!(matches!(unreachable, EtcdError::Unreachable { .. }), "{unreachable:?}");
    assert!(unreachable.to_string().contains(&closed), "{unreachable}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_member_that_is_silent_delays_the_first_question_only() {
    let Some(etcd) = Etcd::start().await else { return };
    let silent = silent().await;
    let endpoints = [silent.endpoint.clone(), server::free_endpoint(), etcd.endpoint.clone()];
    let registers = Registers::open(&config(&endpoints, "")).unwrap();
    assert_eq!(asked(&registers, 1, Request::ForSource).await, said(1, Verdict::Source));
    let before = silent.connections();
    assert_eq!(asked(&registers, 1, Request::Read).await, said(1, Verdict::Source));
    assert_eq!((before, silent.connections()), (1, 1));
}

#[tokio::test]
async fn what_does_not_speak_like_etcd_is_named() {
    for says in ["<html/>", "{}"] {
        let other = server::other_service(says).await;
        let error = registers(&other).round_trip().await.unwrap_err();
        assert!(matches!(error, EtcdError::Form { .. }), "{error:?}");
        assert!(error.to_string().contains("grpc-gateway"), "{error}");
    }
}

#[tokio::test]
async fn tls_proves_the_members_and_a_certificate_this_site() {
    let Some(certificates) = Certificates::make() else { return };
    let Some(etcd) = Etcd::start_tls(&certificates).await else { return };
    let endpoints = [etcd.endpoint.clone()];
    let open = |more: &str| Registers::open(&config(&endpoints, more)).unwrap();
    let proven = open(&certificates.client("ca", Some("site")));
    assert_eq!(asked(&proven, 1, Request::ForDestination).await, said(1, Verdict::Destination));
    let nobody = open(&certificates.client("ca", None));
    assert!(nobody.read(&vm()).await.is_err(), "it asks clients for a certificate");
    let other = open(&certificates.client("other", Some("site"))).read(&vm()).await.unwrap_err();
    assert!(matches!(other, EtcdError::Unreachable { .. }), "{other:?}");
}
