//! The changes of a name and their wire form: one UPDATE each, all or nothing (RFC 2136 section 3.7).
//!
//! A swap of `app.vm.example` from 198.51.100.10 to 203.0.113.10 and 2001:db8::10, epoch 7 to 8:
//!
//! ```text
//! ZONE          vm.example.                IN   SOA
//! PREREQUISITE  _longhaul.app.vm.example.  IN   TXT   "v=1 epoch=7 owner=site-a txn=..."   exactly this value
//!               app.vm.example.            IN   A     198.51.100.10                        exactly this RRset
//!               app.vm.example.            NONE AAAA                                       no such RRset
//! UPDATE        _longhaul.app.vm.example.  ANY  TXT                                        delete the RRset
//!               _longhaul.app.vm.example.  IN   TXT   "v=1 epoch=8 owner=site-b txn=..."   TTL 0
//!               app.vm.example.            ANY  A                                          delete the RRset
//!               app.vm.example.            IN   A     203.0.113.10
//!               app.vm.example.            IN   AAAA  2001:db8::10
//! ```
//!
//! Prerequisites carry TTL 0. The first time, the ownership prerequisite is `NONE TXT`: no such RRset. A family that
//! the old state does not have is not deleted, so that a key without permission for AAAA can move an IPv4 name.
//!
//! Every other change has the same form, with the ownership record in its prerequisites and a new value of it among its
//! updates: a time to live leaves the claim as it is and touches the record, a reverse name has a record of its own below
//! `_longhaul` in its own zone. So no message does anything when it comes again. No I/O.

use std::collections::BTreeSet;
use std::net::IpAddr;

use hickory_proto::op::{Message, MessageType, OpCode, Query, UpdateMessage};
use hickory_proto::rr::rdata::{PTR, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::name::DnsName;
use crate::ownership::{Epoch, NOBODY, OWNERSHIP_LABEL, Ownership, Txn};

/// The most addresses on either side of a swap.
pub const MAX_ADDRESSES: usize = 16;

/// The longest time to live that is written, in seconds: a week, RFC 8767's cap.
pub const MAX_TTL_S: u32 = 604_800;

/// A move of a name from one set of addresses to another, as one compare-and-swap.
///
/// Keep it (it can be serialised) until its outcome is known: given again, it is the same transaction, applied at most
/// once however often it is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swap {
    /// The name.
    pub name: DnsName,
    /// The addresses it must have, all of them. Empty: it must have none and be no CNAME, and is created.
    pub old: Vec<IpAddr>,
    /// The addresses it gets, at least one.
    pub new: Vec<IpAddr>,
    /// The time to live of the new addresses, in seconds.
    pub ttl_s: u32,
    /// The epoch the ownership record must have; 0 when there must be none.
    pub epoch_from: Epoch,
    /// The epoch it gets: larger than `epoch_from`, or the same where the name goes back, within its epoch, from the
    /// owner of `observed` to another one.
    pub epoch_to: Epoch,
    /// The site it names then.
    pub owner: String,
    /// This transaction's number.
    pub txn: Txn,
    /// The ownership record as it was read before, for instance by the preflight. With it the swap is sent without
    /// reading first, one round trip less; without it the record is read and must have `epoch_from`.
    pub observed: Option<Ownership>,
}

impl Swap {
    /// A swap with a fresh transaction number, for a name that was never owned (epoch 0 to 1); change what differs.
    pub fn new(name: DnsName, old: Vec<IpAddr>, new: Vec<IpAddr>, ttl_s: u32, owner: &str) -> Self {
        Self {
            name,
            old,
            new,
            ttl_s,
            epoch_from: Epoch(0),
            epoch_to: Epoch(1),
            owner: owner.to_owned(),
            txn: Txn::random(),
            observed: None,
        }
    }

    /// The same swap between other epochs.
    #[must_use]
    pub fn epochs(self, from: Epoch, to: Epoch) -> Self {
        Self { epoch_from: from, epoch_to: to, ..self }
    }

    /// The same swap on top of an ownership record that was read before.
    #[must_use]
    pub fn observed(self, ownership: Option<Ownership>) -> Self {
        Self { observed: ownership, ..self }
    }

    /// The ownership record this swap writes.
    pub fn ownership(&self) -> Result<Ownership, Error> {
        Ownership::new(self.epoch_to, &self.owner, self.txn).map_err(|error| Error::Config(error.to_string()))
    }

