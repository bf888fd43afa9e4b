//! The `dnsupdater` tool from outside: what it prints, its exit codes, and that it keeps the secret.

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use support::proxy::{Proxy, Verdict, is_update};
use support::*;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::process::Command;

const SECRET: &str = "dGhlIHNlY3JldCBvZiBzaXRlIGEsIDMyIGJ5dGVzISE=";

struct Tool {
    world: World,
    directory: TempDir,
}

struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Ran {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).expect("one JSON object")
    }
}

impl Tool {
    async fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let key = format!("key \"site-a\" {{\n\talgorithm hmac-sha256;\n\tsecret \"{SECRET}\";\n}};\n");
        std::fs::write(directory.path().join("site-a.key"), key).expect("writable");
        Self { world: World::hickory().await, directory }
    }

    fn key_file(&self) -> PathBuf {
        self.directory.path().join("site-a.key")
    }

    /// Runs it with server, zone, key and state in place.
    async fn run(&self, arguments: &[&str]) -> Ran {
        self.run_at(self.world.address, arguments).await
    }

    async fn run_at(&self, server: SocketAddr, arguments: &[&str]) -> Ran {
        let server = server.to_string();
        let mut command = self.with_state();
        command.args(["--server", &server, "--zone", "vm.example", "--timeout", "2", "--retries", "0"]);
        command.arg("--key-file").arg(self.key_file()).args(arguments);
        finish(command).await
    }

    fn with_state(&self) -> Command {
        let mut command = bare();
        command.env("XDG_STATE_HOME", self.directory.path());
        command
    }

    /// The address, time to live and epoch of `app`.
    async fn app(&self) -> (String, u64, u64) {
        let read = self.run(&["read", "app.vm.example", "--json"]).await.json();
        let register = read["records"]["register"]["held"].as_str().map(|held| held.to_owned());
        let epoch = register.and_then(|held| held.split("epoch=").nth(1)?.split(' ').next()?.parse().ok());
        let records = &read["records"];
        let address = records["addresses"][0].as_str().expect("an address").to_owned();
        (address, records["a_ttl_s"].as_u64().expect("a ttl"), epoch.unwrap_or(0))
    }

    async fn reverse_names(&self, address: &str, zone: &str) -> Vec<String> {
        let updater = self.world.updater(site_a());
        let found = updater.read_ptr(ips(&[address])[0], &name(zone)).await.expect("readable");
        found.names.iter().map(ToString::to_string).collect()
    }
}

fn bare() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dnsupdater"));
    command.env_clear().stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn finish(mut command: Command) -> Ran {
    let output = command.output().await.expect("the tool runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    let ran = Ran {
        code: output.status.code().expect("an exit code"),
        out: text(output.stdout),
        err: text(output.stderr),
    };
    for printed in [&ran.out, &ran.err] {
        assert!(!printed.contains(SECRET) && !printed.contains("the secret of"), "{printed}");
    }
    ran
}

#[tokio::test]
async fn a_swap_is_read_verified_lost_and_set_back() {
    let tool = Tool::new().await;
    let swap = ["swap", "app.vm.example", "--from", HOME, "--to", AWAY, "--owner", "site-b"];
    let ran = tool.run(&swap).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{}", ran.out);
    assert!(ran.out.contains("epoch 1, owner site-b"), "{}", ran.out);

    let read = tool.run(&["read", "app.vm.example", "--json"]).await;
    assert_eq!(read.code, 0);
    assert_eq!(read.json()["records"]["addresses"][0], AWAY);
    assert_eq!(read.json()["records"]["a_ttl_s"], 30);

    let lost = tool.run(&[swap.as_slice(), &["--json"]].concat()).await;
    assert_eq!((lost.code, lost.json()["outcome"].as_str()), (1, Some("lost")));

    let current = tool.run(&["verify", "app.vm.example", "--expect", AWAY]).await;
    assert_eq!(current.code, 0, "{}", current.out);
    let behind = tool.run(&["verify", "app.vm.example", "--expect", HOME, "--json"]).await;
    assert_eq!(behind.code, 1);
    assert_eq!(behind.json()["verification"]["servers"][0]["state"]["state"], "behind");

    let set = tool.run(&["set", "app.vm.example", HOME, "2001:db8::1", "--ttl", "120", "--json"]).await;
    assert_eq!((set.code, set.json()["epoch"].as_u64()), (0, Some(2)));
    let preflight = tool.run(&["preflight", "app.vm.example", "--to", AWAY]).await;
    assert_eq!(preflight.code, 0, "{}", preflight.err);
    assert!(preflight.out.contains("nothing changed"), "{}", preflight.out);
}

