//! What a site keeps of a machine that left or came, and what becomes of it: its memory in a file, its disk, and what an
//! attempt has left behind. The rules are the gateway's (`migration/remembered.rs`, `memory/kept.rs`, `migration/partial.rs`).
//! Deliberately not here: how much room all of it may take together.

use std::collections::BTreeMap;

use longhaul_core::memory::PAGE_BYTES;
use longhaul_core::wan::Remembered;

use super::broken::Broken;
use crate::schedule::Random;

pub type Digest = [u8; 32];

/// The memory that is kept.
#[derive(Clone, PartialEq)]
pub struct KeptFile {
    /// The attempt that it is of, where nothing had damaged that.
    pub of: Option<u64>,
    /// What the file's head says.
    pub named: Digest,
    pub pages: Vec<(Vec<u8>, u64, Vec<u8>)>,
    /// It is not what was written, and nobody has seen that.
    pub rotten: bool,
}

enum Unread {
    Gone,
    Damaged,
    TooLarge,
}

impl KeptFile {
    pub fn new(of: Option<u64>, remembered: &Remembered) -> Self {
        let page = |(block, page, content): (&[u8], u64, &[u8])| (block.to_vec(), page, content.to_vec());
        let pages = remembered.pages().map(page).collect();
        Self { of, named: remembered.digest(), pages, rotten: false }
    }

    fn read(&self, wanted: Digest, max_pages: u32) -> Result<Remembered, Unread> {
        if self.named != wanted {
            return Err(Unread::Damaged);
        }
        let mut remembered = Remembered::with_room(max_pages);
        for (at, (block, page, content)) in (0..).zip(&self.pages) {
            if at == max_pages {
                return Err(Unread::TooLarge);
            }
            if !remembered.put(block, *page, content) {
                return Err(Unread::Damaged);
            }
        }
        if remembered.digest() == wanted { Ok(remembered) } else { Err(Unread::Damaged) }
    }

    fn rots(&mut self, random: &mut Random) {
        self.rotten = true;
        let at = random.below(PAGE_BYTES as u64) as usize;
        let page = random.below(self.pages.len().max(1) as u64) as usize;
        match random.below(4) {
            1 if !self.pages.is_empty() => self.pages.truncate(page),
            2 | 3 if !self.pages.is_empty() => self.pages[page].2[at] ^= 1,
            _ => self.named[at % 32] ^= 1,
        }
    }
}

/// What becomes of what is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    MemoryEvicted,
    MemoryRots,
    /// The site comes back from a backup.
    MemoryRestored,
    /// What was to be kept since the last move has only now its name.
    MemoryWritten,
    DiskEvicted,
    DiskRots,
    DiskRestored,
    PartialRots,
}

impl Loss {
    const ALL: [Self; 8] = [
        Self::MemoryEvicted,
        Self::MemoryRots,
        Self::MemoryRestored,
        Self::MemoryWritten,
        Self::DiskEvicted,
        Self::DiskRots,
        Self::DiskRestored,
        Self::PartialRots,
    ];

    pub fn any(random: &mut Random) -> Self {
        Self::ALL[random.below(Self::ALL.len() as u64) as usize]
    }

    /// Of what is kept of memory.
    pub fn any_of_memory(random: &mut Random) -> Self {
        let of_memory: Vec<Self> = Self::ALL.into_iter().filter(|loss| loss.is_of_memory()).collect();
        of_memory[random.below(of_memory.len() as u64) as usize]
    }

    /// The memory that was kept is there no longer, or not as it was.
    pub fn is_of_memory(self) -> bool {
        match self {
            Self::MemoryEvicted | Self::MemoryRots | Self::MemoryRestored | Self::MemoryWritten => true,
            Self::DiskEvicted | Self::DiskRots | Self::DiskRestored | Self::PartialRots => false,
        }
    }
}

/// How keeping goes at one end of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    Done,
    /// The next move does not wait for it.
    Late,
    NoRoom,
    /// The gateway is killed before it begins with it.
    KilledBefore,
    /// The gateway is killed before the new file has its name.
    KilledWithin,
}

