//! `longhaul journal`: what was decided, who owns the machine, what is done next. From the daemon, or from the
//! file of a gateway that is stopped.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use longhaul_core::ids::VmName;

use crate::api::client::{Client, ClientError};
use crate::api::types::JournalView;
use crate::history;
use crate::journal::Journal;

/// Asks the daemon.
pub async fn ask(client: &Client, vm: Option<&VmName>, json: bool) -> Result<ExitCode, ClientError> {
    print(&client.journal(vm).await?, json).map_err(ClientError::Form)
}

/// Reads a journal on which no gateway runs. Its QEMUs are not asked.
pub fn file(path: &Path, vm: Option<&VmName>, json: bool) -> ExitCode {
    let views =
        Journal::open_copy(path).and_then(|journal| history::views(&journal, vm, &BTreeMap::new(), None));
    match views {
        Ok(views) => print(&views, json).unwrap_or_else(|error| super::fail(&error, 1)),
        Err(error) => super::fail(&error, 1),
    }
}

fn print(views: &[JournalView], json: bool) -> Result<ExitCode, serde_json::Error> {
    if json {
        println!("{}", serde_json::to_string(views)?);
    } else {
        print!("{}", views.iter().map(page).collect::<Vec<_>>().join("\n"));
    }
    Ok(ExitCode::SUCCESS)
}

fn page(view: &JournalView) -> String {
    let way = if view.role == "source" { "to" } else { "from" };
    let mut page = format!("{}  epoch {}  {way} site {}  [{}]\n", view.vm, view.epoch, view.peer, view.id);
    for record in &view.records {
        let why = record.why.as_ref().map(|why| format!("  {why}")).unwrap_or_default();
        page += &format!("  {}  {}{why}\n", utc(record.at_ms), record.name);
    }
    page += &format!("  owner: {}\n", view.owner);
    if view.under_way {
        page += "  now: the gateway works on it\n";
    }
    page + &format!("  at a start of the gateway: {}\n", view.next_text)
}

/// RFC 3339 in UTC. Days to a date after Hinnant, *chrono-Compatible Low-Level Date Algorithms*.
pub(super) fn utc(unix_ms: u64) -> String {
    let (days, of_day) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute) = (of_day / 3_600_000, of_day / 60_000 % 60);
    let (second, ms) = (of_day / 1000 % 60, of_day % 1000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_rfc_3339() {
        assert_eq!(utc(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(utc(1_732_550_399_987), "2024-11-25T15:59:59.987Z");
    }
}
