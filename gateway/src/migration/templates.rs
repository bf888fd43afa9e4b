//! Templates: raw images that machines are cloned from, `NAME.raw` in one folder of this site. Which of them a peer may be
//! told of, and which can be read.
//!
//! A template is only read, beside the new disk of a machine that comes. Whether the disk was really cloned from it is not
//! asked here: the source's hashes say so, block by block.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use longhaul_core::ids::{SiteName, TemplateName};
use longhaul_core::machine::Volume;

use super::chain;
use super::destination::DestinationLeaf;
use crate::config::Config;
use crate::disk::{Base, BaseError, only_ours};

/// What the file of a template ends in behind its name.
const SUFFIX: &str = ".raw";

/// Why a template is not used. All of the disk is sent, then.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The folder is not there, or may not be read.
    #[error("Cannot look into {}: make the folder, or set storage.templates", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else could put a link to a file that only root may read in a template's place.
    #[error("Others than root and the gateway's user may write into {}: chown it and chmod go-w it", folder.display())]
    Shared {
        /// The folder.
        folder: PathBuf,
    },
    /// The file.
    #[error(transparent)]
    Image(#[from] BaseError),
}

/// What the template of a disk that comes holds. One that cannot be used costs bytes, and the machine comes all the same.
pub(super) fn base_of(leaf: &DestinationLeaf, volume: &Volume<'_>) -> Option<Base> {
    let (vm, peer, disk) = (&leaf.attempt.vm, &leaf.attempt.peer, volume.name);
    let template = volume.template?;
    match open(&leaf.edges.config, peer, template, volume.size_bytes) {
        Ok(Some(base)) => {
            tracing::info!(%vm, %disk, %template, "sending only what its template lacks");
            Some(base)
        }
        Ok(None) => {
            tracing::info!(%vm, %disk, %template, %peer, "the peer may not be told of the template");
            None
        }
        Err(error) => {
            let error = chain(&error);
            tracing::warn!(%vm, %disk, %template, error, "all of the disk is sent: its template cannot be used");
            let notice =
                format!("All of disk {disk} is sent, its template {template} cannot be used: {error}");
            leaf.viewer.notice_once(notice);
            None
        }
    }
}

/// Each template that is here or that a peer's table names: who may be told of it, or why it cannot be used. Nothing where
/// the configuration has no folder for them.
pub fn look(config: &Config) -> Vec<(String, Result<String, TemplateError>)> {
    let Some(folder) = &config.storage.templates else { return Vec::new() };
    let here = match names_in(folder) {
        Ok(names) => names,
        Err(error) => return vec![("templates".to_owned(), Err(error))],
    };
    // A pattern is no name of a template.
    let named = config.peer.iter().flat_map(|peer| &peer.templates).filter_map(|name| name.parse().ok());
    let all: BTreeSet<TemplateName> = here.into_iter().chain(named).collect();
    let looked = |name: TemplateName| {
        let fit = Base::of_template(&file_of(folder, &name), u64::MAX);
        let fit = fit.map(|_| told_to(config, &name)).map_err(TemplateError::from);
        (format!("template {name}"), fit)
    };
    all.into_iter().map(looked).collect()
}

/// The template of a disk of `size` bytes, if there are any here and `peer` may be told of it.
fn open(
    config: &Config,
    peer: &SiteName,
    template: &TemplateName,
    size: u64,
) -> Result<Option<Base>, TemplateError> {
    let allowed = config.peer(peer).is_some_and(|policy| policy.may_be_told(template));
    let Some(folder) = config.storage.templates.as_deref().filter(|_| allowed) else { return Ok(None) };
    check_folder(folder)?;
    Ok(Some(Base::of_template(&file_of(folder, template), size)?))
}

fn told_to(config: &Config, template: &TemplateName) -> String {
    let peers = config.peer.iter().filter(|peer| peer.may_be_told(template));
    let names: Vec<&str> = peers.map(|peer| peer.name.as_str()).collect();
    if names.is_empty() {
        return "no peer is told of it: the peers' templates do not name it".to_owned();
    }
    format!("{} may be told of it", names.join(", "))
}

fn names_in(folder: &Path) -> Result<Vec<TemplateName>, TemplateError> {
    check_folder(folder)?;
    let unread = |source| TemplateError::Folder { folder: folder.to_owned(), source };
    let name = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_suffix(SUFFIX)?.parse().ok();
    let entries = fs::read_dir(folder).map_err(unread)?;
    Ok(entries.filter_map(|entry| name(entry.ok()?)).collect())
}

fn check_folder(folder: &Path) -> Result<(), TemplateError> {
    let about =
        fs::metadata(folder).map_err(|source| TemplateError::Folder { folder: folder.to_owned(), source })?;
    if only_ours(&about) { Ok(()) } else { Err(TemplateError::Shared { folder: folder.to_owned() }) }
}

