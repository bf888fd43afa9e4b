//! A whole scene: built, ready, taken down.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gateway::api::types::{DefineRequest, MigrateRequest, MigrationView, Progressing};
use gateway::config::ArbiterChoice;

use super::etcd::Etcd;
use super::gateway::{CARE_OF, Gateway, PORT, SiteFiles};
use super::names::{Names, ZONE};
use super::options::SceneOptions;
use super::programs::Programs;
use crate::agent::{
    CONTROL_PORT, DOWNLOAD_PORT, IDLE_PORT, QUIC_PORT, RECORD_PORT, RELAY_PORT, UDP_PORT, UPLOAD_PORT,
};
use crate::cleanup::Lab;
use crate::guest::boot::{BootOptions, Nic, READY, failure};
use crate::guest::disk;
use crate::guest::image::{GuestImage, ImageSpec, lab_folder};
use crate::topology::{SiteSpec, World, WorldSpec};
use crate::wan::{Emulator, Measured, measure};

/// The machine that moves.
pub const VM: &str = "web1";
/// The number of its home address on site a's LAN.
pub const VM_NUMBER: u8 = 10;
/// The machine beside it, where there is one. It has no name.
pub const SECOND_VM: &str = "web2";
/// The number of its home address on site a's LAN.
pub const SECOND_VM_NUMBER: u8 = 20;
/// What root disks are cloned from, see [`SceneOptions::cloned`].
pub const TEMPLATE: &str = "lab-root";

/// A guest that makes it hard, see [`SceneOptions::strict_guest`].
const STRICT: [(&str, &str); 3] = [
    ("net.ipv4.conf.all.rp_filter", "1"),
    ("net.ipv4.conf.all.arp_ignore", "2"),
    ("net.ipv4.conf.all.arp_announce", "2"),
];

/// Two sites or three, their gateways, a guest at site a, a name server.
pub struct Scene {
    /// Namespaces and WAN.
    pub world: World,
    /// Site a's gateway.
    pub a: Gateway,
    /// Site b's gateway.
    pub b: Gateway,
    /// Site c's gateway, where there is one.
    pub c: Option<Gateway>,
    /// The name server.
    pub names: Names,
    /// The etcd, where it arbitrates.
    pub etcd: Option<Etcd>,
    /// The options it was built with.
    pub options: SceneOptions,
    /// What emulates the WAN.
    pub emulator: Emulator,
    /// The programs.
    pub programs: Programs,
    /// The guest's image.
    pub image: GuestImage,
    /// The guest's disks at site a.
    pub disks: Vec<PathBuf>,
    /// Logs and reports.
    pub folder: PathBuf,
}

