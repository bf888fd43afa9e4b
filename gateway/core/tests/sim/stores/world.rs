//! Two or three sites and a machine that moves between them, again and again: what the sites name, what they begin with, and
//! what they keep afterwards (`gateway/src/migration`). Who owns the machine is not doubted here: that is [`crate::world`]'s.

use longhaul_core::disk::TargetError;
use longhaul_core::wan::{DecodeError, Remembered};

use super::attempt::{Attempt, Fault, Plan, Terms};
use super::broken::Broken;
use super::disk::DiskWay;
use super::guest::{Guest, PAGES};
use super::memory::{MemoryWay, Refused};
use super::seen::Seen;
use super::site::{Keeping, KeptFile, Loss, Site, rots};
use crate::invariants::Violation;
use crate::schedule::Random;

/// Moves of one machine.
const MOVES: u64 = 6;
/// Attempts that something may strike, for each move.
const STRUCK: u64 = 2;
/// Steps after which an attempt has ended.
const LONGEST: u64 = 2_000;
/// Pages that a site may allow to be remembered: none, fewer than there are, all.
const ROOMS: [u32; 6] = [0, 8, 16, PAGES as u32, 2 * PAGES as u32, 2 * PAGES as u32];

/// What two sites must have kept, as nothing has become of it.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    sites: [usize; 2],
    pages: usize,
    /// None of the machine's pages was forgotten on the way.
    pub is_whole: bool,
    /// What the machine had written by then.
    pub writes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Moved,
    Stayed,
}

pub struct World {
    random: Random,
    pub sites: Vec<Site>,
    pub guest: Guest,
    owner: usize,
    came_from: usize,
    attempts: u64,
    pub expected: Option<Expected>,
    pub broken: Option<Broken>,
    pub only: Option<&'static str>,
    pub seen: Seen,
    /// What the last move has sent of memory and disk.
    pub sent_bytes: u64,
}

impl World {
    pub fn new(seed: u64, broken: Option<Broken>, only: Option<&'static str>) -> Self {
        let mut random = Random(seed);
        let count = 2 + random.below(2);
        let rooms: Vec<u32> = (0..count).map(|_| ROOMS[random.below(ROOMS.len() as u64) as usize]).collect();
        let guest = Guest::new(&mut random);
        Self::of(random, guest, &rooms, broken, only)
    }

    /// Two sites that have room for everything.
    pub fn roomy(seed: u64) -> Self {
        let mut random = Random(seed);
        let guest = Guest::new(&mut random);
        Self::of(random, guest, &[2 * PAGES as u32; 2], None, None)
    }

    fn of(
        random: Random,
        guest: Guest,
        rooms: &[u32],
        broken: Option<Broken>,
        only: Option<&'static str>,
    ) -> Self {
        Self {
            random,
            sites: rooms.iter().map(|room| Site::new(*room)).collect(),
            guest,
            owner: 0,
            came_from: 1,
            attempts: 0,
            expected: None,
            broken,
            only,
            seen: Seen::default(),
            sent_bytes: 0,
        }
    }

    /// A chain of moves, with whatever happens on the way.
    pub fn play(&mut self) -> Result<(), Violation> {
        (0..MOVES).try_for_each(|_| self.moves())
    }

    fn moves(&mut self) -> Result<(), Violation> {
        let to = self.next_site();
        let is_calm = self.random.one_in(2);
        for tries in 0..STRUCK + 4 {
            let is_calm = is_calm || tries >= STRUCK;
            if tries < STRUCK {
                self.time_passes(is_calm);
            }
            let plan = Plan::any(is_calm, &mut self.random);
            if self.attempt(to, plan)? == Ending::Moved {
                return Ok(());
            }
        }
        self.must("memory_arrives", false, || "attempts that nothing disturbs end all the same".into())
    }

    /// Often the one that the machine came from.
    fn next_site(&mut self) -> usize {
        let count = self.sites.len() as u64;
        match self.random.one_in(2) {
            true => self.came_from,
            false => (self.owner + 1 + self.random.below(count - 1) as usize) % self.sites.len(),
        }
    }

    /// Between two attempts.
    fn time_passes(&mut self, is_calm: bool) {
        let site = self.random.below(self.sites.len() as u64) as usize;
        if self.random.one_in(2) {
            self.sites[site].is_backed_up();
        }
        if self.random.one_in(4) {
            self.restarts(site);
        }
        for _ in 0..self.random.below(if is_calm { 2 } else { 6 }) {
            self.guest.changes(&mut self.random);
        }
        if !is_calm && self.random.one_in(3) {
            let loss = Loss::any(&mut self.random);
            self.loses(site, loss);
        }
    }

    fn loses(&mut self, site: usize, loss: Loss) {
        self.sites[site].loses(loss, &mut self.random);
        if loss.is_of_memory() {
            self.expects_nothing_of(site);
        }
    }

    fn expects_nothing_of(&mut self, site: usize) {
        self.expected = self.expected.filter(|expected| !expected.sites.contains(&site));
    }

