//! A proxy for DNS messages between client and server, over TCP and UDP, that a test tells what to do with each reply.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::loopback;

/// What becomes of one exchange. Whatever it is but `Swallow`, the server has seen the request.
pub enum Verdict {
    /// The server's reply passes.
    Pass,
    /// The request never reaches the server; no reply.
    Swallow,
    /// The server's reply is lost.
    Drop,
    /// These messages are sent instead of the reply.
    Instead(Vec<Vec<u8>>),
    /// The reply comes late.
    Late(Duration),
}

/// Decides on the request and, except for `Swallow` (asked first with no reply), the server's reply.
type Rule = dyn Fn(&[u8], Option<&[u8]>) -> Verdict + Send + Sync;

/// A running proxy; stopped when dropped.
pub struct Proxy {
    pub address: SocketAddr,
    /// Every request that came in, in order, without TCP's length.
    pub requests: mpsc::UnboundedReceiver<Vec<u8>>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub async fn start(
        upstream: SocketAddr,
        rule: impl Fn(&[u8], Option<&[u8]>) -> Verdict + Send + Sync + 'static,
    ) -> Proxy {
        let (tcp, udp) = loop {
            let tcp = TcpListener::bind(loopback(0)).await.expect("the loopback has ports");
            if let Ok(udp) = UdpSocket::bind(tcp.local_addr().expect("bound")).await {
                break (tcp, udp);
            }
        };
        let address = tcp.local_addr().expect("bound");
        let (seen, requests) = mpsc::unbounded_channel();
        let rule: Arc<Rule> = Arc::new(rule);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(tcp, upstream, rule.clone(), seen.clone()));
        tasks.spawn(relay_udp(udp, upstream, rule, seen));
        Proxy { address, requests, _tasks: tasks }
    }

    /// The updates among the requests so far.
    pub fn updates(&mut self) -> Vec<Vec<u8>> {
        let mut updates = Vec::new();
        while let Ok(request) = self.requests.try_recv() {
            if is_update(&request) {
                updates.push(request);
            }
        }
        updates
    }
}

/// Whether a message is an UPDATE or its reply: opcode 5.
pub fn is_update(message: &[u8]) -> bool {
    (message[2] >> 3) & 0xf == 5
}

/// A message of `site-a` without its TSIG record, which is the last one and always begins with the key's uncompressed
/// name.
pub fn unsigned(message: &[u8]) -> Vec<u8> {
    let key = b"\x06site-a\x00";
    let Some(at) = message.windows(key.len()).rposition(|window| window == key) else {
        return message.to_vec();
    };
    let mut bare = message[..at].to_vec();
    bare[11] -= 1;
    bare
}

async fn accept(
    tcp: TcpListener,
    upstream: SocketAddr,
    rule: Arc<Rule>,
    seen: mpsc::UnboundedSender<Vec<u8>>,
) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = tcp.accept().await.expect("listening");
        connections.spawn(relay_tcp(stream, upstream, rule.clone(), seen.clone()));
    }
}

async fn relay_tcp(
    mut client: TcpStream,
    upstream: SocketAddr,
    rule: Arc<Rule>,
    seen: mpsc::UnboundedSender<Vec<u8>>,
) {
    while let Ok(length) = client.read_u16().await {
        let mut request = vec![0; usize::from(length)];
        if client.read_exact(&mut request).await.is_err() {
            return;
        }
        let _ = seen.send(request.clone());
        if matches!(rule(&request, None), Verdict::Swallow) {
            continue;
        }
        let Some(reply) = ask_tcp(upstream, &request).await else { return };
        let (delay, messages) = judge(&*rule, &request, reply);
        tokio::time::sleep(delay).await;
        for message in messages {
            let framed = framed(&message);
            if client.write_all(&framed).await.is_err() {
                return;
            }
        }
    }
}

async fn relay_udp(
    udp: UdpSocket,
    upstream: SocketAddr,
    rule: Arc<Rule>,
    seen: mpsc::UnboundedSender<Vec<u8>>,
) {
    let udp = Arc::new(udp);
    let mut late = JoinSet::new();
    let mut buffer = [0; 4096];
    loop {
        let (length, client) = udp.recv_from(&mut buffer).await.expect("bound");
        let request = buffer[..length].to_vec();
        let _ = seen.send(request.clone());
        if matches!(rule(&request, None), Verdict::Swallow) {
            continue;
        }
        let Some(reply) = ask_tcp(upstream, &request).await else { continue };
        let (delay, messages) = judge(&*rule, &request, reply);
        let udp = udp.clone();
        let send = async move {
            tokio::time::sleep(delay).await;
            for message in messages {
                udp.send_to(&message, client).await.expect("the loopback carries it");
            }
        };
        // What is asked meanwhile does not wait for a late reply.
        if delay.is_zero() { send.await } else { drop(late.spawn(send)) }
    }
}

/// What is sent, and how much later.
fn judge(rule: &Rule, request: &[u8], reply: Vec<u8>) -> (Duration, Vec<Vec<u8>>) {
    match rule(request, Some(&reply)) {
        Verdict::Pass => (Duration::ZERO, vec![reply]),
        Verdict::Swallow | Verdict::Drop => (Duration::ZERO, vec![]),
        Verdict::Instead(messages) => (Duration::ZERO, messages),
        Verdict::Late(delay) => (delay, vec![reply]),
    }
}

/// Sends one raw message over TCP and returns the raw reply.
pub async fn ask_tcp(server: SocketAddr, request: &[u8]) -> Option<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await.ok()?;
    stream.write_all(&framed(request)).await.ok()?;
    let length = stream.read_u16().await.ok()?;
    let mut reply = vec![0; usize::from(length)];
    stream.read_exact(&mut reply).await.ok()?;
    Some(reply)
}

fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("a DNS message");
    [length.to_be_bytes().as_slice(), message].concat()
}
