//! Reads a machine's definition from TOML and says where a fault is: file, line, key, what was expected.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use longhaul_core::machine::{DefinitionDraft, InvalidDefinition, MachineDefinition};
use toml::de::{DeTable, DeValue};

/// A definition file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionFileError {
    /// The file cannot be read.
    #[error("Cannot read the definition {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is not TOML, or a value in it is not what the schema wants.
    #[error("{}:{line}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The key and what was expected, in one line.
        message: String,
    },
    /// Its values are well formed but do not make a machine.
    #[error("{}:{line}: {fault}", path.display())]
    Unsound {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The field and what was expected.
        #[source]
        fault: InvalidDefinition,
    },
}

/// Reads and checks the definition in `path`.
pub fn read_definition(path: &Path) -> Result<MachineDefinition, DefinitionFileError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| DefinitionFileError::Read { path: path.to_owned(), source })?;
    parse_definition(&text, path)
}

/// Checks the definition in `text`; `path` is what errors call it.
pub fn parse_definition(text: &str, path: &Path) -> Result<MachineDefinition, DefinitionFileError> {
    let draft: DefinitionDraft = toml::from_str(text).map_err(|error| syntax(text, path, &error))?;
    draft.validate().map_err(|fault| {
        let line = line_at(text, span_of(text, &fault.field));
        DefinitionFileError::Unsound { path: path.to_owned(), line, fault }
    })
}

fn syntax(text: &str, path: &Path, error: &toml::de::Error) -> DefinitionFileError {
    let line = line_at(text, error.span());
    let message = error.message().trim().replace('\n', ", ");
    let key = text.lines().nth(line - 1).and_then(|line| line.split_once('=')).map(|(key, _)| key.trim());
    let message = match key {
        Some(key) if !message.contains(&format!("`{key}`")) => format!("{key}: {message}"),
        Some(_) | None => message,
    };
    DefinitionFileError::Syntax { path: path.to_owned(), line, message }
}

fn line_at(text: &str, span: Option<Range<usize>>) -> usize {
    let end = span.map_or(0, |span| span.start.min(text.len()));
    text.as_bytes()[..end].iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// Where the value of `field` (`disks[1].pci`) stands, or the innermost table that is there.
fn span_of(text: &str, field: &str) -> Option<Range<usize>> {
    let root = DeTable::parse(text).ok()?;
    let mut span = None;
    let mut value = DeValue::Table(root.into_inner());
    for part in field.split(['.', '[']) {
        let next = match (part.strip_suffix(']'), value) {
            (Some(index), DeValue::Array(items)) => match items.into_iter().nth(index.parse().ok()?) {
                Some(next) => next,
                None => return span,
            },
            (None, DeValue::Table(mut table)) => match table.remove(part) {
                Some(next) => next,
                None => return span,
            },
            (_, _) => return span,
        };
        span = Some(next.span());
        value = next.into_inner();
    }
    span
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"name = "web1"
machine = "pc-q35-7.2"
vcpus = 1
memory_mib = 64

[[disks]]
name = "root"
size_bytes = 1048576
pci = "04.0"

[[disks]]
name = "data"
size_bytes = 1048576
pci = "05.0"

[[nics]]
name = "lan"
mac = "52:54:00:12:34:56"
home = ["198.51.100.10/24"]
lan = "servers"
pci = "06.0"
"#;

    #[track_caller]
    fn fault(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from));
        parse_definition(&GOOD.replacen(from, to, 1), Path::new("web1.toml")).unwrap_err().to_string()
    }

    #[test]
    fn a_fault_names_file_line_key_and_expectation() {
        assert!(parse_definition(GOOD, Path::new("web1.toml")).is_ok());
        let text = fault("pc-q35-7.2", "q35");
        assert!(text.starts_with("web1.toml:2: machine: ") && text.contains("pc-q35-7.2"), "{text}");
        let text = fault("vcpus = 1", "vcpus = 0");
        assert_eq!(text, "web1.toml:3: vcpus: expected 1 to 1024, found 0");
        let text = fault("memory_mib = 64", "memory_mib = \"64M\"");
        assert!(text.starts_with("web1.toml:4: memory_mib: ") && text.contains("expected u64"), "{text}");
        let text = fault("05.0", "04.0");
        assert!(text.starts_with("web1.toml:14: disks[1].pci: ") && text.contains("disks[0].pci"), "{text}");
        let text = fault("\"04.0\"", "\"04.0\"\ntemplate = \"../etc\"");
        assert!(text.starts_with("web1.toml:10: template: ") && text.contains("template name"), "{text}");
        let text = fault("198.51.100.10/24", "198.51.100.10");
        assert!(text.starts_with("web1.toml:19: home: ") && text.contains("prefix length"), "{text}");
        let text = fault("lan = \"servers\"", "bridge = \"br0\"");
        assert!(text.starts_with("web1.toml:20: ") && text.contains("unknown field `bridge`"), "{text}");
        let text = fault("memory_mib = 64\n", "");
        assert!(text.contains("missing field `memory_mib`"), "{text}");
        let text = fault("name = \"web1\"", "name = web1");
        assert!(text.starts_with("web1.toml:1: "), "{text}");
    }
}
