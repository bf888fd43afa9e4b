//! The values a definition is made of, each checked when it is read.
//!
//! Every one of them reads and writes as text, in TOML and on the wire alike, so that a definition
//! looks the same wherever it is printed. None can hold a comma, a slash or a space that would mean
//! something else on QEMU's command line; the kernel's command line, an argument of its own, may.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A value that was refused, and what was expected in its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not {expected}")]
pub struct InvalidValue {
    /// What was written.
    pub value: String,
    /// What may stand there.
    pub expected: String,
}

impl InvalidValue {
    pub(super) fn new(value: impl Into<String>, expected: impl Into<String>) -> Self {
        Self { value: value.into(), expected: expected.into() }
    }
}

/// Gives a type its text form: `TryFrom<String>` by `FromStr`, `Into<String>` by `Display`.
macro_rules! as_text {
    ($type:ident) => {
        impl TryFrom<String> for $type {
            type Error = InvalidValue;

            fn try_from(value: String) -> Result<Self, InvalidValue> {
                value.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    };
}

/// A checked piece of text: the type, its longest length, what is allowed in it.
macro_rules! checked_text {
    ($(#[$doc:meta])* $type:ident, $max:literal, $expected:expr, $allowed:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The longest text of this kind, in bytes.
            pub const MAX_LEN: usize = $max;

            /// The value as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = InvalidValue;

            fn from_str(value: &str) -> Result<Self, InvalidValue> {
                let allowed: fn(&str) -> bool = $allowed;
                if value.len() <= $max && allowed(value) {
                    return Ok(Self(value.to_owned()));
                }
                Err(InvalidValue::new(value.chars().take(80).collect::<String>(), $expected))
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        as_text!($type);
    };
}

checked_text!(
    /// A CPU model by its QEMU name, without feature flags: `qemu64`, `Skylake-Server-v4`.
    ///
    /// `max` is refused, for it means something else on every host. `host` does too, but is the
    /// operator's to allow between equal hosts: [`super::HostCapabilities::allow_host_cpu`].
    CpuModel,
    64,
    "a named CPU model such as \"qemu64\" or \"Skylake-Server-v4\", without feature flags (\"max\" differs from host to host)",
    |text| !text.is_empty() && text != "max" && text.chars().all(is_word)
);
checked_text!(
    /// The serial number that a disk shows to the guest.
    Serial, 20, "a serial number of 1 to 20 characters of A-Z, a-z, 0-9, '.', '_' and '-'",
    |text| !text.is_empty() && text.chars().all(is_word)
);
checked_text!(
    /// A network's name. Each site maps it to a bridge of its own.
    LanName, 32, "a network's name: 1 to 32 characters of A-Z, a-z, 0-9, '.', '_' and '-'",
    |text| !text.is_empty() && text.chars().all(is_word)
);
checked_text!(
    /// The name of a kernel and its initial RAM disk. Each site maps it to files of its own.
    KernelName, 64, "a kernel's name: 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'",
    |text| !text.is_empty() && text.chars().all(is_word)
);
checked_text!(
    /// What a kernel that QEMU loads is told. 2048 bytes is what x86 Linux reads (COMMAND_LINE_SIZE).
    KernelCommandLine, 2047, "a kernel command line of at most 2047 printable ASCII characters",
    |text| text.chars().all(|c| c == ' ' || c.is_ascii_graphic())
);

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

/// A machine type with its version: `pc-q35-7.2` or `pc-i440fx-7.2`.
///
/// A type without version means a different machine in every QEMU and is refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineType {
    chipset: Chipset,
    major: u8,
    minor: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Chipset {
    Q35,
    I440fx,
}

impl MachineType {
    /// Whether the guest's devices sit on a PCI Express root bus.
    pub fn is_q35(&self) -> bool {
        self.chipset == Chipset::Q35
    }

    /// The PCI slots of bus 0 that the machine itself does not occupy.
    pub fn free_slots(&self) -> std::ops::RangeInclusive<u8> {
        match self.chipset {
            Chipset::Q35 => 1..=30,
            Chipset::I440fx => 2..=31,
        }
    }
}

impl FromStr for MachineType {
    type Err = InvalidValue;

    fn from_str(value: &str) -> Result<Self, InvalidValue> {
        let expected = match value {
            "q35" => {
                "a versioned machine type: \"q35\" means another machine in every QEMU, write \"pc-q35-7.2\""
            }
            "pc" => {
                "a versioned machine type: \"pc\" means another machine in every QEMU, write \"pc-i440fx-7.2\""
            }
            _ => "a versioned machine type, \"pc-q35-7.2\" or \"pc-i440fx-7.2\" for example",
        };
        let refused = || InvalidValue::new(value.chars().take(80).collect::<String>(), expected);
        let (chipset, version) = match (value.strip_prefix("pc-q35-"), value.strip_prefix("pc-i440fx-")) {
            (Some(version), _) => (Chipset::Q35, version),
            (None, Some(version)) => (Chipset::I440fx, version),
            (None, None) => return Err(refused()),
        };
        let (major, minor) = version.split_once('.').ok_or_else(refused)?;
        let number = |text: &str| text.parse::<u8>().ok().filter(|n| n.to_string() == text);
        match (number(major), number(minor)) {
            (Some(major), Some(minor)) => Ok(Self { chipset, major, minor }),
            (None, _) | (_, None) => Err(refused()),
        }
    }
}

impl fmt::Display for MachineType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chipset = match self.chipset {
            Chipset::Q35 => "pc-q35",
            Chipset::I440fx => "pc-i440fx",
        };
        write!(f, "{chipset}-{}.{}", self.major, self.minor)
    }
}

as_text!(MachineType);

/// Where a device sits on PCI bus 0, written as QEMU's `addr` is: slot in hexadecimal, dot, function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddress {
    slot: u8,
    function: u8,
}

impl PciAddress {
    /// The address of `slot` (0 to 31) and `function` (0 to 7), if there is one.
    pub fn new(slot: u8, function: u8) -> Option<Self> {
        (slot < 32 && function < 8).then_some(Self { slot, function })
    }

    /// The slot, 0 to 31.
    pub fn slot(self) -> u8 {
        self.slot
    }

    /// The function, 0 to 7.
    pub fn function(self) -> u8 {
        self.function
    }
}

impl FromStr for PciAddress {
    type Err = InvalidValue;

    fn from_str(value: &str) -> Result<Self, InvalidValue> {
        let parse = || {
            let (slot, function) = value.split_once('.')?;
            if slot.is_empty() || slot.len() > 2 || !slot.chars().all(|c| c.is_ascii_hexdigit()) {
                return None;
            }
            let function = function.parse::<u8>().ok().filter(|n| n.to_string() == function)?;
            Self::new(u8::from_str_radix(slot, 16).ok()?, function)
        };
        parse().ok_or_else(|| {
            InvalidValue::new(
                value,
                "a PCI address: slot (hexadecimal, 00 to 1f), dot, function (0 to 7), as in \"04.0\"",
            )
        })
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.slot, self.function)
    }
}

