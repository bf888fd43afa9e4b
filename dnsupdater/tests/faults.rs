//! What happens when answers are lost, late, cut, forged or replayed between the updater and each of the name servers.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dnsupdater::{Error, Outcome, Swap, Transport, Updater, UpdaterConfig};
use support::proxy::{Proxy, Verdict, ask_tcp, is_update, unsigned};
use support::*;
use tokio::net::{TcpListener, UdpSocket};

const SHORT: Duration = Duration::from_millis(300);
/// When nobody waits for an answer any more.
const TOO_LATE: Duration = Duration::from_millis(600);

on_every_server!(
    a_lost_answer_is_won_by_reading_back,
    a_lost_request_is_sent_again,
    a_swap_whose_answer_was_lost_and_overtaken_is_lost,
    an_outcome_that_cannot_be_known_is_said_and_the_same_swap_settles_it_later,
    a_swap_that_is_still_under_way_when_it_is_undone_does_nothing_when_it_arrives,
    a_truncated_answer_is_asked_for_again_over_tcp,
    a_slow_server_is_waited_for_until_the_timeout_and_no_longer,
    an_update_whose_answer_comes_too_late_is_won_and_applied_once,
    an_outcome_that_comes_too_late_to_be_known_is_settled_by_the_same_swap,
    an_unsigned_answer_to_a_signed_question_is_not_believed,
    an_unsigned_success_of_an_update_counts_only_after_a_signed_reading,
    a_forged_refusal_does_not_hide_a_swap_that_was_applied,
    an_altered_answer_is_not_believed,
    strays_before_the_answer_are_skipped_over_udp_and_fatal_over_tcp,
    another_requests_genuine_answer_is_not_believed,
    a_preflight_and_its_failure_leave_no_trace,
);

fn through(proxy: &Proxy, change: impl FnOnce(&mut UpdaterConfig)) -> Updater {
    let mut config = config(vec![proxy.address], site_a());
    config.timeout = SHORT;
    change(&mut config);
    Updater::new(config).expect("valid")
}

/// Answers "is this the first update's reply?" once with yes.
fn first_update_reply() -> impl Fn(&[u8], Option<&[u8]>) -> bool + Send + Sync {
    let updates = AtomicU32::new(0);
    move |request, reply| {
        is_update(request) && reply.is_some() && updates.fetch_add(1, Ordering::Relaxed) == 0
    }
}

async fn state(world: &World) -> (Vec<std::net::IpAddr>, Option<u32>, Option<u32>, String, u32) {
    essence(&world.updater(site_a()).read(&app()).await.expect("readable"))
}

fn with_rcode(mut reply: Vec<u8>, rcode: u8) -> Vec<u8> {
    reply[3] = (reply[3] & 0xf0) | rcode;
    reply
}

async fn a_lost_answer_is_won_by_reading_back(world: &World) {
    for transport in [Transport::Tcp, Transport::Udp] {
        let world = &world.another().await;
        let first = first_update_reply();
        let mut proxy =
            Proxy::start(
                world.address,
                move |request, reply| {
                    if first(request, reply) { Verdict::Drop } else { Verdict::Pass }
                },
            )
            .await;
        let updater = through(&proxy, |config| config.transport = transport);
        let swap = first_swap();
        assert_eq!(updater.swap(&swap).await.expect("resolved"), Outcome::Won);
        assert_eq!(proxy.updates().len(), 1, "the read-back settles it, nothing is sent again");
        let found = world.updater(site_a()).read(&app()).await.expect("readable");
        assert_eq!(found.ownership(), Some(&swap.ownership().expect("valid")));
    }
}

