//! The tables of the configuration file, key by key.
//!
//! Field names are the keys. Rates are decimal megabits, sizes binary megabytes or gigabytes, times
//! carry their unit in the key. Values are checked here where one key decides, in `check` where
//! several do.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use longhaul_core::ids::{SiteName, TemplateName};
use longhaul_core::migration::CommitMode;
use longhaul_core::migration::arbiter::Arbiter;
use longhaul_core::migration::retry::RetryLimits;
use longhaul_core::tunnel::flows::HoldLimit;

/// `[site]`: who this site is and where its daemon keeps things.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteConfig {
    /// This site's name, as its peers call it. Required.
    pub name: SiteName,
    /// The site's private key, made by `longhaul key` (default `/etc/longhaul/key`). Whoever has it is
    /// this site.
    #[serde(default = "default_key")]
    pub key_file: PathBuf,
    /// Journal and definitions (default `/var/lib/longhaul`). Lose it and recovery needs an operator.
    #[serde(default = "default_state")]
    pub state_dir: PathBuf,
    /// Space that must be free where the journal is before a migration begins, in MiB (default 64; 0 asks for
    /// none). Records that cannot be written stop a migration in the middle.
    #[serde(default = "default_journal_free")]
    pub journal_free_mib: u64,
    /// How many files and sockets the gateway must still be allowed to open before a migration begins (default 256; 0 asks
    /// for none). Without descriptors what runs already breaks.
    #[serde(default = "default_descriptors_free")]
    pub descriptors_free: u64,
    /// Sockets and pid files (default `/run/longhaul`). Empty after a reboot.
    #[serde(default = "default_run")]
    pub run_dir: PathBuf,
    /// The program that holds off a reboot of this host while connections of machines that left go through it (default
    /// `systemd-inhibit`; empty: nothing does). A reboot then has to be insisted on.
    #[serde(default = "default_inhibitor")]
    pub shutdown_inhibitor: PathBuf,
    /// The API's UNIX socket (default `<run_dir>/api.sock`). Whoever can write to it can move machines.
    #[serde(default)]
    pub api_socket: Option<PathBuf>,
}

impl SiteConfig {
    /// The API's socket.
    pub fn api_socket(&self) -> PathBuf {
        self.api_socket.clone().unwrap_or_else(|| self.run_dir.join("api.sock"))
    }
}

/// `[link]`: the one UDP port between sites.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkSection {
    /// The address and port to listen on and to dial from (default `0.0.0.0:4789`).
    pub listen: SocketAddr,
    /// The most that is sent to a peer, in Mbit/s (default 100). Too low leaves the link unused. What the path
    /// carries at present is found within it, so that it need not be exact unless `congestion` is `"fixed"`; QEMU may
    /// write up to sixteen times as much, for what the other site has already is hardly sent.
    pub rate_mbit: u64,
    /// How that is found (default `"model"`: from what the path delivers, like BBR). `"fixed"` sends at
    /// `rate_mbit` whatever happens, for a path that carries exactly that and nothing else: on another one it fills
    /// queues and hurts others.
    pub congestion: CongestionChoice,
    /// The largest UDP payload the path carries unfragmented, in bytes (default 1400). Too high and nothing
    /// passes at all.
    pub mtu_bytes: u16,
    /// The most bulk data in flight per channel, in MiB (default 64). Three round trips of at least 100 ms at
    /// `rate_mbit` are used, and at least 4 MiB; less for memory. Too low limits the rate to a third of it per round trip; too high costs memory at either site.
    pub window_mib: u64,
    /// The kernel's buffers of the UDP socket, in MiB (default 8).
    pub socket_buffer_mib: u64,
    /// A connection without a sign of life for this long is given up and made anew (default 10 s).
    pub idle_timeout_s: u64,
}

impl Default for LinkSection {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 4789)),
            rate_mbit: 100,
            congestion: CongestionChoice::default(),
            mtu_bytes: 1400,
            window_mib: 64,
            socket_buffer_mib: 8,
            idle_timeout_s: 10,
        }
    }
}

/// `link.congestion`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CongestionChoice {
    /// What the path carries at present is estimated.
    #[default]
    Model,
    /// It is `rate_mbit`.
    Fixed,
}

