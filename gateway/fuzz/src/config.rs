//! The daemon's configuration file: any text is a configuration or an error that can be printed.

use std::path::Path;

use gateway::config::Config;

/// Reads `data` as `site.toml`.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(Path::new("site.toml"), text) {
        Ok(config) => {
            for lan in config.lan.values() {
                // Checked with the file.
                assert!(lan.care_of_addresses().is_ok_and(|pool| pool.len() <= 65536 * lan.care_of.len()));
            }
            for peer in &config.peer {
                let _ = (peer.may_send("web1"), peer.may_receive("web1"));
                let _ = "debian-12".parse().map(|name| peer.may_be_told(&name));
            }
        }
        Err(error) => drop(error.to_string()),
    }
}

/// The reference configurations, without what they say to people.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let files = [
        ("site-a", include_str!("../../../configs/site-a.toml")),
        ("site-b", include_str!("../../../configs/site-b.toml")),
    ];
    let seed = |text: &str| {
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        lines.flat_map(|line| [line, "\n"]).collect::<String>().into_bytes()
    };
    files.map(|(name, text)| (name, seed(text))).into()
}
