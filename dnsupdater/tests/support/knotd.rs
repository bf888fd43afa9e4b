//! Knot DNS: per-name policy by `update-owner-name`. A name outside it is answered with NOTAUTH and BADKEY.

use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use super::daemon::{Program, Role};
use super::{KEYS, ZONES};

pub const KNOTD: Program = Program {
    name: "knotd",
    package: "knot",
    besides: &[],
    prepare,
    arguments: |directory| vec!["-c".to_owned(), directory.join("knot.conf").display().to_string()],
};

fn prepare(directory: &Path, address: SocketAddr, role: Role) {
    let Role::Primary { notify } = role else { panic!("Knot is always the primary here") };
    // Knot does not make the folder of its journal: without it every update is answered with SERVFAIL.
    for folder in ["run", "db"] {
        fs::create_dir(directory.join(folder)).expect("writable");
    }
    for (at, (_, text)) in ZONES.iter().enumerate() {
        fs::write(directory.join(format!("{at}.zone")), text).expect("writable");
    }
    fs::write(directory.join("knot.conf"), configuration(directory, address, notify)).expect("writable");
}

fn configuration(directory: &Path, address: SocketAddr, notify: SocketAddr) -> String {
    let shown = directory.display();
    let mut text = format!(
        "server:\n  rundir: \"{shown}/run\"\n  listen: {}@{}\n  udp-workers: 1\n  tcp-workers: 2\n  \
         background-workers: 1\n  automatic-acl: off\nlog:\n  - target: stderr\n    any: info\ndatabase:\n  \
         storage: \"{shown}/db\"\n  journal-db-max-size: 64M\nkey:\n",
        address.ip(),
        address.port()
    );
    for (name, hash, secret) in KEYS {
        writeln!(text, "  - id: {name}\n    algorithm: {hash}\n    secret: {secret}").expect("memory");
    }
    if notify.port() != 0 {
        let (ip, port) = (notify.ip(), notify.port());
        writeln!(text, "remote:\n  - id: secondary\n    address: {ip}@{port}").expect("memory");
    }
    text += "acl:\n  - id: all\n    key: [site-a, site-512]\n    action: [update, transfer]\n    \
             update-type: [A, AAAA, PTR, TXT]\n  - id: some\n    key: site-b\n    action: update\n    \
             update-type: [A, AAAA, TXT]\n    update-owner: name\n    update-owner-match: equal\n    \
             update-owner-name: [app.vm.example., _longhaul.app.vm.example., dual.vm.example., \
             _longhaul.dual.vm.example.]\nzone:\n";
    let told = if notify.port() == 0 { "" } else { "    notify: secondary\n" };
    for (at, (origin, _)) in ZONES.iter().enumerate() {
        write!(
            text,
            "  - domain: {origin}.\n    storage: \"{shown}\"\n    file: {at}.zone\n    acl: [all, some]\n{told}    \
             zonefile-sync: 0\n    zonefile-load: whole\n    journal-content: changes\n    semantic-checks: off\n"
        )
        .expect("memory");
    }
    text
}
