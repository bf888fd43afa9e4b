//! What the configuration names on this host: looked at before anything is made.
//!
//! Only what the gateway cannot begin without. What a migration needs besides, `longhaul doctor` finds.

use std::fs;
use std::net::UdpSocket;
use std::path::Path;

use crate::config::Config;
use crate::dns::Names;
use crate::etcd::Registers;
use crate::identity::Identity;
use crate::migration::chain;

/// A key of the configuration, and what is wrong with what it names.
pub type Contradiction = (String, String);

/// Whether this host has what the configuration names. Changes nothing.
pub fn check(config: &Config) -> Result<(), Contradiction> {
    let wrong = |key: &str, error: &dyn std::error::Error| (key.to_owned(), chain(error));
    if let Err(error) = Identity::load(&config.site.key_file) {
        return Err(("site.key_file".to_owned(), format!("{}; `longhaul key` makes a key", chain(&error))));
    }
    if !config.storage.pool.is_dir() {
        let text = format!("expected a folder, and {} is none; make it", config.storage.pool.display());
        return Err(("storage.pool".to_owned(), text));
    }
    if let Err(error) = UdpSocket::bind(config.link.listen) {
        let text = format!("expected a free UDP address of this host, not {}: {error}", config.link.listen);
        return Err(("link.listen".to_owned(), text));
    }
    if let Some(dns) = &config.dns {
        Names::open(dns).map_err(|error| wrong("dns.key_file", &error))?;
    }
    if let Some(etcd) = &config.etcd {
        Registers::open(etcd).map_err(|file| (file.key.to_owned(), file.to_string()))?;
    }
    for (name, kernel) in &config.kernel {
        readable(&format!("kernel.{name}.image"), &kernel.image)?;
        if let Some(initrd) = &kernel.initrd {
            readable(&format!("kernel.{name}.initrd"), initrd)?;
        }
    }
    match &config.hypervisor.uefi_code {
        Some(code) => readable("hypervisor.uefi_code", code),
        None => Ok(()),
    }
}

fn readable(key: &str, path: &Path) -> Result<(), Contradiction> {
    let is_file = fs::File::open(path).and_then(|file| file.metadata()).map(|about| about.is_file());
    match is_file {
        Ok(true) => Ok(()),
        Ok(false) => Err((key.to_owned(), format!("expected a file, and {} is none", path.display()))),
        Err(error) => Err((key.to_owned(), format!("cannot read {}: {error}", path.display()))),
    }
}
