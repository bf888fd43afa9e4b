//! Properties of a whole channel over a carrier that loses, doubles, reorders and disconnects.

use bytes::Bytes;
use proptest::prelude::*;

use super::*;

const WINDOW_BYTES: u64 = 8 * 1024;

fn id() -> BulkId {
    BulkId { migration: MigrationId(7), channel: Channel::Disk(3) }
}

fn header(number: u64, length_bytes: u32, end: bool) -> ChunkHeader {
    ChunkHeader { id: id(), number, length_bytes, end }
}

/// One thing that happens to the channel; indices wrap around what there is.
#[derive(Debug, Clone)]
enum Event {
    Push(usize),
    Transmit,
    Deliver(usize),
    DeliverTwice(usize),
    Lose(usize),
    Refuse(usize),
    Take,
    AckArrives,
    Disconnect,
    Reconnect,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0usize..3000).prop_map(Event::Push),
        6 => Just(Event::Transmit),
        4 => any::<usize>().prop_map(Event::Deliver),
        1 => any::<usize>().prop_map(Event::DeliverTwice),
        1 => any::<usize>().prop_map(Event::Lose),
        1 => any::<usize>().prop_map(Event::Refuse),
        3 => Just(Event::Take),
        2 => Just(Event::AckArrives),
        1 => Just(Event::Disconnect),
        2 => Just(Event::Reconnect),
    ]
}

/// Both ends and what is between them.
struct Channelled {
    window: SendWindow,
    sender: Sender,
    receiver: Receiver,
    flying: Vec<Outgoing>,
    pushed: Vec<Bytes>,
    seen: Vec<Bytes>,
    ended: bool,
}

impl Channelled {
    fn new() -> Self {
        Self {
            window: SendWindow::new(WINDOW_BYTES),
            sender: Sender::new(),
            receiver: Receiver::new(WINDOW_BYTES),
            flying: Vec::new(),
            pushed: Vec::new(),
            seen: Vec::new(),
            ended: false,
        }
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Push(length) => self.push(*length),
            Event::Transmit => self.flying.extend(self.sender.poll_transmit()),
            Event::Deliver(at) => self.arrive(*at, true),
            Event::DeliverTwice(at) => self.arrive(*at, false),
            Event::Lose(at) => {
                if let Some(lost) = self.pick(*at, true) {
                    self.sender.handle_lost(lost.number);
                }
            }
            Event::Refuse(at) => {
                if let Some(refused) = self.pick(*at, true) {
                    self.sender.handle_refused(refused.number);
                    self.reconnect();
                }
            }
            Event::Take => self.take(),
            Event::AckArrives => self.ack(),
            Event::Disconnect => self.disconnect(),
            Event::Reconnect => self.reconnect(),
        }
    }

    fn push(&mut self, length: usize) {
        if !self.window.has_room(length as u64) {
            return;
        }
        let chunk = Bytes::from(vec![self.pushed.len() as u8; length]);
        self.sender.push(chunk.clone()).expect("short and not ended");
        self.window.handle_queued(length as u64);
        self.pushed.push(chunk);
    }

    fn pick(&mut self, at: usize, remove: bool) -> Option<Outgoing> {
        let index = at.checked_rem(self.flying.len())?;
        Some(if remove { self.flying.swap_remove(index) } else { self.flying[index].clone() })
    }

    fn arrive(&mut self, at: usize, remove: bool) {
        let Some(chunk) = self.pick(at, remove) else { return };
        let header = header(chunk.number, chunk.bytes.len() as u32, chunk.end);
        let admission = self.receiver.admit(&header).expect("a correct sender keeps to the window");
        if admission == Admission::Read {
            self.receiver.handle_chunk(chunk.number, chunk.bytes, chunk.end);
        }
        if remove {
            self.sender.handle_sent(chunk.number);
        }
        assert!(
            self.receiver.held_bytes() <= WINDOW_BYTES,
            "the receiver holds {}",
            self.receiver.held_bytes()
        );
    }

    fn take(&mut self) {
        match self.receiver.poll_delivery() {
            Some(Delivery::Chunk(bytes)) => self.seen.push(bytes),
            Some(Delivery::End) => self.ended = true,
            None => return,
        }
        self.receiver.handle_taken(self.receiver.taken() + 1);
    }

    fn ack(&mut self) {
        self.sender.handle_ack(self.receiver.taken()).expect("taken was sent");
        self.window.handle_acknowledged(self.sender.acknowledged());
    }

    fn disconnect(&mut self) {
        self.flying.clear();
        self.sender.handle_disconnected();
        self.receiver.handle_disconnected();
        assert_eq!(self.sender.poll_transmit(), None);
    }

    fn reconnect(&mut self) {
        let (taken, next) = (self.receiver.taken(), self.receiver.next());
        self.sender.handle_open(taken, next, self.receiver.window_bytes()).expect("nothing was forgotten");
        self.window.handle_acknowledged(self.sender.acknowledged());
    }

    fn finish(&mut self) {
        self.sender.end().expect("ended once");
        self.disconnect();
        self.reconnect();
        for _ in 0..100_000 {
            if self.sender.is_finished() {
                return;
            }
            for event in [Event::Transmit, Event::Deliver(0), Event::Take, Event::AckArrives] {
                self.apply(&event);
            }
        }
        panic!("the channel is stuck");
    }
}

