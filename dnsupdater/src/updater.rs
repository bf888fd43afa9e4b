//! The updater: reads a name, swaps it, takes a swap back, changes its time to live; always at the primary alone.
//!
//! Never a second primary: two servers cannot order two swaps. How one update comes to its outcome is in `settle`, the
//! verification of all servers in `verify`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use tracing::info;

use crate::change::{Before, Change, PtrSwap, Swap, check_in_zone, check_ttl, ptr_message, record_type};
use crate::config::{Transport, UpdaterConfig};
use crate::error::{Error, Shape};
use crate::exchange::Conversation;
use crate::name::DnsName;
use crate::records::{Reading, Records};
use crate::settle::{Answer, Update};
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
    },
}

/// What a preflight found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preflight {
    /// The name as it is; its ownership record goes into [`Swap::observed`].
    pub records: Records,
    /// The shortest exchange with the primary, connection included.
    pub round_trip: Duration,
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

/// How a change of a reverse name ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PtrOutcome {
    /// It is as asked.
    Done,
    /// It was not as expected and was left alone.
    Lost,
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

    /// Reads a name at the primary: one round trip, signed unless the configuration says otherwise.
    pub async fn read(&self, name: &DnsName) -> Result<Records, Error> {
        check_in_zone(name, &self.config.zone)?;
        self.read_in(&mut self.conversation(), name).await
    }

    /// Swaps a name's addresses and its ownership record in one update.
    ///
    /// May be repeated with the same `swap` after any error. An error other than [`Error::OutcomeUnknown`] means that
    /// the name was not changed by this call.
    pub async fn swap(&self, swap: &Swap) -> Result<Outcome, Error> {
        swap.check(&self.config.zone)?;
        let after = swap.ownership()?;
        let mut conversation = self.conversation();
        let before = match &swap.observed {
            Some(observed) if observed.epoch() == swap.epoch_from => Some(observed.clone()),
            Some(_) | None => {
                let current = self.read_in(&mut conversation, &swap.name).await?;
                let ownership = current.comparable()?.cloned();
                if ownership.as_ref() == Some(&after) {
                    return Ok(Outcome::Won);
                }
                if current.epoch() != swap.epoch_from || !current.has(&swap.old) {
                    return Ok(Outcome::Lost { current: Box::new(current) });
                }
                ownership
            }
        };
        let message = Change::of(&swap.name, &self.config.zone)?
            .only_if(&Before { ownership: before.as_ref(), addresses: &swap.old })
            .own(&after)
            .point(&swap.old, &swap.new, |_| swap.ttl_s)
            .into_message();
        let update = Update { name: &swap.name, before: before.as_ref(), after: &after, message };
        let outcome = self.settle(&mut conversation, &update).await;
        info!(name = %swap.name, txn = %swap.txn, epoch = %swap.epoch_to, won = matches!(outcome, Ok(Outcome::Won)), "Swap ended");
        outcome
    }

    /// Takes back a swap that was won: `new` becomes `old` again, if nobody has swapped since.
    ///
    /// The time to live stays the swap's; call [`Updater::restore_ttl`] next. `Won` also if the swap was never applied.
    pub async fn undo(&self, swap: &Swap) -> Result<Outcome, Error> {
        swap.check(&self.config.zone)?;
        let reversal = swap.inverse()?;
        let mut conversation = self.conversation();
        let current = self.read_in(&mut conversation, &swap.name).await?;
        if current.comparable()? != Some(&reversal.before) {
            let untouched = current.epoch() == swap.epoch_from && current.has(&swap.old);
            return Ok(if untouched { Outcome::Won } else { Outcome::Lost { current: Box::new(current) } });
        }
        let message = Change::of(&swap.name, &self.config.zone)?
            .only_if(&Before { ownership: Some(&reversal.before), addresses: &swap.new })
            .own(&reversal.after)
            .point(&swap.new, &swap.old, |_| swap.ttl_s)
            .into_message();
        let update =
            Update { name: &swap.name, before: Some(&reversal.before), after: &reversal.after, message };
        self.settle(&mut conversation, &update).await
    }

    /// Proves that a swap of `name` to addresses like `new` would work: reachable, key known and permitted for each
    /// record type, clocks in agreement, a shape that can be swapped. Changes nothing, not even the zone's serial.
    ///
    /// The proof is an UPDATE whose prerequisites are the state just read and whose records are that state again: what
    /// is there is added as it is, what is absent is deleted. BIND checks its update-policy for each of them; hickory
    /// authenticates. `new` may be empty: then only the families the name has now are rehearsed.
    pub async fn preflight(&self, name: &DnsName, new: &[std::net::IpAddr]) -> Result<Preflight, Error> {
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
                Answer::NotAsExpected => {
                    let again = self.read_in(&mut conversation, name).await?;
                    if again.has(&records.addresses) && again.register == records.register {
                        return Err(Error::Shape { name: name.clone(), shape: Shape::Wildcard });
                    }
                }
                Answer::Failed(rcode) => return Err(self.refused(name, rcode)),
            }
        }
        Err(Error::Config(format!("{name} changes faster than it can be looked at; who else updates it?")))
    }

    /// Lowers the time to live of a name's addresses before a move, if it is higher, conditional on the addresses and
    /// the ownership record as they are. Wait for `from_s` afterwards, until older answers have expired.
    pub async fn lower_ttl(&self, name: &DnsName, ttl_s: u32) -> Result<TtlOutcome, Error> {
        self.set_ttl(name, ttl_s, |now_s| now_s > ttl_s).await
    }

    /// Sets the time to live of a name's addresses back, conditional on the addresses and the ownership record.
    pub async fn restore_ttl(&self, name: &DnsName, ttl_s: u32) -> Result<TtlOutcome, Error> {
        self.set_ttl(name, ttl_s, |now_s| now_s != ttl_s).await
    }

    /// Changes an address's reverse name, conditional on the present one. Never critical: report an error, go on.
    ///
    /// The reverse zone is another one than the configured; the key must be allowed to change it at the same primary.
    pub async fn swap_ptr(&self, swap: &PtrSwap) -> Result<PtrOutcome, Error> {
        check_ttl(swap.ttl_s)?;
        let name = DnsName::reverse(swap.address);
        check_in_zone(&name, &swap.zone)?;
        let reply = self.tell(&mut self.conversation(), &ptr_message(swap)).await?;
        match Answer::of(&reply) {
            Answer::Applied => Ok(PtrOutcome::Done),
            Answer::NotAsExpected => Ok(PtrOutcome::Lost),
            Answer::Failed(rcode) => Err(self.refused_in(&swap.zone, &name, rcode)),
        }
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
        let message = Change::of(name, &self.config.zone)?
            .only_if(&Before { ownership, addresses: &current.addresses })
            .point(&current.addresses, &current.addresses, |_| ttl_s)
            .into_message();
        // Repeating it is harmless: it sets the same addresses to the same time to live.
        let reply = self.tell(&mut conversation, &message).await?;
        match Answer::of(&reply) {
            Answer::Applied => Ok(TtlOutcome::Changed { from_s, to_s: ttl_s }),
            Answer::NotAsExpected => {
                let current = self.read_in(&mut conversation, name).await?;
                Ok(TtlOutcome::Lost { current: Box::new(current) })
            }
            Answer::Failed(rcode) => Err(self.refused(name, rcode)),
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

    pub(crate) fn refused(&self, name: &DnsName, rcode: ResponseCode) -> Error {
        self.refused_in(&self.config.zone, name, rcode)
    }

    /// A signed error reply: the key is right.
    fn refused_in(&self, zone: &DnsName, name: &DnsName, rcode: ResponseCode) -> Error {
        let server = self.primary;
        if rcode == ResponseCode::Refused {
            return Error::KeyOrPolicy { server, rcode, tsig: None, authenticated: true };
        }
        if rcode == ResponseCode::NotAuth || rcode == ResponseCode::NotZone {
            let reason = format!("it says {rcode}");
            return Error::NotZone { server, zone: zone.clone(), name: name.clone(), reason };
        }
        Error::Server { server, rcode }
    }
}
