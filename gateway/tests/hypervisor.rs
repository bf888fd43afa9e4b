//! The hypervisor edge against real QEMU, emulating. No network and no operating system: the guest is a
//! boot sector that changes memory all the time and prints a dot to its serial port now and then.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

#[path = "hypervisor/mirror.rs"]
mod mirror;
#[path = "hypervisor/site.rs"]
mod site;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use gateway::disk::nbd::NbdClient;
use gateway::hypervisor::{
    AcceleratorChoice, Access, AdoptError, Guest, HypervisorConfig, HypervisorError, JobState, KernelPaths,
    MigrationStatus, MirrorMode, OutgoingParameters, QmpClient, QmpConfig, QmpError, RunState, StartMode,
    Travel, UidRange,
};
use longhaul_core::machine::{
    Firmware, Incompatible, KernelBoot, MachineDefinition, Nic, PciAddress, UefiFirmware,
};
use longhaul_core::tunnel::handover::Mac;
use longhaul_core::units::{Bytes, Rate};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Command;
use tokio::sync::watch;

use site::*;

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
    assert_eq!(site.hypervisor.running().unwrap(), std::slice::from_ref(&definition.name));
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
    let began = Instant::now();
    let error = site.hypervisor.find(&definition.name).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Qmp { source: QmpError::Taken { .. }, .. }), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
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
    guest.nbd_start(&guest.own_dir().unwrap().join("nbd.sock")).await.unwrap();
    // The gateway's logs, pid file and monitors are not: whoever breaks out of QEMU cannot replace them.
    let dir = guest.dir().unwrap();
    for name in ["console.log.1", "qemu.log", "pid", "qmp.sock"] {
        let link = ["--reuid=64000", "--regid=64000", "--clear-groups", "ln", "-sfn", "/etc/passwd"];
        let done = Command::new("setpriv").args(link).arg(dir.join(name)).output().await.unwrap();
        assert!(!done.status.success(), "{name} was replaced");
    }
    // It may connect to a socket of the gateway's once it was given to it.
    let socket = guest.dir().unwrap().join("memory.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    guest.prepare_outgoing(&OutgoingParameters::default()).await.unwrap();
    guest.let_connect(&socket).unwrap();
    guest.migrate_to(&socket).await.unwrap();
    tokio::time::timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_machine_that_is_gone_holds_no_user_and_one_that_runs_keeps_its_folder() {
    let range = UidRange { first: 64_100, count: 1 };
    let Some(site) = Site::with(|config| config.uids = Some(range)).await else { return };
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can start machines as other users");
        return;
    }
    fs::set_permissions(site.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let definition = web1();
    let placement = site.place(&definition);
    let guest = site.hypervisor.start(&definition, &placement, StartMode::Incoming).await.unwrap();
    site.hypervisor.remove_dir(&definition.name).unwrap();
    assert!(site.hypervisor.machine_dir(&definition.name).exists());
    guest.quit(LIMIT).await.unwrap();
    let mut other = web1();
    other.name = "web2".parse().unwrap();
    let refused = site.hypervisor.start(&other, &placement, StartMode::Boot).await.unwrap_err();
    assert!(matches!(refused, HypervisorError::NoUid { count: 1 }), "{refused}");
    site.hypervisor.remove_dir(&definition.name).unwrap();
    site.hypervisor.remove_dir(&definition.name).unwrap();
    site.hypervisor.start(&other, &placement, StartMode::Boot).await.unwrap();
}

#[tokio::test]
async fn a_start_that_fails_does_not_take_another_machines_disk() {
    let range = UidRange { first: 64_200, count: 2 };
    let Some(site) = Site::with(|config| config.uids = Some(range)).await else { return };
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can start machines as other users");
        return;
    }
    fs::set_permissions(site.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let (_guest, placement) = site.running(&web1()).await;
    let mut other = web1();
    other.name = "web2".parse().unwrap();
    let refused = site.hypervisor.start(&other, &placement, StartMode::Boot).await.unwrap_err().to_string();
    assert!(refused.contains("lock"), "{refused}");
    for file in placement.disks.values() {
        assert_eq!(fs::metadata(&file.path).unwrap().uid(), 64_200, "{}", file.path.display());
    }
}

/// What QEMU takes for a Linux kernel: the boot protocol's header (2.0) and nothing behind it.
fn kernel_image() -> Vec<u8> {
    let mut image = vec![0; 4096];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x207] = 2;
    image[0x211] = 1;
    image
}

