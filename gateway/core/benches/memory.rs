//! What the memory stream costs one core: how many bytes of pages its encoder takes per second, and its decoder gives, by
//! what the pages are.
//!
//! Run it with `cargo bench -p longhaul-core --bench memory`. It asserts only that what comes out is what went in; rates are
//! for reading: medians of the repetitions, by the thread's own CPU time, so that what else the machine does is not taken for
//! the code's.

use std::time::{Duration, Instant};

use bytes::Bytes;
use longhaul_core::memory::PAGE_BYTES;
use longhaul_core::wan::{Decoded, EncoderConfig, StreamDecoder, StreamEncoder};

const MAX_CHUNK: usize = (1 << 20) - 1024;
/// What a gateway reads from QEMU at once.
const READ_BYTES: usize = 256 << 10;

/// What the second pass over the pages finds, after a first one that is not measured.
#[derive(Clone, Copy)]
enum Pages {
    Zero,
    Unchanged,
    /// As one of the first 64.
    Copied,
    Changed,
    NewText,
    NewNoise,
}

const KINDS: [(Pages, &str); 6] = [
    (Pages::Zero, "zero"),
    (Pages::Unchanged, "sent before, unchanged"),
    (Pages::Copied, "equal to another page"),
    (Pages::Changed, "sent before, 64 bytes changed"),
    (Pages::NewText, "new, compressible"),
    (Pages::NewNoise, "new, incompressible"),
];

fn main() {
    let is_bench = std::env::args().any(|arg| arg == "--bench");
    let (pages, repetitions) = if is_bench { (1 << 14, 7) } else { (1 << 8, 1) };
    println!("{:<32} {:>8} {:>8}   wire bytes per page", "MiB/s of pages", "encoder", "decoder");
    for (kind, name) in KINDS {
        let mut runs: Vec<[f64; 3]> = (0..repetitions).map(|_| run(kind, pages)).collect();
        let mut median = |column: usize| {
            runs.sort_by(|a, b| a[column].total_cmp(&b[column]));
            runs[runs.len() / 2][column]
        };
        println!("{name:<32} {:>8.0} {:>8.0}   {:.1}", median(0), median(1), median(2));
    }
}

/// MiB/s of the encoder and of the decoder, and bytes on the wire per page.
fn run(kind: Pages, pages: u64) -> [f64; 3] {
    let first = section(2, pages, |page| Some(before(kind, page)));
    let second = section(3, pages, |page| after(kind, page, pages));
    let config = EncoderConfig { shadow_pages: pages as u32 * 2, ..EncoderConfig::for_chunks_of(MAX_CHUNK) };
    let mut encoder = StreamEncoder::new(config).expect("zstd starts");
    let mut decoder = StreamDecoder::new(config.shadow_pages).expect("zstd starts");
    let sent = encode(&mut encoder, &[begin(pages), first].concat());
    decode(&mut decoder, sent);
    let (sent, encoded) = timed(|| encode(&mut encoder, &second));
    let wire_bytes: usize = sent.iter().map(Bytes::len).sum();
    let (made, decoded) = timed(|| decode(&mut decoder, sent));
    assert!(made.concat() == second, "what came out is not what went in");
    let rate = |time: Duration| (pages as f64 * PAGE_BYTES as f64) / f64::from(1 << 20) / time.as_secs_f64();
    [rate(encoded), rate(decoded), wire_bytes as f64 / pages as f64]
}

fn encode(encoder: &mut StreamEncoder, bytes: &[u8]) -> Vec<Bytes> {
    let mut sent = Vec::new();
    for part in bytes.chunks(READ_BYTES) {
        encoder.handle_bytes(part);
        sent.extend(std::iter::from_fn(|| encoder.poll_chunk()));
    }
    encoder.handle_flush();
    sent.extend(std::iter::from_fn(|| encoder.poll_chunk()));
    sent
}

