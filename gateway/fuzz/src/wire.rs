//! The control stream: frames, [`Hello`], [`Message`] and what rides in it.
//!
//! Whatever was decoded is encoded to bytes that decode to the same; nothing is held beyond one frame
//! and the piece that was pushed last.

use longhaul_core::bulk::{BulkId, Channel};
use longhaul_core::ids::{Epoch, MigrationId};
use longhaul_core::migration::message::{MigrationMessage, Refusal};
use longhaul_core::wire::{
    FrameDecoder, Hello, MAX_FRAME_BYTES, Message, SUPPORTED, Software, VersionRange, negotiate,
};

use crate::sample;

/// Reads `data` as a control stream, in pieces whose length its first byte decides.
pub fn run(data: &[u8]) {
    let Some((piece, stream)) = data.split_first() else { return };
    let piece = usize::from(*piece) + 1;
    let mut decoder = FrameDecoder::new();
    let mut first = true;
    for bytes in stream.chunks(piece) {
        decoder.push(bytes);
        assert!(decoder.buffered_bytes() <= MAX_FRAME_BYTES + 4 + piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(body)) if first => hello(&body),
                Ok(Some(body)) => message(&body),
                Ok(None) => break,
                Err(_) => return,
            }
            first = false;
        }
    }
}

fn hello(body: &[u8]) {
    let Ok(hello) = Hello::decode(body) else { return };
    let frame = hello.encode().expect("it fitted a frame");
    assert_eq!(Hello::decode(&frame[4..]).expect("it decodes again"), hello);
    let agreed = negotiate(SUPPORTED, hello.versions);
    let within = |range: VersionRange, version| range.oldest <= version && version <= range.newest;
    assert!(agreed.is_err() || agreed.is_ok_and(|version| within(hello.versions, version)));
}

fn message(body: &[u8]) {
    let Ok(message) = Message::decode(body) else { return };
    let frame = message.encode().expect("it fitted a frame");
    assert_eq!(Message::decode(&frame[4..]).expect("it decodes again"), message);
    let Message::Migration { id, body } = message else { return };
    let Ok(inner) = MigrationMessage::from_wire(&body) else { return };
    // What needs more room than it came in is refused and not cut.
    let Ok(Message::Migration { body, .. }) = inner.to_wire(id) else { return };
    assert_eq!(MigrationMessage::from_wire(&body).expect("it decodes again"), inner);
}

/// One stream of each kind of message.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let software = Software::try_from("longhaul".to_owned()).expect("printable");
    let hello = Hello { versions: SUPPORTED, site: sample::site("a"), instance: 7, software };
    let id = BulkId { migration: MigrationId(5), channel: Channel::Disk(1) };
    let link = [
        Message::BulkOpen { id, taken: 1, next: 2, window_bytes: 1 << 20 },
        Message::BulkAck { id, taken: 3 },
        Message::BulkClose { id },
    ];
    let (epoch, why) = (Epoch(4), Refusal::Verification("digest".to_owned()));
    let offers = [
        MigrationMessage::Propose(Box::new(sample::proposal())),
        MigrationMessage::Accept,
        MigrationMessage::Reserve { epoch },
        MigrationMessage::Reserved(sample::reservation()),
        MigrationMessage::Decline(Refusal::Operator),
    ];
    let ends = [
        MigrationMessage::Loaded { epoch },
        MigrationMessage::Commit { epoch, handover: Box::new(sample::handover()) },
        MigrationMessage::Activated { epoch },
        MigrationMessage::Refused { epoch, why: why.clone() },
        MigrationMessage::Abort { epoch, why },
        MigrationMessage::Unknown,
    ];
    let wire = |messages: &[MigrationMessage]| -> Vec<Message> {
        messages.iter().map(|message| message.to_wire(MigrationId(5)).expect("it fits")).collect()
    };
    let stream = |messages: &[Message]| {
        let mut stream = vec![255];
        stream.extend(hello.encode().expect("it fits"));
        messages.iter().for_each(|message| stream.extend(message.encode().expect("it fits")));
        stream
    };
    vec![("link", stream(&link)), ("offers", stream(&wire(&offers))), ("ends", stream(&wire(&ends)))]
}
