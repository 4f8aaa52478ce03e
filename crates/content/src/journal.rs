//! The journal: every change of a record, in one file that only grows, so that the index can be
//! made anew.
//!
//! ```text
//! kiln-journal 1 <generation>
//! <checksum> {"put":"name","row":{"reference":"…","config":"…"},"boot":"…"}
//! <checksum> {"delete":"name","column":"reference","value":"…"}
//! <checksum> {"barrier":<bytes>,"boot":"…"}
//! ```
//! Lines are written inside the transaction that makes the change, just before it is committed: the
//! order of lines is the order of commits. A barrier says that the changes of its boot in the first
//! so many bytes have reached the disk. The index knows how long the journal was at its last
//! commit; what is longer was lost by the index, or never finished, and is taken into it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::reserve;
use crate::tables::{self, Existing, TABLES, Table, checksum};

const MAGIC: &str = "kiln-journal";
const VERSION: i64 = 1;
/// Below this the journal is never rewritten.
const COMPACT_BYTES: u64 = 4 << 20;
/// It is rewritten when it has grown to this many times what it was after the last time.
const COMPACT_GROWTH: u64 = 4;

type Row = serde_json::Map<String, serde_json::Value>;

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Put {
        put: String,
        row: Row,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        boot: Option<String>,
        /// When; only beside snapshots, where the order of lines is not that of changes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<i64>,
    },
    Delete {
        delete: String,
        column: String,
        value: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<i64>,
    },
    Barrier {
        barrier: u64,
        boot: String,
    },
}

pub(crate) fn write_put(out: &mut Vec<u8>, table: &Table, values: &[Value], boot: Option<&str>) {
    write_line(out, &put_line(table, values, boot, None));
}

/// As [`write_put`], for a line beside a snapshot.
pub(crate) fn write_put_at(out: &mut Vec<u8>, table: &Table, values: &[Value], at: i64) {
    write_line(out, &put_line(table, values, None, Some(at)));
}

fn put_line(table: &Table, values: &[Value], boot: Option<&str>, at: Option<i64>) -> Line {
    let json = |value: &Value| match value {
        Value::Integer(number) => (*number).into(),
        Value::Text(text) => text.clone().into(),
        // No record has any of the others.
        Value::Null | Value::Real(_) | Value::Blob(_) => serde_json::Value::Null,
    };
    let cells = table.columns.iter().zip(values);
    let row = cells.map(|(column, value)| ((*column).to_owned(), json(value))).collect();
    Line::Put { put: table.name.to_owned(), row, boot: boot.map(str::to_owned), at }
}

/// `at`: as in [`write_put_at`].
pub(crate) fn write_delete(out: &mut Vec<u8>, table: &Table, column: &str, value: &str, at: Option<i64>) {
    let (delete, column, value) = (table.name.to_owned(), column.to_owned(), value.to_owned());
    write_line(out, &Line::Delete { delete, column, value, at });
}

pub(crate) fn write_barrier(out: &mut Vec<u8>, covered_bytes: u64, boot: &str) {
    write_line(out, &Line::Barrier { barrier: covered_bytes, boot: boot.to_owned() });
}

fn write_line(out: &mut Vec<u8>, line: &Line) {
    let json = serde_json::to_string(line).expect("words and numbers are JSON");
    out.extend_from_slice(format!("{} {json}\n", checksum(json.as_bytes())).as_bytes());
}

/// Where the journal stood when something was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    /// Another one whenever the journal is written anew.
    pub(crate) generation: i64,
    /// How long it is.
    pub(crate) bytes: u64,
}

/// What the lines of a journal say.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    lines: Vec<(u64, Line)>,
    /// Lines that are no lines.
    pub(crate) damaged: usize,
    /// How long it is up to the end of the last line.
    pub(crate) whole_bytes: u64,
    /// For each boot, how much of the journal reached the disk in it.
    covered: HashMap<String, u64>,
}

impl Replay {
    /// Whether there is nothing in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Whether all of the journal can be read, which has `bytes` bytes.
    pub(crate) fn is_whole(&self, bytes: u64) -> bool {
        self.damaged == 0 && self.whole_bytes == bytes
    }

