//! The task of routers: hears the advertisements of this host's LANs, and imitates those of a visitor's home on its port.
//!
//! One ICMPv6 socket takes advertisements and solicitations of all devices; it is opened once, as it needs CAP_NET_RAW.
//! A port on which a router is imitated is a visitor's: what the visitor itself advertises is not believed. What is
//! remembered, and when something is sent, is decided in [`longhaul_core::tunnel::routers`].

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::mem::size_of;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use longhaul_core::tunnel::advertisement::{ADVERTISEMENT, Received, SOLICITATION, is_solicitation};
use longhaul_core::tunnel::handover::{Mac, Neighbour};
use longhaul_core::tunnel::policy::PortKey;
use longhaul_core::tunnel::routers::{Advertiser, Imitation, Routers};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, info};

use super::announce::{ALL_NODES, FrameSocket};
use super::error::TunnelError;

/// How long routers of a LAN are waited for that were asked to advertise themselves. They may take half a second to
/// answer (RFC 4861, 6.2.6).
const SOLICITED_WAIT: Duration = Duration::from_secs(1);
/// An Ethernet frame's worth, twice; what is longer is cut and then refused.
const MESSAGE_BYTES: usize = 3000;

/// What the task is asked for.
pub(super) enum Command {
    /// Which routers were heard on a device.
    Heard { device: u32, reply: oneshot::Sender<Vec<Advertiser>> },
    /// Ask for the routers of a device, if none is known; answered when one is, or after a second.
    Solicit { device: u32, reply: oneshot::Sender<()> },
    /// Imitate the routers among `neighbours` on a visitor's port.
    Imitate { key: PortKey, device: u32, neighbours: Vec<Neighbour> },
    /// The visit is over.
    End { key: PortKey },
}

/// A visitor's port on which routers are imitated.
struct Port {
    device: u32,
    imitation: Imitation,
    /// The link-layer address that each packet comes from.
    packets: Vec<(Mac, Vec<u8>)>,
}

struct Waiting {
    device: u32,
    until: Duration,
    reply: oneshot::Sender<()>,
}

impl Waiting {
    /// Whoever asked may have gone.
    fn end(self) {
        let _ = self.reply.send(());
    }
}

/// The task's state.
pub(super) struct RouterTask {
    socket: Option<AsyncFd<Socket>>,
    frames: Arc<FrameSocket>,
    /// The longest time between two imitated advertisements.
    at_most: Duration,
    began: Instant,
    routers: Routers,
    ports: BTreeMap<PortKey, Port>,
    waiting: Vec<Waiting>,
}

impl RouterTask {
    /// Opens the socket. A kernel without IPv6 has no routers to be heard.
    pub(super) fn open(frames: Arc<FrameSocket>, at_most: Duration) -> Result<Self, TunnelError> {
        let socket = match open_socket() {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            opened => Some(opened.map_err(TunnelError::io("open an ICMPv6 socket"))?),
        };
        let began = Instant::now();
        let (ports, waiting) = (BTreeMap::new(), Vec::new());
        Ok(Self { socket, frames, at_most, began, routers: Routers::default(), ports, waiting })
    }

