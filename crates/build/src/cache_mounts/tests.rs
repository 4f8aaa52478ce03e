use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;

struct Store {
    dir: tempfile::TempDir,
}

/// Nobody waits in these tests unless a test says so.
struct Patience {
    told: AtomicUsize,
    cancelled: AtomicBool,
}

impl Waiting for Patience {
    fn waiting(&self, _id: &str) {
        self.told.fetch_add(1, Ordering::SeqCst);
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
}

fn patience(cancelled: bool) -> Patience {
    Patience { told: AtomicUsize::new(0), cancelled: AtomicBool::new(cancelled) }
}

fn nothing(_: usize, _: BorrowedFd<'_>) -> Result<(), OpError> {
    Ok(())
}

fn want(id: &str, sharing: Sharing) -> Want {
    Want { id: id.to_owned(), sharing, mode: 0o755, uid: 0, gid: 0, seed: None }
}

impl Store {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn build(&self, fresh: bool) -> CacheMounts {
        CacheMounts::new(self.dir.path(), fresh)
    }

    /// Takes a cache in a build of its own; an error when it would have to wait.
    fn try_take(&self, want: Want) -> Result<Arc<CacheUse>, OpError> {
        take(&self.build(false), want)
    }

    fn take(&self, id: &str, sharing: Sharing) -> Arc<CacheUse> {
        self.try_take(want(id, sharing)).unwrap()
    }
}

fn take(build: &CacheMounts, want: Want) -> Result<Arc<CacheUse>, OpError> {
    Ok(build.acquire(&[want], &nothing, &patience(true))?.remove(0))
}

/// A path below a cache's directory, for `std::fs`.
fn at(cache: &CacheUse, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{path}", cache.as_fd().as_raw_fd()))
}

fn write(cache: &CacheUse, path: &str, content: &str) {
    fs::write(at(cache, path), content).unwrap();
}

fn read(cache: &CacheUse, path: &str) -> Option<String> {
    fs::read_to_string(at(cache, path)).ok()
}

#[test]
fn what_one_step_wrote_the_next_one_finds() {
    let store = Store::new();
    write(&store.take("go", Sharing::Shared), "x", "kept");
    for sharing in [Sharing::Shared, Sharing::Private, Sharing::Locked] {
        assert_eq!(read(&store.take("go", sharing), "x").as_deref(), Some("kept"));
    }
    assert_eq!(read(&store.take("other", Sharing::Shared), "x"), None);
}

#[test]
fn shared_is_one_directory_private_a_second_and_locked_waits() {
    let store = Store::new();
    let shared = store.take("go", Sharing::Shared);
    write(&shared, "x", "first");
    assert!(read(&store.take("go", Sharing::Shared), "x").is_some());
    assert!(read(&store.take("go", Sharing::Private), "x").is_none());
    let waits = store.try_take(want("go", Sharing::Locked));
    assert!(matches!(waits, Err(OpError::Exec(kiln_executor::ExecError::Cancelled))), "{waits:?}");
    drop(shared);
    assert!(read(&store.take("go", Sharing::Locked), "x").is_some());
}

#[test]
fn waiting_is_told_once_and_ends_when_the_other_step_does() {
    let store = Store::new();
    let first = store.take("go", Sharing::Locked);
    let build = store.build(false);
    let waiter = patience(false);
    std::thread::scope(|scope| {
        let second =
            scope.spawn(|| build.acquire(&[want("go", Sharing::Locked)], &nothing, &waiter).map(drop));
        while waiter.told.load(Ordering::SeqCst) == 0 {
            assert!(!second.is_finished(), "the cache is locked");
            std::thread::yield_now();
        }
        drop(first);
        second.join().unwrap().unwrap();
    });
    assert_eq!(waiter.told.load(Ordering::SeqCst), 1);
}

#[test]
fn steps_that_want_the_same_caches_in_different_order_both_end() {
    let store = Store::new();
    let locked = |id: &str| want(id, Sharing::Locked);
    std::thread::scope(|scope| {
        let steps = [["a", "b"], ["b", "a"]].map(|ids| {
            let build = store.build(false);
            scope.spawn(move || {
                for _ in 0..20 {
                    drop(build.acquire(&ids.map(locked), &nothing, &patience(false)).unwrap());
                }
            })
        });
        for step in steps {
            step.join().unwrap();
        }
    });
}

#[test]
fn one_step_with_the_same_cache_twice_does_not_wait_for_itself() {
    let store = Store::new();
    let wanted = [want("go", Sharing::Locked), want("go", Sharing::Locked)];
    let both = store.build(false).acquire(&wanted, &nothing, &patience(true)).unwrap();
    write(&both[0], "x", "seen");
    assert_eq!(read(&both[1], "x").as_deref(), Some("seen"));
}

#[test]
fn an_id_never_becomes_a_path() {
    let store = Store::new();
    let long = "x".repeat(4096);
    for id in ["../../x", "..", "a/b", "/etc", "", "a\0b", "ünïcödé", long.as_str()] {
        write(&store.take(id, Sharing::Shared), "x", id);
        assert_eq!(read(&store.take(id, Sharing::Shared), "x").as_deref(), Some(id));
    }
    let names = fs::read_dir(store.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["cache-mounts"]);
    let listed = cache_mounts(store.dir.path()).unwrap();
    assert_eq!(listed.len(), 8);
    assert!(listed.iter().all(|cache| cache.name.bytes().all(|b| b.is_ascii_hexdigit())));
    assert!(listed.iter().any(|cache| cache.record.id == "../../x"));
}

#[test]
fn a_new_cache_has_the_mode_and_owner_asked_for_and_these_tell_caches_apart() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED ALOUD: needs root");
        return;
    }
    let store = Store::new();
    let theirs = Want { mode: 0o700, uid: 1000, gid: 1001, ..want("npm", Sharing::Shared) };
    let cache = store.try_take(theirs.clone()).unwrap();
    let stat = cache.data.metadata().unwrap();
    assert_eq!((stat.permissions().mode() & 0o7777, stat.uid(), stat.gid()), (0o700, 1000, 1001));
    write(&cache, "x", "");
    assert_eq!(read(&store.take("npm", Sharing::Shared), "x"), None);
    drop(cache);
    assert!(read(&store.try_take(theirs).unwrap(), "x").is_some());
}

