//! The updater: reads a name, swaps it, takes a swap back, changes its time to live; always at the primary alone.
//!
//! Never a second primary: two servers cannot order two swaps. How one update comes to its outcome is in `settle`, what
//! is proven before in `preflight`, the verification of all servers in `verify`, reverse names in `reverse`.

use std::net::SocketAddr;
use std::time::Instant;

use hickory_proto::op::ResponseCode;
use tracing::info;

use crate::change::{Before, Change, Swap, check_in_zone, check_ttl};
use crate::config::{Transport, UpdaterConfig};
use crate::error::{Error, Shape};
use crate::exchange::Conversation;
use crate::name::DnsName;
use crate::ownership::{Epoch, NOBODY, Ownership, Txn};
use crate::records::{Reading, Records};
use crate::settle::{Proof, Update};
use crate::signing::Seal;

/// Changes names at one primary, as [`UpdaterConfig`] says. Holds no connection; cheap to clone, `&self` everywhere.
#[derive(Clone)]
pub struct Updater {
    pub(crate) config: UpdaterConfig,
    pub(crate) primary: SocketAddr,
    pub(crate) seal: Seal,
}

/// How a compare-and-swap ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The name is as asked, by this transaction.
    Won,
    /// The name was not as expected, nothing was changed by this transaction; this is how it is.
    ///
    /// After an update of this swap was sent and its answer lost, it also covers that the update was applied and has
    /// been replaced since.
    Lost {
        /// The name as it is.
        current: Box<Records>,
        /// What the server said of the prerequisites: NXRRSET, something expected is not there; YXRRSET, something is
        /// there that must not be. None: it was seen by reading.
        rcode: Option<ResponseCode>,
    },
}

/// How a change of the time to live ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TtlOutcome {
    /// It was `from_s` and is `to_s` now, in seconds. Answers given before live up to `from_s` longer.
    Changed {
        /// The longest time to live before.
        from_s: u32,
        /// The one now.
        to_s: u32,
    },
    /// Nothing had to be done; in seconds.
    Already {
        /// The longest time to live.
        ttl_s: u32,
    },
    /// The name changed while this was going on.
    Lost {
        /// The name as it is.
        current: Box<Records>,
    },
}

impl Updater {
    /// Checks the configuration; sends nothing.
    pub fn new(config: UpdaterConfig) -> Result<Self, Error> {
        let primary = config.check()?;
        let seal = Seal { signer: config.key.signer(config.fudge_s)?, clock_offset_s: config.clock_offset_s };
        Ok(Self { config, primary, seal })
    }

    /// The configuration it was made with.
    pub fn config(&self) -> &UpdaterConfig {
        &self.config
    }

    /// The same updater for another zone of the same primary.
    #[must_use]
    pub fn in_zone(&self, zone: DnsName) -> Self {
        let mut other = self.clone();
        other.config.zone = zone;
        other
    }

    /// Reads a name at the primary: one round trip, signed unless the configuration says otherwise.
    pub async fn read(&self, name: &DnsName) -> Result<Records, Error> {
        check_in_zone(name, &self.config.zone)?;
        self.read_in(&mut self.conversation(), name).await
    }

    /// Swaps a name's addresses and its ownership record in one update.
    ///
    /// May be repeated with the same `swap` after any error. An error other than [`Error::OutcomeUnknown`] means that
    /// the name was not changed by this call. A change of the time to live in between does not make it lose.
    pub async fn swap(&self, swap: &Swap) -> Result<Outcome, Error> {
        swap.check(&self.config.zone)?;
        let after = swap.ownership()?;
        let mut conversation = self.conversation();
        let mut before = match &swap.observed {
            Some(observed) if observed.epoch() == swap.epoch_from => Some(observed.clone()),
            Some(_) | None => {
                let current = self.read_in(&mut conversation, &swap.name).await?;
                let ownership = current.comparable()?.cloned();
                if ownership.as_ref().is_some_and(|found| found.is_claim_of(&after)) {
                    return Ok(Outcome::Won);
                }
                if current.epoch() != swap.epoch_from || !current.has(&swap.old) {
                    return Ok(Outcome::Lost { current: Box::new(current), rcode: None });
                }
                ownership
            }
        };
        for _ in 0..self.config.retries {
            let outcome = self.swap_once(&mut conversation, swap, before.as_ref(), &after).await?;
            match touched_since(before.as_ref(), &outcome) {
                Some(now) => before = Some(now),
                None => return Ok(outcome),
            }
        }
        self.swap_once(&mut conversation, swap, before.as_ref(), &after).await
    }

