//! An NBD client for QEMU's exports: many requests under way on one connection.
//!
//! ```text
//!  NbdClient (clones) ─requests─▶ writer task ─socket─▶ QEMU
//!        ▲                             │ registers each request first
//!        └────one answer each──── reader task ◀─socket─ QEMU
//! ```
//!
//! Requests leave in the order of the calls, and QEMU may carry them out in any order: whoever writes
//! overlapping ranges waits for the first answer. A broken connection fails all requests; it is not
//! made anew, because what QEMU still did with the open ones would be unknown. Dropping the last clone
//! takes leave of the server.

use std::path::Path;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::replies::{Answer, Expected, read_replies};
use super::{
    BASE_ALLOCATION, FIXED_NEWSTYLE, NBD_MAGIC, NO_ZEROES, NbdError, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    REQUEST_MAGIC, command, export_flag, info, option, option_reply,
};
use crate::own_socket;

/// Requests under way on one connection; more wait at the caller.
const MAX_REQUESTS: usize = 128;
const MAX_OPTION_REPLY: u32 = 64 << 10;
/// What may be asked for at once where the server does not say: the protocol's own figure.
const DEFAULT_MAX_REQUEST: u32 = 32 << 20;

/// A range of the disk and whether it is known to read as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len: u64,
    /// It reads as zeros.
    pub zero: bool,
}

/// A connection to an export.
#[derive(Debug, Clone)]
pub struct NbdClient {
    requests: mpsc::Sender<Request>,
    export: Arc<ExportInfo>,
}

#[derive(Debug)]
struct Request {
    command: u16,
    offset: u64,
    len: u32,
    data: Bytes,
    answer: oneshot::Sender<Result<Answer, NbdError>>,
}

/// What the server said of the export.
#[derive(Debug)]
struct ExportInfo {
    size: u64,
    flags: u16,
    max_request: u32,
    /// The id of `base:allocation`, where the server knows it.
    allocation: Option<u32>,
}

impl NbdClient {
    /// Connects to `export` at the UNIX socket `path`.
    pub async fn connect(path: &Path, export: &str) -> Result<Self, NbdError> {
        let socket = |source| NbdError::Socket { path: path.display().to_string(), source };
        Self::over(own_socket::connect(path).await.map_err(socket)?, export).await
    }

    /// The same over a stream that is connected already.
    pub async fn over(stream: UnixStream, export: &str) -> Result<Self, NbdError> {
        let (reader, writer) = stream.into_split();
        let reader = BufReader::with_capacity(256 << 10, reader);
        let mut handshake = Handshake { reader, writer };
        let info = handshake.negotiate(export).await?;
        let (requests, queue) = mpsc::channel(16);
        let (expected, expecting) = mpsc::channel(MAX_REQUESTS);
        let Handshake { reader, writer } = handshake;
        tokio::spawn(async move {
            if let Err(error) = read_replies(reader, expecting).await {
                tracing::warn!(%error, "NBD connection lost");
            }
        });
        tokio::spawn(write_requests(writer, queue, expected));
        Ok(Self { requests, export: Arc::new(info) })
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.export.size
    }

