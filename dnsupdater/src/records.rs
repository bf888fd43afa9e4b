//! What a name looks like at a server: its addresses, their times to live, its ownership record, the zone's serial.
//!
//! Interprets replies; sends nothing. An answer that is not authoritative is no answer here.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use serde::{Deserialize, Serialize};

use crate::change::{ownership_name, query};
use crate::error::{Error, Shape};
use crate::name::DnsName;
use crate::ownership::{Epoch, Ownership};

/// The ownership record of a name as it was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Register {
    /// There is none: the name was never swapped.
    Absent,
    /// There is one.
    Held(Ownership),
    /// There is something else under its label, or several records; cut to 255 characters.
    Foreign(String),
}

/// A name as its primary has it. The parts were read in one round trip, not in one instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Records {
    /// The name.
    pub name: DnsName,
    /// All its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// The time to live of its IPv4 addresses, in seconds.
    pub a_ttl_s: Option<u32>,
    /// The time to live of its IPv6 addresses, in seconds.
    pub aaaa_ttl_s: Option<u32>,
    /// What it is an alias of, if it is one.
    pub cname: Option<DnsName>,
    /// Its ownership record.
    pub register: Register,
    /// The zone's serial number.
    pub serial: u32,
    /// The primary's name, by the zone's SOA record.
    pub primary: DnsName,
    /// How long the reading took, connection included.
    pub round_trip: Duration,
    /// The server's clock minus this machine's, in seconds, to about a second; none if the reply was not signed. Always
    /// about 0 with PowerDNS, which signs with the time of the request.
    pub clock_ahead_s: Option<i64>,
}

impl Records {
    /// The longest time to live of the addresses, in seconds: how long an old answer may live on in resolvers.
    pub fn ttl_s(&self) -> Option<u32> {
        self.a_ttl_s.max(self.aaaa_ttl_s)
    }

    /// The ownership record, if there is a proper one.
    pub fn ownership(&self) -> Option<&Ownership> {
        match &self.register {
            Register::Held(ownership) => Some(ownership),
            Register::Absent | Register::Foreign(_) => None,
        }
    }

    /// The epoch: 0 without a proper ownership record.
    pub fn epoch(&self) -> Epoch {
        self.ownership().map_or(Epoch(0), Ownership::epoch)
    }

    /// Whether the name has exactly these addresses.
    pub fn has(&self, addresses: &[IpAddr]) -> bool {
        same(&self.addresses, addresses)
    }

    /// The time to live of the family of `address`, in seconds; 0 if the family is absent.
    pub(crate) fn ttl_of(&self, address: IpAddr) -> u32 {
        match address {
            IpAddr::V4(_) => self.a_ttl_s.unwrap_or(0),
            IpAddr::V6(_) => self.aaaa_ttl_s.unwrap_or(0),
        }
    }

    /// The ownership record to compare with, or why the name cannot be changed by compare-and-swap at all.
    pub(crate) fn comparable(&self) -> Result<Option<&Ownership>, Error> {
        let refuse = |shape| Err(Error::Shape { name: self.name.clone(), shape });
        if self.cname.is_some() {
            return refuse(Shape::Cname);
        }
        match &self.register {
            Register::Absent => Ok(None),
            Register::Held(ownership) => Ok(Some(ownership)),
            Register::Foreign(found) => refuse(Shape::ForeignOwnership { found: found.clone() }),
        }
    }

    /// Refuses what a machine's name must not look like.
    pub(crate) fn check_shape(&self) -> Result<Option<&Ownership>, Error> {
        let ownership = self.comparable()?;
        let refuse = |shape| Err(Error::Shape { name: self.name.clone(), shape });
        let four = self.addresses.iter().filter(|address| address.is_ipv4()).count();
        let found = four.max(self.addresses.len() - four);
        match found {
            0 => refuse(Shape::Missing),
            1 => Ok(ownership),
            _ => refuse(Shape::SeveralAddresses { found }),
        }
    }
}

pub(crate) fn same(left: &[IpAddr], right: &[IpAddr]) -> bool {
    left.iter().collect::<BTreeSet<_>>() == right.iter().collect::<BTreeSet<_>>()
}

/// The questions of one reading, and where it is read.
pub(crate) struct Reading<'a> {
    pub(crate) server: SocketAddr,
    pub(crate) zone: &'a DnsName,
    pub(crate) name: &'a DnsName,
}

