//! The scene that cases are played on: built once, used again for as long as cases leave it whole.
//!
//! A machine that moved cannot move back, so after a move it is forgotten at both sites and a fresh one is defined.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gateway::api::types::MachineView;
use longhaul_core::ids::VmName;

use super::plan::Place;
use crate::agent::client::ask;
use crate::agent::control::AgentStatus;
use crate::scenario::gateway::Gateway;
use crate::scenario::programs::Programs;
use crate::scenario::scene::VM;
use crate::scenario::traces::{Traces, as_before, images, pool, qemus};
use crate::scenario::{Scene, SceneOptions};
use crate::wan::WanProfile;

/// What a site gives back takes no longer, on a busy machine.
const TIDY: Duration = Duration::from_secs(60);

/// A scene, and what its hosts looked like when it was new.
pub struct Arena {
    /// The scene.
    pub scene: Scene,
    /// Site a and b without a machine.
    empty: [Traces; 2],
    /// Site a with its machine.
    inhabited: Option<Traces>,
    /// A fresh machine runs at site a.
    guest: bool,
}

impl Arena {
    /// Builds it; takes a few seconds.
    pub async fn build(programs: &Programs) -> Result<Self> {
        let options = SceneOptions {
            name: "faults".into(),
            rate_mbit: 200.0,
            rtt: Duration::from_millis(20),
            loss: 0.0,
            memory_mib: 128,
            disk_bytes: 256 << 20,
            dirt_bytes: 16 << 20,
            dirty_memory_kib_per_s: 512,
            dirty_disk_kib_per_s: 64,
            ttl_s: 3,
            quiet_s: 1,
            // A case ends with its attempt.
            migration: vec!["retries = 0".into()],
            ..SceneOptions::default()
        };
        let scene = Scene::build(options, programs).await?;
        let empty = [Traces::of(&scene.world.site("a")?.host)?, Traces::of(&scene.world.site("b")?.host)?];
        Ok(Self { scene, empty, inhabited: None, guest: false })
    }

    /// Makes sure of a machine at site a and of two gateways that see each other, and keeps copies of their journals.
    pub async fn ready(&mut self) -> Result<()> {
        self.wan(self.scene.options.rtt, 0.0)?;
        self.scene.wait_for_link().await?;
        if !self.guest {
            self.scene.start_guest().await?;
            self.reachable().await?;
            self.guest = true;
        }
        if self.inhabited.is_none() {
            self.inhabited = Some(Traces::of(&self.scene.world.site("a")?.host)?);
        }
        for place in Place::BOTH {
            std::fs::copy(self.gateway(place).journal(), self.old_journal(place))?;
        }
        Ok(())
    }

