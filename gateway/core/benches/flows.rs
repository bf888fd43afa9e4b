//! What the flow table costs: bytes per flow, time per packet and per forgotten flow, and the longest single call.
//!
//! Run it with `cargo bench -p longhaul-core --bench flows`. It asserts nothing but the bytes: times are for reading,
//! and a million flows beside a thousand of the same run say whether a packet's time is constant. Times per flow are
//! the process's own CPU time, medians of the repetitions. Of a single call, which is too short for that clock, the
//! shortest repetition counts, so that what else the machine does is not taken for the table's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use longhaul_core::tunnel::flows::{FlowConfig, FlowTable, HashKey};
use longhaul_core::tunnel::packet::{Packet, Side, TCP};

const REPETITIONS: usize = 5;
/// Flows of one repetition, in as many tables as that takes.
const FLOWS: u32 = 1_000_000;
const ACK: u8 = 0x10;

struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came; counting changes no memory.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    let is_bench = std::env::args().any(|arg| arg == "--bench");
    let sizes: &[u32] = if is_bench { &[1_000, 100_000, FLOWS] } else { &[1_000] };
    println!("flows     bytes/flow  new ns  packet ns  (parse ns)  expire ns/flow  expire of none ns");
    let longest: Vec<_> = sizes.iter().map(|flows| (*flows, measure(*flows))).collect();
    println!("\nlongest single call, us");
    println!("flows     new     packet  expire (a batch of 1024)");
    for (flows, [new, packet, expire]) in longest {
        println!("{flows:<9} {new:<7.1} {packet:<7.1} {expire:.1}");
    }
}

/// Prints a line; returns the longest calls in microseconds.
fn measure(flows: u32) -> [f64; 3] {
    let mut single = [Calls::default(), Calls::default(), Calls::default()];
    let mut sums = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    let mut idle = Vec::new();
    let mut bytes = 0;
    for _ in 0..REPETITIONS {
        let before = ALLOCATED.load(Ordering::Relaxed);
        let mut tables: Vec<_> = (0..FLOWS / flows).map(|_| table(flows)).collect();
        let steps: [&dyn Fn(&mut FlowTable); 4] = [
            &|table| (0..flows).for_each(|nth| pass(table, 0, nth)),
            &|table| shuffled(flows).for_each(|nth| pass(table, 1, nth)),
            &|_| shuffled(flows).for_each(|nth| parse(nth, |_| ())),
            &|table| while table.expire(at(10_000)) {},
        ];
        for (nth, step) in steps.iter().enumerate() {
            if nth == 3 {
                bytes = ALLOCATED.load(Ordering::Relaxed) - before;
                let nothing_due =
                    |table: &mut FlowTable| (0..FLOWS).for_each(|_| assert!(!table.expire(at(2))));
                idle.push(cpu_time(|| nothing_due(&mut tables[0])) / f64::from(FLOWS));
            }
            sums[nth].push(cpu_time(|| tables.iter_mut().for_each(step)) / f64::from(FLOWS));
        }
        drop(tables);
        longest_calls(flows, &mut single);
    }
    let per_flow = bytes as f64 / f64::from(FLOWS);
    let [new, packet, parse, expire] = sums.map(median);
    let none = median(idle);
    println!("{flows:<9} {per_flow:<11.1} {new:<7.0} {packet:<10.0} {parse:<11.0} {expire:<15.0} {none:.0}");
    assert!(per_flow <= 200.0, "more than 200 bytes per flow");
    single.map(|calls| calls.longest())
}

fn longest_calls(flows: u32, [new, packet, expire]: &mut [Calls; 3]) {
    let mut table = table(flows);
    new.repeat((0..flows).map(|nth| timed(|| pass(&mut table, 0, nth))));
    packet.repeat(shuffled(flows).map(|nth| timed(|| pass(&mut table, 1, nth))));
    let mut more = true;
    expire.repeat(std::iter::from_fn(|| more.then(|| timed(|| more = table.expire(at(10_000))))));
}

/// The shortest time of each call of a sequence that is repeated.
#[derive(Default)]
struct Calls(Vec<f64>);

impl Calls {
    fn repeat(&mut self, times_ns: impl Iterator<Item = f64>) {
        for (nth, ns) in times_ns.enumerate() {
            match self.0.get_mut(nth) {
                Some(shortest) => *shortest = shortest.min(ns),
                None => self.0.push(ns),
            }
        }
    }

    fn longest(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max) / 1000.0
    }
}

fn table(flows: u32) -> FlowTable {
    let hash_key = HashKey([0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]);
    FlowTable::new(FlowConfig { max_flows: flows as usize, hash_key, ..FlowConfig::default() }, at(0))
}

fn pass(table: &mut FlowTable, now: u64, nth: u32) {
    parse(nth, |packet| table.handle_packet(at(now), packet, Side::Remote));
}

/// A segment of the `nth` client.
fn parse(nth: u32, then: impl FnOnce(&Packet<'_>)) {
    let mut bytes = [0; 40];
    (bytes[0], bytes[3], bytes[9]) = (0x45, 40, TCP);
    bytes[12..16].copy_from_slice(&(0x0a00_0000 | nth >> 8).to_be_bytes());
    bytes[16..20].copy_from_slice(&[198, 51, 100, 10]);
    (bytes[20], bytes[21], bytes[23]) = (0x80, nth as u8, 80);
    (bytes[32], bytes[33]) = (0x50, ACK);
    if let Ok(packet) = Packet::parse(black_box(&bytes)) {
        then(black_box(&packet));
    }
}

/// Every number below `flows` once, far from its neighbours: 15485863 is a prime that divides none of the sizes.
fn shuffled(flows: u32) -> impl Iterator<Item = u32> {
    (0..u64::from(flows)).map(move |nth| (nth * 15_485_863 % u64::from(flows)) as u32)
}

fn at(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Nanoseconds that the process was on a CPU; where Linux does not tell, nanoseconds that passed.
fn cpu_time(run: impl FnOnce()) -> f64 {
    let so_far = || -> Option<f64> {
        let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        told.split_whitespace().next()?.parse().ok()
    };
    let before = so_far();
    let passed = timed(run);
    before.zip(so_far()).map_or(passed, |(before, after)| after - before)
}

/// Nanoseconds that passed.
fn timed(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_nanos() as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