    /// Whether the export refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.export.flags & export_flag::READ_ONLY != 0
    }

    /// Whether the export can make writes durable.
    pub fn can_flush(&self) -> bool {
        self.export.flags & export_flag::SEND_FLUSH != 0
    }

    /// The largest read or write in bytes.
    pub fn max_request(&self) -> u32 {
        self.export.max_request
    }

    /// Reads `len` bytes at `offset`.
    pub async fn read(&self, offset: u64, len: u32) -> Result<Bytes, NbdError> {
        Ok(self.ask(command::READ, offset, len, Bytes::new()).await?.data)
    }

    /// Writes `data` at `offset`, and returns when the server has taken it (not: made it durable).
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), NbdError> {
        self.ask(command::WRITE, offset, data.len() as u32, data).await.map(drop)
    }

    /// Makes `len` bytes at `offset` zero, as a hole where the disk can.
    pub async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), NbdError> {
        self.in_parts(command::WRITE_ZEROES, offset, len).await
    }

    /// Gives up `len` bytes at `offset`.
    pub async fn trim(&self, offset: u64, len: u64) -> Result<(), NbdError> {
        self.in_parts(command::TRIM, offset, len).await
    }

    /// Makes durable what was answered before.
    pub async fn flush(&self) -> Result<(), NbdError> {
        self.ask(command::FLUSH, 0, 0, Bytes::new()).await.map(drop)
    }

    /// What the server knows about zeros from `offset` on: extents that follow each other, of at most
    /// `len` bytes together and perhaps of less. Without that service: one extent of unknown content.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<Vec<Extent>, NbdError> {
        if self.export.allocation.is_none() {
            return Ok(vec![Extent { len, zero: false }]);
        }
        let asked = len.min(1 << 31) as u32;
        let mut extents = self.ask(command::BLOCK_STATUS, offset, asked, Bytes::new()).await?.extents;
        // The last extent may reach beyond what was asked.
        let mut left = len;
        for extent in &mut extents {
            extent.len = extent.len.min(left);
            left -= extent.len;
        }
        extents.retain(|extent| extent.len > 0);
        Ok(extents)
    }

    async fn in_parts(&self, command: u16, offset: u64, len: u64) -> Result<(), NbdError> {
        const PART: u64 = 1 << 30;
        let mut at = offset;
        while at < offset + len {
            let part = PART.min(offset + len - at);
            self.ask(command, at, part as u32, Bytes::new()).await?;
            at += part;
        }
        Ok(())
    }

    async fn ask(&self, command: u16, offset: u64, len: u32, data: Bytes) -> Result<Answer, NbdError> {
        let (answer, answered) = oneshot::channel();
        let request = Request { command, offset, len, data, answer };
        self.requests.send(request).await.map_err(|_| NbdError::Closed)?;
        answered.await.map_err(|_| NbdError::Closed)?
    }
}

/// Sends requests until the last client is gone or the connection breaks.
async fn write_requests(
    mut writer: OwnedWriteHalf,
    mut queue: mpsc::Receiver<Request>,
    expected: mpsc::Sender<Expected>,
) {
    let mut cookie = 0;
    while let Some(Request { command, offset, len, data, answer }) = queue.recv().await {
        cookie += 1;
        let header = request_header(command, cookie, offset, len);
        // Registered before it is sent, so that the reader finds it when the answer comes.
        if expected.send(Expected::new(cookie, command, offset, len, answer)).await.is_err() {
            return;
        }
        if writer.write_all(&header).await.is_err() || writer.write_all(&data).await.is_err() {
            // The reader sees the end of the connection and reports it.
            return;
        }
    }
    // Taking leave is a courtesy: the server may be gone already.
    let _ = writer.write_all(&request_header(command::DISC, cookie + 1, 0, 0)).await;
}

fn request_header(command: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut header = [0; 28];
    header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    header[6..8].copy_from_slice(&command.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..].copy_from_slice(&len.to_be_bytes());
    header
}

struct Handshake {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Handshake {
    async fn negotiate(&mut self, export: &str) -> Result<ExportInfo, NbdError> {
        if self.reader.read_u64().await? != NBD_MAGIC || self.reader.read_u64().await? != OPTION_MAGIC {
            return Err(NbdError::Protocol("the server does not greet in newstyle"));
        }
        let server_flags = self.reader.read_u16().await?;
        if server_flags & FIXED_NEWSTYLE == 0 {
            return Err(NbdError::Protocol("the server does not speak fixed newstyle"));
        }
        let flags = FIXED_NEWSTYLE | server_flags & NO_ZEROES;
        self.writer.write_all(&u32::from(flags).to_be_bytes()).await?;
        let allocation = self.negotiate_allocation(export).await?;
        self.go(export, allocation).await
    }

