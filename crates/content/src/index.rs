//! The index: a SQLite file that can be lost. Opening, versions, checking, making it anew.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusqlite::types::Value;
use rusqlite::{Connection, MAIN_DB, TransactionBehavior};

use crate::Error;
use crate::journal::{Journal, POSITION, Position};
use crate::sidecars;
use crate::tables::{Existing, TABLES, Table, insert};

/// Version of the index; counted in SQLite's `user_version`.
pub(crate) const VERSION: i64 = MIGRATIONS.len() as i64;

/// What each version adds to the one before; never changed, only added to.
pub(crate) const MIGRATIONS: [&str; 4] = [
    "
CREATE TABLE image (config TEXT PRIMARY KEY, manifest TEXT NOT NULL, snapshot TEXT, size_bytes INTEGER NOT NULL, created_unix INTEGER NOT NULL, boot TEXT) STRICT;
CREATE TABLE name (reference TEXT PRIMARY KEY, config TEXT NOT NULL, boot TEXT) STRICT;
CREATE TABLE layer (snapshot TEXT PRIMARY KEY, diff_id TEXT NOT NULL, size_bytes INTEGER NOT NULL, blob TEXT, media_type TEXT, blob_bytes INTEGER, boot TEXT) STRICT;
CREATE TABLE chain (chain TEXT PRIMARY KEY, snapshot TEXT NOT NULL, boot TEXT) STRICT;
CREATE TABLE cache (key TEXT PRIMARY KEY, canonical TEXT NOT NULL, snapshot TEXT NOT NULL, created_unix INTEGER NOT NULL, description TEXT NOT NULL, boot TEXT) STRICT;
CREATE INDEX cache_snapshot ON cache (snapshot);
CREATE INDEX name_config ON name (config);
CREATE INDEX image_boot ON image (boot) WHERE boot IS NOT NULL;
CREATE INDEX name_boot ON name (boot) WHERE boot IS NOT NULL;
CREATE INDEX layer_boot ON layer (boot) WHERE boot IS NOT NULL;
CREATE INDEX chain_boot ON chain (boot) WHERE boot IS NOT NULL;
CREATE INDEX cache_boot ON cache (boot) WHERE boot IS NOT NULL;
",
    "
CREATE TABLE source (key TEXT PRIMARY KEY, snapshot TEXT NOT NULL, content TEXT, etag TEXT, last_modified TEXT, created_unix INTEGER NOT NULL, boot TEXT) STRICT;
CREATE INDEX source_boot ON source (boot) WHERE boot IS NOT NULL;
",
    // `usage` and `state` are no records: what they lose, nobody misses.
    "
CREATE TABLE usage (snapshot TEXT PRIMARY KEY, disk_bytes INTEGER, last_used_unix INTEGER, times_used INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE state (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE INDEX chain_snapshot ON chain (snapshot);
CREATE INDEX layer_blob ON layer (blob) WHERE blob IS NOT NULL;
",
    crate::packed::MIGRATION,
];

/// What happened to an index that had to be made anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebuilt {
    /// What was wrong with it.
    pub reason: String,
    /// Records that there are now.
    pub records: i64,
    /// Lines of the journal that could not be read.
    pub lost_lines: usize,
    /// The journal was lost, too: all that is known is what was written beside the layers.
    pub salvaged: bool,
}

impl std::fmt::Display for Rebuilt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { reason, records, lost_lines, salvaged } = self;
        write!(f, "the store's index {reason}")?;
        if *salvaged {
            write!(f, ", and there is no journal; {records} records were found beside the layers")?;
        } else {
            write!(f, "; it was made anew with {records} records")?;
        }
        match (*lost_lines, *salvaged) {
            (0, _) => Ok(()),
            (lines, false) => write!(f, ", but {lines} lines of its journal are damaged"),
            (lines, true) => write!(f, ", and {lines} damaged lines"),
        }
    }
}

/// Where the files are.
pub(crate) struct Place {
    root: PathBuf,
    pub(crate) index: PathBuf,
    checked: PathBuf,
    boot: String,
    /// Damage was found since it was opened.
    distrusted: AtomicBool,
    /// Device and inode of the file that was opened.
    opened: Mutex<Option<(u64, u64)>>,
}

