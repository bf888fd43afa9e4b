//! Bulk channels: a header of any bytes, and both ends of a channel against a peer that says anything.
//!
//! The receiving end holds no more than its window and the chunk at its head; the sending end sends what was
//! pushed and believes no acknowledgement of what was not.

use bytes::Bytes;
use longhaul_core::bulk::{
    Admission, BulkId, Channel, ChunkHeader, Delivery, MAX_CHUNK_BYTES, Receiver, Sender, cost,
};
use longhaul_core::ids::MigrationId;

use crate::input::Input;

const WINDOW_BYTES: u64 = 64 << 10;

/// Plays `data` as events of a channel's two ends.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let header = input.array();
    if let Ok(decoded) = ChunkHeader::decode(&header) {
        assert_eq!(decoded.encode(), header);
        assert!(decoded.length_bytes <= MAX_CHUNK_BYTES);
    }
    receive(&mut Input(input.0));
    send(&mut input);
}

fn receive(input: &mut Input<'_>) {
    let id = BulkId { migration: MigrationId(1), channel: Channel::Memory };
    let mut receiver = Receiver::new(WINDOW_BYTES);
    let mut handed_out = 0;
    while !input.is_empty() {
        let kind = input.byte();
        // Mostly near what is awaited, sometimes anywhere.
        let number = match kind & 0x80 {
            0 => receiver.next().saturating_add(u64::from(input.byte() & 7)),
            _ => input.u64(),
        };
        match kind & 7 {
            0..=3 => {
                let (length_bytes, end) = (u32::from(input.u16()), kind & 0x40 != 0);
                let length_bytes = if end { 0 } else { length_bytes };
                let header = ChunkHeader { id, number, length_bytes, end };
                if receiver.admit(&header) == Ok(Admission::Read) && kind & 7 != 3 {
                    receiver.handle_chunk(number, Bytes::from(vec![0; length_bytes as usize]), end);
                }
            }
            4 => receiver.handle_abandoned(number),
            5 => receiver.handle_disconnected(),
            6 => receiver.handle_taken(number),
            _ => {
                if let Some(Delivery::Chunk(_) | Delivery::End) = receiver.poll_delivery() {
                    handed_out += 1;
                }
            }
        }
        assert!(receiver.held_bytes() <= WINDOW_BYTES + cost(u64::from(MAX_CHUNK_BYTES)));
        assert!(receiver.taken() <= handed_out && handed_out <= receiver.next());
    }
}

fn send(input: &mut Input<'_>) {
    let mut sender = Sender::new();
    let mut pushed = 0u64;
    while !input.is_empty() {
        let kind = input.byte();
        let number = match kind & 0x80 {
            0 => u64::from(input.byte()),
            _ => input.u64(),
        };
        match kind & 7 {
            0 | 1 => pushed += u64::from(sender.push(Bytes::from(vec![1; usize::from(kind)])).is_ok()),
            2 => pushed += u64::from(kind & 0x40 != 0 && sender.end().is_ok()),
            3 => {
                if let Some(outgoing) = sender.poll_transmit() {
                    assert!(outgoing.number < pushed);
                }
            }
            4 => {
                let next = number.wrapping_add(u64::from(input.byte()));
                let _ = sender.handle_open(number, next, input.u64());
            }
            5 => assert!(number <= pushed || sender.handle_ack(number).is_err()),
            6 => {
                let _ = sender.handle_ack(number);
            }
            _ => match kind & 0x60 {
                0 => sender.handle_sent(number),
                0x20 => sender.handle_lost(number),
                0x40 => sender.handle_refused(number),
                _ => sender.handle_disconnected(),
            },
        }
        assert!(sender.acknowledged().chunks <= pushed);
    }
}

/// A header, and rows of events that use every branch.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let id = BulkId { migration: MigrationId(1), channel: Channel::Disk(2) };
    let header = ChunkHeader { id, number: 3, length_bytes: 4096, end: false }.encode().to_vec();
    let orderly =
        [&header[..], &[0, 0, 0x10, 0, 7, 0, 6, 1, 0, 0, 0, 10, 0x40, 0, 0, 0, 7, 0, 6, 2]].concat();
    let sending = [
        0, 0, 1, 0, 0x84, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 3, 0, 3, 0, 6, 1, 0x42, 0, 7, 0,
    ];
    vec![("orderly", orderly), ("sending", [&header[..], &sending].concat())]
}
