//! An NBD server that QEMU's mirror writes into. It keeps nothing: every change goes to the export's
//! channel, and the reply leaves as soon as the channel took it.
//!
//! Reads are refused, because nothing is stored here; QEMU's mirror never reads its target. A write is
//! answered before it is durable anywhere: the barrier, not the reply, makes a destination believable.
//!
//! ```text
//!  accept ─▶ greeting ─▶ options ──GO, EXPORT_NAME──▶ requests ──DISC, end of file──▶ closed
//!                           │ ABORT
//!                           └──────▶ closed
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::{
    FIXED_NEWSTYLE, NBD_MAGIC, NO_ZEROES, NbdError, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC, command, errno, export_flag, info, option, option_reply,
};

/// The largest write accepted in bytes; QEMU splits larger ones because it is told.
pub const MAX_REQUEST: u32 = 2 << 20;
/// Connections served at the same time. QEMU needs one per disk.
pub const MAX_CONNECTIONS: usize = 16;

const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
const MAX_OPTION: u32 = 8 << 10;
const PREFERRED_BLOCK: u32 = 64 << 10;
const FLAGS: u16 = export_flag::HAS_FLAGS
    | export_flag::SEND_FLUSH
    | export_flag::SEND_TRIM
    | export_flag::SEND_WRITE_ZEROES;

