//! The configuration file: read, checked, and turned into types that need no further checks.
//!
//! Every key has a default or is required, is documented here with its cost, and appears in
//! `configs/site-a.toml`. Loading touches no network and starts nothing; an unknown key or a wrong
//! value is reported with file, line, key and what was expected.

mod check;
mod etcd;
mod limits;
mod line;
mod sections;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use longhaul_core::ids::SiteName;
use longhaul_core::migration::CommitMode;
use serde::Deserialize;

pub use etcd::{Endpoint, EtcdConfig, InvalidEndpoint};
pub use limits::MAX_RATE_MBIT;
pub(crate) use limits::{UIDS, parse_prefix};
pub use sections::{
    ArbiterChoice, CommitChoice, CongestionChoice, DnsConfig, HypervisorSection, KernelConfig, LanConfig,
    LinkSection, MigrationSection, PeerConfig, SiteConfig, StorageConfig, TunnelSection,
};

/// A whole configuration file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Who this site is and where its daemon keeps things.
    pub site: SiteConfig,
    /// The one UDP port between sites.
    #[serde(default)]
    pub link: LinkSection,
    /// Networks that machines are connected to, by the name definitions use.
    #[serde(default)]
    pub lan: BTreeMap<String, LanConfig>,
    /// Where disks are kept.
    pub storage: StorageConfig,
    /// How QEMU is run.
    #[serde(default)]
    pub hypervisor: HypervisorSection,
    /// Kernels for machines that boot without a boot loader, by the name definitions use.
    #[serde(default)]
    pub kernel: BTreeMap<String, KernelConfig>,
    /// How open connections follow a machine.
    #[serde(default)]
    pub tunnel: TunnelSection,
    /// The name server to update; without it names do not follow.
    #[serde(default)]
    pub dns: Option<DnsConfig>,
    /// The etcd cluster that `arbiter = "etcd"` asks.
    #[serde(default)]
    pub etcd: Option<EtcdConfig>,
    /// Budgets of a migration.
    #[serde(default)]
    pub migration: MigrationSection,
    /// The other sites. Nobody else is spoken to.
    #[serde(default)]
    pub peer: Vec<PeerConfig>,
}

/// A configuration that is not taken. Exit code 2, nothing started.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("Cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A key or value is wrong.
    #[error("{path}:{line}: {message}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key and what was expected.
        message: String,
    },
    /// A value is out of its range, or does not go together with another or with this host.
    #[error("{path}:{line}: {key}: {message}")]
    Conflict {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// What was expected.
        message: String,
    },
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// Checks `text`, which came from `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            let line = text[..at.min(text.len())].matches('\n').count() + 1;
            let key = key_at(text, line);
            let message = match key {
                Some(key) => format!("{key}: {}", error.message()),
                None => error.message().to_owned(),
            };
            ConfigError::Value { path: path.to_owned(), line, message }
        })?;
        config.check().map_err(|check::Conflict { key, message }| conflict(path, text, key, message))?;
        Ok(config)
    }

    /// What is said of a key in the file at `path` whose value this host contradicts.
    pub fn contradicted(path: &Path, key: &str, message: String) -> ConfigError {
        // The file was read just now; without it, only the line is missing.
        let text = fs::read_to_string(path).unwrap_or_default();
        conflict(path, &text, key.to_owned(), message)
    }

    /// The peer called `name`.
    pub fn peer(&self, name: &SiteName) -> Option<&PeerConfig> {
        self.peer.iter().find(|peer| peer.name == *name)
    }

    /// How machines are handed over to `peer`.
    pub fn commit_mode(&self, peer: &SiteName) -> CommitMode {
        let arbiter = self.peer(peer).and_then(|policy| policy.arbiter.arbiter());
        arbiter.map_or(self.migration.commit.mode(), CommitMode::Arbitrated)
    }
}

fn conflict(path: &Path, text: &str, key: String, message: String) -> ConfigError {
    ConfigError::Conflict { path: path.to_owned(), line: line::line_of(text, &key), key, message }
}

/// The key that stands on `line`, for messages of the parser that name only a value.
fn key_at(text: &str, line: usize) -> Option<&str> {
    let (key, _) = text.lines().nth(line.checked_sub(1)?)?.split_once('=')?;
    Some(key.trim())
}

#[cfg(test)]
mod tests {
    use longhaul_core::migration::arbiter::Arbiter;

    use super::*;

    const SMALL: &str = r#"
[site]
name = "a"
[storage]
pool = "/var/lib/longhaul/disks"
"#;

