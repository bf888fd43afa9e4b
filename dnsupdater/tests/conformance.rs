//! What every name server must do for a swap to be atomic, asked of the embedded hickory server and of Debian's BIND,
//! Knot, PowerDNS and YADIFA: the same cases, and where a server answers otherwise, what it answers.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use dnsupdater::{
    Epoch, Error, Outcome, PtrOutcome, PtrSwap, Register, ResponseCode, Shape, Swap, Transport, TsigFault,
    TtlOutcome, Updater, UpdaterConfig,
};
use support::proxy::{Proxy, Verdict, ask_tcp, is_update, unsigned};
use support::*;
use tokio::task::JoinSet;

on_every_server!(
    a_first_swap_moves_the_addresses_and_leaves_an_ownership_record,
    a_swap_of_an_older_epoch_loses_and_tells_what_is_there,
    a_swap_from_other_addresses_loses_at_the_server,
    a_swap_from_some_of_the_addresses_loses_at_the_server,
    a_lost_swap_carries_the_servers_code,
    the_same_swap_given_twice_is_won_twice_and_applied_once,
    of_twenty_racing_swaps_exactly_one_wins,
    of_twenty_racing_claims_that_change_no_address_exactly_one_wins,
    both_families_move_in_one_update,
    a_name_without_records_can_be_created_but_not_twice,
    udp_does_the_same,
    a_key_of_another_hash_works,
    a_wrong_secret_and_an_unknown_key_are_told_apart,
    a_key_is_held_to_its_names,
    an_update_without_a_key_is_refused,
    another_zone_is_refused,
    a_clock_that_is_off_is_named_with_both_times,
    a_preflight_changes_nothing,
    a_preflight_finds_what_cannot_be_swapped,
    the_time_to_live_is_lowered_and_restored,
    a_swap_is_undone_once,
    a_swap_somebody_built_on_is_not_undone,
    a_replayed_swap_does_nothing,
    a_replayed_time_to_live_does_nothing,
    a_reverse_name_moves_on_its_own,
    a_replayed_reverse_name_does_nothing,
    the_zone_of_a_name_is_found,
);

async fn won(updater: &Updater, swap: &Swap) {
    assert_eq!(updater.swap(swap).await.expect("answered"), Outcome::Won);
}

async fn lost(updater: &Updater, swap: &Swap) -> Box<dnsupdater::Records> {
    match updater.swap(swap).await.expect("answered") {
        Outcome::Lost { current, .. } => current,
        Outcome::Won => panic!("won"),
    }
}

async fn a_first_swap_moves_the_addresses_and_leaves_an_ownership_record(world: &World) {
    let updater = world.updater(site_a());
    let swap = first_swap();
    won(&updater, &swap).await;
    let found = updater.read(&app()).await.expect("readable");
    assert_eq!((&found.addresses, found.a_ttl_s), (&ips(&[AWAY]), Some(30)));
    assert_eq!(found.register, Register::Held(swap.ownership().expect("valid")));
    assert_eq!(found.epoch(), Epoch(1));
    assert!(found.clock_ahead_s.expect("signed").abs() <= 2);
}

async fn a_swap_of_an_older_epoch_loses_and_tells_what_is_there(world: &World) {
    let updater = world.updater(site_a());
    won(&updater, &first_swap()).await;
    let current = lost(&updater, &first_swap()).await;
    assert_eq!((current.epoch(), current.addresses), (Epoch(1), ips(&[AWAY])));
    // And again where the server decides: the caller believes that there is no record yet, and does not read first.
    let other = second_swap();
    won(&updater, &other).await;
    let stale = second_swap().observed(Some(first_swap().ownership().expect("valid")));
    assert_eq!(lost(&updater, &stale).await.ownership(), Some(&other.ownership().expect("valid")));
}

async fn a_swap_from_other_addresses_loses_at_the_server(world: &World) {
    let updater = world.updater(site_a());
    let first = first_swap();
    won(&updater, &first).await;
    let mut swap = second_swap().observed(Some(first.ownership().expect("valid")));
    swap.old = ips(&["203.0.113.99"]);
    assert!(lost(&updater, &swap).await.has(&ips(&[AWAY])));
}

