//! The kernel command line of a guest, and what its console says.
//!
//! The guest is configured by words on the command line alone, so that one cached disk serves every scenario. Does
//! not describe the machine's hardware; see [`BootOptions::cmdline`] for what the command line expects of it.

use std::net::IpAddr;

/// Begins the console line that says: network up, web server and service answering. After it come `uptime=SECONDS`
/// and `boot=BOOT_ID`.
pub const READY: &str = "LONGHAUL-GUEST READY";
/// Begins the console line that says why the guest could not come up; it powers off after it.
pub const FAILED: &str = "LONGHAUL-GUEST FAILED";
/// Begins the console line of a clean shutdown, after the disks were made read-only.
pub const DOWN: &str = "LONGHAUL-GUEST DOWN";

/// How the kernel's own last words begin.
const KERNEL_FAILURES: [&str; 4] = ["Kernel panic", "Oops: ", "BUG: ", "general protection fault"];

/// The console's line that says that the guest cannot come up: its own words or the kernel's.
#[must_use]
pub fn failure(console: &str) -> Option<&str> {
    console
        .lines()
        .find(|line| line.contains(FAILED) || KERNEL_FAILURES.iter().any(|failure| line.contains(failure)))
}

/// One network interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// `eth0`, `eth1`, … in the order of PCI addresses, or a MAC address in lower case.
    pub key: String,
    /// Addresses with their prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default gateways, at most one per address family.
    pub gateways: Vec<IpAddr>,
}

impl Nic {
    /// An interface with one address and, perhaps, a default gateway.
    #[must_use]
    pub fn new(key: &str, address: IpAddr, prefix: u8, gateway: Option<IpAddr>) -> Self {
        Self {
            key: key.to_owned(),
            addresses: vec![(address, prefix)],
            gateways: gateway.into_iter().collect(),
        }
    }

    fn word(&self) -> String {
        let mut word = format!("lab.nic={}", self.key);
        for (address, prefix) in &self.addresses {
            word.push_str(&format!(",{address}/{prefix}"));
        }
        for gateway in &self.gateways {
            word.push_str(&format!(",gw={gateway}"));
        }
        word
    }
}

/// What one boot of the guest should do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootOptions {
    /// Interfaces to configure; others stay down.
    pub nics: Vec<Nic>,
    /// Kernel settings, for example `("net.ipv4.tcp_retries2", "8")`.
    pub sysctls: Vec<(String, String)>,
    /// The guest learns its router's link-layer address once and never again, whatever it is told.
    pub pin_router: bool,
    /// Runs a DHCP client on `eth0`. It configures nothing; it asks for a lease, and then again and again for its renewal.
    pub dhcp: bool,
    /// Arguments for the service in the guest, see [`crate::agent::AgentOptions`].
    pub agent: Vec<String>,
    /// Runs a shell on the console, for `cargo lab shell`.
    pub shell: bool,
    /// Shows the kernel's messages on the console; costs about half a second of boot under TCG.
    pub verbose: bool,
}

impl BootOptions {
    /// The kernel command line.
    ///
    /// It expects the root disk as the first virtio disk (`/dev/vda`), the second disk, if any, as `/dev/vdb`, and a
    /// serial port as console. A panic reboots at once (`panic=-1`), which shows on the console as a new boot.
    #[must_use]
    pub fn cmdline(&self) -> String {
        let loudness = if self.verbose { "loglevel=6" } else { "quiet loglevel=4" };
        let mut words = vec![
            "console=ttyS0 root=/dev/vda rw panic=-1 net.ifnames=0".to_owned(),
            // Under TCG the timer check can fail on a loaded host, and mitigations only cost.
            "no_timer_check mitigations=off random.trust_cpu=on".to_owned(),
            loudness.to_owned(),
        ];
        words.extend(self.nics.iter().map(Nic::word));
        words.extend(self.sysctls.iter().map(|(key, value)| format!("lab.sysctl={key}={value}")));
        for (set, word) in [(self.pin_router, "lab.pin=1"), (self.dhcp, "lab.dhcp=1")] {
            words.extend(set.then(|| word.to_owned()));
        }
        if !self.agent.is_empty() {
            words.push(format!("lab.agent={}", self.agent.join(",")));
        }
        if self.shell {
            words.push("lab.shell=1".to_owned());
        }
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_that_says_failure_is_understood() {
        let booting = "SeaBIOS\n[    0.1] Linux version 6.1\n";
        assert_eq!(failure(booting), None);
        for line in [
            "LONGHAUL-GUEST FAILED cannot mount /dev/vda",
            "[    1.0] Kernel panic - not syncing: Attempted to kill init!",
            "[    1.0] BUG: kernel NULL pointer dereference, address: 0000000000000008",
            "[    1.0] Oops: 0000 [#1] PREEMPT SMP",
        ] {
            assert_eq!(failure(&format!("{booting}{line}\n[    1.1] and more\n")), Some(line));
        }
    }

    #[test]
    fn the_command_line_carries_every_interface_setting_and_argument() {
        let options = BootOptions {
            nics: vec![
                Nic::new("eth0", "192.0.2.10".parse().unwrap(), 24, Some("192.0.2.1".parse().unwrap())),
                Nic::new("52:54:00:00:00:02", "2001:db8::2".parse().unwrap(), 64, None),
            ],
            sysctls: vec![("net.ipv4.tcp_retries2".into(), "8".into())],
            agent: vec!["--log-per-s".into(), "20".into()],
            pin_router: true,
            shell: true,
            ..BootOptions::default()
        };
        let line = options.cmdline();
        assert!(line.contains("lab.nic=eth0,192.0.2.10/24,gw=192.0.2.1"));
        assert!(line.contains("lab.nic=52:54:00:00:00:02,2001:db8::2/64"));
        assert!(line.contains("lab.sysctl=net.ipv4.tcp_retries2=8"));
        assert!(line.contains("lab.agent=--log-per-s,20"));
        assert!(line.contains("lab.pin=1") && !line.contains("lab.dhcp"));
        assert!(line.contains("root=/dev/vda") && line.contains("panic=-1") && line.contains("lab.shell=1"));
    }
}
