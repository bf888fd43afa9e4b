//! Packets that wait in a machine's tap because its QEMU has not read them yet: whoever stops the guest would leave them
//! behind there, for a stopped QEMU reads nothing.
//!
//! The kernel counts a packet at the queueing discipline when it hands it to the tap, and at the tap when it was read
//! (`tun_net_xmit` and `tun_put_user` in drivers/net/tun.c). It only looks; whose packets they are, it does not know. Packets that
//! were thrown away with the tap down stay in the difference for ever, so that it may never be zero.

use std::time::Duration;

use futures_util::TryStreamExt;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::tc::{TcAttribute, TcHandle};
use rtnetlink::Handle;
use tokio::time::Instant;

use super::error::TunnelError;
use super::routes::errno;

/// A QEMU whose guest has room reads what is there within this.
const READ_WITHIN: Duration = Duration::from_millis(20);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// Waits until QEMU has read what is in the taps, at most for 20 ms: a guest without room in its own queue never reads it. To be
/// called while the guest runs and what comes for it is held. Says how many packets were left, by tap.
///
/// # Errors
///
/// When the kernel does not tell. A tap that does not count is taken for read.
pub async fn wait_until_read(taps: &[String]) -> Result<Vec<(String, u32)>, TunnelError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(TunnelError::io("open rtnetlink"))?;
    let connection = tokio::spawn(connection);
    let mut left = Vec::new();
    let until = Instant::now() + READ_WITHIN;
    for tap in taps {
        let mut waiting = unread(&handle, tap).await?;
        while waiting > 0 && Instant::now() < until {
            tokio::time::sleep(LOOK).await;
            waiting = unread(&handle, tap).await?;
        }
        if waiting > 0 {
            left.push((tap.clone(), waiting));
        }
    }
    connection.abort();
    Ok(left)
}

async fn unread(handle: &Handle, tap: &str) -> Result<u32, TunnelError> {
    let failed = || TunnelError::netlink(format!("read the counters of {tap}"));
    // Before the other count: what happens between the two can only make it more.
    let (index, read) = {
        let found = handle.link().get().match_name(tap.to_owned()).execute().try_next().await;
        let link = match found {
            Err(error) if errno(&error) == Some(libc::ENODEV) => return Ok(0),
            found => found.map_err(failed())?,
        };
        let Some(link) = link else { return Ok(0) };
        let counts = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some(stats.tx_packets + stats.tx_dropped),
            _ => None,
        });
        let Some(read) = counts else { return Ok(0) };
        (link.header.index as i32, read)
    };
    let mut disciplines = handle.qdisc().get().index(index).execute();
    let mut handed = None;
    while let Some(discipline) = disciplines.try_next().await.map_err(failed())? {
        if discipline.header.index == index && discipline.header.parent == TcHandle::ROOT {
            handed = discipline.attributes.iter().find_map(|attribute| match attribute {
                TcAttribute::Stats(stats) => Some(stats.packets.wrapping_add(stats.qlen)),
                _ => None,
            });
        }
    }
    // The kernel's count has 32 bits.
    let waiting = handed.map_or(0, |handed| handed.wrapping_sub(read as u32));
    Ok(if waiting > u32::MAX / 2 { 0 } else { waiting })
}
