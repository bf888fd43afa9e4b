//! Who plays: how many sites there are, which of them may move the machine to which other, and how it is handed over
//! then. Nothing happens here.

use longhaul_core::migration::CommitMode;
use longhaul_core::migration::arbiter::Arbiter;

use crate::parts::Id;

/// Where the machine is at home.
pub const A: usize = 0;
/// Where it is moved to.
pub const B: usize = 1;
/// The third site, if there is one.
pub const C: usize = 2;
/// Sites at most.
pub const SITES: usize = 3;

const DNS: CommitMode = CommitMode::Arbitrated(Arbiter::Dns);
const ETCD: CommitMode = CommitMode::Arbitrated(Arbiter::Etcd);

/// A way that the machine may take.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    pub from: usize,
    pub to: usize,
    pub commit: CommitMode,
}

#[derive(Debug)]
pub struct Scene {
    /// Files of schedules that are played in it begin so.
    pub prefix: &'static str,
    pub sites: usize,
    pub routes: &'static [Route],
    /// The sites that it can leave: those have anchors.
    pub leavers: &'static [usize],
    /// Moves that are asked for at most.
    pub moves: Id,
    /// An operator decides where a site is gone for good.
    pub operator: bool,
}

pub static TWO: Scene = Scene {
    prefix: "",
    sites: 2,
    routes: &[route(A, B, CommitMode::Confirmed)],
    leavers: &[A],
    moves: 3,
    operator: false,
};

pub static TWO_RESOLVED: Scene = Scene {
    prefix: "resolved-",
    sites: 2,
    routes: &[route(A, B, CommitMode::Confirmed)],
    leavers: &[A],
    moves: 3,
    operator: true,
};

pub static TWO_ARBITRATED: Scene = Scene {
    prefix: "arbitrated-",
    sites: 2,
    routes: &[route(A, B, DNS)],
    leavers: &[A],
    moves: 3,
    operator: false,
};

pub static THREE: Scene = Scene {
    prefix: "three-",
    sites: 3,
    routes: &everywhere(CommitMode::Confirmed),
    leavers: &[A, B, C],
    moves: 6,
    operator: false,
};

pub static THREE_ETCD: Scene = Scene {
    prefix: "three-etcd-",
    sites: 3,
    routes: &everywhere(ETCD),
    leavers: &[A, B, C],
    moves: 6,
    operator: false,
};

pub static TWO_PIPELINED: Scene = Scene {
    prefix: "pipelined-",
    sites: 2,
    routes: &[route(A, B, CommitMode::Pipelined)],
    leavers: &[A],
    moves: 3,
    operator: false,
};

pub static THREE_PIPELINED: Scene = Scene {
    prefix: "three-pipelined-",
    sites: 3,
    routes: &everywhere(CommitMode::Pipelined),
    leavers: &[A, B, C],
    moves: 6,
    operator: false,
};

/// The name server arbitrates for the home alone; on a link without an arbiter a visitor may move on.
pub static THREE_DNS: Scene = Scene {
    prefix: "three-dns-",
    sites: 3,
    routes: &[
        route(A, B, DNS),
        route(A, C, DNS),
        route(B, C, CommitMode::Confirmed),
        route(C, B, CommitMode::Confirmed),
    ],
    leavers: &[A, B, C],
    moves: 6,
    operator: false,
};

pub static SCENES: [&Scene; 8] =
    [&TWO, &TWO_RESOLVED, &TWO_ARBITRATED, &TWO_PIPELINED, &THREE, &THREE_ETCD, &THREE_DNS, &THREE_PIPELINED];

impl Scene {
    /// The scene of a kept schedule.
    pub fn of_file(name: &str) -> &'static Self {
        let of_it = SCENES.into_iter().filter(|scene| name.starts_with(scene.prefix));
        of_it.max_by_key(|scene| scene.prefix.len()).expect("a prefix may be empty")
    }

    /// Whom some moves ask, or all.
    pub fn arbiter(&self) -> Option<Arbiter> {
        self.routes.iter().find_map(|route| route.commit.arbiter())
    }

    pub fn has_arbiter(&self) -> bool {
        self.arbiter().is_some()
    }

    /// Each site with each other.
    pub fn pair(&self, number: usize) -> (usize, usize) {
        let number = number % self.pairs();
        let site = number % self.sites;
        (site, (site + 1 + number / self.sites) % self.sites)
    }

    pub fn pairs(&self) -> usize {
        self.sites * (self.sites - 1)
    }
}

const fn route(from: usize, to: usize, commit: CommitMode) -> Route {
    Route { from, to, commit }
}

const fn everywhere(commit: CommitMode) -> [Route; 6] {
    [
        route(A, B, commit),
        route(A, C, commit),
        route(B, A, commit),
        route(B, C, commit),
        route(C, A, commit),
        route(C, B, commit),
    ]
}
