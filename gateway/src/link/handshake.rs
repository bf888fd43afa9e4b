//! From nothing to a connection both sides agree on: QUIC, then one [`Hello`] each way.
//!
//! ```text
//!  dialler:   connect -> open control stream -> send Hello -> read Hello -> judge
//!  listener:  accept  -> take control stream -> read Hello -> send Hello -> judge, wait for the dialler
//! ```
//!
//! The key was proven in TLS before; here the peer's name must match it and a common version must exist.
//! Which of several connections is kept is not decided here.

use std::net::SocketAddr;
use std::time::Duration;

use longhaul_core::ids::SiteName;
use longhaul_core::wire::{
    FrameDecoder, FrameError, Hello, HelloError, Version, VersionMismatch, VersionRange, negotiate,
};
use quinn::{ConnectError, Connection, ConnectionError, Endpoint, Incoming, RecvStream, SendStream, VarInt};

use super::tls::{SERVER_NAME, peer_key};
use crate::identity::PublicKey;

/// How many streams in both directions a connection has: the control stream.
pub(super) const CONTROL_STREAMS: u32 = 1;

/// The control stream passes before everything else that is a stream.
pub(super) const CONTROL_PRIORITY: i32 = i32::MAX;

/// How long a refused dialler gets to read why.
const FAREWELL: Duration = Duration::from_secs(2);

/// How much is read from the control stream at once, in bytes.
const READ_BYTES: usize = 16 << 10;

/// Why a connection was closed by a gateway, as QUIC application error codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CloseCode {
    /// The gateway stops.
    Shutdown = 0,
    /// A newer connection took its place.
    Replaced = 1,
    /// An older connection is kept.
    Duplicate = 2,
    /// Name or version do not fit.
    Refused = 3,
    /// The peer broke the protocol.
    Protocol = 4,
    /// The peer sends more control messages than are digested.
    Overrun = 5,
}

impl CloseCode {
    pub(super) fn close(self, connection: &Connection, reason: &str) {
        connection.close(VarInt::from_u32(self as u32), reason.as_bytes());
    }

    pub(super) fn is_in(self, error: &ConnectionError) -> bool {
        matches!(error, ConnectionError::ApplicationClosed(close)
            if close.error_code == VarInt::from_u32(self as u32))
    }
}

