//! The names edge: what a migration asks of the name server, in the migration's words.
//!
//! The work is dnsupdater's; this maps machines to names and epochs, and its errors to what an
//! operator is told. It keeps no state: what is owed to the name server is the anchor's to remember.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use dnsupdater::{
    DnsName, Key, Outcome, Ownership, Records, Register, Scope, ServerState, ServerView, Swap, TtlOutcome,
    Unasked, Updater, UpdaterConfig, Verification,
};

use longhaul_core::ids::{Epoch, SiteName};
use longhaul_core::migration::arbiter::{Contest, Request, Said};
use longhaul_core::migration::spread::NameAnswer;

use crate::config::DnsConfig;

/// Why a name cannot follow.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    /// The configuration's key or zone is wrong.
    #[error("The [dns] table cannot be used: {0}")]
    Config(String),
    /// The definition's name is no DNS name.
    #[error("{0:?} is not a name in this zone")]
    Name(String),
    /// The server or the key.
    #[error(transparent)]
    Update(#[from] dnsupdater::Error),
    /// Somebody else changed the name meanwhile.
    #[error("Name {name} was changed by somebody else: it now says {current}")]
    Lost {
        /// The name.
        name: String,
        /// What it says.
        current: String,
    },
    /// The name's ownership record is not older than the move.
    #[error(
        "Name {name} is in epoch {epoch} of site {owner}, the move would begin epoch {wanted}: make sure that no other \
         site runs the machine, then delete the TXT record _longhaul.{name}; --without-dns leaves the name alone"
    )]
    Ahead {
        /// The name.
        name: String,
        /// The epoch in its ownership record.
        epoch: u64,
        /// The site in it.
        owner: String,
        /// The epoch of the move.
        wanted: Epoch,
    },
    /// Something else stands where the register would be.
    #[error(
        "_longhaul.{name} holds something that is no ownership record: {found}; delete it if nothing needs it"
    )]
    NoRegister {
        /// The name.
        name: String,
        /// What stands there.
        found: String,
    },
    /// The addresses do not match the machine.
    #[error("Name {name} does not point at the machine: it says {current}, expected {expected}")]
    Elsewhere {
        /// The name.
        name: String,
        /// What it says.
        current: String,
        /// The machine's home addresses.
        expected: String,
    },
}

/// How a name stood when it was looked at.
#[derive(Debug, Clone)]
pub struct Standing {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Their TTL in seconds.
    pub ttl_s: u32,
    register: Option<Ownership>,
}

/// A move of one name.
#[derive(Debug, Clone)]
pub struct NameMove<'a> {
    /// The name.
    pub name: &'a str,
    /// Addresses that the machine had, and what clients are to find for each now: itself, if nothing else leads to it.
    /// Those that the name lists are replaced, and what else it lists stays.
    pub addresses: &'a [(IpAddr, IpAddr)],
    /// The TTL of the new records.
    pub ttl_s: u32,
    /// The epoch that began.
    pub epoch: Epoch,
    /// The machine's new owner.
    pub owner: &'a SiteName,
}

/// What the update that wins a contest changes besides the ownership record.
#[derive(Debug, Clone)]
pub struct Prize {
    /// The name.
    pub name: String,
    /// Each home address that has a stand-in at the destination, and the stand-in.
    pub addresses: Vec<(IpAddr, IpAddr)>,
}

/// One look at every name server of the zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpreadLook {
    /// The primary's serial number beside which the others were seen.
    pub serial: u32,
    /// What each said, the primary first; those that could not even be found are silent.
    pub answers: Vec<(String, NameAnswer)>,
}

/// The name server of this site's machines.
pub struct Names {
    updater: Updater,
    move_ttl_s: u32,
}

impl std::fmt::Debug for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Names").field("zone", &self.updater.config().zone).finish_non_exhaustive()
    }
}

impl Names {
    /// Reads the key; speaks to nobody yet.
    pub fn open(config: &DnsConfig) -> Result<Self, NamesError> {
        let zone = config.zone.parse().map_err(|_| NamesError::Config(format!("zone {:?}", config.zone)))?;
        let key = Key::from_file(&config.key_file)?;
        let updater = UpdaterConfig {
            timeout: Duration::from_millis(config.timeout_ms),
            ..UpdaterConfig::new(config.servers.clone(), zone, key)
        };
        Ok(Self { updater: Updater::new(updater)?, move_ttl_s: config.move_ttl_s })
    }

