//! The mode with an arbiter: two sites and a compare-and-swap register.
//!
//! Messages and requests to the register are sets that only grow: what was sent may arrive any
//! number of times, in any order, late or never. A gateway's crash changes nothing, because each
//! state here is one that is in the journal. The register itself is linearizable and never rolled
//! back; a register that travels back in time is the high-water epoch's business, not this model's.
//!
//! More than the reference's model: a source that came back says so, and reads that it was handed back even
//! where nobody tells it. Less: without an offer no claim can be under way, and the register is owed nothing.

use crate::search::{Model, Move};

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The source resumes when it has waited long enough.
    SourceTimesOut,
    /// The destination starts when it has waited long enough.
    DestinationTimesOut,
    /// The source promises after it has asked the register for itself.
    GrantAfterAbort,
    /// The destination refuses although its request may still be on its way.
    RefusesWhileClaiming,
    /// The source does not tell the register that it runs.
    NeverPays,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    Run,
    Offered,
    Aborting,
    Promised,
    Gone,
    /// Resumed without the register: it owes it the news.
    ResumedUnsettled,
    Resumed,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Destination {
    Receiving,
    Loaded,
    Claiming,
    Owner,
    Ran,
    Refused,
    HandBack,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Guest {
    Running,
    Paused,
    Gone,
}

/// What the register says: who, and in which epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Register {
    SourceBefore,
    DestinationAfter,
    SourceAfter,
}

/// What was ever sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sent {
    pub offer: bool,
    pub cancel: bool,
    pub grant: bool,
    pub refuse: bool,
    pub running: bool,
    pub claim: bool,
    pub reclaim: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct State {
    pub source: Source,
    pub source_guest: Guest,
    pub destination: Destination,
    pub destination_guest: Guest,
    pub register: Register,
    pub sent: Sent,
}

/// Who has to be reachable for a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    Nobody,
    Wan,
    Arbiter,
    WanAndArbiter,
}

/// A move's name and whom it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(pub &'static str, pub Needs);

impl Label {
    /// With these out of reach for ever.
    pub fn is_possible_without(self, away: &[Needs]) -> bool {
        match self.1 {
            Needs::WanAndArbiter => away.is_empty(),
            Needs::Nobody | Needs::Wan | Needs::Arbiter => !away.contains(&self.1),
        }
    }
}

pub struct Arbiter {
    pub mutant: Option<Mutant>,
}

struct Moves<'a>(&'a State, Vec<Move<Label, State>>);

impl Moves<'_> {
    fn add(&mut self, when: bool, name: &'static str, needs: Needs, change: impl FnOnce(&mut State)) {
        self.push(when, Label(name, needs), false, change);
    }

    fn push(&mut self, when: bool, label: Label, fault: bool, change: impl FnOnce(&mut State)) {
        if when {
            let mut to = *self.0;
            change(&mut to);
            self.1.push(Move { label, to, fault });
        }
    }
}

fn resume(guest: &mut Guest) {
    if *guest == Guest::Paused {
        *guest = Guest::Running;
    }
}

impl Model for Arbiter {
    type State = State;
    type Label = Label;

    fn start(&self) -> State {
        State {
            source: Source::Run,
            source_guest: Guest::Running,
            destination: Destination::Receiving,
            destination_guest: Guest::Gone,
            register: Register::SourceBefore,
            sent: Sent::default(),
        }
    }

    fn moves(&self, state: &State) -> Vec<Move<Label, State>> {
        let mut moves = Moves(state, Vec::new());
        self.source(state, &mut moves);
        self.source_reads(state, &mut moves);
        self.destination(state, &mut moves);
        self.claims(state, &mut moves);
        register(state, &mut moves);
        let alive = |guest: Guest| guest != Guest::Gone;
        let lost = |name| Label(name, Needs::Nobody);
        moves.push(alive(state.source_guest), lost("source host lost"), true, |s| {
            s.source_guest = Guest::Gone;
        });
        moves.push(alive(state.destination_guest), lost("destination host lost"), true, |s| {
            s.destination_guest = Guest::Gone;
        });
        moves.1
    }

