//! YADIFA. It has no per-name policy.

use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use super::daemon::{Program, Role};
use super::{KEYS, ZONES};

pub const YADIFAD: Program = Program {
    name: "yadifad",
    package: "yadifa",
    besides: &[],
    prepare,
    arguments: |directory| vec!["-c".to_owned(), directory.join("yadifad.conf").display().to_string()],
};

fn prepare(directory: &Path, address: SocketAddr, role: Role) {
    let Role::Primary { notify } = role else { panic!("YADIFA is always the primary here") };
    for folder in ["logs", "run", "zones", "keys", "xfr"] {
        fs::create_dir(directory.join(folder)).expect("writable");
    }
    for (at, (_, text)) in ZONES.iter().enumerate() {
        fs::write(directory.join("zones").join(format!("{at}.zone")), text).expect("writable");
    }
    fs::write(directory.join("yadifad.conf"), configuration(directory, address, notify)).expect("writable");
}

fn configuration(directory: &Path, address: SocketAddr, notify: SocketAddr) -> String {
    let shown = directory.display();
    let mut text = format!(
        "<main>\n  chroot off\n  daemonize off\n  logpath {shown}/logs\n  pidfile {shown}/run/pid\n  datapath {shown}/zones\n  \
         keyspath {shown}/keys\n  xfrpath {shown}/xfr\n  listen {} port {}\n  allow-query any\n  allow-update all\n  \
         allow-transfer all\n  allow-control none\n</main>\n",
        address.ip(),
        address.port()
    );
    for (name, hash, secret) in KEYS {
        write!(text, "<key>\n  name {name}\n  algorithm {hash}\n  secret {secret}\n</key>\n")
            .expect("memory");
    }
    text += "<acl>\n";
    for (name, _, _) in KEYS {
        writeln!(text, "  acl-{name} key {name}").expect("memory");
    }
    writeln!(text, "  all {}\n</acl>", KEYS.map(|(name, _, _)| format!("acl-{name}")).join(";"))
        .expect("memory");
    text += "<channels>\n  stderr STDERR\n</channels>\n<loggers>\n";
    for logger in ["system", "server", "zone"] {
        writeln!(text, "  {logger} INFO,NOTICE,WARNING,ERR,CRIT,ALERT,EMERG stderr").expect("memory");
    }
    text += "</loggers>\n";
    for (at, (origin, _)) in ZONES.iter().enumerate() {
        let told = match notify.port() {
            0 => String::new(),
            port => format!("  notify {} port {port}\n", notify.ip()),
        };
        write!(
            text,
            "<zone>\n  domain {origin}.\n  file {at}.zone\n  type primary\n  allow-update all\n{told}  notify-auto false\n</zone>\n"
        )
        .expect("memory");
    }
    text
}
