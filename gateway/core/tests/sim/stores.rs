//! What sites keep of a machine that moves on and comes back, and what its next move begins with: its memory, as both ends
//! remembered it, and its disk. A seed is a schedule: a chain of moves between two or three sites, what the machine does
//! meanwhile, and what becomes of the link, of the gateways and of what they keep.
//!
//! The encoders, mirrors and maps are the core's, in bytes; the rules of what is named, read, kept and forgotten are an
//! imitation of the gateway's. Deliberately not here: who owns the machine, and a link that breaks without that the attempt
//! ends.

mod attempt;
mod broken;
mod disk;
mod guest;
mod invariants;
mod memory;
mod seen;
mod site;
mod world;

use std::time::Instant;

use attempt::Plan;
use seen::Seen;
use world::{Ending, World};

use crate::schedule::Random;
use crate::{SCHEDULES, number};

/// Of the schedules of the other scenes, one in so many is played here: there are bytes in these.
const ONE_IN: u64 = 100;

fn play_seeds(from: u64, to: u64) -> Seen {
    let play = |seed: u64| {
        let mut world = World::new(seed, None, None);
        if let Err(violation) = world.play() {
            panic!("stores: seed {seed} violates {}: {}", violation.invariant, violation.detail);
        }
        world.seen
    };
    (from..to).map(play).fold(Seen::default(), Seen::and)
}

#[test]
fn every_chain_of_moves_keeps_every_promise_whatever_the_sites_keep() {
    let schedules = number("LONGHAUL_SIM_SCHEDULES", SCHEDULES).div_ceil(ONE_IN);
    let first = number("LONGHAUL_SIM_SEED", 0);
    let began = Instant::now();
    let half = first + schedules / 2;
    let seen = std::thread::scope(|scope| {
        let other = scope.spawn(|| play_seeds(half, first + schedules));
        play_seeds(first, half).and(other.join().expect("chains that keep every promise"))
    });
    let rate = schedules as f64 / began.elapsed().as_secs_f64();
    println!("stores: {schedules} schedules from seed {first}, {rate:.0} schedules per second");
    println!("{seen:?}");
    if schedules >= 1_000 {
        let Seen { moves, based, given_up, unusable, undecoded, unwritten, disk_pages } = seen;
        let rare = [based, given_up, unusable, undecoded, unwritten, disk_pages];
        assert!(rare.iter().all(|count| *count > moves / 100), "something hardly happens");
    }
}

#[test]
fn an_undisturbed_way_back_costs_less_than_a_tenth_of_the_way_there() {
    let mut worst = 0.0f64;
    for seed in 0..50 {
        let mut world = World::roomy(seed);
        let mut random = Random(seed);
        let [there, back] = [1, 0].map(|to| {
            assert_eq!(world.attempt(to, Plan::calm(2, &mut random)), Ok(Ending::Moved));
            world.sent_bytes
        });
        worst = worst.max(back as f64 / there as f64);
    }
    println!("stores: the way back costs {:.1} % of the way there, at most", worst * 100.0);
    assert!(worst < 0.1);
}
