//! The link over 100 Mbit/s, 100 ms and 0.1 % loss: goodput, queue, urgency, and honest counters.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::path::{Path, Shape};
use super::*;
use crate::chunk::{ChunkRecv, ChunkSend, MAX_CHUNK};

const CHUNK_BYTES: usize = 256 << 10;

fn wan() -> Shape {
    Shape {
        rate: Rate::mbit(100),
        one_way: Duration::from_millis(50),
        loss: 0.001,
        queue: Duration::from_millis(100),
    }
}

fn fit(config: &mut LinkConfig, shape: &Shape) {
    config.rate = shape.rate;
    config.rtt = 2 * shape.one_way;
    config.idle_timeout = Duration::from_secs(6);
}

/// These tests take turns: beside one another they would measure the machine.
pub(super) static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// How often a figure may be taken: a busy machine spoils some.
pub(super) const TRIES: usize = 3;

/// What a transfer showed.
#[derive(Debug)]
struct Figures {
    goodput_mbit: f64,
    longest_queue: Duration,
    dropped: u64,
    seen_bytes: u64,
    stats: LinkStats,
}

/// Sends chunks over a path of that shape, with the link configured for it.
async fn transfer(shape: Shape, chunks: u64, chunk_bytes: usize) -> Figures {
    transfer_with(shape, chunks, chunk_bytes, |_config| {}).await
}

