//! Which of a disk's content memory may be named by, and what that holds back.
//!
//! ```text
//!   Noting ──give──▶ Given: a record to a block that was given ──poll──▶ asked ──released──▶ records up to there go
//! ```
//!
//! While the disk is copied it is noted what is sent. What was given then stands still as far as the destination can tell:
//! before such a block is overwritten, whoever names pages by it is asked, and from the record on that overwrites it nothing
//! is packed until he has agreed. A block is asked about once. Who is asked, and when he agrees, is [`crate::wan`]'s.

use std::collections::BTreeSet;
use std::mem;

use super::bitmap::Bitmap;
use super::split_blocks;
use crate::wan::DiskPlaces;

/// Where naming stands.
pub(super) enum Naming {
    /// Content is noted.
    Noting(DiskPlaces),
    /// Memory names pages by it.
    Given(Given),
    /// Nothing is named, or nothing any more.
    Off,
}

pub(super) struct Given {
    /// Blocks that pages may be named by.
    blocks: Bitmap,
    /// Those that are about to be overwritten, and were not asked about.
    overwriting: BTreeSet<u64>,
    /// The places in the queue up to which was asked, and may be packed.
    asked_to: Option<u64>,
    clear_to: u64,
}

impl Naming {
    /// Notes what is sent, in so much memory.
    pub(super) fn noting(bytes: u64) -> Self {
        let pages = usize::try_from(bytes / DiskPlaces::BYTES_PER_PAGE).unwrap_or(usize::MAX);
        if pages == 0 { Self::Off } else { Self::Noting(DiskPlaces::with_room(pages)) }
    }

    /// A record of `start..end` was queued, as the last before the place `next_place`: what is there now; zeros if nothing.
    pub(super) fn note(&mut self, start: u64, end: u64, content: &[u8], next_place: u64) {
        match self {
            Self::Noting(places) if content.is_empty() => places.forget(start, end - start),
            Self::Noting(places) => places.note(start, content),
            Self::Given(given) => given.note(start, end, next_place),
            Self::Off => {}
        }
    }

    /// Ends noting. What is still queued is not among what is given.
    pub(super) fn give(&mut self, blocks: u64, queued: impl Iterator<Item = (u64, u64)>) -> DiskPlaces {
        let Self::Noting(places) = self else {
            *self = Self::Off;
            return DiskPlaces::default();
        };
        let mut places = mem::take(places);
        queued.for_each(|(start, end)| places.forget(start, end - start));
        let mut given = Bitmap::new(blocks, false);
        for block in places.blocks() {
            given.insert(block);
        }
        *self = Self::Given(Given {
            blocks: given,
            overwriting: BTreeSet::new(),
            asked_to: None,
            clear_to: u64::MAX,
        });
        places
    }

    /// What to ask about, if something is to be and nothing is asked.
    pub(super) fn poll_overwriting(&mut self, next_place: u64) -> Option<BTreeSet<u64>> {
        let Self::Given(given) = self else { return None };
        if given.asked_to.is_some() || given.overwriting.is_empty() {
            return None;
        }
        given.asked_to = Some(next_place);
        Some(mem::take(&mut given.overwriting))
    }

    /// It may be overwritten.
    pub(super) fn handle_released(&mut self) {
        let Self::Given(given) = self else { return };
        if let Some(asked_to) = given.asked_to.take() {
            given.clear_to = if given.overwriting.is_empty() { u64::MAX } else { asked_to };
        }
    }

    /// Whether a record may become one with an earlier one: not where that would take it past the limit.
    pub(super) fn joins(&self) -> bool {
        match self {
            Self::Given(_) => false,
            Self::Noting(_) | Self::Off => true,
        }
    }

    /// Records before this place in the queue may be packed.
    pub(super) fn limit(&self) -> u64 {
        match self {
            Self::Given(given) => given.clear_to,
            Self::Noting(_) | Self::Off => u64::MAX,
        }
    }
}

impl Given {
    fn note(&mut self, start: u64, end: u64, next_place: u64) {
        for (block, ..) in split_blocks(start, end - start) {
            if self.blocks.remove(block) {
                self.overwriting.insert(block);
                // The record itself is the first to wait, unless others do already.
                self.clear_to = self.clear_to.min(next_place.saturating_sub(1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::BLOCK;
    use super::*;

    fn given() -> Naming {
        let mut naming = Naming::noting(1 << 20);
        for block in 0..4 {
            naming.note(block * BLOCK, (block + 1) * BLOCK, &[block as u8 + 1; BLOCK as usize], block + 1);
        }
        let places = naming.give(8, [(3 * BLOCK, 3 * BLOCK + 512)].into_iter());
        assert_eq!(
            places.blocks().collect::<Vec<_>>(),
            [0, 1, 2],
            "one place for each content; the last one waits"
        );
        naming
    }

    #[test]
    fn from_the_first_record_on_that_overwrites_all_wait_until_it_was_asked_about() {
        let mut naming = given();
        naming.note(5 * BLOCK, 6 * BLOCK, &[9], 11);
        assert_eq!(
            (naming.limit(), naming.poll_overwriting(11)),
            (u64::MAX, None),
            "nothing was given of it"
        );
        naming.note(BLOCK + 512, BLOCK + 1024, &[9], 12);
        naming.note(5 * BLOCK, 6 * BLOCK, &[9], 13);
        assert_eq!(naming.limit(), 11);
        assert_eq!(naming.poll_overwriting(13), Some(BTreeSet::from([1])));
        naming.note(0, 2 * BLOCK, &[], 14);
        assert_eq!((naming.limit(), naming.poll_overwriting(14)), (11, None), "one question at a time");
        naming.handle_released();
        assert_eq!(naming.limit(), 13, "up to what was asked about");
        assert_eq!(naming.poll_overwriting(14), Some(BTreeSet::from([0])), "a block is asked about once");
        naming.handle_released();
        assert_eq!(naming.limit(), u64::MAX);
    }

    #[test]
    fn what_was_never_noted_holds_nothing_back() {
        let mut naming = Naming::noting(0);
        naming.note(0, BLOCK, &[1; BLOCK as usize], 1);
        assert_eq!(naming.give(8, std::iter::empty()), DiskPlaces::default());
        naming.note(0, BLOCK, &[2; BLOCK as usize], 2);
        assert_eq!((naming.limit(), naming.poll_overwriting(2)), (u64::MAX, None));
        let mut again = given();
        again.note(0, BLOCK, &[], 9);
        assert_eq!((again.limit(), again.poll_overwriting(9)), (8, Some(BTreeSet::from([0]))));
        assert_eq!(again.give(8, std::iter::empty()), DiskPlaces::default(), "they were given");
        assert_eq!(again.limit(), u64::MAX, "and nothing waits for an answer to what was asked before");
    }
}
