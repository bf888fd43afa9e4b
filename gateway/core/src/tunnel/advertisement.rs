//! Router advertisements (RFC 4861, 4.2): what is taken over from one that was heard, and the packet that imitates it.
//!
//! Of what a router says only a fixed set is kept, in a form of its own: the header, prefixes, MTU, name servers and
//! search list (RFC 8106), and routes (RFC 4191). Everything else is left out, and so are reserved bits. Lifetimes stay
//! as the router said them, as it would say them again. It does not decide when one is sent (see [`super::routers`]).

use std::net::Ipv6Addr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::checksum::{fold, pseudo_header, sum};
use super::handover::Mac;
use super::packet::ICMPV6;

/// The longest [`Advertisement`] in bytes: as a packet it fits IPv6's smallest MTU.
pub const MAX_ADVERTISEMENT_BYTES: usize = 1224;

/// ICMPv6 type of a router solicitation.
pub const SOLICITATION: u8 = 133;
/// ICMPv6 type of a router advertisement.
pub const ADVERTISEMENT: u8 = 134;

const HEADER_BYTES: usize = 16;
const SOLICITATION_HEADER_BYTES: usize = 8;
const HOP_LIMIT: u8 = 255;
const SOURCE_LINK_LAYER: u8 = 1;
const PREFIX: u8 = 3;
const MTU: u8 = 5;
const ROUTE: u8 = 24;
const NAME_SERVERS: u8 = 25;
const SEARCH_LIST: u8 = 31;
/// Managed, other configuration, and the router's preference.
const HEADER_FLAGS: u8 = 0xd8;
/// On-link, autonomous.
const PREFIX_FLAGS: u8 = 0xc0;
const PREFERENCE: u8 = 0x18;
/// "Must not be sent"; a header that has it counts as medium, a route is ignored (RFC 4191, 2.2 and 2.3).
const RESERVED_PREFERENCE: u8 = 0x10;
const FOREVER: u32 = u32::MAX;

/// An ICMPv6 message as it arrived.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    /// The device it came in by.
    pub device: u32,
    /// The packet's source.
    pub source: Ipv6Addr,
    /// The packet's hop limit.
    pub hop_limit: u8,
    /// From the ICMPv6 type on; its checksum was verified.
    pub message: &'a [u8],
}

/// Why a message is no advertisement that counts (RFC 4861, 6.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAdvertisement {
    /// It was not sent from a link-local address.
    #[error("Router advertisement from an address that is not link-local")]
    Source,
    /// It has passed a router.
    #[error("Router advertisement from another link")]
    HopLimit,
    /// Another type or code, or shorter than the header.
    #[error("Not a router advertisement")]
    Message,
    /// An option of length zero, or one that ends behind the message.
    #[error("Router advertisement with an option of a wrong length")]
    OptionLength,
    /// Longer than [`MAX_ADVERTISEMENT_BYTES`].
    #[error("Router advertisement of {length_bytes} bytes, {MAX_ADVERTISEMENT_BYTES} are allowed")]
    TooLong {
        /// Its length.
        length_bytes: usize,
    },
}

/// What a router of a LAN tells its hosts, without its link-layer address. Whatever is decoded is parsed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct Advertisement(Vec<u8>);

impl Advertisement {
    /// Takes over what is understood of an ICMPv6 message. Options that do not fit any more are left out.
    pub fn parse(message: &[u8]) -> Result<Self, InvalidAdvertisement> {
        let header: &[u8; HEADER_BYTES] = message.first_chunk().ok_or(InvalidAdvertisement::Message)?;
        if header[..2] != [ADVERTISEMENT, 0] {
            return Err(InvalidAdvertisement::Message);
        }
        let mut bytes = header.to_vec();
        bytes[2..4].fill(0);
        bytes[5] &= HEADER_FLAGS;
        if bytes[5] & PREFERENCE == RESERVED_PREFERENCE {
            bytes[5] &= !PREFERENCE;
        }
        for option in options(&message[HEADER_BYTES..])? {
            let Some(kept) = taken_over(option) else { continue };
            if bytes.len() + kept.len() <= MAX_ADVERTISEMENT_BYTES {
                bytes.extend(kept);
            }
        }
        Ok(Self(bytes))
    }

