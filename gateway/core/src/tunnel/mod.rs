//! What the tunnel decides: which packets travel, which flows are old, when it may end.
//!
//! [`datapath`] puts the pieces together; nothing here reads a device or changes a route. Those are
//! the gateway's work.

pub mod advertisement;
mod checksum;
pub mod coalesce;
pub mod datapath;
pub mod duplicates;
pub mod flows;
pub mod fragment;
pub mod handover;
pub mod hold;
pub mod home_servers;
pub mod host;
pub mod neighbourhood;
pub mod offload;
pub mod packet;
pub mod policy;
pub mod repair;
pub mod routers;
pub mod segment;
pub mod share;
