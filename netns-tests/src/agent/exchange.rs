//! The connections that live through a move: record exchange, idle echo, and the UDP echo.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, interval};

use super::frame::{FRAME_BYTES, Frame, Kind, Tally};
use super::worker::unix_ms;

/// A line longer than this ends an idle connection.
const LINE_LIMIT_BYTES: u64 = 1024;

/// The server's side of one record exchange, until the client's End.
///
/// # Errors
/// The connection breaks or the client does not begin with a Hello.
pub async fn serve_records(stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut from, to) = stream.into_split();
    let hello = read_frame(&mut from).await?.filter(|frame| frame.kind == Kind::Hello);
    let hello = hello.ok_or(io::ErrorKind::InvalidData)?;
    let (ended, end) = oneshot::channel();
    let sender = tokio::spawn(send_records(to, Duration::from_millis(hello.number.clamp(1, 60_000)), end));
    let tally = receive_records(&mut from).await?;
    let _ = ended.send(tally);
    sender.await.map_err(io::Error::other)?
}

/// Sends numbered records at the interval, then, when told what was received, the End frame.
///
/// # Errors
/// The connection breaks.
pub async fn send_records(
    mut to: OwnedWriteHalf,
    every: Duration,
    mut end: oneshot::Receiver<Tally>,
) -> io::Result<()> {
    let mut clock = interval(every);
    // A stopped machine must not come back with a burst of what it did not send.
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut number = 0;
    loop {
        tokio::select! {
            tally = &mut end => {
                let Ok(tally) = tally else { return Ok(()) };
                let frame = Frame { tally, ..Frame::new(Kind::End, number, unix_ms()) };
                to.write_all(&frame.encode()).await?;
                return to.shutdown().await;
            }
            _ = clock.tick() => {
                number += 1;
                to.write_all(&Frame::new(Kind::Record, number, unix_ms()).encode()).await?;
            }
        }
    }
}

/// Reads one frame; nothing if its checksum is wrong.
///
/// # Errors
/// The connection ends.
pub async fn read_frame(from: &mut OwnedReadHalf) -> io::Result<Option<Frame>> {
    let mut bytes = [0; FRAME_BYTES];
    from.read_exact(&mut bytes).await?;
    Ok(Frame::decode(&bytes))
}

async fn receive_records(from: &mut OwnedReadHalf) -> io::Result<Tally> {
    let mut tally = Tally::default();
    loop {
        let Some(frame) = read_frame(from).await? else {
            tally.corrupt += 1;
            continue;
        };
        match frame.kind {
            Kind::Record => tally.record(frame.number),
            Kind::Hello => tally.corrupt += 1,
            Kind::End => return Ok(tally),
        }
    }
}

/// Answers each line with the machine's boot id and the line, until the client closes.
///
/// # Errors
/// The connection breaks.
pub async fn serve_idle(stream: TcpStream, boot_id: &str) -> io::Result<()> {
    let (from, mut to) = stream.into_split();
    let mut from = BufReader::new(from);
    loop {
        let mut line = String::new();
        let count = (&mut from).take(LINE_LIMIT_BYTES).read_line(&mut line).await?;
        if count == 0 || !line.ends_with('\n') {
            return Ok(());
        }
        to.write_all(format!("{boot_id} {line}").as_bytes()).await?;
    }
}

/// Sends every datagram back, for ever.
///
/// # Errors
/// The socket fails.
pub async fn serve_udp(socket: UdpSocket) -> io::Result<()> {
    let mut datagram = vec![0; 65_536];
    loop {
        let (length, peer) = socket.recv_from(&mut datagram).await?;
        // A peer that is gone answers with "unreachable"; that is no reason to end.
        let _ = socket.send_to(&datagram[..length], peer).await;
    }
}
