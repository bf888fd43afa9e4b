//! The hypervisor edge against real QEMU, emulating. No network and no operating system: the guest is a
//! boot sector that changes memory all the time and prints a dot to its serial port now and then.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gateway::hypervisor::{
    AcceleratorChoice, Access, AdoptError, DiskFile, DiskFormat, Guest, Hypervisor, HypervisorConfig,
    HypervisorError, JobState, MigrationStatus, MirrorMode, OutgoingParameters, Placement, QmpClient,
    QmpConfig, QmpError, RunState, StartMode, Travel, UidRange,
};
use longhaul_core::ids::DeviceName;
use longhaul_core::machine::{Incompatible, MachineDefinition};
use longhaul_core::migration::permit::RunPermit;
use longhaul_core::units::{Bytes, Rate};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Command;
use tokio::sync::watch;

/// Enters long mode, then for ever: increments a word in each of 128 pages, every 65536th time prints a dot.
const BUSY_GUEST: [u8; 174] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x66, 0xbf, 0x00, 0x10, 0x00, 0x00, 0x66, 0xb9, 0x00, 0x0c,
    0x00, 0x00, 0x66, 0x31, 0xc0, 0xfc, 0x67, 0x66, 0xf3, 0xab, 0xc7, 0x06, 0x00, 0x10, 0x03, 0x20, 0xc7,
    0x06, 0x00, 0x20, 0x03, 0x30, 0xc7, 0x06, 0x00, 0x30, 0x83, 0x00, 0x66, 0xb8, 0xa0, 0x00, 0x00, 0x00,
    0x0f, 0x22, 0xe0, 0x66, 0xb8, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8, 0x66, 0xb9, 0x80, 0x00, 0x00,
    0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x01, 0x0f, 0x30, 0x0f, 0x01, 0x16, 0xa8, 0x7c, 0x0f, 0x20, 0xc0, 0x66,
    0x0d, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, 0xea, 0x62, 0x7c, 0x08, 0x00, 0xbf, 0x00, 0x00, 0x01,
    0x00, 0xb9, 0x80, 0x00, 0x00, 0x00, 0xff, 0x07, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0xff, 0xc9, 0x75,
    0xf4, 0xff, 0x04, 0x25, 0x00, 0x05, 0x00, 0x00, 0xf7, 0x04, 0x25, 0x00, 0x05, 0x00, 0x00, 0xff, 0xff,
    0x00, 0x00, 0x75, 0xd6, 0x66, 0xba, 0xf8, 0x03, 0xb0, 0x2e, 0xee, 0xeb, 0xcd, 0x0f, 0x1f, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x9a, 0x20, 0x00, 0x0f, 0x00,
    0x98, 0x7c, 0x00, 0x00,
];

const LIMIT: Duration = Duration::from_secs(60);

const WEB1: &str = r#"
    name = "web1"
    machine = "pc-q35-7.2"
    vcpus = 2
    memory_mib = 64
    rng = "06.0"

    [[disks]]
    name = "root"
    size_bytes = 8388608
    pci = "04.0"

    [[disks]]
    name = "data"
    size_bytes = 4194304
    pci = "05.0"
    serial = "data-1"
"#;

fn web1() -> MachineDefinition {
    toml::from_str(WEB1).unwrap()
}

fn disk(name: &str) -> DeviceName {
    name.parse().unwrap()
}

fn permit() -> RunPermit {
    RunPermit::for_lead_to_replace()
}

/// One site: a run directory, a pool of disks, and whatever runs there until the end of the test.
struct Site {
    dir: tempfile::TempDir,
    hypervisor: Hypervisor,
}

