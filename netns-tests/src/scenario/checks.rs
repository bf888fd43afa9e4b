//! Which promises held, by what was seen from outside.

use gateway::api::types::MigrationView;

use super::SceneOptions;
use super::demo::{Seen, Stayed};
use super::monitor::GuestEvent;
use crate::report::{Disk, Dns, Measured, Report, Round, Series, Stage, Tunnel, Vm, Wan, WanBytes};
use crate::traffic::Gap;
use crate::wan::Emulator;

/// How far the gateway's figures may be from those measured outside.
const AGREEMENT: f64 = 0.05;
/// A figure in milliseconds agrees within this, however small it is: two clocks are read.
const AGREEMENT_MS: f64 = 10.0;
/// UDP and IPv4 headers, which the gateway's figures leave out.
const HEADERS: u64 = 28;

/// The report and its series.
pub fn report(
    options: &SceneOptions,
    emulator: Emulator,
    seen: &Seen,
    left: Vec<String>,
) -> (Report, Series) {
    let mut report = begun(options, emulator);
    let relative = |unix_ms: u64| unix_ms.saturating_sub(seen.epoch_unix_ms);
    report.wan.measured =
        Measured { rtt_ms: Some(seen.measured.rtt_ms), rate_mbit: Some(seen.measured.rate_mbit) };
    report.outcome = "moved".into();
    report.stages = seen
        .view
        .stages
        .iter()
        .map(|each| Stage {
            stage: format!("{} {}", each.stage.number(), each.stage.name()),
            start_ms: relative(each.start_ms),
            end_ms: each.end_ms.map(relative),
        })
        .collect();
    report.total_ms = seen.view.ended_ms.map(|end| end.saturating_sub(seen.view.started_ms));
    let pause = pause(seen);
    report.downtime_ms = pause.map(|(stop, resume)| resume - stop);
    report.client_gap_ms = seen.traffic.client_gap_ms();
    report.rounds = seen
        .view
        .rounds
        .iter()
        .map(|round| Round { bytes: round.bytes, pages: round.pages, ms: round.ms })
        .collect();
    report.wan_bytes = wan_bytes(seen);
    report.connections = seen.traffic.connections();
    report.http = seen.traffic.http();
    report.dns = dns(seen, relative);
    report.disk = Disk { blocks: seen.disk.compared, mismatched: seen.disk.mismatched };
    report.tunnel = Tunnel {
        packets: seen.status_a.tunnel.packets_out + seen.status_a.tunnel.packets_in,
        dropped: seen.status_a.tunnel.dropped,
        closed_ms: seen.released_unix_ms.map(relative),
    };
    report.left_behind = left;
    promises(&mut report, options, seen, pause);
    let mut series = Series::of_traffic(&seen.traffic);
    series.paused =
        pause.map(|(stop, resume)| Gap { start_ms: relative(stop as u64), end_ms: relative(resume as u64) });
    series.wan_rate = seen.wan_rate.clone();
    if let Some(at) = report.dns.updated_ms {
        series.marks.push((at, "name moved".into()));
    }
    if let Some(at) = report.tunnel.closed_ms {
        series.marks.push((at, "tunnel down".into()));
    }
    (report, series)
}

/// The report of a scenario that did not come to its end.
pub fn failed(
    options: &SceneOptions,
    emulator: Emulator,
    error: &anyhow::Error,
    left: Vec<String>,
) -> (Report, Series) {
    let mut report = begun(options, emulator);
    let stayed = error.downcast_ref::<Stayed>().is_some();
    report.outcome = if stayed { "rolled-back" } else { "failed" }.into();
    report.promise("the machine moves", false, format!("{error:#}"));
    report.left_behind = left;
    (report, Series::default())
}

fn begun(options: &SceneOptions, emulator: Emulator) -> Report {
    let mut report = Report::new(&options.name);
    report.wan = Wan {
        rtt_ms: options.rtt.as_secs_f64() * 1e3,
        rate_mbit: options.rate_mbit,
        loss_pct: options.loss * 100.0,
        emulator: emulator.name().into(),
        measured: Measured::default(),
    };
    report.vm = Vm { memory_bytes: options.memory_mib << 20, disk_bytes: options.disk_bytes };
    report
}

