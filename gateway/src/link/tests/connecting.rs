//! Who links with whom: keys, names, versions, restarts, and what travels on the control stream.

use longhaul_core::wire::{MAX_FRAME_BYTES, VersionRange};

use super::path::{Path, Shape};
use super::*;

#[tokio::test]
async fn two_sites_connect_and_exchange_control_messages() {
    let (mut a, mut b) = pair().await;
    for number in 0..50 {
        a.peer("b").send(message(number, b"from a")).await.unwrap();
        b.peer("a").send(message(number, &[7; 200_000])).await.unwrap();
    }
    for number in 0..50 {
        let from_a = LinkEvent::Control { peer: name("a"), message: message(number, b"from a") };
        assert_eq!(b.event().await, from_a);
        let from_b = LinkEvent::Control { peer: name("b"), message: message(number, &[7; 200_000]) };
        assert_eq!(a.event().await, from_b);
    }
    let stats = a.peer("b").stats();
    assert!(stats.up && stats.connections == 1 && stats.received.control_bytes > 50 * 200_000, "{stats:?}");
}

#[tokio::test]
async fn an_unknown_key_is_refused_and_reported_once() {
    let (stranger, key_b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let key_a = Identity::generate().unwrap();
    let public_a = key_a.public_key();
    let mut a = Site::open(config("a", vec![peer_config("b", key_b.public_key(), None)]), key_a).await;
    let to_a = vec![peer_config("a", public_a, Some(a.address()))];
    let mut b = Site::open(config("b", to_a), stranger).await;

    assert_eq!(a.event().await, LinkEvent::Refused { key: Some(b.identity.public_key()) });
    let reason = unreachable_reason(&mut b).await;
    assert!(reason.contains("does not accept this site's key"), "{reason}");
    // It tries again and again; nothing more is said about it.
    let tries = || a.link.endpoint.stats().accepted_handshakes;
    let before = tries();
    wait_until(|| tries() >= before + 3).await;
    assert!(a.events.try_recv().is_err(), "a refused key is reported once");
    assert!(!a.peer("b").is_up() && !b.peer("a").is_up());
}

#[tokio::test]
async fn a_listener_with_another_key_than_configured_is_not_linked_with() {
    let (key_a, key_b, other) =
        (Identity::generate().unwrap(), Identity::generate().unwrap(), Identity::generate().unwrap());
    let a = Site::open(config("a", vec![peer_config("b", key_b.public_key(), None)]), key_a).await;
    let to_a = vec![peer_config("a", other.public_key(), Some(a.address()))];
    let mut b = Site::open(config("b", to_a), key_b).await;
    let reason = unreachable_reason(&mut b).await;
    assert!(reason.contains("another key than the configured one"), "{reason}");
}

#[tokio::test]
async fn a_version_mismatch_names_both_sides() {
    let range = |oldest, newest| VersionRange { oldest: Version(oldest), newest: Version(newest) };
    let (key_a, key_b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let mut config_a = config("a", vec![peer_config("b", key_b.public_key(), None)]);
    config_a.versions = range(3, 5);
    let public_a = key_a.public_key();
    let a = Site::open(config_a, key_a).await;
    let mut config_b = config("b", vec![peer_config("a", public_a, Some(a.address()))]);
    config_b.versions = range(1, 2);
    let mut b = Site::open(config_b, key_b).await;
    let reason = unreachable_reason(&mut b).await;
    assert!(reason.contains("this side speaks 1 to 2, the peer speaks 3 to 5"), "{reason}");
    assert!(!a.peer("b").is_up());
}

#[tokio::test]
async fn a_peer_that_calls_itself_otherwise_is_not_linked_with() {
    let (key_a, key_b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let public_a = key_a.public_key();
    let a = Site::open(config("other", vec![peer_config("b", key_b.public_key(), None)]), key_a).await;
    let to_a = vec![peer_config("a", public_a, Some(a.address()))];
    let mut b = Site::open(config("b", to_a), key_b).await;
    let reason = unreachable_reason(&mut b).await;
    assert!(reason.contains("calls itself other, but its key is configured as a's"), "{reason}");
}

#[tokio::test]
async fn a_restarted_gateway_is_linked_with_again_and_told_apart() {
    let (mut a, b) = pair().await;
    let (identity, to_a) = (b.identity.clone(), a.address());
    b.link.close().await;
    assert_eq!(a.down().await, DownReason::PeerStopped);
    assert_eq!(a.peer("b").send(message(1, b"x")).await, Err(NotConnected));
    let peers = vec![peer_config("a", a.identity.public_key(), Some(to_a))];
    let mut b = Site::open(config("b", peers), identity).await;
    b.up().await;
    let LinkEvent::Up { restarted, .. } = a.event().await else { panic!("not up") };
    assert!(restarted);
    assert_eq!(a.peer("b").stats().connections, 2);
}

#[tokio::test]
async fn a_gateway_that_crashed_and_returns_replaces_its_dead_connection() {
    let mut path = None;
    let patient = |config: &mut LinkConfig| config.idle_timeout = Duration::from_secs(30);
    let via = |address| path.insert(Path::to(address, Shape::clear())).address;
    let (mut a, b) = pair_with(patient, patient, via).await;
    let path = path.unwrap();
    let identity = b.identity.clone();
    path.set_cut(true); // what a crashed gateway would not say does not arrive
    b.link.close().await;
    path.set_cut(false);
    let peers = vec![peer_config("a", a.identity.public_key(), Some(path.address))];
    let mut b = Site::open(config("b", peers), identity).await;
    b.up().await;
    let reason = a.down().await;
    assert!(matches!(reason, DownReason::Replaced | DownReason::Reset), "{reason}");
    assert!(matches!(a.event().await, LinkEvent::Up { restarted: true, .. }));
}

#[tokio::test]
async fn a_gateway_that_has_just_begun_dials_at_once_whichever_key_is_the_smaller() {
    let never = |config: &mut LinkConfig| config.dial_after = Duration::from_secs(3600);
    // Keys are random: one of each kind is all but certain to be among these.
    for _ in 0..8 {
        let (mut a, mut b) = pair_with(never, never, |address| address).await;
        settle(&mut a, &mut b).await;
    }
}

#[tokio::test]
async fn two_sites_that_dial_each_other_end_with_one_connection() {
    for _ in 0..5 {
        let (key_a, key_b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let free = std::net::UdpSocket::bind(loopback()).unwrap();
        let address_b = free.local_addr().unwrap();
        let crossing = |config: &mut LinkConfig| config.dial_after = Duration::from_millis(15);
        let mut config_a = config("a", vec![peer_config("b", key_b.public_key(), Some(address_b))]);
        crossing(&mut config_a);
        let public_a = key_a.public_key();
        let mut a = Site::open(config_a, key_a).await;
        let mut config_b = config("b", vec![peer_config("a", public_a, Some(a.address()))]);
        config_b.listen = address_b;
        crossing(&mut config_b);
        drop(free);
        let mut b = Site::open(config_b, key_b).await;
        a.up().await;
        b.up().await;
        // Whatever crossed has settled once a message passes each way on what is left.
        settle(&mut a, &mut b).await;
        assert!(a.peer("b").is_up() && b.peer("a").is_up());
        assert!(a.peer("b").stats().connections <= 3, "{:?}", a.peer("b").stats());
    }
}

#[tokio::test]
async fn an_oversized_control_frame_closes_the_connection() {
    let (mut a, b) = pair().await;
    let mut raw = dial_raw(&a, &b.identity).await;
    a.up().await; // the raw connection took over
    raw.control_send.write_all(&(MAX_FRAME_BYTES as u32 + 1).to_be_bytes()).await.unwrap();
    let DownReason::Protocol(error) = a.event_where(protocol_down).await else { unreachable!() };
    assert!(error.contains("longer than the allowed"), "{error}");
    timeout(PATIENCE, raw.connection.closed()).await.unwrap();
}

#[tokio::test]
async fn bytes_that_are_no_message_close_the_connection() {
    let (mut a, b) = pair().await;
    let mut raw = dial_raw(&a, &b.identity).await;
    a.up().await;
    raw.control_send.write_all(&[0, 0, 0, 2, 0xff, 0xff]).await.unwrap();
    let DownReason::Protocol(error) = a.event_where(protocol_down).await else { unreachable!() };
    assert!(error.contains("no message"), "{error}");
}

#[tokio::test]
async fn a_peer_that_sends_more_control_messages_than_are_handled_is_disconnected() {
    let (a, b) = pair_with(|a| a.control_queue = 8, |_b| {}, |address| address).await;
    // a's events are not read: its queues fill, then the connection ends.
    let flood = async {
        let mut sent = 0;
        while b.peer("a").send(message(0, b"flood")).await.is_ok() && sent < 100_000 {
            sent += 1;
        }
        sent
    };
    let sent = timeout(PATIENCE, flood).await.unwrap();
    assert!((8..100_000).contains(&sent), "{sent}");
    drop(a);
}

#[tokio::test]
async fn datagrams_pass_both_ways_and_what_does_not_fit_is_dropped_and_counted() {
    let (a, b) = pair().await;
    let (mut to_a, mut to_b) = (a.peer("b").take_datagrams(), b.peer("a").take_datagrams());
    let (from_a, from_b) = (a.peer("b").datagram_sender(), b.peer("a").datagram_sender());
    let max_len = from_a.max_len().unwrap();
    assert!((1340..1400).contains(&max_len), "{max_len}");
    let longest = chunk(1, max_len);
    from_a.try_send(longest.clone()).unwrap();
    from_b.try_send(Bytes::from_static(b"back")).unwrap();
    assert_eq!(timeout(PATIENCE, to_b.recv()).await.unwrap().unwrap(), longest);
    assert_eq!(timeout(PATIENCE, to_a.recv()).await.unwrap().unwrap(), "back");
    assert_eq!(from_a.try_send(chunk(1, max_len + 1)), Err(DatagramDropped::TooLong { max_len }));
    let stats = a.peer("b").stats();
    assert_eq!((stats.sent.datagram_bytes, stats.datagrams_dropped), (max_len as u64, 1));
    drop(b);
    wait_until(|| !a.peer("b").is_up()).await;
    assert_eq!(from_a.try_send(Bytes::new()), Err(DatagramDropped::NotConnected));
    assert_eq!(from_a.max_len(), None);
}

#[tokio::test]
async fn an_ipv6_wildcard_serves_ipv4_too() {
    if std::net::UdpSocket::bind("[::1]:0").is_err() {
        println!("skipped: this machine has no IPv6");
        return;
    }
    let everywhere = |config: &mut LinkConfig| config.listen = "[::]:0".parse().unwrap();
    let to_ipv4 = |address: SocketAddr| SocketAddr::from(([127, 0, 0, 1], address.port()));
    let (a, b) = pair_with(everywhere, everywhere, to_ipv4).await;
    assert!(a.peer("b").is_up() && b.peer("a").is_up());
}

#[tokio::test]
async fn a_configuration_that_does_not_work_opens_nothing() {
    let identity = Identity::generate().unwrap();
    let mut wrong = config("a", Vec::new());
    wrong.mtu_bytes = 600;
    assert!(matches!(Link::open(wrong, &identity).await, Err(LinkError::Config { .. })));
    let own_name = config("a", vec![peer_config("a", identity.public_key(), None)]);
    assert!(matches!(Link::open(own_name, &identity).await, Err(LinkError::Config { .. })));
    let taken = std::net::UdpSocket::bind(loopback()).unwrap();
    let mut busy = config("a", Vec::new());
    busy.listen = taken.local_addr().unwrap();
    assert!(matches!(Link::open(busy, &identity).await, Err(LinkError::Bind { .. })));
}

async fn unreachable_reason(site: &mut Site) -> String {
    site.event_where(|event| match event {
        LinkEvent::Unreachable { reason, .. } => Some(reason.clone()),
        LinkEvent::Up { .. }
        | LinkEvent::Down { .. }
        | LinkEvent::Control { .. }
        | LinkEvent::Refused { .. } => None,
    })
    .await
}

pub(super) fn protocol_down(event: &LinkEvent) -> Option<DownReason> {
    match event {
        LinkEvent::Down { reason: reason @ DownReason::Protocol(_), .. } => Some(reason.clone()),
        LinkEvent::Up { .. }
        | LinkEvent::Down { .. }
        | LinkEvent::Control { .. }
        | LinkEvent::Unreachable { .. }
        | LinkEvent::Refused { .. } => None,
    }
}

async fn settle(a: &mut Site, b: &mut Site) {
    let (mut sent, is_control) =
        (0, |event: &LinkEvent| matches!(event, LinkEvent::Control { .. }).then_some(()));
    loop {
        sent += 1;
        let _ = a.peer("b").send(message(sent, b"settled?")).await;
        let _ = b.peer("a").send(message(sent, b"settled?")).await;
        let both = async { tokio::join!(a.event_where(is_control), b.event_where(is_control)) };
        if timeout(Duration::from_millis(500), both).await.is_ok() {
            return;
        }
        assert!(sent < 50, "the links do not settle");
    }
}

/// Speaks the protocol up to the hello by hand, with a known identity, as if that site had restarted.
pub(super) async fn dial_raw(to: &Site, identity: &Identity) -> Established {
    let (refused, _refusals) = mpsc::channel(1);
    let tls = Tls::new(identity, refused).unwrap();
    let config = config("b", Vec::new());
    let transport = transport::transport_config(&config).unwrap();
    let server = tls.server(BTreeSet::new()).unwrap();
    let endpoint = transport::open(&config, identity, server, &transport, &Paths::new(config.rate)).unwrap();
    let client = transport::client_config(tls.client(to.identity.public_key()).unwrap(), &transport);
    introduction(&config).unwrap().dial(endpoint, client, to.address(), to.name.clone()).await.unwrap()
}
