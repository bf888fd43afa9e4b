//! Whatever arrives, in whatever order: pace and window stay within their bounds, and nothing overflows.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Event {
    Wait(u64),
    Sent(u64),
    Departed(u64),
    Acked { ago_us: u64, bytes: u64 },
    AcksEnd { in_flight_bytes: u64, app_limited: bool },
    Lost { ago_us: u64, bytes: u64 },
    PacketLength(u64),
    Cap(u64),
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0u64..3_000_000, 1 => any::<u64>(), 1 => Just(0)]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0u64..500_000).prop_map(Event::Wait),
        1 => (0u64..100_000_000).prop_map(Event::Wait),
        4 => number().prop_map(Event::Sent),
        1 => (0u64..100_000).prop_map(Event::Departed),
        6 => (0u64..1_000_000, number()).prop_map(|(ago_us, bytes)| Event::Acked { ago_us, bytes }),
        6 => (number(), any::<bool>())
            .prop_map(|(in_flight_bytes, app_limited)| Event::AcksEnd { in_flight_bytes, app_limited }),
        2 => (0u64..1_000_000, number()).prop_map(|(ago_us, bytes)| Event::Lost { ago_us, bytes }),
        1 => (0u64..70_000).prop_map(Event::PacketLength),
        1 => number().prop_map(Event::Cap),
    ]
}

fn settings() -> impl Strategy<Value = Settings> {
    let cap = prop_oneof![Just(0), Just(1000), Just(u64::MAX), 1000u64..125_000_000_000];
    (cap, 0u64..10_000_000, 0u64..70_000, any::<u64>()).prop_map(|(cap, rtt_us, packet_bytes, seed)| {
        Settings { cap: Rate(cap), rtt: Duration::from_micros(rtt_us), packet_bytes, seed }
    })
}

fn play(congestion: &mut Congestion, now: &mut Duration, event: &Event) {
    let ago = |now: Duration, us: u64| now.saturating_sub(Duration::from_micros(us));
    match *event {
        Event::Wait(us) => *now += Duration::from_micros(us),
        Event::Sent(bytes) => congestion.handle_sent(*now, bytes),
        Event::Departed(us) => congestion.handle_departed(*now + Duration::from_micros(us)),
        Event::Acked { ago_us, bytes } => congestion.handle_acked(ago(*now, ago_us), bytes),
        Event::AcksEnd { in_flight_bytes, app_limited } => {
            congestion.handle_acks_end(*now, in_flight_bytes, app_limited);
        }
        Event::Lost { ago_us, bytes } => congestion.handle_lost(*now, ago(*now, ago_us), bytes),
        Event::PacketLength(bytes) => congestion.set_packet_bytes(bytes),
        Event::Cap(cap) => congestion.set_cap(Rate(cap)),
    }
}

proptest! {
    #[test]
    fn pace_and_window_stay_within_their_bounds(
        settings in settings(),
        events in prop::collection::vec(event(), 0..400),
    ) {
        let mut now = Duration::from_secs(5);
        let mut congestion = Congestion::new(settings, now);
        let mut cap = settings.cap;
        for event in &events {
            if let Event::Cap(other) = event {
                cap = Rate(*other);
            }
            play(&mut congestion, &mut now, event);
            let (pace, window) = (congestion.pace(), congestion.window());
            prop_assert!(pace >= congestion.min_pace() && pace <= cap, "{pace} after {event:?}");
            prop_assert!(window >= congestion.min_window() && window <= congestion.max_window(), "{window}");
        }
    }
}
