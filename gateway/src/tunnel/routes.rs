//! rtnetlink: links, routes, policy rules, neighbours and the bridge's address table.
//!
//! Every change is idempotent: adding what is there and removing what is gone succeed. What we add
//! carries our routing protocol number, so that it can be found again after a crash. It decides
//! nothing; `plan` does.

mod rules;
mod standing;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};

use futures_util::TryStreamExt;
use longhaul_core::tunnel::handover::{Mac, Neighbour, NeighbourKind, Prefix};
use longhaul_core::tunnel::routers::Advertiser;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteVia,
};
use rtnetlink::{Error, Handle, LinkUnspec, RouteMessageBuilder};

use super::error::TunnelError;

pub(super) use rules::PolicyRule;
pub(super) use standing::Standing;

/// A device as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub index: u32,
    pub mac: Option<Mac>,
    /// The index of the bridge it is a port of.
    pub bridge: Option<u32>,
}

/// A neighbour in the kernel's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KnownNeighbour {
    pub addr: IpAddr,
    pub mac: Mac,
    /// It says of itself that it is a router; IPv6 only.
    pub router: bool,
}

/// A connection to the kernel's routing.
#[derive(Clone)]
pub(super) struct Netlink {
    handle: Handle,
    protocol: u8,
}

impl Netlink {
    /// Connects. What is added carries `protocol`.
    pub(super) fn open(protocol: u8) -> Result<Self, TunnelError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(TunnelError::io("open rtnetlink"))?;
        tokio::spawn(connection);
        Ok(Self { handle, protocol })
    }

    /// The device called `name`, if there is one.
    pub(super) async fn find_link(&self, name: &str) -> Result<Option<Link>, TunnelError> {
        let found = self.handle.link().get().match_name(name.to_owned()).execute().try_next().await;
        match found {
            Ok(message) => Ok(message.map(|message| read_link(&message))),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(TunnelError::netlink(format!("look for device {name}"))(error)),
        }
    }

    /// The device called `name`, which must be there.
    pub(super) async fn link(&self, name: &str) -> Result<Link, TunnelError> {
        self.find_link(name).await?.ok_or_else(|| TunnelError::NoSuchDevice(name.to_owned()))
    }

    /// Sets a device up, with a queue of `queue` packets where given.
    pub(super) async fn set_up(&self, name: &str, queue: Option<u32>) -> Result<(), TunnelError> {
        let mut change = LinkUnspec::new_with_index(self.link(name).await?.index).up();
        if let Some(queue) = queue {
            change = change.txqueuelen(queue);
        }
        self.change_link(change.build(), format!("set {name} up")).await
    }

    /// Gives a device a link-layer address.
    pub(super) async fn set_mac(&self, index: u32, mac: Mac) -> Result<(), TunnelError> {
        let change = LinkUnspec::new_with_index(index).address(mac.0.to_vec()).build();
        self.change_link(change, format!("set the address of device {index}")).await
    }

    /// Makes a device a port of `bridge`, or of none.
    pub(super) async fn set_bridge(&self, index: u32, bridge: Option<u32>) -> Result<(), TunnelError> {
        let change = LinkUnspec::new_with_index(index);
        let change = match bridge {
            Some(bridge) => change.controller(bridge),
            None => change.nocontroller(),
        };
        self.change_link(change.build(), format!("set the bridge of device {index}")).await
    }

    /// The ports of a bridge; a device that is no bridge has none.
    pub(super) async fn ports(&self, bridge: u32) -> Result<Vec<u32>, TunnelError> {
        let links: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(TunnelError::netlink("list the devices"))?;
        let links = links.iter().map(read_link);
        Ok(links.filter(|link| link.bridge == Some(bridge)).map(|link| link.index).collect())
    }

    /// Removes a device.
    pub(super) async fn delete_link(&self, name: &str) -> Result<(), TunnelError> {
        let Some(link) = self.find_link(name).await? else { return Ok(()) };
        let deleted = self.handle.link().del(link.index).execute().await;
        gone_is_fine(deleted).map_err(TunnelError::netlink(format!("delete device {name}")))
    }

    /// Gives a device an address that is never chosen as a source. Without any, the kernel's reverse path
    /// filter refuses all that comes out of the device, in its loose mode too.
    pub(super) async fn add_dummy_address(&self, address: Ipv4Addr, device: u32) -> Result<(), TunnelError> {
        let mut request = self.handle.address().add(device, IpAddr::V4(address), 32);
        request.message_mut().header.scope = AddressScope::Host;
        match request.execute().await {
            Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(()),
            other => other.map_err(TunnelError::netlink(format!("give device {device} address {address}"))),
        }
    }

    /// Takes that address away again.
    pub(super) async fn delete_dummy_address(
        &self,
        address: Ipv4Addr,
        device: u32,
    ) -> Result<(), TunnelError> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 32;
        message.header.index = device;
        message.attributes.push(AddressAttribute::Local(IpAddr::V4(address)));
        gone_is_fine(self.handle.address().del(message).execute().await)
            .map_err(TunnelError::netlink(format!("take address {address} from device {device}")))
    }

    /// Routes `to` to `device`, in `table`. A route of somebody else's for the same block is an error.
    pub(super) async fn add_route(&self, to: Prefix, device: u32, table: u32) -> Result<(), TunnelError> {
        let route = self.route(to, device, table);
        let what = format!("route {}/{} to device {device}", to.addr, to.len);
        match self.handle.route().add(route.clone()).execute().await {
            Err(error) if errno(&error) == Some(libc::EEXIST) => {
                self.delete_route_message(self.route(to, 0, table)).await?;
                self.handle.route().add(route).execute().await.map_err(TunnelError::netlink(what))
            }
            other => other.map_err(TunnelError::netlink(what)),
        }
    }

    /// Removes our route for `to`.
    pub(super) async fn delete_route(&self, to: Prefix, table: u32) -> Result<(), TunnelError> {
        self.delete_route_message(self.route(to, 0, table)).await
    }

    /// Answers for `address` on `device` (proxy ARP or NDP), as a router or as a host.
    pub(super) async fn add_proxy(
        &self,
        address: IpAddr,
        router: bool,
        device: u32,
    ) -> Result<(), TunnelError> {
        let what = format!("answer for {address} on device {device}");
        let mut flags = NeighbourFlags::Proxy;
        flags.set(NeighbourFlags::Router, router);
        self.add_neighbour(self.neighbour(address, device, flags), what).await
    }

    /// Stops answering for `address` on `device`.
    pub(super) async fn delete_proxy(&self, address: IpAddr, device: u32) -> Result<(), TunnelError> {
        self.delete_neighbour(self.neighbour(address, device, NeighbourFlags::Proxy)).await
    }

    /// A neighbour that need not be asked for.
    pub(super) async fn add_fixed(&self, address: IpAddr, mac: Mac, device: u32) -> Result<(), TunnelError> {
        let mut message = self.neighbour(address, device, NeighbourFlags::empty());
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        self.add_neighbour(message, format!("fix the neighbour {address} on device {device}")).await
    }

    /// Forgets a neighbour.
    pub(super) async fn delete_fixed(&self, address: IpAddr, device: u32) -> Result<(), TunnelError> {
        self.delete_neighbour(self.neighbour(address, device, NeighbourFlags::empty())).await
    }

    /// Frames to `mac` on `bridge` go up to the host, whatever port the bridge had learned it on.
    pub(super) async fn add_bridge_address(&self, mac: Mac, bridge: u32) -> Result<(), TunnelError> {
        self.add_neighbour(bridge_address(mac, bridge), "take a machine's frames off the bridge".to_owned())
            .await
    }

    /// The bridge learns `mac` again like any other.
    pub(super) async fn delete_bridge_address(&self, mac: Mac, bridge: u32) -> Result<(), TunnelError> {
        self.delete_neighbour(bridge_address(mac, bridge)).await
    }

    /// The default routers reached through `device`.
    pub(super) async fn default_routers(&self, device: u32) -> Result<Vec<IpAddr>, TunnelError> {
        let mut routers = Vec::new();
        for query in
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let mut routes = self.handle.route().get(query).execute();
            while let Some(route) =
                routes.try_next().await.map_err(TunnelError::netlink("list the routes"))?
            {
                routers.extend(default_router(&route, device));
            }
        }
        routers.sort();
        routers.dedup();
        Ok(routers)
    }

    /// The routers of every route, whatever it is for.
    pub(super) async fn routers(&self) -> Result<BTreeSet<IpAddr>, TunnelError> {
        let mut routers = BTreeSet::new();
        for query in
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let mut routes = self.handle.route().get(query).execute();
            while let Some(route) =
                routes.try_next().await.map_err(TunnelError::netlink("list the routes"))?
            {
                routers.extend(gateways(&route.attributes));
            }
        }
        Ok(routers)
    }

    /// This host's addresses with their blocks, and the device of each.
    pub(super) async fn addresses(&self) -> Result<Vec<(u32, Prefix)>, TunnelError> {
        let listed = self.handle.address().get().execute().try_collect::<Vec<_>>().await;
        let listed = listed.map_err(TunnelError::netlink("list the addresses"))?;
        Ok(listed.iter().filter_map(read_address).collect())
    }

    /// The neighbours on `device` whose link-layer address is known. Bounded by the caller.
    pub(super) async fn neighbours(&self, device: u32) -> Result<Vec<KnownNeighbour>, TunnelError> {
        let mut known = Vec::new();
        let mut entries = self.handle.neighbours().get().execute();
        while let Some(entry) =
            entries.try_next().await.map_err(TunnelError::netlink("list the neighbours"))?
        {
            if entry.header.ifindex == device {
                known.extend(read_neighbour(&entry));
            }
        }
        Ok(known)
    }

    /// This host as its machines' neighbour on a LAN.
    pub(super) async fn own_neighbours(&self, lan: &str) -> Result<Vec<KnownNeighbour>, TunnelError> {
        let Link { index, mac: Some(mac), .. } = self.link(lan).await? else { return Ok(Vec::new()) };
        let its = |(device, prefix): (u32, Prefix)| (device == index).then_some(prefix.addr);
        let own = self.addresses().await?.into_iter().filter_map(its);
        Ok(own.map(|addr| KnownNeighbour { addr, mac, router: false }).collect())
    }

    /// Removes every route, rule and neighbour that carries our protocol number, the bridge entries of `macs`,
    /// and the address `dummy` from all devices but `device`: what a gateway that crashed has left.
    pub(super) async fn sweep(&self, macs: &[Mac], dummy: Ipv4Addr, device: &str) -> Result<(), TunnelError> {
        self.sweep_routes().await?;
        self.sweep_rules().await?;
        self.sweep_neighbours().await?;
        self.sweep_bridges(macs).await?;
        let own = self.find_link(device).await?.map(|link| link.index);
        for (index, found) in self.addresses().await? {
            if found.addr == IpAddr::V4(dummy) && found.len == 32 && Some(index) != own {
                self.delete_dummy_address(dummy, index).await?;
            }
        }
        Ok(())
    }

    async fn sweep_routes(&self) -> Result<(), TunnelError> {
        for query in
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let routes: Vec<RouteMessage> = self
                .handle
                .route()
                .get(query)
                .execute()
                .try_collect()
                .await
                .map_err(TunnelError::netlink("list the routes"))?;
            for route in routes.into_iter().filter(|route| u8::from(route.header.protocol) == self.protocol) {
                self.delete_route_message(route).await?;
            }
        }
        Ok(())
    }

    async fn sweep_neighbours(&self) -> Result<(), TunnelError> {
        let ours = NeighbourAttribute::Protocol(RouteProtocol::from(self.protocol));
        for proxies in [true, false] {
            let query = self.handle.neighbours().get();
            let query = if proxies { query.proxies() } else { query };
            let listed = query.execute().try_collect::<Vec<_>>().await;
            for mut entry in listed.map_err(TunnelError::netlink("list the neighbours"))? {
                if !entry.attributes.contains(&ours) {
                    continue;
                }
                if proxies {
                    entry.header.flags |= NeighbourFlags::Proxy;
                }
                self.delete_neighbour(entry).await?;
            }
        }
        Ok(())
    }

    async fn sweep_bridges(&self, macs: &[Mac]) -> Result<(), TunnelError> {
        let query = self.handle.neighbours().get().set_address_family(AddressFamily::Bridge);
        let listed = query.execute().try_collect::<Vec<_>>().await;
        for entry in listed.map_err(TunnelError::netlink("list the bridges' addresses"))? {
            for mac in macs {
                let theirs = NeighbourAttribute::LinkLayerAddress(mac.0.to_vec());
                if entry.header.state == NeighbourState::Permanent && entry.attributes.contains(&theirs) {
                    self.delete_bridge_address(*mac, entry.header.ifindex).await?;
                }
            }
        }
        Ok(())
    }

    async fn change_link(&self, change: LinkMessage, what: String) -> Result<(), TunnelError> {
        self.handle.link().change(change).execute().await.map_err(TunnelError::netlink(what))
    }

    async fn delete_route_message(&self, route: RouteMessage) -> Result<(), TunnelError> {
        gone_is_fine(self.handle.route().del(route).execute().await)
            .map_err(TunnelError::netlink("delete a route"))
    }

    async fn add_neighbour(&self, message: NeighbourMessage, what: String) -> Result<(), TunnelError> {
        let mut request = self.handle.neighbours().add(0, IpAddr::V4(Ipv4Addr::UNSPECIFIED)).replace();
        *request.message_mut() = message;
        request.execute().await.map_err(TunnelError::netlink(what))
    }

    async fn delete_neighbour(&self, message: NeighbourMessage) -> Result<(), TunnelError> {
        gone_is_fine(self.handle.neighbours().del(message).execute().await)
            .map_err(TunnelError::netlink("forget a neighbour"))
    }

    /// `device` 0 leaves the device open, for removal.
    fn route(&self, to: Prefix, device: u32, table: u32) -> RouteMessage {
        let protocol = RouteProtocol::from(self.protocol);
        let mut message = match to.addr {
            IpAddr::V4(addr) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(addr, to.len)
                .scope(if device == 0 { RouteScope::NoWhere } else { RouteScope::Link })
                .build(),
            IpAddr::V6(addr) => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(addr, to.len).build()
            }
        };
        message.header.protocol = protocol;
        message.header.table = 0;
        message.attributes.push(RouteAttribute::Table(table));
        if device != 0 {
            message.attributes.push(RouteAttribute::Oif(device));
        }
        message
    }

    fn neighbour(&self, address: IpAddr, device: u32, flags: NeighbourFlags) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        let (family, destination) = match address {
            IpAddr::V4(v4) => (AddressFamily::Inet, NeighbourAddress::Inet(v4)),
            IpAddr::V6(v6) => (AddressFamily::Inet6, NeighbourAddress::Inet6(v6)),
        };
        message.header.family = family;
        message.header.ifindex = device;
        message.header.state = NeighbourState::Permanent;
        message.header.flags = flags;
        message.attributes = vec![
            NeighbourAttribute::Destination(destination),
            NeighbourAttribute::Protocol(RouteProtocol::from(self.protocol)),
        ];
        message
    }
}