    /// Of a message that arrived; with the link-layer address that the router says it has.
    pub fn received(received: &Received<'_>) -> Result<(Self, Option<Mac>), InvalidAdvertisement> {
        if !received.source.is_unicast_link_local() {
            return Err(InvalidAdvertisement::Source);
        }
        if received.hop_limit != HOP_LIMIT {
            return Err(InvalidAdvertisement::HopLimit);
        }
        let advertisement = Self::parse(received.message)?;
        let mut options = options(&received.message[HEADER_BYTES..])?.into_iter();
        let link_layer = options.find_map(|option| match option {
            [SOURCE_LINK_LAYER, 1, mac @ ..] => mac.first_chunk().map(|octets| Mac(*octets)),
            _ => None,
        });
        Ok((advertisement, link_layer))
    }

    /// How long its sender is a default router; zero: it is none.
    pub fn router_lifetime(&self) -> Duration {
        Duration::from_secs(u16::from_be_bytes([self.0[6], self.0[7]]).into())
    }

    /// When the first thing that it says runs out, unless it is said again.
    pub fn shortest_lifetime(&self) -> Option<Duration> {
        let mut lifetimes = vec![self.router_lifetime().as_secs() as u32];
        for option in options(&self.0[HEADER_BYTES..]).unwrap_or_default() {
            match option[0] {
                PREFIX => lifetimes.extend([read_u32(option, 4), read_u32(option, 8)]),
                ROUTE | NAME_SERVERS | SEARCH_LIST => lifetimes.push(read_u32(option, 4)),
                _ => {}
            }
        }
        let ends = lifetimes.into_iter().filter(|seconds| ![0, FOREVER].contains(seconds));
        ends.min().map(|seconds| Duration::from_secs(seconds.into()))
    }

    /// The name servers that its link's hosts are to ask, but those that it takes back (RFC 8106, 5.1).
    pub fn name_servers(&self) -> Vec<Ipv6Addr> {
        let said = options(&self.0[HEADER_BYTES..]).unwrap_or_default().into_iter();
        let lasting = said.filter(|option| option[0] == NAME_SERVERS && read_u32(option, 4) > 0);
        let servers = lasting.filter_map(|option| option.get(8..)).flat_map(|rest| rest.chunks_exact(16));
        servers
            .filter_map(|octets| octets.first_chunk::<16>())
            .map(|octets| Ipv6Addr::from(*octets))
            .collect()
    }

    /// The packet in which the router at `source`, with the link-layer address `mac`, says it to all hosts of a link.
    pub fn packet(&self, source: Ipv6Addr, mac: Mac) -> Vec<u8> {
        const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        let len = (self.0.len() + 8) as u16;
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend(len.to_be_bytes());
        packet.extend([ICMPV6, HOP_LIMIT]);
        packet.extend(source.octets());
        packet.extend(ALL_NODES.octets());
        packet.extend(&self.0);
        packet.extend([SOURCE_LINK_LAYER, 1]);
        packet.extend(mac.0);
        let checksum = !fold(pseudo_header(&packet, ICMPV6) + u64::from(len) + sum(&packet[40..]));
        packet[42..44].copy_from_slice(&checksum.to_be_bytes());
        packet
    }
}

impl TryFrom<Vec<u8>> for Advertisement {
    type Error = InvalidAdvertisement;

    fn try_from(bytes: Vec<u8>) -> Result<Self, InvalidAdvertisement> {
        if bytes.len() > MAX_ADVERTISEMENT_BYTES {
            return Err(InvalidAdvertisement::TooLong { length_bytes: bytes.len() });
        }
        Self::parse(&bytes)
    }
}

