//! What a disk holds, as one hash per block, read through an NBD export. For comparing two sides'
//! disks without carrying them; who compares, and when, is decided elsewhere.

use futures_util::stream::{FuturesOrdered, StreamExt};
use longhaul_core::disk::BLOCK;

use super::nbd::{NbdClient, NbdError};

/// Bytes read by one request.
const UNIT: u64 = 1 << 20;
/// Requests under way at the same time.
const AT_ONCE: usize = 4;

/// The BLAKE3 hash of every block of [`BLOCK`] bytes in order; the last block may be shorter. Holds 32
/// bytes per block: 512 KiB per GiB of disk.
pub async fn block_hashes(disk: &NbdClient) -> Result<Vec<[u8; 32]>, NbdError> {
    let mut hashes = Vec::with_capacity(disk.size().div_ceil(BLOCK) as usize);
    let mut reads = FuturesOrdered::new();
    let mut at = 0;
    loop {
        while at < disk.size() && reads.len() < AT_ONCE {
            let unit = UNIT.min(u64::from(disk.max_request()) / BLOCK * BLOCK).min(disk.size() - at);
            reads.push_back(disk.read(at, unit as u32));
            at += unit;
        }
        let Some(data) = reads.next().await else { return Ok(hashes) };
        hashes.extend(data?.chunks(BLOCK as usize).map(|block| *blake3::hash(block).as_bytes()));
    }
}
