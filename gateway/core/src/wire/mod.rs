//! The protocol two gateways speak on their control stream: what a message is, how long it may be,
//! and which version both sides understand.
//!
//! ```text
//!   dialler                                     listener
//!      | --- frame: Hello (magic, versions, ...) --> |     first frame in each direction
//!      | <-- frame: Hello ------------------------- |     both pick the newest common version
//!      | <=> frame: Message, frame: Message ... <=> |     until the stream or the link ends
//! ```
//!
//! There is no ping: QUIC keeps the connection alive. Bulk data does not travel here (see
//! [`crate::bulk`]), only what steers it. This module decides nothing about migrations.

mod anchor;
mod frame;
mod hello;
mod migration;

use serde::{Deserialize, Serialize};

use crate::bulk::BulkId;
use crate::ids::MigrationId;

pub use anchor::{AnchorMessage, MAX_ADDRESSES};
pub use frame::{FRAME_PREFIX_BYTES, FrameDecoder, FrameError, MAX_FRAME_BYTES, encode_frame};
pub use hello::{
    Hello, HelloError, InvalidSoftware, SUPPORTED, Software, Version, VersionMismatch, VersionRange,
    negotiate,
};
pub use migration::UnreadableMigrationMessage;

/// The longest [`Opaque`] body in bytes: a frame less its envelope.
pub const MAX_BODY_BYTES: usize = MAX_FRAME_BYTES - 64;

/// Everything that may travel on the control stream after the [`Hello`]: a closed set.
///
/// A message may be lost when its link dies; whoever needs an answer repeats it. The bulk messages are
/// the link's own and are announced anew on every connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The sender of this message receives on bulk channel `id`, and where to go on. Nothing is sent
    /// on a channel before this arrived on the same connection.
    BulkOpen {
        /// The channel.
        id: BulkId,
        /// All numbers below were taken by the consumer (acknowledged).
        taken: u64,
        /// All numbers below have arrived and need not be sent again; at least `taken`.
        next: u64,
        /// How much may be sent beyond `taken`, in bytes, counted with [`crate::bulk::cost`].
        window_bytes: u64,
    },
    /// All numbers below `taken` were taken by the consumer.
    BulkAck {
        /// The channel.
        id: BulkId,
        /// The lowest number that was not taken yet.
        taken: u64,
    },
    /// The sender of this message has closed its end of the channel before its end.
    BulkClose {
        /// The channel.
        id: BulkId,
    },
    /// What the stage machines of one migration say to each other.
    Migration {
        /// The attempt it belongs to.
        id: MigrationId,
        /// Opaque to the link.
        body: Opaque,
    },
    /// What sites that attract addresses of one machine say to each other.
    Anchor(AnchorMessage),
}

/// At most [`MAX_BODY_BYTES`] bytes that the link carries without looking inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct Opaque(Vec<u8>);

impl Opaque {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

impl TryFrom<Vec<u8>> for Opaque {
    type Error = WireError;

