//! Whether the world sees a change: every listed server, or every name server of the zone, is asked what it answers.
//!
//! The primary is read with the key; the others as any resolver asks them, unsigned, because that is what counts there
//! and because secondaries need not know the key. A server is current if its answer is the expected one and its serial
//! number is not older than the primary's: a name that has come back to its address looks right at a secondary that has
//! heard of nothing. Nothing is decided on these answers except what is shown.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_proto::rr::{RData, RecordType};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::change::{check_in_zone, query};
use crate::config::{MAX_SERVERS, Transport};
use crate::error::{Error, Shape};
use crate::name::DnsName;
use crate::records::{Published, Reading, Records, same};
use crate::updater::Updater;

/// Which servers are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scope {
    /// Those of the configuration.
    #[default]
    Listed,
    /// Those, and every name server the zone itself names (its NS records), at most [`MAX_SERVERS`] in all. Their
    /// addresses come from the primary, else from this machine's resolver.
    All,
}

/// What all servers said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// The name.
    pub name: DnsName,
    /// The addresses it should have.
    pub expected: Vec<IpAddr>,
    /// The primary's serial number of the zone, to which the others are compared; none as long as it did not answer.
    pub serial: Option<u32>,
    /// Every server asked, the primary first.
    pub servers: Vec<ServerView>,
    /// Name servers of the zone that could not be asked.
    pub unasked: Vec<Unasked>,
}

/// A name server of the zone that could not be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unasked {
    /// Its name.
    pub host: String,
    /// Why.
    pub reason: String,
}

/// What one server said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServerView {
    /// Its address.
    pub server: SocketAddr,
    /// Its name, if it is known by one.
    pub host: Option<String>,
    /// Its answer.
    pub state: ServerState,
}

/// A server's answer beside what is expected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum ServerState {
    /// It answers as expected.
    Current {
        /// Its serial number of the zone.
        serial: u32,
        /// The longest time to live of the addresses, in seconds.
        ttl_s: Option<u32>,
    },
    /// It answers something else, or from an older zone: a secondary that has not caught up, or another truth.
    Behind {
        /// Its serial number of the zone.
        serial: u32,
        /// What it answers.
        addresses: Vec<IpAddr>,
    },
    /// It could not be asked.
    Silent {
        /// Why.
        reason: String,
    },
}

impl Verification {
    /// Whether every server of the scope answers as expected.
    pub fn is_complete(&self) -> bool {
        self.behind().next().is_none() && self.unasked.is_empty()
    }

    /// The servers that do not answer as expected, or not at all.
    pub fn behind(&self) -> impl Iterator<Item = &ServerView> {
        self.servers.iter().filter(|view| !matches!(view.state, ServerState::Current { .. }))
    }
}

impl Updater {
    /// Asks every server of `scope` once, all at the same time.
    ///
    /// A server that does not answer is part of the result; only wrong arguments are errors, and with [`Scope::All`]
    /// a primary that cannot say who the name servers are.
    pub async fn verify(
        &self,
        name: &DnsName,
        expected: &[IpAddr],
        scope: Scope,
    ) -> Result<Verification, Error> {
        self.verify_from(name, expected, scope, None).await
    }

    /// The same beside a serial number of the primary's that was seen earlier: with this one it had the answer first, and
    /// other names may have changed since.
    pub async fn verify_since(
        &self,
        name: &DnsName,
        expected: &[IpAddr],
        scope: Scope,
        serial: u32,
    ) -> Result<Verification, Error> {
        self.verify_from(name, expected, scope, Some(serial)).await
    }

