//! One cluster's members over HTTP/1.1, by etcd's JSON gateway: a read, and one compare-and-swap.
//!
//! Keys and values are base64 there, and numbers are strings (the JSON form of protocol buffers; a field that is
//! false or empty is left out). A connection serves one question: one that was kept would be silently dead when a cut
//! makes the arbiter necessary. A read may go to any member, because a linearizable one is the cluster's answer; a
//! transaction goes to the member that was just read from, once. What values mean is not known here.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::{EtcdError, UnusableFile};
use crate::config::{Endpoint, EtcdConfig};

/// Many times what an answer with one key has.
const ANSWER_LIMIT: usize = 64 << 10;

/// The members of a cluster.
pub(super) struct Members {
    endpoints: Vec<Endpoint>,
    tls: Option<TlsConnector>,
    timeout: Duration,
    /// The one that answered last.
    first: AtomicUsize,
}

/// A connection to one of them.
pub(super) struct Member {
    endpoint: Endpoint,
    timeout: Duration,
    sender: SendRequest<Full<Bytes>>,
    driving: JoinHandle<()>,
}

/// What came of a compare-and-swap.
pub(super) enum Swapped {
    /// The new value stands there.
    Won,
    /// Something else stood there, and does still.
    Lost(Option<String>),
}

impl std::fmt::Debug for Members {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Members").field("endpoints", &self.endpoints).finish_non_exhaustive()
    }
}

impl Members {
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, UnusableFile> {
        Ok(Self {
            endpoints: config.endpoints.clone(),
            tls: tls(config)?,
            timeout: Duration::from_millis(config.timeout_ms),
            first: AtomicUsize::new(0),
        })
    }

    /// The value of `key`, and the member that told it; the one that answered last is asked first.
    pub(super) async fn read(&self, key: &str) -> Result<(Member, Option<String>), EtcdError> {
        let first = self.first.load(Ordering::Relaxed);
        let mut failed = EtcdError::NoMember;
        for turn in 0..self.endpoints.len() {
            let at = (first + turn) % self.endpoints.len();
            let endpoint = &self.endpoints[at];
            match within(self.timeout, endpoint, self.read_at(endpoint, key)).await {
                Ok(found) => {
                    self.first.store(at, Ordering::Relaxed);
                    return Ok(found);
                }
                Err(error) => {
                    tracing::debug!(%endpoint, %error, "member of the etcd cluster did not tell a key");
                    failed = error;
                }
            }
        }
        Err(failed)
    }