/// `[lan.NAME]`: a network that machines are connected to.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanConfig {
    /// The Linux bridge that carries it. Required; the gateway does not create it.
    pub bridge: String,
    /// Addresses of this LAN that visiting machines may be given, each `ADDRESS` or `FIRST-LAST`
    /// (default none: no machine can visit with names following). They must be free and routed here.
    #[serde(default)]
    pub care_of: Vec<String>,
}

/// `[storage]`: where disks are kept.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageConfig {
    /// The folder for disks of machines that arrive. Required; it must exist.
    pub pool: PathBuf,
    /// Space that arrivals leave free, in GiB (default 1).
    #[serde(default = "default_reserve")]
    pub keep_free_gib: u64,
    /// Days for which the disk of a machine that left is kept aside (default 30; 0: until an operator removes
    /// it). It is a copy of before the move, and takes the space it took.
    #[serde(default = "default_kept_days")]
    pub keep_moved_disks_d: u64,
    /// How many of them are kept of one disk of one machine, the newest (default 1; 0: all). A machine that comes
    /// back sends only what changed since the newest; each more takes the space it took.
    #[serde(default = "default_kept_count")]
    pub keep_moved_disks_count: usize,
    /// How long what an attempt copied of a machine's disks is kept, in hours, when the machine did not come
    /// (default 24; 0 throws it away at once). The next attempt sends only what differs.
    #[serde(default = "default_keep_partial")]
    pub keep_partial_h: u64,
    /// The most such disks (default 16). The oldest go first.
    #[serde(default = "default_keep_partial_count")]
    pub keep_partial_count: usize,
    /// The most space they take together, in GiB (default 100). They also go when an arrival needs room.
    #[serde(default = "default_keep_partial_gib")]
    pub keep_partial_gib: u64,
    /// A folder of raw images `NAME.raw` that machines of other sites are cloned from (default none). A machine whose
    /// definition names one brings only what changed since. The image is read once for each such disk.
    #[serde(default)]
    pub templates: Option<PathBuf>,
}

/// `[hypervisor]`: how QEMU is run.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HypervisorSection {
    /// QEMU's binary (default `qemu-system-x86_64`).
    pub qemu: PathBuf,
    /// `auto`, `kvm` or `tcg` (default `auto`: KVM where a trial guest runs under it).
    pub accel: String,
    /// The first of the user ids that machines run under, each its own (default 0: all run as the
    /// daemon's user, which gives a guest that breaks out of QEMU the daemon's rights).
    pub uid_base: u32,
    /// Memory that arrivals leave free, in MiB (default 256).
    pub keep_free_mib: u64,
    /// Definitions may name the CPU model `host` (default false): such a machine moves only between
    /// equal CPUs.
    pub allow_host_cpu: bool,
    /// UEFI firmware code image (default none: machines with `uefi` are refused).
    pub uefi_code: Option<PathBuf>,
    /// How often in a row a machine with `restart = "on-crash"` is booted again (default 5; 0: never).
    pub restart_starts: u32,
    /// The wait before the first of these starts, in ms (default 1000); each later one waits twice as long, at most
    /// five minutes.
    pub restart_delay_ms: u64,
    /// A machine that has run for this long since its last start begins a new row (default 600 s).
    pub restart_steady_s: u64,
}

impl Default for HypervisorSection {
    fn default() -> Self {
        Self {
            qemu: PathBuf::from("qemu-system-x86_64"),
            accel: "auto".into(),
            uid_base: 0,
            keep_free_mib: 256,
            allow_host_cpu: false,
            uefi_code: None,
            restart_starts: 5,
            restart_delay_ms: 1000,
            restart_steady_s: 600,
        }
    }
}

/// `[kernel.NAME]`: a kernel for machines that boot without a boot loader.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelConfig {
    /// The kernel image. Required. Both sites need the same file; definitions pin its SHA-256.
    pub image: PathBuf,
    /// Its initial RAM disk (default none).
    #[serde(default)]
    pub initrd: Option<PathBuf>,
}

