//! Which faults there are, when they strike, and the seeded order in which cases are played. A case is a function of the
//! seed and its number alone, so that one can be played again by itself.

use std::time::Duration;

use longhaul_core::migration::Stage;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// A site of the scene, by what it is to the move that is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The site that the machine leaves.
    A,
    /// The site that it goes to.
    B,
}

/// Which way the WAN is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Both ways.
    Both,
    /// What goes to the site that the machine leaves.
    ToA,
    /// What goes to the other one.
    ToB,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL of a gateway, and a restart.
    Gateway(Place),
    /// SIGKILL of the machine's QEMU at a site.
    Qemu(Place),
    /// The WAN carries nothing for so many seconds.
    Cut(Way, u64),
    /// The WAN loses one packet in twenty.
    Loss,
    /// The name server is stopped.
    Names,
    /// A gateway is killed and restarted with the journal it had before the move.
    OldJournal(Place),
    /// The machine's QEMU at a site stands still for a while, and answers nothing.
    Hang(Place),
    /// A gateway stands still for a while; its sockets stay open.
    Stall(Place),
    /// The guest is reset.
    Reboot,
    /// The guest powers itself off.
    PowerOff,
    /// A host dies: SIGKILL of its gateway and of the machine's QEMU there, and a restart of the gateway.
    Host(Place),
    /// The WAN carries a fortieth of its rate.
    Narrow,
    /// The WAN puts packets in another order, doubles some, and damages others.
    Mangle,
}

/// When it strikes, seen at the source gateway's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// So long after the stage was first seen.
    Stage(Stage, Duration),
    /// So long after the move was over.
    After(Duration),
    /// So long after the move began.
    Random(Duration),
}

/// One case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// Its number, from 0.
    pub number: u64,
    /// What goes wrong.
    pub fault: Fault,
    /// When.
    pub moment: Moment,
    /// How long it lasts, where the fault itself does not say.
    pub lasts: Duration,
}

impl Place {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// Its letter in the names of faults.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }
}

impl Fault {
    /// The name in reports.
    pub fn name(self) -> String {
        match self {
            Self::Gateway(place) => format!("gateway-{}", place.name()),
            Self::Qemu(place) => format!("qemu-{}", place.name()),
            Self::Cut(Way::Both, seconds) => format!("cut-{seconds}s"),
            Self::Cut(Way::ToA, seconds) => format!("cut-to-a-{seconds}s"),
            Self::Cut(Way::ToB, seconds) => format!("cut-to-b-{seconds}s"),
            Self::Loss => "loss".to_owned(),
            Self::Names => "names".to_owned(),
            Self::OldJournal(place) => format!("old-journal-{}", place.name()),
            Self::Hang(place) => format!("hang-{}", place.name()),
            Self::Stall(place) => format!("stall-{}", place.name()),
            Self::Reboot => "reboot".to_owned(),
            Self::PowerOff => "power-off".to_owned(),
            Self::Host(place) => format!("host-{}", place.name()),
            Self::Narrow => "narrow".to_owned(),
            Self::Mangle => "mangle".to_owned(),
        }
    }

    /// The machine must move all the same, if the fault strikes in stages 0 to 2.
    pub fn only_delays(self) -> bool {
        match self {
            Self::Cut(..) | Self::Loss | Self::Reboot | Self::Narrow | Self::Mangle => true,
            Self::Gateway(_)
            | Self::Qemu(_)
            | Self::Names
            | Self::OldJournal(_)
            | Self::Hang(_)
            | Self::Stall(_)
            | Self::PowerOff
            | Self::Host(_) => false,
        }
    }

    /// The QEMU at a site is killed by it.
    pub fn kills_qemu(self, at: Place) -> bool {
        match self {
            Self::Qemu(place) | Self::Host(place) => place == at,
            Self::Gateway(_)
            | Self::Cut(..)
            | Self::Loss
            | Self::Names
            | Self::OldJournal(_)
            | Self::Hang(_)
            | Self::Stall(_)
            | Self::Reboot
            | Self::PowerOff
            | Self::Narrow
            | Self::Mangle => false,
        }
    }

    /// It can strike then: what it needs is there.
    fn fits(self, moment: Point) -> bool {
        match (self, moment) {
            (Self::Qemu(Place::B) | Self::Hang(Place::B), Point::Stage(Stage::PreMigration))
            | (Self::Qemu(Place::A) | Self::Hang(Place::A), Point::After) => false,
            (
                Self::Gateway(_)
                | Self::Qemu(_)
                | Self::Cut(..)
                | Self::Loss
                | Self::Names
                | Self::OldJournal(_)
                | Self::Hang(_)
                | Self::Stall(_)
                | Self::Reboot
                | Self::PowerOff
                | Self::Host(_)
                | Self::Narrow
                | Self::Mangle,
                Point::Stage(_) | Point::After | Point::Random,
            ) => true,
        }
    }
}

/// A column of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Point {
    Stage(Stage),
    After,
    Random,
}

const POINTS: [Point; 8] = [
    Point::Stage(Stage::PreMigration),
    Point::Stage(Stage::Reservation),
    Point::Stage(Stage::PreCopy),
    Point::Stage(Stage::StopAndCopy),
    Point::Stage(Stage::Commitment),
    Point::Stage(Stage::Activation),
    Point::After,
    Point::Random,
];

