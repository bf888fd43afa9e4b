//! Stage 2 at the source: disks while the guest runs, then rounds of memory.
//!
//! ```text
//!  QEMU --mirror (new writes)--> NBD server --\
//!  QEMU --read-only export-----> re-reader ----> disk channel --> link
//!  QEMU --migrate--------------> memory pump --> memory channel --> link
//! ```
//!
//! Memory starts when the disks are in step, so that nothing but the rest of a round stands between
//! the decision to stop and the hand-over. Ends only when it is told to: the driver decides.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, watch};

use longhaul_core::bulk::{BulkId, Channel};
use longhaul_core::disk::TargetDisk;
use longhaul_core::ids::DeviceName;
use longhaul_core::migration::convergence::{Progress, disks_in_step};
use longhaul_core::migration::disk_pace::DiskPace;
use longhaul_core::migration::lag::Lag;
use longhaul_core::migration::message::Refusal;
use longhaul_core::migration::source::Event;
use longhaul_core::units::{Bytes, Rate};
use longhaul_core::wan::Level;

use super::anchor::owed_ttl_s;
use super::reins::Reins;
use super::source::SourceLeaf;
use super::view::round;
use super::{MachineRow, chain, hypervisor_failed, remembered, told_to_stop};
use crate::config::CongestionChoice;
use crate::disk::nbd::NbdServer;
use crate::disk::{DiskSource, DiskSourceConfig, DiskSourceError};
use crate::hypervisor::{
    Access, Guest, JobState, MigrationInfo, MigrationStatus, MigrationStep, MigrationSteps, MirrorMode,
    OutgoingParameters,
};
use crate::journal::JournalError;
use crate::link::{OnItsWay, PeerHandle};
use crate::memory::kept::digest;
use crate::memory::{MemorySource, SourceConfig, SourceHandle, SourceMode, SourceProgress};
use crate::naming::NamedBy;

/// How often progress is measured.
const LOOK: Duration = Duration::from_millis(100);
/// Mirrors are asked how they are every so many looks.
const MIRROR_LOOKS: u32 = 10;
/// A peer that closes its end of a disk says why within this.
const PEER_SAYS: Duration = Duration::from_secs(5);
/// Bytes of a disk's map on their way: each chunk tells of 128 MiB of disk.
pub(super) const MAP_WINDOW: u64 = 1 << 20;
/// Goodput is what was acknowledged in this long.
const GOODPUT_WINDOW: usize = 20;

/// Everything that carries one machine's content away from here.
#[derive(Default)]
pub(super) struct Transfer {
    pub disks: Vec<(DeviceName, DiskSource)>,
    pub server: Option<NbdServer>,
    pub memory: Option<SourceHandle>,
    /// Of every channel.
    pub on_its_way: Vec<OnItsWay>,
    /// How many pages both sites remember, and how much of each disk's stream.
    pub shadow_pages: u32,
    pub disk_window_log: u32,
    /// The digest of the memory that the destination remembers.
    pub memory_base: Option<[u8; 32]>,
    /// How much of its processors' time the guest may be denied, in percent; nothing: none.
    pub max_throttle_percent: Option<u32>,
}

/// Copies until it is told to stop; the transfer then goes to the next leaf.
pub(super) async fn run(
    leaf: SourceLeaf,
    guest: Guest,
    row: MachineRow,
    ttl_before_s: Option<watch::Sender<Option<u32>>>,
    mut transfer: Transfer,
    mut stop: watch::Receiver<bool>,
) -> Transfer {
    tokio::select! {
        biased;
        () = told_to_stop(&mut stop) => return transfer,
        result = begin(&leaf, &guest, &row, ttl_before_s, &mut transfer) => {
            if let Err(why) = result {
                leaf.report(Event::Failed(why)).await;
                return transfer;
            }
        }
    }
    let ended = tokio::select! {
        biased;
        () = told_to_stop(&mut stop) => Ok(()),
        result = copy(&leaf, &guest, &row, &mut transfer) => result,
    };
    if let Err(why) = ended {
        leaf.report(Event::Failed(why)).await;
    }
    transfer
}

