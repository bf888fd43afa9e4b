//! The two ends alone, with sockets in the place of QEMU: limits, deadlines and who may close what.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use gateway::chunk::{ChunkRecv, ChunkSend, MAX_CHUNK};
use gateway::memory::{
    MemoryEnd, MemorySource, MemoryTarget, SourceConfig, SourceError, SourceHandle, SourceMode, TargetConfig,
};
use gateway::naming::NoDisk;
use longhaul_core::units::Bytes as ByteCount;
use longhaul_core::wan::{DecodeError, Decoded, EncoderConfig, StreamDecoder, StreamEncoder};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use crate::machine::PATIENCE;
use crate::queue::{Damage, QueueRecv, QueueSend, Valve, queue};

/// Bytes that are no migration stream and do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn prompt() -> SourceConfig {
    SourceConfig { first_read_after: Duration::ZERO, ..SourceConfig::default() }
}

struct SourceSide {
    handle: SourceHandle,
    qemu: UnixStream,
    recv: QueueRecv,
    valve: Valve,
    path: PathBuf,
    _dir: TempDir,
}

/// Pages that both ends remember.
const SHADOW_PAGES: u32 = 1 << 12;

async fn source(config: SourceConfig, window: usize) -> SourceSide {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("out");
    let (send, recv, valve) = queue(window);
    let handle = MemorySource::bind(&path, config).expect("the socket is made").start(send);
    let qemu = UnixStream::connect(&path).await.expect("the source listens");
    SourceSide { handle, qemu, recv, valve, path, _dir: dir }
}

/// Writes until nothing was taken for a while; how much was.
async fn write_until_it_blocks(qemu: &mut UnixStream, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match timeout(Duration::from_millis(500), qemu.write(&bytes[written..])).await {
            Ok(wrote) => written += wrote.expect("the source lives"),
            Err(_) => return written,
        }
    }
    written
}

async fn decoded(recv: &mut QueueRecv, len: usize) -> Vec<u8> {
    go_on_decoding(&mut StreamDecoder::new(SHADOW_PAGES).expect("zstd starts"), recv, len).await
}

async fn go_on_decoding(decoder: &mut StreamDecoder, recv: &mut QueueRecv, len: usize) -> Vec<u8> {
    let mut stream = Vec::new();
    while stream.len() < len {
        let chunk = timeout(PATIENCE, recv.recv()).await.expect("in time").expect("a chunk");
        decoder.handle_chunk(chunk);
        while let Some(Decoded::Bytes(bytes)) = decoder.poll_decoded().expect("it decodes") {
            stream.extend_from_slice(&bytes);
        }
    }
    stream
}

#[tokio::test]
async fn what_qemu_wrote_leaves_when_it_pauses() {
    let mut side = source(prompt(), 4).await;
    side.qemu.write_all(b"not a migration stream").await.expect("taken");
    assert_eq!(decoded(&mut side.recv, 22).await, b"not a migration stream");
}

#[tokio::test]
async fn a_full_channel_slows_qemu_down_and_absorbing_does_not() {
    let bytes = noise(40 << 20);
    let mut side = source(prompt(), 2).await;
    side.valve.set_open(false);
    let taken = write_until_it_blocks(&mut side.qemu, &bytes).await;
    assert!((2 << 20..=6 << 20).contains(&taken), "{taken} bytes");
    side.handle.set_mode(SourceMode::Absorb);
    side.qemu.write_all(&bytes[taken..]).await.expect("all taken");
    drop(side.qemu);
    side.valve.set_open(true);
    assert!(decoded(&mut side.recv, bytes.len()).await == bytes);
    let end = side.handle.ended().await.expect("sent");
    assert_eq!(end.bytes, ByteCount(bytes.len() as u64));
    assert!(matches!(side.handle.ended().await, Err(SourceError::Aborted)), "told once");
}

