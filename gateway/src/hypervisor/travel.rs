//! What in a running machine cannot travel, found before anything is moved.
//!
//! Only what QMP shows can be found. A device that QEMU itself refuses to migrate shows in
//! `query-migrate`; the others are known by their types.

use serde_json::{Value, json};

use super::guest::{Guest, RunState};
use super::inspect;
use super::qmp::QmpError;

/// One thing that stands against a migration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {reason}")]
pub struct Obstacle {
    /// The device or disk.
    pub what: String,
    /// Why it cannot travel, and what helps.
    pub reason: String,
}

/// What a migration would meet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Travel {
    /// What stands against it; empty if nothing does.
    pub obstacles: Vec<Obstacle>,
    /// What will be different afterwards, in sentences for the operator.
    pub notes: Vec<String>,
}

/// Device types that are bound to their host, by the beginning of their names.
const BOUND_TO_HOST: [(&str, &str); 9] = [
    ("vfio-", "it is a device of this host; detach it first"),
    ("usb-host", "it is a USB device of this host; detach it first"),
    ("usb-redir", "it is a USB device of somebody's desk; detach it first"),
    ("vhost-user-fs", "virtiofs shares a folder of this host; unmount and detach it first"),
    ("virtio-9p", "it shares a folder of this host; unmount and detach it first"),
    ("vhost-vsock", "its context id belongs to this host; detach it first"),
    ("tpm-", "the TPM's secrets stay with this host"),
    ("ivshmem", "it shares memory of this host; detach it first"),
    ("scsi-generic", "it is a SCSI device of this host; detach it first"),
];

impl Guest {
    /// What would hinder this machine's migration. QMP `query-status`, `query-migrate`, `query-kvm`,
    /// `query-tpm`, `query-block`, `query-block-jobs`, `qom-list`.
    pub async fn what_cannot_travel(&self) -> Result<Travel, QmpError> {
        let mut travel = Travel::default();
        travel.state(self).await?;
        travel.devices(self).await?;
        travel.disks(self).await?;
        Ok(travel)
    }
}

impl Travel {
    fn against(&mut self, what: impl Into<String>, reason: impl Into<String>) {
        self.obstacles.push(Obstacle { what: what.into(), reason: reason.into() });
    }

    async fn state(&mut self, guest: &Guest) -> Result<(), QmpError> {
        match guest.status().await? {
            RunState::Running | RunState::Paused | RunState::Prelaunch => {}
            RunState::Shutdown => {
                self.against("run state", "the guest has shut down; there is nothing to move")
            }
            RunState::IoError => {
                self.against("run state", "a disk failed and stopped the guest; mend it first")
            }
            state @ (RunState::Inmigrate
            | RunState::FinishMigrate
            | RunState::Postmigrate
            | RunState::Other(_)) => {
                self.against(
                    "run state",
                    format!("it is {state}; a migration begins from a running machine"),
                );
            }
        }
        self.lost_writes(guest).await?;
        for reason in guest.migration().await?.blocked_reasons {
            self.against("QEMU", reason);
        }
        Ok(())
    }

    /// QEMU's own fault, see [`longhaul_core::machine::MachineDefinition::memory_trim_kib`].
    async fn lost_writes(&mut self, guest: &Guest) -> Result<(), QmpError> {
        let kvm: Value = guest.qmp.query("query-kvm", json!({})).await?;
        let memory: Value = guest.qmp.query("query-memory-size-summary", json!({})).await?;
        let bytes = memory["base-memory"].as_u64().unwrap_or(0);
        let major = guest.qmp.version()["qemu"]["major"].as_u64().unwrap_or(0);
        if kvm["enabled"] == false && major < 9 && bytes.is_multiple_of(256 << 10) {
            self.against(
                "memory",
                "this QEMU loses writes while it migrates an emulated machine of this size; start the machine with \
                 8 KiB less (memory_trim_kib = 8), or with KVM or QEMU 9 or newer",
            );
        }
        Ok(())
    }

    async fn devices(&mut self, guest: &Guest) -> Result<(), QmpError> {
        for device in inspect::devices(&guest.qmp).await? {
            let name = device.path.rsplit('/').next().unwrap_or(&device.path).to_owned();
            let bound = BOUND_TO_HOST.iter().find(|(kind, _)| device.kind.starts_with(kind));
            if let Some((_, reason)) = bound {
                self.against(format!("{} {name}", device.kind), *reason);
            }
            if device.share_rw {
                self.against(
                    name,
                    "the disk is shared with other writers (share-rw); only one machine can own it",
                );
            }
        }
        let tpms: Vec<Value> = guest.qmp.query("query-tpm", json!({})).await?;
        if !tpms.is_empty() && !self.obstacles.iter().any(|it| it.what.starts_with("tpm-")) {
            self.against("tpm", "the TPM's secrets stay with this host");
        }
        Ok(())
    }

    async fn disks(&mut self, guest: &Guest) -> Result<(), QmpError> {
        for block in inspect::block_devices(&guest.qmp).await? {
            let Some(inserted) = block.inserted else { continue };
            let node = inserted.node;
            if !inserted.image.snapshots.is_empty() {
                let count = inserted.image.snapshots.len();
                let reason = format!(
                    "{count} internal snapshots would be lost; delete them with qemu-img snapshot -d"
                );
                self.against(node.as_str(), reason);
            }
            if inserted.format == "host_device" || inserted.format == "host_cdrom" {
                self.against(node.as_str(), "it is a device of this host; detach it first");
            }
            if block.removable {
                self.against(node.as_str(), "it is a medium that can be removed; eject it first");
            } else if inserted.read_only {
                self.against(node.as_str(), "the disk is read-only, which a definition cannot say");
            }
            if inserted.backing_file_depth > 0 {
                let depth = inserted.backing_file_depth;
                self.notes.push(format!(
                    "Disk {node} is a chain of {} images here and becomes one there",
                    depth + 1
                ));
            }
            if inserted.format != "raw" {
                let format = &inserted.format;
                self.notes.push(format!("Disk {node} is {format} here and becomes a raw, sparse file there"));
            }
        }
        let jobs: Vec<Value> = guest.qmp.query("query-block-jobs", json!({})).await?;
        for job in jobs {
            let name = job["device"].as_str().unwrap_or("a block job");
            self.against(name, "a block job works on a disk; wait for it or cancel it");
        }
        Ok(())
    }
}
