//! The daemon: builds the edges, recovers, then runs one task that owns everything that is not on disk.
//!
//! ```text
//!   link events --\
//!   API requests --+--> select -> apply --> drivers (a task each), anchors (a task each)
//!   ended drivers -/
//! ```
//!
//! This task never waits for a QEMU: one that hangs would stop the messages of every other migration.
//! Whatever asks one is a task that reports back.
//!
//! Recovery comes before listening: what the journal owes is begun before a peer or an operator can
//! ask for anything new.

mod before;
mod build;
mod dispatch;
mod doctor;
mod flows;
mod image;
mod inhibit;
mod kept;
mod limits;
mod lowered;
mod machines;
mod power;
mod proposals;
mod recovery;
mod resolve;
mod restarts;
mod retries;
mod silent;
mod status;
#[cfg(test)]
mod test_daemon;
mod unknown;

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, interval};
use tracing_subscriber::EnvFilter;

use longhaul_core::ids::{MigrationId, SiteName, VmName};
use longhaul_core::migration::Attempt;
use longhaul_core::migration::message::{Proposal, Refusal};

use crate::api::Request;
use crate::api::types::{AnchorView, MigrateRequest};
use crate::config::Config;
use crate::hypervisor::Guest;
use crate::journal::JournalError;
use crate::link::LinkEvent;
use crate::migration::anchor::AnchorCommand;
use crate::migration::anchors;
use crate::migration::view::Viewer;
use crate::migration::{Edges, Inbound, MachineRow, descriptors, partial};
use proposals::Proposals;
use restarts::Watches;
use retries::PlannedRetry;
use silent::Answered;

/// Partial disks that are too old are looked for this often.
const SWEEP: Duration = Duration::from_secs(600);
/// Ended migrations that the status still shows.
const MAX_SHOWN: usize = 100;

pub use before::check;
pub use build::LinkPath;

/// Sets up logging: for people on a terminal, or JSON lines.
pub fn logs(json: bool) {
    let filter = EnvFilter::try_from_env("LONGHAUL_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A line that cannot be written is lost; complaining of it on the same stream would end a task.
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false);
    if json {
        builder.json().init();
    } else {
        builder.with_ansi(std::io::stderr().is_terminal()).init();
    }
}

