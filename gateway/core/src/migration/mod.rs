//! Who may run a machine, and in which stage a migration is.

pub mod permit;