    /// Names at servers of a test.
    #[cfg(test)]
    pub(crate) fn at(updater: UpdaterConfig, move_ttl_s: u32) -> Self {
        Self { updater: Updater::new(updater).expect("a valid configuration"), move_ttl_s }
    }

    /// The TTL during a move.
    pub fn move_ttl_s(&self) -> u32 {
        self.move_ttl_s
    }

    /// Proves, changing nothing, that `name` could be moved into epoch `wanted`: reachable, allowed, clocks
    /// agree, it points at `home`, and its ownership record is older.
    pub async fn check(&self, name: &str, home: &[IpAddr], wanted: Epoch) -> Result<Standing, NamesError> {
        let found = self.updater.preflight(&parse(name)?, home).await?.records;
        let standing = Standing {
            ttl_s: found.ttl_s().unwrap_or(self.move_ttl_s),
            register: found.ownership().cloned(),
            addresses: found.addresses,
        };
        // A name need not list every address of a machine, but nobody else's either.
        let all_ours = standing.addresses.iter().all(|address| home.contains(address));
        if standing.addresses.is_empty() || !all_ours {
            return Err(NamesError::Elsewhere {
                name: name.to_owned(),
                current: list(&standing.addresses),
                expected: list(home),
            });
        }
        expect_older(name, standing.register.as_ref(), wanted)?;
        Ok(standing)
    }

    /// Lowers the name's TTL for the move.
    pub async fn lower_ttl(&self, name: &str) -> Result<(), NamesError> {
        if self.ttl_s(name).await? > self.move_ttl_s {
            self.set_ttl(name, self.move_ttl_s).await?;
        }
        Ok(())
    }

    /// The name's TTL in seconds; that of a move for a name without an address.
    pub async fn ttl_s(&self, name: &str) -> Result<u32, NamesError> {
        Ok(self.updater.read(&parse(name)?).await?.ttl_s().unwrap_or(self.move_ttl_s))
    }

    /// Sets the name's TTL, whatever it points at.
    pub async fn set_ttl(&self, name: &str, ttl_s: u32) -> Result<(), NamesError> {
        match self.updater.restore_ttl(&parse(name)?, ttl_s).await? {
            TtlOutcome::Changed { .. } | TtlOutcome::Already { .. } => Ok(()),
            TtlOutcome::Lost { current, .. } => {
                Err(NamesError::Lost { name: name.to_owned(), current: list(&current.addresses) })
            }
        }
    }

    /// Moves the name in one atomic update, and says what it lists then. Asking again for the same move is not an error:
    /// a name that already says what it should is done.
    pub async fn swap(&self, wanted: &NameMove<'_>) -> Result<Vec<IpAddr>, NamesError> {
        let name = parse(wanted.name)?;
        let found = self.updater.read(&name).await?;
        let register = found.ownership().cloned();
        let new = wanted.instead_of(&found.addresses);
        let mut ttl_s = wanted.ttl_s;
        if found.addresses.iter().all(|address| new.contains(address)) {
            let at = register.as_ref().map_or(0, |register| register.epoch().0);
            // A name that did not follow the last move is right already when the machine returns.
            let right = wanted.addresses.iter().any(|(_, new)| found.addresses.contains(new));
            if at == wanted.epoch.0 || (right && at > wanted.epoch.0) {
                return Ok(found.addresses);
            }
            if !right {
                return Err(lost(wanted.name, &found.addresses));
            }
            // That move's update may still be under way, and would be applied to a record that stands as it found it.
            ttl_s = found.ttl_s().unwrap_or(ttl_s);
        }
        expect_older(wanted.name, register.as_ref(), wanted.epoch)?;
        let from = found.epoch();
        let new: Vec<IpAddr> = new.into_iter().collect();
        let swap = Swap::new(name, found.addresses, new.clone(), ttl_s, wanted.owner.as_str())
            .epochs(from, dnsupdater::Epoch(wanted.epoch.0))
            .observed(register);
        match self.updater.swap(&swap).await? {
            Outcome::Won => Ok(new),
            Outcome::Lost { current, .. } => Err(lost(wanted.name, &current.addresses)),
        }
    }
}

impl NameMove<'_> {
    fn instead_of(&self, listed: &[IpAddr]) -> BTreeSet<IpAddr> {
        let place = |address: &IpAddr| {
            let pair = self.addresses.iter().find(|(old, _)| old == address);
            pair.map_or(*address, |(_, new)| *new)
        };
        listed.iter().map(place).collect()
    }
}

