//! Reverse names: an address's PTR record, in its own zone and therefore in an update of its own.
//!
//! Forward and reverse never change in one instant: RFC 2136 knows one zone per message. The update has the form of a
//! swap, with an ownership record below `_longhaul` of the reverse name, so that it too is applied at most once.

use std::net::IpAddr;

use hickory_proto::op::Message;
use hickory_proto::rr::{RData, RecordType};
use serde::{Deserialize, Serialize};

use crate::change::{Change, check_in_zone, check_ttl, query};
use crate::error::{Error, Shape};
use crate::exchange::Conversation;
use crate::name::DnsName;
use crate::ownership::{Epoch, NOBODY, Ownership, Txn};
use crate::records::{Reading, Register};
use crate::settle::{Proof, Update};
use crate::updater::{Outcome, Updater};

/// A change of an address's reverse name, as one compare-and-swap in the reverse zone.
///
/// Keep it until its outcome is known: given again, it is the same transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtrSwap {
    /// The address whose reverse name changes.
    pub address: IpAddr,
    /// The reverse zone, such as `100.51.198.in-addr.arpa`; [`Updater::zone_of`] finds it.
    pub zone: DnsName,
    /// The name it must have; none: it must have none.
    pub old: Option<DnsName>,
    /// The name it gets; none: the record is removed.
    pub new: Option<DnsName>,
    /// The time to live of the new record, in seconds.
    pub ttl_s: u32,
    /// This transaction's number.
    pub txn: Txn,
}

/// A reverse name as the primary has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PtrRecords {
    /// The address.
    pub address: IpAddr,
    /// Its names; none, or more than one, which cannot be swapped.
    pub names: Vec<DnsName>,
    /// Their time to live, in seconds.
    pub ttl_s: Option<u32>,
    /// The ownership record of the reverse name.
    pub register: Register,
}

/// How a change of a reverse name ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PtrOutcome {
    /// It is as asked, by this transaction.
    Done,
    /// It was not as expected and was left alone.
    Lost {
        /// As it is.
        current: PtrRecords,
    },
}

impl PtrSwap {
    /// A change with a fresh transaction number.
    pub fn new(
        address: IpAddr,
        zone: DnsName,
        old: Option<DnsName>,
        new: Option<DnsName>,
        ttl_s: u32,
    ) -> Self {
        Self { address, zone, old, new, ttl_s, txn: Txn::random() }
    }

    /// The change that takes this one back.
    #[must_use]
    pub fn inverse(&self) -> Self {
        let (old, new) = (self.new.clone(), self.old.clone());
        Self { old, new, txn: Txn::random(), ..self.clone() }
    }
}

impl PtrRecords {
    /// Whether the address has exactly this name.
    pub fn has(&self, name: Option<&DnsName>) -> bool {
        self.names.iter().eq(name)
    }

    fn ownership(&self) -> Option<&Ownership> {
        match &self.register {
            Register::Held(ownership) => Some(ownership),
            Register::Absent | Register::Foreign(_) => None,
        }
    }
}

impl Updater {
    /// Reads an address's reverse name at the primary; `zone` is its reverse zone.
    pub async fn read_ptr(&self, address: IpAddr, zone: &DnsName) -> Result<PtrRecords, Error> {
        let there = self.in_zone(zone.clone());
        there.read_ptr_in(&mut there.conversation(), address).await
    }

    /// Changes an address's reverse name, conditional on the present one. It may be repeated with the same `swap`.
    ///
    /// The reverse zone is another one than the configured; the key must be allowed to change PTR and TXT records there,
    /// at the same primary. For another primary or key, make another [`Updater`].
    pub async fn swap_ptr(&self, swap: &PtrSwap) -> Result<PtrOutcome, Error> {
        check_ttl(swap.ttl_s)?;
        let there = self.in_zone(swap.zone.clone());
        let name = DnsName::reverse(swap.address);
        let mut conversation = there.conversation();
        let current = there.read_ptr_in(&mut conversation, swap.address).await?;
        if let Register::Foreign(found) = &current.register {
            return Err(Error::Shape { name, shape: Shape::ForeignOwnership { found: found.clone() } });
        }
        let before = current.ownership().cloned();
        if before.as_ref().is_some_and(|before| before.txn() == swap.txn) {
            return Ok(PtrOutcome::Done);
        }
        if !current.has(swap.old.as_ref()) {
            return Ok(PtrOutcome::Lost { current });
        }
        let epoch = before.as_ref().map_or(Epoch(1), |before| Epoch(before.epoch().0.saturating_add(1)));
        let after =
            Ownership::new(epoch, NOBODY, swap.txn).map_err(|error| Error::Config(error.to_string()))?;
        let message = Change::of(&name, &swap.zone)?
            .only_if_named(before.as_ref(), swap.old.as_ref())
            .own(&after)
            .name_back(swap.old.as_ref(), swap.new.as_ref(), swap.ttl_s)
            .into_message();
        let (before, after, proof) = (before.as_ref(), &after, Proof::Claim);
        let update = Update { name: &name, before, after, proof, message };
        match there.settle(&mut conversation, &update).await? {
            Outcome::Won => Ok(PtrOutcome::Done),
            Outcome::Lost { .. } => {
                let current = there.read_ptr_in(&mut conversation, swap.address).await?;
                Ok(PtrOutcome::Lost { current })
            }
        }
    }

    async fn read_ptr_in(
        &self,
        conversation: &mut Conversation<'_>,
        address: IpAddr,
    ) -> Result<PtrRecords, Error> {
        let name = DnsName::reverse(address);
        check_in_zone(&name, &self.config.zone)?;
        let reading = Reading { server: self.primary, zone: &self.config.zone, name: &name };
        let questions = [query(name.as_name(), RecordType::PTR), reading.register_question()?];
        let replies = self.persist(conversation, &questions, self.config.signed_reads).await?;
        let [ptr, register] = replies.as_slice() else {
            return Err(Error::Protocol { server: self.primary, reason: "an answer is missing" });
        };
        let (names, ttl_s) = reading.names(&ptr.message)?;
        let register = reading.register(&register.message)?;
        Ok(PtrRecords { address, names, ttl_s, register })
    }
}

impl Reading<'_> {
    fn names(&self, reply: &Message) -> Result<(Vec<DnsName>, Option<u32>), Error> {
        let own = self.answer(reply)?.iter().filter(|record| record.name == *self.name.as_name());
        let (mut names, mut ttl_s) = (Vec::new(), None);
        for record in own {
            if let RData::PTR(target) = &record.data {
                names.push(DnsName::from_wire(&target.0));
                ttl_s = ttl_s.max(Some(record.ttl));
            }
            if let RData::CNAME(target) = &record.data {
                let shape = Shape::ReverseAlias { target: target.0.to_ascii() };
                return Err(Error::Shape { name: self.name.clone(), shape });
            }
        }
        names.sort();
        Ok((names, ttl_s))
    }
}
