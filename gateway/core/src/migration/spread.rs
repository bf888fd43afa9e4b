//! Whether every name server of a zone has heard that a name moved.
//!
//! The primary has, or nobody would ask. A secondary that has not goes on giving the old address, and whoever asked it may
//! believe that for a TTL more: old answers expire from the moment when the last server has heard.
//!
//! ```text
//!   behind <----> silent ----(silent for too long)----> left out
//!      |            |                                      |
//!      '------------+---------> current <------------------'
//! ```
//!
//! A server that has been current stays it: other names change after this one. One that is silent gives nobody an old
//! answer, but may come back and do so, so it is waited for, and not for ever. It asks nobody.

use std::collections::BTreeMap;
use std::time::Duration;

/// What one name server said when it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameAnswer {
    /// What the primary says.
    Current,
    /// Something else, or it has an older zone.
    Behind,
    /// Nothing.
    Silent,
}

/// How a name server stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Current,
    Behind,
    Silent { since: Duration },
}

/// The name servers of one name that has moved.
#[derive(Debug)]
pub struct Spread {
    silent_limit: Duration,
    servers: BTreeMap<String, Heard>,
}

/// Which name servers do not have a name's new addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lagging {
    /// They are waited for.
    pub behind: Vec<String>,
    /// They have been silent for so long that they are not waited for any more.
    pub left_out: Vec<String>,
}

impl Spread {
    /// Nobody has been asked. A server is waited for until it was silent for `silent_limit` without a break.
    pub fn new(silent_limit: Duration) -> Self {
        Self { silent_limit, servers: BTreeMap::new() }
    }

    /// Takes one look at all servers. One that is not among them is none of the zone's any more.
    pub fn handle_answers(&mut self, now: Duration, answers: &[(String, NameAnswer)]) -> Lagging {
        let before = std::mem::take(&mut self.servers);
        let mut lagging = Lagging::default();
        for (server, answer) in answers {
            let heard = next(before.get(server), *answer, now);
            match heard {
                Heard::Current => {}
                Heard::Silent { since } if now.saturating_sub(since) >= self.silent_limit => {
                    lagging.left_out.push(server.clone());
                }
                Heard::Behind | Heard::Silent { .. } => lagging.behind.push(server.clone()),
            }
            self.servers.insert(server.clone(), heard);
        }
        lagging
    }
}

fn next(before: Option<&Heard>, answer: NameAnswer, now: Duration) -> Heard {
    match (before, answer) {
        (Some(Heard::Current), _) | (_, NameAnswer::Current) => Heard::Current,
        (_, NameAnswer::Behind) => Heard::Behind,
        (Some(Heard::Silent { since }), NameAnswer::Silent) => Heard::Silent { since: *since },
        (Some(Heard::Behind) | None, NameAnswer::Silent) => Heard::Silent { since: now },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(900);

    fn look(spread: &mut Spread, at_s: u64, answers: &[(&str, NameAnswer)]) -> Lagging {
        let answers: Vec<_> =
            answers.iter().map(|(server, answer)| ((*server).to_owned(), *answer)).collect();
        spread.handle_answers(Duration::from_secs(at_s), &answers)
    }

    #[test]
    fn the_last_server_counts_and_one_that_had_it_has_it() {
        let mut spread = Spread::new(LIMIT);
        let lagging = look(&mut spread, 0, &[("1", NameAnswer::Current), ("2", NameAnswer::Behind)]);
        assert_eq!(lagging.behind, ["2"]);
        let lagging = look(&mut spread, 9000, &[("1", NameAnswer::Behind), ("2", NameAnswer::Behind)]);
        assert_eq!(lagging.behind, ["2"], "however long it takes, and the first has had it");
        let lagging = look(&mut spread, 9005, &[("1", NameAnswer::Silent), ("2", NameAnswer::Current)]);
        assert_eq!(lagging, Lagging::default());
    }

    #[test]
    fn a_silent_server_is_waited_for_until_its_limit_which_begins_anew_when_it_answers() {
        let mut spread = Spread::new(LIMIT);
        assert_eq!(look(&mut spread, 10, &[("2", NameAnswer::Silent)]).behind, ["2"]);
        assert_eq!(look(&mut spread, 909, &[("2", NameAnswer::Silent)]).behind, ["2"]);
        let over = look(&mut spread, 910, &[("2", NameAnswer::Silent)]);
        assert_eq!((over.behind.len(), over.left_out), (0, vec!["2".to_owned()]));
        assert_eq!(
            look(&mut spread, 911, &[("2", NameAnswer::Behind)]).behind,
            ["2"],
            "it is back, and stale"
        );
        assert_eq!(look(&mut spread, 912, &[("2", NameAnswer::Silent)]).behind, ["2"]);
        assert_eq!(look(&mut spread, 913, &[]), Lagging::default(), "the zone has given it up");
    }

    fn answer() -> impl Strategy<Value = NameAnswer> {
        prop_oneof![Just(NameAnswer::Current), Just(NameAnswer::Behind), Just(NameAnswer::Silent)]
    }

    proptest! {
        /// Against the plain reading of the rule: over the whole history of one server.
        #[test]
        fn a_server_counts_unless_it_was_current_or_has_been_silent_for_the_limit(
            history in prop::collection::vec((1_u64..600, answer()), 1..40)
        ) {
            let mut spread = Spread::new(LIMIT);
            let (mut now_s, mut asked) = (0, Vec::new());
            for (step, answer) in history {
                now_s += step;
                asked.push((now_s, answer));
                let lagging = look(&mut spread, now_s, &[("ns", answer)]);
                let had_it = asked.iter().any(|(_, answer)| *answer == NameAnswer::Current);
                let silence = asked.iter().rev().take_while(|(_, answer)| *answer == NameAnswer::Silent).last();
                let silent = silence.is_some_and(|(since, _)| now_s - since >= LIMIT.as_secs());
                prop_assert_eq!(lagging.behind.is_empty(), had_it || silent);
                prop_assert_eq!(lagging.left_out.is_empty(), had_it || !silent);
            }
        }
    }
}
