//! Checks that need more than one key.
//!
//! Nothing here looks at the machine it runs on: the daemon does before it makes anything, and `longhaul
//! doctor` does.

use std::collections::BTreeSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{ArbiterChoice, Config};

/// A key and what was expected of it.
pub(super) struct Conflict {
    pub(super) key: String,
    pub(super) message: String,
}

impl Config {
    pub(super) fn check(&self) -> Result<(), Conflict> {
        self.check_ranges()?;
        self.check_limits()?;
        self.check_lans()?;
        self.check_etcd()?;
        self.check_peers()
    }

    fn check_ranges(&self) -> Result<(), Conflict> {
        expect((1200..=9000).contains(&self.link.mtu_bytes), "link.mtu_bytes", "1200 to 9000")?;
        expect((1..=1024).contains(&self.link.window_mib), "link.window_mib", "1 to 1024")?;
        expect((1..=1024).contains(&self.link.socket_buffer_mib), "link.socket_buffer_mib", "1 to 1024")?;
        expect((1..=600).contains(&self.link.idle_timeout_s), "link.idle_timeout_s", "1 to 600")?;
        let accel = self.hypervisor.accel.as_str();
        expect(matches!(accel, "auto" | "kvm" | "tcg"), "hypervisor.accel", "auto, kvm or tcg")?;
        expect((1..=1024).contains(&self.migration.disk_flush_mib), "migration.disk_flush_mib", "1 to 1024")?;
        expect(
            (1..=60_000).contains(&self.migration.disk_flush_ms),
            "migration.disk_flush_ms",
            "1 to 60000",
        )?;
        expect((1..=4096).contains(&self.migration.disk_map_mib), "migration.disk_map_mib", "1 to 4096")?;
        expect(self.migration.retries <= 100, "migration.retries", "at most 100")?;
        expect((1..=600).contains(&self.migration.retry_delay_s), "migration.retry_delay_s", "1 to 600")?;
        if let Some(dns) = &self.dns {
            expect(!dns.servers.is_empty(), "dns.servers", "at least the primary server")?;
            expect((1..=3600).contains(&dns.move_ttl_s), "dns.move_ttl_s", "1 to 3600")?;
        }
        Ok(())
    }

    fn check_lans(&self) -> Result<(), Conflict> {
        let mut seen = BTreeSet::new();
        for (name, lan) in &self.lan {
            let key = format!("lan.{name}.care_of");
            let addresses =
                lan.care_of_addresses().map_err(|message| Conflict { key: key.clone(), message })?;
            for address in addresses {
                expect(seen.insert(address), &key, "addresses that stand only once")?;
            }
        }
        Ok(())
    }

    fn check_etcd(&self) -> Result<(), Conflict> {
        let Some(etcd) = &self.etcd else { return Ok(()) };
        expect(!etcd.endpoints.is_empty(), "etcd.endpoints", "at least one member of the cluster")?;
        let proven = etcd.ca_file.is_some() || etcd.endpoints.iter().all(|endpoint| !endpoint.tls);
        expect(proven, "etcd.ca_file", "the authority that signed the certificates of the https endpoints")?;
        let paired = etcd.cert_file.is_some() == etcd.key_file.is_some();
        expect(paired, "etcd.cert_file", "cert_file and key_file, or neither")?;
        let keyed = !etcd.prefix.is_empty() && !etcd.prefix.ends_with('/');
        expect(keyed, "etcd.prefix", "a text that does not end in '/'")?;
        expect((100..=4000).contains(&etcd.timeout_ms), "etcd.timeout_ms", "100 to 4000")
    }

    fn check_peers(&self) -> Result<(), Conflict> {
        let mut names = BTreeSet::from([&self.site.name]);
        let mut keys = BTreeSet::new();
        for peer in &self.peer {
            let key = format!("peer.{}", peer.name);
            expect(names.insert(&peer.name), &key, "a name that no other site has, this one included")?;
            let bytes = STANDARD.decode(&peer.key).ok().filter(|bytes| bytes.len() == 32);
            let text = "a public key as `longhaul key` prints it: 44 characters of base64";
            expect(bytes.is_some(), &format!("{key}.key"), text)?;
            expect(keys.insert(bytes), &format!("{key}.key"), "a key that no other peer has")?;
            let (arbitrates, text) = match peer.arbiter {
                ArbiterChoice::None => (true, ""),
                ArbiterChoice::Dns => (self.dns.is_some(), "\"none\", or a [dns] table beside \"dns\""),
                ArbiterChoice::Etcd => (self.etcd.is_some(), "\"none\", or an [etcd] table beside \"etcd\""),
            };
            expect(arbitrates, &format!("{key}.arbiter"), text)?;
            let told = peer.templates.is_empty() || self.storage.templates.is_some();
            expect(told, &format!("{key}.templates"), "none, or storage.templates beside them")?;
        }
        Ok(())
    }
}

pub(super) fn expect(holds: bool, key: &str, expected: &str) -> Result<(), Conflict> {
    if holds {
        return Ok(());
    }
    Err(Conflict { key: key.to_owned(), message: format!("expected {expected}") })
}