/// The neighbours as the hand-over carries them, at most `max`: default routers and those that advertise themselves
/// first, then other routers. An advertiser whose link-layer address nobody knows is left out.
pub(super) fn as_handover(
    routers: &[IpAddr],
    known: &[KnownNeighbour],
    heard: Vec<Advertiser>,
    max: usize,
) -> Vec<Neighbour> {
    let mut neighbours: BTreeMap<IpAddr, Neighbour> = BTreeMap::new();
    for KnownNeighbour { addr, mac, router } in known.iter().copied() {
        let is_router = router || routers.contains(&addr);
        let kind = if is_router { NeighbourKind::Router } else { NeighbourKind::Host };
        neighbours.insert(addr, Neighbour { addr, mac, kind });
    }
    for Advertiser { source, link_layer, advertisement } in heard {
        let addr = IpAddr::V6(source);
        let Some(mac) = link_layer.or(neighbours.get(&addr).map(|known| known.mac)) else { continue };
        let kind = NeighbourKind::Advertiser(Box::new(advertisement));
        neighbours.insert(addr, Neighbour { addr, mac, kind });
    }
    let mut neighbours: Vec<Neighbour> = neighbours.into_values().collect();
    neighbours.sort_by_key(|neighbour| match neighbour.kind {
        NeighbourKind::Advertiser(_) => 0,
        NeighbourKind::Router if routers.contains(&neighbour.addr) => 0,
        NeighbourKind::Router => 1,
        NeighbourKind::Host => 2,
    });
    neighbours.truncate(max);
    neighbours
}