    /// An index in memory with nothing but what this says.
    pub(crate) fn into_scratch(self, boot: &str) -> Result<Connection, rusqlite::Error> {
        let mut scratch = Connection::open_in_memory()?;
        let transaction = scratch.transaction()?;
        crate::index::make_tables(&transaction)?;
        self.apply(&transaction, boot)?;
        transaction.commit()?;
        Ok(scratch)
    }

    fn parse(bytes: &[u8], from: u64) -> Self {
        let mut replay = Self { whole_bytes: from, ..Self::default() };
        let mut at = from;
        for raw in bytes.split_inclusive(|&byte| byte == b'\n') {
            let start = at;
            at += raw.len() as u64;
            let Some(raw) = raw.strip_suffix(b"\n") else {
                // Torn: its writer died.
                continue;
            };
            replay.whole_bytes = at;
            match parse_line(raw) {
                Some(Line::Barrier { barrier, boot }) => {
                    let covered = replay.covered.entry(boot).or_default();
                    *covered = barrier.max(*covered);
                }
                Some(line) => replay.lines.push((start, line)),
                None => replay.damaged += 1,
            }
        }
        replay
    }

    /// Adds lines of another file.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        let Self { lines, damaged, .. } = Self::parse(bytes, 0);
        self.lines.extend(lines);
        self.damaged += damaged;
    }

    /// Orders lines of several files.
    pub(crate) fn sort_by_time(&mut self) {
        self.lines.sort_by_key(|(_, line)| match line {
            Line::Put { at, .. } | Line::Delete { at, .. } => at.unwrap_or(0),
            Line::Barrier { .. } => 0,
        });
    }

    /// Makes all changes in `db`, as if all of them had reached the disk.
    pub(crate) fn apply_all(&mut self, db: &Connection) -> Result<(), rusqlite::Error> {
        for (_, line) in &mut self.lines {
            if let Line::Put { boot, .. } = line {
                *boot = None;
            }
        }
        self.apply(db, "")
    }

    /// Makes the changes in `db`, but for records whose data may have been lost in a crash of the
    /// machine: made in another boot than `boot`, and no barrier since.
    pub(crate) fn apply(&self, db: &Connection, boot: &str) -> Result<(), rusqlite::Error> {
        for (start, line) in &self.lines {
            match line {
                Line::Put { put, row, boot: made, .. } => {
                    let Some(table) = TABLES.into_iter().find(|table| table.name == put) else { continue };
                    let durable = made.as_ref().is_none_or(|made| self.covered.get(made) > Some(start));
                    if !durable && made.as_deref() != Some(boot) {
                        continue;
                    }
                    let values: Vec<Value> = table.columns.iter().map(|column| cell(row, column)).collect();
                    let made = made.as_deref().filter(|_| !durable);
                    tables::insert(db, table, Existing::Replace, &values, made)?;
                }
                Line::Delete { delete, column, value, .. } => {
                    if let Some((table, column)) = tables::find(delete, column) {
                        tables::delete(db, table, column, value)?;
                    }
                }
                Line::Barrier { .. } => {}
            }
        }
        Ok(())
    }
}

fn cell(row: &Row, column: &str) -> Value {
    match row.get(column) {
        Some(serde_json::Value::String(text)) => Value::Text(text.clone()),
        Some(serde_json::Value::Number(number)) => number.as_i64().map_or(Value::Null, Value::Integer),
        _ => Value::Null,
    }
}

fn parse_line(raw: &[u8]) -> Option<Line> {
    let (sum, json) = raw.split_at_checked(17)?;
    let sum = sum.strip_suffix(b" ")?;
    if checksum(json).as_bytes() != sum {
        return None;
    }
    serde_json::from_slice(json).ok()
}

fn header(generation: i64) -> String {
    format!("{MAGIC} {VERSION} {generation:016x}\n")
}

/// Version and generation out of a header.
fn parse_header(line: &[u8]) -> Option<(i64, i64)> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.strip_suffix('\n')?.split(' ');
    let (magic, version, generation) = (words.next()?, words.next()?, words.next()?);
    (magic == MAGIC).then_some(())?;
    Some((version.parse().ok()?, i64::from_str_radix(generation, 16).ok()?))
}

/// The journal of a store, as one handle writes it.
pub(crate) struct Journal {
    root: PathBuf,
    path: PathBuf,
    /// Opened with the first change.
    file: Option<File>,
}