/// Why an index cannot be had as it is.
enum Trouble {
    /// It is of no use; what is wrong with it.
    Unusable(String),
    Other(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        match error {
            Error::Db(error) => error.into(),
            other => Trouble::Other(other),
        }
    }
}

impl From<rusqlite::Error> for Trouble {
    fn from(error: rusqlite::Error) -> Self {
        if is_damage(&error) {
            Trouble::Unusable(format!("is damaged ({error})"))
        } else {
            Trouble::Other(error.into())
        }
    }
}

/// Whether SQLite says that the file's content is at fault.
pub(crate) fn is_damage(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase, TypeMismatch, Unknown};
    match error.sqlite_error_code() {
        Some(DatabaseCorrupt | NotADatabase | TypeMismatch) => true,
        // "No such table", which is what a schema that lost a page comes to.
        Some(Unknown) => error.to_string().contains("no such"),
        _ => false,
    }
}

/// Whether SQLite had to open a file for reading only: it tries that by itself where it cannot open one for writing,
/// keeps the reason, and complains when something is to be written.
pub(crate) fn is_read_only(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::ReadOnly)
}

impl Place {
    pub(crate) fn new(root: &Path, boot: &str) -> Self {
        let db = root.join("db");
        Self {
            boot: boot.to_owned(),
            root: root.to_owned(),
            index: db.join("meta.sqlite"),
            checked: db.join("checked"),
            distrusted: AtomicBool::new(false),
            opened: Mutex::default(),
        }
    }

    /// Opens the index; makes it anew from its journal when it is damaged or gone. Costs a few
    /// system calls beyond SQLite's unless somebody changed the file behind our back.
    ///
    /// # Errors
    /// [`Error::NewerStore`], [`Error::Host`], [`Error::Db`].
    pub(crate) fn open(&self, boot: &str) -> Result<(Connection, Option<Rebuilt>), Error> {
        match self.open_as_it_is(boot) {
            Ok(db) => return Ok((db, None)),
            // What was in the way may be gone.
            Err(Trouble::Other(Error::Db(error))) if is_read_only(&error) => {}
            Err(Trouble::Other(error)) => return Err(error),
            Err(Trouble::Unusable(_)) => {}
        }
        let _turn = self.turn("rebuild")?;
        // Another process may have come first.
        let reason = match self.open_as_it_is(boot) {
            Ok(db) => return Ok((db, None)),
            Err(Trouble::Other(error)) => return Err(error),
            Err(Trouble::Unusable(reason)) => reason,
        };
        let rebuilt = self.rebuild(boot, reason)?;
        match self.open_as_it_is(boot) {
            Ok(db) => Ok((db, Some(rebuilt))),
            Err(Trouble::Other(error)) => Err(error),
            Err(Trouble::Unusable(what)) => Err(Error::Damaged { what: format!("the new index {what}") }),
        }
    }

    /// Makes the index anew from its journal, whatever it is like.
    ///
    /// # Errors
    /// As [`Place::open`]; the old one stays then.
    pub(crate) fn open_anew(&self, boot: &str) -> Result<Rebuilt, Error> {
        let _turn = self.turn("rebuild")?;
        if Journal::new(&self.root).read()?.is_empty() {
            // A journal that is lost is written anew from an index that is not.
            if let Err(Trouble::Other(error)) = self.open_as_it_is(boot) {
                return Err(error);
            }
        }
        self.rebuild(boot, "was not trusted".to_owned())
    }

    /// Others wait as long as the file lives.
    pub(crate) fn turn(&self, name: &str) -> Result<File, Error> {
        let path = self.root.join("locks").join(name);
        let file = File::create(&path).map_err(Error::host("create", &path))?;
        file.lock().map_err(Error::host("lock", &path))?;
        Ok(file)
    }