    async fn swap_once(
        &self,
        conversation: &mut Conversation<'_>,
        swap: &Swap,
        before: Option<&Ownership>,
        after: &Ownership,
    ) -> Result<Outcome, Error> {
        let expected = Before { ownership: before, addresses: &swap.old };
        let message = Change::of(&swap.name, &self.config.zone)?
            .only_if(&expected)
            .own(after)
            .point(&swap.old, &swap.new, |_| swap.ttl_s)
            .into_message();
        let update = Update { name: &swap.name, before, after, proof: Proof::Claim, message };
        let outcome = self.settle(conversation, &update).await;
        let won = matches!(outcome, Ok(Outcome::Won));
        info!(name = %swap.name, txn = %swap.txn, epoch = %swap.epoch_to, won, "Swap ended");
        let outcome = outcome?;
        if let Outcome::Lost { current, rcode: Some(_) } = &outcome
            && current.ownership() == before
            && current.has(&swap.old)
        {
            return Err(self.why_not(conversation, &swap.name, &expected).await?);
        }
        Ok(outcome)
    }

    /// Takes back a swap that was won: `new` becomes `old` again, if nobody has swapped since.
    ///
    /// The time to live stays the swap's; call [`Updater::restore_ttl`] next. `Won` also if the swap was never applied: then
    /// no update of it that is still under way will be.
    pub async fn undo(&self, swap: &Swap) -> Result<Outcome, Error> {
        swap.check(&self.config.zone)?;
        let (swapped, after) = (swap.ownership()?, swap.inverse()?);
        let mut conversation = self.conversation();
        let mut current = self.read_in(&mut conversation, &swap.name).await?;
        let is_ours = |found: &Ownership| found.is_claim_of(&swapped);
        if !current.comparable()?.is_some_and(is_ours) {
            if current.epoch() != swap.epoch_from || !current.has(&swap.old) {
                return Ok(Outcome::Lost { current: Box::new(current), rcode: None });
            }
            match self.forestall(&mut conversation, swap, &current).await? {
                // It was applied after all, before it could be kept from it.
                Outcome::Lost { current: now, rcode: _ } if now.ownership().is_some_and(is_ours) => {
                    current = *now
                }
                outcome @ (Outcome::Won | Outcome::Lost { .. }) => return Ok(outcome),
            }
        }
        let before = current.comparable()?;
        let message = Change::of(&swap.name, &self.config.zone)?
            .only_if(&Before { ownership: before, addresses: &swap.new })
            .own(&after)
            .point(&swap.new, &swap.old, |_| swap.ttl_s)
            .into_message();
        let update = Update { name: &swap.name, before, after: &after, proof: Proof::Claim, message };
        self.settle(&mut conversation, &update).await
    }

    /// Leaves an ownership record on which no update of a swap that was not applied can build.
    async fn forestall(
        &self,
        conversation: &mut Conversation<'_>,
        swap: &Swap,
        found: &Records,
    ) -> Result<Outcome, Error> {
        let before = found.comparable()?;
        let replaced = |(before, observed): (&Ownership, &Ownership)| !before.is_claim_of(observed);
        if before.zip(swap.observed.as_ref()).is_some_and(replaced) {
            return Ok(Outcome::Won);
        }
        let after = match before {
            Some(before) => before.touched(),
            None => swap.inverse()?,
        };
        let message = Change::of(&swap.name, &self.config.zone)?
            .only_if(&Before { ownership: before, addresses: &found.addresses })
            .own(&after)
            .into_message();
        let update = Update { name: &swap.name, before, after: &after, proof: Proof::Value, message };
        self.settle(conversation, &update).await
    }

    /// Lowers the time to live of a name's addresses before a move, if it is higher, conditional on the addresses and
    /// the ownership record as they are. Wait for `from_s` afterwards, until older answers have expired.
    ///
    /// The ownership record keeps its claim and is touched; a name without one gets one of epoch 0.
    pub async fn lower_ttl(&self, name: &DnsName, ttl_s: u32) -> Result<TtlOutcome, Error> {
        self.set_ttl(name, ttl_s, |now_s| now_s > ttl_s).await
    }

    /// Sets the time to live of a name's addresses back, conditional on the addresses and the ownership record.
    pub async fn restore_ttl(&self, name: &DnsName, ttl_s: u32) -> Result<TtlOutcome, Error> {
        self.set_ttl(name, ttl_s, |now_s| now_s != ttl_s).await
    }