async fn begin(
    leaf: &SourceLeaf,
    guest: &Guest,
    row: &MachineRow,
    ttl_before_s: Option<watch::Sender<Option<u32>>>,
    transfer: &mut Transfer,
) -> Result<(), Refusal> {
    lower_ttl(leaf, row, ttl_before_s).await?;
    let peer = peer(leaf)?;
    let window = peer.bulk_window_bytes(leaf.edges.config.link.window_mib << 20);
    let sockets = socket_dir(leaf)?;
    let mut exports = Vec::new();
    for (index, volume) in row.definition.volumes().enumerate() {
        let id = BulkId { migration: leaf.attempt.id, channel: Channel::Disk(index as u8) };
        let channel = peer.bulk_sender(id, window).await.map_err(link_failed)?.told(told_rate(leaf));
        transfer.on_its_way.push(channel.on_its_way());
        let mut config = DiskSourceConfig::default();
        config.mirror.buffer_bytes = leaf.edges.config.migration.disk_buffer_mib << 20;
        config.mirror.target = TargetDisk::Told;
        config.mirror.window_log = transfer.disk_window_log;
        config.mirror.map_bytes = leaf.edges.config.migration.disk_map_mib << 20;
        config.mirror.places_bytes = places_bytes(leaf, row);
        let id = BulkId { channel: Channel::Map(index as u8), ..id };
        let map = peer.bulk_receiver(id, MAP_WINDOW).await.map_err(link_failed)?;
        let (export, disk) =
            DiskSource::spawn(volume.name.as_str(), volume.size_bytes, config, channel, Some(map));
        exports.push(export);
        transfer.disks.push((volume.name.clone(), disk));
    }
    let path = sockets.join("mirror.sock");
    remove_stale(&path).map_err(socket_failed)?;
    let server = NbdServer::bind(&path, exports).map_err(disk_failed)?;
    guest.let_connect(server.path()).map_err(socket_failed)?;
    transfer.server = Some(server);
    let reading = guest_socket(guest, &sockets, "reading.sock");
    guest.nbd_start(&reading).await.map_err(hypervisor_failed)?;
    for (name, disk) in &mut transfer.disks {
        // The mirror first: a write between the two would be in neither.
        let export_name = name.as_str();
        guest.mirror_start(name, &path, export_name, MirrorMode::None).await.map_err(hypervisor_failed)?;
        guest.export(name, Access::Read, &[]).await.map_err(hypervisor_failed)?;
        disk.begin(&reading, name.as_str()).await.map_err(disk_failed)?;
    }
    Ok(())
}

