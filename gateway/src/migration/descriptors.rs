//! Whether this process may open as many files and sockets as one more migration takes.
//!
//! A gateway without descriptors loses what runs already: a monitor's connection, a tap, the next record of its journal. So it
//! begins nothing new first. Reserves nothing, and counts nobody else's.

use std::io;

use longhaul_core::migration::message::Refusal;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::Config;

/// Raises what this process may open to what its operator allows: the usual soft limit is for programs that use `select`.
pub fn raise_limit() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}

/// Refuses what would take the last descriptors.
pub fn check(config: &Config) -> Result<(), Refusal> {
    let available =
        free().map_err(|error| Refusal::Other(format!("Descriptors cannot be counted: {error}")))?;
    check_free(available, config.site.descriptors_free)
}

/// How many more this process may open.
pub fn free() -> io::Result<u64> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let open = std::fs::read_dir("/proc/self/fd")?.count() as u64;
    Ok(limit.saturating_sub(open))
}

fn check_free(available: u64, wanted: u64) -> Result<(), Refusal> {
    if available >= wanted {
        return Ok(());
    }
    Err(Refusal::NotEnough {
        what: "descriptors of the gateway (site.descriptors_free, LimitNOFILE=)".into(),
        wanted: wanted.to_string(),
        available: available.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_begins_with_exactly_the_descriptors_that_are_wanted_and_not_with_fewer() {
        assert_eq!(check_free(256, 256), Ok(()));
        let refused = check_free(255, 256).unwrap_err().to_string();
        assert!(refused.contains("site.descriptors_free"), "{refused}");
        assert_eq!(check_free(0, 0), Ok(()), "0 asks for nothing");
    }

    #[test]
    fn what_is_opened_is_counted() {
        let held: Vec<_> = (0..200).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert!(free().unwrap() <= limit - held.len() as u64);
    }
}