/// Of what is expected the server says NXRRSET, of what is not expected YXRRSET.
async fn a_lost_swap_carries_the_servers_code(world: &World) {
    let updater = world.updater(site_a());
    let dual = name("dual.vm.example");
    let home = ips(&["198.51.100.11", "2001:db8:a::11"]);
    let first = Swap::new(dual.clone(), home.clone(), home.clone(), 30, "site-a");
    won(&updater, &first).await;
    let next = |old: &[&str]| {
        Swap::new(dual.clone(), ips(old), ips(&[AWAY]), 30, "site-b")
            .epochs(Epoch(1), Epoch(2))
            .observed(Some(first.ownership().expect("valid")))
    };
    for (swap, code) in [
        (next(&["198.51.100.11"]), ResponseCode::YXRRSet),
        (next(&["198.51.100.99", "2001:db8:a::11"]), ResponseCode::NXRRSet),
    ] {
        let outcome = updater.swap(&swap).await.expect("answered");
        assert!(matches!(outcome, Outcome::Lost { rcode: Some(found), .. } if found == code), "{outcome:?}");
    }
    assert!(updater.read(&dual).await.expect("readable").has(&home));
}

async fn a_swap_from_some_of_the_addresses_loses_at_the_server(world: &World) {
    let updater = world.updater(site_a());
    let name = name("several.vm.example");
    let both = ips(&["192.0.2.20", "192.0.2.21"]);
    let first = Swap::new(name.clone(), both.clone(), both.clone(), 300, "site-a");
    won(&updater, &first).await;
    let some = Swap::new(name, both[..1].to_vec(), ips(&[AWAY]), 30, "site-b")
        .epochs(Epoch(1), Epoch(2))
        .observed(Some(first.ownership().expect("valid")));
    assert!(lost(&updater, &some).await.has(&both));
}

async fn the_same_swap_given_twice_is_won_twice_and_applied_once(world: &World) {
    let updater = world.updater(site_a());
    let swap = first_swap();
    won(&updater, &swap).await;
    let serial = updater.read(&app()).await.expect("readable").serial;
    won(&updater, &swap).await;
    let observed = updater.preflight(&app(), &[]).await.expect("ready").records.ownership().cloned();
    let again = second_swap().observed(observed);
    won(&updater, &again).await;
    won(&updater, &again).await;
    assert_eq!(updater.read(&app()).await.expect("readable").serial, serial + 1);
}

async fn of_twenty_racing_swaps_exactly_one_wins(world: &World) {
    race(world, |racer| ips(&[&format!("203.0.113.{}", 100 + racer)])).await;
}

/// Here the ownership record alone can order them.
async fn of_twenty_racing_claims_that_change_no_address_exactly_one_wins(world: &World) {
    race(world, |_| ips(&[AWAY])).await;
}

async fn race(world: &World, new: impl Fn(u32) -> Vec<std::net::IpAddr>) {
    let first = first_swap();
    won(&world.updater(site_a()), &first).await;
    let mut racers = JoinSet::new();
    for racer in 0..20 {
        let key = if racer % 2 == 0 { site_a() } else { site_b() };
        let transport = if racer % 4 < 2 { Transport::Tcp } else { Transport::Udp };
        let updater = Updater::new(UpdaterConfig { transport, ..world.config(key) }).expect("valid");
        let mut swap = second_swap().observed(Some(first.ownership().expect("valid")));
        (swap.new, swap.owner) = (new(racer), format!("racer-{racer}"));
        racers.spawn(async move { (updater.swap(&swap).await.expect("answered"), swap) });
    }
    let ended = racers.join_all().await;
    let winners: Vec<_> = ended.iter().filter(|(outcome, _)| *outcome == Outcome::Won).collect();
    let [(_, winner)] = winners.as_slice() else { panic!("{} winners", winners.len()) };
    let found = world.updater(site_a()).read(&app()).await.expect("readable");
    assert_eq!(found.register, Register::Held(winner.ownership().expect("valid")));
    assert_eq!(found.addresses, winner.new);
    let told = |outcome: &Outcome| match outcome {
        Outcome::Won => None,
        Outcome::Lost { current, .. } => Some(current.ownership().expect("held").owner().to_owned()),
    };
    let told: BTreeSet<_> = ended.iter().filter_map(|(outcome, _)| told(outcome)).collect();
    assert_eq!(told, BTreeSet::from([winner.owner.clone()]));
}