as_text!(PciAddress);

/// A machine's UUID, which the guest sees in its firmware tables and QEMU in the migration stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineUuid(pub [u8; 16]);

impl MachineUuid {
    /// The UUID that belongs to a name: version 8 (RFC 9562), from a hash of it.
    pub fn of_name(name: &str) -> Self {
        let hash = blake3::derive_key("longhaul machine uuid 1", name.as_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash[..16]);
        bytes[6] = (bytes[6] & 0x0f) | 0x80;
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        Self(bytes)
    }
}

impl FromStr for MachineUuid {
    type Err = InvalidValue;

    fn from_str(value: &str) -> Result<Self, InvalidValue> {
        let parse = || {
            let groups: Vec<&str> = value.split('-').collect();
            if groups.iter().map(|group| group.len()).ne([8, 4, 4, 4, 12]) {
                return None;
            }
            let mut bytes = [0; 16];
            hex::decode_to_slice(groups.concat(), &mut bytes).ok()?;
            Some(Self(bytes))
        };
        parse().ok_or_else(|| {
            InvalidValue::new(value, "a UUID such as \"6ba7b810-9dad-81d1-80b4-00c04fd430c8\"")
        })
    }
}

impl fmt::Display for MachineUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = hex::encode(self.0);
        write!(f, "{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }
}

as_text!(MachineUuid);

/// The SHA-256 of a file, 64 hexadecimal digits in text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sha256Digest(pub [u8; 32]);

impl FromStr for Sha256Digest {
    type Err = InvalidValue;

    fn from_str(value: &str) -> Result<Self, InvalidValue> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(value, &mut bytes).map_err(|_| {
            InvalidValue::new(value, "a SHA-256: 64 hexadecimal digits, as sha256sum prints them")
        })?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

as_text!(Sha256Digest);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_type_without_version_is_refused_with_the_versioned_one() {
        let hint = |text: &str| text.parse::<MachineType>().unwrap_err().to_string();
        assert!(hint("q35").contains("pc-q35-7.2"), "{}", hint("q35"));
        assert!(hint("pc").contains("pc-i440fx-7.2"), "{}", hint("pc"));
        for bad in
            ["", "microvm", "pc-q35-", "pc-q35-7", "pc-q35-7.2,accel=kvm", "pc-q35-07.2", "pc-q35-7.2.1"]
        {
            assert!(bad.parse::<MachineType>().is_err(), "{bad}");
        }
        for good in ["pc-q35-7.2", "pc-i440fx-10.1"] {
            assert_eq!(good.parse::<MachineType>().unwrap().to_string(), good);
        }
    }

    #[test]
    fn a_value_cannot_add_an_option_to_the_command_line() {
        for bad in ["qemu64,+svm", "a b", "", "max", "x/y", &"a".repeat(65)] {
            assert!(bad.parse::<CpuModel>().is_err(), "{bad}");
        }
        for bad in ["a,b", "", &"a".repeat(21)] {
            assert!(bad.parse::<Serial>().is_err(), "{bad}");
        }
        assert!("root=/dev/vda ro console=ttyS0,115200".parse::<KernelCommandLine>().is_ok());
        assert!("a\nb".parse::<KernelCommandLine>().is_err());
        assert!("a".repeat(KernelCommandLine::MAX_LEN).parse::<KernelCommandLine>().is_ok());
        assert!("a".repeat(KernelCommandLine::MAX_LEN + 1).parse::<KernelCommandLine>().is_err());
    }

    #[test]
    fn a_pci_address_reads_as_qemu_reads_it() {
        assert_eq!("1e.7".parse::<PciAddress>().unwrap(), PciAddress { slot: 30, function: 7 });
        assert_eq!("4.0".parse::<PciAddress>().unwrap().to_string(), "04.0");
        for bad in ["", "4", "20.0", "04.8", "0000:04.0", "+4.0", "04.00", "04.0,x=y"] {
            assert!(bad.parse::<PciAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_has_always_the_same_uuid() {
        let uuid = MachineUuid::of_name("web1");
        assert_eq!(uuid, MachineUuid::of_name("web1"));
        assert_ne!(uuid, MachineUuid::of_name("web2"));
        let text = uuid.to_string();
        assert_eq!((text.len(), &text[14..15]), (36, "8"));
        assert_eq!(text.parse::<MachineUuid>().unwrap(), uuid);
        assert!("6ba7b8109dad81d180b400c04fd430c8".parse::<MachineUuid>().is_err());
    }
}