    fn violated(&self, state: &State) -> Option<&'static str> {
        let both = state.source_guest == Guest::Running && state.destination_guest == Guest::Running;
        both.then_some("never_two_running")
    }

    /// One copy runs, and a register that was asked to decide names it: names follow the register.
    fn is_settled(&self, state: &State) -> bool {
        let runs = |guest: Guest| guest == Guest::Running;
        let named = match state.register {
            Register::SourceBefore => !state.sent.offer,
            Register::SourceAfter => runs(state.source_guest),
            Register::DestinationAfter => runs(state.destination_guest),
        };
        runs(state.source_guest) != runs(state.destination_guest) && named
    }

    /// The copy that ran was lost with its host; or the source's was, and its word with it. A copy that was loaded and
    /// never ran is no loss while the source has its own.
    fn is_lost(&self, state: &State) -> bool {
        let source = state.source_guest == Guest::Gone && state.source != Source::Done;
        let destination = state.destination_guest == Guest::Gone && state.destination == Destination::Ran;
        source || destination
    }
}

impl Arbiter {
    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn source(&self, s: &State, moves: &mut Moves<'_>) {
        let receiving = s.destination == Destination::Receiving && s.destination_guest == Guest::Gone;
        let runs = s.source == Source::Run && s.source_guest == Guest::Running;
        moves.add(runs && receiving, "both paused, destination loaded", Needs::Nobody, |s| {
            s.source_guest = Guest::Paused;
            s.destination_guest = Guest::Paused;
            s.destination = Destination::Loaded;
        });
        let parked = s.source == Source::Run && s.source_guest == Guest::Paused;
        moves.add(parked, "source: offers", Needs::Nobody, |s| {
            s.source = Source::Offered;
            s.sent.offer = true;
        });
        moves.add(parked, "source: aborts before the offer", Needs::Nobody, |s| {
            s.source = Source::ResumedUnsettled;
            s.source_guest = Guest::Running;
            s.sent.cancel = true;
        });
        let offered = s.source == Source::Offered;
        moves.add(offered, "source: asks the register for itself", Needs::Arbiter, |s| {
            s.source = Source::Aborting;
            s.sent.reclaim = true;
        });
        let late = s.source == Source::Aborting && self.is(Mutant::GrantAfterAbort);
        let promises = (offered && !self.is(Mutant::GrantAfterAbort)) || late;
        moves.add(promises, "source: promises", Needs::Wan, |s| {
            s.source = Source::Promised;
            s.sent.grant = true;
        });
        moves.add(s.source == Source::Promised, "source: writes for the destination", Needs::Arbiter, |s| {
            s.sent.claim = true;
        });
        moves.add(s.source == Source::Gone && !s.sent.grant, "source: gone, says so", Needs::Wan, |s| {
            s.sent.grant = true;
        });
        let owes = matches!(s.source, Source::Resumed | Source::ResumedUnsettled)
            && s.source_guest == Guest::Running
            && s.sent.offer
            && s.register != Register::SourceAfter
            && !self.is(Mutant::NeverPays);
        moves.add(owes, "source: pays its debt to the register", Needs::Arbiter, |s| {
            s.register = Register::SourceAfter;
        });
    }

    fn source_reads(&self, s: &State, moves: &mut Moves<'_>) {
        let doubts = matches!(s.source, Source::Offered | Source::Aborting | Source::Promised);
        moves.add(
            doubts && s.register == Register::DestinationAfter,
            "source: reads destination",
            Needs::Arbiter,
            |s| s.source = Source::Gone,
        );
        moves.add(
            doubts && s.register == Register::SourceAfter,
            "source: reads itself, resumes",
            Needs::Arbiter,
            |s| {
                s.source = Source::Resumed;
                resume(&mut s.source_guest);
                s.sent.cancel = true;
            },
        );
        moves.add(doubts && s.sent.refuse, "source: hears the refusal, resumes", Needs::Wan, |s| {
            s.source = Source::ResumedUnsettled;
            resume(&mut s.source_guest);
        });
        let times_out = doubts && self.is(Mutant::SourceTimesOut);
        moves.add(times_out, "source: waited long enough, resumes", Needs::Nobody, |s| {
            s.source = Source::ResumedUnsettled;
            resume(&mut s.source_guest);
        });
        let gone = s.source == Source::Gone;
        moves.add((doubts || gone) && s.sent.running, "source: hears that it runs there", Needs::Wan, |s| {
            s.source = Source::Done;
            s.source_guest = Guest::Gone;
        });
        let handed_back = gone && s.register == Register::SourceAfter;
        moves.add(handed_back, "source: gone, reads itself, resumes", Needs::Arbiter, |s| {
            s.source = Source::Resumed;
            resume(&mut s.source_guest);
            s.sent.cancel = true;
        });
        let back = gone && s.sent.refuse && s.register != Register::SourceBefore;
        moves.add(back, "source: refused after all, takes it back", Needs::WanAndArbiter, |s| {
            s.register = Register::SourceAfter;
            s.source = Source::Resumed;
            resume(&mut s.source_guest);
        });
    }

