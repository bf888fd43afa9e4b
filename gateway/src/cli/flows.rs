//! `longhaul flows`: what is still held for connections of a machine that left, as text.

use std::process::ExitCode;
use std::time::Duration;

use longhaul_core::ids::VmName;
use longhaul_core::tunnel::flows::{FlowEntry, FlowOrigin, FlowState, HeldBy};
use longhaul_core::tunnel::packet::Side;
use longhaul_core::units::Bytes;

use crate::api::client::{Client, ClientError};
use crate::api::types::{FlowsView, MAX_FLOWS_SHOWN, NicFlows};

/// Prints the flows, and first what the tunnel waits for.
pub async fn run(client: &Client, vm: &VmName, json: bool) -> Result<ExitCode, ClientError> {
    let view = client.flows(vm).await?;
    if json {
        println!("{}", serde_json::to_string(&view).map_err(ClientError::Form)?);
    } else {
        print!("{}", page(vm, &view));
    }
    Ok(ExitCode::SUCCESS)
}

fn page(vm: &VmName, view: &FlowsView) -> String {
    let mut page = format!("{vm} is at {}\n", view.at);
    for NicFlows { nic, held_by, flows } in &view.nics {
        page += &format!("{nic}: {}\n", waits_for(held_by));
        for flow in flows {
            page += &line(flow);
        }
        let left_out = held_by.flows.alive().saturating_sub(flows.len() as u64);
        if flows.len() >= MAX_FLOWS_SHOWN && left_out > 0 {
            page += &format!("  and {left_out} more, which were silent for less long\n");
        }
    }
    page
}

/// What keeps the tunnel, in words.
fn waits_for(held: &HeldBy) -> String {
    let mut parts = Vec::new();
    let alive = held.flows.alive();
    if alive > 0 {
        parts.push(format!("{alive} connections"));
    }
    match held.names_left {
        None => parts.push("new clients, who are still sent here".to_owned()),
        Some(left) if !left.is_zero() => parts.push(format!("old answers of name servers, {}", time(left))),
        Some(_) => {}
    }
    if !held.quiet_left.is_zero() {
        parts.push(format!("nobody new for {}", time(held.quiet_left)));
    }
    if !held.untracked_left.is_zero() {
        parts.push(format!("connections beyond max_flows, {}", time(held.untracked_left)));
    }
    if let Some(left) = held.limit_left {
        parts.push(format!("at most {}", time(left)));
    }
    if parts.is_empty() {
        "waits for nothing any more".to_owned()
    } else {
        format!("waits for {}", parts.join("; "))
    }
}

fn line(flow: &FlowEntry) -> String {
    let tuple = &flow.tuple;
    let protocol = match tuple.protocol {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        other => other.to_string(),
    };
    let state = match flow.state {
        FlowState::Opening => "opening",
        FlowState::Open => "open",
        FlowState::Closing => "closing",
        FlowState::Closed => "closed",
    };
    let origin = match flow.origin {
        FlowOrigin::Seeded => "from before the move",
        FlowOrigin::New => "opened since",
        FlowOrigin::Underway => "found under way",
    };
    let one_way = match flow.heard_only {
        None => "",
        Some(Side::Guest) => ", ONLY THE GUEST IS HEARD",
        Some(Side::Remote) => ", ONLY THE OTHER END IS HEARD",
    };
    format!(
        "  {protocol} {}:{} <- {}:{}  {state}, {origin}, {} old, silent {}, {} in, {} out{one_way}\n",
        tuple.local,
        tuple.local_port,
        tuple.remote,
        tuple.remote_port,
        time(flow.age),
        time(flow.idle),
        Bytes(flow.to_guest.bytes),
        Bytes(flow.from_guest.bytes),
    )
}

fn time(time: Duration) -> String {
    let secs = time.as_secs();
    match secs {
        0..=119 => format!("{secs} s"),
        120..=7199 => format!("{} min", secs / 60),
        7200..=172_799 => format!("{} h", secs / 3600),
        _ => format!("{} days", secs / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use longhaul_core::tunnel::flows::FlowCounts;
    use longhaul_core::tunnel::handover::FlowTuple;

    use super::*;

    fn held() -> HeldBy {
        HeldBy {
            flows: FlowCounts { tcp_open: 2, udp: 1, ..FlowCounts::default() },
            linger_left: Duration::ZERO,
            untracked_left: Duration::ZERO,
            names_left: None,
            quiet_left: Duration::from_secs(86_400),
            limit_left: Some(Duration::from_secs(600)),
            released: false,
        }
    }

    #[test]
    fn what_the_tunnel_waits_for_is_said_in_words() {
        let mut held = held();
        let text = waits_for(&held);
        assert_eq!(
            text,
            "waits for 3 connections; new clients, who are still sent here; nobody new for 24 h; at most 10 min"
        );
        held.flows = FlowCounts::default();
        (held.names_left, held.quiet_left, held.limit_left) = (Some(Duration::ZERO), Duration::ZERO, None);
        assert_eq!(waits_for(&held), "waits for nothing any more");
    }

    #[test]
    fn connections_that_are_not_shown_are_counted() {
        let end = |address: [u8; 4]| std::net::IpAddr::from(address);
        let tuple = FlowTuple {
            protocol: 6,
            local: end([198, 51, 100, 10]),
            local_port: 22,
            remote: end([192, 0, 2, 1]),
            remote_port: 50_000,
        };
        let flow = FlowEntry {
            tuple,
            state: FlowState::Open,
            origin: FlowOrigin::Seeded,
            age: Duration::ZERO,
            idle: Duration::ZERO,
            idle_left: Duration::ZERO,
            to_guest: Default::default(),
            from_guest: Default::default(),
            heard_only: None,
        };
        let mut held_by = held();
        held_by.flows.tcp_open = MAX_FLOWS_SHOWN as u64 + 234;
        let shown = |flows| {
            let (nic, held_by) = ("lan".parse().unwrap(), held_by.clone());
            let view = FlowsView { at: "b".parse().unwrap(), nics: vec![NicFlows { nic, held_by, flows }] };
            page(&"web1".parse().unwrap(), &view)
        };
        let text = shown(vec![flow.clone(); MAX_FLOWS_SHOWN]);
        assert!(text.ends_with("  and 235 more, which were silent for less long\n"), "{text}");
        // What is over and not forgotten yet is counted, and not shown.
        assert!(!shown(vec![flow]).contains("more"));
    }
}
