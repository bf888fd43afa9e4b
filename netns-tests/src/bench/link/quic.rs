//! quinn with one of its own congestion controllers and otherwise as the gateway uses it: large windows, large socket
//! buffers, chunks on short streams, a known packet size. So only the controller is compared.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use gateway::chunk::MAX_CHUNK;
use quinn::congestion::{BbrConfig, CubicConfig, NewRenoConfig};
use quinn::{Connection, Endpoint, EndpointConfig, TokioRuntime, TransportConfig, VarInt};
use tokio::task::JoinSet;

use super::end::{Arrived, Plan};
use super::sender::Sender;
use crate::agent::quic as agent;

const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
const MTU_BYTES: u16 = 1400;
/// As many chunks as the gateway has under way.
const MAX_STREAMS: u64 = 512;

/// Sends, or receives.
pub(super) async fn run(plan: &Plan, arrived: &Arrived) -> Result<()> {
    let transport = Arc::new(transport(plan)?);
    if plan.sends {
        let endpoint =
            Endpoint::new(EndpointConfig::default(), None, socket(plan.listen)?, Arc::new(TokioRuntime))?;
        let mut client = agent::client_config()?;
        client.transport_config(transport);
        let connection = endpoint.connect_with(client, plan.remote, "bench")?.await?;
        return send(&connection, plan.held_bytes()).await;
    }
    let mut server = agent::server_config()?;
    server.transport_config(transport);
    let endpoint =
        Endpoint::new(EndpointConfig::default(), Some(server), socket(plan.listen)?, Arc::new(TokioRuntime))?;
    let connection = endpoint.accept().await.context("The endpoint was closed")?.await?;
    receive(&connection, arrived).await
}

fn transport(plan: &Plan) -> Result<TransportConfig> {
    let window_bytes = (3 * plan.held_bytes()).max(8 << 20);
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u64(window_bytes)?)
        .send_window(window_bytes)
        .max_concurrent_uni_streams(VarInt::from_u64(MAX_STREAMS)?)
        .initial_rtt(Duration::from_millis(plan.rtt_ms))
        .min_mtu(MTU_BYTES)
        .initial_mtu(MTU_BYTES)
        .mtu_discovery_config(None);
    match plan.sender {
        Sender::QuinnReno => transport.congestion_controller_factory(Arc::new(NewRenoConfig::default())),
        Sender::QuinnBbr => transport.congestion_controller_factory(Arc::new(BbrConfig::default())),
        Sender::QuinnCubic
        | Sender::Ours
        | Sender::OursExact
        | Sender::Fixed
        | Sender::TcpCubic
        | Sender::TcpBbr
        | Sender::S2nQuicBbr => transport.congestion_controller_factory(Arc::new(CubicConfig::default())),
    };
    Ok(transport)
}

fn socket(address: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(address).with_context(|| format!("Cannot listen on {address}"))?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES)?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::SndBufForce, &SOCKET_BUFFER_BYTES)?;
    Ok(socket)
}

async fn send(connection: &Connection, held_bytes: u64) -> Result<()> {
    let chunk = bytes::Bytes::from(vec![0x5a; MAX_CHUNK]);
    let streams = (2 * held_bytes / MAX_CHUNK as u64 + 2).min(MAX_STREAMS);
    let mut sending = JoinSet::new();
    for _ in 0..streams {
        let (connection, chunk) = (connection.clone(), chunk.clone());
        sending.spawn(async move {
            loop {
                let mut stream = connection.open_uni().await?;
                stream.write_chunk(chunk.clone()).await?;
                stream.finish()?;
                stream.stopped().await?;
            }
        });
    }
    let ended: Result<()> = sending.join_next().await.context("Nothing is sent")??;
    ended
}

async fn receive(connection: &Connection, arrived: &Arrived) -> Result<()> {
    loop {
        let mut stream = connection.accept_uni().await?;
        let arrived = arrived.clone();
        tokio::spawn(async move {
            // A stream ends with its connection, which ends this process.
            while let Ok(Some(chunk)) = stream.read_chunk(MAX_CHUNK, true).await {
                arrived.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
            }
        });
        if connection.close_reason().is_some() {
            bail!("The connection has ended");
        }
    }
}
