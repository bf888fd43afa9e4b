//! When the addresses of an anchor were needed last, noted for a gateway that begins anew: the clock by which the quiet time
//! is counted begins with each of them.
//!
//! Connections of after the move are not written down (`ended`). A new gateway knows nothing of those that are silent when it
//! begins, so that the address counts as needed whenever one is used, and not only when one is opened. It listens for a while
//! before it ends anything, whatever was noted: nobody has listened while there was no gateway, and clocks may be wrong when a
//! host has just started.

use std::time::Duration;

use longhaul_core::tunnel::datapath::PortStatus;
use longhaul_core::tunnel::policy::{PortKey, Role};
use tokio::sync::watch;

use crate::journal::unix_ms;
use crate::migration::anchor::Anchor;
use crate::migration::{Edges, chain};
use crate::tunnel::TunnelStatus;

/// It is written down no more often than this, and only if it has become later by more.
const STEP: Duration = Duration::from_secs(60);
/// For so long a new gateway listens before an address may be free, unless the whole quiet time is shorter.
const LISTENS: Duration = Duration::from_secs(3600);

/// When the addresses were needed last, as an earlier gateway has noted it; `None`: nothing follows from what it has noted.
pub(super) fn noted_ms(edges: &Edges, anchor: &Anchor) -> Option<u64> {
    let noted_ms = edges.journal.anchor_needed_ms(&anchor.vm).unwrap_or_else(|error| {
        tracing::warn!(vm = %anchor.vm, error = chain(&error), "nobody knows how long the tunnel was quiet; the time begins anew");
        None
    });
    let quiet = Duration::from_secs(edges.config.tunnel.quiet_s);
    at_the_latest_ms(noted_ms, anchor.since_unix_ms, unix_ms(), quiet)
}

/// What was noted may be older than the truth by a step. A machine that has left again was needed by then.
fn at_the_latest_ms(noted_ms: Option<u64>, left_ms: u64, now_ms: u64, quiet: Duration) -> Option<u64> {
    // The clock was put back since.
    let noted_ms = noted_ms.filter(|noted_ms| *noted_ms <= now_ms)?;
    let heard_ms = now_ms.saturating_sub(quiet.saturating_sub(LISTENS).as_millis() as u64);
    Some(noted_ms.saturating_add(STEP.as_millis() as u64).max(left_ms).max(heard_ms).min(now_ms))
}

/// Notes when the addresses are needed, for as long as anybody asks. `noted_ms` is what is known to be noted.
pub(super) async fn note_needed(
    edges: Edges,
    anchor: Anchor,
    mut noted_ms: Option<u64>,
    mut status: watch::Receiver<TunnelStatus>,
) {
    let keys: Vec<PortKey> = anchor.holds().into_iter().map(|hold| hold.key).collect();
    loop {
        let unneeded = unneeded_for(&status.borrow_and_update(), &keys);
        let needed_ms = unneeded.map(|time| unix_ms().saturating_sub(time.as_millis() as u64));
        let Some(needed_ms) = needed_ms.filter(|needed_ms| is_news(noted_ms, *needed_ms)) else {
            if status.changed().await.is_err() {
                return;
            }
            continue;
        };
        match edges.journal.note_anchor_needed(&anchor.vm, needed_ms) {
            Ok(()) => noted_ms = Some(needed_ms),
            Err(error) => {
                tracing::warn!(vm = %anchor.vm, error = chain(&error), "how long the tunnel is quiet could not be written down");
            }
        }
        tokio::time::sleep(STEP).await;
    }
}

fn is_news(noted_ms: Option<u64>, needed_ms: u64) -> bool {
    noted_ms.is_none_or(|noted_ms| needed_ms > noted_ms.saturating_add(STEP.as_millis() as u64))
}

/// How long none of these NICs' addresses was needed; `None` while none of them is attracted.
fn unneeded_for(status: &TunnelStatus, keys: &[PortKey]) -> Option<Duration> {
    let is_ours = |port: &&PortStatus| port.role == Role::Away && keys.contains(&port.key);
    status.ports.iter().filter(is_ours).filter_map(|port| port.unneeded_for).min()
}