    /// Asks for `base:allocation`, which needs structured replies; `None` where there is no such thing.
    async fn negotiate_allocation(&mut self, export: &str) -> Result<Option<u32>, NbdError> {
        self.send_option(option::STRUCTURED_REPLY, &[]).await?;
        if self.read_reply(option::STRUCTURED_REPLY).await?.0 != option_reply::ACK {
            return Ok(None);
        }
        let mut data = BytesMut::new();
        put_string(&mut data, export);
        data.put_u32(1);
        put_string(&mut data, BASE_ALLOCATION);
        self.send_option(option::SET_META_CONTEXT, &data).await?;
        let mut id = None;
        loop {
            let (reply, mut data) = self.read_reply(option::SET_META_CONTEXT).await?;
            match reply {
                option_reply::META_CONTEXT => {
                    let found = data.try_get_u32().map_err(|_| short_reply())?;
                    id = id.or((data == BASE_ALLOCATION.as_bytes()).then_some(found));
                }
                option_reply::ACK => return Ok(id),
                reply if reply & option_reply::ERROR != 0 => return Ok(None),
                _ => return Err(NbdError::Protocol("the server answered an option oddly")),
            }
        }
    }

    async fn go(&mut self, export: &str, allocation: Option<u32>) -> Result<ExportInfo, NbdError> {
        let mut data = BytesMut::new();
        put_string(&mut data, export);
        data.put_u16(1);
        data.put_u16(info::BLOCK_SIZE);
        self.send_option(option::GO, &data).await?;
        let mut found = None;
        let mut max_request = DEFAULT_MAX_REQUEST;
        loop {
            let (reply, mut data) = self.read_reply(option::GO).await?;
            match reply {
                option_reply::INFO => match data.try_get_u16().map_err(|_| short_reply())? {
                    info::EXPORT if data.len() >= 10 => found = Some((data.get_u64(), data.get_u16())),
                    info::BLOCK_SIZE if data.len() >= 12 => {
                        max_request = (&data[8..]).get_u32().clamp(64 << 10, DEFAULT_MAX_REQUEST);
                    }
                    _ => {}
                },
                option_reply::ACK => break,
                code if code & option_reply::ERROR != 0 => {
                    return Err(NbdError::Refused { what: format!("export {export}"), code });
                }
                _ => return Err(NbdError::Protocol("the server answered an option oddly")),
            }
        }
        let (size, flags) = found.ok_or(NbdError::Protocol("the server did not say the export's size"))?;
        Ok(ExportInfo { size, flags, max_request, allocation })
    }

    async fn send_option(&mut self, option: u32, data: &[u8]) -> Result<(), NbdError> {
        let mut out = BytesMut::with_capacity(16 + data.len());
        out.put_u64(OPTION_MAGIC);
        out.put_u32(option);
        out.put_u32(data.len() as u32);
        out.put_slice(data);
        Ok(self.writer.write_all(&out).await?)
    }

    async fn read_reply(&mut self, option: u32) -> Result<(u32, Bytes), NbdError> {
        let magic = self.reader.read_u64().await?;
        if magic != OPTION_REPLY_MAGIC || self.reader.read_u32().await? != option {
            return Err(NbdError::Protocol("an option reply does not match its option"));
        }
        let reply = self.reader.read_u32().await?;
        let len = self.reader.read_u32().await?;
        if len > MAX_OPTION_REPLY {
            return Err(NbdError::Protocol("an option reply is too long"));
        }
        let mut data = vec![0; len as usize];
        self.reader.read_exact(&mut data).await?;
        Ok((reply, data.into()))
    }
}

fn put_string(out: &mut BytesMut, text: &str) {
    out.put_u32(text.len() as u32);
    out.put_slice(text.as_bytes());
}

fn short_reply() -> NbdError {
    NbdError::Protocol("an option reply is too short")
}