/// As an operator types it who knows nothing of the gateway: no zone, no owner.
#[tokio::test]
async fn a_swap_needs_a_server_a_key_and_two_addresses() {
    let tool = Tool::new().await;
    let server = tool.world.address.to_string();
    let mut command = tool.with_state();
    command.args(["swap", "app.vm.example.", "--from", HOME, "--to", AWAY, "--server", &server]);
    command.arg("--tsig-key-file").arg(tool.key_file());
    let ran = finish(command).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{}", ran.out);
    assert!(ran.out.contains("epoch 1, owner -"), "{}", ran.out);
    assert_eq!(tool.app().await, (AWAY.to_owned(), 30, 1));
    // The name's owner stays who it is.
    let set = tool.run(&["set", "dual.vm.example", AWAY, "--owner", "site-x"]).await;
    assert_eq!(set.code, 0, "{}", set.err);
    let swap = tool.run(&["swap", "dual.vm.example", "--from", AWAY, "--to", HOME]).await;
    assert!(swap.out.contains("epoch 2, owner site-x"), "{} {}", swap.out, swap.err);
}

#[tokio::test]
async fn a_key_file_is_taken_as_tsig_keygen_writes_it() {
    for hash in ["hmac-sha256", "hmac-sha512"] {
        let made = Command::new("tsig-keygen").args(["-a", hash, "gw-a"]).output().await;
        let Ok(made) = made else {
            println!("skipped: tsig-keygen is not installed (Debian package bind9)");
            return;
        };
        let text = String::from_utf8(made.stdout).expect("text");
        let key: dnsupdater::Key = text.parse().expect("as it was written");
        assert_eq!(key.name().to_string(), "gw-a.");
    }
}

#[tokio::test]
async fn a_lost_swap_says_the_code_and_the_difference() {
    let tool = Tool::new().await;
    let swap = ["swap", "app.vm.example", "--from", "192.0.2.77", "--to", AWAY];
    let lost = tool.run(&swap).await;
    assert_eq!(lost.code, 1);
    assert!(lost.out.contains("expected 192.0.2.77, it has 198.51.100.10"), "{}", lost.out);
    // Where the server decides: an epoch that was read before is given, the record is gone on since.
    assert_eq!(tool.run(&["swap", "app.vm.example", "--from", HOME, "--to", AWAY]).await.code, 0);
    let stale = tool.run(&["swap", "app.vm.example", "--from", AWAY, "--to", HOME, "--epoch", "0"]).await;
    assert!(stale.code == 1 && stale.out.contains("its ownership record is not"), "{}", stale.out);
    assert_eq!(
        tool.run(&["undo", "app.vm.example"]).await.code,
        0,
        "a lost swap does not hide the one before it"
    );
    assert_eq!(tool.app().await.0, HOME);
}

#[tokio::test]
async fn the_time_to_live_is_lowered_for_a_swap_and_restored_after_it() {
    let tool = Tool::new().await;
    let lowered = tool.run(&["lower-ttl", "app.vm.example", "--ttl", "20", "--json"]).await;
    assert_eq!((lowered.code, lowered.json()["from_s"].as_u64()), (0, Some(300)));
    assert_eq!(tool.run(&["swap", "app.vm.example", "--from", HOME, "--to", AWAY]).await.code, 0);
    assert_eq!(tool.app().await, (AWAY.to_owned(), 30, 1));
    let restored = tool.run(&["restore-ttl", "app.vm.example"]).await;
    assert!(restored.out.contains("has ttl 300 s now"), "{} {}", restored.out, restored.err);
    assert_eq!(tool.app().await, (AWAY.to_owned(), 300, 1));
    let again = tool.run(&["restore-ttl", "app.vm.example"]).await;
    assert!(again.code == 2 && again.err.contains("give --ttl"), "{}", again.err);
}

