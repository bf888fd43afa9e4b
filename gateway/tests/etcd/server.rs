//! A real etcd for the tests, what can stand between it and its client, and what can stand in its place.
//!
//! Everything is on loopback and ports that were free a moment ago; what was started ends when it is dropped.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use gateway::config::EtcdConfig;
use gateway::etcd::Registers;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};

/// A running etcd of one member.
pub struct Etcd {
    /// Where its clients reach it.
    pub endpoint: String,
    child: Child,
    folder: TempDir,
}

impl Etcd {
    /// Starts one without TLS; nothing, and the reason printed, where there is none.
    pub async fn start() -> Option<Self> {
        let etcd = Self::spawn("http", Vec::new())?;
        etcd.ready("").await;
        Some(etcd)
    }

    /// Starts one that asks its clients for a certificate.
    pub async fn start_tls(certificates: &Certificates) -> Option<Self> {
        let path = |name: &str| certificates.path(name).display().to_string();
        let more = vec![
            "--client-cert-auth".to_owned(),
            format!("--trusted-ca-file={}", path("ca.pem")),
            format!("--cert-file={}", path("member.pem")),
            format!("--key-file={}", path("member.key")),
        ];
        let etcd = Self::spawn("https", more)?;
        etcd.ready(&certificates.client("ca", Some("site"))).await;
        Some(etcd)
    }

    fn spawn(scheme: &str, more: Vec<String>) -> Option<Self> {
        let program = program("etcd", "Debian's etcd-server")?;
        let folder = tempfile::tempdir().unwrap();
        let (endpoint, peer) = (free_endpoint().replace("http", scheme), free_endpoint());
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let child = Command::new(program)
            .arg(format!("--data-dir={}", folder.path().join("data").display()))
            .arg(format!("--listen-client-urls={endpoint}"))
            .arg(format!("--advertise-client-urls={endpoint}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=default={peer}"))
            .args(more)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Some(Self { endpoint, child, folder })
    }

    async fn ready(&self, more: &str) {
        let text = format!("endpoints = [\"{}\"]\n{more}", self.endpoint);
        let config: EtcdConfig = toml::from_str(&text).unwrap();
        let registers = Registers::open(&config).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Err(error) = registers.round_trip().await {
            let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "etcd does not answer: {error:?}\n{log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Writes a value as somebody else would.
    pub async fn put(&self, key: &str, value: &str) {
        let body =
            format!("{{\"key\":\"{}\",\"value\":\"{}\"}}", STANDARD.encode(key), STANDARD.encode(value));
        self.post("/v3/kv/put", &body).await;
    }

    /// Deletes a key as somebody else would.
    pub async fn delete(&self, key: &str) {
        self.post("/v3/kv/deleterange", &format!("{{\"key\":\"{}\"}}", STANDARD.encode(key))).await;
    }

    async fn post(&self, path: &str, body: &str) {
        let mut stream = TcpStream::connect(address(&self.endpoint)).await.unwrap();
        let length = body.len();
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // One that has ended already needs no end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a proxy keeps of transactions; everything else passes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Loses {
    /// The answers: what was asked is done.
    Answers,
    /// The requests, until they are let go.
    Requests,
}

/// Stands between etcd and its client.
pub struct Proxy {
    /// Where clients reach it.
    pub endpoint: String,
    seen: Arc<AtomicUsize>,
    release: Arc<Notify>,
    delivered: mpsc::Receiver<()>,
}

impl Proxy {
    /// Begins to pass on what is said to `endpoint`.
    pub async fn start(endpoint: &str, loses: Loses) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = address(endpoint);
        let own = format!("http://{}", listener.local_addr().unwrap());
        let (seen, release) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let (done, delivered) = mpsc::channel(8);
        let (counted, released) = (seen.clone(), release.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let passing =
                    Passing { loses, seen: counted.clone(), release: released.clone(), done: done.clone() };
                tokio::spawn(passing.run(client, server));
            }
        });
        Self { endpoint: own, seen, release, delivered }
    }

