//! What can go wrong, sorted by whose fault it is and by what the operator can do.
//!
//! Losing a compare-and-swap is no error: see [`crate::Outcome::Lost`].

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hickory_proto::op::ResponseCode;

use crate::config::UpdaterConfig;
use crate::name::DnsName;
use crate::ownership::Txn;

/// Why an operation did not come to a result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration or an argument is wrong; nothing was sent.
    #[error("{0}")]
    Config(String),

    /// The server could not be reached or did not answer, and nothing was changed by this call.
    #[error("Name server {server} cannot be reached: check its address, port and firewall ({source})")]
    Unreachable {
        /// The server that was asked.
        server: SocketAddr,
        /// What the network said.
        #[source]
        source: io::Error,
    },

    /// The server does not take this key, or does not let it change this name.
    ///
    /// Servers differ: BIND, Knot and YADIFA say NOTAUTH with BADKEY or BADSIG, PowerDNS says REFUSED without any
    /// signature (also when the clocks differ), Knot says NOTAUTH BADKEY for a name outside the key's policy.
    #[error("Name server {server} refused key {key} ({}{}): {}", rcode_text(*rcode), tsig_text(tsig), refusal_advice(*rcode, *tsig, *authenticated))]
    KeyOrPolicy {
        /// The server that refused.
        server: SocketAddr,
        /// The key's name.
        key: DnsName,
        /// Its response code.
        rcode: ResponseCode,
        /// Its TSIG error, if it gave one.
        tsig: Option<TsigFault>,
        /// Whether the refusal itself was signed with the key: then the key is right and the policy is not.
        authenticated: bool,
    },

    /// Server and client do not agree on the time.
    #[error("Name server {server} does not accept the time of the message (BADTIME): {}; TSIG allows {fudge_s} s, set both clocks by NTP", difference_text(*here_s, *there_s))]
    Clock {
        /// The server that complained, or whose answer was too old or too new.
        server: SocketAddr,
        /// The time here, in seconds since 1970.
        here_s: u64,
        /// The time at the server, in seconds since 1970, if it said.
        there_s: Option<u64>,
        /// The difference that was allowed, in seconds.
        fudge_s: u16,
    },

    /// The name is not in the zone, or the server is not authoritative for the zone.
    #[error("Name server {server} cannot change {name} in zone {zone}: {reason}")]
    NotZone {
        /// The server that was asked.
        server: SocketAddr,
        /// The zone as configured.
        zone: DnsName,
        /// The name.
        name: DnsName,
        /// What was seen.
        reason: String,
    },

    /// The name is there, but not in a shape that can be swapped.
    #[error("{name} cannot be swapped: {shape}")]
    Shape {
        /// The name.
        name: DnsName,
        /// What is in the way.
        shape: Shape,
    },

    /// The server failed at its own work, or does not do dynamic updates.
    #[error("Name server {server} failed with {}: {}", rcode_text(*rcode), failure_advice(*rcode))]
    Server {
        /// The server.
        server: SocketAddr,
        /// SERVFAIL, NOTIMP, FORMERR or anything else unexpected.
        rcode: ResponseCode,
    },

    /// What came back is not a trustworthy answer to what was asked.
    #[error(
        "The answer of name server {server} was not accepted: {reason}; somebody in between may be altering it"
    )]
    Protocol {
        /// The server that was asked.
        server: SocketAddr,
        /// What was wrong with the answer.
        reason: &'static str,
    },

    /// An update was sent and neither its answer nor a read-back came through.
    ///
    /// The same [`crate::Swap`] may be given again as often as needed: its prerequisite lets it be applied only once.
    #[error(
        "Update {txn} was sent to name server {server}, its outcome is not known: repeat the same swap ({detail})"
    )]
    OutcomeUnknown {
        /// The server.
        server: SocketAddr,
        /// The transaction whose fate is open.
        txn: Txn,
        /// What failed last.
        detail: String,
    },
}

/// The TSIG error of a refusal (RFC 8945 section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TsigFault {
    /// The server does not know the key's name or algorithm.
    BadKey,
    /// The server knows the key and computed another MAC: the secret differs.
    BadSig,
    /// Another one, by number.
    Other(u16),
}

