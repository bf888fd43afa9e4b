//! How one update comes to its outcome although answers get lost: repeating what may be repeated, reading back the rest.
//!
//! ```text
//!             +--------- sent, no answer, register unchanged ----------+
//!             v                                                        |
//! read --> update --NOERROR, signed------------------------> Won       |
//!   |         |--prerequisite failed, signed--> read back --own txn--> Won
//!   |         |--no answer / denied unsigned--> read back --own txn--> Won
//!   |         |                                    |--another txn----> Lost
//!   |         |--denied, signed--> error           |--no answer------> OutcomeUnknown
//!   +--not as expected--> Lost
//! ```
//!
//! Deliberately nothing about what the update says: see `change`.

use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use rand::Rng;
use tracing::{debug, warn};

use crate::error::{Error, Failure};
use crate::exchange::Conversation;
use crate::name::DnsName;
use crate::ownership::Ownership;
use crate::records::{Records, Register};
use crate::signing::Reply;
use crate::updater::{Outcome, Updater};

/// An update on its way: what it expects and what it makes of the register.
pub(crate) struct Update<'a> {
    pub(crate) name: &'a DnsName,
    pub(crate) before: Option<&'a Ownership>,
    pub(crate) after: &'a Ownership,
    pub(crate) proof: Proof,
    pub(crate) message: Message,
}

/// What in the register says that an update was applied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Its claim, touched since or not.
    Claim,
    /// Its very value.
    Value,
}

impl Update<'_> {
    /// A register with our own value says that we won, whatever the answer was.
    fn judge(&self, current: Records, rcode: Option<ResponseCode>) -> Outcome {
        let ours = |found: &Ownership| match self.proof {
            Proof::Claim => found.is_claim_of(self.after),
            Proof::Value => found == self.after,
        };
        if current.ownership().is_some_and(ours) {
            return Outcome::Won;
        }
        Outcome::Lost { current: Box::new(current), rcode }
    }

    /// Whether the update may still be applied: the register is as it expects.
    fn still_open(&self, current: &Records) -> bool {
        match &current.register {
            Register::Held(ownership) => Some(ownership) == self.before,
            Register::Absent => self.before.is_none(),
            Register::Foreign(_) => false,
        }
    }
}

impl Updater {
    /// Sends an update until its outcome is known, or cannot be.
    pub(crate) async fn settle(
        &self,
        conversation: &mut Conversation<'_>,
        update: &Update<'_>,
    ) -> Result<Outcome, Error> {
        // An earlier attempt may have been applied, or may still arrive.
        let mut in_doubt = false;
        let mut attempt = 0;
        loop {
            let failure = match self.once(conversation, &update.message).await? {
                Ok(reply) => match Answer::of(&reply) {
                    Answer::Applied => return Ok(Outcome::Won),
                    Answer::NotAsExpected(rcode) => {
                        let current = self.read_in(conversation, update.name).await;
                        return current
                            .map(|now| update.judge(now, Some(rcode)))
                            .map_err(|error| self.unknown(update, &error));
                    }
                    // SERVFAIL alone may come after the zone was changed.
                    Answer::Failed(rcode @ ResponseCode::ServFail) => Failure::Denied { rcode, tsig: None },
                    Answer::Failed(rcode) => {
                        return Err(self.conclude(update, self.refused(update.name, rcode), in_doubt));
                    }
                },
                Err(failure) => failure,
            };
            warn!(name = %update.name, server = %self.primary, attempt, ?failure, "No trustworthy answer to an update");
            if let Some(settled) = self.read_back(conversation, update, &failure, in_doubt).await {
                return settled;
            }
            in_doubt |= failure.may_have_acted() && !matches!(failure, Failure::Denied { .. });
            if attempt >= self.config.retries || !failure.is_transient() {
                let error = failure.into_error(self.primary, &self.config);
                return Err(self.conclude(update, error, in_doubt));
            }
            self.pause(attempt).await;
            attempt += 1;
        }
    }

