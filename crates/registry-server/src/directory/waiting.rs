//! What came and belongs to nothing yet: uploads, and blobs that no manifest needs so far.
//!
//! Whoever may push could fill the disk without ever sending a manifest, or with manifests that nothing leads to. Where
//! a limit is set they are counted: from the disk at the start, as they come and go, and anew with each collection.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use kiln_oci::Digest;

use super::collect::Reach;
use super::{Directory, DirectoryError, digests, names};
use crate::route::Name;
use crate::settings::Limits;

/// Blobs that no manifest needs, manifests that nothing leads to, and how much may wait.
pub(crate) struct Waiting {
    /// `None`: as much as the disk has room for. Nothing is counted then.
    limit_bytes: Option<u64>,
    all: Mutex<All>,
    /// A blob waits until a tag leads to what needs it, not until a manifest does.
    is_strict: AtomicBool,
}

#[derive(Default)]
struct All {
    /// Of blobs, and of manifests with the repository that each is in.
    sizes: HashMap<(Option<Name>, Digest), u64>,
    /// The sum of them.
    size_bytes: u64,
}

/// What a file takes: many that are empty fill a disk, too.
pub(super) fn on_disk(size_bytes: u64) -> u64 {
    size_bytes.max(4096)
}

impl Waiting {
    pub(super) fn new(limits: &Limits) -> Self {
        Self { limit_bytes: limits.waiting_bytes, all: Mutex::default(), is_strict: AtomicBool::new(false) }
    }

    /// Whether anybody wants to know.
    pub(super) fn is_counted(&self) -> bool {
        self.limit_bytes.is_some()
    }

    /// From now on tags count alone, where manifests without one do not stay.
    pub(crate) fn be_strict(&self) {
        self.is_strict.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_strict(&self) -> bool {
        self.is_strict.load(Ordering::Relaxed)
    }

    /// Something came, or nothing needs it any more.
    pub(super) fn add(&self, digest: &Digest, size_bytes: u64) {
        if self.is_counted() {
            self.set((None, *digest), Some(on_disk(size_bytes)));
        }
    }

    /// Something needs it, or it is gone.
    pub(super) fn forget(&self, digest: &Digest) {
        if self.is_counted() {
            self.set((None, *digest), None);
        }
    }

    /// As [`Waiting::add`], for a manifest: each repository has a file of it.
    pub(super) fn add_manifest(&self, name: &Name, digest: &Digest, size_bytes: u64) {
        if self.is_counted() {
            self.set((Some(name.clone()), *digest), Some(on_disk(size_bytes)));
        }
    }

    /// As [`Waiting::forget`].
    pub(super) fn forget_manifest(&self, name: &Name, digest: &Digest) {
        if self.is_counted() {
            self.set((Some(name.clone()), *digest), None);
        }
    }

    fn set(&self, which: (Option<Name>, Digest), size_bytes: Option<u64>) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match size_bytes {
            Some(size_bytes) => all.sizes.insert(which, size_bytes),
            None => all.sizes.remove(&which),
        };
        all.size_bytes = all.size_bytes + size_bytes.unwrap_or(0) - before.unwrap_or(0);
    }

    fn size_bytes(&self) -> u64 {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).size_bytes
    }
}

impl Directory {
    /// As [`Directory::lacks_room`] for a manifest that comes with a tag: it lets go of what waits for it, so that it
    /// may come when nothing else may. If it is refused in the end it waits as well.
    pub(crate) fn lacks_room_for_tag(&self, more_bytes: u64) -> bool {
        /// For so many large ones that were refused.
        const SLACK_BYTES: u64 = 64 << 20;
        let all = self.waiting.size_bytes().saturating_add(more_bytes);
        self.waiting.limit_bytes.is_some_and(|limit| all > limit.saturating_add(SLACK_BYTES))
    }

    /// The limit, if `more_bytes` would go beyond it. Costs looking at each upload.
    pub(crate) fn lacks_room(&self, more_bytes: u64) -> Option<u64> {
        let limit_bytes = self.waiting.limit_bytes?;
        let all =
            self.waiting.size_bytes().saturating_add(self.uploads.size_bytes()).saturating_add(more_bytes);
        (all > limit_bytes).then_some(limit_bytes)
    }

    /// Counts the blobs that wait on the disk. Costs reading all manifests.
    pub(super) fn find_waiting(&self) -> Result<(), DirectoryError> {
        if self.waiting.limit_bytes.is_none() {
            return Ok(());
        }
        let mut needed = HashSet::new();
        for name in self.repositories()? {
            let found = self.manifests(&name)?;
            let found = match self.reach(&name, found, Reach::Down) {
                // What it would lead to stays, and is nobody's who pushes.
                Err(DirectoryError::Damaged { .. }) => {
                    needed.extend(digests(&self.repository(&name).join("_blobs"))?);
                    continue;
                }
                found => found?,
            };
            needed.extend(found.into_values().flatten());
        }
        let blobs = self.root.join("blobs/sha256");
        for first in names(&blobs)? {
            for digest in digests(&blobs.join(&first))? {
                if !needed.contains(&digest) {
                    self.waiting.add(&digest, fs::metadata(self.blob(&digest)).map_or(0, |stat| stat.len()));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_counted_once_and_small_files_as_what_they_take() {
        let waiting = Waiting::new(&Limits { waiting_bytes: Some(1), ..Limits::default() });
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        waiting.add(&one, 10_000);
        waiting.add(&one, 10_000);
        waiting.add(&two, 0);
        assert_eq!(waiting.size_bytes(), 14_096);
        waiting.add(&one, 5_000);
        waiting.forget(&two);
        waiting.forget(&two);
        let (first, second): (Name, Name) = ("a".parse().unwrap(), "b".parse().unwrap());
        waiting.add_manifest(&first, &two, 5_000);
        waiting.add_manifest(&second, &two, 5_000);
        assert_eq!(waiting.size_bytes(), 15_000);
        waiting.forget_manifest(&first, &two);
        waiting.forget(&two);
        assert_eq!(waiting.size_bytes(), 10_000);
        waiting.forget_manifest(&second, &two);
        assert_eq!(waiting.size_bytes(), 5_000);
        let nobody = Waiting::new(&Limits::default());
        nobody.add(&one, 1);
        assert_eq!(nobody.size_bytes(), 0);
    }
}
