//! What can be wrong with a machine after a fault.

use std::fmt;

/// A promise that did not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Flaw {
    /// Both copies ran at one time, so often.
    DoubleRun(u64),
    /// Both sites would run the machine.
    TwoOwners,
    /// No copy runs, and none can be started.
    LostMachine(String),
    /// What a client knew of is gone.
    LostWrites(String),
    /// An old connection did not survive.
    Connection(String),
    /// The disk or the memory is not what it was.
    Content(String),
    /// Something of the machine is where it should not be.
    LeftBehind(String),
    /// A fault that may only delay the move prevented it.
    Prevented(String),
    /// It does not come to an end.
    Unsettled(String),
    /// The case could not be played or judged: what failed may be the laboratory.
    NotJudged(String),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DoubleRun(times) => write!(f, "two copies ran, {times} times"),
            Self::TwoOwners => write!(f, "both sites may run the machine"),
            Self::LostMachine(why) => write!(f, "the machine is lost: {why}"),
            Self::LostWrites(why) => write!(f, "confirmed writes are lost: {why}"),
            Self::Connection(why) => write!(f, "an old connection died: {why}"),
            Self::Content(why) => write!(f, "content is wrong: {why}"),
            Self::LeftBehind(what) => write!(f, "left behind: {what}"),
            Self::Prevented(why) => write!(f, "the move was prevented: {why}"),
            Self::Unsettled(how) => write!(f, "not settled: {how}"),
            Self::NotJudged(why) => write!(f, "not judged: {why}"),
        }
    }
}
