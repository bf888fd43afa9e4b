//! How long an operator lets a tunnel stay, as it is written in a configuration or on a command line.
//!
//! Only the words. What a tunnel does when the time is over is not said here.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

const UNTIL_DRAINED: &str = "until-drained";
const UNITS: [(&str, u64); 4] = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];

/// `until-drained`, or a time such as `24h` (units `s`, `m`, `h`, `d`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HoldLimit {
    /// As long as somebody needs it.
    #[default]
    UntilDrained,
    /// So long after the hand-over at most, in whole seconds.
    AtMost(Duration),
}

/// The words are none of those.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no time to hold a tunnel; write \"until-drained\", or a number with s, m, h or d such as \"24h\""
)]
pub struct NoHoldLimit(pub String);

impl HoldLimit {
    /// As the flow table takes it.
    pub fn limit(self) -> Option<Duration> {
        match self {
            Self::UntilDrained => None,
            Self::AtMost(limit) => Some(limit),
        }
    }
}

impl FromStr for HoldLimit {
    type Err = NoHoldLimit;

    fn from_str(text: &str) -> Result<Self, NoHoldLimit> {
        if text == UNTIL_DRAINED {
            return Ok(Self::UntilDrained);
        }
        let parse = |(unit, secs): &(&str, u64)| {
            let number = text.strip_suffix(unit)?;
            let digits = number.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| number.parse::<u64>().ok()?.checked_mul(*secs)).flatten()
        };
        let secs = UNITS.iter().find_map(parse).ok_or_else(|| NoHoldLimit(text.into()))?;
        Ok(Self::AtMost(Duration::from_secs(secs)))
    }
}

impl fmt::Display for HoldLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secs = match self {
            Self::UntilDrained => return f.write_str(UNTIL_DRAINED),
            Self::AtMost(limit) => limit.as_secs(),
        };
        let whole = UNITS.iter().find(|(_, unit)| secs > 0 && secs.is_multiple_of(*unit));
        let (name, unit) = whole.copied().unwrap_or(("s", 1));
        write!(f, "{}{name}", secs / unit)
    }
}

impl TryFrom<String> for HoldLimit {
    type Error = NoHoldLimit;

    fn try_from(text: String) -> Result<Self, NoHoldLimit> {
        text.parse()
    }
}

impl From<HoldLimit> for String {
    fn from(limit: HoldLimit) -> Self {
        limit.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_reads_as_it_is_written() {
        let secs = |text: &str| text.parse::<HoldLimit>().unwrap().limit().map(|limit| limit.as_secs());
        assert_eq!(secs("until-drained"), None);
        assert_eq!((secs("24h"), secs("90s"), secs("0s")), (Some(86_400), Some(90), Some(0)));
        for (text, shown) in [("24h", "1d"), ("90s", "90s"), ("0s", "0s"), ("36h", "36h"), ("120s", "2m")] {
            assert_eq!(text.parse::<HoldLimit>().unwrap().to_string(), shown);
        }
        assert_eq!(HoldLimit::default().to_string(), "until-drained");
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        for text in ["", "h", "24", "1.5h", "-1h", "+1h", "24H", "1h30m", "drained", "18446744073709551615d"]
        {
            assert_eq!(text.parse::<HoldLimit>(), Err(NoHoldLimit(text.into())));
        }
    }

    #[test]
    fn a_configuration_may_say_it() {
        #[derive(Deserialize)]
        struct Section {
            hold: HoldLimit,
        }
        let section: Section = toml::from_str("hold = \"24h\"").unwrap();
        assert_eq!(section.hold, HoldLimit::AtMost(Duration::from_secs(86_400)));
        assert!(toml::from_str::<Section>("hold = \"for ever\"").is_err());
    }
}