    /// Nobody puts another index in this one's place as long as the file lives. Three system calls.
    ///
    /// The lock is on the directory, which is there on a disk without a free inode, too.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub(crate) fn keep(&self) -> Result<File, Error> {
        self.lock_directory(File::lock_shared)
    }

    fn lock_directory(&self, lock: impl FnOnce(&File) -> io::Result<()>) -> Result<File, Error> {
        let path = self.root.join("db");
        let directory = File::open(&path).map_err(Error::host("open", &path))?;
        lock(&directory).map_err(Error::host("lock", &path))?;
        Ok(directory)
    }

    /// Whether another file than the one that was opened is there now, or none. One system call.
    pub(crate) fn is_replaced(&self) -> bool {
        let opened = *self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened != self.identity()
    }

    fn identity(&self) -> Option<(u64, u64)> {
        fs::metadata(&self.index).ok().map(|file| (file.dev(), file.ino()))
    }

    fn open_as_it_is(&self, boot: &str) -> Result<Connection, Trouble> {
        // What is changed here must not be the journal of an index that took this one's place.
        let _kept = self.keep()?;
        let mut journal = Journal::new(&self.root);
        let size_bytes = fs::metadata(&self.index).map_or(0, |file| file.len());
        if size_bytes == 0 && !self.is_new(&journal)? {
            let what = if self.index.exists() { "is empty" } else { "is missing" };
            return Err(Trouble::Unusable(what.to_owned()));
        }
        let trusted = size_bytes == 0 || self.is_checked();
        let mut db = Connection::open(&self.index)?;
        db.busy_timeout(Duration::from_secs(10))?;
        self.set_mode(&db)?;
        if db.is_readonly(MAIN_DB)? {
            // A transaction that is to write would begin all the same.
            let error = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_READONLY);
            return Err(rusqlite::Error::SqliteFailure(error, None).into());
        }
        let version = |db: &Connection| db.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0));
        let found = version(&db)?;
        if found > VERSION {
            let (path, known) = (self.root.clone(), VERSION);
            return Err(Trouble::Other(Error::NewerStore { path, found, known }));
        }
        if found < VERSION {
            let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            // Another process may have come first while this one waited.
            let found = usize::try_from(version(&transaction)?).unwrap_or(0);
            if found == 0 && !self.is_new(&journal)? {
                return Err(Trouble::Unusable("is empty".to_owned()));
            }
            for step in MIGRATIONS.iter().skip(found) {
                transaction.execute_batch(step)?;
            }
            transaction.pragma_update(None, "user_version", VERSION)?;
            journal.rewrite(&transaction)?;
            transaction.commit()?;
        }
        let found = journal.position()?;
        let (known, is_stale) = look(&db, boot)?;
        if is_stale {
            forget_other_boots(&mut db, &mut journal, boot)?;
        } else if known != found {
            let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            journal.catch_up(&transaction, boot)?;
            transaction.commit()?;
        }
        if !trusted {
            self.check(&mut db, &mut journal, boot)?;
        }
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = self.identity();
        Ok(db)
    }

    /// Whether there is nothing that an index could be made of.
    fn is_new(&self, journal: &Journal) -> Result<bool, Error> {
        Ok(!sidecars::any(&self.root) && journal.read()?.is_empty())
    }

    fn set_mode(&self, db: &Connection) -> Result<(), Trouble> {
        // Changing the journal mode does not wait for others, so newcomers take turns.
        let mode: String = db.query_row("PRAGMA journal_mode", [], |row| row.get(0))?;
        let _turn = if mode == "wal" { None } else { Some(self.turn("setup")?) };
        // In WAL mode NORMAL syncs at checkpoints only; the boot id covers what a power cut takes.
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "synchronous", "NORMAL")?;
        Ok(())
    }

    /// Looks at every page, and compares every record with the journal. Costs O(records).
    fn check(&self, db: &mut Connection, journal: &mut Journal, boot: &str) -> Result<(), Trouble> {
        if let Some(reason) = find_damage(db, journal, boot)? {
            return Err(Trouble::Unusable(reason));
        }
        self.mark_checked();
        Ok(())
    }

    fn rebuild(&self, boot: &str, reason: String) -> Result<Rebuilt, Error> {
        // Whoever writes to the old index has committed by then, and looks for the new one next.
        let _alone = self.lock_directory(File::lock)?;
        let mut journal = Journal::new(&self.root);
        let replay = journal.read()?;
        let new = self.index.with_file_name("new.sqlite");
        let suffixes = ["", "-wal", "-shm", "-journal"];
        let beside = |path: &Path, suffix: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let remove = |path: PathBuf| match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::host("unlink", path)(error)),
            _ => Ok(()),
        };
        suffixes.iter().try_for_each(|suffix| remove(beside(&new, suffix)))?;
        let mut db = Connection::open(&new)?;
        let transaction = db.transaction()?;
        make_tables(&transaction)?;
        replay.apply(&transaction, boot)?;
        let mut lost_lines = replay.damaged;
        let salvaged = replay.is_empty() && sidecars::any(&self.root);
        if salvaged {
            lost_lines = sidecars::replay(&self.root, &transaction)?;
        }
        // Before the journal is one again: nothing else tells that the records are but salvaged.
        self.mark_unproven(salvaged)?;
        let mut records = 0;
        for table in TABLES {
            let sql = format!("SELECT count(*) FROM {}", table.name);
            records += transaction.query_row(&sql, [], |row| row.get::<_, i64>(0))?;
        }
        // The last moment to see a newer store; from here on, what is lost is the old index alone.
        if replay.damaged > 0 || replay.is_empty() {
            journal.rewrite(&transaction)?;
        } else {
            journal.adopt(&transaction, &replay)?;
        }
        transaction.commit()?;
        drop(db);
        // A log that belongs to the old file must not be taken for one of the new.
        ["-wal", "-shm", "-journal"].iter().try_for_each(|suffix| remove(beside(&self.index, suffix)))?;
        fs::rename(&new, &self.index).map_err(Error::host("rename", &self.index))?;
        let directory = self.root.join("db");
        let synced = File::open(&directory).and_then(|directory| directory.sync_all());
        synced.map_err(Error::host("fsync", directory))?;
        self.mark_checked();
        Ok(Rebuilt { reason, records, lost_lines, salvaged })
    }

    fn unproven_path(&self) -> PathBuf {
        self.index.with_file_name("unproven")
    }

    /// Notes, so that it survives this process and a power cut, that nobody has compared the records
    /// with the data yet.
    fn mark_unproven(&self, salvaged: bool) -> Result<(), Error> {
        let path = self.unproven_path();
        // One that was salvaged and made anew since is still unproven.
        let salvaged = salvaged || self.unproven()? == Some(true);
        let write = || {
            let mut file = File::create(&path)?;
            io::Write::write_all(&mut file, if salvaged { b"salvaged\n" } else { b"rebuilt\n" })?;
            file.sync_all()?;
            File::open(self.root.join("db"))?.sync_all()
        };
        write().map_err(Error::host("write", &path))
    }

    /// As [`crate::Store::unproven`].
    pub(crate) fn unproven(&self) -> Result<Option<bool>, Error> {
        let path = self.unproven_path();
        match fs::read(&path) {
            // Cut off by a crash: what is certain to be enough.
            Ok(text) => Ok(Some(text != b"rebuilt\n")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::host("read", path)(error)),
        }
    }

    /// Takes the note back.
    pub(crate) fn mark_proven(&self) -> Result<(), Error> {
        let path = self.unproven_path();
        fs::remove_file(&path).map_err(Error::host("unlink", path))
    }

    /// Whether the index has a log, which the last to close it writes into it.
    pub(crate) fn has_log(&self) -> bool {
        fs::metadata(self.index.with_extension("sqlite-wal")).is_ok_and(|log| log.len() > 0)
    }

    /// How the file looked when it was last known to be good: changed by nobody but SQLite, and in
    /// this boot, for a power cut may have changed anything.
    pub(crate) fn stamp(&self) -> Option<String> {
        let file = fs::metadata(&self.index).ok()?;
        let times = (file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec());
        let Self { boot, .. } = self;
        Some(format!("2 {} {} {} {times:?} {boot}\n", file.dev(), file.ino(), file.len()))
    }

    fn is_checked(&self) -> bool {
        let stamp = self.stamp();
        stamp.is_some() && stamp == fs::read_to_string(&self.checked).ok()
    }

    /// Notes that the file as it is now is good. If that fails, it is only checked once more.
    pub(crate) fn mark_checked(&self) {
        if self.distrusted.load(Ordering::Relaxed) {
            return;
        }
        let new = self.checked.with_extension("new");
        if let Some(stamp) = self.stamp()
            && fs::read_to_string(&self.checked).ok().as_ref() != Some(&stamp)
            && fs::write(&new, stamp).is_ok()
        {
            let _ = fs::rename(new, &self.checked);
        }
    }

    /// Lets the next one who opens the index look at all of it.
    pub(crate) fn distrust(&self) {
        self.distrusted.store(true, Ordering::Relaxed);
        let _ = fs::remove_file(&self.checked);
    }
}