impl Keeping {
    pub const ALL: [Self; 5] = [Self::Done, Self::Late, Self::NoRoom, Self::KilledBefore, Self::KilledWithin];
}

/// A file of memory cannot be used: the attempt ends, and the other site hears why.
#[derive(Debug)]
pub struct Unusable;

pub struct Site {
    /// Pages that it allows to be remembered.
    pub room_pages: u32,
    pub memory: Option<KeptFile>,
    /// The newest disk of the machine that was put aside.
    pub disk: Option<Vec<u8>>,
    /// What attempts have left, by the site that they came from.
    pub partials: BTreeMap<usize, Vec<u8>>,
    /// What is being written.
    late: Option<KeptFile>,
    backup: (Option<KeptFile>, Option<Vec<u8>>),
}

impl Site {
    pub fn new(room_pages: u32) -> Self {
        let partials = BTreeMap::new();
        Self { room_pages, memory: None, disk: None, partials, late: None, backup: (None, None) }
    }

    /// What it says of its file to the other site.
    pub fn named(&self) -> Option<Digest> {
        self.memory.as_ref().map(|kept| kept.named)
    }

    /// Reads what the other site remembers as well; nothing if it is too much.
    pub fn of_both(
        &mut self,
        wanted: Option<Digest>,
        max_pages: u32,
        broken: Option<Broken>,
    ) -> Result<Option<Remembered>, Unusable> {
        let Some(wanted) = wanted else { return Ok(None) };
        let read = self.memory.as_ref().map_or(Err(Unread::Gone), |kept| {
            let wanted = if broken == Some(Broken::ReadsAnother) { kept.named } else { wanted };
            kept.read(wanted, max_pages)
        });
        match read {
            Ok(remembered) => Ok(Some(remembered)),
            Err(Unread::TooLarge) => Ok(None),
            Err(Unread::Gone) => Err(Unusable),
            Err(Unread::Damaged) if broken == Some(Broken::KeepsWhatIsDamaged) => {
                self.memory.iter_mut().for_each(|kept| kept.rotten = false);
                Err(Unusable)
            }
            Err(Unread::Damaged) => {
                self.forgets();
                Err(Unusable)
            }
        }
    }

    /// Keeps what was remembered at the end of a move.
    pub fn keeps(&mut self, file: KeptFile, how: Keeping) {
        self.late = None;
        match how {
            Keeping::Done => self.memory = Some(file),
            Keeping::Late => self.late = Some(file),
            Keeping::NoRoom | Keeping::KilledWithin => self.memory = None,
            Keeping::KilledBefore => {}
        }
    }

    /// Nothing of its memory is kept any more; what is just being written will have no name.
    pub fn forgets(&mut self) {
        (self.memory, self.late) = (None, None);
    }

    /// What the gateway had in its memory is gone, and what it kept in files is not.
    pub fn restarts(&mut self) {
        self.late = None;
    }

    /// Somebody copies all that is kept.
    pub fn is_backed_up(&mut self) {
        self.backup = (self.memory.clone(), self.disk.clone());
    }

    pub fn loses(&mut self, loss: Loss, random: &mut Random) {
        match loss {
            Loss::MemoryEvicted => self.memory = None,
            Loss::MemoryRots => self.memory.iter_mut().for_each(|kept| kept.rots(random)),
            Loss::MemoryRestored => self.memory = self.backup.0.clone(),
            Loss::MemoryWritten => self.memory = self.late.take().or(self.memory.take()),
            Loss::DiskEvicted => self.disk = None,
            Loss::DiskRots => self.disk.iter_mut().for_each(|disk| rots(disk, random)),
            Loss::DiskRestored => self.disk = self.backup.1.clone(),
            Loss::PartialRots => self.partials.values_mut().for_each(|disk| rots(disk, random)),
        }
    }
}

/// A byte of each of some blocks is another one.
pub fn rots(disk: &mut [u8], random: &mut Random) {
    for _ in 0..3 {
        let at = random.below(disk.len() as u64) as usize;
        disk[at] ^= 1;
    }
}
