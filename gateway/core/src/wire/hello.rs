//! The first frame in each direction, and the version both sides then speak.
//!
//! Its encoding never changes: eight bytes of magic, then the fields in postcard. A later version may
//! append fields; bytes after the known ones are therefore ignored here, and only here. Hello says
//! who a peer claims to be; that it is so is proven by its key in the TLS handshake, not here.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::frame::{FrameError, encode_frame};
use crate::ids::SiteName;

/// A version of the control protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version(pub u16);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The versions that one side understands, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRange {
    /// The oldest.
    pub oldest: Version,
    /// The newest.
    pub newest: Version,
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.oldest == self.newest {
            true => write!(f, "{}", self.newest),
            false => write!(f, "{} to {}", self.oldest, self.newest),
        }
    }
}

/// What this build understands.
pub const SUPPORTED: VersionRange = VersionRange { oldest: Version(7), newest: Version(7) };

/// No version is understood by both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "No common protocol version: this side speaks {ours}, the peer speaks {theirs}; update the older gateway"
)]
pub struct VersionMismatch {
    /// What this side speaks.
    pub ours: VersionRange,
    /// What the peer speaks.
    pub theirs: VersionRange,
}

/// The newest version in both ranges.
pub fn negotiate(ours: VersionRange, theirs: VersionRange) -> Result<Version, VersionMismatch> {
    let newest = ours.newest.min(theirs.newest);
    let oldest = ours.oldest.max(theirs.oldest);
    if newest < oldest {
        return Err(VersionMismatch { ours, theirs });
    }
    Ok(newest)
}

/// Name and release of a peer's software, for logs alone: 1 to 64 printable ASCII characters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Software(String);

impl Software {
    const MAX_LEN: usize = 64;

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A software name that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("A software name has 1 to 64 printable ASCII characters")]
pub struct InvalidSoftware;

impl TryFrom<String> for Software {
    type Error = InvalidSoftware;

    fn try_from(text: String) -> Result<Self, InvalidSoftware> {
        let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        match printable && !text.is_empty() && text.len() <= Self::MAX_LEN {
            true => Ok(Self(text)),
            false => Err(InvalidSoftware),
        }
    }
}

impl From<Software> for String {
    fn from(software: Software) -> String {
        software.0
    }
}

/// What each side says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The versions it understands.
    pub versions: VersionRange,
    /// The site it is.
    pub site: SiteName,
    /// A random number drawn when the gateway started: tells a new process from a new connection.
    pub instance: u64,
    /// What it runs.
    pub software: Software,
}

/// A first frame that is no Hello.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Not even the magic.
    #[error("The first frame is no Longhaul hello; something else listens at that address")]
    NoMagic,
    /// The magic, then nonsense.
    #[error("The peer's hello is damaged")]
    Damaged(#[source] postcard::Error),
    /// Too long to be sent.
    #[error("The hello does not fit a frame")]
    Frame(#[from] FrameError),
}

impl Hello {
    const MAGIC: &[u8; 8] = b"longhaul";

    /// The hello as one frame, ready for the stream.
    pub fn encode(&self) -> Result<Vec<u8>, HelloError> {
        let mut body = Self::MAGIC.to_vec();
        body.extend(postcard::to_allocvec(self).map_err(HelloError::Damaged)?);
        Ok(encode_frame(&body)?)
    }

    /// A hello from the body of the first frame.
    pub fn decode(body: &[u8]) -> Result<Self, HelloError> {
        let fields = body.strip_prefix(Self::MAGIC).ok_or(HelloError::NoMagic)?;
        let (hello, _appended_by_later_versions) =
            postcard::take_from_bytes(fields).map_err(HelloError::Damaged)?;
        Ok(hello)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(oldest: u16, newest: u16) -> VersionRange {
        VersionRange { oldest: Version(oldest), newest: Version(newest) }
    }

    fn hello() -> Hello {
        Hello {
            versions: range(1, 300),
            site: "a".parse().unwrap(),
            instance: 5,
            software: Software::try_from("x 1".to_owned()).unwrap(),
        }
    }

    #[test]
    fn the_newest_common_version_is_picked() {
        assert_eq!(negotiate(range(1, 3), range(2, 5)), Ok(Version(3)));
        assert_eq!(negotiate(range(2, 5), range(1, 3)), Ok(Version(3)));
        assert_eq!(negotiate(range(1, 1), range(1, 1)), Ok(Version(1)));
    }

    #[test]
    fn gateways_of_before_are_told_which_side_is_older() {
        for older in 1..=6 {
            let error = negotiate(SUPPORTED, range(older, older)).unwrap_err().to_string();
            let wanted = format!("this side speaks 7, the peer speaks {older}; update the older gateway");
            assert!(error.contains(&wanted), "{error}");
        }
    }

    #[test]
    fn a_mismatch_names_both_sides() {
        let error = negotiate(range(1, 2), range(3, 4)).unwrap_err().to_string();
        assert!(
            error.contains("this side speaks 1 to 2") && error.contains("the peer speaks 3 to 4"),
            "{error}"
        );
    }

    #[test]
    fn the_encoding_is_pinned() {
        let frame = hello().encode().unwrap();
        assert_eq!(hex::encode(frame), "000000126c6f6e676861756c01ac0201610503782031");
    }

    #[test]
    fn fields_appended_by_a_later_version_are_ignored() {
        let mut body = hello().encode().unwrap()[4..].to_vec();
        body.extend(b"more");
        assert_eq!(Hello::decode(&body), Ok(hello()));
    }

    #[test]
    fn another_protocol_is_told_from_a_damaged_hello() {
        assert_eq!(Hello::decode(b"GET / HTTP/1.1"), Err(HelloError::NoMagic));
        assert!(matches!(Hello::decode(b"longhaul"), Err(HelloError::Damaged(_))));
    }

    proptest! {
        #[test]
        fn negotiation_is_symmetric(a in 0u16..9, b in 0u16..9, c in 0u16..9, d in 0u16..9) {
            let (ours, theirs) = (range(a.min(b), a.max(b)), range(c.min(d), c.max(d)));
            prop_assert_eq!(negotiate(ours, theirs).ok(), negotiate(theirs, ours).ok());
        }
    }
}
