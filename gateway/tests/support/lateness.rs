//! How late this machine wakes a process at worst: what an answer may take longer than it would on one that has nothing
//! else to do. It measures, and decides nothing.

use std::time::{Duration, Instant};

use tokio::sync::watch;

/// The worst of it from now on, until the receiver is dropped.
pub fn watch_lateness() -> watch::Receiver<Duration> {
    const NAP: Duration = Duration::from_millis(5);
    let (worst, seen) = watch::channel(Duration::ZERO);
    tokio::spawn(async move {
        while !worst.is_closed() {
            let asleep = Instant::now();
            tokio::time::sleep(NAP).await;
            let late = asleep.elapsed().saturating_sub(NAP);
            worst.send_if_modified(|worst| late > std::mem::replace(worst, late.max(*worst)));
        }
    });
    seen
}
