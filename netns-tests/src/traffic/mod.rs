//! The client of the laboratory: old connections that must live through a move, and new requests by name.
//!
//! Everything is measured where a user would notice it. The client knows the plan's addresses and name, and nothing
//! of gateways, stages or machines; its times are milliseconds since the plan's start, so that they fit any other
//! time line with the same start.
//!
//! ```text
//! run ── owns TrafficReport ◀── events ── record   (numbered records both ways)
//!  ▲                                   ── download (body with a known SHA-256)
//!  │ orders: close, finish, report     ── idle     (speaks once, at the end)
//!  └── caller                          ── prober ──▶ resolver (honours TTLs)
//! ```
//!
//! Sockets belong to the namespace of the thread that runs it: either the whole process was started there (the
//! hidden subcommand [`client_main`]), or [`run_in`] enters it in a thread of its own.

pub mod clock;
pub mod command;
pub mod download;
pub mod event;
pub mod idle;
pub mod plan;
pub mod prober;
pub mod record;
pub mod resolver;
pub mod run;

pub use command::client_main;
pub use event::{
    DownloadReport, Event, Gap, IdleReport, NameChange, Outcome, ProbeSample, RecordReport, TrafficReport,
};
pub use plan::{CLOSE_AFTER_CUT_MS, DownloadPlan, HttpPlan, IdlePlan, RecordPlan, TrafficPlan};
pub use run::{Order, run, run_in};
