//! Properties: a definition survives TOML and postcard unchanged, and one that was written before disks had templates is
//! refused and not misread.

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::tunnel::handover::{Mac, Prefix};

fn firmware() -> impl Strategy<Value = Firmware> {
    let digest = || any::<[u8; 32]>().prop_map(Sha256Digest);
    prop_oneof![
        Just(Firmware::Bios),
        (1_u64..16, 1_u64..16).prop_map(|(code, vars)| Firmware::Uefi(UefiFirmware {
            code_bytes: code << 12,
            vars: "efi-vars".parse().unwrap(),
            vars_bytes: vars << 12,
        })),
        ("[a-zA-Z0-9._-]{1,64}", "[ -~]{0,100}", digest(), proptest::option::of(digest())).prop_map(
            |(name, cmdline, kernel_sha256, initrd_sha256)| Firmware::Kernel(KernelBoot {
                name: name.parse().unwrap(),
                cmdline: cmdline.parse().unwrap(),
                kernel_sha256,
                initrd_sha256,
            })
        ),
    ]
}

fn disk(at: u8) -> impl Strategy<Value = Disk> {
    let serial = proptest::option::of("[a-zA-Z0-9._-]{1,20}");
    let template = proptest::option::of("[a-z][a-z0-9-]{0,31}");
    (1_u64..1 << 30, serial, template).prop_map(move |(sectors, serial, template)| Disk {
        name: format!("disk{at}").parse().unwrap(),
        size_bytes: sectors * 512,
        pci: PciAddress::new(2 + at, 0).unwrap(),
        serial: serial.map(|text| text.parse().unwrap()),
        template: template.map(|text| text.parse().unwrap()),
    })
}

fn nic(at: u8) -> impl Strategy<Value = Nic> {
    let home = prop_oneof![
        (1_u32..0xffff_ff00, 0_u8..=32).prop_map(|(addr, len)| (IpAddr::from(addr.to_be_bytes()), len)),
        (any::<[u16; 7]>(), 0_u8..=128)
            .prop_map(|(t, len)| { (IpAddr::from([0x2001, t[0], t[1], t[2], t[3], t[4], t[5], t[6]]), len) }),
    ]
    .prop_filter("one station", |(addr, _)| !addr.is_loopback() && !addr.is_multicast())
    .prop_map(|(addr, len)| Prefix { addr, len });
    (any::<[u8; 4]>(), proptest::option::of(home)).prop_map(move |(mac, home)| Nic {
        name: format!("nic{at}").parse().unwrap(),
        mac: Mac([0x52, mac[0], mac[1], mac[2], mac[3], at]),
        home: home.into_iter().collect(),
        lan: "servers".parse().unwrap(),
        pci: PciAddress::new(16 + at, 0).unwrap(),
    })
}

fn definition() -> impl Strategy<Value = MachineDefinition> {
    let disks = (0..=limits::MAX_DISKS as u8).prop_flat_map(|count| (0..count).map(disk).collect::<Vec<_>>());
    let nics = (0..=limits::MAX_NICS as u8).prop_flat_map(|count| (0..count).map(nic).collect::<Vec<_>>());
    let sizes = (1..=limits::MAX_VCPUS, limits::MIN_MEMORY_MIB..=limits::MAX_MEMORY_MIB);
    let dns = (proptest::option::of("[a-z0-9]{1,20}\\.example"), proptest::option::of(1_u32..100_000));
    let boot = (firmware(), prop_oneof![Just(Restart::Never), Just(Restart::OnCrash)]);
    ("[a-z][a-z0-9-]{0,31}", proptest::option::of(any::<[u8; 16]>()), sizes, boot, dns, disks, nics).prop_map(
        |(name, uuid, (vcpus, memory_mib), (firmware, restart), (dns_name, dns_ttl_s), disks, nics)| {
            MachineDefinition {
                name: name.parse().unwrap(),
                uuid: uuid.map(MachineUuid),
                machine: "pc-i440fx-7.2".parse().unwrap(),
                cpu: "qemu64".parse().unwrap(),
                vcpus,
                memory_mib,
                memory_trim_kib: 16,
                firmware,
                rng: PciAddress::new(30, 0),
                dns_name,
                dns_ttl_s,
                restart,
                disks,
                nics,
            }
        },
    )
}

/// Two interfaces drawn with the same address are no sound definition.
fn sound(mut definition: MachineDefinition) -> MachineDefinition {
    let mut seen = std::collections::BTreeSet::new();
    for nic in &mut definition.nics {
        nic.home.retain(|prefix| seen.insert(prefix.addr));
    }
    definition
}

/// As wire protocol 6, and journals of its time, have a definition.
fn of_protocol_6(of: &MachineDefinition) -> Vec<u8> {
    let disk = |disk: &Disk| (disk.name.clone(), disk.size_bytes, disk.pci, disk.serial.clone());
    let disks: Vec<_> = of.disks.iter().map(disk).collect();
    let begins = (&of.name, of.uuid, &of.machine, &of.cpu, of.vcpus, of.memory_mib, of.memory_trim_kib);
    let goes_on = (&of.firmware, of.rng, &of.dns_name, of.dns_ttl_s, of.restart);
    postcard::to_allocvec(&(begins, goes_on, disks, &of.nics)).unwrap()
}

proptest! {
    #[test]
    fn a_definition_survives_toml_and_the_wire(definition in definition()) {
        let definition = sound(definition);
        prop_assert_eq!(definition.validate(), Ok(()));
        let text = toml::to_string(&definition).unwrap();
        prop_assert_eq!(&toml::from_str::<MachineDefinition>(&text).unwrap(), &definition);
        let bytes = postcard::to_allocvec(&definition).unwrap();
        prop_assert_eq!(&postcard::from_bytes::<MachineDefinition>(&bytes).unwrap(), &definition);
    }

    #[test]
    fn a_template_stands_behind_what_a_disk_had_and_a_definition_without_that_place_is_refused(
        definition in definition(),
    ) {
        let mut definition = sound(definition);
        let before = of_protocol_6(&definition);
        definition.disks.iter_mut().for_each(|disk| disk.template = None);
        let now = postcard::to_allocvec(&definition).unwrap();
        prop_assert_eq!(now.len(), before.len() + definition.disks.len(), "a byte for each disk");
        let read = postcard::from_bytes::<MachineDefinition>(&before);
        prop_assert!(read.is_err() || definition.disks.is_empty(), "{:?}", read);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = postcard::from_bytes::<MachineDefinition>(&bytes);
    }
}
