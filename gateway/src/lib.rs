//! The Longhaul gateway: everything that touches the world.
//!
//! Decisions are made in `longhaul-core`; the modules here carry them out. The edges (`link`,
//! `hypervisor`, `memory`, `disk`, `tunnel`, `dns`, `etcd`) do not import one another: they meet in
//! `migration`, where actions are performed, and in `daemon`, where the gateway is built.

pub mod api;
pub mod chunk;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod disk;
pub mod dns;
pub mod etcd;
pub mod generation;
pub mod history;
pub mod hypervisor;
pub mod identity;
pub mod journal;
pub mod link;
pub mod memory;
pub mod metrics;
pub mod migration;
pub mod naming;
mod own_socket;
#[cfg(test)]
mod test_site;
pub mod tunnel;
