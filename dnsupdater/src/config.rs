//! What an [`Updater`](crate::Updater) is told: servers, zone, key, limits. No file formats, no environment.

use std::net::SocketAddr;
use std::time::Duration;

use crate::error::Error;
use crate::key::Key;
use crate::name::DnsName;

/// The most servers that may be listed: each is asked by every verification.
pub const MAX_SERVERS: usize = 16;

/// How messages travel to the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// TCP: no duplicates, no fragments, hard to spoof; costs one round trip more for the connection.
    #[default]
    Tcp,
    /// UDP, repeated over TCP when the answer is truncated; one round trip less, easier to disturb.
    Udp,
}

/// Everything an updater needs. Make one with [`UpdaterConfig::new`] and change what should differ.
#[derive(Debug, Clone)]
pub struct UpdaterConfig {
    /// The name servers, the primary first. Updates go to the first and to no other; all are verified.
    pub servers: Vec<SocketAddr>,
    /// The zone that holds the names.
    pub zone: DnsName,
    /// The TSIG key.
    pub key: Key,
    /// How messages travel. Default TCP.
    pub transport: Transport,
    /// How long one exchange may take, connection included. Default 5 s. Shorter: a slow primary counts as silent, and
    /// a swap has to be resolved by reading back; longer: an unreachable one is noticed later.
    pub timeout: Duration,
    /// The clock difference that TSIG allows, in seconds. Default 300 (RFC 8945 section 10). Larger: a captured message
    /// stays usable longer, which prerequisites make harmless; smaller: clocks must agree better.
    pub fudge_s: u16,
    /// How often an exchange that failed is repeated. Default 2. Each costs up to `timeout` and a pause of 0.2 to 2 s.
    pub retries: u32,
    /// Whether reads from the primary are signed and must be answered with a signature. Default true. Servers that do
    /// not sign answers to queries (the stock hickory-dns 0.26) need false; then whoever sits on the path can lie to
    /// reads, though still not to updates.
    pub signed_reads: bool,
    /// The port at which the zone's own name servers are asked by a verification of all of them. Default 53.
    pub ns_port: u16,
    /// Seconds added to the system clock when signing and checking. Default 0; for tests, and for a machine whose clock
    /// is known to be off and cannot be set.
    pub clock_offset_s: i64,
}

impl UpdaterConfig {
    /// A configuration with every default; `servers` begins with the primary.
    pub fn new(servers: Vec<SocketAddr>, zone: DnsName, key: Key) -> Self {
        Self {
            servers,
            zone,
            key,
            transport: Transport::default(),
            timeout: Duration::from_secs(5),
            fudge_s: 300,
            retries: 2,
            signed_reads: true,
            ns_port: 53,
            clock_offset_s: 0,
        }
    }

    pub(crate) fn check(&self) -> Result<SocketAddr, Error> {
        let Some(primary) = self.servers.first() else {
            return Err(Error::Config("No name server is listed: give the zone's primary".to_owned()));
        };
        if self.servers.len() > MAX_SERVERS {
            let listed = self.servers.len();
            return Err(Error::Config(format!(
                "{listed} name servers are listed, at most {MAX_SERVERS} may be"
            )));
        }
        if self.timeout.is_zero() || self.fudge_s == 0 {
            return Err(Error::Config(
                "The timeout and the fudge of a name server must be over zero".to_owned(),
            ));
        }
        Ok(*primary)
    }
}