#[tokio::test]
async fn chunks_are_short_once_qemu_must_not_wait() {
    let bytes = noise(8 << 20);
    let mut side = source(prompt(), 64).await;
    side.handle.set_mode(SourceMode::Absorb);
    side.qemu.write_all(&bytes).await.expect("all taken");
    drop(side.qemu);
    side.handle.ended().await.expect("sent");
    let mut decoder = StreamDecoder::new(SHADOW_PAGES).expect("zstd starts");
    let (mut stream, mut ended) = (0, false);
    while !ended {
        let chunk = timeout(PATIENCE, side.recv.recv()).await.expect("in time").expect("a chunk");
        assert!(chunk.len() <= SourceConfig::default().chunk_in_pause, "{} bytes", chunk.len());
        decoder.handle_chunk(chunk);
        while let Some(decoded) = decoder.poll_decoded().expect("in order") {
            match decoded {
                Decoded::Bytes(bytes) => stream += bytes.len(),
                Decoded::End(_) => ended = true,
                Decoded::Disks(_) | Decoded::Wanted(_) => panic!("nothing is named by disks"),
            }
        }
    }
    assert_eq!(stream, bytes.len());
}

#[tokio::test]
async fn it_is_seen_when_a_qemu_that_slept_has_woken() {
    let mut side = source(prompt(), 4).await;
    assert_eq!(side.handle.woke(), None);
    side.qemu.write_all(b"not a migration stream").await.expect("taken");
    assert_eq!(decoded(&mut side.recv, 22).await, b"not a migration stream");
    let first = side.handle.woke().expect("it has written");
    // As long as QEMU sleeps at the most.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(side.handle.woke(), Some(first), "it has not written since");
    let wakes = side.handle.wakes();
    side.qemu.write_all(b", and more").await.expect("taken");
    timeout(PATIENCE, wakes).await.expect("it is awake");
    assert!(side.handle.woke().is_some_and(|woke| woke - first >= Duration::from_millis(100)));
}

#[tokio::test]
async fn a_source_that_listens_hears_qemu_once_and_lets_it_write_no_more_than_a_socket_holds() {
    let bytes = noise(4 << 20);
    let mut side = source(prompt(), 64).await;
    side.qemu.write_all(&bytes[..100]).await.expect("taken");
    let mut progress = side.handle.progress();
    let read = timeout(PATIENCE, progress.wait_for(|progress| progress.original == ByteCount(100)));
    read.await.expect("it is read").expect("the source lives");
    let wakes = side.handle.wakes();
    side.handle.set_mode(SourceMode::Listening);
    let taken = 100 + write_until_it_blocks(&mut side.qemu, &bytes[100..]).await;
    assert!(taken < 512 << 10, "{taken} bytes");
    timeout(PATIENCE, wakes).await.expect("it is heard");
    side.handle.set_mode(SourceMode::Absorb);
    let (wrote, stream) = tokio::join!(
        async { side.qemu.write_all(&bytes[taken..]).await.map(|()| drop(side.qemu)) },
        decoded(&mut side.recv, bytes.len()),
    );
    wrote.expect("all taken");
    assert!(stream == bytes);
}

#[tokio::test]
async fn a_source_that_holds_sends_what_it_has_read_and_makes_qemu_wait_until_the_guest_stops() {
    let bytes = noise(4 << 20);
    let mut side = source(prompt(), 4).await;
    side.qemu.write_all(&bytes[..100]).await.expect("taken");
    let mut progress = side.handle.progress();
    let read = timeout(PATIENCE, progress.wait_for(|progress| progress.original == ByteCount(100)));
    read.await.expect("it is read").expect("the source lives");
    side.handle.set_mode(SourceMode::Held);
    let taken = 100 + write_until_it_blocks(&mut side.qemu, &bytes[100..]).await;
    assert!(taken < 1 << 20, "{taken} bytes: no more than a socket holds");
    let mut decoder = StreamDecoder::new(SHADOW_PAGES).expect("zstd starts");
    assert_eq!(go_on_decoding(&mut decoder, &mut side.recv, 100).await, bytes[..100]);
    assert_eq!(side.handle.progress().borrow().original, ByteCount(100));
    side.handle.set_mode(SourceMode::Absorb);
    let (wrote, stream) = tokio::join!(
        async { side.qemu.write_all(&bytes[taken..]).await.map(|()| drop(side.qemu)) },
        go_on_decoding(&mut decoder, &mut side.recv, bytes.len() - 100),
    );
    wrote.expect("all taken");
    assert!(stream == bytes[100..]);
}

