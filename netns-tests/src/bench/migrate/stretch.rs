//! The two sites' LANs as one Ethernet, by VXLAN between the hypervisors: what operators stretch today so that the
//! connections of a machine live when QEMU moves it. The peers get it; the gateway does without.

use anyhow::Result;

use crate::scenario::gateway::PORT;
use crate::topology::{BRIDGE, World};

/// The interface on each host.
const DEVICE: &str = "vx0";

/// Joins the LANs of sites a and b. Its packets use the port that the firewalls admit between hypervisors.
pub fn join(world: &World) -> Result<()> {
    let (a, b) = (world.site("a")?, world.site("b")?);
    for (here, there) in [(a, b), (b, a)] {
        here.host.ip(&[
            format!(
                "link add {DEVICE} type vxlan id 1 local {} remote {} dstport {PORT} srcport {PORT} {}",
                here.host_address(),
                there.host_address(),
                PORT + 1
            ),
            // The guest's packets stay whole: what is too long for the WAN goes as fragments.
            format!("link set {DEVICE} mtu 1500"),
            format!("link set {DEVICE} master {BRIDGE} up"),
        ])?;
    }
    Ok(())
}
