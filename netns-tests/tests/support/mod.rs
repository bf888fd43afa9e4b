//! What several tests of whole sites need besides a scene.

pub mod journal;
