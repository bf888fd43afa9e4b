//! Looks at the machine: what of a lab is there, and what in the root namespace is there now that was not there before.
//! Only looks; nothing is removed here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{namespaces, processes, state_folder};
use crate::exec;
use crate::netns::LabId;

/// What the root namespace has: interfaces, nft tables, routing rules and routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    entries: BTreeSet<String>,
}

impl Snapshot {
    /// Looks at the namespace this process is in.
    pub fn take() -> Result<Self> {
        let mut entries: BTreeSet<String> =
            link_names().into_iter().map(|name| format!("link {name}")).collect();
        // A machine without nft has no tables to compare.
        let tables = exec::run("nft", &["list", "tables"]).unwrap_or_default();
        entries.extend(tables.lines().map(|line| format!("nft {line}")));
        for family in ["-4", "-6"] {
            let rules = exec::run("ip", &[family, "rule"]).unwrap_or_default();
            entries.extend(rules.lines().map(|line| format!("rule {family} {line}")));
            let routes = exec::run("ip", &[family, "route", "show", "table", "all"]).unwrap_or_default();
            entries.extend(routes.lines().map(|line| format!("route {family} {}", without_expiry(line))));
        }
        Ok(Self { entries })
    }

    /// What this one has and `before` has not, without what labs other than `own` may have made meanwhile.
    pub fn since(&self, before: &Self, own: &LabId) -> Vec<String> {
        let new = self.entries.difference(&before.entries);
        new.filter(|entry| !names_another_lab(entry, own)).cloned().collect()
    }
}

/// What remains of a lab on this machine; empty after a proper removal.
pub fn left_behind(id: &LabId, scratch: &Path, before: &Snapshot) -> Vec<String> {
    let mut left: Vec<String> = namespaces(id).into_iter().map(|name| format!("namespace {name}")).collect();
    left.extend(
        processes(id).into_iter().map(|pid| format!("process {pid} ({})", command_name(pid.as_raw()))),
    );
    left.extend(mounts(id, Some(scratch)).into_iter().map(|target| format!("mount {}", target.display())));
    left.extend(links_of(id).into_iter().map(|link| format!("link {link}")));
    for folder in [scratch, &state_folder(id)] {
        if folder.exists() {
            left.push(format!("file {}", folder.display()));
        }
    }
    match Snapshot::take() {
        Ok(now) => left.extend(now.since(before, id)),
        Err(error) => left.push(format!("unknown: {error:#}")),
    }
    left
}

/// Mount points that carry the lab's id or lie in its folder, outermost first.
pub(super) fn mounts(id: &LabId, scratch: Option<&Path>) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let targets = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let prefix = id.prefix();
    let ours = |target: &PathBuf| {
        scratch.is_some_and(|folder| target.starts_with(folder)) || target.to_string_lossy().contains(&prefix)
    };
    targets.filter(ours).collect()
}

/// Interfaces of the root namespace that carry the lab's id.
pub(super) fn links_of(id: &LabId) -> Vec<String> {
    link_names().into_iter().filter(|name| name.starts_with(id.as_str())).collect()
}

fn link_names() -> Vec<String> {
    let listing = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    listing.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect()
}

fn without_expiry(route: &str) -> &str {
    route.split(" expires ").next().unwrap_or(route).trim()
}

fn names_another_lab(entry: &str, own: &LabId) -> bool {
    let words = entry.split(|letter: char| !letter.is_ascii_alphanumeric());
    words.filter_map(LabId::parse).any(|id| id != *own)
}

fn command_name(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(entries: &[&str]) -> Snapshot {
        Snapshot { entries: entries.iter().map(|entry| (*entry).to_owned()).collect() }
    }

    #[test]
    fn a_difference_names_what_is_new_but_not_what_other_labs_made() {
        let before = snapshot(&["link lo", "link eth0"]);
        let after = snapshot(&["link lo", "link tap7", "link lh12ab-x", "nft table ip lh34cd"]);
        let own = LabId::parse("lh34cd").unwrap();
        assert_eq!(after.since(&before, &own), ["link tap7", "nft table ip lh34cd"]);
    }

    #[test]
    fn the_life_time_of_a_route_is_no_difference() {
        assert_eq!(without_expiry("default via fe80::1 expires 1793sec pref medium"), "default via fe80::1");
    }
}
