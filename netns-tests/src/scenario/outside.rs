//! What can be seen of a move without asking a gateway: the name server's answers and the host's routes. It judges
//! nothing.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::demo::unix_ms;
use super::names::Names;
use crate::netns::Namespace;

/// Between two questions to the name server.
const ASK: Duration = Duration::from_millis(100);
/// Between two looks at the routes.
const LOOK: Duration = Duration::from_millis(100);

/// Asks the name server again and again until a name has left an address.
pub struct NameWatch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Option<u64>>,
}

impl NameWatch {
    /// Begins to ask for `name`, which has the address `old`.
    pub fn begin(names: &Names, name: &str, old: IpAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (reader, name, stopped) = (names.reader(), name.to_owned(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // A server that does not answer at this moment is asked again.
                if reader.read(&name).is_ok_and(|found| !found.addresses.contains(&old)) {
                    return Some(unix_ms());
                }
                std::thread::sleep(ASK);
            }
            None
        });
        Self { stop, thread }
    }

    /// When the server first answered without the old address, if it has.
    pub fn end(self) -> Option<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok().flatten()
    }
}

/// Whether a host takes packets to `home` for itself: a route of that one address into the tunnel.
pub fn attracts(host: &Namespace, home: IpAddr) -> Result<bool> {
    let routes = host.output("ip", &["route", "show", "table", "main", &format!("{home}/32")])?;
    Ok(!routes.trim().is_empty())
}

/// Waits until a host no longer attracts `home`; when that was seen, or nothing if it still does after `limit`.
pub async fn released(host: &Namespace, home: IpAddr, limit: Duration) -> Result<Option<u64>> {
    let deadline = Instant::now() + limit;
    while attracts(host, home)? {
        if Instant::now() > deadline {
            return Ok(None);
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(Some(unix_ms()))
}
