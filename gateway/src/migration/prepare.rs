//! Stages 1 to 3 at the destination: a QEMU that waits, disks that fill, memory that flows in.
//!
//! ```text
//!  link --> disk channel ---> target pump --> writable NBD export --\
//!  link --> memory channel -> memory pump --> incoming socket ------ QEMU -S -incoming
//! ```
//!
//! `Loaded` is said only after every barrier was proven here, QEMU itself says that it has loaded, the
//! disks are flushed and nothing can write to them from outside any more: QEMU would let a late write
//! into a running guest.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::sync::watch;

use longhaul_core::bulk::{BulkId, Channel};
use longhaul_core::disk::TargetConfig as MirrorConfig;
use longhaul_core::ids::DeviceName;
use longhaul_core::migration::destination::Event;
use longhaul_core::migration::message::{Proposal, Refusal, Reservation};
use longhaul_core::units::Bytes;

use super::activate::remember;
use super::destination::DestinationLeaf;
use super::partial::{self, PartialOf};
use super::precopy::{MAP_WINDOW, disk_failed, guest_socket, memory_failed};
use super::stay::Stay;
use super::{damage, hypervisor_failed, kept, remembered, templates, told_to_stop};
use crate::disk::nbd::NbdClient;
use crate::disk::{Base, DiskMap, DiskTarget};
use crate::hypervisor::{
    Access, DiskFile, DiskFormat, Guest, MigrationStatus, Placement, RunState, StartMode,
};
use crate::memory::{MemoryEnd, MemoryTarget, TargetConfig, TargetHandle};
use crate::migration::anchor::pool_images;

const QEMU_LIMIT: Duration = Duration::from_secs(60);
/// Between two tries to find QEMU.
const AGAIN: Duration = Duration::from_millis(500);
/// QEMU only lets go of what it holds locally.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// What is held for a machine that comes.
#[derive(Default)]
pub(super) struct Held {
    pub guest: Option<Guest>,
    pub images: Vec<PathBuf>,
    /// For each image, what is there of it already.
    there: Vec<There>,
    pub maps: Vec<DiskMap>,
    disks: Vec<Arriving>,
    pub memory: Option<TargetHandle>,
}

/// A disk that fills.
struct Arriving {
    name: DeviceName,
    size: Bytes,
    target: DiskTarget,
}

/// What this site has of a disk before anything is sent.
struct There {
    /// The image was left by an earlier attempt.
    partial: bool,
    /// What the machine left behind when it was here before, or what it was cloned from.
    base: Option<Base>,
}

impl Held {
    /// What is left of it after a restart of the gateway: QEMU, if it was found.
    pub(super) fn found(guest: Option<Guest>) -> Self {
        Self { guest, ..Self::default() }
    }
}

/// Prepares, waits for the machine until it is loaded, and watches its QEMU until it is told to stop.
///
/// Preparing is never broken off: a QEMU that is just being started would be nobody's.
pub(super) async fn run(
    leaf: DestinationLeaf,
    proposal: Proposal,
    reservation: Reservation,
    mut held: Held,
    mut stop: watch::Receiver<bool>,
) -> Held {
    if let Err(why) = prepare(&leaf, &proposal, &reservation, &mut held).await {
        leaf.report(Event::Failed(why)).await;
        return held;
    }
    let done = tokio::select! {
        biased;
        () = told_to_stop(&mut stop) => return held,
        done = wait_for_it(&leaf, &mut held) => done,
    };
    match done {
        Ok(()) => watch(leaf, held, stop).await,
        Err(why) => {
            leaf.report(Event::Failed(why)).await;
            held
        }
    }
}

/// Watches the QEMU of a machine that is loaded until it is told to stop. One that dies before the machine is
/// ours is reported: the source has kept its memory and goes on.
pub(super) async fn watch(leaf: DestinationLeaf, mut held: Held, mut stop: watch::Receiver<bool>) -> Held {
    tokio::select! {
        biased;
        () = told_to_stop(&mut stop) => {}
        () = gone(&leaf, &mut held) => leaf.report(Event::Failed(waiting_qemu_ended())).await,
    }
    held
}