/// Why no link came about.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("Cannot dial this address")]
    Dial(#[from] ConnectError),
    #[error("Nobody answered in time")]
    TimedOut,
    #[error("The peer does not accept this site's key; is this site's public key in its configuration?")]
    KeyRefused,
    #[error("Whoever answers there has another key than the configured one")]
    OtherKey,
    #[error("The connection ended during the handshake")]
    Ended(#[source] ConnectionError),
    #[error("The peer closed the control stream during the handshake")]
    NoHello,
    #[error(transparent)]
    Hello(#[from] HelloError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Version(#[from] VersionMismatch),
    #[error("The peer calls itself {claimed}, but its key is configured as {configured}'s")]
    OtherName { claimed: SiteName, configured: SiteName },
    #[error("The listener knows no peer with this key")]
    UnknownPeer,
}

impl HandshakeError {
    /// Whether trying again will not help until somebody changes something.
    pub(super) fn is_lasting(&self) -> bool {
        match self {
            Self::KeyRefused | Self::OtherKey | Self::Version(_) | Self::OtherName { .. } => true,
            Self::Dial(_) | Self::Hello(_) | Self::Frame(_) | Self::UnknownPeer => true,
            Self::TimedOut | Self::Ended(_) | Self::NoHello => false,
        }
    }
}

impl From<ConnectionError> for HandshakeError {
    fn from(error: ConnectionError) -> Self {
        match &error {
            ConnectionError::TimedOut => Self::TimedOut,
            ConnectionError::ConnectionClosed(close) if is_tls_alert(close.error_code) => Self::KeyRefused,
            ConnectionError::TransportError(local) if is_tls_alert(local.code) => Self::OtherKey,
            ConnectionError::ConnectionClosed(_)
            | ConnectionError::TransportError(_)
            | ConnectionError::VersionMismatch
            | ConnectionError::ApplicationClosed(_)
            | ConnectionError::Reset
            | ConnectionError::LocallyClosed
            | ConnectionError::CidsExhausted => Self::Ended(error),
        }
    }
}

/// CRYPTO_ERROR codes carry a TLS alert (RFC 9001, section 4.8).
fn is_tls_alert(code: quinn::TransportErrorCode) -> bool {
    (0x100..0x200).contains(&u64::from(code))
}

/// What this side says of itself.
#[derive(Debug, Clone)]
pub(super) struct Introduction {
    pub(super) hello: Hello,
}

/// A connection both sides agree on.
#[derive(Debug)]
pub(super) struct Established {
    pub(super) connection: Connection,
    pub(super) control_send: SendStream,
    pub(super) control_receive: ControlReader,
    pub(super) peer: Hello,
    pub(super) version: Version,
    /// This side dialled.
    pub(super) dialled: bool,
}

impl Introduction {
    /// Dials `address`, where the site `name` should be.
    pub(super) async fn dial(
        self,
        endpoint: Endpoint,
        client: quinn::ClientConfig,
        address: SocketAddr,
        name: SiteName,
    ) -> Result<Established, HandshakeError> {
        let connection = endpoint.connect_with(client, address, SERVER_NAME)?.await?;
        let result = self.introduce(&connection).await;
        let (control_send, control_receive, peer) = closing(result, &connection)?;
        let version = closing(self.judge(&peer, &name), &connection)?;
        Ok(Established { connection, control_send, control_receive, peer, version, dialled: true })
    }

    async fn introduce(
        &self,
        connection: &Connection,
    ) -> Result<(SendStream, ControlReader, Hello), HandshakeError> {
        let (mut send, receive) = connection.open_bi().await?;
        let mut control = ControlReader::new(receive);
        self.send(connection, &mut send).await?;
        let peer = control.hello(connection).await?;
        Ok((send, control, peer))
    }

    /// Answers a dialler; `name_of` tells whose key it has proven.
    pub(super) async fn answer(
        self,
        incoming: Incoming,
        name_of: impl Fn(&PublicKey) -> Option<SiteName>,
    ) -> Result<(SiteName, Established), HandshakeError> {
        let connection = incoming.await?;
        let name = peer_key(&connection).and_then(|key| name_of(&key));
        let name = closing(name.ok_or(HandshakeError::UnknownPeer), &connection)?;
        let (mut send, receive) = connection.accept_bi().await?;
        let mut control = ControlReader::new(receive);
        let peer = closing(control.hello(&connection).await, &connection)?;
        self.send(&connection, &mut send).await?;
        match self.judge(&peer, &name) {
            Ok(version) => {
                let established = Established {
                    connection,
                    control_send: send,
                    control_receive: control,
                    peer,
                    version,
                    dialled: false,
                };
                Ok((name, established))
            }
            Err(error) => {
                // Closing now would overtake the hello that tells the dialler why.
                let _ = send.finish();
                let _ = tokio::time::timeout(FAREWELL, connection.closed()).await;
                closing(Err(error), &connection)
            }
        }
    }

    async fn send(&self, connection: &Connection, send: &mut SendStream) -> Result<(), HandshakeError> {
        let _ = send.set_priority(CONTROL_PRIORITY);
        let frame = self.hello.encode()?;
        send.write_all(&frame).await.map_err(|_write| ended(connection))
    }

    fn judge(&self, peer: &Hello, name: &SiteName) -> Result<Version, HandshakeError> {
        if peer.site != *name {
            return Err(HandshakeError::OtherName { claimed: peer.site.clone(), configured: name.clone() });
        }
        let ours: VersionRange = self.hello.versions;
        Ok(negotiate(ours, peer.versions)?)
    }
}

/// Frames from the control stream.
#[derive(Debug)]
pub(super) struct ControlReader {
    stream: RecvStream,
    decoder: FrameDecoder,
    buffer: Box<[u8]>,
}

impl ControlReader {
    fn new(stream: RecvStream) -> Self {
        Self { stream, decoder: FrameDecoder::new(), buffer: vec![0; READ_BYTES].into_boxed_slice() }
    }

    /// The next frame's body; `None` when the stream ended, with the connection or before it.
    pub(super) async fn next_frame(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        loop {
            if let Some(body) = self.decoder.next_frame()? {
                return Ok(Some(body));
            }
            match self.stream.read(&mut self.buffer).await {
                Ok(Some(length)) => self.decoder.push(&self.buffer[..length]),
                Ok(None) | Err(_) => return Ok(None),
            }
        }
    }

    async fn hello(&mut self, connection: &Connection) -> Result<Hello, HandshakeError> {
        let body = self.next_frame().await?.ok_or_else(|| ended(connection))?;
        Ok(Hello::decode(&body)?)
    }
}

fn ended(connection: &Connection) -> HandshakeError {
    connection.close_reason().map_or(HandshakeError::NoHello, HandshakeError::from)
}

/// Closes the connection when the handshake failed on this side, and tells the peer why.
fn closing<T>(result: Result<T, HandshakeError>, connection: &Connection) -> Result<T, HandshakeError> {
    if let Err(error) = &result {
        CloseCode::Refused.close(connection, &error.to_string());
    }
    result
}
