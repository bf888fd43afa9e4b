//! `longhaul doctor`: finds what would make a migration fail before it is tried, and says the remedy.
//!
//! Looks, and changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use longhaul_core::ids::{Epoch, VmName};
use tokio::sync::oneshot;

use super::machines::held;
use super::status::is_crashed;
use super::unknown::unknown;
use super::{Daemon, Machine};
use crate::api::types::Finding;
use crate::config::{ArbiterChoice, PeerConfig};
use crate::migration::{Edges, chain, home_servers, journal_room, templates};

/// Servers that are named of one machine.
const MAX_SERVERS_SHOWN: usize = 4;

impl Daemon {
    /// Looks in a task of its own: QEMUs and name servers may take long to answer.
    pub(super) fn doctor(&self, vm: Option<VmName>, reply: oneshot::Sender<Vec<Finding>>) {
        let through_here = self.connections_through_here();
        let running = self.migrations.values().filter(|running| running.inbox.is_some());
        let notices = running.flat_map(|running| {
            let view = running.viewer.current();
            view.notices.into_iter().map(move |notice| (view.vm.clone(), notice))
        });
        let owed = |machine: &Machine| {
            let row = self.row(&machine.row.definition.name)?;
            Some((row.definition.name.clone(), self.owed_ttl_s(&row)?))
        };
        let doctor = Doctor {
            ttls_owed: self.machines.values().filter_map(owed).collect(),
            edges: self.edges.clone(),
            machines: self.machines.clone(),
            through_here,
            notices: notices.collect(),
        };
        tokio::spawn(async move {
            // An asker that went away needs no answer.
            drop(reply.send(doctor.look(vm).await));
        });
    }
}

/// What is looked at.
struct Doctor {
    edges: Edges,
    machines: BTreeMap<VmName, Machine>,
    through_here: Option<(u64, String)>,
    /// TTLs that moves which were undone could not restore, in seconds.
    ttls_owed: BTreeMap<VmName, u32>,
    /// What moves tell their operator.
    notices: Vec<(VmName, String)>,
}

impl Doctor {
    async fn look(&self, vm: Option<VmName>) -> Vec<Finding> {
        let mut findings = vec![self.hypervisor().await, self.journal(), self.pool()];
        findings.extend(self.templates());
        findings.extend(self.lans());
        findings.extend(self.peers());
        findings.extend(self.arbiters().await);
        findings.extend(self.reboot());
        findings.extend(self.unknown());
        findings.extend(self.notices.iter().map(|(vm, notice)| {
            bad(&format!("move of {vm}"), notice, "`longhaul status` shows it until that has ended")
        }));
        findings.extend(self.ttls_owed.iter().map(|(vm, ttl_s)| {
            let detail =
                format!("its TTL was lowered for a move that was undone, and is not {ttl_s} s again");
            bad(
                &format!("name of {vm}"),
                &detail,
                "check server and key; the gateway tries again every minute",
            )
        }));
        for machine in self.machines.values() {
            if vm.as_ref().is_none_or(|vm| machine.row.definition.name == *vm) {
                findings.extend(self.machine(machine).await);
            }
        }
        if let Some(vm) = vm
            && !self.machines.contains_key(&vm)
        {
            findings.push(bad(
                &format!("machine {vm}"),
                "this site does not have it",
                "`longhaul vm list` lists machines",
            ));
        }
        findings
    }

    async fn hypervisor(&self) -> Finding {
        match self.edges.hypervisor.capabilities().await {
            Ok(host) => {
                let accelerator = self.edges.hypervisor.accelerator().await.as_str();
                good("hypervisor", format!("QEMU {} with {accelerator}", host.qemu))
            }
            Err(error) => bad("hypervisor", &chain(&error), "install QEMU, or set hypervisor.qemu"),
        }
    }

    fn journal(&self) -> Finding {
        let site = &self.edges.config.site;
        let free = match journal_room::free(&site.state_dir) {
            Ok(free) => free,
            Err(error) => return bad("journal", &error, "check site.state_dir"),
        };
        match journal_room::check(&self.edges.config) {
            Ok(()) => good("journal", format!("{free} free in {}", site.state_dir.display())),
            Err(why) => bad("journal", &why.to_string(), "make room there; nothing moves until then"),
        }
    }

    fn pool(&self) -> Finding {
        let pool = &self.edges.config.storage.pool;
        match nix::sys::statvfs::statvfs(pool) {
            Ok(space) => {
                let free = longhaul_core::units::Bytes(space.blocks_available() * space.fragment_size());
                good("pool", format!("{free} free in {}", pool.display()))
            }
            Err(error) => {
                bad("pool", &format!("{}: {error}", pool.display()), "make the folder, or set storage.pool")
            }
        }
    }

