//! Packets that wait in a machine's tap because its QEMU has not read them yet: whoever stops the guest would leave them
//! behind there, for a stopped QEMU reads nothing.
//!
//! The kernel counts packets when they are handed to the tap, at its queueing discipline, and when they were read from it
//! (`tun_net_xmit` and `tun_put_user` in drivers/net/tun.c). Equal counts say that nothing waits. But the one counts segments
//! and the other what they came in, so that after bulk data they stay apart for ever: then a QEMU that has read nothing for a
//! while has read all, or has no room for it. It only looks; whose packets they are, it does not know.

use std::time::Duration;

use futures_util::TryStreamExt;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::tc::{TcAttribute, TcHandle};
use rtnetlink::Handle;
use tokio::time::Instant;

use super::error::TunnelError;
use super::routes::errno;

/// A QEMU whose guest has room reads what is there within this.
const READ_WITHIN: Duration = Duration::from_millis(30);
/// One that has read nothing for so long has nothing to read, unless its host is too busy to let it run.
const STILL: Duration = Duration::from_millis(8);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// Waits until QEMU has read what is in the taps, at most for 30 ms. To be called while the guest runs and what comes for it is
/// held. Says of which taps QEMU still read when that was over.
///
/// # Errors
///
/// When the kernel does not tell. A tap that does not count is taken for read.
pub async fn wait_until_read(taps: &[String]) -> Result<Vec<String>, TunnelError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(TunnelError::io("open rtnetlink"))?;
    let connection = tokio::spawn(connection);
    let mut busy = Vec::new();
    let until = Instant::now() + READ_WITHIN;
    for tap in taps {
        if !is_read(&handle, tap, until).await? {
            busy.push(tap.clone());
        }
    }
    connection.abort();
    Ok(busy)
}

async fn is_read(handle: &Handle, tap: &str, until: Instant) -> Result<bool, TunnelError> {
    let (mut read_before, mut still_since) = (None, Instant::now());
    loop {
        let Some(counts) = count(handle, tap).await? else { return Ok(true) };
        let now = Instant::now();
        if read_before.replace(counts.read) != Some(counts.read) {
            still_since = now;
        }
        if counts.handed == counts.read || now.duration_since(still_since) >= STILL {
            return Ok(true);
        }
        if now >= until {
            return Ok(false);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Packets since the tap was made, as the kernel counts: in 32 bits.
struct Counts {
    handed: u32,
    read: u32,
}

/// `None` of a tap that is not there or does not count.
async fn count(handle: &Handle, tap: &str) -> Result<Option<Counts>, TunnelError> {
    let failed = || TunnelError::netlink(format!("read the counters of {tap}"));
    let link = match handle.link().get().match_name(tap.to_owned()).execute().try_next().await {
        Err(error) if errno(&error) == Some(libc::ENODEV) => return Ok(None),
        found => found.map_err(failed())?,
    };
    let Some(link) = link else { return Ok(None) };
    let read = link.attributes.iter().find_map(|attribute| {
        let LinkAttribute::Stats64(stats) = attribute else { return None };
        Some((stats.tx_packets + stats.tx_dropped) as u32)
    });
    let index = link.header.index as i32;
    let mut disciplines = handle.qdisc().get().index(index).execute();
    let mut handed = None;
    while let Some(discipline) = disciplines.try_next().await.map_err(failed())? {
        if discipline.header.index == index && discipline.header.parent == TcHandle::ROOT {
            handed = discipline.attributes.iter().find_map(|attribute| {
                let TcAttribute::Stats(stats) = attribute else { return None };
                Some(stats.packets.wrapping_add(stats.qlen))
            });
        }
    }
    Ok(handed.zip(read).map(|(handed, read)| Counts { handed, read }))
}
