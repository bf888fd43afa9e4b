//! The small service inside the guest: it gives disk, memory and connections something that can be checked.
//!
//! Its formats and patterns are public, because the laboratory computes the same content from outside. It does not
//! know that it is being moved, and nothing here speaks to a gateway.
//!
//! ```text
//! main ──▶ thread "log"     owns Log      (append, fsync)     ◀─┐
//!      ──▶ thread "disk"    owns Dirt     (rewrite blocks)    ◀─┤ commands, each with a channel for its answer
//!      ──▶ thread "memory"  owns Region   (touch pages)       ◀─┤
//!      ──▶ tokio: control (HTTP) ───────────────────────────────┘
//!                 record exchange, idle echo, download, upload, relay, UDP echo, QUIC echo
//! ```

pub mod client;
pub mod control;
pub mod crc;
pub mod dirt;
pub mod download;
pub mod exchange;
pub mod frame;
pub mod http;
pub mod log;
pub mod memory;
pub mod pattern;
pub mod quic;
pub mod relay;
pub mod service;
pub mod upload;
pub mod worker;

pub use service::{AgentOptions, agent_main};

/// Port of the control service, HTTP: `/status`, `/log/tail`, `/log/verify`, `/disk/verify`, `/memory/verify`,
/// `/set`, `/poweroff`, `/reboot`.
pub const CONTROL_PORT: u16 = 7000;
/// Port of the record exchange, see [`frame`].
pub const RECORD_PORT: u16 = 7001;
/// Port of the idle echo: answers each line with `BOOT_ID LINE`.
pub const IDLE_PORT: u16 = 7002;
/// Port of the download service, HTTP: `/blob?bytes=N&rate=BYTES_PER_SECOND&seed=S`.
pub const DOWNLOAD_PORT: u16 = 7003;
/// Port of the UDP echo.
pub const UDP_PORT: u16 = 7004;
/// Port of the relay, see [`relay`]: connections that the guest opens itself.
pub const RELAY_PORT: u16 = 7005;
/// UDP port of the QUIC echo.
pub const QUIC_PORT: u16 = 7006;
/// Port of the upload, see [`upload`].
pub const UPLOAD_PORT: u16 = 7007;
