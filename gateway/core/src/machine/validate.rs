//! Whether a definition is sound as a whole: bounds, and names and addresses that occur only once.
//!
//! Single values check themselves when they are read ([`super::values`]); this looks at numbers and at
//! what only several values together can get wrong. It does not ask whether any host can run the
//! machine: [`super::HostCapabilities`] answers that.

use std::collections::BTreeMap;

use super::definition::{Firmware, MachineDefinition, Nic};
use crate::tunnel::handover::Mac;

/// The bounds of a definition. A peer's message can never make a site allocate for more than these.
pub mod limits {
    /// The most disks of one machine.
    pub const MAX_DISKS: usize = 8;
    /// The most network interfaces of one machine.
    pub const MAX_NICS: usize = 4;
    /// The most home addresses of one interface.
    pub const MAX_HOME_ADDRESSES: usize = 8;
    /// The most virtual CPUs; QEMU's own limit for the machine type can be lower.
    pub const MAX_VCPUS: u16 = 1024;
    /// The least memory in MiB with which SeaBIOS still runs.
    pub const MIN_MEMORY_MIB: u64 = 8;
    /// The most memory, 16 TiB in MiB.
    pub const MAX_MEMORY_MIB: u64 = 16 << 20;
    /// The most that is left off the memory, in KiB: less than what QEMU looks at in one step.
    pub const MAX_TRIM_KIB: u64 = 248;
    /// The largest disk, 256 TiB in bytes.
    pub const MAX_DISK_BYTES: u64 = 256 << 40;
    /// The largest flash image, 16 MiB in bytes: QEMU maps them all below 4 GiB.
    pub const MAX_FLASH_BYTES: u64 = 16 << 20;
    /// The longest TTL, one week in seconds.
    pub const MAX_DNS_TTL_S: u32 = 7 * 24 * 3600;
}

/// A definition that was refused: where, and what was expected there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: expected {expected}, found {found}")]
pub struct InvalidDefinition {
    /// The field as a path: `disks[1].pci`.
    pub field: String,
    /// What may stand there.
    pub expected: String,
    /// What stands there.
    pub found: String,
}

fn refuse(
    field: impl Into<String>,
    expected: impl Into<String>,
    found: impl ToString,
) -> Result<(), InvalidDefinition> {
    Err(InvalidDefinition { field: field.into(), expected: expected.into(), found: found.to_string() })
}

impl MachineDefinition {
    /// Checks bounds, and that no name, address or PCI slot is used twice. The first fault is reported.
    pub fn validate(&self) -> Result<(), InvalidDefinition> {
        self.check_sizes()?;
        self.check_volumes()?;
        self.check_nics()?;
        self.check_pci()?;
        self.check_dns()
    }

    fn check_sizes(&self) -> Result<(), InvalidDefinition> {
        if !(1..=limits::MAX_VCPUS).contains(&self.vcpus) {
            return refuse("vcpus", format!("1 to {}", limits::MAX_VCPUS), self.vcpus);
        }
        if !(limits::MIN_MEMORY_MIB..=limits::MAX_MEMORY_MIB).contains(&self.memory_mib) {
            let expected = format!("{} to {} MiB", limits::MIN_MEMORY_MIB, limits::MAX_MEMORY_MIB);
            return refuse("memory_mib", expected, self.memory_mib);
        }
        if self.memory_trim_kib > limits::MAX_TRIM_KIB || !self.memory_trim_kib.is_multiple_of(8) {
            let expected = format!("a multiple of 8 up to {}", limits::MAX_TRIM_KIB);
            return refuse("memory_trim_kib", expected, self.memory_trim_kib);
        }
        if self.disks.len() > limits::MAX_DISKS {
            return refuse("disks", format!("at most {} disks", limits::MAX_DISKS), self.disks.len());
        }
        if self.nics.len() > limits::MAX_NICS {
            return refuse("nics", format!("at most {} interfaces", limits::MAX_NICS), self.nics.len());
        }
        Ok(())
    }

