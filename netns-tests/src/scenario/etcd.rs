//! The scene's etcd, where it arbitrates: one member, beside the name server, which both sites reach.
//!
//! Without TLS; what a certificate proves is tested where the gateway's client is.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dnsupdater::Ownership;
use gateway::config::EtcdConfig;
use gateway::etcd::Registers;

use crate::netns::Namespace;
use crate::topology::NAME_SERVER;

const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;

/// A running etcd.
pub struct Etcd {
    child: Child,
    namespace: Namespace,
    log: PathBuf,
}

impl Etcd {
    /// Starts an empty one in `namespace`, and waits until it answers.
    pub fn start(namespace: &Namespace, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let log = folder.join("etcd.log");
        let (clients, peer) = (Self::endpoint(), url(PEER_PORT));
        let mut command = Command::new("etcd");
        command
            .arg(format!("--data-dir={}", folder.join("data").display()))
            .arg(format!("--listen-client-urls={clients}"))
            .arg(format!("--advertise-client-urls={clients}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=default={peer}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?);
        let etcd = Self { child: namespace.spawn(&mut command)?, namespace: namespace.clone(), log };
        etcd.wait()?;
        Ok(etcd)
    }

    /// Where it answers.
    pub fn endpoint() -> String {
        url(CLIENT_PORT)
    }

    /// What the register of `vm` holds, asked from beside it.
    pub fn read(&self, vm: &str) -> Result<Option<Ownership>> {
        let vm = vm.parse()?;
        let registers = Registers::open(&EtcdConfig::new(vec![Self::endpoint().try_into()?]))?;
        self.namespace.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { Ok(registers.read(&vm).await?) })
        })?
    }

    fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match self.read("nobody") {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                    return Err(error).with_context(|| format!("etcd does not answer:\n{log}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // One that has ended needs no end, and the namespace takes the rest with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn url(port: u16) -> String {
    format!("http://{}", SocketAddr::new(NAME_SERVER.into(), port))
}