fn decode(decoder: &mut StreamDecoder, sent: Vec<Bytes>) -> Vec<Bytes> {
    let mut made = Vec::new();
    for chunk in sent {
        decoder.handle_chunk(chunk);
        while let Some(decoded) = decoder.poll_decoded().expect("it decodes") {
            let Decoded::Bytes(bytes) = decoded else { panic!("nothing but bytes was sent") };
            made.push(bytes);
        }
    }
    made
}

/// What QEMU 7.2 writes before the first page: `migration/savevm.c` and `migration/ram.c`.
fn begin(pages: u64) -> Vec<u8> {
    let ram_bytes = pages * PAGE_BYTES as u64;
    let mut bytes =
        b"QEVM\0\0\0\x03\x07\0\0\0\x0dpc-i440fx-7.2\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    bytes.extend((ram_bytes | 4).to_be_bytes());
    bytes.extend(b"\x06pc.ram");
    bytes.extend(ram_bytes.to_be_bytes());
    end_section(&mut bytes);
    bytes
}

/// One section of all pages; `None` is a zero page.
fn section(kind: u8, pages: u64, page: impl Fn(u64) -> Option<Vec<u8>>) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0, 2];
    for number in 0..pages {
        let content = page(number);
        let flags = if content.is_some() { 8 } else { 2 } | if number > 0 { 0x20 } else { 0 };
        bytes.extend(((number * PAGE_BYTES as u64) | flags).to_be_bytes());
        if number == 0 {
            bytes.extend(b"\x06pc.ram");
        }
        match content {
            Some(content) => bytes.extend(content),
            None => bytes.push(0),
        }
    }
    end_section(&mut bytes);
    bytes
}

fn end_section(bytes: &mut Vec<u8>) {
    bytes.extend(0x10u64.to_be_bytes());
    bytes.extend([0x7e, 0, 0, 0, 2]);
}

fn before(kind: Pages, page: u64) -> Vec<u8> {
    match kind {
        Pages::Zero | Pages::Unchanged | Pages::Copied | Pages::Changed => text(page),
        Pages::NewText | Pages::NewNoise => vec![page as u8 | 1; PAGE_BYTES],
    }
}

fn after(kind: Pages, page: u64, pages: u64) -> Option<Vec<u8>> {
    Some(match kind {
        Pages::Zero => return None,
        Pages::Unchanged => text(page),
        Pages::Copied => text(page % 64),
        Pages::Changed => {
            let mut content = text(page);
            let at = (page as usize * 640) % (PAGE_BYTES - 64);
            content[at..at + 64].copy_from_slice(&noise(page + pages)[..64]);
            content
        }
        Pages::NewText => text(page + pages),
        Pages::NewNoise => noise(page),
    })
}

/// A page of words that are drawn at random: zstd halves it, as it does most of a guest's memory.
fn text(page: u64) -> Vec<u8> {
    let mut words = Words(page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut bytes = Vec::with_capacity(PAGE_BYTES + 8);
    while bytes.len() < PAGE_BYTES {
        let word = words.next();
        if word.is_multiple_of(4) {
            bytes.extend(word.to_le_bytes());
        } else {
            bytes.extend((0x5555_8000_0000 + (word >> 52) * 64).to_le_bytes());
        }
    }
    bytes.truncate(PAGE_BYTES);
    bytes
}

fn noise(page: u64) -> Vec<u8> {
    let mut words = Words(page.wrapping_mul(0xd134_2543_de82_ef95) | 1);
    (0..PAGE_BYTES / 8).flat_map(|_| words.next().to_le_bytes()).collect()
}

/// Xorshift (Marsaglia 2003).
struct Words(u64);

impl Words {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// What it gives, and how long this thread was on a processor for it; where Linux does not tell, how long it took.
fn timed<T>(run: impl FnOnce() -> T) -> (T, Duration) {
    let so_far = || -> Option<u64> {
        let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        told.split_whitespace().next()?.parse().ok()
    };
    let (began, before) = (Instant::now(), so_far());
    let made = run();
    let (passed, after) = (began.elapsed(), so_far());
    let on_processor = before.zip(after).map(|(before, after)| Duration::from_nanos(after - before));
    (made, on_processor.filter(|time| !time.is_zero()).unwrap_or(passed))
}