async fn both_families_move_in_one_update(world: &World) {
    let updater = world.updater(site_b());
    let name = name("dual.vm.example");
    let (home, away) = (ips(&["198.51.100.11", "2001:db8:a::11"]), ips(&["203.0.113.11", "2001:db8:b::11"]));
    let serial = updater.read(&name).await.expect("readable").serial;
    won(&updater, &Swap::new(name.clone(), home, away.clone(), 30, "site-b")).await;
    let found = updater.read(&name).await.expect("readable");
    assert_eq!((&found.addresses, found.serial), (&away, serial + 1));
    assert_eq!((found.a_ttl_s, found.aaaa_ttl_s), (Some(30), Some(30)));
    // The visited site has no IPv6: that family disappears with the same update.
    let four = Swap::new(name.clone(), away, ips(&[AWAY]), 30, "site-c").epochs(Epoch(1), Epoch(2));
    won(&updater, &four).await;
    assert_eq!(updater.read(&name).await.expect("readable").addresses, ips(&[AWAY]));
}

async fn a_name_without_records_can_be_created_but_not_twice(world: &World) {
    let updater = world.updater(site_a());
    let name = name("new.vm.example");
    let create = || Swap::new(name.clone(), vec![], ips(&[AWAY]), 60, "site-a");
    won(&updater, &create()).await;
    assert!(lost(&updater, &create()).await.has(&ips(&[AWAY])));
}

async fn udp_does_the_same(world: &World) {
    let config = UpdaterConfig { transport: Transport::Udp, ..world.config(site_a()) };
    let updater = Updater::new(config).expect("valid");
    let found = updater.preflight(&app(), &ips(&[AWAY])).await.expect("ready");
    won(&updater, &first_swap().observed(found.records.ownership().cloned())).await;
    lost(&updater, &first_swap()).await;
    assert!(updater.read(&app()).await.expect("readable").has(&ips(&[AWAY])));
}

async fn a_key_of_another_hash_works(world: &World) {
    won(&world.updater(site_512()), &first_swap()).await;
}

async fn a_wrong_secret_and_an_unknown_key_are_told_apart(world: &World) {
    let before = essence(&world.updater(site_a()).read(&app()).await.expect("readable"));
    let hash = site_a().algorithm();
    let wrong = key("site-a", hash, b"not the secret of site a at all!");
    let unknown = key("nobody", hash, b"the secret of site a, 32 bytes!!");
    for (key, fault) in [(wrong, TsigFault::BadSig), (unknown, TsigFault::BadKey)] {
        let updater = world.updater(key);
        let errors = [
            updater.read(&app()).await.expect_err("refused"),
            updater.preflight(&app(), &[]).await.expect_err("refused"),
            updater.swap(&first_swap()).await.expect_err("refused"),
            // Without a reading before it: the update itself is refused.
            updater
                .swap(&second_swap().observed(Some(first_swap().ownership().expect("valid"))))
                .await
                .expect_err("refused"),
        ];
        // PowerDNS does not say what is wrong, only that something is.
        let told = (world.kind != Kind::PowerDns).then_some(fault);
        for error in errors {
            let expected =
                matches!(error, Error::KeyOrPolicy { tsig, authenticated: false, .. } if tsig == told);
            assert!(expected, "{error:?}");
        }
    }
    assert_eq!(essence(&world.updater(site_a()).read(&app()).await.expect("readable")), before);
}

async fn a_key_is_held_to_its_names(world: &World) {
    if !world.kind.has_policy_per_name() {
        println!("skipped: {:?} has no policy per name, a key may change its whole zone", world.kind);
        return;
    }
    let updater = world.updater(site_b());
    let name = name("ns1.vm.example");
    let before = essence(&world.updater(site_a()).read(&name).await.expect("readable"));
    let swap = Swap::new(name.clone(), ips(&["127.0.0.1"]), ips(&[AWAY]), 30, "site-b");
    for error in [
        updater.preflight(&name, &ips(&[AWAY])).await.expect_err("refused"),
        updater.swap(&swap).await.expect_err("refused"),
        updater.lower_ttl(&name, 30).await.expect_err("refused"),
    ] {
        let Error::KeyOrPolicy { rcode, tsig, authenticated, .. } = error else { panic!("{error:?}") };
        // Knot denies the key where the others deny the change.
        let expected = match world.kind {
            Kind::Knot => (ResponseCode::NotAuth, Some(TsigFault::BadKey), false),
            Kind::Hickory | Kind::Bind | Kind::PowerDns | Kind::Yadifa => (ResponseCode::Refused, None, true),
        };
        assert_eq!((rcode, tsig, authenticated), expected);
    }
    assert_eq!(essence(&world.updater(site_a()).read(&name).await.expect("readable")), before);
}

