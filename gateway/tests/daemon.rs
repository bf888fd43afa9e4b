//! The daemon as a process, in a network namespace of its own: what it refuses to begin with, and that it
//! answers whatever one machine's QEMU does. Nothing moves here.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

#[path = "daemon/site.rs"]
mod site;

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use site::*;

#[test]
fn a_qemu_that_hangs_keeps_nobody_else_waiting() {
    let Some(site) = Site::new() else { return };
    let gateway = site.serve();
    for vm in ["web1", "web2"] {
        site.define(vm);
        site.longhaul(&["vm", "start", vm]).success();
    }
    site.signal("web1", Signal::SIGSTOP);
    // Each of these asks the QEMU that hangs, and waits for it.
    let stopping = site.begin(&["vm", "stop", "web1"]);
    let looking = site.begin(&["doctor"]);
    let began = Instant::now();
    site.longhaul(&["may-run", "web2"]).success();
    let listed = site.longhaul(&["vm", "list"]).success();
    site.longhaul(&["vm", "stop", "web2"]).success();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(6), "{took:?}");
    let line = |vm: &str| listed.lines().find(|line| line.contains(vm)).unwrap_or_default();
    assert!(line("web1").contains("no answer") && line("web2").contains("running"), "{listed}");
    let refused = site.longhaul(&["vm", "start", "web1"]).failure(1);
    assert!(refused.contains("is just being"), "{refused}");
    site.signal("web1", Signal::SIGCONT);
    stopping.join().unwrap().success();
    looking.join().unwrap();
    site.longhaul(&["vm", "start", "web1"]).success();
    drop(gateway);
}

#[test]
fn a_qemu_that_hung_while_its_gateway_started_is_not_gone_and_is_taken_up_when_it_answers() {
    let Some(site) = Site::new() else { return };
    let gateway = site.serve();
    site.define("web1");
    site.longhaul(&["vm", "start", "web1"]).success();
    drop(gateway);
    site.longhaul(&["may-run", "web1"]).failure(3);
    site.signal("web1", Signal::SIGSTOP);
    let gateway = site.serve();
    let line = || {
        let listed = site.longhaul(&["vm", "list"]).success();
        listed.lines().find(|line| line.contains("web1")).unwrap_or_default().to_owned()
    };
    assert!(line().contains("no answer"), "{}", line());
    let doctor = site.longhaul(&["doctor"]).output();
    assert!(doctor.contains("is there and does not answer"), "{doctor}");
    // What cannot be asked is not said to be stopped, and nothing is taken from it.
    site.longhaul(&["vm", "stop", "web1"]).failure(1);
    let refused = site.longhaul(&["vm", "undefine", "web1"]).failure(1);
    assert!(refused.contains("does not answer"), "{refused}");
    site.signal("web1", Signal::SIGCONT);
    let began = Instant::now();
    while !line().contains("running") {
        assert!(began.elapsed() < LIMIT, "{}", line());
        std::thread::sleep(Duration::from_millis(100));
    }
    site.longhaul(&["may-run", "web1"]).success();
    site.longhaul(&["vm", "stop", "web1"]).success();
    site.longhaul(&["vm", "undefine", "web1"]).success();
    site.longhaul(&["may-run", "web1"]).failure(1);
    drop(gateway);
}

