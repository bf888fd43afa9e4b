//! The race as one page of HTML without outside resources: bars per WAN, one row per racer, one plot per figure.

use std::fmt::Write;

use serde_json::Value;

use crate::report::chart::escape;
use crate::report::page::STYLE;

/// Key, caption, what the value is divided by, unit.
const PLOTS: [(&str, &str, f64, &str); 6] = [
    ("wan_bytes", "Bytes over the WAN", 1_048_576.0, "MiB"),
    ("total_ms", "Time until the machine is there", 1e3, "s"),
    ("downtime_ms", "Pause of the guest", 1.0, "ms"),
    ("client_gap_ms", "Longest silence a client saw", 1.0, "ms"),
    ("cpu_s", "Processor time of gateways and QEMUs, the guest's left out", 1.0, "s"),
    ("request_p50_ms", "How slow the guest was: the median time of a request meanwhile", 1.0, "ms"),
];

const ROW: f64 = 22.0;
const NAMES: f64 = 220.0;
const WIDTH: f64 = 860.0;

/// The page for a report as [`super::report::Outcome::json`] gives it.
pub fn render(report: &Value) -> String {
    let mut body = String::from(
        "<header><p class=\"kicker\">Longhaul laboratory</p><h1>The race</h1>\
         <p class=\"setting\">The same guest and the same work, moved by each. Medians of the rounds; a racer without a \
         bar for its time did not end in the time it was given, and its bytes are those until then.</p></header>",
    );
    for (profile, workloads) in entries(&report["profiles"]) {
        for (workload, found) in entries(&workloads["workloads"]) {
            let _ = write!(body, "<section><h2>{}, {}</h2>", escape(profile), escape(workload));
            for plot in PLOTS {
                bars(&mut body, &found["runs"], plot);
            }
            body.push_str("</section>");
        }
    }
    for (what, reason) in entries(&report["left_out"]) {
        let _ = write!(
            body,
            "<p>Left out: {}: {}</p>",
            escape(what),
            escape(reason.as_str().unwrap_or_default())
        );
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\"><title>Longhaul: the race</title>\
         <style>\n{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )
}

fn entries(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flatten().map(|(name, value)| (name.as_str(), value))
}

fn bars(body: &mut String, runs: &Value, (key, caption, unit_of, unit): (&str, &str, f64, &str)) {
    let value = |run: &Value| run[key].as_f64().map(|value| value / unit_of);
    let most = entries(runs).filter_map(|(_, run)| value(run)).fold(0.0, f64::max).max(1e-9);
    let rows = entries(runs).count() as f64;
    let _ = write!(
        body,
        "<h3>{}</h3><svg viewBox=\"0 0 {WIDTH} {:.0}\" role=\"img\">",
        escape(caption),
        rows * ROW
    );
    for (row, (peer, run)) in entries(runs).enumerate() {
        let top = row as f64 * ROW;
        let base = top + ROW * 0.7;
        let ours = peer.starts_with("longhaul");
        let color = if ours { "#2a78d6" } else { "#8a8f98" };
        let _ = write!(
            body,
            "<text x=\"0\" y=\"{base:.0}\" fill=\"currentColor\" font-size=\"12\">{}</text>",
            escape(peer)
        );
        let (width, said) = match value(run) {
            Some(value) => ((WIDTH - NAMES - 120.0) * value / most, format!("{value:.1} {unit}")),
            None if run["did_not_finish"] == true => (0.0, "did not finish".to_owned()),
            None => (0.0, "not seen".to_owned()),
        };
        let _ = write!(
            body,
            "<rect x=\"{NAMES}\" y=\"{:.0}\" width=\"{width:.1}\" height=\"{:.0}\" rx=\"2\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{base:.0}\" fill=\"currentColor\" font-size=\"12\">{said}</text>",
            top + 3.0,
            ROW - 6.0,
            NAMES + width + 6.0
        );
    }
    body.push_str("</svg>");
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_racer_has_a_row_and_a_name_is_no_markup() {
        let runs = json!({
            "longhaul": { "wan_bytes": 1_048_576, "total_ms": 1000, "request_p50_ms": 104.5 },
            "<peer>": { "wan_bytes": 2_097_152, "did_not_finish": true },
        });
        let report = json!({ "profiles": { "metro": { "workloads": { "web": { "runs": runs } } } } });
        let page = render(&report);
        assert!(page.contains("1.0 MiB") && page.contains("2.0 MiB") && page.contains("did not finish"));
        assert!(page.contains("104.5 ms"));
        assert!(page.contains("&lt;peer&gt;") && !page.contains("<peer>"));
    }
}
