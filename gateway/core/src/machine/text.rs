//! The text form of addresses inside a definition: `52:54:00:12:34:56` and `198.51.100.10/24`.
//!
//! The same text goes over the wire, so that one definition has one form. The types themselves
//! belong to [`crate::tunnel::handover`], where they travel in binary.

use std::net::IpAddr;

use crate::machine::values::InvalidValue;
use crate::tunnel::handover::{Mac, Prefix};

/// A link-layer address as six hexadecimal pairs.
pub(super) mod mac {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::{Mac, parse_mac, print_mac};

    pub fn serialize<S: Serializer>(mac: &Mac, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&print_mac(*mac))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
        parse_mac(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// A list of addresses with their prefix length.
pub(super) mod prefixes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::{Prefix, parse_prefix, print_prefix};

    pub fn serialize<S: Serializer>(prefixes: &[Prefix], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(prefixes.iter().map(print_prefix))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Prefix>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| parse_prefix(text)).collect::<Result<_, _>>().map_err(D::Error::custom)
    }
}

/// `mac` as QEMU and `ip link` print it.
pub(super) fn print_mac(mac: Mac) -> String {
    mac.0.map(|byte| format!("{byte:02x}")).join(":")
}

fn parse_mac(text: &str) -> Result<Mac, InvalidValue> {
    let parse = || {
        let pairs: Vec<&str> = text.split(':').collect();
        if pairs.len() != 6 || pairs.iter().any(|pair| pair.len() != 2) {
            return None;
        }
        let mut bytes = [0; 6];
        hex::decode_to_slice(pairs.concat(), &mut bytes).ok()?;
        Some(Mac(bytes))
    };
    parse().ok_or_else(|| InvalidValue::new(text, "a link-layer address such as \"52:54:00:12:34:56\""))
}

fn print_prefix(prefix: &Prefix) -> String {
    format!("{}/{}", prefix.addr, prefix.len)
}

fn parse_prefix(text: &str) -> Result<Prefix, InvalidValue> {
    let parse = || {
        let (addr, len) = text.split_once('/')?;
        let addr: IpAddr = addr.parse().ok()?;
        let len = len.parse::<u8>().ok().filter(|n| n.to_string() == len)?;
        let max = if addr.is_ipv4() { 32 } else { 128 };
        (len <= max).then_some(Prefix { addr, len })
    };
    parse().ok_or_else(|| {
        InvalidValue::new(text, "an address with its network's prefix length such as \"198.51.100.10/24\"")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_their_text() {
        for text in ["198.51.100.10/24", "2001:db8::10/64", "0.0.0.0/0"] {
            assert_eq!(print_prefix(&parse_prefix(text).unwrap()), text);
        }
        assert_eq!(print_mac(parse_mac("52:54:00:AB:cd:ef").unwrap()), "52:54:00:ab:cd:ef");
    }

    #[test]
    fn half_an_address_is_refused() {
        for bad in ["198.51.100.10", "198.51.100.10/33", "2001:db8::/129", "1.2.3/8", "1.2.3.4/+8", ""] {
            assert!(parse_prefix(bad).is_err(), "{bad}");
        }
        for bad in ["", "52:54:00:12:34", "52-54-00-12-34-56", "5:254:00:12:34:56", "52:54:00:12:34:5g"] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }
}
