//! Space set aside, so that a full disk can be cleared: forgetting and removing need to write, too.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use crate::{Space, Store};

/// Enough for the index and its log to forget a few thousand records.
const RESERVE_BYTES: u64 = 2 << 20;
/// Set aside only while much more than that is free.
const PLENTY_BYTES: u64 = 32 << 20;

fn path(root: &Path) -> PathBuf {
    root.join("db/reserve")
}

fn free_bytes(root: &Path) -> u64 {
    Space::of(root).map_or(u64::MAX, |space| space.free_bytes)
}

/// Whether so many bytes can be written and leave the space that a full disk needs to be cleared.
pub(crate) fn has_room(root: &Path, bytes: u64) -> bool {
    free_bytes(root) > bytes.saturating_add(RESERVE_BYTES)
}

/// Gives the space free if the disk is as good as full; whether there is more of it now.
pub(crate) fn release(root: &Path) -> bool {
    free_bytes(root) < RESERVE_BYTES && fs::remove_file(path(root)).is_ok()
}

impl Store {
    /// Sets the space aside, if it is not and the disk has plenty. One system call when it is.
    pub fn keep_reserve(&self) {
        let path = path(self.root());
        if path.exists() || free_bytes(self.root()) < PLENTY_BYTES {
            return;
        }
        let made = File::create(&path)
            .map_err(drop)
            .and_then(|file| fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES).map_err(drop));
        // A file that holds no space is of no use.
        if made.is_err() {
            let _ = fs::remove_file(path);
        }
    }

    /// Gives the space free if the disk is as good as full, for whoever is going to remove things.
    /// However that ends, it is set aside again then, if the disk has plenty.
    pub fn release_reserve(&self) -> ReleasedReserve<'_> {
        release(self.root());
        ReleasedReserve(self)
    }
}

/// Sets the space aside again when dropped.
#[must_use = "the space is set aside again as soon as this is dropped"]
pub struct ReleasedReserve<'a>(&'a Store);

impl Drop for ReleasedReserve<'_> {
    fn drop(&mut self) {
        self.0.keep_reserve();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::store::tests::new_store;

    #[test]
    fn space_is_set_aside_by_whoever_writes_a_record() {
        let (dir, store) = new_store();
        if free_bytes(dir.path()) < PLENTY_BYTES {
            eprintln!("SKIPPED ALOUD: the disk is nearly full");
            return;
        }
        store.barrier().unwrap();
        assert!(!path(dir.path()).exists(), "nothing was written");
        let chain = kiln_oci::ChainId(kiln_oci::Digest::of(b"chain"));
        store.put_chain(&chain, &"s".parse().unwrap()).unwrap();
        store.barrier().unwrap();
        assert!(path(dir.path()).exists());
    }

    #[test]
    fn space_is_set_aside_once_and_kept_while_the_disk_has_room() {
        let (dir, store) = new_store();
        if free_bytes(dir.path()) < PLENTY_BYTES {
            eprintln!("SKIPPED ALOUD: the disk is nearly full");
            return;
        }
        store.keep_reserve();
        let made = fs::metadata(path(dir.path())).unwrap();
        assert!(made.blocks() * 512 >= RESERVE_BYTES);
        store.keep_reserve();
        drop(store.release_reserve());
        assert_eq!(fs::metadata(path(dir.path())).unwrap().ino(), made.ino());
        // As on a disk that was full.
        let released = store.release_reserve();
        fs::remove_file(path(dir.path())).unwrap();
        drop(released);
        assert!(path(dir.path()).exists());
    }
}
