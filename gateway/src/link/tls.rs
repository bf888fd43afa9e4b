//! TLS 1.3 with raw public keys (RFC 7250): who a peer is, proven by its Ed25519 key, and nothing else.
//!
//! The side that dials accepts one key, the side that listens those of all configured peers. Sessions are
//! never resumed, so that a key taken out of the configuration is refused from then on. What a peer may do
//! is not decided here.

use std::collections::BTreeSet;
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, SignatureScheme,
    version,
};
use tokio::sync::mpsc;

use super::LinkError;
use crate::identity::{Identity, PublicKey};

/// The application protocol; its number changes only when not even a hello would be understood.
const ALPN: &[u8] = b"longhaul/1";

/// What a dialler puts as the server's name; nobody looks at it.
pub(super) const SERVER_NAME: &str = "longhaul";

/// A key that was refused, for the log.
#[derive(Debug)]
pub(super) enum RefusedKey {
    /// An Ed25519 key that is not configured.
    Unknown(PublicKey),
    /// Something else.
    NotEd25519,
}

/// This side's half of every handshake.
pub(super) struct Tls {
    provider: Arc<CryptoProvider>,
    certified_key: Arc<CertifiedKey>,
    refused: mpsc::Sender<RefusedKey>,
}

impl Tls {
    /// For `identity`; refused keys are reported through `refused`, as long as it has room.
    pub(super) fn new(identity: &Identity, refused: mpsc::Sender<RefusedKey>) -> Result<Self, LinkError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(identity.pkcs8_der().to_vec());
        let signing_key = rustls::crypto::ring::sign::any_eddsa_type(&key).map_err(LinkError::Tls)?;
        let spki = CertificateDer::from(identity.public_key().to_spki());
        let certified_key = Arc::new(CertifiedKey::new(vec![spki], signing_key));
        Ok(Self { provider, certified_key, refused })
    }

    /// For listening: any of `keys` may dial.
    pub(super) fn server(&self, keys: BTreeSet<PublicKey>) -> Result<QuicServerConfig, LinkError> {
        let mut config = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&version::TLS13])
            .map_err(LinkError::Tls)?
            .with_client_cert_verifier(Arc::new(self.verifier(keys)))
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(self.certified_key.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        QuicServerConfig::try_from(config).map_err(|_no_suite| LinkError::NoInitialCipherSuite)
    }

    /// For dialling the peer with `key`.
    pub(super) fn client(&self, key: PublicKey) -> Result<QuicClientConfig, LinkError> {
        let mut config = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&version::TLS13])
            .map_err(LinkError::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(self.verifier(BTreeSet::from([key]))))
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
                self.certified_key.clone(),
            )));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        QuicClientConfig::try_from(config).map_err(|_no_suite| LinkError::NoInitialCipherSuite)
    }

    fn verifier(&self, accepted: BTreeSet<PublicKey>) -> PinnedKeys {
        PinnedKeys { accepted, provider: self.provider.clone(), refused: self.refused.clone() }
    }
}

/// The key that the other end of a connection has proven to hold.
pub(super) fn peer_key(connection: &quinn::Connection) -> Option<PublicKey> {
    let identity = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    PublicKey::from_spki(identity.first()?)
}

/// Accepts exactly these keys, from either end.
#[derive(Debug)]
struct PinnedKeys {
    accepted: BTreeSet<PublicKey>,
    provider: Arc<CryptoProvider>,
    refused: mpsc::Sender<RefusedKey>,
}

impl PinnedKeys {
    fn check(&self, spki: &CertificateDer<'_>) -> Result<(), Error> {
        let refused = match PublicKey::from_spki(spki) {
            Some(key) if self.accepted.contains(&key) => return Ok(()),
            Some(key) => RefusedKey::Unknown(key),
            None => RefusedKey::NotEd25519,
        };
        // A full queue loses a log line of many; the handshake is refused all the same.
        let _ = self.refused.try_send(refused);
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn check_signature(
        &self,
        message: &[u8],
        spki: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let spki = SubjectPublicKeyInfoDer::from(spki.as_ref());
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &spki, signature, algorithms)
    }
}

/// What both verifier traits ask of a verifier that knows TLS 1.3 and raw Ed25519 keys only.
macro_rules! signatures_by_raw_keys {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::PeerIncompatible(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.check_signature(message, cert, dss)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for PinnedKeys {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    signatures_by_raw_keys!();
}

impl ClientCertVerifier for PinnedKeys {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    signatures_by_raw_keys!();
}
