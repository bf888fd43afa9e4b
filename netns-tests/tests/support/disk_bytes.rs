//! What the disks of a move cost on the WAN, counted at the emulator.

use std::time::{Duration, Instant};

use gateway::api::types::Progressing;
use longhaul_core::migration::Stage;
use netns_tests::scenario::scene::Scene;
use netns_tests::wan::Direction;

/// Begins to move a guest; gives the move and what passed the WAN in both directions until its disks were in step.
pub async fn begun_with_disk_bytes(
    scene: &Scene,
    vm: &str,
    from: &str,
    to: &str,
    limit: Duration,
) -> (String, u64) {
    let offered = || -> u64 {
        let bytes = |direction| scene.world.wan.counters(direction).unwrap().offered.bytes;
        Direction::BOTH.into_iter().map(bytes).sum()
    };
    let before = offered();
    let id = scene.begin_move_of(vm, from, to).await.unwrap();
    let client = scene.gateway(from).unwrap().client();
    let deadline = Instant::now() + limit;
    loop {
        let view = client.migration(&id).await.unwrap();
        let in_step = view.disk.1 > 0 && view.disk.0 == view.disk.1;
        if view.stage > Stage::PreCopy || view.stage == Stage::PreCopy && (view.round >= 1 || in_step) {
            break;
        }
        assert!(view.progressing == Progressing::Running && Instant::now() < deadline, "{view:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (id, offered() - before)
}
