//! Peers that lie: one with a configured key that speaks the protocol by hand and means harm.
//!
//! Each test ends with an honest third site that does its work through the same gateway.

use longhaul_core::bulk::{ChunkHeader, MAX_CHUNK_BYTES};
use longhaul_core::wire::{MAX_FRAME_BYTES, encode_frame};
use quinn::{SendStream, VarInt};

use super::connecting::{dial_raw, protocol_down};
use super::*;
use crate::chunk::{ChunkClosed, ChunkRecv, ChunkSend};

const WINDOW_BYTES: u64 = 1 << 20;

/// Site a, an honest site c linked with it, and a liar that has b's key.
struct Scene {
    a: Site,
    c: Site,
    liar: Established,
    identity: Identity,
    works: u128,
}

impl Scene {
    async fn new(change_a: impl Fn(&mut LinkConfig)) -> Self {
        let (key_a, key_c) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let (identity, public_a) = (Identity::generate().unwrap(), key_a.public_key());
        let peers =
            vec![peer_config("b", identity.public_key(), None), peer_config("c", key_c.public_key(), None)];
        let mut config_a = config("a", peers);
        change_a(&mut config_a);
        let mut a = Site::open(config_a, key_a).await;
        let to_a = vec![peer_config("a", public_a, Some(a.address()))];
        let c = Site::open(config("c", to_a), key_c).await;
        a.up().await;
        c.peer("a").up().await.unwrap();
        let liar = dial_raw(&a, &identity).await;
        a.up().await;
        Self { a, c, liar, identity, works: 0 }
    }

    /// Bulk data, a control message and a datagram pass between a and c.
    async fn honest_site_works(&mut self) {
        self.works += 1;
        let id = bulk_id(1 << 64 | self.works, Channel::Disk(0));
        let mut receiver = self.a.peer("c").bulk_receiver(id, WINDOW_BYTES).await.unwrap();
        let mut sender = self.c.peer("a").bulk_sender(id, WINDOW_BYTES).await.unwrap();
        let mut datagrams = self.a.peer("c").take_datagrams();
        for number in 0..20 {
            timeout(PATIENCE, sender.send(chunk(number, 100_000))).await.unwrap().unwrap();
            assert!(timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap() == chunk(number, 100_000));
        }
        self.c.peer("a").datagram_sender().try_send(Bytes::from_static(b"honest")).unwrap();
        assert_eq!(timeout(PATIENCE, datagrams.recv()).await.unwrap().unwrap(), "honest");
        let honest = message(self.works, b"honest");
        self.c.peer("a").send(honest.clone()).await.unwrap();
        let heard = LinkEvent::Control { peer: name("c"), message: honest };
        self.a.event_where(|event| (*event == heard).then_some(())).await;
    }

    async fn say(&mut self, bytes: &[u8]) {
        self.liar.control_send.write_all(bytes).await.unwrap();
    }

    async fn say_message(&mut self, message: &Message) {
        let frame = message.encode().unwrap();
        self.say(&frame).await;
    }

    /// The reason for which a closes the liar's connection.
    async fn convicted(&mut self) -> String {
        let DownReason::Protocol(error) = self.a.event_where(protocol_down).await else { unreachable!() };
        timeout(PATIENCE, self.liar.connection.closed()).await.unwrap();
        error
    }

    async fn send_chunk(&self, header: &[u8], bytes: &[u8]) -> SendStream {
        let mut stream = self.liar.connection.open_uni().await.unwrap();
        // a may stop the stream before all of it is sent.
        let _ = stream.write_all(header).await;
        let _ = stream.write_all(bytes).await;
        let _ = stream.finish();
        stream
    }
}

fn header(number: u64, length_bytes: u32) -> ChunkHeader {
    ChunkHeader { id: bulk_id(7, Channel::Memory), number, length_bytes, end: false }
}

#[tokio::test]
async fn a_control_stream_that_ends_in_the_middle_of_a_frame_closes_the_connection() {
    let mut scene = Scene::new(|_| {}).await;
    let frame = message(1, b"never whole").encode().unwrap();
    scene.say(&frame[..frame.len() - 1]).await;
    scene.liar.control_send.finish().unwrap();
    assert!(scene.convicted().await.contains("closed its control stream"));
    scene.honest_site_works().await;
}

#[tokio::test]
async fn messages_of_unknown_kinds_empty_frames_a_second_hello_and_trailing_bytes_close_the_connection() {
    let trailing = {
        let mut body = message(1, b"x").encode().unwrap()[4..].to_vec();
        body.push(0);
        encode_frame(&body).unwrap()
    };
    let mut scene = Scene::new(|_| {}).await;
    let hello = introduction(&config("b", Vec::new())).unwrap().hello.encode().unwrap();
    for bytes in [encode_frame(&[4, 0]).unwrap(), vec![0; 4], hello, trailing] {
        scene.say(&bytes).await;
        scene.convicted().await;
        scene.liar = dial_raw(&scene.a, &scene.identity).await;
        scene.a.up().await;
    }
    scene.honest_site_works().await;
}

