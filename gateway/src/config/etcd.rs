//! The `[etcd]` table and what an endpoint may be.
//!
//! Values are checked as far as the file goes; no endpoint is asked and no certificate is read here.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

/// etcd's port for clients, where an endpoint names none.
const DEFAULT_PORT: u16 = 2379;

/// `[etcd]`: the cluster that `arbiter = "etcd"` asks. The same cluster and prefix at both sites.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdConfig {
    /// The cluster's members, `https://HOST:PORT`, the nearest first. Required. `http://` is for networks in which
    /// nobody else can listen or answer: whoever can write to the cluster decides who runs a machine.
    pub endpoints: Vec<Endpoint>,
    /// What the key of each machine begins with (default `longhaul/vm`): `PREFIX/NAME`.
    #[serde(default = "default_prefix")]
    pub prefix: String,
    /// The authority that signed the members' certificates, PEM (default none). Required with `https://`; the
    /// system's authorities are not asked.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// This site's certificate, PEM (default none), where the cluster asks clients for one.
    #[serde(default)]
    pub cert_file: Option<PathBuf>,
    /// Its key, PEM (default none). Whoever has it can decide who runs a machine.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// A member is waited for this long, for each of its answers (default 2000 ms); for a read the next one is asked
    /// then. A question gives up after 5 s whatever this says.
    #[serde(default = "default_timeout")]
    pub timeout_ms: u64,
}

impl EtcdConfig {
    /// A cluster whose members are `endpoints`, everything else as without the key.
    pub fn new(endpoints: Vec<Endpoint>) -> Self {
        let (ca_file, cert_file, key_file) = (None, None, None);
        let (prefix, timeout_ms) = (default_prefix(), default_timeout());
        Self { endpoints, prefix, ca_file, cert_file, key_file, timeout_ms }
    }
}

/// One member of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Endpoint {
    /// Whether it is spoken to by TLS.
    pub tls: bool,
    /// Its name or address, without brackets.
    pub host: String,
    /// Its TCP port.
    pub port: u16,
}

/// A text that is no endpoint.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no endpoint: expected https://HOST:PORT, or http://HOST:PORT in a trusted network")]
pub struct InvalidEndpoint(String);

impl TryFrom<String> for Endpoint {
    type Error = InvalidEndpoint;

    fn try_from(text: String) -> Result<Self, InvalidEndpoint> {
        parsed(&text).ok_or(InvalidEndpoint(text))
    }
}

fn parsed(text: &str) -> Option<Endpoint> {
    let uri: hyper::Uri = text.parse().ok()?;
    let tls = match uri.scheme_str()? {
        "https" => true,
        "http" => false,
        _ => return None,
    };
    let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'))?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let rest = uri.path_and_query().map_or("/", |rest| rest.as_str());
    let port = match authority.as_str().strip_prefix(authority.host())? {
        "" => DEFAULT_PORT,
        port => port.strip_prefix(':')?.parse().ok().filter(|port| *port > 0)?,
    };
    let plain = !host.is_empty() && rest == "/";
    plain.then(|| Endpoint { tls, host: host.to_owned(), port })
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        if self.host.contains(':') {
            return write!(f, "{scheme}://[{}]:{}", self.host, self.port);
        }
        write!(f, "{scheme}://{}:{}", self.host, self.port)
    }
}

fn default_prefix() -> String {
    "longhaul/vm".into()
}

fn default_timeout() -> u64 {
    2000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_made_here_is_as_one_whose_table_has_its_members_only() {
        let table: EtcdConfig = toml::from_str("endpoints = [\"http://192.0.2.1\"]").unwrap();
        assert_eq!(format!("{table:?}"), format!("{:?}", EtcdConfig::new(table.endpoints.clone())));
    }

    #[test]
    fn an_endpoint_is_a_scheme_a_host_and_a_port() {
        let written = |text: &str| parsed(text).map(|endpoint| endpoint.to_string());
        for (text, meant) in [
            ("https://192.0.2.1:2379", "https://192.0.2.1:2379"),
            ("http://etcd.example.net:1/", "http://etcd.example.net:1"),
            ("https://[2001:db8::1]", "https://[2001:db8::1]:2379"),
        ] {
            assert_eq!(written(text).as_deref(), Some(meant));
        }
        for text in [
            "192.0.2.1:2379",
            "ftp://a:1",
            "https://a:0",
            "https://a:99999",
            "https://u@a:1",
            "http://a/v3",
            "",
        ] {
            assert_eq!(written(text), None, "{text}");
        }
    }
}
