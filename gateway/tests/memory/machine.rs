//! Real QEMU machines with a guest of 142 bytes that never stops dirtying its memory.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{sleep, timeout};

/// Enough for anything here on a busy machine; what takes longer has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const MEMORY_MIB: u64 = 128;

/// ```text
///         cli; ds = 0; lgdt; cr0.PE = 1; far jump         16 bits
///         ds = es = ss = flat; open A20; cld              32 bits from here
///         8 MiB from 2 MiB on: xorshift32 of 0x12345678   content that does not compress
/// sweep:  add 1 to the first dword of 2048 pages from 16 MiB on
///         add 1 to the dword at 0x7000; jmp sweep         how often it swept
/// ```
const BOOT_CODE: &str = "fa31c08ed80f0116887c0f20c00c010f22c0ea177c080066b810008ed88ec08ed0e4920c02e692fcbf\
00002000b900002000b87856341289c2c1e20d31d089c2c1ea1131d089c2c1e20531d0abe2e8bf00000001b900080000ff0781c7001000\
00e2f6ff0500700000ebe48d742600900000000000000000ffff0000009acf00ffff00000092cf001700707c0000";

/// A QEMU process and its monitor; ends with the value.
pub struct Machine {
    process: Child,
    lines: Lines<BufReader<OwnedReadHalf>>,
    commands: OwnedWriteHalf,
    events: Vec<Value>,
    dir: PathBuf,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Why the tests with real machines cannot run here.
pub fn unavailable() -> Option<String> {
    let found = Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status();
    found.err().map(|error| format!("qemu-system-x86_64: {error}"))
}

impl Machine {
    /// A running guest.
    pub async fn running(dir: &Path, name: &str) -> Self {
        let mut machine = Self::spawn(dir, name, &[]).await;
        let deadline = Instant::now() + PATIENCE;
        while machine.sweeps().await == 0 {
            assert!(Instant::now() < deadline, "the guest did not boot");
            sleep(Duration::from_millis(50)).await;
        }
        machine
    }

    /// A machine that waits for another's memory at `socket`.
    pub async fn waiting(dir: &Path, name: &str, socket: &Path) -> Self {
        let uri = format!("unix:{}", socket.display());
        Self::spawn(dir, name, &["-S", "-incoming", &uri]).await
    }

    async fn spawn(dir: &Path, name: &str, more: &[&str]) -> Self {
        let (disk, monitor) = (dir.join(format!("{name}.img")), dir.join(format!("{name}.qmp")));
        let mut sector = hex::decode(BOOT_CODE).expect("the code is hexadecimal");
        sector.resize(510, 0);
        sector.extend([0x55, 0xaa]);
        sector.resize(64 << 10, 0);
        std::fs::write(&disk, sector).expect("the disk is written");
        let process = Command::new("qemu-system-x86_64")
            .args(["-M", "pc-i440fx-7.2", "-accel", "tcg", "-nodefaults", "-display", "none"])
            .args(["-m", &MEMORY_MIB.to_string()])
            .args(["-drive", &format!("if=ide,format=raw,file={}", disk.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())])
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        let (read, commands) = connect(&monitor).await.into_split();
        let lines = BufReader::new(read).lines();
        let mut machine = Self { process, lines, commands, events: Vec::new(), dir: dir.to_owned() };
        machine.line().await;
        machine.execute("qmp_capabilities", json!({})).await;
        let capability = |name| json!({"capability": name, "state": true});
        let capabilities = [capability("events"), capability("pause-before-switchover")];
        machine.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).await;
        machine
    }

    async fn line(&mut self) -> Value {
        let line = timeout(PATIENCE, self.lines.next_line()).await.expect("QEMU answers in time");
        let line = line.expect("the monitor reads").expect("QEMU lives");
        serde_json::from_str(&line).expect("QMP is JSON")
    }

    /// Sends a command and returns what it returns.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let request = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.commands.write_all(request.as_bytes()).await.expect("the monitor is written");
        loop {
            let mut answer = self.line().await;
            if answer.get("event").is_some() {
                self.events.push(answer);
                continue;
            }
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            return answer["return"].take();
        }
    }

    /// Waits for a migration status to be announced.
    pub async fn migration_reaches(&mut self, status: &str) {
        let reached = |event: &Value| event["event"] == "MIGRATION" && event["data"]["status"] == status;
        while !self.events.iter().any(reached) {
            let event = self.line().await;
            self.events.push(event);
        }
    }

    /// Begins to migrate to a socket. QEMU never finds by itself that little enough is left: the guest
    /// dirties 8 MiB as fast as it can.
    pub async fn migrate(&mut self, socket: &Path) {
        self.migrate_to(format!("unix:{}", socket.display())).await;
    }

    pub async fn migrate_to(&mut self, uri: String) {
        self.execute("migrate-set-parameters", json!({"downtime-limit": 1, "max-bandwidth": 100_000_000}))
            .await;
        self.execute("migrate", json!({ "uri": uri })).await;
    }

    /// Stops the guest and takes QEMU through the switchover; how long the slowest answer took.
    pub async fn stop_and_finish(&mut self) -> Duration {
        let mut slowest = Duration::ZERO;
        let began = Instant::now();
        self.execute("stop", json!({})).await;
        slowest = slowest.max(began.elapsed());
        self.execute("migrate-set-parameters", json!({"max-bandwidth": 0})).await;
        self.migration_reaches("pre-switchover").await;
        let began = Instant::now();
        self.execute("migrate-continue", json!({"state": "pre-switchover"})).await;
        slowest = slowest.max(began.elapsed());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let began = Instant::now();
            let status = self.migration_status().await;
            slowest = slowest.max(began.elapsed());
            if status == "completed" {
                return slowest;
            }
            assert!(Instant::now() < deadline, "still {status}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn run_state(&mut self) -> String {
        self.execute("query-status", json!({})).await["status"].as_str().unwrap_or_default().to_owned()
    }

    pub async fn migration_status(&mut self) -> String {
        self.execute("query-migrate", json!({})).await["status"].as_str().unwrap_or_default().to_owned()
    }

    /// How often the guest has gone over its pages, modulo 2^32.
    pub async fn sweeps(&mut self) -> u32 {
        let told = self.execute("human-monitor-command", json!({"command-line": "xp /1wx 0x7000"})).await;
        let told =
            told.as_str().unwrap_or_default().trim().rsplit("0x").next().unwrap_or_default().to_owned();
        u32::from_str_radix(&told, 16).expect("a number in hexadecimal")
    }

    /// Waits until the guest has swept on: it runs.
    pub async fn runs_on(&mut self) {
        let (before, deadline) = (self.sweeps().await, Instant::now() + PATIENCE);
        while self.sweeps().await == before {
            assert!(Instant::now() < deadline, "the guest stands still");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// A digest of all of the machine's memory.
    pub async fn memory_digest(&mut self) -> blake3::Hash {
        let file = self.dir.join("memory");
        let arguments = json!({"val": 0, "size": MEMORY_MIB << 20, "filename": file});
        self.execute("pmemsave", arguments).await;
        let memory = std::fs::read(&file).expect("the memory was saved");
        assert_eq!(memory.len() as u64, MEMORY_MIB << 20);
        std::fs::remove_file(&file).expect("the file is there");
        blake3::hash(&memory)
    }
}

async fn connect(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", socket.display()),
        }
        sleep(Duration::from_millis(10)).await;
    }
}
