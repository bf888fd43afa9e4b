//! What has happened in the schedules that were played, to tell whether the dice bring everything about. Judges nothing.

/// What has been seen, to tell whether the dice bring everything about.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub moves: u64,
    /// Of them, such that began with what both sites kept.
    pub based: u64,
    pub given_up: u64,
    /// Attempts that ended because of what the destination kept.
    pub unusable: u64,
    /// By the decoder.
    pub undecoded: u64,
    /// By the disk.
    pub unwritten: u64,
    /// Pages that were named by the disk.
    pub disk_pages: u64,
}

impl Seen {
    pub fn and(self, other: Self) -> Self {
        Self {
            moves: self.moves + other.moves,
            based: self.based + other.based,
            given_up: self.given_up + other.given_up,
            unusable: self.unusable + other.unusable,
            undecoded: self.undecoded + other.undecoded,
            unwritten: self.unwritten + other.unwritten,
            disk_pages: self.disk_pages + other.disk_pages,
        }
    }
}
