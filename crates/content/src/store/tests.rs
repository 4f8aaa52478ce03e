use std::fs;

use super::barrier::loose_rows;
use super::directory::DIRS;
use super::*;
use crate::ImageRecord;
use kiln_oci::Digest;

/// An empty store; it goes with its directory.
pub(crate) fn new_store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

#[test]
fn store_of_a_newer_kiln_is_refused() {
    let (dir, store) = new_store();
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
    let (dir, store) = new_store();
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
    let (dir, store) = new_store();
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
    let (dir, store) = new_store();
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
    let (dir, store) = new_store();
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
    let (dir, mut store) = new_store();
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
    let (dir, mut store) = new_store();
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
    let (dir, mut store) = new_store();
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
    let (dir, store) = new_store();
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
    let (dir, store) = new_store();
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
    let (dir, store) = new_store();
    fs::write(dir.path().join("db/journal.new"), "half").unwrap();
    assert_eq!((store.sweep_ingest().unwrap(), store.sweep_ingest().unwrap()), (1, 0));
}

#[test]
fn barrier_that_failed_is_still_to_come() {
    let (_dir, mut store) = new_store();
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
    let (_dir, store) = new_store();
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
    let (dir, mut store) = new_store();
    let old = put(&store, "old");
    store.barrier().unwrap();
    store.boot = "another".to_owned();
    put(&store, "new");
    drop(store);
    for _ in 0..2 {
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(app(&store), Some(old));
        assert_eq!(store.images().unwrap().len(), 1);
        drop(store);
        // The same when the index is lost on top of it.
        fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
    }
}
