//! The store as a whole: directories, index, durability.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::types::Value;
use rusqlite::{Connection, TransactionBehavior, params_from_iter};
use rustix::fs::syncfs;

use crate::Error;
use crate::index::{Place, Rebuilt, find_damage, is_damage};
use crate::journal::{Journal, Position, remember_covered};
use crate::pins::Pins;
use crate::tables::{TABLES, Table, Writer, Written};

const DIRS: [&str; 6] = ["blobs/sha256", "ingest", "locks", "state", "db", "snapshots"];

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
            let synchronous: i64 = db.query_row("PRAGMA synchronous", [], |row| row.get(0))?;
            let (new, _) = self.place.open(&self.boot)?;
            new.pragma_update(None, "synchronous", synchronous)?;
            *db = new;
        }
        Ok(db)
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
        let mut journal = self.journal();
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
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
                journal.take_back(&mut db, at, lines.len());
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

    /// Makes all changes of records survive a power cut, for whoever removes data next: what is
    /// forgotten must not come back without it. Two `fdatasync`.
    ///
    /// # Errors
    /// [`Error::Db`], [`Error::Host`].
    pub fn settle(&self) -> Result<(), Error> {
        self.journal().sync()?;
        self.synced(|| {
            self.write_aside(|db| {
                db.execute("INSERT OR REPLACE INTO state VALUES ('settled', 1)", []).map(drop)
            })
        })
    }

    /// Runs `work` so that its commit, and with it all before it, reaches the disk.
    fn synced<T>(&self, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        self.read(|db| db.pragma_update(None, "synchronous", "FULL"))?;
        let done = work();
        self.read(|db| db.pragma_update(None, "synchronous", "NORMAL"))?;
        done
    }

    /// Makes everything this handle wrote survive a power cut: one `syncfs`, then the records are
    /// marked. Costs nothing when it wrote no record. Sets space aside afterwards, for whoever fills a
    /// disk has to be able to clear it.
    ///
    /// # Errors
    /// [`Error::Host`] when the disk failed; the records stay of this boot only then.
    pub fn barrier(&self) -> Result<(), Error> {
        if !self.dirty.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let covered = self.cover();
        // What another thread wrote meanwhile has said so itself.
        self.dirty.fetch_or(covered.is_err(), Ordering::Relaxed);
        covered?;
        self.keep_reserve();
        Ok(())
    }

    fn cover(&self) -> Result<(), Error> {
        // What another process records during the sync is not covered by it: it stands behind this,
        // and is none of these rows, or not as they are now.
        let loose = self.loose()?;
        syncfs(&self.directory).map_err(Error::host("syncfs", &self.root))?;
        self.mark_durable(&loose)
    }

    /// What a sync that begins now is going to cover.
    fn loose(&self) -> Result<Loose, Error> {
        let reached = self.journal().position()?;
        let rows = |table| Ok((table, self.read(|db| loose_rows(db, table))?));
        Ok(Loose { reached, rows: TABLES.into_iter().map(rows).collect::<Result<_, Error>>()? })
    }

    fn mark_durable(&self, loose: &Loose) -> Result<(), Error> {
        // This transaction alone is synced itself: without it all others would count for nothing.
        self.synced(|| {
            self.write_at(|writer, generation| {
                for (table, rows) in &loose.rows {
                    let same = table.columns.iter().enumerate();
                    let same: Vec<String> =
                        same.map(|(at, column)| format!("{column} IS ?{}", at + 1)).collect();
                    let (name, same) = (table.name, same.join(" AND "));
                    let mut query =
                        writer.db().prepare(&format!("UPDATE {name} SET boot = NULL WHERE {same}"))?;
                    for row in rows {
                        query.execute(params_from_iter(row))?;
                    }
                }
                match loose.reached.filter(|reached| reached.generation == generation) {
                    Some(reached) => {
                        writer.barrier(reached.bytes);
                        remember_covered(writer.db(), &self.boot, reached.bytes)?;
                    }
                    // Somebody has written it anew meanwhile: it does not know that they are durable.
                    None => writer.renew_journal(),
                }
                Ok(())
            })
        })
        .map(drop)
    }
}

