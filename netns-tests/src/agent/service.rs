//! Starts the service: its threads, its ports, its arguments.

use std::future::Future;
use std::io;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use clap::Parser;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::control::{Control, Counters};
use super::dirt::Dirt;
use super::memory::Region;
use super::worker::{DiskTask, LogTask, MemoryTask, Worker};
use super::{
    CONTROL_PORT, DOWNLOAD_PORT, IDLE_PORT, QUIC_PORT, RECORD_PORT, RELAY_PORT, UDP_PORT, UPLOAD_PORT,
    download, exchange, quic, relay, upload,
};

/// Arguments of the service. In the guest they come from `lab.agent=A,B,C` on the kernel's command line.
#[derive(Debug, Clone, Parser)]
#[command(name = "guest-agent", about = "The laboratory's service inside the guest")]
pub struct AgentOptions {
    /// Folder with the log, the blocks and their index
    #[arg(long, default_value = "/var/lib/lab")]
    pub state: PathBuf,
    /// Keeps a second log at this path
    #[arg(long)]
    pub second_log: Option<PathBuf>,
    /// Log records a second, each written with fsync
    #[arg(long, default_value_t = 10)]
    pub log_per_s: u64,
    /// KiB of disk rewritten a second, index included
    #[arg(long, default_value_t = 256)]
    pub disk_kib_per_s: u64,
    /// KiB of memory touched a second
    #[arg(long, default_value_t = 2048)]
    pub memory_kib_per_s: u64,
    /// MiB of memory over which pages are touched
    #[arg(long, default_value_t = 32)]
    pub memory_mib: u64,
    /// Bytes of each touched page that do not compress; the rest is zero
    #[arg(long, default_value_t = 2048)]
    pub memory_random_bytes: usize,
    /// Added to every port number
    #[arg(long, default_value_t = 0)]
    pub port_offset: u16,
}

/// Connections per port at one time; more wait in the kernel's queue. Each costs about 20 KiB.
const CONNECTIONS: usize = 256;

/// What waits for the UDP echo. A guest that a busy host leaves without a processor for a second or two must not lose in its
/// own socket what the network has brought.
const UDP_BUFFER_BYTES: usize = 4 << 20;

/// Runs the service until the process ends.
///
/// # Errors
/// Its files are damaged or a port is taken.
pub fn agent_main(options: AgentOptions) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: AgentOptions) -> Result<()> {
    let control = start_workers(&options)?;
    let counters = Arc::clone(&control.counters);
    let boot_id = Arc::clone(&control.boot_id);
    let port = |port: u16| port + options.port_offset;
    let records = listen(port(RECORD_PORT))?;
    let idle = listen(port(IDLE_PORT))?;
    let downloads = listen(port(DOWNLOAD_PORT))?;
    let controls = listen(port(CONTROL_PORT))?;
    let relays = listen(port(RELAY_PORT))?;
    let uploads = listen(port(UPLOAD_PORT))?;
    let udp =
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port(UDP_PORT))).await.context("Cannot bind the UDP port")?;
    setsockopt(&udp, sockopt::RcvBufForce, &UDP_BUFFER_BYTES)
        .context("Cannot enlarge the UDP echo's buffer")?;
    let quic = std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port(QUIC_PORT)));
    let quic = quic::listen(quic.context("Cannot bind the QUIC port")?)?;
    let idle_answer = move |stream| {
        let boot_id = Arc::clone(&boot_id);
        async move { exchange::serve_idle(stream, &boot_id).await }
    };
    tokio::select! {
        result = accept(records, Some(Arc::clone(&counters)), exchange::serve_records) => result?,
        result = accept(idle, Some(Arc::clone(&counters)), idle_answer) => result?,
        result = accept(downloads, Some(Arc::clone(&counters)), download::serve) => result?,
        result = accept(uploads, Some(Arc::clone(&counters)), upload::serve) => result?,
        result = accept(relays, Some(counters), relay::serve) => result?,
        result = accept(controls, None, move |stream| control.clone().serve(stream)) => result?,
        result = exchange::serve_udp(udp) => result?,
        result = quic::serve(quic) => result?,
    }
    Ok(())
}

fn start_workers(options: &AgentOptions) -> Result<Control> {
    let log = LogTask::open(&options.state.join("log"), options.log_per_s).context("Cannot open the log")?;
    let second =
        options.second_log.as_ref().map(|path| LogTask::open(path, options.log_per_s)).transpose()?;
    let dirt = Dirt::open(&options.state).context("Cannot open the file of blocks")?;
    let disk = DiskTask { dirt, kib_per_s: options.disk_kib_per_s, error: None };
    let region = Region::new(options.memory_mib << 20, options.memory_random_bytes);
    let memory = MemoryTask { region, kib_per_s: options.memory_kib_per_s };
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(Control {
        boot_id: boot_id.trim().into(),
        log: Worker::start("log", log)?,
        second_log: second.map(|task| Worker::start("second-log", task)).transpose()?,
        disk: Worker::start("disk", disk)?,
        memory: Worker::start("memory", memory)?,
        counters: Arc::new(Counters::default()),
    })
}

/// Listens on all addresses of both families.
fn listen(port: u16) -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket
        .bind(&std::net::SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())
        .with_context(|| format!("Cannot bind port {port}"))?;
    // Who connects while the machine stands still or its host is busy comes all at once. Beyond this the kernel answers with
    // SYN cookies, and a connection whose first words were dropped then ends in a reset.
    socket.listen(4096)?;
    Ok(TcpListener::from_std(socket.into())?)
}

async fn accept<F, A>(listener: TcpListener, counters: Option<Arc<Counters>>, answer: F) -> io::Result<()>
where
    F: Fn(TcpStream) -> A,
    A: Future<Output = io::Result<()>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.map_err(io::Error::other)?;
        let (stream, _) = listener.accept().await?;
        let counters = counters.clone();
        if let Some(counters) = &counters {
            counters.accepted.fetch_add(1, Ordering::Relaxed);
            counters.open.fetch_add(1, Ordering::Relaxed);
        }
        let served = answer(stream);
        tokio::spawn(async move {
            // How a client ends its connection is the client's business.
            let _ = served.await;
            if let Some(counters) = counters {
                counters.open.fetch_sub(1, Ordering::Relaxed);
            }
            drop(place);
        });
    }
}
