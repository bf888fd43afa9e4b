//! The figures of a report's page, each one SVG: the time line, the rounds, the bytes on the WAN.

use std::fmt::Write;
use std::net::IpAddr;

use super::chart::{Area, Scale, bytes, duration, escape, number, text, time_axis, vertical_axis};
use super::{Report, Series};
use crate::traffic::Outcome;

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = WIDTH - 16.0;

/// A stretch of time, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// Beginning.
    pub from_ms: f64,
    /// End.
    pub to_ms: f64,
}

impl Window {
    /// All that was recorded.
    #[must_use]
    pub fn whole(report: &Report, series: &Series) -> Self {
        let stages = report.stages.iter().flat_map(|stage| [Some(stage.start_ms), stage.end_ms]).flatten();
        let samples = series.probes.iter().map(|probe| probe.at_ms);
        let gaps = series.gaps.iter().flat_map(|gap| [gap.start_ms, gap.end_ms]);
        let rates = series.wan_rate.iter().map(|sample| sample.at_ms);
        let marks = series.marks.iter().map(|(at_ms, _)| *at_ms);
        let all: Vec<u64> = stages.chain(samples).chain(gaps).chain(rates).chain(marks).collect();
        let first = all.iter().min().copied().unwrap_or(0);
        Self { from_ms: first as f64, to_ms: all.iter().max().copied().unwrap_or(0).max(first + 1) as f64 }
    }

    /// The pause and what lies around it, or nothing if there was none.
    #[must_use]
    pub fn around_pause(series: &Series) -> Option<Self> {
        let pause = series.paused?;
        let (from, to) = (pause.start_ms as f64, pause.end_ms as f64);
        let margin = (to - from).clamp(1000.0, 20_000.0);
        Some(Self { from_ms: (from - margin).max(0.0), to_ms: to + 1.5 * margin })
    }
}

/// The time line: stages, the client's latency, the record connection's silences, and throughput, over one axis.
#[must_use]
pub fn timeline(report: &Report, series: &Series, window: Window) -> String {
    let x = Scale::linear(window.from_ms / 1000.0, window.to_ms / 1000.0, LEFT, RIGHT);
    let mut svg = String::new();
    let stages = Area { left: LEFT, right: RIGHT, top: 30.0, bottom: 62.0 };
    let latency = Area { left: LEFT, right: RIGHT, top: 104.0, bottom: 304.0 };
    let silence = Area { left: LEFT, right: RIGHT, top: 342.0, bottom: 366.0 };
    let rate = Area { left: LEFT, right: RIGHT, top: 408.0, bottom: 498.0 };
    let last = if series.wan_rate.is_empty() { silence } else { rate };
    let height = last.bottom + 48.0;
    shade_pause(&mut svg, series, &x, stages.top, last.bottom);
    stage_bar(&mut svg, report, &x, stages);
    latency_plot(&mut svg, report, series, &x, latency);
    silence_lane(&mut svg, series, &x, silence);
    if !series.wan_rate.is_empty() {
        rate_plot(&mut svg, report, series, &x, rate);
    }
    mark_moments(&mut svg, series, &x, latency.top, last.bottom);
    time_axis(&mut svg, last, &x, "time since the start of the scenario, s");
    wrap(
        &svg,
        height,
        "Stages, latency of requests, silences of the record connection, and throughput over time",
    )
}

fn shade_pause(svg: &mut String, series: &Series, x: &Scale, top: f64, bottom: f64) {
    let Some(pause) = series.paused else { return };
    let (from, to) = (x.at(pause.start_ms as f64 / 1000.0), x.at(pause.end_ms as f64 / 1000.0));
    let _ = write!(
        svg,
        r#"<rect class="pause" x="{from:.1}" y="{top:.1}" width="{:.1}" height="{:.1}"><title>Guest paused for {}</title></rect>"#,
        (to - from).max(1.0),
        bottom - top,
        duration((pause.end_ms - pause.start_ms) as f64),
    );
}

