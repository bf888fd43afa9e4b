//! What the integration tests share: the same zones on five servers (embedded hickory; BIND, Knot, PowerDNS and YADIFA
//! from Debian), keys, and a proxy that breaks things between client and server.

#![allow(dead_code, unused_macros)]

pub mod daemon;
mod knotd;
mod named;
mod pdns;
pub mod proxy;
mod yadifad;

use std::net::{IpAddr, SocketAddr};

use dnsupdater::test_server::{Grant, TestServer, TestZone};
use dnsupdater::{Algorithm, DnsName, Epoch, Key, Records, Swap, Updater, UpdaterConfig};

use daemon::{Daemon, Program, Role, nobody};
pub use named::NAMED;

/// Runs each case, an `async fn(&World)`, against every server that can compare and swap, in a module named after it.
macro_rules! on_every_server {
    ($($case:ident),* $(,)?) => {
        $crate::support::on_server!(hickory, Hickory, $($case),*);
        $crate::support::on_server!(bind, Bind, $($case),*);
        $crate::support::on_server!(knot, Knot, $($case),*);
        $crate::support::on_server!(powerdns, PowerDns, $($case),*);
    };
}

macro_rules! on_server {
    ($module:ident, $kind:ident, $($case:ident),*) => {
        mod $module {
            $(#[tokio::test]
            async fn $case() {
                if let Some(world) = super::World::of(super::Kind::$kind).await {
                    super::$case(&world).await;
                }
            })*
        }
    };
}

#[allow(unused_imports)]
pub(crate) use {on_every_server, on_server};

pub const ZONE: &str = "\
$TTL 300
@ IN SOA ns1.vm.example. admin.vm.example. 1 3600 600 86400 5
@ IN NS ns1.vm.example.
@ IN NS dead.vm.example.
@ IN NS stale.vm.example.
@ IN NS nowhere.invalid.
ns1 IN A 127.0.0.1
dead IN A 127.0.0.2
stale IN A 127.0.0.3
app IN A 198.51.100.10
dual 600 IN A 198.51.100.11
dual 120 IN AAAA 2001:db8:a::11
alias IN CNAME app
*.wild IN A 192.0.2.9
several IN A 192.0.2.20
several IN A 192.0.2.21
foreign IN A 192.0.2.30
_longhaul.foreign IN TXT \"somebody else's\"
";

pub const REVERSE: &str = "\
$TTL 300
@ IN SOA ns1.vm.example. admin.vm.example. 1 3600 600 86400 5
@ IN NS ns1.vm.example.
10 IN PTR app.vm.example.
";

pub const REVERSE_ZONE: &str = "100.51.198.in-addr.arpa";

pub const REVERSE_AWAY: &str = "\
$TTL 300
@ IN SOA ns1.vm.example. admin.vm.example. 1 3600 600 86400 5
@ IN NS ns1.vm.example.
10 IN PTR host-10.pool.example.
11 IN CNAME 11.classless
11.classless IN PTR dual.vm.example.
";

pub const REVERSE_ZONE_AWAY: &str = "113.0.203.in-addr.arpa";

/// Every zone of a test server: its name and its text.
pub const ZONES: [(&str, &str); 3] =
    [("vm.example", ZONE), (REVERSE_ZONE, REVERSE), (REVERSE_ZONE_AWAY, REVERSE_AWAY)];

/// Every key: its name, its hash, its secret.
pub const KEYS: [(&str, &str, &str); 3] = [
    ("site-a", "hmac-sha256", "dGhlIHNlY3JldCBvZiBzaXRlIGEsIDMyIGJ5dGVzISE="),
    ("site-b", "hmac-sha256", "dGhlIHNlY3JldCBvZiBzaXRlIGIsIDMyIGJ5dGVzISE="),
    (
        "site-512",
        "hmac-sha512",
        "dGhlIHNlY3JldCBvZiBhIHN0cm9uZ2VyIGtpbmQgb2Yga2V5LCA2NCBieXRlcywgbW9yZSBvciBsZXNzLi4uLg==",
    ),
];

/// The server programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Hickory,
    Bind,
    Knot,
    PowerDns,
    Yadifa,
}