    async fn set_ttl(
        &self,
        name: &DnsName,
        ttl_s: u32,
        needed: impl Fn(u32) -> bool,
    ) -> Result<TtlOutcome, Error> {
        check_in_zone(name, &self.config.zone)?;
        check_ttl(ttl_s)?;
        let mut conversation = self.conversation();
        let current = self.read_in(&mut conversation, name).await?;
        let ownership = current.comparable()?;
        let Some(from_s) = current.ttl_s() else {
            return Err(Error::Shape { name: name.clone(), shape: Shape::Missing });
        };
        if ![current.a_ttl_s, current.aaaa_ttl_s].into_iter().flatten().any(needed) {
            return Ok(TtlOutcome::Already { ttl_s: from_s });
        }
        let after = match ownership {
            Some(ownership) => ownership.touched(),
            None => Ownership::new(Epoch(0), NOBODY, Txn::random())
                .map_err(|error| Error::Config(error.to_string()))?,
        };
        let message = Change::of(name, &self.config.zone)?
            .only_if(&Before { ownership, addresses: &current.addresses })
            .own(&after)
            .point(&current.addresses, &current.addresses, |_| ttl_s)
            .into_message();
        let update = Update { name, before: ownership, after: &after, proof: Proof::Value, message };
        match self.settle(&mut conversation, &update).await? {
            Outcome::Won => Ok(TtlOutcome::Changed { from_s, to_s: ttl_s }),
            Outcome::Lost { current, rcode: _ } => Ok(TtlOutcome::Lost { current }),
        }
    }

    pub(crate) async fn read_in(
        &self,
        conversation: &mut Conversation<'_>,
        name: &DnsName,
    ) -> Result<Records, Error> {
        let reading = Reading { server: self.primary, zone: &self.config.zone, name };
        let mut questions = reading.public_questions();
        questions.push(reading.register_question()?);
        let started = Instant::now();
        let replies = self.persist(conversation, &questions, self.config.signed_reads).await?;
        let round_trip = started.elapsed();
        let [soa, a, aaaa, register] = replies.as_slice() else {
            return Err(Error::Protocol { server: self.primary, reason: "an answer is missing" });
        };
        let published = reading.published(&soa.message, &a.message, &aaaa.message)?;
        Ok(Records {
            name: name.clone(),
            addresses: published.addresses,
            a_ttl_s: published.a_ttl_s,
            aaaa_ttl_s: published.aaaa_ttl_s,
            cname: published.cname,
            register: reading.register(&register.message)?,
            serial: published.serial,
            primary: published.primary,
            round_trip,
            clock_ahead_s: soa
                .signed_at_s
                .map(|there_s| there_s.wrapping_sub(self.seal.now_s()).cast_signed()),
        })
    }

    pub(crate) fn conversation(&self) -> Conversation<'_> {
        self.conversation_with(self.primary, self.config.transport)
    }

    pub(crate) fn conversation_with(&self, server: SocketAddr, transport: Transport) -> Conversation<'_> {
        Conversation::new(server, transport, self.config.timeout, &self.seal)
    }

    /// A signed error reply: the key is right.
    pub(crate) fn refused(&self, name: &DnsName, rcode: ResponseCode) -> Error {
        let (server, zone) = (self.primary, self.config.zone.clone());
        if rcode == ResponseCode::Refused {
            let key = self.config.key.name().clone();
            return Error::KeyOrPolicy { server, key, rcode, tsig: None, authenticated: true };
        }
        if rcode == ResponseCode::NotAuth || rcode == ResponseCode::NotZone {
            let reason = if rcode == ResponseCode::NotAuth {
                "NOTAUTH: it has no such zone as a primary; give the primary of the zone, or add the zone there"
            } else {
                "NOTZONE: its zone does not reach down to this name; give the zone that holds the name"
            };
            return Error::NotZone { server, zone, name: name.clone(), reason: reason.to_owned() };
        }
        Error::Server { server, rcode }
    }
}

/// The ownership record now, if a swap lost for no other reason than that this record was touched.
fn touched_since(before: Option<&Ownership>, outcome: &Outcome) -> Option<Ownership> {
    let Outcome::Lost { current, rcode: _ } = outcome else { return None };
    let (now, before) = (current.ownership()?, before?);
    (now != before && now.is_claim_of(before)).then(|| now.clone())
}