impl Names {
    /// Asks every name server of the zone whether it says of `name` what the primary says, from a zone that is not older
    /// than `since`, the serial number of the first look. Where nobody but the primary is known it alone counts.
    pub async fn spread(&self, name: &str, since: Option<u32>) -> Result<SpreadLook, NamesError> {
        let name = parse(name)?;
        let found = self.updater.read(&name).await?;
        let serial = since.unwrap_or(found.serial);
        let look = async |scope| self.updater.verify_since(&name, &found.addresses, scope, serial).await;
        let answers = match look(Scope::All).await {
            Ok(view) => answers(&view),
            Err(error) => {
                tracing::debug!(%error, "the primary does not say which name servers the zone has");
                let unknown = ("the zone's own name servers".to_owned(), NameAnswer::Silent);
                answers(&look(Scope::Listed).await?).into_iter().chain([unknown]).collect()
            }
        };
        Ok(SpreadLook { serial, answers })
    }

    /// Asks the register of a contest, as one compare-and-swap that moves the prize's addresses with it. `seen` is
    /// the highest epoch this site has seen there. An error says nothing about whether a request was applied.
    pub async fn arbitrate(
        &self,
        prize: &Prize,
        contest: &Contest,
        request: Request,
        seen: Epoch,
    ) -> Result<Said, NamesError> {
        let name = parse(&prize.name)?;
        let found = self.updater.read(&name).await?;
        let said = prize.reads(contest, &found, seen)?;
        let Some(winner) = contest.winner(request, said.verdict) else { return Ok(said) };
        let swap = prize.swap(name, contest, &found, winner, self.move_ttl_s);
        let seen = seen.max(said.epoch);
        match self.updater.swap(&swap).await? {
            Outcome::Won => Ok(contest.said(Some((contest.epoch, winner.as_str())), seen)),
            Outcome::Lost { current, .. } => prize.reads(contest, &current, seen),
        }
    }
}

impl Prize {
    fn reads(&self, contest: &Contest, found: &Records, seen: Epoch) -> Result<Said, NamesError> {
        if let Register::Foreign(text) = &found.register {
            return Err(NamesError::NoRegister { name: self.name.clone(), found: text.clone() });
        }
        let held = found.ownership().map(|register| (Epoch(register.epoch().0), register.owner()));
        Ok(contest.said(held, seen))
    }

    /// The change of what was found that names `winner`.
    fn swap(&self, name: DnsName, contest: &Contest, found: &Records, winner: &SiteName, ttl_s: u32) -> Swap {
        let goes = *winner == contest.destination;
        // What was lowered for the move is restored by its rollback, before this or after it.
        let ttl_s = if goes { ttl_s } else { found.ttl_s().unwrap_or(ttl_s) };
        let place = |address: &IpAddr| {
            let pair = self.addresses.iter().find(|(home, care_of)| home == address || care_of == address);
            pair.map_or(*address, |(home, care_of)| if goes { *care_of } else { *home })
        };
        let new = found.addresses.iter().map(place).collect();
        Swap::new(name, found.addresses.clone(), new, ttl_s, winner.as_str())
            .epochs(found.epoch(), dnsupdater::Epoch(contest.epoch.0))
            .observed(found.ownership().cloned())
    }
}

impl Standing {
    /// The epoch in the name's ownership record; 0 without one.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.register.as_ref().map_or(0, |register| register.epoch().0))
    }
}

fn answers(view: &Verification) -> Vec<(String, NameAnswer)> {
    let answer = |server: &ServerView| {
        let name = server
            .host
            .as_ref()
            .map_or(server.server.to_string(), |host| format!("{host} ({})", server.server));
        let answer = match server.state {
            ServerState::Current { .. } => NameAnswer::Current,
            ServerState::Behind { .. } => NameAnswer::Behind,
            ServerState::Silent { .. } => NameAnswer::Silent,
        };
        (name, answer)
    };
    let alone = view.servers.len() == 1;
    let unfound = |unasked: &Unasked| (unasked.host.clone(), NameAnswer::Silent);
    let unfound = view.unasked.iter().filter(|_| !alone).map(unfound);
    view.servers.iter().map(answer).chain(unfound).collect()
}

/// A register that is not older would refuse the swap for ever.
fn expect_older(name: &str, register: Option<&Ownership>, wanted: Epoch) -> Result<(), NamesError> {
    match register.filter(|register| register.epoch().0 >= wanted.0) {
        None => Ok(()),
        Some(ahead) => Err(NamesError::Ahead {
            name: name.to_owned(),
            epoch: ahead.epoch().0,
            owner: ahead.owner().to_owned(),
            wanted,
        }),
    }
}

