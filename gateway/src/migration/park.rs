//! Stage 3 at the source: the pause. Nothing here waits for a round trip, but for two things. A disk's barrier waits until names
//! were read of blocks that its last writes hit. And a machine that is given away behind its last byte waits until that byte has
//! left, as acknowledgements tell: what is behind the Commit is what the path holds, not what waits here.
//!
//! QEMU keeps to the rate it was given by sleeping to the end of each tenth of a second: what it slept in the pause would be the
//! pause. It is waited for before packets are held.
//!
//! Order matters: packets are held before the guest stops, and QEMU reads those that came before, so that none is lost; the memory
//! pump absorbs before the guest is told to stop, so that QEMU never waits for the WAN; the mirrors end while the
//! source's disks are still active; `Parked` is said only when QEMU itself says that it has stopped
//! for good, run state and migration status both.

use std::time::Duration;

use futures_util::future::select_all;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use longhaul_core::bulk::Channel;
use longhaul_core::migration::CommitMode;
use longhaul_core::migration::message::{Handover, Refusal};
use longhaul_core::migration::source::Event;
use longhaul_core::tunnel::handover::NicHandover;
use longhaul_core::units::{Bytes, Rate};

use super::precopy::{Transfer, age, disk_failed, memory_failed, show_memory};
use super::source::SourceLeaf;
use super::{MachineRow, chain, hypervisor_failed, told_to_stop};
use crate::config::CongestionChoice;
use crate::hypervisor::{Events, Guest, MigrationStatus, RunState};
use crate::link::OnItsWay;
use crate::memory::{SourceHandle, SourceMode};
use crate::migration::stay::holds;
use crate::tunnel::wait_until_read;

/// QEMU finishes what it has locally: no network is involved, so this is generous.
const QEMU_LIMIT: Duration = Duration::from_secs(30);
/// A QEMU that has written what it may sleeps no longer (`BUFFER_DELAY`, migration/migration.c).
const QEMU_SLEEPS: Duration = Duration::from_millis(100);
/// A QEMU with so much to write does not come to its end by itself before it is read on: a socket holds 208 KiB, and one read takes
/// 128 KiB.
const MUCH: Bytes = Bytes(512 << 10);
/// What holding packets takes on a host that has something else to do (measured: 12 ms).
const HOLDING_TAKES: Duration = Duration::from_millis(20);
/// So much may be behind a Commit on any path, in bytes: a chunk is acknowledged as a whole, and on a slow path the last two that
/// have left would be waited for until they are there.
const LEAST_BEHIND_BYTES: u64 = 128 << 10;

/// Parks the machine, unless it is told to stop; the transfer then goes to the next leaf.
pub(super) async fn run(
    leaf: SourceLeaf,
    guest: Guest,
    row: MachineRow,
    mut transfer: Transfer,
    mut stop: watch::Receiver<bool>,
) -> Transfer {
    let parked = tokio::select! {
        biased;
        () = told_to_stop(&mut stop) => return transfer,
        parked = park(&leaf, &guest, &row, &mut transfer) => parked,
    };
    let event = match parked {
        Ok(handover) => Event::Parked(Box::new(handover)),
        Err(why) => Event::Failed(why),
    };
    leaf.report(event).await;
    transfer
}

/// A limit is for the copy: in the pause it would cost the guest's users more than it spares others.
async fn unlimit(leaf: &SourceLeaf) {
    if let Some(peer) = leaf.edges.link.peer(&leaf.attempt.peer) {
        // A link that is closed sends nothing.
        let _ = peer.limit_migration(leaf.attempt.id, None).await;
    }
    leaf.viewer.change(|view| view.limit_mbit = None);
}

async fn park(
    leaf: &SourceLeaf,
    guest: &Guest,
    row: &MachineRow,
    transfer: &mut Transfer,
) -> Result<Handover, Refusal> {
    let tunnel = &leaf.edges.tunnel;
    let holds = holds(&leaf.edges, row, &leaf.attempt.peer)?;
    let taps: Vec<String> = holds.iter().map(|hold| hold.port.clone()).collect();
    let Some(memory) = &mut transfer.memory else {
        return Err(Refusal::Other("Memory was not started".into()));
    };
    let mut events = guest.events();
    wake(guest, memory).await?;
    for hold in holds {
        tunnel.hold_begin(hold).await.map_err(tunnel_failed)?;
    }
    memory.set_mode(SourceMode::Absorb);
    guest.limit_bandwidth(None).await.map_err(hypervisor_failed)?;
    if guest.status().await.is_ok_and(|state| state == RunState::Running) {
        read_out(leaf, &taps).await;
    }
    leaf.report(Event::GuestStopped).await;
    guest.stop().await.map_err(hypervisor_failed)?;
    leaf.viewer.paused_for(stopped_for(&mut events).await);
    tracing::debug!(vm = %leaf.attempt.vm, "the guest has stopped");
    unlimit(leaf).await;
    let waiting = |status: &MigrationStatus| *status == MigrationStatus::PreSwitchover;
    expect(guest, waiting, MigrationStatus::PreSwitchover).await?;
    tracing::debug!(vm = %leaf.attempt.vm, "memory is at its last part");
    for (name, disk) in &mut transfer.disks {
        guest.mirror_finish(name, QEMU_LIMIT).await.map_err(hypervisor_failed)?;
        let barrier = disk.finish().await.map_err(disk_failed)?;
        tracing::debug!(vm = %leaf.attempt.vm, disk = %name, ?barrier, "disk barrier sent");
    }
    guest.continue_switchover().await.map_err(hypervisor_failed)?;
    expect(guest, |status| *status == MigrationStatus::Completed, MigrationStatus::Completed).await?;
    let end = memory.ended().await.map_err(memory_failed)?;
    show_memory(leaf, &memory.progress().borrow());
    let state = guest.status_after_migration(QEMU_LIMIT).await.map_err(hypervisor_failed)?;
    if state != RunState::Postmigrate {
        return Err(Refusal::Hypervisor(format!("the guest reads {state} after it was sent")));
    }
    let on_its_way = until_on_its_way(leaf, &mut transfer.on_its_way);
    let (handover, ()) = tokio::join!(handover(leaf, row), on_its_way);
    tracing::info!(vm = %leaf.attempt.vm, bytes = end.bytes.0, "parked");
    handover
}