async fn copy(
    leaf: &SourceLeaf,
    guest: &Guest,
    row: &MachineRow,
    transfer: &mut Transfer,
) -> Result<(), Refusal> {
    let link = Rate::mbit(leaf.edges.config.link.rate_mbit);
    let (mut goodput, mut reins) = (Goodput::up_to(link), Reins::new(link, transfer.max_throttle_percent));
    let (mut pace, began) = (DiskPace::new(), Instant::now());
    let mut sync = LastSync::default();
    let memory_total = row.definition.memory().0;
    let mut ticks = tokio::time::interval(LOOK);
    let mut steps = MigrationSteps::new(guest.events());
    let (mut looks, mut lags): (u32, Vec<Lag>) = (0, Vec::new());
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // At what QEMU does by itself the next look must not be a tick away: packets are not held yet.
            step = steps.next() => match step {
                MigrationStep::StoppedGuest(at) => leaf.viewer.paused_for(age(at)),
                MigrationStep::NewRound => {}
            },
        }
        let peer = peer(leaf)?;
        let disks = match look_at_disks(transfer) {
            Ok(disks) => disks,
            Err(at) => return Err(ended_early(guest, &mut transfer.disks[at]).await),
        };
        if looks.is_multiple_of(MIRROR_LOOKS) {
            check_mirrors(guest, transfer).await?;
        }
        looks += 1;
        let rate = goodput.look(&peer);
        let disks_in_step =
            disks.owed == 0 && disks_in_step(Bytes(disks.unacknowledged), rate, peer.stats().rtt);
        if transfer.memory.is_none() && disks_in_step {
            tracing::info!(vm = %leaf.attempt.vm, "disks are in step, memory begins");
            start_memory(leaf, guest, &peer, Bytes(memory_total), transfer).await?;
        }
        let memory = look_at_memory(guest, transfer, disks_in_step).await?;
        let left = (!disks_in_step).then_some(Bytes(disks.owed + disks.unacknowledged));
        if let Some(limit) = pace.handle_left(began.elapsed(), left, Bytes(disks.sent), rate) {
            slow_disks(leaf, guest, row, transfer.max_throttle_percent.is_some(), limit).await?;
        }
        let unacknowledged = disks.unacknowledged + memory.as_ref().map_or(0, |(pump, _)| pump.backlog.0);
        let mut progress = Progress {
            goodput: rate,
            unacknowledged: Bytes(unacknowledged),
            reduction_permille: 1000,
            disks_in_step,
            rtt: peer.stats().rtt,
            waited: longest_wait(&mut lags, &transfer.on_its_way, began.elapsed()),
            ..Progress::default()
        };
        if let Some((pump, info)) = &memory {
            check_memory(info)?;
            add_memory(&mut progress, pump, info, &mut sync);
            reins.follow(guest, &progress, info).await?;
            show_throttle(leaf, info.throttle_percent);
            show_memory(leaf, pump);
            if info.status == MigrationStatus::PreSwitchover {
                leaf.report(Event::SwitchoverReached).await;
                std::future::pending::<()>().await;
            }
        }
        show(leaf, &progress, &disks, memory_total);
        leaf.report(Event::Progress(progress)).await;
    }
}

/// How long the oldest waits that the other side has not taken, of all channels.
fn longest_wait(lags: &mut Vec<Lag>, channels: &[OnItsWay], now: Duration) -> Duration {
    lags.resize_with(channels.len(), Lag::default);
    let waits = channels.iter().zip(lags).map(|(channel, lag)| {
        // In this order: what is taken was queued before.
        let taken = channel.taken_bytes();
        lag.look(now, Bytes(channel.queued_bytes()), Bytes(taken))
    });
    waits.max().unwrap_or_default()
}

/// What pump and QEMU say of memory. It waits while the disks are out of step: if it came to its end before them, QEMU would
/// stop the guest by itself.
async fn look_at_memory(
    guest: &Guest,
    transfer: &Transfer,
    disks_in_step: bool,
) -> Result<Option<(SourceProgress, MigrationInfo)>, Refusal> {
    let Some(handle) = &transfer.memory else { return Ok(None) };
    handle.set_mode(if disks_in_step { SourceMode::Streaming } else { SourceMode::Held });
    let pump = handle.progress().borrow().clone();
    Ok(Some((pump, guest.migration().await.map_err(hypervisor_failed)?)))
}

fn add_memory(progress: &mut Progress, pump: &SourceProgress, info: &MigrationInfo, sync: &mut LastSync) {
    progress.memory_remaining = info.remaining;
    progress.dirty_rate = Rate(info.dirty_pages_per_s * info.page_size.0);
    progress.round = info.dirty_sync_count;
    progress.since_sync = sync.look(info.dirty_sync_count);
    progress.reduction_permille = reduction(pump);
    progress.names_unread = pump.names_unread;
}

fn check_memory(info: &MigrationInfo) -> Result<(), Refusal> {
    if !info.status.is_final() {
        return Ok(());
    }
    let detail = info.error.clone().unwrap_or_default();
    Err(Refusal::Hypervisor(Refusal::text(format!(
        "the migration of memory ended early: {} {detail}",
        info.status
    ))))
}

