//! New requests by name, one at every interval whatever became of those before.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc::{Sender, channel};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::clock::Clock;
use super::event::{Event, Outcome, ProbeSample};
use super::plan::HttpPlan;
use super::resolver::{Waiting, resolve};
use super::run::switched_on;

/// Requests under way at one time: at ten a second, 30 s of silence with room to spare. Each costs a socket.
const UNDER_WAY: usize = 600;
/// A longer answer is cut and counts as wrong content.
const ANSWER_LIMIT_BYTES: u64 = 4 << 20;

/// Sends requests until `finish` says so, then waits for those under way.
pub async fn probe(plan: HttpPlan, clock: Clock, mut finish: watch::Receiver<bool>, events: Sender<Event>) {
    let (names, requests) = channel(UNDER_WAY);
    let resolver = tokio::spawn(resolve(plan.clone(), clock, requests, events.clone()));
    let plan = Arc::new(plan);
    let mut ticks = interval(Duration::from_millis(plan.interval_ms.max(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut under_way = JoinSet::new();
    loop {
        tokio::select! {
            () = switched_on(&mut finish) => break,
            Some(_) = under_way.join_next() => {}
            _ = ticks.tick(), if under_way.len() < UNDER_WAY => {
                under_way.spawn(one(Arc::clone(&plan), clock, names.clone(), events.clone()));
            }
        }
    }
    while under_way.join_next().await.is_some() {}
    drop(names);
    let _ = resolver.await;
}

async fn one(plan: Arc<HttpPlan>, clock: Clock, names: Sender<Waiting>, events: Sender<Event>) {
    let begun = Instant::now();
    let mut sample = ProbeSample {
        at_ms: clock.at_ms(begun),
        latency_ms: 0.0,
        address: None,
        outcome: Outcome::Timeout,
        boot_id: None,
        detail: None,
    };
    let limit = Duration::from_millis(plan.timeout_ms);
    // A timeout leaves the sample as far as it got: the address, and Timeout as outcome.
    if let Ok((outcome, detail)) = timeout(limit, request(&plan, &names, &mut sample)).await {
        sample.outcome = outcome;
        sample.detail = detail;
    }
    sample.latency_ms = begun.elapsed().as_secs_f64() * 1000.0;
    let _ = events.send(Event::Probe(sample)).await;
}

async fn request(
    plan: &HttpPlan,
    names: &Sender<Waiting>,
    sample: &mut ProbeSample,
) -> (Outcome, Option<String>) {
    let address = match address_of(names).await {
        Ok(address) => address,
        Err(error) => return (Outcome::Name, Some(error)),
    };
    sample.address = Some(address);
    match get(plan, address).await {
        Ok(mut answer) => {
            sample.boot_id = answer.boot_id.take();
            answer.verdict(plan)
        }
        Err(error) => (outcome_of(&error), Some(error.to_string())),
    }
}

async fn address_of(names: &Sender<Waiting>) -> Result<IpAddr, String> {
    let (answer, wait) = oneshot::channel();
    names.send(answer).await.map_err(|error| error.to_string())?;
    wait.await.map_err(|error| error.to_string())?
}

#[allow(clippy::wildcard_enum_match_arm)] // The enum is the standard library's and not complete.
fn outcome_of(error: &io::Error) -> Outcome {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
            Outcome::Reset
        }
        io::ErrorKind::TimedOut => Outcome::Timeout,
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Outcome::Content,
        _ => Outcome::Connect,
    }
}

struct Answer {
    status: String,
    boot_id: Option<String>,
    body: Vec<u8>,
}

impl Answer {
    fn verdict(&self, plan: &HttpPlan) -> (Outcome, Option<String>) {
        if self.status != "200" {
            return (Outcome::Content, Some(format!("Status {}", self.status)));
        }
        if plan.expect_body.as_ref().is_some_and(|body| body.as_bytes() != self.body) {
            return (Outcome::Content, Some(format!("Another body, of {} bytes", self.body.len())));
        }
        (Outcome::Ok, None)
    }
}

async fn get(plan: &HttpPlan, address: IpAddr) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(SocketAddr::new(address, plan.port)).await?;
    stream.set_nodelay(true)?;
    let request = format!("GET {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", plan.path, plan.name);
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = Vec::new();
    stream.take(ANSWER_LIMIT_BYTES).read_to_end(&mut bytes).await?;
    let end = bytes.windows(4).position(|end| end == b"\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let boot_id = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .find(|(key, _)| key.eq_ignore_ascii_case("x-boot-id"))
        .map(|(_, value)| value.trim().to_owned());
    Ok(Answer { status, boot_id, body: bytes.split_off(end + 4) })
}