fn stage_bar(svg: &mut String, report: &Report, x: &Scale, area: Area) {
    text(svg, area.left, area.top - 10.0, "axis", "stage of the migration");
    for (index, stage) in report.stages.iter().enumerate() {
        let end_ms = stage.end_ms.unwrap_or(u64::MAX) as f64;
        let (from, to) = (x.at(stage.start_ms as f64 / 1000.0), x.at(end_ms / 1000.0));
        let _ = write!(
            svg,
            r#"<rect class="stage s{}" x="{from:.1}" y="{:.1}" width="{:.1}" height="{:.1}" rx="3"><title>{}: {}</title></rect>"#,
            index % 6,
            area.top,
            (to - from - 1.5).max(1.5),
            area.bottom - area.top,
            escape(&stage.stage),
            stage
                .end_ms
                .map_or_else(|| "did not end".to_owned(), |end| duration((end - stage.start_ms) as f64)),
        );
        // About 6.6 units a letter; of a name that does not fit the number stays, and the whole is in the table below.
        if to - from > stage.stage.len() as f64 * 6.6 + 12.0 {
            text(svg, from + 8.0, area.top + 21.0, "on-stage", &stage.stage);
        } else if to - from > 22.0 {
            text(
                svg,
                from + 7.0,
                area.top + 21.0,
                "on-stage",
                stage.stage.split(' ').next().unwrap_or_default(),
            );
        }
    }
}

