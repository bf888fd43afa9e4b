//! One measurement: a sender alone on a path, or two that share it. Everything but the payload that arrived is seen at the
//! emulator.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use super::cell::Cell;
use super::place::{Flow, Place, class_name};
use super::sender::Sender;
use crate::wan::{Direction, PathCounters, Sample};

/// A share of packets that the kernel or a device dropped from which on a run says nothing.
const DISTURBED: f64 = 0.0005;

/// What came of one sender alone.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Alone {
    /// Payload that arrived, in Mbit/s.
    pub goodput_mbit: f64,
    /// The share of the path's rate that was used, headers and repetitions included.
    pub used: f64,
    /// The mean of what waited at the bottleneck, by the longest queue of each tenth of a second.
    pub queue_mean_ms: f64,
    /// The longest queue.
    pub queue_most_ms: f64,
    /// Of a hundred packets, those that random loss took.
    pub lost_percent: f64,
    /// Of a hundred packets, those that found the queue full.
    pub dropped_percent: f64,
    /// Of a hundred packets, those that the machine lost: the emulator or a device could not keep up.
    pub disturbed_percent: f64,
}

/// What came of two that shared a path.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Shared {
    /// Each one's share of the path's rate.
    pub shares: [f64; 2],
    /// Jain's index.
    pub fairness: f64,
    /// As in [`Alone`].
    pub queue_mean_ms: f64,
}

impl Alone {
    /// The machine was too slow for the path.
    pub fn is_disturbed(&self) -> bool {
        self.disturbed_percent > DISTURBED * 100.0
    }
}

/// Lets one sender have the path.
pub(super) fn alone(cell: &Cell, sender: Sender, time: Duration) -> Result<Alone> {
    let place = Place::build(cell)?;
    let measured = measure_alone(&place, cell, sender, time);
    place.close()?;
    measured
}

fn measure_alone(place: &Place, cell: &Cell, sender: Sender, time: Duration) -> Result<Alone> {
    let flow = place.start(cell, sender, 0)?;
    std::thread::sleep(cell.warm_up());
    let (counters, samples, goodput) = observe(place, &[&flow], time)?;
    let offered = counters.offered.packets.max(1) as f64;
    let disturbed = counters.kernel_dropped + counters.write_failed.packets;
    let (queue_mean_ms, queue_most_ms) = queues(cell, &samples);
    Ok(Alone {
        goodput_mbit: goodput[0],
        used: used(cell, counters.delivered.bytes, time),
        queue_mean_ms,
        queue_most_ms,
        lost_percent: counters.lost.packets as f64 / offered * 100.0,
        dropped_percent: counters.tail_dropped.packets as f64 / offered * 100.0,
        disturbed_percent: disturbed as f64 / offered * 100.0,
    })
}

/// Lets the second sender come when the first has found its rate.
pub(super) fn shared(cell: &Cell, senders: [Sender; 2], time: Duration) -> Result<Shared> {
    let place = Place::build(cell)?;
    let measured = measure_shared(&place, cell, senders, time);
    place.close()?;
    measured
}

fn measure_shared(place: &Place, cell: &Cell, senders: [Sender; 2], time: Duration) -> Result<Shared> {
    let first = place.start(cell, senders[0], 0)?;
    std::thread::sleep(cell.warm_up());
    let second = place.start(cell, senders[1], 1)?;
    std::thread::sleep(4 * cell.warm_up());
    let (counters, samples, _) = observe(place, &[&first, &second], time)?;
    let share = |flow| {
        let class = counters.class(&class_name(flow));
        used(cell, class.map_or(0, |class| class.delivered.bytes), time)
    };
    let shares = [share(0), share(1)];
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    let fairness = (shares[0] + shares[1]).powi(2) / (2.0 * squares).max(f64::MIN_POSITIVE);
    Ok(Shared { shares, fairness, queue_mean_ms: queues(cell, &samples).0 })
}

fn observe(place: &Place, flows: &[&Flow], time: Duration) -> Result<(PathCounters, Vec<Sample>, Vec<f64>)> {
    let dropped_before = place.wan.counters(Direction::ToFar)?.kernel_dropped;
    place.wan.reset_counters()?;
    let from = Instant::now();
    std::thread::sleep(time);
    let to = Instant::now();
    let mut counters = place.wan.counters(Direction::ToFar)?;
    counters.kernel_dropped -= dropped_before;
    let samples = place.wan.samples(Direction::ToFar)?;
    let goodput: Result<Vec<f64>> = flows.iter().map(|flow| flow.goodput_mbit(from, to)).collect();
    Ok((counters, samples, goodput?))
}

fn used(cell: &Cell, bytes: u64, time: Duration) -> f64 {
    bytes as f64 / cell.profile().to_far.bytes_in(time).max(1) as f64
}

fn queues(cell: &Cell, samples: &[Sample]) -> (f64, f64) {
    let path = cell.profile().to_far;
    let waits = samples.iter().map(|sample| path.line_time(sample.queue_bytes as usize).as_secs_f64() * 1e3);
    let most = waits.clone().fold(0.0, f64::max);
    (waits.sum::<f64>() / samples.len().max(1) as f64, most)
}
