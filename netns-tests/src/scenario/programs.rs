//! The programs a scene runs: built by cargo before the first scene, so that `cargo lab` needs nothing
//! prepared.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Paths of the binaries under test.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The gateway.
    pub longhaul: PathBuf,
    /// The service inside the guest.
    pub guest_agent: PathBuf,
}

impl Programs {
    /// Builds them in the profile this program was built in, and says where they are.
    pub fn build() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut command = crate::cargo::command();
        command.args(["build", "--quiet", "--package", "gateway", "--bin", "longhaul"]);
        command.args(["--package", "netns-tests", "--bin", "guest-agent"]);
        command.current_dir(&root);
        if profile() == "release" {
            command.arg("--release");
        }
        let status = command.status().context("Cannot run cargo to build the gateway")?;
        if !status.success() {
            bail!("The gateway does not build");
        }
        Self::find()
    }

    /// Says where those are that were built before.
    pub fn find() -> Result<Self> {
        let folder = crate::guest::image::lab_folder()
            .parent()
            .map(|target| target.join(profile()))
            .context("There is no target folder")?;
        let programs = Self { longhaul: folder.join("longhaul"), guest_agent: folder.join("guest-agent") };
        for path in [&programs.longhaul, &programs.guest_agent] {
            if !path.exists() {
                bail!("{} was not built", path.display());
            }
        }
        Ok(programs)
    }
}

fn profile() -> &'static str {
    if cfg!(debug_assertions) { "debug" } else { "release" }
}
