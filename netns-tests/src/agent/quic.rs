//! The QUIC echo: sends back what comes on each stream. Its key is made at its start and nobody looks at it, because a
//! flow is tested here and no identity.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime, TransportConfig, VarInt,
};
use ring::signature::Ed25519KeyPair;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, Error, PeerIncompatible, SignatureScheme, version};

/// Listens on `socket`. To be called inside a runtime.
///
/// # Errors
/// There is no randomness for a key, or the socket does not do.
pub fn listen(socket: std::net::UdpSocket) -> Result<Endpoint> {
    Ok(Endpoint::new(EndpointConfig::default(), Some(server_config()?), socket, Arc::new(TokioRuntime))?)
}

/// How to answer, with a key made now.
///
/// # Errors
/// There is no randomness for a key.
pub fn server_config() -> Result<ServerConfig> {
    let randomness = ring::rand::SystemRandom::new();
    let key = Ed25519KeyPair::generate_pkcs8(&randomness).ok().context("There is no randomness")?;
    let key = PrivatePkcs8KeyDer::from(key.as_ref().to_vec());
    let key = rustls::crypto::ring::sign::any_eddsa_type(&key)?;
    let public = key.public_key().context("The key has no public half")?;
    let certified = CertifiedKey::new(vec![CertificateDer::from(public.to_vec())], key);
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::new(certified))));
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(config)?));
    config.transport_config(transport());
    Ok(config)
}

/// How to dial an echo, whoever it is.
///
/// # Errors
/// The TLS stack does not do QUIC.
pub fn client_config() -> Result<ClientConfig> {
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(config)?));
    config.transport_config(transport());
    Ok(config)
}

/// Answers all who dial, for ever.
///
/// # Errors
/// The endpoint was closed.
pub async fn serve(endpoint: Endpoint) -> io::Result<()> {
    while let Some(incoming) = endpoint.accept().await {
        // How a client ends its connection is the client's business.
        tokio::spawn(async { drop(echo(incoming).await) });
    }
    Err(io::ErrorKind::NotConnected.into())
}

async fn echo(incoming: Incoming) -> Result<()> {
    let connection = incoming.await?;
    loop {
        let (mut to, mut from) = connection.accept_bi().await?;
        tokio::io::copy(&mut from, &mut to).await?;
        to.finish()?;
    }
}

/// Behind a cut the next repetition may be later than QUIC's own 30 s without a word.
fn transport() -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport.max_idle_timeout(Some(VarInt::from_u32(60_000).into()));
    Arc::new(transport)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Takes every key.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_said_comes_back() {
        let bind = || std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let server = listen(bind()).unwrap();
        let address = server.local_addr().unwrap();
        tokio::spawn(serve(server));
        let client = Endpoint::new(EndpointConfig::default(), None, bind(), Arc::new(TokioRuntime)).unwrap();
        let dialling = client.connect_with(client_config().unwrap(), address, "echo").unwrap();
        let (mut to, mut from) = dialling.await.unwrap().open_bi().await.unwrap();
        to.write_all(b"what is said").await.unwrap();
        to.finish().unwrap();
        assert_eq!(from.read_to_end(100).await.unwrap(), b"what is said");
    }
}
