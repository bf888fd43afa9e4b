//! What sites that attract addresses of one machine say to each other when it moves on.
//!
//! ```text
//!   the site it left            a site that attracts one of its addresses        the site it is at
//!      | ---- Moved (again and again) ----> |  packets now go to the new site         |
//!      | <--- Noted ----------------------- |                                         |
//!                                           | ---- Ended ---------------------------> |
//! ```
//!
//! `Moved` comes only after the new site has said that the machine runs there, and only the site that the machine was
//! at is believed. `Ended` may be lost: it saves the new site a rule, nothing more. Nobody gains a machine by these.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, SiteName, VmName};

/// Addresses that one of these messages names at most.
pub const MAX_ADDRESSES: usize = 64;

/// One word about one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AnchorMessage {
    /// The machine has moved on from the sender's site.
    Moved {
        /// The machine.
        vm: VmName,
        /// The epoch that began there.
        epoch: Epoch,
        /// Where it is now.
        to: SiteName,
        /// Its home addresses that have a stand-in there, and the stand-ins.
        care_of: Vec<(IpAddr, IpAddr)>,
    },
    /// A `Moved` was heard and is being followed, or is none of the receiver's business.
    Noted {
        /// The machine.
        vm: VmName,
        /// The epoch it named.
        epoch: Epoch,
    },
    /// The sender no longer attracts these addresses of the machine.
    Ended {
        /// The machine.
        vm: VmName,
        /// The addresses.
        addresses: Vec<IpAddr>,
    },
}

impl AnchorMessage {
    /// What it says is within its bounds.
    pub fn is_bounded(&self) -> bool {
        match self {
            Self::Moved { care_of, .. } => care_of.len() <= MAX_ADDRESSES,
            Self::Ended { addresses, .. } => addresses.len() <= MAX_ADDRESSES,
            Self::Noted { .. } => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Message;
    use super::*;

    #[test]
    fn it_comes_back_as_it_was_and_stands_behind_what_was_there() {
        let said = Message::Anchor(AnchorMessage::Noted { vm: "web1".parse().unwrap(), epoch: Epoch(3) });
        let frame = said.encode().unwrap();
        let body = &frame[super::super::FRAME_PREFIX_BYTES..];
        assert_eq!(body[0], 4, "the number of a new kind follows the old ones");
        assert_eq!(Message::decode(body).unwrap(), said);
    }

    #[test]
    fn more_addresses_than_a_machine_has_are_noticed() {
        let ended = |n| AnchorMessage::Ended {
            vm: "web1".parse().unwrap(),
            addresses: vec![[192, 0, 2, 1].into(); n],
        };
        assert!(ended(MAX_ADDRESSES).is_bounded());
        assert!(!ended(MAX_ADDRESSES + 1).is_bounded());
    }
}
