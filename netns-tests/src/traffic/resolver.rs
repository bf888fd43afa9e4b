//! Resolves one name as an ordinary stub resolver would: asks the name server, keeps the answer until its TTL ends.
//!
//! RFC 1035 over UDP, RFC 2181 section 5.2 for TTLs. Never serves an answer that has expired, never asks early, keeps no
//! negative answers. A TTL of 0 is used for one request only.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::net::UdpSocket;
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::clock::Clock;
use super::event::{Event, NameChange};
use super::plan::HttpPlan;

/// Where the answer to a request for the name goes.
pub type Waiting = oneshot::Sender<Result<IpAddr, String>>;

const TRIES: u32 = 3;
const TRY_TIMEOUT: Duration = Duration::from_secs(1);

struct Cached {
    address: IpAddr,
    expires: Instant,
}

struct Resolver {
    name: Name,
    kind: RecordType,
    server: SocketAddr,
    cached: Option<Cached>,
    last: Option<IpAddr>,
}

/// Answers requests for the plan's name until the last asker is gone.
pub async fn resolve(plan: HttpPlan, clock: Clock, mut requests: Receiver<Waiting>, events: Sender<Event>) {
    let mut resolver = match Resolver::new(&plan) {
        Ok(resolver) => resolver,
        Err(error) => return refuse_all(&mut requests, &error.to_string()).await,
    };
    while let Some(request) = requests.recv().await {
        let answer = resolver.address(clock, &events).await.map_err(|error| error.to_string());
        let _ = request.send(answer);
    }
}

async fn refuse_all(requests: &mut Receiver<Waiting>, reason: &str) {
    while let Some(request) = requests.recv().await {
        let _ = request.send(Err(reason.to_owned()));
    }
}

impl Resolver {
    fn new(plan: &HttpPlan) -> io::Result<Self> {
        let name =
            Name::from_str(&format!("{}.", plan.name.trim_end_matches('.'))).map_err(io::Error::other)?;
        let kind = if plan.ipv6 { RecordType::AAAA } else { RecordType::A };
        Ok(Self { name, kind, server: plan.name_server, cached: None, last: None })
    }

    async fn address(&mut self, clock: Clock, events: &Sender<Event>) -> io::Result<IpAddr> {
        if let Some(cached) = &self.cached
            && Instant::now() < cached.expires
        {
            return Ok(cached.address);
        }
        self.cached = None;
        let (address, ttl_s) = self.ask().await?;
        let now = Instant::now();
        self.cached = Some(Cached { address, expires: now + Duration::from_secs(ttl_s.into()) });
        if self.last != Some(address) {
            self.last = Some(address);
            let change = NameChange { at_ms: clock.at_ms(now), address, ttl_s };
            let _ = events.send(Event::NameChanged(change)).await;
        }
        Ok(address)
    }

    async fn ask(&self) -> io::Result<(IpAddr, u32)> {
        let mut result = Err(io::ErrorKind::TimedOut.into());
        for _ in 0..TRIES {
            match timeout(TRY_TIMEOUT, self.ask_once()).await {
                Ok(answer @ Ok(_)) => return answer,
                Ok(Err(error)) => result = Err(error),
                Err(_) => {
                    result = Err(io::Error::new(io::ErrorKind::TimedOut, "The name server did not answer"))
                }
            }
        }
        result
    }

    async fn ask_once(&self) -> io::Result<(IpAddr, u32)> {
        let any: IpAddr = match self.server {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        // A new socket for each question: a new random port, as RFC 5452 wants it.
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(self.server).await?;
        let mut question = Message::query();
        question.metadata.recursion_desired = true;
        question.add_query(Query::query(self.name.clone(), self.kind));
        socket.send(&question.to_vec().map_err(io::Error::other)?).await?;
        let mut datagram = [0; 4096];
        loop {
            let length = socket.recv(&mut datagram).await?;
            let Ok(answer) = Message::from_vec(&datagram[..length]) else { continue };
            if answer.metadata.id == question.metadata.id && answer.queries == question.queries {
                return self.read(&answer);
            }
        }
    }

    fn read(&self, answer: &Message) -> io::Result<(IpAddr, u32)> {
        if answer.metadata.response_code != ResponseCode::NoError {
            return Err(io::Error::other(format!(
                "The name server answered {}",
                answer.metadata.response_code
            )));
        }
        // A chain of aliases lives as long as its shortest part.
        let ttl = answer.answers.iter().map(|record| record.ttl).min();
        let address = answer.answers.iter().find_map(|record| address_in(&record.data));
        address.zip(ttl).ok_or_else(|| io::Error::other(format!("{} has no address", self.name)))
    }
}

#[allow(clippy::wildcard_enum_match_arm)] // The enum is the DNS library's, with dozens of record types.
fn address_in(data: &RData) -> Option<IpAddr> {
    match data {
        RData::A(address) => Some(address.0.into()),
        RData::AAAA(address) => Some(address.0.into()),
        _ => None,
    }
}