impl Journal {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), path: root.join("db/journal"), file: None }
    }

    /// Where it stands now; `None`: there is none, or none with a header. Four system calls.
    ///
    /// # Errors
    /// [`Error::NewerStore`], [`Error::Host`].
    pub(crate) fn position(&self) -> Result<Option<Position>, Error> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::host("open", &self.path)(error)),
        };
        let bytes = file.metadata().map_err(Error::host("stat", &self.path))?.len();
        let mut start = vec![0; header(0).len()];
        match file.read_exact(&mut start) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(Error::host("read", &self.path)(error)),
        }
        // A later version may have a longer header.
        let word = start.strip_prefix(MAGIC.as_bytes()).unwrap_or_default();
        let word: String = word.iter().skip(1).take_while(|b| **b != b' ').map(|b| char::from(*b)).collect();
        if let Ok(found) = word.parse::<i64>()
            && found > VERSION
        {
            return Err(Error::NewerStore { path: self.root.clone(), found, known: VERSION });
        }
        Ok(parse_header(&start).map(|(_, generation)| Position { generation, bytes }))
    }

    /// Reads all of it, and of the index how much of it has reached the disk: after a power cut its
    /// own lines may not say so. Also how long it is.
    ///
    /// # Errors
    /// As [`Journal::position`], and [`Error::Db`].
    pub(crate) fn read_beside(&self, db: &Connection) -> Result<(Replay, u64), Error> {
        let (known, found) = (known_position(db)?, self.position()?);
        let mut replay = self.read()?;
        let generation = |position: Option<Position>| position.map(|position| position.generation);
        if generation(known) == generation(found) {
            let mut query = db.prepare("SELECT name, value FROM state WHERE name LIKE 'covered %'")?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                let (name, bytes): (String, i64) = (row.get(0)?, row.get(1)?);
                let boot = name.strip_prefix(COVERED).unwrap_or_default().to_owned();
                let covered = replay.covered.entry(boot).or_default();
                *covered = u64::try_from(bytes).unwrap_or(0).max(*covered);
            }
        }
        Ok((replay, found.map_or(0, |found| found.bytes)))
    }

    /// Brings it to the disk; nothing if there is none.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub(crate) fn sync(&mut self) -> Result<(), Error> {
        if !self.path.exists() {
            return Ok(());
        }
        let path = self.path.clone();
        self.open()?.sync_data().map_err(Error::host("fdatasync", path))
    }

    /// Reads all of it. A header that is damaged counts as a damaged line.
    ///
    /// # Errors
    /// As [`Journal::position`].
    pub(crate) fn read(&self) -> Result<Replay, Error> {
        let has_header = self.position()?.is_some();
        let bytes = match fs::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Replay::default()),
            other => other.map_err(Error::host("read", &self.path))?,
        };
        let start = if has_header { header(0).len() } else { 0 };
        Ok(Replay::parse(&bytes[start.min(bytes.len())..], start as u64))
    }

    /// Takes into the index what the journal has beyond it; writes the journal anew when it lacks
    /// something. Inside a write transaction, which keeps every other writer away.
    ///
    /// # Errors
    /// [`Error::Host`], [`Error::Db`].
    pub(crate) fn catch_up(&mut self, db: &Connection, boot: &str) -> Result<Position, Error> {
        let (known, found) = (known_position(db)?, self.position()?);
        let (Some(known), Some(found)) = (known, found) else { return self.rewrite(db) };
        if known == found {
            return Ok(found);
        }
        if known.generation != found.generation || known.bytes > found.bytes {
            return self.rewrite(db);
        }
        let bytes = fs::read(&self.path).map_err(Error::host("read", &self.path))?;
        let from = usize::try_from(known.bytes).unwrap_or(usize::MAX).min(bytes.len());
        let replay = Replay::parse(&bytes[from..], known.bytes);
        replay.apply(db, boot)?;
        let position = Position { bytes: replay.whole_bytes, ..found };
        if position.bytes < found.bytes {
            let file = self.open()?;
            file.set_len(position.bytes).map_err(Error::host("ftruncate", &self.path))?;
        }
        remember(db, position)?;
        Ok(position)
    }

    /// Appends lines in one write, and notes in the index how long the journal is then. Inside a
    /// write transaction, after [`Journal::catch_up`]. A journal that has grown long is written anew,
    /// if the disk has room for that.
    ///
    /// # Errors
    /// [`Error::Host`], [`Error::Db`]; nothing was appended then.
    pub(crate) fn append(&mut self, db: &Connection, at: Position, lines: &[u8]) -> Result<(), Error> {
        let live = state(db, LIVE)?.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0);
        let bytes = at.bytes + lines.len() as u64;
        let path = self.path.clone();
        let mut file = self.open()?;
        let written = file.write_all(lines).map_err(Error::host("write", path));
        if let Err(error) = written.and_then(|()| Ok(remember(db, Position { bytes, ..at })?)) {
            let _ = file.set_len(at.bytes);
            return Err(error);
        }
        let is_long = bytes > COMPACT_BYTES.max(live.saturating_mul(COMPACT_GROWTH));
        // What was asked for is done: a full disk must not undo it, nor lose what is set aside on it.
        if is_long
            && reserve::has_room(&self.root, bytes)
            && let Ok(position) = self.write_new(db)
        {
            self.take_new(db, position)?;
        }
        Ok(())
    }

    /// Takes back what [`Journal::append`] wrote for a transaction that was not committed after all.
    pub(crate) fn take_back(&mut self, db: &mut Connection, at: Position, lines: usize) {
        let behaviour = rusqlite::TransactionBehavior::Immediate;
        // If another writer was faster it has taken the lines in; so be it.
        let Ok(transaction) = db.transaction_with_behavior(behaviour) else { return };
        let ours = Position { bytes: at.bytes + lines as u64, ..at };
        let (known, found) = (known_position(&transaction), self.position());
        if matches!(known, Ok(Some(known)) if known == at)
            && matches!(found, Ok(Some(found)) if found == ours)
            && let Ok(file) = self.open()
        {
            let _ = file.set_len(at.bytes);
        }
    }

    /// Notes in a new index that it is what `replay`, all of this journal, says.
    ///
    /// # Errors
    /// As [`Journal::rewrite`].
    pub(crate) fn adopt(&mut self, db: &Connection, replay: &Replay) -> Result<(), Error> {
        match self.position()? {
            // What another process has added meanwhile is beyond what the index knows.
            Some(found) => Ok(remember(db, Position { bytes: replay.whole_bytes, ..found })?),
            None => self.rewrite(db).map(drop),
        }
    }

    /// The journal's file, open for appending. Another process may have replaced it.
    fn open(&mut self) -> Result<&File, Error> {
        let there = fs::metadata(&self.path).map_err(Error::host("stat", &self.path))?;
        let same = |file: &File| {
            file.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (there.dev(), there.ino()))
        };
        if !self.file.as_ref().is_some_and(same) {
            let file = OpenOptions::new().append(true).open(&self.path);
            self.file = Some(file.map_err(Error::host("open", &self.path))?);
        }
        Ok(self.file.as_ref().expect("opened above"))
    }

    /// Writes a journal of nothing but what is in the index, and what comes back when a power cut
    /// takes that. Inside a write transaction.
    ///
    /// # Errors
    /// [`Error::Host`], [`Error::Db`].
    pub(crate) fn rewrite(&mut self, db: &Connection) -> Result<Position, Error> {
        let position = self.write_new(db)?;
        self.take_new(db, position)?;
        Ok(position)
    }

    /// Removes what one left who was killed while writing the journal anew; how many files. Inside a
    /// write transaction: nobody is writing it then.
    pub(crate) fn sweep(&self) -> usize {
        usize::from(fs::remove_file(self.new_path()).is_ok())
    }

    /// Whether there is something to sweep, or somebody is writing the journal anew.
    pub(crate) fn has_new(&self) -> bool {
        self.new_path().exists()
    }

    fn new_path(&self) -> PathBuf {
        self.path.with_extension("new")
    }

    /// Writes a new journal beside this one.
    fn write_new(&self, db: &Connection) -> Result<Position, Error> {
        let generation = i64::from_str_radix(&crate::lease::random(), 16).unwrap_or(1);
        let mut bytes = header(generation).into_bytes();
        // Only what is durable already: no boot is called that.
        let older = self.read_beside(db)?.0.into_scratch("")?;
        for table in TABLES {
            let (columns, name, key) = (table.columns.join(", "), table.name, table.columns[0]);
            let mut replaced = older.prepare(&format!("SELECT {columns} FROM {name} WHERE {key} = ?1"))?;
            let values = |row: &rusqlite::Row<'_>| {
                (0..table.columns.len()).map(|at| row.get(at)).collect::<Result<Vec<Value>, _>>()
            };
            let mut query = db.prepare(&format!("SELECT {columns}, boot FROM {name}"))?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                let values_now = values(row)?;
                let boot: Option<String> = row.get(table.columns.len())?;
                if boot.is_some()
                    && let Some(before) = replaced.query_row([&values_now[0]], values).optional()?
                {
                    write_put(&mut bytes, table, &before, None);
                }
                write_put(&mut bytes, table, &values_now, boot.as_deref());
            }
        }
        let new = self.new_path();
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_data()
        });
        if let Err(error) = written {
            // Half of it would take the space that is wanting.
            let _ = fs::remove_file(&new);
            return Err(Error::host("write", new)(error));
        }
        Ok(Position { generation, bytes: bytes.len() as u64 })
    }

    /// Puts the new journal in this one's place.
    fn take_new(&mut self, db: &Connection, position: Position) -> Result<(), Error> {
        fs::rename(self.new_path(), &self.path).map_err(Error::host("rename", &self.path))?;
        // The index must not reach the disk before the journal that it is going to name.
        let directory = self.path.parent().unwrap_or(&self.root);
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(Error::host("fsync", directory))?;
        self.file = None;
        db.execute("DELETE FROM state WHERE name LIKE 'covered %'", [])?;
        remember(db, position)?;
        Ok(set_state(db, LIVE, i64::try_from(position.bytes).unwrap_or(i64::MAX))?)
    }
}

