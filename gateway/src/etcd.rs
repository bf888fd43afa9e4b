//! The etcd edge: one key per machine, as the register of an arbiter.
//!
//! ```text
//! PREFIX/NAME = "v=1 epoch=7 owner=site-a txn=00112233445566778899aabbccddeeff"
//! ```
//!
//! A question is one linearizable read and at most one transaction, which compares the value that was read and puts
//! another one. The value is the ownership record that dnsupdater keeps in the DNS; its random number makes every
//! value unique, so that a late transaction finds its comparison false for ever. What a value means for a hand-over
//! is the core's to decide, names are `dns`'s, and who asks how often is the stage machines' business.
//!
//! It speaks etcd's JSON gateway (`/v3/kv/range`, `/v3/kv/txn`; etcd 3.4 and later) and not gRPC: the gRPC clients
//! there are compile etcd's protocol when they are built, for which every build machine would need `protoc`, and bring
//! a second HTTP stack for two calls. No watches, leases, user names or retries: a lease must not start a machine.

mod member;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use dnsupdater::{InvalidOwnership, Ownership, Txn};

use longhaul_core::ids::{Epoch, VmName};
use longhaul_core::migration::arbiter::{Contest, Request, Said};

use self::member::{Member, Members};
use crate::config::{Endpoint, EtcdConfig};

/// A file that `[etcd]` names and that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {path}: {why}", path = path.display())]
pub struct UnusableFile {
    /// The configuration's key.
    pub key: &'static str,
    path: PathBuf,
    why: String,
}

/// Why the cluster decides nothing. A transaction may have been applied nevertheless.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// No TCP or TLS connection.
    #[error("Cannot reach etcd at {endpoint}; check etcd.endpoints, firewalls, and the certificates of both")]
    Unreachable {
        /// Which member.
        endpoint: Endpoint,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It did not answer in time.
    #[error("etcd at {endpoint} did not answer within {} ms; does its cluster have a leader?", after.as_millis())]
    Late {
        /// Which member.
        endpoint: Endpoint,
        /// `etcd.timeout_ms`.
        after: Duration,
    },
    /// The connection broke.
    #[error("etcd at {endpoint} broke off its answer")]
    Broken {
        /// Which member.
        endpoint: Endpoint,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It says no.
    #[error("etcd at {endpoint} refuses ({status}): {message}")]
    Refused {
        /// Which member.
        endpoint: Endpoint,
        /// HTTP status.
        status: u16,
        /// Its words.
        message: String,
    },
    /// What answers is no etcd, or one that this version does not know.
    #[error(
        "{endpoint} does not answer like etcd 3.4 or later; its JSON gateway must be on (--enable-grpc-gateway)"
    )]
    Form {
        /// Which member.
        endpoint: Endpoint,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The configuration names no member.
    #[error("No etcd is configured; set etcd.endpoints")]
    NoMember,
    /// A site whose name does not fit the register.
    #[error(transparent)]
    Owner(#[from] InvalidOwnership),
    /// Something else stands where the register would be.
    #[error(
        "etcd's key {key} holds something that is no ownership record: {found:?}; delete it if nothing needs it"
    )]
    NoRegister {
        /// The key.
        key: String,
        /// What stands there.
        found: String,
    },
    /// The register is not older than the move.
    #[error(
        "etcd's key {key} is in epoch {epoch} of site {owner}, the move would begin epoch {wanted}: make sure that no \
         other site runs the machine, then delete the key"
    )]
    Ahead {
        /// The key.
        key: String,
        /// The epoch in it.
        epoch: Epoch,
        /// The site in it.
        owner: String,
        /// The epoch of the move.
        wanted: Epoch,
    },
}

/// The registers of this site's machines.
#[derive(Debug)]
pub struct Registers {
    members: Members,
    prefix: String,
}

impl Registers {
    /// Reads the certificates; speaks to nobody yet.
    pub fn open(config: &EtcdConfig) -> Result<Self, UnusableFile> {
        Ok(Self { members: Members::new(config)?, prefix: config.prefix.clone() })
    }

    /// The key of a machine's register.
    pub fn key(&self, vm: &VmName) -> String {
        format!("{}/{vm}", self.prefix)
    }

    /// How long a member took for a linearizable read, its connection included.
    pub async fn round_trip(&self) -> Result<Duration, EtcdError> {
        let begun = Instant::now();
        self.members.read(&self.prefix).await?;
        Ok(begun.elapsed())
    }

    /// What the register of `vm` holds, read linearizably.
    pub async fn read(&self, vm: &VmName) -> Result<Option<Ownership>, EtcdError> {
        Ok(self.look(&self.key(vm)).await?.1)
    }

