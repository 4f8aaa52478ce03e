//! Leases: what a living process is working on.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_oci::ActiveKey;

use crate::{Error, Store};

/// Held by a process while it works; the kernel lets go of the lock when the process dies.
pub struct Lease {
    id: String,
    path: PathBuf,
    next: AtomicU64,
    _lock: File,
}

/// Twelve hexadecimal digits that no two calls share.
pub(crate) fn random() -> String {
    // The standard library seeds every `RandomState` anew; time and pid keep forks apart.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let hash = RandomState::new().hash_one((std::process::id(), now.as_nanos()));
    format!("{:012x}", hash & 0xffff_ffff_ffff)
}

/// Makes a file and locks it; `None`: it was swept away in between as one of the dead.
pub(crate) fn create_locked(path: &Path) -> Result<Option<File>, Error> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
    let file = file.map_err(Error::host("create", path))?;
    file.lock().map_err(Error::host("lock", path))?;
    let ours = file.metadata().map_err(Error::host("stat", path))?;
    let same = |there: fs::Metadata| (there.dev(), there.ino()) == (ours.dev(), ours.ino());
    Ok(fs::metadata(path).is_ok_and(same).then_some(file))
}

impl Lease {
    /// A name for a snapshot of this process; never given twice.
    pub fn new_key(&self) -> ActiveKey {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{}-{number}", self.id).parse().expect("hexadecimal digits, a dash and a number")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // One that stays behind is dead and goes with the next look at it.
        let _ = fs::remove_file(&self.path);
    }
}

impl Store {
    fn lease_path(&self, id: &str) -> PathBuf {
        self.root().join("locks").join(format!("lease-{id}"))
    }

    /// Takes a new lease.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn lease(&self) -> Result<Lease, Error> {
        loop {
            let id = random();
            let path = self.lease_path(&id);
            if let Some(file) = create_locked(&path)? {
                return Ok(Lease { id, path, next: AtomicU64::new(0), _lock: file });
            }
        }
    }

    /// Removes the files of leases whose process is dead; how many.
    ///
    /// # Errors
    /// [`Error::Host`] when the directory cannot be read.
    pub fn sweep_leases(&self) -> Result<usize, Error> {
        let dir = self.root().join("locks");
        let mut removed = 0;
        for entry in fs::read_dir(&dir).map_err(Error::host("read", dir.clone()))? {
            let entry = entry.map_err(Error::host("read", dir.clone()))?;
            let name = entry.file_name();
            // Claims on steps are locked files of living processes, too.
            if ![&b"lease-"[..], b"step-"].iter().any(|kind| name.as_encoded_bytes().starts_with(kind)) {
                continue;
            }
            let Ok(file) = File::open(entry.path()) else { continue };
            if file.try_lock().is_ok() && fs::remove_file(entry.path()).is_ok() {
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Whether the process that made `key` still lives, or the container whose layer it is is there.
    pub fn is_key_live(&self, key: &ActiveKey) -> bool {
        if self.is_container(key) {
            return true;
        }
        let id = key.as_str().split('-').next().unwrap_or_default();
        let path = self.lease_path(id);
        let Ok(file) = File::open(&path) else { return false };
        match file.try_lock() {
            Ok(()) => {
                let _ = fs::remove_file(&path);
                false
            }
            Err(TryLockError::WouldBlock) => true,
            // In doubt nothing is removed.
            Err(TryLockError::Error(_)) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::new_store;

    #[test]
    fn keys_live_as_long_as_their_lease() {
        let (_dir, store) = new_store();
        let lease = store.lease().unwrap();
        let (one, two) = (lease.new_key(), lease.new_key());
        assert_ne!(one, two);
        assert!(store.is_key_live(&one) && store.is_key_live(&two));
        drop(lease);
        assert!(!store.is_key_live(&one));
    }

    #[test]
    fn only_leases_of_the_dead_are_swept() {
        let (_dir, store) = new_store();
        let lease = store.lease().unwrap();
        fs::write(store.lease_path("00aa"), "").unwrap();
        assert_eq!(store.sweep_leases().unwrap(), 1);
        assert!(lease.path.exists());
        assert!(store.is_key_live(&lease.new_key()));
    }

    #[test]
    fn lock_file_of_a_killed_process_counts_as_dead() {
        let (_dir, store) = new_store();
        fs::write(store.lease_path("00aa"), "").unwrap();
        assert!(!store.is_key_live(&"00aa-7".parse().unwrap()));
        assert!(!store.lease_path("00aa").exists());
    }
}
