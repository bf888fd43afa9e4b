//! One flow alone on a path: the line is used, the queue stays short, and changes are followed.

use super::*;

const RATES_MBIT: [u64; 4] = [5, 50, 200, 1000];
const RTTS_MS: [u64; 3] = [20, 100, 300];
const QUEUES: [f64; 3] = [0.25, 1.0, 4.0];

/// What is used and queued after ten seconds, on a path that the operator's rate exceeds `cap` times.
fn steady(mbit: u64, rtt: Duration, queue: f64, loss: f64, cap: u64) -> (f64, Network) {
    let time = if mbit < 1000 { 20 * SECOND } else { 8 * SECOND };
    let path = Path::new(Rate::mbit(mbit), rtt, queue, loss);
    let mut network = Network::new(path, vec![ours(Rate::mbit(mbit * cap), rtt, 1, Duration::ZERO)]);
    network.run_until(10 * SECOND);
    network.measure_anew();
    network.run_until(10 * SECOND + time);
    (network.used(time), network)
}

fn uses_the_line(loss: f64, least: f64) {
    for mbit in RATES_MBIT {
        for rtt_ms in RTTS_MS {
            for queue in QUEUES {
                for cap in if mbit < 1000 { 1..3 } else { 4..5 } {
                    let (used, network) = steady(mbit, ms(rtt_ms), queue, loss, cap);
                    let case = format!("{mbit} Mbit/s, {rtt_ms} ms, queue of {queue}, cap of {cap}");
                    assert!(used >= least, "{case}: {used:.3}");
                    let mean_ms = network.queue.mean_ms();
                    assert!(queue < 4.0 || mean_ms < 10.0, "{case}: queue of {mean_ms:.1} ms on average");
                }
            }
        }
    }
}

#[test]
fn a_thousandth_lost_at_random_leaves_95_percent_of_the_line_and_no_queue() {
    uses_the_line(0.001, 0.95);
}

#[test]
fn a_hundredth_lost_at_random_leaves_90_percent_of_the_line_and_no_queue() {
    uses_the_line(0.01, 0.90);
}

#[test]
fn three_hundredths_lost_at_random_are_borne() {
    for (mbit, rtt_ms) in [(50, 20), (50, 100), (200, 300)] {
        let (used, _) = steady(mbit, ms(rtt_ms), 1.0, 0.03, 4);
        assert!(used >= 0.85, "{mbit} Mbit/s, {rtt_ms} ms: {used:.3}");
    }
}

#[test]
fn a_probe_makes_a_queue_of_some_40_ms_at_most() {
    for rtt_ms in RTTS_MS {
        let (_, network) = steady(100, ms(rtt_ms), 4.0, 0.0, 10);
        assert!(network.queue.most_ms() < 45.0, "{rtt_ms} ms: {:.1} ms", network.queue.most_ms());
    }
}

#[test]
fn the_operators_rate_is_filled_and_never_exceeded() {
    let (rtt, cap) = (ms(100), Rate::mbit(100));
    let path = Path::new(Rate::mbit(1000), rtt, 1.0, 0.001);
    let mut network = Network::new(path, vec![ours(cap, rtt, 1, Duration::ZERO)]);
    network.run_until(5 * SECOND);
    let mut before = network.flows[0].delivered_bytes;
    for second in 6..30 {
        network.run_until(second * SECOND);
        let delivered = network.flows[0].delivered_bytes - before;
        before = network.flows[0].delivered_bytes;
        assert!(delivered <= cap.0 + 20 * PACKET_BYTES, "{delivered} bytes in second {second}");
        assert!(delivered as f64 >= 0.95 * cap.0 as f64, "{delivered} bytes in second {second}");
    }
    assert!(network.queue.most_ms() < 1.0, "{}", network.queue.most_ms());
}

#[test]
fn the_line_is_full_soon_after_the_start() {
    for (mbit, rtt_ms, within_s) in [(100, 20, 1), (100, 100, 2), (100, 300, 6), (1000, 100, 3)] {
        let rtt = ms(rtt_ms);
        let path = Path::new(Rate::mbit(mbit), rtt, 1.0, 0.001);
        let mut network = Network::new(path, vec![ours(Rate::mbit(2 * mbit), rtt, 1, Duration::ZERO)]);
        network.run_until(within_s * SECOND);
        network.measure_anew();
        network.run_until((within_s + 2) * SECOND);
        let used = network.used(2 * SECOND);
        assert!(used >= 0.9, "{mbit} Mbit/s, {rtt_ms} ms: {used:.2} of the line from second {within_s} on");
    }
}

