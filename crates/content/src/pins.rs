//! Pins: what living processes use, so that garbage collection leaves it alone.
//!
//! A user of a snapshot or blob holds a shared lock on one byte of `locks/pins`, at an offset that
//! is a hash of the name; garbage collection wants the byte for itself. The locks belong to open
//! file descriptions: the kernel lets go of them when the process dies, however it dies.
//!
//! Users pin first and look second. Garbage collection forgets records and removes data while it
//! has the byte, so what a user finds after the pin stays; what is gone by then is not found.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_oci::{Digest, SnapshotId};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::{Error, Store};

/// Something that can be pinned.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Pinnable {
    /// A committed snapshot, or one that is about to be.
    Snapshot(SnapshotId),
    /// A blob, or one that is about to be there.
    Blob(Digest),
}

impl Pinnable {
    /// Its byte. Two names may share one: then each keeps the other, which costs a little space.
    fn offset(&self) -> i64 {
        let name = match self {
            Pinnable::Snapshot(id) => format!("snapshot:{id}"),
            Pinnable::Blob(digest) => format!("blob:{digest}"),
        };
        let digest = Digest::of(name.as_bytes());
        let head = digest.as_bytes().first_chunk::<8>().map_or(0, |head| u64::from_be_bytes(*head));
        // 62 bits: the range that ends behind the byte must fit into an i64, too.
        i64::try_from(head >> 2).unwrap_or(0)
    }
}

/// The pins of one handle, on one open file description.
pub(crate) struct Pins {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Opened with the first pin.
    file: Option<Arc<File>>,
    /// How many pins there are for each byte.
    counts: HashMap<i64, usize>,
    /// Pinned for as long as the handle lives.
    kept: HashMap<Pinnable, Pin>,
}

/// Keeps one thing in the store while it lives.
#[derive(Debug)]
pub struct Pin {
    offset: i64,
    pins: std::sync::Weak<Pins>,
}

impl std::fmt::Debug for Pins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pins").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // Without its handle there is no lock either.
        let Some(pins) = self.pins.upgrade() else { return };
        let mut state = pins.lock();
        let left = state.counts.get_mut(&self.offset).map(|count| {
            *count -= 1;
            *count
        });
        if left == Some(0) {
            state.counts.remove(&self.offset);
            if let Some(file) = &state.file {
                // It cannot fail for a byte that is ours; if it does, the byte stays pinned.
                let _ = set(file, libc::F_UNLCK, self.offset, false);
            }
        }
    }
}

impl Pins {
    pub(crate) fn new(root: &Path) -> Arc<Self> {
        Arc::new(Self { path: path(root), state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counts are changed only after the locks they stand for.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while garbage collection has the byte: as long as it takes to remove one thing.
    fn pin(self: &Arc<Self>, what: &Pinnable) -> Result<Pin, Error> {
        let offset = what.offset();
        let failed = |error| Error::host("lock", &self.path)(error);
        loop {
            let mut state = self.lock();
            let file = match &state.file {
                Some(file) => file.clone(),
                None => state.file.insert(Arc::new(open(&self.path)?)).clone(),
            };
            let count = state.counts.entry(offset).or_default();
            // Locked and counted in one step: another thread's last pin unlocks the byte for all.
            if *count == 0 && !try_set(&file, libc::F_RDLCK, offset).map_err(failed)? {
                state.counts.remove(&offset);
                drop(state);
                // Without the mutex: others pin and unpin while this waits.
                set(&file, libc::F_RDLCK, offset, true).map_err(failed)?;
                continue;
            }
            *count += 1;
            return Ok(Pin { offset, pins: Arc::downgrade(self) });
        }
    }
}

fn path(root: &Path) -> PathBuf {
    root.join("locks/pins")
}

fn open(path: &Path) -> Result<File, Error> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    file.map_err(Error::host("open", path))
}

fn set(file: &File, kind: i32, offset: i64, wait: bool) -> io::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: offset,
        l_len: 1,
        l_pid: 0,
    };
    loop {
        let argument = if wait { FcntlArg::F_OFD_SETLKW(&lock) } else { FcntlArg::F_OFD_SETLK(&lock) };
        match fcntl(file, argument) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) if wait => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Without waiting; `false`: somebody has a lock that stands against it.
fn try_set(file: &File, kind: i32, offset: i64) -> io::Result<bool> {
    match set(file, kind, offset, false) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Store {
    /// Pins something, there or not, until the pin is dropped.
    ///
    /// # Errors
    /// [`Error::Host`] when there is no lock to be had.
    pub fn pin(&self, what: &Pinnable) -> Result<Pin, Error> {
        self.pins.pin(what)
    }

    /// Pins something for as long as this handle lives; `false`: it had done so already.
    ///
    /// # Errors
    /// As [`Store::pin`].
    pub fn hold(&self, what: Pinnable) -> Result<bool, Error> {
        if self.pins.lock().kept.contains_key(&what) {
            return Ok(false);
        }
        let pin = self.pins.pin(&what)?;
        let doubled = self.pins.lock().kept.insert(what, pin);
        // Dropping a pin takes the mutex: not before it is free again.
        drop(doubled);
        Ok(true)
    }

    /// [`Store::hold`] for a snapshot.
    ///
    /// # Errors
    /// As [`Store::pin`].
    pub fn hold_snapshot(&self, id: &SnapshotId) -> Result<bool, Error> {
        self.hold(Pinnable::Snapshot(id.clone()))
    }

    /// [`Store::hold`] for a blob.
    ///
    /// # Errors
    /// As [`Store::pin`].
    pub fn hold_blob(&self, digest: &Digest) -> Result<bool, Error> {
        self.hold(Pinnable::Blob(*digest))
    }

    /// The snapshots that this handle used so far.
    pub(crate) fn held_snapshots(&self) -> Vec<SnapshotId> {
        let state = self.pins.lock();
        let ids = state.kept.keys().filter_map(|kept| match kept {
            Pinnable::Snapshot(id) => Some(id.clone()),
            Pinnable::Blob(_) => None,
        });
        ids.collect()
    }
}

/// Takes what nobody has pinned, for garbage collection.
pub struct Claims {
    path: PathBuf,
    /// A description of its own: even this process's pins stand against it.
    file: File,
    /// How many claims there are for each byte.
    counts: Mutex<HashMap<i64, usize>>,
}

/// Nobody can pin this while it lives.
pub struct Claim<'a> {
    claims: &'a Claims,
    offset: i64,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut counts = self.claims.counts();
        let left = counts.get_mut(&self.offset).map(|count| {
            *count -= 1;
            *count
        });
        if left == Some(0) {
            counts.remove(&self.offset);
            let _ = set(&self.claims.file, libc::F_UNLCK, self.offset, false);
        }
    }
}