/// Where the journal stood at the last commit, and whether there are records of a boot that ended
/// before their data was known to be on the disk. One query: every command pays for it.
fn look(db: &Connection, boot: &str) -> Result<(Option<Position>, bool), rusqlite::Error> {
    let stale = TABLES
        .map(|table| format!("EXISTS (SELECT 1 FROM {} WHERE boot IS NOT NULL AND boot <> ?1)", table.name));
    let sql = format!("SELECT {}, {POSITION}", stale.join(" OR "));
    db.query_row(&sql, [boot], |row| Ok((Position::of(row, 1)?, row.get(0)?)))
}

/// Drops records whose data may not have reached the disk before the machine went down. What they
/// replaced comes back.
fn forget_other_boots(db: &mut Connection, journal: &mut Journal, boot: &str) -> Result<(), Error> {
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Before it is written anew from an index that has forgotten what was replaced.
    let (replay, _) = journal.read_beside(&transaction)?;
    let scratch = replay.into_scratch(boot)?;
    journal.catch_up(&transaction, boot)?;
    for table in TABLES {
        let (name, key) = (table.name, table.columns[0]);
        let mut query =
            transaction.prepare(&format!("DELETE FROM {name} WHERE boot <> ?1 RETURNING {key}"))?;
        let dropped: HashSet<String> =
            query.query_map([boot], |row| row.get(0))?.collect::<Result<_, _>>()?;
        for mut values in all_rows(&scratch, table, true)? {
            let made = match values.pop() {
                Some(Value::Text(made)) => Some(made),
                _ => None,
            };
            if matches!(&values[0], Value::Text(key) if dropped.contains(key)) {
                insert(&transaction, table, Existing::Keep, &values, made.as_deref())?;
            }
        }
    }
    journal.rewrite(&transaction)?;
    transaction.commit()?;
    Ok(())
}

