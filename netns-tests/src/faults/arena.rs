//! The scene that cases are played on: built once, used again for as long as cases leave it whole.
//!
//! After a move the machine is forgotten at both sites and a fresh one is defined. Where a case's move is the machine's
//! way home, or a register has seen its epochs, a scene is used for one move only.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gateway::api::types::{MachineView, Progressing};
use gateway::config::ArbiterChoice;
use longhaul_core::ids::VmName;

use super::plan::{Place, Way};
use super::play::Ending;
use super::setting::{Leg, Setting};
use crate::agent::client::ask;
use crate::agent::control::AgentStatus;
use crate::netns::Namespace;
use crate::scenario::gateway::{Gateway, PORT};
use crate::scenario::options::DnsServer;
use crate::scenario::programs::Programs;
use crate::scenario::scene::VM;
use crate::scenario::traces::{Traces, as_at_one_time, as_before, images, pool, qemus};
use crate::scenario::{Scene, SceneOptions};
use crate::wan::{Direction, WanProfile};

/// What a site gives back takes no longer, on a busy machine.
const TIDY: Duration = Duration::from_secs(60);
/// A whole move of a small guest, on a busy machine.
const MOVE: Duration = Duration::from_secs(180);
/// The table that makes a gateway deaf.
const PARTITION: &str = "partition";

/// A scene, and what its hosts looked like when it was new.
pub struct Arena {
    /// The scene.
    pub scene: Scene,
    /// What it is played in.
    pub setting: Setting,
    /// Site a and b without a machine.
    empty: [Traces; 2],
    /// Where the machine is and where it is to go, right before a case.
    before: Option<[Traces; 2]>,
    /// A machine runs where it is to leave from.
    guest: bool,
}