    /// The swap that takes this one back: on top of exactly this one's record, to the old addresses and epoch.
    ///
    /// The ownership record of the swap that takes this one back, to the old addresses and epoch.
    ///
    /// It has a new transaction number, so a replay of the first swap stays impossible. Its owner is the one of
    /// `observed`, else [`NOBODY`].
    pub(crate) fn inverse(&self) -> Result<Ownership, Error> {
        let owner = self.observed.as_ref().map_or(NOBODY, |observed| observed.owner());
        let written = Ownership::new(self.epoch_from, owner, Txn::random());
        written.map_err(|error| Error::Config(error.to_string()))
    }

    pub(crate) fn check(&self, zone: &DnsName) -> Result<(), Error> {
        let refuse =
            |reason: String| Err(Error::Config(format!("The swap of {} is refused: {reason}", self.name)));
        let goes_back = self.epoch_to == self.epoch_from
            && self.observed.as_ref().is_some_and(|observed| observed.owner() != self.owner);
        if self.epoch_to <= self.epoch_from && !goes_back {
            return refuse(format!("epoch {} does not follow {}", self.epoch_to, self.epoch_from));
        }
        if self.new.is_empty() {
            return refuse("it has no new address".to_owned());
        }
        if self.old.len().max(self.new.len()) > MAX_ADDRESSES {
            return refuse(format!("it has more than {MAX_ADDRESSES} addresses"));
        }
        if let Some(bad) = self.new.iter().find(|address| address.is_unspecified() || address.is_multicast())
        {
            return refuse(format!("{bad} is no machine's address"));
        }
        check_ttl(self.ttl_s)?;
        check_in_zone(&self.name, zone)?;
        self.ownership().map(|_| ())
    }
}

pub(crate) fn check_ttl(ttl_s: u32) -> Result<(), Error> {
    if ttl_s > MAX_TTL_S {
        return Err(Error::Config(format!("A time to live of {ttl_s} s is refused, at most {MAX_TTL_S} s")));
    }
    Ok(())
}

pub(crate) fn check_in_zone(name: &DnsName, zone: &DnsName) -> Result<(), Error> {
    if !name.is_in(zone) {
        return Err(Error::Config(format!("{name} is not in the configured zone {zone}")));
    }
    Ok(())
}

pub(crate) fn ownership_name(name: &DnsName) -> Result<DnsName, Error> {
    name.child(OWNERSHIP_LABEL).map_err(|error| Error::Config(error.to_string()))
}

/// What a name must look like for a change to happen, all of it.
pub(crate) struct Before<'a> {
    pub(crate) ownership: Option<&'a Ownership>,
    pub(crate) addresses: &'a [IpAddr],
}

/// An UPDATE message under construction.
pub(crate) struct Change {
    message: Message,
    name: Name,
    ownership: Name,
}

impl Change {
    pub(crate) fn of(name: &DnsName, zone: &DnsName) -> Result<Self, Error> {
        let ownership = ownership_name(name)?.as_name().clone();
        Ok(Self { message: empty_update(zone), name: name.as_name().clone(), ownership })
    }

    /// The prerequisites: exactly this state, nothing more and nothing less.
    pub(crate) fn only_if(mut self, before: &Before<'_>) -> Self {
        let register = self.ownership_prerequisite(before.ownership);
        let message = &mut self.message;
        message.add_pre_requisite(register);
        let distinct: BTreeSet<_> = before.addresses.iter().copied().collect();
        for address in &distinct {
            message.add_pre_requisite(Record::from_rdata(self.name.clone(), 0, (*address).into()));
        }
        for absent in [RecordType::A, RecordType::AAAA] {
            if !distinct.iter().any(|address| record_type(*address) == absent) {
                message.add_pre_requisite(marker(&self.name, DNSClass::NONE, absent));
            }
        }
        if distinct.is_empty() {
            message.add_pre_requisite(marker(&self.name, DNSClass::NONE, RecordType::CNAME));
        }
        self
    }

    /// The prerequisites of a reverse name: exactly this one and this ownership record.
    pub(crate) fn only_if_named(mut self, ownership: Option<&Ownership>, old: Option<&DnsName>) -> Self {
        self.message.add_pre_requisite(self.ownership_prerequisite(ownership));
        self.message.add_pre_requisite(match old {
            Some(old) => Record::from_rdata(self.name.clone(), 0, ptr(old)),
            None => marker(&self.name, DNSClass::NONE, RecordType::PTR),
        });
        self
    }

    fn ownership_prerequisite(&self, expected: Option<&Ownership>) -> Record {
        match expected {
            Some(value) => Record::from_rdata(self.ownership.clone(), 0, txt(value)),
            None => marker(&self.ownership, DNSClass::NONE, RecordType::TXT),
        }
    }

