//! Real machines move; the link stalls, damages and vanishes on the way.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use gateway::memory::{
    MemoryEnd, MemorySource, MemoryTarget, SourceConfig, SourceHandle, SourceMode, TargetConfig, TargetHandle,
};
use gateway::naming::NoDisk;
use longhaul_core::memory::StreamPhase;
use longhaul_core::wan::StreamEnd;
use tempfile::TempDir;
use tokio::time::timeout;

use crate::lateness::watch_lateness;
use crate::machine::{Machine, PATIENCE, unavailable};
use crate::queue::{Damage, QueueRecv, QueueSend, Valve, queue};

/// Chunks on their way at most: 4 MiB, as much as 100 Mbit/s carry in a third of a second.
const WINDOW: usize = 4;

/// Two machines with the whole path between them, the source's migration under way.
struct Move {
    from: Machine,
    to: Machine,
    source: SourceHandle,
    target: TargetHandle,
    valve: Valve,
    _dir: TempDir,
}

impl Move {
    async fn begin(prepare: impl FnOnce(&mut QueueRecv, &Valve)) -> Option<Self> {
        if let Some(reason) = unavailable() {
            println!("skipped: {reason}");
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| -> PathBuf { dir.path().join(name) };
        let mut from = Machine::running(dir.path(), "from").await;
        let to = Machine::waiting(dir.path(), "to", &path("in")).await;
        let (send, mut recv, valve) = queue(WINDOW);
        prepare(&mut recv, &valve);
        let target = MemoryTarget::start(
            path("in"),
            recv,
            TargetConfig { shadow_pages: SHADOW_PAGES, ..TargetConfig::default() },
            None,
            Vec::<NoDisk>::new(),
        );
        let source = start_source(path("out"), send);
        from.migrate(&path("out")).await;
        Some(Self { from, to, source, target, valve, _dir: dir })
    }

    /// Waits until the stream has come this far.
    async fn carries(&self, megabytes: u64, rounds: usize) {
        let mut progress = self.source.progress();
        let far = progress.wait_for(|p| p.original.0 >= megabytes << 20 && p.rounds.len() >= rounds);
        timeout(PATIENCE, far).await.expect("the stream goes on").expect("the source lives");
    }

    async fn finish(&mut self) -> Duration {
        self.source.set_mode(SourceMode::Absorb);
        self.from.stop_and_finish().await
    }

    /// Both ends agree, the memories are the same, and the guest goes on at the destination.
    async fn arrives(&mut self) -> StreamEnd {
        let sent = timeout(PATIENCE, self.source.ended()).await.expect("in time").expect("sent");
        let MemoryEnd::Proven(made) = timeout(PATIENCE, self.target.ended()).await.expect("in time") else {
            panic!("not proven");
        };
        assert_eq!(sent, made);
        self.to.migration_reaches("completed").await;
        assert_eq!(self.to.run_state().await, "paused");
        assert_eq!(self.from.run_state().await, "postmigrate");
        assert_eq!(self.from.memory_digest().await, self.to.memory_digest().await);
        self.to.execute("cont", serde_json::json!({})).await;
        self.to.runs_on().await;
        sent
    }

    /// The damage is found, and neither machine takes the stream for complete or loses the guest.
    async fn is_refused(&mut self) {
        let end = timeout(PATIENCE, self.target.ended()).await.expect("in time");
        assert!(matches!(end, MemoryEnd::Mismatch(_)), "{end:?}");
        assert_eq!(self.to.run_state().await, "inmigrate", "it was not told the end");
        assert_eq!(self.from.run_state().await, "postmigrate");
        self.from.execute("cont", serde_json::json!({})).await;
        self.from.runs_on().await;
    }
}

fn start_source(path: PathBuf, channel: QueueSend) -> SourceHandle {
    let mut config = SourceConfig::default();
    config.encoder.shadow_pages = SHADOW_PAGES;
    MemorySource::bind(&path, config).expect("the socket is made").start(channel)
}

/// Fewer than the guest has: some are forgotten.
const SHADOW_PAGES: u32 = 1 << 13;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_and_goes_on_at_the_destination() {
    let Some(mut run) = Move::begin(|_, _| ()).await else { return };
    run.carries(40, 3).await;
    run.from.runs_on().await;
    let stopped = Instant::now();
    run.finish().await;
    run.to.migration_reaches("completed").await;
    let loaded = stopped.elapsed();
    let end = run.arrives().await;
    let progress = run.source.progress().borrow().clone();
    assert_eq!(progress.phase, StreamPhase::DeviceState, "the stream was understood");
    assert_eq!(progress.original, end.bytes);
    assert!(progress.zero_pages > 20_000 && progress.pages > 4000, "{progress:?}");
    assert!(progress.wire.0 * 2 < progress.original.0, "{progress:?}");
    assert!(progress.device_wire.0 * 4 < progress.device_state.0, "{progress:?}");
    let told: u64 = progress.rounds.iter().map(|round| round.pages).sum();
    assert_eq!(told, progress.pages + progress.zero_pages);
    println!(
        "stream {} -> wire {}; device state {} -> {}; {} rounds, the first {:?}; stop to loaded {loaded:?}",
        progress.original,
        progress.wire,
        progress.device_state,
        progress.device_wire,
        progress.rounds.len(),
        progress.rounds[0]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_of_two_seconds_slows_the_move_and_no_more() {
    let Some(mut run) = Move::begin(|_, _| ()).await else { return };
    run.carries(20, 1).await;
    run.valve.set_open(false);
    let cut = Instant::now();
    while cut.elapsed() < Duration::from_secs(2) {
        run.from.runs_on().await;
        assert_eq!(run.from.migration_status().await, "active");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(run.to.run_state().await, "inmigrate");
    let before = run.source.progress().borrow().original;
    let held = run.source.progress().borrow().backlog;
    assert!(held.0 <= 8 << 20, "{held} held back");
    run.valve.set_open(true);
    run.carries((before.0 >> 20) + 10, 2).await;
    run.finish().await;
    run.arrives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_after_the_guest_was_stopped_never_hangs_the_monitor() {
    let Some(mut run) = Move::begin(|_, _| ()).await else { return };
    run.carries(20, 2).await;
    run.valve.set_open(false);
    let lateness = watch_lateness();
    let slowest = run.finish().await;
    let late = *lateness.borrow();
    assert!(slowest < Duration::from_millis(100) + late, "QMP took {slowest:?}, machine late by {late:?}");
    println!("slowest answer {slowest:?}");
    assert_eq!(run.to.run_state().await, "inmigrate");
    run.valve.set_open(true);
    run.arrives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_flipped_bit_is_refused_while_the_guest_runs_and_it_runs_on() {
    let Some(mut run) = Move::begin(|recv, _| recv.damage = Damage::Chunk(3)).await else { return };
    let end = timeout(PATIENCE, run.target.ended()).await.expect("in time");
    assert!(matches!(end, MemoryEnd::Mismatch(_)), "{end:?}");
    println!("{end:?}");
    assert_eq!(run.to.run_state().await, "inmigrate", "it was not told the end");
    assert_eq!(run.from.run_state().await, "running");
    run.source.abort();
    run.from.runs_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_proof_keeps_the_destination_from_loading() {
    let prepare = |recv: &mut QueueRecv, valve: &Valve| {
        valve.set_open(false);
        recv.damage = Damage::Last;
    };
    let Some(mut run) = Move::begin(prepare).await else { return };
    run.finish().await;
    let sent = timeout(PATIENCE, run.source.ended()).await.expect("in time").expect("sent");
    run.valve.set_open(true);
    run.is_refused().await;
    assert_eq!(run.target.progress().borrow().written.0, sent.bytes.0 - 1, "all but the last byte");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_channel_is_not_the_end_of_the_stream_for_qemu() {
    let Some(mut run) = Move::begin(|_, _| ()).await else { return };
    run.carries(10, 1).await;
    run.source.abort();
    let end = timeout(PATIENCE, run.target.ended()).await.expect("in time");
    assert!(matches!(end, MemoryEnd::ChannelClosed { .. }), "{end:?}");
    assert_eq!(run.to.run_state().await, "inmigrate");
    run.from.runs_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_waiting_machine_is_told() {
    let Some(mut run) = Move::begin(|_, _| ()).await else { return };
    run.carries(10, 1).await;
    drop(run.to);
    let end = timeout(PATIENCE, run.target.ended()).await.expect("in time");
    assert!(matches!(end, MemoryEnd::QemuClosed { proven: false, .. }), "{end:?}");
    run.from.runs_on().await;
}
