//! Machine definitions, as operators write them: refused, or sound and the same after a journey.

use std::path::Path;

use gateway::hypervisor::parse_definition;
use longhaul_core::machine::MachineDefinition;

use crate::sample;

/// Reads `data` as a definition file.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let definition = match parse_definition(text, Path::new("web1.toml")) {
        Ok(definition) => definition,
        Err(error) => return drop(error.to_string()),
    };
    assert_eq!(definition.validate(), Ok(()));
    assert!(definition.volumes().map(|volume| volume.size_bytes).try_fold(0, u64::checked_add).is_some());
    let wire = postcard::to_allocvec(&definition).expect("it can be written");
    let arrived: MachineDefinition = postcard::from_bytes(&wire).expect("a sound definition arrives");
    assert_eq!(arrived, definition);
}

/// The sample machine, and one that boots by UEFI, one by a kernel of the host's.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let uefi = "[firmware.uefi]\ncode_bytes = 3653632\nvars = \"vars\"\nvars_bytes = 540672\n";
    let kernel = "[firmware.kernel]\nname = \"cloud\"\nimage_sha256 = \"00\"\ncommand_line = \"quiet\"\n";
    let with = |firmware: &str| format!("{}\n{firmware}", sample::DEFINITION).into_bytes();
    vec![("plain", with("")), ("uefi", with(uefi)), ("kernel", with(kernel))]
}
