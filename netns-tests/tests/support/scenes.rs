//! What tests with a scene of their own share: they take turns, and what they leave is an error.

use std::time::{Duration, Instant};

use netns_tests::scenario::gateway::Gateway;
use netns_tests::scenario::monitor::Monitor;
use netns_tests::scenario::options::SceneOptions;
use netns_tests::scenario::programs::Programs;
use netns_tests::scenario::scene::{Scene, VM};
use tokio::sync::{Mutex, MutexGuard, OnceCell};

static TURN: Mutex<()> = Mutex::const_new(());
static PROGRAMS: OnceCell<Programs> = OnceCell::const_new();

/// The turn of one test; `None`, with the reason printed, where it cannot run.
pub async fn turn() -> Option<MutexGuard<'static, ()>> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return None;
    }
    Some(TURN.lock().await)
}

/// Builds a scene, with programs that are built once.
pub async fn build(options: SceneOptions) -> Scene {
    let programs = PROGRAMS.get_or_init(|| async { Programs::build().unwrap() }).await;
    Scene::build(options, programs).await.unwrap()
}

/// Takes it down. In all that was done no site sent anything under an address that is not its own.
pub fn close(scene: Scene) {
    for site in &scene.world.sites {
        let foreign = scene.world.foreign_dropped(&site.spec.name).unwrap();
        assert_eq!(foreign.packets, 0, "site {} sent under foreign addresses", site.spec.name);
    }
    let left = scene.close();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// The run state of the machine's QEMU, `None` where there is none.
pub fn state(gateway: &Gateway) -> Option<String> {
    state_of(gateway, VM)
}

/// The same of another machine's.
pub fn state_of(gateway: &Gateway, vm: &str) -> Option<String> {
    Monitor::connect(&gateway.observer(vm), Duration::from_millis(300)).ok()?.state().ok()
}

/// Asks until `seen` gives something, at most `limit`.
pub async fn wait<T>(what: &str, limit: Duration, mut seen: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = seen() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