async fn a_lost_request_is_sent_again(world: &World) {
    for transport in [Transport::Tcp, Transport::Udp] {
        let world = &world.another().await;
        let updates = AtomicU32::new(0);
        let mut proxy = Proxy::start(world.address, move |request, reply| {
            let asked = is_update(request) && reply.is_none();
            if asked && updates.fetch_add(1, Ordering::Relaxed) == 0 {
                Verdict::Swallow
            } else {
                Verdict::Pass
            }
        })
        .await;
        let updater = through(&proxy, |config| config.transport = transport);
        assert_eq!(updater.swap(&first_swap()).await.expect("sent again"), Outcome::Won);
        assert_eq!(proxy.updates().len(), 2);
    }
}

async fn a_swap_whose_answer_was_lost_and_overtaken_is_lost(world: &World) {
    let first = first_swap();
    assert_eq!(world.updater(site_a()).swap(&first).await.expect("answered"), Outcome::Won);
    let proxy =
        Proxy::start(
            world.address,
            |request, _| {
                if is_update(request) { Verdict::Swallow } else { Verdict::Pass }
            },
        )
        .await;
    let updater = through(&proxy, |config| config.retries = 20);
    let slow = second_swap().observed(Some(first.ownership().expect("valid")));
    let (ours, theirs) = tokio::join!(updater.swap(&slow), async {
        let other = second_swap();
        world.updater(site_a()).swap(&other).await.map(|outcome| (outcome, other))
    });
    let (outcome, other) = theirs.expect("answered");
    assert_eq!(outcome, Outcome::Won);
    let Outcome::Lost { current, .. } = ours.expect("resolved") else { panic!("won") };
    assert_eq!(current.ownership(), Some(&other.ownership().expect("valid")));
}

async fn an_outcome_that_cannot_be_known_is_said_and_the_same_swap_settles_it_later(world: &World) {
    let cut = Arc::new(AtomicU32::new(0));
    let rule_cut = cut.clone();
    let proxy = Proxy::start(world.address, move |request, reply| {
        // From the first update on, nothing comes back; the update itself arrives.
        if is_update(request) && rule_cut.load(Ordering::Relaxed) == 0 {
            rule_cut.store(1, Ordering::Relaxed);
        }
        if reply.is_some() && rule_cut.load(Ordering::Relaxed) == 1 { Verdict::Drop } else { Verdict::Pass }
    })
    .await;
    let updater = through(&proxy, |config| config.retries = 0);
    let swap = first_swap();
    let error = updater.swap(&swap).await.expect_err("nothing came back");
    assert!(matches!(&error, Error::OutcomeUnknown { txn, .. } if *txn == swap.txn), "{error:?}");
    assert!(error.is_transient());
    cut.store(2, Ordering::Relaxed);
    let serial = state(world).await.4;
    assert_eq!(updater.swap(&swap).await.expect("the cut is over"), Outcome::Won);
    assert_eq!(state(world).await.4, serial, "it had been applied before");
}

async fn a_swap_that_is_still_under_way_when_it_is_undone_does_nothing_when_it_arrives(world: &World) {
    let updater = world.updater(site_a());
    let late = async |swap: &Swap| {
        // The update waits in a queue, and nobody says so.
        let swallow = |request: &[u8], _: Option<&[u8]>| match is_update(request) {
            true => Verdict::Swallow,
            false => Verdict::Pass,
        };
        let mut proxy = Proxy::start(world.address, swallow).await;
        let error = through(&proxy, |config| config.retries = 0).swap(swap).await.expect_err("no answer");
        assert!(matches!(error, Error::OutcomeUnknown { .. }), "{error:?}");
        let before = updater.read(&app()).await.expect("readable");
        assert_eq!(updater.undo(swap).await.expect("answered"), Outcome::Won, "it was not applied");
        let [queued] = proxy.updates().try_into().expect("one update");
        let reply = ask_tcp(world.address, &queued).await.expect("answered");
        assert_ne!(reply[3] & 0xf, 0, "the late update was accepted");
        let found = updater.read(&app()).await.expect("readable");
        let said =
            |records: &dnsupdater::Records| (records.addresses.clone(), records.ttl_s(), records.epoch());
        assert_eq!(said(&found), said(&before), "the name is as it was");
    };
    late(&first_swap()).await;
    assert_eq!(updater.swap(&first_swap()).await.expect("answered"), Outcome::Won);
    let held = updater.read(&app()).await.expect("readable").ownership().cloned();
    late(&second_swap().observed(held)).await;
    assert_eq!(
        updater.swap(&second_swap()).await.expect("answered"),
        Outcome::Won,
        "the name can still move"
    );
}

