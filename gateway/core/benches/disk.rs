//! What a disk's mirror costs one core: how many bytes of content its source packs per second and its target unpacks, by what
//! the content is and how hard it is packed.
//!
//! Run it with `cargo bench -p longhaul-core --bench disk`. It asserts only that what is to be written is what was read; rates
//! are for reading: medians of the repetitions, by the thread's own CPU time. Reading, writing and hashing of what the
//! destination has are the gateway's, and not in it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use longhaul_core::disk::{
    Content, MirrorSource, MirrorTarget, ReadRun, SourceConfig, Step, TargetConfig, TargetDisk,
};
use longhaul_core::wan::Level;

/// What a gateway reads from QEMU at once.
const READ_BYTES: u64 = 1 << 20;
/// Places for this much content are noted.
const PLACES_BYTES: u64 = 64 << 20;

/// Makes a word of a disk's content of one that was drawn.
type Word = fn(u64) -> u64;

const CONTENTS: [(Word, &str); 2] = [(text, "compressible"), (noise, "incompressible")];
const LEVELS: [Level; 4] = [Level::Stored, Level::Zstd(-5), Level::FIRST, Level::Zstd(3)];

fn main() {
    let is_bench = std::env::args().any(|arg| arg == "--bench");
    let (reads, repetitions) = if is_bench { (128, 5) } else { (2, 1) };
    println!("{:<36} {:>8} {:>8}   of its size on the wire", "MiB/s of content", "source", "target");
    for (content, name) in CONTENTS {
        let disk: Vec<Bytes> = (0..reads).map(|read| filled(content, read)).collect();
        for level in LEVELS {
            let mut runs: Vec<[f64; 3]> = (0..repetitions).map(|_| run(&disk, level)).collect();
            let mut median = |column: usize| {
                runs.sort_by(|a, b| a[column].total_cmp(&b[column]));
                runs[runs.len() / 2][column]
            };
            let name = format!("{name}, level {level}");
            println!("{name:<36} {:>8.0} {:>8.0}   {:.2}", median(0), median(1), median(2));
        }
    }
}

/// MiB/s of the source and of the target, and the share on the wire.
fn run(disk: &[Bytes], level: Level) -> [f64; 3] {
    let size = disk.len() as u64 * READ_BYTES;
    let config = SourceConfig {
        target: TargetDisk::Zero,
        places_bytes: PLACES_BYTES,
        window_log: 26,
        ..SourceConfig::default()
    };
    let (chunks, packed) = timed(|| {
        let mut source = MirrorSource::new(size, config);
        source.set_level(level);
        disk.iter().flat_map(|read| pack(&mut source, read)).collect::<Vec<Bytes>>()
    });
    let wire: usize = chunks.iter().map(Bytes::len).sum();
    let (written, unpacked) = timed(|| unpack(size, chunks));
    assert_eq!(written, size, "what is written is not what was read");
    let rate = |time: Duration| size as f64 / f64::from(1 << 20) / time.as_secs_f64();
    [rate(packed), rate(unpacked), wire as f64 / size as f64]
}

fn pack(source: &mut MirrorSource, content: &Bytes) -> Vec<Bytes> {
    let run: ReadRun = source.poll_read(READ_BYTES).expect("something is left to read");
    source.handle_read(run, &[Content::Data(content.clone())]);
    std::iter::from_fn(|| source.poll_chunk()).collect()
}

fn unpack(size: u64, chunks: Vec<Bytes>) -> u64 {
    let config = TargetConfig { max_window_log: 26, ..TargetConfig::default() };
    let mut target = MirrorTarget::new(size, config);
    let mut written = 0;
    for chunk in chunks {
        target.handle_chunk(chunk).expect("it is what was packed");
        while let Some(step) = target.poll_step(Duration::ZERO) {
            match step {
                Step::Write { number, data, .. } => {
                    written += data.len() as u64;
                    target.handle_applied(number);
                }
                Step::Flush => target.handle_flushed(),
                Step::Zero { .. } | Step::Hash { .. } | Step::Fetch { .. } | Step::Proven(_) => {
                    panic!("nothing but content was sent")
                }
            }
        }
    }
    written
}

fn filled(word: Word, read: u64) -> Bytes {
    let mut state = read.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // Xorshift (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..READ_BYTES / 8).flat_map(|_| word(next()).to_le_bytes()).collect::<Vec<u8>>().into()
}

/// zstd halves it, as it does most of a guest's disk.
fn text(drawn: u64) -> u64 {
    if drawn.is_multiple_of(4) { drawn } else { 0x5555_8000_0000 + (drawn >> 52) * 64 }
}

fn noise(drawn: u64) -> u64 {
    drawn
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
