//! What QEMU is kept from doing of its own accord while a machine's memory is copied: coming to its own end, and slowing the
//! guest down for what is not the guest's doing. Decides nothing of the pause; how fast QEMU may write is
//! `core/migration/convergence.rs`'s affair.

use longhaul_core::migration::convergence::Progress;
use longhaul_core::migration::message::Refusal;
use longhaul_core::units::Rate;

use super::hypervisor_failed;
use crate::hypervisor::{Guest, MigrationInfo, MigrationStatus};

/// What one outgoing migration may do.
pub(super) struct Reins {
    writing: Writing,
    throttle: Throttle,
}

impl Reins {
    /// For a link of that rate, and a guest that may be denied so much of its processors' time, in percent.
    pub(super) fn new(link: Rate, most_percent: Option<u32>) -> Self {
        let writing = Writing { link, allowed: Rate::default() };
        Self { writing, throttle: Throttle { most_percent, kept_in_round: None } }
    }

    pub(super) async fn follow(
        &mut self,
        guest: &Guest,
        progress: &Progress,
        info: &MigrationInfo,
    ) -> Result<(), Refusal> {
        if info.status != MigrationStatus::Active {
            return Ok(());
        }
        self.writing.follow(guest, progress).await?;
        self.throttle.follow(guest, progress, info.throttle_percent).await
    }
}

/// How fast QEMU may write at present.
struct Writing {
    link: Rate,
    allowed: Rate,
}

impl Writing {
    async fn follow(&mut self, guest: &Guest, progress: &Progress) -> Result<(), Refusal> {
        let wanted = progress.writing_rate(self.link);
        if wanted.0.abs_diff(self.allowed.0) > self.allowed.0 / 8 {
            guest.limit_bandwidth(Some(wanted)).await.map_err(hypervisor_failed)?;
            self.allowed = wanted;
        }
        Ok(())
    }
}

/// How much of its processors' time QEMU may deny the guest. QEMU compares what was changed with what was sent, and memory that
/// waits for the disks, or for a destination that is behind, is not sent: its throttle stays where it is meanwhile, and in the round
/// after.
struct Throttle {
    most_percent: Option<u32>,
    kept_in_round: Option<u64>,
}

impl Throttle {
    async fn follow(&mut self, guest: &Guest, progress: &Progress, now_percent: u64) -> Result<(), Refusal> {
        let Some(most_percent) = self.most_percent else { return Ok(()) };
        if !progress.disks_in_step || progress.waits_for_destination() {
            if self.kept_in_round.replace(progress.round).is_none() {
                let kept = u32::try_from(now_percent).unwrap_or(most_percent).min(most_percent);
                guest.limit_throttle(kept).await.map_err(hypervisor_failed)?;
            }
            return Ok(());
        }
        if self.kept_in_round.is_some_and(|round| progress.round > round + 1) {
            self.kept_in_round = None;
            guest.limit_throttle(most_percent).await.map_err(hypervisor_failed)?;
        }
        Ok(())
    }
}