async fn an_update_without_a_key_is_refused(world: &World) {
    let lose_updates = |request: &[u8], _: Option<&[u8]>| match is_update(request) {
        true => Verdict::Swallow,
        false => Verdict::Pass,
    };
    let mut proxy = Proxy::start(world.address, lose_updates).await;
    let mut config = config(vec![proxy.address], site_a());
    (config.retries, config.timeout) = (0, Duration::from_millis(200));
    let watched = Updater::new(config).expect("valid");
    watched.swap(&first_swap()).await.expect_err("it never arrived");
    let [captured] = proxy.updates().try_into().expect("one update");
    let before = essence(&world.updater(site_a()).read(&app()).await.expect("readable"));
    let reply = ask_tcp(world.address, &unsigned(&captured)).await.expect("answered");
    assert!(matches!(reply[3] & 0xf, 5 | 9), "REFUSED or NOTAUTH, not {}", reply[3] & 0xf);
    assert_eq!(essence(&world.updater(site_a()).read(&app()).await.expect("readable")), before);
    // The same message with its signature is what the server takes.
    let reply = ask_tcp(world.address, &captured).await.expect("answered");
    assert_eq!(reply[3] & 0xf, 0);
}

async fn another_zone_is_refused(world: &World) {
    let outside = Swap::new(name("app.other.example"), ips(&[HOME]), ips(&[AWAY]), 30, "site-a");
    let error = world.updater(site_a()).swap(&outside).await.expect_err("refused");
    assert!(matches!(error, Error::Config(_)), "{error:?}");
    let elsewhere = UpdaterConfig { zone: name("other.example"), ..world.config(site_a()) };
    let updater = Updater::new(elsewhere).expect("valid");
    for error in [
        updater.preflight(&outside.name, &[]).await.expect_err("refused"),
        updater.swap(&outside).await.expect_err("refused"),
    ] {
        // hickory's catalogue answers for unknown zones before any key is looked at.
        assert!(matches!(error, Error::NotZone { .. } | Error::KeyOrPolicy { .. }), "{error:?}");
    }
    // A zone below the real one is not a zone of the server either.
    let below = UpdaterConfig { zone: name("app.vm.example"), ..world.config(site_a()) };
    let updater = Updater::new(below).expect("valid");
    let error = updater.read(&app()).await.expect_err("refused");
    assert!(matches!(error, Error::NotZone { .. }), "{error:?}");
}

async fn a_clock_that_is_off_is_named_with_both_times(world: &World) {
    for offset_s in [3_600, -3_600] {
        let config = UpdaterConfig { clock_offset_s: offset_s, ..world.config(site_a()) };
        let updater = Updater::new(config).expect("valid");
        let blind = second_swap().observed(Some(first_swap().ownership().expect("valid")));
        for error in [
            updater.preflight(&app(), &[]).await.expect_err("refused"),
            updater.swap(&blind).await.expect_err("refused"),
        ] {
            if world.kind == Kind::PowerDns {
                // It does not say that it is the clock.
                assert!(
                    matches!(error, Error::KeyOrPolicy { tsig: None, authenticated: false, .. }),
                    "{error:?}"
                );
                assert!(error.to_string().contains("then the clocks"), "{error}");
                continue;
            }
            let Error::Clock { here_s, there_s: Some(there_s), .. } = error else { panic!("{error:?}") };
            assert!((here_s.cast_signed() - there_s.cast_signed() - offset_s).abs() <= 2);
        }
    }
    let config = UpdaterConfig { clock_offset_s: 250, ..world.config(site_a()) };
    let updater = Updater::new(config).expect("valid");
    let found = updater.preflight(&app(), &[]).await.expect("within the fudge").records;
    // PowerDNS signs with the time of the request: its clock cannot be seen.
    let ahead_s = if world.kind == Kind::PowerDns { 0 } else { -250 };
    assert!((found.clock_ahead_s.expect("signed") - ahead_s).abs() <= 2);
}

