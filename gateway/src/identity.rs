//! A site's identity: one Ed25519 key in one file, and the public keys of the sites it trusts.
//!
//! As in WireGuard there is no authority: the operator carries public keys from site to site. The file
//! is an ordinary PKCS#8 PEM (RFC 8410), so `openssl genpkey -algorithm ed25519` makes one too. Who
//! may do what is not decided here.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

/// The longest key file that is read, in bytes; a key has about 200.
const MAX_FILE_BYTES: u64 = 16 << 10;

/// `SubjectPublicKeyInfo` of an Ed25519 key up to the key itself (RFC 8410, section 4).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be opened, read or made.
    #[error("Cannot {action} the key file {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Others than the owner may read the file.
    #[error(
        "The key file {path} may be read by others (mode {mode:04o}); run chmod 600 {path} and consider a new key"
    )]
    ReadableByOthers {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The file holds no Ed25519 key.
    #[error("The key file {path} holds no Ed25519 private key in PKCS#8 PEM; make one with `longhaul key`")]
    NotAKey {
        /// The file.
        path: PathBuf,
    },
    /// No key could be made.
    #[error("The system's random number generator gives no key")]
    NoRandomness,
}

/// The private key of this site.
#[derive(Clone)]
pub struct Identity {
    pkcs8: Vec<u8>,
    public: PublicKey,
}

impl Identity {
    /// A new key, in memory only.
    pub fn generate() -> Result<Self, IdentityError> {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_unspecified| IdentityError::NoRandomness)?;
        Self::from_pkcs8(pkcs8.as_ref()).ok_or(IdentityError::NoRandomness)
    }

    /// Reads the key from `path`; refuses a file that others than its owner can read.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let failed = |source| file_error("read", path, source);
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::ReadableByOthers { path: path.to_owned(), mode });
        }
        let mut pem = String::new();
        file.take(MAX_FILE_BYTES).read_to_string(&mut pem).map_err(failed)?;
        let not_a_key = || IdentityError::NotAKey { path: path.to_owned() };
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(|_no_pem| not_a_key())?;
        Self::from_pkcs8(der.secret_pkcs8_der()).ok_or_else(not_a_key)
    }

    /// Writes the key to a new file that only its owner can read. An existing file is never replaced.
    pub fn save(&self, path: &Path) -> Result<(), IdentityError> {
        let failed = |source| file_error("make", path, source);
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        file.write_all(self.to_pem().as_bytes()).map_err(failed)?;
        file.sync_all().map_err(failed)
    }

    /// The public half, for the other sites' configurations.
    pub fn public_key(&self) -> PublicKey {
        self.public
    }

    /// The private key in PKCS#8 DER, for the TLS stack.
    pub(crate) fn pkcs8_der(&self) -> &[u8] {
        &self.pkcs8
    }

    fn from_pkcs8(pkcs8: &[u8]) -> Option<Self> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(pkcs8).ok()?;
        let public = PublicKey(pair.public_key().as_ref().try_into().ok()?);
        Some(Self { pkcs8: pkcs8.to_vec(), public })
    }

    fn to_pem(&self) -> String {
        let base64 = BASE64.encode(&self.pkcs8);
        let mut pem = String::from("-----BEGIN PRIVATE KEY-----\n");
        let mut rest = base64.as_str();
        while !rest.is_empty() {
            let (line, tail) = rest.split_at(rest.len().min(64));
            pem.push_str(line);
            pem.push('\n');
            rest = tail;
        }
        pem.push_str("-----END PRIVATE KEY-----\n");
        pem
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("public", &self.public).finish_non_exhaustive()
    }
}

/// A site's public key: 32 bytes, written in base64 (44 characters, as WireGuard's are).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

/// Text that is no public key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a public key: 44 characters of base64 as `longhaul key` prints them")]
pub struct InvalidPublicKey(String);

impl PublicKey {
    /// A short name for logs and for comparing over the telephone.
    pub fn fingerprint(&self) -> Fingerprint {
        let hash = blake3::hash(&self.0);
        Fingerprint(*hash.as_bytes().first_chunk().expect("a BLAKE3 hash has 32 bytes"))
    }

    /// The key as `SubjectPublicKeyInfo` (RFC 8410), which a TLS raw public key consists of (RFC 7250).
    pub(crate) fn to_spki(self) -> Vec<u8> {
        [SPKI_PREFIX.as_slice(), &self.0].concat()
    }

    /// The key in a `SubjectPublicKeyInfo`; `None` when it is of another kind.
    pub(crate) fn from_spki(spki: &[u8]) -> Option<Self> {
        Some(Self(spki.strip_prefix(&SPKI_PREFIX)?.try_into().ok()?))
    }
}

impl TryFrom<String> for PublicKey {
    type Error = InvalidPublicKey;

    fn try_from(text: String) -> Result<Self, InvalidPublicKey> {
        let bytes = BASE64.decode(text.trim()).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or(InvalidPublicKey(text))
    }
}

impl FromStr for PublicKey {
    type Err = InvalidPublicKey;

    fn from_str(text: &str) -> Result<Self, InvalidPublicKey> {
        Self::try_from(text.to_owned())
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        key.to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The first 8 bytes of the BLAKE3 hash of a public key, written as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 8]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn file_error(action: &'static str, path: &Path, source: io::Error) -> IdentityError {
    IdentityError::File { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_saved_key_is_loaded_again_and_only_its_owner_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        let identity = Identity::generate().unwrap();
        identity.save(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(Identity::load(&path).unwrap().public_key(), identity.public_key());
        assert!(matches!(identity.save(&path), Err(IdentityError::File { action: "make", .. })));
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        Identity::generate().unwrap().save(&path).unwrap();
        for mode in [0o640, 0o604, 0o660, 0o644] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let error = Identity::load(&path).unwrap_err();
            assert!(matches!(error, IdentityError::ReadableByOthers { .. }), "{mode:o}: {error}");
        }
    }

    #[test]
    fn a_file_without_a_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        file.unwrap().write_all(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").unwrap();
        assert!(matches!(Identity::load(&path), Err(IdentityError::NotAKey { .. })));
        assert!(matches!(Identity::load(&dir.path().join("none")), Err(IdentityError::File { .. })));
    }

    #[test]
    fn a_key_made_by_openssl_is_loaded() {
        // openssl genpkey -algorithm ed25519; openssl pkey -pubout
        let pem = "-----BEGIN PRIVATE KEY-----\n\
                   MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n\
                   -----END PRIVATE KEY-----\n";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        file.unwrap().write_all(pem.as_bytes()).unwrap();
        let public = Identity::load(&path).unwrap().public_key();
        // RFC 8032, section 7.1, test 1
        assert_eq!(public.to_string(), "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=");
    }

    #[test]
    fn public_keys_survive_text_and_spki() {
        let key = Identity::generate().unwrap().public_key();
        assert_eq!(key.to_string().len(), 44);
        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!(PublicKey::from_spki(&key.to_spki()), Some(key));
        assert_eq!(PublicKey::from_spki(&key.to_spki()[1..]), None);
        assert_eq!(key.fingerprint().to_string().len(), 16);
        for bad in ["", "abc", "AAAA", &"A".repeat(44)] {
            assert!(bad.parse::<PublicKey>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_private_key_is_not_in_the_debug_output() {
        let identity = Identity::generate().unwrap();
        let secret = BASE64.encode(identity.pkcs8_der());
        assert!(!format!("{identity:?}").contains(&secret[30..60]));
    }
}
