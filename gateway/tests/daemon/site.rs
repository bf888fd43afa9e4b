//! A site of a test: its configuration, its gateway as a process, and the command line that asks it.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LONGHAUL: &str = env!("CARGO_BIN_EXE_longhaul");
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Site {
    folder: tempfile::TempDir,
}

impl Site {
    /// A site with a key and a configuration; `None`, with the reason printed, where none can run.
    pub fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: only root can make a network namespace");
            return None;
        }
        for program in ["qemu-system-x86_64", "nft"] {
            if Command::new(program).arg("--version").output().is_err() {
                println!("skipped: there is no {program}");
                return None;
            }
        }
        let site = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(site.path("pool")).unwrap();
        let key = site.path("key");
        assert!(Command::new(LONGHAUL).args(["key", "--file"]).arg(&key).output().unwrap().status.success());
        fs::write(site.config(), site.configuration()).unwrap();
        Some(site)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn config(&self) -> PathBuf {
        self.path("site.toml")
    }

    /// The configuration that is right.
    pub fn configuration(&self) -> String {
        let folder = self.folder.path().display();
        format!(
            "[site]\nname = \"a\"\nkey_file = \"{folder}/key\"\nstate_dir = \"{folder}/state\"\n\
             run_dir = \"{folder}/run\"\n[storage]\npool = \"{folder}/pool\"\n[hypervisor]\naccel = \"tcg\"\n\
             [lan.servers]\nbridge = \"br0\"\n"
        )
    }

    /// `longhaul serve` in a namespace with nothing but its loopback: without any address the kernel lets a
    /// socket be bound to every one.
    fn command(&self) -> Command {
        let mut command = Command::new("unshare");
        command.args(["-n", "sh", "-c", "ip link set lo up && exec \"$0\" serve --config \"$1\"", LONGHAUL]);
        command.arg(self.config()).stdin(Stdio::null());
        command
    }

    /// The gateway, once it answers.
    pub fn serve(&self) -> Gateway {
        let mut gateway = Gateway(self.command().spawn().unwrap());
        let began = Instant::now();
        while !self.longhaul(&["status"]).0.status.success() {
            assert!(gateway.0.try_wait().unwrap().is_none(), "the gateway ended");
            assert!(began.elapsed() < LIMIT, "the gateway does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        gateway
    }

    /// What a gateway that does not begin says.
    pub fn serve_in_vain(&self) -> Said {
        let mut gateway = Gateway(self.command().stderr(Stdio::piped()).spawn().unwrap());
        let began = Instant::now();
        while gateway.0.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < LIMIT, "the gateway runs on");
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut stderr = Vec::new();
        std::io::Read::read_to_end(&mut gateway.0.stderr.take().unwrap(), &mut stderr).unwrap();
        Said(Output { status: gateway.0.wait().unwrap(), stdout: Vec::new(), stderr })
    }

    /// Defines a machine without a network, with an empty disk.
    pub fn define(&self, vm: &str) {
        let image = self.path(&format!("{vm}.raw"));
        fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let definition = self.path(&format!("{vm}.toml"));
        fs::write(&definition, definition_of(vm)).unwrap();
        self.define_as(&definition, &image).success();
    }

    pub fn define_as(&self, definition: &std::path::Path, image: &std::path::Path) -> Said {
        let (definition, image) = (definition.display().to_string(), image.display().to_string());
        self.longhaul(&["vm", "define", &definition, "--disk", &image])
    }

    /// Asks the gateway.
    pub fn longhaul(&self, arguments: &[&str]) -> Said {
        ask(&self.path("run/api.sock"), arguments)
    }

    /// The same, without waiting for the answer.
    pub fn begin(&self, arguments: &[&str]) -> JoinHandle<Said> {
        let socket = self.path("run/api.sock");
        let arguments: Vec<String> = arguments.iter().map(|&it| it.to_owned()).collect();
        std::thread::spawn(move || ask(&socket, &arguments.iter().map(String::as_str).collect::<Vec<_>>()))
    }

    /// Sends a signal to a machine's QEMU.
    pub fn signal(&self, vm: &str, signal: Signal) {
        kill(self.qemu(vm).unwrap(), signal).unwrap();
    }

    fn qemu(&self, vm: &str) -> Option<Pid> {
        let text = fs::read_to_string(self.path(&format!("run/vm/{vm}/pid"))).ok()?;
        let pid = text.trim().parse().ok()?;
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let ours = self.folder.path().to_str().unwrap();
        String::from_utf8_lossy(&arguments).contains(ours).then(|| Pid::from_raw(pid))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.path("run/vm")).into_iter().flatten().flatten() {
            if let Some(pid) = entry.file_name().to_str().and_then(|vm| self.qemu(vm)) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        }
    }
}

/// A machine called `vm` with one disk of 1 MiB.
pub fn definition_of(vm: &str) -> String {
    format!(
        "name = \"{vm}\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 32\n\
         [[disks]]\nname = \"root\"\nsize_bytes = 1048576\npci = \"03.0\"\n"
    )
}

fn ask(socket: &std::path::Path, arguments: &[&str]) -> Said {
    Said(Command::new(LONGHAUL).arg("--socket").arg(socket).args(arguments).output().unwrap())
}

/// What a command has said.
pub struct Said(Output);

impl Said {
    #[track_caller]
    pub fn success(&self) -> String {
        assert!(self.0.status.success(), "{}", self.errors());
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    #[track_caller]
    pub fn failure(&self, code: i32) -> String {
        assert_eq!(self.0.status.code(), Some(code), "{}", self.errors());
        self.errors()
    }

    /// What it printed, however it ended.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    fn errors(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }
}

/// A gateway that runs until it is dropped.
pub struct Gateway(Child);

impl Gateway {
    /// Takes a device away from it.
    pub fn remove_device(&self, name: &str) {
        let namespace = format!("--net=/proc/{}/ns/net", self.0.id());
        let removed = Command::new("nsenter").args([&namespace, "ip", "link", "del", name]).status().unwrap();
        assert!(removed.success());
    }

    /// How it ended by itself.
    pub fn ended(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < LIMIT, "the gateway runs on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
