//! How the stage machines' messages ride in [`Message::Migration`]: postcard, bounded by the frame.
//!
//! Kept apart from the link's own messages so that a change of one does not change the other's bytes.

use super::{Message, Opaque, WireError};
use crate::ids::MigrationId;
use crate::migration::message::MigrationMessage;

/// A body that no version this side speaks could have written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Peer sent a migration message that does not decode; run the same version at both sites")]
pub struct UnreadableMigrationMessage;

impl MigrationMessage {
    /// Wraps the message for the control stream. Fails only for a machine whose lists of neighbours
    /// and flows exceed a frame.
    pub fn to_wire(&self, id: MigrationId) -> Result<Message, WireError> {
        let bytes = postcard::to_allocvec(self).unwrap_or_default();
        Ok(Message::Migration { id, body: Opaque::try_from(bytes)? })
    }

    /// Unwraps a body that arrived; trailing bytes are refused.
    pub fn from_wire(body: &Opaque) -> Result<Self, UnreadableMigrationMessage> {
        match postcard::take_from_bytes(body.as_slice()) {
            Ok((message, [])) => Ok(message),
            Ok((_, _)) | Err(_) => Err(UnreadableMigrationMessage),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Epoch;
    use crate::migration::CommitMode;
    use crate::migration::arbiter::Arbiter;
    use crate::migration::message::{Handover, Refusal};
    use crate::migration::record::{DestinationRecord, Record, SourceRecord};
    use crate::tunnel::advertisement::Advertisement;
    use crate::tunnel::handover::{Mac, Neighbour, NeighbourKind};

    fn first_byte(value: &impl serde::Serialize) -> u8 {
        postcard::to_allocvec(value).unwrap()[0]
    }

    #[test]
    fn what_came_with_the_arbiter_stands_behind_what_was_there_and_moves_no_number() {
        let handover = || Box::new(Handover { nics: Vec::new() });
        let offer = MigrationMessage::Offer { epoch: Epoch(3), handover: handover() };
        let taken_back = MigrationMessage::TakenBack { epoch: Epoch(3) };
        assert_eq!([&MigrationMessage::Unknown, &taken_back, &offer].map(first_byte), [10, 11, 12]);
        let arbitrated = [Arbiter::Dns, Arbiter::Etcd].map(CommitMode::Arbitrated);
        assert_eq!(postcard::to_allocvec(&CommitMode::Confirmed).unwrap(), [0]);
        assert_eq!(arbitrated.map(|mode| postcard::to_allocvec(&mode).unwrap()), [[1, 0], [1, 1]]);
        assert_eq!(postcard::to_allocvec(&CommitMode::Pipelined).unwrap(), [2]);
        let second_byte = |record: &Record| postcard::to_allocvec(record).unwrap()[1];
        let source = [
            SourceRecord::Returned { why: Refusal::Operator },
            SourceRecord::TakenBack { destroyed: "b".parse().unwrap() },
            SourceRecord::Offered { handover: handover() },
            SourceRecord::Reclaiming { handover: handover() },
            SourceRecord::Promised { handover: handover() },
            SourceRecord::Settled,
        ];
        assert_eq!(source.map(|record| second_byte(&Record::Source(record))), [6, 7, 8, 9, 10, 11]);
        let destination = [
            DestinationRecord::Refused { why: Refusal::Operator },
            DestinationRecord::TakenOver { handover: handover(), destroyed: "a".parse().unwrap() },
            DestinationRecord::Overruled,
            DestinationRecord::Claiming { handover: handover() },
            DestinationRecord::Owned { handover: handover() },
            DestinationRecord::HandedBack { why: Refusal::Operator },
        ];
        assert_eq!(destination.map(|record| second_byte(&Record::Destination(record))), [3, 4, 5, 6, 7, 8]);
    }

    fn neighbour(kind: NeighbourKind) -> Neighbour {
        Neighbour { addr: "fe80::1".parse().unwrap(), mac: Mac([2, 0, 0, 0, 0, 1]), kind }
    }

    fn advertiser() -> NeighbourKind {
        let header = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        NeighbourKind::Advertiser(Box::new(Advertisement::parse(&header).unwrap()))
    }

    #[test]
    fn a_neighbour_that_advertises_nothing_is_written_as_it_was_before() {
        let before = |router: bool| {
            let addr: std::net::IpAddr = "fe80::1".parse().unwrap();
            postcard::to_allocvec(&(addr, Mac([2, 0, 0, 0, 0, 1]), router)).unwrap()
        };
        for (kind, router) in [(NeighbourKind::Host, false), (NeighbourKind::Router, true)] {
            assert_eq!(postcard::to_allocvec(&neighbour(kind.clone())).unwrap(), before(router));
            assert_eq!(postcard::from_bytes::<Neighbour>(&before(router)).unwrap(), neighbour(kind));
        }
        let bytes = postcard::to_allocvec(&neighbour(advertiser())).unwrap();
        assert_eq!(postcard::from_bytes::<Neighbour>(&bytes).unwrap(), neighbour(advertiser()));
        assert_eq!(bytes[bytes.len() - 18..bytes.len() - 15], [2, 16, 134], "kind, length, type");
        let mut other = bytes;
        let at = other.len() - 16;
        other[at] = 135;
        assert!(postcard::from_bytes::<Neighbour>(&other).is_err(), "no advertisement");
    }

    #[test]
    fn a_message_survives_the_wire_and_a_longer_one_does_not_decode() {
        let message = MigrationMessage::Refused { epoch: Epoch(3), why: Refusal::Operator };
        let Message::Migration { id, body } = message.to_wire(MigrationId(5)).unwrap() else {
            panic!("wrapped as something else");
        };
        assert_eq!((id, MigrationMessage::from_wire(&body).unwrap()), (MigrationId(5), message));
        let mut longer = body.as_slice().to_vec();
        longer.push(0);
        assert!(MigrationMessage::from_wire(&Opaque::try_from(longer).unwrap()).is_err());
    }

    #[test]
    fn the_connections_of_a_busy_machine_fit_a_frame_and_no_more_are_handed_over() {
        use std::net::{IpAddr, Ipv6Addr};

        use crate::migration::message::MAX_HANDED_FLOWS;
        use crate::tunnel::handover::{FlowTuple, Mac, NicHandover};

        let flow = |n: u32| FlowTuple {
            protocol: 255,
            local: IpAddr::V6(Ipv6Addr::from([0xff; 16])),
            local_port: u16::MAX,
            remote: IpAddr::V6(Ipv6Addr::from(u128::MAX - u128::from(n))),
            remote_port: u16::MAX,
        };
        let nic = |name: &str, flows| NicHandover {
            nic: name.parse().unwrap(),
            mac: Mac([2; 6]),
            home: Vec::new(),
            neighbours: Vec::new(),
            home_prefixes: Vec::new(),
            flows,
        };
        let most = MAX_HANDED_FLOWS as u32;
        let nics =
            vec![nic("one", (0..most - 10).map(flow).collect()), nic("two", (0..15).map(flow).collect())];
        let mut handover = Handover { nics };
        assert_eq!(handover.bound_flows(), 5);
        assert_eq!(handover.nics[1].flows.len(), 10);
        for message in [
            MigrationMessage::Commit { epoch: Epoch(u64::MAX), handover: Box::new(handover.clone()) },
            MigrationMessage::Offer { epoch: Epoch(u64::MAX), handover: Box::new(handover.clone()) },
        ] {
            let wire = message.to_wire(MigrationId(u128::MAX)).expect("fits");
            wire.encode().expect("fits a frame");
            let Message::Migration { body, .. } = wire else { panic!("another message") };
            assert_eq!(MigrationMessage::from_wire(&body), Ok(message));
        }
    }
}
