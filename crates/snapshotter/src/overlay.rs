//! The overlayfs backend.
//!
//! ```text
//! active/<key>/{fs,work,meta}    committed/<id>/{fs,meta,sharers/}    shared/    trash/    empty/
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kiln_oci::{ActiveKey, SnapshotId};
use rustix::fd::{AsFd, OwnedFd};

use crate::fuse::{Fuse, normalise};
use crate::mount::{Stack, overlay};
use crate::places::{Places, active, committed, ensure_dir, make_dir, open_readable};
use crate::sidecar::Links;
use crate::{Changes, Error, Form, LayerForm, Needs, OpenOptions, Overhead, Snapshotter};

mod sharing;

/// Snapshots as overlayfs upperdirs. Needs the right to mount.
///
/// Any number of processes may have the same directory open.
#[derive(Debug)]
pub struct Overlay {
    places: Places,
    mounter: Mounter,
}

/// Who does the mounting.
#[derive(Debug)]
enum Mounter {
    /// overlayfs.
    Kernel,
    /// A process that does the same over FUSE.
    Fuse(Fuse),
}

const EMPTY: &str = "empty";

impl Overlay {
    /// Opens the snapshots below `root`, which is made if it is not there; its parent must be.
    ///
    /// # Errors
    /// [`Error::OtherForm`] when another backend made them.
    pub fn open(root: &Path) -> Result<Self, Error> {
        Self::with(root, Mounter::Kernel)
    }

    /// Like [`Overlay::open`], mounted by the program fuse-overlayfs at `program`.
    ///
    /// # Errors
    /// Those of [`Overlay::open`].
    pub fn open_fuse(root: &Path, program: &Path) -> Result<Self, Error> {
        Self::with(root, Mounter::Fuse(Fuse::new(program)))
    }

    fn with(root: &Path, mounter: Mounter) -> Result<Self, Error> {
        let places = Places::open(root, LayerForm::Changes)?;
        ensure_dir(&places.root, Path::new(sharing::SHARED), 0o700)?;
        ensure_dir(&places.root, Path::new(EMPTY), 0o755)?;
        Ok(Self { places, mounter })
    }

    /// Mounts these directories.
    fn stack(
        &self,
        lower: &[PathBuf],
        upper: Option<(PathBuf, PathBuf)>,
        durable: bool,
    ) -> Result<OwnedFd, Error> {
        let stack = Stack { root: self.places.root.as_fd(), lower, upper, durable };
        match &self.mounter {
            Mounter::Kernel => overlay(&stack),
            Mounter::Fuse(fuse) => fuse.mount(&self.places.path, &stack),
        }
    }

    /// Mounts the stack that ends in `top`, with the directory `above` on top of it, and extra ones
    /// below.
    fn mount(
        &self,
        top: Option<&SnapshotId>,
        above: Option<&Path>,
        upper: Option<&(PathBuf, PathBuf)>,
        options: &OpenOptions,
    ) -> Result<OwnedFd, Error> {
        // overlayfs without an upperdir wants two lowerdirs.
        let least = if upper.is_some() { 1 } else { 2 };
        let attempt = || {
            let mut lower: Vec<PathBuf> = above.iter().map(|above| above.to_path_buf()).collect();
            lower.extend(options.covers.iter().cloned());
            if let Some(top) = top {
                lower.extend(self.lower_of(top)?);
            }
            lower.extend(options.extra_lower.iter().cloned());
            if lower.len() < least {
                lower.push(PathBuf::from(EMPTY));
            }
            self.stack(&lower, upper.cloned(), options.durable)
        };
        self.twice(attempt)
    }

    /// Does what fails when somebody removes a snapshot whose changes are shared: they move, once.
    fn twice<T>(&self, attempt: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
        match attempt() {
            Err(Error::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => attempt(),
            result => result,
        }
    }

    /// Ends what was mounted on an active snapshot: nothing changes in it any more.
    fn complete(&self, key: &ActiveKey) -> Result<(), Error> {
        self.remove_work(&active(key).join("work"))?;
        let upper = active(key).join("fs");
        if let Mounter::Fuse(fuse) = &self.mounter
            && fuse.settle(&upper)?
        {
            normalise(open_readable(&self.places.root, &upper)?.as_fd())?;
        }
        Ok(())
    }

    /// Removes a workdir. The kernel makes `work/work` with mode 000, which only root can list.
    fn remove_work(&self, work: &Path) -> Result<(), Error> {
        // Not there before the first mount; if it cannot be changed, the removal will say why.
        let inner = self.places.path.join(work).join("work");
        let _ = fs::set_permissions(inner, fs::Permissions::from_mode(0o700));
        self.places.remove_tree(work)
    }

    /// Gives the root directory `dir` the mode and owner of its parent's.
    fn root_like(&self, dir: &Path, parent: &SnapshotId) -> Result<(), Error> {
        let own = committed(parent).join("fs");
        let like = |from: &Path| {
            let stat = self.places.stat_dir(from)?;
            self.places.make_like(dir, &stat)?;
            self.places.copy_record(from, dir)
        };
        match self.places.links(parent)?.changes {
            Some(owner) if !self.places.exists(&own) => {
                self.at_owner(&owner, |place| like(&place.join("fs")))
            }
            _ => like(&own),
        }
    }
}

impl Snapshotter for Overlay {
    fn prepare(&self, key: &ActiveKey, parent: Option<&SnapshotId>) -> Result<(), Error> {
        self.places.prepare(key, parent, |dir| {
            make_dir(&self.places.root, &dir.join("work"), 0o700)?;
            make_dir(&self.places.root, &dir.join("fs"), 0o755)?;
            parent.map_or(Ok(()), |parent| self.root_like(&dir.join("fs"), parent))
        })
    }