    /// Replaces the ownership record.
    pub(crate) fn own(mut self, after: &Ownership) -> Self {
        self.message.add_update(marker(&self.ownership, DNSClass::ANY, RecordType::TXT));
        self.message.add_update(Record::from_rdata(self.ownership.clone(), 0, txt(after)));
        self
    }

    /// Replaces the addresses `old` by `new`, family by family.
    pub(crate) fn point(mut self, old: &[IpAddr], new: &[IpAddr], ttl_of: impl Fn(IpAddr) -> u32) -> Self {
        for family in [RecordType::A, RecordType::AAAA] {
            if old.iter().any(|address| record_type(*address) == family) {
                self.message.add_update(marker(&self.name, DNSClass::ANY, family));
            }
        }
        let distinct: BTreeSet<_> = new.iter().copied().collect();
        for address in distinct {
            let record = Record::from_rdata(self.name.clone(), ttl_of(address), address.into());
            self.message.add_update(record);
        }
        self
    }

    /// Touches every record that a swap touches without changing any: what is there is added again as it is, what is
    /// not there is deleted. The server checks the key's policy for each all the same.
    pub(crate) fn rehearse(
        mut self,
        before: &Before<'_>,
        types: &[RecordType],
        ttl_of: impl Fn(IpAddr) -> u32,
    ) -> Self {
        self.message.add_update(match before.ownership {
            Some(value) => Record::from_rdata(self.ownership.clone(), 0, txt(value)),
            None => marker(&self.ownership, DNSClass::ANY, RecordType::TXT),
        });
        for address in before.addresses {
            let record = Record::from_rdata(self.name.clone(), ttl_of(*address), (*address).into());
            self.message.add_update(record);
        }
        for absent in types {
            if !before.addresses.iter().any(|address| record_type(*address) == *absent) {
                self.message.add_update(marker(&self.name, DNSClass::ANY, *absent));
            }
        }
        self
    }

    /// Of the prerequisites only those of one record type at the name itself, and nothing to change. They are checked all
    /// the same (RFC 2136 section 3.2).
    pub(crate) fn asks_only(mut self, record_type: RecordType) -> Message {
        let name = self.name;
        self.message.answers.retain(|record| record.name == name && record.record_type() == record_type);
        self.message
    }

    /// Replaces the reverse name `old` by `new`.
    pub(crate) fn name_back(mut self, old: Option<&DnsName>, new: Option<&DnsName>, ttl_s: u32) -> Self {
        if old.is_some() {
            self.message.add_update(marker(&self.name, DNSClass::ANY, RecordType::PTR));
        }
        if let Some(new) = new {
            self.message.add_update(Record::from_rdata(self.name.clone(), ttl_s, ptr(new)));
        }
        self
    }

    pub(crate) fn into_message(self) -> Message {
        self.message
    }
}

pub(crate) fn query(name: &Name, record_type: RecordType) -> Message {
    let mut message = Message::new(0, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(name.clone(), record_type));
    message
}

pub(crate) fn record_type(address: IpAddr) -> RecordType {
    match address {
        IpAddr::V4(_) => RecordType::A,
        IpAddr::V6(_) => RecordType::AAAA,
    }
}

fn empty_update(zone: &DnsName) -> Message {
    let mut message = Message::new(0, MessageType::Query, OpCode::Update);
    message.add_zone(Query::query(zone.as_name().clone(), RecordType::SOA));
    message
}

/// A record without data whose class carries the meaning (RFC 2136 sections 2.4 and 2.5).
fn marker(name: &Name, class: DNSClass, record_type: RecordType) -> Record {
    let mut record = Record::update0(name.clone(), 0, record_type);
    record.dns_class = class;
    record
}

fn ptr(target: &DnsName) -> RData {
    RData::PTR(PTR(target.as_name().clone()))
}

fn txt(value: &Ownership) -> RData {
    RData::TXT(TXT::new(vec![value.to_string()]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_goes_back_within_its_epoch_only_from_another_owner_that_was_observed() {
        let zone: DnsName = "vm.example".parse().unwrap();
        let address = "198.51.100.10".parse().unwrap();
        let swap = Swap::new("app.vm.example".parse().unwrap(), vec![address], vec![address], 30, "a")
            .epochs(Epoch(7), Epoch(7));
        let held = |owner| Some(Ownership::new(Epoch(7), owner, Txn::random()).unwrap());
        assert!(swap.clone().observed(held("b")).check(&zone).is_ok());
        for refused in [None, held("a")] {
            assert!(swap.clone().observed(refused).check(&zone).is_err());
        }
        let lower = swap.epochs(Epoch(7), Epoch(6)).observed(held("b"));
        assert!(lower.check(&zone).is_err());
    }
}
