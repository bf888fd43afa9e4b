//! What the integration tests share: one zone on two servers (embedded hickory, Debian's BIND), keys, and a proxy that
//! breaks things between client and server.

#![allow(dead_code)]

pub mod named;
pub mod proxy;

use std::net::{IpAddr, SocketAddr};

use dnsupdater::test_server::{Grant, TestServer, TestZone};
use dnsupdater::{Algorithm, DnsName, Epoch, Key, Records, Swap, Updater, UpdaterConfig};

use named::Named;

pub const ZONE: &str = "\
$TTL 300
@ IN SOA ns1.vm.example. admin.vm.example. 1 3600 600 86400 5
@ IN NS ns1.vm.example.
ns1 IN A 127.0.0.1
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

/// A server with the zones above, `site-a` and `site-512` allowed everything, `site-b` only `app` and `dual`.
pub struct World {
    pub address: SocketAddr,
    pub server: Backend,
}

pub enum Backend {
    Hickory(TestServer),
    Bind(Named),
}

impl World {
    pub async fn hickory() -> World {
        let zones = [
            TestZone { origin: name("vm.example"), text: ZONE.to_owned() },
            TestZone { origin: name(REVERSE_ZONE), text: REVERSE.to_owned() },
        ];
        let own = vec![name("app.vm.example"), name("dual.vm.example")];
        let grants = [site_a().into(), site_512().into(), Grant::only(site_b(), own)];
        let server = TestServer::start(loopback(0), &zones, &grants).await.expect("starts");
        World { address: server.address(), server: Backend::Hickory(server) }
    }

    /// None, with the reason printed, where there is no BIND.
    pub async fn bind() -> Option<World> {
        let server = Named::primary(loopback(0)).await?;
        Some(World { address: server.address, server: Backend::Bind(server) })
    }

    pub fn updater(&self, key: Key) -> Updater {
        Updater::new(self.config(key)).expect("a valid configuration")
    }

    pub fn config(&self, key: Key) -> UpdaterConfig {
        config(vec![self.address], key)
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
