//! Moments, as docker writes them.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Nanoseconds since 1970; 0 stands for never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Time(i64);

impl Time {
    /// Never.
    pub const NEVER: Self = Self(0);

    /// Now.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
    }

    /// A moment so many nanoseconds after 1970.
    pub fn from_nanos(nanos: i64) -> Self {
        Self(nanos)
    }

    /// Seconds since 1970.
    pub fn unix(self) -> i64 {
        self.0.div_euclid(1_000_000_000)
    }

    /// How long after `earlier` this is; zero when it is before.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// So much earlier.
    pub fn before(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(by.as_nanos()).unwrap_or(i64::MAX)))
    }
}

impl fmt::Display for Time {
    /// RFC 3339 with nanoseconds; never is the year 1.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::NEVER {
            return f.write_str("0001-01-01T00:00:00Z");
        }
        match jiff::Timestamp::from_nanosecond(self.0.into()) {
            Ok(time) => write!(f, "{time:.9}"),
            Err(_) => f.write_str("0001-01-01T00:00:00Z"),
        }
    }
}

/// The text is no moment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no time such as 2026-01-31T12:00:00Z, 1769860800 or 10m (ago)")]
pub struct TimeError(String);

impl FromStr for Time {
    type Err = TimeError;

    /// RFC 3339 with or without time and zone, seconds since 1970 with a fraction, or how long ago.
    fn from_str(text: &str) -> Result<Self, TimeError> {
        let wrong = || TimeError(text.to_owned());
        if let Some(ago) = parse_duration(text) {
            return Ok(Self::now().before(ago));
        }
        if text.bytes().all(|b| b.is_ascii_digit() || b == b'.') && !text.is_empty() {
            let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
            let fraction: String = fraction.chars().chain("000000000".chars()).take(9).collect();
            let nanos = seconds.parse::<i64>().ok().and_then(|seconds| seconds.checked_mul(1_000_000_000));
            let fraction: i64 = fraction.parse().map_err(|_| wrong())?;
            return nanos.and_then(|nanos| nanos.checked_add(fraction)).map(Self).ok_or_else(wrong);
        }
        let spelled = match text.len() {
            10 => format!("{text}T00:00:00Z"),
            _ if text.ends_with('Z') || text[text.len().min(11)..].contains(['+', '-']) => text.to_owned(),
            _ => format!("{text}Z"),
        };
        let time: jiff::Timestamp = spelled.parse().map_err(|_| wrong())?;
        i64::try_from(time.as_nanosecond()).map(Self).map_err(|_| wrong())
    }
}

/// A duration as Go writes it: `1h30m`, `1.5s`, `100ms`; `None` when it is none.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let units =
        [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let mut rest = text;
    let mut seconds = 0.0;
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let (_, unit) = units.iter().find(|(name, _)| *name == &rest[..end])?;
        seconds += number * unit;
        rest = &rest[end..];
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_written() {
        let time: Time = "2026-01-31T12:00:00.5Z".parse().unwrap();
        assert_eq!(time.to_string(), "2026-01-31T12:00:00.500000000Z");
        assert_eq!("1769860800.5".parse::<Time>().unwrap(), time);
        assert_eq!("2026-01-31T12:00:00.5".parse::<Time>().unwrap(), time);
        assert_eq!("2026-01-31T13:00:00.5+01:00".parse::<Time>().unwrap(), time);
        assert_eq!("2026-01-31".parse::<Time>().unwrap().unix(), 1_769_817_600);
        assert_eq!(Time::NEVER.to_string(), "0001-01-01T00:00:00Z");
        let ago = Time::now().since("10m".parse().unwrap()).as_secs();
        assert!((599..660).contains(&ago), "{ago}");
        for bad in ["", "yesterday", "10x", "2026-13-01", "ä"] {
            assert!(bad.parse::<Time>().is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_gos() {
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(parse_duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(parse_duration("100ms"), Some(Duration::from_millis(100)));
        assert_eq!(parse_duration("5"), None);
        assert_eq!(parse_duration("s"), None);
    }
}
