//! What was measured, as a table and as JSON:
//! `{schema, paths: {PATH: {peers: {NAME: {version, FIGURE: median, ...}}}}}`, and `skipped` with the reason
//! instead of figures where a tunnel could not be measured.

use std::collections::BTreeMap;

use serde::Serialize;

use super::measure::Figures;
use super::peers::Kind;
use super::place::Path;
use crate::bench::median;

/// The version of the JSON's shape.
const SCHEMA: u32 = 1;

const CLEAN: &[&str] = &[
    "tcp1_gbit",
    "tcp1_back_gbit",
    "tcp1_bbr_gbit",
    "tcp8_gbit",
    "tcp8_back_gbit",
    "udp64_kpps",
    "udp1400_kpps",
    "rtt_p50_us",
    "rtt_p99_us",
    "loaded_rtt_p50_us",
    "loaded_rtt_p99_us",
    "cpu_s_per_gib",
];
const LOSSY: &[&str] = &["cubic_mbit", "bbr_mbit", "cpu_s_per_gib"];

/// All results so far.
#[derive(Debug, Default)]
pub struct Outcome {
    paths: BTreeMap<Path, BTreeMap<Kind, Peer>>,
}

#[derive(Debug, Default)]
struct Peer {
    version: String,
    figures: BTreeMap<String, Vec<f64>>,
    skipped: Option<String>,
}

impl Outcome {
    /// Adds a round.
    pub(super) fn add(&mut self, path: Path, kind: Kind, version: &str, figures: Figures) {
        let peer = self.peer(path, kind, version);
        for (name, value) in figures.0 {
            peer.figures.entry(name).or_default().push(value);
        }
    }

    /// Says why there is nothing.
    pub(super) fn skip(&mut self, path: Path, kind: Kind, version: &str, reason: &str) {
        println!("left out: {} on the {} path: {reason}", kind.name(), path.name());
        self.peer(path, kind, version).skipped = Some(reason.to_owned());
    }

    /// The same for both paths.
    pub(super) fn skip_everywhere(&mut self, kind: Kind, reason: &str) {
        self.skip(Path::Clean, kind, "", reason);
        self.skip(Path::Lossy, kind, "", reason);
    }

    /// The medians as a table per path.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for (path, peers) in &self.paths {
            let columns = columns(*path);
            text += &format!("\n{:14}", path.name());
            columns.iter().for_each(|column| text += &format!(" {column:>17}"));
            for (kind, peer) in peers {
                text += &format!("\n{:14}", kind.name());
                match &peer.skipped {
                    Some(reason) => text += &format!(" skipped: {reason}"),
                    None => columns.iter().for_each(|column| text += &format!(" {:>17}", peer.cell(column))),
                }
            }
            text += "\n";
        }
        text
    }

    fn peer(&mut self, path: Path, kind: Kind, version: &str) -> &mut Peer {
        let peer = self.paths.entry(path).or_default().entry(kind).or_default();
        version.clone_into(&mut peer.version);
        peer
    }
}

impl Peer {
    fn cell(&self, column: &str) -> String {
        match self.figures.get(column).and_then(|measured| median(measured)) {
            Some(value) if value >= 100.0 => format!("{value:.0}"),
            Some(value) => format!("{value:.2}"),
            None => "-".to_owned(),
        }
    }

    fn json(&self) -> serde_json::Value {
        let mut object = serde_json::Map::new();
        object.insert("version".to_owned(), self.version.clone().into());
        if let Some(reason) = &self.skipped {
            object.insert("skipped".to_owned(), reason.clone().into());
        }
        for (name, measured) in &self.figures {
            if let Some(value) = median(measured) {
                object.insert(name.clone(), ((value * 1e3).round() / 1e3).into());
            }
        }
        object.into()
    }
}

impl Serialize for Outcome {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut paths = serde_json::Map::new();
        for (path, peers) in &self.paths {
            let peers: serde_json::Map<_, _> =
                peers.iter().map(|(kind, peer)| (kind.name().to_owned(), peer.json())).collect();
            paths.insert(path.name().to_owned(), serde_json::json!({ "peers": peers }));
        }
        serde_json::json!({ "schema": SCHEMA, "paths": paths }).serialize(serializer)
    }
}

fn columns(path: Path) -> &'static [&'static str] {
    match path {
        Path::Clean => CLEAN,
        Path::Lossy => LOSSY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_medians_and_says_what_was_skipped() {
        let mut outcome = Outcome::default();
        for value in [1.0, 9.0, 2.0] {
            let mut figures = Figures::default();
            figures.put("tcp1_gbit", value);
            outcome.add(Path::Clean, Kind::Quincy, "3.1.1", figures);
        }
        outcome.skip(Path::Lossy, Kind::Quincy, "3.1.1", "no network");
        let json = serde_json::to_value(&outcome).unwrap();
        assert_eq!(json["schema"], SCHEMA);
        assert_eq!(json["paths"]["clean"]["peers"]["quincy"]["tcp1_gbit"], 2.0);
        assert_eq!(json["paths"]["lossy"]["peers"]["quincy"]["skipped"], "no network");
        assert!(outcome.table().contains("skipped: no network"));
    }
}