#[tokio::test]
async fn a_peer_that_reads_nothing_costs_a_bounded_queue_and_holds_up_nobody() {
    let limited = |config: &mut LinkConfig| {
        config.control_queue = 64;
        config.control_queue_bytes = MAX_FRAME_BYTES + (256 << 10);
    };
    let mut scene = Scene::new(limited).await;
    let to_liar = scene.a.peer("b");
    // The liar's reader is never polled: its stream's window and a's queues fill.
    let mut sent = 0;
    let mut full = 0;
    while full < 20 && sent < 10_000 {
        match to_liar.try_send(message(sent, &[0; 200_000])) {
            Ok(()) => sent += 1,
            Err(Unsent::Full) => {
                full += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(Unsent::NotConnected) => panic!("the liar keeps its connection"),
        }
    }
    // The requests of handles, the outbox, the writer, and the stream's and the connection's windows.
    assert!((10..150).contains(&sent), "{sent} messages of 200 kB are held");
    assert!(to_liar.is_up());
    scene.honest_site_works().await;
}

#[tokio::test]
async fn control_messages_that_nobody_takes_are_bounded_in_bytes() {
    let mut scene = Scene::new(|config| config.control_queue_bytes = 1 << 20).await;
    let frame = message(1, &[0; 200_000]).encode().unwrap();
    let mut sent = 0;
    // a's events are not read meanwhile.
    while scene.liar.control_send.write_all(&frame).await.is_ok() {
        sent += 1;
        assert!(sent < 200, "the connection is never closed");
    }
    let overrun = |event: &LinkEvent| {
        matches!(event, LinkEvent::Down { reason: DownReason::Overrun, .. }).then_some(())
    };
    scene.a.event_where(overrun).await;
    scene.honest_site_works().await;
}

#[tokio::test]
async fn a_flood_of_streams_ends_at_the_limit_and_what_hangs_in_them_holds_up_nobody() {
    const LIMIT: u32 = 16;
    let mut scene = Scene::new(|config| config.stream_limit = LIMIT).await;
    let mut hanging = Vec::new();
    let whole = header(0, 1000).encode();
    for number in 0..LIMIT as usize {
        let mut stream = scene.liar.connection.open_uni().await.unwrap();
        stream.write_all(&whole[..number]).await.unwrap();
        hanging.push(stream);
    }
    let another = timeout(Duration::from_millis(300), scene.liar.connection.open_uni()).await;
    assert!(another.is_err(), "one stream more than the limit was opened");
    let both_ways = timeout(Duration::from_millis(300), scene.liar.connection.open_bi()).await;
    assert!(both_ways.is_err(), "a second control stream was opened");
    scene.honest_site_works().await;
    assert!(scene.liar.connection.close_reason().is_none());
}

#[tokio::test]
async fn a_flood_of_datagrams_is_dropped_beyond_the_queue_and_counted() {
    const LIMIT: usize = 32;
    let mut scene = Scene::new(|config| config.datagram_queue = LIMIT).await;
    let mut taken = scene.a.peer("b").take_datagrams();
    let before = scene.a.peer("b").stats();
    for _ in 0..2000 {
        scene.liar.connection.send_datagram_wait(chunk(1, 1000)).await.unwrap();
    }
    let dropped = || scene.a.peer("b").stats().datagrams_dropped - before.datagrams_dropped;
    wait_until(|| dropped() > 0).await;
    scene.honest_site_works().await;
    let mut held = 0;
    while taken.try_recv().is_ok() {
        held += 1;
    }
    assert!(held <= LIMIT, "{held} datagrams were held");
}

#[tokio::test]
async fn chunks_that_contradict_their_header_or_the_window_close_the_connection() {
    let too_long = {
        let mut bytes = header(0, 0).encode();
        bytes[27..].copy_from_slice(&(MAX_CHUNK_BYTES + 1).to_be_bytes());
        bytes
    };
    let unknown = {
        let mut bytes = header(0, 0).encode();
        bytes[16] = 9;
        bytes
    };
    let lies: [(&[u8], &[u8], &str); 5] = [
        (&header(0, 10).encode(), &[0; 11], "longer or shorter"),
        (&header(0, 10).encode(), &[0; 9], "longer or shorter"),
        (&header(1, MAX_CHUNK_BYTES).encode(), &[0; 9], "beyond the window"),
        (&too_long, &[], "longer than the allowed"),
        (&unknown, &[], "does not know"),
    ];
    let mut scene = Scene::new(|_| {}).await;
    let _receiver =
        scene.a.peer("b").bulk_receiver(bulk_id(7, Channel::Memory), WINDOW_BYTES / 2).await.unwrap();
    for (header, bytes, error) in lies {
        let _stream = scene.send_chunk(header, bytes).await;
        let said = scene.convicted().await;
        assert!(said.contains(error), "{said}");
        scene.liar = dial_raw(&scene.a, &scene.identity).await;
        scene.a.up().await;
    }
    scene.honest_site_works().await;
}

#[tokio::test]
async fn chunks_of_a_channel_that_nobody_opened_are_stopped_before_they_are_read() {
    let mut scene = Scene::new(|_| {}).await;
    for number in [0, 1, u64::MAX] {
        // Not finished: what has arrived whole can no longer be stopped.
        let mut stream = scene.liar.connection.open_uni().await.unwrap();
        stream.write_all(&header(number, MAX_CHUNK_BYTES).encode()).await.unwrap();
        let stopped = timeout(PATIENCE, stream.stopped()).await.unwrap();
        assert_eq!(stopped.unwrap(), Some(VarInt::from_u32(1)), "nobody receives there");
    }
    assert_eq!(scene.a.peer("b").stats().received.memory_bytes, 0);
    scene.honest_site_works().await;
}

#[tokio::test]
async fn an_acknowledgement_of_what_was_never_sent_closes_that_channel_alone() {
    let mut scene = Scene::new(|_| {}).await;
    let (told, other) = (bulk_id(7, Channel::Memory), bulk_id(8, Channel::Memory));
    for lie in [
        Message::BulkAck { id: told, taken: 100_000 },
        Message::BulkAck { id: told, taken: u64::MAX },
        Message::BulkOpen { id: told, taken: u64::MAX, next: u64::MAX, window_bytes: u64::MAX },
    ] {
        let mut sender = scene.a.peer("b").bulk_sender(told, WINDOW_BYTES).await.unwrap();
        sender.send(chunk(0, 10)).await.unwrap();
        scene.say_message(&lie).await;
        let closed = async {
            while sender.send(chunk(1, 10)).await != Err(ChunkClosed) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, closed).await.expect("the channel is closed");
        let used = scene.a.peer("b").bulk_sender(told, WINDOW_BYTES).await;
        assert!(used.is_err(), "its id is used up");
        let mut another = scene.a.peer("b").bulk_sender(other, WINDOW_BYTES).await.unwrap();
        another.send(chunk(0, 10)).await.unwrap();
        assert!(scene.a.peer("b").is_up());
        scene = Scene::new(|_| {}).await;
    }
    scene.honest_site_works().await;
}

#[tokio::test]
async fn handshakes_that_are_begun_and_left_keep_nobody_else_out() {
    let patient = |config: &mut LinkConfig| {
        config.handshake_limit = 8;
        config.handshake_timeout = Duration::from_secs(60);
    };
    let mut scene = Scene::new(patient).await;
    let tls = Tls::new(&scene.identity, mpsc::channel(1).0).unwrap();
    let liars = config("b", Vec::new());
    let transport = transport::transport_config(&liars).unwrap();
    let server = tls.server(BTreeSet::new()).unwrap();
    let endpoint =
        transport::open(&liars, &scene.identity, server, &transport, &Paths::new(liars.rate)).unwrap();
    let mut begun = Vec::new();
    let mut refused = 0;
    for _ in 0..20 {
        let client = transport::client_config(tls.client(scene.a.identity.public_key()).unwrap(), &transport);
        let dial = endpoint.connect_with(client, scene.a.address(), "longhaul").unwrap();
        match timeout(PATIENCE, dial).await.unwrap() {
            Ok(connection) => begun.push(connection), // and now it says nothing
            Err(_) => refused += 1,
        }
    }
    assert!(begun.len() <= 2 && refused >= 18, "{} handshakes of one address", begun.len());
    // Somebody else, from another address.
    let identity = scene.c.identity.clone();
    scene.c.link.close().await;
    let mut elsewhere =
        config("c", vec![peer_config("a", scene.a.identity.public_key(), Some(scene.a.address()))]);
    elsewhere.listen = SocketAddr::from(([127, 0, 0, 2], 0));
    scene.c = Site::open(elsewhere, identity).await;
    scene.c.up().await;
    scene.honest_site_works().await;
}

#[test]
fn what_a_peer_asks_about_closed_channels_is_answered_once_while_it_reads_nothing() {
    let (commands, _kept) = mpsc::unbounded_channel();
    let mut channels = Channels::new(256, commands);
    channels.handle_connected();
    let closed: Vec<BulkId> = (0..10).map(|number| bulk_id(number, Channel::Memory)).collect();
    for id in &closed {
        channels.open_sender(*id, WINDOW_BYTES).unwrap();
        channels.close_migration(id.migration);
    }
    for _ in 0..1000 {
        for id in &closed {
            channels.handle_peer_open(*id, 0, 0, WINDOW_BYTES).unwrap();
        }
    }
    let answers = std::iter::from_fn(|| channels.poll_message()).count();
    assert_eq!(answers, closed.len());
}
