//! The API: HTTP and JSON on a UNIX socket, used by the command line and by programs.
//!
//! `types` is what travels, `server` answers it by asking the daemon's task, `client` is the one typed
//! client. Whoever can open the socket may do everything; its file mode is the access control.

pub mod client;
pub mod server;
pub mod types;

use tokio::sync::oneshot;

use longhaul_core::ids::{MigrationId, SiteName, VmName};
use longhaul_core::migration::ledger::MayNotRun;

use types::{
    AdoptRequest, DefineRequest, Finding, FlowsView, JournalView, LimitRequest, MigrateRequest,
    MigrationView, MovedRequest, ResolveRequest, Started, StatusView,
};

/// A request to the daemon's task, with the way back for the answer.
#[derive(Debug)]
pub enum Request {
    /// Everything there is to see.
    Status(oneshot::Sender<StatusView>),
    /// Takes a definition.
    Define(Box<DefineRequest>, Reply<()>),
    /// Takes a machine that runs already.
    Adopt(Box<AdoptRequest>, Reply<()>),
    /// Starts a machine.
    Start(VmName, Reply<()>),
    /// Stops a machine for good (power off).
    Stop(VmName, Reply<()>),
    /// Forgets a machine that is stopped; one that is at another site only if that is said. Its disk stays.
    Undefine(VmName, bool, Reply<()>),
    /// Throws away the disks that are kept of a machine that did not come.
    Discard(VmName, Reply<()>),
    /// Throws away the memory and the disks that are kept of a machine that left, for its way back.
    DiscardKept(VmName, Reply<()>),
    /// The connections for which something of a machine that left is still held.
    Flows(VmName, Reply<FlowsView>),
    /// Ends them.
    Release(VmName, Reply<()>),
    /// Says where a machine is that left, for a site that cannot.
    Moved(VmName, MovedRequest, Reply<()>),
    /// Begins a migration.
    Migrate(MigrateRequest, Reply<Started>),
    /// One migration.
    Migration(MigrationId, Reply<MigrationView>),
    /// Ends a migration that has not committed.
    Abort(MigrationId, Reply<()>),
    /// Limits what is sent to a peer.
    LimitPeer(SiteName, LimitRequest, Reply<()>),
    /// Limits what a migration sends from here.
    LimitMigration(MigrationId, LimitRequest, Reply<()>),
    /// Decides a move that waits for a peer that is gone for good.
    Resolve(VmName, ResolveRequest, Reply<()>),
    /// Whether a machine may be started here by something else (a start gate).
    MayRun(VmName, Reply<()>),
    /// What would make a migration fail.
    Doctor(Option<VmName>, oneshot::Sender<Vec<Finding>>),
    /// What the journal holds of a machine's migrations, or of all, and what is done next.
    Journal(Option<VmName>, Reply<Vec<JournalView>>),
    /// The metrics page.
    Metrics(oneshot::Sender<String>),
}

/// The way back for an answer.
pub type Reply<T> = oneshot::Sender<Result<T, RequestError>>;

/// Why a request is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// The request contradicts the state things are in.
    #[error("{0}")]
    Conflict(String),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The machine may not run here.
    #[error(transparent)]
    MayNotRun(#[from] MayNotRun),
    /// It was tried and failed here.
    #[error("{0}")]
    Failed(String),
}