fn bridge_address(mac: Mac, bridge: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = bridge;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
    message
}

fn read_link(message: &LinkMessage) -> Link {
    let mut link = Link { index: message.header.index, mac: None, bridge: None };
    for attribute in &message.attributes {
        if let LinkAttribute::Address(address) = attribute {
            link.mac = address.first_chunk().map(|octets| Mac(*octets));
        }
        if let LinkAttribute::Controller(index) = attribute {
            link.bridge = Some(*index).filter(|index| *index != 0);
        }
    }
    link
}

/// Whom an entry is about, and the link-layer address in it.
fn neighbour_addresses(entry: &NeighbourMessage) -> (Option<IpAddr>, Option<Mac>) {
    let (mut address, mut mac) = (None, None);
    for attribute in &entry.attributes {
        if let NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) = attribute {
            address = Some(IpAddr::V4(*v4));
        }
        if let NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) = attribute {
            address = Some(IpAddr::V6(*v6));
        }
        if let NeighbourAttribute::LinkLayerAddress(octets) = attribute {
            mac = octets.first_chunk().map(|octets| Mac(*octets));
        }
    }
    (address, mac)
}

fn read_neighbour(entry: &NeighbourMessage) -> Option<KnownNeighbour> {
    let (address, mac) = neighbour_addresses(entry);
    let unresolved = [NeighbourState::Failed, NeighbourState::Incomplete, NeighbourState::Noarp];
    if unresolved.contains(&entry.header.state) {
        return None;
    }
    let router = entry.header.flags.contains(NeighbourFlags::Router);
    Some(KnownNeighbour { addr: address?, mac: mac?, router })
}

