//! What is kept of a name between runs: the last swap, written before it is sent, and the time to live from before it.
//!
//! One JSON file per name, replaced as a whole. Without it a lost answer could not be told from a lost swap when the
//! command is repeated. It holds no key. The name server's ownership record decides; this only says what was asked.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use dnsupdater::{DnsName, Error, PtrSwap, Swap};
use serde::{Deserialize, Serialize};

/// What is kept of one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// The primary that was asked.
    pub server: SocketAddr,
    /// The time to live before it was first lowered, in seconds; none when it was restored.
    pub ttl_before_s: Option<u32>,
    /// The last swap that may have been applied.
    pub last: Option<Last>,
}

/// The last swap of a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Last {
    /// The swap as it was sent.
    pub swap: Swap,
    /// The changes of reverse names that follow it.
    pub reverse: Vec<PtrSwap>,
    /// What became of the swap.
    pub ended: Ended,
}

/// What became of a swap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    /// Sent, or about to be; the answer is not known.
    Unknown,
    /// It won.
    Won,
    /// It was taken back.
    Undone,
}

/// The file of one name.
pub struct Memory {
    file: PathBuf,
    server: SocketAddr,
}

impl Memory {
    /// The file of `name`; `state_dir` or the user's own folder for such things.
    pub fn of(state_dir: Option<&Path>, name: &DnsName, server: SocketAddr) -> Result<Self, Error> {
        let own = || {
            let set = |variable| std::env::var_os(variable).filter(|value| !value.is_empty());
            let state = set("XDG_STATE_HOME").map(PathBuf::from);
            let folder =
                state.or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".local/state")))?;
            Some(folder.join("dnsupdater"))
        };
        let Some(folder) = state_dir.map(Path::to_owned).or_else(own) else {
            let reason = "There is no place to remember the swap in: give --state-dir".to_owned();
            return Err(Error::Config(reason));
        };
        let name = name.to_string();
        Ok(Self { file: folder.join(format!("{}.json", name.trim_end_matches('.'))), server })
    }

    /// What is kept; nothing of a name that was never changed from here.
    pub fn recall(&self) -> Result<Remembered, Error> {
        let nothing = Remembered { server: self.server, ttl_before_s: None, last: None };
        let bytes = match fs::read(&self.file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(nothing),
            Err(error) => return Err(self.refused("read", &error)),
        };
        let kept: Remembered =
            serde_json::from_slice(&bytes).map_err(|error| self.refused("read", &error))?;
        // Another server may hold another zone of the same name.
        Ok(if kept.server == self.server { kept } else { nothing })
    }

    /// Keeps this, on the disk before it returns.
    pub fn keep(&self, remembered: &Remembered) -> Result<(), Error> {
        self.replace(remembered).map_err(|error| self.refused("write", &error))
    }

    fn replace(&self, remembered: &Remembered) -> io::Result<()> {
        let folder = self.file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let new = self.file.with_extension("json.new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(remembered)?)?;
        file.sync_all()?;
        fs::rename(&new, &self.file)?;
        File::open(folder)?.sync_all()
    }

    fn refused(&self, verb: &str, error: &dyn std::fmt::Display) -> Error {
        let file = self.file.display();
        Error::Config(format!("Cannot {verb} {file}, where the last swap is kept: {error}; see --state-dir"))
    }
}
