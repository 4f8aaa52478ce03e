//! What is known of each snapshot, beside the index and its journal: for the day when both are lost.
//!
//! ```text
//! records/<snapshot>    records that name it, and names that lead to it, a journal line each
//! records/_             images without files
//! ```
//! Written after a change is committed, as hints: what cannot be written is done without. Lines are
//! ordered by the clock, and each says what was true then. The files go with their snapshots.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rusqlite::Connection;
use rusqlite::types::Value;
use rustix::fs::syncfs;

use crate::Error;
use crate::journal::{Replay, write_put_at};
use crate::tables::TABLES;

/// Where the files are.
pub(crate) const DIR: &str = "records";
/// Becomes [`DIR`].
const NEW: &str = "records.new";
/// The file of images without files.
pub(crate) const NONE: &str = "_";

const MAGIC: &str = "kiln-records";
const VERSION: i64 = 1;

/// What a transaction has to say about snapshots.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    lines: BTreeMap<String, Vec<u8>>,
    gone: Vec<String>,
}

impl Notes {
    /// Where to add lines about a snapshot.
    pub(crate) fn about(&mut self, snapshot: String) -> &mut Vec<u8> {
        self.lines.entry(snapshot).or_default()
    }

    /// Nothing is to be known of a snapshot any more.
    pub(crate) fn forget(&mut self, snapshot: &str) {
        self.lines.remove(snapshot);
        self.gone.push(snapshot.to_owned());
    }

    /// Writes them down. Costs three system calls a snapshot.
    pub(crate) fn write(self, root: &Path) {
        let dir = root.join(DIR);
        for snapshot in self.gone {
            let _ = fs::remove_file(dir.join(snapshot));
        }
        for (snapshot, lines) in self.lines {
            let _ = append(&dir.join(snapshot), lines);
        }
    }

    /// Writes the lines into a directory that becomes [`DIR`] when all of them are on the disk.
    fn write_anew(self, root: &Path) -> io::Result<()> {
        let new = root.join(NEW);
        match fs::remove_dir_all(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => DirBuilder::new().mode(0o700).create(&new)?,
        }
        let is_any = !self.lines.is_empty();
        for (snapshot, lines) in self.lines {
            append(&new.join(snapshot), lines)?;
        }
        if is_any {
            syncfs(File::open(&new)?)?;
        }
        fs::rename(&new, root.join(DIR))
    }
}

fn append(path: &Path, lines: Vec<u8>) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    let mut bytes = Vec::new();
    if file.metadata()?.len() == 0 {
        bytes = format!("{MAGIC} {VERSION}\n").into_bytes();
    }
    bytes.extend_from_slice(&lines);
    file.write_all(&bytes)
}

/// Nanoseconds since 1970, to put lines of several files in order.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Whether there is anything to make an index of.
pub(crate) fn any(root: &Path) -> bool {
    fs::read_dir(root.join(DIR)).is_ok_and(|mut files| files.next().is_some())
}

/// Writes down everything that is in `db`, for a store that never did. Inside a write transaction,
/// which keeps others from doing the same. What cannot be written now is another time.
///
/// # Errors
/// [`Error::Db`].
pub(crate) fn write_all(root: &Path, db: &Connection) -> Result<(), Error> {
    if root.join(DIR).exists() {
        return Ok(());
    }
    let owner = "(SELECT snapshot FROM image WHERE image.config = name.config)";
    let mut notes = Notes::default();
    for table in TABLES {
        let columns = table.columns.join(", ");
        let about = match table.name {
            "name" => owner,
            _ if table.columns.contains(&"snapshot") => "snapshot",
            _ => continue,
        };
        let mut query =
            db.prepare(&format!("SELECT {columns}, coalesce({about}, ?1) FROM {}", table.name))?;
        let mut rows = query.query([NONE])?;
        while let Some(row) = rows.next()? {
            let count = table.columns.len();
            let values: Vec<Value> = (0..count).map(|at| row.get(at)).collect::<Result<_, _>>()?;
            write_put_at(notes.about(row.get(count)?), table, &values, now());
        }
    }
    if notes.write_anew(root).is_err() {
        // It would take space, which may be what is wanting.
        let _ = fs::remove_dir_all(root.join(NEW));
    }
    Ok(())
}

/// Puts everything that is written beside snapshots into `db`; how many lines could not be read.
///
/// # Errors
/// [`Error::NewerStore`], [`Error::Host`], [`Error::Db`].
pub(crate) fn replay(root: &Path, db: &Connection) -> Result<usize, Error> {
    let dir = root.join(DIR);
    let mut all = Replay::default();
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        other => other.map_err(Error::host("read", &dir))?,
    };
    for entry in entries {
        let path: PathBuf = entry.map_err(Error::host("read", &dir))?.path();
        let bytes = fs::read(&path).map_err(Error::host("read", &path))?;
        let end = bytes.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let (header, lines) = bytes.split_at(end);
        if let Some(found) = version(header)
            && found > VERSION
        {
            return Err(Error::NewerStore { path: root.to_owned(), found, known: VERSION });
        }
        // Without a header all are lines.
        all.add(if version(header).is_some() { lines } else { &bytes });
    }
    all.sort_by_time();
    all.apply_all(db)?;
    Ok(all.damaged)
}

fn version(header: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(header).ok()?;
    text.strip_prefix(MAGIC)?.trim().parse().ok()
}
