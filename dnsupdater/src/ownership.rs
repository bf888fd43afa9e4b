//! The ownership record: who may change a name next, and by which transaction it was last changed.
//!
//! ```text
//! _longhaul.NAME. 0 IN TXT "v=1 epoch=7 owner=site-a txn=00112233445566778899aabbccddeeff"
//! ```
//!
//! One string of at most 255 bytes, compared byte for byte by the name server, hence written in one way only.
//! The transaction number makes every value unique, so that a value once replaced never comes back and a replayed
//! update finds its prerequisite false for ever. What changes a name but not who has it, a new time to live, keeps the
//! three and appends ` touch=` and 32 random digits, for the same reason. It does not decide what an epoch means: that is
//! the caller's journal.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The label under which the ownership record of a name lives.
pub const OWNERSHIP_LABEL: &str = "_longhaul";

/// The longest owner in an ownership record, in characters.
pub const MAX_OWNER_LEN: usize = 63;

/// The owner written when a name is given back and nobody is known to have had it before.
pub const NOBODY: &str = "-";

/// How often a name has changed hands. 0 means never: no record, or one that was undone to the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// A transaction's number: 128 random bits, written as 32 lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Txn(u128);

/// The value of an ownership record.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ownership {
    epoch: Epoch,
    owner: String,
    txn: Txn,
    touch: Option<Txn>,
}

/// A text that is no ownership record of version 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is not an ownership record: v=1 epoch=NUMBER owner=SITE txn=32 HEX DIGITS [touch=32 HEX DIGITS]"
)]
pub struct InvalidOwnership {
    value: String,
}

impl Txn {
    /// A new random number.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl Ownership {
    /// A record; the owner has 1 to [`MAX_OWNER_LEN`] characters of letters, digits, `.`, `_` and `-`.
    pub fn new(epoch: Epoch, owner: &str, txn: Txn) -> Result<Self, InvalidOwnership> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if owner.is_empty() || owner.len() > MAX_OWNER_LEN || !owner.bytes().all(allowed) {
            return Err(InvalidOwnership { value: format!("owner={owner}") });
        }
        Ok(Self { epoch, owner: owner.to_owned(), txn, touch: None })
    }

    /// The same claim in a value that never was: for an update that changes a name but not whose it is.
    #[must_use]
    pub fn touched(&self) -> Self {
        Self { touch: Some(Txn::random()), ..self.clone() }
    }

    /// Whether both say that the same transaction gave the name to the same owner, touched since or not.
    pub fn is_claim_of(&self, other: &Self) -> bool {
        (self.epoch, &self.owner, self.txn) == (other.epoch, &other.owner, other.txn)
    }

    /// How often the name has changed hands.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The site that has the name.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// The transaction that wrote this value.
    pub fn txn(&self) -> Txn {
        self.txn
    }
}

impl FromStr for Ownership {
    type Err = InvalidOwnership;

    /// Reads the canonical form only: what would not be written exactly so again is refused.
    fn from_str(value: &str) -> Result<Self, InvalidOwnership> {
        let refused = || InvalidOwnership { value: value.chars().take(255).collect() };
        let mut fields = value.split(' ');
        let mut field = |key: &str| fields.next().and_then(|field| field.strip_prefix(key));
        if field("v=") != Some("1") {
            return Err(refused());
        }
        let epoch = field("epoch=").and_then(|text| text.parse().ok()).ok_or_else(refused)?;
        let owner = field("owner=").ok_or_else(refused)?;
        let txn = field("txn=").and_then(|text| Txn::from_str(text).ok()).ok_or_else(refused)?;
        let touch = match fields.next() {
            None => None,
            Some(last) => {
                let number = last.strip_prefix("touch=").and_then(|text| text.parse().ok());
                Some(number.ok_or_else(refused)?)
            }
        };
        let read = Self { touch, ..Self::new(Epoch(epoch), owner, txn).map_err(|_| refused())? };
        if read.to_string() == value { Ok(read) } else { Err(refused()) }
    }
}

impl fmt::Display for Ownership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v=1 epoch={} owner={} txn={}", self.epoch, self.owner, self.txn)?;
        self.touch.map_or(Ok(()), |touch| write!(f, " touch={touch}"))
    }
}

impl FromStr for Txn {
    type Err = InvalidOwnership;

    fn from_str(value: &str) -> Result<Self, InvalidOwnership> {
        let canonical = value.len() == 32 && value.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match u128::from_str_radix(value, 16) {
            Ok(number) if canonical => Ok(Self(number)),
            Ok(_) | Err(_) => Err(InvalidOwnership { value: value.chars().take(64).collect() }),
        }
    }
}

impl fmt::Display for Txn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl TryFrom<String> for Ownership {
    type Error = InvalidOwnership;

    fn try_from(value: String) -> Result<Self, InvalidOwnership> {
        value.parse()
    }
}

impl From<Ownership> for String {
    fn from(value: Ownership) -> String {
        value.to_string()
    }
}

impl TryFrom<String> for Txn {
    type Error = InvalidOwnership;

    fn try_from(value: String) -> Result<Self, InvalidOwnership> {
        value.parse()
    }
}

impl From<Txn> for String {
    fn from(value: Txn) -> String {
        value.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "v=1 epoch=7 owner=site-a txn=00112233445566778899aabbccddeeff";

    #[test]
    fn the_written_form_is_the_one_that_is_read() {
        let read: Ownership = GOOD.parse().expect("canonical");
        assert_eq!((read.epoch(), read.owner()), (Epoch(7), "site-a"));
        assert_eq!(read.to_string(), GOOD);
    }

    #[test]
    fn anything_but_the_canonical_form_is_refused() {
        for bad in [
            "".to_owned(),
            GOOD.replace("v=1", "v=2"),
            GOOD.replace("epoch=7", "epoch=07"),
            GOOD.replace("epoch=7", "epoch=+7"),
            GOOD.replace("epoch=7", "epoch=18446744073709551616"),
            GOOD.replace("site-a", ""),
            GOOD.replace("site-a", "site a"),
            GOOD.replace("site-a", &"a".repeat(MAX_OWNER_LEN + 1)),
            GOOD.replace("aabb", "AABB"),
            GOOD.replace("ff", "f"),
            GOOD.replace(' ', "  "),
            format!("{GOOD} more=1"),
            format!("{GOOD} touch=1"),
            format!("{GOOD} touch=00112233445566778899aabbccddeeff more=1"),
            format!("{GOOD}\n"),
        ] {
            assert!(bad.parse::<Ownership>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_touched_record_is_another_value_and_the_same_claim() {
        let read: Ownership = GOOD.parse().expect("canonical");
        let touched = read.touched();
        assert!(touched != read && touched != read.touched() && touched.is_claim_of(&read));
        assert_eq!(touched.to_string().parse(), Ok(touched.clone()));
        let other = Ownership::new(Epoch(7), "site-a", Txn::random()).expect("valid");
        assert!(!other.is_claim_of(&read));
    }

    proptest! {
        #[test]
        fn every_record_fits_one_string_and_survives_the_way_there_and_back(
            epoch: u64, owner in "[A-Za-z0-9._-]{1,63}", txn: u128
        ) {
            let record = Ownership::new(Epoch(epoch), &owner, Txn(txn)).expect("valid").touched();
            let text = record.to_string();
            prop_assert!(text.len() <= 255);
            prop_assert_eq!(text.parse::<Ownership>(), Ok(record));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,300}") {
            if let Ok(record) = text.parse::<Ownership>() {
                prop_assert_eq!(record.to_string(), text);
            }
        }
    }
}
