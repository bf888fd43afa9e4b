//! The parts of the `dnsupdater` tool: arguments, operations, what is remembered, what is printed.

pub mod args;
pub mod commands;
pub mod memory;
pub mod report;
pub mod reverse;
