//! What a gateway asks of its arbiter, and an arbiter whose register comes back in an older state: a zone or a cluster
//! that was restored from a backup.
//!
//! A decision that somebody in doubt has not seen is never undone here: no protocol survives that (`ForgetsTheDecision`).
//! Nor is a change applied that was under way when its server was stopped for the restore: it would find the state that
//! it was made for. For everybody else the outcome is to hold, until an operator writes the newest state again.

use longhaul_core::ids::Epoch;
use longhaul_core::migration::CommitMode;
use longhaul_core::migration::arbiter::{Request, Verdict};
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};

use crate::broken::Broken;
use crate::invariants::Violation;
use crate::parts::Id;
use crate::world::World;

impl World {
    /// Asks the register about an attempt; what was seen in it is on disk before anybody hears of it.
    pub fn arbitrates(&mut self, site: usize, id: Id, request: Request) -> Result<Verdict, Violation> {
        let attempt = self.moves[&id];
        if self.broken == Some(Broken::NeverPays) && request == Request::BackToSource {
            return Ok(Verdict::Source);
        }
        let forgets = self.broken == Some(Broken::ForgetsHighWater);
        let seen = if forgets { Epoch(0) } else { self.sites[site].journal.seen };
        if site == attempt.destination && self.broken == Some(Broken::TwoPrimaries) {
            return Ok(self.second_primary.ask(request, &attempt, seen).0.verdict);
        }
        let CommitMode::Arbitrated(of) = attempt.commit else { return Ok(Verdict::Unknown) };
        let before = self.register(of).epoch;
        let (said, under_way) = self.register(of).ask(request, &attempt, seen);
        let changed = self.register(of).epoch != before || under_way.is_some();
        self.under_way.extend(under_way.map(|change| (of, change)));
        self.believes_nothing_older(site, before, changed)?;
        let seen = &mut self.sites[site].journal.seen;
        *seen = said.epoch.max(*seen);
        let hopes = match self.broken {
            Some(Broken::ClaimsWithoutAnAnswer) => Some((Request::ForDestination, Verdict::Destination)),
            Some(Broken::TakesBackWithoutAnAnswer) => Some((Request::ForSource, Verdict::Source)),
            Some(_) | None => None,
        };
        Ok(match (said.verdict, hopes) {
            (Verdict::Unknown, Some((hoped, won))) if hoped == request => won,
            (verdict, _) => verdict,
        })
    }

    /// Its register comes back in an older state.
    pub fn put_back(&mut self, number: usize) {
        let Some(of) = self.scene.arbiter() else { return };
        let older = self.register(of).older();
        let Some(to) = older.get(number % older.len().max(1)).copied() else { return };
        if self.broken == Some(Broken::ForgetsTheDecision) || !self.deceives(to.1) {
            self.register(of).put_back(to);
            self.under_way.retain(|(at, _)| *at != of);
        }
    }

    /// Somebody has not seen what would be undone, and waits for it.
    fn deceives(&self, to: Epoch) -> bool {
        self.last_records().any(|(site, id, last)| {
            let doubts = matches!(
                last,
                Record::Source(
                    SourceRecord::Offered { .. }
                        | SourceRecord::Reclaiming { .. }
                        | SourceRecord::Promised { .. }
                ) | Record::Destination(DestinationRecord::Loaded | DestinationRecord::Claiming { .. })
            );
            let attempt = &self.moves[&id];
            let decided = self.arbiter(attempt.commit).is_some_and(|it| it.has_decided(attempt.epoch));
            doubts && decided && self.sites[site].journal.seen <= to && to < attempt.epoch
        })
    }
}
