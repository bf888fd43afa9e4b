//! The Network Block Device protocol, fixed newstyle, over UNIX sockets between this gateway and QEMU.
//!
//! Numbers are from the protocol's public specification (`doc/proto.md` of the NBD project). There is
//! no TLS and no TCP here: NBD never leaves the host, the link carries records instead.

mod client;
mod replies;
mod server;

use std::io;

pub use client::{Extent, NbdClient};
pub use server::{GuestChange, NbdExport, NbdServer, serve_connection};

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, the same bits in both directions.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

mod option {
    pub(super) const EXPORT_NAME: u32 = 1;
    pub(super) const ABORT: u32 = 2;
    pub(super) const LIST: u32 = 3;
    pub(super) const INFO: u32 = 6;
    pub(super) const GO: u32 = 7;
    pub(super) const STRUCTURED_REPLY: u32 = 8;
    pub(super) const SET_META_CONTEXT: u32 = 10;
}

mod option_reply {
    pub(super) const ACK: u32 = 1;
    pub(super) const SERVER: u32 = 2;
    pub(super) const INFO: u32 = 3;
    pub(super) const META_CONTEXT: u32 = 4;
    pub(super) const ERROR: u32 = 1 << 31;
    pub(super) const ERR_UNSUP: u32 = ERROR + 1;
    pub(super) const ERR_INVALID: u32 = ERROR + 3;
    pub(super) const ERR_UNKNOWN: u32 = ERROR + 6;
}

mod info {
    pub(super) const EXPORT: u16 = 0;
    pub(super) const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
mod export_flag {
    pub(super) const HAS_FLAGS: u16 = 1;
    pub(super) const READ_ONLY: u16 = 2;
    pub(super) const SEND_FLUSH: u16 = 4;
    pub(super) const SEND_TRIM: u16 = 32;
    pub(super) const SEND_WRITE_ZEROES: u16 = 64;
}

mod command {
    pub(super) const READ: u16 = 0;
    pub(super) const WRITE: u16 = 1;
    pub(super) const DISC: u16 = 2;
    pub(super) const FLUSH: u16 = 3;
    pub(super) const TRIM: u16 = 4;
    pub(super) const WRITE_ZEROES: u16 = 6;
    pub(super) const BLOCK_STATUS: u16 = 7;
}

mod reply_chunk {
    pub(super) const FLAG_DONE: u16 = 1;
    pub(super) const NONE: u16 = 0;
    pub(super) const OFFSET_DATA: u16 = 1;
    pub(super) const OFFSET_HOLE: u16 = 2;
    pub(super) const BLOCK_STATUS: u16 = 5;
    pub(super) const ERROR_BIT: u16 = 1 << 15;
}

/// The bit of `base:allocation` that says a range reads as zeros.
const STATE_ZERO: u32 = 2;
/// The metadata context that tells zeros.
const BASE_ALLOCATION: &str = "base:allocation";

mod errno {
    pub(super) const EPERM: u32 = 1;
    pub(super) const EINVAL: u32 = 22;
    pub(super) const ENOSPC: u32 = 28;
    pub(super) const ESHUTDOWN: u32 = 108;
}

/// Why talking NBD failed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The socket.
    #[error("The NBD socket {path} cannot be used")]
    Socket {
        /// Its path.
        path: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("The NBD connection broke")]
    Io(#[from] io::Error),
    /// The other end does not speak the protocol as this one expects.
    #[error("The NBD peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// The server refused the export, or an option that is needed.
    #[error("The NBD server refused {what} (reply {code:#x}): check that QEMU exports it")]
    Refused {
        /// The export's name or the option.
        what: String,
        /// The server's reply type.
        code: u32,
    },
    /// The server answered a request with an error.
    #[error("The NBD server answered {command} at {offset}: {}", io::Error::from_raw_os_error(*errno as i32))]
    Request {
        /// What was asked.
        command: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// The protocol's error number, which are Linux's.
        errno: u32,
    },
    /// The connection ended before the answer.
    #[error("The NBD connection was closed")]
    Closed,
}

fn command_name(command: u16) -> &'static str {
    match command {
        command::READ => "a read",
        command::WRITE => "a write",
        command::FLUSH => "a flush",
        command::TRIM => "a trim",
        command::WRITE_ZEROES => "a write of zeros",
        command::BLOCK_STATUS => "a block status request",
        _ => "a request",
    }
}
