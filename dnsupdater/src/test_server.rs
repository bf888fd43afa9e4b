//! An authoritative name server in this process, for tests and laboratories: hickory-server's zones behind rules that
//! make it a fit partner for compare-and-swap.
//!
//! What is hickory's: sockets, wire format, zone parsing, answering, applying updates. What this adds, because the
//! stock handler of 0.26 lacks it: updates one after the other with readers kept out, prerequisites compared as whole
//! RRsets without wildcards (RFC 2136 section 3.2.3), signed answers to signed queries, keys limited to names.
//! Everything is in memory and gone with the server. Not for production: no transfers, no DNSSEC, no limits on clients.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::tsig::TsigError;
use hickory_proto::rr::{
    DNSClass, LowerName, Name, RData, Record, RecordType, RrKey, TSigResponseContext, TSigner,
};
use hickory_proto::serialize::txt::Parser;
use hickory_server::Server;
use hickory_server::dnssec::NxProofKind;
use hickory_server::server::{Request, RequestInfo};
use hickory_server::store::in_memory::InMemoryZoneHandler;
use hickory_server::store::sqlite::SqliteZoneHandler;
use hickory_server::zone_handler::{
    AuthLookup, AxfrPolicy, Catalog, LookupControlFlow, LookupError, LookupOptions, Nsec3QueryInfo,
    UpdateRequest, ZoneHandler, ZoneType,
};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::RwLock;

use crate::change::ownership_name;
use crate::key::Key;
use crate::name::DnsName;

/// How long a TCP connection may be idle before the server closes it.
const TCP_IDLE: Duration = Duration::from_secs(30);

/// How many answers may wait for a slow TCP client.
const TCP_ANSWERS: usize = 64;

/// How often another port is tried when the one that was free for TCP is taken for UDP.
const PORT_ATTEMPTS: u32 = 16;

/// A key and what it may change.
#[derive(Debug, Clone)]
pub struct Grant {
    key: Key,
    names: Option<Vec<DnsName>>,
    fudge_s: u16,
}

/// A zone to serve.
#[derive(Debug, Clone)]
pub struct TestZone {
    /// Its name.
    pub origin: DnsName,
    /// Its records in the master file format (RFC 1035 section 5), SOA included; relative names are below `origin`.
    pub text: String,
}