/// The records of a table, by key; with `boot` as one more column.
fn all_rows(db: &Connection, table: &Table, boot: bool) -> Result<Vec<Vec<Value>>, rusqlite::Error> {
    let (columns, more) = (table.columns.join(", "), if boot { ", boot" } else { "" });
    let mut query =
        db.prepare(&format!("SELECT {columns}{more} FROM {} ORDER BY {}", table.name, table.columns[0]))?;
    let width = query.column_count();
    query.query_map([], |row| (0..width).map(|at| row.get(at)).collect())?.collect()
}

/// The tables of this version in an empty database.
pub(crate) fn make_tables(db: &Connection) -> Result<(), rusqlite::Error> {
    MIGRATIONS.iter().try_for_each(|step| db.execute_batch(step))?;
    db.pragma_update(None, "user_version", VERSION)
}

/// What is wrong with an index, if anything. Costs O(records); keeps writers waiting.
///
/// # Errors
/// [`Error::Db`], [`Error::Host`].
pub(crate) fn find_damage(
    db: &mut Connection,
    journal: &mut Journal,
    boot: &str,
) -> Result<Option<String>, Error> {
    let damaged = |what: &str| Ok(Some(format!("is damaged ({what})")));
    let good: String = db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if good != "ok" {
        return damaged(good.lines().next().unwrap_or_default());
    }
    let version: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version != VERSION {
        return damaged("of another version");
    }
    let differs = differs(db, journal, boot)?;
    Ok(differs.map(|table| format!("does not agree with its journal ({table} records)")))
}

/// The first table that is not what the journal says.
fn differs(db: &mut Connection, journal: &mut Journal, boot: &str) -> Result<Option<&'static str>, Error> {
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    journal.catch_up(&transaction, boot)?;
    let (replay, bytes) = journal.read_beside(&transaction)?;
    if !replay.is_whole(bytes) {
        // The index is sound: it is the journal that needs to be made anew.
        journal.rewrite(&transaction)?;
        transaction.commit()?;
        return Ok(None);
    }
    let scratch = replay.into_scratch(boot)?;
    let mut found = None;
    for table in TABLES {
        if all_rows(&transaction, table, false)? != all_rows(&scratch, table, false)? {
            found = Some(table.name);
            break;
        }
    }
    transaction.commit()?;
    Ok(found)
}

#[cfg(test)]
mod tests;
