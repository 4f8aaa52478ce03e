//! Snapshots whose changes are another one's, or stand in front of another one's.
//!
//! The sidecar of such a snapshot names the *owner* of its changes, or of the larger part of them
//! ([`Links::full`]), or both; below an owner, `sharers/` holds an empty file named after the
//! snapshot. An owner that is removed while somebody shows its changes moves from `committed/` to `shared/`: it is a snapshot no more, its directory stays. The files
//! in `sharers/` are hints: one counts only while that snapshot's sidecar names the owner, so a
//! crash between the two leaves nothing that lasts.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use kiln_oci::{ActiveKey, SnapshotId};
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, Stat, openat, renameat_with, unlinkat};
use rustix::io::Errno;

use super::Overlay;
use crate::Error;
use crate::error::host;
use crate::places::{active, committed, ensure_dir, make_dir};
use crate::sidecar::Links;

/// Where changes outlive their owner.
pub(super) const SHARED: &str = "shared";
const SHARERS: &str = "sharers";

impl Overlay {
    /// The lowerdirs of the stack that ends in `top`, highest first.
    pub(super) fn lower_of(&self, top: &SnapshotId) -> Result<Vec<PathBuf>, Error> {
        let mut lower = Vec::new();
        let mut seen = HashSet::new();
        for (id, links) in self.places.stack(top)? {
            let own = committed(&id).join("fs");
            if links.changes.is_some() && self.places.exists(&own) {
                lower.push(own);
            }
            // overlayfs refuses a directory twice. Below itself it shows and hides nothing that it
            // does not show and hide above.
            for changes in self.changes_of(&id, &links)? {
                if seen.insert(changes.clone()) {
                    lower.push(changes);
                }
            }
        }
        Ok(lower)
    }

    /// The directories with the changes of `id`, highest first.
    pub(super) fn changes_of(&self, id: &SnapshotId, links: &Links) -> Result<Vec<PathBuf>, Error> {
        let mut dirs = vec![match &links.changes {
            None => committed(id).join("fs"),
            Some(owner) => self.place_of(owner)?.join("fs"),
        }];
        if let Some(full) = &links.full {
            dirs.push(self.place_of(full)?.join("fs"));
        }
        Ok(dirs)
    }

    /// Where the owner of shared changes is now.
    fn place_of(&self, owner: &SnapshotId) -> Result<PathBuf, Error> {
        let places = [committed(owner), shared(owner)];
        let found = places.into_iter().find(|place| self.places.exists(place));
        let missing =
            || Error::Damaged { path: committed(owner), reason: "another snapshot shows its changes" };
        found.ok_or_else(missing)
    }

    /// Does something in the directory of the owner of shared changes, which may move meanwhile: once,
    /// when it is removed.
    pub(super) fn at_owner<T>(
        &self,
        owner: &SnapshotId,
        work: impl Fn(&Path) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let place = self.place_of(owner)?;
        match work(&place) {
            Err(Error::Host { source, .. })
                if source.kind() == io::ErrorKind::NotFound && self.place_of(owner)? != place =>
            {
                work(&self.place_of(owner)?)
            }
            result => result,
        }
    }

    /// Whether `id` is the name of a snapshot, or of changes that others still show.
    pub(super) fn is_taken(&self, id: &SnapshotId) -> bool {
        self.places.contains(id) || self.places.exists(&shared(id))
    }

    /// [`Snapshotter::commit_layer`].
    pub(super) fn share(&self, key: &ActiveKey, id: &SnapshotId, layer: &SnapshotId) -> Result<(), Error> {
        let parent = self.places.active_parent(key)?;
        if self.is_taken(id) {
            return Err(Error::IdTaken(id.clone()));
        }
        let Links { changes, full, .. } = self.places.links(layer)?;
        let owner = changes.unwrap_or_else(|| layer.clone());
        let layer_root = self.at_owner(&owner, |place| self.places.stat_dir(&place.join("fs")))?;
        let dir = active(key);
        self.remove_work(&dir.join("work"))?;
        let fs = dir.join("fs");
        // Refuses when something was written. It comes back only where the roots differ, as a
        // directory that covers the layer's: no entry of a layer's tar is for the root.
        let root = self.places.stat_dir(&fs)?;
        unlinkat(&self.places.root, &fs, AtFlags::REMOVEDIR).map_err(host("rmdir", &fs))?;
        let key_of = |stat: &Stat| (stat.st_mode, stat.st_uid, stat.st_gid);
        if key_of(&root) != key_of(&layer_root) {
            make_dir(&self.places.root, &fs, 0o700)?;
            self.places.make_like(&fs, &root)?;
        }

        self.publish_shown(key, id, &Links { parent, changes: Some(owner), full })
    }