#[tokio::test]
async fn undo_takes_addresses_reverse_names_and_time_to_live_back() {
    let tool = Tool::new().await;
    let nothing = tool.run(&["undo", "app.vm.example"]).await;
    assert!(nothing.code == 2 && nothing.err.contains("No swap of app.vm.example."), "{}", nothing.err);
    let server = tool.world.address.to_string();
    let swap = ["swap", "app.vm.example", "--from", HOME, "--to", AWAY, "--ptr", "--ptr-server", &server];
    let zones = ["--ptr-zone", REVERSE_ZONE, "--ptr-zone", REVERSE_ZONE_AWAY];
    let swap = tool.run(&[swap.as_slice(), &zones].concat()).await;
    assert_eq!(swap.code, 0, "{} {}", swap.out, swap.err);
    assert!(swap.out.contains("203.0.113.10 has the reverse name app.vm.example. now"), "{}", swap.out);
    assert_eq!(tool.reverse_names(AWAY, REVERSE_ZONE_AWAY).await, ["app.vm.example."]);
    assert!(tool.reverse_names(HOME, REVERSE_ZONE).await.is_empty());
    for _ in 0..2 {
        let undo = tool.run(&["undo", "app.vm.example"]).await;
        assert_eq!(undo.code, 0, "{} {}", undo.out, undo.err);
        assert_eq!(tool.app().await, (HOME.to_owned(), 300, 0));
        assert_eq!(tool.reverse_names(AWAY, REVERSE_ZONE_AWAY).await, ["host-10.pool.example."]);
        assert_eq!(tool.reverse_names(HOME, REVERSE_ZONE).await, ["app.vm.example."]);
    }
    // What somebody has built on is not taken back.
    assert_eq!(tool.run(&["swap", "app.vm.example", "--from", HOME, "--to", AWAY]).await.code, 0);
    let other = Tool { world: World::hickory().await, directory: tempfile::tempdir().expect("a directory") };
    std::fs::copy(tool.key_file(), other.key_file()).expect("writable");
    let taken =
        other.run_at(tool.world.address, &["swap", "app.vm.example", "--from", AWAY, "--to", "192.0.2.8"]);
    assert_eq!(taken.await.code, 0);
    assert_eq!(tool.run(&["undo", "app.vm.example"]).await.code, 1);
    assert_eq!(tool.app().await.0, "192.0.2.8");
}

#[tokio::test]
async fn a_reverse_name_that_cannot_follow_leaves_the_name_changed_and_is_said() {
    let tool = Tool::new().await;
    // Found out before anything is changed.
    let alias = tool.run(&["swap", "app.vm.example", "--from", HOME, "--to", "203.0.113.11", "--ptr"]).await;
    assert!(alias.code == 2 && alias.err.contains("RFC 2317"), "{} {}", alias.code, alias.err);
    assert_eq!(tool.app().await.0, HOME);
    // The key of site b may not change reverse names.
    let key = tool.directory.path().join("site-b.key");
    std::fs::write(&key, "site-b:hmac-sha256:dGhlIHNlY3JldCBvZiBzaXRlIGIsIDMyIGJ5dGVzISE=")
        .expect("writable");
    let key = key.display().to_string();
    let swap =
        ["swap", "app.vm.example", "--from", HOME, "--to", AWAY, "--ptr", "--ptr-key-file", &key, "--json"];
    let ran = tool.run(&swap).await;
    assert_eq!((ran.code, ran.json()["outcome"].as_str()), (5, Some("won")), "{}", ran.out);
    assert!(ran.out.contains("NOT CHANGED") && ran.out.contains("REFUSED"), "{}", ran.out);
    assert_eq!(tool.app().await.0, AWAY);
}

