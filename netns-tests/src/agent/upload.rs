//! The upload: whatever comes until the client has said all; the answer is what came. It keeps nothing of it.

use std::io;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bytes read at once.
const PART_BYTES: usize = 64 << 10;

/// Answers one connection: [`receipt`] of all that came before the client's end.
///
/// # Errors
/// The connection breaks.
pub async fn serve(mut stream: TcpStream) -> io::Result<()> {
    let (mut hash, mut bytes) = (Sha256::new(), 0);
    let mut part = vec![0; PART_BYTES];
    loop {
        let count = stream.read(&mut part).await?;
        if count == 0 {
            break;
        }
        hash.update(&part[..count]);
        bytes += count as u64;
    }
    stream.write_all(receipt(bytes, hash).as_bytes()).await?;
    stream.shutdown().await
}

/// Length and SHA-256 of what was sent or came, as one line.
#[must_use]
pub fn receipt(bytes: u64, hash: Sha256) -> String {
    format!("{bytes} {}\n", hex::encode(hash.finalize()))
}
