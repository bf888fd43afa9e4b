//! TSIG keys (RFC 8945): reading them from a file or a short form, and never printing them.
//!
//! Only the HMACs that are still recommended; no MD5, no SHA-1, no truncated MACs, no SIG(0), no GSS-TSIG.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hickory_proto::rr::TSigner;
use hickory_proto::rr::rdata::tsig::TsigAlgorithm;

use crate::error::Error;
use crate::name::DnsName;

/// The shortest secret that is taken, in bytes: half of what RFC 8945 recommends for hmac-sha256.
pub const MIN_SECRET_BYTES: usize = 16;

/// The longest key file that is read, in bytes.
const MAX_KEY_FILE_BYTES: u64 = 64 * 1024;

/// The MAC of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Algorithm {
    /// hmac-sha256, the default everywhere.
    #[default]
    HmacSha256,
    /// hmac-sha384.
    HmacSha384,
    /// hmac-sha512.
    HmacSha512,
}

/// A secret shared with the name server. `Debug` shows its name and algorithm, nothing shows its secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    name: DnsName,
    algorithm: Algorithm,
    secret: Vec<u8>,
}

impl Key {
    /// A key; `secret` is raw bytes, at least [`MIN_SECRET_BYTES`] of them.
    pub fn new(name: DnsName, algorithm: Algorithm, secret: Vec<u8>) -> Result<Self, Error> {
        if secret.len() < MIN_SECRET_BYTES {
            return Err(Error::Config(format!(
                "Key {name} has {} bytes of secret; make one with `tsig-keygen {name}`",
                secret.len()
            )));
        }
        Ok(Self { name, algorithm, secret })
    }

    /// The key's name as the server knows it.
    pub fn name(&self) -> &DnsName {
        &self.name
    }

    /// The key's MAC.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Reads a file that holds either BIND's `key "NAME" { algorithm ...; secret "..."; };` (exactly one) or
    /// `NAME:ALGORITHM:BASE64`.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let refused =
            |reason: String| Error::Config(format!("Cannot read the key file {}: {reason}", path.display()));
        let size = std::fs::metadata(path).map_err(|error| refused(error.to_string()))?.len();
        if size > MAX_KEY_FILE_BYTES {
            return Err(refused(format!("it has {size} bytes, a key file has at most {MAX_KEY_FILE_BYTES}")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| refused(error.to_string()))?;
        text.parse().map_err(|error: Error| refused(error.to_string()))
    }

    /// The signer of messages under this key; `fudge_s` in seconds.
    pub(crate) fn signer(&self, fudge_s: u16) -> Result<TSigner, Error> {
        TSigner::new(self.secret.clone(), self.algorithm.wire(), self.name.as_name().clone(), fudge_s)
            .map_err(|error| Error::Config(format!("Key {} cannot sign: {error}", self.name)))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({} {} [redacted])", self.name, self.algorithm)
    }
}

impl FromStr for Key {
    type Err = Error;

    /// Takes both forms that [`Key::from_file`] takes. Errors never quote the text: it holds the secret.
    fn from_str(text: &str) -> Result<Self, Error> {
        let text = without_comments(text);
        if text.contains('{') { from_bind(&text) } else { from_short(text.trim()) }
    }
}

fn from_short(text: &str) -> Result<Key, Error> {
    let mut fields = text.splitn(3, ':');
    let (Some(name), Some(algorithm), Some(secret)) = (fields.next(), fields.next(), fields.next()) else {
        return Err(Error::Config(
            "A key is NAME:ALGORITHM:BASE64 or BIND's key \"NAME\" { ... };".to_owned(),
        ));
    };
    assemble(name, algorithm, secret)
}

fn from_bind(text: &str) -> Result<Key, Error> {
    let expected = || Error::Config("Expected key \"NAME\" { algorithm ...; secret \"...\"; };".to_owned());
    let (head, rest) = text.split_once('{').ok_or_else(expected)?;
    let (body, tail) = rest.split_once('}').ok_or_else(expected)?;
    if !matches!(tail.trim(), "" | ";") {
        return Err(Error::Config("A key file holds one key and nothing else".to_owned()));
    }
    let mut head = head.split_whitespace();
    let (Some("key"), Some(name), None) = (head.next(), head.next(), head.next()) else {
        return Err(expected());
    };
    let (mut algorithm, mut secret) = (None, None);
    for statement in body.split(';').map(str::trim).filter(|statement| !statement.is_empty()) {
        match statement.split_once(char::is_whitespace) {
            Some(("algorithm", value)) => algorithm = Some(value.trim()),
            Some(("secret", value)) => secret = Some(value.trim()),
            Some(_) | None => return Err(expected()),
        }
    }
    assemble(
        unquoted(name),
        unquoted(algorithm.ok_or_else(expected)?),
        unquoted(secret.ok_or_else(expected)?),
    )
}

fn assemble(name: &str, algorithm: &str, secret: &str) -> Result<Key, Error> {
    let name: DnsName = name.trim().parse().map_err(|error| Error::Config(format!("Key name: {error}")))?;
    let secret = STANDARD
        .decode(secret.trim())
        .map_err(|_| Error::Config(format!("The secret of key {name} is not base64")))?;
    Key::new(name, algorithm.trim().parse()?, secret)
}

fn unquoted(text: &str) -> &str {
    text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text)
}

