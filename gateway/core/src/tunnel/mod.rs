//! What the tunnel decides: which packets travel, which flows are old, when it may end.

pub mod handover;