/// What a server says about a name, without the ownership record.
pub(crate) struct Published {
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) a_ttl_s: Option<u32>,
    pub(crate) aaaa_ttl_s: Option<u32>,
    pub(crate) cname: Option<DnsName>,
    pub(crate) serial: u32,
    pub(crate) primary: DnsName,
}

impl Reading<'_> {
    /// The questions for [`Reading::published`]: SOA, A, AAAA.
    pub(crate) fn public_questions(&self) -> Vec<Message> {
        let name = self.name.as_name();
        vec![
            query(self.zone.as_name(), RecordType::SOA),
            query(name, RecordType::A),
            query(name, RecordType::AAAA),
        ]
    }

    /// The question for [`Reading::register`].
    pub(crate) fn register_question(&self) -> Result<Message, Error> {
        Ok(query(ownership_name(self.name)?.as_name(), RecordType::TXT))
    }

    /// Interprets the answers to [`Reading::public_questions`].
    pub(crate) fn published(&self, soa: &Message, a: &Message, aaaa: &Message) -> Result<Published, Error> {
        let Some((primary, serial)) = self.answer(soa)?.iter().find_map(|record| self.soa_of(record)) else {
            return Err(self.not_zone("it has no SOA record for the zone"));
        };
        let (four, six) = (self.answer(a)?, self.answer(aaaa)?);
        let (a_addresses, a_ttl_s) = self.addresses(four, RecordType::A);
        let (mut addresses, (six_addresses, aaaa_ttl_s)) =
            (a_addresses, self.addresses(six, RecordType::AAAA));
        addresses.extend(six_addresses);
        let cname = four.iter().chain(six).find_map(|record| {
            let RData::CNAME(target) = &record.data else { return None };
            (record.name == *self.name.as_name()).then(|| DnsName::from_wire(&target.0))
        });
        Ok(Published { addresses, a_ttl_s, aaaa_ttl_s, cname, serial, primary })
    }

    /// Interprets the answer to [`Reading::register_question`].
    pub(crate) fn register(&self, reply: &Message) -> Result<Register, Error> {
        let name = ownership_name(self.name)?;
        let found: Vec<_> =
            self.answer(reply)?.iter().filter_map(|record| txt_of(record, name.as_name())).collect();
        Ok(match found.as_slice() {
            [] => Register::Absent,
            [value] => value.parse().map_or_else(|_| foreign(value), Register::Held),
            several => foreign(&several.join(" | ")),
        })
    }

    /// The answer section, if the reply is an authoritative one.
    pub(crate) fn answer<'m>(&self, reply: &'m Message) -> Result<&'m [Record], Error> {
        let rcode = reply.response_code;
        if rcode == ResponseCode::Refused || rcode == ResponseCode::NotAuth {
            return Err(self.not_zone("it refuses to answer for it"));
        }
        if rcode != ResponseCode::NoError && rcode != ResponseCode::NXDomain {
            return Err(Error::Server { server: self.server, rcode });
        }
        if !reply.authoritative {
            return Err(self.not_zone("its answer is not authoritative"));
        }
        Ok(&reply.answers)
    }

    fn soa_of(&self, record: &Record) -> Option<(DnsName, u32)> {
        let RData::SOA(soa) = &record.data else { return None };
        (record.name == *self.zone.as_name()).then(|| (DnsName::from_wire(&soa.mname), soa.serial))
    }

    fn addresses(&self, answers: &[Record], record_type: RecordType) -> (Vec<IpAddr>, Option<u32>) {
        let own =
            |record: &&Record| record.name == *self.name.as_name() && record.record_type() == record_type;
        let own: Vec<_> = answers.iter().filter(own).collect();
        let mut addresses: Vec<IpAddr> = own.iter().filter_map(|record| record.data.ip_addr()).collect();
        addresses.sort_unstable();
        (addresses, own.iter().map(|record| record.ttl).max())
    }

    fn not_zone(&self, reason: &str) -> Error {
        Error::NotZone {
            server: self.server,
            zone: self.zone.clone(),
            name: self.name.clone(),
            reason: reason.to_owned(),
        }
    }
}

fn txt_of(record: &Record, name: &Name) -> Option<String> {
    let RData::TXT(txt) = &record.data else { return None };
    if record.name != *name {
        return None;
    }
    Some(match &*txt.txt_data {
        [one] => String::from_utf8_lossy(one).into_owned(),
        several => several.iter().map(|part| format!("{:?}", String::from_utf8_lossy(part))).collect(),
    })
}

fn foreign(value: &str) -> Register {
    Register::Foreign(value.chars().take(255).collect())
}