impl From<Advertisement> for Vec<u8> {
    fn from(advertisement: Advertisement) -> Self {
        advertisement.0
    }
}

/// Whether a host asks the routers of its link (RFC 4861, 6.1.1).
pub fn is_solicitation(received: &Received<'_>) -> bool {
    let message = received.message;
    if received.hop_limit != HOP_LIMIT || message.len() < SOLICITATION_HEADER_BYTES {
        return false;
    }
    let Ok(options) = options(&message[SOLICITATION_HEADER_BYTES..]) else { return false };
    let names_itself = options.iter().any(|option| option[0] == SOURCE_LINK_LAYER);
    message[..2] == [SOLICITATION, 0] && !(received.source.is_unspecified() && names_itself)
}

/// The options one by one, each with its type and length. None is empty.
fn options(mut bytes: &[u8]) -> Result<Vec<&[u8]>, InvalidAdvertisement> {
    let mut options = Vec::new();
    while !bytes.is_empty() {
        let len = bytes.get(1).map_or(0, |units| usize::from(*units) * 8);
        if len == 0 || len > bytes.len() {
            return Err(InvalidAdvertisement::OptionLength);
        }
        let (option, rest) = bytes.split_at(len);
        options.push(option);
        bytes = rest;
    }
    Ok(options)
}

/// What is passed on of an option; nothing of one that is not known or that its receiver would ignore.
fn taken_over(option: &[u8]) -> Option<Vec<u8>> {
    let mut kept = option.to_vec();
    match option[0] {
        PREFIX => {
            let prefix: [u8; 16] = *option.get(16..)?.first_chunk()?;
            let prefix = Ipv6Addr::from(prefix);
            let local = prefix.is_multicast() || prefix.is_unicast_link_local();
            let outlived = read_u32(option, 8) > read_u32(option, 4);
            if option.len() != 32 || option[2] > 128 || local || outlived {
                return None;
            }
            kept[3] &= PREFIX_FLAGS;
            kept[12..16].fill(0);
        }
        MTU => {
            if option.len() != 8 || read_u32(option, 4) < 1280 {
                return None;
            }
            kept[2..4].fill(0);
        }
        ROUTE => {
            let needed = match option[2] {
                0 => 8,
                1..=64 => 16,
                65..=128 => 24,
                129.. => return None,
            };
            if !(needed..=24).contains(&option.len()) || option[3] & PREFERENCE == RESERVED_PREFERENCE {
                return None;
            }
            kept[3] &= PREFERENCE;
        }
        NAME_SERVERS => {
            if option.len() < 24 || option.len() % 16 != 8 {
                return None;
            }
            kept[2..4].fill(0);
        }
        SEARCH_LIST => {
            if option.len() < 16 || !is_search_list(&option[8..]) {
                return None;
            }
            kept[2..4].fill(0);
        }
        _ => return None,
    }
    Some(kept)
}

/// Names of labels (RFC 1035, 3.1) without compression, then zeros.
fn is_search_list(mut bytes: &[u8]) -> bool {
    let mut names = 0;
    while let Some((&len, rest)) = bytes.split_first() {
        if len == 0 {
            break;
        }
        let Some(behind) = name_ends(bytes) else { return false };
        names += 1;
        bytes = &rest[behind - 1..];
    }
    names > 0 && bytes.iter().all(|byte| *byte == 0)
}

/// The length of the name that `bytes` begin with, its last zero included.
fn name_ends(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            len @ 1..=63 => at += 1 + usize::from(len),
            64.. => return None,
        }
        if at > 254 {
            return None;
        }
    }
}

/// Four bytes of an option that is at least so long; every option has eight.
fn read_u32(option: &[u8], at: usize) -> u32 {
    option.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

#[cfg(test)]
#[path = "advertisement/tests.rs"]
mod tests;