    fn check_volumes(&self) -> Result<(), InvalidDefinition> {
        for (at, disk) in self.disks.iter().enumerate() {
            let size = disk.size_bytes;
            if size == 0 || size % 512 != 0 || size > limits::MAX_DISK_BYTES {
                let expected = format!("a multiple of 512 up to {}", limits::MAX_DISK_BYTES);
                return refuse(format!("disks[{at}].size_bytes"), expected, size);
            }
        }
        if let Firmware::Uefi(uefi) = &self.firmware {
            for (field, size) in [("code_bytes", uefi.code_bytes), ("vars_bytes", uefi.vars_bytes)] {
                if size == 0 || size % 4096 != 0 || size > limits::MAX_FLASH_BYTES {
                    let expected = format!("a multiple of 4096 up to {}", limits::MAX_FLASH_BYTES);
                    return refuse(format!("firmware.uefi.{field}"), expected, size);
                }
            }
            if self.disks.iter().any(|disk| disk.name == uefi.vars) {
                return refuse("firmware.uefi.vars", "a name that no disk has", &uefi.vars);
            }
        }
        let names = self.disks.iter().enumerate().map(|(at, disk)| (format!("disks[{at}].name"), &disk.name));
        only_once(names)
    }

    fn check_nics(&self) -> Result<(), InvalidDefinition> {
        let fields = |part: &'static str| {
            self.nics.iter().enumerate().map(move |(at, nic)| (format!("nics[{at}].{part}"), nic))
        };
        only_once(fields("name").map(|(field, nic)| (field, &nic.name)))?;
        only_once(fields("mac").map(|(field, nic)| (field, nic.mac_text())))?;
        let homes =
            fields("home").flat_map(|(field, nic)| nic.home.iter().map(move |p| (field.clone(), p.addr)));
        only_once(homes)?;
        fields("").try_for_each(|(field, nic)| check_nic(&field, nic))
    }

    fn check_pci(&self) -> Result<(), InvalidDefinition> {
        let free = self.machine.free_slots();
        for (field, pci) in self.pci_devices() {
            if !free.contains(&pci.slot()) {
                let expected = format!(
                    "a slot from {:02x} to {:02x}, which {} leaves free",
                    free.start(),
                    free.end(),
                    self.machine
                );
                return refuse(field, expected, pci);
            }
        }
        only_once(self.pci_devices())?;
        // A guest looks for further functions only where function 0 answers.
        for (field, pci) in self.pci_devices() {
            let first =
                |(_, other): (String, super::PciAddress)| other.slot() == pci.slot() && other.function() == 0;
            if !self.pci_devices().any(first) {
                return refuse(field, "a device at function 0 of the same slot", pci);
            }
        }
        Ok(())
    }

    fn check_dns(&self) -> Result<(), InvalidDefinition> {
        if let Some(name) = &self.dns_name
            && !is_host_name(name)
        {
            let found: String = name.chars().take(80).collect();
            return refuse(
                "dns_name",
                "a full host name such as \"web1.site.example\"",
                format!("{found:?}"),
            );
        }
        match self.dns_ttl_s {
            Some(ttl) if ttl == 0 || ttl > limits::MAX_DNS_TTL_S => {
                refuse("dns_ttl_s", format!("1 to {} seconds", limits::MAX_DNS_TTL_S), ttl)
            }
            Some(_) | None => Ok(()),
        }
    }
}

fn check_nic(field: &str, nic: &Nic) -> Result<(), InvalidDefinition> {
    let Mac(bytes) = nic.mac;
    if bytes[0] & 1 == 1 || bytes == [0; 6] {
        return refuse(format!("{field}mac"), "an address of one station, not of a group", nic.mac_text());
    }
    if nic.home.len() > limits::MAX_HOME_ADDRESSES {
        let expected = format!("at most {} addresses", limits::MAX_HOME_ADDRESSES);
        return refuse(format!("{field}home"), expected, nic.home.len());
    }
    match nic.home.iter().find(|p| p.addr.is_unspecified() || p.addr.is_loopback() || p.addr.is_multicast()) {
        Some(prefix) => refuse(format!("{field}home"), "an address that one machine can have", prefix.addr),
        None => Ok(()),
    }
}