/// Prints the table of promises.
pub fn print(report: &Report) {
    println!();
    for promise in &report.promises {
        let mark = if promise.held { "held  " } else { "BROKEN" };
        println!("  {mark}  {:<46}  {}", promise.name, promise.detail);
    }
    println!();
}

/// The pause by QEMU's own events: the source's last STOP, the destination's first RESUME after it.
fn pause(seen: &Seen) -> Option<(f64, f64)> {
    let at = |events: &[GuestEvent], name: &str| {
        events.iter().filter(|event| event.name == name).map(|event| event.unix_ms).next_back()
    };
    let stop = at(&seen.events_a, "STOP")?;
    let resume = seen
        .events_b
        .iter()
        .filter(|event| event.name == "RESUME" && event.unix_ms >= stop)
        .map(|event| event.unix_ms)
        .next()?;
    Some((stop, resume))
}

/// What the WAN carried from a to b, divided as the gateway says it was caused.
fn wan_bytes(seen: &Seen) -> WanBytes {
    let total = outside_bytes(seen);
    let inside = inside_bytes(&seen.view).max(1);
    let share = |bytes: u64| (u128::from(bytes) * u128::from(total) / u128::from(inside)) as u64;
    let wan = &seen.view.wan;
    WanBytes {
        memory: share(wan.memory),
        disk: share(wan.disk),
        tunnel: share(wan.tunnel),
        control: share(wan.control),
    }
}

fn outside_bytes(seen: &Seen) -> u64 {
    seen.wan_forward.bytes.saturating_sub(seen.wan_forward.packets * HEADERS)
}

fn inside_bytes(view: &MigrationView) -> u64 {
    view.wan.memory + view.wan.disk + view.wan.tunnel + view.wan.control
}

fn dns(seen: &Seen, relative: impl Fn(u64) -> u64) -> Dns {
    let (old, new) = seen.addresses;
    Dns {
        old: Some(old),
        new: Some(new),
        updated_ms: seen.name_moved_unix_ms.map(relative),
        first_direct_client_ms: seen.traffic.first_direct_ms(old),
    }
}

fn promises(report: &mut Report, options: &SceneOptions, seen: &Seen, pause: Option<(f64, f64)>) {
    let running_b = seen.state_b.as_deref() == Some("running");
    wan(report, options);
    report.promise(
        "exactly one copy runs, at b",
        running_b && seen.qemus == (0, 1),
        format!(
            "a: {} QEMUs, b: {}, {}",
            seen.qemus.0,
            seen.qemus.1,
            seen.state_b.as_deref().unwrap_or("does not answer")
        ),
    );
    connections(report, seen);
    names(report, options, seen);
    let disk = &seen.disk;
    report.promise(
        "the disk at b is right",
        disk.mismatched == 0 && disk.compared > 0 && disk.sound,
        format!(
            "{} blocks equal the source's, {} differ, {} changed at b; {}",
            disk.compared - disk.mismatched,
            disk.mismatched,
            disk.changed,
            disk.detail
        ),
    );
    let closed = seen.released_unix_ms;
    report.promise(
        "the tunnel comes down by itself",
        seen.attracted && closed.is_some(),
        match closed {
            Some(_) if !seen.attracted => "it was down before the old connections had ended".into(),
            Some(at) => {
                let after = at.saturating_sub(seen.old_closed_unix_ms);
                format!("{:.1} s after the last old connection", after as f64 / 1e3)
            }
            None => "it is still up".into(),
        },
    );
    agreement(report, seen, pause);
    let left = report.left_behind.join(", ");
    let detail = if left.is_empty() { "nothing".to_owned() } else { left };
    report.promise("nothing is left behind", report.left_behind.is_empty(), detail);
}