/// `[tunnel]`: how open connections follow a machine.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TunnelSection {
    /// The TUN device's name (default `lh0`).
    pub device: String,
    /// What one machine may take of the tunnel, in Mbit/s in each direction (default 0: whatever it wants, as machines in a
    /// LAN do). What is more is dropped, and counted; the others and the control messages keep theirs.
    pub machine_mbit: u64,
    /// What it may take at once beyond that, in KiB (default 1024). Less cuts bursts that the path would have carried.
    pub machine_burst_kib: u64,
    /// A connection of which one end has sent for this long, while the other is silent, counts as heard from one end only
    /// (default 30 s). Shorter names those that only wait for a slow answer.
    pub one_way_s: u64,
    /// An attracted address that another host uses is that host's until it was silent for this long, although it is
    /// asked (default 60 s). Shorter takes it away from a host that is being rebooted.
    pub duplicate_silent_s: u64,
    /// The tunnel ends when no old flow is left, the old name has expired and there was no new flow for this long: from
    /// outside, taken up by the guest, or the guest's own to its home (default 86400 s: some clients have the number
    /// written down).
    pub quiet_s: u64,
    /// Packets held during the pause, in KiB per machine (default 4096); beyond it the oldest are dropped.
    pub hold_kib: u64,
    /// A TCP connection without packets counts as ended after this long (default 7440 s, RFC 5382).
    pub idle_s: u64,
    /// The same for a TCP connection that one end has closed (default 240 s, RFC 5382).
    pub closing_s: u64,
    /// The same for UDP (default 300 s, RFC 4787).
    pub udp_idle_s: u64,
    /// The same for other protocols (default 1800 s).
    pub other_idle_s: u64,
    /// Flows that are told apart per NIC (default 65536: 9 MiB when all are there; at most 16777216). Those beyond it hold
    /// the tunnel for `idle_s`. Of those that are open when a machine leaves, 65535 at most are handed over.
    pub max_flows: u32,
    /// How long the tunnel stays at most, whatever is open: `until-drained` (default), or a time such as `24h`.
    pub hold: HoldLimit,
    /// The WAN's loss is hidden from TCP connections in the tunnel (default true): lost packets are repeated, and only
    /// their own connection waits for them.
    pub repair_tcp: bool,
    /// The same for UDP (default false: most of what cannot wait is UDP).
    pub repair_udp: bool,
    /// What is kept of the packets to each peer until it has them, and of its packets that wait for lost ones, in KiB
    /// each (default 24576: 400 ms at 500 Mbit/s; at most 65536). Less repairs less of a fast connection.
    pub repair_kib: u64,
    /// UDP ports, at either end, for which it is hidden all the same, such as 443 for QUIC (default none).
    pub repair_udp_ports: Vec<u16>,
    /// The same for all other protocols (default true).
    pub repair_other: bool,
    /// Destinations that visiting machines of this home always reach through the tunnel, as `PREFIX/LEN`
    /// (default: the LANs of the machine's own home addresses, and the home's private resolvers and time servers outside of
    /// them that are known, 32 per NIC at most: [`longhaul_core::tunnel::home_servers`]). A list takes the default's place.
    pub home_prefixes: Option<Vec<String>>,
    /// How often a visiting machine hears the router advertisements of its home, imitated (default 200 s; 4 to 1800, as
    /// RFC 4861 has it), and more often where something they say would run out within three times that.
    pub router_advertisements_s: u64,
}

impl Default for TunnelSection {
    fn default() -> Self {
        Self {
            device: "lh0".into(),
            machine_mbit: 0,
            machine_burst_kib: 1024,
            one_way_s: 30,
            duplicate_silent_s: 60,
            quiet_s: 24 * 3600,
            hold_kib: 4096,
            idle_s: 7440,
            closing_s: 240,
            udp_idle_s: 300,
            other_idle_s: 1800,
            max_flows: 65_536,
            hold: HoldLimit::UntilDrained,
            repair_tcp: true,
            repair_udp: false,
            repair_kib: 24 << 10,
            repair_udp_ports: Vec::new(),
            repair_other: true,
            home_prefixes: None,
            router_advertisements_s: 200,
        }
    }
}

