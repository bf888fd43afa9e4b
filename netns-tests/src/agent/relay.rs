//! Connections that the guest opens itself: whoever connects names an address in one line, the guest connects to it, and
//! everything after the line is passed on, both ways. It knows nothing of what it passes on.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, copy_bidirectional};
use tokio::net::TcpStream;

/// A longer first line names no address.
const LINE_LIMIT_BYTES: u64 = 100;

/// Passes on one connection, until both sides have ended it.
///
/// # Errors
/// The first line names no address, nobody answers there, or either connection breaks; then both end.
pub async fn serve(stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut from = BufReader::new(stream);
    let mut line = String::new();
    (&mut from).take(LINE_LIMIT_BYTES).read_line(&mut line).await?;
    let to: SocketAddr = line.trim_end().parse().map_err(io::Error::other)?;
    let mut to = TcpStream::connect(to).await?;
    to.set_nodelay(true)?;
    copy_bidirectional(&mut from, &mut to).await.map(drop)
}