async fn start_memory(
    leaf: &SourceLeaf,
    guest: &Guest,
    peer: &PeerHandle,
    memory: Bytes,
    transfer: &mut Transfer,
) -> Result<(), Refusal> {
    let id = BulkId { migration: leaf.attempt.id, channel: Channel::Memory };
    // Three times what is on the way at the configured rate, or at the one that is found: enough to keep the link full, no
    // more, because what waits here when the guest stops lengthens its pause.
    let config = &leaf.edges.config.link;
    let on_the_way = Rate::mbit(config.rate_mbit).bytes_in(peer.stats().rtt).0;
    let window = (on_the_way * 3).clamp(256 << 10, config.window_mib << 20);
    let mut channel = peer.bulk_sender(id, window).await.map_err(link_failed)?.told(told_rate(leaf));
    channel.keep_short();
    transfer.on_its_way.push(channel.on_its_way());
    let path = socket_dir(leaf)?.join("memory.sock");
    remove_stale(&path).map_err(socket_failed)?;
    let mut packing = SourceConfig::default();
    packing.encoder.shadow_pages = transfer.shadow_pages;
    packing.encoder.memory_level = level_of_disks(transfer);
    // Only what both remember counts.
    let wanted = transfer
        .memory_base
        .filter(|theirs| digest(&leaf.edges.kept_memory(&leaf.attempt.vm)) == Some(*theirs));
    // Without it all of memory is sent.
    let base = remembered::of_both(&leaf.edges, &leaf.attempt.vm, wanted, transfer.shadow_pages).await;
    let base = base.unwrap_or_default();
    let named_by = named_by(&mut transfer.disks).await?;
    let source =
        MemorySource::bind(&path, packing).map_err(memory_failed)?.with_base(base).with_disks(named_by);
    guest.let_connect(&path).map_err(socket_failed)?;
    transfer.memory = Some(source.start(channel));
    let all = Progress { memory_remaining: memory, ..Progress::default() };
    let parameters = OutgoingParameters {
        max_bandwidth: Some(all.writing_rate(Rate::mbit(config.rate_mbit))),
        max_throttle_percent: transfer.max_throttle_percent,
    };
    guest.prepare_outgoing(&parameters).await.map_err(hypervisor_failed)?;
    guest.migrate_to(&path).await.map_err(hypervisor_failed)
}

/// What the link carries where nobody estimates it.
fn told_rate(leaf: &SourceLeaf) -> Option<Rate> {
    let link = &leaf.edges.config.link;
    match link.congestion {
        CongestionChoice::Fixed => Some(Rate::mbit(link.rate_mbit)),
        CongestionChoice::Model => None,
    }
}

/// What packing the disks has shown of the link and of this host: memory begins with it.
fn level_of_disks(transfer: &Transfer) -> Level {
    let most = transfer.disks.iter().map(|(_, disk)| *disk.progress().borrow());
    most.max_by_key(|progress| progress.counters.sent_bytes)
        .map(|progress| progress.level)
        .unwrap_or_default()
}

/// What one disk may keep of where its content stands.
fn places_bytes(leaf: &SourceLeaf, row: &MachineRow) -> u64 {
    let all_bytes = leaf.edges.config.migration.content_index_mib << 20;
    all_bytes / row.definition.volumes().count().max(1) as u64
}

/// What memory may be named by.
async fn named_by(disks: &mut [(DeviceName, DiskSource)]) -> Result<NamedBy, Refusal> {
    let (asks, questions) = mpsc::channel(disks.len().max(1));
    let mut given = Vec::new();
    for (index, (_, disk)) in (0..).zip(disks) {
        given.push(disk.give_places(index, asks.clone()).await.map_err(disk_failed)?);
    }
    Ok(NamedBy { given, questions })
}

