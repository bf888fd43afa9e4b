//! Just enough HTTP/1.1 for the service: one GET per connection, query parameters, answers with a length.
//!
//! Not a general server: no bodies in requests, no keep-alive, no escapes in the path.

use std::collections::BTreeMap;
use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A request head longer than this is refused.
pub const HEAD_LIMIT_BYTES: usize = 8192;

/// A request's path and parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The path without its query.
    pub path: String,
    /// The query's parameters.
    pub query: BTreeMap<String, String>,
}

impl Request {
    /// Parses a request line such as `GET /a?b=1 HTTP/1.1`.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let target = line.strip_prefix("GET ")?.split(' ').next()?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let query = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Some(Self { path: path.to_owned(), query })
    }

    /// A numeric parameter.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<u64> {
        self.query.get(key)?.parse().ok()
    }
}

/// Reads a request's head.
///
/// # Errors
/// The connection ends, or the head is too long or no GET.
pub async fn read_request(stream: &mut TcpStream) -> io::Result<Request> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut part = [0; 1024];
        let count = stream.read(&mut part).await?;
        if count == 0 || head.len() + count > HEAD_LIMIT_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        head.extend_from_slice(&part[..count]);
    }
    let text = String::from_utf8_lossy(&head);
    text.lines().next().and_then(Request::parse).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Sends a complete answer and ends the connection.
///
/// # Errors
/// The connection ended before.
pub async fn respond(stream: &mut TcpStream, status: &str, kind: &str, body: &[u8]) -> io::Result<()> {
    stream.write_all(head(status, kind, body.len() as u64).as_bytes()).await?;
    stream.write_all(body).await?;
    stream.shutdown().await
}

/// An answer's head for a body of `length_bytes`.
#[must_use]
pub fn head(status: &str, kind: &str, length_bytes: u64) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length_bytes}\r\nConnection: close\r\n\r\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_line_gives_path_and_numbers() {
        let request = Request::parse("GET /blob?bytes=10&rate=x HTTP/1.1").unwrap();
        assert_eq!(
            (request.path.as_str(), request.number("bytes"), request.number("rate")),
            ("/blob", Some(10), None)
        );
        assert_eq!(Request::parse("POST / HTTP/1.1"), None);
    }
}
