//! Schedules: what happens to the world, in which order; drawn from a seed, replayed from a file.
//!
//! An event's number is taken modulo what there is to choose from, so that any part of a schedule is
//! a schedule too: that is what lets a failing one be shortened.

use std::fmt;
use std::str::FromStr;

use crate::scene::{A, B, C, Scene};

/// What happens, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Deliver,
    Double,
    Lose,
    Work,
    WorkFails,
    Sync,
    Wait,
    /// The WAN from one site to another.
    Cut(usize, usize),
    Mend,
    NoticeLink,
    Crash(usize),
    Restart,
    PowerLoss(usize),
    KillGuest(usize),
    Boot,
    Migrate,
    Abort,
    NameServer,
    /// Everybody gets on with what he can do.
    Calm,
    /// The arbiter's register comes back in an older state.
    PutBack,
    /// An operator decides for a site that is gone for good.
    Resolve,
}

/// Each kind and how often it comes, out of the sum. What only a third site can have happen stands last, so that a seed
/// means the same to two sites as ever.
const WEIGHTS: [(Kind, u64); 32] = [
    (Kind::Deliver, 160),
    (Kind::Double, 20),
    (Kind::Lose, 20),
    (Kind::Work, 200),
    (Kind::WorkFails, 6),
    (Kind::Sync, 160),
    (Kind::Wait, 50),
    (Kind::Cut(A, B), 5),
    (Kind::Cut(B, A), 5),
    (Kind::Mend, 12),
    (Kind::NoticeLink, 14),
    (Kind::Crash(A), 8),
    (Kind::Crash(B), 8),
    (Kind::Restart, 30),
    (Kind::PowerLoss(A), 1),
    (Kind::PowerLoss(B), 2),
    (Kind::KillGuest(A), 1),
    (Kind::KillGuest(B), 2),
    (Kind::Boot, 4),
    (Kind::Migrate, 24),
    (Kind::Abort, 4),
    (Kind::NameServer, 10),
    (Kind::Cut(A, C), 5),
    (Kind::Cut(C, A), 5),
    (Kind::Cut(B, C), 5),
    (Kind::Cut(C, B), 5),
    (Kind::Crash(C), 8),
    (Kind::PowerLoss(C), 2),
    (Kind::KillGuest(C), 2),
    // A machine that has moved moves on: without it hardly one would come so far.
    (Kind::Calm, 60),
    // Where there is an arbiter, or an operator.
    (Kind::PutBack, 20),
    (Kind::Resolve, 20),
];

/// How many of them there are for two sites.
const OF_TWO: usize = 22;

/// Which of them happen in a scene.
fn happens(scene: &Scene, at: usize) -> bool {
    match WEIGHTS[at].0 {
        Kind::PutBack => scene.has_arbiter(),
        Kind::Resolve => scene.operator,
        Kind::Deliver
        | Kind::Double
        | Kind::Lose
        | Kind::Work
        | Kind::WorkFails
        | Kind::Sync
        | Kind::Wait
        | Kind::Cut(..)
        | Kind::Mend
        | Kind::NoticeLink
        | Kind::Crash(_)
        | Kind::Restart
        | Kind::PowerLoss(_)
        | Kind::KillGuest(_)
        | Kind::Boot
        | Kind::Migrate
        | Kind::Abort
        | Kind::NameServer
        | Kind::Calm => scene.sites > 2 || at < OF_TWO,
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |site: &usize| ["A", "B", "C"][*site];
        match self {
            Self::Cut(from, to) => write!(f, "Cut{}{}", letter(from), letter(to)),
            Self::Crash(site) => write!(f, "Crash{}", letter(site)),
            Self::PowerLoss(site) => write!(f, "PowerLoss{}", letter(site)),
            Self::KillGuest(site) => write!(f, "KillGuest{}", letter(site)),
            Self::Deliver
            | Self::Double
            | Self::Lose
            | Self::Work
            | Self::WorkFails
            | Self::Sync
            | Self::Wait
            | Self::Mend
            | Self::NoticeLink
            | Self::Restart
            | Self::Boot
            | Self::Migrate
            | Self::Abort
            | Self::NameServer
            | Self::Calm
            | Self::PutBack
            | Self::Resolve => write!(f, "{self:?}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    pub kind: Kind,
    pub number: u16,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.number)
    }
}

impl FromStr for Event {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let (kind, number) = line.split_once(' ').ok_or_else(|| format!("no number in {line:?}"))?;
        let known = WEIGHTS.iter().find(|(known, _)| known.to_string() == kind);
        let (kind, _) = known.ok_or_else(|| format!("no event is called {kind:?}"))?;
        let number = number.parse().map_err(|error| format!("{line:?}: {error}"))?;
        Ok(Self { kind: *kind, number })
    }
}

/// SplitMix64: small, and the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of so many numbers, from zero on.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}

/// The schedule of a seed. Each seed leaves some kinds of faults out, so that rare ones meet.
pub fn of_seed(seed: u64, scene: &Scene) -> Vec<Event> {
    let mut random = Random(seed);
    let swarm = random.next();
    let sites = scene.sites;
    let weights: Vec<(Kind, u64)> = WEIGHTS
        .iter()
        .enumerate()
        .filter(|(at, _)| happens(scene, *at))
        .map(|(at, (kind, weight))| {
            let steady = matches!(
                kind,
                Kind::Deliver | Kind::Work | Kind::Sync | Kind::Restart | Kind::Migrate | Kind::Calm
            );
            (*kind, if steady || swarm >> at & 1 == 1 { *weight } else { 0 })
        })
        .collect();
    let sum: u64 = weights.iter().map(|(_, weight)| weight).sum();
    let draw = random.next();
    // One in eight is long: a second attempt after a first one needs that.
    let short = 20 + (draw >> 8) % 160;
    let length = if draw.is_multiple_of(8) { 500 } else { short * (sites as u64 - 1) };
    // In every other one of three sites the first move ends well.
    let calm = if sites > 2 && swarm >> 63 == 1 { 8 } else { 0 };
    let drawn = (calm..length)
        .map(|_| Event { kind: pick(&weights, random.next() % sum), number: random.next() as u16 });
    std::iter::repeat_n(Event { kind: Kind::Calm, number: 3 }, calm as usize).chain(drawn).collect()
}

fn pick(weights: &[(Kind, u64)], mut at: u64) -> Kind {
    for (kind, weight) in weights {
        if at < *weight {
            return *kind;
        }
        at -= weight;
    }
    Kind::Wait
}

/// Leaves out whatever is not needed for `fails` to stay true.
pub fn shorten(mut events: Vec<Event>, fails: impl Fn(&[Event]) -> bool) -> Vec<Event> {
    let mut chunk = events.len().div_ceil(2).max(1);
    loop {
        let mut at = 0;
        while at < events.len() {
            let mut without = events.clone();
            without.drain(at..(at + chunk).min(events.len()));
            if fails(&without) {
                events = without;
            } else {
                at += chunk;
            }
        }
        if chunk == 1 {
            return events;
        }
        chunk = chunk.div_ceil(2);
    }
}
