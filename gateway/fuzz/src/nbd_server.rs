//! The NBD server that QEMU's mirror writes into: options and requests of any bytes.
//!
//! Every change it hands on lies within the export.

use gateway::disk::nbd::{GuestChange, NbdExport, serve_connection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::nbd_client::on_runtime;

const SIZE: u64 = 1 << 20;

/// Sends `data` as everything a client says.
pub fn run(data: &[u8]) {
    on_runtime(async {
        let Ok((client, server)) = UnixStream::pair() else { return };
        let (changes, mut received) = mpsc::channel(4);
        let exports = [NbdExport { name: "disk0".to_owned(), size: SIZE, changes }];
        let (mut reader, mut writer) = client.into_split();
        let say = async move {
            // It may close before all is said.
            let _ = writer.write_all(data).await;
        };
        let hear = async move {
            let mut heard = Vec::new();
            let _ = reader.read_to_end(&mut heard).await;
        };
        let serve = async move {
            let _ = serve_connection(server, &exports).await;
        };
        let check = async move {
            while let Some(change) = received.recv().await {
                check_change(&change);
            }
        };
        tokio::join!(say, hear, serve, check);
    });
}

fn check_change(change: &GuestChange) {
    let (offset, len) = match change {
        GuestChange::Write { offset, data } => (*offset, data.len() as u64),
        GuestChange::Zero { offset, len } | GuestChange::Trim { offset, len } => (*offset, *len),
        GuestChange::Flush => (0, 0),
    };
    assert!(offset.checked_add(len).is_some_and(|end| end <= SIZE));
}

/// What clients say: by `GO` with every request, and by the old `EXPORT_NAME`.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut go = 3u32.to_be_bytes().to_vec();
    go.extend(option(3, b""));
    go.extend(option(6, b"\0\0\0\x05disk0\0\0"));
    go.extend(option(7, b"\0\0\0\x05disk0\0\x01\0\x03"));
    go.extend(request(1, 1, 4096, 8));
    go.extend(b"contents");
    for (command, cookie) in [(0, 2), (3, 3), (4, 4), (6, 5), (7, 6)] {
        go.extend(request(command, cookie, 512, 512));
    }
    go.extend(request(2, 7, 0, 0));
    let mut old = 1u32.to_be_bytes().to_vec();
    old.extend(option(1, b"disk0"));
    old.extend(request(6, 1, 0, SIZE as u32));
    old.extend(request(4, 2, SIZE, 1));
    vec![("go", go), ("export-name", old)]
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let head = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes()].concat();
    [&head, data].concat()
}

fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let head = [&0x2560_9513u32.to_be_bytes()[..], &[0, 0], &command.to_be_bytes()].concat();
    [&head[..], &cookie.to_be_bytes(), &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}
