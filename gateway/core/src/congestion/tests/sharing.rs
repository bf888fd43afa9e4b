//! Several flows on one path: ours share evenly, others keep what is theirs.
//!
//! Not where the queue holds a quarter of a round trip only: there a CUBIC flow beside ours is left a tenth and less, because
//! each of our probes makes it lose, and it grows too slowly in between. BBRv3's reaction to that costs rate under random loss.

use super::*;

/// Each flow's share of the line between two times.
fn shares(network: &mut Network, from: Duration, to: Duration) -> Vec<f64> {
    network.run_until(from);
    network.measure_anew();
    network.run_until(to);
    let line_bytes = network.path.rate.bytes_in(to - from).0 as f64;
    network.flows.iter().map(|flow| flow.delivered_bytes as f64 / line_bytes).collect()
}

/// Jain's index: 1 if all have the same, one over their number if one has all.
fn fairness(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    sum * sum / (shares.len() as f64 * shares.iter().map(|share| share * share).sum::<f64>())
}

/// Ours, and ten seconds later somebody else.
fn beside(path: Path, other: impl Fn(Duration) -> Flow) -> Network {
    let begins = 10 * SECOND;
    Network::new(path, vec![ours(Rate(path.rate.0 * 4), path.rtt, 1, Duration::ZERO), other(begins)])
}

#[test]
fn two_of_ours_share_evenly() {
    // A longer round trip means fewer probes, by which they come together.
    for (mbit, rtt_ms, from_s) in [(20, 20, 30), (100, 20, 40), (40, 100, 60), (100, 100, 80), (40, 300, 160)]
    {
        for queue in [1.0, 4.0] {
            let path = Path::new(Rate::mbit(mbit), ms(rtt_ms), queue, 0.0);
            let mut network = beside(path, |begins| ours(Rate::mbit(4 * mbit), ms(rtt_ms), 2, begins));
            let shares = shares(&mut network, from_s * SECOND, (from_s + 60) * SECOND);
            let (used, fairness) = (shares.iter().sum::<f64>(), fairness(&shares));
            let case = format!("{mbit} Mbit/s, {rtt_ms} ms, queue of {queue}: {shares:.2?}");
            assert!(fairness > 0.95, "{case}: {fairness:.3}");
            assert!(used > 0.95, "{case}");
        }
    }
}

#[test]
fn a_cubic_flow_keeps_a_third_where_the_queue_holds_a_round_trip() {
    for (mbit, rtt_ms) in [(20, 20), (50, 20), (40, 100), (100, 100)] {
        for queue in [1.0, 4.0] {
            let path = Path::new(Rate::mbit(mbit), ms(rtt_ms), queue, 0.0);
            let mut network = beside(path, |begins| Flow::new(Box::new(Cubic::new()), begins));
            let shares = shares(&mut network, 30 * SECOND, 120 * SECOND);
            assert!(shares[1] > 1.0 / 3.0, "{mbit} Mbit/s, {rtt_ms} ms, queue of {queue}: {shares:.2?}");
            assert!(shares[0] > 0.05, "{mbit} Mbit/s, {rtt_ms} ms, queue of {queue}: {shares:.2?}");
        }
    }
}

#[test]
fn a_bbr_flow_keeps_a_third_and_does_not_starve_us() {
    for (mbit, rtt_ms) in [(20, 20), (40, 100), (10, 300)] {
        for queue in [0.25, 1.0, 4.0] {
            let path = Path::new(Rate::mbit(mbit), ms(rtt_ms), queue, 0.001);
            let mut network = beside(path, |begins| Flow::new(Box::new(Bbr::new(begins)), begins));
            let shares = shares(&mut network, 30 * SECOND, 120 * SECOND);
            assert!(shares[1] > 1.0 / 3.0, "{mbit} Mbit/s, {rtt_ms} ms, queue of {queue}: {shares:.2?}");
            assert!(shares[0] > 0.05, "{mbit} Mbit/s, {rtt_ms} ms, queue of {queue}: {shares:.2?}");
        }
    }
}
