//! A guest that changes itself as fast as the link carries it: it stays and it is said why, or it is slowed down and moves.
//!
//! How much it is slowed down is the core's affair (`migration/disk_pace.rs`). Memory is throttled by QEMU itself.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

#[path = "support/scenes.rs"]
mod scenes;

use std::time::Duration;

use gateway::api::types::{MigrateRequest, Progressing};
use netns_tests::scenario::gateway::Gateway;
use netns_tests::scenario::monitor::Monitor;
use netns_tests::scenario::options::SceneOptions;
use netns_tests::scenario::scene::{Scene, VM};
use serde_json::json;

use scenes::{build, close, state, turn, wait};

const SECOND: Duration = Duration::from_secs(1);
/// Generous: guests run without hardware help, and the machine may be busy.
const LIMIT: Duration = Duration::from_secs(120);

/// What the guest at a site may write to its disks, in bytes per second; zero is no limit.
fn write_limits(gateway: &Gateway) -> Vec<u64> {
    let mut monitor = Monitor::connect(&gateway.observer(VM), 5 * SECOND).unwrap();
    let disks = monitor.ask("query-block", json!({})).unwrap();
    let limits = disks.as_array().unwrap().iter().filter_map(|disk| disk["inserted"]["bps_wr"].as_u64());
    limits.collect()
}

/// Waits until the guest's disk writes are limited, and gives the limit.
async fn limited(scene: &Scene, id: &str) -> u64 {
    let began = tokio::time::Instant::now();
    loop {
        let view = scene.a.client().migration(id).await.unwrap();
        if let Some(limit) = view.disk_limit {
            return limit;
        }
        assert_eq!(view.progressing, Progressing::Running, "it ended without a limit: {view:?}");
        assert!(began.elapsed() < LIMIT, "it is not limited: {view:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_its_disk_as_fast_as_it_is_sent_stays_or_is_slowed_down_and_moves() {
    let Some(_turn) = turn().await else { return };
    let options = SceneOptions {
        rate_mbit: 60.0,
        ttl_s: 5,
        dirt_bytes: 24 << 20,
        dirty_disk_kib_per_s: 24 << 10,
        ..SceneOptions::small("busy")
    };
    let scene = build(options).await;
    scene.start_guest().await.unwrap();
    let (vm, to) = (VM.parse().unwrap(), "b".parse().unwrap());
    let request = MigrateRequest { vm, to, without_dns: false, max_downtime_ms: None, no_throttle: true };
    let id = scene.a.client().migrate(&request).await.unwrap().id;
    let view = scene.wait_move(&id, LIMIT).await.unwrap();
    assert_eq!(view.progressing, Progressing::Stayed, "{view:?}");
    let why = view.reason.unwrap();
    assert!(why.contains("writes its disks as fast as they are sent") && view.disk_limit.is_none(), "{why}");
    let runs = || (state(&scene.a).as_deref() == Some("running")).then_some(());
    wait("the guest runs on", 5 * SECOND, runs).await;

    // What an attempt took from the guest it has back when the attempt is over.
    let id = scene.begin_move().await.unwrap();
    let limit = limited(&scene, &id).await;
    assert!(write_limits(&scene.a).contains(&limit), "{limit}: {:?}", write_limits(&scene.a));
    scene.a.client().abort(&id).await.unwrap();
    let view = scene.wait_move(&id, LIMIT).await.unwrap();
    assert_eq!(view.progressing, Progressing::Stayed, "{view:?}");
    assert!(write_limits(&scene.a).iter().all(|limit| *limit == 0), "{:?}", write_limits(&scene.a));

    let id = scene.begin_move().await.unwrap();
    let limit = limited(&scene, &id).await;
    let view = scene.wait_move(&id, LIMIT).await.unwrap();
    assert_eq!(view.progressing, Progressing::Moved, "{:?}\n{}", view.reason, scene.a.log_tail());
    println!("moved with writes limited to {} KiB/s, paused {:?} ms", limit >> 10, view.pause_ms);
    assert_eq!(state(&scene.b).as_deref(), Some("running"));
    assert!(write_limits(&scene.b).iter().all(|limit| *limit == 0), "{:?}", write_limits(&scene.b));
    close(scene);
}