fn lost(name: &str, current: &[IpAddr]) -> NamesError {
    NamesError::Lost { name: name.to_owned(), current: list(current) }
}

fn parse(name: &str) -> Result<DnsName, NamesError> {
    name.parse().map_err(|_| NamesError::Name(name.to_owned()))
}

fn list(addresses: &[IpAddr]) -> String {
    let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    if texts.is_empty() { "nothing".to_owned() } else { texts.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_that_is_not_older_refuses_the_move_and_names_the_remedy() {
        let register: Ownership =
            "v=1 epoch=3 owner=b txn=00112233445566778899aabbccddeeff".parse().expect("canonical");
        let tried = |wanted| expect_older("web1.vm.example", Some(&register), Epoch(wanted));
        for wanted in [1, 3] {
            let text = tried(wanted).expect_err("the swap would be refused for ever").to_string();
            for part in ["epoch 3 of site b", "_longhaul.web1.vm.example", "--without-dns"] {
                assert!(text.contains(part), "{text}");
            }
        }
        assert!(tried(4).is_ok());
        assert!(expect_older("web1.vm.example", None, Epoch(1)).is_ok());
    }

    fn contest() -> Contest {
        let (source, destination) = ("a".parse().unwrap(), "b".parse().unwrap());
        Contest { epoch: Epoch(5), source, destination }
    }

    fn prize() -> Prize {
        let addresses = vec![(HOME.parse().unwrap(), CARE_OF.parse().unwrap())];
        Prize { name: "web1.vm.example".into(), addresses }
    }

    const HOME: &str = "198.51.100.10";
    const CARE_OF: &str = "203.0.113.10";

    fn found(register: Register, address: &str) -> Records {
        Records {
            name: "web1.vm.example".parse().unwrap(),
            addresses: vec![address.parse().unwrap()],
            a_ttl_s: Some(2),
            aaaa_ttl_s: None,
            cname: None,
            register,
            serial: 1,
            primary: "ns.vm.example".parse().unwrap(),
            round_trip: Duration::ZERO,
            clock_ahead_s: None,
        }
    }

    fn held(epoch: u64, owner: &str) -> Register {
        let text = format!("v=1 epoch={epoch} owner={owner} txn=00112233445566778899aabbccddeeff");
        Register::Held(text.parse().unwrap())
    }

    /// Owner and address that a request makes of what stands there.
    fn made(request: Request, register: Register, address: &str) -> Option<(String, String)> {
        let (contest, prize, found) = (contest(), prize(), found(register, address));
        let verdict = prize.reads(&contest, &found, Epoch(4)).unwrap().verdict;
        let winner = contest.winner(request, verdict)?;
        let swap = prize.swap(found.name.clone(), &contest, &found, winner, 2);
        assert_eq!((swap.epoch_to.0, &swap.old), (5, &found.addresses));
        Some((swap.owner, swap.new[0].to_string()))
    }

    #[test]
    fn an_open_register_is_won_once_with_the_address_and_only_a_way_back_changes_it_again() {
        let won = |owner: &str, address: &str| Some((owner.to_owned(), address.to_owned()));
        assert_eq!(made(Request::ForDestination, held(4, "a"), HOME), won("b", CARE_OF));
        assert_eq!(made(Request::ForSource, held(4, "a"), HOME), won("a", HOME));
        assert_eq!(made(Request::ForSource, held(5, "b"), CARE_OF), None);
        assert_eq!(made(Request::ForDestination, held(5, "a"), HOME), None);
        assert_eq!(made(Request::BackToSource, held(5, "b"), CARE_OF), won("a", HOME));
        assert_eq!(made(Request::BackToSource, held(5, "a"), HOME), None);
        assert_eq!(made(Request::Read, held(4, "a"), HOME), None);
    }

    #[test]
    fn a_register_put_back_to_an_older_state_is_not_touched_and_a_foreign_one_is_no_register() {
        for request in [Request::ForDestination, Request::ForSource, Request::BackToSource] {
            assert_eq!(made(request, held(3, "a"), HOME), None, "{request:?}");
            assert_eq!(made(request, Register::Absent, HOME), None, "{request:?}");
        }
        let foreign = found(Register::Foreign("v=spf1".into()), HOME);
        let read = prize().reads(&contest(), &foreign, Epoch(0));
        assert!(read.unwrap_err().to_string().contains("v=spf1"));
    }
}
