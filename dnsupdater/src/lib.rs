//! Moves a DNS name to another address, atomically and at most once.
//!
//! A name that follows a machine is changed by an RFC 2136 UPDATE, signed with TSIG (RFC 8945). Every update states
//! what it expects and fails as a whole if the name is otherwise: two sites that change a name at the same time
//! cannot both succeed, and a message replayed later does nothing (name servers do accept replays within the TSIG
//! window). The exact messages are documented in [`change`], the record that makes them unique in [`ownership`].
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use dnsupdater::{Epoch, Key, Outcome, Scope, Swap, Updater, UpdaterConfig};
//!
//! let key = Key::from_file("/etc/longhaul/dns.key".as_ref())?;
//! let updater = Updater::new(UpdaterConfig::new(vec!["192.0.2.53:53".parse()?], "vm.example".parse()?, key))?;
//! let name = "app.vm.example".parse()?;
//! let new = vec!["203.0.113.10".parse()?];
//!
//! let found = updater.preflight(&name, &new).await?.records;
//! let swap = Swap::new(name.clone(), found.addresses.clone(), new.clone(), 30, "site-b")
//!     .epochs(found.epoch(), Epoch(found.epoch().0 + 1))
//!     .observed(found.ownership().cloned());
//! match updater.swap(&swap).await? {
//!     Outcome::Won => println!("{}", updater.verify(&name, &new, Scope::Listed).await?.is_complete()),
//!     Outcome::Lost { current, .. } => println!("somebody else was first: {current:?}"),
//! }
//! # Ok(()) }
//! ```
//!
//! **What is trusted.** Of the primary, answers signed with the key over this very request. An unsigned error may
//! stop an operation but never counts as proof: a swap is then read back. Secondaries are read unsigned, for display.
//! hickory-dns 0.26 as shipped signs answers to updates only, not to queries; for it set
//! [`UpdaterConfig::signed_reads`] to false. The module `test_server` (feature `test-server`) signs both.
//!
//! **What it needs of the server.** A single primary that applies updates one after the other and keeps them over a
//! crash (BIND, Knot with its defaults, PowerDNS with `pragma-synchronous=2`). The stock hickory server compares
//! prerequisites record by record and does not serialise updates, so it can confirm a swap but not arbitrate a race.
//! YADIFA 2.6 misjudges several prerequisites together; [`Updater::preflight`] finds that out.

pub mod change;
mod config;
mod error;
mod exchange;
mod key;
mod name;
pub mod ownership;
mod preflight;
mod records;
mod reverse;
mod settle;
mod signing;
#[cfg(feature = "test-server")]
pub mod test_server;
mod updater;
mod verify;

pub use change::{MAX_ADDRESSES, MAX_TTL_S, Swap};
pub use config::{MAX_SERVERS, Transport, UpdaterConfig};
pub use error::{Error, Shape, TsigFault};
pub use hickory_proto::op::ResponseCode;
pub use key::{Algorithm, Key, MIN_SECRET_BYTES};
pub use name::{DnsName, InvalidDnsName};
pub use ownership::{Epoch, InvalidOwnership, Ownership, Txn};
pub use preflight::Preflight;
pub use records::{Records, Register};
pub use reverse::{PtrOutcome, PtrRecords, PtrSwap};
pub use updater::{Outcome, TtlOutcome, Updater};
pub use verify::{Scope, ServerState, ServerView, Unasked, Verification};