async fn a_preflight_changes_nothing(world: &World) {
    let updater = world.updater(site_b());
    for (text, new) in [
        ("app.vm.example", vec![]),
        ("dual.vm.example", vec![]),
        ("app.vm.example", ips(&[AWAY, "2001:db8::1"])),
    ] {
        let before = essence(&updater.read(&name(text)).await.expect("readable"));
        let found = updater.preflight(&name(text), &new).await.expect("ready");
        assert_eq!(essence(&found.records), before);
        assert_eq!(essence(&updater.read(&name(text)).await.expect("readable")), before);
    }
    won(&updater, &first_swap()).await;
    let before = essence(&updater.read(&app()).await.expect("readable"));
    updater.preflight(&app(), &ips(&[HOME])).await.expect("ready");
    assert_eq!(essence(&updater.read(&app()).await.expect("readable")), before);
}

async fn a_preflight_finds_what_cannot_be_swapped(world: &World) {
    let updater = world.updater(site_a());
    for (text, expected) in [
        ("alias.vm.example", Shape::Cname),
        ("x.wild.vm.example", Shape::Wildcard),
        ("several.vm.example", Shape::SeveralAddresses { found: 2 }),
        ("missing.vm.example", Shape::Missing),
        ("foreign.vm.example", Shape::ForeignOwnership { found: "somebody else's".to_owned() }),
    ] {
        let error = updater.preflight(&name(text), &ips(&[AWAY])).await.expect_err("refused");
        assert!(matches!(&error, Error::Shape { shape, .. } if *shape == expected), "{text}: {error:?}");
    }
    // What is not checked first is refused all the same.
    for text in ["alias.vm.example", "foreign.vm.example"] {
        let swap = Swap::new(name(text), ips(&[HOME]), ips(&[AWAY]), 30, "site-b");
        assert!(matches!(updater.swap(&swap).await, Err(Error::Shape { .. })), "{text}");
    }
    let wild = Swap::new(name("x.wild.vm.example"), ips(&["192.0.2.9"]), ips(&[AWAY]), 30, "site-b");
    let error = updater.swap(&wild).await.expect_err("refused");
    assert!(matches!(error, Error::Shape { shape: Shape::Wildcard, .. }), "{error:?}");
}

async fn the_time_to_live_is_lowered_and_restored(world: &World) {
    let updater = world.updater(site_b());
    let name = name("dual.vm.example");
    let lowered = updater.lower_ttl(&name, 30).await.expect("answered");
    assert_eq!(lowered, TtlOutcome::Changed { from_s: 600, to_s: 30 });
    let found = updater.read(&name).await.expect("readable");
    assert_eq!((found.a_ttl_s, found.aaaa_ttl_s), (Some(30), Some(30)));
    assert_eq!(found.addresses, ips(&["198.51.100.11", "2001:db8:a::11"]));
    let again = updater.lower_ttl(&name, 60).await.expect("answered");
    assert_eq!(again, TtlOutcome::Already { ttl_s: 30 });
    let restored = updater.restore_ttl(&name, 600).await.expect("answered");
    assert_eq!(restored, TtlOutcome::Changed { from_s: 30, to_s: 600 });
    let missing = updater.lower_ttl(&support::name("missing.vm.example"), 30).await;
    assert!(matches!(missing, Err(Error::Shape { shape: Shape::Missing, .. })), "{missing:?}");
    // The ownership record is another one afterwards, of the same claim; a swap on top of the old one is still won.
    won(&updater, &first_swap()).await;
    let before = updater.read(&app()).await.expect("readable").ownership().cloned();
    updater.restore_ttl(&app(), 300).await.expect("answered");
    let after = updater.read(&app()).await.expect("readable");
    let (before, held) = (before.expect("held"), after.ownership().expect("held"));
    assert!(*held != before && held.is_claim_of(&before) && after.ttl_s() == Some(300));
    won(&updater, &on_top_of(&before)).await;
}