async fn a_truncated_answer_is_asked_for_again_over_tcp(world: &World) {
    let over_udp = Arc::new(AtomicU32::new(0));
    let counted = over_udp.clone();
    let mut proxy = Proxy::start(world.address, move |request, reply| match reply {
        // Each request comes twice: the first time over UDP, cut; ids are new every time, so count instead.
        Some(reply) if counted.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) && is_update(request) => {
            let mut cut = unsigned(reply);
            cut[2] |= 2;
            Verdict::Instead(vec![cut])
        }
        Some(_) | None => Verdict::Pass,
    })
    .await;
    let updater = through(&proxy, |config| config.transport = Transport::Udp);
    // The reading before it takes four answers, so the update's first reply is an even one.
    assert_eq!(updater.swap(&first_swap()).await.expect("answered"), Outcome::Won);
    assert_eq!(proxy.updates().len(), 2, "over UDP, then over TCP");
}

async fn a_slow_server_is_waited_for_until_the_timeout_and_no_longer(world: &World) {
    let proxy = Proxy::start(world.address, |_, _| Verdict::Late(Duration::from_millis(200))).await;
    let patient = through(&proxy, |config| config.timeout = Duration::from_secs(5));
    assert!(patient.read(&app()).await.expect("in time").has(&ips(&[HOME])));
    let hasty = through(&proxy, |config| (config.timeout, config.retries) = (Duration::from_millis(50), 0));
    let started = Instant::now();
    let error = hasty.read(&app()).await.expect_err("too late");
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(2));
}

async fn an_update_whose_answer_comes_too_late_is_won_and_applied_once(world: &World) {
    for transport in [Transport::Tcp, Transport::Udp] {
        let world = &world.another().await;
        let before = state(world).await.4;
        let slow = |request: &[u8], _: Option<&[u8]>| {
            if is_update(request) { Verdict::Late(TOO_LATE) } else { Verdict::Pass }
        };
        let mut proxy = Proxy::start(world.address, slow).await;
        let updater = through(&proxy, |config| config.transport = transport);
        let swap = first_swap();
        assert_eq!(updater.swap(&swap).await.expect("resolved"), Outcome::Won, "{transport:?}");
        assert_eq!(proxy.updates().len(), 1, "the reading settles it, nothing is sent again");
        assert_eq!(updater.swap(&swap).await.expect("resolved"), Outcome::Won, "{transport:?}, again");
        let found = world.updater(site_a()).read(&app()).await.expect("readable");
        assert_eq!(found.ownership(), Some(&swap.ownership().expect("valid")));
        assert_eq!(found.serial, before + 1, "{transport:?}");
    }
}

async fn an_outcome_that_comes_too_late_to_be_known_is_settled_by_the_same_swap(world: &World) {
    for transport in [Transport::Tcp, Transport::Udp] {
        let world = &world.another().await;
        let before = state(world).await.4;
        // From the first update on every answer is late, until the server is quick again.
        let (updated, quick) = (AtomicBool::new(false), Arc::new(AtomicBool::new(false)));
        let rule_quick = quick.clone();
        let proxy = Proxy::start(world.address, move |request, _| {
            updated.fetch_or(is_update(request), Ordering::Relaxed);
            let is_late = updated.load(Ordering::Relaxed) && !rule_quick.load(Ordering::Relaxed);
            if is_late { Verdict::Late(TOO_LATE) } else { Verdict::Pass }
        })
        .await;
        let updater = through(&proxy, |config| (config.transport, config.retries) = (transport, 0));
        let swap = first_swap();
        let error = updater.swap(&swap).await.expect_err("nothing came in time");
        assert!(matches!(&error, Error::OutcomeUnknown { txn, .. } if *txn == swap.txn), "{error:?}");
        quick.store(true, Ordering::Relaxed);
        assert_eq!(updater.swap(&swap).await.expect("in time"), Outcome::Won, "{transport:?}");
        assert_eq!(state(world).await.4, before + 1, "{transport:?}: it had been applied before");
    }
}