/// What QEMU's mirror did to its target. Ranges lie within the export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestChange {
    /// `data` at byte `offset`.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: Bytes,
    },
    /// `len` bytes of zero.
    Zero {
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// `len` bytes whose content no longer matters.
    Trim {
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// What was written is to become durable.
    Flush,
}

/// A disk to mirror into.
#[derive(Debug, Clone)]
pub struct NbdExport {
    /// The export's name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Where its changes go. Must be emptied promptly: a full channel delays QEMU's reply.
    pub changes: mpsc::Sender<GuestChange>,
}

/// A listening server; dropping it closes all its connections and removes the socket.
#[derive(Debug)]
pub struct NbdServer {
    path: PathBuf,
    accepting: JoinHandle<()>,
}

impl NbdServer {
    /// Listens on a new UNIX socket. Whoever runs QEMU under another uid gives it the socket.
    pub fn bind(path: &Path, exports: Vec<NbdExport>) -> Result<Self, NbdError> {
        let socket = |source| NbdError::Socket { path: path.display().to_string(), source };
        let listener = UnixListener::bind(path).map_err(socket)?;
        let accepting = tokio::spawn(accept(listener, exports.into()));
        Ok(Self { path: path.to_owned(), accepting })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.accepting.abort();
        // The socket may be gone with its directory already.
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn accept(listener: UnixListener, exports: Arc<[NbdExport]>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve(stream, exports.clone()));
                }
                // The queue is still there: without descriptors it would be asked again without a pause.
                Err(error) => {
                    tracing::warn!(%error, "NBD connection not accepted");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(stream: UnixStream, exports: Arc<[NbdExport]>) {
    match serve_connection(stream, &exports).await {
        Ok(()) => tracing::debug!("NBD connection ended"),
        Err(error) => tracing::warn!(%error, "NBD connection ended"),
    }
}

/// Serves one client, from the greeting to its leave.
pub async fn serve_connection(stream: UnixStream, exports: &[NbdExport]) -> Result<(), NbdError> {
    let (reader, writer) = stream.into_split();
    let mut connection = Connection { reader: BufReader::with_capacity(256 << 10, reader), writer };
    match connection.negotiate(exports).await? {
        Some(export) => connection.requests(export).await,
        None => Ok(()),
    }
}

struct Connection {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

struct Request {
    command: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

impl Connection {
    async fn negotiate<'a>(&mut self, exports: &'a [NbdExport]) -> Result<Option<&'a NbdExport>, NbdError> {
        let mut greeting = BytesMut::new();
        greeting.put_u64(NBD_MAGIC);
        greeting.put_u64(OPTION_MAGIC);
        greeting.put_u16(FIXED_NEWSTYLE | NO_ZEROES);
        self.writer.write_all(&greeting).await?;
        let client_flags = self.reader.read_u32().await?;
        let no_zeroes = client_flags & u32::from(NO_ZEROES) != 0;
        if client_flags & u32::from(FIXED_NEWSTYLE) == 0 {
            return Err(NbdError::Protocol("the client does not speak fixed newstyle"));
        }
        loop {
            let (option, data) = self.read_option().await?;
            match option {
                option::GO | option::INFO => {
                    let found = self.describe(option, data, exports).await?;
                    if found.is_some() && option == option::GO {
                        return Ok(found);
                    }
                }
                option::EXPORT_NAME => return self.name_export(&data, no_zeroes, exports).await.map(Some),
                option::LIST => self.list(exports).await?,
                option::ABORT => {
                    self.reply_option(option, option_reply::ACK, &[]).await?;
                    return Ok(None);
                }
                _ => self.reply_option(option, option_reply::ERR_UNSUP, &[]).await?,
            }
        }
    }

    async fn read_option(&mut self) -> Result<(u32, Bytes), NbdError> {
        if self.reader.read_u64().await? != OPTION_MAGIC {
            return Err(NbdError::Protocol("an option has a wrong magic"));
        }
        let option = self.reader.read_u32().await?;
        let len = self.reader.read_u32().await?;
        if len > MAX_OPTION {
            return Err(NbdError::Protocol("an option is too long"));
        }
        let mut data = vec![0; len as usize];
        self.reader.read_exact(&mut data).await?;
        Ok((option, data.into()))
    }

    async fn reply_option(&mut self, option: u32, reply: u32, data: &[u8]) -> Result<(), NbdError> {
        let mut out = BytesMut::with_capacity(20 + data.len());
        out.put_u64(OPTION_REPLY_MAGIC);
        out.put_u32(option);
        out.put_u32(reply);
        out.put_u32(data.len() as u32);
        out.put_slice(data);
        Ok(self.writer.write_all(&out).await?)
    }

    /// Answers GO and INFO; the export, if it is one of ours.
    async fn describe<'a>(
        &mut self,
        option: u32,
        mut data: Bytes,
        exports: &'a [NbdExport],
    ) -> Result<Option<&'a NbdExport>, NbdError> {
        let name_len = data.try_get_u32().unwrap_or(u32::MAX) as usize;
        if name_len > data.len() {
            self.reply_option(option, option_reply::ERR_INVALID, &[]).await?;
            return Ok(None);
        }
        let name = data.split_to(name_len);
        let Some(export) = exports.iter().find(|export| export.name.as_bytes() == name) else {
            self.reply_option(option, option_reply::ERR_UNKNOWN, &[]).await?;
            return Ok(None);
        };
        let mut description = BytesMut::new();
        description.put_u16(info::EXPORT);
        description.put_u64(export.size);
        description.put_u16(FLAGS);
        self.reply_option(option, option_reply::INFO, &description).await?;
        let mut sizes = BytesMut::new();
        sizes.put_u16(info::BLOCK_SIZE);
        for size in [1, PREFERRED_BLOCK, MAX_REQUEST] {
            sizes.put_u32(size);
        }
        self.reply_option(option, option_reply::INFO, &sizes).await?;
        self.reply_option(option, option_reply::ACK, &[]).await?;
        Ok(Some(export))
    }

    async fn name_export<'a>(
        &mut self,
        name: &[u8],
        no_zeroes: bool,
        exports: &'a [NbdExport],
    ) -> Result<&'a NbdExport, NbdError> {
        // This option has no reply for an error: the connection closes.
        let export = exports.iter().find(|export| export.name.as_bytes() == name);
        let export = export.ok_or(NbdError::Protocol("the client asked for an unknown export"))?;
        let mut out = BytesMut::new();
        out.put_u64(export.size);
        out.put_u16(FLAGS);
        out.put_bytes(0, if no_zeroes { 0 } else { 124 });
        self.writer.write_all(&out).await?;
        Ok(export)
    }

    async fn list(&mut self, exports: &[NbdExport]) -> Result<(), NbdError> {
        for export in exports {
            let mut data = BytesMut::new();
            data.put_u32(export.name.len() as u32);
            data.put_slice(export.name.as_bytes());
            self.reply_option(option::LIST, option_reply::SERVER, &data).await?;
        }
        self.reply_option(option::LIST, option_reply::ACK, &[]).await
    }

    async fn requests(&mut self, export: &NbdExport) -> Result<(), NbdError> {
        while let Some(request) = self.read_request().await? {
            let error = match self.change(&request, export.size).await? {
                Ok(change) => match export.changes.send(change).await {
                    Ok(()) => 0,
                    Err(_) => errno::ESHUTDOWN,
                },
                Err(error) => error,
            };
            let mut reply = [0; 16];
            reply[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
            reply[4..8].copy_from_slice(&error.to_be_bytes());
            reply[8..].copy_from_slice(&request.cookie.to_be_bytes());
            self.writer.write_all(&reply).await?;
        }
        Ok(())
    }

    /// The next request, or `None` at the end of the connection.
    async fn read_request(&mut self) -> Result<Option<Request>, NbdError> {
        let mut header = [0; 28];
        match self.reader.read_exact(&mut header).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let mut header = &header[..];
        if header.get_u32() != REQUEST_MAGIC {
            return Err(NbdError::Protocol("a request has a wrong magic"));
        }
        let _flags = header.get_u16();
        let command = header.get_u16();
        let (cookie, offset, len) = (header.get_u64(), header.get_u64(), header.get_u32());
        let request = Request { command, cookie, offset, len };
        Ok((request.command != command::DISC).then_some(request))
    }

    /// What the request changes, or the error number of the answer. Takes the payload in any case.
    async fn change(&mut self, request: &Request, size: u64) -> Result<Result<GuestChange, u32>, NbdError> {
        let Request { command, offset, len, .. } = *request;
        let mut data = Vec::new();
        if command == command::WRITE {
            if len > MAX_REQUEST {
                return Err(NbdError::Protocol("a write is larger than was agreed"));
            }
            data.resize(len as usize, 0);
            self.reader.read_exact(&mut data).await?;
        }
        let len = u64::from(len);
        let inside = offset.checked_add(len).is_some_and(|end| end <= size);
        Ok(match command {
            command::FLUSH => Ok(GuestChange::Flush),
            command::READ => Err(errno::EPERM),
            command::WRITE | command::WRITE_ZEROES if !inside => Err(errno::ENOSPC),
            command::TRIM if !inside => Err(errno::EINVAL),
            command::WRITE => Ok(GuestChange::Write { offset, data: data.into() }),
            command::WRITE_ZEROES => Ok(GuestChange::Zero { offset, len }),
            command::TRIM => Ok(GuestChange::Trim { offset, len }),
            _ => Err(errno::EINVAL),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::NbdClient;
    use super::*;

    struct Fixture {
        directory: tempfile::TempDir,
        _server: NbdServer,
        changes: mpsc::Receiver<GuestChange>,
    }

    impl Fixture {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let (sender, changes) = mpsc::channel(4);
            let export = NbdExport { name: "disk0".to_owned(), size: 1 << 20, changes: sender };
            let server = NbdServer::bind(&directory.path().join("nbd"), vec![export]).unwrap();
            Self { directory, _server: server, changes }
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join("nbd")
        }
    }

    /// The error number of a refused request.
    fn errno_of<T: std::fmt::Debug>(result: Result<T, NbdError>) -> u32 {
        match result {
            Err(NbdError::Request { errno, .. }) => errno,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn changes_arrive_in_order_and_are_answered() {
        let mut fixture = Fixture::new();
        let client = NbdClient::connect(&fixture.path(), "disk0").await.unwrap();
        assert_eq!((client.size(), client.max_request(), client.can_flush()), (1 << 20, MAX_REQUEST, true));
        client.write(4096, Bytes::from_static(b"abc")).await.unwrap();
        client.write_zeroes(0, 1 << 20).await.unwrap();
        client.trim(65536, 512).await.unwrap();
        client.flush().await.unwrap();
        let expected = [
            GuestChange::Write { offset: 4096, data: Bytes::from_static(b"abc") },
            GuestChange::Zero { offset: 0, len: 1 << 20 },
            GuestChange::Trim { offset: 65536, len: 512 },
            GuestChange::Flush,
        ];
        for change in expected {
            assert_eq!(fixture.changes.recv().await, Some(change));
        }
    }

    #[tokio::test]
    async fn reads_and_writes_beyond_the_end_are_refused() {
        let fixture = Fixture::new();
        let client = NbdClient::connect(&fixture.path(), "disk0").await.unwrap();
        assert_eq!(errno_of(client.read(0, 512).await), errno::EPERM);
        assert_eq!(errno_of(client.write((1 << 20) - 1, Bytes::from_static(b"ab")).await), errno::ENOSPC);
        assert_eq!(errno_of(client.write_zeroes(u64::MAX - 5, 3).await), errno::ENOSPC);
        assert_eq!(errno_of(client.trim(1 << 20, 1).await), errno::EINVAL);
        client.write((1 << 20) - 2, Bytes::from_static(b"ab")).await.unwrap();
    }

    #[tokio::test]
    async fn the_largest_write_is_taken_and_a_larger_one_ends_the_connection() {
        let mut fixture = Fixture::new();
        let (sender, mut changes) = mpsc::channel(4);
        let export = NbdExport { name: "large".to_owned(), size: 1 << 30, changes: sender };
        let path = fixture.directory.path().join("large");
        let _server = NbdServer::bind(&path, vec![export]).unwrap();
        let client = NbdClient::connect(&path, "large").await.unwrap();
        client.write(0, vec![1; MAX_REQUEST as usize].into()).await.unwrap();
        assert!(changes.recv().await.is_some());
        assert!(client.write(0, vec![1; MAX_REQUEST as usize + 1].into()).await.is_err());
        assert!(changes.try_recv().is_err() && fixture.changes.try_recv().is_err());
    }

    #[tokio::test]
    async fn an_unknown_export_is_refused_and_the_others_are_still_served() {
        let fixture = Fixture::new();
        let refused = NbdClient::connect(&fixture.path(), "other").await;
        assert!(matches!(refused, Err(NbdError::Refused { .. })), "{refused:?}");
        NbdClient::connect(&fixture.path(), "disk0").await.unwrap();
    }

    #[tokio::test]
    async fn without_a_mirror_behind_it_the_server_answers_with_an_error() {
        let Fixture { directory, _server, changes } = Fixture::new();
        drop(changes);
        let client = NbdClient::connect(&directory.path().join("nbd"), "disk0").await.unwrap();
        assert_eq!(errno_of(client.flush().await), errno::ESHUTDOWN);
    }

    #[tokio::test]
    async fn the_old_way_to_name_an_export_and_the_list_work() {
        let fixture = Fixture::new();
        let mut stream = UnixStream::connect(fixture.path()).await.unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await.unwrap();
        let mut out = BytesMut::new();
        out.put_u32(u32::from(FIXED_NEWSTYLE));
        for (option, data) in [(option::LIST, &b""[..]), (option::EXPORT_NAME, b"disk0")] {
            out.put_u64(OPTION_MAGIC);
            out.put_u32(option);
            out.put_u32(data.len() as u32);
            out.put_slice(data);
        }
        stream.write_all(&out).await.unwrap();
        let mut list = [0; 29 + 20];
        stream.read_exact(&mut list).await.unwrap();
        assert_eq!((&list[20..24], &list[24..29]), (&5u32.to_be_bytes()[..], &b"disk0"[..]));
        let mut export = [0; 10 + 124];
        stream.read_exact(&mut export).await.unwrap();
        assert_eq!(export[..8], (1u64 << 20).to_be_bytes());
    }

    #[tokio::test]
    async fn garbage_ends_the_connection_and_not_the_server() {
        let fixture = Fixture::new();
        let mut stream = UnixStream::connect(fixture.path()).await.unwrap();
        stream.write_all(&[0xFF; 4096]).await.unwrap();
        let mut rest = Vec::new();
        // The server may reset instead of closing, because it leaves bytes unread.
        let _ = stream.read_to_end(&mut rest).await;
        NbdClient::connect(&fixture.path(), "disk0").await.unwrap();
    }
}
