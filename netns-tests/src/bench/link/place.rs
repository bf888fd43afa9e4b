//! Two hosts and the emulated path between them, and the processes that send over it.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gateway::identity::Identity;

use super::cell::Cell;
use super::end::Plan;
use super::sender::Sender;
use crate::cleanup::Lab;
use crate::netns::Namespace;
use crate::wan::{Emulator, PacketClass, PacketMatch, Wan, WanEnd, WanSpec};

const A: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);
const B: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 2);
const DEVICE: &str = "path0";
const PORT: u16 = 4789;

/// How many senders may share the path.
pub(super) const MAX_FLOWS: u16 = 2;

/// How long a sender may take until something arrives.
const PATIENCE: Duration = Duration::from_secs(15);

/// The hosts and the path; dropping it removes them.
#[derive(Debug)]
pub(super) struct Place {
    // Ends before its namespaces are removed.
    pub wan: Wan,
    a: Namespace,
    b: Namespace,
    lab: Lab,
}

/// A transfer under way; dropping it ends both its processes.
#[derive(Debug)]
pub(super) struct Flow {
    processes: Vec<Child>,
    /// When which total was reported.
    reports: Arc<Mutex<Vec<(Instant, u64)>>>,
}

impl Place {
    /// Builds it for a cell.
    pub fn build(cell: &Cell) -> Result<Self> {
        let lab = Lab::start()?;
        let (a, b) = (lab.namespace("a")?, lab.namespace("b")?);
        let end = |namespace: &Namespace| WanEnd { namespace: namespace.clone(), device: DEVICE.to_owned() };
        let class = |flow: u16| {
            let (tcp, udp) =
                (PacketMatch { protocol: Some(6), ..port(flow) }, PacketMatch::udp_port(PORT + flow));
            PacketClass { name: class_name(flow), any_of: vec![tcp, udp] }
        };
        let wan = Wan::build(WanSpec {
            near: end(&a),
            far: end(&b),
            profile: cell.profile(),
            classes: (0..MAX_FLOWS).map(class).collect(),
            emulator: Emulator::Userspace,
        })?;
        for (namespace, address) in [(&a, A), (&b, B)] {
            for (key, value) in [
                ("net.ipv4.tcp_rmem", "4096 131072 268435456"),
                ("net.ipv4.tcp_wmem", "4096 131072 268435456"),
            ] {
                namespace.sysctl(key, value)?;
            }
            namespace.ip(&[format!("addr add {address}/24 dev {DEVICE}")])?;
        }
        Ok(Self { wan, a, b, lab })
    }

    /// Starts a transfer from a to b, and waits until something arrives.
    pub fn start(&self, cell: &Cell, sender: Sender, flow: u16) -> Result<Flow> {
        let keys = [Identity::generate()?, Identity::generate()?];
        let address = |host: Ipv4Addr| SocketAddr::from((host, PORT + flow));
        let mut processes = Vec::new();
        let mut output = None;
        // The receiver first: TCP is not dialled twice.
        for (index, namespace, own, other) in [(1, &self.b, B, A), (0, &self.a, A, B)] {
            let key_file = self.lab.scratch().join(format!("{flow}-{index}.key"));
            keys[index].save(&key_file)?;
            let plan = Plan {
                sender,
                sends: index == 0,
                listen: address(own),
                remote: address(other),
                rate_mbit: cell.rate_mbit,
                rtt_ms: cell.rtt_ms,
                key_file,
                peer_key: keys[1 - index].public_key().to_string(),
            };
            let file = self.lab.scratch().join(format!("{flow}-{index}.json"));
            std::fs::write(&file, serde_json::to_vec(&plan)?)?;
            let log = std::fs::File::create(self.lab.scratch().join(format!("{flow}-{index}.log")))?;
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("bench-link-end").arg(file).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
            let mut child = namespace.spawn(&mut command)?;
            output = output.or(child.stdout.take());
            processes.push(child);
            if index == 1 {
                std::thread::sleep(Duration::from_millis(300)); // until it listens; TCP refuses else
            }
        }
        let reports = Arc::new(Mutex::new(Vec::new()));
        let flow = Flow { processes, reports: reports.clone() };
        let output = output.context("The receiver has no output")?;
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let Ok(bytes) = line.parse() else { return };
                reports.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), bytes));
            }
        });
        flow.wait_until_something_arrives()?;
        Ok(flow)
    }

    /// Removes everything; fails if something is left.
    pub fn close(self) -> Result<()> {
        drop(self.wan);
        let left = self.lab.close();
        if left.is_empty() { Ok(()) } else { bail!("The benchmark leaves behind: {}", left.join(", ")) }
    }
}

impl Flow {
    /// Mbit/s of payload that arrived between two moments.
    pub fn goodput_mbit(&self, from: Instant, to: Instant) -> Result<f64> {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let within = |(at, _): &&(Instant, u64)| *at >= from && *at <= to;
        let (first, last) = (reports.iter().find(within), reports.iter().rev().find(within));
        let (Some((began, first)), Some((ended, last))) = (first, last) else {
            bail!("The receiver is gone");
        };
        if reports.last().is_none_or(|(at, _)| at.elapsed() > Duration::from_secs(1)) {
            bail!("The transfer died");
        }
        Ok((last - first) as f64 * 8.0 / 1e6 / (*ended - *began).as_secs_f64().max(0.1))
    }

    fn wait_until_something_arrives(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
            if reports.last().is_some_and(|(_, bytes)| *bytes > 0) {
                return Ok(());
            }
            drop(reports);
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("Nothing arrives")
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // One that has ended cannot be ended.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// What the emulator calls the packets of a flow.
pub(super) fn class_name(flow: u16) -> String {
    format!("flow{flow}")
}

fn port(flow: u16) -> PacketMatch {
    PacketMatch { port: Some(PORT + flow), ..PacketMatch::default() }
}