#[tokio::test]
async fn absorbing_ends_at_its_limit_and_goes_on_when_there_is_room() {
    let bytes = noise(20 << 20);
    let config = SourceConfig { absorb_limit: ByteCount::mib(8), ..prompt() };
    let mut side = source(config, 2).await;
    side.valve.set_open(false);
    side.handle.set_mode(SourceMode::Absorb);
    let taken = write_until_it_blocks(&mut side.qemu, &bytes).await;
    assert!((8 << 20..=14 << 20).contains(&taken), "{taken} bytes");
    side.valve.set_open(true);
    let (wrote, stream) = tokio::join!(
        async { side.qemu.write_all(&bytes[taken..]).await.map(|()| drop(side.qemu)) },
        decoded(&mut side.recv, bytes.len()),
    );
    wrote.expect("all taken");
    assert!(stream == bytes);
}

#[tokio::test]
async fn a_stream_that_ends_inside_the_memory_gets_no_proof() {
    let mut side = source(prompt(), 4).await;
    side.qemu.write_all(b"QEVM\0\0\0\x03\x07\0\0\0\x0dpc-i440fx-7.2").await.expect("taken");
    drop(side.qemu);
    let end = side.handle.ended().await;
    assert!(matches!(end, Err(SourceError::Truncated(_))), "{end:?}");
    side.handle.abort();
    assert_eq!(timeout(PATIENCE, side.recv.recv()).await.expect("closed"), None);
}

#[tokio::test]
async fn aborting_closes_the_socket_and_the_name_is_gone() {
    let mut side = source(prompt(), 4).await;
    side.handle.progress().wait_for(|progress| progress.connected).await.expect("the source lives");
    assert!(!side.path.exists());
    side.handle.abort();
    let closed = timeout(PATIENCE, side.qemu.read(&mut [0])).await.expect("in time");
    assert_eq!(closed.expect("an end"), 0);
}

#[tokio::test]
async fn a_closed_channel_fails_qemus_migration() {
    let mut side = source(prompt(), 4).await;
    drop(side.recv);
    side.qemu.write_all(b"not a migration stream").await.expect("taken");
    let end = timeout(PATIENCE, side.handle.ended()).await.expect("in time");
    assert!(matches!(end, Err(SourceError::ChannelClosed(_))), "{end:?}");
    assert_eq!(side.qemu.read(&mut [0]).await.expect("an end"), 0);
}

#[tokio::test]
async fn qemu_has_until_the_deadline_to_connect() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = SourceConfig { accept_deadline: Duration::from_millis(20), ..SourceConfig::default() };
    let (send, _recv, _valve) = queue(1);
    let mut handle = MemorySource::bind(&dir.path().join("out"), config).expect("a socket").start(send);
    let end = timeout(PATIENCE, handle.ended()).await.expect("in time");
    assert!(matches!(end, Err(SourceError::NotConnected(_))), "{end:?}");
}

#[tokio::test]
async fn a_socket_left_by_a_crash_is_replaced_and_a_file_is_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("out");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
    assert!(path.exists());
    drop(MemorySource::bind(&path, SourceConfig::default()).expect("replaced"));
    assert!(!path.exists(), "dropped before it was used");
    std::fs::write(&path, "precious").expect("a file");
    let refused = MemorySource::bind(&path, SourceConfig::default());
    assert!(matches!(refused, Err(SourceError::Bind { .. })));
    assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
}

