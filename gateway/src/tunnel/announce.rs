//! Raw frames: telling a LAN where an address lives now, and a guest where its neighbours do.
//!
//! The socket needs CAP_NET_RAW. It is opened once, receives nothing, and works
//! after the capability has been dropped. Frames: ARP announcements (RFC 5227, 3) as request and as
//! reply, because some stacks heed only one of them, and unsolicited neighbour advertisements (RFC 4861,
//! 7.2.6) with the override flag; and the questions whether somebody has an address (RFC 5227, 2.1.1; RFC 4862, 5.4.2).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use longhaul_core::tunnel::handover::Mac;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::task::AbortHandle;
use tracing::debug;

use super::config::AnnounceConfig;
use super::error::TunnelError;

const BROADCAST: Mac = Mac([0xff; 6]);
/// The link-layer address of all IPv6 hosts of a link.
pub(super) const ALL_NODES: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);
const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Who says that an address is at which link-layer address, and where.
#[derive(Debug, Clone, Copy)]
pub(super) struct Announcement {
    /// The device it is said on.
    pub device: u32,
    pub address: IpAddr,
    pub mac: Mac,
    /// Whose address it is routes: a host that is told of its router that it does not takes its route away (RFC 4861,
    /// 7.2.5).
    pub router: bool,
}

/// The socket that sends frames on any device.
#[derive(Debug)]
pub(super) struct FrameSocket {
    socket: Socket,
}

impl FrameSocket {
    /// Opens it; needs CAP_NET_RAW now and never again.
    pub(super) fn open() -> Result<Self, TunnelError> {
        let open = || {
            let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let socket =
            open().map_err(TunnelError::io("open a packet socket; CAP_NET_RAW is needed at the start"))?;
        Ok(Self { socket })
    }

    /// Sends what makes neighbours on the LAN update their caches.
    pub(super) fn announce(&self, announcement: &Announcement) -> io::Result<()> {
        let Announcement { device, address, mac, router } = *announcement;
        match address {
            IpAddr::V4(v4) => {
                self.send(device, &arp(ArpOperation::Request, BROADCAST, mac, v4, Mac([0; 6]), v4))?;
                self.send(device, &arp(ArpOperation::Reply, BROADCAST, mac, v4, BROADCAST, v4))
            }
            IpAddr::V6(v6) => self.send(device, &advertisement(ALL_NODES, mac, v6, router)),
        }
    }

    /// Asks who has `address`, claiming nothing.
    pub(super) fn probe(&self, device: u32, mac: Mac, address: IpAddr) -> io::Result<()> {
        match address {
            IpAddr::V4(v4) => {
                let nobody = Ipv4Addr::UNSPECIFIED;
                self.send(device, &arp(ArpOperation::Request, BROADCAST, mac, nobody, Mac([0; 6]), v4))
            }
            IpAddr::V6(v6) => self.send(device, &solicitation(mac, v6)),
        }
    }

    /// Tells the one at `to` alone that `announcement` holds.
    pub(super) fn tell(&self, to: Mac, to_address: IpAddr, announcement: &Announcement) -> io::Result<()> {
        let Announcement { device, address, mac, router } = *announcement;
        match (address, to_address) {
            (IpAddr::V4(v4), IpAddr::V4(target)) => {
                self.send(device, &arp(ArpOperation::Reply, to, mac, v4, to, target))
            }
            (IpAddr::V6(v6), IpAddr::V6(_)) => self.send(device, &advertisement(to, mac, v6, router)),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Ok(()),
        }
    }

    /// Hands an IP packet to `to` on `device`.
    pub(super) fn deliver(&self, device: u32, to: Mac, from: Mac, packet: &[u8]) -> io::Result<()> {
        let ethertype = match packet.first().map(|first| first >> 4) {
            Some(6) => ETHERTYPE_IPV6,
            Some(_) | None => ETHERTYPE_IPV4,
        };
        self.send(device, &frame(to, from, ethertype, packet))
    }

    fn send(&self, device: u32, frame: &[u8]) -> io::Result<()> {
        self.socket.send_to(frame, &link_layer_address(device)?).map(drop)
    }
}

/// Announcements that are being repeated; they end when this is dropped.
#[derive(Debug)]
pub(super) struct Repeating(AbortHandle);

impl Drop for Repeating {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Repeats announcements: the burst, then every second, then rarely.
pub(super) fn repeat(
    socket: Arc<FrameSocket>,
    announcements: Vec<Announcement>,
    config: AnnounceConfig,
) -> Repeating {
    let task = tokio::spawn(async move {
        let mut last = Duration::ZERO;
        for offset in &config.burst {
            tokio::time::sleep(offset.saturating_sub(last)).await;
            last = *offset;
            announce_all(&socket, &announcements);
        }
        for _ in 0..config.every_second {
            tokio::time::sleep(Duration::from_secs(1)).await;
            announce_all(&socket, &announcements);
        }
        loop {
            tokio::time::sleep(config.then_every).await;
            announce_all(&socket, &announcements);
        }
    });
    Repeating(task.abort_handle())
}

/// The burst alone, then silence.
pub(super) fn burst(socket: Arc<FrameSocket>, announcements: Vec<Announcement>, config: &AnnounceConfig) {
    let offsets = config.burst.clone();
    tokio::spawn(async move {
        let mut last = Duration::ZERO;
        for offset in offsets {
            tokio::time::sleep(offset.saturating_sub(last)).await;
            last = offset;
            announce_all(&socket, &announcements);
        }
    });
}

fn announce_all(socket: &FrameSocket, announcements: &[Announcement]) {
    for announcement in announcements {
        if let Err(error) = socket.announce(announcement) {
            debug!(address = %announcement.address, %error, "announcement not sent");
        }
    }
}

#[derive(Clone, Copy)]
enum ArpOperation {
    Request = 1,
    Reply = 2,
}

fn arp(
    op: ArpOperation,
    to: Mac,
    sender: Mac,
    sender_ip: Ipv4Addr,
    target: Mac,
    target_ip: Ipv4Addr,
) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4, 0, op as u8];
    body.extend_from_slice(&sender.0);
    body.extend_from_slice(&sender_ip.octets());
    body.extend_from_slice(&target.0);
    body.extend_from_slice(&target_ip.octets());
    frame(to, sender, ETHERTYPE_ARP, &body)
}

