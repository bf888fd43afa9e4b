//! What is proven before a swap, and found out when a server says no for no visible reason: reach, key, clock, policy,
//! shape, zone. Changes nothing.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use hickory_proto::rr::{Name, RData, RecordType};

use crate::change::{Before, Change, check_in_zone, query, record_type};
use crate::error::{Error, Shape};
use crate::exchange::Conversation;
use crate::name::DnsName;
use crate::records::Records;
use crate::settle::Answer;
use crate::updater::Updater;

/// What a preflight found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preflight {
    /// The name as it is; its ownership record goes into [`crate::Swap::observed`].
    pub records: Records,
    /// The shortest exchange with the primary, connection included.
    pub round_trip: Duration,
}

impl Updater {
    /// Proves that a swap of `name` to addresses like `new` would work: reachable, key known and permitted for each
    /// record type, clocks in agreement, a shape that can be swapped. Changes nothing, not even the zone's serial.
    ///
    /// The proof is an UPDATE whose prerequisites are the state just read and whose records are that state again: what
    /// is there is added as it is, what is absent is deleted. BIND checks its update-policy for each of them; hickory
    /// authenticates. `new` may be empty: then only the families the name has now are rehearsed.
    pub async fn preflight(&self, name: &DnsName, new: &[IpAddr]) -> Result<Preflight, Error> {
        check_in_zone(name, &self.config.zone)?;
        let mut conversation = self.conversation();
        for _ in 0..=self.config.retries {
            let records = self.read_in(&mut conversation, name).await?;
            let ownership = records.check_shape()?;
            let before = Before { ownership, addresses: &records.addresses };
            let types: Vec<_> = new.iter().map(|address| record_type(*address)).collect();
            let message = Change::of(name, &self.config.zone)?
                .only_if(&before)
                .rehearse(&before, &types, |address| records.ttl_of(address))
                .into_message();
            let started = Instant::now();
            let reply = self.tell(&mut conversation, &message).await?;
            let round_trip = started.elapsed().min(records.round_trip);
            match Answer::of(&reply) {
                Answer::Applied => {
                    self.check_single_primary(&records).await?;
                    return Ok(Preflight { records, round_trip });
                }
                Answer::NotAsExpected(_) => {
                    let again = self.read_in(&mut conversation, name).await?;
                    if again.has(&records.addresses) && again.register == records.register {
                        return Err(self.why_not(&mut conversation, name, &before).await?);
                    }
                }
                Answer::Failed(rcode) => return Err(self.refused(name, rcode)),
            }
        }
        Err(Error::Config(format!("{name} changes faster than it can be looked at; who else updates it?")))
    }

    /// The zone of the primary that holds `name`, by the SOA record in its answer, whatever zone is configured.
    ///
    /// The first of the name's parents that the primary says something authoritative about. Nothing is guessed: a server
    /// that does not answer for the name is an error.
    pub async fn zone_of(&self, name: &DnsName) -> Result<DnsName, Error> {
        let mut conversation = self.conversation();
        let mut at = name.as_name().clone();
        while !at.is_root() {
            let question = [query(&at, RecordType::SOA)];
            let replies = self.persist(&mut conversation, &question, self.config.signed_reads).await?;
            let reply = &replies.first().ok_or(self.no_zone(name))?.message;
            if !reply.authoritative {
                return Err(self.no_zone(name));
            }
            let records = reply.answers.iter().chain(&reply.authorities);
            let zones = records.filter(|record| matches!(record.data, RData::SOA(_)));
            // An alias brings the zone it leads to: that one does not hold the name.
            let holds = |zone: &&Name| zone.zone_of(&at);
            if let Some(zone) = zones.map(|record| &record.name).find(holds) {
                return Ok(DnsName::from_wire(zone));
            }
            at = at.base_name();
        }
        Err(self.no_zone(name))
    }

    /// Why a server says that a prerequisite does not hold of a name that reads exactly as the prerequisites say.
    pub(crate) async fn why_not(
        &self,
        conversation: &mut Conversation<'_>,
        name: &DnsName,
        before: &Before<'_>,
    ) -> Result<Error, Error> {
        let shape = match before.addresses.first() {
            None => Shape::Prerequisites,
            Some(address) => {
                let change = Change::of(name, &self.config.zone)?.only_if(before);
                let alone = change.asks_only(record_type(*address));
                match Answer::of(&self.tell(conversation, &alone).await?) {
                    Answer::NotAsExpected(_) => Shape::Wildcard,
                    Answer::Applied | Answer::Failed(_) => Shape::Prerequisites,
                }
            }
        };
        Ok(Error::Shape { name: name.clone(), shape })
    }

    fn no_zone(&self, name: &DnsName) -> Error {
        let reason = "no zone of its own was found there; give the primary that holds the name, or the zone"
            .to_owned();
        let (server, zone) = (self.primary, self.config.zone.clone());
        Error::NotZone { server, zone, name: name.clone(), reason }
    }
}
