//! The builds' history: what ran, what did not and why, how long it took, what it printed.
//!
//! ```text
//! builds/log        a line a build, numbered from the first
//! builds/logs/ID/   what the steps of a build printed
//! builds/taken      results that garbage collection removed, and when
//! builds/lineages/, builds/lists/   what keys were made of: see `why/lineage.rs`
//! ```
//! Only its owner may read it. A build that changes nothing adds one line, without waiting for the disk:
//! a power cut may take the last lines, and a line that is damaged is passed over. Nothing in the store
//! depends on any of it.

pub(crate) mod logs;
pub(crate) mod taken;

pub use logs::read_log;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kiln_content::Space;
use serde::{Deserialize, Serialize};

use crate::why::Reason;

/// Version of the records.
const VERSION: u32 = 1;

/// Builds that are remembered.
pub const BUILDS: usize = 50;

/// A log beyond this size is written anew with the last builds only.
const LOG_BYTES: u64 = 1 << 20;

/// The first line: what this is, and the number of the build in the second.
const HEADER: &str = "kiln-builds 1 ";

/// A build that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildRecord {
    version: u32,
    /// Names its logs.
    pub id: String,
    /// Names what it is compared with: builds of the same Dockerfile, context, target and platform.
    pub lineage: String,
    /// When it began; seconds since 1970.
    pub at_unix: i64,
    /// How long it took.
    pub took_ms: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// The context, without passwords.
    pub context: String,
    /// The Dockerfile as the messages call it.
    pub dockerfile: String,
    /// `--target`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The image's ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Names that the image got.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Its steps in the Dockerfile's order, those that nobody asked for apart.
    pub steps: Vec<StepRecord>,
}

/// How a build ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should.
    Done,
    /// With an error.
    Failed,
    /// Somebody stopped it.
    Cancelled,
}