/// A running server. Dropping it stops it.
pub struct TestServer {
    address: SocketAddr,
    server: Server<Catalog>,
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum TestServerError {
    /// The address could not be bound.
    #[error("Cannot listen for DNS on {address}: {source}")]
    Bind {
        /// The address that was asked for.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A zone's text is not a zone.
    #[error("Zone {origin} cannot be read: {reason}")]
    Zone {
        /// The zone.
        origin: DnsName,
        /// Where and why.
        reason: String,
    },
    /// A key cannot be used.
    #[error(transparent)]
    Key(#[from] crate::Error),
}

impl Grant {
    /// A key that may change every record of every zone.
    pub fn everything(key: Key) -> Self {
        Self { key, names: None, fudge_s: 300 }
    }

    /// A key that may change these names and their ownership records, like BIND's `grant KEY name NAME`.
    pub fn only(key: Key, names: Vec<DnsName>) -> Self {
        Self { key, names: Some(names), fudge_s: 300 }
    }
}

impl From<Key> for Grant {
    fn from(key: Key) -> Self {
        Self::everything(key)
    }
}

impl TestServer {
    /// Serves zones at `bind`, over UDP and TCP; port 0 takes a free one. Answers from the moment this returns.
    pub async fn start(
        bind: SocketAddr,
        zones: &[TestZone],
        grants: &[Grant],
    ) -> Result<Self, TestServerError> {
        let refused = |source| TestServerError::Bind { address: bind, source };
        let (udp, tcp) = listen(bind).await.map_err(refused)?;
        Self::start_on(udp, tcp, zones, grants)
    }

    /// Serves zones on sockets that are already bound, for instance in another network namespace.
    pub fn start_on(
        udp: UdpSocket,
        tcp: TcpListener,
        zones: &[TestZone],
        grants: &[Grant],
    ) -> Result<Self, TestServerError> {
        let unbound = |source| TestServerError::Bind { address: SocketAddr::from(([0, 0, 0, 0], 0)), source };
        let address = tcp.local_addr().map_err(unbound)?;
        let mut catalog = Catalog::new();
        for zone in zones {
            let handler = Zone::load(zone, grants)?;
            catalog.upsert(zone.origin.as_name().into(), vec![std::sync::Arc::new(handler)]);
        }
        let mut server = Server::new(catalog);
        server.register_socket(udp);
        server.register_listener(tcp, TCP_IDLE, TCP_ANSWERS);
        Ok(Self { address, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops it and waits until its sockets are closed.
    pub async fn shutdown(mut self) {
        // What its tasks report at the end is of no use to anybody.
        let _ = self.server.shutdown_gracefully().await;
    }
}

async fn listen(bind: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let mut attempt = 0;
    loop {
        let tcp = TcpListener::bind(bind).await?;
        match UdpSocket::bind(tcp.local_addr()?).await {
            Ok(udp) => return Ok((udp, tcp)),
            Err(error) if bind.port() != 0 || attempt >= PORT_ATTEMPTS => return Err(error),
            Err(_) => attempt += 1,
        }
    }
}

/// A key of one zone, ready to check and sign.
struct Keyholder {
    signer: TSigner,
    /// The names it may change; none: all.
    names: Option<BTreeSet<LowerName>>,
}

/// One zone: readers share it, an update has it alone.
struct Zone {
    store: RwLock<SqliteZoneHandler>,
    origin: LowerName,
    keyholders: Vec<Keyholder>,
}

type Signing = Option<TSigResponseContext>;

impl Zone {
    fn load(zone: &TestZone, grants: &[Grant]) -> Result<Self, TestServerError> {
        let refused = |reason: String| TestServerError::Zone { origin: zone.origin.clone(), reason };
        let origin = zone.origin.as_name().clone();
        let (_, records) = Parser::new(zone.text.as_str(), None, Some(origin.clone()))
            .parse()
            .map_err(|error| refused(error.to_string()))?;
        let memory =
            InMemoryZoneHandler::new(origin.clone(), records, ZoneType::Primary, AxfrPolicy::Deny, None)
                .map_err(refused)?;
        let store = SqliteZoneHandler::new(memory, AxfrPolicy::Deny, true, false);
        let keyholders = grants.iter().map(keyholder).collect::<Result<_, _>>()?;
        Ok(Self { store: RwLock::new(store), origin: origin.into(), keyholders })
    }

    /// RFC 8945 section 5.2: the key, its MAC, then the time.
    fn authenticate(&self, request: &Request, now_s: u64) -> Result<(&Keyholder, Signing), Signing> {
        let Some(tsig) = UpdateRequest::signature(&**request) else {
            return Err(None);
        };
        let id = request.metadata.id;
        let Some(keyholder) = self.keyholders.iter().find(|holder| *holder.signer.signer_name() == tsig.name)
        else {
            return Err(Some(TSigResponseContext::unknown_key(id, now_s, tsig.name.clone())));
        };
        let signer = &keyholder.signer;
        let Ok((_, _, valid)) = signer.verify_message_byte(request.as_slice(), None, true) else {
            return Err(Some(TSigResponseContext::bad_signature(id, now_s, signer.clone())));
        };
        let sign = |error| TSigResponseContext::new(id, now_s, signer.clone(), tsig.data.mac.clone(), error);
        if !valid.contains(&now_s) {
            return Err(Some(sign(Some(TsigError::BadTime))));
        }
        Ok((keyholder, Some(sign(None))))
    }

    async fn apply(&self, request: &Request, keyholder: &Keyholder) -> Result<bool, ResponseCode> {
        let store = self.store.write().await;
        self.check_prerequisites(&store, request.prerequisites()).await?;
        if !keyholder.may_change(request.updates()) {
            return Err(ResponseCode::Refused);
        }
        store.pre_scan(request.updates()).await?;
        store.update_records(request.updates(), true).await
    }

    /// RFC 2136 section 3.2, on the zone's own records.
    async fn check_prerequisites(
        &self,
        store: &SqliteZoneHandler,
        prerequisites: &[Record],
    ) -> Result<(), ResponseCode> {
        let mut exact: BTreeMap<RrKey, Vec<&RData>> = BTreeMap::new();
        for record in prerequisites {
            let name = LowerName::from(&record.name);
            if record.ttl != 0 {
                return Err(ResponseCode::FormErr);
            }
            if !self.origin.zone_of(&name) {
                return Err(ResponseCode::NotZone);
            }
            if record.dns_class == DNSClass::IN {
                exact.entry(RrKey::new(name, record.record_type())).or_default().push(&record.data);
                continue;
            }
            let found = exists(store, &name, record.record_type()).await;
            let any = record.record_type() == RecordType::ANY;
            match (record.dns_class, found) {
                (DNSClass::ANY, true) | (DNSClass::NONE, false) => {}
                (DNSClass::ANY, false) => {
                    return Err(if any { ResponseCode::NXDomain } else { ResponseCode::NXRRSet });
                }
                (DNSClass::NONE, true) => {
                    return Err(if any { ResponseCode::YXDomain } else { ResponseCode::YXRRSet });
                }
                (_, _) => return Err(ResponseCode::FormErr),
            }
        }
        let records = store.records().await;
        let holds = |(key, wanted): (&RrKey, &Vec<&RData>)| {
            let Some(found) = records.get(key) else { return false };
            let found: Vec<_> = found.records_without_rrsigs().map(|record| &record.data).collect();
            found.len() == wanted.len() && found.iter().all(|data| wanted.contains(data))
        };
        if exact.iter().all(holds) { Ok(()) } else { Err(ResponseCode::NXRRSet) }
    }
}

async fn exists(store: &SqliteZoneHandler, name: &LowerName, record_type: RecordType) -> bool {
    let fits =
        |key: &RrKey| key.name == *name && (record_type == RecordType::ANY || key.record_type == record_type);
    store.records().await.iter().any(|(key, set)| fits(key) && !set.is_empty())
}

fn keyholder(grant: &Grant) -> Result<Keyholder, crate::Error> {
    let with_ownership = |name: &DnsName| {
        let ownership = ownership_name(name)?;
        Ok([LowerName::from(name.as_name()), LowerName::from(ownership.as_name())])
    };
    let names = match &grant.names {
        None => None,
        Some(names) => {
            let pairs: Vec<_> = names.iter().map(with_ownership).collect::<Result<_, crate::Error>>()?;
            Some(pairs.into_iter().flatten().collect())
        }
    };
    Ok(Keyholder { signer: grant.key.signer(grant.fudge_s)?, names })
}

impl Keyholder {
    fn may_change(&self, records: &[Record]) -> bool {
        let allowed =
            |name: &Name| self.names.as_ref().is_none_or(|names| names.contains(&LowerName::from(name)));
        records.iter().all(|record| allowed(&record.name))
    }
}

#[async_trait::async_trait]
impl ZoneHandler for Zone {
    fn zone_type(&self) -> ZoneType {
        ZoneType::Primary
    }

    fn axfr_policy(&self) -> AxfrPolicy {
        AxfrPolicy::Deny
    }

    async fn update(&self, request: &Request, now_s: u64) -> (Result<bool, ResponseCode>, Signing) {
        match self.authenticate(request, now_s) {
            Ok((keyholder, signing)) => (self.apply(request, keyholder).await, signing),
            Err(None) => (Err(ResponseCode::Refused), None),
            Err(signing) => (Err(ResponseCode::NotAuth), signing),
        }
    }

    fn origin(&self) -> &LowerName {
        &self.origin
    }

    async fn lookup(
        &self,
        name: &LowerName,
        record_type: RecordType,
        info: Option<&RequestInfo<'_>>,
        options: LookupOptions,
    ) -> LookupControlFlow<AuthLookup> {
        self.store.read().await.lookup(name, record_type, info, options).await
    }

    async fn search(
        &self,
        request: &Request,
        options: LookupOptions,
    ) -> (LookupControlFlow<AuthLookup>, Signing) {
        let now_s = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        let signing = match self.authenticate(request, now_s) {
            Ok((_, signing)) => signing,
            Err(None) => None,
            Err(signing) => {
                let refused = LookupError::ResponseCode(ResponseCode::NotAuth);
                return (LookupControlFlow::Break(Err(refused)), signing);
            }
        };
        (self.store.read().await.search(request, options).await.0, signing)
    }

    async fn nsec_records(&self, name: &LowerName, options: LookupOptions) -> LookupControlFlow<AuthLookup> {
        self.store.read().await.nsec_records(name, options).await
    }

    async fn nsec3_records(
        &self,
        info: Nsec3QueryInfo<'_>,
        options: LookupOptions,
    ) -> LookupControlFlow<AuthLookup> {
        self.store.read().await.nsec3_records(info, options).await
    }

    fn nx_proof_kind(&self) -> Option<&NxProofKind> {
        None
    }
}
