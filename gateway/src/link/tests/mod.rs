//! Two or more links in one process, over loopback or over an emulated path.

mod bulk;
mod connecting;
mod liars;
mod limits;
mod path;
mod wan;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use longhaul_core::bulk::{BulkId, Channel};
use longhaul_core::ids::{MigrationId, SiteName};
use longhaul_core::units::Rate;
use longhaul_core::wire::{Message, Opaque};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::*;

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// A link, its events and who it is.
struct Site {
    name: SiteName,
    identity: Identity,
    link: Link,
    events: mpsc::Receiver<LinkEvent>,
}

fn name(text: &str) -> SiteName {
    text.parse().unwrap()
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn peer_config(peer: &str, key: PublicKey, address: Option<SocketAddr>) -> PeerConfig {
    PeerConfig { name: name(peer), key, address }
}

/// Quick to notice and to return, so that tests are.
fn config(site: &str, peers: Vec<PeerConfig>) -> LinkConfig {
    let mut config = LinkConfig::new(name(site), loopback(), peers);
    config.rate = Rate::mbit(2000);
    config.rtt = Duration::from_millis(10);
    config.keep_alive = Duration::from_millis(200);
    config.idle_timeout = Duration::from_secs(2);
    config.backoff = Duration::from_millis(50);
    config.backoff_limit = Duration::from_millis(200);
    config.handshake_timeout = Duration::from_secs(2);
    config.dial_after = Duration::from_millis(100);
    config
}

impl Site {
    async fn open(config: LinkConfig, identity: Identity) -> Self {
        let name = config.site.clone();
        let (link, events) = Link::open(config, &identity).await.unwrap();
        Self { name, identity, link, events }
    }

    fn address(&self) -> SocketAddr {
        self.link.local_addr().unwrap()
    }

    fn peer(&self, peer: &str) -> PeerHandle {
        self.link.peer(&name(peer)).unwrap()
    }

    async fn event(&mut self) -> LinkEvent {
        timeout(PATIENCE, self.events.recv()).await.expect("an event in time").expect("the link is open")
    }

    /// The next event that `wanted` picks; others are passed over.
    async fn event_where<T>(&mut self, wanted: impl Fn(&LinkEvent) -> Option<T>) -> T {
        loop {
            let event = self.event().await;
            if let Some(found) = wanted(&event) {
                return found;
            }
        }
    }

    async fn up(&mut self) {
        self.event_where(|event| matches!(event, LinkEvent::Up { .. }).then_some(())).await;
    }

    async fn down(&mut self) -> DownReason {
        self.event_where(|event| match event {
            LinkEvent::Down { reason, .. } => Some(reason.clone()),
            LinkEvent::Up { .. }
            | LinkEvent::Control { .. }
            | LinkEvent::Unreachable { .. }
            | LinkEvent::Refused { .. } => None,
        })
        .await
    }
}

/// Sites a and b; b dials a, directly.
async fn pair() -> (Site, Site) {
    pair_with(|_a| {}, |_b| {}, |address| address).await
}

/// Sites a and b with changed configurations; b dials a at the address that `via` gives.
async fn pair_with(
    change_a: impl Fn(&mut LinkConfig),
    change_b: impl Fn(&mut LinkConfig),
    via: impl FnOnce(SocketAddr) -> SocketAddr,
) -> (Site, Site) {
    let (key_a, key_b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let mut config_a = config("a", vec![peer_config("b", key_b.public_key(), None)]);
    change_a(&mut config_a);
    let public_a = key_a.public_key();
    let mut a = Site::open(config_a, key_a).await;
    let mut config_b = config("b", vec![peer_config("a", public_a, Some(via(a.address())))]);
    change_b(&mut config_b);
    let mut b = Site::open(config_b, key_b).await;
    a.up().await;
    b.up().await;
    (a, b)
}

fn message(number: u128, body: &[u8]) -> Message {
    Message::Migration { id: MigrationId(number), body: Opaque::try_from(body.to_vec()).unwrap() }
}

fn bulk_id(migration: u128, channel: Channel) -> BulkId {
    BulkId { migration: MigrationId(migration), channel }
}

/// A chunk whose content follows from its number.
fn chunk(number: u64, length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    Bytes::from(bytes)
}

async fn wait_until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, wait).await.expect("the condition comes true");
}
