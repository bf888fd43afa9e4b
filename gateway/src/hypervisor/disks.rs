//! Disks of a running machine for others to read and write: QEMU's NBD server, and dirty bitmaps.
//!
//! A read-only export of a running machine's disk hinders neither the machine nor its migration. A
//! writable one must be gone before the guest resumes: QEMU would let a late write into its disk.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use futures_util::future::try_join_all;
use longhaul_core::ids::DeviceName;
use serde::Deserialize;
use serde_json::json;

use super::guest::Guest;
use super::qmp::{EventLoss, Events, QmpError};

/// What a client of an export may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Read and write.
    Write,
}

/// An export of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Export {
    /// Its id, for [`Guest::unexport`].
    pub id: String,
    /// The node that is exported.
    pub node_name: String,
    /// It is closing down and waits for its clients.
    pub shutting_down: bool,
}

pub(crate) fn export_id(disk: &DeviceName) -> String {
    format!("nbd-{disk}")
}

impl Guest {
    /// Starts the NBD server at the UNIX socket `path`. QMP `nbd-server-start`.
    pub async fn nbd_start(&self, path: &Path) -> Result<(), QmpError> {
        let address = json!({ "type": "unix", "data": { "path": path } });
        self.qmp
            .execute("nbd-server-start", json!({ "addr": address, "max-connections": 16 }))
            .await
            .map(drop)
    }

    /// Ends the NBD server and all its exports, its clients cut off. QMP `nbd-server-stop`.
    pub async fn nbd_stop(&self) -> Result<(), QmpError> {
        self.qmp.execute("nbd-server-stop", json!({})).await.map(drop)
    }

    /// Exports a disk under its own name; a client can ask which blocks the dirty `bitmaps` hold (NBD
    /// metadata context `qemu:dirty-bitmap:NAME`). The export's id is returned. QMP `block-export-add`.
    pub async fn export(
        &self,
        disk: &DeviceName,
        access: Access,
        bitmaps: &[&str],
    ) -> Result<String, QmpError> {
        let id = export_id(disk);
        let mut arguments = json!({
            "type": "nbd",
            "id": id,
            "node-name": self.node(disk)?,
            "name": disk.as_str(),
            "writable": access == Access::Write,
        });
        if !bitmaps.is_empty() {
            arguments["bitmaps"] = json!(bitmaps);
        }
        self.qmp.execute("block-export-add", arguments).await?;
        Ok(id)
    }

    /// Ends an export. `hard` cuts its clients off; else it is refused while one is connected. Returns at
    /// once: the export is gone when [`Guest::exports`] no longer lists it. QMP `block-export-del`.
    pub async fn unexport(&self, id: &str, hard: bool) -> Result<(), QmpError> {
        let mode = if hard { "hard" } else { "safe" };
        self.qmp.execute("block-export-del", json!({ "id": id, "mode": mode })).await.map(drop)
    }

    /// All exports. QMP `query-block-exports`.
    pub async fn exports(&self) -> Result<Vec<Export>, QmpError> {
        self.qmp.query("query-block-exports", json!({})).await
    }

    /// Ends all exports together, their clients cut off, and waits until QEMU lists none, at most for
    /// `limit`. QMP `block-export-del`, event `BLOCK_EXPORT_DELETED`.
    pub async fn close_exports(&self, limit: Duration) -> Result<(), QmpError> {
        let mut events = self.events();
        let close = async {
            let mut left = self.exports().await?;
            let ending = left.iter().filter(|export| !export.shutting_down);
            try_join_all(ending.map(|export| self.unexport(&export.id, true))).await?;
            while !left.is_empty() {
                let ids = left.into_iter().map(|export| export.id).collect();
                self.exports_deleted(&mut events, ids).await?;
                // Its word counts, not that of its events.
                left = self.exports().await?;
            }
            Ok(())
        };
        let late = |_| QmpError::Timeout { command: "block-export-del".to_owned(), limit };
        tokio::time::timeout(limit, close).await.map_err(late)?
    }

    /// Waits until QEMU has said of each export that it is gone, or events were lost.
    async fn exports_deleted(&self, events: &mut Events, mut ids: BTreeSet<String>) -> Result<(), QmpError> {
        while !ids.is_empty() {
            match events.next().await {
                Ok(event) if event.name == "BLOCK_EXPORT_DELETED" => {
                    event.data["id"].as_str().map(|id| ids.remove(id));
                }
                Ok(_) => {}
                Err(EventLoss::Missed(_)) => return Ok(()),
                Err(EventLoss::Gone) => return Err(QmpError::Gone { peer: self.qmp.peer().to_owned() }),
            }
        }
        Ok(())
    }

    /// Begins to note which blocks of `granularity_bytes` (a power of two from 512) are written. The
    /// bitmap lives as long as QEMU does. QMP `block-dirty-bitmap-add`.
    pub async fn dirty_bitmap_add(
        &self,
        disk: &DeviceName,
        name: &str,
        granularity_bytes: u32,
    ) -> Result<(), QmpError> {
        let arguments = json!({ "node": self.node(disk)?, "name": name, "granularity": granularity_bytes });
        self.qmp.execute("block-dirty-bitmap-add", arguments).await.map(drop)
    }

    /// Stops noting; what was noted stays and can be exported from a disk that is being written. QMP
    /// `block-dirty-bitmap-disable`.
    pub async fn dirty_bitmap_freeze(&self, disk: &DeviceName, name: &str) -> Result<(), QmpError> {
        let arguments = json!({ "node": self.node(disk)?, "name": name });
        self.qmp.execute("block-dirty-bitmap-disable", arguments).await.map(drop)
    }

    /// Forgets a bitmap. QMP `block-dirty-bitmap-remove`.
    pub async fn dirty_bitmap_remove(&self, disk: &DeviceName, name: &str) -> Result<(), QmpError> {
        let arguments = json!({ "node": self.node(disk)?, "name": name });
        self.qmp.execute("block-dirty-bitmap-remove", arguments).await.map(drop)
    }
}
