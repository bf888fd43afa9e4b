//! The controller on simulated paths, in virtual time: what it uses, what it queues, what it leaves to others.

mod alone;
mod bottleneck;
mod bounds;
mod overestimate;
mod senders;
mod sharing;

use std::time::Duration;

use super::*;
use bottleneck::{Flow, Network, PACKET_BYTES, Path};
use senders::{Bbr, Cubic, Ours};

const SECOND: Duration = Duration::from_secs(1);

/// This controller from `begins` on, with an operator's rate of `cap`.
fn ours(cap: Rate, rtt: Duration, seed: u64, begins: Duration) -> Flow {
    Flow::new(Box::new(Ours::new(cap, rtt, seed, begins)), begins)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}
