//! The matrix' report: `report.json` for programs, a table for people.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::flaw::Flaw;
use super::plan::Case;
use super::play::{Ending, Played};
use super::setting::Setting;

/// Version of `report.json`.
pub const SCHEMA: u32 = 1;

/// Cases of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Played.
    pub cases: u64,
    /// Among them those in which every promise held.
    pub held: u64,
}

/// How the cases of a fault ended. One that came to no end is counted nowhere.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endings {
    /// The machine is where it was to go.
    pub moved: u64,
    /// It is where it was.
    pub stayed: u64,
    /// The QEMU that owned it was killed, and it was booted again.
    pub guest_crashed: u64,
    /// Its guest powered itself off, and was started again.
    pub was_off: u64,
    /// Only an operator may start it.
    pub on_hold: u64,
}

/// A case that did not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Its number.
    pub number: u64,
    /// The fault.
    pub fault: String,
    /// Where the move was; empty if it never got there.
    pub stage: String,
    /// What did not hold.
    pub flaws: Vec<String>,
    /// The command that plays it again.
    pub replay: String,
    /// Where the logs are, below the report's folder.
    pub logs: String,
}

/// `report.json`, version 1.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultReport {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The seed.
    pub seed: u64,
    /// The command's arguments beside the seed; empty for what is usual.
    #[serde(default)]
    pub setting: String,
    /// Cases in which the fault struck.
    pub cases: u64,
    /// Among them those in which every promise held.
    pub held: u64,
    /// Cases in which there was nothing to strike at the moment; not counted anywhere else.
    pub missed: u64,
    /// By the fault's name.
    pub by_fault: BTreeMap<String, Tally>,
    /// By the stage in which it struck: `0` to `5`, `after`, or `?` for a case that did not get there.
    pub by_stage: BTreeMap<String, Tally>,
    /// By fault and stage.
    pub by_cell: BTreeMap<String, BTreeMap<String, Tally>>,
    /// How the cases of each fault ended.
    #[serde(default)]
    pub endings: BTreeMap<String, Endings>,
    /// How often two copies ran at one time.
    pub double_runs: u64,
    /// Cases in which the QEMU that owned the machine was killed, and the machine was booted again.
    pub guest_crashed: u64,
    /// Cases in which the guest powered itself off, and was started again.
    pub was_off: u64,
    /// Cases that ended with the machine where it was to go.
    pub moved: u64,
    /// Cases that ended with the machine where it was.
    pub stayed: u64,
    /// Cases that ended with a machine that only an operator may start.
    pub on_hold: u64,
    /// Cases after which no copy could run.
    pub lost_machines: u64,
    /// Cases after which something was gone that a client knew of.
    pub lost_confirmed_writes: u64,
    /// Cases that left something behind.
    pub leftovers: u64,
    /// Cases that did not hold.
    pub failed: Vec<Failed>,
    /// The whole run.
    pub took_s: f64,
}

impl FaultReport {
    /// An empty one.
    pub fn new(seed: u64, setting: Setting) -> Self {
        Self { schema: SCHEMA, seed, setting: setting.arguments(), ..Self::default() }
    }

    /// Counts a case; `None` for one that could not be played.
    pub fn count(&mut self, case: &Case, played: Option<&Played>, flaws: &[Flaw]) {
        if played.is_some_and(|played| !played.struck) && flaws.is_empty() {
            self.missed += 1;
            return;
        }
        let (fault, stage) = (case.fault.name(), stage_name(played));
        let cell = self.by_cell.entry(fault.clone()).or_default().entry(stage.clone()).or_default();
        let (by_fault, by_stage) = (
            self.by_fault.entry(fault.clone()).or_default(),
            self.by_stage.entry(stage.clone()).or_default(),
        );
        for tally in [cell, by_fault, by_stage] {
            tally.cases += 1;
            tally.held += u64::from(flaws.is_empty());
        }
        self.cases += 1;
        self.held += u64::from(flaws.is_empty());
        let endings = self.endings.entry(fault.clone()).or_default();
        let (of_fault, of_all) = match played.map_or(Ending::Unclear, |played| played.ending) {
            Ending::Stayed => (&mut endings.stayed, &mut self.stayed),
            Ending::Moved => (&mut endings.moved, &mut self.moved),
            Ending::Crashed(_) => (&mut endings.guest_crashed, &mut self.guest_crashed),
            Ending::WasOff(_) => (&mut endings.was_off, &mut self.was_off),
            Ending::Held => (&mut endings.on_hold, &mut self.on_hold),
            Ending::Unclear => (&mut 0, &mut 0),
        };
        (*of_fault, *of_all) = (*of_fault + 1, *of_all + 1);
        self.count_flaws(flaws);
        if !flaws.is_empty() {
            self.failed.push(Failed {
                number: case.number,
                fault,
                stage,
                flaws: flaws.iter().map(ToString::to_string).collect(),
                replay: replay(&self.setting, self.seed, case.number),
                logs: logs(&self.setting, self.seed, case.number),
            });
        }
    }

