//! The reverse names of a swap: which change with it, and changing them after it.

use dnsupdater::{DnsName, Error, Key, PtrOutcome, PtrSwap, Swap, Updater, UpdaterConfig};

use super::args::ReverseAccess;

/// How long a new reverse name may be remembered by resolvers, where there was none before: in seconds.
const PTR_TTL_S: u32 = 300;

/// What became of the reverse names.
pub struct Followed {
    /// For people.
    pub lines: Vec<String>,
    /// Whether all are as they should be.
    pub complete: bool,
}

/// The updater for reverse zones.
pub fn updater(forward: &Updater, access: &ReverseAccess) -> Result<Updater, Error> {
    let config = forward.config().clone();
    let key = match &access.ptr_key_file {
        Some(path) => Key::from_file(path)?,
        None => config.key.clone(),
    };
    let servers = access.ptr_server.map_or_else(|| config.servers.clone(), |server| vec![server]);
    Updater::new(UpdaterConfig { servers, key, ..config })
}

/// The changes that let reverse names follow `swap`: a new address gets the name, an old one loses it if it has it.
pub async fn plan(updater: &Updater, access: &ReverseAccess, swap: &Swap) -> Result<Vec<PtrSwap>, Error> {
    let mut changes = Vec::new();
    for address in swap.new.iter().filter(|address| !swap.old.contains(address)) {
        let name = DnsName::reverse(*address);
        let zone = zone_of(updater, access, &name).await?;
        let found = updater.read_ptr(*address, &zone).await?;
        if found.names.len() > 1 {
            let several = format!("{address} has {} reverse names, a swap knows one", found.names.len());
            return Err(Error::Config(several));
        }
        if !found.has(Some(&swap.name)) {
            let (old, new) = (found.names.into_iter().next(), Some(swap.name.clone()));
            changes.push(PtrSwap::new(*address, zone, old, new, found.ttl_s.unwrap_or(PTR_TTL_S)));
        }
    }
    for address in swap.old.iter().filter(|address| !swap.new.contains(address)) {
        let zone = zone_of(updater, access, &DnsName::reverse(*address)).await?;
        let found = updater.read_ptr(*address, &zone).await?;
        if found.has(Some(&swap.name)) {
            let ttl_s = found.ttl_s.unwrap_or(PTR_TTL_S);
            changes.push(PtrSwap::new(*address, zone, Some(swap.name.clone()), None, ttl_s));
        }
    }
    Ok(changes)
}

/// Changes each, whatever becomes of the others.
pub async fn follow(updater: &Updater, changes: &[PtrSwap]) -> Followed {
    let mut followed = Followed { lines: Vec::new(), complete: true };
    for change in changes {
        let address = change.address;
        let wanted = shown(change.new.as_ref());
        let line = match updater.swap_ptr(change).await {
            Ok(PtrOutcome::Done) => format!("{address} has {wanted} now"),
            Ok(PtrOutcome::Lost { current }) if current.has(change.new.as_ref()) => {
                format!("{address} has {wanted} already")
            }
            Ok(PtrOutcome::Lost { current }) => {
                followed.complete = false;
                let expected = shown(change.old.as_ref());
                let found = current.names.iter().map(DnsName::to_string).collect::<Vec<_>>().join(", ");
                format!("{address} was NOT CHANGED: expected {expected}, it has {found}")
            }
            Err(error) => {
                followed.complete = false;
                format!("{address} was NOT CHANGED to {wanted}: {error}")
            }
        };
        followed.lines.push(line);
    }
    followed
}

async fn zone_of(updater: &Updater, access: &ReverseAccess, name: &DnsName) -> Result<DnsName, Error> {
    match access.ptr_zones.iter().find(|zone| name.is_in(zone)) {
        Some(zone) => Ok(zone.clone()),
        None => updater.zone_of(name).await,
    }
}

fn shown(name: Option<&DnsName>) -> String {
    name.map_or_else(|| "no reverse name".to_owned(), |name| format!("the reverse name {name}"))
}
