//! `report.html`: one page without any outside resource, readable in light and dark.

use std::fmt::Write;

use super::chart::{bytes, duration, escape, number};
use super::figures::{Window, rounds, timeline, wan_bytes};
use super::{Report, Series};

/// The look of every page.
pub const STYLE: &str = include_str!("style.css");

/// The whole page.
#[must_use]
pub fn render(report: &Report, series: &Series) -> String {
    let title = format!("Longhaul laboratory: {}", report.scenario);
    let mut body = String::new();
    headline(&mut body, report);
    tiles(&mut body, report);
    promises(&mut body, report);
    section(&mut body, "Time line", &timeline(report, series, Window::whole(report, series)));
    if let Some(window) = Window::around_pause(series) {
        section(&mut body, "Around the pause", &timeline(report, series, window));
    }
    stages(&mut body, report);
    if !report.rounds.is_empty() {
        section(&mut body, "Rounds of memory", &rounds(report));
    }
    section(&mut body, "Bytes on the WAN", &wan_bytes(report));
    details(&mut body, report);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <title>{}</title><style>\n{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n",
        escape(&title)
    )
}

fn headline(body: &mut String, report: &Report) {
    let held = report.promises.iter().filter(|promise| promise.held).count();
    let (class, verdict) =
        if report.all_held() { ("good", "every promise held") } else { ("bad", "not every promise held") };
    let _ = write!(
        body,
        "<header><p class=\"kicker\">Longhaul laboratory</p><h1>{}</h1>\
         <p class=\"verdict {class}\">{} {} — {verdict} ({held} of {})</p><p class=\"setting\">{}</p></header>",
        escape(&report.scenario),
        if report.all_held() { "✓" } else { "✗" },
        escape(&report.outcome),
        report.promises.len(),
        escape(&setting(report)),
    );
}

fn setting(report: &Report) -> String {
    let measured = &report.wan.measured;
    let or_none = |value: Option<f64>, unit: &str| {
        value.map_or_else(
            || "not measured".to_owned(),
            |value| format!("{} {unit}", number((value * 10.0).round() / 10.0)),
        )
    };
    format!(
        "Machine: {} of memory, {} of disk. WAN ({}): {} Mbit/s asked, {} measured; round trip {} ms asked, {} measured; loss {} %.",
        bytes(report.vm.memory_bytes),
        bytes(report.vm.disk_bytes),
        report.wan.emulator,
        number(report.wan.rate_mbit),
        or_none(measured.rate_mbit, "Mbit/s"),
        number(report.wan.rtt_ms),
        or_none(measured.rtt_ms, "ms"),
        number(report.wan.loss_pct),
    )
}

fn tiles(body: &mut String, report: &Report) {
    let time = |ms: Option<f64>| ms.map_or_else(|| "—".to_owned(), duration);
    let connections = &report.connections;
    let tiles = [
        ("guest paused", time(report.downtime_ms), "from pause to resumption"),
        (
            "client's gap",
            time(report.client_gap_ms.map(|ms| ms as f64)),
            "longest silence, less the interval",
        ),
        ("whole migration", time(report.total_ms.map(|ms| ms as f64)), "stages 0 to 5"),
        (
            "old connections",
            format!("{} / {}", connections.survived, connections.before),
            "survived / opened before",
        ),
        (
            "failed requests",
            format!("{} / {}", report.http.failed, report.http.requests),
            "new requests by name",
        ),
        ("on the WAN", bytes(report.wan_bytes.total()), "all kinds"),
    ];
    body.push_str("<div class=\"tiles\">");
    for (name, value, note) in tiles {
        let _ = write!(
            body,
            "<div class=\"tile\"><p class=\"name\">{name}</p><p class=\"figure\">{value}</p><p class=\"note\">{note}</p></div>"
        );
    }
    body.push_str("</div>");
}

fn promises(body: &mut String, report: &Report) {
    body.push_str("<section><h2>Promises</h2><table><thead><tr><th>held</th><th>promise</th><th>figures</th></tr></thead><tbody>");
    for promise in &report.promises {
        let (class, word) = if promise.held { ("good", "✓ held") } else { ("bad", "✗ not held") };
        let _ = write!(
            body,
            "<tr><td class=\"{class}\">{word}</td><td>{}</td><td class=\"detail\">{}</td></tr>",
            escape(&promise.name),
            escape(&promise.detail)
        );
    }
    body.push_str("</tbody></table></section>");
}

fn stages(body: &mut String, report: &Report) {
    body.push_str("<section><h2>Stages</h2><table class=\"figures\"><thead><tr><th>stage</th><th>start, s</th><th>end, s</th><th>duration</th></tr></thead><tbody>");
    for (index, stage) in report.stages.iter().enumerate() {
        let second = |ms: u64| format!("{:.3}", ms as f64 / 1000.0);
        let _ = write!(
            body,
            "<tr><td><span class=\"chip s{}\"></span>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            index % 6,
            escape(&stage.stage),
            second(stage.start_ms),
            stage.end_ms.map_or_else(|| "—".to_owned(), second),
            stage.end_ms.map_or_else(
                || "did not end".to_owned(),
                |end| duration(end.saturating_sub(stage.start_ms) as f64)
            ),
        );
    }
    body.push_str("</tbody></table></section>");
}

fn details(body: &mut String, report: &Report) {
    let at = |ms: Option<u64>| ms.map_or_else(|| "—".to_owned(), |ms| format!("{:.3} s", ms as f64 / 1000.0));
    let address = |address: Option<std::net::IpAddr>| {
        address.map_or_else(|| "—".to_owned(), |address| address.to_string())
    };
    let rows = [
        ("Name: old address", address(report.dns.old)),
        ("Name: new address", address(report.dns.new)),
        ("Name server answers the new one at", at(report.dns.updated_ms)),
        ("First request at the new one", at(report.dns.first_direct_client_ms)),
        ("Longest successful request", duration(report.http.longest_ms)),
        ("Connections reset", report.connections.reset.to_string()),
        (
            "Content of old connections",
            if report.connections.content_ok { "right" } else { "wrong" }.to_owned(),
        ),
        ("Disk blocks compared", number(report.disk.blocks as f64)),
        ("Disk blocks mismatched", number(report.disk.mismatched as f64)),
        ("Tunnel: packets", number(report.tunnel.packets as f64)),
        ("Tunnel: dropped", number(report.tunnel.dropped as f64)),
        ("Tunnel came down at", at(report.tunnel.closed_ms)),
        (
            "Left behind",
            if report.left_behind.is_empty() { "nothing".to_owned() } else { report.left_behind.join(", ") },
        ),
    ];
    body.push_str("<section><h2>Figures</h2><table class=\"figures two\"><tbody>");
    for (name, value) in rows {
        let _ = write!(body, "<tr><td>{name}</td><td>{}</td></tr>", escape(&value));
    }
    body.push_str("</tbody></table></section>");
}

fn section(body: &mut String, title: &str, figure: &str) {
    let _ = write!(body, "<section><h2>{title}</h2><figure>{figure}</figure></section>");
}
