//! The seam between a machine's disks and its memory, where pages are named by what the disks hold: see
//! [`longhaul_core::wan`]. At the source a disk asks the memory before it overwrites what may have been named; at the
//! destination the memory reads the disks.
//!
//! Neither knows the other. Who is joined with whom is said in `migration`.

use std::collections::BTreeSet;
use std::future::Future;
use std::io;

use bytes::Bytes;
use longhaul_core::wan::GivenPlaces;
use tokio::sync::{mpsc, oneshot};

/// Blocks of a disk that are about to be overwritten at the destination.
#[derive(Debug)]
pub struct Overwriting {
    /// The disk's index in the machine's definition.
    pub disk: u8,
    /// Their numbers.
    pub blocks: BTreeSet<u64>,
    /// Told when nothing that is on its way names them; dropped when nothing is named any more.
    pub released: oneshot::Sender<()>,
}

/// What the disks gave, at the source, and what they ask.
#[derive(Debug)]
pub struct NamedBy {
    /// One for each disk, in the definition's order.
    pub given: Vec<GivenPlaces>,
    /// One question for each disk at most.
    pub questions: mpsc::Receiver<Overwriting>,
}

/// A disk at the destination that pages are named by.
pub trait NamedDisk: Send + Sync + 'static {
    /// Waits until so many of the disk's records are applied.
    fn applied(&mut self, records: u64) -> impl Future<Output = io::Result<()>> + Send;

    /// Its size in bytes.
    fn size_bytes(&self) -> u64;

    /// Reads `len` bytes at `offset`.
    fn read(&self, offset: u64, len: u32) -> impl Future<Output = io::Result<Bytes>> + Send;
}

/// For memory that is named by nothing.
#[derive(Debug)]
pub enum NoDisk {}

impl NamedDisk for NoDisk {
    async fn applied(&mut self, _records: u64) -> io::Result<()> {
        match *self {}
    }

    fn size_bytes(&self) -> u64 {
        match *self {}
    }

    async fn read(&self, _offset: u64, _len: u32) -> io::Result<Bytes> {
        match *self {}
    }
}