    fn count_flaws(&mut self, flaws: &[Flaw]) {
        let has = |wanted: fn(&Flaw) -> bool| u64::from(flaws.iter().any(wanted));
        self.lost_machines += has(|flaw| matches!(flaw, Flaw::LostMachine(_)));
        self.lost_confirmed_writes += has(|flaw| matches!(flaw, Flaw::LostWrites(_)));
        self.leftovers += has(|flaw| matches!(flaw, Flaw::LeftBehind(_)));
        for flaw in flaws {
            if let Flaw::DoubleRun(times) = flaw {
                self.double_runs += times;
            }
        }
    }

    /// Writes `report.json`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder)?;
        Ok(std::fs::write(folder.join("report.json"), serde_json::to_vec_pretty(self)?)?)
    }

    /// Nothing did not hold, and enough was played to say so.
    pub fn held_everywhere(&self) -> bool {
        let enough = self.held > 0 && self.missed * 5 <= self.cases;
        enough && self.failed.is_empty() && self.leftovers == 0
    }

    /// How the cases of each fault ended.
    pub fn endings_table(&self) -> String {
        let mut text = format!(
            "{:<16}{:>8}{:>8}{:>8}{:>8}{:>8}\n",
            "fault", "moved", "stayed", "crashed", "off", "on hold"
        );
        for (fault, of) in &self.endings {
            let (moved, stayed, crashed, off, held) =
                (of.moved, of.stayed, of.guest_crashed, of.was_off, of.on_hold);
            text.push_str(&format!("{fault:<16}{moved:>8}{stayed:>8}{crashed:>8}{off:>8}{held:>8}\n"));
        }
        text
    }

    /// Faults by stages, each cell `held/cases`.
    pub fn table(&self) -> String {
        let stages: BTreeSet<&String> = self.by_stage.keys().collect();
        let mut text = format!("{:<16}", "fault \\ stage");
        for stage in &stages {
            text.push_str(&format!("{stage:>8}"));
        }
        text.push_str(&format!("{:>8}\n", "all"));
        for (fault, cells) in &self.by_cell {
            text.push_str(&format!("{fault:<16}"));
            for stage in &stages {
                text.push_str(&format!("{:>8}", cells.get(*stage).map_or("-".into(), shown)));
            }
            text.push_str(&format!("{:>8}\n", self.by_fault.get(fault).map_or("-".into(), shown)));
        }
        text.push_str(&format!("{:<16}", "all"));
        for tally in self.by_stage.values() {
            text.push_str(&format!("{:>8}", shown(tally)));
        }
        text.push_str(&format!("{:>8}\n", shown(&Tally { cases: self.cases, held: self.held })));
        text
    }
}

/// The command that plays a case again.
pub fn replay(setting: &str, seed: u64, number: u64) -> String {
    format!("cargo lab faults --seed {seed}{setting} --only {number}")
}

/// The folder of a case that did not hold, below the report's.
pub fn logs(setting: &str, seed: u64, number: u64) -> String {
    let played_in = setting.replace(" --", "-").replace(' ', "-");
    format!("failed/{seed}{played_in}-{number}")
}

/// The stage of a case for reports.
pub fn stage_name(played: Option<&Played>) -> String {
    played.map_or("?".to_owned(), |played| played.spot.name())
}

fn shown(tally: &Tally) -> String {
    format!("{}/{}", tally.held, tally.cases)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::plan::{self, Place};
    use super::super::strike::Spot;
    use super::*;

    #[test]
    fn a_case_is_counted_by_fault_and_stage_and_a_flaw_makes_it_fail() {
        let mut report = FaultReport::new(3, Setting::default());
        let case = plan::case(3, 0);
        let played = Played {
            spot: Spot::After,
            struck: true,
            ending: Ending::Crashed(Place::B),
            flaws: Vec::new(),
            took: Duration::ZERO,
        };
        report.count(&case, Some(&played), &[]);
        let flaws = [Flaw::DoubleRun(2), Flaw::LostWrites("x".into())];
        report.count(&case, Some(&played), &flaws);
        report.count(&case, Some(&Played { struck: false, ..played }), &[]);
        let expected = Tally { cases: 2, held: 1 };
        assert_eq!((report.by_fault[&case.fault.name()], report.by_stage["after"]), (expected, expected));
        assert_eq!((report.double_runs, report.lost_confirmed_writes, report.guest_crashed), (2, 1, 2));
        assert_eq!((report.missed, report.failed.len()), (1, 1));
        assert_eq!(report.endings[&case.fault.name()], Endings { guest_crashed: 2, ..Endings::default() });
        assert!(report.endings_table().contains(&case.fault.name()));
        assert_eq!(report.failed[0].replay, "cargo lab faults --seed 3 --only 0");
        assert!(report.table().contains("1/2"), "{}", report.table());
    }

    #[test]
    fn a_run_in_which_nothing_was_struck_has_shown_nothing() {
        let case = plan::case(3, 0);
        let played = |struck| Played {
            spot: Spot::After,
            struck,
            ending: Ending::Moved,
            flaws: Vec::new(),
            took: Duration::ZERO,
        };
        let mut report = FaultReport::new(3, Setting::default());
        assert!(!report.held_everywhere());
        report.count(&case, Some(&played(false)), &[]);
        assert!(!report.held_everywhere());
        for _ in 0..5 {
            report.count(&case, Some(&played(true)), &[]);
        }
        assert!(report.held_everywhere());
        report.leftovers = 1;
        assert!(!report.held_everywhere());
    }
}