    /// A template that cannot be used keeps no machine away, but costs what it was to save.
    fn templates(&self) -> Vec<Finding> {
        let looked = templates::look(&self.edges.config).into_iter();
        let remedy = "until that is put right, machines that are cloned from it are sent whole";
        looked
            .map(|(check, looked)| match looked {
                Ok(detail) => good(&check, detail),
                Err(error) => bad(&check, &chain(&error), remedy),
            })
            .collect()
    }

    fn lans(&self) -> Vec<Finding> {
        let config = &self.edges.config;
        config
            .lan
            .iter()
            .map(|(name, lan)| {
                let check = format!("lan.{name}");
                // Not sysfs: what is mounted there may show another network namespace.
                if nix::net::if_::if_nametoindex(lan.bridge.as_str()).is_err() {
                    let detail = format!("{} is no interface of this host", lan.bridge);
                    return bad(&check, &detail, "make the bridge and put the LAN's interface into it");
                }
                let addresses = lan.care_of_addresses().map_or(0, |addresses| addresses.len());
                good(&check, format!("bridge {}, {addresses} care-of addresses", lan.bridge))
            })
            .collect()
    }

    fn peers(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for peer in self.edges.link.peers() {
            let check = format!("peer {}", peer.name());
            findings.push(if peer.is_up() {
                good(&check, format!("up, round trip {:.1} ms", peer.stats().rtt.as_secs_f64() * 1e3))
            } else {
                bad(&check, "no connection", "check the address, the UDP port in firewalls, and both keys")
            });
        }
        findings
    }

    fn unknown(&self) -> Vec<Finding> {
        let lost = unknown(&self.edges).unwrap_or_default();
        lost.iter()
            .map(|lost| {
                let held = lost.held();
                bad(&format!("machine {}", lost.note.vm), &held.why, &held.remedy)
            })
            .collect()
    }

    /// Nothing is wrong, but a reboot would break it.
    fn reboot(&self) -> Option<Finding> {
        let (flows, machines) = self.through_here.as_ref()?;
        let said = format!("{flows} connections go through this host: {machines}; a reboot now breaks them");
        Some(good("reboot", said))
    }

    /// Whether each peer's arbiter can decide.
    async fn arbiters(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for peer in &self.edges.config.peer {
            let check = format!("arbiter of peer {}", peer.name);
            match peer.arbiter {
                ArbiterChoice::None => {}
                ArbiterChoice::Dns => findings.push(self.name_server_arbitrates(&check, peer)),
                ArbiterChoice::Etcd => findings.push(self.etcd_arbitrates(&check).await),
            }
        }
        findings
    }

    /// Machines without a name are those that a name server cannot decide about.
    fn name_server_arbitrates(&self, check: &str, peer: &PeerConfig) -> Finding {
        let nameless: Vec<&str> = self
            .machines
            .values()
            .map(|machine| &machine.row.definition)
            .filter(|vm| vm.dns_name.is_none() && peer.may_receive(vm.name.as_str()))
            .map(|vm| vm.name.as_str())
            .collect();
        if nameless.is_empty() {
            return good(check, "the primary name server decides in a cut of the link".into());
        }
        let detail = format!("it cannot decide about {}: no dns_name", nameless.join(", "));
        bad(check, &detail, "give them a dns_name, or set the arbiter to \"none\" at both sites")
    }

    async fn etcd_arbitrates(&self, check: &str) -> Finding {
        let Some(registers) = &self.edges.etcd else {
            return bad(check, "this site has no [etcd]", "add it");
        };
        match registers.round_trip().await {
            Ok(took) => {
                let ms = took.as_secs_f64() * 1e3;
                good(check, format!("etcd decides in a cut of the link; it answered in {ms:.1} ms"))
            }
            Err(error) => bad(check, &chain(&error), "until etcd answers no machine moves to this peer"),
        }
    }

    async fn machine(&self, machine: &Machine) -> Vec<Finding> {
        let definition = &machine.row.definition;
        let check = format!("machine {}", definition.name);
        if let Some(held) = held(&self.edges, &machine.row) {
            return vec![bad(&check, &held.why, &held.remedy)];
        }
        if machine.silent {
            let remedy = "look why it hangs; it is taken up when it answers, or end its process";
            return vec![bad(&check, "its QEMU is there and does not answer", remedy)];
        }
        if is_crashed(&self.edges, machine) {
            let remedy = "`longhaul vm start` boots it from its disk";
            return vec![bad(&check, "its QEMU is gone although nobody stopped it", remedy)];
        }
        let Some(guest) = &machine.guest else {
            return vec![bad(&check, "it is not running", "`longhaul vm start` starts it")];
        };
        let mut findings = Vec::new();
        match guest.what_cannot_travel().await {
            Ok(travel) if travel.obstacles.is_empty() => {
                findings.push(good(&check, "nothing in it is bound to this host".into()))
            }
            Ok(travel) => findings.extend(travel.obstacles.iter().map(|obstacle| {
                bad(&check, &obstacle.to_string(), "take it out of the machine before the move")
            })),
            Err(error) => findings.push(bad(&check, &chain(&error), "check its QEMU")),
        }
        findings.extend(self.stays_at_home(machine).await);
        findings.extend(self.names(machine).await);
        findings.extend(self.register(machine).await);
        findings
    }