const FAULTS: [Fault; 14] = [
    Fault::Gateway(Place::A),
    Fault::Gateway(Place::B),
    Fault::Qemu(Place::A),
    Fault::Qemu(Place::B),
    Fault::Cut(Way::Both, 2),
    Fault::Cut(Way::Both, 10),
    Fault::Cut(Way::ToA, 2),
    Fault::Cut(Way::ToA, 10),
    Fault::Cut(Way::ToB, 2),
    Fault::Cut(Way::ToB, 10),
    Fault::Loss,
    Fault::Names,
    Fault::OldJournal(Place::A),
    Fault::OldJournal(Place::B),
];

/// Each of these strikes at one point of a round only: a minute is long.
const LONG: [Fault; 3] = [Fault::Cut(Way::Both, 60), Fault::Cut(Way::ToA, 60), Fault::Cut(Way::ToB, 60)];

/// What stands still or ends without being killed. These come after the others of a round.
const STANDSTILLS: [Fault; 6] = [
    Fault::Hang(Place::A),
    Fault::Hang(Place::B),
    Fault::Stall(Place::A),
    Fault::Stall(Place::B),
    Fault::Reboot,
    Fault::PowerOff,
];

/// What takes a whole host, or spoils the WAN without cutting it. These come last.
const ROUGH: [Fault; 4] = [Fault::Host(Place::A), Fault::Host(Place::B), Fault::Narrow, Fault::Mangle];

/// One round: every cell of the matrix once, in an order of its own.
fn cells(seed: u64, round: u64) -> Vec<(Fault, Point)> {
    let of = |faults: &[Fault]| {
        let all = faults.iter().flat_map(|fault| POINTS.iter().map(move |point| (*fault, *point)));
        all.filter(|(fault, point)| fault.fits(*point)).collect::<Vec<_>>()
    };
    let mut random = StdRng::seed_from_u64(seed.rotate_left(32) ^ round);
    let mut cells = of(&FAULTS);
    cells.extend(LONG.iter().map(|fault| (*fault, POINTS[random.random_range(0..POINTS.len())])));
    cells.shuffle(&mut random);
    let mut standstills = of(&STANDSTILLS);
    standstills.shuffle(&mut random);
    cells.extend(standstills);
    let mut rough = of(&ROUGH);
    rough.shuffle(&mut random);
    cells.extend(rough);
    cells
}

/// The case of this number.
pub fn case(seed: u64, number: u64) -> Case {
    let in_round = cells(seed, 0).len() as u64;
    let (fault, point) = cells(seed, number / in_round)[(number % in_round) as usize];
    let mut random = StdRng::seed_from_u64(seed.rotate_left(16) ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut between = |least: u64, most: u64| Duration::from_millis(random.random_range(least..=most));
    let moment = match point {
        // The others are short: later than at once is another stage. The last one is over when the site that the machine
        // left has heard of it.
        Point::Stage(Stage::PreCopy) => Moment::Stage(Stage::PreCopy, between(0, 2500)),
        Point::Stage(Stage::Activation) => Moment::Stage(Stage::Activation, between(0, 60) / 2),
        Point::Stage(stage) => Moment::Stage(stage, between(0, 60)),
        Point::After => Moment::After(between(0, 3000)),
        Point::Random => Moment::Random(between(0, 8000)),
    };
    let lasts = match fault {
        Fault::Cut(_, seconds) => Duration::from_secs(seconds),
        Fault::Loss | Fault::Names | Fault::Narrow | Fault::Mangle => between(3000, 8000),
        Fault::Gateway(_) | Fault::Qemu(_) | Fault::OldJournal(_) | Fault::Host(_) => between(100, 2500),
        // Longer than a gateway waits for QEMU's answer or a link for a sign of life, or not.
        Fault::Hang(_) | Fault::Stall(_) => between(500, 15_000),
        Fault::Reboot | Fault::PowerOff => Duration::ZERO,
    };
    Case { number, fault, moment, lasts }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Cases of a round.
    const ROUND: u64 = 191;

    #[test]
    fn what_was_added_to_a_round_came_after_what_was_there() {
        let later = |number| {
            let fault = case(1, number).fault;
            (STANDSTILLS.contains(&fault), ROUGH.contains(&fault))
        };
        assert!((0..113).all(|number| later(number) == (false, false)));
        assert!((113..159).all(|number| later(number) == (true, false)));
        assert!((159..ROUND).all(|number| later(number) == (false, true)));
    }

    #[test]
    fn a_case_is_the_same_whenever_it_is_asked_for_and_another_seed_gives_another_order() {
        assert_eq!(case(7, 113), case(7, 113));
        let order = |seed| (0..20).map(|number| case(seed, number).fault).collect::<Vec<_>>();
        assert_ne!(order(7), order(8));
    }

    #[test]
    fn one_round_holds_every_fault_and_few_of_the_long_ones() {
        let round: Vec<Case> = (0..ROUND).map(|number| case(1, number)).collect();
        let names: BTreeSet<String> = round.iter().map(|case| case.fault.name()).collect();
        assert_eq!(names.len(), FAULTS.len() + LONG.len() + STANDSTILLS.len() + ROUGH.len());
        let long = round.iter().filter(|case| case.lasts >= Duration::from_secs(60)).count();
        assert_eq!(long, LONG.len());
    }
}