/// Runs the daemon until it is told to stop.
pub fn run(config: Config) -> anyhow::Result<()> {
    if let Err(error) = descriptors::raise_limit() {
        tracing::warn!(%error, "the limit on open files stays what it is; moves are refused when it comes near");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let build::Opened { edges, mut link_events, api } = build::open(config).await?;
    let (anchor_sender, anchor_commands) = mpsc::channel(64);
    let (anchor_views, anchor_watch) = watch::channel(BTreeMap::new());
    let restored = anchors::restore(&edges, &anchor_views).await;
    tokio::spawn(anchors::run(edges.clone(), restored, anchor_commands, anchor_views));
    tokio::spawn(inhibit::run(edges.config.site.shutdown_inhibitor.clone(), edges.tunnel.status()));
    let (ended_tx, mut ended) = mpsc::channel(64);
    let (settled_tx, mut settled) = mpsc::channel(64);
    let (admitted_tx, mut admitted) = mpsc::channel(64);
    let (worked_tx, mut worked) = mpsc::channel(64);
    let (gone_tx, mut gone) = mpsc::channel(64);
    let (answered_tx, mut answered) = mpsc::channel(64);
    let mut daemon = Daemon {
        edges,
        machines: BTreeMap::new(),
        migrations: BTreeMap::new(),
        proposals: Proposals::default(),
        retries: BTreeMap::new(),
        anchors: anchor_sender,
        anchor_views: anchor_watch,
        ended: ended_tx,
        settled: settled_tx,
        admitted: admitted_tx,
        working: BTreeSet::new(),
        worked: worked_tx,
        watches: Watches::new(gone_tx),
        answered: answered_tx,
    };
    daemon.recover().await.context("Recovery failed; nothing was changed")?;
    let (requests_tx, mut requests) = mpsc::channel::<Request>(64);
    tracing::info!(site = %daemon.edges.site(), api = %api.path().display(), "gateway is ready");
    let mut api = tokio::spawn(api.serve(requests_tx));
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // The first look is at once.
    let (mut daily, mut sweep, mut ttls) = (interval(kept::DAILY), interval(SWEEP), interval(lowered::AGAIN));
    let mut restoring = JoinSet::new();
    let tunnel = daemon.edges.tunnel.clone();
    loop {
        let retry_at = daemon.next_retry_at();
        let restart_at = daemon.watches.next_at();
        tokio::select! {
            _ = sweep.tick() => partial::sweep(&daemon.edges.config.storage),
            () = tokio::time::sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => {
                daemon.begin_retries().await;
            }
            () = tokio::time::sleep_until(restart_at.unwrap_or_else(Instant::now)), if restart_at.is_some() => {
                daemon.begin_restarts();
            }
            Some(event) = link_events.recv() => daemon.on_link(event).await,
            Some(request) = requests.recv() => daemon.on_request(request).await,
            Some(end) = ended.recv() => daemon.on_ended(end).await?,
            Some(id) = settled.recv() => daemon.on_settled(id).await,
            Some(answer) = admitted.recv() => daemon.on_admitted(answer),
            Some(work) = worked.recv() => daemon.on_worked(work),
            Some(end) = gone.recv() => daemon.on_gone(end),
            Some(found) = answered.recv() => daemon.on_answered(found),
            ended = &mut api => return Err(api_ended(ended)),
            () = tunnel.ended() => anyhow::bail!("The tunnel has ended; see the log for why, and start the gateway again"),
            _ = daily.tick() => daemon.delete_due_disks(),
            _ = ttls.tick() => daemon.restore_ttls(&mut restoring),
            Some(restored) = restoring.join_next() => daemon.on_ttl_restored(restored),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    api.abort();
    daemon.close().await;
    Ok(())
}

/// A gateway that nobody can ask is none; whatever watches it starts it again.
fn api_ended(ended: Result<std::io::Result<()>, JoinError>) -> anyhow::Error {
    let error = ended.map_or_else(anyhow::Error::from, |served| match served {
        Ok(()) => anyhow::anyhow!("its socket was closed"),
        Err(error) => error.into(),
    });
    error.context("The API failed; machines and tunnels stay")
}

/// What the one task owns.
struct Daemon {
    edges: Edges,
    machines: BTreeMap<VmName, Machine>,
    migrations: BTreeMap<MigrationId, Running>,
    proposals: Proposals,
    /// Attempts that follow by themselves, by the machine.
    retries: BTreeMap<VmName, PlannedRetry>,
    anchors: mpsc::Sender<AnchorCommand>,
    anchor_views: watch::Receiver<BTreeMap<VmName, AnchorView>>,
    ended: mpsc::Sender<Ended>,
    /// Migrations that are over for the machine, and not yet for their drivers.
    settled: mpsc::Sender<MigrationId>,
    admitted: mpsc::Sender<Admitted>,
    /// Machines that a task is just starting, stopping or adopting.
    working: BTreeSet<VmName>,
    worked: mpsc::Sender<power::Worked>,
    watches: Watches,
    answered: mpsc::Sender<Answered>,
}

/// A machine that this site knows.
#[derive(Clone)]
struct Machine {
    row: MachineRow,
    guest: Option<Guest>,
    /// There is a QEMU, and it does not answer.
    silent: bool,
}

impl Machine {
    fn has_qemu(&self) -> bool {
        self.guest.as_ref().is_some_and(|guest| !guest.qmp().is_closed())
    }
}

/// A migration, running or shown after its end.
struct Running {
    attempt: Attempt,
    /// What was asked for, where this site is the source.
    request: Option<MigrateRequest>,
    /// What an operator lets it take of the link, in Mbit/s. The attempts that follow it begin with that, also where its pause
    /// has lifted it.
    limit_mbit: Option<u64>,
    /// `None` once it has ended.
    inbox: Option<mpsc::Sender<Inbound>>,
    viewer: Viewer,
    /// `None` once it has ended: a monitor serves one client, and whoever holds the last handle keeps it.
    guest: Option<watch::Receiver<Option<Guest>>>,
}

/// A driver has ended.
struct Ended {
    id: MigrationId,
    failed: Option<JournalError>,
}

/// A proposal was looked at.
struct Admitted {
    id: MigrationId,
    peer: SiteName,
    proposal: Box<Proposal>,
    verdict: Result<(), Refusal>,
}

impl Daemon {
    async fn close(&self) {
        tracing::info!("stopping; machines and tunnels stay");
        if let Some((flows, machines)) = self.connections_through_here() {
            tracing::warn!(
                flows,
                machines,
                "connections stall until the gateway is back; a reboot of this host breaks them"
            );
        }
        self.edges.link.close().await;
    }

    async fn on_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up { peer, restarted, .. } => {
                tracing::info!(%peer, restarted, "link is up");
                if restarted && let Err(error) = self.edges.tunnel.peer_restarted(peer.clone()).await {
                    tracing::warn!(%peer, %error, "tunnel was not told");
                }
                self.tell_migrations_with(&peer, || Inbound::LinkUp).await;
                self.tell_taken_back(&peer);
            }
            LinkEvent::Down { peer, reason } => {
                tracing::warn!(%peer, ?reason, "link is down");
                self.tell_migrations_with(&peer, || Inbound::LinkDown).await;
            }
            LinkEvent::Control { peer, message } => self.on_message(peer, message).await,
            LinkEvent::Unreachable { peer, reason } => {
                tracing::warn!(%peer, reason, "peer cannot be reached")
            }
            // The link has said it, once for each key.
            LinkEvent::Refused { key } => tracing::debug!(?key, "somebody with an unknown key was refused"),
        }
    }

    async fn tell_migrations_with(&self, peer: &SiteName, inbound: impl Fn() -> Inbound) {
        for running in self.migrations.values().filter(|running| running.attempt.peer == *peer) {
            if let Some(inbox) = &running.inbox {
                // A driver that ends at this moment needs no news.
                drop(inbox.send(inbound()).await);
            }
        }
    }

    /// What the migration did with its machine is done, though its driver may still have something to tell.
    async fn on_settled(&mut self, id: MigrationId) {
        let Some(running) = self.migrations.get_mut(&id) else { return };
        // The second time there is nothing new.
        let Some(guest) = running.guest.take() else { return };
        let (vm, guest) = (running.attempt.vm.clone(), guest.borrow().clone());
        self.refresh(&vm, guest).await;
        self.after_migration(&vm, id);
    }

    async fn on_ended(&mut self, end: Ended) -> anyhow::Result<()> {
        if let Some(error) = end.failed {
            return Err(error).context("The journal failed; nothing can be decided any more");
        }
        self.on_settled(end.id).await;
        let Some(running) = self.migrations.get_mut(&end.id) else { return Ok(()) };
        running.inbox = None;
        self.plan_retry(end.id);
        self.forget_limit(end.id).await;
        let shown: BTreeSet<MigrationId> = self
            .migrations
            .iter()
            .filter(|(_, running)| running.inbox.is_none())
            .map(|(id, _)| *id)
            .collect();
        if shown.len() > MAX_SHOWN {
            let oldest = shown.iter().min_by_key(|id| self.migrations[id].viewer.current().started_ms);
            if let Some(id) = oldest {
                self.migrations.remove(id);
            }
        }
        Ok(())
    }

    /// The migration that `vm` is in at this moment.
    fn migration_of(&self, vm: &VmName) -> Option<&Running> {
        self.migrations.values().find(|running| {
            running.attempt.vm == *vm
                && running.inbox.is_some()
                && running.viewer.current().progressing == crate::api::types::Progressing::Running
        })
    }
}
