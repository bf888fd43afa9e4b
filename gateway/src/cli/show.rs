//! Text for people: status, machines, findings.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use longhaul_core::ids::VmName;
use longhaul_core::units::Bytes;

use super::journal::utc;
use crate::api::client::{Client, ClientError};
use crate::api::types::{AnchorView, MigrationView, PeerView, Progressing, RetryView, StatusView};

/// `longhaul status`.
pub async fn status(client: &Client, json: bool) -> Result<ExitCode, ClientError> {
    let view = client.status().await?;
    if json {
        println!("{}", serde_json::to_string(&view).map_err(ClientError::Form)?);
    } else {
        print!("{}", page(&view));
    }
    Ok(ExitCode::SUCCESS)
}

/// `longhaul watch`: the same page every second, until it is interrupted.
pub async fn watch(client: &Client) -> Result<ExitCode, ClientError> {
    let clear = if std::io::stdout().is_terminal() { "\x1b[2J\x1b[H" } else { "" };
    loop {
        let view = client.status().await?;
        println!("{clear}{}", page(&view));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// `longhaul vm list`.
pub fn machines(view: &StatusView) {
    print!("{}", machine_lines(view));
}

/// `longhaul doctor`: exit 1 if anything is not well.
pub async fn doctor(client: &Client, vm: Option<&VmName>, json: bool) -> Result<ExitCode, ClientError> {
    let findings = client.doctor(vm).await?;
    let well = findings.iter().all(|finding| finding.ok);
    if json {
        println!("{}", serde_json::to_string(&findings).map_err(ClientError::Form)?);
    } else {
        for finding in &findings {
            let mark = if finding.ok { "ok  " } else { "FAIL" };
            println!("{mark} {}: {}", finding.check, finding.detail);
            if let Some(remedy) = &finding.remedy {
                println!("     {remedy}");
            }
        }
    }
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn estimate(peer: &PeerView) -> String {
    let estimate = peer.estimated_mbit.map_or_else(String::new, |mbit| format!(", about {mbit:.0} Mbit/s"));
    let limit = peer.limit_mbit.map_or_else(String::new, |mbit| format!(", limited to {mbit:.0} Mbit/s"));
    estimate + &limit
}

fn page(view: &StatusView) -> String {
    let mut page = format!("site {}\n", view.site);
    for peer in &view.peers {
        let state = match (peer.up, peer.rtt_ms) {
            (true, Some(rtt)) => format!("up, {rtt:.1} ms{}", estimate(peer)),
            (true, None) => "up".to_owned(),
            (false, _) => "DOWN".to_owned(),
        };
        page += &format!("  peer {:<16} {state}\n", peer.name.as_str());
    }
    page += "machines\n";
    page += &machine_lines(view);
    if !view.migrations.is_empty() {
        page += "migrations\n";
    }
    for migration in &view.migrations {
        page += &migration_line(migration);
    }
    if !view.anchors.is_empty() {
        page += "connections held for machines that left\n";
    }
    for anchor in &view.anchors {
        page += &anchor_line(anchor);
    }
    let flows: u64 = view.anchors.iter().map(|anchor| anchor.flows).sum();
    if flows > 0 {
        page += &format!("  {flows} connections go through this host; a reboot now breaks them\n");
    }
    if !view.kept.is_empty() {
        page += "disks kept of machines that left\n";
    }
    for disk in &view.kept {
        let until = disk.until_ms.map_or("until it is removed".to_owned(), |ms| format!("until {}", utc(ms)));
        page +=
            &format!("  {:<16} {}  {}  {until}\n", disk.vm.as_str(), disk.path.display(), Bytes(disk.bytes));
    }
    if !view.kept_memory.is_empty() {
        page += "memory kept of machines that moved\n";
    }
    for memory in &view.kept_memory {
        let until =
            memory.until_ms.map_or("until it is removed".to_owned(), |ms| format!("until {}", utc(ms)));
        let (vm, bytes, since) = (&memory.vm, Bytes(memory.bytes), utc(memory.since_ms));
        page += &format!("  {:<16} {bytes}  since {since}  {until}\n", vm.as_str());
    }
    if !view.partials.is_empty() {
        page += "disks kept of machines that did not come\n";
    }
    for partial in &view.partials {
        let (vm, disk, from) = (&partial.vm, &partial.disk, &partial.from);
        page += &format!("  {:<16} {disk:<12} from {from}  {}\n", vm.as_str(), Bytes(partial.bytes));
    }
    let tunnel = &view.tunnel;
    for (machine, packets) in &view.over_share {
        page += &format!("tunnel: {packets} packets of {machine} dropped, more than its share\n");
    }
    page += &format!(
        "tunnel: {} packets out, {} in, {} dropped, {} held\n",
        tunnel.packets_out, tunnel.packets_in, tunnel.dropped, tunnel.held
    );
    page
}

fn machine_lines(view: &StatusView) -> String {
    let mut lines = String::new();
    for machine in &view.machines {
        let place = match &machine.at {
            Some(site) => format!("{} ({site})", machine.owner),
            None => machine.owner.clone(),
        };
        let disk = Bytes(machine.disk_bytes.iter().sum());
        let addresses: Vec<String> =
            machine.home.iter().chain(&machine.care_of).map(ToString::to_string).collect();
        lines += &format!(
            "  {:<16} {:<12} {:<12} epoch {:<3} {:>10} memory {:>10} disk  {}\n",
            machine.name.as_str(),
            place,
            machine.state,
            machine.epoch,
            Bytes(machine.memory_bytes).to_string(),
            disk.to_string(),
            addresses.join(" ")
        );
        if let Some(why) = &machine.hold {
            lines += &format!("    HELD  {why}\n");
        }
        if let Some(ttl_s) = machine.ttl_owed_s {
            lines += &format!(
                "    the TTL of its name is still lowered; {ttl_s} s is restored as soon as its name server takes it\n"
            );
        }
    }
    lines
}

fn migration_line(migration: &MigrationView) -> String {
    let state = match migration.progressing {
        Progressing::Running => {
            let limit =
                migration.limit_mbit.map_or_else(String::new, |mbit| format!(", limited to {mbit} Mbit/s"));
            format!("{} {:.0} %{limit}", migration.stage.name(), migration.percent)
        }
        Progressing::Moved => match migration.pause_ms {
            Some(pause) => format!("moved, paused {pause:.0} ms"),
            None => "moved".to_owned(),
        },
        Progressing::Stayed => {
            format!("stayed: {}{}", migration.reason.as_deref().unwrap_or("unknown"), follows(migration))
        }
    };
    let kept = match migration.disk_kept {
        0 => String::new(),
        bytes => format!("; {} of disk was there already", Bytes(bytes)),
    };
    let (vm, from, to, id) = (&migration.vm, &migration.from, &migration.to, &migration.id);
    format!("  {:<16} {from} -> {to}  {state}{kept}  [{id}]\n", vm.as_str())
}

fn follows(migration: &MigrationView) -> String {
    match &migration.retry {
        Some(RetryView { number, of, id: Some(id), .. }) => {
            format!("; tried again ({number} of {of}) as {id}")
        }
        Some(RetryView { number, of, id: None, .. }) => format!("; trying again ({number} of {of})"),
        None => String::new(),
    }
}

fn anchor_line(anchor: &AnchorView) -> String {
    let state = match anchor.closed_ms {
        Some(_) => "tunnel ended".to_owned(),
        None if anchor.flows_one_way > 0 => {
            format!("{} old flows, {} heard from one end only", anchor.flows, anchor.flows_one_way)
        }
        None => format!("{} old flows", anchor.flows),
    };
    let names = match &anchor.names_error {
        Some(error) => format!("{} ({error})", anchor.names),
        None => anchor.names.clone(),
    };
    let mut lines = format!("  {:<16} at {}  {state}, names {names}\n", anchor.vm.as_str(), anchor.at);
    if !anchor.names_behind.is_empty() {
        lines += &format!("    name servers that do not have it yet: {}\n", anchor.names_behind.join(", "));
    }
    if let Some(error) = &anchor.attract_error {
        lines += &format!("    NOT ATTRACTED, trying again: {error}\n");
    }
    for conflict in &anchor.conflicts {
        let (address, mac) = (conflict.address, &conflict.mac);
        lines += &format!("    CONFLICT  {address} is used by {mac}; it is not attracted while that lasts\n");
    }
    lines
}
