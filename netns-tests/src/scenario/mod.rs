//! Scenes with everything in them: sites with gateways, a guest, a name server, a client.
//!
//! [`Scene`] builds one and takes it down; [`demo`] plays the main job on it; [`checks`] says which
//! promises held, by what was seen from outside. Real-machine tests use the same pieces.

pub mod checks;
pub mod demo;
pub mod disk_check;
pub mod etcd;
pub mod gateway;
pub mod monitor;
pub mod names;
pub mod options;
pub mod outside;
pub mod programs;
pub mod scene;
pub mod traces;
pub mod traffic;

pub use options::SceneOptions;
pub use scene::Scene;
