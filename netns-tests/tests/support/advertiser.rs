//! The router of a home LAN that says so itself (RFC 4861): a guest has its IPv6 default route from there, for as long as
//! that was said to hold. It advertises no prefix, and answers no solicitation but by speaking often.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use netns_tests::netns::Namespace;
use netns_tests::scenario::scene::Scene;
use socket2::{Domain, Protocol, Socket, Type};

use super::scenes::wait;

/// The router's interface to its LAN.
const LAN: &str = "lan";
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const EVERY: Duration = Duration::from_secs(2);

/// The router at work.
pub struct Advertiser {
    quit: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Advertiser {
    /// Advertises itself in `router`'s LAN.
    pub fn start(router: &Namespace, lifetime: Duration) -> Self {
        let link = router.output("ip", &["-o", "link", "show", LAN]).unwrap();
        let address = link.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        let message = advertisement(address, lifetime);
        let (socket, device) = router
            .run(|| {
                let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
                // Others are taken for forged.
                socket.set_multicast_hops_v6(255).unwrap();
                (socket, nix::net::if_::if_nametoindex(LAN).unwrap())
            })
            .unwrap();
        let (quit, quitting) = channel::<()>();
        let thread = std::thread::spawn(move || {
            let to = SocketAddrV6::new(ALL_NODES, 0, 0, device).into();
            while quitting.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                // A LAN without a station takes nothing; the next one comes soon.
                drop(socket.send_to(&message, &to));
            }
        });
        Self { quit: Some(quit), thread: Some(thread) }
    }

    /// Waits until the guest has its default route: it answers a client that is not in its LAN.
    pub async fn heard_by_the_guest(&self, scene: &Scene) {
        let home = scene.home6().unwrap().to_string();
        let answers = || scene.world.client.output("ping", &["-n", "-c", "1", "-W", "1", &home]).ok();
        wait("a guest that has heard its router", Duration::from_secs(30), answers).await;
    }
}

impl Drop for Advertiser {
    fn drop(&mut self) {
        drop(self.quit.take());
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// Its lifetime as a router, and its link-layer address. The kernel makes the checksum.
fn advertisement(link_layer: &str, lifetime: Duration) -> Vec<u8> {
    let mut message = vec![134, 0, 0, 0, 64, 0];
    message.extend((lifetime.as_secs() as u16).to_be_bytes());
    message.extend([0; 8]);
    message.extend([1, 1]);
    message.extend(link_layer.split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()));
    message
}