impl Site {
    /// A site whose machines are emulated; `None`, with the reason printed, where there is no QEMU.
    async fn new() -> Option<Self> {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut HypervisorConfig)) -> Option<Self> {
        if !has("qemu-system-x86_64").await {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut config = HypervisorConfig {
            run_dir: dir.path().join("run"),
            accelerator: AcceleratorChoice::Tcg,
            systemd: false,
            ..HypervisorConfig::default()
        };
        change(&mut config);
        Some(Self { hypervisor: Hypervisor::new(config).unwrap(), dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Raw files of the defined sizes, empty.
    fn place(&self, definition: &MachineDefinition) -> Placement {
        let mut placement = Placement::default();
        for volume in definition.volumes() {
            let path = self.path(&format!("{}.raw", volume.name));
            fs::File::create(&path).unwrap().set_len(volume.size_bytes).unwrap();
            placement.disks.insert(volume.name.clone(), DiskFile { path, format: DiskFormat::Raw });
        }
        placement
    }

    /// The same with the busy guest and a pattern on every disk.
    fn place_busy(&self, definition: &MachineDefinition) -> Placement {
        let placement = self.place(definition);
        for (at, volume) in definition.volumes().enumerate() {
            let mut file = fs::File::options().write(true).open(&placement.disks[volume.name].path).unwrap();
            let mut sector = [0; 512];
            sector[..BUSY_GUEST.len()].copy_from_slice(&BUSY_GUEST);
            sector[510..].copy_from_slice(&[0x55, 0xaa]);
            file.write_all(&sector).unwrap();
            file.seek(SeekFrom::Start(1 << 20)).unwrap();
            file.write_all(&vec![at as u8 + 1; 1 << 20]).unwrap();
        }
        placement
    }

    /// Starts the busy guest and waits until it prints.
    async fn running(&self, definition: &MachineDefinition) -> (Guest, Placement) {
        let placement = self.place_busy(definition);
        let guest = self.hypervisor.start(definition, &placement, StartMode::Boot).await.unwrap();
        guest.resume(permit()).await.unwrap();
        more_dots(&guest, 0).await;
        (guest, placement)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for name in self.hypervisor.running().unwrap_or_default() {
            let pid = self.hypervisor.machine_dir(&name).join("pid");
            if let Some(pid) = fs::read_to_string(pid).ok().and_then(|text| text.trim().parse().ok()) {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }
}

/// How many dots the guest has printed here.
fn dots(guest: &Guest) -> u64 {
    fs::metadata(guest.dir().unwrap().join("console.log")).map_or(0, |it| it.len())
}

/// Waits until the guest has printed more than `before` dots.
async fn more_dots(guest: &Guest, before: u64) -> u64 {
    let more = async {
        while dots(guest) <= before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        dots(guest)
    };
    tokio::time::timeout(LIMIT, more).await.expect("the guest prints")
}

async fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().await.is_ok();
    if !found {
        println!("skipped: there is no {program}");
    }
    found
}

fn content(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

#[tokio::test]
async fn a_machine_starts_paused_outlives_its_handle_and_is_found_again() {
    let Some(site) = Site::new().await else { return };
    let definition = web1();
    let placement = site.place_busy(&definition);
    let guest = site.hypervisor.start(&definition, &placement, StartMode::Boot).await.unwrap();
    assert_eq!(guest.status().await.unwrap(), RunState::Prelaunch);
    assert_eq!(guest.volumes()[&disk("data")].size_bytes, 4 << 20);
    let again = site.hypervisor.start(&definition, &placement, StartMode::Boot).await.unwrap_err();
    assert!(matches!(again, HypervisorError::Runs { .. }), "{again}");
    guest.resume(permit()).await.unwrap();
    let before = more_dots(&guest, 0).await;
    let (pid, volumes) = (guest.pid(), guest.volumes().clone());
    drop(guest);

    let found = site.hypervisor.find(&definition.name).await.unwrap().expect("it still runs");
    assert_eq!((found.pid(), found.volumes()), (pid, &volumes));
    assert_eq!(found.status().await.unwrap(), RunState::Running);
    more_dots(&found, before).await;
    let mut events = found.events();
    found.stop().await.unwrap();
    assert_eq!(events.next().await.unwrap().name, "STOP");
    assert_eq!(found.status().await.unwrap(), RunState::Paused);
    found.system_reset().await.unwrap();
    found.announce_self().await.unwrap();
    assert_eq!(site.hypervisor.running().unwrap(), [definition.name.clone()]);
    found.quit(LIMIT).await.unwrap();
    assert!(site.hypervisor.find(&definition.name).await.unwrap().is_none());
    site.hypervisor.discard(&definition.name).await.unwrap();
    assert!(!site.hypervisor.machine_dir(&definition.name).exists());
}

#[tokio::test]
async fn a_monitor_that_another_owner_holds_is_reported_within_its_limit() {
    let Some(site) = Site::new().await else { return };
    let definition = web1();
    let guest = site.hypervisor.start(&definition, &site.place(&definition), StartMode::Boot).await.unwrap();
    let began = std::time::Instant::now();
    let error = site.hypervisor.find(&definition.name).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Qmp { source: QmpError::Taken { .. }, .. }), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    // The observer's monitor is another one, and free.
    let observer = guest.observer_socket().unwrap();
    let observer = QmpClient::connect(&observer, QmpConfig::default()).await.unwrap();
    let mut events = observer.events();
    guest.resume(permit()).await.unwrap();
    assert_eq!(events.next().await.unwrap().name, "RESUME");
    site.hypervisor.discard(&definition.name).await.unwrap();
    guest.gone().await;
    assert!(matches!(guest.status().await, Err(QmpError::Gone { .. })));
}

#[tokio::test]
async fn a_machine_that_cannot_start_says_what_qemu_said_and_leaves_nothing() {
    let Some(site) = Site::new().await else { return };
    let mut definition = web1();
    let placement = site.place(&definition);
    definition.cpu = "no-such-cpu".parse().unwrap();
    let error =
        site.hypervisor.start(&definition, &placement, StartMode::Boot).await.unwrap_err().to_string();
    assert!(error.contains("no-such-cpu") && error.contains("CPU model"), "{error}");
    assert!(!site.hypervisor.machine_dir(&definition.name).exists());

    let mut definition = web1();
    definition.disks[1].size_bytes = 1 << 20;
    let error = site.hypervisor.start(&definition, &placement, StartMode::Boot).await.unwrap_err();
    let HypervisorError::NotAsDefined { source: AdoptError::Differs(found), .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(found[0].field, "disks[1].size_bytes");
    assert!(!site.hypervisor.machine_dir(&definition.name).exists());
}

#[tokio::test]
async fn a_machine_runs_as_a_user_of_its_own_under_a_filter() {
    let range = UidRange { first: 64_000, count: 2 };
    let Some(site) = Site::with(|config| config.uids = Some(range)).await else { return };
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can start machines as other users");
        return;
    }
    fs::set_permissions(site.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let (guest, _) = site.running(&web1()).await;
    let status = fs::read_to_string(format!("/proc/{}/status", guest.pid().unwrap())).unwrap();
    let field = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap();
    assert!(field("Uid:").contains("64000\t64000\t64000"), "{}", field("Uid:"));
    assert!(field("Seccomp:").ends_with('2'), "{}", field("Seccomp:"));
    assert!(field("CapEff:").ends_with("0000000000000000"), "{}", field("CapEff:"));
    // Its own folder is open to it, for the sockets it makes while it runs.
    guest.nbd_start(&guest.dir().unwrap().join("nbd.sock")).await.unwrap();
    // It may connect to a socket of the gateway's once it was given to it.
    let socket = guest.dir().unwrap().join("memory.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    guest.prepare_outgoing(&OutgoingParameters::default()).await.unwrap();
    guest.let_connect(&socket).unwrap();
    guest.migrate_to(&socket).await.unwrap();
    tokio::time::timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_read_only_export_shows_what_the_disk_holds_and_refuses_writes() {
    let Some(site) = Site::new().await else { return };
    if !has("qemu-img").await || !has("qemu-io").await {
        return;
    }
    let (guest, placement) = site.running(&web1()).await;
    let socket = site.path("nbd.sock");
    guest.nbd_start(&socket).await.unwrap();
    guest.dirty_bitmap_add(&disk("data"), "since", 65536).await.unwrap();
    let id = guest.export(&disk("data"), Access::Read, &[]).await.unwrap();
    let url = format!("nbd+unix:///data?socket={}", socket.display());
    let copy = site.path("copy.raw");
    let run = async |program: &str, arguments: &[&str]| {
        Command::new(program).args(arguments).output().await.unwrap()
    };
    let copied = run("qemu-img", &["convert", "-O", "raw", &url, copy.to_str().unwrap()]).await;
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    assert!(content(&copy) == content(&placement.disks[&disk("data")].path));
    let written = run("qemu-io", &["-f", "raw", "-c", "write 0 512", &url]).await;
    assert!(!written.status.success());
    assert_eq!(guest.status().await.unwrap(), RunState::Running, "an export does not hinder the guest");

    assert_eq!(guest.exports().await.unwrap()[0].id, id);
    guest.unexport(&id, true).await.unwrap();
    guest.nbd_stop().await.unwrap();
    assert_eq!(guest.exports().await.unwrap(), []);
    guest.dirty_bitmap_freeze(&disk("data"), "since").await.unwrap();
    guest.dirty_bitmap_remove(&disk("data"), "since").await.unwrap();
    let unknown = guest.export(&disk("none"), Access::Read, &[]).await.unwrap_err();
    assert!(unknown.to_string().contains("no disk none"), "{unknown}");
}

#[tokio::test]
async fn a_bitmap_tells_which_blocks_were_written_since() {
    let Some(site) = Site::new().await else { return };
    if !has("qemu-img").await || !has("qemu-io").await {
        return;
    }
    let definition = web1();
    let guest = site.hypervisor.start(&definition, &site.place(&definition), StartMode::Boot).await.unwrap();
    let (socket, data) = (site.path("nbd.sock"), disk("data"));
    guest.nbd_start(&socket).await.unwrap();
    guest.dirty_bitmap_add(&data, "since", 65536).await.unwrap();
    let url = format!("nbd+unix:///data?socket={}", socket.display());
    let write = guest.export(&data, Access::Write, &[]).await.unwrap();
    let arguments = ["-f", "raw", "-c", "write -P 7 1M 4k", &url];
    assert!(Command::new("qemu-io").args(arguments).output().await.unwrap().status.success());
    guest.unexport(&write, true).await.unwrap();
    while !guest.exports().await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    guest.dirty_bitmap_freeze(&data, "since").await.unwrap();
    guest.export(&data, Access::Read, &["since"]).await.unwrap();
    let image = serde_json::json!({
        "driver": "nbd", "export": "data", "server.type": "unix", "server.path": socket,
        "x-dirty-bitmap": "qemu:dirty-bitmap:since",
    });
    let map = Command::new("qemu-img")
        .args(["map", "--output=json", &format!("json:{image}")])
        .output()
        .await
        .unwrap();
    let map: serde_json::Value = serde_json::from_slice(&map.stdout).unwrap();
    // qemu-img shows what the bitmap holds as "no data".
    let written: Vec<_> = map.as_array().unwrap().iter().filter(|extent| extent["data"] == false).collect();
    assert_eq!(written.len(), 1, "{map}");
    assert_eq!((written[0]["start"].as_u64(), written[0]["length"].as_u64()), (Some(1 << 20), Some(65536)));
}

#[tokio::test]
async fn a_machine_moves_with_its_disks_and_runs_at_one_place_at_any_time() {
    let (Some(a), Some(b)) = (Site::new().await, Site::new().await) else { return };
    let definition = web1();
    let (source, at_a) = a.running(&definition).await;
    assert_eq!(source.what_cannot_travel().await.unwrap(), Travel::default());
    let at_b = b.place(&definition);
    let destination = b.hypervisor.start(&definition, &at_b, StartMode::Incoming).await.unwrap();
    assert_eq!(destination.status().await.unwrap(), RunState::Inmigrate);
    let (memory, nbd) = (b.path("memory.sock"), b.path("nbd.sock"));
    destination.incoming(&memory).await.unwrap();
    destination.nbd_start(&nbd).await.unwrap();
    for volume in definition.volumes() {
        destination.export(volume.name, Access::Write, &[]).await.unwrap();
        source.mirror_start(volume.name, &nbd, volume.name.as_str(), MirrorMode::Full).await.unwrap();
    }
    for volume in definition.volumes() {
        let status = source.mirror_settled(volume.name, LIMIT).await.unwrap();
        assert_eq!((status.state, status.done), (JobState::Ready, Bytes(volume.size_bytes)));
    }
    let slowly = OutgoingParameters { max_bandwidth: Some(Rate(4 << 20)), ..Default::default() };
    source.prepare_outgoing(&slowly).await.unwrap();
    source.migrate_to(&memory).await.unwrap();
    let rounds = async {
        while source.migration().await.unwrap().dirty_sync_count < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, rounds).await.expect("memory is sent in rounds");
    assert!(source.status().await.unwrap().is_running());
    switch_over(&source, &definition).await;
    let info = source.wait_migration(|_| false, LIMIT).await.unwrap();
    assert_eq!(info.status, MigrationStatus::Completed, "{info:?}");
    assert_eq!(source.status().await.unwrap(), RunState::Postmigrate);
    take_over(&destination).await;
    for (name, file) in &at_a.disks {
        assert!(content(&file.path) == content(&at_b.disks[name].path), "disk {name} differs");
    }
    let at_source = dots(&source);
    destination.resume(permit()).await.unwrap();
    more_dots(&destination, 0).await;
    assert_eq!((source.status().await.unwrap(), dots(&source)), (RunState::Postmigrate, at_source));
    source.quit(LIMIT).await.unwrap();
}

/// Stops the source, ends its mirrors at `pre-switchover`, and lets QEMU send the rest.
async fn switch_over(source: &Guest, definition: &MachineDefinition) {
    source.limit_bandwidth(None).await.unwrap();
    source.stop().await.unwrap();
    let info = source.wait_migration(|it| *it == MigrationStatus::PreSwitchover, LIMIT).await.unwrap();
    assert_eq!(info.status, MigrationStatus::PreSwitchover);
    assert!(info.total > Bytes::mib(64) && info.page_size == Bytes(4096), "{info:?}");
    for volume in definition.volumes() {
        assert_eq!(source.mirror_finish(volume.name, LIMIT).await.unwrap().state, JobState::Concluded);
        assert_eq!(source.mirror_status(volume.name).await.unwrap(), None);
    }
    source.continue_switchover().await.unwrap();
}

/// Waits until the destination has loaded everything, and closes its exports.
async fn take_over(destination: &Guest) {
    let loaded = destination.wait_migration(|_| false, LIMIT).await.unwrap();
    assert_eq!(loaded.status, MigrationStatus::Completed);
    assert_eq!(destination.status().await.unwrap(), RunState::Paused);
    for export in destination.exports().await.unwrap() {
        destination.unexport(&export.id, true).await.unwrap();
    }
    destination.nbd_stop().await.unwrap();
    assert_eq!(destination.exports().await.unwrap(), []);
}

/// Carries bytes from one socket to another until it is told to cut.
fn relay(from: &Path, to: &Path) -> watch::Sender<bool> {
    let listener = UnixListener::bind(from).unwrap();
    let (cut, mut is_cut) = watch::channel(false);
    let to = to.to_owned();
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = UnixStream::connect(to).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            _ = is_cut.wait_for(|&cut| cut) => {}
        }
    });
    cut
}

/// A running source and a waiting destination, with a relay between them that can be cut.
async fn under_way(a: &Site, b: &Site, rate: Rate) -> (Guest, Guest, watch::Sender<bool>) {
    let definition = web1();
    let (source, _) = a.running(&definition).await;
    let at_b = b.place(&definition);
    let destination = b.hypervisor.start(&definition, &at_b, StartMode::Incoming).await.unwrap();
    let (near, far) = (a.path("relay.sock"), b.path("memory.sock"));
    destination.incoming(&far).await.unwrap();
    let cut = relay(&near, &far);
    let parameters = OutgoingParameters { max_bandwidth: Some(rate), ..Default::default() };
    source.prepare_outgoing(&parameters).await.unwrap();
    source.migrate_to(&near).await.unwrap();
    source.wait_migration(|it| *it == MigrationStatus::Active, LIMIT).await.unwrap();
    (source, destination, cut)
}

#[tokio::test]
async fn a_cut_before_the_pause_leaves_the_source_running_and_ends_the_destination() {
    let (Some(a), Some(b)) = (Site::new().await, Site::new().await) else { return };
    let (source, destination, cut) = under_way(&a, &b, Rate(1 << 20)).await;
    cut.send(true).unwrap();
    let info = source.wait_migration(|_| false, LIMIT).await.unwrap();
    assert_eq!(info.status, MigrationStatus::Failed);
    assert_eq!(source.status().await.unwrap(), RunState::Running);
    destination.gone().await;
    let pid = b.hypervisor.machine_dir(destination.name()).join("pid");
    while !b.hypervisor.running().unwrap().is_empty() {
        assert!(pid.exists());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_cut_after_our_stop_never_resumes_the_source_and_the_gateway_can() {
    let (Some(a), Some(b)) = (Site::new().await, Site::new().await) else { return };
    let (source, destination, cut) = under_way(&a, &b, Rate(4 << 20)).await;
    source.limit_bandwidth(None).await.unwrap();
    let mut events = source.events();
    source.stop().await.unwrap();
    source.wait_migration(|it| *it == MigrationStatus::PreSwitchover, LIMIT).await.unwrap();
    cut.send(true).unwrap();
    destination.gone().await;
    source.continue_switchover().await.unwrap();
    let info = source.wait_migration(|_| false, LIMIT).await.unwrap();
    let state = source.status().await.unwrap();
    println!("after the cut: {state}, {}", info.status);
    // The run state alone would pass for a machine that was handed over.
    assert_eq!((info.status, state), (MigrationStatus::Failed, RunState::Postmigrate));
    let mut names = Vec::new();
    while let Ok(Ok(event)) = tokio::time::timeout(Duration::from_millis(300), events.next()).await {
        names.push(event.name);
    }
    assert!(!names.contains(&"RESUME".to_owned()), "{names:?}");
    let before = dots(&source);
    source.resume(permit()).await.unwrap();
    assert_eq!(source.status().await.unwrap(), RunState::Running);
    more_dots(&source, before).await;
}

#[tokio::test]
async fn a_cancelled_or_yanked_migration_leaves_the_source_running() {
    let (Some(a), Some(b)) = (Site::new().await, Site::new().await) else { return };
    let (source, destination, _cut) = under_way(&a, &b, Rate(1 << 20)).await;
    source.cancel_migration().await.unwrap();
    let info = source.wait_migration(|_| false, LIMIT).await.unwrap();
    assert_eq!(
        (info.status, source.status().await.unwrap()),
        (MigrationStatus::Cancelled, RunState::Running)
    );
    destination.gone().await;

    let nobody = a.path("nobody.sock");
    let listener = UnixListener::bind(&nobody).unwrap();
    source.migrate_to(&nobody).await.unwrap();
    let (_silent, _) = listener.accept().await.unwrap();
    // Nobody reads: the socket fills up and QEMU waits in it.
    source.wait_migration(|it| *it == MigrationStatus::Active, LIMIT).await.unwrap();
    source.cut_migration().await.unwrap();
    let info = source.wait_migration(|_| false, LIMIT).await.unwrap();
    assert_eq!((info.status, source.status().await.unwrap()), (MigrationStatus::Failed, RunState::Running));
}

#[tokio::test]
async fn a_mirror_whose_target_goes_away_is_aborted_and_the_guest_runs_on() {
    let (Some(a), Some(b)) = (Site::new().await, Site::new().await) else { return };
    let definition = web1();
    let (source, _) = a.running(&definition).await;
    let at_b = b.place(&definition);
    let destination = b.hypervisor.start(&definition, &at_b, StartMode::Incoming).await.unwrap();
    let (nbd, root) = (b.path("nbd.sock"), disk("root"));
    destination.nbd_start(&nbd).await.unwrap();
    let refused = source.mirror_start(&root, &nbd, "root", MirrorMode::Full).await.unwrap_err();
    assert!(matches!(refused, QmpError::Refused { .. }), "{refused}");
    destination.export(&root, Access::Write, &[]).await.unwrap();
    source.mirror_start(&root, &nbd, "root", MirrorMode::None).await.unwrap();
    assert_eq!(source.mirror_settled(&root, LIMIT).await.unwrap().state, JobState::Ready);
    b.hypervisor.discard(&definition.name).await.unwrap();
    source.mirror_abort(&root, true, Duration::from_secs(2)).await.unwrap();
    assert_eq!(source.mirror_status(&root).await.unwrap(), None);
    assert!(source.status().await.unwrap().is_running());
    source.mirror_abort(&root, true, LIMIT).await.expect("no mirror is no error");
    let error = source.mirror_finish(&root, LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("not ready"), "{error}");
}

/// A QEMU that somebody else started, with names and options of their own.
struct Foreign {
    process: std::process::Child,
    socket: PathBuf,
}

impl Foreign {
    async fn start(site: &Site, data: &str, extra: &[&str]) -> Self {
        let root = site.place(&web1()).disks[&disk("root")].path.display().to_string();
        let socket = site.path("foreign.sock");
        let process = std::process::Command::new("qemu-system-x86_64")
            .args(["-M", "pc-q35-7.2,accel=tcg", "-cpu", "qemu64", "-smp", "2", "-m", "64"])
            .args(["-uuid", &web1().uuid().to_string()])
            .args(["-nodefaults", "-display", "none", "-S", "-serial", "null"])
            .args(["-drive", &format!("file={root},format=raw,if=none,id=hd0")])
            .args(["-device", "virtio-blk-pci,drive=hd0,addr=4"])
            .args(["-drive", data, "-device", "virtio-rng-pci,addr=6"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .args(extra)
            .spawn()
            .unwrap();
        let there = async {
            while !socket.exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, there).await.expect("QEMU makes its socket");
        Self { process, socket }
    }

    /// With the disks as they are defined.
    async fn as_defined(site: &Site, extra: &[&str]) -> Self {
        let data = site.place(&web1()).disks[&disk("data")].path.display().to_string();
        let device = ["-device", "virtio-blk-pci,drive=hd1,addr=5,serial=data-1,id=x"];
        Self::start(site, &format!("file={data},format=raw,if=none,id=hd1"), &[&device, extra].concat()).await
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn a_foreign_machine_is_adopted_as_it_is() {
    let Some(site) = Site::new().await else { return };
    let foreign = Foreign::as_defined(&site, &[]).await;
    let guest = site.hypervisor.adopt(&foreign.socket, &web1()).await.unwrap();
    assert_eq!(guest.volumes()[&disk("data")].size_bytes, 4 << 20);
    assert!(guest.volumes()[&disk("root")].node.starts_with("#block"), "{:?}", guest.volumes());
    assert_eq!((guest.pid(), guest.status().await.unwrap()), (None, RunState::Prelaunch));
    guest.nbd_start(&site.path("nbd.sock")).await.unwrap();
    guest.export(&disk("root"), Access::Read, &[]).await.expect("nodes without a name can be exported");
    assert_eq!(guest.what_cannot_travel().await.unwrap(), Travel::default());
    guest.quit(LIMIT).await.unwrap();
}

#[tokio::test]
async fn a_foreign_machine_that_differs_is_refused_by_the_name_of_the_field() {
    let Some(site) = Site::new().await else { return };
    let foreign = Foreign::as_defined(&site, &[]).await;
    let refused = async |field: &str, change: &dyn Fn(&mut MachineDefinition)| {
        let mut definition = web1();
        change(&mut definition);
        match site.hypervisor.adopt(&foreign.socket, &definition).await {
            Err(AdoptError::Differs(found)) => assert_eq!(found[0].field, field, "{found:?}"),
            other => panic!("{field}: {other:?}"),
        }
    };
    refused("machine", &|it| it.machine = "pc-q35-7.1".parse().unwrap()).await;
    refused("cpu", &|it| it.cpu = "kvm64".parse().unwrap()).await;
    refused("vcpus", &|it| it.vcpus = 1).await;
    refused("memory_mib", &|it| it.memory_mib = 128).await;
    refused("uuid", &|it| it.uuid = "6ba7b810-9dad-81d1-80b4-00c04fd430c8".parse().ok()).await;
    refused("disks[0].size_bytes", &|it| it.disks[0].size_bytes = 1 << 30).await;
    refused("disks[1].serial", &|it| it.disks[1].serial = None).await;
    refused("disks[1].pci", &|it| it.disks[1].pci = "08.0".parse().unwrap()).await;
    refused("disks[0]", &|it| it.disks[0].pci = "06.0".parse().unwrap()).await;
    refused("devices", &|it| it.rng = None).await;
    let mut definition = web1();
    definition.memory_mib = 128;
    let error = site.hypervisor.adopt(&foreign.socket, &definition).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "The running machine is not as defined: memory_mib: the definition has 128, QEMU has 64"
    );
}

#[tokio::test]
async fn devices_that_no_definition_knows_are_refused() {
    let Some(site) = Site::new().await else { return };
    let memory = "memory-backend-ram,id=m,size=1M,share=on";
    let extra = ["-object", memory, "-device", "ivshmem-plain,memdev=m", "-vga", "std", "-serial", "null"];
    let foreign = Foreign::as_defined(&site, &extra).await;
    let error = site.hypervisor.adopt(&foreign.socket, &web1()).await.unwrap_err().to_string();
    assert!(error.contains("QEMU has a ivshmem-plain at PCI"), "{error}");
    assert!(error.contains("QEMU has a VGA controller at PCI"), "{error}");
    assert!(error.contains("serial ports: the definition has 1, QEMU has 2"), "{error}");
}

#[tokio::test]
async fn what_cannot_travel_is_named_before_anything_moves() {
    let Some(site) = Site::new().await else { return };
    if !has("qemu-img").await {
        return;
    }
    let (base, image) = (site.path("base.raw"), site.path("data.qcow2"));
    fs::File::create(&base).unwrap().set_len(4 << 20).unwrap();
    let (base, image) = (base.to_str().unwrap(), image.to_str().unwrap());
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, image];
    for arguments in [&create[..], &["snapshot", "-c", "one", image]] {
        assert!(Command::new("qemu-img").args(arguments).status().await.unwrap().success());
    }
    let device = ["-device", "virtio-blk-pci,drive=hd1,addr=5,serial=data-1,id=shared,share-rw=on"];
    let foreign = Foreign::start(&site, &format!("file={image},format=qcow2,if=none,id=hd1"), &device).await;
    let guest = site.hypervisor.adopt(&foreign.socket, &web1()).await.unwrap();
    let travel = guest.what_cannot_travel().await.unwrap();
    let text: String = travel.obstacles.iter().map(|it| format!("{it}\n")).collect();
    assert!(text.contains("1 internal snapshots"), "{text}");
    assert!(text.contains("shared: the disk is shared"), "{text}");
    assert!(travel.notes.iter().any(|note| note.contains("chain of 2 images")), "{:?}", travel.notes);
}

#[tokio::test]
async fn the_host_is_asked_and_not_guessed() {
    let Some(site) = Site::with(|config| config.accelerator = AcceleratorChoice::Auto).await else { return };
    let began = std::time::Instant::now();
    let accelerator = site.hypervisor.accelerator().await;
    println!("{accelerator:?} after {:?}", began.elapsed());
    let host = site.hypervisor.capabilities().await.unwrap();
    println!("QEMU {} with {:?}", host.qemu, host.features);
    assert!(host.has("blockdev-mirror") && host.has("yank") && host.has("migrate-continue"));
    assert!(host.free_memory > Bytes::mib(64));
    assert_eq!(host.has("block-job-change"), (host.qemu.major, host.qemu.minor) >= (8, 2));
    assert_eq!(web1().check(&host), Ok(()));
    let mut future = web1();
    future.machine = "pc-q35-99.0".parse().unwrap();
    let Err(Incompatible(found)) = future.check(&host) else { panic!("no QEMU has that machine type") };
    assert_eq!(found[0].field, "machine");
    let none = Site::with(|config| config.qemu = "/nonexistent/qemu".into()).await.unwrap();
    let error = none.hypervisor.capabilities().await.unwrap_err().to_string();
    assert!(error.contains("install QEMU"), "{error}");
}