    /// Servers of its home that the machine would lose. A move is not in danger, but what it does there may be.
    async fn stays_at_home(&self, machine: &Machine) -> Option<Finding> {
        if machine.row.visits(self.edges.site()) {
            return None;
        }
        let servers = home_servers::not_reached(&self.edges, &machine.row).await;
        lost_servers(&machine.row.definition.name, &servers)
    }

    /// Whether etcd could be asked about the machine's next move, where a peer's arbiter is etcd.
    async fn register(&self, machine: &Machine) -> Option<Finding> {
        let registers = self.edges.etcd.as_ref()?;
        let vm = &machine.row.definition.name;
        let mut peers = self.edges.config.peer.iter();
        peers.find(|peer| peer.arbiter == ArbiterChoice::Etcd && peer.may_receive(vm.as_str()))?;
        let check = format!("register {}", registers.key(vm));
        Some(match registers.check(vm, self.next_epoch(vm)).await {
            Ok(epoch) => good(&check, format!("can decide; it is in epoch {epoch}")),
            Err(error) => bad(&check, &chain(&error), "the machine does not move to this peer until then"),
        })
    }

    fn next_epoch(&self, vm: &VmName) -> Epoch {
        let epoch = self.edges.journal.ownership(vm).unwrap_or_default();
        epoch.map_or(Epoch(0), |ownership| ownership.epoch()).next()
    }

    async fn names(&self, machine: &Machine) -> Option<Finding> {
        let name = machine.row.definition.dns_name.as_ref()?;
        let check = format!("name {name}");
        let Some(names) = &self.edges.names else {
            return Some(bad(&check, "this site has no [dns]", "add it, or move with --without-dns"));
        };
        let home: Vec<_> = machine
            .row
            .definition
            .nics
            .iter()
            .flat_map(|nic| nic.home.iter().map(|home| home.addr))
            .collect();
        let next = self.next_epoch(&machine.row.definition.name);
        Some(match names.check(name, &home, next).await {
            Ok(standing) => good(&check, format!("can follow; TTL {} s", standing.ttl_s)),
            Err(error) => bad(&check, &chain(&error), "check server, key and update policy"),
        })
    }
}

/// Nothing fails because of them, so that this is worth a look only.
fn lost_servers(vm: &VmName, servers: &BTreeSet<(IpAddr, u16)>) -> Option<Finding> {
    let shown: Vec<String> = servers
        .iter()
        .take(MAX_SERVERS_SHOWN)
        .map(|(address, port)| format!("{address} port {port}"))
        .collect();
    let more = match servers.len() - shown.len() {
        0 if shown.is_empty() => return None,
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let detail = format!(
        "it speaks with {}{more}, which are private addresses outside of its home_prefixes: after a move new connections \
         to them leave at the visited site, by the care-of address",
        shown.join(", ")
    );
    let remedy = "if they answer at its home only, name their networks in tunnel.home_prefixes, and its LAN and resolvers \
        with them: the list takes the place of the default";
    Some(Finding { remedy: Some(remedy.to_owned()), ..good(&format!("servers of {vm}"), detail) })
}

fn good(check: &str, detail: String) -> Finding {
    Finding { check: check.to_owned(), ok: true, detail, remedy: None }
}

fn bad(check: &str, detail: &str, remedy: &str) -> Finding {
    Finding { check: check.to_owned(), ok: false, detail: detail.to_owned(), remedy: Some(remedy.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_a_machine_would_lose_are_named_with_the_remedy_and_fail_nothing() {
        let vm: VmName = "web1".parse().unwrap();
        let servers = |count: u8| -> BTreeSet<(IpAddr, u16)> {
            (0..count).map(|n| (IpAddr::from([10, 0, 0, n]), 5432)).collect()
        };
        assert_eq!(lost_servers(&vm, &servers(0)).map(|finding| finding.detail), None);
        let finding = lost_servers(&vm, &servers(1)).unwrap();
        assert!(finding.ok && finding.detail.contains("10.0.0.0 port 5432, which"), "{}", finding.detail);
        assert!(finding.remedy.is_some_and(|remedy| remedy.contains("tunnel.home_prefixes")));
        let finding = lost_servers(&vm, &servers(7)).unwrap();
        assert!(finding.detail.contains("10.0.0.3 port 5432 and 3 more"), "{}", finding.detail);
    }
}
