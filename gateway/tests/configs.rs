//! The reference configurations load, and they mention every key there is.

use std::path::{Path, PathBuf};

use gateway::config::Config;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
}

#[test]
fn each_reference_configuration_loads() {
    let mut loaded = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            Config::load(&path).unwrap_or_else(|error| panic!("{error}"));
            loaded += 1;
        }
    }
    assert!(loaded >= 2);
}

#[test]
fn the_reference_mentions_every_key() {
    let reference = std::fs::read_to_string(folder().join("site-a.toml")).unwrap();
    let sections = include_str!("../src/config/sections.rs");
    let keys = sections.lines().filter_map(|line| {
        let (key, _) = line.trim().strip_prefix("pub ")?.split_once(':')?;
        (!key.contains(' ')).then_some(key)
    });
    let mut seen = 0;
    for key in keys {
        seen += 1;
        let mentioned = reference
            .lines()
            .any(|line| line.trim_start_matches("# ").split_once(" =").is_some_and(|(name, _)| name == key));
        assert!(mentioned, "configs/site-a.toml does not mention {key}");
    }
    assert!(seen > 30, "the keys were not found");
}

#[test]
fn commented_defaults_are_the_defaults() {
    let reference = std::fs::read_to_string(folder().join("site-a.toml")).unwrap();
    let spelled: String = reference
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest)
                if is_setting(rest)
                    && !["home_prefixes", "uefi_code", "image", "initrd", "api_socket"]
                        .iter()
                        .any(|key| rest.starts_with(key)) =>
            {
                format!("{rest}\n")
            }
            Some(_) | None => format!("{line}\n"),
        })
        .collect();
    let path = Path::new("site-a.toml");
    let spelled = Config::parse(path, &spelled).unwrap_or_else(|error| panic!("{error}"));
    let silent = Config::parse(path, &reference).unwrap();
    assert_eq!(format!("{spelled:?}"), format!("{silent:?}"));
}

/// `key = value`, and not a sentence that quotes one.
fn is_setting(line: &str) -> bool {
    let Some((key, _)) = line.split_once(" = ") else { return false };
    key.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}
