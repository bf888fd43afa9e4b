//! What is done with arbitrary bytes, one module per decoder, and where the fuzzer begins.
//!
//! ```text
//!  seeds (real encoders) -> corpus/TARGET/NAME -> libFuzzer -> run(bytes): no panic, bounded, properties hold
//! ```
//!
//! A `run` function panics when a property does not hold. It is called by libFuzzer (`cargo lab fuzz`) and,
//! with the files of the corpus and whatever fuzzing has found, by an ordinary test. How inputs are made
//! is not decided here.

pub mod bulk;
pub mod config;
pub mod definition;
pub mod disk;
pub mod journal;
pub mod kept;
pub mod map;
pub mod memory_stream;
pub mod nbd_client;
pub mod nbd_server;
pub mod qmp;
pub mod sample;
pub mod tunnel;
pub mod wan;
pub mod wire;

mod input;

/// A decoder under test.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: that of its binary and of its folder in the corpus.
    pub name: &'static str,
    /// Takes one input.
    pub run: fn(&[u8]),
    /// Inputs to begin with, by name.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
    /// The longest input that is tried, in bytes.
    pub max_bytes: usize,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "wire", run: wire::run, seeds: wire::seeds, max_bytes: 8 << 10 },
    Target { name: "bulk", run: bulk::run, seeds: bulk::seeds, max_bytes: 4 << 10 },
    Target {
        name: "memory_stream",
        run: memory_stream::run,
        seeds: memory_stream::seeds,
        max_bytes: 64 << 10,
    },
    Target { name: "wan", run: wan::run, seeds: wan::seeds, max_bytes: 16 << 10 },
    Target { name: "disk", run: disk::run, seeds: disk::seeds, max_bytes: 16 << 10 },
    Target { name: "map", run: map::run, seeds: map::seeds, max_bytes: 16 << 10 },
    Target { name: "nbd_server", run: nbd_server::run, seeds: nbd_server::seeds, max_bytes: 8 << 10 },
    Target { name: "nbd_client", run: nbd_client::run, seeds: nbd_client::seeds, max_bytes: 8 << 10 },
    Target { name: "tunnel", run: tunnel::run, seeds: tunnel::seeds, max_bytes: 8 << 10 },
    Target { name: "journal", run: journal::run, seeds: journal::seeds, max_bytes: 8 << 10 },
    Target { name: "kept", run: kept::run, seeds: kept::seeds, max_bytes: 24 << 10 },
    Target { name: "config", run: config::run, seeds: config::seeds, max_bytes: 16 << 10 },
    Target { name: "definition", run: definition::run, seeds: definition::seeds, max_bytes: 8 << 10 },
    Target { name: "qmp", run: qmp::run, seeds: qmp::seeds, max_bytes: 8 << 10 },
];