impl Arena {
    /// Builds it; takes a few seconds.
    pub async fn build(setting: Setting, programs: &Programs) -> Result<Self> {
        let by_name = setting.arbiter == ArbiterChoice::Dns;
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
            // A guest that was cut off for a minute says its last word up to two minutes later.
            closing_s: 150,
            arbiter: setting.arbiter,
            dns: if by_name { DnsServer::Bind9 } else { DnsServer::Hickory },
            // A case ends with its attempt.
            migration: vec!["retries = 0".into()],
            ..SceneOptions::default()
        };
        let scene = Scene::build(options, programs).await?;
        let empty = [Traces::of(&scene.world.site("a")?.host)?, Traces::of(&scene.world.site("b")?.host)?];
        Ok(Self { scene, setting, empty, before: None, guest: false })
    }

    /// Makes sure of a machine where it is to leave from and of two gateways that see each other, and keeps copies of their journals.
    pub async fn ready(&mut self) -> Result<()> {
        self.wan(self.scene.options.rtt, 0.0)?;
        self.scene.wait_for_link().await?;
        if !self.guest {
            self.scene.start_guest().await?;
            self.reachable().await?;
            if self.setting.leg == Leg::Home {
                self.go_away().await?;
            }
            self.guest = true;
        }
        if self.before.is_none() {
            self.before = Some([self.traces(Place::A)?, self.traces(Place::B)?]);
        }
        for place in Place::BOTH {
            std::fs::copy(self.gateway(place).journal(), self.old_journal(place))?;
        }
        Ok(())
    }

    /// The move before the one that is played.
    async fn go_away(&self) -> Result<()> {
        let id = self.scene.begin_move().await?;
        let view = self.scene.wait_move(&id, MOVE).await?;
        ensure!(view.progressing == Progressing::Moved, "The machine does not get away: {view:?}");
        self.ttl_is_restored().await
    }

    fn traces(&self, place: Place) -> Result<Traces> {
        Traces::of(&self.scene.world.site(self.setting.site(place))?.host)
    }

    /// After a case that ended like this the next one may be played on the same scene.
    pub fn may_be_used_again(&self, ending: Ending) -> bool {
        match ending {
            Ending::Stayed | Ending::Crashed(Place::A) | Ending::WasOff(Place::A) => true,
            Ending::Moved | Ending::Crashed(Place::B) | Ending::WasOff(Place::B) => self.renews(),
            Ending::Held | Ending::Unclear => true,
        }
    }

    fn renews(&self) -> bool {
        self.setting == Setting::default()
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
        if self.setting.site(place) == "a" { &self.scene.a } else { &self.scene.b }
    }

    /// A site's gateway, to be killed or launched.
    pub fn gateway_mut(&mut self, place: Place) -> &mut Gateway {
        if self.setting.site(place) == "a" { &mut self.scene.a } else { &mut self.scene.b }
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

    /// Begins the move that is played.
    pub async fn begin_move(&self) -> Result<String> {
        let [from, to] = Place::BOTH.map(|place| self.setting.site(place));
        self.scene.begin_move_of(VM, from, to).await
    }

    /// The gateways hear each other no more, or one of them does not hear the other.
    pub fn cut(&self, way: Way) -> Result<()> {
        if self.setting.arbiter == ArbiterChoice::None {
            return match way {
                Way::Both => self.scene.world.wan.cut(),
                Way::ToA => self.scene.world.wan.set_cut(self.toward(Place::A), true),
                Way::ToB => self.scene.world.wan.set_cut(self.toward(Place::B), true),
            };
        }
        let deaf = match way {
            Way::Both => &Place::BOTH[..],
            Way::ToA => &[Place::A],
            Way::ToB => &[Place::B],
        };
        for place in deaf {
            let rule = format!("chain in {{ type filter hook input priority -300; udp dport {PORT} drop; }}");
            self.host(*place)?.nft(&format!("table inet {PARTITION} {{\n {rule}\n}}\n"))?;
        }
        Ok(())
    }

    /// Ends [`Self::cut`].
    pub fn heal(&self) -> Result<()> {
        if self.setting.arbiter == ArbiterChoice::None {
            return self.scene.world.wan.heal();
        }
        for place in Place::BOTH {
            self.host(place)?.nft(&format!("table inet {PARTITION}\ndelete table inet {PARTITION}\n"))?;
        }
        Ok(())
    }

    fn toward(&self, place: Place) -> Direction {
        if self.setting.site(place) == "a" { Direction::ToNear } else { Direction::ToFar }
    }

    fn host(&self, place: Place) -> Result<&Namespace> {
        Ok(&self.scene.world.site(self.setting.site(place))?.host)
    }

    /// The image of the machine's root disk where it is.
    pub fn image(&self, place: Place) -> Result<PathBuf> {
        if let ("a", Leg::Away) = (self.setting.site(place), self.setting.leg) {
            return Ok(self.scene.disks.first().context("The guest has no disk")?.clone());
        }
        let mut images = images(self.gateway(place))?;
        images.retain(|name| !name.contains(".moved-e"));
        let [image] = &images[..] else { bail!("Site {} has disks {images:?}", self.setting.site(place)) };
        Ok(self.gateway(place).folder.join("disks").join(image))
    }

    /// Where clients reach the machine while it is at `place`, without a detour.
    pub async fn address(&self, place: Place) -> Result<IpAddr> {
        if self.setting.site(place) == "a" {
            return self.scene.home();
        }
        let machine = self.machine(place).await?.context("Site b does not list the machine")?;
        machine.care_of.first().copied().context("The machine has no care-of address")
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

    /// The machine stayed: the other site has nothing new of it, and the one where it is what it had.
    pub async fn nothing_new(&self) -> Result<()> {
        let (there, site) = (self.gateway(Place::B), self.setting.site(Place::B));
        ensure!(qemus(there).is_empty(), "site {site} has QEMU {:?}", qemus(there));
        let mut disks = pool(there)?;
        // What is kept for the next attempt, or since the machine was there, is no machine's.
        disks.retain(|name| !name.ends_with(".partial") && !kept_since(name));
        ensure!(disks.is_empty(), "site {site} has disks {disks:?}");
        let listed = self.machine(Place::B).await?.map(|machine| machine.owner);
        let right = match self.setting.leg {
            Leg::Away => listed.is_none(),
            Leg::Home => listed.as_deref() == Some("away"),
        };
        ensure!(right, "site {site} lists the machine as {listed:?}");
        let [here, there] = self.before.as_ref().context("There never was a machine")?;
        // What a home holds for old connections may have ended meanwhile, because there are none.
        let times = match self.setting.leg {
            Leg::Away => vec![there],
            Leg::Home => vec![there, &self.empty[0]],
        };
        as_at_one_time(self.host(Place::B)?, &times, TIDY).await?;
        as_before(self.host(Place::A)?, here, TIDY).await
    }

    /// The machine moved and was stopped: it is forgotten at both sites, which must be empty then. A new one takes its
    /// place, unless the scene is not used again.
    pub async fn renew(&mut self) -> Result<()> {
        if self.setting.leg == Leg::Home {
            // It was there before it came, and b has nothing but its disk.
            ensure!(qemus(&self.scene.b).is_empty(), "site b has QEMU {:?}", qemus(&self.scene.b));
            return as_before(&self.scene.world.site("b")?.host, &self.empty[1], TIDY).await;
        }
        let vm: VmName = VM.parse()?;
        let moved = images(&self.scene.a)?;
        ensure!(moved.iter().all(|name| name.contains(".moved-e")), "site a still has disks {moved:?}");
        let arrived = images(&self.scene.b)?;
        ensure!(arrived.len() == 1, "site b has disks {arrived:?}");
        self.scene.b.client().undefine(&vm, false).await.context("Site b does not forget the machine")?;
        self.scene.a.client().undefine(&vm, true).await.context("Site a does not forget the machine")?;
        for place in Place::BOTH {
            ensure!(qemus(self.gateway(place)).is_empty(), "site {} has a QEMU", self.setting.site(place));
            remove_files(&self.gateway(place).folder.join("disks"))?;
        }
        let world = &self.scene.world;
        as_before(&world.site("a")?.host, &self.empty[0], TIDY).await?;
        as_before(&world.site("b")?.host, &self.empty[1], TIDY).await?;
        if !self.renews() {
            return Ok(());
        }
        let home = self.scene.home()?;
        self.scene.names.start_anew(&Scene::name(), home, self.scene.options.ttl_s)?;
        self.scene.image.copy_disks(&self.scene.a.folder.join("disks"))?;
        (self.guest, self.before) = (false, None);
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

/// It is of a time when the machine was here: its disk, kept aside, or the note beside it.
fn kept_since(name: &str) -> bool {
    name.contains(".moved-e") || name.ends_with(".generation")
}

fn remove_files(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        std::fs::remove_file(entry?.path())?;
    }
    Ok(())
}
