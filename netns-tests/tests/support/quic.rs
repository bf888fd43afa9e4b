//! A client's QUIC connection to the guest's echo: numbered records, each asked for before the next.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_tests::agent::quic::client_config;
use netns_tests::netns::Namespace;
use quinn::{Connection, ConnectionError, Endpoint, EndpointConfig, TokioRuntime};
use tokio::task::JoinHandle;

/// Of each record: more than a datagram of QUIC carries, so that full ones travel both ways.
const RECORD_BYTES: usize = 4000;
/// Encryption is dear to a guest without hardware help; more would keep it from everything else.
const PAUSE: Duration = Duration::from_millis(100);
/// How long opening is tried.
const OPEN: Duration = Duration::from_secs(90);

/// A connection at work.
pub struct QuicRecords {
    answered: Arc<AtomicU64>,
    quit: Arc<AtomicBool>,
    task: JoinHandle<Result<QuicReport>>,
}

/// What became of it.
#[derive(Debug)]
pub struct QuicReport {
    pub answered: u64,
    pub longest: Duration,
    /// UDP payload that the connection found out its path to carry.
    pub mtu_bytes: u16,
}

impl QuicRecords {
    /// Opens the connection; it is open when this returns.
    pub async fn start(from: &Namespace, to: SocketAddr) -> Self {
        let socket = from.udp_socket("0.0.0.0:0".parse().unwrap()).unwrap();
        let endpoint =
            Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime)).unwrap();
        let connection = open(&endpoint, to).await;
        let (answered, quit) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let task = tokio::spawn(exchange(endpoint, connection, answered.clone(), quit.clone()));
        Self { answered, quit, task }
    }

    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    pub async fn end(self) -> QuicReport {
        self.quit.store(true, Ordering::Relaxed);
        self.task.await.unwrap().unwrap()
    }
}

/// A guest that has just booted on a busy host may take longer for its first handshake than QUIC waits.
async fn open(endpoint: &Endpoint, to: SocketAddr) -> Connection {
    let began = Instant::now();
    loop {
        match endpoint.connect_with(client_config().unwrap(), to, "guest").unwrap().await {
            Ok(connection) => return connection,
            Err(ConnectionError::TimedOut) if began.elapsed() < OPEN => {}
            Err(error) => panic!("no connection after {:?}: {error}", began.elapsed()),
        }
    }
}

async fn exchange(
    endpoint: Endpoint,
    connection: Connection,
    answered: Arc<AtomicU64>,
    quit: Arc<AtomicBool>,
) -> Result<QuicReport> {
    let (mut to, mut from) = connection.open_bi().await?;
    let mut longest = Duration::ZERO;
    let mut answer = vec![0; RECORD_BYTES];
    for number in 0u64.. {
        if quit.load(Ordering::Relaxed) {
            break;
        }
        let mut record = vec![number as u8; RECORD_BYTES];
        record[..8].copy_from_slice(&number.to_be_bytes());
        let asked = Instant::now();
        to.write_all(&record).await?;
        from.read_exact(&mut answer).await?;
        longest = longest.max(asked.elapsed());
        ensure!(answer == record, "record {number} came back as another");
        answered.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(PAUSE).await;
    }
    let mtu_bytes = connection.stats().path.current_mtu;
    connection.close(0u32.into(), b"");
    endpoint.wait_idle().await;
    Ok(QuicReport { answered: answered.load(Ordering::Relaxed), longest, mtu_bytes })
}