/// What is not known to be durable.
struct Loose {
    /// Where the journal stands.
    reached: Option<Position>,
    rows: Vec<(&'static Table, Vec<Vec<Value>>)>,
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

/// The records that are not known to be durable.
fn loose_rows(db: &Connection, table: &Table) -> Result<Vec<Vec<Value>>, rusqlite::Error> {
    let columns = table.columns.join(", ");
    let sql = format!("SELECT {columns} FROM {} WHERE boot IS NOT NULL", table.name);
    let values = |row: &rusqlite::Row<'_>| (0..table.columns.len()).map(|at| row.get(at)).collect();
    db.prepare_cached(&sql)?.query_map([], values)?.collect()
}

/// Makes the directories; returns the boot id.
fn prepare(root: &Path) -> Result<String, Error> {
    let failed = |source| Error::NotWritable { path: root.to_owned(), source };
    check_place(root)?;
    let mut made = false;
    // After a power cut some may be there and others not.
    for dir in DIRS {
        if !root.join(dir).is_dir() {
            DirBuilder::new().recursive(true).mode(0o700).create(root.join(dir)).map_err(failed)?;
            made = true;
        }
    }
    if made {
        // Somebody may have been faster.
        check_place(root)?;
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(failed)?;
    Ok(boot.trim().to_owned())
}

/// Whoever can put another directory in the store's place, or write to it, owns every image in it.
///
/// A link on the way through a directory that anybody may write to counts as the kernel's
/// `fs.protected_symlinks` has it: one's own or root's is safe where nobody else can replace it. The
/// store itself is no link there, whoever made it.
fn check_place(root: &Path) -> Result<(), Error> {
    const STICKY: u32 = 0o1000;
    let refused = |what: String| Error::Unsafe { path: root.to_owned(), what };
    let me = rustix::process::geteuid().as_raw();
    let mut parent_mode = 0;
    let mut at = PathBuf::new();
    for component in root.components() {
        at.push(component);
        let Ok(stat) = fs::symlink_metadata(&at) else { break };
        if stat.is_symlink() && parent_mode & 0o002 != 0 {
            let is_store = at == root;
            if is_store || ![me, 0].contains(&stat.uid()) || parent_mode & STICKY == 0 {
                return Err(refused(format!(
                    "{} is a link in a directory that anybody may write to",
                    at.display()
                )));
            }
        }
        parent_mode = fs::metadata(&at).map_or(0, |stat| stat.mode());
    }
    match fs::metadata(root).map(|stat| stat.uid()) {
        Ok(owner) if owner != me => Err(refused(format!("it belongs to user {owner}"))),
        _ => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ImageRecord;
    use kiln_oci::Digest;

    #[test]
    fn store_of_a_newer_kiln_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.read(|db| db.pragma_update(None, "user_version", 99)).unwrap();
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
        db.execute_batch(crate::index::MIGRATIONS[0]).unwrap();
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
    fn store_that_wrote_nothing_beside_its_layers_does_so_now() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let config = put(&store, "one");
        drop(store);
        fs::remove_dir_all(dir.path().join(crate::sidecars::DIR)).unwrap();
        drop(Store::open(dir.path()).unwrap());
        fs::remove_dir_all(dir.path().join("db")).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(store.rebuilt().unwrap().salvaged);
        assert_eq!(app(&store), Some(config));
    }

    #[test]
    fn words_beside_layers_are_all_there_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let config = put(&store, "one");
        drop(store);
        let (words, new) = (dir.path().join(crate::sidecars::DIR), dir.path().join("records.new"));
        fs::remove_dir_all(&words).unwrap();
        // What somebody left who was killed.
        fs::create_dir(&new).unwrap();
        fs::write(new.join("half"), "kiln-rec").unwrap();
        drop(prepare(dir.path()).unwrap());
        assert!(!words.exists(), "whoever is killed now leaves no sign that they were written");
        drop(Store::open(dir.path()).unwrap());
        assert!(!words.join("half").exists() && !new.exists());
        fs::remove_dir_all(dir.path().join("db")).unwrap();
        assert_eq!(app(&Store::open(dir.path()).unwrap()), Some(config));
    }

    #[test]
    fn words_beside_layers_that_cannot_be_written_are_next_time() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let config = put(&store, "one");
        drop(store);
        let (words, new) = (dir.path().join(crate::sidecars::DIR), dir.path().join("records.new"));
        fs::remove_dir_all(&words).unwrap();
        fs::write(&new, "in the way").unwrap();
        assert_eq!(app(&Store::open(dir.path()).unwrap()), Some(config));
        assert!(!words.exists());
        fs::remove_file(&new).unwrap();
        drop(Store::open(dir.path()).unwrap());
        assert!(words.join(crate::sidecars::NONE).exists());
    }

    #[test]
    fn newer_words_beside_layers_are_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        put(&store, "one");
        drop(store);
        let words = dir.path().join(crate::sidecars::DIR).join(crate::sidecars::NONE);
        let text = fs::read_to_string(&words).unwrap();
        assert!(text.starts_with("kiln-records 1\n"), "{text}");
        fs::write(&words, text.replacen(" 1\n", " 2\n", 1)).unwrap();
        fs::remove_dir_all(dir.path().join("db")).unwrap();
        assert!(matches!(Store::open(dir.path()), Err(Error::NewerStore { found: 2, known: 1, .. })));
        assert!(!dir.path().join("db/meta.sqlite").exists());
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

    fn put(store: &Store, name: &str) -> Digest {
        let config = Digest::of(name.as_bytes());
        let image = ImageRecord { config, manifest: config, snapshot: None, size_bytes: 5, created_unix: 6 };
        store.put_image(&image).unwrap();
        store.set_name(&"app:1".parse().unwrap(), &image).unwrap();
        config
    }

    fn app(store: &Store) -> Option<Digest> {
        store.resolve(&"app:1".parse().unwrap()).unwrap().map(|image| image.config)
    }

    #[test]
    fn name_that_moved_moves_back_although_the_journal_lost_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        store.boot = "old".to_owned();
        let old = put(&store, "old");
        let journal = dir.path().join("db/journal");
        let synced = fs::metadata(&journal).unwrap().len();
        store.barrier().unwrap();
        put(&store, "new");
        drop(store);
        // The line of the barrier, too, came after the sync.
        File::options().write(true).open(&journal).unwrap().set_len(synced).unwrap();
        assert_eq!(app(&Store::open(dir.path()).unwrap()), Some(old));
    }