fn wan(report: &mut Report, options: &SceneOptions) {
    let near = |asked: f64, measured: Option<f64>, least: f64| {
        measured.is_some_and(|measured| (measured - asked).abs() <= (asked * AGREEMENT).max(least))
    };
    let Wan { rtt_ms, rate_mbit, measured, .. } = report.wan.clone();
    let jitter_ms = options.jitter.as_secs_f64() * 2e3;
    let held = near(rtt_ms, measured.rtt_ms, 2.0 + jitter_ms) && near(rate_mbit, measured.rate_mbit, 0.1);
    let text = |figure: Option<f64>| figure.map_or("?".to_owned(), |figure| format!("{figure:.1}"));
    report.promise(
        "the WAN is the one that was asked for",
        held,
        format!("{} ms, {} Mbit/s", text(measured.rtt_ms), text(measured.rate_mbit)),
    );
}

fn connections(report: &mut Report, seen: &Seen) {
    let connections = report.connections.clone();
    let record = seen.traffic.record.as_ref();
    report.promise(
        "every old connection lives, its content right",
        connections.survived == connections.before && connections.content_ok && connections.before == 3,
        format!(
            "{} of {} alive, {} reset; longest silence {} ms",
            connections.survived,
            connections.before,
            connections.reset,
            report.client_gap_ms.map_or("?".into(), |gap| gap.to_string())
        ),
    );
    report.promise(
        "no record is lost or doubled",
        record.is_some_and(|record| record.content_ok),
        record.map_or("no record connection".into(), |record| {
            format!("{} sent, {} received", record.sent, record.received)
        }),
    );
    report.promise(
        "no new request fails",
        report.http.failed == 0 && report.http.requests > 0,
        format!(
            "{} requests, {} failed, longest {:.0} ms",
            report.http.requests, report.http.failed, report.http.longest_ms
        ),
    );
}

fn names(report: &mut Report, options: &SceneOptions, seen: &Seen) {
    let (addresses, ttl) = &seen.name;
    let new = report.dns.new;
    report.promise(
        "the name points at b, its TTL is restored",
        new.is_some_and(|new| *addresses == [new]) && *ttl == Some(options.ttl_s),
        format!("{addresses:?}, TTL {ttl:?} s"),
    );
    let delay = match (report.dns.updated_ms, report.dns.first_direct_client_ms) {
        (Some(updated), Some(direct)) => Some(direct.saturating_sub(updated)),
        (Some(_), None) | (None, Some(_)) | (None, None) => None,
    };
    // A resolver may have asked just before the TTL was lowered.
    let limit_ms = u64::from(options.ttl_s) * 1000 + 2000;
    report.promise(
        "new clients go to b directly, not through a",
        delay.is_some_and(|delay| delay <= limit_ms)
            && seen.direct.packets > 0
            && seen.through_a.packets == 0,
        format!(
            "first {} ms after the name moved; {} packets direct, {} through a",
            delay.map_or("never".into(), |delay| delay.to_string()),
            seen.direct.packets,
            seen.through_a.packets
        ),
    );
}

fn agreement(report: &mut Report, seen: &Seen, pause: Option<(f64, f64)>) {
    let outside = pause.map(|(stop, resume)| resume - stop);
    let inside = seen.view.pause_ms;
    let agrees = match (outside, inside) {
        (Some(outside), Some(inside)) => (outside - inside).abs() <= (outside * AGREEMENT).max(AGREEMENT_MS),
        (Some(_), None) | (None, Some(_)) | (None, None) => false,
    };
    let text = |figure: Option<f64>| figure.map_or("?".to_owned(), |ms| format!("{ms:.0} ms"));
    report.promise(
        "the gateway's pause is the measured one",
        agrees,
        format!("QEMU's events {}, the gateway {}", text(outside), text(inside)),
    );
    let (outside, inside) = (outside_bytes(seen), inside_bytes(&seen.view));
    let close = outside.abs_diff(inside) as f64 <= outside as f64 * AGREEMENT;
    report.promise(
        "the gateway's bytes are the measured ones",
        close && outside > 0,
        format!("WAN {:.1} MB, the gateway {:.1} MB", outside as f64 / 1e6, inside as f64 / 1e6),
    );
}