    fn try_from(bytes: Vec<u8>) -> Result<Self, WireError> {
        if bytes.len() > MAX_BODY_BYTES {
            return Err(WireError::BodyTooLong { length_bytes: bytes.len() });
        }
        Ok(Self(bytes))
    }
}

impl From<Opaque> for Vec<u8> {
    fn from(opaque: Opaque) -> Self {
        opaque.0
    }
}

/// Why a message was not sent or not understood. A peer that causes one is disconnected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A body that would not fit its frame.
    #[error("A message body of {length_bytes} bytes is longer than the {MAX_BODY_BYTES} that fit a frame")]
    BodyTooLong {
        /// The body's length.
        length_bytes: usize,
    },
    /// The frame itself was refused.
    #[error("The control stream carries a frame that was refused")]
    Frame(#[from] FrameError),
    /// The body is no message of this version.
    #[error("The control stream carries bytes that are no message; the peer is damaged or no gateway")]
    NotAMessage(#[source] postcard::Error),
    /// The body goes on after the message.
    #[error("A control message is followed by {trailing_bytes} bytes that belong to nothing")]
    TrailingBytes {
        /// How many.
        trailing_bytes: usize,
    },
}

impl Message {
    /// The message as one frame, ready for the stream.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let body = postcard::to_allocvec(self).map_err(WireError::NotAMessage)?;
        Ok(encode_frame(&body)?)
    }

    /// A message from the body of one frame; every byte of it must belong to the message.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let (message, rest) = postcard::take_from_bytes(body).map_err(WireError::NotAMessage)?;
        match rest.len() {
            0 => Ok(message),
            trailing_bytes => Err(WireError::TrailingBytes { trailing_bytes }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bulk::Channel;

    fn bulk_id() -> impl Strategy<Value = BulkId> {
        let channel = prop_oneof![
            Just(Channel::Memory),
            any::<u8>().prop_map(Channel::Disk),
            any::<u8>().prop_map(Channel::Map),
        ];
        (any::<u128>(), channel)
            .prop_map(|(migration, channel)| BulkId { migration: MigrationId(migration), channel })
    }

    fn anchor((epoch, addresses): (u64, Vec<std::net::IpAddr>)) -> Message {
        let care_of = addresses.iter().map(|address| (*address, *address)).collect();
        let (vm, to) = ("web1".parse().unwrap(), "c".parse().unwrap());
        Message::Anchor(AnchorMessage::Moved { vm, epoch: crate::ids::Epoch(epoch), to, care_of })
    }

    fn message() -> impl Strategy<Value = Message> {
        let opaque = prop::collection::vec(any::<u8>(), 0..2000)
            .prop_map(|bytes| Opaque::try_from(bytes).expect("short"));
        prop_oneof![
            (bulk_id(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
                |(id, taken, next, window_bytes)| Message::BulkOpen { id, taken, next, window_bytes }
            ),
            (bulk_id(), any::<u64>()).prop_map(|(id, taken)| Message::BulkAck { id, taken }),
            bulk_id().prop_map(|id| Message::BulkClose { id }),
            (any::<u128>(), opaque).prop_map(|(id, body)| Message::Migration { id: MigrationId(id), body }),
            (any::<u64>(), prop::collection::vec(any::<std::net::IpAddr>(), 0..4)).prop_map(anchor),
        ]
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(messages in prop::collection::vec(message(), 1..8), cut in 1usize..64) {
            let mut stream = Vec::new();
            for message in &messages {
                stream.extend(message.encode().unwrap());
            }
            let mut decoder = FrameDecoder::new();
            let mut seen = Vec::new();
            for piece in stream.chunks(cut) {
                decoder.push(piece);
                while let Some(body) = decoder.next_frame().unwrap() {
                    seen.push(Message::decode(&body).unwrap());
                }
            }
            prop_assert_eq!(seen, messages);
            prop_assert_eq!(decoder.buffered_bytes(), 0);
        }

        #[test]
        fn garbage_never_panics(garbage in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = Message::decode(&garbage);
            let _ = Hello::decode(&garbage);
            let mut decoder = FrameDecoder::new();
            decoder.push(&garbage);
            while let Ok(Some(body)) = decoder.next_frame() {
                let _ = Message::decode(&body);
            }
        }

        #[test]
        fn a_truncated_message_is_refused(message in message(), keep in 0.0f64..1.0) {
            let frame = message.encode().unwrap();
            let body = &frame[4..];
            let cut = (body.len() as f64 * keep) as usize;
            prop_assert!(Message::decode(&body[..cut]).is_err());
        }
    }

    #[test]
    fn the_longest_body_fits_and_one_byte_more_does_not() {
        let body = Opaque::try_from(vec![7; MAX_BODY_BYTES]).unwrap();
        let message = Message::Migration { id: MigrationId(u128::MAX), body };
        assert!(message.encode().unwrap().len() <= MAX_FRAME_BYTES + 4);
        assert!(Opaque::try_from(vec![7; MAX_BODY_BYTES + 1]).is_err());
    }

    #[test]
    fn bytes_after_a_message_are_refused() {
        let id = BulkId { migration: MigrationId(1), channel: Channel::Memory };
        let mut body = Message::BulkClose { id }.encode().unwrap()[4..].to_vec();
        body.push(0);
        assert_eq!(Message::decode(&body), Err(WireError::TrailingBytes { trailing_bytes: 1 }));
    }
}