/// Lets QEMU write as it likes from when it wakes, while the guest runs and its packets reach it. One that has much to write does
/// not get to its end before it waits for us; one that has little might, and stop the guest before packets are held: that is only
/// waited for until it is about to wake.
async fn wake(guest: &Guest, memory: &SourceHandle) -> Result<(), Refusal> {
    let info = guest.migration().await.map_err(hypervisor_failed)?;
    if info.status != MigrationStatus::Active {
        return Ok(());
    }
    if info.remaining < MUCH {
        let hold_at = memory.woke().map(|woke| woke + QEMU_SLEEPS.saturating_sub(HOLDING_TAKES));
        sleep_until(hold_at.unwrap_or_else(Instant::now)).await;
        return Ok(());
    }
    let wakes = memory.wakes();
    memory.set_mode(SourceMode::Listening);
    guest.limit_bandwidth(None).await.map_err(hypervisor_failed)?;
    let _ = timeout(QEMU_SLEEPS, wakes).await; // by then it is awake, or waits for the link
    Ok(())
}

/// Pipelined, waits until no more is unacknowledged than the path holds. A link that is down lets nothing leave: the pause's
/// deadline is the source's.
async fn until_on_its_way(leaf: &SourceLeaf, channels: &mut Vec<OnItsWay>) {
    if leaf.attempt.commit != CommitMode::Pipelined {
        return;
    }
    while channels.iter().map(OnItsWay::bytes).sum::<u64>() > may_be_behind(leaf) {
        let taken = channels.iter_mut().map(|channel| Box::pin(channel.taken()));
        let (taken, index, _) = select_all(taken).await;
        if taken.is_err() {
            // A disk whose last acknowledgement was lost with the link is closed by a destination that has all of it.
            let channel = channels.swap_remove(index);
            if channel.id().channel == Channel::Memory {
                // It is refused there, and the destination says why.
                return std::future::pending().await;
            }
        }
    }
}

/// What the path holds: as it is estimated, or by the operator's word.
fn may_be_behind(leaf: &SourceLeaf) -> u64 {
    let Some(peer) = leaf.edges.peer(&leaf.attempt.peer) else { return LEAST_BEHIND_BYTES };
    let link = &leaf.edges.config.link;
    let held = match link.congestion {
        CongestionChoice::Model => peer.path_holds().unwrap_or_default(),
        CongestionChoice::Fixed => Rate::mbit(link.rate_mbit).bytes_in(peer.stats().rtt),
    };
    held.0.max(LEAST_BEHIND_BYTES)
}

/// Lets QEMU read what had come to the machine's taps before its packets were held.
async fn read_out(leaf: &SourceLeaf, taps: &[String]) {
    let vm = &leaf.attempt.vm;
    match wait_until_read(taps).await {
        Ok(busy) if busy.is_empty() => {}
        Ok(taps) => tracing::debug!(%vm, ?taps, "packets may stay behind in the machine's taps"),
        Err(error) => {
            tracing::debug!(%vm, error = chain(&error), "nobody knows what is left in the machine's taps")
        }
    }
}

/// How long the guest has stood still, by QEMU's own event: that comes before its answer to `stop`, and a busy
/// host may need a while for either. Does not wait: an event that was lost counts from now.
async fn stopped_for(events: &mut Events) -> Duration {
    while let Ok(Ok(event)) = timeout(Duration::ZERO, events.next()).await {
        if event.name == "STOP" {
            return age(event.at);
        }
    }
    Duration::ZERO
}

