//! Reads an NBD server's replies, simple and structured, and answers those who asked.
//!
//! Every length is checked against the request before anything is allocated or read.

use std::collections::BTreeMap;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot};

use super::client::Extent;
use super::{
    NbdError, SIMPLE_REPLY_MAGIC, STATE_ZERO, STRUCTURED_REPLY_MAGIC, command, command_name, reply_chunk,
};

/// The longest structured chunk that carries no data read, in bytes: far more extents than asked for.
const MAX_CHUNK: u32 = 1 << 20;

/// What a request was answered with.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// For a read.
    pub(super) data: Bytes,
    /// For a block status.
    pub(super) extents: Vec<Extent>,
}

/// A request that was sent.
#[derive(Debug)]
pub(super) struct Expected {
    cookie: u64,
    command: u16,
    offset: u64,
    len: u32,
    data: Vec<u8>,
    /// Bytes of data that have come.
    filled: u64,
    extents: Vec<Extent>,
    errno: u32,
    answer: oneshot::Sender<Result<Answer, NbdError>>,
}

type Reader = BufReader<OwnedReadHalf>;

impl Expected {
    pub(super) fn new(
        cookie: u64,
        command: u16,
        offset: u64,
        len: u32,
        answer: oneshot::Sender<Result<Answer, NbdError>>,
    ) -> Self {
        Self { cookie, command, offset, len, data: vec![], filled: 0, extents: vec![], errno: 0, answer }
    }

    fn finish(self) {
        let missing = self.command == command::READ && self.filled < u64::from(self.len);
        let result = match self.errno {
            0 if missing => Err(NbdError::Protocol("a read was answered in part")),
            0 => Ok(Answer { data: self.data.into(), extents: self.extents }),
            errno => {
                let command = command_name(self.command);
                Err(NbdError::Request { command, offset: self.offset, errno })
            }
        };
        // Nobody waits any more when the task that asked was aborted.
        let _ = self.answer.send(result);
    }

    /// The part of the read's buffer for `len` bytes at `offset` of the disk.
    fn part(&mut self, offset: u64, len: u64) -> Result<&mut [u8], NbdError> {
        let outside = NbdError::Protocol("a reply lies outside its read");
        let start = offset.checked_sub(self.offset);
        let inside = start.filter(|start| start.saturating_add(len) <= u64::from(self.len));
        let (command::READ, Some(start)) = (self.command, inside) else { return Err(outside) };
        if self.data.is_empty() {
            self.data = vec![0; self.len as usize];
        }
        self.filled += len;
        Ok(&mut self.data[start as usize..][..len as usize])
    }
}

/// Reads until the server closes; an error is a broken connection or protocol.
pub(super) async fn read_replies(
    mut reader: Reader,
    mut expecting: mpsc::Receiver<Expected>,
) -> Result<(), NbdError> {
    let mut open: BTreeMap<u64, Expected> = BTreeMap::new();
    loop {
        let magic = match reader.read_u32().await {
            Ok(magic) => magic,
            Err(error) => {
                // The end of the connection is no error when nothing is open and nobody can ask any more.
                return if open.is_empty() && expecting.is_closed() { Ok(()) } else { Err(error.into()) };
            }
        };
        let head = match magic {
            SIMPLE_REPLY_MAGIC => Head::simple(&mut reader).await?,
            STRUCTURED_REPLY_MAGIC => Head::structured(&mut reader).await?,
            _ => return Err(NbdError::Protocol("a reply has a wrong magic")),
        };
        while let Ok(expected) = expecting.try_recv() {
            open.insert(expected.cookie, expected);
        }
        let expected = open.get_mut(&head.cookie);
        let expected = expected.ok_or(NbdError::Protocol("a reply answers nothing that was asked"))?;
        head.read_body(&mut reader, expected).await?;
        if head.done {
            open.remove(&head.cookie).into_iter().for_each(Expected::finish);
        }
    }
}

struct Head {
    cookie: u64,
    done: bool,
    body: Body,
}

enum Body {
    /// A simple reply's error number; 0 is followed by the data of a read.
    Simple(u32),
    /// A structured chunk of this type and length.
    Chunk(u16, u32),
}

impl Head {
    async fn simple(reader: &mut Reader) -> Result<Self, NbdError> {
        let errno = reader.read_u32().await?;
        Ok(Self { cookie: reader.read_u64().await?, done: true, body: Body::Simple(errno) })
    }

    async fn structured(reader: &mut Reader) -> Result<Self, NbdError> {
        let flags = reader.read_u16().await?;
        let kind = reader.read_u16().await?;
        let cookie = reader.read_u64().await?;
        let len = reader.read_u32().await?;
        Ok(Self { cookie, done: flags & reply_chunk::FLAG_DONE != 0, body: Body::Chunk(kind, len) })
    }

    async fn read_body(&self, reader: &mut Reader, expected: &mut Expected) -> Result<(), NbdError> {
        match self.body {
            Body::Simple(0) if expected.command == command::READ => {
                let whole = expected.part(expected.offset, u64::from(expected.len))?;
                reader.read_exact(whole).await?;
            }
            Body::Simple(errno) => expected.errno = errno,
            Body::Chunk(reply_chunk::OFFSET_DATA, len) => {
                let data_len = len.checked_sub(8).ok_or(NbdError::Protocol("a data chunk is too short"))?;
                let offset = reader.read_u64().await?;
                reader.read_exact(expected.part(offset, u64::from(data_len))?).await?;
            }
            Body::Chunk(kind, len) => {
                if len > MAX_CHUNK {
                    return Err(NbdError::Protocol("a reply chunk is too long"));
                }
                let mut body = vec![0; len as usize];
                reader.read_exact(&mut body).await?;
                take_chunk(kind, &body, expected)?;
            }
        }
        Ok(())
    }
}

fn take_chunk(kind: u16, mut body: &[u8], expected: &mut Expected) -> Result<(), NbdError> {
    let short = |_| NbdError::Protocol("a reply chunk is too short");
    match kind {
        reply_chunk::NONE => {}
        reply_chunk::OFFSET_HOLE => {
            let offset = body.try_get_u64().map_err(short)?;
            let len = body.try_get_u32().map_err(short)?;
            expected.part(offset, u64::from(len))?.fill(0);
        }
        reply_chunk::BLOCK_STATUS => {
            // Only one context was negotiated.
            body.try_get_u32().map_err(short)?;
            while body.has_remaining() {
                let len = u64::from(body.try_get_u32().map_err(short)?);
                let zero = body.try_get_u32().map_err(short)? & STATE_ZERO != 0;
                expected.extents.push(Extent { len, zero });
            }
        }
        kind if kind & reply_chunk::ERROR_BIT != 0 => {
            expected.errno = body.try_get_u32().map_err(short)?.max(1);
        }
        _ => return Err(NbdError::Protocol("a reply chunk has an unknown type")),
    }
    Ok(())
}