proptest! {
    #[test]
    fn everything_arrives_exactly_once_and_in_order(events in prop::collection::vec(event(), 0..400)) {
        let mut channel = Channelled::new();
        channel.reconnect();
        for event in &events {
            channel.apply(event);
        }
        channel.finish();
        prop_assert_eq!(&channel.seen, &channel.pushed);
        prop_assert!(channel.ended && channel.receiver.is_finished());
        prop_assert_eq!(channel.window.unacknowledged_bytes(), 0);
        prop_assert_eq!(channel.receiver.held_bytes(), 0);
    }

    #[test]
    fn headers_survive_encoding(migration: u128, disk: Option<u8>, map: bool, number: u64, length in 0..=MAX_CHUNK_BYTES) {
        let channel = disk.map_or(Channel::Memory, if map { Channel::Map } else { Channel::Disk });
        let id = BulkId { migration: MigrationId(migration), channel };
        let header = ChunkHeader { id, number, length_bytes: length, end: length == 0 };
        prop_assert_eq!(ChunkHeader::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn header_garbage_never_panics(bytes: [u8; ChunkHeader::LEN]) {
        let _ = ChunkHeader::decode(&bytes);
    }
}

#[test]
fn nothing_is_sent_before_the_receiving_end_is_announced() {
    let mut sender = Sender::new();
    sender.push(Bytes::from_static(b"x")).unwrap();
    assert_eq!(sender.poll_transmit(), None);
    sender.handle_open(0, 0, 1024).unwrap();
    assert_eq!(sender.poll_transmit().unwrap().number, 0);
}

#[test]
fn a_full_window_stops_the_sender_and_an_acknowledgement_lets_it_go_on() {
    let mut sender = Sender::new();
    for _ in 0..3 {
        sender.push(Bytes::from(vec![0; 1000])).unwrap();
    }
    sender.handle_open(0, 0, 2 * cost(1000)).unwrap();
    assert_eq!(sender.poll_transmit().unwrap().number, 0);
    assert_eq!(sender.poll_transmit().unwrap().number, 1);
    assert_eq!(sender.poll_transmit(), None);
    sender.handle_sent(0);
    assert_eq!(sender.poll_transmit(), None, "arrived is not taken");
    sender.handle_ack(1).unwrap();
    assert_eq!(sender.poll_transmit().unwrap().number, 2);
}

#[test]
fn the_producers_window_ends_exactly_where_it_says() {
    let mut window = SendWindow::new(2 * cost(1000));
    window.handle_queued(1000);
    assert!(window.has_room(1000));
    assert!(!window.has_room(1001));
    assert!(
        window.has_room_within(999, 2 * cost(1000) - 1) && !window.has_room_within(1000, 2 * cost(1000) - 1)
    );
    assert!(!window.has_room_within(1001, u64::MAX), "a bound makes no window larger");
    window.handle_queued(1000);
    assert!(!window.has_room(0));
    window.handle_acknowledged(Acknowledged { chunks: 2, bytes: 2000 });
    assert!(window.has_room(u64::from(MAX_CHUNK_BYTES)), "an empty window takes any chunk");
}

#[test]
fn a_peer_that_ignores_its_window_is_noticed() {
    let mut receiver = Receiver::new(2 * cost(1000));
    assert_eq!(receiver.admit(&header(1, 1000, false)), Ok(Admission::Read));
    let beyond = ReceiveError::BeyondWindow { number: 2, window_bytes: 2 * cost(1000) };
    assert_eq!(receiver.admit(&header(2, 1001, false)), Err(beyond));
    assert_eq!(receiver.admit(&header(0, 5000, false)), Ok(Admission::Read), "the head passes always");
}

#[test]
fn a_chunk_after_the_end_is_noticed() {
    let mut receiver = Receiver::new(4096);
    receiver.admit(&header(0, 0, true)).unwrap();
    receiver.handle_chunk(0, Bytes::new(), true);
    assert_eq!(receiver.admit(&header(1, 0, false)), Err(ReceiveError::AfterEnd { number: 1 }));
}

#[test]
fn a_peer_that_lost_its_state_is_noticed() {
    let mut sender = Sender::new();
    sender.push(Bytes::from_static(b"a")).unwrap();
    sender.handle_open(1, 1, 4096).unwrap();
    assert_eq!(sender.handle_open(0, 0, 4096), Err(SendError::Forgotten { next: 0, oldest: 1 }));
    assert_eq!(sender.handle_ack(2), Err(SendError::NeverSent { taken: 2, queued: 1 }));
}

#[test]
fn only_what_the_peer_lacks_is_sent_again() {
    let mut sender = Sender::new();
    for _ in 0..4 {
        sender.push(Bytes::from_static(b"abc")).unwrap();
    }
    sender.handle_open(0, 0, 65536).unwrap();
    while sender.poll_transmit().is_some() {}
    sender.handle_disconnected();
    sender.handle_open(1, 3, 65536).unwrap();
    assert_eq!(sender.poll_transmit().unwrap().number, 3);
    assert_eq!(sender.poll_transmit(), None);
    assert_eq!(sender.acknowledged(), Acknowledged { chunks: 1, bytes: 3 });
}
