//! The link over 100 Mbit/s, 100 ms and 0.1 % loss: goodput, queue, urgency, and honest counters.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::path::{Path, Shape};
use super::*;
use crate::chunk::{ChunkRecv, ChunkSend};

const CHUNK_BYTES: usize = 256 << 10;

fn wan() -> Shape {
    Shape {
        rate: Rate::mbit(100),
        one_way: Duration::from_millis(50),
        loss: 0.001,
        queue: Duration::from_millis(100),
    }
}

fn for_wan(config: &mut LinkConfig) {
    config.rate = wan().rate;
    config.rtt = 2 * wan().one_way;
    config.idle_timeout = Duration::from_secs(6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_lossy_path_is_filled_without_a_queue_and_the_counters_are_right() {
    let mut path = None;
    let (a, b) = pair_with(for_wan, for_wan, |address| path.insert(Path::to(address, wan())).address).await;
    let path = path.unwrap();
    let id = bulk_id(1, Channel::Memory);
    let window_bytes = 8 << 20;
    let mut sender = a.peer("b").bulk_sender(id, window_bytes).await.unwrap();
    let mut receiver = b.peer("a").bulk_receiver(id, window_bytes).await.unwrap();
    let total_bytes = 40 << 20;
    let began = Instant::now();
    let producer = tokio::spawn(async move {
        for number in 0..(total_bytes / CHUNK_BYTES) as u64 {
            sender.send(chunk(number, CHUNK_BYTES)).await.unwrap();
        }
        sender.drained().await.unwrap();
    });
    let mut received_bytes = 0;
    while received_bytes < total_bytes {
        received_bytes += timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap().len();
    }
    let goodput_mbit = received_bytes as f64 * 8.0 / 1e6 / began.elapsed().as_secs_f64();
    assert_eq!(timeout(PATIENCE, receiver.recv()).await.ok(), Some(None));
    timeout(PATIENCE, producer).await.unwrap().unwrap();

    let stats = a.peer("b").stats();
    let (seen_bytes, seen_datagrams) =
        (path.back.bytes.load(Ordering::Relaxed), path.back.datagrams.load(Ordering::Relaxed));
    let queue_ms = path.back.longest_queue_us.load(Ordering::Relaxed) as f64 / 1000.0;
    let dropped = path.back.dropped.load(Ordering::Relaxed);
    println!(
        "goodput {goodput_mbit:.1} Mbit/s, round trip {:?}, longest queue {queue_ms:.1} ms, \
         {dropped} of {seen_datagrams} packets dropped, {} taken for lost, {} UDP bytes counted, {seen_bytes} seen",
        stats.rtt, stats.lost_packets, stats.udp_sent.payload_bytes
    );
    assert!(goodput_mbit > 80.0, "goodput {goodput_mbit:.1} Mbit/s");
    assert!(dropped > 0, "the path loses packets");
    assert!(stats.rtt < Duration::from_millis(150), "{:?}", stats.rtt);
    let difference = stats.udp_sent.payload_bytes.abs_diff(seen_bytes) as f64 / seen_bytes as f64;
    assert!(difference < 0.01, "counted {} and seen {seen_bytes}", stats.udp_sent.payload_bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_and_control_pass_before_disks() {
    let mut path = None;
    let (a, mut b) =
        pair_with(for_wan, for_wan, |address| path.insert(Path::to(address, wan())).address).await;
    let window_bytes = 8 << 20;
    let disk = bulk_id(1, Channel::Disk(0));
    let memory = bulk_id(1, Channel::Memory);
    let mut disk_sender = a.peer("b").bulk_sender(disk, window_bytes).await.unwrap();
    let mut disk_receiver = b.peer("a").bulk_receiver(disk, window_bytes).await.unwrap();
    let mut memory_sender = a.peer("b").bulk_sender(memory, window_bytes).await.unwrap();
    let mut memory_receiver = b.peer("a").bulk_receiver(memory, window_bytes).await.unwrap();
    let disks = tokio::spawn(async move {
        let mut number = 0;
        while disk_sender.send(chunk(number, CHUNK_BYTES)).await.is_ok() {
            number += 1;
        }
    });
    // The path is full of disk data before memory begins.
    for number in 0..16 {
        assert!(
            timeout(PATIENCE, disk_receiver.recv()).await.unwrap().unwrap() == chunk(number, CHUNK_BYTES)
        );
    }
    let drain = tokio::spawn(async move { while disk_receiver.recv().await.is_some() {} });
    let sent_before_bytes = a.peer("b").stats().sent.disk_bytes;
    let began = Instant::now();
    let chunks = 64;
    let producer = tokio::spawn(async move {
        for number in 0..chunks {
            memory_sender.send(chunk(number, CHUNK_BYTES)).await.unwrap();
        }
        memory_sender.drained().await.unwrap();
    });
    a.peer("b").send(message(1, b"urgent")).await.unwrap();
    assert!(matches!(b.event().await, LinkEvent::Control { .. }));
    let control_took = began.elapsed();
    for number in 0..chunks {
        let received = timeout(PATIENCE, memory_receiver.recv()).await.unwrap().unwrap();
        assert!(received == chunk(number, CHUNK_BYTES));
    }
    let memory_took = began.elapsed();
    let memory_mbit = (chunks as usize * CHUNK_BYTES) as f64 * 8.0 / 1e6 / memory_took.as_secs_f64();
    let disk_bytes = a.peer("b").stats().sent.disk_bytes - sent_before_bytes;
    println!(
        "control took {control_took:?}; memory {memory_mbit:.1} Mbit/s beside a busy disk ({disk_bytes} bytes)"
    );
    assert!(control_took < Duration::from_millis(400), "{control_took:?}");
    assert!(memory_mbit > 60.0, "{memory_mbit:.1} Mbit/s");
    a.peer("b").close_bulk(MigrationId(1)).await;
    let _ = tokio::join!(disks, drain, producer);
}