#[test]
fn a_seed_fills_a_new_cache_only_and_a_failed_one_leaves_none() {
    let store = Store::new();
    let seeded = || Want { seed: Some("tree /src".to_owned()), ..want("go", Sharing::Shared) };
    let acquire = |seed: Seed<'_>| store.build(false).acquire(&[seeded()], seed, &patience(true));
    let fail = |_: usize, dir: BorrowedFd<'_>| {
        fs::write(format!("/proc/self/fd/{}/half", dir.as_raw_fd()), "").unwrap();
        Err(OpError::NoSecret { id: "any error".to_owned() })
    };
    assert!(acquire(&fail).is_err());
    let fill = |_: usize, dir: BorrowedFd<'_>| {
        fs::write(format!("/proc/self/fd/{}/seed", dir.as_raw_fd()), "planted").unwrap();
        Ok(())
    };
    let cache = acquire(&fill).unwrap().remove(0);
    assert_eq!(read(&cache, "seed").as_deref(), Some("planted"));
    assert_eq!(read(&cache, "half"), None);
    write(&cache, "seed", "grown");
    assert_eq!(read(&acquire(&fill).unwrap()[0], "seed").as_deref(), Some("grown"));
}

#[test]
fn a_build_without_cache_starts_empty_once_and_leaves_steps_in_flight_alone() {
    let store = Store::new();
    let old = store.take("go", Sharing::Shared);
    write(&old, "x", "old");
    let fresh = store.build(true);
    let new = take(&fresh, want("go", Sharing::Shared)).unwrap();
    assert_eq!(read(&new, "x"), None);
    write(&new, "x", "new");
    // The second step of the same build goes on with what the first one left.
    assert_eq!(read(&take(&fresh, want("go", Sharing::Shared)).unwrap(), "x").as_deref(), Some("new"));
    assert_eq!(read(&old, "x").as_deref(), Some("old"));
    drop((old, new));
    assert_eq!(read(&store.take("go", Sharing::Shared), "x").as_deref(), Some("new"));
    let cache = Cache { dir: store.dir.path().join("cache-mounts").join(want("go", Sharing::Shared).name()) };
    assert_eq!(cache.copies().unwrap(), ["0"], "what nobody uses any more is gone");
}

#[test]
fn a_half_made_copy_of_a_killed_process_is_swept() {
    let store = Store::new();
    drop(store.take("go", Sharing::Shared));
    let dir = store.dir.path().join("cache-mounts").join(want("go", Sharing::Shared).name());
    fs::create_dir_all(dir.join("tmp/data/half")).unwrap();
    drop(store.take("go", Sharing::Shared));
    assert!(!dir.join("tmp").exists());
}

#[test]
fn a_cache_in_use_is_not_removed() {
    let store = Store::new();
    let cache = store.take("go", Sharing::Shared);
    write(&cache, "x", "");
    let [info] = cache_mounts(store.dir.path()).unwrap().try_into().unwrap();
    assert!(info.in_use && info.record.last_used_unix >= info.record.created_unix);
    assert!(!remove_cache_mount(store.dir.path(), &info.name).unwrap());
    assert!(read(&cache, "x").is_some());
    drop(cache);
    assert!(remove_cache_mount(store.dir.path(), &info.name).unwrap());
    assert_eq!(cache_mounts(store.dir.path()).unwrap(), []);
    assert_eq!(read(&store.take("go", Sharing::Shared), "x"), None);
    assert!(remove_cache_mount(store.dir.path(), "../x").is_err());
}