async fn lower_ttl(
    leaf: &SourceLeaf,
    row: &MachineRow,
    ttl_before_s: Option<watch::Sender<Option<u32>>>,
) -> Result<(), Refusal> {
    let (Some(name), Some(names), Some(ttl)) = (&row.definition.dns_name, &leaf.edges.names, ttl_before_s)
    else {
        return Ok(());
    };
    let found = names.ttl_s(name).await.map_err(names_failed)?;
    let (journal, vm) = (&leaf.edges.journal, &leaf.attempt.vm);
    let failed = |error: JournalError| Refusal::Other(Refusal::text(chain(&error)));
    // A name that is low already is so by a move that could not undo it, or has not settled.
    let low = || row.ttl_before_s.or(owed_ttl_s(journal, vm)).unwrap_or(found);
    let before = if found > names.move_ttl_s() { found } else { low() };
    // Known before it is lowered, also to a gateway that is killed meanwhile.
    journal.change_machine(vm, |row: &mut MachineRow| row.ttl_before_s = Some(before)).map_err(failed)?;
    ttl.send_replace(Some(before));
    names.lower_ttl(name).await.map_err(names_failed)
}

struct Disks {
    copied: u64,
    total: u64,
    same: u64,
    owed: u64,
    sent: u64,
    unacknowledged: u64,
}

/// Why a disk's copy is over before it was finished.
async fn ended_early(guest: &Guest, (name, disk): &mut (DeviceName, DiskSource)) -> Refusal {
    if guest.qmp().is_closed() {
        return Refusal::Hypervisor("QEMU of the machine is gone".into());
    }
    let error = disk.ended().await;
    if let DiskSourceError::Read(error) = &error {
        return Refusal::Other(Refusal::text(format!(
            "Disk {name} cannot be read, see whether the device fails that it lies on: {}",
            chain(error)
        )));
    }
    if matches!(error, DiskSourceError::Channel(_)) {
        // The other side knows why it closed its end, and says so.
        tokio::time::sleep(PEER_SAYS).await;
    }
    Refusal::Other(Refusal::text(format!("the copy of disk {name} ended early: {}", chain(&error))))
}

/// A mirror that ends by itself has failed: the disk could not be read.
async fn check_mirrors(guest: &Guest, transfer: &Transfer) -> Result<(), Refusal> {
    for (name, _) in &transfer.disks {
        let Some(mirror) = guest.mirror_status(name).await.map_err(hypervisor_failed)? else { continue };
        if mirror.state == JobState::Concluded {
            let why = mirror.error.unwrap_or_else(|| "without an error".into());
            let text = format!("the mirror of disk {name} ended: {why}");
            return Err(Refusal::Hypervisor(Refusal::text(text)));
        }
    }
    Ok(())
}

/// The disk whose copy has ended is an error.
fn look_at_disks(transfer: &Transfer) -> Result<Disks, usize> {
    let mut sum = Disks { copied: 0, total: 0, same: 0, owed: 0, sent: 0, unacknowledged: 0 };
    for (at, (_, disk)) in transfer.disks.iter().enumerate() {
        let progress = disk.progress();
        if progress.has_changed().is_err() {
            return Err(at);
        }
        let progress = progress.borrow();
        sum.copied += progress.copied_bytes;
        sum.same += progress.counters.same_bytes;
        sum.total += progress.total_bytes;
        sum.sent += progress.counters.chunk_bytes;
        sum.owed += progress.owed_bytes;
        sum.unacknowledged += progress.queued_bytes + progress.unacknowledged_bytes;
    }
    Ok(sum)
}

