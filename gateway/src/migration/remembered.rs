//! The memory that both sites of a move remember afterwards, so that the way back costs what changed since. One file for each
//! machine, of its last move; what is in it is [`crate::memory::kept`]'s.
//!
//! It is a help and never needed: whatever goes wrong with it is logged, and the next move sends all memory.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use longhaul_core::ids::VmName;
use longhaul_core::wan::Remembered;

use super::Edges;
use crate::memory::kept;

impl Edges {
    /// Where it is kept.
    pub fn kept_memory(&self, vm: &VmName) -> PathBuf {
        self.config.site.state_dir.join("memory").join(format!("{vm}.pages"))
    }
}

/// Keeps it in place of that of the machine's last move. Beside everything else: a move does not wait for it.
pub(super) fn keep(edges: &Edges, vm: &VmName, remembered: Option<Remembered>) {
    let Some(remembered) = remembered else { return };
    let (path, vm) = (edges.kept_memory(vm), vm.clone());
    let wanted = edges.config.migration.keep_memory;
    tokio::task::spawn_blocking(move || {
        let kept = if wanted { kept::write(&path, &remembered) } else { kept::forget(&path) };
        if let Err(error) = kept {
            tracing::info!(%vm, %error, "its memory is not kept; its way back will send all of it");
        }
    });
}

/// Reads what the other site remembers as well.
pub(super) async fn of_both(
    edges: &Edges,
    vm: &VmName,
    digest: Option<[u8; 32]>,
    max_pages: u32,
) -> Option<Remembered> {
    let (path, wanted) = (edges.kept_memory(vm), digest?);
    let read = move || {
        let read = kept::read(&path, wanted, max_pages);
        if read.is_err() {
            // The other site may begin with it all the same: this attempt fails then, the next must not.
            kept::forget(&path)?;
        }
        read
    };
    let read = tokio::task::spawn_blocking(read).await;
    let read = read.unwrap_or_else(|ended| Err(std::io::Error::other(ended)));
    read.inspect_err(|error| tracing::info!(%vm, %error, "its memory of before is not used")).ok()
}

/// Forgets it, with the machine.
pub fn forget(edges: &Edges, vm: &VmName) {
    if let Err(error) = kept::forget(&edges.kept_memory(vm)) {
        tracing::warn!(%vm, %error, "its kept memory could not be removed");
    }
}

/// Removes what is older than disks are kept; nothing if those are kept for ever.
pub fn expire(edges: &Edges) {
    let days = edges.config.storage.keep_moved_disks_d;
    if days == 0 {
        return;
    }
    let limit = Duration::from_secs(days.saturating_mul(86_400));
    let Ok(files) = std::fs::read_dir(edges.config.site.state_dir.join("memory")) else { return };
    for file in files.flatten() {
        let age = file.metadata().and_then(|about| about.modified()).ok();
        let age = age.and_then(|at| SystemTime::now().duration_since(at).ok());
        if age.is_some_and(|age| age > limit)
            && let Err(error) = kept::forget(&file.path())
        {
            tracing::warn!(file = %file.path().display(), %error, "kept memory could not be removed");
        }
    }
}
