//! Disks of machines that left: shown to operators, and deleted when their days are over. Which there are, and what
//! may be touched, is `migration::kept`'s to say.

use std::time::Duration;

use super::Daemon;
use crate::api::types::KeptView;
use crate::journal::unix_ms;
use crate::migration::kept::{self, KeptDisk};
use crate::migration::remembered;

/// Between two looks.
pub(super) const DAILY: Duration = Duration::from_secs(24 * 3600);

impl Daemon {
    /// The disks that are kept now.
    pub(super) fn kept_disks(&self) -> Vec<KeptView> {
        let keep_d = self.edges.config.storage.keep_moved_disks_d;
        kept::list(&self.edges).into_iter().map(|disk| view(disk, keep_d)).collect()
    }

    /// Deletes those whose time is over.
    pub(super) fn delete_due_disks(&self) {
        let (now_ms, keep_d) = (unix_ms(), self.edges.config.storage.keep_moved_disks_d);
        let kept = kept::list(&self.edges);
        for disk in kept.iter().filter(|disk| is_due(disk.since_ms, keep_d, now_ms)) {
            kept::remove(&self.edges, disk);
        }
        kept::forget_removed(&self.edges);
        remembered::expire(&self.edges);
    }
}

fn view(disk: KeptDisk, keep_d: u64) -> KeptView {
    let until_ms = until_ms(disk.since_ms, keep_d);
    KeptView { vm: disk.vm, path: disk.path, bytes: disk.bytes, since_ms: disk.since_ms, until_ms }
}

fn until_ms(since_ms: u64, keep_d: u64) -> Option<u64> {
    (keep_d > 0).then(|| since_ms + keep_d * DAILY.as_millis() as u64)
}

fn is_due(since_ms: u64, keep_d: u64, now_ms: u64) -> bool {
    until_ms(since_ms, keep_d).is_some_and(|until_ms| until_ms <= now_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_MS: u64 = 24 * 3600 * 1000;

    #[test]
    fn a_kept_disk_is_due_when_its_days_are_over_and_never_with_zero() {
        assert!(!is_due(1000, 30, 1000 + 30 * DAY_MS - 1));
        assert!(is_due(1000, 30, 1000 + 30 * DAY_MS));
        assert!(!is_due(1000, 0, u64::MAX));
    }
}
