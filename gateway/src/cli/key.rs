//! `longhaul key`: makes and prints this site's identity.

use std::path::Path;
use std::process::ExitCode;

use crate::identity::{Identity, IdentityError};

/// Loads the key at `file`, or makes one there, and prints its public half.
pub fn run(file: &Path) -> ExitCode {
    let identity = if file.exists() { Identity::load(file) } else { make(file) };
    match identity {
        Ok(identity) => {
            println!("{}", identity.public_key());
            ExitCode::SUCCESS
        }
        Err(error) => super::fail(&error, 2),
    }
}

fn make(file: &Path) -> Result<Identity, IdentityError> {
    let identity = Identity::generate()?;
    identity.save(file)?;
    Ok(identity)
}