    async fn read_at(&self, endpoint: &Endpoint, key: &str) -> Result<(Member, Option<String>), EtcdError> {
        let mut member = self.connect(endpoint).await?;
        // Linearizable, which is etcd's default.
        let answer: Answer<Range> = member.ask("/v3/kv/range", &json!({ "key": coded(key) })).await?;
        let value = answer.body.value(endpoint)?;
        Ok((member, value))
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Member, EtcdError> {
        let unreachable = |source| EtcdError::Unreachable { endpoint: endpoint.clone(), source };
        let stream =
            TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let Some(tls) = self.tls.as_ref().filter(|_| endpoint.tls) else {
            return Member::over(stream, endpoint, self.timeout).await;
        };
        let name = ServerName::try_from(endpoint.host.clone())
            .map_err(|error| unreachable(std::io::Error::other(error)))?;
        let stream = tls.connect(name, stream).await.map_err(unreachable)?;
        Member::over(stream, endpoint, self.timeout).await
    }
}

impl Member {
    async fn over<S>(stream: S, endpoint: &Endpoint, timeout: Duration) -> Result<Self, EtcdError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) =
            handshake(TokioIo::new(stream)).await.map_err(|source| broken(endpoint, source))?;
        // Whoever waits for an answer hears of an error, too.
        let driving = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { endpoint: endpoint.clone(), timeout, sender, driving })
    }

    /// Puts `new` at `key` if `old` stands there, or nothing does. An error does not say that it was not put.
    pub(super) async fn swap(
        mut self,
        key: &str,
        old: Option<&str>,
        new: &str,
    ) -> Result<Swapped, EtcdError> {
        let key = coded(key);
        let compare = match old {
            Some(old) => json!({ "key": key, "target": "VALUE", "result": "EQUAL", "value": coded(old) }),
            None => json!({ "key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0" }),
        };
        let transaction = json!({
            "compare": [compare],
            "success": [{ "request_put": { "key": key, "value": coded(new) } }],
            "failure": [{ "request_range": { "key": key } }],
        });
        let (timeout, endpoint) = (self.timeout, self.endpoint.clone());
        let asked = self.ask::<Answer<Transaction>>("/v3/kv/txn", &transaction);
        within(timeout, &endpoint, asked).await?.body.outcome(&endpoint)
    }

    async fn ask<T: DeserializeOwned>(&mut self, path: &str, body: &Value) -> Result<T, EtcdError> {
        let endpoint = &self.endpoint;
        let request = hyper::Request::post(path)
            .header("host", authority(endpoint))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .map_err(|source| form(endpoint, source))?;
        // Just after an answer the connection may still be busy with its end.
        self.sender.ready().await.map_err(|source| broken(endpoint, source))?;
        let response = self.sender.send_request(request).await.map_err(|source| broken(endpoint, source))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
        let bytes = body.map_err(|source| broken(endpoint, source))?.to_bytes();
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|source| form(endpoint, source));
        }
        let message = complaint(&bytes);
        Err(EtcdError::Refused { endpoint: endpoint.clone(), status: status.as_u16(), message })
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.driving.abort();
    }
}

/// What every answer of etcd has; `{}` is another service's.
#[derive(Deserialize)]
struct Answer<T> {
    #[serde(rename = "header")]
    _header: IgnoredAny,
    #[serde(flatten)]
    body: T,
}

#[derive(Deserialize)]
struct Range {
    #[serde(default)]
    kvs: Vec<KeyValue>,
}