/// `[dns]`: the name server that is updated when a machine of this site moves.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsConfig {
    /// The authoritative servers, the primary first. Required.
    pub servers: Vec<SocketAddr>,
    /// The zone. Required.
    pub zone: String,
    /// A file with the TSIG key, as `tsig-keygen` writes it or `NAME:ALGORITHM:BASE64`. Required. Whoever
    /// has it can rewrite what its update policy allows.
    pub key_file: PathBuf,
    /// The TTL during a move, in seconds (default 5): how long new clients may still go to the old
    /// address.
    #[serde(default = "default_ttl")]
    pub move_ttl_s: u32,
    /// An answer is waited for this long (default 3000 ms).
    #[serde(default = "default_dns_timeout")]
    pub timeout_ms: u64,
    /// How often every name server of the zone is asked whether it has a name that moved, at most (default 5 s). Each time
    /// costs a connection and three questions per server, until the last one has it.
    #[serde(default = "default_secondary_poll")]
    pub secondary_poll_s: u64,
    /// A name server that does not have it after this long is worth a warning (default 60 s).
    #[serde(default = "default_secondary_warn")]
    pub secondary_warn_s: u64,
    /// One that does not answer at all is waited for this long (default 900 s). More keeps tunnels for a server that is
    /// gone; less forgets one that comes back with old answers.
    #[serde(default = "default_secondary_silent")]
    pub secondary_silent_s: u64,
}

/// `[migration]`: budgets of a migration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationSection {
    /// The pause to aim at, beyond the round trips that it cannot avoid (default 300 ms). Lower costs more
    /// rounds.
    pub pause_target_ms: u64,
    /// No pause longer than this is begun (default 30 s).
    pub pause_limit_s: u64,
    /// How much longer than predicted the guest may stand still before it is resumed at the source
    /// (default 5 s).
    pub pause_budget_s: u64,
    /// When a machine is given away where no arbiter decides: `pipelined`, as soon as no more than the path holds is left to
    /// come (default), or `confirmed`, after the other site has said that it is loaded there. The first takes a round trip out
    /// of the pause; a cut of the link while that travels then leaves the machine standing until the link is back, where the
    /// second resumes it. The site that the machine leaves decides.
    pub commit: CommitChoice,
    /// A cut of the link that the copy outlasts (default 600 s).
    pub cut_limit_s: u64,
    /// Buffer for disk writes that wait for the WAN, in MiB per disk (default 64); beyond it they are read
    /// again later.
    pub disk_buffer_mib: u64,
    /// Memory for what the other site tells of a disk that it kept from an earlier attempt, in MiB per disk
    /// (default 64: 27 GiB of content by its parts of 4 KiB, 64 GiB more by blocks of 64 KiB). What finds no room is sent again.
    pub disk_map_mib: u64,
    /// Memory for pages that were sent, in MiB per migration (default 1024; 0 remembers none). A page that is sent again then
    /// travels as what changed of it. Both sites need it while a machine's memory travels, no more than the machine has,
    /// and the smaller of their limits holds. For a machine with more memory the pages sent last are remembered.
    pub shadow_mib: u32,
    /// Those pages are kept in `state_dir` by both sites after a move (default true), so that the way back sends what changed
    /// since: files with the guest's memory, for root alone, as old as its disks are kept at most.
    pub keep_memory: bool,
    /// How much all of them may take, in GiB (default 8: seven machines with all that the default of `shadow_mib` allows; 1 to 65,536). The
    /// oldest are removed for a new one. More brings more machines back fast; 1 GiB beside the journal stays free anyway.
    pub keep_memory_gib: u64,
    /// Memory at the source for where on the machine's disks which content stands, in MiB per migration (default 64: 3.2 GiB of
    /// distinct content; 0: none). A page of memory that holds the same, as the page cache does, then travels as a place.
    pub content_index_mib: u64,
    /// How far back in what was sent of a disk equal content is found, in MiB (default 64; 1 to 512, a power of two, or the
    /// next below). Both sites need that much memory per disk while it travels, and the smaller of their limits holds.
    pub disk_window_mib: u32,
    /// How much of its processors' time a guest may be denied, in percent, when it changes its memory as fast as the link
    /// carries it and the copy would never end (default 80; 0 never, at most 99). QEMU begins with 20 and adds 10 each
    /// time that is not enough; it ends with the move. A guest that writes its disks so may write half of what the link
    /// carries, then half of that. With 0, as with `--no-throttle`, a move that would never end is given up.
    pub max_throttle_percent: u32,
    /// A disk that arrives is flushed after this much, in MiB (default 4). What is not flushed when the guest
    /// stops lengthens its pause; less costs a slow disk more flushes while it fills.
    pub disk_flush_mib: u64,
    /// And at least this often while there is something to flush (default 100 ms). The same cost.
    pub disk_flush_ms: u64,
    /// How often a machine that stayed for a reason that passes (a pause that took too long, a restarted
    /// gateway at the other site) is tried again without being asked (default 3; 0 is never). Each retry
    /// pauses the guest once more.
    pub retries: u32,
    /// The wait before the first of them (default 2 s), doubled each time.
    pub retry_delay_s: u64,
}

