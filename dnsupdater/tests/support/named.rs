//! Debian's BIND as a child process on a high port of the loopback, without privileges, in a directory of its own.

use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dnsupdater::{Scope, Updater};
use tempfile::TempDir;

use super::{REVERSE, REVERSE_ZONE, ZONE, app, config, ips, loopback, site_a};

const START_LIMIT: Duration = Duration::from_secs(20);

const KEYS: &str = r#"
key "site-a" { algorithm hmac-sha256; secret "dGhlIHNlY3JldCBvZiBzaXRlIGEsIDMyIGJ5dGVzISE="; };
key "site-b" { algorithm hmac-sha256; secret "dGhlIHNlY3JldCBvZiBzaXRlIGIsIDMyIGJ5dGVzISE="; };
key "site-512" { algorithm hmac-sha512; secret "dGhlIHNlY3JldCBvZiBhIHN0cm9uZ2VyIGtpbmQgb2Yga2V5LCA2NCBieXRlcywgbW9yZSBvciBsZXNzLi4uLg=="; };
"#;

/// A running `named`; killed when dropped.
pub struct Named {
    pub address: SocketAddr,
    directory: TempDir,
    child: Child,
}

impl Named {
    /// A primary of the test zones that notifies the server at `secondary` (port 0: nobody).
    pub async fn primary(secondary: SocketAddr) -> Option<Named> {
        Self::with_zones(&primary_zones(secondary)).await
    }

    /// The same primary with the same data, restarted so that it notifies `secondary`.
    pub async fn notifying(mut self, secondary: SocketAddr) -> Option<Named> {
        let configuration = configuration(self.directory.path(), self.address, &primary_zones(secondary));
        fs::write(self.directory.path().join("named.conf"), configuration).expect("writable");
        self.kill_and_restart().await;
        Some(self)
    }

    /// A secondary of `primary` that accepts its notifications.
    pub async fn secondary(primary: SocketAddr) -> Option<Named> {
        let zones = format!(
            r#"zone "vm.example" {{ type secondary; file "vm.copy"; masterfile-format text; notify no;
                primaries {{ {} port {} key site-a; }}; }};"#,
            primary.ip(),
            primary.port()
        );
        Self::with_zones(&zones).await
    }

    async fn with_zones(zones: &str) -> Option<Named> {
        if Command::new("named").arg("-v").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            println!("skipped: named is not installed (Debian package bind9)");
            return None;
        }
        for _ in 0..8 {
            let directory = tempfile::Builder::new().prefix("lhdns-").tempdir().expect("a directory");
            let address = free_port();
            write_files(directory.path(), address, zones);
            let child = spawn(directory.path());
            let mut named = Named { address, directory, child };
            if named.ready().await {
                return Some(named);
            }
        }
        panic!("named does not start");
    }

    /// SIGKILL, then the same server again on the same files.
    pub async fn kill_and_restart(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it was started here");
        self.child = spawn(self.directory.path());
        assert!(self.ready().await, "named does not come back: {}", self.log());
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// False if it ended, for instance because somebody else took the port.
    async fn ready(&mut self) -> bool {
        let mut config = config(vec![self.address], site_a());
        (config.retries, config.timeout) = (0, Duration::from_secs(2));
        let probe = Updater::new(config).expect("a valid configuration");
        let started = Instant::now();
        while started.elapsed() < START_LIMIT {
            if self.child.try_wait().expect("it was started here").is_some() {
                return false;
            }
            let view = probe.verify(&app(), &ips(&[]), Scope::Listed).await.expect("valid arguments");
            if !matches!(view.servers[0].state, dnsupdater::ServerState::Silent { .. }) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("named is not ready after {START_LIMIT:?}: {}", self.log());
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn primary_zones(secondary: SocketAddr) -> String {
    let notify = match secondary.port() {
        0 => "notify no;".to_owned(),
        port => {
            format!("notify explicit; also-notify {{ {} port {port}; }}; notify-delay 0;", secondary.ip())
        }
    };
    format!(
        r#"zone "vm.example" {{ type primary; file "vm.zone"; {notify} update-policy {{
                grant site-a subdomain vm.example. A AAAA TXT;
                grant site-512 subdomain vm.example. A AAAA TXT;
                grant site-b name app.vm.example. A AAAA; grant site-b name _longhaul.app.vm.example. TXT;
                grant site-b name dual.vm.example. A AAAA; grant site-b name _longhaul.dual.vm.example. TXT; }}; }};
            zone "{REVERSE_ZONE}" {{ type primary; file "reverse.zone"; {notify}
                update-policy {{ grant site-a subdomain {REVERSE_ZONE}. PTR; }}; }};"#
    )
}

fn write_files(directory: &Path, address: SocketAddr, zones: &str) {
    fs::write(directory.join("named.conf"), configuration(directory, address, zones)).expect("writable");
    fs::write(directory.join("vm.zone"), ZONE).expect("writable");
    fs::write(directory.join("reverse.zone"), REVERSE).expect("writable");
}

fn configuration(directory: &Path, address: SocketAddr, zones: &str) -> String {
    let shown = directory.display();
    let options = format!(
        r#"options {{ directory "{shown}"; pid-file none; session-keyfile none; lock-file none;
            listen-on port {} {{ {}; }}; listen-on-v6 {{ none; }}; recursion no; dnssec-validation no;
            allow-transfer {{ key site-a; }}; minimal-responses yes; }};
        controls {{ }};"#,
        address.port(),
        address.ip()
    );
    format!("{KEYS}{options}{zones}")
}

fn spawn(directory: &Path) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(directory.join("log")).expect("writable");
    Command::new("named")
        .args(["-g", "-n", "1", "-c"])
        .arg(directory.join("named.conf"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("named is installed")
}

/// A port that is free for TCP and UDP now; named fails to start if it is not any more, and another is tried.
fn free_port() -> SocketAddr {
    loop {
        let tcp = TcpListener::bind(loopback(0)).expect("the loopback has ports");
        let address = tcp.local_addr().expect("bound");
        if UdpSocket::bind(address).is_ok() {
            return address;
        }
    }
}