#[test]
fn a_configuration_that_this_host_contradicts_is_refused_before_anything_is_made() {
    let Some(site) = Site::new() else { return };
    let right = site.configuration();
    let folder = site.path("").display().to_string();
    std::fs::write(site.path("open-key"), "x").unwrap();
    for (was, is, line, key) in [
        ("/key\"", "/no-key\"", 3, "site.key_file"),
        ("/pool\"", "/no-pool\"", 7, "storage.pool"),
        ("[hypervisor]\n", "[hypervisor]\nuefi_code = \"/no-code\"\n", 9, "hypervisor.uefi_code"),
        ("[hypervisor]\n", "[kernel.k]\nimage = \"/no-kernel\"\n[hypervisor]\n", 9, "kernel.k.image"),
        ("[hypervisor]\n", "[link]\nlisten = \"192.0.2.77:4789\"\n[hypervisor]\n", 9, "link.listen"),
        ("[hypervisor]\n", "[link]\nrate_mbit = 18446744073709551615\n[hypervisor]\n", 9, "link.rate_mbit"),
        ("[hypervisor]\n", "[tunnel]\ndevice = \"lh 0\"\n[hypervisor]\n", 9, "tunnel.device"),
        (
            "[hypervisor]\n",
            "[dns]\nservers = [\"192.0.2.53:53\"]\nzone = \"example.net.\"\nkey_file = \"/no-key\"\n[hypervisor]\n",
            11,
            "dns.key_file",
        ),
    ] {
        std::fs::write(site.config(), right.replace(was, is)).unwrap();
        let said = site.serve_in_vain().failure(2);
        let expected = format!("longhaul: {folder}site.toml:{line}: {key}: ");
        assert!(said.starts_with(&expected), "{is}: {said}");
        assert!(!site.path("state").exists() && !site.path("run").exists(), "{is}: something was made");
    }
}

#[test]
fn a_gateway_whose_socket_cannot_be_bound_does_not_begin() {
    let Some(site) = Site::new() else { return };
    let api = format!("[storage]\npool = \"{}\"", site.path("pool").display());
    let taken = site.path("taken");
    std::fs::create_dir(&taken).unwrap();
    for socket in [taken, site.path("none/api.sock")] {
        let key = format!("api_socket = \"{}\"\n{api}", socket.display());
        std::fs::write(site.config(), site.configuration().replace(&api, &key)).unwrap();
        let said = site.serve_in_vain().failure(1);
        assert!(said.contains("Cannot listen at") && !said.contains("is ready"), "{said}");
    }
    std::fs::write(site.config(), site.configuration()).unwrap();
    drop(site.serve());
    // What a killed gateway left is replaced.
    assert!(site.path("run/api.sock").exists());
    drop(site.serve());
}

#[test]
fn a_definition_that_could_not_start_is_refused() {
    let Some(site) = Site::new() else { return };
    let _gateway = site.serve();
    site.define("web1");
    let (definition, image) = (site.path("web2.toml"), site.path("web2.raw"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let refused = |text: String, image: &std::path::Path, code: i32| {
        std::fs::write(&definition, text).unwrap();
        site.define_as(&definition, image).failure(code)
    };
    let right = definition_of("web2");
    let said = refused(right.replace("vcpus = 1", "vcpus = 0"), &image, 2);
    assert!(said.starts_with(&format!("longhaul: {}:3: ", definition.display())), "{said}");
    let nic = "[[nics]]\nname = \"lan\"\nmac = \"52:54:00:00:00:01\"\nhome = [\"198.51.100.10/24\"]\nlan = \"no\"\npci = \"04.0\"\n";
    for (text, image, expected) in [
        (right.clone(), site.path("pool"), "neither a file"),
        (right.replace("1048576", "2097152"), image.clone(), "has 1048576 bytes"),
        (format!("cpu = \"no-such-cpu\"\n{right}"), image.clone(), "no-such-cpu"),
        (format!("{right}{nic}"), image.clone(), "[lan.no]"),
    ] {
        let said = refused(text, &image, 2);
        assert!(said.contains(expected), "{said}");
    }
    let said = refused(right.clone(), &site.path("web1.raw"), 1);
    assert!(said.contains("is a disk of machine web1"), "{said}");
    std::fs::write(&definition, right).unwrap();
    site.define_as(&definition, &image).success();
}

#[test]
fn a_gateway_that_has_lost_its_tunnels_device_ends_with_an_error() {
    let Some(site) = Site::new() else { return };
    let mut gateway = site.serve();
    gateway.remove_device("lh0");
    assert_eq!(gateway.ended().code(), Some(1));
}