async fn expect(
    guest: &Guest,
    wanted: impl Fn(&MigrationStatus) -> bool,
    status: MigrationStatus,
) -> Result<(), Refusal> {
    let info = guest.wait_migration(wanted, QEMU_LIMIT).await.map_err(hypervisor_failed)?;
    if info.status == status {
        return Ok(());
    }
    let detail = info.error.unwrap_or_default();
    Err(Refusal::Hypervisor(Refusal::text(format!("expected {status}, found {}: {detail}", info.status))))
}

/// What keeps the machine's connections alive, sampled now that it stands still.
async fn handover(leaf: &SourceLeaf, row: &MachineRow) -> Result<Handover, Refusal> {
    let mut nics = Vec::new();
    for hold in holds(&leaf.edges, row, &leaf.attempt.peer)? {
        let Some(nic) = row.definition.nics.iter().find(|nic| nic.name == hold.key.nic) else { continue };
        let flows = leaf.edges.tunnel.sample(hold.key.clone()).await.map_err(tunnel_failed)?;
        nics.push(NicHandover {
            nic: nic.name.clone(),
            mac: nic.mac,
            home: nic.home.clone(),
            // Neighbours and prefixes went with the proposal and do not change in a pause.
            neighbours: Vec::new(),
            home_prefixes: Vec::new(),
            flows,
        });
    }
    let mut handover = Handover { nics };
    let left_out = handover.bound_flows();
    if left_out > 0 {
        tracing::warn!(vm = %leaf.attempt.vm, left_out, "more connections are open than can be handed over");
    }
    Ok(handover)
}

pub(super) fn tunnel_failed(error: impl std::error::Error) -> Refusal {
    Refusal::Other(Refusal::text(format!("Tunnel failed: {}", chain(&error))))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use longhaul_core::bulk::BulkId;
    use longhaul_core::ids::{Epoch, MigrationId};
    use longhaul_core::migration::Attempt;
    use tokio::sync::mpsc;
    use tokio::time::timeout;

    use super::*;
    use crate::chunk::{ChunkRecv, ChunkSend};
    use crate::link::{BulkReceiver, BulkSender};
    use crate::migration::view::Viewer;
    use crate::test_site::TestSite;

    const PATIENCE: Duration = Duration::from_secs(20);
    const ID: MigrationId = MigrationId(7);

    fn leaf(site: &TestSite, commit: CommitMode) -> SourceLeaf {
        let (vm, peer) = ("web1".parse().unwrap(), "b".parse().unwrap());
        let attempt = Attempt { id: ID, vm, peer, epoch: Epoch(1), commit };
        let viewer = Viewer::new(&attempt, site.edges.site(), &attempt.peer);
        let (edges, events, guest) = (site.edges.clone(), mpsc::channel(1).0, watch::Sender::new(None));
        SourceLeaf { edges, attempt, viewer, events, guest }
    }

    /// A channel with more on its way than any path's least.
    async fn sending(a: &TestSite, channel: Channel) -> BulkSender {
        let id = BulkId { migration: ID, channel };
        let mut sender =
            a.edges.peer(&"b".parse().unwrap()).unwrap().bulk_sender(id, 64 << 20).await.unwrap();
        for _ in 0..4 {
            sender.absorb(Bytes::from(vec![1; 1 << 19])).unwrap();
        }
        sender
    }

    async fn receiving(b: &TestSite, channel: Channel) -> BulkReceiver {
        let id = BulkId { migration: ID, channel };
        b.edges.peer(&"a".parse().unwrap()).unwrap().bulk_receiver(id, 64 << 20).await.unwrap()
    }

    #[tokio::test]
    async fn what_waits_here_is_waited_for_until_it_has_left_and_only_pipelined() {
        let (a, b) = TestSite::pair().await;
        let sender = sending(&a, Channel::Memory).await;
        let mut channels = vec![sender.on_its_way()];
        until_on_its_way(&leaf(&a, CommitMode::Confirmed), &mut channels).await;
        let leaf = leaf(&a, CommitMode::Pipelined);
        let soon = timeout(Duration::from_millis(200), until_on_its_way(&leaf, &mut channels)).await;
        assert!(soon.is_err(), "nobody receives it");
        let mut receiver = receiving(&b, Channel::Memory).await;
        let took = tokio::spawn(async move { while receiver.recv().await.is_some() {} });
        timeout(PATIENCE, until_on_its_way(&leaf, &mut channels)).await.unwrap();
        took.abort();
    }

    #[tokio::test]
    async fn a_disk_that_the_other_site_has_done_with_is_on_its_way_no_more_and_of_memory_it_says_why() {
        let (a, b) = TestSite::pair().await;
        for (channel, limit) in [(Channel::Disk(0), PATIENCE), (Channel::Memory, Duration::from_secs(5))] {
            let mut channels = vec![sending(&a, channel).await.on_its_way()];
            drop(receiving(&b, channel).await);
            let leaf = leaf(&a, CommitMode::Pipelined);
            let waited = timeout(limit, until_on_its_way(&leaf, &mut channels)).await;
            assert_eq!(waited.is_ok(), channel != Channel::Memory, "{channel:?}");
            assert!(channels.is_empty(), "it was closed");
        }
    }
}
