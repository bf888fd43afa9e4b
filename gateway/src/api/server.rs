//! Answers HTTP on the UNIX socket by asking the daemon's task. Decides nothing.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use axum::Router;
use axum::extract::{Json, Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use longhaul_core::ids::{MigrationId, SiteName, VmName};

use super::types::{
    AdoptRequest, DefineRequest, ErrorBody, LimitRequest, MigrateRequest, MovedRequest, ResolveRequest,
};
use super::{Reply, Request, RequestError};

/// The API's socket: bound, not answered yet. It is removed with this value, for a socket that nobody answers
/// is worse than none.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    path: Bound,
}

#[derive(Debug)]
struct Bound(PathBuf);

impl Drop for Bound {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

impl ApiSocket {
    /// Listens at `path`; whoever asks already waits. A socket left by an earlier run is replaced, so the caller
    /// has made sure that no other gateway runs here. Anything that is no socket stays, and is an error.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::symlink_metadata(path) {
            Ok(about) if about.file_type().is_socket() => std::fs::remove_file(path)?,
            // Binding fails then and says why.
            Ok(_) | Err(_) => {}
        }
        let socket = Self { listener: UnixListener::bind(path)?, path: Bound(path.to_owned()) };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
        Ok(socket)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path.0
    }

    /// Answers until the process ends.
    pub async fn serve(self, requests: mpsc::Sender<Request>) -> io::Result<()> {
        let Self { listener, path: _path } = self;
        axum::serve(listener, router(requests)).await
    }
}

/// The routes, over the daemon's request channel.
pub fn router(requests: mpsc::Sender<Request>) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/metrics", get(metrics))
        .route("/v1/status", get(status))
        .route("/v1/doctor", get(doctor))
        .route("/v1/journal", get(journal))
        .route("/v1/machines", post(define))
        .route("/v1/machines/adopt", post(adopt))
        .route("/v1/machines/{name}/start", post(start))
        .route("/v1/machines/{name}/stop", post(stop))
        .route("/v1/machines/{name}/may-run", get(may_run))
        .route("/v1/machines/{name}/resolve", post(resolve))
        .route("/v1/machines/{name}", axum::routing::delete(undefine))
        .route("/v1/machines/{name}/flows", get(flows))
        .route("/v1/machines/{name}/release", post(release))
        .route("/v1/machines/{name}/moved", post(moved))
        .route("/v1/partials/{name}", axum::routing::delete(discard))
        .route("/v1/kept/{name}", axum::routing::delete(discard_kept))
        .route("/v1/migrations", post(migrate))
        .route("/v1/migrations/{id}", get(migration).delete(abort))
        .route("/v1/migrations/{id}/limit", put(limit_migration))
        .route("/v1/peers/{name}/limit", put(limit_peer))
        .with_state(Daemon(requests))
}

#[derive(Clone)]
struct Daemon(mpsc::Sender<Request>);

#[derive(Deserialize)]
struct MachineQuery {
    vm: Option<VmName>,
}

#[derive(Deserialize)]
struct UndefineQuery {
    #[serde(default)]
    forget: bool,
}

impl Daemon {
    async fn ask<T: Serialize>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Response {
        let (reply, answer) = oneshot::channel();
        if self.0.send(request(reply)).await.is_err() {
            return stopping();
        }
        match answer.await {
            Ok(Ok(value)) => Json(value).into_response(),
            Ok(Err(error)) => error.into_response(),
            Err(_) => stopping(),
        }
    }

    async fn look<T: Serialize>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Response {
        let (reply, answer) = oneshot::channel();
        if self.0.send(request(reply)).await.is_err() {
            return stopping();
        }
        answer.await.map_or_else(|_| stopping(), |value| Json(value).into_response())
    }
}

async fn metrics(State(daemon): State<Daemon>) -> Response {
    let (reply, answer) = oneshot::channel();
    if daemon.0.send(Request::Metrics(reply)).await.is_err() {
        return stopping();
    }
    let open_metrics = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    answer.await.map_or_else(|_| stopping(), |page| (open_metrics, page).into_response())
}

async fn status(State(daemon): State<Daemon>) -> Response {
    daemon.look(Request::Status).await
}

async fn flows(State(daemon): State<Daemon>, UrlPath(vm): UrlPath<VmName>) -> Response {
    daemon.ask(|reply| Request::Flows(vm, reply)).await
}

async fn release(State(daemon): State<Daemon>, UrlPath(vm): UrlPath<VmName>) -> Response {
    daemon.ask(|reply| Request::Release(vm, reply)).await
}