    /// [`Snapshotter::commit_delta`].
    pub(super) fn put_before(
        &self,
        key: &ActiveKey,
        id: &SnapshotId,
        full: &SnapshotId,
    ) -> Result<(), Error> {
        let parent = self.places.active_parent(key)?;
        if self.is_taken(id) {
            return Err(Error::IdTaken(id.clone()));
        }
        let below = self.places.links(full)?;
        if below.full.is_some() {
            return Err(Error::IsDelta(full.clone()));
        }
        let full = below.changes.unwrap_or_else(|| full.clone());
        self.complete(key)?;
        self.publish_shown(key, id, &Links { parent, changes: None, full: Some(full) })
    }

    /// Gives an active snapshot its name, with what it shows of others: these know it before.
    fn publish_shown(&self, key: &ActiveKey, id: &SnapshotId, links: &Links) -> Result<(), Error> {
        self.places.replace_sidecar(&active(key), links)?;
        for owner in links.shown() {
            self.at_owner(owner, |place| {
                ensure_dir(&self.places.root, &place.join(SHARERS), 0o700)?;
                let hint = place.join(SHARERS).join(id.as_str());
                let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
                openat(&self.places.root, &hint, flags, Mode::RUSR | Mode::WUSR)
                    .map(drop)
                    .map_err(host("openat", &hint))
            })?;
        }
        self.places.publish(key, id)
    }

    /// [`Snapshotter::remove`].
    pub(super) fn release(&self, id: &SnapshotId) -> Result<(), Error> {
        // A damaged sidecar must not keep the snapshot from being removed.
        let links = self.places.links(id).unwrap_or_default();
        if self.is_shared(id, &committed(id))? {
            match renameat_with(
                &self.places.root,
                committed(id),
                &self.places.root,
                shared(id),
                RenameFlags::NOREPLACE,
            ) {
                Ok(()) => {}
                Err(Errno::NOENT) => return Err(Error::NoSnapshot(id.clone())),
                Err(errno) => return Err(host("rename", committed(id))(errno)),
            }
        } else if !self.places.discard(&committed(id))? {
            return Err(Error::NoSnapshot(id.clone()));
        }
        for owner in links.shown() {
            let Ok(place) = self.place_of(owner) else { continue };
            match unlinkat(&self.places.root, place.join(SHARERS).join(id.as_str()), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(host("unlink", place)(errno)),
            }
            self.discard_unshared(owner)?;
        }
        Ok(())
    }

    /// Removes changes without an owner that nobody shares any more.
    pub(super) fn sweep_shared(&self) -> Result<(), Error> {
        for name in self.places.names(SHARED)? {
            if let Ok(owner) = name.parse() {
                self.discard_unshared(&owner)?;
            }
        }
        Ok(())
    }

    fn discard_unshared(&self, owner: &SnapshotId) -> Result<(), Error> {
        let place = shared(owner);
        if self.places.exists(&place) && !self.is_shared(owner, &place)? {
            self.places.discard(&place)?;
        }
        Ok(())
    }

    /// Whether a committed snapshot shows the changes of `owner`, which is at `place`.
    fn is_shared(&self, owner: &SnapshotId, place: &Path) -> Result<bool, Error> {
        let sharers = place.join(SHARERS);
        if !self.places.exists(&sharers) {
            return Ok(false);
        }
        for name in self.places.names(&sharers)? {
            let Ok(sharer) = name.parse::<SnapshotId>() else { continue };
            match self.places.links(&sharer) {
                Ok(links) if links.shown().any(|shown| shown == owner) => return Ok(true),
                Ok(_) | Err(Error::NoSnapshot(_)) => {}
                // It may be a sharer; what cannot be read frees nothing.
                Err(_) => return Ok(true),
            }
        }
        Ok(false)
    }
}

fn shared(id: &SnapshotId) -> PathBuf {
    Path::new(SHARED).join(id.as_str())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use crate::Snapshotter;

    use super::*;

    #[test]
    fn an_owner_that_moves_at_that_moment_is_found_again() {
        let temp = tempfile::tempdir().unwrap();
        let store = Overlay::open(&temp.path().join("snapshots")).unwrap();
        let (owner, sharer): (SnapshotId, SnapshotId) = ("owner".parse().unwrap(), "sharer".parse().unwrap());
        let key = |name: &str| -> ActiveKey { name.parse().unwrap() };
        store.prepare(&key("a"), None).unwrap();
        store.commit(&key("a"), &owner).unwrap();
        store.prepare(&key("b"), None).unwrap();
        store.commit_layer(&key("b"), &sharer, &owner).unwrap();

        let calls = Cell::new(0);
        let found = store.at_owner(&owner, |place| {
            calls.set(calls.get() + 1);
            if calls.get() == 1 {
                store.remove(&owner).unwrap();
            }
            store.places.stat_dir(&place.join("fs"))
        });
        found.unwrap();
        assert_eq!(calls.get(), 2);
        // What is missing although nothing moved is an error at once.
        let missing = store.at_owner(&owner, |place| {
            calls.set(calls.get() + 1);
            store.places.stat_dir(&place.join("nothing"))
        });
        assert!(matches!(missing, Err(Error::Host { .. })));
        assert_eq!(calls.get(), 3);
    }
}
