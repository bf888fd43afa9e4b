//! What was measured, as tables and as JSON:
//! `{schema, seconds, alone: [{path, senders: {NAME: {FIGURE: median} | {failed}}}], shared: [{path, pairs: {..}}]}`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Value, json};

use super::cell::Cell;
use super::measure::{Alone, Shared};
use super::sender::Sender;
use crate::bench::median;

/// The version of the JSON's shape.
const SCHEMA: u32 = 1;

/// Everything so far.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    seconds: u64,
    alone: Vec<(Cell, Sender, Result<Vec<Alone>, String>)>,
    shared: Vec<(Cell, [Sender; 2], Result<Shared, String>)>,
    pub left_out: BTreeMap<String, String>,
}

impl Outcome {
    /// Nothing yet, of measurements of this length.
    pub fn new(seconds: u64) -> Self {
        Self { seconds, ..Self::default() }
    }

    pub fn add_alone(&mut self, cell: Cell, sender: Sender, measured: Result<Vec<Alone>, String>) {
        self.alone.push((cell, sender, measured));
    }

    pub fn add_shared(&mut self, cell: Cell, senders: [Sender; 2], measured: Result<Shared, String>) {
        self.shared.push((cell, senders, measured));
    }

    /// For the terminal.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut last = None;
        for (cell, sender, measured) in &self.alone {
            if last.replace(*cell) != Some(*cell) {
                let heading = "goodput Mbit/s   used %   queue ms  longest ms   lost %  dropped %";
                let _ = write!(text, "\n{}\n{:16}{heading}\n", cell.name(), "");
            }
            let _ = writeln!(text, "{:16}{}", sender.name(), alone_line(measured));
        }
        for (cell, senders, measured) in &self.shared {
            let names = format!("{} and then {}", senders[0].name(), senders[1].name());
            let _ = writeln!(text, "\n{}: {names}\n{}", cell.name(), shared_line(measured));
        }
        for (name, reason) in &self.left_out {
            let _ = writeln!(text, "\nleft out: {name}: {reason}");
        }
        text
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let mut cells: Vec<(Cell, serde_json::Map<String, Value>)> = Vec::new();
        for (cell, sender, measured) in &self.alone {
            if cells.last().is_none_or(|(last, _)| last != cell) {
                cells.push((*cell, serde_json::Map::new()));
            }
            if let Some((_, senders)) = cells.last_mut() {
                let value = measured.as_deref().map(medians);
                senders.insert(sender.name().to_owned(), value_or_failure(value));
            }
        }
        let alone: Vec<Value> =
            cells.into_iter().map(|(cell, senders)| json!({ "path": cell, "senders": senders })).collect();
        let shared = self.shared.iter().map(|(cell, senders, measured)| {
            let senders = senders.map(Sender::name);
            json!({ "path": cell, "senders": senders, "measured": value_or_failure(measured.as_ref()) })
        });
        json!({
            "schema": SCHEMA,
            "seconds": self.seconds,
            "alone": alone,
            "shared": shared.collect::<Vec<_>>(),
            "left_out": self.left_out,
        })
    }
}

/// The median of each figure over the rounds.
fn medians(rounds: &[Alone]) -> Alone {
    let of = |figure: fn(&Alone) -> f64| {
        median(&rounds.iter().map(figure).collect::<Vec<_>>()).unwrap_or_default()
    };
    Alone {
        goodput_mbit: of(|round| round.goodput_mbit),
        used: of(|round| round.used),
        queue_mean_ms: of(|round| round.queue_mean_ms),
        queue_most_ms: of(|round| round.queue_most_ms),
        lost_percent: of(|round| round.lost_percent),
        dropped_percent: of(|round| round.dropped_percent),
        disturbed_percent: of(|round| round.disturbed_percent),
    }
}

fn alone_line(measured: &Result<Vec<Alone>, String>) -> String {
    let rounds = match measured {
        Ok(rounds) => rounds,
        Err(reason) => return format!("failed: {reason}"),
    };
    let of = medians(rounds);
    let (lost, dropped) = (of.lost_percent, of.dropped_percent);
    let disturbed = match of.is_disturbed() {
        true => format!("   the machine lost {:.2} % itself", of.disturbed_percent),
        false => String::new(),
    };
    format!(
        "{:14.1}{:9.1}{:11.1}{:12.1}{lost:9.2}{dropped:11.2}{disturbed}",
        of.goodput_mbit,
        of.used * 100.0,
        of.queue_mean_ms,
        of.queue_most_ms,
    )
}

fn shared_line(measured: &Result<Shared, String>) -> String {
    match measured {
        Ok(Shared { shares: [first, second], fairness, queue_mean_ms }) => format!(
            "{:.0} % and {:.0} % of the path, fairness {fairness:.3}, queue {queue_mean_ms:.1} ms",
            first * 100.0,
            second * 100.0,
        ),
        Err(reason) => format!("failed: {reason}"),
    }
}

fn value_or_failure<T: Serialize, E: AsRef<str>>(measured: Result<T, E>) -> Value {
    let failed = |reason: &str| json!({ "failed": reason });
    match measured {
        Ok(value) => serde_json::to_value(value).unwrap_or_else(|error| failed(&error.to_string())),
        Err(reason) => failed(reason.as_ref()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::cell::Extent;
    use super::*;

    #[test]
    fn medians_failures_and_a_machine_that_is_too_slow_are_told() {
        let mut outcome = Outcome::new(5);
        let cell = Cell::of(Extent::Quick)[0];
        let round =
            |goodput_mbit, disturbed_percent| Alone { goodput_mbit, disturbed_percent, ..Alone::default() };
        let rounds = vec![round(10.0, 1.0), round(95.0, 1.0), round(94.0, 0.0)];
        outcome.add_alone(cell, Sender::Ours, Ok(rounds));
        outcome.add_alone(cell, Sender::QuinnCubic, Err("The transfer died".to_owned()));
        let table = outcome.table();
        assert!(table.contains("94.0") && table.contains("the machine lost 1.00 % itself"), "{table}");
        assert!(table.contains("failed: The transfer died"), "{table}");
        let json = outcome.json();
        assert_eq!(json["alone"][0]["senders"]["longhaul"]["goodput_mbit"], 94.0);
        assert_eq!(json["alone"][0]["senders"]["quinn-cubic"]["failed"], "The transfer died");
        assert_eq!(json["alone"][0]["path"]["rtt_ms"], 100);
    }
}