    fn restarts(&mut self, site: usize) {
        self.sites[site].restarts();
        if self.broken == Some(Broken::LosesItWithItsGateway) {
            self.sites[site].memory = None;
        }
    }

    /// The destination says what it keeps and what it allows.
    fn terms(&mut self, to: usize) -> Terms {
        let room = self.sites[to].room_pages;
        // Its host may have less memory free than its operator allows.
        let allowed_pages = if self.random.one_in(8) { room / 2 } else { room };
        let agreed_pages = allowed_pages.min(self.sites[self.owner].room_pages);
        Terms { named: self.sites[to].named(), allowed_pages, agreed_pages }
    }

    pub fn attempt(&mut self, to: usize, plan: Plan) -> Result<Ending, Violation> {
        self.attempts += 1;
        let (from, terms) = (self.owner, self.terms(to));
        let was_rotten = self.sites[to].memory.as_ref().is_some_and(|kept| kept.rotten);
        if let Some(loss) = plan.before_it_reads {
            self.loses(to, loss);
        }
        let may_be_unusable = was_rotten || plan.before_it_reads.is_some();
        let Ok(base) = self.sites[to].of_both(terms.named, terms.allowed_pages, self.broken) else {
            self.must("memory_arrives", may_be_unusable, || "what is kept and whole cannot be used".into())?;
            self.seen.unusable += 1;
            self.hears_of_damage(from, &plan);
            return Ok(Ending::Stayed);
        };
        let (partial, beside) = (self.sites[to].partials.remove(&from), self.sites[to].disk.clone());
        let attempt = Attempt {
            number: self.attempts,
            from,
            to,
            terms,
            disk: DiskWay::new(partial, beside, &mut self.random, self.broken),
            holds: base.as_ref().map(Remembered::digest),
            memory: MemoryWay::new(terms.allowed_pages, base, self.broken),
            must_be_based: false,
            is_hurt: false,
            plan,
        };
        self.run(attempt)
    }

    fn run(&mut self, mut attempt: Attempt) -> Result<Ending, Violation> {
        for step in 0..LONGEST {
            let faults = attempt.plan.faults.iter().filter(|(at, _)| *at == step);
            let faults: Vec<Fault> = faults.map(|(_, fault)| *fault).collect();
            for fault in faults {
                if self.strikes(&mut attempt, fault) {
                    return self.stays(attempt);
                }
            }
            if step == attempt.plan.memory_begins_at {
                self.memory_begins(&mut attempt);
            }
            attempt.step(step, &mut self.guest, &mut self.random);
            self.check(&attempt)?;
            if attempt.is_refused() {
                return self.is_refused(attempt);
            }
            if attempt.is_proven() {
                return if attempt.plan.rolls_back { self.stays(attempt) } else { self.arrives(attempt) };
            }
        }
        self.must("memory_arrives", attempt.is_hurt, || "an attempt does not end".into())?;
        self.stays(attempt)
    }

    /// Whether that ends the attempt.
    fn strikes(&mut self, attempt: &mut Attempt, fault: Fault) -> bool {
        let random = &mut self.random;
        match fault {
            Fault::Cut => return true,
            Fault::RestartSource => {
                self.restarts(attempt.from);
                return true;
            }
            Fault::RestartDestination => {
                self.restarts(attempt.to);
                return true;
            }
            Fault::MemoryFlips => {
                attempt.memory.flips(random);
                attempt.is_hurt = true;
            }
            Fault::DiskFlips => {
                attempt.disk.flips(random);
                attempt.is_hurt = true;
            }
            Fault::MapFails => attempt.disk.map_fails(),
            Fault::BaseRots => {
                if let Some(base) = &mut attempt.disk.base {
                    rots(base, random);
                    self.sites[attempt.to].disk = Some(base.clone());
                    attempt.is_hurt = true;
                }
            }
            Fault::AtSource(loss) => self.loses(attempt.from, loss),
            Fault::AtDestination(loss) => self.loses(attempt.to, loss),
        }
        false
    }

    /// The source begins with what it keeps, if the destination has named the same.
    fn memory_begins(&mut self, attempt: &mut Attempt) {
        let (terms, ends) = (attempt.terms, [attempt.from, attempt.to]);
        let ours = self.sites[attempt.from].named();
        let named = terms.named.filter(|theirs| ours == Some(*theirs));
        let wanted = if self.broken == Some(Broken::BeginsUnnamed) { ours } else { named };
        let base = self.sites[attempt.from].of_both(wanted, terms.agreed_pages, self.broken);
        attempt.memory.begins(
            terms.agreed_pages,
            base.unwrap_or_default(),
            attempt.disk.mirror.give_places(),
        );
        let kept = self.expected.filter(|kept| ends.iter().all(|site| kept.sites.contains(site)));
        attempt.must_be_based =
            kept.is_some_and(|kept| kept.pages <= terms.agreed_pages as usize && terms.agreed_pages > 0);
    }

