//! Who is compared, by name, and what each needs to be there. How each sends is in `end`.

use serde::{Deserialize, Serialize};

use super::s2n_quic;

/// One way of sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sender {
    /// The gateway's link, told twice the path's rate.
    Ours,
    /// The gateway's link, told exactly the path's rate.
    OursExact,
    /// The gateway's link with `congestion = "fixed"`, told exactly the path's rate.
    Fixed,
    /// Kernel TCP.
    TcpCubic,
    /// Kernel TCP, the kernel's own BBR.
    TcpBbr,
    /// quinn's CUBIC, with the gateway's windows and short streams.
    QuinnCubic,
    /// quinn's NewReno, likewise.
    QuinnReno,
    /// quinn's BBR, likewise.
    QuinnBbr,
    /// s2n-quic's BBR, likewise.
    S2nQuicBbr,
}

impl Sender {
    /// In the order of the table.
    pub const ALL: [Self; 9] = [
        Self::Ours,
        Self::OursExact,
        Self::Fixed,
        Self::TcpCubic,
        Self::TcpBbr,
        Self::QuinnCubic,
        Self::QuinnReno,
        Self::QuinnBbr,
        Self::S2nQuicBbr,
    ];

    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "longhaul",
            Self::OursExact => "longhaul-exact",
            Self::Fixed => "longhaul-fixed",
            Self::TcpCubic => "tcp-cubic",
            Self::TcpBbr => "tcp-bbr",
            Self::QuinnCubic => "quinn-cubic",
            Self::QuinnReno => "quinn-reno",
            Self::QuinnBbr => "quinn-bbr",
            Self::S2nQuicBbr => "s2n-quic-bbr",
        }
    }

    /// The kernel's congestion control, if it is TCP.
    pub fn kernel_control(self) -> Option<&'static str> {
        match self {
            Self::TcpCubic => Some("cubic"),
            Self::TcpBbr => Some("bbr"),
            Self::Ours
            | Self::OursExact
            | Self::Fixed
            | Self::QuinnCubic
            | Self::QuinnReno
            | Self::QuinnBbr
            | Self::S2nQuicBbr => None,
        }
    }

    /// Makes ready what it needs; else why it cannot be measured here.
    pub fn prepare(self) -> Result<(), String> {
        if self == Self::S2nQuicBbr {
            return s2n_quic::build();
        }
        let Some(control) = self.kernel_control() else { return Ok(()) };
        let known = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control");
        let has = known.unwrap_or_default().split_whitespace().any(|name| name == control);
        if has { Ok(()) } else { Err(format!("the kernel has no {control}")) }
    }
}
