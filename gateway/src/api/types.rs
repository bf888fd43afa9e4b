//! What travels over the API. Times are milliseconds since the UNIX epoch unless named otherwise,
//! sizes bytes, rates bytes per second.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use longhaul_core::ids::{DeviceName, SiteName, VmName};
use longhaul_core::migration::Stage;
use longhaul_core::migration::recovery::NextStep;
use longhaul_core::migration::resolve::Keep;
use longhaul_core::tunnel::flows::{FlowEntry, HeldBy};

/// Everything there is to see at one site.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StatusView {
    /// This site.
    pub site: SiteName,
    /// The other sites.
    pub peers: Vec<PeerView>,
    /// Machines this site knows.
    pub machines: Vec<MachineView>,
    /// Migrations since the daemon started, and unfinished older ones.
    pub migrations: Vec<MigrationView>,
    /// Machines that left and whose connections still pass here.
    pub anchors: Vec<AnchorView>,
    /// Disks of machines that did not come, kept for the next attempt.
    #[serde(default)]
    pub partials: Vec<PartialView>,
    /// The tunnel's counters.
    pub tunnel: TunnelView,
    /// Disks of machines that left.
    #[serde(default)]
    pub kept: Vec<KeptView>,
    /// Memory of machines that left or came, as both sites of their last move remember it.
    #[serde(default)]
    pub kept_memory: Vec<KeptMemoryView>,
    /// Packets of machines that were more than their share of the tunnel (`tunnel.machine_mbit`) and did not travel.
    #[serde(default)]
    pub over_share: BTreeMap<VmName, u64>,
}

/// A disk of a machine that left, as it was then.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeptView {
    /// The machine.
    pub vm: VmName,
    /// The file.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// When the machine was released.
    pub since_ms: u64,
    /// When it is deleted, if it is.
    pub until_ms: Option<u64>,
}

/// What a machine had in its memory when it left or came, for its way back.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeptMemoryView {
    /// The machine.
    pub vm: VmName,
    /// The file's length.
    pub bytes: u64,
    /// When it was kept.
    pub since_ms: u64,
    /// When it is deleted, if it is not for want of room before.
    pub until_ms: Option<u64>,
}

/// Another site.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerView {
    /// Its name.
    pub name: SiteName,
    /// A connection is up.
    pub up: bool,
    /// Its round-trip time, while it is.
    pub rtt_ms: Option<f64>,
    /// The shortest round-trip time of late: what is more, waits in queues.
    #[serde(default)]
    pub min_rtt_ms: Option<f64>,
    /// What the path to it is believed to carry, once that was measured.
    #[serde(default)]
    pub estimated_mbit: Option<f64>,
    /// What an operator lets be sent to it at most, in Mbit/s.
    #[serde(default)]
    pub limit_mbit: Option<f64>,
}

/// A machine this site knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineView {
    /// Its name.
    pub name: VmName,
    /// Who owns it: `here`, `away` or `arriving`.
    pub owner: String,
    /// The site that owns it, when that is not this one.
    pub at: Option<SiteName>,
    /// How often it was handed over.
    pub epoch: u64,
    /// QEMU's run state; `stopped`; `crashed`: its QEMU is gone although nobody stopped it; `restarting`: the
    /// same, and it is started again in a moment.
    pub state: String,
    /// Why nothing starts it here, if the journal is older than its disks.
    #[serde(default)]
    pub hold: Option<String>,
    /// The TTL that its name had before a move that was undone, in seconds, until it could be restored.
    #[serde(default)]
    pub ttl_owed_s: Option<u32>,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Its disks' sizes.
    pub disk_bytes: Vec<u64>,
    /// Its home addresses.
    pub home: Vec<IpAddr>,
    /// The addresses this site gave it.
    pub care_of: Vec<IpAddr>,
}

/// How a migration stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progressing {
    /// It goes on.
    Running,
    /// The destination runs the machine.
    Moved,
    /// The machine stayed where it was.
    Stayed,
}

/// One stage's time.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct StageTime {
    /// The stage.
    pub stage: Stage,
    /// When it began.
    pub start_ms: u64,
    /// When it ended, once it has.
    pub end_ms: Option<u64>,
}

/// One round of memory.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct RoundView {
    /// Bytes QEMU wrote.
    pub bytes: u64,
    /// Pages with content.
    pub pages: u64,
    /// How long it took.
    pub ms: u64,
}

