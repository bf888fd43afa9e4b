//! The laboratory: two sites, a WAN, clients, name servers and real QEMU guests in network namespaces.
//!
//! A library so that the `lab` binary and the real-machine tests share every part. It measures the gateway from
//! outside and never takes the gateway's own word.

pub mod agent;
pub mod guest;
pub mod report;
pub mod traffic;