impl Default for MigrationSection {
    fn default() -> Self {
        Self {
            pause_target_ms: 300,
            pause_limit_s: 30,
            pause_budget_s: 5,
            commit: CommitChoice::Pipelined,
            cut_limit_s: 600,
            disk_buffer_mib: 64,
            disk_map_mib: 64,
            shadow_mib: 1024,
            keep_memory: true,
            keep_memory_gib: 8,
            content_index_mib: 64,
            disk_window_mib: 64,
            max_throttle_percent: 80,
            disk_flush_mib: 4,
            disk_flush_ms: 100,
            retries: 3,
            retry_delay_s: 2,
        }
    }
}

/// `migration.commit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CommitChoice {
    /// After Loaded.
    Confirmed,
    /// Right behind the last byte.
    Pipelined,
}

impl CommitChoice {
    /// How machines are handed over then, without an arbiter.
    pub fn mode(self) -> CommitMode {
        match self {
            Self::Confirmed => CommitMode::Confirmed,
            Self::Pipelined => CommitMode::Pipelined,
        }
    }
}

impl MigrationSection {
    /// How often and how soon a machine that stayed is tried again.
    pub fn retry_limits(&self) -> RetryLimits {
        RetryLimits { retries: self.retries, first_delay: Duration::from_secs(self.retry_delay_s) }
    }
}

/// `[[peer]]`: another site.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its name. Required.
    pub name: SiteName,
    /// Its public key, printed by `longhaul key` there. Required.
    pub key: String,
    /// Where to dial it (default none: it dials us).
    #[serde(default)]
    pub address: Option<SocketAddr>,
    /// Machines it may send us, names with `*` (default none).
    #[serde(default)]
    pub may_send: Vec<String>,
    /// Machines it may receive from us, names with `*` (default none).
    #[serde(default)]
    pub may_receive: Vec<String>,
    /// The most memory one machine from it may have, in MiB (default 0: none may come).
    #[serde(default)]
    pub max_memory_mib: u64,
    /// The most disk one machine from it may have, in GiB (default 0: none may come).
    #[serde(default)]
    pub max_disk_gib: u64,
    /// How many machines from it may be on their way here at once (default 4). Each takes a QEMU, a
    /// care-of address and its windows while it comes.
    #[serde(default = "default_max_arriving")]
    pub max_arriving: u32,
    /// Templates of this site that it may be told of, names with `*` (default none). It learns hashes of their blocks, and
    /// from these whether a block that it knows is in one.
    #[serde(default)]
    pub templates: Vec<String>,
    /// Who decides who has a machine when this link is cut in the middle of a hand-over: `none` (default), `dns` or
    /// `etcd`.
    #[serde(default)]
    pub arbiter: ArbiterChoice,
}

/// `peer.arbiter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ArbiterChoice {
    /// Nobody: who is in doubt waits for the other site.
    #[default]
    None,
    /// The ownership record beside the machine's name.
    Dns,
    /// The machine's key in etcd.
    Etcd,
}

impl ArbiterChoice {
    /// Whose register decides then.
    pub fn arbiter(self) -> Option<Arbiter> {
        match self {
            Self::None => None,
            Self::Dns => Some(Arbiter::Dns),
            Self::Etcd => Some(Arbiter::Etcd),
        }
    }
}

