//! The task that hears whether another host uses an address which is attracted here.
//!
//! Two sockets, opened once, as they need CAP_NET_RAW: one has every ARP packet that comes up to this host, of whatever
//! device, the other neighbour messages. What they mean is decided in [`longhaul_core::tunnel::duplicates`]; what is done
//! about it is the owner task's.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use longhaul_core::tunnel::duplicates::{
    Attracted, Claim, Duplicates, Finding, NEIGHBOUR_ADVERTISEMENT, NEIGHBOUR_SOLICITATION, Step,
};
use longhaul_core::tunnel::policy::PortKey;
use nix::sys::socket::{LinkAddr, MsgFlags, recvmsg};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::debug;

use super::announce::{ETHERTYPE_ARP, FrameSocket};
use super::error::TunnelError;
use super::routers::{open_icmpv6, readable, receive, register};

/// An Ethernet frame's worth; what is longer is cut, and no claim.
const MESSAGE_BYTES: usize = 1500;
/// Taken from one socket before the other gets its turn.
const BATCH: usize = 64;

/// What the task is told.
pub(super) enum Command {
    /// Addresses are attracted.
    Watch(Attracted),
    /// They are no longer.
    Forget { key: PortKey },
}

/// The task's state.
pub(super) struct DuplicateTask {
    arp: Option<AsyncFd<Socket>>,
    neighbours: Option<AsyncFd<Socket>>,
    frames: Arc<FrameSocket>,
    began: Instant,
    duplicates: Duplicates,
    findings: mpsc::Sender<Finding>,
    /// At most one for each address: the owner task may be busy.
    unsaid: VecDeque<Finding>,
}

impl DuplicateTask {
    /// Opens the sockets. A kernel without IPv6 has no neighbour messages.
    pub(super) fn open(
        frames: Arc<FrameSocket>,
        silent: Duration,
        findings: mpsc::Sender<Finding>,
    ) -> Result<Self, TunnelError> {
        let neighbours = match open_icmpv6(&[NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT]) {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            opened => Some(opened.map_err(TunnelError::io("open an ICMPv6 socket"))?),
        };
        let arp = Some(open_arp().map_err(TunnelError::io("open a socket for ARP"))?);
        let (duplicates, unsaid) = (Duplicates::new(silent), VecDeque::new());
        Ok(Self { arp, neighbours, frames, began: Instant::now(), duplicates, findings, unsaid })
    }

    /// Until nobody is left who attracts anything.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let findings = self.findings.clone();
        loop {
            let due = self.duplicates.due().map(|due| self.began + due);
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Watch(attracted)) => self.duplicates.watch(self.began.elapsed(), &attracted),
                    Some(Command::Forget { key }) => {
                        self.duplicates.forget(&key);
                        self.unsaid.retain(|finding| finding.key != key);
                    }
                    None => return,
                },
                read = readable(self.arp.as_ref()) => match read {
                    Ok(()) => self.hear_arp(),
                    Err(error) => {
                        debug!(%error, "ARP is not heard any more");
                        self.arp = None;
                    }
                },
                read = readable(self.neighbours.as_ref()) => match read {
                    Ok(()) => self.hear_neighbours(),
                    Err(error) => {
                        debug!(%error, "neighbours are not heard any more");
                        self.neighbours = None;
                    }
                },
                room = findings.reserve(), if !self.unsaid.is_empty() => match room {
                    Ok(room) => if let Some(finding) = self.unsaid.pop_front() {
                        room.send(finding);
                    },
                    Err(_) => return,
                },
                () = tokio::time::sleep_until(due.unwrap_or(self.began)), if due.is_some() => {}
            }
            self.take_steps();
        }
    }

    fn hear_arp(&mut self) {
        let mut buffer = [0; MESSAGE_BYTES];
        for _ in 0..BATCH {
            let Some(socket) = &self.arp else { return };
            match socket.try_io(Interest::READABLE, |socket| receive_arp(socket, &mut buffer)) {
                Ok(Some((device, len))) => self.handle_claim(device, Claim::of_arp(&buffer[..len])),
                Ok(None) => {}
                Err(_would_block) => return,
            }
        }
    }

    fn hear_neighbours(&mut self) {
        let mut buffer = [0; MESSAGE_BYTES];
        for _ in 0..BATCH {
            let Some(socket) = &self.neighbours else { return };
            match socket.try_io(Interest::READABLE, |socket| receive(socket, &mut buffer)) {
                Ok(Some((device, source, hop_limit, len))) => {
                    self.handle_claim(device, Claim::of_neighbour(source, hop_limit, &buffer[..len]));
                }
                Ok(None) => {}
                Err(_would_block) => return,
            }
        }
    }

    fn handle_claim(&mut self, device: u32, claim: Option<Claim>) {
        let Some(claim) = claim else { return };
        if let Some(finding) = self.duplicates.handle_claim(self.began.elapsed(), device, claim) {
            self.say(finding);
        }
    }

    fn take_steps(&mut self) {
        for step in self.duplicates.poll(self.began.elapsed()) {
            match step {
                Step::Probe { device, address, from } => {
                    if let Err(error) = self.frames.probe(device, from, address) {
                        debug!(%address, %error, "not asked who has it");
                    }
                }
                Step::Found(finding) => self.say(finding),
            }
        }
    }

    /// The newest counts.
    fn say(&mut self, finding: Finding) {
        self.unsaid.retain(|earlier| (&earlier.key, earlier.address) != (&finding.key, finding.address));
        self.unsaid.push_back(finding);
    }
}

fn open_arp() -> io::Result<AsyncFd<Socket>> {
    let protocol = Protocol::from(i32::from(ETHERTYPE_ARP.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
    socket.set_nonblocking(true)?;
    register(socket)
}

/// One ARP packet without its Ethernet header: its device and length. An error: nothing more has arrived.
fn receive_arp(socket: &Socket, buffer: &mut [u8]) -> io::Result<Option<(u32, usize)>> {
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut slices, None, MsgFlags::MSG_DONTWAIT)?;
    let device = message.address.and_then(|address| u32::try_from(address.ifindex()).ok());
    Ok(device.map(|device| (device, message.bytes)))
}
