//! The QUIC endpoint: one UDP socket with large buffers, paced, and transport settings for a long path.
//!
//! What makes quinn slow or deadly on such a path, and what is set against it: windows of two round
//! trips instead of 1.25 MB; chunks in streams of their own instead of one long stream; controllers that
//! do not take random loss for congestion; a provisioned packet size, so that a burst of loss is not taken
//! for a black hole. Who connects to whom is not decided here.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use longhaul_core::bulk::{ChunkHeader, MAX_CHUNK_BYTES};
use nix::sys::socket::{setsockopt, sockopt};
use quinn::congestion::ControllerFactory;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Connection, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig,
    Runtime, ServerConfig, TokioRuntime, TransportConfig, VarInt,
};
use ring::hmac;
use socket2::{Domain, Protocol, Socket, Type};

use super::config::{CongestionControl, LinkConfig, MIN_MTU_BYTES};
use super::controller::RateWindow;
use super::model::Model;
use super::pacing::{PacedSocket, Paths};
use super::{LinkError, handshake};
use crate::identity::Identity;

/// How many packets the peer may receive before it acknowledges. More cost less, fewer notice loss sooner.
const ACK_EVERY_PACKETS: u32 = 8;

/// The window of one stream: a whole chunk, or one control frame and more.
const STREAM_WINDOW_BYTES: u32 = MAX_CHUNK_BYTES + ChunkHeader::LEN as u32;

/// Opens the endpoint for listening and dialling.
pub(super) fn open(
    config: &LinkConfig,
    identity: &Identity,
    server: QuicServerConfig,
    transport: &Arc<TransportConfig>,
    paths: &Arc<Paths>,
) -> Result<Endpoint, LinkError> {
    let mut server = ServerConfig::with_crypto(Arc::new(server));
    server.transport_config(transport.clone()).migration(true).max_incoming(config.handshake_limit);
    let socket = TokioRuntime
        .wrap_udp_socket(bind(config)?)
        .map_err(|source| LinkError::Bind { address: config.listen, source })?;
    let socket = Arc::new(PacedSocket::new(socket, paths.clone()));
    Endpoint::new_with_abstract_socket(
        endpoint_config(config, identity)?,
        Some(server),
        socket,
        Arc::new(TokioRuntime),
    )
    .map_err(|source| LinkError::Bind { address: config.listen, source })
}

/// How to dial a peer whose key `crypto` expects.
pub(super) fn client_config(crypto: QuicClientConfig, transport: &Arc<TransportConfig>) -> ClientConfig {
    let mut client = ClientConfig::new(Arc::new(crypto));
    client.transport_config(transport.clone());
    client
}

/// The settings of every connection.
pub(super) fn transport_config(config: &LinkConfig) -> Result<Arc<TransportConfig>, LinkError> {
    let too_long = |_bounds| LinkError::Config { expected: "idle_timeout is too long".to_owned() };
    let idle_timeout = IdleTimeout::try_from(config.idle_timeout).map_err(too_long)?;
    // send_fairness stays on: without it quinn finishes a stream it has begun before a more urgent one.
    let connection_window_bytes = connection_window_bytes(config.window_bytes());
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_EVERY_PACKETS));

    let mut transport = TransportConfig::default();
    transport
        .congestion_controller_factory(controller(config))
        .initial_rtt(config.rtt)
        .max_concurrent_bidi_streams(VarInt::from_u32(handshake::CONTROL_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(config.stream_limit))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(varint(connection_window_bytes))
        .send_window(connection_window_bytes)
        .datagram_send_buffer_size(config.datagram_buffer().most)
        .keep_alive_interval(Some(config.keep_alive))
        .max_idle_timeout(Some(idle_timeout))
        .ack_frequency_config(Some(acks))
        .min_mtu(config.mtu_bytes)
        .initial_mtu(config.mtu_bytes)
        .mtu_discovery_config(mtu_discovery(config));
    Ok(Arc::new(transport))
}

/// Lets a connection carry as much as one kind of bulk data may have under way, from now on.
pub(super) fn widen(connection: &Connection, window_bytes: u64) {
    let connection_window_bytes = connection_window_bytes(window_bytes);
    connection.set_send_window(connection_window_bytes);
    connection.set_receive_window(varint(connection_window_bytes));
}

/// Room for both kinds of bulk data, each with a window of its own, and for control.
fn connection_window_bytes(window_bytes: u64) -> u64 {
    2 * window_bytes + 2 * u64::from(STREAM_WINDOW_BYTES)
}

fn varint(bytes: u64) -> VarInt {
    VarInt::from_u64(bytes).unwrap_or(VarInt::MAX)
}

fn controller(config: &LinkConfig) -> Arc<dyn ControllerFactory + Send + Sync> {
    match config.congestion {
        CongestionControl::Model => Arc::new(Model { cap: config.rate, rtt: config.rtt }),
        CongestionControl::Fixed => Arc::new(RateWindow { rate: config.rate, rtt: config.rtt }),
    }
}

fn mtu_discovery(config: &LinkConfig) -> Option<MtuDiscoveryConfig> {
    let limit_bytes = config.mtu_limit_bytes();
    (limit_bytes > config.mtu_bytes).then(|| {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(limit_bytes);
        discovery
    })
}

fn endpoint_config(config: &LinkConfig, identity: &Identity) -> Result<EndpointConfig, LinkError> {
    // The same key after every start: a peer of a gateway that crashed learns so from the first reset.
    let secret = blake3::derive_key("longhaul 2026 QUIC stateless reset", identity.pkcs8_der());
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
    let mut endpoint = EndpointConfig::new(Arc::new(reset_key));
    endpoint
        .max_udp_payload_size(config.mtu_limit_bytes().max(MIN_MTU_BYTES))
        .map_err(|_bounds| LinkError::Config { expected: "mtu is too large".to_owned() })?;
    Ok(endpoint)
}

fn bind(config: &LinkConfig) -> Result<UdpSocket, LinkError> {
    let failed = |source| LinkError::Bind { address: config.listen, source };
    let address = config.listen;
    let socket =
        Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP)).map_err(failed)?;
    if address.is_ipv6() {
        socket.set_only_v6(false).map_err(failed)?;
    }
    socket.set_nonblocking(true).map_err(failed)?;
    raise_buffers(&socket, config.udp_buffer_bytes, address);
    socket.bind(&address.into()).map_err(failed)?;
    Ok(socket.into())
}

/// As large as asked with CAP_NET_ADMIN, else as large as the system allows, with a word about it.
fn raise_buffers(socket: &Socket, wanted_bytes: usize, address: SocketAddr) {
    if setsockopt(socket, sockopt::RcvBufForce, &wanted_bytes).is_err() {
        let _ = socket.set_recv_buffer_size(wanted_bytes);
    }
    if setsockopt(socket, sockopt::SndBufForce, &wanted_bytes).is_err() {
        let _ = socket.set_send_buffer_size(wanted_bytes);
    }
    let granted_bytes = socket.recv_buffer_size().unwrap_or(0);
    if granted_bytes < wanted_bytes {
        tracing::warn!(
            %address, wanted_bytes, granted_bytes,
            "UDP buffers are smaller than asked and may lose packets; raise net.core.rmem_max and wmem_max"
        );
    }
}