#[test]
fn a_path_that_shrinks_to_a_fifth_and_grows_again_is_followed() {
    for rtt_ms in RTTS_MS {
        for queue in QUEUES {
            let rtt = ms(rtt_ms);
            let path = Path::new(Rate::mbit(100), rtt, queue, 0.001);
            let mut network = Network::new(path, vec![ours(Rate::mbit(200), rtt, 1, Duration::ZERO)]);
            network.run_until(20 * SECOND);
            network.set_rate(Rate::mbit(20));
            network.run_until(40 * SECOND);
            network.measure_anew();
            network.run_until(60 * SECOND);
            let (used, queue_ms) = (network.used(20 * SECOND), network.queue.mean_ms());
            assert!(used > 0.95 && queue_ms < 10.0, "{rtt_ms} ms, {queue}: {used:.2}, {queue_ms:.1} ms");
            network.set_rate(Rate::mbit(100));
            network.run_until(72 * SECOND);
            network.measure_anew();
            network.run_until(80 * SECOND);
            let used = network.used(8 * SECOND);
            assert!(used > 0.95, "{rtt_ms} ms, queue of {queue}: {used:.2} of the line after it grew");
        }
    }
}

#[test]
fn from_next_to_nothing_the_whole_line_is_found() {
    for rtt_ms in RTTS_MS {
        let rtt = ms(rtt_ms);
        let path = Path { rate: Rate(40_000), ..Path::new(Rate::mbit(100), rtt, 1.0, 0.0) };
        let mut network = Network::new(path, vec![ours(Rate::mbit(200), rtt, 1, Duration::ZERO)]);
        network.run_until(30 * SECOND);
        network.set_rate(Rate::mbit(100));
        network.run_until(30 * SECOND + 60 * rtt + 10 * SECOND);
        network.measure_anew();
        network.run_until(network.now + 5 * SECOND);
        let used = network.used(5 * SECOND);
        assert!(used > 0.9, "{rtt_ms} ms: {used:.3} of the line");
    }
}

#[test]
fn a_path_slower_than_configured_does_not_queue_without_end() {
    for rtt_ms in RTTS_MS {
        let rtt = ms(rtt_ms);
        let path = Path::new(Rate::mbit(10), rtt, 40.0, 0.0);
        let mut network = Network::new(path, vec![ours(Rate::mbit(1000), rtt, 1, Duration::ZERO)]);
        network.run_until(10 * SECOND);
        network.measure_anew();
        network.run_until(180 * SECOND);
        assert!(network.used(170 * SECOND) > 0.95);
        let (mean_ms, most_ms) = (network.queue.mean_ms(), network.queue.most_ms());
        assert!(mean_ms < 10.0 && most_ms < 60.0, "{rtt_ms} ms: {mean_ms:.1} ms, {most_ms:.1} ms at most");
    }
}

#[test]
fn an_application_that_paused_finds_the_rate_it_left() {
    let rtt = ms(100);
    let path = Path::new(Rate::mbit(100), rtt, 1.0, 0.001);
    let mut network = Network::new(path, vec![ours(Rate::mbit(400), rtt, 1, Duration::ZERO)]);
    network.run_until(10 * SECOND);
    network.flows[0].offered = Some(Rate::mbit(3));
    network.run_until(60 * SECOND);
    network.flows[0].offered = None;
    network.run_until(60 * SECOND + ms(200));
    network.measure_anew();
    network.run_until(63 * SECOND);
    let used = network.used(3 * SECOND - ms(200));
    assert!(used > 0.9, "{used:.2}");
}

#[test]
fn an_application_that_sent_little_for_long_still_starts_fast() {
    let rtt = ms(100);
    let path = Path::new(Rate::mbit(100), rtt, 1.0, 0.001);
    let mut network = Network::new(path, vec![ours(Rate::mbit(400), rtt, 1, Duration::ZERO)]);
    network.flows[0].offered = Some(Rate(20_000));
    network.run_until(30 * SECOND);
    network.path.rtt = ms(140); // the route is longer now, or somebody else keeps a queue
    network.run_until(60 * SECOND);
    network.flows[0].offered = None;
    network.run_until(62 * SECOND);
    network.measure_anew();
    network.run_until(65 * SECOND);
    let used = network.used(3 * SECOND);
    assert!(used > 0.9, "{used:.2}");
}

#[test]
fn after_a_cut_the_line_is_full_again_at_once() {
    let rtt = ms(100);
    let path = Path::new(Rate::mbit(100), rtt, 1.0, 0.001);
    let mut network = Network::new(path, vec![ours(Rate::mbit(400), rtt, 1, Duration::ZERO)]);
    network.run_until(10 * SECOND);
    network.path.loss = 1.0;
    network.run_until(14 * SECOND);
    network.path.loss = 0.001;
    network.run_until(17 * SECOND);
    network.measure_anew();
    network.run_until(22 * SECOND);
    let used = network.used(5 * SECOND);
    assert!(used > 0.9, "{used:.2}");
}