/// Why a name cannot be swapped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Shape {
    /// There is an alias where addresses are expected.
    #[error("it is a CNAME; use the name it points to, or replace it with A and AAAA records")]
    Cname,
    /// The addresses come from a wildcard, so there is nothing at the name itself to compare and swap.
    #[error("its addresses come from a wildcard; give the name records of its own")]
    Wildcard,
    /// The server says that what it answers itself does not hold.
    #[error(
        "its name server says that it is not as it reads: each prerequisite holds alone, all together do not; such a server \
         (YADIFA 2.6 is one) cannot compare and swap, take BIND, Knot or PowerDNS"
    )]
    Prerequisites,
    /// The reverse name is an alias, as RFC 2317 delegates less than 256 addresses.
    #[error("it is an alias of {target} (RFC 2317); its PTR record is there, change it in that zone by hand")]
    ReverseAlias {
        /// What it is an alias of.
        target: String,
    },
    /// More than one address of a family, which a move would collapse into one.
    #[error("it has {found} addresses of one family; a machine's name has one, remove the others")]
    SeveralAddresses {
        /// How many there are.
        found: usize,
    },
    /// No address at all.
    #[error("it has no address; create it with `dnsupdater set` or in the zone")]
    Missing,
    /// The ownership record is there but was not written by this crate.
    #[error(
        "its _longhaul TXT record is {found:?}, not a single ownership record; remove it if it is not needed"
    )]
    ForeignOwnership {
        /// What it says, cut to 255 characters.
        found: String,
    },
    /// The authoritative servers name different primaries, so no server can order two updates.
    #[error("the listed servers name different primaries ({primaries}); compare-and-swap needs a single one")]
    SeveralPrimaries {
        /// The primaries' names.
        primaries: String,
    },
}

impl Error {
    /// The variant as a word, for programs: `config`, `unreachable`, `key-or-policy`, `clock`, `not-zone`, `shape`,
    /// `server`, `protocol`, `outcome-unknown`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Config(_) => "config",
            Self::Unreachable { .. } => "unreachable",
            Self::KeyOrPolicy { .. } => "key-or-policy",
            Self::Clock { .. } => "clock",
            Self::NotZone { .. } => "not-zone",
            Self::Shape { .. } => "shape",
            Self::Server { .. } => "server",
            Self::Protocol { .. } => "protocol",
            Self::OutcomeUnknown { .. } => "outcome-unknown",
        }
    }

    /// Whether trying again later may help without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::OutcomeUnknown { .. } | Self::Server { .. } => true,
            Self::Config(_)
            | Self::KeyOrPolicy { .. }
            | Self::Clock { .. }
            | Self::NotZone { .. }
            | Self::Shape { .. }
            | Self::Protocol { .. } => false,
        }
    }
}

/// What went wrong between a request and its reply, before it is known what that means for the operation.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Nothing was sent.
    NotSent(io::Error),
    /// The request was sent, no answer came.
    NoAnswer(io::Error),
    /// The request was sent, what came is not a trustworthy answer.
    Suspicious(&'static str),
    /// An error reply whose authenticity cannot be proven, as servers send it when they do not know the key.
    Denied { rcode: ResponseCode, tsig: Option<TsigFault> },
    /// The clocks differ; `there_s` if the server said its time. Refused: the server noticed and did nothing.
    Clock { here_s: u64, there_s: Option<u64>, refused: bool },
}

impl Failure {
    /// Whether the server may have acted on the request all the same.
    ///
    /// An unauthenticated denial is in: on its own it proves nothing. A signed BADTIME precedes any action.
    pub(crate) fn may_have_acted(&self) -> bool {
        match self {
            Self::NotSent(_) => false,
            Self::Clock { refused, .. } => !refused,
            Self::NoAnswer(_) | Self::Suspicious(_) | Self::Denied { .. } => true,
        }
    }

    /// Whether the same request may succeed when it is repeated.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::NotSent(_) | Self::NoAnswer(_) | Self::Suspicious(_) => true,
            Self::Denied { rcode, .. } => *rcode == ResponseCode::ServFail,
            Self::Clock { .. } => false,
        }
    }

    /// The failure as the error of an operation that changes nothing.
    pub(crate) fn into_error(self, server: SocketAddr, config: &UpdaterConfig) -> Error {
        let fudge_s = config.fudge_s;
        match self {
            Self::NotSent(source) | Self::NoAnswer(source) => Error::Unreachable { server, source },
            Self::Suspicious(reason) => Error::Protocol { server, reason },
            Self::Denied { rcode: rcode @ (ResponseCode::Refused | ResponseCode::NotAuth), tsig } => {
                let key = config.key.name().clone();
                Error::KeyOrPolicy { server, key, rcode, tsig, authenticated: false }
            }
            Self::Denied { rcode, tsig: _ } => Error::Server { server, rcode },
            Self::Clock { here_s, there_s, refused: _ } => Error::Clock { server, here_s, there_s, fudge_s },
        }
    }
}

pub(crate) fn timed_out(after: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} ms", after.as_millis()))
}

fn tsig_text(tsig: &Option<TsigFault>) -> String {
    match tsig {
        None => String::new(),
        Some(TsigFault::BadKey) => " BADKEY".to_owned(),
        Some(TsigFault::BadSig) => " BADSIG".to_owned(),
        Some(TsigFault::Other(code)) => format!(" TSIG error {code}"),
    }
}