    /// Repeats [`Updater::verify`] until every server answers as expected or `patience` is over; the last view counts.
    ///
    /// A secondary with working NOTIFY catches up within 0.2 s; one without waits for the zone's refresh time.
    pub async fn verify_until(
        &self,
        name: &DnsName,
        expected: &[IpAddr],
        scope: Scope,
        patience: Duration,
    ) -> Result<Verification, Error> {
        let deadline = Instant::now() + patience;
        let mut pause = Duration::from_millis(50);
        // The serial number with which the primary had it first: other names may change while this waits.
        let mut serial = None;
        loop {
            let verification = self.verify_from(name, expected, scope, serial).await?;
            if let ServerState::Current { serial: now, ttl_s: _ } = verification.servers[0].state {
                serial = serial.or(Some(now));
            }
            if verification.is_complete() || Instant::now() + pause > deadline {
                return Ok(verification);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }

    /// One view of all, beside the primary's `serial` or, if none is given, the one it answers now.
    async fn verify_from(
        &self,
        name: &DnsName,
        expected: &[IpAddr],
        scope: Scope,
        serial: Option<u32>,
    ) -> Result<Verification, Error> {
        check_in_zone(name, &self.config.zone)?;
        let Audience { servers, unasked } = self.audience(scope).await?;
        let asked: Vec<_> = servers.iter().map(|(server, _)| *server).collect();
        let answers = self.ask_each(&asked, name, self.config.retries).await;
        let primary = answers.first().and_then(|answer| answer.as_ref().ok());
        let serial = serial.or(primary.map(|published| published.serial));
        let view = |((server, host), published): ((SocketAddr, Option<String>), Result<Published, Error>)| {
            ServerView { server, host, state: state_of(published, expected, serial) }
        };
        let servers = servers.into_iter().zip(answers).map(view).collect();
        Ok(Verification { name: name.clone(), expected: expected.to_vec(), serial, servers, unasked })
    }

    /// Refuses several primaries, as directory services and replicated databases have them: they cannot order two
    /// swaps. A listed server that does not answer is no reason.
    pub(crate) async fn check_single_primary(&self, records: &Records) -> Result<(), Error> {
        let others = &self.config.servers[1..];
        let answers = self.ask_each(others, &records.name, 0).await;
        let mut primaries: BTreeSet<_> =
            answers.into_iter().filter_map(Result::ok).map(|published| published.primary).collect();
        primaries.insert(records.primary.clone());
        if primaries.len() == 1 {
            return Ok(());
        }
        let primaries = primaries.iter().map(DnsName::to_string).collect::<Vec<_>>().join(", ");
        Err(Error::Shape { name: records.name.clone(), shape: Shape::SeveralPrimaries { primaries } })
    }

    /// Every server's answer, in the servers' order.
    async fn ask_each(
        &self,
        servers: &[SocketAddr],
        name: &DnsName,
        retries: u32,
    ) -> Vec<Result<Published, Error>> {
        let mut questions = JoinSet::new();
        for (at, server) in servers.iter().copied().enumerate() {
            let mut updater = self.clone();
            updater.config.retries = retries;
            let name = name.clone();
            questions.spawn(async move { (at, updater.published_by(server, &name).await) });
        }
        let mut answers = questions.join_all().await;
        answers.sort_unstable_by_key(|(at, _)| *at);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    async fn published_by(&self, server: SocketAddr, name: &DnsName) -> Result<Published, Error> {
        let reading = Reading { server, zone: &self.config.zone, name };
        let sign = server == self.primary && self.config.signed_reads;
        let mut conversation = self.conversation_with(server, Transport::Tcp);
        let replies = self.persist(&mut conversation, &reading.public_questions(), sign).await?;
        let [soa, a, aaaa] = replies.as_slice() else {
            return Err(Error::Protocol { server, reason: "an answer is missing" });
        };
        reading.published(&soa.message, &a.message, &aaaa.message)
    }

    async fn audience(&self, scope: Scope) -> Result<Audience, Error> {
        let listed = self.config.servers.iter().map(|server| (*server, None)).collect();
        let mut audience = Audience { servers: listed, unasked: Vec::new() };
        match scope {
            Scope::Listed => return Ok(audience),
            Scope::All => {}
        }
        for host in self.name_servers().await? {
            let found = self.addresses_of(&host).await;
            match found.as_deref() {
                Ok([]) => audience.skip(&host, "it has no address".to_owned()),
                Ok(addresses) => {
                    for address in addresses {
                        audience.add(&host, SocketAddr::new(*address, self.config.ns_port));
                    }
                }
                Err(reason) => audience.skip(&host, reason.clone()),
            }
        }
        Ok(audience)
    }

    async fn name_servers(&self) -> Result<Vec<DnsName>, Error> {
        let question = query(self.config.zone.as_name(), RecordType::NS);
        let replies = self.persist(&mut self.conversation(), &[question], self.config.signed_reads).await?;
        let records = replies.iter().flat_map(|reply| &reply.message.answers);
        let hosts = records.filter_map(|record| {
            let RData::NS(host) = &record.data else { return None };
            Some(DnsName::from_wire(&host.0))
        });
        Ok(hosts.collect())
    }

    /// The primary knows the hosts inside the zone; for others this machine's resolver is asked.
    async fn addresses_of(&self, host: &DnsName) -> Result<Vec<IpAddr>, String> {
        if host.is_in(&self.config.zone) {
            return self.read(host).await.map(|records| records.addresses).map_err(|error| error.to_string());
        }
        let found = tokio::net::lookup_host((host.to_string(), self.config.ns_port)).await;
        let distinct = |addresses: std::vec::IntoIter<SocketAddr>| {
            addresses.map(|address| address.ip()).collect::<BTreeSet<_>>().into_iter().collect()
        };
        found
            .map(|addresses| distinct(addresses.collect::<Vec<_>>().into_iter()))
            .map_err(|error| format!("this machine's resolver does not find its address: {error}"))
    }
}

/// Who is asked, with the names they are known by, and who cannot be.
struct Audience {
    servers: Vec<(SocketAddr, Option<String>)>,
    unasked: Vec<Unasked>,
}

impl Audience {
    fn add(&mut self, host: &DnsName, server: SocketAddr) {
        match self.servers.iter().position(|(known, _)| *known == server) {
            Some(at) => self.servers[at].1 = Some(host.to_string()),
            None if self.servers.len() < MAX_SERVERS => self.servers.push((server, Some(host.to_string()))),
            None => self.skip(host, format!("{server} would be one of more than {MAX_SERVERS} servers")),
        }
    }

    fn skip(&mut self, host: &DnsName, reason: String) {
        self.unasked.push(Unasked { host: host.to_string(), reason });
    }
}

fn state_of(published: Result<Published, Error>, expected: &[IpAddr], serial: Option<u32>) -> ServerState {
    let published = match published {
        Ok(published) => published,
        Err(error) => return ServerState::Silent { reason: error.to_string() },
    };
    let caught_up = serial.is_none_or(|serial| !is_older(published.serial, serial));
    if caught_up && same(&published.addresses, expected) {
        let ttl_s = published.a_ttl_s.max(published.aaaa_ttl_s);
        return ServerState::Current { serial: published.serial, ttl_s };
    }
    ServerState::Behind { serial: published.serial, addresses: published.addresses }
}

/// Serial numbers go round (RFC 1982 section 3.2).
fn is_older(serial: u32, than: u32) -> bool {
    than.wrapping_sub(serial).cast_signed() > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_go_round() {
        assert!(is_older(1, 2) && is_older(u32::MAX, 0) && is_older(u32::MAX - 5, 100));
        assert!(!is_older(2, 2) && !is_older(3, 2) && !is_older(0, u32::MAX));
    }
}