#[cfg(test)]
mod tests {
    use longhaul_core::tunnel::datapath::Phase;
    use longhaul_core::tunnel::flows::OneWay;

    use super::super::tests::{left_home, within};
    use super::*;
    use crate::identity::Identity;
    use crate::test_site::TestSite;

    const HOUR_MS: u64 = 3_600_000;
    const STEP_MS: u64 = 60_000;
    const PATIENCE: Duration = Duration::from_secs(30);

    fn status(unneeded_for: &[u64]) -> TunnelStatus {
        let port = |seconds: &u64| PortStatus {
            key: left_home().holds()[0].key.clone(),
            role: Role::Away,
            peer: "b".parse().unwrap(),
            phase: Phase::Passing,
            held_packets: 0,
            held_bytes: 0,
            held_by: None,
            unneeded_for: Some(Duration::from_secs(*seconds)),
            one_way: OneWay::default(),
            over_share: 0,
            may_end: false,
        };
        TunnelStatus { ports: unneeded_for.iter().map(port).collect(), ..TunnelStatus::default() }
    }

    #[test]
    fn what_was_noted_counts_to_the_step_and_not_from_the_future_or_an_earlier_leave() {
        let now_ms = 100 * HOUR_MS;
        let day = Duration::from_secs(24 * 3600);
        let known = |noted_ms, left_ms| at_the_latest_ms(noted_ms, left_ms, now_ms, day);
        assert_eq!(known(None, 0), None, "an earlier version has noted nothing");
        assert_eq!(known(Some(78 * HOUR_MS), HOUR_MS), Some(78 * HOUR_MS + STEP_MS));
        assert_eq!(known(Some(now_ms), 0), Some(now_ms));
        assert_eq!(known(Some(now_ms + 1), 0), None, "the clock was put back");
        assert_eq!(known(Some(78 * HOUR_MS), 99 * HOUR_MS), Some(99 * HOUR_MS), "it has left again since");
        assert_eq!(known(Some(HOUR_MS), 0), Some(77 * HOUR_MS), "it listens for an hour after a long outage");
        let short = at_the_latest_ms(Some(HOUR_MS), 0, now_ms, Duration::from_secs(60));
        assert_eq!(short, Some(now_ms), "and for the whole quiet time if that is shorter");
    }

    #[test]
    fn a_moment_is_noted_when_it_is_later_by_more_than_a_step() {
        assert!(is_news(None, 0));
        assert!(!is_news(Some(HOUR_MS), HOUR_MS + STEP_MS) && is_news(Some(HOUR_MS), HOUR_MS + STEP_MS + 1));
        assert!(!is_news(Some(HOUR_MS), 0), "nothing was needed earlier than that");
    }

    #[test]
    fn the_nic_that_was_needed_last_counts() {
        let keys = [left_home().holds()[0].key.clone()];
        assert_eq!(unneeded_for(&status(&[7, 3]), &keys), Some(Duration::from_secs(3)));
        assert_eq!(unneeded_for(&status(&[7]), &[]), None);
    }

    #[tokio::test]
    async fn it_is_noted_for_as_long_as_there_is_an_anchor_and_goes_with_it() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let (journal, anchor) = (&site.edges.journal, left_home());
        let noted_ms = || journal.anchor_needed_ms(&anchor.vm).unwrap();
        let (_shown, seen) = watch::channel(status(&[100]));
        journal.note_anchor_needed(&anchor.vm, 1).unwrap();
        assert_eq!(noted_ms(), None, "there is no anchor");

        journal.put_anchor(&anchor.vm, &anchor).unwrap();
        let noting = tokio::spawn(note_needed(site.edges.clone(), anchor.clone(), None, seen));
        assert!(within(PATIENCE, || noted_ms().is_some()).await);
        noting.abort();
        let ago_ms = unix_ms() - noted_ms().unwrap();
        assert!((100_000..100_000 + PATIENCE.as_millis() as u64).contains(&ago_ms), "{ago_ms}");

        journal.remove_anchor(&anchor.vm).unwrap();
        assert_eq!(noted_ms(), None);
        journal.put_anchor(&anchor.vm, &anchor).unwrap();
        assert_eq!(noted_ms(), None, "the next leave begins anew");
    }
}
