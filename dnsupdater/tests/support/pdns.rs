//! PowerDNS with SQLite. It has no per-name policy, and refuses without TSIG whatever it does not like of a key.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use super::daemon::{Program, Role};
use super::{KEYS, ZONES};

const SCHEMA: &str = "/usr/share/pdns-backend-sqlite3/schema/schema.sqlite3.sql";

pub const PDNS: Program = Program {
    name: "pdns_server",
    package: "pdns-server",
    besides: &[("pdnsutil", "pdns-server"), (SCHEMA, "pdns-backend-sqlite3"), ("sqlite3", "sqlite3")],
    prepare,
    arguments: |directory| vec![format!("--config-dir={}", directory.display())],
};

fn prepare(directory: &Path, address: SocketAddr, role: Role) {
    let Role::Primary { notify } = role else { panic!("PowerDNS is always the primary here") };
    fs::create_dir(directory.join("run")).expect("writable");
    fs::write(directory.join("pdns.conf"), configuration(directory, address, notify)).expect("writable");
    let schema = File::open(SCHEMA).expect("pdns-backend-sqlite3 is installed");
    let database = directory.join("pdns.sqlite3");
    finish(Command::new("sqlite3").arg(database).stdin(schema));
    let util = |arguments: &[&str]| {
        let folder = format!("--config-dir={}", directory.display());
        finish(Command::new("pdnsutil").arg(folder).args(arguments).stdin(Stdio::null()));
    };
    for (name, hash, secret) in KEYS {
        util(&["import-tsig-key", name, hash, secret]);
    }
    let names = KEYS.map(|(name, _, _)| name);
    for (at, (origin, text)) in ZONES.iter().enumerate() {
        let file = directory.join(format!("{at}.zone"));
        fs::write(&file, text).expect("writable");
        util(&["load-zone", origin, &file.display().to_string()]);
        util(&[&["set-meta", origin, "TSIG-ALLOW-DNSUPDATE"], names.as_slice()].concat());
        util(&["set-meta", origin, "TSIG-ALLOW-AXFR", "site-a"]);
        util(&["set-meta", origin, "SOA-EDIT-DNSUPDATE", "INCREASE"]);
        if notify.port() != 0 {
            util(&["set-kind", origin, "primary"]);
            util(&["set-meta", origin, "NOTIFY-DNSUPDATE", "1"]);
            util(&["set-meta", origin, "ALSO-NOTIFY", &notify.to_string()]);
        }
    }
}

fn configuration(directory: &Path, address: SocketAddr, notify: SocketAddr) -> String {
    let shown = directory.display();
    let primary = if notify.port() == 0 { "no" } else { "yes" };
    format!(
        "launch=gsqlite3\ngsqlite3-database={shown}/pdns.sqlite3\ngsqlite3-pragma-synchronous=2\ngsqlite3-dnssec=yes\n\
         local-address={}\nlocal-port={}\nsocket-dir={shown}/run\ndaemon=no\nguardian=no\nprimary={primary}\n\
         only-notify=\ndnsupdate=yes\nallow-dnsupdate-from=127.0.0.0/8\ndisable-axfr=no\nallow-axfr-ips=\ncache-ttl=0\n\
         query-cache-ttl=0\nnegquery-cache-ttl=0\nconsistent-backends=no\nzone-cache-refresh-interval=0\n\
         loglevel=6\nreceiver-threads=1\n",
        address.ip(),
        address.port()
    )
}

fn finish(command: &mut Command) {
    let output = command.output().expect("it is installed");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
