//! What a single value may be, where its type says too little: ranges, names, prefixes, patterns.
//!
//! Every number has an upper limit too: it is what keeps a slip of the pen from becoming a size or a time that
//! nothing on this host can have. Nothing here looks at the host.

use std::path::Path;

use longhaul_core::machine::{KernelName, LanName};
use longhaul_core::tunnel::handover::Prefix;

use super::Config;
use super::check::{Conflict, expect};

/// Many times the memory or disk of any host; beyond it, a number of bytes does not fit.
/// The highest rate of a link, in Mbit/s.
pub const MAX_RATE_MBIT: u64 = 1_000_000;
const MAX_MIB: u64 = 1 << 24;
const MAX_DESCRIPTORS: u64 = 1 << 20;
const MAX_GIB: u64 = 1 << 20;
/// A week.
const MAX_S: u64 = 7 * 24 * 3600;
/// The most machines that run under user ids of their own at once.
pub(crate) const UIDS: u32 = 1000;

impl Config {
    pub(super) fn check_limits(&self) -> Result<(), Conflict> {
        self.check_site_limits()?;
        self.check_tunnel_limits()?;
        self.check_migration_limits()?;
        self.check_dns_limits()?;
        self.check_names()?;
        self.check_peer_limits()
    }

    fn check_site_limits(&self) -> Result<(), Conflict> {
        let site = &self.site;
        expect(site.state_dir.is_absolute(), "site.state_dir", "a path that begins with '/'")?;
        expect(site.run_dir.is_absolute(), "site.run_dir", "a path that begins with '/'")?;
        expect(self.storage.pool.is_absolute(), "storage.pool", "a path that begins with '/'")?;
        let templates = self.storage.templates.as_ref().is_none_or(|folder| folder.is_absolute());
        expect(templates, "storage.templates", "a path that begins with '/'")?;
        let pool = &self.storage.pool;
        let apart = |folder: &Path| !folder.starts_with(pool) && !pool.starts_with(folder);
        let apart = self.storage.templates.as_deref().is_none_or(apart);
        expect(
            apart,
            "storage.templates",
            "a folder apart from storage.pool: peers are told of what is in it",
        )?;
        within(site.journal_free_mib, 0, MAX_MIB, "site.journal_free_mib")?;
        within(site.descriptors_free, 0, MAX_DESCRIPTORS, "site.descriptors_free")?;
        within(self.storage.keep_free_gib, 0, MAX_GIB, "storage.keep_free_gib")?;
        within(self.hypervisor.keep_free_mib, 0, MAX_MIB, "hypervisor.keep_free_mib")?;
        within(self.hypervisor.restart_starts.into(), 0, 1000, "hypervisor.restart_starts")?;
        within(self.hypervisor.restart_delay_ms, 1, 300_000, "hypervisor.restart_delay_ms")?;
        within(self.hypervisor.restart_steady_s, 1, MAX_S, "hypervisor.restart_steady_s")?;
        let first = self.hypervisor.uid_base;
        let last = u32::MAX - 1 - UIDS;
        let text = format!("0, or 1000 to {last}: {UIDS} user ids that nobody else has");
        expect(first == 0 || (1000..=last).contains(&first), "hypervisor.uid_base", &text)?;
        within(self.link.rate_mbit, 1, MAX_RATE_MBIT, "link.rate_mbit")?;
        expect(self.link.listen.port() > 0, "link.listen", "ADDRESS:PORT with a port that is not 0")
    }

    fn check_tunnel_limits(&self) -> Result<(), Conflict> {
        let tunnel = &self.tunnel;
        expect(is_interface(&tunnel.device), "tunnel.device", INTERFACE)?;
        within(tunnel.machine_mbit, 0, 1_000_000, "tunnel.machine_mbit")?;
        within(tunnel.machine_burst_kib, 64, 64 << 10, "tunnel.machine_burst_kib")?;
        within(tunnel.one_way_s, 1, 3600, "tunnel.one_way_s")?;
        within(tunnel.duplicate_silent_s, 5, MAX_S, "tunnel.duplicate_silent_s")?;
        within(tunnel.quiet_s, 1, MAX_S, "tunnel.quiet_s")?;
        within(tunnel.hold_kib, 64, 1 << 20, "tunnel.hold_kib")?;
        within(tunnel.idle_s, 1, MAX_S, "tunnel.idle_s")?;
        within(tunnel.closing_s, 1, MAX_S, "tunnel.closing_s")?;
        within(tunnel.udp_idle_s, 1, MAX_S, "tunnel.udp_idle_s")?;
        within(tunnel.other_idle_s, 1, MAX_S, "tunnel.other_idle_s")?;
        within(tunnel.max_flows.into(), 1, 1 << 24, "tunnel.max_flows")?;
        within(tunnel.repair_kib, 64, 64 << 10, "tunnel.repair_kib")?;
        within(tunnel.router_advertisements_s, 4, 1800, "tunnel.router_advertisements_s")?;
        let hold_s = tunnel.hold.limit().map_or(1, |limit| limit.as_secs());
        within(hold_s, 1, 366 * 24 * 3600, "tunnel.hold")?;
        for prefix in tunnel.home_prefixes.iter().flatten() {
            let text = format!("ADDRESS/LENGTH, not {prefix:?}");
            expect(parse_prefix(prefix).is_some(), "tunnel.home_prefixes", &text)?;
        }
        Ok(())
    }