fn read_address(message: &AddressMessage) -> Option<(u32, Prefix)> {
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        if let AddressAttribute::Local(addr) = attribute {
            local = Some(*addr);
        } else if let AddressAttribute::Address(addr) = attribute {
            // The other end's on a line of two; else the same.
            address = Some(*addr);
        }
    }
    let own = local.or(address);
    Some((message.header.index, Prefix { addr: own?, len: message.header.prefix_len }))
}

/// The routers a route goes through, several if it is spread.
fn gateways(attributes: &[RouteAttribute]) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for attribute in attributes {
        if let RouteAttribute::Gateway(RouteAddress::Inet(v4)) = attribute {
            found.push(IpAddr::V4(*v4));
        }
        if let RouteAttribute::Gateway(RouteAddress::Inet6(v6)) = attribute {
            found.push(IpAddr::V6(*v6));
        }
        if let RouteAttribute::Via(RouteVia::Inet6(v6)) = attribute {
            found.push(IpAddr::V6(*v6));
        }
        if let RouteAttribute::MultiPath(hops) = attribute {
            found.extend(hops.iter().flat_map(|hop| gateways(&hop.attributes)));
        }
    }
    found
}

fn default_router(route: &RouteMessage, device: u32) -> Option<IpAddr> {
    let through = route.attributes.contains(&RouteAttribute::Oif(device));
    if route.header.destination_prefix_length != 0 || !through {
        return None;
    }
    gateways(&route.attributes).first().copied()
}