fn only_once<T: Ord + ToString>(
    fields: impl IntoIterator<Item = (String, T)>,
) -> Result<(), InvalidDefinition> {
    let mut seen = BTreeMap::new();
    for (field, value) in fields {
        let text = value.to_string();
        if let Some(first) = seen.insert(value, field.clone()) {
            return refuse(field, format!("a value of its own ({first} has the same)"), text);
        }
    }
    Ok(())
}

/// RFC 1123, 2.1, with at least two labels; a final dot is not wanted.
fn is_host_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.contains('.') && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::super::definition::tests::web1;
    use super::*;

    #[track_caller]
    fn refused(change: impl FnOnce(&mut MachineDefinition), field: &str) {
        let mut definition = web1();
        change(&mut definition);
        let error = definition.validate().unwrap_err();
        assert_eq!(error.field, field, "{error}");
        assert!(error.to_string().contains("expected"), "{error}");
    }

    #[test]
    fn a_fault_is_reported_at_its_field() {
        refused(|it| it.vcpus = 0, "vcpus");
        refused(|it| it.memory_mib = 0, "memory_mib");
        refused(|it| it.memory_trim_kib = 4, "memory_trim_kib");
        refused(|it| it.memory_trim_kib = 256, "memory_trim_kib");
        refused(|it| it.disks[1].size_bytes = 513, "disks[1].size_bytes");
        refused(|it| it.disks[1].name = it.disks[0].name.clone(), "disks[1].name");
        refused(|it| it.nics[0].pci = it.disks[1].pci, "nics[0].pci");
        refused(|it| it.rng = "1f.0".parse().ok(), "rng");
        refused(|it| it.rng = "07.1".parse().ok(), "rng");
        refused(|it| it.nics[0].mac = Mac([1, 0, 0, 0, 0, 1]), "nics[0].mac");
        refused(|it| it.nics[0].home[0].addr = "127.0.0.1".parse().unwrap(), "nics[0].home");
        refused(|it| it.nics[0].home[1] = it.nics[0].home[0], "nics[0].home");
        refused(|it| it.dns_name = Some("web1".to_owned()), "dns_name");
        refused(|it| it.dns_name = Some("-a.b".to_owned()), "dns_name");
        refused(|it| it.dns_ttl_s = Some(0), "dns_ttl_s");
    }

    #[test]
    fn an_address_used_twice_names_both_places() {
        let mut definition = web1();
        definition.nics.push(definition.nics[0].clone());
        definition.nics[1].name = "wan".parse().unwrap();
        let error = definition.validate().unwrap_err();
        assert_eq!(error.field, "nics[1].mac");
        assert!(error.expected.contains("nics[0].mac"), "{error}");
    }

    #[test]
    fn the_lists_hold_their_limit_and_not_one_more() {
        let mut definition = web1();
        definition.nics.clear();
        let disk = definition.disks[0].clone();
        definition.disks.clear();
        for at in 0..limits::MAX_DISKS as u8 {
            let mut disk = disk.clone();
            disk.name = format!("d{at}").parse().unwrap();
            disk.pci = super::super::PciAddress::new(at + 1, 0).unwrap();
            definition.disks.push(disk);
        }
        assert_eq!(definition.validate(), Ok(()));
        definition.disks.push(disk);
        assert_eq!(definition.validate().unwrap_err().field, "disks");
    }

    #[test]
    fn the_limits_themselves_are_allowed() {
        let mut definition = web1();
        definition.vcpus = limits::MAX_VCPUS;
        definition.memory_mib = limits::MAX_MEMORY_MIB;
        definition.disks[0].size_bytes = limits::MAX_DISK_BYTES;
        definition.dns_ttl_s = Some(limits::MAX_DNS_TTL_S);
        assert_eq!(definition.validate(), Ok(()));
    }
}