impl Claims {
    /// Opens the pins of `store`.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn open(store: &Store) -> Result<Self, Error> {
        let path = path(store.root());
        Ok(Self { file: open(&path)?, path, counts: Mutex::default() })
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<i64, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims `what`, once more if it is claimed by this already; `None`: somebody uses it.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn claim(&self, what: &Pinnable) -> Result<Option<Claim<'_>>, Error> {
        let offset = what.offset();
        let mut counts = self.counts();
        let count = counts.entry(offset).or_default();
        let failed = |error| Error::host("lock", &self.path)(error);
        if *count == 0 && !try_set(&self.file, libc::F_WRLCK, offset).map_err(failed)? {
            counts.remove(&offset);
            return Ok(None);
        }
        *count += 1;
        Ok(Some(Claim { claims: self, offset }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(name: &str) -> Pinnable {
        Pinnable::Snapshot(name.parse().unwrap())
    }

    fn is_free(store: &Store, what: &Pinnable) -> bool {
        Claims::open(store).unwrap().claim(what).unwrap().is_some()
    }

    #[test]
    fn what_is_pinned_cannot_be_claimed_until_the_last_pin_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (store, other) = (Store::open(dir.path()).unwrap(), Store::open(dir.path()).unwrap());
        let a = snapshot("a");
        assert!(is_free(&store, &a));
        let (one, two, far) = (store.pin(&a).unwrap(), store.pin(&a).unwrap(), other.pin(&a).unwrap());
        assert!(is_free(&store, &snapshot("b")));
        for pin in [one, two, far] {
            assert!(!is_free(&store, &a));
            drop(pin);
        }
        assert!(is_free(&store, &a));
    }

    #[test]
    fn what_is_held_stays_as_long_as_the_handle() {
        let dir = tempfile::tempdir().unwrap();
        let (store, other) = (Store::open(dir.path()).unwrap(), Store::open(dir.path()).unwrap());
        let (a, b) = (snapshot("a"), Pinnable::Blob(Digest::of(b"b")));
        store.hold(a.clone()).unwrap();
        store.hold(a.clone()).unwrap();
        store.hold(b.clone()).unwrap();
        drop(store.pin(&a).unwrap());
        assert!(!is_free(&other, &a) && !is_free(&other, &b));
        assert_eq!(store.held_snapshots().len(), 1);
        drop(store);
        assert!(is_free(&other, &a) && is_free(&other, &b));
    }

    #[test]
    fn a_pin_waits_for_the_claim() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path()).unwrap());
        let claims = Claims::open(&store).unwrap();
        let claim = claims.claim(&snapshot("a")).unwrap().unwrap();
        let removed = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let user = std::thread::spawn({
            let (store, removed) = (store.clone(), removed.clone());
            move || {
                let _pin = store.pin(&snapshot("a")).unwrap();
                assert!(removed.load(std::sync::atomic::Ordering::SeqCst), "pinned under a claim");
            }
        });
        // Others are not in its way.
        drop(store.pin(&snapshot("b")).unwrap());
        removed.store(true, std::sync::atomic::Ordering::SeqCst);
        drop(claim);
        user.join().unwrap();
    }
}
