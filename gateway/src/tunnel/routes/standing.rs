//! What of our routing stands in the kernel, and making what does not.
//!
//! Routes and rules are not listed for it: a host may have the Internet's routes. The kernel refuses to add what it has, and
//! that is the look. Whose fault it is that something is gone is nobody's to say here.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use longhaul_core::tunnel::handover::{Mac, Prefix};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressScope;
use netlink_packet_route::neighbour::{NeighbourFlags, NeighbourMessage, NeighbourState};
use rtnetlink::Error;

use super::{Netlink, errno, neighbour_addresses};
use crate::tunnel::error::TunnelError;

/// Entries of the neighbour tables, each with its device.
#[derive(Debug, Default)]
pub(in crate::tunnel) struct Standing {
    /// What is answered for.
    pub proxies: BTreeSet<(IpAddr, u32)>,
    /// What need not be asked for.
    pub fixed: BTreeSet<(IpAddr, Mac, u32)>,
    /// Frames that bridges hand up.
    pub bridges: BTreeSet<(Mac, u32)>,
}

impl Netlink {
    /// One listing each.
    pub(in crate::tunnel) async fn standing(&self) -> Result<Standing, TunnelError> {
        let mut standing = Standing::default();
        for entry in self.entries(AddressFamily::Unspec, true).await? {
            let (address, _) = neighbour_addresses(&entry);
            standing.proxies.extend(address.map(|address| (address, entry.header.ifindex)));
        }
        let permanent = |entry: &NeighbourMessage| entry.header.state == NeighbourState::Permanent;
        for entry in self.entries(AddressFamily::Unspec, false).await?.into_iter().filter(permanent) {
            if let (Some(address), Some(mac)) = neighbour_addresses(&entry) {
                standing.fixed.insert((address, mac, entry.header.ifindex));
            }
        }
        for entry in self.entries(AddressFamily::Bridge, false).await?.into_iter().filter(permanent) {
            let (_, mac) = neighbour_addresses(&entry);
            standing.bridges.extend(mac.map(|mac| (mac, entry.header.ifindex)));
        }
        Ok(standing)
    }

    async fn entries(
        &self,
        family: AddressFamily,
        proxies: bool,
    ) -> Result<Vec<NeighbourMessage>, TunnelError> {
        let mut query = self.handle.neighbours().get();
        query.message_mut().header.family = family;
        if proxies {
            query.message_mut().header.flags = NeighbourFlags::Proxy;
        }
        query.execute().try_collect().await.map_err(TunnelError::netlink("list the neighbours"))
    }

    /// Adds a route unless one of somebody stands there; says whether there was none.
    pub(in crate::tunnel) async fn add_missing_route(
        &self,
        to: Prefix,
        device: u32,
        table: u32,
    ) -> Result<bool, TunnelError> {
        let added = self.handle.route().add(self.route(to, device, table)).execute().await;
        was_missing(added)
            .map_err(TunnelError::netlink(format!("route {}/{} to device {device}", to.addr, to.len)))
    }

    /// The same for an address that is never chosen as a source.
    pub(in crate::tunnel) async fn add_missing_dummy_address(
        &self,
        address: Ipv4Addr,
        device: u32,
    ) -> Result<bool, TunnelError> {
        let mut request = self.handle.address().add(device, IpAddr::V4(address), 32);
        request.message_mut().header.scope = AddressScope::Host;
        was_missing(request.execute().await)
            .map_err(TunnelError::netlink(format!("give device {device} address {address}")))
    }
}

fn was_missing(added: Result<(), Error>) -> Result<bool, Error> {
    match added {
        Ok(()) => Ok(true),
        Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}