#[tokio::test]
async fn a_silent_or_absent_server_is_unreachable_and_nothing_is_unknown_about_it() {
    let silent_udp = UdpSocket::bind(loopback(0)).await.expect("bound");
    let silent_tcp = TcpListener::bind(loopback(0)).await.expect("bound");
    let absent = {
        let gone = TcpListener::bind(loopback(0)).await.expect("bound");
        gone.local_addr().expect("bound")
    };
    for (server, transport) in [
        (silent_udp.local_addr().expect("bound"), Transport::Udp),
        (silent_tcp.local_addr().expect("bound"), Transport::Tcp),
        (absent, Transport::Tcp),
        (absent, Transport::Udp),
    ] {
        let mut config = config(vec![server], site_a());
        (config.timeout, config.retries, config.transport) = (Duration::from_millis(100), 1, transport);
        let updater = Updater::new(config).expect("valid");
        let error = updater.preflight(&app(), &[]).await.expect_err("nobody answers");
        assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
        let blind = second_swap().observed(Some(first_swap().ownership().expect("valid")));
        let error = updater.swap(&blind).await.expect_err("nobody answers");
        if server == absent {
            assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
        } else {
            assert!(matches!(error, Error::OutcomeUnknown { .. }), "{error:?}");
        }
    }
}

async fn an_unsigned_answer_to_a_signed_question_is_not_believed(world: &World) {
    let proxy = Proxy::start(world.address, |_, reply| match reply {
        Some(reply) => Verdict::Instead(vec![unsigned(reply)]),
        None => Verdict::Pass,
    })
    .await;
    let updater = through(&proxy, |config| config.retries = 0);
    let error = updater.read(&app()).await.expect_err("unsigned");
    assert!(matches!(error, Error::Protocol { reason: "it is not signed", .. }), "{error:?}");
    let error = updater.swap(&first_swap()).await.expect_err("unsigned");
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
    // Where the operator has said that reads are unsigned, updates are still signed.
    let lax = through(&proxy, |config| (config.signed_reads, config.retries) = (false, 0));
    let error = lax.preflight(&app(), &[]).await.expect_err("the update's answer is unsigned");
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
}

async fn an_unsigned_success_of_an_update_counts_only_after_a_signed_reading(world: &World) {
    // The forger answers the update himself, with success, and lets it never arrive.
    let updates = AtomicU32::new(0);
    let forger = Proxy::start(world.address, move |request, reply| match reply {
        Some(reply) if is_update(request) && updates.fetch_add(1, Ordering::Relaxed) == 0 => {
            Verdict::Instead(vec![with_rcode(unsigned(reply), 0)])
        }
        Some(_) | None => Verdict::Pass,
    })
    .await;
    let updater = through(&forger, |_| {});
    let stale = first_swap();
    assert_eq!(world.updater(site_a()).swap(&first_swap()).await.expect("answered"), Outcome::Won);
    let blind = stale.epochs(dnsupdater::Epoch(1), dnsupdater::Epoch(2)).observed(Some(
        dnsupdater::Ownership::new(dnsupdater::Epoch(1), "nobody", dnsupdater::Txn::random()).expect("valid"),
    ));
    assert!(matches!(updater.swap(&blind).await.expect("resolved"), Outcome::Lost { .. }));
}