impl Scene {
    /// Builds it, up to gateways that see each other. The guest is not started.
    pub async fn build(options: SceneOptions, programs: &Programs) -> Result<Self> {
        let image = GuestImage::ensure(&ImageSpec {
            disk_bytes: options.disk_bytes,
            second_disk_bytes: options.two_of_each.then_some(256 << 20),
            dirt_bytes: options.dirt_bytes,
            ..ImageSpec::new(&programs.guest_agent)
        })?;
        let emulator = Emulator::detect()?;
        let mut spec = WorldSpec::two_sites(options.wan(), emulator, PORT);
        spec.open_tcp_ports = guest_ports();
        spec.open_udp_ports = vec![UDP_PORT, QUIC_PORT];
        spec.behind_nat = options.behind_nat.clone();
        spec.mute_icmp = options.mute_icmp;
        if options.third_site {
            spec.sites.push(SiteSpec::c());
        }
        let world = World::build(Lab::start()?, &spec)?;
        let folder = lab_folder().join(&options.name);
        std::fs::create_dir_all(&folder)?;
        let scratch = world.lab.scratch().to_owned();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&scratch, open)?;
        let home = world.site("a")?.spec.address(VM_NUMBER);
        let name = Self::name();
        let mut names =
            Names::start(options.dns, &world.dns, &scratch.join("dns"), &name, home.into(), options.ttl_s)?;
        names.wait(&name)?;
        let arbitrates = options.arbiter == ArbiterChoice::Etcd;
        let etcd = arbitrates.then(|| Etcd::start(&world.dns, &scratch.join("etcd"))).transpose()?;
        let by_name = options.arbiter == ArbiterChoice::Dns;
        let a = SiteFiles::make(&world.site("a")?.spec, &scratch)?;
        let b = SiteFiles::make(&world.site("b")?.spec, &scratch)?;
        let c = options.third_site.then(|| SiteFiles::make(&world.site("c")?.spec, &scratch)).transpose()?;
        let all = [Some(&a), Some(&b), c.as_ref()];
        for site in all.into_iter().flatten() {
            let others: Vec<&SiteFiles> =
                all.into_iter().flatten().filter(|other| other.spec.name != site.spec.name).collect();
            // The name is its home's to change, unless it arbitrates.
            let changes = site.spec.name == "a" || by_name;
            site.configure(&others, &image, &options, changes.then(|| names.key_file()))?;
        }
        let disks = image.copy_disks(&a.folder.join("disks"))?;
        let disks = [Some(disks.root), disks.second].into_iter().flatten().collect();
        let gateway_a = Gateway::start(&world.site("a")?.host, &programs.longhaul, &a.folder).await?;
        let gateway_b = Gateway::start(&world.site("b")?.host, &programs.longhaul, &b.folder).await?;
        let gateway_c = match &c {
            Some(c) => Some(Gateway::start(&world.site("c")?.host, &programs.longhaul, &c.folder).await?),
            None => None,
        };
        let scene = Self {
            world,
            a: gateway_a,
            b: gateway_b,
            c: gateway_c,
            names,
            etcd,
            options,
            emulator,
            programs: programs.clone(),
            image,
            disks,
            folder,
        };
        scene.wait_for_link().await?;
        Ok(scene)
    }

    /// Puts the template of the root disks into a site's folder.
    pub fn put_template(&self, site: &str) -> Result<()> {
        let path = self.gateway(site)?.folder.join("templates").join(format!("{TEMPLATE}.raw"));
        disk::copy(&self.image.root_template, &path)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        Ok(std::fs::set_permissions(&path, mode)?)
    }

    /// The machine's name in the DNS.
    pub fn name() -> String {
        format!("{VM}.{ZONE}")
    }

    /// The machine's home address.
    pub fn home(&self) -> Result<IpAddr> {
        Ok(self.world.site("a")?.spec.address(VM_NUMBER).into())
    }

    /// The machine's IPv6 home address, where it has one.
    pub fn home6(&self) -> Result<IpAddr> {
        Ok(self.world.site("a")?.spec.address6(VM_NUMBER).into())
    }

    /// The second machine's home address.
    pub fn second_home(&self) -> Result<IpAddr> {
        Ok(self.world.site("a")?.spec.address(SECOND_VM_NUMBER).into())
    }

    /// The first of a site's care-of addresses.
    pub fn care_of(&self, site: &str) -> Result<IpAddr> {
        Ok(self.world.site(site)?.spec.address(CARE_OF).into())
    }

    /// The first of its IPv6 ones.
    pub fn care_of6(&self, site: &str) -> Result<IpAddr> {
        Ok(self.world.site(site)?.spec.address6(CARE_OF).into())
    }

    /// Measures the emulated WAN.
    pub fn measure(&self) -> Result<Measured> {
        let (near, far) = self.world.wan_addresses()?;
        measure(&self.world.wan, &self.options.wan(), near, far)
    }

    /// Defines the guest at site a, starts it and waits until it serves.
    pub async fn start_guest(&self) -> Result<Duration> {
        self.start(VM, self.definition()?, self.disks.clone()).await
    }

    /// The same for a second one beside it.
    pub async fn start_second_guest(&self) -> Result<Duration> {
        let folder = self.a.folder.join("disks").join(SECOND_VM);
        std::fs::create_dir(&folder)?;
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&folder, open)?;
        let disks = self.image.copy_disks(&folder)?;
        self.start(SECOND_VM, self.second_definition()?, vec![disks.root]).await
    }

    async fn start(&self, vm: &str, definition: String, disks: Vec<PathBuf>) -> Result<Duration> {
        std::fs::write(self.folder.join(format!("{vm}.toml")), &definition)?;
        let client = self.a.client();
        client.define(&DefineRequest { definition, disks }).await?;
        let started = Instant::now();
        client.start(&vm.parse()?).await?;
        console_ready(&self.a.console(vm), Duration::from_secs(120))
            .await
            .with_context(|| format!("gateway a:\n{}", self.a.log_tail()))?;
        Ok(started.elapsed())
    }

    /// The guest's definition, as its operator writes it.
    pub fn definition(&self) -> Result<String> {
        let site = &self.world.site("a")?.spec;
        let mut nics =
            vec![Nic::new("eth0", self.home()?, site.lan_prefix, Some(site.router_address().into()))];
        let mut home = format!("\"{}/{}\"", self.home()?, site.lan_prefix);
        if self.options.dual_stack {
            let (home6, router6) = (self.home6()?, site.address6(1));
            nics[0].addresses.push((home6, 64));
            nics[0].gateways.extend((!self.options.router_advertised).then_some(IpAddr::from(router6)));
            home += &format!(", \"{home6}/64\"");
        }
        let mut devices = self.devices("52:54:00:aa:00:10", &home);
        if self.options.two_of_each {
            let second = site.address(VM_NUMBER + 1);
            nics.push(Nic::new("eth1", second.into(), site.lan_prefix, None));
            devices += &format!(
                "[[disks]]\nname = \"data\"\nsize_bytes = {}\npci = \"04.0\"\n\
                 [[nics]]\nname = \"second\"\nmac = \"52:54:00:aa:00:11\"\nhome = [\"{second}/{}\"]\n\
                 lan = \"lan\"\npci = \"06.0\"\n",
                256u64 << 20,
                site.lan_prefix
            );
        }
        let named = format!("dns_name = \"{}\"\ndns_ttl_s = {}\n", Self::name(), self.options.ttl_s);
        Ok(self.machine(VM, &named, &devices, nics))
    }

    /// The second guest's.
    pub fn second_definition(&self) -> Result<String> {
        let site = &self.world.site("a")?.spec;
        let address = self.second_home()?;
        let nic = Nic::new("eth0", address, site.lan_prefix, Some(site.router_address().into()));
        let devices = self.devices("52:54:00:aa:00:20", &format!("\"{address}/{}\"", site.lan_prefix));
        Ok(self.machine(SECOND_VM, "", &devices, vec![nic]))
    }

    fn devices(&self, mac: &str, home: &str) -> String {
        let template = match self.options.cloned {
            true => format!("template = \"{TEMPLATE}\"\n"),
            false => String::new(),
        };
        format!(
            "[[disks]]\nname = \"root\"\nsize_bytes = {}\npci = \"03.0\"\n{template}\
             [[nics]]\nname = \"lan\"\nmac = \"{mac}\"\nhome = [{home}]\nlan = \"lan\"\npci = \"05.0\"\n",
            self.options.disk_bytes,
        )
    }

    fn machine(&self, vm: &str, named: &str, devices: &str, nics: Vec<Nic>) -> String {
        let options = &self.options;
        let strict = STRICT.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let boot = BootOptions {
            nics,
            sysctls: if options.strict_guest { strict.to_vec() } else { Vec::new() },
            pin_router: options.strict_guest,
            dhcp: options.dhcp_client,
            agent: vec![
                format!("--memory-kib-per-s={}", options.dirty_memory_kib_per_s),
                format!("--disk-kib-per-s={}", options.dirty_disk_kib_per_s),
            ],
            ..BootOptions::default()
        };
        format!(
            "name = \"{vm}\"\nmachine = \"pc-q35-7.2\"\ncpu = \"qemu64\"\nvcpus = 1\nmemory_mib = {}\n\
             {named}restart = \"{}\"\n{devices}\
             [firmware.kernel]\nname = \"lab\"\ncmdline = \"{}\"\nkernel_sha256 = \"{}\"\n\
             initrd_sha256 = \"{}\"\n",
            options.memory_mib,
            if options.restart_on_crash { "on-crash" } else { "never" },
            boot.cmdline(),
            self.image.kernel_sha256,
            self.image.initrd_sha256,
        )
    }

    /// Waits until both gateways see each other.
    pub async fn wait_for_link(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let up = |view: &gateway::api::types::StatusView| view.peers.iter().all(|peer| peer.up);
            let mut all = true;
            for gateway in self.gateways() {
                all &= up(&gateway.client().status().await?);
            }
            if all {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "The gateways do not see each other\na: {}\nb: {}",
                    self.a.log_tail(),
                    self.b.log_tail()
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The gateways there are.
    pub fn gateways(&self) -> impl Iterator<Item = &Gateway> {
        [Some(&self.a), Some(&self.b), self.c.as_ref()].into_iter().flatten()
    }

    /// One site's gateway.
    pub fn gateway(&self, site: &str) -> Result<&Gateway> {
        let found = match site {
            "a" => Some(&self.a),
            "b" => Some(&self.b),
            _ => self.c.as_ref(),
        };
        found.with_context(|| format!("No gateway {site}"))
    }

    /// Begins to move the guest to site b.
    pub async fn begin_move(&self) -> Result<String> {
        self.begin_move_between("a", "b").await
    }

    /// Begins to move the guest.
    pub async fn begin_move_between(&self, from: &str, to: &str) -> Result<String> {
        self.begin_move_of(VM, from, to).await
    }

    /// Begins to move either guest.
    pub async fn begin_move_of(&self, vm: &str, from: &str, to: &str) -> Result<String> {
        let request = MigrateRequest {
            vm: vm.parse()?,
            to: to.parse()?,
            without_dns: vm == SECOND_VM,
            max_downtime_ms: None,
            no_throttle: false,
        };
        Ok(self.gateway(from)?.client().migrate(&request).await?.id)
    }

    /// Waits until a migration from site a is over.
    pub async fn wait_move(&self, id: &str, limit: Duration) -> Result<MigrationView> {
        self.wait_move_from("a", id, limit).await
    }

    /// Waits until a migration is over.
    pub async fn wait_move_from(&self, from: &str, id: &str, limit: Duration) -> Result<MigrationView> {
        let deadline = Instant::now() + limit;
        loop {
            let view = self.gateway(from)?.client().migration(id).await?;
            if view.progressing != Progressing::Running {
                return Ok(view);
            }
            if Instant::now() > deadline {
                bail!("The migration is not over after {limit:?}: {view:?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Keeps what helps to find out what went wrong.
    pub fn keep_logs(&self) {
        for (site, gateway) in ["a", "b", "c"].into_iter().zip(self.gateways()) {
            let kept = |what: &str| self.folder.join(format!("{site}-{what}"));
            copy_if_there(&gateway.log(), &kept("gateway.log"));
            copy_if_there(&gateway.console(VM), &kept("console.log"));
            copy_if_there(&gateway.folder.join("site.toml"), &kept("site.toml"));
            copy_if_there(&gateway.folder.join("run/vm").join(VM).join("qemu.log"), &kept("qemu.log"));
        }
    }

    /// Takes everything down and says what is left nevertheless.
    pub fn close(mut self) -> Vec<String> {
        self.keep_logs();
        // A gateway that does not end by itself is ended with its namespace.
        let _ = self.a.stop();
        let _ = self.b.stop();
        let _ = self.c.as_mut().map(Gateway::stop);
        let Self { world, names, etcd, .. } = self;
        drop((names, etcd));
        world.close()
    }
}

/// TCP ports of the guest that the sites' firewalls admit.
pub fn guest_ports() -> Vec<u16> {
    vec![80, CONTROL_PORT, RECORD_PORT, IDLE_PORT, DOWNLOAD_PORT, RELAY_PORT, UPLOAD_PORT]
}

/// Waits until a guest's console says that it serves.
pub async fn console_ready(console: &Path, limit: Duration) -> Result<()> {
    let started = Instant::now();
    loop {
        let text = std::fs::read_to_string(console).unwrap_or_default();
        if text.contains(READY) {
            return Ok(());
        }
        let late = (started.elapsed() > limit).then_some("it is not ready in time");
        if let Some(why) = failure(&text).or(late) {
            bail!("The guest does not come up: {why}\nits console:\n{}", last_lines(&text));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

fn copy_if_there(from: &Path, to: &Path) {
    if from.exists()
        && let Err(error) = std::fs::copy(from, to).with_context(|| format!("copy {}", from.display()))
    {
        eprintln!("{error:#}");
    }
}
