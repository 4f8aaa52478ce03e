//! Removes what nothing refers to, while others push.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use kiln_oci::Digest;

use super::manifests::Reads;
use super::{Directory, DirectoryError, names, remove};
use crate::route::{Name, Tag, Which};
use crate::settings::Collection;

/// What a collection removed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Collected {
    /// Manifests that no tag, index or subject leads to.
    pub manifests: u64,
    /// Blobs that no repository has any more.
    pub blobs: u64,
    /// How many bytes those were.
    pub bytes: u64,
}

/// Blobs that a repository got since a collection began.
#[derive(Default)]
pub(super) struct Fresh(Mutex<Option<HashSet<Digest>>>);

impl Fresh {
    pub(super) fn add(&self, digest: &Digest) {
        if let Some(fresh) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            fresh.insert(*digest);
        }
    }

    fn set(&self, value: Option<HashSet<Digest>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = value;
    }

    fn has(&self, digest: &Digest) -> bool {
        let fresh = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        fresh.as_ref().is_none_or(|fresh| fresh.contains(digest))
    }
}

impl Directory {
    /// Removes manifests without a tag, if that is asked for, then what no manifest of its repository refers to,
    /// then blobs of no repository. Whatever somebody had to do with within [`Collection::grace`] stays. One at a time.
    ///
    /// Pushes wait for a repository's part, and for a 256th of the blobs, at the longest.
    pub(crate) fn collect(&self, policy: &Collection) -> Result<Collected, DirectoryError> {
        let mut collected = Collected::default();
        self.fresh.set(Some(HashSet::new()));
        let done = self.collect_all(policy.grace, policy.untagged, &mut collected);
        self.fresh.set(None);
        done.map(|()| collected)
    }

    fn collect_all(
        &self,
        grace: Duration,
        untagged: bool,
        collected: &mut Collected,
    ) -> Result<(), DirectoryError> {
        let mut kept = HashSet::new();
        for name in self.repositories()? {
            let _alone = self.publishing.write().unwrap_or_else(PoisonError::into_inner);
            if untagged {
                collected.manifests += self.collect_manifests(&name, grace)?;
            }
            self.collect_marks(&name, grace, &mut kept)?;
            self.collect_directories(&name);
        }
        let blobs = self.root.join("blobs/sha256");
        for first in names(&blobs)? {
            let _alone = self.publishing.write().unwrap_or_else(PoisonError::into_inner);
            for hex in names(&blobs.join(&first))? {
                let Ok(digest) = format!("sha256:{hex}").parse::<Digest>() else { continue };
                let path = self.blob(&digest);
                if kept.contains(&digest) || self.fresh.has(&digest) || !is_older(&path, grace) {
                    continue;
                }
                let size = fs::metadata(&path).map_or(0, |metadata| metadata.len());
                if remove(&path)? {
                    collected.blobs += 1;
                    collected.bytes += size;
                }
            }
        }
        Ok(())
    }

    /// Removes what no tag leads to, over indexes and subjects.
    fn collect_manifests(&self, name: &Name, grace: Duration) -> Result<u64, DirectoryError> {
        let mut live = HashSet::new();
        let mut open = Vec::new();
        for tag in names(&self.repository(name).join("_tags"))? {
            let Ok(tag) = tag.parse::<Tag>() else { continue };
            open.extend(self.tag(name, &tag)?);
        }
        let all = self.manifests(name)?;
        let dir = self.repository(name).join("_manifests");
        // Somebody may be about to push the index, or the tag.
        open.extend(all.iter().filter(|digest| !is_older(&dir.join(digest.hex()), grace)));
        while let Some(digest) = open.pop() {
            if !live.insert(digest) {
                continue;
            }
            // A signature lives as long as what it signs.
            let referrers = names(&self.referrers_path(name, &digest))?;
            open.extend(referrers.iter().filter_map(|hex| format!("sha256:{hex}").parse::<Digest>().ok()));
            if let Some(manifest) = self.manifest(name, &Which::Digest(digest))?
                && let Ok(reads) = Reads::new(&manifest.bytes)
            {
                open.extend(reads.manifests.iter().map(|child| child.digest));
            }
        }
        let mut removed = 0;
        for digest in all.iter().filter(|digest| !live.contains(digest)) {
            removed += u64::from(self.forget_manifest(name, digest)?);
        }
        Ok(removed)
    }

    /// Takes from a repository the blobs that none of its manifests needs; what is left goes into `kept`.
    fn collect_marks(
        &self,
        name: &Name,
        grace: Duration,
        kept: &mut HashSet<Digest>,
    ) -> Result<(), DirectoryError> {
        let mut needed = HashSet::new();
        for digest in self.manifests(name)? {
            // One that cannot be read may need anything: nothing of this repository goes then.
            let Some(manifest) = self.manifest(name, &Which::Digest(digest))? else { continue };
            let damaged = || DirectoryError::Damaged { path: self.repository(name) };
            let reads = Reads::new(&manifest.bytes).map_err(|_| damaged())?;
            needed.extend(reads.blobs().map(|blob| blob.digest));
        }
        let dir = self.repository(name).join("_blobs");
        for hex in names(&dir)? {
            let Ok(digest) = format!("sha256:{hex}").parse::<Digest>() else { continue };
            let mark = dir.join(&hex);
            if needed.contains(&digest) || self.fresh.has(&digest) || !is_older(&mark, grace) {
                kept.insert(digest);
            } else {
                remove(&mark)?;
            }
        }
        Ok(())
    }

    /// Removes the directories of a repository in which nothing is left.
    fn collect_directories(&self, name: &Name) {
        let root = self.repository(name);
        for part in ["_blobs", "_manifests", "_referrers", "_tags"] {
            let _ = fs::remove_dir(root.join(part));
        }
        let _ = fs::remove_dir(root);
    }
}

/// A time that lies ahead is no age.
fn is_older(path: &Path, than: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|age| age >= than))
}
