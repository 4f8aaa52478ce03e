//! The store as a whole: opening it, reading its index and writing to it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, TransactionBehavior};

pub use self::directory::check_place;
use self::directory::prepare;
use crate::Error;
use crate::index::{Place, Rebuilt, find_damage, is_damage, is_read_only};
use crate::journal::Journal;
use crate::pins::Pins;
use crate::tables::{Writer, Written};

mod barrier;
mod directory;
#[cfg(test)]
pub(crate) mod tests;

/// Blobs and metadata below one directory. Any number of processes may have it open.
///
/// What a handle hands out (images, cached results, blobs it was given) is pinned until the handle
/// is dropped: garbage collection leaves it alone. Whoever lives long opens a handle for each job.
pub struct Store {
    root: PathBuf,
    /// Open from the beginning: the kernel reports a failed write once, to what was open then.
    directory: File,
    place: Place,
    db: Mutex<Connection>,
    journal: Mutex<Journal>,
    /// This handle wrote records since its last barrier.
    dirty: AtomicBool,
    /// This handle wrote to the index at all.
    wrote: AtomicBool,
    rebuilt: Option<Rebuilt>,
    pub(crate) boot: String,
    pub(crate) pins: Arc<Pins>,
}

impl Store {
    /// Opens the store at `root`, making it when there is none. Costs about a millisecond when it
    /// is there.
    ///
    /// An index that is damaged or gone is made anew; [`Store::rebuilt`] tells.
    ///
    /// # Errors
    /// [`Error::NotWritable`], [`Error::Unsafe`], [`Error::NewerStore`]; nothing is left behind then.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let boot = prepare(root)?;
        let place = Place::new(root, &boot);
        let opened = match place.open(&boot) {
            // Even reading needs a little space: on a full disk, that which was set aside for this.
            Err(Error::Db(_) | Error::Host { .. }) if crate::reserve::release(root) => place.open(&boot),
            opened => opened,
        };
        let (db, rebuilt) = opened.map_err(|error| not_writable(root, error))?;
        Self::new(root, place, db, rebuilt, boot)
    }

    /// Makes the index of the store at `root` anew from its journal, whatever it is like, and opens
    /// the store. Costs O(records ever made).
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_anew(root: &Path) -> Result<Self, Error> {
        let boot = prepare(root)?;
        let place = Place::new(root, &boot);
        let anew = || {
            let rebuilt = place.open_anew(&boot)?;
            Ok((place.open(&boot)?.0, Some(rebuilt)))
        };
        let (db, rebuilt) = anew().map_err(|error| not_writable(root, error))?;
        Self::new(root, place, db, rebuilt, boot)
    }

    fn new(
        root: &Path,
        place: Place,
        mut db: Connection,
        rebuilt: Option<Rebuilt>,
        boot: String,
    ) -> Result<Self, Error> {
        if !root.join(crate::sidecars::DIR).exists() {
            // Who changes a record meanwhile waits, and then has a place to write it down.
            let alone = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            crate::sidecars::write_all(root, &alone)?;
        }
        let directory = File::open(root).map_err(Error::host("open", root))?;
        Ok(Self {
            root: root.to_owned(),
            directory,
            place,
            db: Mutex::new(db),
            journal: Mutex::new(Journal::new(root)),
            dirty: AtomicBool::new(false),
            wrote: AtomicBool::new(false),
            rebuilt,
            boot,
            pins: Pins::new(root),
        })
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What was wrong with the index when this handle opened it; `None`: nothing.
    pub fn rebuilt(&self) -> Option<&Rebuilt> {
        self.rebuilt.as_ref()
    }

    /// Whether the index was made anew, by this process or another, and its records have not been
    /// compared with the data since; `Some(true)`: not even its journal was left. Costs one system call.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn unproven(&self) -> Result<Option<bool>, Error> {
        self.place.unproven()
    }

    /// Waits until nobody else compares records with the data. Others wait as long as the file lives.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn prove_turn(&self) -> Result<File, Error> {
        self.place.turn("prove")
    }

    /// Says that the records were compared with the data; what was forgotten stays so.
    ///
    /// # Errors
    /// [`Error::Db`], [`Error::Host`].
    pub fn mark_proven(&self) -> Result<(), Error> {
        self.settle()?;
        self.place.mark_proven()
    }

    /// What is wrong with the index, if anything: its pages, and whether it is what its journal
    /// says. A damaged journal beside a sound index is written anew. Costs O(records); writers wait meanwhile.
    ///
    /// # Errors
    /// [`Error::Host`], [`Error::Db`].
    pub fn find_index_damage(&self) -> Result<Option<String>, Error> {
        let (mut db, kept) = self.kept_index()?;
        let found = find_damage(&mut db, &mut self.journal(), &self.boot);
        drop((db, kept));
        let found = match found {
            Err(Error::Db(error)) if is_damage(&error) => Some(format!("is damaged ({error})")),
            other => other?,
        };
        if found.is_some() {
            self.place.distrust();
        }
        Ok(found)
    }

    /// How many lines of the index's journal cannot be read. Costs O(lines).
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn damaged_journal_lines(&self) -> Result<usize, Error> {
        Ok(self.journal().read()?.damaged)
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        // A panic elsewhere rolled its transaction back; the connection is fine.
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index that is in its place: who made it anew left this handle with the old one.
    fn index(&self) -> Result<MutexGuard<'_, Connection>, Error> {
        let mut db = self.db();
        if self.place.is_replaced() {
            *db = self.reopened(&db)?;
        }
        Ok(db)
    }

    /// Another connection, as durable as this one.
    fn reopened(&self, db: &Connection) -> Result<Connection, Error> {
        let synchronous: i64 = db.query_row("PRAGMA synchronous", [], |row| row.get(0))?;
        let (new, _) = self.place.open(&self.boot)?;
        new.pragma_update(None, "synchronous", synchronous)?;
        Ok(new)
    }

    /// As [`Store::index`]; nobody makes it anew while the second lives.
    fn kept_index(&self) -> Result<(MutexGuard<'_, Connection>, File), Error> {
        loop {
            // Not while it is kept: an index that is damaged or gone is made anew there.
            let db = self.index()?;
            let kept = self.place.keep()?;
            if !self.place.is_replaced() {
                return Ok((db, kept));
            }
        }
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the next one who opens the index look at all of it, if this error says so.
    fn note(&self, error: Error) -> Error {
        if let Error::Db(error) = &error
            && is_damage(error)
        {
            self.place.distrust();
        }
        error
    }

    /// Runs `work` on the index without changing it.
    pub(crate) fn read<T>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, rusqlite::Error>,
    ) -> Result<T, Error> {
        let db = self.index().map_err(|error| self.note(error))?;
        work(&db).map_err(|error| self.note(error.into()))
    }

    /// Runs `work` as one write transaction: all of it or nothing, in the index and the journal.
    pub(crate) fn write<T>(
        &self,
        work: impl FnOnce(&mut Writer<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (value, recorded) = self.write_at(|writer, _| work(writer)).map_err(|error| self.note(error))?;
        self.dirty.fetch_or(recorded, Ordering::Relaxed);
        Ok(value)
    }

    /// Also whether the journal has a line more.
    fn write_at<T>(
        &self,
        work: impl FnOnce(&mut Writer<'_>, i64) -> Result<T, Error>,
    ) -> Result<(T, bool), Error> {
        let (mut db, _kept) = self.kept_index()?;
        let mut work = Some(work);
        match self.write_to(&mut db, &mut work) {
            Err(Error::Db(error)) if is_read_only(&error) && work.is_some() => {
                *db = self.reopened(&db)?;
                self.write_to(&mut db, &mut work)
            }
            done => done,
        }
    }

    /// `work` is still there when nothing could be begun.
    fn write_to<T>(
        &self,
        db: &mut Connection,
        work: &mut Option<impl FnOnce(&mut Writer<'_>, i64) -> Result<T, Error>>,
    ) -> Result<(T, bool), Error> {
        let mut journal = self.journal();
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let again = || Error::Damaged { what: "it was written twice".to_owned() };
        let work = work.take().ok_or_else(again)?;
        let at = journal.catch_up(&transaction, &self.boot)?;
        let mut writer = Writer::new(&transaction, &self.boot);
        let value = work(&mut writer, at.generation)?;
        let Written { lines, renews, notes } = writer.into_written();
        if renews {
            journal.rewrite(&transaction)?;
            transaction.commit()?;
        } else if lines.is_empty() {
            transaction.commit()?;
        } else {
            journal.append(&transaction, at, &lines)?;
            if let Err(error) = transaction.commit() {
                journal.take_back(db, at, lines.len());
                return Err(error.into());
            }
        }
        notes.write(&self.root);
        self.wrote.store(true, Ordering::Relaxed);
        Ok((value, !lines.is_empty()))
    }

    /// Lets the next barrier be one although this handle wrote nothing: it tells somebody about what
    /// another wrote, who may have died before the barrier.
    pub(crate) fn needs_barrier(&self) {
        self.dirty.store(true, Ordering::Relaxed);
    }

    /// As [`Store::write`], for what is no record: nothing is made durable for its sake.
    pub(crate) fn write_aside(
        &self,
        work: impl FnOnce(&Connection) -> Result<(), rusqlite::Error>,
    ) -> Result<(), Error> {
        let (mut db, _kept) = self.kept_index()?;
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        work(&transaction)?;
        transaction.commit()?;
        self.wrote.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Removes a journal that somebody did not finish writing anew; how many files.
    pub(crate) fn sweep_journal(&self) -> Result<usize, Error> {
        if !self.journal().has_new() {
            return Ok(0);
        }
        let (mut db, _kept) = self.kept_index()?;
        let _alone = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        Ok(self.journal().sweep())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // The last to close the index writes its log into it. Closed here, so that the file can be
        // looked at afterwards; the field is left with a connection to nothing.
        if !self.wrote.load(Ordering::Relaxed) && !self.place.has_log() {
            return;
        }
        let before = self.place.stamp();
        let Ok(nothing) = Connection::open_in_memory() else { return };
        drop(std::mem::replace(&mut *self.db(), nothing));
        if self.wrote.load(Ordering::Relaxed) || before != self.place.stamp() {
            self.place.mark_checked();
        }
    }
}

fn not_writable(root: &Path, error: Error) -> Error {
    match error {
        Error::Db(error) if unusable(&error) => {
            Error::NotWritable { path: root.to_owned(), source: io::Error::other(error) }
        }
        other => other,
    }
}

/// What SQLite says when the file system does not let it in.
fn unusable(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{CannotOpen, PermissionDenied, ReadOnly};
    matches!(error.sqlite_error_code(), Some(CannotOpen | PermissionDenied | ReadOnly))
}
