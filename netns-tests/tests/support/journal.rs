//! Journals written by hand, as gateways would have left them.
//!
//! Knows one machine and attempts by number. Both gateways are stopped while it writes.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use gateway::hypervisor::parse_definition;
use gateway::journal::{Journal, unix_ms};
use gateway::migration::MachineRow;
use gateway::migration::anchor::{Anchor, AnchorNic, NameState};
use gateway::tunnel::Leaving;
use longhaul_core::ids::{Epoch, MigrationId};
use longhaul_core::machine::MachineDefinition;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{CareOf, Handover, Proposal, Reservation};
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::step::Step;
use longhaul_core::migration::{Attempt, CommitMode};
use longhaul_core::tunnel::handover::{NicHandover, Prefix};
use netns_tests::scenario::Scene;
use netns_tests::scenario::gateway::Gateway;
use netns_tests::scenario::scene::VM;

/// What both sites' records say of the machine.
pub struct Written {
    definition: MachineDefinition,
    care_of: IpAddr,
}

/// One site's journal.
pub struct Site {
    journal: Journal,
    at_a: bool,
}

/// The attempt of that number; all begin epoch 1.
pub fn attempt(number: u128) -> Attempt {
    let peer = "b".parse().unwrap();
    Attempt {
        id: MigrationId(number << 100),
        vm: VM.parse().unwrap(),
        peer,
        epoch: Epoch(1),
        commit: CommitMode::Confirmed,
    }
}

/// An anchor whose name has not moved yet.
pub fn anchor(written: &Written, home: IpAddr, care_of: IpAddr) -> Anchor {
    let definition = &written.definition;
    let nics = definition.nics.iter().map(|nic| AnchorNic {
        nic: nic.name.clone(),
        mac: nic.mac,
        from: Leaving::Home,
        addresses: vec![home],
        bridge: netns_tests::topology::BRIDGE.to_owned(),
        port: "gone".to_owned(),
        flows: Vec::new(),
    });
    Anchor {
        vm: VM.parse().unwrap(),
        epoch: Epoch(1),
        peer: "b".parse().unwrap(),
        nics: nics.collect(),
        care_of: vec![(home, care_of)],
        moves: vec![(home, care_of)],
        name: definition.dns_name.clone(),
        ttl_s: 5,
        names: NameState::Waiting,
        since_unix_ms: unix_ms(),
        tell: Vec::new(),
        runs_there: false,
        ended: false,
    }
}

impl Written {
    /// Stops both gateways, so that their journals can be written.
    pub fn begin(scene: &mut Scene) -> Result<Self> {
        scene.a.kill()?;
        scene.b.kill()?;
        let definition = parse_definition(&scene.definition()?, Path::new("web1.toml"))?;
        Ok(Self { definition, care_of: scene.world.site("b")?.spec.address(200).into() })
    }

    /// A gateway's journal, with the machine's row in it.
    pub fn open(&self, gateway: &Gateway, images: &[PathBuf]) -> Result<Site> {
        let journal = Journal::open(&gateway.folder.join("state/journal.redb"))?;
        let at_a = gateway.folder.ends_with("a");
        let row = MachineRow {
            definition: self.definition.clone(),
            images: images.to_vec(),
            home_site: "a".parse()?,
            came_from: (!at_a).then(|| "a".parse()).transpose()?,
            adopted: None,
            carried: Vec::new(),
            over: Vec::new(),
            care_of: if at_a { Vec::new() } else { self.reservation().care_of },
            handover: (!at_a).then(|| self.handover()),
            wanted: true,
            settled_in: None,
            ttl_before_s: None,
        };
        journal.put_machine(&VM.parse()?, &row)?;
        let mut site = Site { journal, at_a };
        if at_a {
            site.define(&Ownership::Here { epoch: Epoch(0) })?;
        }
        Ok(site)
    }

    /// Where the first attempt's disk is at a gateway that takes it.
    pub fn pool_image(&self, gateway: &Gateway) -> PathBuf {
        let short = &attempt(1).id.to_string()[..8];
        gateway.folder.join("disks").join(format!("{VM}-root.{short}.raw"))
    }

    pub fn reserved(&self) -> SourceRecord {
        let peer = "b".parse().unwrap();
        SourceRecord::Reserved { peer, proposal: self.proposal(), without_names: false }
    }

    /// The source's records up to Committed.
    pub fn until_committed(&self) -> Vec<SourceRecord> {
        vec![
            self.reserved(),
            SourceRecord::PreCopy { reservation: self.reservation() },
            SourceRecord::Parked,
            SourceRecord::Committed { handover: Box::new(self.handover()) },
        ]
    }

    pub fn held(&self) -> DestinationRecord {
        let peer = "a".parse().unwrap();
        DestinationRecord::Reserved { peer, proposal: self.proposal(), reservation: self.reservation() }
    }

    pub fn activated(&self) -> DestinationRecord {
        DestinationRecord::Activated { handover: Box::new(self.handover()) }
    }

    fn proposal(&self) -> Box<Proposal> {
        Box::new(Proposal {
            definition: self.definition.clone(),
            home_site: "a".parse().unwrap(),
            hypervisor: "7.2".into(),
            epoch: Epoch(0),
            running: true,
            commit: CommitMode::Confirmed,
            nics: self.handover().nics,
            carried: Vec::new(),
        })
    }

    fn reservation(&self) -> Reservation {
        let homes = self.definition.nics.iter().flat_map(|nic| {
            nic.home.iter().map(|home| CareOf { nic: nic.name.clone(), home: *home, addr: self.care_of })
        });
        Reservation { care_of: homes.collect(), shadow_pages: 0, disk_window_log: 20, memory_base: None }
    }

    fn handover(&self) -> Handover {
        let nics = self.definition.nics.iter().map(|nic| NicHandover {
            nic: nic.name.clone(),
            mac: nic.mac,
            home: nic.home.iter().map(|home| Prefix { addr: home.addr, len: home.len }).collect(),
            neighbours: Vec::new(),
            home_prefixes: Vec::new(),
            flows: Vec::new(),
        });
        Handover { nics: nics.collect() }
    }
}

impl Site {
    pub fn define(&mut self, ownership: &Ownership) -> Result<()> {
        Ok(self.journal.define(&VM.parse()?, ownership)?)
    }

    pub fn anchor(&mut self, anchor: &Anchor) -> Result<()> {
        Ok(self.journal.put_anchor(&anchor.vm, anchor)?)
    }

    pub async fn source(&mut self, number: u128, records: &[SourceRecord]) -> Result<()> {
        for record in records {
            self.write(number, Record::Source(record.clone())).await?;
        }
        Ok(())
    }

    pub async fn destination(&mut self, number: u128, records: &[DestinationRecord]) -> Result<()> {
        for record in records {
            self.write(number, Record::Destination(record.clone())).await?;
        }
        Ok(())
    }

    async fn write(&self, number: u128, record: Record) -> Result<()> {
        let peer = if self.at_a { "b" } else { "a" }.parse()?;
        let attempt = Attempt { peer, ..attempt(number) };
        self.journal.commit(&attempt, Step::record(record, vec![()])).await?;
        Ok(())
    }
}