/// The guest writes its disks as fast as they are sent.
async fn slow_disks(
    leaf: &SourceLeaf,
    guest: &Guest,
    row: &MachineRow,
    allowed: bool,
    limit: Rate,
) -> Result<(), Refusal> {
    let vm = &leaf.attempt.vm;
    if !allowed {
        return Err(Refusal::Diverges("the guest writes its disks as fast as they are sent".into()));
    }
    if guest.pid().is_none() {
        tracing::warn!(%vm, "the guest writes its disks as fast as they are sent, and is copied on and on: its writes are for whoever manages its QEMU to limit");
        return Ok(());
    }
    tracing::warn!(%vm, %limit, "the guest writes its disks as fast as they are sent, and may write less until the move ends");
    let each = Rate(limit.0 / row.definition.volumes().count().max(1) as u64);
    for volume in row.definition.volumes() {
        guest.limit_writes(volume.name, Some(each)).await.map_err(hypervisor_failed)?;
    }
    leaf.viewer.change(|view| view.disk_limit = Some(limit.0));
    Ok(())
}

/// Worth a word when it begins: the guest's users feel it.
fn show_throttle(leaf: &SourceLeaf, percent: u64) {
    leaf.viewer.change(|view| {
        if percent > 0 && view.throttle_percent == 0 {
            tracing::warn!(vm = %leaf.attempt.vm, percent, "the guest changes memory as fast as it is sent, and is slowed down until the move ends");
        }
        view.throttle_percent = percent;
    });
}

fn show(leaf: &SourceLeaf, progress: &Progress, disks: &Disks, memory_total: u64) {
    let remaining =
        if progress.round == 0 { memory_total } else { progress.memory_remaining.0.min(memory_total) };
    let total = (disks.total + memory_total).max(1);
    let done = disks.copied + memory_total - remaining;
    let rest = (disks.total - disks.copied.min(disks.total)) + remaining + progress.unacknowledged.0;
    leaf.viewer.change(|view| {
        // Never backwards: a new round finds more to send than the last one left.
        view.percent = view.percent.max(99.0 * done as f64 / total as f64);
        view.rate = progress.goodput.0;
        view.round = progress.round;
        view.dirty_rate = progress.dirty_rate.0;
        view.eta_s = progress.goodput.time_for(Bytes(rest)).map(|time| time.as_secs());
        view.disk = (disks.copied, disks.total);
        view.disk_kept = disks.same;
        view.memory = (remaining, memory_total);
    });
}

/// The rounds so far, as the pump counts them.
pub(super) fn show_memory(leaf: &SourceLeaf, pump: &SourceProgress) {
    leaf.viewer.change(|view| {
        view.rounds = pump.rounds.iter().map(|each| round(each.bytes.0, each.pages, each.elapsed)).collect();
    });
}

/// How long ago a moment since the Unix epoch was.
pub(super) fn age(at: Duration) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(at)
}

/// What the link gets of what QEMU still writes. Pages that are sent again are those that changed: as long as none were, less
/// than half is not hoped for, however little the others took that the destination knew.
fn reduction(pump: &SourceProgress) -> u32 {
    const SEEN: u64 = 1 << 20;
    const HOPED_PERMILLE: u32 = 500;
    let permille = |bytes: u64, wire_bytes: u64| match bytes {
        0..SEEN => 1000,
        bytes => (wire_bytes.saturating_mul(1000) / bytes).clamp(1, 1100) as u32,
    };
    let again = pump.rounds.iter().skip(1);
    let (bytes, wire_bytes) =
        again.fold((0, 0), |(bytes, wire), round| (bytes + round.bytes.0, wire + round.wire_bytes.0));
    match bytes {
        SEEN.. => permille(bytes, wire_bytes),
        _ => permille(pump.original.0, pump.wire.0).max(HOPED_PERMILLE),
    }
}

/// What the link carries to the peer, from what it has sent: the best second of the last two, because
/// a link that had nothing to send is not slow.
struct Goodput {
    samples: VecDeque<(Instant, u64)>,
    best: Rate,
    /// A chunk counts when the link takes it: on a slow link one second can seem to carry more.
    limit: Rate,
}

impl Goodput {
    fn up_to(limit: Rate) -> Self {
        Self { samples: VecDeque::new(), best: Rate::default(), limit }
    }