fn file_of(folder: &Path, template: &TemplateName) -> PathBuf {
    folder.join(format!("{template}{SUFFIX}"))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, Permissions, set_permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use tempfile::TempDir;

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn file(folder: &Path, name: &str, size: u64, mode: u32) {
        let path = folder.join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    }

    /// A site with some templates, and peers b, which may be told of `told`, and c, which may not be told of any.
    fn site(told: &str) -> (TempDir, Config) {
        let folder = tempfile::tempdir().unwrap();
        file(folder.path(), "debian-12.raw", SIZE, 0o644);
        file(folder.path(), "shared.raw", SIZE, 0o666);
        file(folder.path(), "Notes.raw", SIZE, 0o644);
        symlink(folder.path().join("debian-12.raw"), folder.path().join("link.raw")).unwrap();
        let peer = |name: &str, key: char| {
            format!("[[peer]]\nname = \"{name}\"\nkey = \"{key}{}=\"\n", "A".repeat(42))
        };
        let text = format!(
            "[site]\nname = \"a\"\n[storage]\npool = \"/disks\"\ntemplates = \"{}\"\n{}{}templates = {told}\n",
            folder.path().display(),
            peer("c", 'A'),
            peer("b", 'B'),
        );
        let config = Config::parse(Path::new("site.toml"), &text).unwrap();
        (folder, config)
    }

    fn opened(config: &Config, peer: &str, template: &str, size: u64) -> Result<bool, TemplateError> {
        let template = template.parse().unwrap();
        open(config, &peer.parse().unwrap(), &template, size).map(|base| base.is_some())
    }

    #[test]
    fn a_peer_is_told_of_no_template_that_its_table_does_not_name() {
        let (_folder, config) = site("[\"debian-*\"]");
        let told = |peer, template| opened(&config, peer, template, SIZE).unwrap();
        assert!(told("b", "debian-12"));
        assert!(!told("b", "shared") && !told("b", "absent"), "not even whether it is here");
        assert!(!told("c", "debian-12") && !told("z", "debian-12"));
        let mut without = config.clone();
        without.storage.templates = None;
        assert!(!opened(&without, "b", "debian-12", SIZE).unwrap());
    }

    #[test]
    fn a_template_that_is_absent_a_link_longer_or_others_to_write_is_not_opened() {
        let (folder, config) = site("[\"*\"]");
        let refused = |template, size| opened(&config, "b", template, size).unwrap_err();
        assert!(opened(&config, "b", "debian-12", 2 * SIZE).unwrap(), "a clone that was grown");
        let longer = refused("debian-12", SIZE - 512);
        assert!(matches!(longer, TemplateError::Image(BaseError::Longer { .. })), "{longer}");
        assert!(matches!(refused("absent", SIZE), TemplateError::Image(BaseError::Open(_))));
        assert!(matches!(refused("link", SIZE), TemplateError::Image(BaseError::Open(_))));
        assert!(matches!(refused("shared", SIZE), TemplateError::Image(BaseError::NotTrusted)));
        set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(refused("debian-12", SIZE), TemplateError::Shared { .. }));
        drop(folder);
        assert!(matches!(refused("debian-12", SIZE), TemplateError::Folder { .. }));
    }

    #[test]
    fn what_can_be_told_to_whom_is_listed_and_what_cannot_be_used_with_the_reason() {
        let (folder, config) = site("[\"debian-12\", \"plan9\", \"x*\"]");
        let looked = |config: &Config| -> Vec<(String, bool, String)> {
            let said = |looked: Result<String, TemplateError>| match looked {
                Ok(said) => (true, said),
                Err(error) => (false, chain(&error)),
            };
            let each = |(check, looked)| {
                let (ok, said) = said(looked);
                (check, ok, said)
            };
            look(config).into_iter().map(each).collect()
        };
        let all = looked(&config);
        let seen: Vec<(&str, bool)> = all.iter().map(|(check, ok, _)| (check.as_str(), *ok)).collect();
        let wanted = [
            ("template debian-12", true),
            ("template link", false),
            ("template plan9", false),
            ("template shared", false),
        ];
        assert_eq!(seen, wanted);
        assert!(all[0].2.starts_with("b may be told"), "{}", all[0].2);
        assert!(all[3].2.contains("chmod go-w"), "{}", all[3].2);
        let mut nobody = config.clone();
        nobody.peer.iter_mut().for_each(|peer| peer.templates.clear());
        assert!(looked(&nobody)[0].2.contains("no peer is told"));
        drop(folder);
        let gone = looked(&config);
        assert!(gone.len() == 1 && !gone[0].1 && gone[0].2.contains("storage.templates"), "{gone:?}");
        nobody.storage.templates = None;
        assert!(looked(&nobody).is_empty());
    }
}