/// The same command again after a lost answer is the same transaction: it is won, and applied once.
#[tokio::test]
async fn a_swap_whose_answer_was_lost_is_settled_by_the_same_command() {
    let tool = Tool::new().await;
    // From the first update on nothing comes back, until the way is free again.
    let (cut, free) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (rule_cut, rule_free) = (cut.clone(), free.clone());
    let mut proxy = Proxy::start(tool.world.address, move |request, reply| {
        rule_cut.fetch_or(is_update(request), Ordering::Relaxed);
        let lost = rule_cut.load(Ordering::Relaxed) && !rule_free.load(Ordering::Relaxed);
        if reply.is_some() && lost { Verdict::Drop } else { Verdict::Pass }
    })
    .await;
    let swap = ["swap", "app.vm.example", "--from", HOME, "--to", AWAY];
    let ran = tool.run_at(proxy.address, &swap).await;
    assert!(ran.code == 3 && ran.err.contains("repeat the same swap"), "{} {}", ran.code, ran.err);
    assert_eq!(tool.app().await, (AWAY.to_owned(), 30, 1), "it had arrived");
    let kept = tool.directory.path().join("dnsupdater/app.vm.example.json");
    let kept = std::fs::read_to_string(kept).expect("kept");
    assert!(kept.contains("\"unknown\"") && !kept.contains(SECRET), "{kept}");
    assert_eq!(proxy.updates().len(), 1);

    free.store(true, Ordering::Relaxed);
    let ran = tool.run_at(proxy.address, &swap).await;
    assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
    assert_eq!(tool.app().await, (AWAY.to_owned(), 30, 1), "once");
    let undo = tool.run_at(proxy.address, &["undo", "app.vm.example"]).await;
    assert_eq!((undo.code, tool.app().await.0.as_str()), (0, HOME), "{}", undo.err);
}

#[tokio::test]
async fn a_change_is_verified_at_every_name_server_of_the_zone() {
    let tool = Tool::new().await;
    let port = tool.world.address.port().to_string();
    let arguments =
        ["swap", "app.vm.example", "--from", HOME, "--to", AWAY, "--verify", "0", "--ns-port", &port];
    let ran = tool.run(&arguments).await;
    // The zone names servers that are not there: the swap is won, and they are told by name.
    assert_eq!(ran.code, 1, "{} {}", ran.out, ran.err);
    for part in ["has 203.0.113.10 now", "(ns1.vm.example.): current, serial 2", "(dead.vm.example.): SILENT"]
    {
        assert!(ran.out.contains(part), "{part}: {}", ran.out);
    }
    assert!(ran.out.contains("nowhere.invalid. was NOT ASKED"), "{}", ran.out);
}

#[tokio::test]
async fn wrong_usage_is_exit_code_2_and_says_what_is_missing() {
    let tool = Tool::new().await;
    for (arguments, says) in [
        (vec!["read", "not a name"], "not a domain name"),
        (vec!["swap", "app.vm.example", "--from", "x", "--to", AWAY, "--owner", "b"], "invalid IP address"),
        (vec!["read", "app.other.example"], "not in the configured zone"),
        (vec!["preflight", "alias.vm.example"], "CNAME"),
        (vec!["set", "app.vm.example", HOME, "--owner", "two words"], "not an ownership record"),
        (vec!["set", "app.vm.example", "0.0.0.0"], "no machine's address"),
        (vec!["--state-dir", "/dev/null/x", "set", "app.vm.example", HOME], "see --state-dir"),
    ] {
        let ran = tool.run(&arguments).await;
        assert!(ran.code == 2 && ran.err.contains(says), "{arguments:?}: {} {}", ran.code, ran.err);
    }
    let mut without_key = bare();
    without_key.args(["--server", "127.0.0.1", "--zone", "vm.example", "read", "app.vm.example"]);
    let ran = finish(without_key).await;
    assert!(ran.code == 2 && ran.err.contains("--key-file"), "{}", ran.err);
}

#[tokio::test]
async fn an_unreachable_server_is_exit_code_3_and_a_refusal_4() {
    let tool = Tool::new().await;
    let absent = {
        let gone = TcpListener::bind(loopback(0)).await.expect("bound");
        gone.local_addr().expect("bound").to_string()
    };
    let mut command = bare();
    command.env("DNSUPDATER_SERVERS", absent).env("DNSUPDATER_ZONE", "vm.example");
    command.env("DNSUPDATER_KEY_FILE", tool.key_file());
    command.args(["--retries", "0", "--json", "read", "app.vm.example"]);
    let ran = finish(command).await;
    assert_eq!((ran.code, ran.json()["kind"].as_str()), (3, Some("unreachable")));
    assert!(ran.err.contains("check its address, port and firewall"), "{}", ran.err);

    let mut command = bare();
    let server = tool.world.address.to_string();
    command.env("DNSUPDATER_KEY", format!("nobody:hmac-sha256:{SECRET}"));
    command.args(["--server", &server, "--zone", "vm.example", "read", "app.vm.example"]);
    let ran = finish(command).await;
    assert_eq!(ran.code, 4);
    assert!(ran.err.contains("BADKEY"), "{}", ran.err);
}