    /// How many transactions came.
    pub fn transactions(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }

    /// Passes on the requests that were kept; how many, once etcd has answered them.
    pub async fn let_go(mut self) -> usize {
        let kept = self.transactions();
        self.release.notify_waiters();
        for _ in 0..kept {
            self.delivered.recv().await.unwrap();
        }
        kept
    }
}

/// One connection through a proxy.
struct Passing {
    loses: Loses,
    seen: Arc<AtomicUsize>,
    release: Arc<Notify>,
    done: mpsc::Sender<()>,
}

impl Passing {
    /// A client of one question sends one request at a time, each in one piece.
    async fn run(self, mut client: TcpStream, server: SocketAddr) {
        let mut upstream = TcpStream::connect(server).await.unwrap();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let Ok(length @ 1..) = client.read(&mut buffer).await else { return };
            let is_transaction = buffer[..length].windows(10).any(|text| text == b"/v3/kv/txn");
            if is_transaction {
                let released = self.release.notified();
                self.seen.fetch_add(1, Ordering::SeqCst);
                if self.loses == Loses::Requests {
                    released.await;
                }
            }
            upstream.write_all(&buffer[..length]).await.unwrap();
            let Ok(length @ 1..) = upstream.read(&mut buffer).await else { return };
            if is_transaction {
                // Nobody waits for this in a test about lost answers.
                let _ = self.done.send(()).await;
                continue;
            }
            let _ = client.write_all(&buffer[..length]).await;
        }
    }
}

/// Something that takes connections and says nothing.
pub struct Silent {
    /// Where it is.
    pub endpoint: String,
    connections: Arc<AtomicUsize>,
}

impl Silent {
    /// How many were made.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Starts one.
pub async fn silent() -> Silent {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            kept.push(stream);
        }
    });
    Silent { endpoint, connections }
}

/// A web server that is no etcd, and what it says to everything.
pub async fn other_service(says: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{says}", says.len());
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    endpoint
}

/// Two authorities, a member's certificate and a site's, made by openssl.
pub struct Certificates(TempDir);

impl Certificates {
    /// Makes them; nothing, and the reason printed, where there is no openssl.
    pub fn make() -> Option<Self> {
        let made = Self(tempfile::tempdir().unwrap());
        let openssl = program("openssl", "the package openssl")?;
        for authority in ["ca", "other"] {
            made.run(
                &openssl,
                &format!("req -x509 -subj /CN={authority} -out {authority}.pem {}", key(authority)),
            );
        }
        // The JSON gateway of a member is a client of that member.
        let both = "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n";
        std::fs::write(made.path("extensions"), both).unwrap();
        for name in ["member", "site"] {
            made.run(&openssl, &format!("req -subj /CN={name} -out {name}.csr {}", key(name)));
            made.run(
                &openssl,
                &format!(
                    "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions \
                     -out {name}.pem"
                ),
            );
        }
        Some(made)
    }

    /// Where one of them is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Lines for `[etcd]`.
    pub fn client(&self, authority: &str, name: Option<&str>) -> String {
        let own = name.map(|name| {
            let (cert, key) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
            format!("cert_file = {cert:?}\nkey_file = {key:?}\n")
        });
        let ca = self.path(&format!("{authority}.pem"));
        format!("ca_file = {ca:?}\n{}", own.unwrap_or_default())
    }

    fn run(&self, openssl: &Path, arguments: &str) {
        let output = Command::new(openssl)
            .args(arguments.split_whitespace())
            .current_dir(self.0.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

fn key(name: &str) -> String {
    format!("-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {name}.key")
}

/// Nobody listened there a moment ago.
pub fn free_endpoint() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn address(endpoint: &str) -> SocketAddr {
    endpoint.split_once("//").unwrap().1.parse().unwrap()
}

/// A program of this machine; where it is missing, that is said.
fn program(name: &str, package: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        println!("skipped: no {name} here; {package} has it");
    }
    found
}
