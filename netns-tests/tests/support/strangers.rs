//! Hosts in site b's LAN that have private addresses of the machine's home: its own, and its neighbour's. The host of site b
//! reaches them as it reaches everybody in its LAN; the machine never does.

use std::net::{IpAddr, SocketAddr};

use netns_tests::agent::RECORD_PORT;
use netns_tests::netns::Namespace;
use netns_tests::scenario::scene::{Scene, VM_NUMBER};
use netns_tests::scenario::traffic::Client;
use netns_tests::topology::BRIDGE;

use super::beside::records;
use super::elsewhere::Elsewhere;

/// The stranger's number in site b's LAN.
const STRANGER: u8 = 30;
/// Where the host has its addresses in the two networks.
const HOST_ADDRESSES: [u8; 2] = [9, 65];

/// The strangers at work, on one interface.
pub struct Strangers {
    lan: Namespace,
    /// At the machine's home address, and at its neighbour's.
    servers: [Elsewhere; 2],
}

impl Strangers {
    /// Two small networks of site a's, around the machine and around its neighbour, are site b's, too. Site a's gateway
    /// is in neither.
    pub fn settle(scene: &Scene, neighbour: u8) -> Self {
        let lan = scene.world.add_lan_host("b", "stranger", STRANGER).unwrap();
        let (home, host) = (&scene.world.site("a").unwrap().spec, &scene.world.site("b").unwrap().host);
        for ((number, at_host), prefix) in
            [VM_NUMBER, neighbour].into_iter().zip(HOST_ADDRESSES).zip([29, 28])
        {
            lan.ip(&[format!("addr add {}/{prefix} dev eth0", home.address(number))]).unwrap();
            host.ip(&[format!("addr add {}/{prefix} dev {BRIDGE}", home.address(at_host))]).unwrap();
        }
        let serve =
            |number| Elsewhere::serve(&lan, SocketAddr::new(home.address(number).into(), RECORD_PORT));
        let servers = [serve(VM_NUMBER), serve(neighbour)];
        Self { lan, servers }
    }

    /// Each calls the machine by its care-of address, as who it is here.
    pub async fn call(&self, care_of: IpAddr) -> Vec<(String, Client)> {
        let mut clients = Vec::new();
        for server in &self.servers {
            let own = server.address.ip();
            self.lan.ip(&[format!("route replace {care_of}/32 dev eth0 src {own}")]).unwrap();
            let plan = records(SocketAddr::new(care_of, RECORD_PORT), None);
            let client = Client::start(&self.lan, plan).await.unwrap();
            clients.push((format!("a stranger with {own} to {care_of}"), client));
        }
        clients
    }

    /// The host reaches them, and nobody else has come.
    pub async fn are_reached_from_the_host_alone(&self, scene: &Scene) {
        let (site, home) = (scene.world.site("b").unwrap(), &scene.world.site("a").unwrap().spec);
        for (server, at_host) in self.servers.iter().zip(HOST_ADDRESSES) {
            let client = Client::start(&site.host, records(server.address, None)).await.unwrap();
            assert!(client.finish().await.unwrap().record.unwrap().content_ok, "{}", server.address);
            assert_eq!(server.seen(), [IpAddr::from(home.address(at_host))]);
        }
    }
}