#[tokio::test]
async fn uefi_variables_are_a_volume_of_the_machine() {
    let change = |config: &mut HypervisorConfig| {
        let code = config.run_dir.with_file_name("code.fd");
        fs::write(&code, vec![0; 1 << 20]).unwrap();
        config.uefi_code = Some(code);
    };
    let Some(site) = Site::with(change).await else { return };
    let uefi = UefiFirmware { code_bytes: 1 << 20, vars: disk("vars"), vars_bytes: 128 << 10 };
    let definition = MachineDefinition { firmware: Firmware::Uefi(uefi), ..web1() };
    assert_eq!(definition.check(&site.hypervisor.capabilities().await.unwrap()), Ok(()));
    let placement = site.place(&definition);
    let guest = site.hypervisor.start(&definition, &placement, StartMode::Incoming).await.unwrap();
    assert_eq!(guest.volumes()[&disk("vars")].size_bytes, 128 << 10);
    guest.nbd_start(&site.path("nbd.sock")).await.unwrap();
    guest.export(&disk("vars"), Access::Write, &[]).await.unwrap();
}

#[tokio::test]
async fn a_machine_boots_the_kernel_that_this_site_has_under_its_name() {
    let change = |config: &mut HypervisorConfig| {
        let (kernel, initrd) =
            (config.run_dir.with_file_name("vm,linuz"), config.run_dir.with_file_name("initrd"));
        fs::write(&kernel, kernel_image()).unwrap();
        fs::write(&initrd, "ramdisk").unwrap();
        config.kernels.insert("debian".parse().unwrap(), KernelPaths { kernel, initrd: Some(initrd) });
    };
    let Some(site) = Site::with(change).await else { return };
    let host = site.hypervisor.capabilities().await.unwrap();
    let files = &host.kernels[&"debian".parse().unwrap()];
    let boot = KernelBoot {
        name: "debian".parse().unwrap(),
        cmdline: "console=ttyS0,115200 ro".parse().unwrap(),
        kernel_sha256: files.kernel_sha256,
        initrd_sha256: files.initrd_sha256,
    };
    let definition = MachineDefinition { firmware: Firmware::Kernel(boot.clone()), ..web1() };
    assert_eq!(definition.check(&host), Ok(()));
    let placement = site.place(&definition);
    let guest = site.hypervisor.start(&definition, &placement, StartMode::Boot).await.unwrap();
    // The second monitor stands for one of a machine that somebody else started.
    let socket = guest.observer_socket().unwrap();
    drop(site.hypervisor.adopt(&socket, &definition).await.unwrap());
    let other = KernelBoot { cmdline: "quiet".parse().unwrap(), ..boot };
    let other = MachineDefinition { firmware: Firmware::Kernel(other), ..web1() };
    let error = site.hypervisor.adopt(&socket, &other).await.unwrap_err().to_string();
    assert!(error.contains("firmware.kernel.cmdline: the definition has \"quiet\""), "{error}");
    let error = site.hypervisor.adopt(&socket, &web1()).await.unwrap_err().to_string();
    assert!(error.contains("firmware: the definition has BIOS, QEMU has a kernel of its own"), "{error}");
}

