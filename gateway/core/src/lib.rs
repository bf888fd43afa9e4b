//! What a gateway decides, without doing any of it.
//!
//! Nothing here opens a socket or a file, reads a clock, draws a random number or awaits. Inputs
//! arrive through `handle_*`, outputs leave through `poll_*` or as returned steps, and time is a
//! parameter. Maps are ordered and every queue has a bound, so that a run can be replayed exactly.

pub mod bulk;
pub mod congestion;
pub mod disk;
pub mod ids;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod proof;
pub mod tunnel;
pub mod units;
pub mod wan;
pub mod wire;