fn gone_is_fine(result: Result<(), Error>) -> Result<(), Error> {
    let gone = [libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EADDRNOTAVAIL, libc::ENXIO];
    match result {
        Err(error) if errno(&error).is_some_and(|code| gone.contains(&code)) => Ok(()),
        other => other,
    }
}

pub(super) fn errno(error: &Error) -> Option<i32> {
    match error {
        Error::NetlinkError(message) => Some(-message.raw_code()),
        Error::UnexpectedMessage(_)
        | Error::RequestFailed
        | Error::NamespaceError(_)
        | Error::InvalidHardwareAddress(_)
        | Error::InvalidIp(_)
        | Error::InvalidAddress(_, _)
        | Error::InvalidNla(_) => None,
    }
}

/// A datagram to the discard port (RFC 863) makes the kernel look for the router's address.
pub(super) fn make_kernel_ask(router: IpAddr, device: u32) {
    const DISCARD: u16 = 9;
    let (any, to): (SocketAddr, SocketAddr) = match router {
        IpAddr::V4(v4) => (([0u8; 4], 0).into(), (v4, DISCARD).into()),
        // The kernel heeds the device of a link-local address only.
        IpAddr::V6(v6) => (([0u16; 8], 0).into(), SocketAddrV6::new(v6, DISCARD, 0, device).into()),
    };
    // Without a route there is no router to be found either.
    if let Ok(socket) = UdpSocket::bind(any) {
        let _ = socket.send_to(&[0], to);
    }
}

