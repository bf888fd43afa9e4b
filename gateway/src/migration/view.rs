//! What a migration shows of itself: one value, replaced as things happen, watched by the API.
//!
//! Figures come from the leaves that move bytes; nothing is decided by what stands here.

use std::time::{Duration, Instant};

use tokio::sync::watch;

use longhaul_core::ids::SiteName;
use longhaul_core::migration::{Attempt, Stage};

use crate::api::types::{MigrationView, Progressing, RetryView, RoundView, StageTime, WanBytes};
use crate::journal::unix_ms;

/// The writing end of one migration's view. Cheap to clone, so that leaves can report figures.
#[derive(Debug, Clone)]
pub struct Viewer {
    view: watch::Sender<MigrationView>,
    paused_at: watch::Sender<Option<Instant>>,
}

impl Viewer {
    /// A view of an attempt that begins now.
    pub fn new(attempt: &Attempt, from: &SiteName, to: &SiteName) -> Self {
        let now = unix_ms();
        let view = MigrationView {
            id: attempt.id.to_string(),
            vm: attempt.vm.clone(),
            from: from.clone(),
            to: to.clone(),
            progressing: Progressing::Running,
            reason: None,
            retry: None,
            follows: None,
            notices: Vec::new(),
            stage: Stage::PreMigration,
            stages: vec![StageTime { stage: Stage::PreMigration, start_ms: now, end_ms: None }],
            percent: 0.0,
            rate: 0,
            round: 0,
            dirty_rate: 0,
            throttle_percent: 0,
            disk_limit: None,
            limit_mbit: None,
            eta_s: None,
            rounds: Vec::new(),
            disk: (0, 0),
            disk_kept: 0,
            memory: (0, 0),
            pause_ms: None,
            wan: WanBytes::default(),
            started_ms: now,
            ended_ms: None,
        };
        Self { view: watch::Sender::new(view), paused_at: watch::Sender::new(None) }
    }

    /// A reader of it.
    pub fn watch(&self) -> watch::Receiver<MigrationView> {
        self.view.subscribe()
    }

    /// The view as it is now.
    pub fn current(&self) -> MigrationView {
        self.view.borrow().clone()
    }

    /// Changes figures.
    pub fn change(&self, change: impl FnOnce(&mut MigrationView)) {
        self.view.send_modify(change);
    }

    /// The stage the machine is in; times follow.
    pub fn enter(&self, stage: Stage) {
        self.view.send_if_modified(|view| {
            if view.stage == stage || view.progressing != Progressing::Running {
                return false;
            }
            let now = unix_ms();
            if let Some(last) = view.stages.last_mut() {
                last.end_ms = Some(now);
            }
            view.stages.push(StageTime { stage, start_ms: now, end_ms: None });
            view.stage = stage;
            true
        });
    }

    /// The guest has been standing for this long, unless it stands since earlier.
    pub fn paused_for(&self, age: Duration) {
        let now = Instant::now();
        self.paused_at.send_modify(|at| {
            at.get_or_insert(now.checked_sub(age).unwrap_or(now));
        });
    }

    /// The guest runs again; `age` is how long the news of it travelled.
    pub fn resumed(&self, age: Duration) {
        if let Some(at) = self.paused_at.send_replace(None) {
            let pause = at.elapsed().saturating_sub(age);
            self.change(|view| view.pause_ms = Some(pause.as_secs_f64() * 1e3));
        }
    }

    /// Tells the operator something that is said once however often it happens.
    pub fn notice_once(&self, notice: String) {
        self.change(|view| {
            if !view.notices.contains(&notice) {
                view.notices.push(notice);
            }
        });
    }

    /// What begins so does not hold any more.
    pub fn take_notices_back(&self, beginning: &str) {
        self.change(|view| view.notices.retain(|notice| !notice.starts_with(beginning)));
    }

    /// It is being undone, for this reason.
    pub fn reason(&self, reason: String) {
        self.change(|view| view.reason = Some(reason));
    }

    /// The attempt that follows by itself, or that none does.
    pub fn retry(&self, retry: Option<RetryView>) {
        self.change(|view| view.retry = retry);
    }

    /// It is over.
    pub fn end(&self, how: Progressing, reason: Option<String>) {
        self.change(|view| {
            if view.progressing != Progressing::Running {
                return;
            }
            let now = unix_ms();
            if let Some(last) = view.stages.last_mut() {
                last.end_ms = Some(now);
            }
            view.progressing = how;
            view.ended_ms = Some(now);
            view.eta_s = None;
            if how == Progressing::Moved {
                view.percent = 100.0;
            }
            view.reason = reason.or_else(|| view.reason.take());
        });
    }
}

/// A round of memory, from the pump's figures.
pub fn round(bytes: u64, pages: u64, time: Duration) -> RoundView {
    RoundView { bytes, pages, ms: time.as_millis() as u64 }
}
