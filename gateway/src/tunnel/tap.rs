//! Taps: the devices machines are plugged into, made before the machine and outliving the gateway.
//!
//! A tap is persistent and belongs to the uid its QEMU runs as, so that QEMU needs no privilege to
//! attach and the gateway's death does not unplug the machine. Its name follows from the machine and
//! NIC alone and is found again after a restart.

use longhaul_core::tunnel::handover::Mac;
use longhaul_core::tunnel::policy::PortKey;

use super::config::{TunnelConfig, check_device_name};
use super::error::TunnelError;
use super::routes::Netlink;

const MAX_NAME: usize = 15;

/// The tap's name: `lh-web1-net0` where that fits, else a short form with a hash.
pub fn tap_name(config: &TunnelConfig, key: &PortKey) -> String {
    let plain = format!("{}-{}-{}", config.prefix, key.machine, key.nic);
    if plain.len() <= MAX_NAME {
        return plain;
    }
    let hash = port_id(key);
    let room = MAX_NAME - config.prefix.len() - 2 - 7;
    let machine: String = key.machine.as_str().chars().take(room).collect();
    format!("{}-{machine}-{}", config.prefix, &hash[..7])
}

/// Twelve hexadecimal digits that stand for a NIC in names of bounded length.
pub(super) fn port_id(key: &PortKey) -> String {
    blake3::hash(key.to_string().as_bytes()).to_hex()[..12].to_owned()
}

/// Makes the tap of `key`, or finds it, owned by `owner`; a port of `bridge` if given, else routed.
pub(super) async fn create(
    netlink: &Netlink,
    config: &TunnelConfig,
    key: &PortKey,
    owner: u32,
    bridge: Option<&str>,
) -> Result<String, TunnelError> {
    let name = tap_name(config, key);
    check_device_name(&name)?;
    if netlink.find_link(&name).await?.is_none() {
        open(&name, owner).map_err(|source| TunnelError::Device { name: name.clone(), source })?;
    }
    let bridge = match bridge {
        Some(bridge) => Some(netlink.link(bridge).await?.index),
        None => None,
    };
    let link = netlink.link(&name).await?;
    // A bridge takes the lowest address of its ports: an address of its own that is high leaves it alone.
    netlink.set_mac(link.index, tap_mac(key)).await?;
    netlink.set_bridge(link.index, bridge).await?;
    netlink.set_up(&name, Some(config.tap_queue)).await?;
    Ok(name)
}

/// The tap's own link-layer address, which no guest ever sees while it is bridged.
fn tap_mac(key: &PortKey) -> Mac {
    let hash = blake3::hash(key.to_string().as_bytes());
    let octets = hash.as_bytes();
    Mac([0xfe, octets[0], octets[1], octets[2], octets[3], octets[4]])
}

fn open(name: &str, owner: u32) -> Result<(), tun::Error> {
    let mut configuration = tun::Configuration::default();
    configuration.tun_name(name).layer(tun::Layer::L2);
    configuration.platform_config(|platform| {
        // Only makes the device; what it is set to afterwards goes through rtnetlink.
        platform.ensure_root_privileges(false);
    });
    let mut device = tun::create(&configuration)?;
    device.user(i32::try_from(owner).unwrap_or(i32::MAX))?;
    device.persist()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(machine: &str, nic: &str) -> PortKey {
        PortKey { machine: machine.parse().unwrap(), nic: nic.parse().unwrap() }
    }

    #[test]
    fn a_short_name_is_readable_and_a_long_one_is_hashed_to_fit() {
        let config = TunnelConfig::default();
        assert_eq!(tap_name(&config, &key("web1", "net0")), "lh-web1-net0");
        let long = tap_name(&config, &key("database-of-the-accounts", "net0"));
        assert_eq!((long.len(), &long[..8]), (15, "lh-data-"));
        assert_ne!(long, tap_name(&config, &key("database-of-the-accounts", "net1")));
        let prefix = TunnelConfig { prefix: "test".to_owned(), ..config };
        assert_eq!(tap_name(&prefix, &key("database", "net0")).len(), 15);
    }
}
