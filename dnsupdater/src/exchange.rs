//! Sending sealed messages to one server and receiving their replies, over TCP or UDP.
//!
//! Several messages travel at once: a whole reading of a name costs one round trip. Deliberately no second server, no
//! retry and no judgement of what a reply means.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout_at};

use crate::config::Transport;
use crate::error::{Failure, timed_out};
use crate::signing::{Rejected, Reply, Seal, Sealed};

/// The largest message that is received over UDP; no larger one is asked for.
const MAX_UDP_BYTES: usize = 4096;

/// How many messages that match nothing are read before an exchange gives up.
const MAX_STRAYS: usize = 256;

/// One server and how to talk to it. A TCP connection is kept for the next exchange of the same conversation.
pub(crate) struct Conversation<'a> {
    pub(crate) server: SocketAddr,
    pub(crate) transport: Transport,
    pub(crate) timeout: Duration,
    pub(crate) seal: &'a Seal,
    stream: Option<TcpStream>,
}

impl<'a> Conversation<'a> {
    pub(crate) fn new(server: SocketAddr, transport: Transport, timeout: Duration, seal: &'a Seal) -> Self {
        Self { server, transport, timeout, seal, stream: None }
    }

    /// Sends all requests and waits for all replies, which come back in the requests' order.
    pub(crate) async fn ask(&mut self, requests: &[Sealed]) -> Result<Vec<Reply>, Failure> {
        let deadline = Instant::now() + self.timeout;
        match self.transport {
            Transport::Tcp => self.over_tcp(requests, deadline).await,
            Transport::Udp => match self.over_udp(requests, deadline).await? {
                Some(replies) => Ok(replies),
                None => self.over_tcp(requests, Instant::now() + self.timeout).await,
            },
        }
    }

    async fn over_tcp(&mut self, requests: &[Sealed], deadline: Instant) -> Result<Vec<Reply>, Failure> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect(deadline).await?,
        };
        let mut replies = Replies::new(requests);
        let exchange = async {
            stream.write_all(&framed(requests)).await?;
            while !replies.complete() {
                let bytes = receive_framed(&mut stream).await?;
                // A connection brings nobody else's messages: what does not fit is not waited out.
                match replies.take(self.seal, &bytes, Strays::Fatal) {
                    Ok(Taken::Kept) => {}
                    Ok(Taken::Truncated) => return Ok(Err(Failure::Suspicious("it is cut short, over TCP"))),
                    Err(failure) => return Ok(Err(failure)),
                }
            }
            io::Result::Ok(Ok(()))
        };
        match timeout_at(deadline, exchange).await {
            Ok(Ok(judged)) => judged?,
            Ok(Err(error)) => return Err(Failure::NoAnswer(error)),
            Err(_) => return Err(Failure::NoAnswer(timed_out(self.timeout))),
        }
        self.stream = Some(stream);
        replies.into_vec()
    }

    async fn connect(&self, deadline: Instant) -> Result<TcpStream, Failure> {
        let connected = timeout_at(deadline, TcpStream::connect(self.server)).await;
        let stream = connected
            .unwrap_or_else(|_| Err(timed_out(self.timeout)))
            .and_then(|stream| stream.set_nodelay(true).map(|()| stream));
        stream.map_err(Failure::NotSent)
    }

    /// None if an answer was truncated.
    async fn over_udp(&self, requests: &[Sealed], deadline: Instant) -> Result<Option<Vec<Reply>>, Failure> {
        let socket = udp_to(self.server).await.map_err(Failure::NotSent)?;
        for request in requests {
            socket.send(&request.bytes).await.map_err(Failure::NoAnswer)?;
        }
        let mut replies = Replies::new(requests);
        let mut buffer = [0; MAX_UDP_BYTES];
        while !replies.complete() {
            let received = match timeout_at(deadline, socket.recv(&mut buffer)).await {
                Ok(received) => received.map_err(udp_failure)?,
                Err(_) => return Err(replies.why_incomplete(self.timeout)),
            };
            match replies.take(self.seal, &buffer[..received], Strays::Skipped)? {
                Taken::Kept => {}
                Taken::Truncated => return Ok(None),
            }
        }
        replies.into_vec().map(Some)
    }
}

/// What a message that matches no request means on this transport.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Strays {
    Fatal,
    Skipped,
}

/// What became of a received message.
enum Taken {
    Kept,
    Truncated,
}

/// The replies that have come so far, in the requests' order.
struct Replies<'a> {
    requests: &'a [Sealed],
    taken: Vec<Option<Reply>>,
    strays: usize,
    last_stray: Option<&'static str>,
}

impl<'a> Replies<'a> {
    fn new(requests: &'a [Sealed]) -> Self {
        Self { requests, taken: requests.iter().map(|_| None).collect(), strays: 0, last_stray: None }
    }

    fn complete(&self) -> bool {
        self.taken.iter().all(Option::is_some)
    }

    fn take(&mut self, seal: &Seal, bytes: &[u8], strays: Strays) -> Result<Taken, Failure> {
        let id = bytes.first_chunk::<2>().map(|id| u16::from_be_bytes(*id));
        let wanted = |at: &usize| Some(self.requests[*at].id) == id && self.taken[*at].is_none();
        let Some(at) = (0..self.requests.len()).find(wanted) else {
            return self.stray("its id is another", strays);
        };
        match seal.open(&self.requests[at], bytes) {
            Ok(reply) => {
                self.taken[at] = Some(reply);
                Ok(Taken::Kept)
            }
            Err(Rejected::Stray(reason)) => self.stray(reason, strays),
            Err(Rejected::Truncated) => Ok(Taken::Truncated),
            Err(Rejected::Final(failure)) => Err(failure),
        }
    }

    fn stray(&mut self, reason: &'static str, strays: Strays) -> Result<Taken, Failure> {
        self.strays += 1;
        self.last_stray = Some(reason);
        if strays == Strays::Fatal || self.strays > MAX_STRAYS {
            return Err(Failure::Suspicious(reason));
        }
        Ok(Taken::Kept)
    }

    fn why_incomplete(&self, waited: Duration) -> Failure {
        self.last_stray.map_or_else(|| Failure::NoAnswer(timed_out(waited)), Failure::Suspicious)
    }

    fn into_vec(self) -> Result<Vec<Reply>, Failure> {
        self.taken.into_iter().collect::<Option<Vec<_>>>().ok_or(Failure::Suspicious("an answer is missing"))
    }
}

/// "Connection refused" on UDP is an ICMP answer to the datagram itself: nobody has read it.
fn udp_failure(error: io::Error) -> Failure {
    if error.kind() == io::ErrorKind::ConnectionRefused {
        Failure::NotSent(error)
    } else {
        Failure::NoAnswer(error)
    }
}

/// All requests with their two-byte lengths (RFC 1035 section 4.2.2), as one write.
fn framed(requests: &[Sealed]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for request in requests {
        let length =
            u16::try_from(request.bytes.len()).expect("MAX_ADDRESSES keeps every request under 4 KiB");
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&request.bytes);
    }
    bytes
}

async fn receive_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut bytes = vec![0; usize::from(length)];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// A connected socket on a random port: the kernel drops what does not come from the server's address and port.
async fn udp_to(server: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    Ok(socket)
}
