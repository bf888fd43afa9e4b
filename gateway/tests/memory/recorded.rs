//! A stream recorded from a real QEMU is understood, survives the way bit for bit, and how fast.

use std::time::{Duration, Instant};

use bytes::Bytes;
use gateway::chunk::MAX_CHUNK;
use longhaul_core::memory::{StreamParser, StreamPhase};
use longhaul_core::wan::{Decoded, EncoderConfig, StreamDecoder, StreamEncoder};

use crate::machine::{Machine, unavailable};

const READ: usize = 128 << 10;

async fn record() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("stream");
    let mut machine = Machine::running(dir.path(), "recorded").await;
    machine.migrate_to(format!("exec:cat > {}", file.display())).await;
    machine.migration_reaches("active").await;
    machine.stop_and_finish().await;
    // QEMU waits for the command when it closes the stream, which it has done when it has exited.
    drop(machine);
    std::fs::read(&file).expect("the stream was recorded")
}

fn megabytes_per_second(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

fn encode(stream: &[u8]) -> Vec<Bytes> {
    let mut encoder = StreamEncoder::new(EncoderConfig {
        shadow_pages: 1 << 12,
        ..EncoderConfig::for_chunks_of(MAX_CHUNK)
    })
    .expect("zstd starts");
    let mut chunks = Vec::new();
    for part in stream.chunks(READ) {
        encoder.handle_bytes(part);
        chunks.extend(std::iter::from_fn(|| encoder.poll_chunk()));
    }
    encoder.handle_end();
    chunks.extend(std::iter::from_fn(|| encoder.poll_chunk()));
    let counters = encoder.counters();
    println!("device state {} -> {} bytes", counters.stream.device_state_bytes, counters.wire_device_bytes);
    chunks
}

/// Decodes and compares.
fn decode(chunks: &[Bytes], mut expected: &[u8]) {
    let mut decoder = StreamDecoder::new(1 << 12).expect("zstd starts");
    let mut proven = false;
    for chunk in chunks {
        decoder.handle_chunk(chunk.clone());
        while let Some(decoded) = decoder.poll_decoded().expect("the stream decodes") {
            match decoded {
                Decoded::Bytes(bytes) => {
                    assert!(expected.starts_with(&bytes), "differs {} bytes before the end", expected.len());
                    expected = &expected[bytes.len()..];
                }
                Decoded::Disks(_) | Decoded::Wanted(_) => panic!("no disk was given"),
                Decoded::End(_) => proven = true,
            }
        }
    }
    assert!(proven && expected.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_stream_is_understood_and_comes_out_bit_for_bit() {
    if let Some(reason) = unavailable() {
        println!("skipped: {reason}");
        return;
    }
    let stream = record().await;
    let began = Instant::now();
    let mut parser = StreamParser::new();
    let mut rest = stream.as_slice();
    for part in stream.chunks(READ) {
        parser.handle_bytes(part);
        while let Some(item) = parser.poll_item() {
            assert!(rest.starts_with(item.bytes()));
            rest = &rest[item.bytes().len()..];
        }
    }
    let parsed = began.elapsed();
    let counters = parser.counters();
    assert!(rest.is_empty());
    assert_eq!(parser.phase(), StreamPhase::DeviceState);
    assert!(counters.pages > 4000 && counters.zero_pages > 20_000, "{counters:?}");
    assert!(counters.device_state_bytes > 10_000, "{counters:?}");

    let began = Instant::now();
    let chunks = encode(&stream);
    let encoded = began.elapsed();
    let began = Instant::now();
    decode(&chunks, &stream);
    let decoded = began.elapsed();
    let wire: usize = chunks.iter().map(Bytes::len).sum();
    println!(
        "{counters:?}\nstream {} -> wire {wire} bytes in {} chunks; parse {:.0} MB/s, \
         parse + hash + encode {:.0} MB/s, decode + hash + compare {:.0} MB/s",
        stream.len(),
        chunks.len(),
        megabytes_per_second(stream.len(), parsed),
        megabytes_per_second(stream.len(), encoded),
        megabytes_per_second(stream.len(), decoded),
    );
}
