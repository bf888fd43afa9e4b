//! What is changed by compare-and-swap only: the name with its ownership record, and an arbiter's key. A register here
//! is an owner and an epoch.

use longhaul_core::ids::Epoch;
use longhaul_core::migration::arbiter::{Contest, Request, Said, Verdict};

use crate::parts::{Move, name};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Answers,
    Stalls,
    Refuses,
    AppliesAndLosesTheAnswer,
}

impl Mood {
    pub fn of(number: usize) -> Self {
        match number % 4 {
            0 => Self::Answers,
            1 => Self::Stalls,
            2 => Self::Refuses,
            _ => Self::AppliesAndLosesTheAnswer,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Register {
    pub mood: Mood,
    pub site: usize,
    pub epoch: Epoch,
    /// All that it ever was changed to.
    held: Vec<(usize, Epoch)>,
    /// What it said when it was put back to an older state.
    undone: Option<(usize, Epoch)>,
}

/// A compare-and-swap that has not been answered: it may still be applied, as long as the register says what it
/// said when it was sent.
#[derive(Clone, Copy, Debug)]
pub struct UnderWay {
    before: (usize, Epoch),
    after: (usize, Epoch),
}

/// No answer, or none to be trusted.
const SILENCE: Said = Said { epoch: Epoch(0), verdict: Verdict::Unknown };

impl Register {
    pub fn new(site: usize, epoch: Epoch) -> Self {
        Self { mood: Mood::Answers, site, epoch, held: vec![(site, epoch)], undone: None }
    }

    /// Arbitrates, as the mood allows, for a site that has seen this epoch in it.
    pub fn ask(&mut self, request: Request, attempt: &Move, seen: Epoch) -> (Said, Option<UnderWay>) {
        let contest = contest(attempt);
        let winner = contest
            .winner(request, self.says(&contest, seen).verdict)
            .map(|winner| if *winner == contest.destination { attempt.destination } else { attempt.source });
        let change =
            winner.map(|winner| UnderWay { before: (self.site, self.epoch), after: (winner, attempt.epoch) });
        match self.mood {
            Mood::Stalls => (SILENCE, change),
            Mood::Refuses => (SILENCE, None),
            Mood::Answers => {
                change.into_iter().for_each(|change| self.apply(change));
                (self.says(&contest, seen), None)
            }
            Mood::AppliesAndLosesTheAnswer => {
                change.into_iter().for_each(|change| self.apply(change));
                (SILENCE, None)
            }
        }
    }

    /// What it says of the attempt that would begin the contest's epoch.
    fn says(&self, contest: &Contest, seen: Epoch) -> Said {
        contest.said(Some((self.epoch, name(self.site).as_str())), seen)
    }

    /// Epoch and owner stand for the transaction's number: none of them comes back.
    pub fn apply(&mut self, change: UnderWay) {
        if (self.site, self.epoch) == change.before {
            self.set(change.after.0, change.after.1);
        }
    }

    /// Moves the name; whether the asker knows that it moved. One that is right already gets the epoch all the same: what
    /// is under way still is not applied any more.
    pub fn swap(&mut self, site: usize, epoch: Epoch) -> (bool, Option<UnderWay>) {
        let done = self.site == site && self.epoch == epoch;
        let change = (self.epoch < epoch)
            .then_some(UnderWay { before: (self.site, self.epoch), after: (site, epoch) });
        match self.mood {
            Mood::Stalls => (false, change),
            Mood::Refuses => (false, None),
            Mood::Answers => {
                change.into_iter().for_each(|change| self.apply(change));
                (done || change.is_some(), None)
            }
            Mood::AppliesAndLosesTheAnswer => {
                change.into_iter().for_each(|change| self.apply(change));
                (false, None)
            }
        }
    }

    /// It was given to somebody, or a later epoch was.
    pub fn has_decided(&self, epoch: Epoch) -> bool {
        self.held.iter().any(|(_, held)| *held >= epoch)
    }

    /// The states that it had before it came to what it says.
    pub fn older(&self) -> Vec<(usize, Epoch)> {
        let older = self.held.iter().filter(|(_, epoch)| *epoch < self.epoch);
        older.copied().collect()
    }

    /// An operator writes where the machine is, by hand.
    pub fn correct(&mut self, site: usize, epoch: Epoch) {
        self.set(site, epoch);
    }

    /// Somebody restores an old zone, or a backup of the cluster.
    pub fn put_back(&mut self, to: (usize, Epoch)) {
        let newest = self.undone.filter(|(_, epoch)| *epoch > self.epoch);
        self.undone = newest.or(Some((self.site, self.epoch)));
        (self.site, self.epoch) = to;
    }

    /// An operator writes the newest state again, unless it came to a newer one.
    pub fn repair(&mut self) {
        if let Some((site, epoch)) = self.undone.take().filter(|(_, epoch)| *epoch > self.epoch) {
            self.set(site, epoch);
        }
    }

    /// It gave the epoch to `site`, whatever came after.
    pub fn gave(&self, site: usize, epoch: Epoch) -> bool {
        self.held.contains(&(site, epoch))
    }

    fn set(&mut self, site: usize, epoch: Epoch) {
        (self.site, self.epoch) = (site, epoch);
        self.held.push((site, epoch));
    }
}

fn contest(attempt: &Move) -> Contest {
    let (source, destination) = (name(attempt.source).clone(), name(attempt.destination).clone());
    Contest { epoch: attempt.epoch, source, destination }
}