/// A server with the zones above, `site-a` and `site-512` allowed everything, `site-b` only `app` and `dual` where the
/// server can hold a key to names.
pub struct World {
    pub kind: Kind,
    pub address: SocketAddr,
    pub server: Backend,
}

pub enum Backend {
    Hickory(TestServer),
    Daemon(Daemon),
}

impl World {
    pub async fn hickory() -> World {
        let zones = ZONES.map(|(origin, text)| TestZone { origin: name(origin), text: text.to_owned() });
        let own = vec![name("app.vm.example"), name("dual.vm.example")];
        let grants = [site_a().into(), site_512().into(), Grant::only(site_b(), own)];
        let server = TestServer::start(loopback(0), &zones, &grants).await.expect("starts");
        World { kind: Kind::Hickory, address: server.address(), server: Backend::Hickory(server) }
    }

    /// None, with the reason printed, where the server is not installed.
    pub async fn of(kind: Kind) -> Option<World> {
        World::notifying(kind, nobody()).await
    }

    /// A server that tells the one at `secondary` of each change (port 0: nobody).
    pub async fn notifying(kind: Kind, secondary: SocketAddr) -> Option<World> {
        let Some(program) = kind.program() else { return Some(World::hickory().await) };
        let server = Daemon::start(program, loopback(0), Role::Primary { notify: secondary }).await?;
        Some(World { kind, address: server.address, server: Backend::Daemon(server) })
    }

    /// A fresh one of the same kind.
    pub async fn another(&self) -> World {
        World::of(self.kind).await.expect("it was there a moment ago")
    }

    pub fn updater(&self, key: Key) -> Updater {
        Updater::new(self.config(key)).expect("a valid configuration")
    }

    pub fn config(&self, key: Key) -> UpdaterConfig {
        config(vec![self.address], key)
    }
}

impl Kind {
    fn program(self) -> Option<&'static Program> {
        match self {
            Kind::Hickory => None,
            Kind::Bind => Some(&NAMED),
            Kind::Knot => Some(&knotd::KNOTD),
            Kind::PowerDns => Some(&pdns::PDNS),
            Kind::Yadifa => Some(&yadifad::YADIFAD),
        }
    }

    /// Whether a key can be held to single names.
    pub fn has_policy_per_name(self) -> bool {
        match self {
            Kind::Hickory | Kind::Bind | Kind::Knot => true,
            Kind::PowerDns | Kind::Yadifa => false,
        }
    }
}

pub fn config(servers: Vec<SocketAddr>, key: Key) -> UpdaterConfig {
    UpdaterConfig::new(servers, name("vm.example"), key)
}

pub fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

pub fn name(text: &str) -> DnsName {
    text.parse().expect("a name")
}

pub fn app() -> DnsName {
    name("app.vm.example")
}

pub fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().expect("an address")).collect()
}

pub const HOME: &str = "198.51.100.10";
pub const AWAY: &str = "203.0.113.10";

/// The first move of `app`, from nobody to site b.
pub fn first_swap() -> Swap {
    Swap::new(app(), ips(&[HOME]), ips(&[AWAY]), 30, "site-b")
}

/// The move back home, on top of the first.
pub fn second_swap() -> Swap {
    Swap::new(app(), ips(&[AWAY]), ips(&[HOME]), 30, "site-a").epochs(Epoch(1), Epoch(2))
}

pub fn site_a() -> Key {
    key("site-a", Algorithm::HmacSha256, b"the secret of site a, 32 bytes!!")
}

pub fn site_b() -> Key {
    key("site-b", Algorithm::HmacSha256, b"the secret of site b, 32 bytes!!")
}

pub fn site_512() -> Key {
    key(
        "site-512",
        Algorithm::HmacSha512,
        b"the secret of a stronger kind of key, 64 bytes, more or less....",
    )
}

pub fn key(key_name: &str, algorithm: Algorithm, secret: &[u8]) -> Key {
    Key::new(name(key_name), algorithm, secret.to_vec()).expect("long enough")
}

/// What a name is, without what every reading changes.
pub fn essence(records: &Records) -> (Vec<IpAddr>, Option<u32>, Option<u32>, String, u32) {
    let register = format!("{:?}", records.register);
    (records.addresses.clone(), records.a_ttl_s, records.aaaa_ttl_s, register, records.serial)
}
