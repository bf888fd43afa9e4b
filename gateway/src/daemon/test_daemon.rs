//! A daemon for tests that nobody has asked for anything yet. What its tasks report goes nowhere.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::{mpsc, watch};

use super::Daemon;
use super::proposals::Proposals;
use super::restarts::Watches;
use crate::migration::Edges;

impl Daemon {
    pub(super) fn idle(edges: Edges) -> Self {
        Self {
            edges,
            machines: BTreeMap::new(),
            migrations: BTreeMap::new(),
            proposals: Proposals::default(),
            retries: BTreeMap::new(),
            anchors: mpsc::channel(1).0,
            anchor_views: watch::channel(BTreeMap::new()).1,
            ended: mpsc::channel(1).0,
            admitted: mpsc::channel(1).0,
            working: BTreeSet::new(),
            worked: mpsc::channel(1).0,
            watches: Watches::new(mpsc::channel(1).0),
            answered: mpsc::channel(1).0,
            settled: mpsc::channel(1).0,
        }
    }
}