fn advertisement(to: Mac, mac: Mac, address: Ipv6Addr, router: bool) -> Vec<u8> {
    const ROUTER: u8 = 0x80;
    const OVERRIDE: u8 = 0x20;
    const TARGET_LINK_LAYER: u8 = 2;
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut message = vec![136, 0, 0, 0, if router { ROUTER | OVERRIDE } else { OVERRIDE }, 0, 0, 0];
    message.extend_from_slice(&address.octets());
    message.extend_from_slice(&[TARGET_LINK_LAYER, 1]);
    message.extend_from_slice(&mac.0);
    icmpv6(to, mac, address, all_nodes, message)
}

/// A solicitation of one who has no address yet, to those whose address may be this one (RFC 4291, 2.7.1).
fn solicitation(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    let [.., x, y, z] = address.octets();
    let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, x, y, z]);
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&address.octets());
    icmpv6(Mac([0x33, 0x33, 0xff, x, y, z]), mac, Ipv6Addr::UNSPECIFIED, group, message)
}

/// A frame with an ICMPv6 message, its checksum filled in.
fn icmpv6(to: Mac, from: Mac, source: Ipv6Addr, destination: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    let checksum = icmpv6_checksum(source, destination, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0, 0, message.len() as u8, 58, 255];
    packet.extend_from_slice(&source.octets());
    packet.extend_from_slice(&destination.octets());
    packet.extend_from_slice(&message);
    frame(to, from, ETHERTYPE_IPV6, &packet)
}

/// The checksum over message and pseudo-header (RFC 8200, 8.1).
fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let mut bytes = Vec::with_capacity(40 + message.len());
    bytes.extend_from_slice(&source.octets());
    bytes.extend_from_slice(&destination.octets());
    bytes.extend_from_slice(&(message.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&[0, 0, 0, 58]);
    bytes.extend_from_slice(message);
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn frame(to: Mac, from: Mac, ethertype: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(14 + body.len());
    frame.extend_from_slice(&to.0);
    frame.extend_from_slice(&from.0);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(body);
    frame
}

/// A `sockaddr_ll` that names only the device: the frame carries its own header (packet(7)).
#[allow(unsafe_code)]
fn link_layer_address(device: u32) -> io::Result<SockAddr> {
    let index = i32::try_from(device).map_err(io::Error::other)?;
    // SAFETY: the storage is zeroed and larger than sockaddr_ll, whose fields are plain integers; the
    // length set is that of sockaddr_ll.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, len| {
            let link: &mut libc::sockaddr_ll = &mut *storage.cast();
            link.sll_family = libc::AF_PACKET as u16;
            link.sll_ifindex = index;
            *len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }?;
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([0x52, 0x54, 0, 0xaa, 0, 0x10]);

    #[test]
    fn an_arp_announcement_names_the_address_as_sender_and_target() {
        let address = Ipv4Addr::new(198, 51, 100, 10);
        let bytes = arp(ArpOperation::Request, BROADCAST, MAC, address, Mac([0; 6]), address);
        assert_eq!(bytes.len(), 42);
        assert_eq!(bytes[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(
            (&bytes[22..28], &bytes[28..32], &bytes[38..42]),
            (&MAC.0[..], &[198, 51, 100, 10][..], &[198, 51, 100, 10][..])
        );
    }

    #[test]
    fn a_question_claims_no_address_and_goes_to_whoever_may_have_it() {
        let address = Ipv4Addr::new(198, 51, 100, 10);
        let bytes = arp(ArpOperation::Request, BROADCAST, MAC, Ipv4Addr::UNSPECIFIED, Mac([0; 6]), address);
        assert_eq!((&bytes[28..32], &bytes[38..42]), (&[0; 4][..], &[198, 51, 100, 10][..]));
        let bytes = solicitation(MAC, "2001:db8:a::1:2:10".parse().unwrap());
        assert_eq!((&bytes[..6], bytes[54]), (&[0x33, 0x33, 0xff, 2, 0, 0x10][..], 135));
        let group = "ff02::1:ff02:10".parse().unwrap();
        assert_eq!(icmpv6_checksum(Ipv6Addr::UNSPECIFIED, group, &bytes[54..]), 0);
    }

    #[test]
    fn an_advertisement_has_a_valid_checksum_and_overrides() {
        let address: Ipv6Addr = "2001:db8:a::10".parse().unwrap();
        let bytes = advertisement(ALL_NODES, MAC, address, false);
        let message = &bytes[54..];
        assert_eq!(icmpv6_checksum(address, "ff02::1".parse().unwrap(), message), 0);
        assert_eq!((message[0], message[4], message.len()), (136, 0x20, 32));
        assert_eq!(advertisement(ALL_NODES, MAC, address, true)[58], 0xa0, "of a router");
    }
}