/// The chunks of a stream, and the stream's end.
fn chunks_of(stream: &[u8]) -> Vec<Bytes> {
    let config = EncoderConfig { shadow_pages: SHADOW_PAGES, ..EncoderConfig::for_chunks_of(MAX_CHUNK) };
    let mut encoder = StreamEncoder::new(config).expect("zstd starts");
    encoder.handle_bytes(stream);
    encoder.handle_flush();
    encoder.handle_end();
    std::iter::from_fn(|| encoder.poll_chunk()).collect()
}

fn target(path: &Path, recv: QueueRecv) -> gateway::memory::TargetHandle {
    let config = TargetConfig { shadow_pages: SHADOW_PAGES, ..TargetConfig::default() };
    MemoryTarget::start(path.to_owned(), recv, config, None, Vec::<NoDisk>::new())
}

async fn send_all(send: &mut QueueSend, chunks: &[Bytes]) {
    for chunk in chunks {
        send.send(chunk.clone()).await.expect("the target lives");
    }
}

#[tokio::test]
async fn the_last_byte_waits_for_the_proof() {
    let dir = tempfile::tempdir().expect("a directory");
    let listener = UnixListener::bind(dir.path().join("in")).expect("a socket");
    let (mut send, recv, _valve) = queue(8);
    let mut handle = target(&dir.path().join("in"), recv);
    let (mut qemu, _) = listener.accept().await.expect("the target connects");
    let chunks = chunks_of(b"anything");
    let (proof, stream) = chunks.split_last().expect("two chunks");
    send_all(&mut send, stream).await;
    let mut read = [0; 7];
    qemu.read_exact(&mut read).await.expect("all but one byte");
    assert_eq!(&read, b"anythin");
    assert!(qemu.try_read(&mut [0]).is_err(), "nothing more");
    send_all(&mut send, std::slice::from_ref(proof)).await;
    let mut rest = Vec::new();
    timeout(PATIENCE, qemu.read_to_end(&mut rest)).await.expect("in time").expect("the end");
    assert_eq!(rest, b"g");
    let end = handle.ended().await;
    assert!(matches!(end, MemoryEnd::Proven(end) if end.bytes.0 == 8), "{end:?}");
    assert!(matches!(handle.ended().await, MemoryEnd::Aborted), "told once");
    while send.unacknowledged() > 0 {
        tokio::task::yield_now().await;
    }
}

const PAGE: usize = 4096;
/// What comes before the first page's contents: `migration/savevm.c` and `migration/ram.c` of QEMU 7.2.
const BEFORE_PAGES: &[u8] =
    b"QEVM\0\0\0\x03\x07\0\0\0\x0dpc-i440fx-7.2\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\
    \0\0\0\0\x10\0\0\x04\x06pc.ram\0\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x03\0\0\0\x02";

/// A machine of `pages` pages, all of them noise.
fn noisy_memory(pages: usize) -> Vec<u8> {
    let mut stream = BEFORE_PAGES.to_vec();
    for (number, page) in noise(pages * PAGE).chunks(PAGE).enumerate() {
        let flags = if number == 0 { 0x8 } else { 0x28 };
        stream.extend(((number * PAGE) as u64 | flags).to_be_bytes());
        stream.extend_from_slice(if number == 0 { b"\x06pc.ram" } else { b"" });
        stream.extend_from_slice(page);
    }
    stream.extend(0x10u64.to_be_bytes());
    stream.extend(b"\x7e\0\0\0\x02\x04\0\0\0\x05device state");
    stream
}

