//! A client that asks the guest all the time how far its log is, and remembers what it was told: a record that a client
//! knows of must never be lost again.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::agent::client::ask;
use crate::agent::control::AgentStatus;
use crate::netns::Namespace;

/// Between two questions. Each is a connection; one that just closes when the machine moves keeps the tunnel up for
/// minutes.
const PAUSE: Duration = Duration::from_millis(500);
/// An answer that takes longer is not waited for; a pause, and most cuts, are shorter.
const PATIENCE: Duration = Duration::from_secs(20);

/// What clients were told.
#[derive(Debug, Clone, Default)]
pub struct Confirmed {
    /// The last record of the guest's log.
    pub log_last: u64,
    /// The boot that said so.
    pub boot_id: String,
    /// How often the guest answered.
    pub answers: u64,
}

/// The client at work.
pub struct Confirmer {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Confirmed>,
}

impl Confirmer {
    /// Begins to ask the guest at `address` from the client's namespace.
    pub fn start(client: &Namespace, address: IpAddr) -> Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        let (end, client) = (ended.clone(), client.clone());
        let thread = std::thread::Builder::new().name("confirmer".into()).spawn(move || {
            let mut confirmed = Confirmed::default();
            while !end.load(Ordering::Relaxed) {
                // Silence proves nothing.
                if let Ok(Ok(status)) = client.run(|| ask::<AgentStatus>(address, "/status", PATIENCE)) {
                    confirmed.log_last = confirmed.log_last.max(status.log_last);
                    confirmed.boot_id = status.boot_id;
                    confirmed.answers += 1;
                }
                std::thread::sleep(PAUSE);
            }
            confirmed
        })?;
        Ok(Self { ended, thread })
    }

    /// Ends, and says what was confirmed.
    pub async fn finish(self) -> Result<Confirmed> {
        self.ended.store(true, Ordering::Relaxed);
        let joined = tokio::task::spawn_blocking(move || self.thread.join()).await?;
        joined.map_err(|_| anyhow!("The confirmer broke"))
    }
}