/// Bytes this gateway put on the link, by what they are for (UDP payload, acknowledgements included).
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct WanBytes {
    /// Memory and device state.
    pub memory: u64,
    /// Disk content.
    pub disk: u64,
    /// Guests' packets.
    pub tunnel: u64,
    /// Everything else.
    pub control: u64,
}

/// The attempt that follows one that did not move the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryView {
    /// Which retry it is, from 1.
    pub number: u32,
    /// How many there are at most.
    pub of: u32,
    /// How long after the end of this attempt it begins, if the link is up then.
    pub delay_ms: u64,
    /// Its id, once it has begun.
    pub id: Option<String>,
}

/// One migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrationView {
    /// Its id, 32 hexadecimal digits.
    pub id: String,
    /// The machine.
    pub vm: VmName,
    /// The site it leaves.
    pub from: SiteName,
    /// The site it goes to.
    pub to: SiteName,
    /// How it stands.
    pub progressing: Progressing,
    /// Why it stayed or is being undone.
    pub reason: Option<String>,
    /// The attempt that follows this one by itself, if one does.
    #[serde(default)]
    pub retry: Option<RetryView>,
    /// The attempt that this one follows.
    #[serde(default)]
    pub follows: Option<String>,
    /// What is different about the machine at its new place, for people.
    #[serde(default)]
    pub notices: Vec<String>,
    /// The stage it is in.
    pub stage: Stage,
    /// The stages so far.
    pub stages: Vec<StageTime>,
    /// How much is copied, 0 to 100, disks and memory together.
    pub percent: f64,
    /// Acknowledged bytes per second.
    pub rate: u64,
    /// The round of memory.
    pub round: u64,
    /// How fast the guest dirties memory.
    pub dirty_rate: u64,
    /// How much of its processors' time the guest is denied so that the copy ends, in percent.
    #[serde(default)]
    pub throttle_percent: u64,
    /// What the guest may write to its disks so that the copy ends, in bytes per second.
    #[serde(default)]
    pub disk_limit: Option<u64>,
    /// What an operator lets memory and disks take of the link, in Mbit/s, until the guest is stopped.
    #[serde(default)]
    pub limit_mbit: Option<u64>,
    /// Seconds to the pause at this rate.
    pub eta_s: Option<u64>,
    /// Rounds so far.
    pub rounds: Vec<RoundView>,
    /// Disk bytes copied and in all.
    pub disk: (u64, u64),
    /// Disk bytes that the other site had already, of an earlier attempt or stay or of a template, and that were not sent.
    #[serde(default)]
    pub disk_kept: u64,
    /// Memory bytes that QEMU has not written yet, and in all.
    pub memory: (u64, u64),
    /// The guest's pause as this gateway saw it: stop asked to the peer's word that it runs.
    pub pause_ms: Option<f64>,
    /// Bytes on the link since the migration began.
    pub wan: WanBytes,
    /// When it began.
    pub started_ms: u64,
    /// When it was over.
    pub ended_ms: Option<u64>,
}

/// One migration, as this site's journal holds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JournalView {
    /// Its id, 32 hexadecimal digits.
    pub id: String,
    /// The machine.
    pub vm: VmName,
    /// The other site.
    pub peer: SiteName,
    /// The epoch that it would begin or has begun.
    pub epoch: u64,
    /// What this site is in it: `source` or `destination`.
    pub role: String,
    /// What was decided, in order.
    pub records: Vec<RecordView>,
    /// Who owns the machine now, for people.
    pub owner: String,
    /// What a gateway does about it when it starts.
    pub next: NextStep,
    /// The same for people, and what that waits for.
    pub next_text: String,
    /// A driver of the running gateway works on it.
    pub under_way: bool,
}

/// One decision.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RecordView {
    /// When.
    pub at_ms: u64,
    /// What.
    pub name: String,
    /// Why, where it ended something.
    pub why: Option<String>,
}

/// A disk that an attempt to move a machine here has left, kept for the next one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PartialView {
    /// The machine.
    pub vm: VmName,
    /// The disk in its definition.
    pub disk: String,
    /// The site it came from.
    pub from: SiteName,
    /// Bytes it takes in the pool.
    pub bytes: u64,
    /// When the attempt ended.
    pub kept_ms: u64,
}