const GENERATION: &str = "journal-generation";
const BYTES: &str = "journal-bytes";
/// How long the journal was when it was last written anew.
const LIVE: &str = "journal-live";
/// With a boot id behind it: how much of the journal has reached the disk in that boot.
const COVERED: &str = "covered ";

/// Notes in the index how much of the journal it knows has reached the disk in `boot`.
pub(crate) fn remember_covered(db: &Connection, boot: &str, bytes: u64) -> Result<(), rusqlite::Error> {
    set_state(db, &format!("{COVERED}{boot}"), i64::try_from(bytes).unwrap_or(i64::MAX))
}

fn state(db: &Connection, name: &str) -> Result<Option<i64>, rusqlite::Error> {
    let mut query = db.prepare_cached("SELECT value FROM state WHERE name = ?1")?;
    query.query_row([name], |row| row.get(0)).optional()
}

fn set_state(db: &Connection, name: &str, value: i64) -> Result<(), rusqlite::Error> {
    let mut query = db.prepare_cached("INSERT OR REPLACE INTO state VALUES (?1, ?2)")?;
    query.execute(rusqlite::params![name, value]).map(drop)
}

/// Columns that say where the journal stood at the index's last commit.
pub(crate) const POSITION: &str = "(SELECT value FROM state WHERE name = 'journal-generation'), \
     (SELECT value FROM state WHERE name = 'journal-bytes')";

impl Position {
    /// Out of the columns [`POSITION`], the first of which is this one; `None`: the index never had
    /// a journal.
    pub(crate) fn of(row: &rusqlite::Row<'_>, first: usize) -> Result<Option<Self>, rusqlite::Error> {
        let (generation, bytes): (Option<i64>, Option<i64>) = (row.get(first)?, row.get(first + 1)?);
        let bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok());
        Ok(generation.zip(bytes).map(|(generation, bytes)| Self { generation, bytes }))
    }
}

fn known_position(db: &Connection) -> Result<Option<Position>, rusqlite::Error> {
    db.prepare_cached(&format!("SELECT {POSITION}"))?.query_row([], |row| Position::of(row, 0))
}

fn remember(db: &Connection, position: Position) -> Result<(), rusqlite::Error> {
    set_state(db, GENERATION, position.generation)?;
    set_state(db, BYTES, i64::try_from(position.bytes).unwrap_or(i64::MAX))
}
