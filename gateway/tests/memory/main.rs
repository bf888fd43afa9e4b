//! The memory's path, from a QEMU to a QEMU, with a queue in the place of the link.

mod edges;
#[path = "../support/lateness.rs"]
mod lateness;
mod machine;
mod moves;
mod queue;
mod recorded;
