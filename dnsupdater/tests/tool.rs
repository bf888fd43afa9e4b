//! The `dnsupdater` tool from outside: what it prints, its exit codes, and that it keeps the secret.

mod support;

use std::path::PathBuf;
use std::process::Stdio;

use serde_json::Value;
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

    /// Runs it with server, zone and key in place.
    async fn run(&self, arguments: &[&str]) -> Ran {
        let server = self.world.address.to_string();
        let key_file = self.key_file();
        let mut command = bare();
        command.args(["--server", &server, "--zone", "vm.example", "--timeout", "2", "--retries", "0"]);
        command.arg("--key-file").arg(key_file).args(arguments);
        finish(command).await
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