impl PeerConfig {
    /// Whether it may send us machines called `vm`.
    pub fn may_send(&self, vm: &str) -> bool {
        self.may_send.iter().any(|pattern| matches_pattern(pattern, vm))
    }

    /// Whether it may receive our machine `vm`.
    pub fn may_receive(&self, vm: &str) -> bool {
        self.may_receive.iter().any(|pattern| matches_pattern(pattern, vm))
    }

    /// Whether it may be told of our template `name`.
    pub fn may_be_told(&self, name: &TemplateName) -> bool {
        self.templates.iter().any(|pattern| matches_pattern(pattern, name.as_str()))
    }
}

impl LanConfig {
    /// The care-of addresses, spelled out; at most 65,536. An entry that does not parse is an error text.
    pub fn care_of_addresses(&self) -> Result<Vec<IpAddr>, String> {
        let mut addresses = Vec::new();
        for entry in &self.care_of {
            let (first, last) = entry.split_once('-').unwrap_or((entry, entry));
            let parse = |text: &str| {
                text.trim().parse::<IpAddr>().map_err(|_| format!("{entry:?} is not ADDRESS or FIRST-LAST"))
            };
            addresses.extend(range(parse(first)?, parse(last)?).ok_or_else(|| {
                format!("{entry:?} is not a range of one family, first to last, of at most 65536 addresses")
            })?);
        }
        Ok(addresses)
    }
}

fn range(first: IpAddr, last: IpAddr) -> Option<Vec<IpAddr>> {
    match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            let (first, last) = (u32::from(first), u32::from(last));
            let bounded = last >= first && last - first < 1 << 16;
            bounded.then(|| (first..=last).map(|bits| IpAddr::V4(bits.into())).collect())
        }
        (IpAddr::V6(first), IpAddr::V6(last)) => {
            let (first, last) = (u128::from(first), u128::from(last));
            let bounded = last >= first && last - first < 1 << 16;
            bounded.then(|| (first..=last).map(|bits| IpAddr::V6(bits.into())).collect())
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => None,
    }
}

/// A name pattern with at most one `*`.
pub(super) fn matches_pattern(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((before, after)) => {
            name.len() >= before.len() + after.len() && name.starts_with(before) && name.ends_with(after)
        }
    }
}

fn default_key() -> PathBuf {
    PathBuf::from("/etc/longhaul/key")
}

fn default_state() -> PathBuf {
    PathBuf::from("/var/lib/longhaul")
}

fn default_run() -> PathBuf {
    PathBuf::from("/run/longhaul")
}

fn default_inhibitor() -> PathBuf {
    PathBuf::from("systemd-inhibit")
}

fn default_kept_days() -> u64 {
    30
}

fn default_reserve() -> u64 {
    1
}

fn default_journal_free() -> u64 {
    64
}

fn default_descriptors_free() -> u64 {
    256
}

fn default_max_arriving() -> u32 {
    4
}

fn default_kept_count() -> usize {
    1
}

fn default_keep_partial() -> u64 {
    24
}

fn default_keep_partial_count() -> usize {
    16
}

fn default_keep_partial_gib() -> u64 {
    100
}

fn default_ttl() -> u32 {
    5
}

fn default_dns_timeout() -> u64 {
    3000
}

fn default_secondary_poll() -> u64 {
    5
}

fn default_secondary_warn() -> u64 {
    60
}

fn default_secondary_silent() -> u64 {
    900
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        assert!(matches_pattern("web*", "web1") && matches_pattern("*", "x") && matches_pattern("db", "db"));
        assert!(
            !matches_pattern("web", "web1") && !matches_pattern("web*", "we") && !matches_pattern("", "x")
        );
    }

    #[test]
    fn care_of_ranges_are_spelled_out_and_bounded() {
        let lan = |entry: &str| LanConfig { bridge: "br0".into(), care_of: vec![entry.into()] };
        assert_eq!(lan("203.0.113.10-203.0.113.12").care_of_addresses().unwrap().len(), 3);
        assert!(lan("203.0.113.12-203.0.113.10").care_of_addresses().is_err());
        assert!(lan("10.0.0.0-10.255.0.0").care_of_addresses().is_err());
        assert!(lan("10.0.0.0-2001:db8::1").care_of_addresses().is_err());
    }
}
