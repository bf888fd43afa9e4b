//! What stays at a site that the machine left, as far as its name and its whereabouts are concerned: the daemon's
//! anchors. Packets and flows are not played.

use longhaul_core::ids::Epoch;
use longhaul_core::migration::arbiter::Arbiter;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::wire::AnchorMessage;

use crate::broken::Broken;
use crate::parts::{Anchor, Id, Names, Packet, VM, Word, name, site_of};
use crate::scene::A;
use crate::world::World;

impl World {
    /// The machine left by this attempt.
    pub fn attracts(&mut self, id: Id) {
        let left = self.moves[&id];
        let known = &self.sites[left.source].journal.anchor;
        if known.as_ref().is_some_and(|known| known.epoch >= left.epoch) {
            return;
        }
        let names = if left.source == A { Names::Owed } else { Names::None };
        let (epoch, peer) = (left.epoch, left.destination);
        self.put_anchor(left.source, Some(Anchor { epoch, peer, runs_there: false, names }));
    }

    /// It stayed after all, and this epoch does not begin elsewhere.
    pub fn forgets_anchor(&mut self, id: Id) {
        let stayed = self.moves[&id];
        let known = self.sites[stayed.source].journal.anchor.as_ref();
        if known.is_some_and(|known| known.epoch == stayed.epoch) {
            self.put_anchor(stayed.source, None);
        }
    }

    /// It is here again: at its home its name comes back, too.
    pub fn came_back(&mut self, site: usize, id: Id) {
        if self.broken == Some(Broken::KeepsItsAnchor) {
            return;
        }
        let epoch = self.moves[&id].epoch;
        let names_alone = Anchor { epoch, peer: site, runs_there: true, names: Names::Owed };
        self.put_anchor(site, (site == A).then_some(names_alone));
    }

    /// An anchor does one thing: it writes down that the machine runs there, or moves the name and tells the others.
    pub fn anchor_works(&mut self, site: usize) {
        let state = &mut self.sites[site];
        let Some(anchor) = state.journal.anchor.as_mut().filter(|_| state.up) else { return };
        if !anchor.runs_there {
            anchor.runs_there = state.runs_there;
            return;
        }
        if anchor.names == Names::Owed {
            let (known, late) = self.name_server.swap(anchor.peer, anchor.epoch);
            self.under_way.extend(late.map(|change| (Arbiter::Dns, change)));
            if known || self.broken == Some(Broken::AsksOnce) {
                anchor.names = Names::Moved;
            }
        }
        self.tells_others(site);
    }

    /// Until they have heard. Every other site may attract an address of the machine.
    fn tells_others(&mut self, site: usize) {
        let Some(anchor) = self.sites[site].journal.anchor.clone() else { return };
        if anchor.peer == site || self.broken == Some(Broken::TellsNobody) {
            return;
        }
        for other in (0..self.sites.len()).filter(|other| *other != site && *other != anchor.peer) {
            if !self.sites[site].noted.contains(&other) {
                let (vm, to) = (VM.clone(), name(anchor.peer).clone());
                let moved = AnchorMessage::Moved { vm, epoch: anchor.epoch, to, care_of: Vec::new() };
                self.transmit(Packet { from: site, to: other, word: Word::Anchor(moved) });
            }
        }
    }

    /// Another site's word about an anchor. `Moved` counts from the site that the machine was at only.
    pub fn hear_of_anchor(&mut self, from: usize, to: usize, message: &AnchorMessage) {
        match message {
            AnchorMessage::Noted { epoch, .. } => {
                let state = &mut self.sites[to];
                if state.journal.anchor.as_ref().is_some_and(|anchor| anchor.epoch == *epoch) {
                    state.noted.insert(from);
                }
            }
            AnchorMessage::Ended { .. } => {}
            AnchorMessage::Moved { epoch, to: place, .. } => {
                self.hear_moved(from, to, *epoch, site_of(place));
            }
        }
    }

    fn hear_moved(&mut self, from: usize, site: usize, epoch: Epoch, place: usize) {
        let anybody = self.broken == Some(Broken::BelievesAnybody);
        let known = self.sites[site].journal.anchor.clone();
        let Some(anchor) = known.filter(|anchor| anchor.epoch < epoch || anybody) else {
            // Not while it may have left: it is said again once this site knows, and has an anchor.
            let in_doubt = matches!(self.sites[site].journal.owner, Some(Ownership::Offered { .. }));
            if !in_doubt || self.broken == Some(Broken::NotesInDoubt) {
                self.notes(site, from, epoch);
            }
            return;
        };
        if anchor.peer != from && !anybody {
            return;
        }
        if place != site {
            let names = if anchor.names == Names::None { Names::None } else { Names::Owed };
            // Who has heard from here that it went to the site which moves it on hears the rest from that one.
            let noted = std::mem::take(&mut self.sites[site].noted);
            self.put_anchor(site, Some(Anchor { epoch, peer: place, runs_there: true, names }));
            self.sites[site].noted = noted;
        }
        self.notes(site, from, epoch);
    }

    fn notes(&mut self, site: usize, teller: usize, epoch: Epoch) {
        let noted = AnchorMessage::Noted { vm: VM.clone(), epoch };
        self.transmit(Packet { from: site, to: teller, word: Word::Anchor(noted) });
    }

    fn put_anchor(&mut self, site: usize, anchor: Option<Anchor>) {
        let state = &mut self.sites[site];
        (state.journal.anchor, state.runs_there) = (anchor, false);
        state.noted.clear();
    }

    /// A gateway that starts owes the name whether or not a guest is left to end.
    pub fn owes_names(&mut self, site: usize, id: Id) {
        let left = matches!(&self.sites[site].journal.owner,
            Some(Ownership::Away { epoch, .. }) if *epoch == self.moves[&id].epoch);
        if left && self.broken != Some(Broken::ForgetsNames) {
            self.sites[site].runs_there = true;
        }
    }
}