    fn look(&mut self, peer: &PeerHandle) -> Rate {
        let stats = peer.stats();
        let sent = stats.sent.memory_bytes + stats.sent.disk_bytes;
        let now = Instant::now();
        if let Some((at, before)) = self.samples.get(self.samples.len().saturating_sub(10)) {
            let seconds = now.duration_since(*at).as_secs_f64();
            if self.samples.len() >= 10 && seconds > 0.0 {
                let rate = Rate((sent.saturating_sub(*before) as f64 / seconds) as u64);
                self.best = Rate((self.best.0 * 99 / 100).max(rate.0).min(self.limit.0));
            }
        }
        self.samples.push_back((now, sent));
        if self.samples.len() > GOODPUT_WINDOW {
            self.samples.pop_front();
        }
        self.best
    }
}

/// When QEMU last looked for dirty pages, as far as its count of looks tells.
#[derive(Default)]
struct LastSync {
    count: u64,
    at: Option<Instant>,
}

impl LastSync {
    fn look(&mut self, count: u64) -> Duration {
        if count != self.count || self.at.is_none() {
            (self.count, self.at) = (count, Some(Instant::now()));
        }
        self.at.map(|at| at.elapsed()).unwrap_or_default()
    }
}

/// Where a socket lies that QEMU itself is to create: a folder it may write to.
pub(super) fn guest_socket(guest: &Guest, own: &Path, name: &str) -> PathBuf {
    guest.own_dir().unwrap_or_else(|| own.to_owned()).join(name)
}

pub(super) fn socket_dir(leaf: &SourceLeaf) -> Result<PathBuf, Refusal> {
    let folder = leaf.edges.socket_dir(&leaf.attempt.vm);
    std::fs::create_dir_all(&folder).map_err(socket_failed)?;
    Ok(folder)
}

/// Removes the socket of a gateway that was killed: nobody listens on it, and a new one needs its name.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn peer(leaf: &SourceLeaf) -> Result<PeerHandle, Refusal> {
    leaf.edges
        .peer(&leaf.attempt.peer)
        .ok_or_else(|| Refusal::Other(format!("site {} is not configured", leaf.attempt.peer)))
}

pub(super) fn disk_failed(error: impl std::error::Error) -> Refusal {
    Refusal::Other(Refusal::text(format!("Disk copy failed: {}", chain(&error))))
}

pub(super) fn memory_failed(error: impl std::error::Error) -> Refusal {
    Refusal::Other(Refusal::text(format!("Memory copy failed: {}", chain(&error))))
}

fn names_failed(error: impl std::error::Error) -> Refusal {
    Refusal::Names(Refusal::text(chain(&error)))
}

fn link_failed(error: impl std::error::Error) -> Refusal {
    Refusal::Link(Refusal::text(chain(&error)))
}

fn socket_failed(error: io::Error) -> Refusal {
    Refusal::Other(Refusal::text(format!("A socket for QEMU could not be made: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Round;

    #[test]
    fn what_changed_is_expected_to_shrink_as_what_changed_did_and_not_as_what_was_known() {
        let mib = |count: u64| Bytes(count << 20);
        let round = |bytes, wire_bytes| Round { bytes, wire_bytes, ..Round::default() };
        let sent =
            |original, wire, rounds| SourceProgress { original, wire, rounds, ..SourceProgress::new() };
        assert_eq!(reduction(&sent(Bytes(1000), Bytes(100), vec![])), 1000, "nothing is known");
        let known = round(mib(100), mib(5));
        assert_eq!(reduction(&sent(mib(100), mib(5), vec![known])), 500);
        assert_eq!(reduction(&sent(mib(100), mib(70), vec![round(mib(100), mib(70))])), 700);
        assert_eq!(
            reduction(&sent(mib(108), mib(7), vec![known, round(mib(4), mib(1)), round(mib(4), mib(1))])),
            250
        );
    }
}
