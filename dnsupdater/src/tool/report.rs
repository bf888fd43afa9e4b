//! What the tool prints: for people as lines, for programs as one JSON object, and the exit code.

use std::net::IpAddr;

use dnsupdater::{
    Error, Records, Register, ResponseCode, ServerState, ServerView, Swap, Unasked, Verification,
};
use serde_json::{Value, json};

/// The name is not as expected, or a server is behind.
pub const LOST: u8 = 1;
const USAGE: u8 = 2;
const UNREACHABLE: u8 = 3;
const REFUSED: u8 = 4;
/// The name is changed, its reverse name is not.
pub const REVERSE: u8 = 5;

/// The end of a run.
pub struct Report {
    pub code: u8,
    pub text: String,
    pub json: Value,
}

impl Report {
    /// An error; its text is printed elsewhere.
    pub fn failure(error: &Error) -> Self {
        let json = json!({ "outcome": "failed", "kind": error.kind(), "message": error.to_string() });
        Self { code: exit_code(error), text: String::new(), json }
    }

    /// A swap that won.
    pub fn won(swap: &Swap) -> Self {
        let (name, new) = (&swap.name, list(&swap.new));
        Self {
            code: 0,
            text: format!("{name} has {new} now, epoch {}, owner {}", swap.epoch_to, swap.owner),
            json: json!({
                "outcome": "won", "name": name, "addresses": swap.new, "ttl_s": swap.ttl_s,
                "epoch": swap.epoch_to, "owner": swap.owner, "txn": swap.txn
            }),
        }
    }

    /// A change that found the name otherwise than expected; `expected` is empty if no addresses were.
    pub fn lost(expected: &[IpAddr], current: &Records, rcode: Option<ResponseCode>) -> Self {
        let said = match rcode {
            Some(ResponseCode::NXRRSet) => " (NXRRSET: something expected is not there)",
            Some(ResponseCode::YXRRSet) => " (YXRRSET: something is there that was not expected)",
            Some(_) | None => "",
        };
        let difference = if expected.is_empty() || current.has(expected) {
            "its addresses are as expected, its ownership record is not: somebody swapped it meanwhile"
                .to_owned()
        } else {
            format!("expected {}, it has {}", list(expected), list(&current.addresses))
        };
        Self {
            code: LOST,
            text: format!(
                "lost{said}: {difference}; nothing was changed. Find out who changed it, then repeat with what is there\n{}",
                records_text(current)
            ),
            json: json!({
                "outcome": "lost", "current": current, "rcode": rcode.map(|rcode| format!("{rcode:?}").to_uppercase())
            }),
        }
    }

    /// What the servers say.
    pub fn verified(verification: &Verification) -> Self {
        let complete = verification.is_complete();
        let views = verification.servers.iter().map(|view| view_text(view, verification));
        let unasked = |host: &Unasked| format!("{} was NOT ASKED: {}", host.host, host.reason);
        let lines: Vec<_> = views.chain(verification.unasked.iter().map(unasked)).collect();
        let outcome = if complete { "current" } else { "behind" };
        Self {
            code: if complete { 0 } else { LOST },
            text: lines.join("\n"),
            json: json!({ "outcome": outcome, "verification": verification }),
        }
    }

    /// Adds lines of its own to the text, and a field to the JSON.
    pub fn and(mut self, key: &str, lines: &[String], value: Value) -> Self {
        for line in lines {
            self.text.push('\n');
            self.text.push_str(line);
        }
        self.json[key] = value;
        self
    }

    /// The first code that is not 0 counts.
    pub fn or_code(mut self, code: u8) -> Self {
        if self.code == 0 {
            self.code = code;
        }
        self
    }
}

/// A name as it was read.
pub fn records_text(records: &Records) -> String {
    let register = match &records.register {
        Register::Absent => "none".to_owned(),
        Register::Held(ownership) => ownership.to_string(),
        Register::Foreign(found) => format!("{found:?} (not written by dnsupdater)"),
    };
    let target = match &records.cname {
        Some(target) => format!("CNAME {target}"),
        None => list(&records.addresses),
    };
    let ttl = records.ttl_s().map(|ttl_s| format!(", ttl {ttl_s} s")).unwrap_or_default();
    let (name, serial, primary) = (&records.name, records.serial, &records.primary);
    format!("{name} {target}{ttl}\nownership: {register}\nserial {serial} at {primary}")
}

/// Addresses for people.
pub fn list(addresses: &[IpAddr]) -> String {
    if addresses.is_empty() {
        return "no address".to_owned();
    }
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
}

fn view_text(view: &ServerView, verification: &Verification) -> String {
    let host = view.host.as_deref().map(|host| format!(" ({host})")).unwrap_or_default();
    let state = match &view.state {
        ServerState::Current { serial, ttl_s } => {
            format!("current, serial {serial}, ttl {} s", ttl_s.unwrap_or(0))
        }
        ServerState::Behind { serial, addresses } => {
            let primary = verification.serial.map(|serial| format!(" (the primary has {serial})"));
            format!(
                "BEHIND, serial {serial}{}, answers {}: does NOTIFY reach it?",
                primary.unwrap_or_default(),
                list(addresses)
            )
        }
        ServerState::Silent { reason } => format!("SILENT: {reason}"),
    };
    format!("{}{host}: {state}", view.server)
}

fn exit_code(error: &Error) -> u8 {
    match error.kind() {
        "config" | "shape" => USAGE,
        "unreachable" | "outcome-unknown" => UNREACHABLE,
        _refusals => REFUSED,
    }
}
