//! Cargo, as it is called from a shell.
//!
//! A program that cargo runs finds the package's name, version and folder in its environment. Build scripts that look at
//! those, such as ring's, would take a build from here for another one, and with them all that depends on them would be built
//! anew, in turn with what a shell builds.

use std::process::Command;

/// What cargo sets for a program that it runs, by the beginning of the name.
const OF_THE_PACKAGE: [&str; 3] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"];

/// The cargo that built this program.
pub fn command() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        if OF_THE_PACKAGE.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            command.env_remove(name);
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_package_that_cargo_tests_is_not_told_of() {
        if std::env::var_os("CARGO_PKG_NAME").is_none() {
            println!("skipped: this test was not started by cargo");
            return;
        }
        let removed: Vec<_> = command()
            .get_envs()
            .filter(|(_, value)| value.is_none())
            .map(|(name, _)| name.to_owned())
            .collect();
        assert!(
            removed.contains(&"CARGO_PKG_NAME".into()) && removed.contains(&"CARGO_MANIFEST_DIR".into()),
            "{removed:?}"
        );
    }
}
