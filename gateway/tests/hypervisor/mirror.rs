//! Mirrors of a running machine's disk whose target or gateway goes away.

use std::time::Duration;

use gateway::hypervisor::{Access, Guest, JobState, MirrorMode, QmpError, StartMode};
use longhaul_core::ids::DeviceName;
use longhaul_core::units::Rate;
use serde_json::json;

use super::site::*;

#[tokio::test]
async fn a_mirror_whose_target_goes_away_is_aborted_and_the_guest_runs_on() {
    let (Some(a), Some(b)) = (Site::new().await, Site::new().await) else { return };
    let definition = web1();
    let (source, _) = a.running(&definition).await;
    let at_b = b.place(&definition);
    let destination = b.hypervisor.start(&definition, &at_b, StartMode::Incoming).await.unwrap();
    let (nbd, root) = (b.path("nbd.sock"), disk("root"));
    destination.nbd_start(&nbd).await.unwrap();
    let refused = source.mirror_start(&root, &nbd, "root", MirrorMode::Full).await.unwrap_err();
    assert!(matches!(refused, QmpError::Refused { .. }), "{refused}");
    destination.export(&root, Access::Write, &[]).await.unwrap();
    source.mirror_start(&root, &nbd, "root", MirrorMode::None).await.unwrap();
    assert_eq!(source.mirror_settled(&root, LIMIT).await.unwrap().state, JobState::Ready);
    assert!(source.is_encumbered().await.unwrap(), "it has a mirror");
    b.hypervisor.discard(&definition.name).await.unwrap();
    source.mirror_abort(&root, true, Duration::from_secs(2)).await.unwrap();
    assert_eq!(source.mirror_status(&root).await.unwrap(), None);
    assert!(!source.is_encumbered().await.unwrap());
    assert!(source.status().await.unwrap().is_running());
    source.mirror_abort(&root, true, LIMIT).await.expect("no mirror is no error");
    let error = source.mirror_finish(&root, LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("not ready"), "{error}");
}

/// What a gateway leaves that was killed after it had ended its mirror, and before it took the target away.
async fn end_the_job_alone(source: &Guest, disk: &DeviceName) {
    let job = format!("mirror-{disk}");
    source.qmp().execute("block-job-cancel", json!({ "device": job })).await.unwrap();
    while source.mirror_status(disk).await.unwrap().unwrap().state != JobState::Concluded {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    source.qmp().execute("job-dismiss", json!({ "id": job })).await.unwrap();
}

#[tokio::test]
async fn a_target_that_a_killed_gateway_left_is_taken_away_and_the_disk_is_mirrored_again() {
    let (Some(a), Some(b)) = (Site::new().await, Site::new().await) else { return };
    let definition = web1();
    let (source, _) = a.running(&definition).await;
    let destination =
        b.hypervisor.start(&definition, &b.place(&definition), StartMode::Incoming).await.unwrap();
    let (nbd, root) = (b.path("nbd.sock"), disk("root"));
    destination.nbd_start(&nbd).await.unwrap();
    destination.export(&root, Access::Write, &[]).await.unwrap();
    source.mirror_start(&root, &nbd, "root", MirrorMode::None).await.unwrap();
    assert_eq!(source.mirror_settled(&root, LIMIT).await.unwrap().state, JobState::Ready);
    end_the_job_alone(&source, &root).await;
    let refused = source.mirror_start(&root, &nbd, "root", MirrorMode::None).await.unwrap_err();
    assert!(refused.to_string().contains("Duplicate"), "{refused}");
    source.mirror_abort(&root, true, LIMIT).await.unwrap();
    source.mirror_start(&root, &nbd, "root", MirrorMode::None).await.unwrap();
}

#[tokio::test]
async fn what_a_guest_may_write_to_a_disk_is_bounded_and_its_own_again() {
    let Some(site) = Site::new().await else { return };
    let (guest, _) = site.running(&web1()).await;
    let bound = async || {
        let disks = guest.qmp().execute("query-block", json!({})).await.unwrap();
        let bound = |disk: &serde_json::Value| {
            let inserted = &disk["inserted"];
            (inserted["bps_wr"].as_u64().unwrap_or(0), inserted["bps_rd"].as_u64().unwrap_or(0))
        };
        disks.as_array().unwrap().iter().map(bound).filter(|bound| *bound != (0, 0)).collect::<Vec<_>>()
    };
    assert_eq!(bound().await, []);
    guest.limit_writes(&disk("root"), Some(Rate(1 << 20))).await.unwrap();
    assert_eq!(bound().await, [(1 << 20, 0)], "of one disk, and not what it reads");
    assert!(guest.is_encumbered().await.unwrap(), "it has a bound");
    guest.limit_writes(&disk("root"), None).await.unwrap();
    assert_eq!(bound().await, []);
    assert!(!guest.is_encumbered().await.unwrap());
    guest.nbd_start(&site.path("nbd.sock")).await.unwrap();
    guest.export(&disk("root"), Access::Read, &[]).await.unwrap();
    assert!(guest.is_encumbered().await.unwrap(), "it has an export");
    guest.close_exports(LIMIT).await.unwrap();
    assert!(!guest.is_encumbered().await.unwrap());
    guest.limit_writes(&disk("nowhere"), None).await.expect("no disk of the guest's");
    guest.quit(LIMIT).await.unwrap();
}