/// Removes `/* */`, and `//` and `#` where a word begins (base64 holds slashes).
fn without_comments(text: &str) -> String {
    let mut blocks = text.split("/*");
    let mut kept = blocks.next().unwrap_or_default().to_owned();
    for block in blocks {
        kept.push_str(block.split_once("*/").map_or("", |(_, rest)| rest));
    }
    let code = |line: &str| {
        let begins = |at: usize| at == 0 || line[..at].ends_with(|c: char| c.is_whitespace() || c == ';');
        let comment = line
            .match_indices("//")
            .chain(line.match_indices('#'))
            .map(|(at, _)| at)
            .filter(|at| begins(*at));
        line[..comment.min().unwrap_or(line.len())].to_owned()
    };
    kept.lines().map(code).collect::<Vec<_>>().join("\n")
}

impl Algorithm {
    fn wire(self) -> TsigAlgorithm {
        match self {
            Self::HmacSha256 => TsigAlgorithm::HmacSha256,
            Self::HmacSha384 => TsigAlgorithm::HmacSha384,
            Self::HmacSha512 => TsigAlgorithm::HmacSha512,
        }
    }
}

impl FromStr for Algorithm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.trim_end_matches('.').to_ascii_lowercase().as_str() {
            "hmac-sha256" => Ok(Self::HmacSha256),
            "hmac-sha384" => Ok(Self::HmacSha384),
            "hmac-sha512" => Ok(Self::HmacSha512),
            other => Err(Error::Config(format!(
                "{other:?} is no usable key algorithm: hmac-sha256, hmac-sha384 or hmac-sha512"
            ))),
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HmacSha256 => "hmac-sha256",
            Self::HmacSha384 => "hmac-sha384",
            Self::HmacSha512 => "hmac-sha512",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "IcLUEdyeaOVGt6Gekx4g/N4iAVSAsOaBZfZBaXkupMM=";

    #[test]
    fn both_written_forms_give_the_same_key() {
        let short: Key = format!("gw-a.:hmac-sha256:{SECRET}\n").parse().expect("short form");
        let bind = format!(
            "# made by hand\nkey \"gw-a\" {{ // the gateway\n\talgorithm hmac-sha256; /* x\n */ secret \"{SECRET}\";\n}};\n"
        );
        assert_eq!(bind.parse::<Key>().expect("BIND's form"), short);
        assert_eq!(short.name().to_string(), "gw-a.");
    }

    #[test]
    fn the_secret_is_shown_neither_by_debug_nor_by_errors() {
        let key: Key = format!("gw-a:hmac-sha512:{SECRET}").parse().expect("valid");
        assert_eq!(format!("{key:?}"), "Key(gw-a. hmac-sha512 [redacted])");
        for bad in [
            format!("gw-a:hmac-md5:{SECRET}"),
            format!("gw-a:{SECRET}"),
            format!("gw-a:hmac-sha256:{SECRET}!"),
            format!("key a {{ algorithm hmac-sha256; secret {SECRET}; secrets x; }};"),
            format!("key a {{ algorithm hmac-sha256; secret {SECRET}; }}; key b {{ }};"),
            "gw-a:hmac-sha256:c2hvcnQ=".to_owned(),
        ] {
            let message = bad.parse::<Key>().expect_err("refused").to_string();
            assert!(!message.contains("IcLU"), "{message}");
        }
    }

    #[test]
    fn a_missing_key_file_is_named() {
        let error = Key::from_file(Path::new("/nonexistent/gw.key")).expect_err("refused").to_string();
        assert!(error.contains("/nonexistent/gw.key"), "{error}");
    }
}