/// The move home by somebody who read the ownership record before its last touch.
fn on_top_of(before: &dnsupdater::Ownership) -> Swap {
    second_swap().observed(Some(before.clone()))
}

async fn a_swap_is_undone_once(world: &World) {
    let updater = world.updater(site_a());
    won(&updater, &first_swap()).await;
    let home = second_swap().observed(updater.read(&app()).await.expect("readable").ownership().cloned());
    assert_eq!(updater.undo(&home).await.expect("answered"), Outcome::Won, "it was never applied");
    won(&updater, &home).await;
    assert_eq!(updater.undo(&home).await.expect("answered"), Outcome::Won);
    let found = updater.read(&app()).await.expect("readable");
    assert_eq!((found.epoch(), found.addresses.clone()), (Epoch(1), ips(&[AWAY])));
    let ownership = found.ownership().expect("held").clone();
    assert_eq!(ownership.owner(), "site-b");
    assert_ne!(Some(&ownership), home.observed.as_ref(), "a value never comes back");
    assert_eq!(updater.undo(&home).await.expect("answered"), Outcome::Won);
    assert_eq!(updater.read(&app()).await.expect("readable").serial, found.serial, "undone once only");
    won(&updater, &second_swap()).await;
}

async fn a_swap_somebody_built_on_is_not_undone(world: &World) {
    let updater = world.updater(site_a());
    let first = first_swap();
    won(&updater, &first).await;
    won(&updater, &second_swap()).await;
    let before = essence(&updater.read(&app()).await.expect("readable"));
    assert!(matches!(updater.undo(&first).await.expect("answered"), Outcome::Lost { .. }));
    assert_eq!(essence(&updater.read(&app()).await.expect("readable")), before);
}

async fn a_replayed_swap_does_nothing(world: &World) {
    let mut proxy = Proxy::start(world.address, |_, _| Verdict::Pass).await;
    let watched = Updater::new(config(vec![proxy.address], site_a())).expect("valid");
    let first = first_swap();
    won(&watched, &first).await;
    let [captured] = proxy.updates().try_into().expect("one update");
    let updater = world.updater(site_a());
    replay(world, &captured, "right after").await;
    assert_eq!(updater.undo(&first).await.expect("answered"), Outcome::Won);
    replay(world, &captured, "after the undo, everything as before the swap").await;
    won(&updater, &first_swap()).await;
    replay(world, &captured, "after another swap").await;
}

async fn a_replayed_time_to_live_does_nothing(world: &World) {
    let mut proxy = Proxy::start(world.address, |_, _| Verdict::Pass).await;
    let watched = Updater::new(config(vec![proxy.address], site_a())).expect("valid");
    watched.preflight(&app(), &[]).await.expect("ready");
    watched.lower_ttl(&app(), 30).await.expect("answered");
    let [rehearsed, lowered] = proxy.updates().try_into().expect("two updates");
    replay(world, &rehearsed, "the preflight, when the time to live is another").await;
    let updater = world.updater(site_a());
    updater.restore_ttl(&app(), 300).await.expect("answered");
    replay(world, &lowered, "when it is as before").await;
    replay(world, &rehearsed, "the preflight, when it is as before").await;
    won(&updater, &first_swap()).await;
    watched.lower_ttl(&app(), 20).await.expect("answered");
    let [lowered] = proxy.updates().try_into().expect("one update");
    updater.restore_ttl(&app(), 30).await.expect("answered");
    replay(world, &lowered, "with a swap in between").await;
}

/// Sends a captured update again: it is answered with an error and changes nothing.
async fn replay(world: &World, captured: &[u8], when: &str) {
    let updater = world.updater(site_a());
    let before = essence(&updater.read(&app()).await.expect("readable"));
    let reply = ask_tcp(world.address, captured).await.expect("answered");
    assert_ne!(reply[3] & 0xf, 0, "{when}: the replay was accepted");
    assert_eq!(essence(&updater.read(&app()).await.expect("readable")), before, "{when}");
}

fn reverse(old: Option<&str>, new: Option<&str>) -> PtrSwap {
    PtrSwap::new(ips(&[HOME])[0], name(REVERSE_ZONE), old.map(name), new.map(name), 300)
}

