//! What a state of the hand-over model is, and what must hold in every one of them.
//!
//! Journals are not kept apart: each state of a side says what its journal holds.

/// One site's copy of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Guest {
    /// None, or one that has not got everything yet.
    Gone,
    /// Complete, stopped.
    Still,
    Running,
    /// Its host lost power or its QEMU was killed.
    Dead,
}

/// The ledger of one site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owns {
    Unknown,
    Here(u8),
    Away(u8),
    Arriving,
}

/// Why the source holds on to the machine, as its journal has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// Nothing was reserved, nothing recorded.
    Early,
    Aborted,
    Returned,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    Absent,
    Preflight,
    Proposed,
    Reserving,
    PreCopy,
    Parking {
        loaded: bool,
    },
    Parked,
    Committed,
    Released,
    Aborting {
        cause: Cause,
        rolled_back: bool,
        told: bool,
    },
    Moved,
    /// It ended here; nobody listens any more but the journal.
    Stayed(Cause),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Destination {
    Absent,
    Preparing,
    Receiving,
    Loaded,
    Activating,
    Active,
    Refusing,
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Message {
    Propose,
    Accept,
    Reserve,
    Reserved,
    Loaded,
    Commit,
    Activated,
    Refused,
    Abort,
    Unknown,
}

pub const MESSAGES: [Message; 10] = [
    Message::Propose,
    Message::Accept,
    Message::Reserve,
    Message::Reserved,
    Message::Loaded,
    Message::Commit,
    Message::Activated,
    Message::Refused,
    Message::Abort,
    Message::Unknown,
];

impl Message {
    pub fn is_for_source(self) -> bool {
        match self {
            Self::Propose | Self::Reserve | Self::Commit | Self::Abort => false,
            Self::Accept
            | Self::Reserved
            | Self::Loaded
            | Self::Activated
            | Self::Refused
            | Self::Unknown => true,
        }
    }
}

/// Messages that were ever sent; any of them may arrive at any time, any number of times, or never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sent(u16);

impl Sent {
    pub fn add(&mut self, message: Message) {
        self.0 |= 1 << message as u16;
    }

    pub fn has(self, message: Message) -> bool {
        self.0 & (1 << message as u16) != 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    pub source: Source,
    pub destination: Destination,
    pub sent: Sent,
    /// The machine's last byte has left the source, and is not lost.
    pub all_sent: bool,
    /// Behind a pipelined Commit the source asks for its machine: its gateway died, and what had not arrived will not, or it
    /// takes too long.
    pub asks: bool,
    /// A pipelined Commit lies at the destination.
    pub early: bool,
    pub epoch: u8,
}

impl Attempt {
    pub const ABSENT: Self = Self {
        source: Source::Absent,
        destination: Destination::Absent,
        sent: Sent(0),
        all_sent: false,
        asks: false,
        early: false,
        epoch: 0,
    };

    /// The machine may be attempted again: this one is over here, whether the peer knows or not.
    pub fn is_settled_at_source(&self) -> bool {
        matches!(self.source, Source::Stayed(_) | Source::Aborting { rolled_back: true, .. })
    }

    fn is_over(&self) -> bool {
        matches!(self.source, Source::Absent | Source::Moved | Source::Stayed(_))
            && matches!(self.destination, Destination::Absent | Destination::Active | Destination::Refused)
    }

    fn journal_precedes_message(&self) -> bool {
        use Destination as D;
        use Source as S;
        let committed = matches!(
            self.source,
            S::Committed
                | S::Released
                | S::Moved
                | S::Stayed(Cause::Returned)
                | S::Aborting { cause: Cause::Returned, .. }
        );
        let reserved = !matches!(
            self.source,
            S::Preflight | S::Proposed | S::Stayed(Cause::Early) | S::Aborting { cause: Cause::Early, .. }
        );
        let activated = matches!(self.destination, D::Activating | D::Active);
        let refused = matches!(self.destination, D::Refusing | D::Refused);
        let loaded = activated || refused || self.destination == D::Loaded;
        (committed || !self.sent.has(Message::Commit))
            && (reserved || !self.sent.has(Message::Reserve))
            && (activated || !self.sent.has(Message::Activated))
            && (refused || !self.sent.has(Message::Refused))
            && (loaded || !self.sent.has(Message::Loaded))
    }

    fn unknown_is_refused(&self) -> bool {
        let back = matches!(
            self.source,
            Source::Stayed(Cause::Returned) | Source::Aborting { cause: Cause::Returned, .. }
        );
        back && !matches!(self.destination, Destination::Refusing | Destination::Refused)
    }
}

/// Three sites and two attempts for one machine; the first goes from site 0 to site 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct State {
    pub guests: [Guest; 3],
    pub owns: [Owns; 3],
    pub attempts: [Attempt; 2],
}

impl State {
    pub const START: Self = Self {
        guests: [Guest::Running, Guest::Gone, Guest::Gone],
        owns: [Owns::Here(0), Owns::Unknown, Owns::Unknown],
        attempts: [Attempt { source: Source::Preflight, epoch: 1, ..Attempt::ABSENT }, Attempt::ABSENT],
    };

    pub fn is_here(&self, site: usize) -> bool {
        matches!(self.owns[site], Owns::Here(_))
    }

    /// The invariant that this state violates.
    pub fn violated(&self) -> Option<&'static str> {
        let running = |site: &usize| self.guests[*site] == Guest::Running;
        if (0..3).filter(running).count() > 1 {
            return Some("never_two_running");
        }
        if (0..3).filter(running).any(|site| !self.is_here(site)) {
            return Some("no_resume_without_permit");
        }
        if (0..3).filter(|site| self.is_here(*site)).count() > 1 {
            return Some("never_two_owners");
        }
        if self.attempts.iter().any(Attempt::unknown_is_refused) {
            return Some("unknown_is_not_refused");
        }
        if !self.attempts.iter().all(Attempt::journal_precedes_message) {
            return Some("journal_precedes_message");
        }
        let [first, second] = &self.attempts;
        let stayed = matches!(first.source, Source::Stayed(_)) && second.source == Source::Absent;
        if stayed && !matches!(self.guests[0], Guest::Running | Guest::Dead) {
            return Some("rollback_leaves_source_running");
        }
        None
    }

    /// One copy runs, nothing is reserved anywhere, nobody waits.
    pub fn is_settled(&self) -> bool {
        self.guests.iter().filter(|guest| **guest == Guest::Running).count() == 1
            && self.attempts.iter().all(Attempt::is_over)
    }

    pub fn is_lost(&self) -> bool {
        self.guests.contains(&Guest::Dead)
    }
}
