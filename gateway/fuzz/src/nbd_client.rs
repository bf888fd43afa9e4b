//! The NBD client that reads and writes QEMU's disks: option replies and answers of any bytes.
//!
//! A read gives as many bytes as were asked for or fails; a block status covers no more than was asked for.

use std::time::Duration;

use bytes::Bytes;
use gateway::disk::nbd::NbdClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const READ: u32 = 16;

/// Sends `data` as everything a server says, then closes.
pub fn run(data: &[u8]) {
    on_runtime(async {
        let Ok((client, server)) = UnixStream::pair() else { return };
        let (mut reader, mut writer) = server.into_split();
        let say = async move {
            // The client may close before all is said.
            let _ = writer.write_all(data).await;
        };
        let hear = async move {
            let mut heard = Vec::new();
            let _ = reader.read_to_end(&mut heard).await;
        };
        tokio::join!(say, hear, ask(client));
    });
}

/// Everything a client can ask, at the same time; answered or not, it comes to an end.
async fn ask(stream: UnixStream) {
    let Ok(client) = NbdClient::over(stream, "disk0").await else { return };
    let (read, extents, written, zeroed, flushed) = tokio::join!(
        client.read(512, READ),
        client.block_status(0, 65536),
        client.write(512, Bytes::from_static(b"contents")),
        client.write_zeroes(0, 4096),
        client.flush(),
    );
    assert!(read.is_err() || read.is_ok_and(|read| read.len() == READ as usize));
    assert!(extents.is_err() || extents.is_ok_and(|extents| !extents.is_empty()));
    drop((written, zeroed, flushed));
}

/// Runs `work` to its end. Work that waits for nothing that will come is a hang, and panics.
pub(crate) fn on_runtime(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime needs two file descriptors");
    runtime.block_on(async {
        let done = tokio::time::timeout(Duration::from_secs(10), work).await;
        assert!(done.is_ok(), "waits for ever");
    });
}

/// What servers say: with simple replies, and with structured ones.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let greeting = [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat();
    let export = [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0, 0x65]].concat();
    let sizes =
        [&[0, 3][..], &1u32.to_be_bytes(), &4096u32.to_be_bytes(), &(2u32 << 20).to_be_bytes()].concat();
    let going = [reply(7, 3, &export), reply(7, 3, &sizes), reply(7, 1, b"")].concat();
    let mut simple = [greeting.clone(), reply(8, 0x8000_0001, b""), going.clone()].concat();
    for cookie in 1..=4u64 {
        let head = [&0x6744_6698u32.to_be_bytes()[..], &0u32.to_be_bytes(), &cookie.to_be_bytes()].concat();
        simple.extend(head);
        if cookie == 1 {
            simple.extend([7; READ as usize]);
        }
    }
    let context = [&1u32.to_be_bytes()[..], b"base:allocation"].concat();
    let contexts = [reply(8, 1, b""), reply(10, 4, &context), reply(10, 1, b"")].concat();
    let mut structured = [greeting, contexts, going].concat();
    let half = [&512u64.to_be_bytes()[..], &[9; 8]].concat();
    let hole = [&520u64.to_be_bytes()[..], &8u32.to_be_bytes()].concat();
    let status = [1u32, 4096, 2, 61440, 0].map(u32::to_be_bytes).concat();
    structured.extend(chunk(0, 1, 1, &half));
    structured.extend(chunk(1, 2, 1, &hole));
    structured.extend(chunk(1, 5, 2, &status));
    structured.extend(chunk(1, 0, 3, b""));
    structured.extend(chunk(1, 0x8001, 4, &[0, 0, 0, 28, 0, 0]));
    structured.extend(chunk(1, 0, 5, b""));
    vec![("simple", simple), ("structured", structured)]
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let head = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()];
    [&head.concat()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn chunk(flags: u16, kind: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
    let head = [&0x668e_33efu32.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes()].concat();
    [&head[..], &cookie.to_be_bytes(), &(body.len() as u32).to_be_bytes(), body].concat()
}
