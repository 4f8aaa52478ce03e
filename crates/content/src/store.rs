//! The store as a whole: directories, index, durability.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, TransactionBehavior};
use rustix::fs::syncfs;

use crate::Error;

/// Version of the index; counted in SQLite's `user_version`.
const VERSION: i64 = MIGRATIONS.len() as i64;
const DIRS: [&str; 6] = ["blobs/sha256", "ingest", "locks", "state", "db", "snapshots"];

/// What each version adds to the one before; never changed, only added to.
const MIGRATIONS: [&str; 2] = [
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
];

/// Tables whose records are trusted only when they are durable or of this boot.
const TABLES: [&str; 6] = ["image", "name", "layer", "chain", "cache", "source"];

/// Blobs and metadata below one directory. Any number of processes may have it open.
pub struct Store {
    root: PathBuf,
    db: Mutex<Connection>,
    /// This handle wrote records since its last barrier.
    dirty: AtomicBool,
    pub(crate) boot: String,
}

impl Store {
    /// Opens the store at `root`, making it when there is none. Costs about a millisecond when it
    /// is there.
    ///
    /// # Errors
    /// [`Error::NotWritable`], [`Error::NewerStore`]; nothing is left behind then.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let not_writable = |source| Error::NotWritable { path: root.to_owned(), source };
        let index = root.join("db/meta.sqlite");
        if !index.exists() {
            for dir in DIRS {
                DirBuilder::new().recursive(true).mode(0o700).create(root.join(dir)).map_err(not_writable)?;
            }
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(not_writable)?;
        let db = open_index(root, &index).map_err(|error| match error {
            Error::Db(error) if unusable(&error) => not_writable(io::Error::other(error)),
            other => other,
        })?;
        let store = Self {
            root: root.to_owned(),
            db: Mutex::new(db),
            dirty: AtomicBool::new(false),
            boot: boot.trim().to_owned(),
        };
        store.forget_other_boots()?;
        Ok(store)
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn db(&self) -> MutexGuard<'_, Connection> {
        // A panic elsewhere rolled its transaction back; the connection is fine.
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` as one write transaction: all of it or nothing.
    pub(crate) fn write<T>(
        &self,
        work: impl FnOnce(&rusqlite::Transaction<'_>) -> Result<T, rusqlite::Error>,
    ) -> Result<T, Error> {
        let mut db = self.db();
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let value = work(&transaction)?;
        transaction.commit()?;
        self.dirty.store(true, Ordering::Relaxed);
        Ok(value)
    }

    /// Makes everything this handle wrote survive a power cut: one `syncfs`, then the records are
    /// marked. Costs nothing when it wrote no record.
    ///
    /// # Errors
    /// [`Error::Host`] when the disk failed; the records stay of this boot only then.
    pub fn barrier(&self) -> Result<(), Error> {
        if !self.dirty.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        // What another process records during the sync has larger row ids, and is not covered by it.
        let mut covered = Vec::new();
        for table in TABLES {
            let sql = format!("SELECT coalesce(max(rowid), 0) FROM {table}");
            let last: i64 = self.db().prepare_cached(&sql)?.query_row([], |row| row.get(0))?;
            covered.push((table, last));
        }
        let directory = File::open(&self.root).map_err(Error::host("open", &self.root))?;
        syncfs(&directory).map_err(Error::host("syncfs", &self.root))?;
        self.write(|db| {
            for (table, last) in covered {
                let sql = format!("UPDATE {table} SET boot = NULL WHERE boot IS NOT NULL AND rowid <= ?1");
                db.execute(&sql, [last])?;
            }
            Ok(())
        })?;
        self.dirty.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Drops records whose data may not have reached the disk before the machine went down.
    fn forget_other_boots(&self) -> Result<(), Error> {
        let mut stale = Vec::new();
        {
            let db = self.db();
            for table in TABLES {
                let sql = format!("SELECT 1 FROM {table} WHERE boot IS NOT NULL AND boot <> ?1 LIMIT 1");
                if db.prepare_cached(&sql)?.query_row([&self.boot], |_| Ok(())).optional()?.is_some() {
                    stale.push(table);
                }
            }
        }
        if stale.is_empty() {
            return Ok(());
        }
        self.write(|db| {
            for table in stale {
                db.execute(&format!("DELETE FROM {table} WHERE boot <> ?1"), [&self.boot])?;
            }
            Ok(())
        })
    }
}

/// What SQLite says when the file system does not let it in.
fn unusable(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{CannotOpen, PermissionDenied, ReadOnly};
    matches!(error.sqlite_error_code(), Some(CannotOpen | PermissionDenied | ReadOnly))
}

fn open_index(root: &Path, index: &Path) -> Result<Connection, Error> {
    let mut db = Connection::open(index)?;
    db.busy_timeout(Duration::from_secs(10))?;
    // Changing the journal mode does not wait for others, so newcomers take turns.
    let mode: String = db.query_row("PRAGMA journal_mode", [], |row| row.get(0))?;
    let turn = root.join("locks/setup");
    let _turn = if mode == "wal" {
        None
    } else {
        let file = File::create(&turn).map_err(Error::host("create", &turn))?;
        file.lock().map_err(Error::host("lock", &turn))?;
        Some(file)
    };
    // In WAL mode NORMAL syncs at checkpoints only; the boot id covers what a power cut takes.
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "NORMAL")?;
    let version = |db: &Connection| db.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0));
    let found = version(&db)?;
    if found > VERSION {
        return Err(Error::NewerStore { path: root.to_owned(), found, known: VERSION });
    }
    if found < VERSION {
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Another process may have come first while this one waited.
        let found = usize::try_from(version(&transaction)?).unwrap_or(0);
        for step in MIGRATIONS.iter().skip(found) {
            transaction.execute_batch(step)?;
        }
        transaction.pragma_update(None, "user_version", VERSION)?;
        transaction.commit()?;
    }
    Ok(db)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_oci::Digest;

    #[test]
    fn store_of_a_newer_kiln_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.db().pragma_update(None, "user_version", 99).unwrap();
        drop(store);
        assert!(matches!(Store::open(dir.path()), Err(Error::NewerStore { found: 99, .. })));
    }

    #[test]
    fn store_of_an_older_kiln_is_brought_up_to_date() {
        let dir = tempfile::tempdir().unwrap();
        for dir_name in DIRS {
            fs::create_dir_all(dir.path().join(dir_name)).unwrap();
        }
        let db = Connection::open(dir.path().join("db/meta.sqlite")).unwrap();
        db.execute_batch(MIGRATIONS[0]).unwrap();
        db.pragma_update(None, "user_version", 1).unwrap();
        let chain = "INSERT INTO chain VALUES (?1, 'old', NULL)";
        let digest = kiln_oci::ChainId(Digest::of(b"old"));
        db.execute(chain, [digest.to_string()]).unwrap();
        drop(db);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.snapshot_by_chain(&digest).unwrap().unwrap().as_str(), "old");
        assert_eq!(store.source(&Digest::of(b"x")).unwrap(), None);
    }

    #[test]
    fn place_that_cannot_be_written_is_said_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(matches!(Store::open(&file.join("store")), Err(Error::NotWritable { .. })));
        assert_eq!(fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn records_of_another_boot_are_dropped_unless_they_are_durable() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let chain = |text: &str| kiln_oci::ChainId(Digest::of(text.as_bytes()));
        let snapshot = "s".parse().unwrap();
        store.put_chain(&chain("durable"), &snapshot).unwrap();
        store.barrier().unwrap();
        store.boot = "another".to_owned();
        store.put_chain(&chain("lost"), &snapshot).unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert!(store.snapshot_by_chain(&chain("durable")).unwrap().is_some());
        assert!(store.snapshot_by_chain(&chain("lost")).unwrap().is_none());
    }
}