/// A step of a build that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRecord {
    /// As the progress shows it.
    pub title: String,
    /// What became of it.
    pub state: StepState,
    /// How long it ran.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub took_ms: u64,
    /// The most memory its processes had at a time; 0: not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub peak_memory_bytes: u64,
    /// Why it ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub why: Vec<Reason>,
    /// Whose cache it came from, if not this store's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Its log's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<usize>,
    /// First digits of the digest of what it does.
    pub op: String,
    /// First digits of a digest of the content that it read; empty: nobody asked.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub content: String,
}

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepState {
    /// Its result was there.
    Cached,
    /// It ran.
    Ran,
    /// It ran, and failed.
    Failed,
    /// It was stopped.
    Cancelled,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl StepRecord {
    /// Its stage and its number there.
    pub fn place(&self) -> Option<(&str, usize)> {
        crate::shell::stage_of(&self.title)
    }
}

impl BuildRecord {
    pub(crate) fn new(id: String, lineage: String, outcome: Outcome) -> Self {
        Self {
            version: VERSION,
            id,
            lineage,
            at_unix: 0,
            took_ms: 0,
            outcome,
            context: String::new(),
            dockerfile: String::new(),
            target: None,
            image: None,
            names: Vec::new(),
            steps: Vec::new(),
        }
    }

    /// The most memory that one of its steps had.
    pub fn peak_memory_bytes(&self) -> u64 {
        self.steps.iter().map(|step| step.peak_memory_bytes).max().unwrap_or(0)
    }

    /// How many of its steps came from the cache, and how many ran.
    pub fn counts(&self) -> (usize, usize) {
        let cached = self.steps.iter().filter(|step| step.state == StepState::Cached).count();
        (cached, self.steps.len() - cached)
    }
}

pub(crate) fn dir(root: &Path) -> PathBuf {
    root.join("builds")
}

fn log_path(root: &Path) -> PathBuf {
    dir(root).join("log")
}

/// The builds that are remembered, with their numbers, oldest first. Reads one file of a megabyte or so.
///
/// # Errors
/// When it is there and cannot be read.
pub fn builds(root: &Path) -> io::Result<Vec<(u64, BuildRecord)>> {
    let bytes = match fs::read(log_path(root)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let (first, lines) = lines(&bytes);
    let skip = lines.len().saturating_sub(BUILDS);
    let record = |(nth, line): (usize, &&[u8])| {
        let record: BuildRecord = serde_json::from_slice(line).ok()?;
        (record.version == VERSION).then_some((first + nth as u64, record))
    };
    Ok(lines.iter().enumerate().skip(skip).filter_map(record).collect())
}

/// The last build of a lineage.
pub(crate) fn last_of(root: &Path, lineage: &str) -> Option<BuildRecord> {
    let builds = builds(root).ok()?;
    builds.into_iter().rev().map(|(_, record)| record).find(|record| record.lineage == lineage)
}

/// The number of the first record, and the records.
fn lines(bytes: &[u8]) -> (u64, Vec<&[u8]>) {
    let mut lines = bytes.split(|&b| b == b'\n');
    let header = lines.next().and_then(|line| std::str::from_utf8(line).ok());
    let first = header.and_then(|line| line.strip_prefix(HEADER)?.parse().ok());
    (first.unwrap_or(1), lines.collect())
}

/// Writes a build down. What cannot be written is missing when somebody asks.
pub(crate) fn note(root: &Path, record: &BuildRecord) {
    let Ok(json) = serde_json::to_vec(record) else { return };
    let ran = record.steps.iter().any(|step| step.state != StepState::Cached);
    if ran && !has_room(root) {
        return;
    }
    let Ok(mut log) = append(&log_path(root)) else { return };
    let size = log.metadata().map_or(0, |stat| stat.len());
    let mut line = Vec::with_capacity(json.len() + 32);
    if size == 0 {
        line.extend_from_slice(format!("{HEADER}1").as_bytes());
    }
    // The line's end in front: what a power cut has torn ends here.
    line.push(b'\n');
    line.extend_from_slice(&json);
    // In one call: builds that end at once do not mix.
    let written = log.write_all(&line);
    if written.is_ok() && size > LOG_BYTES {
        shorten(root);
    }
}

/// Leaves the last builds, and of those half of what is too much. A build that ends meanwhile is forgotten.
fn shorten(root: &Path) {
    let Ok(bytes) = fs::read(log_path(root)) else { return };
    let (first, all) = lines(&bytes);
    let mut from = all.len().saturating_sub(BUILDS);
    let mut size: usize = all[from..].iter().map(|line| line.len()).sum();
    while size > LOG_BYTES as usize / 2 && from + 1 < all.len() {
        size -= all[from].len();
        from += 1;
    }
    let mut new = format!("{HEADER}{}", first + from as u64).into_bytes();
    for line in &all[from..] {
        new.push(b'\n');
        new.extend_from_slice(line);
    }
    let _ = replace(&log_path(root), &new);
}

/// Inodes and bytes that others may need more than the history does.
const ROOM_INODES: u64 = 256;
const ROOM_BYTES: u64 = 16 << 20;

/// Whether there is room for more than the builds' log: on a full disk the last inodes are for whoever
/// makes room.
pub(crate) fn has_room(root: &Path) -> bool {
    let has_room = |space: Space| {
        space.free_inodes.is_none_or(|inodes| inodes > ROOM_INODES) && space.free_bytes > ROOM_BYTES
    };
    Space::of(root).is_ok_and(has_room)
}

/// Opens a file that grows; makes its directory when that is not there.
fn append(path: &Path) -> io::Result<File> {
    with_dir(path, || OpenOptions::new().append(true).create(true).mode(0o600).open(path))
}

/// Writes a file anew; whoever reads it sees the old one or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.{}.new", std::process::id()));
    let create = || OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
    let written = with_dir(&new, create).and_then(|mut file| file.write_all(bytes));
    written.and_then(|()| fs::rename(&new, path)).inspect_err(|_| drop(fs::remove_file(&new)))
}

/// Does something in the directory of `path`; makes that when it is not there.
pub(crate) fn with_dir<T>(path: &Path, mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match work() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let dir = path.parent().unwrap_or(path);
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            work()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> BuildRecord {
        BuildRecord::new(id.to_owned(), "lineage".to_owned(), Outcome::Done)
    }

    fn ids(root: &Path) -> Vec<(u64, String)> {
        builds(root).unwrap().into_iter().map(|(number, record)| (number, record.id)).collect()
    }

    #[test]
    fn builds_have_numbers_that_stay() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ids(dir.path()), []);
        for number in 1..=BUILDS + 3 {
            note(dir.path(), &record(&number.to_string()));
        }
        let last = ids(dir.path());
        assert_eq!(last.len(), BUILDS);
        assert!(last.iter().all(|(number, id)| number.to_string() == *id), "{last:?}");
        shorten(dir.path());
        assert_eq!(ids(dir.path()), last);
        note(dir.path(), &record("54"));
        assert_eq!(ids(dir.path()).last(), Some(&(54, "54".to_owned())));
    }

    #[test]
    fn the_log_does_not_grow_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut large = record("large");
        large.context = "x".repeat(100_000);
        for _ in 0..60 {
            note(dir.path(), &large);
        }
        assert!(fs::metadata(log_path(dir.path())).unwrap().len() < 2 * LOG_BYTES);
        assert_eq!(ids(dir.path()).last().map(|(number, _)| *number), Some(60));
    }

    #[test]
    fn torn_and_foreign_lines_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        note(dir.path(), &record("1"));
        let whole = fs::read(log_path(dir.path())).unwrap();
        for end in 0..whole.len() {
            fs::write(log_path(dir.path()), &whole[..end]).unwrap();
            assert!(builds(dir.path()).unwrap().is_empty(), "{end} bytes");
        }
        // What comes after a torn line is whole.
        note(dir.path(), &record("2"));
        assert_eq!(ids(dir.path()), [(2, "2".to_owned())]);
        let mut newer = record("3");
        newer.version = VERSION + 1;
        note(dir.path(), &newer);
        assert_eq!(ids(dir.path()), [(2, "2".to_owned())]);
    }
}
