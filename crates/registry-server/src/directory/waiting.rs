//! What came and belongs to nothing yet: uploads, and blobs that no manifest needs so far.
//!
//! Whoever may push could fill the disk without ever sending a manifest. Where a limit is set they are counted: from the
//! disk at the start, and then as they come and go.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_oci::Digest;

use super::manifests::Reads;
use super::{Directory, DirectoryError, names};
use crate::route::Which;
use crate::settings::Limits;

/// Blobs that no manifest needs, and how much may wait.
pub(crate) struct Waiting {
    /// `None`: as much as the disk has room for. Nothing is counted then.
    limit_bytes: Option<u64>,
    blobs: Mutex<HashMap<Digest, u64>>,
}

impl Waiting {
    pub(super) fn new(limits: &Limits) -> Self {
        Self { limit_bytes: limits.waiting_bytes, blobs: Mutex::default() }
    }

    fn blobs(&self) -> MutexGuard<'_, HashMap<Digest, u64>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A blob came.
    pub(super) fn add(&self, digest: &Digest, size_bytes: u64) {
        if self.limit_bytes.is_some() {
            self.blobs().insert(*digest, size_bytes);
        }
    }

    /// A manifest needs it, or it is gone.
    pub(super) fn forget(&self, digest: &Digest) {
        if self.limit_bytes.is_some() {
            self.blobs().remove(digest);
        }
    }
}

impl Directory {
    /// The limit, if `more_bytes` would go beyond it.
    pub(crate) fn lacks_room(&self, more_bytes: u64) -> Option<u64> {
        let limit_bytes = self.waiting.limit_bytes?;
        let blobs: u64 = self.waiting.blobs().values().sum();
        let all = blobs.saturating_add(self.uploads.size_bytes()).saturating_add(more_bytes);
        (all > limit_bytes).then_some(limit_bytes)
    }

    /// Counts what waits on the disk. Costs reading all manifests.
    pub(super) fn find_waiting(&self) -> Result<(), DirectoryError> {
        if self.waiting.limit_bytes.is_none() {
            return Ok(());
        }
        let mut needed = HashSet::new();
        for name in self.repositories()? {
            for digest in self.manifests(&name)? {
                // One that is damaged needs nothing that could be given out.
                let Ok(Some(manifest)) = self.manifest(&name, &Which::Digest(digest)) else { continue };
                let Ok(reads) = Reads::new(&manifest.bytes) else { continue };
                needed.extend(reads.blobs().map(|blob| blob.digest));
            }
        }
        let blobs = self.root.join("blobs/sha256");
        for first in names(&blobs)? {
            for hex in names(&blobs.join(&first))? {
                let Ok(digest) = format!("sha256:{hex}").parse::<Digest>() else { continue };
                if !needed.contains(&digest) {
                    self.waiting.add(&digest, fs::metadata(self.blob(&digest)).map_or(0, |stat| stat.len()));
                }
            }
        }
        Ok(())
    }
}
