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
    let sections = concat!(include_str!("../src/config/sections.rs"), include_str!("../src/config/etcd.rs"));
    let keys = sections.lines().filter_map(|line| {
        let (key, _) = line.trim().strip_prefix("pub ")?.split_once(':')?;
        // An endpoint's parts are no keys.
        (!key.contains(' ') && !["tls", "host", "port"].contains(&key)).then_some(key)
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
    let (reference, _) = without_etcd(&reference);
    let spelled: String = reference
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest)
                if is_setting(rest)
                    && !["home_prefixes", "uefi_code", "image", "initrd", "api_socket", "templates"]
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

#[test]
fn the_commented_table_of_etcd_is_taken_with_its_defaults_spelled_out_and_without() {
    for site in ["site-a.toml", "site-b.toml"] {
        let text = std::fs::read_to_string(folder().join(site)).unwrap();
        let (rest, table) = without_etcd(&text);
        let line = |line: &str| line.strip_prefix("# ").filter(|rest| is_setting(rest)).map(str::to_owned);
        let settings: Vec<String> = table.lines().filter_map(line).collect();
        let parse = |settings: &[String]| {
            let chosen = rest.replace("# arbiter = \"none\"", "arbiter = \"etcd\"");
            let text = format!("{chosen}\n[etcd]\n{}\n", settings.join("\n"));
            Config::parse(Path::new(site), &text).unwrap_or_else(|error| panic!("{error}"))
        };
        let is_default = |line: &String| line.starts_with("prefix") || line.starts_with("timeout_ms");
        let (defaults, others): (Vec<_>, Vec<_>) = settings.iter().cloned().partition(is_default);
        assert_eq!((defaults.len(), others.len()), (2, 4));
        assert_eq!(format!("{:?}", parse(&settings)), format!("{:?}", parse(&others)));
        assert_eq!(parse(&others).etcd.unwrap().endpoints.len(), 3);
    }
}

/// The text without the commented table of etcd, and that table.
fn without_etcd(text: &str) -> (String, String) {
    let begin = text.find("# [etcd]\n").expect("the reference has the table");
    let end = begin + text[begin..].find("\n\n").expect("an empty line ends it");
    (format!("{}{}", &text[..begin], &text[end..]), text[begin..end].to_owned())
}

/// `key = value`, and not a sentence that quotes one.
fn is_setting(line: &str) -> bool {
    let Some((key, _)) = line.split_once(" = ") else { return false };
    key.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}
