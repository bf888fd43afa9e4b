//! What an operator limits is sent no faster, and as fast as before when the limit is lifted.

use std::time::Instant;

use super::wan::{TRIES, TURN};
use super::*;
use crate::chunk::{ChunkRecv, ChunkSend};

const WINDOW_BYTES: u64 = 4 << 20;
const CHUNK: usize = 64 << 10;

/// Sends chunks of a migration for that long; Mbit/s.
async fn sent_mbit(sender: &mut BulkSender, time: Duration) -> f64 {
    let began = Instant::now();
    let mut sent = 0;
    while began.elapsed() < time {
        sender.send(Bytes::from(vec![7; CHUNK])).await.unwrap();
        sent += CHUNK;
    }
    sender.drained().await.unwrap();
    sent as f64 * 8.0 / 1e6 / began.elapsed().as_secs_f64()
}

/// A limited migration beside a free one, and then without its limit: Mbit/s.
async fn limited_beside_a_free_one() -> [f64; 3] {
    let (a, b) = pair().await;
    let (limited, free) = (bulk_id(1, Channel::Memory), bulk_id(2, Channel::Disk(0)));
    let mut senders = Vec::new();
    for id in [limited, free] {
        let mut receiver = b.peer("a").bulk_receiver(id, WINDOW_BYTES).await.unwrap();
        senders.push(a.peer("b").bulk_sender(id, WINDOW_BYTES).await.unwrap());
        tokio::spawn(async move { while receiver.recv().await.is_some() {} });
    }
    let [limited_sender, free_sender] = &mut senders[..] else { panic!("two") };
    a.peer("b").limit_migration(limited.migration, Some(Rate::mbit(8))).await.unwrap();
    let time = Duration::from_secs(2);
    let (slow, fast) = tokio::join!(sent_mbit(limited_sender, time), sent_mbit(free_sender, time));
    a.peer("b").limit_migration(limited.migration, None).await.unwrap();
    let lifted = sent_mbit(limited_sender, time).await;
    println!("{slow:.1} and {fast:.1}, then {lifted:.1} Mbit/s: {:?}", a.peer("b").stats());
    a.peer("b").close_bulk(limited.migration).await;
    [slow, fast, lifted]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limited_migration_sends_no_faster_and_another_one_is_not_touched() {
    let _turn = TURN.lock().await;
    for _ in 0..TRIES {
        let [slow, fast, lifted] = limited_beside_a_free_one().await;
        assert!(slow < 9.5, "{slow}");
        if slow > 5.0 && fast > 2.0 * slow && lifted > 2.0 * slow {
            return;
        }
    }
    panic!("limited more than it should be, or not alone, in {TRIES} tries");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limited_peer_is_sent_no_more_and_a_guests_packet_passes_first() {
    let _turn = TURN.lock().await;
    let (a, b) = pair().await;
    let id = bulk_id(1, Channel::Memory);
    let mut receiver = b.peer("a").bulk_receiver(id, WINDOW_BYTES).await.unwrap();
    let mut sender = a.peer("b").bulk_sender(id, WINDOW_BYTES).await.unwrap();
    tokio::spawn(async move { while receiver.recv().await.is_some() {} });
    let peer = a.peer("b");
    peer.limit(Some(Rate::mbit(8))).await.unwrap();
    wait_until(|| peer.limited_to() == Some(Rate::mbit(8))).await;
    let mut datagrams = b.peer("a").take_datagrams();
    let datagram = async {
        // The bucket is overdrawn, and more waits behind it than it lets go in a second.
        wait_until(|| peer.stats().sent.memory_bytes >= 512 << 10).await;
        let sent = Instant::now();
        peer.datagram_sender().try_send(Bytes::from_static(b"a guest's packet")).unwrap();
        timeout(PATIENCE, datagrams.recv()).await.unwrap().unwrap();
        sent.elapsed()
    };
    let (slow, took) = tokio::join!(sent_mbit(&mut sender, Duration::from_secs(2)), datagram);
    println!("{slow:.1} Mbit/s, a datagram took {took:?}");
    assert!(slow > 4.0 && slow < 9.5, "{slow}");
    assert!(took < Duration::from_millis(200), "{took:?}");
    peer.limit(None).await.unwrap();
    let lifted = sent_mbit(&mut sender, Duration::from_secs(4)).await;
    assert!(lifted > 2.0 * slow, "{slow}, then {lifted}");
    peer.close_bulk(id.migration).await;
}