async fn a_forged_refusal_does_not_hide_a_swap_that_was_applied(world: &World) {
    for rcode in [5, 9, 2] {
        let world = &world.another().await;
        let first = first_update_reply();
        let proxy = Proxy::start(world.address, move |request, reply| match reply {
            Some(bytes) if first(request, reply) => {
                Verdict::Instead(vec![with_rcode(unsigned(bytes), rcode)])
            }
            Some(_) | None => Verdict::Pass,
        })
        .await;
        let updater = through(&proxy, |_| {});
        assert_eq!(updater.swap(&first_swap()).await.expect("resolved"), Outcome::Won, "rcode {rcode}");
    }
}

async fn an_altered_answer_is_not_believed(world: &World) {
    let proxy = Proxy::start(world.address, |_, reply| match reply {
        Some(reply) => {
            let mut altered = reply.to_vec();
            let home = [198, 51, 100, 10];
            if let Some(at) = altered.windows(4).position(|window| window == home) {
                altered[at + 3] = 66;
            }
            Verdict::Instead(vec![altered])
        }
        None => Verdict::Pass,
    })
    .await;
    let updater = through(&proxy, |config| config.retries = 0);
    let error = updater.read(&app()).await.expect_err("altered");
    assert!(matches!(error, Error::Protocol { reason: "its signature does not match", .. }), "{error:?}");
}

async fn strays_before_the_answer_are_skipped_over_udp_and_fatal_over_tcp(world: &World) {
    let proxy = Proxy::start(world.address, |_, reply| match reply {
        Some(reply) => {
            let mut other_id = reply.to_vec();
            other_id[0] ^= 0x55;
            let forged = with_rcode(unsigned(reply), 0);
            Verdict::Instead(vec![vec![], vec![1, 2, 3], other_id, forged, reply.to_vec()])
        }
        None => Verdict::Pass,
    })
    .await;
    let udp = through(&proxy, |config| config.transport = Transport::Udp);
    assert_eq!(udp.swap(&first_swap()).await.expect("answered"), Outcome::Won);
    let tcp = through(&proxy, |config| config.retries = 0);
    let error = tcp.read(&app()).await.expect_err("a connection brings no strays");
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
}

async fn another_requests_genuine_answer_is_not_believed(world: &World) {
    let recorded: Arc<OnceLock<Vec<u8>>> = Arc::default();
    let record = recorded.clone();
    let proxy = Proxy::start(world.address, move |request, reply| match reply {
        Some(reply) if is_update(request) => match record.get() {
            None => {
                record.set(reply.to_vec()).expect("once");
                Verdict::Pass
            }
            // The success of before, with the id of now: the MAC covers the request it belonged to.
            Some(old) => {
                let mut replayed = old.clone();
                replayed[..2].copy_from_slice(&request[..2]);
                Verdict::Instead(vec![replayed])
            }
        },
        Some(_) | None => Verdict::Pass,
    })
    .await;
    let updater = through(&proxy, |config| config.retries = 0);
    assert_eq!(updater.swap(&first_swap()).await.expect("answered"), Outcome::Won);
    assert!(recorded.get().is_some());
    let stale = second_swap().observed(Some(
        dnsupdater::Ownership::new(dnsupdater::Epoch(1), "nobody", dnsupdater::Txn::random()).expect("valid"),
    ));
    assert!(matches!(updater.swap(&stale).await.expect("resolved"), Outcome::Lost { .. }));
}

async fn a_preflight_and_its_failure_leave_no_trace(world: &World) {
    let before = state(world).await;
    let proxy = Proxy::start(world.address, |request, reply| {
        if is_update(request) && reply.is_some() { Verdict::Drop } else { Verdict::Pass }
    })
    .await;
    let updater = through(&proxy, |config| config.retries = 1);
    let error = updater.preflight(&app(), &ips(&[AWAY])).await.expect_err("no answer");
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert_eq!(state(world).await, before);
}
