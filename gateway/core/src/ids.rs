//! Names and numbers that identify things, each a type of its own so that they cannot be mixed.
//!
//! Names come from peers and from configuration files, end up in file names, interface names and
//! unit names, and are therefore checked on construction and again when they are deserialised.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A name that was refused, and what a name may look like.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a {kind}: 1 to {max} characters of a-z, 0-9 and '-', beginning with a letter")]
pub struct InvalidName {
    kind: &'static str,
    value: String,
    max: usize,
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal, $max:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The longest name of this kind, in characters.
            pub const MAX_LEN: usize = $max;

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidName;

            fn try_from(value: String) -> Result<Self, InvalidName> {
                if is_name(&value, $max) {
                    Ok(Self(value))
                } else {
                    Err(InvalidName { kind: $kind, value, max: $max })
                }
            }
        }

        impl FromStr for $type {
            type Err = InvalidName;

            fn from_str(value: &str) -> Result<Self, InvalidName> {
                Self::try_from(value.to_owned())
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A site's name, unique among the sites that peer with each other.
    SiteName, "site name", 16
);
name!(
    /// A machine's name, unique among the machines of all sites that exchange machines.
    VmName, "machine name", 32
);
name!(
    /// The name of a disk or NIC inside one machine's definition.
    DeviceName, "device name", 16
);
name!(
    /// The name of an image that disks are cloned from. A site that has the image has a file of its own for it.
    TemplateName, "template name", 32
);

fn is_name(value: &str, max: usize) -> bool {
    value.len() <= max
        && value.starts_with(|c: char| c.is_ascii_lowercase())
        && value.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// One attempt to move one machine. Drawn at random by the source, 128 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MigrationId(pub u128);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How often a machine's ownership was handed over. It only grows; a higher one fences a lower one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
pub struct Epoch(pub u64);

impl Epoch {
    /// Beyond it no machine is taken from a peer: no machine is handed over that often, and counting on
    /// from there cannot overflow.
    pub const MAX_FROM_PEER: Self = Self(1 << 48);

    /// The epoch of the next hand-over.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_escape_a_path_are_refused() {
        for bad in ["", "../x", "a/b", "Web", "1a", "a b", "a\n", "a.b", &"a".repeat(33)] {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?}");
        }
        assert_eq!("web-1".parse::<VmName>().unwrap().as_str(), "web-1");
    }

    #[test]
    fn a_bad_name_does_not_deserialise() {
        let bytes = postcard::to_allocvec("../etc").unwrap();
        assert!(postcard::from_bytes::<VmName>(&bytes).is_err());
    }
}
