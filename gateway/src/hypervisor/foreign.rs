//! What a QEMU that something else started has of this host: the taps of its NICs, the files of its
//! disks.
//!
//! It is asked of QEMU's monitor and not of the process, which may belong to another user. Whether the
//! machine is the defined one is [`super::adopt`]'s to say; nothing is changed here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use longhaul_core::ids::DeviceName;
use longhaul_core::machine::{MachineDefinition, Mismatch};
use serde_json::{Value, json};

use super::adopt::AdoptError;
use super::guest::Guest;
use super::inspect;

impl Guest {
    /// The tap of each NIC, by the interface's name. QMP `qom-get`; HMP `info network`, for QMP has no
    /// query for it.
    pub async fn taps(
        &self,
        definition: &MachineDefinition,
    ) -> Result<BTreeMap<DeviceName, String>, AdoptError> {
        let devices = inspect::devices(&self.qmp).await?;
        let shown = json!({ "command-line": "info network" });
        let networks: String = self.qmp.query("human-monitor-command", shown).await?;
        let (mut taps, mut found) = (BTreeMap::new(), Vec::new());
        for (at, nic) in definition.nics.iter().enumerate() {
            let Some(device) = devices.iter().find(|device| device.pci == Some(nic.pci)) else { continue };
            let netdev: String = inspect::property(&self.qmp, &device.path, "netdev").await?;
            match tap_of(&networks, &netdev) {
                Some(tap) => drop(taps.insert(nic.name.clone(), tap.to_owned())),
                None => found.push(Mismatch {
                    field: format!("nics[{at}]"),
                    reason: format!(
                        "its network {netdev:?} is not a tap that QEMU opened by name; start the machine with \
                         -netdev tap,ifname=NAME,script=no,downscript=no"
                    ),
                }),
            }
        }
        if found.is_empty() { Ok(taps) } else { Err(AdoptError::Differs(found)) }
    }

    /// The file of each volume, in the definition's order. QMP `query-named-block-nodes`.
    pub async fn image_files(&self, definition: &MachineDefinition) -> Result<Vec<PathBuf>, AdoptError> {
        let nodes = json!({ "flat": true });
        let nodes: Vec<Value> = self.qmp.query("query-named-block-nodes", nodes).await?;
        let (mut files, mut found) = (Vec::new(), Vec::new());
        for volume in definition.volumes() {
            let node = self.node(volume.name)?;
            let file = nodes.iter().find(|it| it["node-name"] == node).and_then(|it| it["file"].as_str());
            match file.filter(|file| Path::new(file).is_absolute()) {
                Some(file) => files.push(PathBuf::from(file)),
                None => found.push(Mismatch {
                    field: volume.name.to_string(),
                    reason: format!(
                        "QEMU has it in {:?}, which is not a file by its full path and could not be kept aside after \
                         a move",
                        file.unwrap_or_default()
                    ),
                }),
            }
        }
        if found.is_empty() { Ok(files) } else { Err(AdoptError::Differs(found)) }
    }
}

/// The interface behind a network of QEMU's, from lines such as
/// ` \ net0: index=0,type=tap,ifname=vnet3,script=no,downscript=no`.
fn tap_of<'a>(networks: &'a str, netdev: &str) -> Option<&'a str> {
    networks.lines().find_map(|line| {
        let line = line.trim_start_matches([' ', '\\']);
        let mut options = line.strip_prefix(netdev)?.strip_prefix(": ")?.split(',');
        options.clone().find(|option| *option == "type=tap")?;
        options.find_map(|option| option.trim_end().strip_prefix("ifname="))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_found_by_its_network_and_nothing_else_is_taken_for_one() {
        // In the form of net/net.c and net/tap.c of QEMU 7.2.
        let networks = "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:aa:00:10\r\n \
                        \\ n1: index=0,type=tap,ifname=vnet3,script=no,downscript=no\r\n\
                        other: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:aa:00:11\r\n \
                        \\ n11: index=0,type=tap,fd=12\r\n \
                        \\ user0: index=0,type=user,net=10.0.2.0,restrict=off\r\n";
        assert_eq!(tap_of(networks, "n1"), Some("vnet3"));
        assert_eq!(tap_of(networks, "n11"), None);
        assert_eq!(tap_of(networks, "user0"), None);
        assert_eq!(tap_of(networks, "n"), None);
    }
}
