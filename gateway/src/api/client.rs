//! The one typed client of the API, over its UNIX socket. One connection per request.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use longhaul_core::ids::{SiteName, VmName};

use super::types::{
    AdoptRequest, DefineRequest, ErrorBody, Finding, FlowsView, JournalView, LimitRequest, MigrateRequest,
    MigrationView, MovedRequest, ResolveRequest, Started, StatusView,
};

/// Why there is no answer, or not the one hoped for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "Cannot reach the gateway at {socket}; is `longhaul serve` running, and may you open the socket?"
    )]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("Gateway broke off the answer")]
    Broken(#[source] hyper::Error),
    /// The answer is not what this version expects.
    #[error("Gateway answered in a form this version does not know; use the same version of both")]
    Form(#[source] serde_json::Error),
    /// The gateway says no.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// For people.
        message: String,
    },
}

/// A client of the gateway whose API is at one socket.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client for the API at `socket`. Nothing is opened yet.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Everything there is to see.
    pub async fn status(&self) -> Result<StatusView, ClientError> {
        self.ask(Method::GET, "/v1/status", &()).await
    }

    /// What would make a migration fail.
    pub async fn doctor(&self, vm: Option<&VmName>) -> Result<Vec<Finding>, ClientError> {
        let query = vm.map(|vm| format!("?vm={vm}")).unwrap_or_default();
        self.ask(Method::GET, &format!("/v1/doctor{query}"), &()).await
    }

    /// What the journal holds of a machine's migrations, or of all.
    pub async fn journal(&self, vm: Option<&VmName>) -> Result<Vec<JournalView>, ClientError> {
        let query = vm.map(|vm| format!("?vm={vm}")).unwrap_or_default();
        self.ask(Method::GET, &format!("/v1/journal{query}"), &()).await
    }

    /// Takes a definition.
    pub async fn define(&self, request: &DefineRequest) -> Result<(), ClientError> {
        self.ask(Method::POST, "/v1/machines", request).await
    }

    /// Takes a machine that runs already.
    pub async fn adopt(&self, request: &AdoptRequest) -> Result<(), ClientError> {
        self.ask(Method::POST, "/v1/machines/adopt", request).await
    }

    /// Starts a machine.
    pub async fn start(&self, vm: &VmName) -> Result<(), ClientError> {
        self.ask(Method::POST, &format!("/v1/machines/{vm}/start"), &()).await
    }

    /// Stops a machine.
    pub async fn stop(&self, vm: &VmName) -> Result<(), ClientError> {
        self.ask(Method::POST, &format!("/v1/machines/{vm}/stop"), &()).await
    }

    /// Forgets a machine; `forget` one that is at another site, too.
    pub async fn undefine(&self, vm: &VmName, forget: bool) -> Result<(), ClientError> {
        self.ask(Method::DELETE, &format!("/v1/machines/{vm}?forget={forget}"), &()).await
    }

    /// Throws away the disks that are kept of a machine that did not come.
    pub async fn discard(&self, vm: &VmName) -> Result<(), ClientError> {
        self.ask(Method::DELETE, &format!("/v1/partials/{vm}"), &()).await
    }

    /// Throws away the memory and the disks that are kept of a machine that left.
    pub async fn discard_kept(&self, vm: &VmName) -> Result<(), ClientError> {
        self.ask(Method::DELETE, &format!("/v1/kept/{vm}"), &()).await
    }

    /// Whether something else may start the machine here.
    pub async fn may_run(&self, vm: &VmName) -> Result<(), ClientError> {
        self.ask(Method::GET, &format!("/v1/machines/{vm}/may-run"), &()).await
    }

    /// Decides a move that waits for a peer that is gone for good.
    pub async fn resolve(&self, vm: &VmName, request: &ResolveRequest) -> Result<(), ClientError> {
        self.ask(Method::POST, &format!("/v1/machines/{vm}/resolve"), request).await
    }

    /// What is held of a machine that left.
    pub async fn flows(&self, vm: &VmName) -> Result<FlowsView, ClientError> {
        self.ask(Method::GET, &format!("/v1/machines/{vm}/flows"), &()).await
    }

    /// Ends it.
    pub async fn release(&self, vm: &VmName) -> Result<(), ClientError> {
        self.ask(Method::POST, &format!("/v1/machines/{vm}/release"), &()).await
    }

    /// Says where a machine is that left, for a site that cannot.
    pub async fn moved(&self, vm: &VmName, request: &MovedRequest) -> Result<(), ClientError> {
        self.ask(Method::POST, &format!("/v1/machines/{vm}/moved"), request).await
    }

    /// Begins a migration.
    pub async fn migrate(&self, request: &MigrateRequest) -> Result<Started, ClientError> {
        self.ask(Method::POST, "/v1/migrations", request).await
    }

    /// One migration.
    pub async fn migration(&self, id: &str) -> Result<MigrationView, ClientError> {
        self.ask(Method::GET, &format!("/v1/migrations/{id}"), &()).await
    }

    /// Ends a migration that has not committed.
    pub async fn abort(&self, id: &str) -> Result<(), ClientError> {
        self.ask(Method::DELETE, &format!("/v1/migrations/{id}"), &()).await
    }

    /// Limits what a migration sends from this site, in Mbit/s, or no longer.
    pub async fn limit_migration(&self, id: &str, rate_mbit: Option<u64>) -> Result<(), ClientError> {
        self.ask(Method::PUT, &format!("/v1/migrations/{id}/limit"), &LimitRequest { rate_mbit }).await
    }

    /// Limits what is sent to a peer, in Mbit/s, or no longer.
    pub async fn limit_peer(&self, peer: &SiteName, rate_mbit: Option<u64>) -> Result<(), ClientError> {
        self.ask(Method::PUT, &format!("/v1/peers/{peer}/limit"), &LimitRequest { rate_mbit }).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Unreachable { socket: self.socket.clone(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(ClientError::Broken)?;
        let driving = tokio::spawn(connection);
        let body = serde_json::to_vec(body).map_err(ClientError::Form)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "longhaul")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .expect("a path made of checked names is a URI");
        let response = sender.send_request(request).await.map_err(ClientError::Broken)?;
        let status = response.status();
        let bytes = response.into_body().collect().await.map_err(ClientError::Broken)?.to_bytes();
        driving.abort();
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(ClientError::Form);
        }
        let message = match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => body.error,
            Err(_) => String::from_utf8_lossy(&bytes).trim().to_owned(),
        };
        Err(ClientError::Refused { status, message })
    }
}
