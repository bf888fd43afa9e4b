//! What can go wrong between the tunnel and the kernel, said so that an operator knows what to do.

use std::io;
use std::net::IpAddr;

use longhaul_core::tunnel::datapath::UnknownPort;
use longhaul_core::tunnel::policy::{AddressTaken, PortKey};

/// A tunnel operation that failed. What it had changed before is undone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TunnelError {
    /// The TUN or TAP device could not be made.
    #[error("Cannot make device {name}; is /dev/net/tun there, and CAP_NET_ADMIN?")]
    Device {
        /// Its name.
        name: String,
        /// What the kernel said.
        #[source]
        source: tun::Error,
    },
    /// A device that must exist does not.
    #[error("No device {0}; create it, or correct the name in the configuration")]
    NoSuchDevice(String),
    /// A name the kernel would not take as a device's.
    #[error("{0:?} is no device name: 1 to 15 characters, none of them a blank, a quote or a slash")]
    InvalidDeviceName(String),
    /// The kernel refused a change over rtnetlink.
    #[error("Kernel refused: {what}")]
    Netlink {
        /// What was asked for.
        what: String,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
    /// A file or socket operation failed.
    #[error("Cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// `nft` refused a transaction; nothing of it was applied.
    #[error("nft refused the rules: {message}")]
    Nft {
        /// Its own words.
        message: String,
    },
    /// `nft` printed something that is not its documented JSON.
    #[error("Cannot read what nft printed; nft 1.0 or newer is needed")]
    NftOutput(#[source] serde_json::Error),
    /// Two machines with one address.
    #[error(transparent)]
    AddressTaken(#[from] AddressTaken),
    /// Nothing was begun for that NIC.
    #[error(transparent)]
    UnknownPort(#[from] UnknownPort),
    /// What the tunnel has of it belongs to the machine that comes.
    #[error("The machine of {0} is on its way back: its tunnel ends when it is here")]
    Returning(PortKey),
    /// The flows of this NIC are not being sampled.
    #[error("Flows of {0} are not sampled; begin it when the machine starts")]
    NotSampled(PortKey),
    /// A care-of address of another family than the home address it stands for.
    #[error("Care-of address {care_of} cannot stand for {home}: give one of the same IP version")]
    FamilyMismatch {
        /// The home address.
        home: IpAddr,
        /// The care-of address.
        care_of: IpAddr,
    },
    /// Configuration values that exclude each other.
    #[error("Tunnel configuration: {0}")]
    Config(&'static str),
    /// The tunnel's task has ended.
    #[error("The tunnel has stopped; restart the gateway")]
    Stopped,
}

impl TunnelError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(super) fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let what = what.into();
        move |source| Self::Netlink { what, source }
    }
}