#[derive(Deserialize)]
struct KeyValue {
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
struct Transaction {
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<Response>,
}

#[derive(Deserialize)]
struct Response {
    // Newer gateways may spell names the JSON way.
    #[serde(alias = "responseRange")]
    response_range: Option<Range>,
}

#[derive(Deserialize)]
struct Complaint {
    message: String,
}

impl Range {
    fn value(self, endpoint: &Endpoint) -> Result<Option<String>, EtcdError> {
        let Some(held) = self.kvs.into_iter().next() else { return Ok(None) };
        let bytes = STANDARD.decode(held.value).map_err(|source| form(endpoint, source))?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

impl Transaction {
    fn outcome(self, endpoint: &Endpoint) -> Result<Swapped, EtcdError> {
        if self.succeeded {
            return Ok(Swapped::Won);
        }
        match self.responses.into_iter().find_map(|response| response.response_range) {
            Some(current) => Ok(Swapped::Lost(current.value(endpoint)?)),
            None => Err(form(endpoint, "a transaction that was lost without what stands there")),
        }
    }
}

/// What a member says that did not do as it was asked.
fn complaint(body: &[u8]) -> String {
    if let Ok(Complaint { message }) = serde_json::from_slice(body) {
        return message;
    }
    String::from_utf8_lossy(body).chars().take(200).collect()
}

async fn within<T>(
    limit: Duration,
    endpoint: &Endpoint,
    asked: impl Future<Output = Result<T, EtcdError>>,
) -> Result<T, EtcdError> {
    let late = |_| EtcdError::Late { endpoint: endpoint.clone(), after: limit };
    tokio::time::timeout(limit, asked).await.map_err(late)?
}

fn coded(text: &str) -> String {
    STANDARD.encode(text)
}

fn authority(endpoint: &Endpoint) -> String {
    let text = endpoint.to_string();
    text.split_once("//").map_or_else(|| text.clone(), |(_, authority)| authority.to_owned())
}

fn broken(endpoint: &Endpoint, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> EtcdError {
    EtcdError::Broken { endpoint: endpoint.clone(), source: source.into() }
}

fn form(endpoint: &Endpoint, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> EtcdError {
    EtcdError::Form { endpoint: endpoint.clone(), source: source.into() }
}

/// What TLS connections are made with; nothing without an authority.
fn tls(config: &EtcdConfig) -> Result<Option<TlsConnector>, UnusableFile> {
    let Some(ca_file) = &config.ca_file else { return Ok(None) };
    let ca = |error: &dyn std::fmt::Display| unusable("etcd.ca_file", ca_file, error);
    let mut roots = RootCertStore::empty();
    for authority in certificates("etcd.ca_file", ca_file)? {
        roots.add(authority).map_err(|error| ca(&error))?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| ca(&error))?
        .with_root_certificates(roots);
    let mut client = match (&config.cert_file, &config.key_file) {
        (Some(cert_file), Some(key_file)) => {
            let key_error = |error: &dyn std::fmt::Display| unusable("etcd.key_file", key_file, error);
            let key = PrivateKeyDer::from_pem_file(key_file).map_err(|error| key_error(&error))?;
            let chain = certificates("etcd.cert_file", cert_file)?;
            builder.with_client_auth_cert(chain, key).map_err(|error| key_error(&error))?
        }
        (None, _) | (_, None) => builder.with_no_client_auth(),
    };
    // etcd tells gRPC and its JSON gateway apart by this.
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Some(TlsConnector::from(Arc::new(client))))
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, UnusableFile> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = read.map_err(|error| unusable(key, path, &error))?;
    if found.is_empty() {
        return Err(unusable(key, path, &"no certificate is in it"));
    }
    Ok(found)
}

fn unusable(key: &'static str, path: &Path, why: &dyn std::fmt::Display) -> UnusableFile {
    UnusableFile { key, path: path.to_owned(), why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> Endpoint {
        "http://192.0.2.1:2379".to_owned().try_into().unwrap()
    }

    #[test]
    fn an_answer_of_etcd_is_read_with_what_it_leaves_out() {
        let value = |rest: &str| {
            let text = format!("{{\"header\":{{\"revision\":\"3\"}}{rest}}}");
            serde_json::from_str::<Answer<Range>>(&text).unwrap().body.value(&endpoint())
        };
        let held = r#","kvs":[{"key":"dg==","value":"YQ==","version":"1"}],"count":"1""#;
        assert_eq!(value(held).unwrap().as_deref(), Some("a"));
        assert_eq!(value("").unwrap(), None);
        assert_eq!(value(r#","kvs":[{"key":"dg=="}]"#).unwrap().as_deref(), Some(""));
        assert!(value(r#","kvs":[{"value":"%"}]"#).is_err());
        assert!(
            serde_json::from_str::<Answer<Range>>("{}").is_err(),
            "another service's answer is no absence"
        );
    }

    #[test]
    fn a_lost_transaction_says_what_stands_there_or_nothing_follows() {
        let outcome = |text: &str| serde_json::from_str::<Transaction>(text).unwrap().outcome(&endpoint());
        assert!(matches!(
            outcome(r#"{"succeeded":true,"responses":[{"response_put":{}}]}"#),
            Ok(Swapped::Won)
        ));
        for name in ["response_range", "responseRange"] {
            let there =
                outcome(&format!("{{\"responses\":[{{\"{name}\":{{\"kvs\":[{{\"value\":\"Yg==\"}}]}}}}]}}"));
            assert!(matches!(there, Ok(Swapped::Lost(Some(value))) if value == "b"));
        }
        assert!(matches!(outcome(r#"{"responses":[{"response_range":{}}]}"#), Ok(Swapped::Lost(None))));
        assert!(outcome("{}").is_err());
    }

    #[test]
    fn what_a_member_complains_of_is_told_shortly() {
        assert_eq!(complaint(br#"{"error":"x","message":"no leader","code":14}"#), "no leader");
        assert_eq!(complaint(b"<html>"), "<html>");
        assert_eq!(complaint(&[b'x'; 1000]).len(), 200);
    }
}
