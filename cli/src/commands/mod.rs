//! One command a file.

mod attestations;
pub(crate) mod build;
pub(crate) mod builds;
pub(crate) mod cache_mount;
mod call;
mod confinement;
pub(crate) mod containers;
pub(crate) mod copy;
pub(crate) mod cp;
pub(crate) mod diff;
pub(crate) mod doctor;
pub(crate) mod du;
pub(crate) mod export;
pub(crate) mod flatten;
pub(crate) mod fsck;
pub(crate) mod gc;
pub(crate) mod history;
pub(crate) mod image;
pub(crate) mod images;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod layer;
pub(crate) mod load;
pub(crate) mod login;
pub(crate) mod manifest;
pub(crate) mod mutate;
mod outputs;
mod proxies;
pub(crate) mod prune;
pub(crate) mod pull;
pub(crate) mod push;
pub(crate) mod registry_serve;
pub(crate) mod rmi;
pub(crate) mod run;
pub(crate) mod save;
pub(crate) mod search;
pub(crate) mod selftest;
pub(crate) mod shell;
pub(crate) mod tag;
mod watch;
pub(crate) mod why;

use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::errors::Failure;

/// Writes to standard output; a reader that went away is no error, a full disk is.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::output(&error)),
        _ => Ok(()),
    }
}

/// `NAME=VALUE`, or `NAME` with the value of the environment; `None` when it has none there.
fn pair(text: &str, what: &str) -> Result<Option<(String, String)>, Failure> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, std::env::var(text).ok()),
    };
    if name.is_empty() {
        return Err(Failure::usage(format!("{what} {text:?} has no name in front of `=`")));
    }
    Ok(value.map(|value| (name.to_owned(), value)))
}

/// The program that `--runtime` names: a path, or a name that is looked up as a shell does.
fn runtime(name: &Path) -> Result<PathBuf, Failure> {
    let is_program = |path: &PathBuf| {
        path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    let places: Vec<PathBuf> = if name.components().count() > 1 || name.is_absolute() {
        std::path::absolute(name).into_iter().collect()
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).chain(["/usr/sbin".into()]).map(|dir| dir.join(name)).collect()
    };
    places.into_iter().find(is_program).ok_or_else(|| {
        Failure::usage(format!("--runtime {}: there is no such program", name.display()))
            .hint("Debian has packages `crun` and `runc`")
    })
}

/// Sizes as docker shows them: 1000s, about three digits.
fn human_size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            let digits = if unit == "B" || value >= 100.0 {
                0
            } else if value >= 10.0 {
                1
            } else {
                2
            };
            return format!("{value:.digits$}{unit}");
        }
        value /= 1000.0;
    }
    format!("{value:.2}TB")
}

/// Columns three blanks apart, as docker prints them.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        out.push_str(cells.collect::<Vec<_>>().join("   ").trim_end());
        out.push('\n');
    }
    out
}

/// How long ago, in the largest unit that says enough.
fn ago(created_unix: i64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seconds = u64::try_from(i64::try_from(now.as_secs()).unwrap_or(i64::MAX) - created_unix).unwrap_or(0);
    let (count, unit) = match seconds {
        0..120 => (seconds, "second"),
        120..7200 => (seconds / 60, "minute"),
        7200..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_in_docker() {
        for (bytes, text) in
            [(0, "0B"), (999, "999B"), (1500, "1.50kB"), (123_456_789, "123MB"), (7_340_000_000, "7.34GB")]
        {
            assert_eq!(human_size(bytes), text);
        }
    }

    #[test]
    fn tables_align() {
        let rows = [vec!["A".to_owned(), "B".to_owned()], vec!["long".to_owned(), "x".to_owned()]];
        assert_eq!(table(&rows), "A      B\nlong   x\n");
    }
}