    /// Proves, changing nothing, that `vm` could be moved into epoch `wanted`: reachable, and its register is
    /// older. The epoch it holds; 0 for none.
    pub async fn check(&self, vm: &VmName, wanted: Epoch) -> Result<Epoch, EtcdError> {
        let held = self.read(vm).await?;
        let at = held.as_ref().map_or(Epoch(0), |held| Epoch(held.epoch().0));
        match held.filter(|_| at >= wanted) {
            None => Ok(at),
            Some(ahead) => Err(EtcdError::Ahead {
                key: self.key(vm),
                epoch: at,
                owner: ahead.owner().to_owned(),
                wanted,
            }),
        }
    }

    /// Asks the register of `vm`. `seen` is the highest epoch this site has seen in it. An error says nothing
    /// about whether a request was applied.
    pub async fn arbitrate(
        &self,
        vm: &VmName,
        contest: &Contest,
        request: Request,
        seen: Epoch,
    ) -> Result<Said, EtcdError> {
        let key = self.key(vm);
        let (member, found) = self.look(&key).await?;
        let said = says(contest, found.as_ref(), seen);
        let Some(winner) = contest.winner(request, said.verdict) else { return Ok(said) };
        let wanted = Ownership::new(dnsupdater::Epoch(contest.epoch.0), winner.as_str(), Txn::random())?;
        let seen = seen.max(said.epoch);
        let after = match swap(member, &key, found.as_ref(), &wanted).await {
            Ok(after) => after,
            Err(lost) => self.read_back(&key, found, &wanted, lost).await?,
        };
        Ok(says(contest, after.as_ref(), seen))
    }

    async fn look(&self, key: &str) -> Result<(Member, Option<Ownership>), EtcdError> {
        let (member, value) = self.members.read(key).await?;
        Ok((member, parse(key, value)?))
    }

    /// What stands there after a transaction whose answer was `lost`. As long as it is what `found` was, the
    /// transaction may still be applied.
    async fn read_back(
        &self,
        key: &str,
        found: Option<Ownership>,
        wanted: &Ownership,
        lost: EtcdError,
    ) -> Result<Option<Ownership>, EtcdError> {
        tracing::debug!(key, error = %lost, "transaction was not answered; reading it back");
        let Ok((_, after)) = self.look(key).await else { return Err(lost) };
        if after == found {
            return Err(lost);
        }
        let ours = after.as_ref().is_some_and(|after| after.txn() == wanted.txn());
        tracing::info!(key, ours, "the answer of a transaction was lost and read back");
        Ok(after)
    }
}

/// Puts `wanted` if `found` still stands there; what stands there afterwards.
async fn swap(
    member: Member,
    key: &str,
    found: Option<&Ownership>,
    wanted: &Ownership,
) -> Result<Option<Ownership>, EtcdError> {
    let old = found.map(Ownership::to_string);
    match member.swap(key, old.as_deref(), &wanted.to_string()).await? {
        member::Swapped::Won => Ok(Some(wanted.clone())),
        member::Swapped::Lost(current) => parse(key, current),
    }
}

fn says(contest: &Contest, held: Option<&Ownership>, seen: Epoch) -> Said {
    contest.said(held.map(|held| (Epoch(held.epoch().0), held.owner())), seen)
}

fn parse(key: &str, value: Option<String>) -> Result<Option<Ownership>, EtcdError> {
    let Some(found) = value else { return Ok(None) };
    match found.parse() {
        Ok(held) => Ok(Some(held)),
        Err(InvalidOwnership { .. }) => {
            let found = found.chars().take(255).collect();
            Err(EtcdError::NoRegister { key: key.to_owned(), found })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_an_ownership_record_or_decides_nothing() {
        let text = "v=1 epoch=7 owner=a txn=00112233445566778899aabbccddeeff";
        let held = parse("vm/web1", Some(text.into())).unwrap().unwrap();
        assert_eq!((held.epoch().0, held.owner(), held.to_string().as_str()), (7, "a", text));
        assert_eq!(parse("vm/web1", None).unwrap(), None);
        for foreign in ["", "7", "v=1 epoch=7 owner=a"] {
            let message = parse("vm/web1", Some(foreign.into())).unwrap_err().to_string();
            assert!(message.contains("vm/web1") && message.contains("delete it"), "{message}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named_with_its_key() {
        let text = "endpoints = [\"https://192.0.2.1\"]\nca_file = \"/nowhere/ca.pem\"";
        let unusable = Registers::open(&toml::from_str(text).unwrap()).unwrap_err();
        assert_eq!(unusable.key, "etcd.ca_file");
        assert!(unusable.to_string().contains("/nowhere/ca.pem"), "{unusable}");
    }
}
