//! The memory that both sites of a move remember afterwards, so that the way back costs what changed since. One file for each
//! machine, of its last move; what is in it is [`crate::memory::kept`]'s.
//!
//! It is a help and never needed: whatever goes wrong with it is logged, and the next move sends all memory.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use longhaul_core::ids::VmName;
use longhaul_core::migration::message::Refusal;
use longhaul_core::wan::Remembered;

use super::Edges;
use crate::memory::kept::{self, KeptFile};

impl Edges {
    /// Where it is kept.
    pub fn kept_memory(&self, vm: &VmName) -> PathBuf {
        self.memory_folder().join(format!("{vm}.pages"))
    }

    fn memory_folder(&self) -> PathBuf {
        self.config.site.state_dir.join("memory")
    }
}

/// A guest has so long to itself where it runs now: its first moments are when its clients wait for it, and keeping a gigabyte of
/// pages takes a processor some seconds.
const FIRST_MOMENTS: Duration = Duration::from_secs(2);

/// Keeps it in place of that of the machine's last move. Beside everything else, and a little later: a move does not wait for it.
pub(super) fn keep(edges: &Edges, vm: &VmName, remembered: Option<Remembered>) {
    let Some(remembered) = remembered else { return };
    let (path, vm, most_bytes) = (edges.kept_memory(vm), vm.clone(), most_bytes(edges));
    let kept_not = move |error| {
        tracing::info!(%vm, %error, "its memory is not kept; its way back will send all of it");
    };
    // What was kept before goes at once: a next move must not begin with what only one site will have.
    let begun = if edges.config.migration.keep_memory {
        kept::begin(&path).map(Some)
    } else {
        kept::forget(&path).map(|()| None)
    };
    let keeping = match begun {
        Ok(Some(keeping)) => keeping,
        Ok(None) => return,
        Err(error) => return kept_not(error),
    };
    tokio::spawn(async move {
        tokio::time::sleep(FIRST_MOMENTS).await;
        let write = move || keeping.write(&remembered, most_bytes).unwrap_or_else(kept_not);
        tokio::task::spawn_blocking(write).await
    });
}

fn most_bytes(edges: &Edges) -> u64 {
    edges.config.migration.keep_memory_gib << 30
}

/// What is kept, and of which machine, the oldest first.
pub fn list(edges: &Edges) -> Vec<(VmName, KeptFile)> {
    let of = |file: KeptFile| Some((file.path.file_stem()?.to_str()?.parse().ok()?, file));
    kept::list(&edges.memory_folder()).into_iter().filter_map(of).collect()
}

/// Reads what the other site remembers as well; nothing if there is no room for it, as there then is none at the source.
///
/// # Errors
///
/// [`Refusal::Verification`] if what is kept here is not what it was, or is gone. The other site may begin with it, so that
/// this attempt has to end, and the next must not. What is damaged is forgotten; what could not be read is not.
pub(super) async fn of_both(
    edges: &Edges,
    vm: &VmName,
    digest: Option<[u8; 32]>,
    max_pages: u32,
) -> Result<Option<Remembered>, Refusal> {
    let (path, Some(wanted)) = (edges.kept_memory(vm), digest) else { return Ok(None) };
    let read = tokio::task::spawn_blocking(move || read_or_forget(&path, wanted, max_pages)).await;
    match read.unwrap_or_else(|ended| Err(io::Error::other(ended))) {
        Ok(remembered) => Ok(Some(remembered)),
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
            tracing::info!(%vm, "its memory of before is more than may be remembered now, and is not used");
            Ok(None)
        }
        Err(error) => {
            tracing::warn!(%vm, %error, "its kept memory is damaged or cannot be read");
            let (site, is) = (edges.site(), if is_damage(&error) { "is damaged" } else { "cannot be read" });
            let text = format!("memory: what site {site} kept of it {is}: {error}");
            Err(Refusal::Verification(Refusal::text(text)))
        }
    }
}

fn read_or_forget(path: &Path, wanted: [u8; 32], max_pages: u32) -> io::Result<Remembered> {
    let read = kept::read(path, wanted, max_pages);
    if read.as_ref().is_err_and(is_damage) {
        kept::forget(path)?;
    }
    read
}

fn is_damage(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
}

/// Forgets it, with the machine.
pub fn forget(edges: &Edges, vm: &VmName) {
    if let Err(error) = kept::forget(&edges.kept_memory(vm)) {
        tracing::warn!(%vm, %error, "its kept memory could not be removed");
    }
}

/// Removes what is more than may be kept, and what is older than disks are kept, if those are not kept for ever.
pub fn expire(edges: &Edges) {
    if let Err(error) = kept::bound(&edges.memory_folder(), most_bytes(edges)) {
        tracing::warn!(%error, "kept memory could not be removed");
    }
    let days = edges.config.storage.keep_moved_disks_d;
    if days == 0 {
        return;
    }
    let limit = Duration::from_secs(days.saturating_mul(86_400));
    let Ok(files) = std::fs::read_dir(edges.memory_folder()) else { return };
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

#[cfg(test)]
mod tests {
    use longhaul_core::memory::PAGE_BYTES;

    use super::*;
    use crate::identity::Identity;
    use crate::test_site::TestSite;

    #[tokio::test]
    async fn kept_memory_that_is_damaged_ends_the_attempt_before_anything_is_copied_and_not_the_next() {
        let site = TestSite::open("b", &Identity::generate().unwrap(), &[]).await;
        let (edges, vm) = (&site.edges, "web1".parse().unwrap());
        let path = edges.kept_memory(&vm);
        let mut remembered = Remembered::with_room(2);
        for page in 0..2u64 {
            assert!(remembered.put(b"pc.ram", page, &[page as u8; PAGE_BYTES]));
        }
        kept::begin(&path).unwrap().write(&remembered, u64::MAX).unwrap();
        let named = kept::digest(&path);
        assert!(of_both(edges, &vm, named, 2).await.unwrap().is_some());
        assert!(of_both(edges, &vm, named, 1).await.unwrap().is_none(), "no room is no damage");
        assert!(of_both(edges, &vm, None, 2).await.unwrap().is_none());
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(kept::digest(&path), named, "it is named to the source all the same");
        let why = of_both(edges, &vm, named, 2).await.err();
        assert!(matches!(&why, Some(Refusal::Verification(text)) if text.contains("site b")), "{why:?}");
        assert_eq!(kept::digest(&path), None);
    }
}