#[tokio::test]
async fn two_interfaces_sit_on_taps_that_this_site_gives_them() {
    let range = UidRange { first: 64_100, count: 1 };
    let Some(site) = Site::with(|config| config.uids = Some(range)).await else { return };
    if !has("ip").await {
        return;
    }
    // This thread, and what it starts, gets a network of its own that ends with the test.
    if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err()
        || !Path::new("/dev/net/tun").exists()
    {
        println!("skipped: no network namespace or no /dev/net/tun");
        return;
    }
    fs::set_permissions(site.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let mut definition = web1();
    let mut placement = site.place(&definition);
    for (at, name) in ["lan", "backup"].into_iter().enumerate() {
        let tap = format!("lhhyp{at}");
        let arguments = ["tuntap", "add", &tap, "mode", "tap", "user", "64100"];
        assert!(Command::new("ip").args(arguments).status().await.unwrap().success());
        definition.nics.push(Nic {
            name: disk(name),
            mac: Mac([0x52, 0x54, 0, 0, 0, at as u8]),
            home: Vec::new(),
            lan: "servers".parse().unwrap(),
            pci: PciAddress::new(8, at as u8).unwrap(),
        });
        placement.taps.insert(disk(name), tap);
    }
    assert_eq!(definition.validate(), Ok(()));
    let guest = site.hypervisor.start(&definition, &placement, StartMode::Boot).await.unwrap();
    guest.announce_self().await.unwrap();
    let socket = guest.observer_socket().unwrap();
    drop(site.hypervisor.adopt(&socket, &definition).await.unwrap());
    definition.nics[1].mac = Mac([0x52, 0x54, 0, 0, 0, 9]);
    let error = site.hypervisor.adopt(&socket, &definition).await.unwrap_err().to_string();
    assert!(error.contains("nics[1].mac: the definition has 52:54:00:00:00:09"), "{error}");
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

/// One export after the other, with a look every 10 ms.
async fn close_by_looking(guest: &Guest) {
    for export in guest.exports().await.unwrap() {
        guest.unexport(&export.id, true).await.unwrap();
    }
    while !guest.exports().await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn exports_end_together_and_by_qemus_word() {
    let Some(site) = Site::new().await else { return };
    let definition = web1();
    let (guest, _placement) = site.running(&definition).await;
    let socket = site.path("nbd.sock");
    let (mut looking, mut told) = (Duration::ZERO, Duration::ZERO);
    for round in 0..40u64 {
        guest.nbd_start(&socket).await.unwrap();
        let mut clients = Vec::new();
        for volume in definition.volumes() {
            guest.export(volume.name, Access::Read, &[]).await.unwrap();
            clients.push(NbdClient::connect(&socket, volume.name.as_str()).await.unwrap());
        }
        assert_eq!(guest.exports().await.unwrap().len(), clients.len());
        let began = Instant::now();
        if round % 2 == 0 {
            close_by_looking(&guest).await;
            looking += began.elapsed();
        } else {
            guest.close_exports(LIMIT).await.unwrap();
            told += began.elapsed();
        }
        assert_eq!(guest.exports().await.unwrap(), []);
        for client in clients {
            assert!(client.read(0, 512).await.is_err(), "a client outlived its export");
        }
        guest.nbd_stop().await.unwrap();
    }
    println!(
        "exports closed by looking {looking:.1?}, by events {told:.1?}: {:.2} of it",
        told.as_secs_f64() / looking.as_secs_f64()
    );
}

#[tokio::test]
async fn a_bitmap_tells_which_blocks_were_written_since() {
    let Some(site) = Site::new().await else { return };
    if !has("qemu-img").await || !has("qemu-io").await {
        return;
    }
    let definition = web1();
    let guest =
        site.hypervisor.start(&definition, &site.place(&definition), StartMode::Incoming).await.unwrap();
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
    let slowly = OutgoingParameters { max_bandwidth: Some(Rate(2 << 20)), ..Default::default() };
    source.prepare_outgoing(&slowly).await.unwrap();
    source.migrate_to(&memory).await.unwrap();
    // A host so busy that the guest did not run between two rounds lets QEMU be done by itself.
    let rounds = async {
        loop {
            let info = source.migration().await.unwrap();
            if info.dirty_sync_count >= 4 || info.status == MigrationStatus::PreSwitchover {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, rounds).await.expect("memory is sent in rounds");
    switch_over(&source, &definition).await;
    let info = source.wait_migration(|_| false, LIMIT).await.unwrap();
    assert_eq!(info.status, MigrationStatus::Completed, "{info:?}");
    assert_eq!(source.status_after_migration(LIMIT).await.unwrap(), RunState::Postmigrate);
    take_over(&destination).await;
    let (left, arrived) = (memory_of(&a, &source).await, memory_of(&b, &destination).await);
    let differing =
        left.chunks(4096).zip(arrived.chunks(4096)).filter(|(left, arrived)| left != arrived).count();
    assert_eq!(differing, 0, "pages are stale at the destination");
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
    assert!(info.total >= web1().memory() && info.page_size == Bytes(4096), "{info:?}");
    for volume in definition.volumes() {
        assert_eq!(source.mirror_finish(volume.name, LIMIT).await.unwrap().state, JobState::Concluded);
        assert_eq!(source.mirror_status(volume.name).await.unwrap(), None);
    }
    source.continue_switchover().await.unwrap();
}

/// The memory that the busy guest changes.
async fn memory_of(site: &Site, guest: &Guest) -> Vec<u8> {
    let file = site.path("memory.bin");
    let arguments = serde_json::json!({ "val": 0, "size": 0x90000, "filename": file });
    guest.qmp().execute("pmemsave", arguments).await.unwrap();
    content(&file)
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
    // The run state alone could pass for that of a machine that was handed over.
    assert_eq!(info.status, MigrationStatus::Failed);
    assert!(matches!(state, RunState::Postmigrate | RunState::FinishMigrate), "{state}");
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
    refused("memory_mib, memory_trim_kib", &|it| it.memory_trim_kib = 0).await;
    refused("uuid", &|it| it.uuid = "6ba7b810-9dad-81d1-80b4-00c04fd430c8".parse().ok()).await;
    refused("disks[0].size_bytes", &|it| it.disks[0].size_bytes = 1 << 30).await;
    refused("disks[1].serial", &|it| it.disks[1].serial = None).await;
    refused("disks[1].pci", &|it| it.disks[1].pci = "08.0".parse().unwrap()).await;
    refused("disks[0]", &|it| it.disks[0].pci = "06.0".parse().unwrap()).await;
    refused("devices", &|it| it.rng = None).await;
    let mut definition = web1();
    definition.memory_mib = 128;
    let error = site.hypervisor.adopt(&foreign.socket, &definition).await.unwrap_err().to_string();
    assert!(error.ends_with(": the definition has 131064 KiB, QEMU has 65528 KiB"), "{error}");
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
    let foreign =
        Foreign::start(&site, "64M", &format!("file={image},format=qcow2,if=none,id=hd1"), &device).await;
    let whole = MachineDefinition { memory_trim_kib: 0, ..web1() };
    let guest = site.hypervisor.adopt(&foreign.socket, &whole).await.unwrap();
    let travel = guest.what_cannot_travel().await.unwrap();
    let text: String = travel.obstacles.iter().map(|it| format!("{it}\n")).collect();
    assert!(text.contains("1 internal snapshots"), "{text}");
    assert!(text.contains("shared: the disk is shared"), "{text}");
    if guest.qmp().version()["qemu"]["major"].as_u64() < Some(9) {
        assert!(text.contains("memory: this QEMU loses writes"), "{text}");
    }
    for word in ["chain of 2 images", "is qcow2 here and becomes a raw"] {
        assert!(travel.notes.iter().any(|note| note.contains(word)), "{word}: {:?}", travel.notes);
    }
}

#[tokio::test]
async fn the_host_is_asked_and_not_guessed() {
    let Some(site) = Site::with(|config| config.accelerator = AcceleratorChoice::Auto).await else { return };
    let began = Instant::now();
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