/// The same with a changed configuration.
async fn transfer_with(
    shape: Shape,
    chunks: u64,
    chunk_bytes: usize,
    change: impl Fn(&mut LinkConfig),
) -> Figures {
    let mut path = None;
    let via = |address| path.insert(Path::to(address, shape)).address;
    let fit_and_change = |config: &mut LinkConfig| {
        fit(config, &shape);
        change(config);
    };
    let (a, b) = pair_with(&fit_and_change, &fit_and_change, via).await;
    let path = path.unwrap();
    let id = bulk_id(1, Channel::Memory);
    let window_bytes = (3 * shape.rate.bytes_in(2 * shape.one_way).0).max(2 << 20);
    let mut sender = a.peer("b").bulk_sender(id, window_bytes).await.unwrap();
    let mut receiver = b.peer("a").bulk_receiver(id, window_bytes).await.unwrap();
    let began = Instant::now();
    let producer = tokio::spawn(async move {
        for number in 0..chunks {
            sender.send(chunk(number, chunk_bytes)).await.unwrap();
        }
        sender.drained().await.unwrap();
    });
    for _ in 0..chunks {
        let received = timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap();
        assert_eq!(received.len(), chunk_bytes);
    }
    let stats = a.peer("b").stats();
    let total_bytes = chunks as usize * chunk_bytes;
    let goodput_mbit = mbit_per_second(total_bytes, began.elapsed());
    assert_eq!(timeout(PATIENCE, receiver.recv()).await.ok(), Some(None));
    timeout(PATIENCE, producer).await.unwrap().unwrap();
    let figures = Figures {
        goodput_mbit,
        longest_queue: Duration::from_micros(path.back.longest_queue_us.load(Ordering::Relaxed)),
        dropped: path.back.dropped.load(Ordering::Relaxed),
        seen_bytes: path.back.bytes.load(Ordering::Relaxed),
        stats,
    };
    println!("{figures:#?}");
    figures
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_lossy_path_is_filled_without_a_queue_and_the_counters_are_right() {
    let _turn = TURN.lock().await;
    let mut best_mbit: f64 = 0.0;
    for _ in 0..TRIES {
        let Figures { goodput_mbit, dropped, seen_bytes, stats, .. } =
            transfer(wan(), 320, CHUNK_BYTES).await;
        assert!(dropped > 0, "the path loses packets");
        assert!(stats.rtt < Duration::from_millis(150), "{:?}", stats.rtt);
        let difference = stats.udp_sent.payload_bytes.abs_diff(seen_bytes) as f64 / seen_bytes as f64;
        assert!(difference < 0.01, "counted {} and seen {seen_bytes}", stats.udp_sent.payload_bytes);
        best_mbit = best_mbit.max(goodput_mbit);
        if best_mbit > 80.0 {
            return;
        }
    }
    panic!("goodput {best_mbit:.1} of 100 Mbit/s at best");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fixed_rate_fills_the_path_it_is_right_for() {
    let _turn = TURN.lock().await;
    let mut best_mbit: f64 = 0.0;
    for _ in 0..TRIES {
        let fixed = |config: &mut LinkConfig| config.congestion = CongestionControl::Fixed;
        let Figures { goodput_mbit, stats, .. } = transfer_with(wan(), 160, CHUNK_BYTES, fixed).await;
        assert_eq!(stats.bandwidth, None, "nothing is estimated");
        best_mbit = best_mbit.max(goodput_mbit);
        if best_mbit > 80.0 {
            return;
        }
    }
    panic!("goodput {best_mbit:.1} of 100 Mbit/s at best");
}

/// A fifth of what the operator believes, with a queue of a second.
async fn overrated(congestion: CongestionControl) -> Figures {
    let shape = Shape { rate: Rate::mbit(20), queue: Duration::from_secs(1), loss: 0.001, ..wan() };
    let overrate = |config: &mut LinkConfig| {
        config.rate = Rate::mbit(100);
        config.congestion = congestion;
    };
    transfer_with(shape, 160, 64 << 10, overrate).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rate_of_a_slower_path_is_found_and_its_queue_stays_short() {
    let _turn = TURN.lock().await;
    let mut best = None;
    for _ in 0..TRIES {
        let figures = overrated(CongestionControl::Model).await;
        let bandwidth = figures.stats.bandwidth.expect("it was measured");
        assert!(bandwidth < Rate::mbit(24), "{bandwidth}");
        assert!(figures.stats.rtt < Duration::from_millis(200), "{:?}", figures.stats.rtt);
        if figures.goodput_mbit > 15.0 && bandwidth > Rate::mbit(16) {
            return;
        }
        best = Some(figures);
    }
    panic!("the path is not filled: {best:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fixed_rate_above_the_paths_fills_its_queue() {
    let _turn = TURN.lock().await;
    let figures = overrated(CongestionControl::Fixed).await;
    assert!(figures.longest_queue > Duration::from_millis(300), "{:?}", figures.longest_queue);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_path_is_filled_too() {
    let _turn = TURN.lock().await;
    let shape = Shape { rate: Rate::mbit(5), ..wan() };
    let mut best_mbit: f64 = 0.0;
    for _ in 0..TRIES {
        let Figures { goodput_mbit, longest_queue, .. } = transfer(shape, 32, 64 << 10).await;
        assert!(longest_queue < Duration::from_millis(60), "{longest_queue:?}");
        best_mbit = best_mbit.max(goodput_mbit);
        if best_mbit > 4.0 {
            return;
        }
    }
    panic!("goodput {best_mbit:.1} of 5 Mbit/s at best");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_trip_far_beyond_the_expected_one_is_filled_too() {
    let _turn = TURN.lock().await;
    let shape = Shape {
        rate: Rate::mbit(40),
        one_way: Duration::from_millis(400),
        queue: Duration::from_millis(400),
        loss: 0.0,
    };
    let expect_less = |config: &mut LinkConfig| {
        fit(config, &shape);
        config.rtt = Duration::from_millis(100);
        config.handshake_timeout = Duration::from_secs(8);
        assert!(config.window_bytes() < shape.rate.bytes_in(2 * shape.one_way).0, "it would fit anyway");
    };
    let mut path = None;
    let via = |address| path.insert(Path::to(address, shape)).address;
    let (a, b) = pair_with(&expect_less, &expect_less, via).await;
    let window_bytes = a.peer("b").bulk_window_bytes(1 << 30);
    assert!(window_bytes > 3 * shape.rate.bytes_in(2 * shape.one_way).0, "{window_bytes}");
    assert_eq!(a.peer("b").bulk_window_bytes(1 << 20), 1 << 20);
    let id = bulk_id(1, Channel::Disk(0));
    let mut receiver = b.peer("a").bulk_receiver(id, window_bytes).await.unwrap();
    let mut sender = a.peer("b").bulk_sender(id, window_bytes).await.unwrap();
    let producer = tokio::spawn(async move {
        for number in 0.. {
            if sender.send(chunk(number, CHUNK_BYTES)).await.is_err() {
                return;
            }
        }
    });
    // The rate is found within a few round trips; of the rest each second counts.
    for _ in 0..60 {
        timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap();
    }
    let mut best_mbit: f64 = 0.0;
    for _ in 0..TRIES {
        let began = Instant::now();
        for _ in 0..60 {
            timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap();
        }
        best_mbit = best_mbit.max(mbit_per_second(60 * CHUNK_BYTES, began.elapsed()));
        if best_mbit > 32.0 {
            break;
        }
    }
    println!("{best_mbit:.1} of 40 Mbit/s");
    producer.abort();
    assert!(best_mbit > 32.0, "{best_mbit:.1} of 40 Mbit/s at best");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_is_kept_short_holds_what_a_slower_path_needs_and_fills_it() {
    let _turn = TURN.lock().await;
    let shape = Shape { rate: Rate::mbit(20), queue: Duration::from_secs(1), loss: 0.0, ..wan() };
    let overrate = |config: &mut LinkConfig| {
        fit(config, &shape);
        config.rate = Rate::mbit(400);
    };
    let mut path = None;
    let via = |address| path.insert(Path::to(address, shape)).address;
    let (a, b) = pair_with(overrate, overrate, via).await;
    let id = bulk_id(1, Channel::Memory);
    let mut receiver = b.peer("a").bulk_receiver(id, 8 << 20).await.unwrap();
    let mut sender = a.peer("b").bulk_sender(id, 8 << 20).await.unwrap();
    sender.keep_short();
    let received = tokio::spawn(async move { while receiver.recv().await.is_some() {} });
    let (mut began, mut longest, chunks, unmeasured) = (Instant::now(), 0, 300, 100);
    for number in 0..chunks {
        sender.send(chunk(number, 64 << 10)).await.unwrap();
        if number == unmeasured {
            began = Instant::now();
        }
        if number > unmeasured {
            longest = longest.max(sender.unacknowledged());
        }
    }
    let goodput_mbit = mbit_per_second((chunks - unmeasured) as usize * (64 << 10), began.elapsed());
    println!("{goodput_mbit:.1} Mbit/s, {longest} bytes at most wait");
    // Three times 20 Mbit/s for 110 ms and a little more while it probes.
    assert!(longest < 1_250_000, "{longest} bytes wait");
    assert!(goodput_mbit > 14.0, "{goodput_mbit:.1} Mbit/s");
    drop(sender);
    timeout(PATIENCE, received).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_urgent_message_does_not_wait_for_a_chunk_that_has_begun() {
    let _turn = TURN.lock().await;
    let mut path = None;
    let shape = Shape { rate: Rate::mbit(5), ..wan() };
    let via = |address| path.insert(Path::to(address, shape)).address;
    let (a, mut b) = pair_with(|a| fit(a, &shape), |b| fit(b, &shape), via).await;
    let id = bulk_id(1, Channel::Disk(0));
    let mut receiver = b.peer("a").bulk_receiver(id, 2 << 20).await.unwrap();
    let mut sender = a.peer("b").bulk_sender(id, 2 << 20).await.unwrap();
    sender.send(chunk(0, 1000)).await.unwrap();
    assert!(timeout(PATIENCE, receiver.recv()).await.unwrap().is_some());
    sender.send(chunk(1, MAX_CHUNK)).await.unwrap(); // takes 1.7 s
    let under_way_bytes = a.peer("b").stats().udp_sent.payload_bytes + 100_000;
    wait_until(|| a.peer("b").stats().udp_sent.payload_bytes > under_way_bytes).await;
    let began = Instant::now();
    a.peer("b").send(message(1, b"urgent")).await.unwrap();
    assert!(matches!(b.event().await, LinkEvent::Control { .. }));
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    assert!(timeout(PATIENCE, receiver.recv()).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_control_and_datagrams_pass_before_disks() {
    let _turn = TURN.lock().await;
    let mut path = None;
    let via = |address| path.insert(Path::to(address, wan())).address;
    let (a, mut b) = pair_with(|a| fit(a, &wan()), |b| fit(b, &wan()), via).await;
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
        memory_sender.drained().await
    });
    a.peer("b").send(message(1, b"urgent")).await.unwrap();
    assert!(matches!(b.event().await, LinkEvent::Control { .. }));
    let control_took = began.elapsed();
    let mut datagrams = b.peer("a").take_datagrams();
    let sent = Instant::now();
    a.peer("b").datagram_sender().try_send(Bytes::from_static(b"a guest's packet")).unwrap();
    timeout(PATIENCE, datagrams.recv()).await.unwrap().unwrap();
    let datagram_took = sent.elapsed();
    for number in 0..chunks {
        let received = timeout(PATIENCE, memory_receiver.recv()).await.unwrap().unwrap();
        assert!(received == chunk(number, CHUNK_BYTES));
    }
    let memory_took = began.elapsed();
    let memory_mbit = mbit_per_second(chunks as usize * CHUNK_BYTES, memory_took);
    let disk_bytes = a.peer("b").stats().sent.disk_bytes - sent_before_bytes;
    println!(
        "control took {control_took:?}, a datagram {datagram_took:?}; memory {memory_mbit:.1} Mbit/s beside a busy disk ({disk_bytes} bytes)"
    );
    assert!(datagram_took < Duration::from_millis(400), "{datagram_took:?}");
    assert!(control_took < Duration::from_millis(400), "{control_took:?}");
    // What the disk had under way when memory began, and little more.
    assert!(disk_bytes < 4 << 20, "{disk_bytes} bytes of disk beside 16 MiB of memory");
    a.peer("b").close_bulk(MigrationId(1)).await;
    let (disks, drain, _drained_or_closed) = tokio::join!(disks, drain, producer);
    disks.and(drain).unwrap();
}

fn mbit_per_second(bytes: usize, time: Duration) -> f64 {
    bytes as f64 * 8.0 / 1e6 / time.as_secs_f64()
}
