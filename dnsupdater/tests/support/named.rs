//! Debian's BIND: per-name policy by `update-policy`.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use super::daemon::{Program, Role};
use super::{KEYS, ZONES};

pub const NAMED: Program = Program {
    name: "named",
    package: "bind9",
    besides: &[],
    prepare,
    arguments: |directory| {
        let file = directory.join("named.conf").display().to_string();
        ["-g", "-n", "1", "-c", &file].map(str::to_owned).into()
    },
};

fn prepare(directory: &Path, address: SocketAddr, role: Role) {
    let zones = match role {
        Role::Primary { notify } => primary_zones(notify),
        Role::Secondary { of } => format!(
            r#"zone "vm.example" {{ type secondary; file "vm.copy"; masterfile-format text; notify no;
                primaries {{ {} port {} key site-a; }}; }};"#,
            of.ip(),
            of.port()
        ),
    };
    for (at, (_, text)) in ZONES.iter().enumerate() {
        fs::write(directory.join(format!("{at}.zone")), text).expect("writable");
    }
    fs::write(directory.join("named.conf"), options(directory, address) + &zones).expect("writable");
}

fn options(directory: &Path, address: SocketAddr) -> String {
    let key = |(name, hash, secret): &(&str, &str, &str)| {
        format!(r#"key "{name}" {{ algorithm {hash}; secret "{secret}"; }};"#)
    };
    let keys: String = KEYS.iter().map(key).collect();
    format!(
        r#"{keys} options {{ directory "{}"; pid-file none; session-keyfile none; lock-file none;
            listen-on port {} {{ {}; }}; listen-on-v6 {{ none; }}; recursion no; dnssec-validation no;
            allow-transfer {{ key site-a; }}; minimal-responses yes; }};
        controls {{ }};"#,
        directory.display(),
        address.port(),
        address.ip()
    )
}

fn primary_zones(secondary: SocketAddr) -> String {
    let notify = match secondary.port() {
        0 => "notify no;".to_owned(),
        port => {
            format!("notify explicit; also-notify {{ {} port {port}; }}; notify-delay 0;", secondary.ip())
        }
    };
    let only = ["app", "dual"].map(|name| {
        format!(
            "grant site-b name {name}.vm.example. A AAAA; grant site-b name _longhaul.{name}.vm.example. TXT;"
        )
    });
    let zone = |(at, (origin, _)): (usize, &(&str, &str))| {
        let rest = if *origin == "vm.example" { only.concat() } else { String::new() };
        format!(
            r#"zone "{origin}" {{ type primary; file "{at}.zone"; {notify} update-policy {{
                grant site-a subdomain {origin}. A AAAA PTR TXT; grant site-512 subdomain {origin}. A AAAA PTR TXT;
                {rest} }}; }};"#
        )
    };
    ZONES.iter().enumerate().map(zone).collect()
}
