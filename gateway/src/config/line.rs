//! Where a key stands in the file, for messages about values that were read without a fault.

use toml::de::{DeTable, DeValue};

/// The line, from 1, of `key` (`link.rate_mbit`, `peer.b.may_send`) in `text`: of its value, or of the innermost
/// table that is there. A peer is found by its name.
pub(super) fn line_of(text: &str, key: &str) -> usize {
    let at = offset(text, key).unwrap_or(0).min(text.len());
    text.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count() + 1
}

fn offset(text: &str, key: &str) -> Option<usize> {
    let mut value = DeValue::Table(DeTable::parse(text).ok()?.into_inner());
    let mut found = None;
    let mut rest = key;
    while !rest.is_empty() {
        let next = match value {
            DeValue::Table(mut table) => {
                // A table's own name may hold dots: the longest that is there is meant.
                let names = rest.match_indices('.').map(|(at, _)| at).chain([rest.len()]);
                let Some(end) = names.rev().find(|&end| table.contains_key(&rest[..end])) else {
                    return found;
                };
                let next = table.remove(&rest[..end])?;
                rest = rest[end..].trim_start_matches('.');
                next
            }
            DeValue::Array(entries) => {
                let (name, after) = rest.split_once('.').unwrap_or((rest, ""));
                let named = |entry: &DeValue<'_>| {
                    let DeValue::Table(table) = entry else { return false };
                    table.get("name").and_then(|it| it.get_ref().as_str()) == Some(name)
                };
                // Of two that are called alike, the second is the one too many.
                let Some(next) = entries.into_iter().rfind(|it| named(it.get_ref())) else { return found };
                rest = after;
                next
            }
            DeValue::String(_)
            | DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_) => return found,
        };
        found = Some(next.span().start);
        value = next.into_inner();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_its_table_its_peer_or_its_dotted_name() {
        let text = "[site]\nname = \"a\"\n[lan.\"x.y\"]\nbridge = \"b\"\n[[peer]]\nname = \"b\"\n[[peer]]\nname = \"c\"\nkey = \"k\"\n";
        assert_eq!(line_of(text, "site.name"), 2);
        assert_eq!(line_of(text, "lan.x.y.bridge"), 4);
        assert_eq!(line_of(text, "peer.c.key"), 9);
        assert_eq!(line_of(text, "peer.b.key"), 5, "the table that lacks it");
        assert_eq!(line_of(text, "dns.zone"), 1);
    }
}