    fn form(&self) -> LayerForm {
        LayerForm::Changes
    }

    fn set_parent(&self, key: &ActiveKey, parent: &SnapshotId, inherit_root: bool) -> Result<(), Error> {
        self.places.active_parent(key)?;
        if !self.places.contains(parent) {
            return Err(Error::NoParent(parent.clone()));
        }
        let dir = active(key);
        if inherit_root {
            self.root_like(&dir.join("fs"), parent)?;
        }
        self.places.replace_sidecar(&dir, &Links { parent: Some(parent.clone()), ..Links::default() })
    }

    fn open_active(&self, key: &ActiveKey, options: &OpenOptions) -> Result<OwnedFd, Error> {
        let parent = self.places.active_parent(key)?;
        let fs = active(key).join("fs");
        if options.read_only {
            return self.mount(parent.as_ref(), Some(&fs), None, options);
        }
        // A former volatile mount left `incompat/volatile` behind, and the kernel refuses the
        // workdir from then on. It means lost writes after a crash, but keys do not outlive theirs.
        let work = active(key).join("work");
        self.remove_work(&work)?;
        make_dir(&self.places.root, &work, 0o700)?;
        self.mount(parent.as_ref(), None, Some(&(fs, work)), options)
    }

    fn open_layer(&self, key: &ActiveKey) -> Result<OwnedFd, Error> {
        self.places.active_parent(key)?;
        open_readable(&self.places.root, &active(key).join("fs"))
    }

    fn open_view(&self, id: &SnapshotId) -> Result<OwnedFd, Error> {
        self.mount(Some(id), None, None, &OpenOptions::default())
    }

    fn open_changes(&self, id: &SnapshotId) -> Result<Changes, Error> {
        let dir = self.twice(|| match self.changes_of(id, &self.places.links(id)?)?.as_slice() {
            [whole] => open_readable(&self.places.root, whole),
            parts => self.stack(parts, None, false),
        })?;
        Ok(Changes { dir, form: Form::OverlayUpper })
    }

    fn open_dirs(&self, id: &SnapshotId) -> Result<Vec<OwnedFd>, Error> {
        self.twice(|| {
            let dirs = self.changes_of(id, &self.places.links(id)?)?;
            dirs.iter().map(|dir| open_readable(&self.places.root, dir)).collect()
        })
    }

    fn commit(&self, key: &ActiveKey, id: &SnapshotId) -> Result<(), Error> {
        // Complete or not at all: a snapshot that names no parent must not become one.
        self.places.active_parent(key)?;
        if self.is_taken(id) {
            return Err(Error::IdTaken(id.clone()));
        }
        self.complete(key)?;
        self.places.publish(key, id)
    }

    fn commit_layer(&self, key: &ActiveKey, id: &SnapshotId, layer: &SnapshotId) -> Result<(), Error> {
        self.share(key, id, layer)
    }

    fn commit_delta(&self, key: &ActiveKey, id: &SnapshotId, full: &SnapshotId) -> Result<(), Error> {
        self.put_before(key, id, full)
    }

    fn remove_active(&self, key: &ActiveKey) -> Result<(), Error> {
        if self.places.discard(&active(key))? { Ok(()) } else { Err(Error::NoActive(key.clone())) }
    }

    fn remove(&self, id: &SnapshotId) -> Result<(), Error> {
        self.release(id)
    }

    fn needs(&self, id: &SnapshotId) -> Result<Needs, Error> {
        self.places.needs(id)
    }

    fn chain(&self, id: &SnapshotId) -> Result<Vec<SnapshotId>, Error> {
        self.places.chain(id)
    }

    fn contains(&self, id: &SnapshotId) -> bool {
        self.places.contains(id)
    }

    fn committed(&self) -> Result<Vec<SnapshotId>, Error> {
        self.places.committed()
    }

    fn active(&self) -> Result<Vec<ActiveKey>, Error> {
        self.places.active()
    }

    fn disk_bytes(&self, id: &SnapshotId) -> Result<u64, Error> {
        self.places.disk_bytes(id)
    }

    fn overhead(&self) -> Result<Overhead, Error> {
        self.places.overhead(&[sharing::SHARED, EMPTY])
    }

    fn empty_trash(&self) -> Result<usize, Error> {
        // Changes that the last snapshot to share them left behind go there first.
        self.sweep_shared()?;
        self.places.empty_trash()
    }
}