fn refusal_advice(rcode: ResponseCode, tsig: Option<TsigFault>, authenticated: bool) -> &'static str {
    match (tsig, authenticated) {
        (Some(TsigFault::BadKey), _) => {
            "it has no key of this name and algorithm, add it there as tsig-keygen printed it; or (Knot) the key is there and \
             its acl does not name this name"
        }
        (Some(TsigFault::BadSig), _) => {
            "it has another secret under this key's name, copy the whole key again from one side to the other"
        }
        (_, true) => {
            "the key is right, its policy does not allow this; allow it A, AAAA and the TXT record below _longhaul (PTR and TXT \
             for a reverse name): BIND `update-policy`, Knot `acl` with `update-type`, PowerDNS TSIG-ALLOW-DNSUPDATE, YADIFA \
             `allow-update`"
        }
        (Some(TsigFault::Other(_)) | None, false) if rcode == ResponseCode::NotAuth => {
            "it does not accept the signature and does not say why: compare the key's name, algorithm and secret on both sides, \
             then the clocks"
        }
        (Some(TsigFault::Other(_)) | None, false) => {
            "it may have no such zone (give the zone's primary), allow this zone no updates by this key or from this address, \
             or not know the key; compare the key on both sides, then the clocks"
        }
    }
}

fn failure_advice(rcode: ResponseCode) -> &'static str {
    if rcode == ResponseCode::NotImp {
        return "it does no dynamic updates (RFC 2136); give the zone's primary, or a server that does them";
    }
    if rcode == ResponseCode::FormErr {
        return "it does not understand the message; is something between that rewrites DNS?";
    }
    if rcode == ResponseCode::ServFail {
        return "read its log; often it may not write its journal or zone file, or the zone is not loaded";
    }
    "read its log; it must accept RFC 2136 updates for this zone"
}

/// The rcode as RFC 2136 and the servers' logs write it.
pub(crate) fn rcode_text(rcode: ResponseCode) -> String {
    let written = [
        (ResponseCode::FormErr, "FORMERR"),
        (ResponseCode::ServFail, "SERVFAIL"),
        (ResponseCode::NXDomain, "NXDOMAIN"),
        (ResponseCode::NotImp, "NOTIMP"),
        (ResponseCode::Refused, "REFUSED"),
        (ResponseCode::YXDomain, "YXDOMAIN"),
        (ResponseCode::YXRRSet, "YXRRSET"),
        (ResponseCode::NXRRSet, "NXRRSET"),
        (ResponseCode::NotAuth, "NOTAUTH"),
        (ResponseCode::NotZone, "NOTZONE"),
    ];
    let known = written.iter().find(|(code, _)| *code == rcode);
    known.map_or_else(|| rcode.to_string(), |(_, text)| (*text).to_owned())
}

fn difference_text(here_s: u64, there_s: Option<u64>) -> String {
    let Some(there_s) = there_s else {
        return format!("here it is {here_s} s since 1970, the server does not tell its time");
    };
    let apart_s = here_s.abs_diff(there_s);
    let side = if here_s > there_s { "ahead of" } else { "behind" };
    format!("the clock here is {apart_s} s {side} the server's (here {here_s}, there {there_s} s since 1970)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_error_says_who_is_ahead_and_by_how_much() {
        let error = |here_s, there_s| {
            let server = "192.0.2.53:53".parse().unwrap();
            Error::Clock { server, here_s, there_s, fudge_s: 300 }.to_string()
        };
        assert!(error(4_600, Some(1_000)).contains("clock here is 3600 s ahead of the server's"));
        assert!(error(1_000, Some(1_400)).contains("clock here is 400 s behind the server's"));
        assert!(error(1_000, None).contains("does not tell its time"));
    }

    #[test]
    fn every_refusal_names_its_code_the_key_and_what_to_change() {
        let said = |rcode, tsig, authenticated| {
            let (server, key) = ("192.0.2.53:53".parse().unwrap(), "gw-a".parse().unwrap());
            Error::KeyOrPolicy { server, key, rcode, tsig, authenticated }.to_string()
        };
        for (text, parts) in [
            (said(ResponseCode::NotAuth, Some(TsigFault::BadKey), false), ["NOTAUTH BADKEY", "add it there"]),
            (
                said(ResponseCode::NotAuth, Some(TsigFault::BadSig), false),
                ["NOTAUTH BADSIG", "another secret"],
            ),
            (said(ResponseCode::NotAuth, None, false), ["(NOTAUTH)", "then the clocks"]),
            (said(ResponseCode::Refused, None, false), ["(REFUSED)", "no updates by this key"]),
            (said(ResponseCode::Refused, None, true), ["(REFUSED)", "update-policy"]),
        ] {
            assert!(parts.iter().all(|part| text.contains(part)) && text.contains("key gw-a."), "{text}");
        }
        let server = "192.0.2.53:53".parse().unwrap();
        for (rcode, part) in [
            (ResponseCode::NotImp, "NOTIMP: it does no dynamic updates"),
            (ResponseCode::ServFail, "SERVFAIL: read its log"),
            (ResponseCode::FormErr, "FORMERR: it does not understand"),
        ] {
            let text = Error::Server { server, rcode }.to_string();
            assert!(text.contains(part), "{text}");
        }
    }
}