/// Until the waiting QEMU is gone; after a restart of the gateway it may have to be found first.
async fn gone(leaf: &DestinationLeaf, held: &mut Held) {
    loop {
        if let Some(guest) = &held.guest {
            return guest.gone().await;
        }
        match leaf.edges.hypervisor.find(&leaf.attempt.vm).await {
            Ok(None) => return,
            Ok(found) => held.guest = found,
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    }
}

fn waiting_qemu_ended() -> Refusal {
    Refusal::Hypervisor("the waiting QEMU ended".into())
}

async fn wait_for_it(leaf: &DestinationLeaf, held: &mut Held) -> Result<(), Refusal> {
    leaf.report(Event::Prepared).await;
    load(leaf, held).await?;
    leaf.report(Event::Loaded).await;
    Ok(())
}

async fn prepare(
    leaf: &DestinationLeaf,
    proposal: &Proposal,
    reservation: &Reservation,
    held: &mut Held,
) -> Result<(), Refusal> {
    let (edges, definition) = (&leaf.edges, &proposal.definition);
    let guest_was = edges.hypervisor.find(&definition.name).await.map_err(hypervisor_failed)?;
    if guest_was.is_some() {
        return Err(Refusal::Busy(format!("a QEMU of {} runs at site {}", definition.name, edges.site())));
    }
    make_images(leaf, proposal, held)?;
    let taps =
        Stay::of_arrival(edges, &leaf.attempt.peer, proposal, reservation).prepare_arrival(edges).await?;
    let volumes = definition.volumes().map(|volume| volume.name.clone());
    let placement = Placement {
        disks: volumes
            .zip(&held.images)
            .map(|(name, path)| (name, DiskFile { path: path.clone(), format: DiskFormat::Raw }))
            .collect(),
        taps,
    };
    let guest = edges
        .hypervisor
        .start(definition, &placement, StartMode::Incoming)
        .await
        .map_err(hypervisor_failed)?;
    held.guest = Some(guest.clone());
    remember(leaf, proposal, reservation, None);
    receive(leaf, proposal, reservation, &guest, held).await
}

fn make_images(leaf: &DestinationLeaf, proposal: &Proposal, held: &mut Held) -> Result<(), Refusal> {
    let images = pool_images(&leaf.edges, &leaf.attempt, proposal);
    let kept = kept::list(&leaf.edges);
    for (volume, path) in proposal.definition.volumes().zip(images) {
        let failed = |error: std::io::Error| {
            Refusal::Other(format!("site {} cannot make {}: {error}", leaf.edges.site(), path.display()))
        };
        let of = partial_of(leaf, volume.name);
        let pool = &leaf.edges.config.storage.pool;
        let partial = partial::take(pool, &of, Bytes(volume.size_bytes), &path).map_err(failed)?;
        if partial {
            tracing::info!(vm = %of.vm, disk = %of.disk, "going on with what an earlier attempt has left");
        }
        let new = if partial { None } else { Some(new_image(&path).map_err(failed)?) };
        held.images.push(path.clone());
        if let Some(file) = new {
            file.set_len(volume.size_bytes).map_err(failed)?;
        }
        let base = kept::base_of(&kept, &of.vm, &of.disk, volume.size_bytes);
        let base = base.or_else(|| templates::base_of(leaf, &volume));
        held.there.push(There { partial, base });
    }
    Ok(())
}

/// A new file that nobody but its owner reads: it becomes a machine's disk.
fn new_image(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// What a disk that comes is kept as if the machine does not.
pub(super) fn partial_of(leaf: &DestinationLeaf, disk: &DeviceName) -> PartialOf {
    let (vm, from) = (leaf.attempt.vm.clone(), leaf.attempt.peer.clone());
    PartialOf { vm, disk: disk.clone(), from }
}

async fn receive(
    leaf: &DestinationLeaf,
    proposal: &Proposal,
    reservation: &Reservation,
    guest: &Guest,
    held: &mut Held,
) -> Result<(), Refusal> {
    let own = leaf.edges.socket_dir(&leaf.attempt.vm);
    let Some(peer) = leaf.edges.peer(&leaf.attempt.peer) else {
        return Err(Refusal::Other(format!("site {} is not configured", leaf.attempt.peer)));
    };
    let window = peer.bulk_window_bytes(leaf.edges.config.link.window_mib << 20);
    let migration = leaf.attempt.id;
    let limits = &leaf.edges.config.migration;
    let mirror = MirrorConfig {
        flush_bytes: limits.disk_flush_mib << 20,
        flush_interval: Duration::from_millis(limits.disk_flush_ms),
        max_window_log: reservation.disk_window_log,
        ..MirrorConfig::default()
    };
    let filling = guest_socket(guest, &own, "filling.sock");
    guest.nbd_start(&filling).await.map_err(hypervisor_failed)?;
    for (index, volume) in proposal.definition.volumes().enumerate() {
        guest.export(volume.name, Access::Write, &[]).await.map_err(hypervisor_failed)?;
        let client = NbdClient::connect(&filling, volume.name.as_str()).await.map_err(disk_failed)?;
        let id = BulkId { migration, channel: Channel::Disk(index as u8) };
        let channel = peer.bulk_receiver(id, window).await.map_err(disk_failed)?;
        let id = BulkId { migration, channel: Channel::Map(index as u8) };
        let telling = peer.bulk_sender(id, MAP_WINDOW).await.map_err(disk_failed)?;
        let there = held.there.get(index);
        let base = there.and_then(|there| there.base.clone());
        held.maps.push(match (there.filter(|there| there.partial).zip(held.images.get(index)), &base) {
            (Some((_, image)), _) => {
                DiskMap::of_kept_disk(image.clone(), client.clone(), base.clone(), telling)
            }
            (None, Some(base)) => DiskMap::of_copy_beside_new_disk(base.clone(), telling),
            (None, None) => DiskMap::of_new_disk(telling),
        });
        let size = volume.size_bytes;
        let target = DiskTarget::spawn(size, mirror, channel, client, base).map_err(disk_failed)?;
        held.disks.push(Arriving { name: volume.name.clone(), size: Bytes(size), target });
    }
    let incoming = guest_socket(guest, &own, "incoming.sock");
    guest.incoming(&incoming).await.map_err(hypervisor_failed)?;
    let id = BulkId { migration, channel: Channel::Memory };
    let channel = peer.bulk_receiver(id, window).await.map_err(memory_failed)?;
    let config = TargetConfig { shadow_pages: reservation.shadow_pages, ..TargetConfig::default() };
    let (base, pages) = (reservation.memory_base, reservation.shadow_pages);
    // The source may begin with what is damaged here: better now than when all disks are copied.
    let base = remembered::of_both(&leaf.edges, &leaf.attempt.vm, base, pages).await?;
    let disks = held.disks.iter().map(|disk| disk.target.named()).collect();
    held.memory = Some(MemoryTarget::start(incoming, channel, config, base, disks));
    Ok(())
}

async fn load(leaf: &DestinationLeaf, held: &mut Held) -> Result<(), Refusal> {
    let (Some(guest), Some(memory)) = (&held.guest, &mut held.memory) else {
        return Err(Refusal::Other("nothing was prepared".into()));
    };
    let (site, pool) = (leaf.edges.site(), &leaf.edges.config.storage.pool);
    let names: Vec<DeviceName> = held.disks.iter().map(|disk| disk.name.clone()).collect();
    // Whichever fails first says why; the others may wait for ever.
    let disks = try_join_all(held.disks.iter_mut().map(async |Arriving { name, size, target }| {
        let proven = target.proven().await.map(drop);
        proven.map_err(|error| damage::of_disk(site, pool, (&*name, *size), &error))
    }));
    let loaded = async {
        memory_proven(leaf, &names, memory).await?;
        let info = guest.wait_migration(|_| false, QEMU_LIMIT).await.map_err(hypervisor_failed)?;
        if info.status == MigrationStatus::Completed {
            return Ok(());
        }
        let detail = info.error.unwrap_or_default();
        Err(Refusal::Hypervisor(Refusal::text(format!("loading ended {}: {detail}", info.status))))
    };
    let gone = async {
        guest.gone().await;
        Err::<(), Refusal>(waiting_qemu_ended())
    };
    tokio::select! {
        both = async { tokio::try_join!(disks, loaded) } => { both?; }
        Err(why) = gone => return Err(why),
    }
    held.maps.clear();
    held.there.clear();
    close_disks(guest, &mut held.disks).await?;
    let state = guest.status().await.map_err(hypervisor_failed)?;
    if !matches!(state, RunState::Paused | RunState::Prelaunch) {
        return Err(Refusal::Hypervisor(format!("the loaded guest reads {state}")));
    }
    tracing::info!(vm = %leaf.attempt.vm, "loaded");
    Ok(())
}

/// Waits for memory; `disks` are the names of the machine's.
async fn memory_proven(
    leaf: &DestinationLeaf,
    disks: &[DeviceName],
    memory: &mut TargetHandle,
) -> Result<(), Refusal> {
    let end = memory.ended().await;
    if matches!(end, MemoryEnd::Proven(_)) {
        return Ok(());
    }
    if matches!(end, MemoryEnd::Mismatch(_)) {
        // Whatever it was that differed: the next attempt sends all of it.
        remembered::forget(&leaf.edges, &leaf.attempt.vm);
    }
    Err(damage::of_memory(leaf.edges.site(), disks, &end))
}

/// Nobody writes to the disks but the guest from here on.
async fn close_disks(guest: &Guest, disks: &mut Vec<Arriving>) -> Result<(), Refusal> {
    join_all(disks.drain(..).map(|disk| disk.target.close())).await;
    guest.close_exports(CLOSE_LIMIT).await.map_err(hypervisor_failed)?;
    guest.nbd_stop().await.map_err(hypervisor_failed)
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::sync::Arc;

    use longhaul_core::ids::{Epoch, MigrationId};
    use longhaul_core::migration::{Attempt, CommitMode};
    use tokio::sync::mpsc;

    use super::*;
    use crate::identity::Identity;
    use crate::migration::view::Viewer;
    use crate::test_site::{TestSite, definition, proposal};

    /// Machine web1 of site a, whose disk was cloned from debian-12, comes to site b, which may tell a of these templates and
    /// has an image of `image_bytes` for this one. Whether that is the new disk's base, and what b's operator is told.
    async fn a_clone_arrives(told: &str, image_bytes: Option<u64>) -> (bool, Vec<String>) {
        let [key_a, key_b] = [(); 2].map(|()| Identity::generate().unwrap());
        let mut site = TestSite::open("b", &key_b, &[("a", &key_a, None)]).await;
        let folder = tempfile::tempdir().unwrap();
        if let Some(bytes) = image_bytes {
            let image = folder.path().join("debian-12.raw");
            File::create(&image).unwrap().set_len(bytes).unwrap();
            set_permissions(&image, Permissions::from_mode(0o644)).unwrap();
        }
        let config = Arc::make_mut(&mut site.edges.config);
        config.storage.templates = Some(folder.path().to_owned());
        config.peer[0].templates = vec![told.to_owned()];
        let attempt = Attempt {
            id: MigrationId(7 << 96),
            vm: "web1".parse().unwrap(),
            peer: "a".parse().unwrap(),
            epoch: Epoch(1),
            commit: CommitMode::Confirmed,
        };
        let viewer = Viewer::new(&attempt, &attempt.peer, site.edges.site());
        let (edges, events, guest) = (site.edges.clone(), mpsc::channel(1).0, watch::Sender::new(None));
        let leaf = DestinationLeaf { edges, attempt, viewer, events, guest };
        let mut machine = definition();
        machine.disks[0].template = Some("debian-12".parse().unwrap());
        let mut held = Held::default();
        make_images(&leaf, &proposal(machine), &mut held).unwrap();
        assert!(held.images.iter().all(|image| image.exists()) && !held.there[0].partial);
        (held.there[0].base.is_some(), leaf.viewer.current().notices)
    }

    #[tokio::test]
    async fn a_clone_has_its_template_as_base_where_its_peer_may_be_told_of_it_and_it_is_no_longer() {
        let disk = definition().disks[0].size_bytes;
        for bytes in [disk, disk - 4096] {
            assert_eq!(a_clone_arrives("debian-*", Some(bytes)).await, (true, Vec::new()));
        }
        assert_eq!(a_clone_arrives("debian-11", Some(disk)).await, (false, Vec::new()));
        for (unfit, why) in [(Some(disk + 512), "only 1048576"), (None, "No such file")] {
            let (base, notices) = a_clone_arrives("debian-12", unfit).await;
            assert!(!base && notices.len() == 1, "{notices:?}");
            assert!(notices[0].contains("debian-12") && notices[0].contains(why), "{notices:?}");
        }
    }

    #[test]
    fn a_disk_that_arrives_is_read_by_its_owner_only_and_replaces_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web1-root.raw");
        let file = new_image(&path).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        assert!(new_image(&path).is_err());
    }
}