    fn destination(&self, s: &State, moves: &mut Moves<'_>) {
        let loaded = s.destination == Destination::Loaded;
        let alive = s.destination_guest == Guest::Paused;
        let refuse = |s: &mut State| {
            s.destination = Destination::Refused;
            s.destination_guest = Guest::Gone;
            s.sent.refuse = true;
        };
        moves.add(loaded && s.sent.cancel, "destination: cancelled", Needs::Wan, refuse);
        moves.add(
            loaded && s.destination_guest == Guest::Gone,
            "destination: QEMU lost, refuses",
            Needs::Nobody,
            refuse,
        );
        moves.add(loaded && alive, "destination: refuses", Needs::Nobody, refuse);
        let waits = matches!(s.destination, Destination::Loaded | Destination::Claiming);
        moves.add(waits && s.sent.grant && alive, "destination: was promised it", Needs::Wan, |s| {
            s.destination = Destination::Owner;
        });
        let times_out = waits && alive && self.is(Mutant::DestinationTimesOut);
        moves.add(times_out, "destination: waited long enough, owns", Needs::Nobody, |s| {
            s.destination = Destination::Owner;
        });
        let starts = matches!(s.destination, Destination::Owner | Destination::Ran) && alive;
        moves.add(starts, "destination: journals, resumes", Needs::Nobody, |s| {
            s.destination = Destination::Ran;
            s.destination_guest = Guest::Running;
            s.sent.running = true;
            s.sent.claim = true;
        });
    }

    fn claims(&self, s: &State, moves: &mut Moves<'_>) {
        let alive = s.destination_guest == Guest::Paused;
        let loaded = s.destination == Destination::Loaded && alive;
        let claiming = s.destination == Destination::Claiming;
        moves.add(loaded && s.sent.offer, "destination: claims", Needs::Wan, |s| {
            s.destination = Destination::Claiming;
            s.sent.claim = true;
        });
        let won = s.register == Register::DestinationAfter;
        moves.add((loaded || claiming) && won, "destination: reads itself, owns", Needs::Arbiter, |s| {
            s.destination = Destination::Owner;
        });
        moves.add(
            claiming && s.destination_guest == Guest::Gone,
            "destination: QEMU lost, asks for the source",
            Needs::Arbiter,
            |s| s.sent.reclaim = true,
        );
        let early = self.is(Mutant::RefusesWhileClaiming) && s.register == Register::SourceBefore;
        let lost = s.register == Register::SourceAfter;
        moves.add(claiming && (early || lost), "destination: lost the race, refuses", Needs::Arbiter, |s| {
            s.destination = Destination::Refused;
            s.destination_guest = Guest::Gone;
            s.sent.refuse = true;
        });
        let dead_owner = s.destination == Destination::Owner && s.destination_guest == Guest::Gone;
        moves.add(
            dead_owner && s.register == Register::SourceBefore,
            "destination: hands back",
            Needs::Arbiter,
            |s| {
                s.destination = Destination::HandBack;
                s.sent.refuse = true;
                s.sent.reclaim = true;
            },
        );
        moves.add(dead_owner && won, "destination: hands back by the register", Needs::Arbiter, |s| {
            s.destination = Destination::HandBack;
            s.register = Register::SourceAfter;
            s.sent.refuse = true;
        });
        let overtaken = s.destination == Destination::HandBack && won;
        moves.add(overtaken, "destination: hands back again", Needs::Arbiter, |s| {
            s.register = Register::SourceAfter;
        });
    }
}

fn register(s: &State, moves: &mut Moves<'_>) {
    let open = s.register == Register::SourceBefore;
    moves.add(open && s.sent.claim, "arbiter: applies the claim", Needs::Arbiter, |s| {
        s.register = Register::DestinationAfter;
    });
    moves.add(open && s.sent.reclaim, "arbiter: applies the reclaim", Needs::Arbiter, |s| {
        s.register = Register::SourceAfter;
    });
}