    #[test]
    fn name_that_moved_moves_back_although_the_journal_was_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let old = put(&store, "old");
        store.barrier().unwrap();
        store.boot = "another".to_owned();
        put(&store, "new");
        let renew = |writer: &mut Writer<'_>| {
            writer.renew_journal();
            Ok(())
        };
        store.write(renew).unwrap();
        drop(store);
        for _ in 0..2 {
            assert_eq!(app(&Store::open(dir.path()).unwrap()), Some(old));
            fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
        }
    }

    #[test]
    fn handle_goes_on_with_the_index_that_somebody_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let running = Store::open(dir.path()).unwrap();
        put(&running, "old");
        running.barrier().unwrap();
        // A line of it is lost, so that the journal is made anew, too.
        let journal = dir.path().join("db/journal");
        let mut bytes = fs::read(&journal).unwrap();
        let last = bytes.len() - 3;
        bytes[last] ^= 1;
        fs::write(&journal, bytes).unwrap();
        let other = Store::open_anew(dir.path()).unwrap();
        let chain = kiln_oci::ChainId(Digest::of(b"other"));
        other.put_chain(&chain, &"s".parse().unwrap()).unwrap();
        assert!(running.snapshot_by_chain(&chain).unwrap().is_some());
        let late = put(&running, "late");
        running.barrier().unwrap();
        assert_eq!(app(&other), Some(late));
        drop((running, other));
        for _ in 0..2 {
            let store = Store::open(dir.path()).unwrap();
            assert_eq!(app(&store), Some(late));
            assert!(store.snapshot_by_chain(&chain).unwrap().is_some());
            assert_eq!(store.find_index_damage().unwrap(), None);
            drop(store);
            fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
        }
    }

    #[test]
    fn transaction_that_is_to_reach_the_disk_does_so_in_an_index_made_anew_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let synchronous = || {
            let value = |db: &Connection| db.query_row("PRAGMA synchronous", [], |row| row.get::<_, i64>(0));
            store.read(value)
        };
        let inside = store.synced(|| {
            drop(Store::open_anew(dir.path()).unwrap());
            synchronous()
        });
        assert_eq!((inside.unwrap(), synchronous().unwrap()), (2, 1));
    }

    #[test]
    fn journal_that_cannot_be_written_anew_stays_long_and_the_change_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (journal, new) = (dir.path().join("db/journal"), dir.path().join("db/journal.new"));
        std::os::unix::fs::symlink("/dev/full", &new).unwrap();
        let key = Digest::of(b"key");
        let cached = crate::CacheRecord {
            canonical: key,
            snapshot: "s".parse().unwrap(),
            created_unix: 1,
            description: "x".repeat(5 << 20),
        };
        store.cache_put(&[key], &cached, false).unwrap();
        assert!(fs::metadata(&journal).unwrap().len() > 5 << 20);
        assert!(fs::symlink_metadata(&new).is_err(), "half a journal takes the last of the space");
        put(&store, "one");
        assert_eq!(store.find_index_damage().unwrap(), None);
        // There was room for it now.
        store.cache_forget_snapshot(&cached.snapshot).unwrap();
        assert!(store.cache_get(&key).unwrap().is_none());
        drop(store);
        fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(app(&store).is_some() && store.cache_get(&key).unwrap().is_none());
    }

    #[test]
    fn half_a_journal_of_somebody_killed_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        fs::write(dir.path().join("db/journal.new"), "half").unwrap();
        assert_eq!((store.sweep_ingest().unwrap(), store.sweep_ingest().unwrap()), (1, 0));
    }

    #[test]
    fn barrier_that_failed_is_still_to_come() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        put(&store, "one");
        let good = std::mem::replace(&mut store.directory, nothing_to_sync());
        for _ in 0..2 {
            assert!(matches!(store.barrier(), Err(Error::Host { .. })));
        }
        store.directory = good;
        store.barrier().unwrap();
        let loose = store.read(|db| loose_rows(db, &crate::tables::NAME)).unwrap();
        assert!(loose.is_empty(), "{loose:?}");
    }

    /// The kernel syncs nothing for a file that is open as a path alone.
    fn nothing_to_sync() -> File {
        use rustix::fs::{CWD, Mode, OFlags, openat};
        openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap().into()
    }

    #[test]
    fn barrier_covers_a_name_that_somebody_set_who_died_before_his() {
        let dir = tempfile::tempdir().unwrap();
        let killed = Store::open(dir.path()).unwrap();
        let config = put(&killed, "made");
        let store = Store::open(dir.path()).unwrap();
        let image = store.image(&config).unwrap().unwrap();
        store.set_name(&"app:1".parse().unwrap(), &image).unwrap();
        store.barrier().unwrap();
        let loose = store.read(|db| loose_rows(db, &crate::tables::NAME)).unwrap();
        assert!(loose.is_empty(), "{loose:?}");
    }

    #[test]
    fn barrier_does_not_cover_what_changes_during_its_sync() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        put(&store, "one");
        let loose = store.loose().unwrap();
        store.dirty.store(false, Ordering::Relaxed);
        // Takes the row id of the one that it replaces, which was the last.
        put(&store, "other");
        assert!(store.dirty.swap(false, Ordering::Relaxed));
        store.mark_durable(&loose).unwrap();
        assert!(!store.dirty.load(Ordering::Relaxed), "a barrier needs no barrier");
        let rows = |table| store.read(|db| loose_rows(db, table)).unwrap().len();
        assert_eq!((rows(&crate::tables::NAME), rows(&crate::tables::IMAGE)), (1, 1));
    }

    #[test]
    fn name_that_moved_before_a_crash_of_the_machine_moves_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
        let put = |store: &Store, config| {
            let image =
                ImageRecord { config, manifest: config, snapshot: None, size_bytes: 5, created_unix: 6 };
            store.put_image(&image).unwrap();
            store.set_name(&"app:1".parse().unwrap(), &image).unwrap();
        };
        put(&store, old);
        store.barrier().unwrap();
        store.boot = "another".to_owned();
        put(&store, new);
        drop(store);
        for _ in 0..2 {
            let store = Store::open(dir.path()).unwrap();
            assert_eq!(store.resolve(&"app:1".parse().unwrap()).unwrap().unwrap().config, old);
            assert_eq!(store.images().unwrap().len(), 1);
            drop(store);
            // The same when the index is lost on top of it.
            fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
        }
    }
}
