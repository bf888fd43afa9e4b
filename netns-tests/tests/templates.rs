//! Machines that were cloned from one image, and a site that has the image: of their disks it is sent only what changed since.
//! A site that has it not gets all of them.
//!
//! What a template may be and who is told of it is looked at without machines, in the gateway.

#![allow(
    clippy::unwrap_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

#[path = "support/disk_bytes.rs"]
mod disk_bytes;
#[path = "support/scenes.rs"]
mod scenes;

use std::time::Duration;

use gateway::api::types::{MigrationView, Progressing};
use netns_tests::scenario::disk_check::compare;
use netns_tests::scenario::monitor::Monitor;
use netns_tests::scenario::options::SceneOptions;
use netns_tests::scenario::scene::{SECOND_VM, Scene, TEMPLATE, VM};

use disk_bytes::begun_with_disk_bytes;
use scenes::{build, close, state, state_of, turn, wait};

const SOON: Duration = Duration::from_secs(20);
/// Generous: guests run without hardware help, and the machine may be busy.
const MOVE_LIMIT: Duration = Duration::from_secs(180);

fn options(name: &str) -> SceneOptions {
    SceneOptions {
        cloned: true,
        dirty_disk_kib_per_s: 16,
        ..SceneOptions::small(format!("templates-{name}"))
    }
}

/// Moves a guest from a to b; gives also what its disk cost on the WAN.
async fn moved(scene: &Scene, vm: &str) -> (MigrationView, u64) {
    let (id, disk) = begun_with_disk_bytes(scene, vm, "a", "b", MOVE_LIMIT).await;
    let view = scene.wait_move(&id, MOVE_LIMIT).await.unwrap();
    scene.keep_logs();
    assert_eq!(view.progressing, Progressing::Moved, "{:?}\n{}", view.reason, scene.b.log_tail());
    assert_eq!(state_of(&scene.b, vm).as_deref(), Some("running"));
    wait("the guest to be gone from a", SOON, || state_of(&scene.a, vm).is_none().then_some(())).await;
    println!("{vm}: {disk} bytes of disk over the WAN, {} bytes were there already", view.disk_kept);
    (view, disk)
}

/// What the disk costs where the site that is gone to has no such template: all of it.
async fn without() -> u64 {
    let scene = build(options("without")).await;
    scene.start_guest().await.unwrap();
    let (view, disk) = moved(&scene, VM).await;
    assert_eq!(view.disk_kept, 0);
    assert_eq!(state(&scene.b).as_deref(), Some("running"), "it came all the same");
    let told = scene.b.client().migration(&view.id).await.unwrap().notices;
    assert!(told.iter().any(|notice| notice.contains(TEMPLATE)), "b's operator is told: {told:?}");
    close(scene);
    disk
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_of_an_image_that_the_other_site_has_bring_only_what_changed_since() {
    let Some(_turn) = turn().await else { return };
    let whole = without().await;
    assert!(whole > 10 << 20, "{whole} bytes");
    let scene = build(options("with")).await;
    scene.put_template("b").unwrap();
    let check = format!("template {TEMPLATE}");
    let looked = scene.b.client().doctor(None).await.unwrap();
    assert!(looked.iter().any(|finding| finding.check == check && finding.ok), "{looked:?}");
    scene.start_guest().await.unwrap();
    scene.start_second_guest().await.unwrap();
    let (first, first_bytes) = moved(&scene, VM).await;
    let (second, second_bytes) = moved(&scene, SECOND_VM).await;
    for (view, bytes) in [(&first, first_bytes), (&second, second_bytes)] {
        let part = 100.0 * bytes as f64 / whole as f64;
        println!("{}: {part:.1} % of {whole} bytes", view.vm);
        assert!(view.disk_kept > 10 << 20 && bytes * 4 < whole, "{bytes} of {whole} bytes");
        let told = scene.b.client().migration(&view.id).await.unwrap().notices;
        assert!(told.iter().all(|notice| !notice.contains(TEMPLATE)), "{told:?}");
    }
    let mut monitor = Monitor::connect(&scene.b.observer(VM), Duration::from_secs(5)).unwrap();
    let found = compare(&scene, &mut monitor, &first.id, 1).await.unwrap();
    println!("{found:?}");
    assert!(found.sound && found.mismatched == 0 && found.compared > 1000, "{found:?}");
    close(scene);
}
