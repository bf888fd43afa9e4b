//! `longhaul key`: makes and prints this site's identity.

use std::path::Path;
use std::process::ExitCode;

use crate::identity::Identity;

/// Loads the key at `file`, or makes one there, and prints its public half.
pub fn run(file: &Path) -> ExitCode {
    let identity = if file.exists() { Identity::load(file) } else { Identity::generate(file) };
    match identity {
        Ok(identity) => {
            println!("{}", identity.public_key());
            ExitCode::SUCCESS
        }
        Err(error) => super::fail(&error, 2),
    }
}