#[cfg(test)]
mod tests {
    use longhaul_core::tunnel::advertisement::Advertisement;

    use super::*;

    #[test]
    fn routers_come_first_and_an_advertiser_has_the_address_it_names() {
        let mac = |last| Mac([2, 0, 0, 0, 0, last]);
        let known =
            |addr: &str, last, router| KnownNeighbour { addr: addr.parse().unwrap(), mac: mac(last), router };
        let header = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        let heard = |source: &str, link_layer| Advertiser {
            source: source.parse().unwrap(),
            link_layer,
            advertisement: Advertisement::parse(&header).unwrap(),
        };
        let known = [
            known("2001:db8::9", 9, false),
            known("2001:db8::2", 2, true),
            known("198.51.100.1", 1, false),
            known("fe80::3", 3, false),
            known("fe80::4", 4, true),
        ];
        let heard = vec![
            heard("fe80::3", None),
            heard("fe80::4", Some(mac(44))),
            heard("fe80::5", Some(mac(5))),
            heard("fe80::6", None),
        ];
        let listed = as_handover(&["198.51.100.1".parse().unwrap()], &known, heard, 6);
        let seen: Vec<_> =
            listed.iter().map(|it| (it.addr.to_string(), it.mac.0[5], it.advertises().is_some())).collect();
        let expected = [
            ("198.51.100.1", 1, false),
            ("fe80::3", 3, true),
            ("fe80::4", 44, true),
            ("fe80::5", 5, true),
            ("2001:db8::2", 2, false),
            ("2001:db8::9", 9, false),
        ];
        assert_eq!(seen, expected.map(|(addr, mac, advertises)| (addr.to_owned(), mac, advertises)));
        assert!(listed[4].is_router() && !listed[5].is_router());
    }
}