    /// Looks at the register after an update without a trustworthy answer. None: the update may be sent again.
    async fn read_back(
        &self,
        conversation: &mut Conversation<'_>,
        update: &Update<'_>,
        failure: &Failure,
        in_doubt: bool,
    ) -> Option<Result<Outcome, Error>> {
        if !failure.may_have_acted() && !in_doubt {
            return None;
        }
        match self.read_in(conversation, update.name).await {
            Ok(current) if update.still_open(&current) => None,
            Ok(current) => Some(Ok(update.judge(current, None))),
            // Who does not know the key answers neither: what was denied was not done.
            Err(error @ Error::KeyOrPolicy { .. }) if is_denial(failure) => {
                Some(Err(self.conclude(update, error, in_doubt)))
            }
            Err(error) => Some(Err(self.unknown(update, &error))),
        }
    }

    fn conclude(&self, update: &Update<'_>, error: Error, in_doubt: bool) -> Error {
        if in_doubt { self.unknown(update, &error) } else { error }
    }

    /// Sends one update whose repetition is harmless.
    pub(crate) async fn tell(
        &self,
        conversation: &mut Conversation<'_>,
        message: &Message,
    ) -> Result<Reply, Error> {
        let mut replies = self.persist(conversation, std::slice::from_ref(message), true).await?;
        replies.pop().ok_or(Error::Protocol { server: self.primary, reason: "an answer is missing" })
    }

    /// Repeats an exchange that may be repeated.
    pub(crate) async fn persist(
        &self,
        conversation: &mut Conversation<'_>,
        messages: &[Message],
        sign: bool,
    ) -> Result<Vec<Reply>, Error> {
        let mut attempt = 0;
        loop {
            let sealed: Result<Vec<_>, _> =
                messages.iter().map(|message| self.seal.seal(message.clone(), sign)).collect();
            let failure = match conversation.ask(&sealed?).await {
                Ok(replies) => return Ok(replies),
                Err(failure) => failure,
            };
            debug!(server = %conversation.server, attempt, ?failure, "Exchange failed");
            if attempt >= self.config.retries || !failure.is_transient() {
                return Err(failure.into_error(conversation.server, &self.config));
            }
            self.pause(attempt).await;
            attempt += 1;
        }
    }

    async fn once(
        &self,
        conversation: &mut Conversation<'_>,
        message: &Message,
    ) -> Result<Result<Reply, Failure>, Error> {
        let sealed = [self.seal.seal(message.clone(), true)?];
        let missing = Failure::Suspicious("an answer is missing");
        Ok(conversation.ask(&sealed).await.and_then(|mut replies| replies.pop().ok_or(missing)))
    }

    /// 0.2 s, doubling, at most 2 s, plus or minus a fifth so that many do not come back at once.
    async fn pause(&self, attempt: u32) {
        let base_ms = 200_u64.saturating_mul(1 << attempt.min(4)).min(2_000);
        let pause_ms = rand::rng().random_range(base_ms * 4 / 5..=base_ms * 6 / 5);
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
    }

    fn unknown(&self, update: &Update<'_>, error: &Error) -> Error {
        Error::OutcomeUnknown { server: self.primary, txn: update.after.txn(), detail: error.to_string() }
    }
}

/// What a signed reply says about an update.
pub(crate) enum Answer {
    Applied,
    /// A prerequisite does not hold (RFC 2136 section 3.2).
    NotAsExpected(ResponseCode),
    Failed(ResponseCode),
}

impl Answer {
    pub(crate) fn of(reply: &Reply) -> Self {
        let failed_prerequisites =
            [ResponseCode::NXRRSet, ResponseCode::YXRRSet, ResponseCode::NXDomain, ResponseCode::YXDomain];
        let rcode = reply.message.response_code;
        if rcode == ResponseCode::NoError {
            Self::Applied
        } else if failed_prerequisites.contains(&rcode) {
            Self::NotAsExpected(rcode)
        } else {
            Self::Failed(rcode)
        }
    }
}

fn is_denial(failure: &Failure) -> bool {
    matches!(failure, Failure::Denied { rcode: ResponseCode::Refused | ResponseCode::NotAuth, .. })
}
