//! Attracting the addresses of a machine that left, and giving way to another host that uses one.
//!
//! An address that is taken is neither answered for nor announced until it is nobody's again. Frames to the machine's own
//! link-layer address and the routes stay, so that whoever had learned them goes on being served.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use longhaul_core::tunnel::duplicates::{Attracted, Finding};
use longhaul_core::tunnel::handover::{FlowTuple, Mac};
use longhaul_core::tunnel::policy::{PortKey, Role};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::super::announce::{self, Announcement};
use super::super::change::{Change, Owner};
use super::super::duplicates;
use super::super::error::TunnelError;
use super::super::plan::{HoldRequest, Leaving};
use super::super::tap;
use super::{AnchorClosed, Control, Move};

/// Another host uses an address that is attracted here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressConflict {
    /// The NIC it is attracted for.
    pub key: PortKey,
    /// The address.
    pub address: IpAddr,
    /// The other host's link-layer address.
    pub mac: Mac,
}

/// What an attraction begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Since {
    /// The machine was here just now.
    JustNow,
    /// An earlier gateway: another host may have taken the address meanwhile.
    Earlier {
        /// Nobody had needed the address for this long.
        quiet: Duration,
    },
}

/// Which of a machine's addresses are this host's to speak for.
#[derive(Debug, Default)]
pub(super) struct Spoken {
    /// Others use them.
    taken: BTreeMap<IpAddr, Mac>,
    /// It is being asked whether others do.
    asked: BTreeSet<IpAddr>,
}

impl Control {
    pub(super) async fn hold_end_attract(
        &mut self,
        key: PortKey,
        flows: Vec<FlowTuple>,
        since: Since,
    ) -> Result<(), TunnelError> {
        let (port, old_flows) = (key.clone(), flows.len());
        let quiet = match since {
            Since::JustNow => Duration::ZERO,
            Since::Earlier { quiet } => quiet,
        };
        self.tell(|done| Move::Attract { key: port, flows, quiet, done }).await??;
        let Some(away) = self.away.get_mut(&key) else { return Ok(()) };
        away.attracted.get_or_insert_with(Instant::now);
        let request = away.request.clone();
        away.spoken.asked = match since {
            Since::JustNow => BTreeSet::new(),
            Since::Earlier { .. } => request.addresses.iter().copied().collect(),
        };
        if self.has_tunnels(&key) {
            let (key, onward) = (key.clone(), request.peer.clone());
            self.tell(|done| Move::Relay { key, onward, done }).await??;
        }
        let link = self.netlink.link(&request.lan).await?;
        let host = link.mac.ok_or_else(|| TunnelError::NoSuchDevice(request.lan.clone()))?;
        let attracted = Attracted {
            key: key.clone(),
            device: link.index,
            ours: [host, request.mac],
            addresses: request.addresses,
            ask: since != Since::JustNow,
        };
        self.tell_duplicates(duplicates::Command::Watch(attracted)).await?;
        self.announce_spoken(&key).await?;
        info!(port = %key, old_flows, "attracting the home address");
        Ok(())
    }

    pub(super) async fn attract_end(&mut self, key: &PortKey) -> Result<AnchorClosed, TunnelError> {
        let away = self.away.remove(key);
        let open_for = away.as_ref().and_then(|away| away.attracted).map(|since| since.elapsed());
        drop(away);
        self.unwatch(key).await;
        let undone = self.changes.undo(&Owner::Away(key.clone())).await;
        self.end(key, Role::Away).await?;
        self.end(key, Role::Relay).await?;
        undone?;
        info!(port = %key, "address no longer attracted");
        Ok(AnchorClosed { at: SystemTime::now(), open_for: open_for.unwrap_or_default() })
    }

    /// One step, so that nothing is made for a machine that comes between two of its parts.
    pub(super) async fn let_go(&mut self, request: HoldRequest) -> Result<(), TunnelError> {
        let key = request.key;
        if self.away.get(&key).is_some_and(|away| away.returning) {
            return Err(TunnelError::Returning(key));
        }
        let ended = self.attract_end(&key).await;
        if request.from == Leaving::Visit {
            return ended.map(drop);
        }
        let sampled = self.sample_end(key.clone()).await;
        let tap = tap::tap_name(&self.config, &key);
        // The tap of an adopted machine stays its operator's.
        let removed = if request.port == tap { self.netlink.delete_link(&tap).await } else { Ok(()) };
        ended.and(sampled).and(removed)
    }

