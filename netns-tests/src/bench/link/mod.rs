//! `cargo lab bench link`: how fast bulk data travels over an emulated WAN with the gateway's link, with kernel TCP, with
//! quinn's own congestion controllers and with s2n-quic's BBR, what queue each makes, and how two share a path.
//!
//! ```text
//!   a: sends without end ===== emulated WAN: rate, delay, loss, queue ===== b: counts what arrives
//! ```
//!
//! Each sender is measured alone after it had time to find the rate, and some in pairs. What is used, lost and queued is
//! seen at the emulator. It takes processor time of the same machine; where packets were lost to that, the table says so,
//! and the figures of that line are the machine's rather than the sender's. Who cannot be measured here is named with the
//! reason.

mod cell;
mod end;
mod measure;
mod place;
mod quic;
mod report;
mod s2n_quic;
mod sender;

use std::time::Duration;

use anyhow::Result;

pub use end::{LinkEndArguments, link_end_main};

use cell::{Cell, Extent};
use report::Outcome;
use sender::Sender;

/// What is measured and for how long.
#[derive(Debug, Clone)]
pub struct LinkOptions {
    /// Length of one measurement.
    pub seconds: u64,
    /// How often each is repeated.
    pub rounds: u32,
    /// A few cells only.
    pub quick: bool,
    /// Every combination.
    pub full: bool,
    /// Only senders with these names; all if empty.
    pub only: Vec<String>,
    /// Nobody alone, only pairs.
    pub shared_only: bool,
}

impl LinkOptions {
    fn extent(&self) -> Extent {
        match (self.quick, self.full) {
            (_, true) => Extent::Full,
            (true, false) => Extent::Quick,
            (false, false) => Extent::Usual,
        }
    }

    fn wants(&self, sender: Sender) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == sender.name())
    }
}

/// Measures, prints the tables and writes `link.json`, or `link-part.json` if only a part was wanted.
pub fn run(options: &LinkOptions) -> Result<()> {
    let mut outcome = Outcome::new(options.seconds);
    let wanted = Sender::ALL.into_iter().filter(|sender| options.wants(*sender));
    let senders = ready(wanted, Sender::prepare, &mut outcome);
    if !options.shared_only {
        for cell in Cell::of(options.extent()) {
            measure_alone(options, cell, &senders, &mut outcome);
        }
    }
    for cell in Cell::shared(options.extent()) {
        measure_shared(options, cell, &senders, &mut outcome);
    }
    println!("{}", outcome.table());
    let partial = options.quick || options.shared_only || !options.only.is_empty();
    let file = super::results("link", partial, "json")?;
    super::keep(&file, serde_json::to_vec_pretty(&outcome.json())?)
}

/// Those of the wanted that can be measured here; why the others cannot is told in the outcome.
fn ready(
    wanted: impl Iterator<Item = Sender>,
    prepare: impl Fn(Sender) -> Result<(), String>,
    outcome: &mut Outcome,
) -> Vec<Sender> {
    let mut senders = Vec::new();
    for sender in wanted {
        match prepare(sender) {
            Ok(()) => senders.push(sender),
            Err(reason) => drop(outcome.left_out.insert(sender.name().to_owned(), reason)),
        }
    }
    senders
}

fn measure_alone(options: &LinkOptions, cell: Cell, senders: &[Sender], outcome: &mut Outcome) {
    let time = Duration::from_secs(options.seconds);
    for sender in senders {
        let mut rounds = Vec::new();
        let mut failed = None;
        for round in 1..=options.rounds {
            println!("{}: {}, round {round} of {}", cell.name(), sender.name(), options.rounds);
            match measure::alone(&cell, *sender, time) {
                Ok(measured) => rounds.push(measured),
                Err(error) => failed = Some(format!("{error:#}")),
            }
        }
        outcome.add_alone(cell, *sender, failed.map_or(Ok(rounds), Err));
    }
}

fn measure_shared(options: &LinkOptions, cell: Cell, senders: &[Sender], outcome: &mut Outcome) {
    for second in [Sender::Ours, Sender::TcpCubic, Sender::TcpBbr] {
        if !senders.contains(&Sender::Ours) || !senders.contains(&second) {
            continue;
        }
        let pair = [Sender::Ours, second];
        println!("{}: {} and then {}", cell.name(), pair[0].name(), pair[1].name());
        let time = Duration::from_secs(3 * options.seconds);
        let measured = measure::shared(&cell, pair, time).map_err(|error| format!("{error:#}"));
        outcome.add_shared(cell, pair, measured);
    }
}