/// A machine that left and whose connections still pass here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AnchorView {
    /// The machine.
    pub vm: VmName,
    /// Where it is.
    pub at: SiteName,
    /// Its home addresses, attracted here.
    pub home: Vec<IpAddr>,
    /// Its addresses there.
    pub care_of: Vec<IpAddr>,
    /// Old flows alive.
    pub flows: u64,
    /// Of those, the ones that are heard from one end only, although the other was heard before.
    #[serde(default)]
    pub flows_one_way: u64,
    /// Its addresses that another host uses, and that are not attracted while that lasts.
    #[serde(default)]
    pub conflicts: Vec<ConflictView>,
    /// Why an address of it is not attracted, while that lasts; it is tried again.
    #[serde(default)]
    pub attract_error: Option<String>,
    /// How the name stands: `none`, `pending`, `moved`, `settled`.
    pub names: String,
    /// When the name moved: at the primary, or once every name server of the zone has it, at the last of them.
    pub names_moved_ms: Option<u64>,
    /// Why the name is still pending, or its name servers could not be asked.
    pub names_error: Option<String>,
    /// Name servers of the zone that do not have the moved name yet; until they do, old answers do not expire.
    #[serde(default)]
    pub names_behind: Vec<String>,
    /// When the home address began to be attracted.
    pub since_ms: u64,
    /// When the tunnel ended, once it has.
    pub closed_ms: Option<u64>,
}

/// Another host that uses an address of a machine that left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictView {
    /// The address.
    pub address: IpAddr,
    /// The other host's link-layer address.
    pub mac: String,
}

/// What is held here of a machine that left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowsView {
    /// Where it is.
    pub at: SiteName,
    /// Each of its NICs.
    pub nics: Vec<NicFlows>,
}

/// Flows that are shown per NIC at most.
pub const MAX_FLOWS_SHOWN: usize = 1000;

/// The same for one NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicFlows {
    /// The NIC.
    pub nic: DeviceName,
    /// What the tunnel waits for.
    pub held_by: HeldBy,
    /// Flows, those first that were silent for the longest; [`MAX_FLOWS_SHOWN`] at most. `held_by` counts all of them.
    pub flows: Vec<FlowEntry>,
}

/// The tunnel's counters since the daemon started.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct TunnelView {
    /// Guests' packets sent to peers.
    pub packets_out: u64,
    /// Guests' packets received from peers.
    pub packets_in: u64,
    /// Packets dropped, for whatever reason.
    pub dropped: u64,
    /// Packets held now.
    pub held: u64,
}

/// Takes a definition.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DefineRequest {
    /// The definition, TOML.
    pub definition: String,
    /// Each disk's image here, in the definition's order.
    pub disks: Vec<PathBuf>,
}

/// Takes a machine that runs already.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AdoptRequest {
    /// The definition, TOML.
    pub definition: String,
    /// Its QMP socket.
    pub qmp: PathBuf,
}

/// Begins a migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrateRequest {
    /// The machine.
    pub vm: VmName,
    /// Where to.
    pub to: SiteName,
    /// Go although names cannot follow.
    #[serde(default)]
    pub without_dns: bool,
    /// The pause to aim at instead of the configured one.
    #[serde(default)]
    pub max_downtime_ms: Option<u64>,
    /// Do not slow the guest down, however fast it changes its memory.
    #[serde(default)]
    pub no_throttle: bool,
}

/// Decides a move that waits for a peer that is gone for good.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ResolveRequest {
    /// Where the machine is to be.
    pub keep: Keep,
    /// The site whose copy is destroyed, typed by the operator.
    #[serde(default)]
    pub destroyed: Option<SiteName>,
}

/// Says where a machine is that left.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MovedRequest {
    /// The site it was handed on to.
    pub to: SiteName,
}

/// Limits what is sent, or no longer.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct LimitRequest {
    /// In Mbit/s; nothing is no limit but the configured one.
    pub rate_mbit: Option<u64>,
}

/// A migration that began.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Started {
    /// Its id.
    pub id: String,
}

/// Something that would make a migration fail, or that is well.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at.
    pub check: String,
    /// It is well.
    pub ok: bool,
    /// What was seen.
    pub detail: String,
    /// What to do.
    pub remedy: Option<String>,
}

/// The body of every answer that is not a success.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    /// For people.
    pub error: String,
}
