//! Whether the disk under the journal has room for the records of one more migration.
//!
//! A migration whose records cannot be written stops deciding in the middle, so it is not begun. Reserves
//! nothing: what fills the disk afterwards still does; see `SourceDriver` for what happens then.

use std::path::Path;

use longhaul_core::migration::message::Refusal;
use longhaul_core::units::Bytes;

use crate::config::Config;

/// Refuses what could not be recorded.
pub fn check(config: &Config) -> Result<(), Refusal> {
    let site = &config.site;
    check_free(free(&site.state_dir).map_err(Refusal::Other)?, Bytes(site.journal_free_mib << 20))
}

/// Free space where the journal is; an error is a text.
pub fn free(state_dir: &Path) -> Result<Bytes, String> {
    let space = nix::sys::statvfs::statvfs(state_dir)
        .map_err(|error| format!("{} cannot be looked at: {error}", state_dir.display()))?;
    Ok(Bytes(space.blocks_available() * space.fragment_size()))
}

fn check_free(free: Bytes, wanted: Bytes) -> Result<(), Refusal> {
    if free >= wanted {
        return Ok(());
    }
    Err(Refusal::NotEnough {
        what: "space for the journal (site.journal_free_mib)".into(),
        wanted: wanted.to_string(),
        available: free.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_begins_with_exactly_the_room_that_is_wanted_and_not_with_less() {
        assert_eq!(check_free(Bytes(64 << 20), Bytes(64 << 20)), Ok(()));
        let refused = check_free(Bytes((64 << 20) - 1), Bytes(64 << 20)).unwrap_err().to_string();
        assert!(refused.contains("site.journal_free_mib"), "{refused}");
        assert_eq!(check_free(Bytes(0), Bytes(0)), Ok(()), "0 asks for nothing");
    }
}
