//! Arguments of the commands that look after the store.

use std::time::Duration;

use clap::{Args, ValueEnum};

// How much may be unpacked.
#[derive(Args)]
pub(crate) struct LimitArgs {
    /// Unpack layers and archives of up to this size, however well they are packed (100GB, 50%)
    /// [default: 64GiB, and 1GiB of what is packed better than 1000 to 1]
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_layer: Option<Size>,
}

#[derive(Args)]
pub(crate) struct DuArgs {
    /// Every image, layer and cache mount
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct GcArgs {
    /// Only tell what would be removed, and why
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Remove cache until the store takes no more than this (20GB, 20GiB, 10%)
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_store: Option<Size>,
    /// Remove cache until this much of the file system is free
    #[arg(long, value_name = "SIZE")]
    pub(crate) min_free: Option<Size>,
    /// Remove cache that was not used for this long (7d, 12h, 30m); with a limit, only such cache
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) keep_duration: Option<Duration>,
    /// Tell of what stays, too
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct PruneArgs {
    /// Also images that no container uses, and all of the cache
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
}

#[derive(Args)]
pub(crate) struct FsckArgs {
    /// Read every blob and every file, and compare them with what they should be
    #[arg(long)]
    pub(crate) deep: bool,
    /// Make the index anew from its journal first
    #[arg(long)]
    pub(crate) rebuild: bool,
    /// Forget what is damaged, so that the next build or load makes it anew
    #[arg(long)]
    pub(crate) repair: bool,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// So many bytes, or a part of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    Bytes(u64),
    Percent(u64),
}

impl Size {
    /// Bytes, on a file system of so many.
    pub(crate) fn bytes(self, whole_bytes: u64) -> u64 {
        match self {
            Size::Bytes(bytes) => bytes,
            Size::Percent(percent) => whole_bytes / 100 * percent,
        }
    }
}

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no size such as 500MB, 20GiB or 10%");
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let unit = unit.trim_start().to_ascii_lowercase();
        if unit == "%" {
            return if number <= 100 { Ok(Size::Percent(number)) } else { Err(wrong()) };
        }
        let factor: u64 = match unit.as_str() {
            "" | "b" => 1,
            "k" | "kb" => 1000,
            "m" | "mb" => 1000_u64.pow(2),
            "g" | "gb" => 1000_u64.pow(3),
            "t" | "tb" => 1000_u64.pow(4),
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            "tib" => 1 << 40,
            _ => return Err(wrong()),
        };
        number.checked_mul(factor).map(Size::Bytes).ok_or_else(wrong)
    }
}

/// `7d`, `12h`, `1h30m`, `90s`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time such as 7d, 12h or 1h30m");
    let mut seconds: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let mut tail = tail.chars();
        let factor = match tail.next() {
            Some('w') => 7 * 86_400,
            Some('d') => 86_400,
            Some('h') => 3600,
            Some('m') => 60,
            Some('s') => 1,
            _ => return Err(wrong()),
        };
        let part = number.checked_mul(factor).ok_or_else(wrong)?;
        seconds = seconds.checked_add(part).ok_or_else(wrong)?;
        rest = tail.as_str();
    }
    if text.is_empty() { Err(wrong()) } else { Ok(Duration::from_secs(seconds)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_both_kinds() {
        for (text, expected) in [
            ("0", Size::Bytes(0)),
            ("1500", Size::Bytes(1500)),
            ("2kB", Size::Bytes(2000)),
            ("2 KiB", Size::Bytes(2048)),
            ("20g", Size::Bytes(20_000_000_000)),
            ("1TiB", Size::Bytes(1 << 40)),
            ("10%", Size::Percent(10)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["", "GB", "-1", "1.5GB", "10PB", "101%", "99999999999TB", "1 0"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size::Percent(10).bytes(1000), 100);
    }

    #[test]
    fn times_are_numbers_with_units() {
        for (text, expected) in [("90s", 90), ("1h30m", 5400), ("7d", 604_800), ("1w1s", 604_801), ("0s", 0)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(expected)), "{text}");
        }
        for text in ["", "7", "d", "1.5h", "-1h", "1y", "99999999999999999999d", "9999999999999999d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
