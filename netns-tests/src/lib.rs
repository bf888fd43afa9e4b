//! The laboratory as a library: namespaces, an emulated WAN, two sites, a guest, a client, and scenes
//! made of them. What is shown and what is tested is decided in the `lab` binary and in the tests.

pub mod agent;
pub mod bench;
pub mod cargo;
pub mod cleanup;
pub mod exec;
pub mod faults;
pub mod fuzz;
pub mod guest;
pub mod install;
pub mod netns;
pub mod record;
pub mod report;
pub mod scenario;
pub mod suite;
pub mod topology;
pub mod traffic;
pub mod wan;
