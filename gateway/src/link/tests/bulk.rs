//! Bulk channels: order, windows, cuts, and what happens when an end is missing.

use super::path::{Path, Shape};
use super::*;
use crate::chunk::{ChunkClosed, ChunkRecv, ChunkSend, MAX_CHUNK};

const WINDOW_BYTES: u64 = 8 << 20;

#[test]
fn the_seam_and_the_protocol_agree_on_the_largest_chunk() {
    assert_eq!(MAX_CHUNK, longhaul_core::bulk::MAX_CHUNK_BYTES as usize);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_mebibytes_arrive_intact_and_in_order() {
    let (a, b) = pair().await;
    let id = bulk_id(1, Channel::Memory);
    let mut receiver = b.peer("a").bulk_receiver(id, WINDOW_BYTES).await.unwrap();
    let mut sender = a.peer("b").bulk_sender(id, WINDOW_BYTES).await.unwrap();
    let lengths: Vec<usize> = lengths().take_while_total(64 << 20);
    let chunks = lengths.len() as u64;
    let producer = tokio::spawn(async move {
        for (number, length) in lengths.into_iter().enumerate() {
            sender.send(chunk(number as u64, length)).await.unwrap();
        }
        sender.drained().await.unwrap();
        assert_eq!(sender.unacknowledged(), 0);
    });
    let received = receive_all(&mut receiver).await;
    assert_eq!(received, chunks);
    assert_eq!(receiver.end(), ReceiveEnd::Complete);
    timeout(PATIENCE, producer).await.unwrap().unwrap();
    let (sent, got) = (a.peer("b").stats().sent.memory_bytes, b.peer("a").stats().received.memory_bytes);
    assert_eq!(sent, got);
    assert!(sent > 64 << 20);
    let current = a.peer("b").state.borrow().current.clone().unwrap();
    assert_eq!(current.connection.stats().frame_rx.stop_sending, 0, "no chunk looks refused");
}

#[tokio::test]
async fn what_is_on_its_way_is_told_to_who_looks_on_and_wakes_him_when_it_is_taken() {
    let (a, b) = pair().await;
    let id = bulk_id(1, Channel::Memory);
    let mut sender = a.peer("b").bulk_sender(id, WINDOW_BYTES).await.unwrap();
    let mut seen = sender.on_its_way();
    sender.absorb(chunk(0, 1000)).unwrap();
    sender.send(chunk(1, 500)).await.unwrap();
    assert_eq!(seen.bytes(), 1500, "nobody receives yet");
    let mut receiver = b.peer("a").bulk_receiver(id, WINDOW_BYTES).await.unwrap();
    timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap();
    let second = timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap();
    timeout(PATIENCE, seen.taken()).await.expect("woken").unwrap();
    assert_eq!(seen.bytes(), second.len() as u64, "the first was taken when the second was asked for");
    let rest = tokio::spawn(async move { receiver.recv().await });
    timeout(PATIENCE, seen.taken()).await.expect("woken").unwrap();
    assert_eq!(seen.bytes(), 0);
    rest.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_arrives_exactly_once_over_cuts() {
    let mut path = None;
    let shape = Shape { rate: Rate::mbit(400), one_way: Duration::from_millis(5), ..Shape::clear() };
    let (mut a, mut b) = pair_with(
        |a| a.idle_timeout = Duration::from_millis(600),
        |b| b.idle_timeout = Duration::from_millis(600),
        |address| path.insert(Path::to(address, shape)).address,
    )
    .await;
    let path = path.unwrap();
    let id = bulk_id(1, Channel::Disk(0));
    let mut sender = a.peer("b").bulk_sender(id, WINDOW_BYTES).await.unwrap();
    let mut receiver = b.peer("a").bulk_receiver(id, WINDOW_BYTES).await.unwrap();
    const CHUNKS: u64 = 300;
    let producer = tokio::spawn(async move {
        for number in 0..CHUNKS {
            sender.send(chunk(number, 100_000)).await.unwrap();
        }
    });
    for number in 0..CHUNKS {
        if number == 60 || number == 150 {
            path.set_cut(true);
            assert_eq!(a.down().await, DownReason::Silent);
            assert_eq!(b.down().await, DownReason::Silent);
            path.set_cut(false);
        }
        let received = timeout(PATIENCE, receiver.recv()).await.expect("resumed").expect("open");
        assert!(received == chunk(number, 100_000), "chunk {number} differs");
    }
    assert_eq!(timeout(PATIENCE, receiver.recv()).await.unwrap(), None);
    timeout(PATIENCE, producer).await.unwrap().unwrap();
    assert!(a.peer("b").stats().connections >= 3);
}

#[tokio::test]
async fn a_short_cut_passes_without_a_new_connection() {
    let mut path = None;
    let (a, b) =
        pair_with(|_a| {}, |_b| {}, |address| path.insert(Path::to(address, Shape::clear())).address).await;
    let path = path.unwrap();
    let id = bulk_id(1, Channel::Memory);
    let mut sender = a.peer("b").bulk_sender(id, WINDOW_BYTES).await.unwrap();
    let mut receiver = b.peer("a").bulk_receiver(id, WINDOW_BYTES).await.unwrap();
    for number in 0..20 {
        path.set_cut(number == 10);
        sender.send(chunk(number, 50_000)).await.unwrap();
        if number == 10 {
            tokio::time::sleep(Duration::from_millis(500)).await; // the length of the cut
            path.set_cut(false);
        }
        let received = timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap();
        assert!(received == chunk(number, 50_000));
    }
    assert_eq!(a.peer("b").stats().connections, 1);
}

#[tokio::test]
async fn a_stalled_consumer_stalls_its_sender_and_nothing_else() {
    const SMALL_WINDOW: u64 = 1 << 20;
    let (a, mut b) = pair().await;
    let (stalled, lively) = (bulk_id(1, Channel::Memory), bulk_id(1, Channel::Disk(0)));
    let mut sender = a.peer("b").bulk_sender(stalled, SMALL_WINDOW).await.unwrap();
    let mut receiver = b.peer("a").bulk_receiver(stalled, SMALL_WINDOW).await.unwrap();
    let mut queued = 0;
    while let Ok(sent) = timeout(Duration::from_millis(300), sender.send(chunk(queued, 100_000))).await {
        sent.unwrap();
        queued += 1;
    }
    assert_eq!(queued, 10, "ten chunks of 100 kB and their overhead fit 1 MiB");
    assert_eq!(sender.unacknowledged(), 1_000_000);

    a.peer("b").send(message(5, b"control passes")).await.unwrap();
    assert!(matches!(b.event().await, LinkEvent::Control { .. }));
    let mut datagrams = b.peer("a").take_datagrams();
    a.peer("b").datagram_sender().try_send(Bytes::from_static(b"ping")).unwrap();
    assert_eq!(timeout(PATIENCE, datagrams.recv()).await.unwrap().unwrap(), "ping");
    let mut other = a.peer("b").bulk_sender(lively, SMALL_WINDOW).await.unwrap();
    let mut others = b.peer("a").bulk_receiver(lively, SMALL_WINDOW).await.unwrap();
    for number in 0..30 {
        other.send(chunk(number, 200_000)).await.unwrap();
        assert!(timeout(PATIENCE, others.recv()).await.unwrap().unwrap() == chunk(number, 200_000));
    }

    // Absorbing goes on all the same, and the consumer finds everything when it returns.
    for number in queued..queued + 20 {
        sender.absorb(chunk(number, 100_000)).unwrap();
    }
    assert_eq!(sender.unacknowledged(), 3_000_000);
    for number in 0..queued + 20 {
        assert!(timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap() == chunk(number, 100_000));
    }
}

#[tokio::test]
async fn a_sender_waits_for_a_receiver_that_is_registered_later() {
    let (a, b) = pair().await;
    let id = bulk_id(9, Channel::Disk(1));
    let mut sender = a.peer("b").bulk_sender(id, WINDOW_BYTES).await.unwrap();
    sender.send(chunk(0, 1000)).await.unwrap();
    drop(sender); // what was queued is delivered all the same
    a.peer("b").send(message(1, b"a round trip")).await.unwrap();
    assert_eq!(a.peer("b").stats().sent.disk_bytes, 0);
    let mut receiver = b.peer("a").bulk_receiver(id, WINDOW_BYTES).await.unwrap();
    assert!(timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap() == chunk(0, 1000));
    assert_eq!(timeout(PATIENCE, receiver.recv()).await.unwrap(), None);
    assert_eq!(receiver.end(), ReceiveEnd::Complete);
}

#[tokio::test]
async fn closing_a_migration_closes_its_channels_at_both_sites_and_no_other() {
    let (a, b) = pair().await;
    let (ending, staying) = (bulk_id(1, Channel::Memory), bulk_id(2, Channel::Memory));
    let mut sender = a.peer("b").bulk_sender(ending, WINDOW_BYTES).await.unwrap();
    let mut receiver = b.peer("a").bulk_receiver(ending, WINDOW_BYTES).await.unwrap();
    let mut other = a.peer("b").bulk_sender(staying, WINDOW_BYTES).await.unwrap();
    let mut others = b.peer("a").bulk_receiver(staying, WINDOW_BYTES).await.unwrap();
    sender.send(chunk(0, 10)).await.unwrap();
    assert!(timeout(PATIENCE, receiver.recv()).await.unwrap().is_some());

    b.peer("a").close_bulk(ending.migration).await;
    assert_eq!(timeout(PATIENCE, receiver.recv()).await.unwrap(), None);
    assert_eq!(receiver.end(), ReceiveEnd::Broken);
    assert_eq!(timeout(PATIENCE, until_closed(&mut sender)).await.unwrap(), ChunkClosed);
    let used = a.peer("b").bulk_sender(ending, WINDOW_BYTES).await;
    assert_eq!(used.unwrap_err(), BulkError::Used(ending));

    other.send(chunk(3, 10)).await.unwrap();
    assert!(timeout(PATIENCE, others.recv()).await.unwrap().is_some());
}

#[tokio::test]
async fn a_migration_that_one_site_closed_during_a_cut_is_closed_at_the_other_afterwards() {
    let mut path = None;
    let hasty = |config: &mut LinkConfig| config.idle_timeout = Duration::from_millis(600);
    let via = |address| path.insert(Path::to(address, Shape::clear())).address;
    let (mut a, mut b) = pair_with(hasty, hasty, via).await;
    let path = path.unwrap();
    let (forth, back) = (bulk_id(1, Channel::Memory), bulk_id(1, Channel::Disk(0)));
    let mut sender = a.peer("b").bulk_sender(forth, WINDOW_BYTES).await.unwrap();
    let mut receiver = a.peer("b").bulk_receiver(back, WINDOW_BYTES).await.unwrap();
    let _receiver = b.peer("a").bulk_receiver(forth, WINDOW_BYTES).await.unwrap();
    let _sender = b.peer("a").bulk_sender(back, WINDOW_BYTES).await.unwrap();
    path.set_cut(true);
    a.down().await;
    b.down().await;
    b.peer("a").close_bulk(MigrationId(1)).await;
    path.set_cut(false);
    assert_eq!(timeout(PATIENCE, until_closed(&mut sender)).await.unwrap(), ChunkClosed);
    assert_eq!(timeout(PATIENCE, receiver.recv()).await.unwrap(), None);
    assert_eq!(receiver.end(), ReceiveEnd::Broken);
}

#[tokio::test]
async fn a_consumer_that_leaves_closes_the_sender() {
    let (a, b) = pair().await;
    let id = bulk_id(1, Channel::Memory);
    let mut sender = a.peer("b").bulk_sender(id, WINDOW_BYTES).await.unwrap();
    drop(b.peer("a").bulk_receiver(id, WINDOW_BYTES).await.unwrap());
    assert_eq!(timeout(PATIENCE, until_closed(&mut sender)).await.unwrap(), ChunkClosed);
}

#[tokio::test]
async fn more_channels_than_allowed_are_refused() {
    let (a, _b) = pair_with(|a| a.channel_limit = 2, |_b| {}, |address| address).await;
    let first = a.peer("b").bulk_sender(bulk_id(1, Channel::Disk(0)), WINDOW_BYTES).await.unwrap();
    let _second = a.peer("b").bulk_sender(bulk_id(1, Channel::Disk(1)), WINDOW_BYTES).await.unwrap();
    let third = a.peer("b").bulk_sender(bulk_id(1, Channel::Disk(2)), WINDOW_BYTES).await;
    assert_eq!(third.unwrap_err(), BulkError::TooMany(2));
    assert_eq!(first.id(), bulk_id(1, Channel::Disk(0)));
}

#[tokio::test]
async fn a_closed_link_closes_its_channels() {
    let (a, b) = pair().await;
    let id = bulk_id(1, Channel::Memory);
    let mut sender = a.peer("b").bulk_sender(id, WINDOW_BYTES).await.unwrap();
    let handle = a.peer("b");
    a.link.close().await;
    assert_eq!(sender.send(chunk(0, 1)).await, Err(ChunkClosed));
    assert_eq!(handle.bulk_sender(id, 1).await.unwrap_err(), BulkError::LinkClosed);
    drop(b);
}

/// Sends until the closed channel is noticed.
async fn until_closed(sender: &mut BulkSender) -> ChunkClosed {
    loop {
        if let Err(closed) = sender.send(chunk(0, 100_000)).await {
            return closed;
        }
    }
}

async fn receive_all(receiver: &mut BulkReceiver) -> u64 {
    let mut number = 0;
    while let Some(received) = timeout(PATIENCE, receiver.recv()).await.expect("in time") {
        assert!(received == chunk(number, received.len()), "chunk {number} differs");
        number += 1;
    }
    number
}

/// Chunk lengths of all sizes, the empty and the largest included.
fn lengths() -> impl Iterator<Item = usize> {
    [MAX_CHUNK, 0, 1, 4096, 65_536, 300_000, 1_000_000, 17].into_iter().cycle()
}

trait TakeWhileTotal: Iterator<Item = usize> + Sized {
    fn take_while_total(self, total: usize) -> Vec<usize> {
        let mut sum = 0;
        self.take_while(|length| {
            let goes_on = sum < total;
            sum += length;
            goes_on
        })
        .collect()
    }
}

impl<I: Iterator<Item = usize>> TakeWhileTotal for I {}
