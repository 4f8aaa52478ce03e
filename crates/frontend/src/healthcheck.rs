//! HEALTHCHECK: its test, and durations as Go writes them.

use kiln_oci::image::RunConfig;
use serde_json::{Map, Value};

/// What HEALTHCHECK says; durations in nanoseconds, 0: inherited.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Healthcheck {
    /// `NONE`, or `CMD` or `CMD-SHELL` and what to run.
    pub(crate) test: Vec<String>,
    pub(crate) interval: i64,
    pub(crate) timeout: i64,
    pub(crate) start_period: i64,
    pub(crate) start_interval: i64,
    pub(crate) retries: i64,
}

impl Healthcheck {
    /// Puts it into an image config.
    pub(crate) fn apply(&self, config: &mut RunConfig) {
        let mut json = Map::new();
        json.insert("Test".to_owned(), self.test.clone().into());
        let numbers = [
            ("Interval", self.interval),
            ("Timeout", self.timeout),
            ("StartPeriod", self.start_period),
            ("StartInterval", self.start_interval),
            ("Retries", self.retries),
        ];
        for (name, number) in numbers {
            if number != 0 {
                json.insert(name.to_owned(), number.into());
            }
        }
        config.healthcheck = Some(Value::Object(json));
    }

    /// As BuildKit writes it into the history: Go's `%+v`.
    pub(crate) fn history(&self) -> String {
        format!(
            "HEALTHCHECK {{Test:[{}] Interval:{} Timeout:{} StartPeriod:{} StartInterval:{} Retries:{}}}",
            self.test.join(" "),
            format_duration(self.interval),
            format_duration(self.timeout),
            format_duration(self.start_period),
            format_duration(self.start_interval),
            self.retries
        )
    }
}

const UNITS: [(&str, i64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// The shortest interval docker takes.
const LEAST: i64 = 1_000_000;

/// Reads `1h30m`, `1.5s`, `0`: 0 or at least a millisecond, in nanoseconds.
pub(crate) fn parse_interval(text: &str) -> Result<i64, String> {
    let nanoseconds =
        parse_duration(text).ok_or_else(|| format!("{text:?} is no duration like 30s, 1m30s or 500ms"))?;
    match nanoseconds {
        0 => Ok(0),
        n if n < 0 => Err(format!("{text:?} is negative")),
        n if n < LEAST => Err(format!("{text:?} is shorter than a millisecond")),
        n => Ok(n),
    }
}

fn parse_duration(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Some(0);
    }
    let mut total: i64 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(end);
        let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (_, unit) = UNITS.iter().find(|(name, _)| *name == &after[..unit_end])?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') || fraction.len() > 18 {
            return None;
        }
        let whole: i64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        let mut part = whole.checked_mul(*unit)?;
        if !fraction.is_empty() {
            let digits: i128 = fraction.parse().ok()?;
            let scale = 10i128.pow(fraction.len() as u32);
            part = part.checked_add(i64::try_from(digits * i128::from(*unit) / scale).ok()?)?;
        }
        total = total.checked_add(part)?;
        rest = &after[unit_end..];
    }
    Some(if negative { -total } else { total })
}

/// `1h30m0s`, `1.5s`, `500ms`, `0s`: as Go prints a duration.
fn format_duration(nanoseconds: i64) -> String {
    let fraction = |value: i64, unit: i64| {
        let text = format!("{:.9}", value as f64 / unit as f64);
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match nanoseconds {
        0 => "0s".to_owned(),
        n if n < 1_000 => format!("{n}ns"),
        n if n < 1_000_000 => format!("{}µs", fraction(n, 1_000)),
        n if n < 1_000_000_000 => format!("{}ms", fraction(n, 1_000_000)),
        n => {
            let (minutes, rest) = (n / 60_000_000_000, n % 60_000_000_000);
            let seconds = format!("{}s", fraction(rest, 1_000_000_000));
            match (minutes / 60, minutes % 60) {
                (0, 0) => seconds,
                (0, minutes) => format!("{minutes}m{seconds}"),
                (hours, minutes) => format!("{hours}h{minutes}m{seconds}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_in_go() {
        for (text, nanoseconds) in [
            ("0", 0),
            ("30s", 30_000_000_000),
            ("1m30s", 90_000_000_000),
            ("1.5h", 5_400_000_000_000),
            ("500ms", 500_000_000),
            (".5s", 500_000_000),
            ("1000us", 1_000_000),
            ("+1s", 1_000_000_000),
        ] {
            assert_eq!(parse_interval(text), Ok(nanoseconds), "{text}");
        }
        for text in ["", "-1s", "1", "1x", "s", "1.2.3s", "1us", "-", "99999999999999h", "1 s"] {
            assert!(parse_interval(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_written_as_in_go() {
        for (nanoseconds, text) in [
            (0, "0s"),
            (90_000_000_000, "1m30s"),
            (5_400_000_000_000, "1h30m0s"),
            (1_500_000_000, "1.5s"),
            (500_000_000, "500ms"),
        ] {
            assert_eq!(format_duration(nanoseconds), text);
        }
    }
}
