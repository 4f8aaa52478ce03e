//! The backend that needs nothing of the kernel: a complete tree for each snapshot.
//!
//! A tree is copied when it is written to, sharing contents with the original where the file system
//! can (reflink). What a snapshot changed is found by comparing it with its parent.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};
use std::thread;

use kiln_layer::{ApplyOptions, DiffOptions, Limits, Reading, TreeForm, Whiteouts};
use kiln_oci::{ActiveKey, SnapshotId};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::error::host;
use crate::places::{Places, active, committed, make_dir, open_readable};
use crate::{Changes, Error, Form, LayerForm, Needs, OpenOptions, Overhead, Snapshotter, sys};

mod stubs;
use stubs::Stub;

/// Snapshots as complete trees.
///
/// Any number of processes may have the same directory open.
#[derive(Debug)]
pub struct Copying {
    places: Places,
    /// Active snapshots that were opened, and what was put into them for mounts to find.
    opened: Mutex<HashMap<ActiveKey, Vec<Stub>>>,
}

impl Copying {
    /// Opens the snapshots below `root`, which is made if it is not there; its parent must be.
    ///
    /// # Errors
    /// [`Error::OtherForm`] when another backend made them.
    pub fn open(root: &Path) -> Result<Self, Error> {
        Ok(Self { places: Places::open(root, LayerForm::Tree)?, opened: Mutex::default() })
    }

    fn tree(&self, dir: PathBuf) -> Result<OwnedFd, Error> {
        open_readable(&self.places.root, &dir.join("fs"))
    }

    fn committed_tree(&self, id: &SnapshotId) -> Result<OwnedFd, Error> {
        match self.tree(committed(id)) {
            Err(_) if !self.places.contains(id) => Err(Error::NoSnapshot(id.clone())),
            result => result,
        }
    }

    fn active_tree(&self, key: &ActiveKey) -> Result<OwnedFd, Error> {
        self.places.active_parent(key)?;
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).entry(key.clone()).or_default();
        self.tree(active(key))
    }

    /// Removes what nothing was mounted on, or was and is not any more.
    fn close(&self, key: &ActiveKey) -> Result<(), Error> {
        let stubs = self.opened.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        match stubs {
            Some(stubs) if !stubs.is_empty() => stubs::remove(self.tree(active(key))?.as_fd(), &stubs),
            _ => Ok(()),
        }
    }

    /// Does to the tree `to` what `layer` did to its parent.
    fn take_over(&self, to: &OwnedFd, path: PathBuf, layer: &SnapshotId) -> Result<(), Error> {
        let Changes { dir, form } = self.open_changes(layer)?;
        let never = AtomicBool::new(false);
        let failed = |source| Error::Changes { path: path.clone(), source };
        let (reader, writer) = io::pipe().map_err(host("pipe", &path))?;
        let options = DiffOptions { form: TreeForm::Plain, root_entry: false, cancel: &never };
        let options = &options;
        thread::scope(|scope| {
            let write = move || match form {
                Form::Tree { parent: Some(parent) } => {
                    kiln_layer::diff_trees(parent.as_fd(), dir.as_fd(), writer, options)
                }
                Form::Tree { parent: None } | Form::OverlayUpper => {
                    kiln_layer::diff(dir.as_fd(), writer, options)
                }
            };
            let writing = thread::Builder::new().spawn_scoped(scope, write).map_err(host("thread", &path))?;
            let (whiteouts, limits) = (Whiteouts::Remove, Limits::default());
            let options = ApplyOptions {
                whiteouts,
                keep_owner: true,
                limits,
                reading: Reading::InPlace,
                cancel: &never,
            };
            let applied = kiln_layer::apply(reader, to.as_fd(), &options);
            let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // When the reader gives up, the writer only says that nobody reads.
            applied.map_err(|error| failed(error.into()))?;
            written.map(drop).map_err(|error| failed(error.into()))
        })
    }
}

/// A detached mount of a directory; the directory itself where mounting is not allowed.
fn detached(tree: OwnedFd, path: &Path) -> Result<OwnedFd, Error> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    match open_tree(&tree, "", flags) {
        Ok(mount) => Ok(mount),
        Err(Errno::PERM) => Ok(tree),
        Err(errno) => Err(host("open_tree", path)(errno)),
    }
}