async fn moved(
    State(daemon): State<Daemon>,
    UrlPath(vm): UrlPath<VmName>,
    Json(body): Json<MovedRequest>,
) -> Response {
    daemon.ask(|reply| Request::Moved(vm, body, reply)).await
}

async fn doctor(State(daemon): State<Daemon>, Query(query): Query<MachineQuery>) -> Response {
    daemon.look(|reply| Request::Doctor(query.vm, reply)).await
}

async fn journal(State(daemon): State<Daemon>, Query(query): Query<MachineQuery>) -> Response {
    daemon.ask(|reply| Request::Journal(query.vm, reply)).await
}

async fn define(State(daemon): State<Daemon>, Json(body): Json<DefineRequest>) -> Response {
    daemon.ask(|reply| Request::Define(Box::new(body), reply)).await
}

async fn adopt(State(daemon): State<Daemon>, Json(body): Json<AdoptRequest>) -> Response {
    daemon.ask(|reply| Request::Adopt(Box::new(body), reply)).await
}

async fn start(State(daemon): State<Daemon>, UrlPath(name): UrlPath<VmName>) -> Response {
    daemon.ask(|reply| Request::Start(name, reply)).await
}

async fn stop(State(daemon): State<Daemon>, UrlPath(name): UrlPath<VmName>) -> Response {
    daemon.ask(|reply| Request::Stop(name, reply)).await
}

async fn may_run(State(daemon): State<Daemon>, UrlPath(name): UrlPath<VmName>) -> Response {
    daemon.ask(|reply| Request::MayRun(name, reply)).await
}

async fn resolve(
    State(daemon): State<Daemon>,
    UrlPath(name): UrlPath<VmName>,
    Json(body): Json<ResolveRequest>,
) -> Response {
    daemon.ask(|reply| Request::Resolve(name, body, reply)).await
}

async fn undefine(
    State(daemon): State<Daemon>,
    UrlPath(name): UrlPath<VmName>,
    Query(query): Query<UndefineQuery>,
) -> Response {
    daemon.ask(|reply| Request::Undefine(name, query.forget, reply)).await
}

async fn discard(State(daemon): State<Daemon>, UrlPath(name): UrlPath<VmName>) -> Response {
    daemon.ask(|reply| Request::Discard(name, reply)).await
}

async fn discard_kept(State(daemon): State<Daemon>, UrlPath(name): UrlPath<VmName>) -> Response {
    daemon.ask(|reply| Request::DiscardKept(name, reply)).await
}

async fn migrate(State(daemon): State<Daemon>, Json(body): Json<MigrateRequest>) -> Response {
    daemon.ask(|reply| Request::Migrate(body, reply)).await
}

async fn migration(State(daemon): State<Daemon>, UrlPath(id): UrlPath<String>) -> Response {
    match parse_id(&id) {
        Some(id) => daemon.ask(|reply| Request::Migration(id, reply)).await,
        None => no_such_migration(&id),
    }
}

async fn abort(State(daemon): State<Daemon>, UrlPath(id): UrlPath<String>) -> Response {
    match parse_id(&id) {
        Some(id) => daemon.ask(|reply| Request::Abort(id, reply)).await,
        None => no_such_migration(&id),
    }
}

async fn limit_migration(
    State(daemon): State<Daemon>,
    UrlPath(id): UrlPath<String>,
    Json(body): Json<LimitRequest>,
) -> Response {
    match parse_id(&id) {
        Some(id) => daemon.ask(|reply| Request::LimitMigration(id, body, reply)).await,
        None => no_such_migration(&id),
    }
}

async fn limit_peer(
    State(daemon): State<Daemon>,
    UrlPath(peer): UrlPath<SiteName>,
    Json(body): Json<LimitRequest>,
) -> Response {
    daemon.ask(|reply| Request::LimitPeer(peer, body, reply)).await
}

fn parse_id(text: &str) -> Option<MigrationId> {
    u128::from_str_radix(text, 16).ok().map(MigrationId)
}

fn no_such_migration(id: &str) -> Response {
    RequestError::NotFound(format!("No migration {id}; `longhaul status` lists them")).into_response()
}

fn stopping() -> Response {
    let body = ErrorBody { error: "Gateway is stopping".into() };
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

impl IntoResponse for RequestError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Conflict(_) | Self::MayNotRun(_) => StatusCode::CONFLICT,
            Self::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(ErrorBody { error: self.to_string() })).into_response()
    }
}
