//! The laboratory as a library: namespaces, an emulated WAN, two sites and what runs in them.
//! What a scenario does with it is decided in the `lab` binary and in the tests.

pub mod cleanup;
pub mod exec;
pub mod install;
pub mod netns;
pub mod topology;
pub mod wan;