    fn check_migration_limits(&self) -> Result<(), Conflict> {
        let migration = &self.migration;
        within(migration.pause_target_ms, 1, 600_000, "migration.pause_target_ms")?;
        within(migration.pause_limit_s, 1, 3600, "migration.pause_limit_s")?;
        within(migration.pause_budget_s, 1, 3600, "migration.pause_budget_s")?;
        within(migration.cut_limit_s, 0, MAX_S, "migration.cut_limit_s")?;
        within(migration.shadow_mib.into(), 0, 16_384, "migration.shadow_mib")?;
        within(migration.keep_memory_gib, 1, 65_536, "migration.keep_memory_gib")?;
        within(migration.content_index_mib, 0, 65_536, "migration.content_index_mib")?;
        within(migration.max_throttle_percent.into(), 0, 99, "migration.max_throttle_percent")?;
        within(migration.disk_window_mib.into(), 1, 512, "migration.disk_window_mib")?;
        within(migration.disk_buffer_mib, 1, 65_536, "migration.disk_buffer_mib")
    }

    fn check_dns_limits(&self) -> Result<(), Conflict> {
        let Some(dns) = &self.dns else { return Ok(()) };
        within(dns.timeout_ms, 1, 60_000, "dns.timeout_ms")?;
        within(dns.secondary_poll_s, 1, 3600, "dns.secondary_poll_s")?;
        within(dns.secondary_warn_s, 1, MAX_S, "dns.secondary_warn_s")?;
        within(dns.secondary_silent_s, 0, MAX_S, "dns.secondary_silent_s")?;
        let ports = dns.servers.iter().all(|server| server.port() > 0);
        expect(ports, "dns.servers", "ADDRESS:PORT with a port that is not 0")?;
        let zone = dns.zone.parse::<dnsupdater::DnsName>().is_ok();
        expect(zone, "dns.zone", "a DNS name such as \"example.net.\"")
    }

    fn check_names(&self) -> Result<(), Conflict> {
        for (name, lan) in &self.lan {
            let text = "a name of 1 to 32 characters of A-Z, a-z, 0-9, '.', '_' and '-'";
            expect(name.parse::<LanName>().is_ok(), &format!("lan.{name}"), text)?;
            expect(is_interface(&lan.bridge), &format!("lan.{name}.bridge"), INTERFACE)?;
        }
        for name in self.kernel.keys() {
            let text = "a name of 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'";
            expect(name.parse::<KernelName>().is_ok(), &format!("kernel.{name}"), text)?;
        }
        Ok(())
    }

    fn check_peer_limits(&self) -> Result<(), Conflict> {
        for peer in &self.peer {
            let key = |name: &str| format!("peer.{}.{name}", peer.name);
            within(peer.max_memory_mib, 0, MAX_MIB, &key("max_memory_mib"))?;
            within(peer.max_disk_gib, 0, MAX_GIB, &key("max_disk_gib"))?;
            let port = peer.address.is_none_or(|address| address.port() > 0);
            expect(port, &key("address"), "ADDRESS:PORT with a port that is not 0")?;
            for (name, what, patterns) in [
                ("may_send", "machines", &peer.may_send),
                ("may_receive", "machines", &peer.may_receive),
                ("templates", "templates", &peer.templates),
            ] {
                for pattern in patterns {
                    let text = format!("names of {what} with at most one '*', not {pattern:?}");
                    expect(is_pattern(pattern), &key(name), &text)?;
                }
            }
        }
        Ok(())
    }
}

/// `ADDRESS/LENGTH` of either family.
pub(crate) fn parse_prefix(text: &str) -> Option<Prefix> {
    let (addr, len) = text.split_once('/')?;
    let prefix = Prefix { addr: addr.parse().ok()?, len: len.parse().ok()? };
    let longest = if prefix.addr.is_ipv4() { 32 } else { 128 };
    (prefix.len <= longest).then_some(prefix)
}

fn within(value: u64, least: u64, most: u64, key: &str) -> Result<(), Conflict> {
    expect((least..=most).contains(&value), key, &format!("{least} to {most}, not {value}"))
}