fn latency_plot(svg: &mut String, report: &Report, series: &Series, x: &Scale, area: Area) {
    let shown: Vec<_> = series.probes.iter().filter(|probe| x.holds(probe.at_ms as f64 / 1000.0)).collect();
    let longest = shown.iter().map(|probe| probe.latency_ms).fold(100.0, f64::max);
    let shortest = shown.iter().map(|probe| probe.latency_ms).fold(100.0, f64::min).max(0.1);
    let low = 10_f64.powf(shortest.log10().floor());
    let high = 10_f64.powf(longest.log10().ceil());
    let y = Scale::logarithmic(low, high, area.bottom, area.top);
    vertical_axis(svg, area, &y, "latency of a new request by name, ms (logarithmic)", 5.0);
    latency_legend(svg, report, area);
    let radius = if shown.len() < 200 { 3.2 } else { 2.0 };
    for probe in shown {
        let (at, height) = (x.at(probe.at_ms as f64 / 1000.0), y.at(probe.latency_ms));
        let place = place_of(report, probe.address);
        if probe.outcome == Outcome::Ok {
            let _ = write!(svg, r#"<circle class="{place}" cx="{at:.1}" cy="{height:.1}" r="{radius}"/>"#);
        } else {
            let (l, r, t, b) = (at - 3.5, at + 3.5, height - 3.5, height + 3.5);
            let _ = write!(
                svg,
                r#"<path class="failed" d="M{l:.1} {t:.1}L{r:.1} {b:.1}M{l:.1} {b:.1}L{r:.1} {t:.1}"><title>{:?} at {} s</title></path>"#,
                probe.outcome,
                number(probe.at_ms as f64 / 1000.0)
            );
        }
    }
}

fn latency_legend(svg: &mut String, report: &Report, area: Area) {
    let (y, mut at) = (area.top - 14.0, area.right - 470.0);
    let name =
        |address: Option<IpAddr>| address.map_or_else(|| "?".to_owned(), |address| address.to_string());
    for (class, label) in [
        ("old", format!("old address {}", name(report.dns.old))),
        ("new", format!("new address {}", name(report.dns.new))),
    ] {
        let _ = write!(svg, r#"<circle class="{class}" cx="{at:.1}" cy="{y:.1}" r="4"/>"#);
        text(svg, at + 10.0, y + 4.0, "legend", &label);
        at += 205.0;
    }
    let _ = write!(svg, r#"<path class="failed" d="M{at} {0}l7 7m-7 0l7 -7"/>"#, y - 3.5);
    text(svg, at + 14.0, y + 4.0, "legend", "failed");
}

fn place_of(report: &Report, address: Option<IpAddr>) -> &'static str {
    if address.is_some() && address == report.dns.new { "new" } else { "old" }
}

fn silence_lane(svg: &mut String, series: &Series, x: &Scale, area: Area) {
    text(svg, area.left, area.top - 10.0, "axis", "record connection: silences");
    let _ = write!(
        svg,
        r#"<rect class="lane" x="{}" y="{}" width="{}" height="{}" rx="3"/>"#,
        area.left,
        area.top,
        area.right - area.left,
        area.bottom - area.top
    );
    for gap in &series.gaps {
        let (from, to) = (gap.start_ms as f64 / 1000.0, gap.end_ms as f64 / 1000.0);
        if !x.holds(from) && !x.holds(to) {
            continue;
        }
        let width = (x.at(to) - x.at(from)).max(1.5);
        let _ = write!(
            svg,
            r#"<rect class="gap" x="{:.1}" y="{:.1}" width="{width:.1}" height="{:.1}"><title>{} at {} s</title></rect>"#,
            x.at(from),
            area.top,
            area.bottom - area.top,
            duration((gap.end_ms - gap.start_ms) as f64),
            number(from),
        );
    }
}

fn rate_plot(svg: &mut String, report: &Report, series: &Series, x: &Scale, area: Area) {
    let top = series.wan_rate.iter().map(|sample| sample.forward_mbit.max(sample.backward_mbit));
    let y = Scale::linear(0.0, top.fold(report.wan.rate_mbit, f64::max) * 1.05, area.bottom, area.top);
    vertical_axis(svg, area, &y, "throughput on the WAN, Mbit/s", 4.0);
    for (class, forward) in [("line backward", false), ("line forward", true)] {
        let mut path = String::new();
        for sample in series.wan_rate.iter().filter(|sample| x.holds(sample.at_ms as f64 / 1000.0)) {
            let value = if forward { sample.forward_mbit } else { sample.backward_mbit };
            let command = if path.is_empty() { 'M' } else { 'L' };
            let _ = write!(path, "{command}{:.1} {:.1}", x.at(sample.at_ms as f64 / 1000.0), y.at(value));
        }
        let _ = write!(svg, r#"<path class="{class}" d="{path}"/>"#);
    }
    let legend = area.top - 14.0;
    for (at, class, label) in [
        (area.right - 430.0, "line forward", "source to destination"),
        (area.right - 245.0, "line backward", "destination to source"),
    ] {
        let _ = write!(svg, r#"<path class="{class}" d="M{:.1} {legend}h14"/>"#, at - 6.0);
        text(svg, at + 14.0, legend + 4.0, "legend", label);
    }
}

fn mark_moments(svg: &mut String, series: &Series, x: &Scale, top: f64, bottom: f64) {
    let shown = series.marks.iter().filter(|(at_ms, _)| x.holds(*at_ms as f64 / 1000.0));
    for (row, (at_ms, name)) in shown.enumerate() {
        let at = x.at(*at_ms as f64 / 1000.0);
        let _ =
            write!(svg, r#"<line class="mark" x1="{at:.1}" x2="{at:.1}" y1="{top:.1}" y2="{bottom:.1}"/>"#);
        let anchor = if at > RIGHT - 140.0 { "end" } else { "start" };
        let shift = if anchor == "end" { -5.0 } else { 5.0 };
        let y = 118.0 + (row % 3) as f64 * 15.0;
        let _ = write!(
            svg,
            r#"<text class="moment" x="{:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
            at + shift,
            escape(name)
        );
    }
}

/// Bytes of each round as columns.
#[must_use]
pub fn rounds(report: &Report) -> String {
    let area = Area { left: LEFT, right: RIGHT, top: 34.0, bottom: 214.0 };
    let mib = |amount: u64| amount as f64 / f64::from(1 << 20);
    let most = report.rounds.iter().map(|round| mib(round.bytes)).fold(0.0, f64::max);
    let y = Scale::linear(0.0, (most * 1.2).max(0.01), area.bottom, area.top);
    let mut svg = String::new();
    vertical_axis(&mut svg, area, &y, "memory in a round before it is reduced, MiB", 4.0);
    let step = (area.right - area.left) / report.rounds.len().max(1) as f64;
    let width = (step - 2.0).clamp(1.0, 64.0);
    let labelled = report.rounds.len().div_ceil(20).max(1);
    for (index, round) in report.rounds.iter().enumerate() {
        let middle = area.left + step * (index as f64 + 0.5);
        let top = y.at(mib(round.bytes));
        let _ = write!(
            svg,
            r#"<path class="column" d="M{0:.1} {1:.1}V{2:.1}q0 -3 3 -3H{3:.1}q3 0 3 3V{1:.1}z"><title>Round {4}: {5}, {6} pages, {7}</title></path>"#,
            middle - width / 2.0,
            area.bottom,
            (top + 3.0).min(area.bottom),
            middle + width / 2.0 - 3.0,
            index + 1,
            bytes(round.bytes),
            number(round.pages as f64),
            duration(round.ms as f64),
        );
        if index % labelled == 0 {
            centred(&mut svg, middle, area.bottom + 19.0, "tick", &(index + 1).to_string());
        }
        if report.rounds.len() <= 16 {
            centred(&mut svg, middle, top - 8.0, "value", &number((mib(round.bytes) * 10.0).round() / 10.0));
        }
    }
    let _ = write!(
        svg,
        r#"<line class="base" x1="{LEFT}" x2="{RIGHT}" y1="{0}" y2="{0}"/><text class="axis" x="{RIGHT}" y="{1}" text-anchor="end">round</text>"#,
        area.bottom,
        area.bottom + 38.0
    );
    wrap(&svg, area.bottom + 46.0, "Bytes of memory in each round, before they are reduced")
}

/// Bytes on the WAN by kind, as bars.
#[must_use]
pub fn wan_bytes(report: &Report) -> String {
    let kinds = [
        ("memory", report.wan_bytes.memory),
        ("disk", report.wan_bytes.disk),
        ("tunnel", report.wan_bytes.tunnel),
        ("control", report.wan_bytes.control),
    ];
    let total = report.wan_bytes.total().max(1);
    let most = kinds.iter().map(|(_, amount)| *amount).max().unwrap_or(1).max(1);
    let x = Scale::linear(0.0, most as f64, LEFT + 20.0, RIGHT - 190.0);
    let mut svg = String::new();
    text(&mut svg, LEFT - 60.0, 14.0, "axis", "bytes on the WAN by kind");
    for (index, (kind, amount)) in kinds.into_iter().enumerate() {
        let top = 28.0 + index as f64 * 34.0;
        text(&mut svg, LEFT - 60.0, top + 17.0, "kind", kind);
        let width = (x.at(amount as f64) - (LEFT + 20.0)).max(1.0);
        let _ = write!(
            svg,
            r#"<rect class="bar" x="{:.1}" y="{top:.1}" width="{width:.1}" height="24" rx="3"/>"#,
            LEFT + 20.0
        );
        let share = 100.0 * amount as f64 / total as f64;
        text(
            &mut svg,
            LEFT + 30.0 + width,
            top + 17.0,
            "value",
            &format!("{} ({share:.1} %)", bytes(amount)),
        );
    }
    wrap(&svg, 170.0, "Bytes on the WAN by kind")
}

fn centred(svg: &mut String, x: f64, y: f64, class: &str, content: &str) {
    let _ = write!(
        svg,
        r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="middle">{}</text>"#,
        escape(content)
    );
}

fn wrap(content: &str, height: f64, label: &str) -> String {
    format!(
        r#"<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{}">{content}</svg>"#,
        escape(label)
    )
}