    /// Until nobody is left to ask for anything.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let due = self.due();
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.handle(command),
                    None => return,
                },
                read = readable(self.socket.as_ref()) => match read {
                    Ok(()) => self.hear(),
                    Err(error) => {
                        debug!(%error, "routers are not heard any more");
                        self.socket = None;
                    }
                },
                () = tokio::time::sleep_until(due) => {}
            }
            self.handle_timeout();
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Heard { device, reply } => drop(reply.send(self.routers.on(self.now(), device))),
            Command::Solicit { device, reply } => self.solicit(device, reply),
            Command::Imitate { key, device, neighbours } => self.imitate(key, device, &neighbours),
            Command::End { key } => drop(self.ports.remove(&key)),
        }
    }

    fn solicit(&mut self, device: u32, reply: oneshot::Sender<()>) {
        let now = self.now();
        let asked = self.routers.on(now, device).is_empty() && self.ask(device);
        if asked {
            self.waiting.push(Waiting { device, until: now + SOLICITED_WAIT, reply });
        } else {
            let _ = reply.send(());
        }
    }

    /// Sends a solicitation (RFC 4861, 4.1); the kernel makes its checksum.
    fn ask(&self, device: u32) -> bool {
        const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
        let Some(socket) = &self.socket else { return false };
        let to = SockAddr::from(SocketAddrV6::new(ALL_ROUTERS, 0, 0, device));
        let sent = socket.get_ref().send_to(&[SOLICITATION, 0, 0, 0, 0, 0, 0, 0], &to);
        if let Err(error) = &sent {
            debug!(device, %error, "routers were not asked for");
        }
        sent.is_ok()
    }

    fn imitate(&mut self, key: PortKey, device: u32, neighbours: &[Neighbour]) {
        let advertisers = || neighbours.iter().filter_map(|it| Some((it.mac, it.advertises()?)));
        let packets: Vec<_> =
            advertisers().map(|(mac, (source, said))| (mac, said.packet(source, mac))).collect();
        if packets.is_empty() {
            self.ports.remove(&key);
            return;
        }
        let shortest = advertisers().filter_map(|(_, (_, said))| said.shortest_lifetime()).min();
        info!(port = %key, routers = packets.len(), "imitating the routers of its home");
        let imitation = Imitation::begin(self.now(), self.at_most, shortest);
        self.ports.insert(key, Port { device, imitation, packets });
    }

    /// Takes all that has arrived.
    fn hear(&mut self) {
        let Some(socket) = &self.socket else { return };
        let mut buffer = [0; MESSAGE_BYTES];
        let mut heard = Vec::new();
        // Bounded, so that a flood does not keep the task from what is due.
        for _ in 0..64 {
            match socket.try_io(Interest::READABLE, |socket| receive(socket, &mut buffer)) {
                Ok(Some((device, source, hop_limit, len))) => {
                    heard.push((device, source, hop_limit, buffer[..len].to_vec()));
                }
                Ok(None) => {}
                Err(_would_block) => break,
            }
        }
        for (device, source, hop_limit, message) in heard {
            self.handle_message(&Received { device, source, hop_limit, message: &message });
        }
    }

    fn handle_message(&mut self, received: &Received<'_>) {
        let now = self.now();
        let visitor = self.ports.values_mut().find(|port| port.device == received.device);
        if let Some(port) = visitor {
            if is_solicitation(received) {
                port.imitation.handle_solicitation(now);
            }
            return;
        }
        if received.message.first() != Some(&ADVERTISEMENT) {
            return;
        }
        match self.routers.handle_advertisement(now, received) {
            Ok(()) => {
                let here = |waiting: &mut Waiting| waiting.device == received.device;
                self.waiting.extract_if(.., here).for_each(Waiting::end);
            }
            Err(error) => debug!(device = received.device, source = %received.source, %error, "not heard"),
        }
    }

    fn handle_timeout(&mut self) {
        let now = self.now();
        let over = |waiting: &mut Waiting| waiting.until <= now;
        self.waiting.extract_if(.., over).for_each(Waiting::end);
        for (key, port) in &mut self.ports {
            if !port.imitation.poll(now) {
                continue;
            }
            for (mac, packet) in &port.packets {
                if let Err(error) = self.frames.deliver(port.device, ALL_NODES, *mac, packet) {
                    debug!(port = %key, %error, "router advertisement not sent");
                }
            }
        }
    }

    fn due(&self) -> Instant {
        let waits = self.waiting.iter().map(|waiting| waiting.until);
        let due = waits.chain(self.ports.values().map(|port| port.imitation.due())).min();
        self.began + due.unwrap_or_else(|| self.now() + Duration::from_secs(3600))
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }
}

/// Waits until something has arrived; for ever without a socket. Cancel safe.
pub(super) async fn readable(socket: Option<&AsyncFd<Socket>>) -> io::Result<()> {
    match socket {
        Some(socket) => {
            socket.readable().await?.retain_ready();
            Ok(())
        }
        None => std::future::pending().await,
    }
}

fn open_socket() -> io::Result<AsyncFd<Socket>> {
    open_icmpv6(&[SOLICITATION, ADVERTISEMENT])
}

/// A socket that takes these types of message, of all devices.
pub(super) fn open_icmpv6(passed: &[u8]) -> io::Result<AsyncFd<Socket>> {
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    socket.set_nonblocking(true)?;
    let mut blocked = [u32::MAX; 8];
    for kind in passed {
        blocked[usize::from(kind / 32)] &= !(1 << (kind % 32));
    }
    filter(&socket, &blocked)?;
    setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true)?;
    socket.set_multicast_hops_v6(255)?;
    socket.set_multicast_loop_v6(false)?;
    register(socket)
}

#[allow(unsafe_code)]
pub(super) fn register(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    // SAFETY: a `Socket` gives the same descriptor every time it is asked, and closes it when it is dropped with the
    // `AsyncFd` that owns it.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(io::Error::from)
}

/// Sets which types of message do not reach the socket, one bit each (RFC 3542, 3.2; `linux/icmpv6.h`).
#[allow(unsafe_code)]
fn filter(socket: &Socket, blocked: &[u32; 8]) -> io::Result<()> {
    const ICMP6_FILTER: libc::c_int = 1;
    let len = size_of::<[u32; 8]>() as libc::socklen_t;
    // SAFETY: the option is `struct icmp6_filter`, which is these 32 bytes, and the kernel only reads them.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_ICMPV6, ICMP6_FILTER, blocked.as_ptr().cast(), len)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// One message: its device, source, hop limit and length; `None` if one of them is not told. An error: nothing more has
/// arrived.
pub(super) fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<Option<(u32, Ipv6Addr, u8, usize)>> {
    let mut control = nix::cmsg_space!(libc::in6_pktinfo, libc::c_int);
    let mut slices = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrIn6>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
    let (mut device, mut hop_limit) = (None, None);
    for told in message.cmsgs()? {
        if let ControlMessageOwned::Ipv6PacketInfo(info) = told {
            device = Some(info.ipi6_ifindex);
        } else if let ControlMessageOwned::Ipv6HopLimit(limit) = told {
            hop_limit = u8::try_from(limit).ok();
        }
    }
    let source = message.address.map(|address| address.ip());
    Ok(device
        .zip(source)
        .zip(hop_limit)
        .map(|((device, source), hop_limit)| (device, source, hop_limit, message.bytes)))
}
