//! Domain names as this crate takes them: absolute, lower case, checked once on construction.
//!
//! Deliberately no internationalised names: what goes into a prerequisite must be what the zone holds.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use hickory_proto::rr::Name;
use serde::{Deserialize, Serialize};

/// An absolute domain name (RFC 1035), lower case, without escapes; written with or without its final dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DnsName(Arc<Name>);

/// A text that is no usable domain name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is not a domain name: labels of letters, digits, '-' and '_' of at most 63 characters, 253 in all"
)]
pub struct InvalidDnsName {
    value: String,
}

impl DnsName {
    /// Whether this name is `zone` or lies below it.
    pub fn is_in(&self, zone: &DnsName) -> bool {
        zone.0.zone_of(&self.0)
    }

    /// The name one label below this one, such as `_longhaul.web1.example`.
    pub fn child(&self, label: &str) -> Result<DnsName, InvalidDnsName> {
        format!("{label}.{self}").parse()
    }

    /// The reverse name of an address, in `in-addr.arpa` or `ip6.arpa` (RFC 1035 section 3.5, RFC 3596).
    pub fn reverse(address: std::net::IpAddr) -> DnsName {
        DnsName(Arc::new(Name::from(address).to_lowercase()))
    }

    pub(crate) fn as_name(&self) -> &Name {
        &self.0
    }

    pub(crate) fn from_wire(name: &Name) -> DnsName {
        let mut name = name.to_lowercase();
        name.set_fqdn(true);
        DnsName(Arc::new(name))
    }
}

impl FromStr for DnsName {
    type Err = InvalidDnsName;

    fn from_str(value: &str) -> Result<Self, InvalidDnsName> {
        let refused = || InvalidDnsName { value: value.to_owned() };
        let labels = value.strip_suffix('.').unwrap_or(value);
        if labels.len() > 253 || !labels.split('.').all(is_label) {
            return Err(refused());
        }
        let mut name = Name::from_ascii(labels).map_err(|_| refused())?.to_lowercase();
        name.set_fqdn(true);
        Ok(Self(Arc::new(name)))
    }
}

fn is_label(label: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=63).contains(&label.len()) && label.bytes().all(allowed)
}

impl TryFrom<String> for DnsName {
    type Error = InvalidDnsName;

    fn try_from(value: String) -> Result<Self, InvalidDnsName> {
        value.parse()
    }
}

impl From<DnsName> for String {
    fn from(name: DnsName) -> String {
        name.to_string()
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> DnsName {
        text.parse().expect("a valid name")
    }

    #[test]
    fn case_and_final_dot_do_not_matter() {
        assert_eq!(name("Web1.Example"), name("web1.example."));
        assert_eq!(name("Web1.Example").to_string(), "web1.example.");
    }

    #[test]
    fn a_name_belongs_to_its_zone_by_labels_not_by_letters() {
        assert!(name("app.vm.example").is_in(&name("vm.example")));
        assert!(name("vm.example").is_in(&name("vm.example")));
        assert!(!name("app.xvm.example").is_in(&name("vm.example")));
    }

    #[test]
    fn what_cannot_be_a_name_is_refused() {
        let long = "a".repeat(64);
        for text in ["", ".", "a..b", "*.vm.example", "a b", "a\\.b", long.as_str(), "ü.example"] {
            assert!(text.parse::<DnsName>().is_err(), "{text:?}");
        }
        assert!(vec!["a".repeat(63); 4].join(".").parse::<DnsName>().is_err());
    }

    #[test]
    fn reverse_names_follow_the_address() {
        assert_eq!(DnsName::reverse([192, 0, 2, 7].into()).to_string(), "7.2.0.192.in-addr.arpa.");
        let six: std::net::IpAddr = "2001:db8::1".parse().expect("an address");
        assert!(DnsName::reverse(six).to_string().ends_with("8.b.d.0.1.0.0.2.ip6.arpa."));
    }
}