    pub(super) async fn expect_return(&mut self, key: PortKey, returning: bool) -> Result<(), TunnelError> {
        if let Some(away) = self.away.get_mut(&key) {
            away.returning = returning;
        }
        self.tell(|done| Move::ExpectReturn { key, returning, done }).await
    }

    /// Nobody else is listened for on behalf of a NIC that is no longer in `away`.
    pub(super) async fn unwatch(&mut self, key: &PortKey) {
        self.publish_conflicts();
        if self.tell_duplicates(duplicates::Command::Forget { key: key.clone() }).await.is_err() {
            debug!(port = %key, "nobody listens for other hosts any more");
        }
    }

    /// Gives way to who has taken an address, or speaks for it again.
    pub(super) async fn handle_finding(&mut self, finding: Finding) {
        let Finding { key, address, taken_by } = finding;
        let Some(away) = self.away.get_mut(&key) else { return };
        away.spoken.asked.remove(&address);
        let was = match taken_by {
            Some(mac) => away.spoken.taken.insert(address, mac),
            None => away.spoken.taken.remove(&address),
        };
        let proxy = Change::Proxy { address, device: away.request.lan.clone(), router: false };
        let owner = Owner::Away(key.clone());
        let changed = match (was, taken_by) {
            (None, Some(mac)) => {
                warn!(port = %key, %address, %mac, "another host uses the address of a machine that is away; it is not attracted while that lasts");
                self.changes.withdraw(&owner, &proxy).await
            }
            (Some(_), None) => {
                info!(port = %key, %address, "nobody else uses the address any more; it is attracted again");
                self.changes.give_back(&owner, proxy).await
            }
            (Some(_), Some(_)) | (None, None) => Ok(()),
        };
        self.publish_conflicts();
        if let Err(error) = changed.and(self.announce_spoken(&key).await) {
            warn!(port = %key, %address, %error, "the LAN could not be told whose the address is");
        }
    }

    /// Announces the addresses that are this host's to speak for, from now on and no others.
    async fn announce_spoken(&mut self, key: &PortKey) -> Result<(), TunnelError> {
        let Some(away) = self.away.get_mut(key) else { return Ok(()) };
        // What was announced before ends here, also if nothing can be announced.
        away.announcing = None;
        let Spoken { taken, asked } = &away.spoken;
        let is_ours = |address: &&IpAddr| !taken.contains_key(*address) && !asked.contains(*address);
        let ours: Vec<IpAddr> = away.request.addresses.iter().filter(is_ours).copied().collect();
        if ours.is_empty() {
            return Ok(());
        }
        let lan = away.request.lan.clone();
        let announcements: Vec<Announcement> = self.announcements(&lan, &ours).await?;
        let announcing = announce::repeat(self.frames.clone(), announcements, self.config.announce.clone());
        if let Some(away) = self.away.get_mut(key) {
            away.announcing = Some(announcing);
        }
        Ok(())
    }

    fn publish_conflicts(&self) {
        let of = |key: &PortKey, spoken: &Spoken| {
            let conflict = |(address, mac): (&IpAddr, &Mac)| AddressConflict {
                key: key.clone(),
                address: *address,
                mac: *mac,
            };
            spoken.taken.iter().map(conflict).collect::<Vec<_>>()
        };
        let conflicts: Vec<_> = self.away.iter().flat_map(|(key, away)| of(key, &away.spoken)).collect();
        self.conflicts.send_if_modified(|old| {
            let changed = *old != conflicts;
            *old = conflicts;
            changed
        });
    }

    async fn tell_duplicates(&self, command: duplicates::Command) -> Result<(), TunnelError> {
        self.duplicates.send(command).await.map_err(|_| TunnelError::Stopped)
    }
}
