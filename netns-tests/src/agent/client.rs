//! Asks the service from outside, blocking: usable in any thread, and so inside any namespace.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;

use super::CONTROL_PORT;

/// Gets a path of an HTTP server and gives the answer's body; the answer must be 200.
///
/// # Errors
/// No connection within `timeout`, silence for as long, or another status.
pub fn fetch(address: SocketAddr, path: &str, timeout: Duration) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let at = answer.windows(4).position(|end| end == b"\r\n\r\n").context("The answer has no head")?;
    let head = String::from_utf8_lossy(&answer[..at]).into_owned();
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.split(' ').nth(1) == Some("200"), "{path} answered: {status}");
    Ok(answer.split_off(at + 4))
}

/// Asks the guest's control port, for example `ask::<AgentStatus>(guest, "/status", timeout)`.
///
/// # Errors
/// As [`fetch`], or the answer is not what was asked for.
pub fn ask<T: DeserializeOwned>(guest: IpAddr, path: &str, timeout: Duration) -> Result<T> {
    let body = fetch(SocketAddr::new(guest, CONTROL_PORT), path, timeout)?;
    serde_json::from_slice(&body).with_context(|| format!("{path} answered something unexpected"))
}