const INTERFACE: &str =
    "an interface's name: 1 to 15 characters without '/', ':' or space, and neither \".\" nor \"..\"";

/// What the kernel takes as an interface's name. Linux, `dev_valid_name`.
fn is_interface(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | ',');
    (1..=15).contains(&name.len()) && !matches!(name, "." | "..") && name.chars().all(allowed)
}

fn is_pattern(pattern: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '*');
    !pattern.is_empty() && pattern.chars().all(allowed) && pattern.matches('*').count() <= 1
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// What is said of a file with `line` in `table`; the line is the fifth.
    #[track_caller]
    fn error(table: &str, line: &str) -> String {
        let site = "[site]\nname = \"a\"\n";
        let text = match table {
            "site" => format!("{site}\n\n{line}\n[storage]\npool = \"/p\"\n"),
            "storage" if line.starts_with("pool") => format!("{site}\n[storage]\n{line}\n"),
            "storage" => format!("{site}[storage]\npool = \"/p\"\n{line}\n"),
            "dns" => format!(
                "{site}\n[dns]\n{line}\n{}[storage]\npool = \"/p\"\n",
                "servers = [\"192.0.2.1:53\"]\nzone = \"example.net.\"\nkey_file = \"/k\"\n"
                    .lines()
                    .filter(|it| it.split(' ').next() != line.split(' ').next())
                    .fold(String::new(), |text, it| text + it + "\n")
            ),
            "[peer]" => format!(
                "{site}\n[[peer]]\n{line}\nname = \"b\"\nkey = \"{}=\"\n[storage]\npool = \"/p\"\n",
                "A".repeat(43)
            ),
            "lan.l" if !line.starts_with("bridge") => {
                format!("{site}\n[lan.l]\n{line}\nbridge = \"b\"\n[storage]\npool = \"/p\"\n")
            }
            _ => format!("{site}\n[{table}]\n{line}\n[storage]\npool = \"/p\"\n"),
        };
        Config::parse(Path::new("t.toml"), &text).map(drop).unwrap_err().to_string()
    }

    #[test]
    fn every_value_out_of_its_range_is_named_with_file_line_key_and_what_was_expected() {
        for (table, line, key) in [
            ("site", "run_dir = \"run\"", "site.run_dir"),
            ("site", "state_dir = \"state\"", "site.state_dir"),
            ("site", "journal_free_mib = 16777217", "site.journal_free_mib"),
            ("site", "descriptors_free = 1048577", "site.descriptors_free"),
            ("storage", "pool = \"disks\"", "storage.pool"),
            ("storage", "keep_free_gib = 1048577", "storage.keep_free_gib"),
            ("link", "rate_mbit = 0", "link.rate_mbit"),
            ("link", "rate_mbit = 1000001", "link.rate_mbit"),
            ("link", "mtu_bytes = 1199", "link.mtu_bytes"),
            ("link", "listen = \"0.0.0.0:0\"", "link.listen"),
            ("hypervisor", "uid_base = 999", "hypervisor.uid_base"),
            ("hypervisor", "uid_base = 4294967295", "hypervisor.uid_base"),
            ("hypervisor", "keep_free_mib = 16777217", "hypervisor.keep_free_mib"),
            ("hypervisor", "restart_starts = 1001", "hypervisor.restart_starts"),
            ("hypervisor", "restart_delay_ms = 0", "hypervisor.restart_delay_ms"),
            ("hypervisor", "restart_delay_ms = 300001", "hypervisor.restart_delay_ms"),
            ("hypervisor", "restart_steady_s = 0", "hypervisor.restart_steady_s"),
            ("hypervisor", "accel = \"xen\"", "hypervisor.accel"),
            ("tunnel", "device = \"a/b\"", "tunnel.device"),
            ("tunnel", "device = \"sixteen-letters-\"", "tunnel.device"),
            ("tunnel", "hold_kib = 63", "tunnel.hold_kib"),
            ("tunnel", "hold_kib = 1048577", "tunnel.hold_kib"),
            ("tunnel", "idle_s = 0", "tunnel.idle_s"),
            ("tunnel", "closing_s = 0", "tunnel.closing_s"),
            ("tunnel", "udp_idle_s = 0", "tunnel.udp_idle_s"),
            ("tunnel", "other_idle_s = 0", "tunnel.other_idle_s"),
            ("tunnel", "max_flows = 0", "tunnel.max_flows"),
            ("tunnel", "max_flows = 16777217", "tunnel.max_flows"),
            ("tunnel", "repair_kib = 63", "tunnel.repair_kib"),
            ("tunnel", "repair_kib = 65537", "tunnel.repair_kib"),
            ("tunnel", "quiet_s = 604801", "tunnel.quiet_s"),
            ("tunnel", "machine_mbit = 1000001", "tunnel.machine_mbit"),
            ("tunnel", "machine_burst_kib = 63", "tunnel.machine_burst_kib"),
            ("tunnel", "machine_burst_kib = 65537", "tunnel.machine_burst_kib"),
            ("tunnel", "one_way_s = 0", "tunnel.one_way_s"),
            ("tunnel", "one_way_s = 3601", "tunnel.one_way_s"),
            ("tunnel", "duplicate_silent_s = 4", "tunnel.duplicate_silent_s"),
            ("tunnel", "duplicate_silent_s = 604801", "tunnel.duplicate_silent_s"),
            ("tunnel", "router_advertisements_s = 3", "tunnel.router_advertisements_s"),
            ("tunnel", "router_advertisements_s = 1801", "tunnel.router_advertisements_s"),
            ("tunnel", "home_prefixes = [\"banana\"]", "tunnel.home_prefixes"),
            ("tunnel", "home_prefixes = [\"192.0.2.0/33\"]", "tunnel.home_prefixes"),
            ("migration", "disk_buffer_mib = 0", "migration.disk_buffer_mib"),
            ("migration", "disk_buffer_mib = 65537", "migration.disk_buffer_mib"),
            ("migration", "shadow_mib = 16385", "migration.shadow_mib"),
            ("migration", "keep_memory_gib = 0", "migration.keep_memory_gib"),
            ("migration", "keep_memory_gib = 65537", "migration.keep_memory_gib"),
            ("migration", "content_index_mib = 65537", "migration.content_index_mib"),
            ("migration", "max_throttle_percent = 100", "migration.max_throttle_percent"),
            ("migration", "disk_window_mib = 0", "migration.disk_window_mib"),
            ("migration", "disk_window_mib = 513", "migration.disk_window_mib"),
            ("migration", "pause_budget_s = 0", "migration.pause_budget_s"),
            ("migration", "cut_limit_s = 604801", "migration.cut_limit_s"),
            ("dns", "zone = \"a b..\"", "dns.zone"),
            ("dns", "timeout_ms = 0", "dns.timeout_ms"),
            ("dns", "secondary_poll_s = 0", "dns.secondary_poll_s"),
            ("dns", "secondary_poll_s = 3601", "dns.secondary_poll_s"),
            ("dns", "secondary_warn_s = 0", "dns.secondary_warn_s"),
            ("dns", "secondary_silent_s = 604801", "dns.secondary_silent_s"),
            ("lan.l", "bridge = \"br 0\"", "lan.l.bridge"),
            ("lan.l", "care_of = [\"x\"]", "lan.l.care_of"),
            ("[peer]", "may_send = [\"w*b*\"]", "peer.b.may_send"),
            ("[peer]", "may_receive = [\"\"]", "peer.b.may_receive"),
            ("[peer]", "max_disk_gib = 1048577", "peer.b.max_disk_gib"),
            ("[peer]", "max_memory_mib = 16777217", "peer.b.max_memory_mib"),
        ] {
            let message = error(table, line);
            assert!(message.starts_with(&format!("t.toml:5: {key}: ")), "{line}: {message}");
        }
    }

    #[test]
    fn a_folder_of_templates_has_a_full_path_and_its_templates_have_names() {
        let message = error("storage", "templates = \"templates\"");
        assert!(message.starts_with("t.toml:5: storage.templates: "), "{message}");
        let message = error("storage", "templates = \"/p/templates\"");
        assert!(message.contains("apart from storage.pool"), "{message}");
        let message = error("[peer]", "templates = [\"../debian\"]");
        assert!(message.starts_with("t.toml:5: peer.b.templates: "), "{message}");
    }

    #[test]
    fn a_word_that_is_none_of_a_keys_is_named_with_those_that_are() {
        let message = error("link", "congestion = \"cubic\"");
        assert!(message.starts_with("t.toml:5: congestion: "), "{message}");
        assert!(message.contains("`model` or `fixed`"), "{message}");
        let message = error("migration", "commit = \"later\"");
        assert!(message.starts_with("t.toml:5: commit: "), "{message}");
        assert!(message.contains("`confirmed` or `pipelined`"), "{message}");
    }

    #[test]
    fn a_name_that_no_definition_can_use_is_refused() {
        let message = error("lan.\"a b\"", "bridge = \"br0\"");
        assert!(message.starts_with("t.toml:4: lan.a b: "), "{message}");
        let message = error("kernel.\"a b\"", "image = \"/k\"");
        assert!(message.starts_with("t.toml:4: kernel.a b: "), "{message}");
    }
}