    /// The machine goes on where it is. What had arrived of its disk is left for the next attempt.
    fn stays(&mut self, attempt: Attempt) -> Result<Ending, Violation> {
        self.seen.given_up += u64::from(!attempt.is_refused());
        let Attempt { number, from, to, disk, memory, .. } = attempt;
        if !self.random.one_in(8) {
            self.sites[to].partials.insert(from, disk.target_disk);
        }
        if self.broken == Some(Broken::KeepsWhatWasAborted)
            && let Some(remembered) = memory.into_remembered()
        {
            for (site, remembered) in [from, to].into_iter().zip(&remembered) {
                self.sites[site].keeps(KeptFile::new(Some(number), remembered), Keeping::Done);
            }
        }
        self.check_files()?;
        Ok(Ending::Stayed)
    }

    /// The destination does not believe what came.
    fn is_refused(&mut self, attempt: Attempt) -> Result<Ending, Violation> {
        self.may_be_refused(&attempt)?;
        match &attempt.memory.refused {
            Some(Refused::Decoder(_)) => {
                self.seen.undecoded += 1;
                self.forgets(attempt.to);
                self.hears_of_damage(attempt.from, &attempt.plan);
            }
            Some(Refused::Unread) | None => {}
        }
        match &attempt.disk.refused {
            // The source has sent what no source sends: nothing was damaged.
            Some(TargetError::Bounds { .. } | TargetError::Block { .. } | TargetError::Part { .. })
            | None => {}
            Some(
                TargetError::Chunk(_)
                | TargetError::Number { .. }
                | TargetError::Damaged { .. }
                | TargetError::Differs { .. }
                | TargetError::Count { .. }
                | TargetError::Digest { .. },
            ) => {
                self.seen.unwritten += 1;
                self.hears_of_damage(attempt.from, &attempt.plan);
            }
        }
        self.stays(attempt)
    }

    /// What nobody has hurt is refused by nobody.
    fn may_be_refused(&self, attempt: &Attempt) -> Result<(), Violation> {
        let invariant = match &attempt.memory.refused {
            Some(Refused::Decoder(DecodeError::OtherBase | DecodeError::NotRemembered)) => {
                "no_page_from_an_unacknowledged_base"
            }
            Some(Refused::Decoder(_) | Refused::Unread) => "memory_arrives",
            None => "disk_arrives",
        };
        self.must(invariant, attempt.is_hurt, || {
            format!("{:?}, {:?}", attempt.memory.refused, attempt.disk.refused)
        })
    }

    /// Whatever it was that differed: the next attempt begins with nothing that both sites only believe to have.
    fn hears_of_damage(&mut self, site: usize, plan: &Plan) {
        if !plan.is_unheard {
            self.forgets(site);
        }
    }

    fn forgets(&mut self, site: usize) {
        self.sites[site].forgets();
        self.expects_nothing_of(site);
    }

    fn arrives(&mut self, attempt: Attempt) -> Result<Ending, Violation> {
        self.check_arrival(&attempt)?;
        self.seen.moves += 1;
        self.seen.based += u64::from(attempt.memory.begun.is_some_and(|begun| begun.based_on.is_some()));
        self.seen.disk_pages += attempt.memory.disk_pages();
        self.sent_bytes = attempt.memory.sent_bytes + attempt.disk.sent_bytes;
        let Attempt { number, from, to, terms, memory, is_hurt, plan, .. } = attempt;
        self.sites[from].disk = Some(self.guest.image());
        self.sites[to].partials.clear();
        (self.owner, self.came_from) = (to, from);
        let Some([sent, made]) = memory.into_remembered() else { return Ok(Ending::Moved) };
        self.must("stores_identical", is_hurt || sent == made && sent.digest() == made.digest(), || {
            format!("{} pages at the source, {} there", sent.pages().count(), made.pages().count())
        })?;
        let (of, is_calm) = ((!is_hurt).then_some(number), plan.faults.is_empty());
        let files = [(from, KeptFile::new(of, &sent)), (to, KeptFile::new(of, &made))];
        self.keep(files, is_calm, terms);
        self.check_files()?;
        Ok(Ending::Moved)
    }

    /// Both ends keep what they remember, each for itself.
    fn keep(&mut self, files: [(usize, KeptFile); 2], is_calm: bool, terms: Terms) {
        let sites = [files[0].0, files[1].0];
        let (mut both, pages) = (files[0].1.of.is_some(), files[0].1.pages.len());
        for (site, file) in files {
            let fails = !is_calm && self.random.one_in(3);
            let how = if fails { self.random.below(Keeping::ALL.len() as u64) as usize } else { 0 };
            both &= Keeping::ALL[how] == Keeping::Done;
            self.sites[site].keeps(file, Keeping::ALL[how]);
        }
        let is_whole = terms.agreed_pages as usize >= PAGES;
        self.expected = both.then_some(Expected { sites, pages, is_whole, writes: self.guest.writes });
    }
}