async fn a_reverse_name_moves_on_its_own(world: &World) {
    let updater = world.updater(site_a());
    let done = async |swap: &PtrSwap| {
        assert_eq!(updater.swap_ptr(swap).await.expect("answered"), PtrOutcome::Done);
    };
    let away = reverse(Some("app.vm.example"), Some("dual.vm.example"));
    done(&away).await;
    done(&away).await;
    let found = updater.read_ptr(away.address, &away.zone).await.expect("readable");
    assert_eq!((&found.names, found.ttl_s), (&vec![name("dual.vm.example")], Some(300)));
    let stale = reverse(Some("app.vm.example"), Some("dual.vm.example"));
    assert_eq!(updater.swap_ptr(&stale).await.expect("answered"), PtrOutcome::Lost { current: found });
    done(&reverse(Some("dual.vm.example"), None)).await;
    done(&reverse(None, Some("app.vm.example"))).await;
    let wrong_zone = PtrSwap { zone: name("vm.example"), ..stale };
    assert!(matches!(updater.swap_ptr(&wrong_zone).await, Err(Error::Config(_))));
    // RFC 2317: the record is in another zone.
    let alias = ips(&["203.0.113.11"])[0];
    let error = updater.read_ptr(alias, &name(REVERSE_ZONE_AWAY)).await.expect_err("refused");
    assert!(matches!(&error, Error::Shape { shape: Shape::ReverseAlias { .. }, .. }), "{error:?}");
}

async fn a_replayed_reverse_name_does_nothing(world: &World) {
    let mut proxy = Proxy::start(world.address, |_, _| Verdict::Pass).await;
    let watched = Updater::new(config(vec![proxy.address], site_a())).expect("valid");
    let away = reverse(Some("app.vm.example"), Some("dual.vm.example"));
    assert_eq!(watched.swap_ptr(&away).await.expect("answered"), PtrOutcome::Done);
    let [captured] = proxy.updates().try_into().expect("one update");
    let updater = world.updater(site_a());
    assert_eq!(updater.swap_ptr(&away.inverse()).await.expect("answered"), PtrOutcome::Done);
    let before = updater.read_ptr(away.address, &away.zone).await.expect("readable");
    let reply = ask_tcp(world.address, &captured).await.expect("answered");
    assert_ne!(reply[3] & 0xf, 0, "the replay was accepted");
    assert_eq!(updater.read_ptr(away.address, &away.zone).await.expect("readable"), before);
}

async fn the_zone_of_a_name_is_found(world: &World) {
    let updater = world.updater(site_a());
    let zone = name("vm.example");
    for text in
        ["app.vm.example", "vm.example", "missing.below.vm.example", "alias.vm.example", "x.wild.vm.example"]
    {
        assert_eq!(updater.zone_of(&name(text)).await.expect("found"), zone, "{text}");
    }
    for text in [HOME, "198.51.100.99"] {
        let reverse = dnsupdater::DnsName::reverse(ips(&[text])[0]);
        assert_eq!(updater.zone_of(&reverse).await.expect("found"), name(REVERSE_ZONE), "{text}");
    }
    let error = updater.zone_of(&name("app.other.example")).await.expect_err("it is not there");
    assert!(matches!(error, Error::NotZone { .. } | Error::KeyOrPolicy { .. }), "{error:?}");
}

/// YADIFA 2.6 judges a prerequisite on a whole RRset rightly only if it is the last one: no swap of a name that has an
/// ownership record can be told from a stale one. It says no where it should say yes, and never the other way round.
#[tokio::test]
async fn yadifa_is_found_out_by_the_preflight() {
    let Some(world) = World::of(Kind::Yadifa).await else { return };
    let updater = world.updater(site_a());
    let dual = name("dual.vm.example");
    let before = essence(&updater.read(&dual).await.expect("readable"));
    let swap = Swap::new(dual.clone(), ips(&["198.51.100.11", "2001:db8:a::11"]), ips(&[AWAY]), 30, "site-b");
    for error in [
        updater.preflight(&dual, &ips(&[AWAY])).await.expect_err("refused"),
        updater.swap(&swap).await.expect_err("refused"),
    ] {
        assert!(matches!(error, Error::Shape { shape: Shape::Prerequisites, .. }), "{error:?}");
    }
    assert_eq!(essence(&updater.read(&dual).await.expect("readable")), before);
}
