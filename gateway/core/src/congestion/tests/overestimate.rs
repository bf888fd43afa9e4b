//! A path that carries less than is believed: what was once measured is forgotten, with a queue to see and without.

use super::*;

const LOSS: f64 = 0.001;

/// One flow of ours on a path that becomes slower after ten seconds, 30 s after that.
fn slowed(path: Path, cap: Rate, to: Rate) -> Network {
    let mut network = Network::new(path, vec![ours(cap, path.rtt, 1, Duration::ZERO)]);
    network.run_until(10 * SECOND);
    network.set_rate(to);
    network.run_until(40 * SECOND);
    network
}

/// Measures for 40 s; gives the share of the line that was used and the share of the packets that were lost.
fn measured(network: &mut Network) -> (f64, f64) {
    network.measure_anew();
    network.run_until(network.now + 40 * SECOND);
    (network.used(40 * SECOND), network.flows[0].lost())
}

fn drops_little(case: &str, mut network: Network, least_used: f64, most_lost: f64) {
    let (used, lost) = measured(&mut network);
    assert!(used >= least_used && lost <= most_lost, "{case}: {used:.3} of the line, {lost:.3} lost");
}

#[test]
fn a_policer_that_lets_a_burst_pass_is_not_taken_for_a_fast_path() {
    for (mbit, rtt_ms) in [(20, 20), (20, 100), (20, 300), (100, 20)] {
        let path = Path::policed(Rate::mbit(mbit), ms(rtt_ms), 200_000);
        let mut network = Network::new(path, vec![ours(Rate::mbit(5 * mbit), ms(rtt_ms), 1, Duration::ZERO)]);
        network.run_until(20 * SECOND);
        drops_little(&format!("{mbit} Mbit/s, {rtt_ms} ms"), network, 0.8, 0.08);
    }
}

#[test]
fn a_policer_that_becomes_slower_is_followed() {
    for rtt_ms in [20, 100, 300, 600] {
        let path = Path::policed(Rate::mbit(20), ms(rtt_ms), 15_000);
        let network = slowed(path, Rate::mbit(100), Rate::mbit(4));
        drops_little(&format!("{rtt_ms} ms"), network, 0.8, 0.08);
    }
}

#[test]
fn a_queue_of_a_few_packets_does_not_hide_that_the_path_became_slower() {
    for (from_mbit, to_mbit, packets) in [(20, 4, 4), (50, 10, 12)] {
        for rtt_ms in [20, 100, 300, 600] {
            let path = Path::new(Rate::mbit(from_mbit), ms(rtt_ms), 0.0, 0.0);
            let path = Path { queue_bytes: packets * PACKET_BYTES, ..path };
            let network = slowed(path, Rate::mbit(100), Rate::mbit(to_mbit));
            let case = format!("{from_mbit} to {to_mbit} Mbit/s, {packets} packets, {rtt_ms} ms");
            drops_little(&case, network, 0.8, 0.08);
        }
    }
}

fn drains(case: &str, mut network: Network) {
    let (used, _) = measured(&mut network);
    let (most_ms, mean_ms) = (network.queue.most_ms(), network.queue.mean_ms());
    assert!(
        used >= 0.9 && most_ms <= 80.0,
        "{case}: {used:.3} of the line, {mean_ms:.1} ms, {most_ms:.1} ms"
    );
}

#[test]
fn a_queue_that_is_left_of_a_much_faster_path_is_drained() {
    for (from_mbit, to_mbit, rtt_ms, queue_bytes) in
        [(50, 5, 300, 1_500_000), (50, 2, 100, 600_000), (50, 2, 20, 600_000), (50, 5, 100, 600_000)]
    {
        let path = Path::new(Rate::mbit(from_mbit), ms(rtt_ms), 0.0, LOSS);
        let network = slowed(Path { queue_bytes, ..path }, Rate::mbit(2 * from_mbit), Rate::mbit(to_mbit));
        drains(&format!("{from_mbit} to {to_mbit} Mbit/s, {rtt_ms} ms"), network);
    }
}

#[test]
fn a_path_that_becomes_slower_in_the_midst_of_a_probe_is_drained() {
    for at_ms in [20_500, 21_000, 21_500, 22_000, 22_500] {
        let path = Path::new(Rate::mbit(40), ms(300), 1.0, LOSS);
        let mut network = Network::new(path, vec![ours(Rate::mbit(80), ms(300), 1, Duration::ZERO)]);
        network.run_until(ms(at_ms));
        network.set_rate(Rate::mbit(8));
        network.run_until(ms(at_ms) + 30 * SECOND);
        drains(&format!("at {at_ms} ms"), network);
    }
}

#[test]
fn a_path_that_becomes_slower_when_startup_ends_is_drained() {
    for rtt_ms in [20, 100] {
        let path = Path { queue_bytes: 5_000_000, ..Path::new(Rate::mbit(50), ms(rtt_ms), 0.0, LOSS) };
        let mut network = Network::new(path, vec![ours(Rate::mbit(200), ms(rtt_ms), 1, Duration::ZERO)]);
        run_until_startup_ends(&mut network);
        network.set_rate(Rate::mbit(10));
        network.run_until(network.now + 30 * SECOND);
        drains(&format!("{rtt_ms} ms"), network);
    }
}

/// Startup ends with a pace that is much lower at once.
fn run_until_startup_ends(network: &mut Network) {
    let pace = |network: &Network| network.flows[0].sender.pace().unwrap_or_default();
    let mut before = pace(network);
    while pace(network).0 * 2 > before.0 {
        before = pace(network);
        network.run_until(network.now + ms(5));
    }
}

#[test]
fn what_is_lost_at_random_beyond_the_bearable_costs_rate() {
    for (loss, least) in [(0.05, 0.9), (0.08, 0.8), (0.12, 0.3), (0.2, 0.06)] {
        for rtt_ms in [20, 100] {
            let path = Path::new(Rate::mbit(20), ms(rtt_ms), 1.0, loss);
            let mut network = Network::new(path, vec![ours(Rate::mbit(100), ms(rtt_ms), 1, Duration::ZERO)]);
            network.run_until(20 * SECOND);
            let (used, _) = measured(&mut network);
            assert!(used >= least, "{loss}, {rtt_ms} ms: {used:.2} of the line");
        }
    }
}