impl Snapshotter for Copying {
    fn prepare(&self, key: &ActiveKey, parent: Option<&SnapshotId>) -> Result<(), Error> {
        self.places.prepare(key, parent, |dir| {
            let fs = dir.join("fs");
            make_dir(&self.places.root, &fs, 0o755)?;
            let Some(parent) = parent else { return Ok(()) };
            let (from, to) = (self.committed_tree(parent)?, open_readable(&self.places.root, &fs)?);
            kiln_layer::clone_tree(from.as_fd(), to.as_fd(), &AtomicBool::new(false))
                .map_err(|source| Error::Tree { path: fs, source })
        })
    }

    fn form(&self) -> LayerForm {
        LayerForm::Tree
    }

    fn set_parent(&self, key: &ActiveKey, _: &SnapshotId, _: bool) -> Result<(), Error> {
        self.places.active_parent(key)?;
        Err(Error::WholeTrees)
    }

    fn open_active(&self, key: &ActiveKey, options: &OpenOptions) -> Result<OwnedFd, Error> {
        let tree = self.active_tree(key)?;
        if options.read_only {
            let mount = detached(tree, &active(key))?;
            // Where nothing can be mounted, it is up to the caller not to write.
            let _ = crate::sys::make_read_only(mount.as_fd());
            return Ok(mount);
        }
        for dir in &options.extra_lower {
            let made = stubs::add(tree.as_fd(), dir)?;
            let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
            opened.entry(key.clone()).or_default().extend(made);
        }
        detached(tree, &active(key))
    }

    fn open_layer(&self, key: &ActiveKey) -> Result<OwnedFd, Error> {
        self.active_tree(key)
    }

    fn open_view(&self, id: &SnapshotId) -> Result<OwnedFd, Error> {
        // Damage shows here as it does where all of the chain is mounted.
        self.places.stack(id)?;
        let tree = self.committed_tree(id)?;
        let mount = detached(tree, &committed(id))?;
        match sys::make_read_only(mount.as_fd()) {
            // Not mounted, but opened: whoever may not mount is trusted to read only.
            Ok(()) | Err(Errno::PERM | Errno::INVAL) => Ok(mount),
            Err(errno) => Err(host("mount_setattr", committed(id))(errno)),
        }
    }

    fn open_changes(&self, id: &SnapshotId) -> Result<Changes, Error> {
        let parent = match self.places.links(id)?.parent {
            Some(parent) => Some(self.committed_tree(&parent).map_err(|error| match error {
                Error::NoSnapshot(_) => Error::Damaged {
                    path: committed(&parent),
                    reason: "another snapshot stands on it, but it is missing",
                },
                error => error,
            })?),
            None => None,
        };
        Ok(Changes { dir: self.committed_tree(id)?, form: Form::Tree { parent } })
    }

    fn open_dirs(&self, id: &SnapshotId) -> Result<Vec<OwnedFd>, Error> {
        Ok(vec![self.committed_tree(id)?])
    }

    fn commit(&self, key: &ActiveKey, id: &SnapshotId) -> Result<(), Error> {
        // Complete or not at all: a snapshot that names no parent must not become one.
        self.places.active_parent(key)?;
        if self.places.contains(id) {
            return Err(Error::IdTaken(id.clone()));
        }
        self.close(key)?;
        self.places.publish(key, id)
    }

    fn commit_layer(&self, key: &ActiveKey, id: &SnapshotId, layer: &SnapshotId) -> Result<(), Error> {
        self.places.active_parent(key)?;
        if self.places.contains(id) {
            return Err(Error::IdTaken(id.clone()));
        }
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner).contains_key(key);
        if opened {
            return Err(host("commit", active(key))(Errno::NOTEMPTY));
        }
        self.take_over(&self.tree(active(key))?, active(key), layer)?;
        self.places.publish(key, id)
    }

    fn commit_delta(&self, key: &ActiveKey, _: &SnapshotId, _: &SnapshotId) -> Result<(), Error> {
        self.places.active_parent(key)?;
        Err(Error::WholeTrees)
    }

    fn remove_active(&self, key: &ActiveKey) -> Result<(), Error> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        if self.places.discard(&active(key))? { Ok(()) } else { Err(Error::NoActive(key.clone())) }
    }

    fn remove(&self, id: &SnapshotId) -> Result<(), Error> {
        if self.places.discard(&committed(id))? { Ok(()) } else { Err(Error::NoSnapshot(id.clone())) }
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
        self.places.overhead(&[])
    }

    fn empty_trash(&self) -> Result<usize, Error> {
        self.places.empty_trash()
    }
}