#[tokio::test]
async fn a_damaged_page_is_named_and_qemu_gets_nothing_of_its_batch() {
    let dir = tempfile::tempdir().expect("a directory");
    let listener = UnixListener::bind(dir.path().join("in")).expect("a socket");
    let (mut send, mut recv, _valve) = queue(8);
    // Noise travels as it is, so that the bit is one of a page.
    recv.damage = Damage::Chunk(1);
    let mut handle = target(&dir.path().join("in"), recv);
    let (mut qemu, _) = listener.accept().await.expect("the target connects");
    let reading = tokio::spawn(async move {
        let mut read = Vec::new();
        qemu.read_to_end(&mut read).await.map(|_| read)
    });
    let stream = noisy_memory(512);
    send_all(&mut send, &chunks_of(&stream)).await;
    let end = timeout(PATIENCE, handle.ended()).await.expect("in time");
    handle.abort();
    let read = timeout(PATIENCE, reading).await.expect("in time").expect("no panic").expect("the end");
    let MemoryEnd::Mismatch(DecodeError::Damaged { start, end, pages, .. }) = end else { panic!("{end:?}") };
    assert!(read.len() as u64 == start.0 - 1 && stream.starts_with(&read), "{} of {start:?}", read.len());
    let first_record = BEFORE_PAGES.len() + b"\x06pc.ram".len();
    let address = |at: ByteCount| (at.0 as usize - first_record) / (8 + PAGE) * PAGE;
    assert_eq!(pages.to_string(), format!("pc.ram, {:#x} to {:#x}", address(start), address(end)));
}

#[tokio::test]
async fn a_channel_closed_early_leaves_qemus_socket_open_until_the_handle_goes() {
    let dir = tempfile::tempdir().expect("a directory");
    let listener = UnixListener::bind(dir.path().join("in")).expect("a socket");
    let (mut send, recv, _valve) = queue(8);
    let mut handle = target(&dir.path().join("in"), recv);
    let (mut qemu, _) = listener.accept().await.expect("the target connects");
    send_all(&mut send, &chunks_of(b"anything")[..1]).await;
    drop(send);
    let end = timeout(PATIENCE, handle.ended()).await.expect("in time");
    assert!(matches!(end, MemoryEnd::ChannelClosed { written: ByteCount(7) }), "{end:?}");
    qemu.read_exact(&mut [0; 7]).await.expect("what was written");
    let open = qemu.try_read(&mut [0]).expect_err("still open");
    assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock);
    handle.abort();
    assert_eq!(timeout(PATIENCE, qemu.read(&mut [0])).await.expect("in time").expect("the end"), 0);
}

#[tokio::test]
async fn a_qemu_that_listens_late_is_found_and_one_that_never_does_is_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("in");
    let (_send, recv, _valve) = queue(8);
    let handle = target(&path, recv);
    tokio::time::sleep(Duration::from_millis(60)).await;
    let listener = UnixListener::bind(&path).expect("a socket");
    timeout(PATIENCE, listener.accept()).await.expect("in time").expect("the target connects");
    drop((handle, listener));
    std::fs::remove_file(&path).expect("the socket's name");

    let (_send, recv, _valve) = queue(8);
    let config = TargetConfig { connect_deadline: Duration::from_millis(50), ..TargetConfig::default() };
    let mut handle = MemoryTarget::start(path, recv, config, None, Vec::<NoDisk>::new());
    let end = timeout(PATIENCE, handle.ended()).await.expect("in time");
    assert!(matches!(end, MemoryEnd::Unreachable { .. }), "{end:?}");
}

#[tokio::test]
async fn a_qemu_that_hangs_up_is_told_even_while_nothing_arrives() {
    let dir = tempfile::tempdir().expect("a directory");
    let listener = UnixListener::bind(dir.path().join("in")).expect("a socket");
    let (_send, recv, _valve) = queue(8);
    let mut handle = target(&dir.path().join("in"), recv);
    drop(listener.accept().await.expect("the target connects"));
    let end = timeout(PATIENCE, handle.ended()).await.expect("in time");
    assert!(matches!(end, MemoryEnd::QemuClosed { proven: false, .. }), "{end:?}");
}
