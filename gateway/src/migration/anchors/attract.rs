//! How an anchor comes to attract its addresses: NIC by NIC when it begins, and again for as long as one fails.
//!
//! A bridge may be made after the gateway has started, and what an operator has mended must not want a restart. Until when
//! they are attracted is `task`'s to say: nothing is tried unless whoever waits drives it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::pin::Pin;
use std::time::Duration;

use longhaul_core::ids::VmName;
use longhaul_core::tunnel::handover::FlowTuple;
use tokio::sync::watch;

use super::Begin;
use super::task::{AGAIN_AT_MOST, AnchorTask, show};
use crate::api::types::AnchorView;
use crate::journal::unix_ms;
use crate::migration::chain;
use crate::tunnel::{HoldRequest, Tunnel, TunnelError};

/// Between the first two tries.
const AGAIN: Duration = Duration::from_millis(200);

/// A NIC whose addresses could not be attracted.
#[derive(Debug, Clone)]
pub(super) struct Unattracted {
    hold: HoldRequest,
    flows: Vec<FlowTuple>,
    /// Nobody had needed them for this long when the gateway began.
    quiet: Duration,
}

impl AnchorTask {
    /// Tries each NIC once; what failed is [`attract_rest`]'s.
    pub async fn attract(&self, begin: Begin) {
        if !self.attracts() {
            return;
        }
        let quiet = self.needed_ms.map_or(0, |needed_ms| unix_ms().saturating_sub(needed_ms));
        let quiet = Duration::from_millis(quiet);
        let mut failed = Vec::new();
        for (hold, nic) in self.anchor.holds().into_iter().zip(&self.anchor.nics) {
            let nic = Unattracted { hold, flows: nic.flows.clone(), quiet };
            if let Err(error) = begin_with(&self.edges.tunnel, &nic, begin).await {
                let (vm, nic_name) = (&self.anchor.vm, &nic.hold.key.nic);
                tracing::error!(%vm, nic = %nic_name, error = chain(&error), "home address cannot be attracted yet, trying again");
                self.show(|view| view.attract_error = Some(chain(&error)));
                failed.push(nic);
            }
        }
        if failed.is_empty() {
            tracing::info!(vm = %self.anchor.vm, to = %self.anchor.peer, "address attracted");
        }
        self.unattracted.send_replace(failed);
    }
}

async fn begin_with(tunnel: &Tunnel, nic: &Unattracted, begin: Begin) -> Result<(), TunnelError> {
    let (key, flows) = (nic.hold.key.clone(), nic.flows.clone());
    let known = match begin {
        Begin::Held => tunnel.hold_end_attract(key.clone(), flows.clone()).await,
        Begin::Restored => Err(TunnelError::Stopped),
    };
    // A gateway that was killed before it wrote the anchor down knows of no hold either.
    if known.is_ok() {
        return known;
    }
    tunnel.hold_begin(nic.hold.clone()).await?;
    // Another host may have taken the address while there was no gateway.
    tunnel.attract_again(key, flows, nic.quiet).await
}

/// The same once more: what the first try has begun is not begun twice.
pub(super) async fn again(tunnel: Tunnel, nic: Unattracted) -> Result<(), TunnelError> {
    match tunnel.attract_again(nic.hold.key.clone(), nic.flows.clone(), nic.quiet).await {
        Err(TunnelError::UnknownPort(_)) => {}
        tried => return tried,
    }
    begin_with(&tunnel, &nic, Begin::Restored).await
}

/// Tries what failed again until all of it is attracted, and then does nothing more.
pub(super) async fn attract_rest(
    vm: VmName,
    unattracted: watch::Sender<Vec<Unattracted>>,
    views: watch::Sender<BTreeMap<VmName, AnchorView>>,
    attract: impl AsyncFn(Unattracted) -> Result<(), TunnelError>,
) -> Infallible {
    let mut wait = AGAIN;
    loop {
        let left = unattracted.borrow().clone();
        if left.is_empty() {
            return pending().await;
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(AGAIN_AT_MOST);
        let (mut failed, mut why) = (Vec::new(), None);
        for nic in left {
            match attract(nic.clone()).await {
                Ok(()) => tracing::info!(%vm, nic = %nic.hold.key.nic, "address attracted after all"),
                Err(error) => {
                    tracing::debug!(%vm, nic = %nic.hold.key.nic, error = chain(&error), "home address cannot be attracted yet");
                    why = Some(chain(&error));
                    failed.push(nic);
                }
            }
        }
        show(&views, &vm, |view| view.attract_error = why);
        unattracted.send_replace(failed);
    }
}

/// Waits for `work` and meanwhile drives `rest`.
pub(super) async fn beside<T>(
    rest: Pin<&mut impl Future<Output = Infallible>>,
    work: impl Future<Output = T>,
) -> T {
    tokio::select! {
        done = work => done,
        never = rest => match never {},
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use longhaul_core::tunnel::handover::Mac;
    use longhaul_core::tunnel::policy::PortKey;

    use super::*;
    use crate::test_site::anchor;
    use crate::tunnel::Leaving;

    fn unattracted(nic: &str) -> Unattracted {
        let key = PortKey { machine: "web1".parse().unwrap(), nic: nic.parse().unwrap() };
        let hold = HoldRequest {
            port: "lh-web1".to_owned(),
            key,
            peer: "b".parse().unwrap(),
            mac: Mac([0x52, 0x54, 0, 0, 0, 1]),
            from: Leaving::Home,
            addresses: Vec::new(),
            lan: "br-lan".to_owned(),
        };
        Unattracted { hold, flows: Vec::new(), quiet: Duration::ZERO }
    }

    #[tokio::test]
    async fn each_nic_is_tried_until_its_bridge_is_there_and_then_nothing_is_shown() {
        let left = watch::Sender::new(vec![unattracted("lan"), unattracted("dmz")]);
        let shown = anchor("b");
        let views = watch::Sender::new(BTreeMap::from([(shown.vm.clone(), shown.view())]));
        let tries = AtomicU32::new(0);
        let attract = async |nic: Unattracted| {
            let before = tries.fetch_add(1, Ordering::Relaxed);
            match nic.hold.key.nic.as_str() {
                "dmz" if before < 2 => Err(TunnelError::NoSuchDevice("br-dmz".to_owned())),
                _ => Ok(()),
            }
        };
        let mut all = left.subscribe();
        let rest = std::pin::pin!(attract_rest(shown.vm.clone(), left.clone(), views.clone(), attract));
        let mut error = views.subscribe();
        let seen = async {
            let is_shown = |views: &BTreeMap<VmName, AnchorView>| views[&shown.vm].attract_error.is_some();
            let text = error.wait_for(is_shown).await.unwrap()[&shown.vm].attract_error.clone().unwrap();
            assert!(text.contains("br-dmz"), "{text}");
            assert_eq!(all.wait_for(|left| left.len() == 1).await.unwrap().len(), 1);
            drop(all.wait_for(Vec::is_empty).await.unwrap());
        };
        beside(rest, seen).await;
        assert_eq!(views.borrow()[&shown.vm].attract_error, None);
        assert_eq!(tries.load(Ordering::Relaxed), 3, "what is attracted is not tried again");
    }
}
