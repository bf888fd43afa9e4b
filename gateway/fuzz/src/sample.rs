//! Values that real gateways send and keep, for the seeds of several targets.

use std::net::Ipv6Addr;

use longhaul_core::ids::{Epoch, SiteName};
use longhaul_core::machine::MachineDefinition;
use longhaul_core::migration::CommitMode;
use longhaul_core::migration::message::{CareOf, Carried, Handover, Proposal, Reservation};
use longhaul_core::tunnel::advertisement::Advertisement;
use longhaul_core::tunnel::handover::{FlowTuple, Neighbour, NeighbourKind, NicHandover};

/// A definition with a disk that was cloned, a NIC and a name.
pub const DEFINITION: &str = r#"name = "web1"
machine = "pc-q35-7.2"
cpu = "qemu64"
vcpus = 2
memory_mib = 256
dns_name = "web1.example.net"
dns_ttl_s = 60

[[disks]]
name = "root"
size_bytes = 1073741824
pci = "03.0"
template = "debian-12"

[[nics]]
name = "lan"
mac = "52:54:00:aa:00:10"
home = ["198.51.100.10/24", "2001:db8::10/64"]
lan = "lan"
pci = "05.0"
"#;

/// A router advertisement with the router's link-layer address, a prefix, an MTU, a name server, a search list, a route
/// and an option that nobody knows.
pub const ADVERTISEMENT: &[u8] = b"\x86\0\0\0\x40\xc0\x07\x08\0\0\0\0\0\0\0\0\
    \x01\x01\x52\x54\0\xaa\0\x01\
    \x03\x04\x40\xc0\0\x01\x51\x80\0\0\x38\x40\0\0\0\0\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\0\
    \x05\x01\0\0\0\0\x05\xdc\
    \x19\x03\0\0\0\0\x04\xb0\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x53\
    \x1f\x03\0\0\0\0\x0e\x10\x07example\x03net\0\0\0\0\
    \x18\x02\x20\x08\0\0\x0e\x10\x20\x01\x0d\xb8\0\0\0\0\
    \xc8\x01\0\0\0\0\0\0";

/// A site's name.
pub fn site(name: &str) -> SiteName {
    name.parse().expect("a name")
}

/// The machine of [`DEFINITION`].
pub fn definition() -> MachineDefinition {
    toml::from_str(DEFINITION).expect("the sample is a definition")
}

/// What a home says of the machine's NIC.
pub fn nics() -> Vec<NicHandover> {
    let nic = definition().nics.remove(0);
    let home = nic.home[0].addr;
    let router = Neighbour { addr: [198, 51, 100, 1].into(), mac: nic.mac, kind: NeighbourKind::Router };
    let host = Neighbour { addr: [198, 51, 100, 2].into(), mac: nic.mac, kind: NeighbourKind::Host };
    let said = Advertisement::parse(ADVERTISEMENT).expect("the sample is an advertisement");
    let advertiser = Neighbour {
        addr: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).into(),
        mac: nic.mac,
        kind: NeighbourKind::Advertiser(Box::new(said)),
    };
    let flow = FlowTuple {
        protocol: 6,
        local: home,
        local_port: 80,
        remote: [192, 0, 2, 1].into(),
        remote_port: 40000,
    };
    vec![NicHandover {
        nic: nic.name.clone(),
        mac: nic.mac,
        home: nic.home.clone(),
        neighbours: vec![advertiser, router, host],
        home_prefixes: nic.home,
        flows: vec![flow],
    }]
}

/// A proposal of the machine.
pub fn proposal() -> Proposal {
    Proposal {
        definition: definition(),
        home_site: site("a"),
        hypervisor: "7.2.17".to_owned(),
        epoch: Epoch(3),
        running: true,
        commit: CommitMode::Confirmed,
        nics: nics(),
        carried: vec![Carried {
            nic: definition().nics.remove(0).name,
            home: definition().nics[0].home[0].addr,
            addr: [192, 0, 2, 200].into(),
            site: site("c"),
        }],
    }
}

/// What is held for it.
pub fn reservation() -> Reservation {
    let nic = definition().nics.remove(0);
    Reservation {
        care_of: vec![CareOf { nic: nic.name, home: nic.home[0], addr: [203, 0, 113, 20].into() }],
        shadow_pages: 1 << 18,
        disk_window_log: 26,
        memory_base: Some([7; 32]),
    }
}

/// What travels with the commitment.
pub fn handover() -> Handover {
    Handover { nics: nics() }
}

/// A migration stream as QEMU 7.2 writes it: a block, `pages` of memory of which every second is zero, a device.
pub fn memory_stream(pages: u64) -> Vec<u8> {
    const PAGE: u64 = 4096;
    const SECTION: [u8; 4] = [0, 0, 0, 2];
    let mut stream = b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2".to_vec();
    let end_section = |stream: &mut Vec<u8>| {
        stream.extend(0x10u64.to_be_bytes());
        stream.push(0x7e);
        stream.extend(SECTION);
    };
    stream.push(1);
    stream.extend(SECTION);
    stream.extend(b"\x03ram\0\0\0\0\0\0\0\x04");
    stream.extend(((pages * PAGE) | 4).to_be_bytes());
    stream.extend(b"\x06pc.ram");
    stream.extend((pages * PAGE).to_be_bytes());
    end_section(&mut stream);
    stream.push(3);
    stream.extend(SECTION);
    for page in 0..pages {
        let (kind, name) = (if page % 2 == 0 { 8 } else { 2 }, if page == 0 { 0 } else { 0x20 });
        stream.extend(((page * PAGE) | kind | name).to_be_bytes());
        if page == 0 {
            stream.extend(b"\x06pc.ram");
        }
        match kind {
            8 => stream.extend([page as u8 + 1; PAGE as usize]),
            _ => stream.push(0),
        }
    }
    end_section(&mut stream);
    stream.extend(b"\x04\0\0\0\x05device state");
    stream
}