    fn error(text: &str) -> String {
        Config::parse(Path::new("site.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn the_smallest_file_is_taken() {
        let config = Config::parse(Path::new("site.toml"), SMALL).unwrap();
        assert_eq!(config.site.name.as_str(), "a");
        assert!(config.peer.is_empty());
    }

    #[test]
    fn an_arbiter_needs_a_name_server_and_is_none_unless_it_is_asked_for() {
        let peer = "[[peer]]\nname = \"b\"\nkey = \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"\n";
        let parsed = |text: &str| Config::parse(Path::new("site.toml"), text);
        let config = parsed(&format!("{SMALL}{peer}")).unwrap();
        assert_eq!(config.peer[0].arbiter, ArbiterChoice::None);
        let b = "b".parse().unwrap();
        assert_eq!(config.commit_mode(&b), CommitMode::Pipelined);
        let config = parsed(&format!("{SMALL}[migration]\ncommit = \"confirmed\"\n{peer}")).unwrap();
        assert_eq!(config.commit_mode(&b), CommitMode::Confirmed);
        let message = error(&format!("{SMALL}{peer}arbiter = \"dns\"\n"));
        assert!(message.contains("peer.b.arbiter") && message.contains("[dns]"), "{message}");
        let dns = "[dns]\nservers = [\"192.0.2.53:53\"]\nzone = \"example.net.\"\nkey_file = \"/k\"\n";
        let config = parsed(&format!("{SMALL}{dns}{peer}arbiter = \"dns\"\n")).unwrap();
        assert_eq!(config.peer[0].arbiter, ArbiterChoice::Dns);
        assert_eq!(config.commit_mode(&b), CommitMode::Arbitrated(Arbiter::Dns));
    }

    #[test]
    fn an_arbiter_in_etcd_needs_a_cluster_and_tls_needs_an_authority() {
        let peer = "[[peer]]\nname = \"b\"\nkey = \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"\narbiter = \"etcd\"\n";
        let with = |lines: &str| format!("{SMALL}[etcd]\n{lines}\n{peer}");
        let message = error(&format!("{SMALL}{peer}"));
        assert!(message.contains("peer.b.arbiter") && message.contains("[etcd]"), "{message}");
        let plain = "endpoints = [\"http://192.0.2.1:2379\"]";
        let config = Config::parse(Path::new("site.toml"), &with(plain)).unwrap();
        assert_eq!(config.peer[0].arbiter, ArbiterChoice::Etcd);
        let tls = "endpoints = [\"https://192.0.2.1:2379\"]";
        Config::parse(Path::new("site.toml"), &with(&format!("{tls}\nca_file = \"/ca\""))).unwrap();
        for (lines, key) in [
            (tls.to_owned(), "etcd.ca_file"),
            (format!("{plain}\nkey_file = \"/k\""), "etcd.cert_file"),
            (format!("{plain}\nprefix = \"vm/\""), "etcd.prefix"),
            (format!("{plain}\nprefix = \"\""), "etcd.prefix"),
            (format!("{plain}\ntimeout_ms = 99"), "etcd.timeout_ms"),
            (format!("{plain}\ntimeout_ms = 4001"), "etcd.timeout_ms"),
            ("endpoints = []".to_owned(), "etcd.endpoints"),
            ("endpoints = [\"192.0.2.1:2379\"]".to_owned(), "is no endpoint"),
        ] {
            let message = error(&with(&lines));
            assert!(message.contains(key), "{message}");
        }
        for timeout_ms in [100, 4000] {
            let text = with(&format!("{plain}\ntimeout_ms = {timeout_ms}"));
            Config::parse(Path::new("site.toml"), &text).unwrap();
        }
    }

    #[test]
    fn a_peer_is_told_of_the_templates_that_are_named_and_of_none_by_default() {
        let peer = "[[peer]]\nname = \"b\"\nkey = \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"\n";
        let told = "templates = [\"debian-*\", \"plan9\"]\n";
        let message = error(&format!("{SMALL}{peer}{told}"));
        assert!(message.contains("peer.b.templates") && message.contains("storage.templates"), "{message}");
        let folder = "templates = \"/var/lib/longhaul/templates\"\n";
        let parsed = |told: &str| {
            let text = format!("{SMALL}{folder}{peer}{told}");
            Config::parse(Path::new("site.toml"), &text).unwrap()
        };
        let allowed = |told: &str, name: &str| parsed(told).peer[0].may_be_told(&name.parse().unwrap());
        assert!(allowed(told, "debian-12") && allowed(told, "plan9") && !allowed(told, "debian"));
        assert!(!allowed("", "debian-12"));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_what_was_expected() {
        let message = error(&SMALL.replace("pool =", "pol = 1\npool ="));
        assert!(message.starts_with("site.toml:5: pol: unknown field `pol`, expected"), "{message}");
    }

    #[test]
    fn a_wrong_value_is_named_with_its_line_and_key() {
        let message = error(&SMALL.replace("\"a\"", "\"A!\""));
        assert!(message.starts_with("site.toml:3: name:") && message.contains("a-z"), "{message}");
    }

    #[test]
    fn limits_are_taken_up_to_their_bounds_and_not_beyond() {
        let with = |line: &str| format!("{SMALL}[migration]\n{line}\n");
        for line in ["retries = 100", "retries = 0", "retry_delay_s = 600", "disk_map_mib = 4096"] {
            Config::parse(Path::new("site.toml"), &with(line)).unwrap();
        }
        for line in ["retries = 101", "retry_delay_s = 601", "retry_delay_s = 0", "disk_map_mib = 0"] {
            let key = line.split(' ').next().unwrap();
            assert!(error(&with(line)).contains(&format!("migration.{key}")), "{line}");
        }
    }

    #[test]
    fn keys_that_do_not_go_together_are_named() {
        let peer = "[[peer]]\nname = \"a\"\nkey = \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"\n";
        let message = error(&format!("{SMALL}{peer}"));
        assert!(message.contains("peer.a"), "{message}");
    }
}