    /// Waits until the client reaches the new machine at its home address; a router may believe for a moment that it is
    /// where the one before it was attracted to.
    async fn reachable(&self) -> Result<()> {
        let deadline = Instant::now() + TIDY;
        let home = self.scene.home()?;
        while let Err(error) = self.ask::<AgentStatus>(home, "/status").await {
            if Instant::now() > deadline {
                let site = self.scene.world.site("a")?;
                let neighbours = [&site.host, &site.router].map(|host| host.output("ip", &["neigh"]));
                let bridge = site.host.output("bridge", &["fdb", "show"]);
                bail!("The new machine cannot be reached: {error:#}; {neighbours:?}, {bridge:?}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// A site's gateway.
    pub fn gateway(&self, place: Place) -> &Gateway {
        match place {
            Place::A => &self.scene.a,
            Place::B => &self.scene.b,
        }
    }

    /// A site's gateway, to be killed or launched.
    pub fn gateway_mut(&mut self, place: Place) -> &mut Gateway {
        match place {
            Place::A => &mut self.scene.a,
            Place::B => &mut self.scene.b,
        }
    }

    /// The copy of a site's journal of before the move.
    pub fn old_journal(&self, place: Place) -> PathBuf {
        self.gateway(place).folder.join("journal.before")
    }

    /// The WAN with this round trip and loss.
    pub fn wan(&self, rtt: Duration, loss: f64) -> Result<()> {
        self.scene.world.wan.set_profile(&WanProfile::symmetric(self.scene.options.rate_mbit, rtt, loss))
    }

    /// The machine as a site's gateway shows it.
    pub async fn machine(&self, place: Place) -> Result<Option<MachineView>> {
        let machines = self.gateway(place).client().status().await?.machines;
        Ok(machines.into_iter().find(|machine| machine.name.as_str() == VM))
    }

    /// Where clients reach the machine while it is at `place`, without a detour.
    pub async fn address(&self, place: Place) -> Result<IpAddr> {
        match place {
            Place::A => self.scene.home(),
            Place::B => {
                let machine = self.machine(place).await?.context("Site b does not list the machine")?;
                machine.care_of.first().copied().context("The machine has no care-of address")
            }
        }
    }

    /// Asks the machine's service from the client.
    pub async fn ask<T>(&self, address: IpAddr, path: &'static str) -> Result<T>
    where
        T: serde::de::DeserializeOwned + Send + 'static,
    {
        let client = self.scene.world.client.clone();
        tokio::task::spawn_blocking(move || {
            client.run(move || ask(address, path, Duration::from_secs(20)))?
        })
        .await?
    }

    /// The machine stayed: site b has nothing of it, and site a what it had.
    pub async fn nothing_new(&self) -> Result<()> {
        ensure!(qemus(&self.scene.b).is_empty(), "site b has QEMU {:?}", qemus(&self.scene.b));
        let mut disks = pool(&self.scene.b)?;
        // What is kept for the next attempt is no machine's.
        disks.retain(|name| !name.ends_with(".partial"));
        ensure!(disks.is_empty(), "site b has disks {disks:?}");
        ensure!(self.machine(Place::B).await?.is_none(), "site b lists the machine");
        let world = &self.scene.world;
        as_before(&world.site("b")?.host, &self.empty[1], TIDY).await?;
        let inhabited = self.inhabited.as_ref().context("Site a never had a machine")?;
        as_before(&world.site("a")?.host, inhabited, TIDY).await
    }

    /// The machine moved and was stopped: it is forgotten at both sites, which must be empty then. A new one takes its
    /// place.
    pub async fn renew(&mut self) -> Result<()> {
        let vm: VmName = VM.parse()?;
        let moved = images(&self.scene.a)?;
        ensure!(moved.iter().all(|name| name.contains(".moved-e")), "site a still has disks {moved:?}");
        let arrived = images(&self.scene.b)?;
        ensure!(arrived.len() == 1, "site b has disks {arrived:?}");
        self.scene.b.client().undefine(&vm, false).await.context("Site b does not forget the machine")?;
        self.scene.a.client().undefine(&vm, true).await.context("Site a does not forget the machine")?;
        for place in Place::BOTH {
            ensure!(qemus(self.gateway(place)).is_empty(), "site {} has a QEMU", place.name());
            remove_files(&self.gateway(place).folder.join("disks"))?;
        }
        let world = &self.scene.world;
        as_before(&world.site("a")?.host, &self.empty[0], TIDY).await?;
        as_before(&world.site("b")?.host, &self.empty[1], TIDY).await?;
        let home = self.scene.home()?;
        self.scene.names.start_anew(&Scene::name(), home, self.scene.options.ttl_s)?;
        self.scene.image.copy_disks(&self.scene.a.folder.join("disks"))?;
        self.guest = false;
        Ok(())
    }

    /// The name's TTL is what it was before the move.
    pub async fn ttl_is_restored(&self) -> Result<()> {
        let wanted = Some(self.scene.options.ttl_s);
        let deadline = Instant::now() + TIDY;
        loop {
            let ttl = self.scene.names.read(&Scene::name())?.ttl_s();
            if ttl == wanted {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the name's TTL is {ttl:?}, it was {wanted:?}");
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Takes it down and says what is left nevertheless.
    pub fn close(self) -> Vec<String> {
        self.scene.close()
    }
}

fn remove_files(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        std::fs::remove_file(entry?.path())?;
    }
    Ok(())
}
