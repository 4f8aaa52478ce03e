//! The contract of a snapshot backend.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use kiln_oci::{ActiveKey, SnapshotId};

use crate::Error;

/// Keeps file trees as chains of snapshots.
///
/// ```text
/// prepare(key) ─▶ Active ── commit(key, id) ─▶ Committed(id)
///                    ├── commit_layer(key, id, layer) ─▶ Committed(id)
///                    ├── commit_delta(key, id, full) ─▶ Committed(id)
///                    └── remove_active(key) ─▶ gone
/// ```
/// Only committed snapshots can be parents. Each active key belongs to one process; committed
/// snapshots are shared by all. Whoever removes snapshots makes sure that nobody uses them.
pub trait Snapshotter: Send + Sync {
    /// Makes a writable snapshot on top of `parent` (`None`: an empty directory).
    ///
    /// Its root directory has the parent's mode and owner, or 0755 and the caller's. Costs O(1)
    /// on overlay.
    ///
    /// # Errors
    /// [`Error::KeyTaken`], [`Error::NoParent`]; nothing has changed then.
    fn prepare(&self, key: &ActiveKey, parent: Option<&SnapshotId>) -> Result<(), Error>;

    /// Whether [`Snapshotter::open_layer`] holds changes or the whole tree.
    fn form(&self) -> LayerForm;

    /// Puts an active snapshot that was prepared on nothing, and was never mounted, on top of
    /// `parent`: as if it had been prepared there. With `inherit_root` its root directory gets mode
    /// and owner of the parent's. So layers unpack side by side before it is known what they stand
    /// on. Costs O(1); only where the form is [`LayerForm::Changes`].
    ///
    /// # Errors
    /// [`Error::NoActive`], [`Error::NoParent`], [`Error::WholeTrees`].
    fn set_parent(&self, key: &ActiveKey, parent: &SnapshotId, inherit_root: bool) -> Result<(), Error>;

    /// Returns the writable merged tree as the root of a detached mount, gone when the descriptor
    /// and everything attached from it are closed.
    ///
    /// May be called again, but only once the former mount is gone: two mounts writing to one
    /// upperdir are undefined. What was written is not synced to disk.
    ///
    /// # Errors
    /// [`Error::NoActive`], [`Error::TooDeep`], [`Error::Damaged`] if a parent is missing.
    fn open_active(&self, key: &ActiveKey, options: &OpenOptions) -> Result<OwnedFd, Error>;

    /// Opens only what an active snapshot adds to its parent, in the form of [`Changes`]: the place
    /// to unpack a layer into.
    ///
    /// # Errors
    /// [`Error::NoActive`].
    fn open_layer(&self, key: &ActiveKey) -> Result<OwnedFd, Error>;

    /// Returns the read-only merged tree of a committed snapshot as the root of a detached mount.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`], [`Error::TooDeep`], [`Error::Damaged`] if a parent is missing.
    fn open_view(&self, id: &SnapshotId) -> Result<OwnedFd, Error>;

    /// Returns what this committed snapshot alone adds to and hides from its parent. Of a delta
    /// ([`Snapshotter::commit_delta`]) it is a mount, read-only as all of them.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`].
    fn open_changes(&self, id: &SnapshotId) -> Result<Changes, Error>;

    /// Opens the directories whose files a committed snapshot's changes are, highest first: for who
    /// shares blocks with them, which goes with files themselves only and not with what a mount shows
    /// of them. One, or two of a delta.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`].
    fn open_dirs(&self, id: &SnapshotId) -> Result<Vec<OwnedFd>, Error>;

    /// Turns the active snapshot into the committed snapshot `id`, in one step; from then on
    /// nobody may write to it. Its mount must be gone.
    ///
    /// # Errors
    /// [`Error::NoActive`]; [`Error::IdTaken`], and the active snapshot stays then.
    fn commit(&self, key: &ActiveKey, id: &SnapshotId) -> Result<(), Error>;

    /// Turns the active snapshot, to which nothing was written, into the committed snapshot `id`:
    /// what it adds to and hides from its parent is what `layer` alone adds and hides, whatever
    /// `layer` stands on. Its root directory keeps mode and owner of its parent's.
    ///
    /// As if the layer's tar were applied on the parent, but no file is copied: both snapshots show
    /// the same ones. Either may be removed first; the space is freed with the last. Costs O(1).
    ///
    /// # Errors
    /// [`Error::NoActive`], [`Error::NoSnapshot`] without `layer`, [`Error::Host`] if something was
    /// written; [`Error::IdTaken`], and the active snapshot stays then, to be removed only.
    fn commit_layer(&self, key: &ActiveKey, id: &SnapshotId, layer: &SnapshotId) -> Result<(), Error>;

    /// Turns the active snapshot into the committed snapshot `id`: what it adds to its parent is what
    /// `full` alone adds, whatever `full` stands on, and in front of that what was written, with
    /// [`Snapshotter::open_layer`]. Everybody sees such a delta as any other snapshot: its changes
    /// are one tree, and `full` is not in its chain. It takes a place more in a stack of layers. Either
    /// may be removed first. Costs O(1); only where the form is [`LayerForm::Changes`].
    ///
    /// Neither may hide anything but files behind files: there are no whiteouts and no opaque
    /// directories, and what is a directory in one is none else in the other. So one upperdir could
    /// have what both have together.
    ///
    /// # Errors
    /// [`Error::NoActive`], [`Error::NoSnapshot`] without `full`, [`Error::IsDelta`],
    /// [`Error::WholeTrees`]; [`Error::IdTaken`], and the active snapshot stays then.
    fn commit_delta(&self, key: &ActiveKey, id: &SnapshotId, full: &SnapshotId) -> Result<(), Error>;

    /// Removes an active snapshot, complete or not. Costs O(files).
    ///
    /// # Errors
    /// [`Error::NoActive`].
    fn remove_active(&self, key: &ActiveKey) -> Result<(), Error>;

    /// Removes a committed snapshot. Costs O(files), unless another one shows its changes
    /// ([`Snapshotter::commit_layer`], [`Snapshotter::commit_delta`]): they go when that one goes.
    ///
    /// Children are not looked for: the caller, who knows all records, removes them first. A
    /// child left behind answers [`Error::Damaged`] from then on.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`].
    fn remove(&self, id: &SnapshotId) -> Result<(), Error>;

    /// Returns which other snapshots a committed one needs. Costs the read of a small file.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`], [`Error::Damaged`].
    fn needs(&self, id: &SnapshotId) -> Result<Needs, Error>;

    /// Returns a committed snapshot and all it stands on, lowest first.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`]; [`Error::Damaged`] if one below is missing or the parents form a
    /// circle; [`Error::TooDeep`].
    fn chain(&self, id: &SnapshotId) -> Result<Vec<SnapshotId>, Error>;

    /// Whether a committed snapshot has this name.
    fn contains(&self, id: &SnapshotId) -> bool;

    /// The names of all committed snapshots, sorted. Costs a look at each.
    ///
    /// # Errors
    /// [`Error::Host`].
    fn committed(&self) -> Result<Vec<SnapshotId>, Error>;

    /// The names of all active snapshots, sorted.
    ///
    /// # Errors
    /// [`Error::Host`].
    fn active(&self) -> Result<Vec<ActiveKey>, Error>;

    /// Both.
    fn list(&self) -> Result<(Vec<SnapshotId>, Vec<ActiveKey>), Error> {
        Ok((self.committed()?, self.active()?))
    }

    /// Returns what a committed snapshot alone takes on disk, in bytes of blocks: what others share
    /// with it counts for the one that had it first. Costs O(files).
    ///
    /// # Errors
    /// [`Error::NoSnapshot`].
    fn disk_bytes(&self, id: &SnapshotId) -> Result<u64, Error>;

    /// Returns what takes space beside the committed snapshots. Costs O(files).
    fn overhead(&self) -> Result<Overhead, Error>;

    /// Removes what crashes and removed snapshots left behind; returns how many trees that were.
    fn empty_trash(&self) -> Result<usize, Error>;
}

/// The other snapshots that a committed one needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// What it stands on; `None`: on nothing.
    pub parent: Option<SnapshotId>,
    /// What it is a delta on, which may be removed already; `None`: it is none.
    pub full: Option<SnapshotId>,
}

/// What takes space beside committed snapshots.
#[derive(Debug, Clone, Default)]
pub struct Overhead {
    /// Active snapshots, with their bytes on disk.
    pub active: Vec<(ActiveKey, u64)>,
    /// All else: directories, changes that outlived their owner, what waits for its removal.
    pub rest_bytes: u64,
}

/// How an active snapshot is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Directories appended below all parents, highest first: the stubs that mounts need to find.
    /// They are seen in this mount only and are not part of the snapshot.
    pub extra_lower: Vec<PathBuf>,
    /// Directories above all parents and below what is written, highest first: what stands in front of
    /// the parents in this mount only. Not for backends of whole trees, which pass them over.
    pub covers: Vec<PathBuf>,
    /// What the process syncs reaches the disk: for a tree that shall outlive a crash of the machine.
    /// Closing such a mount syncs its file system. Else nothing is ever synced.
    pub durable: bool,
    /// Nothing can be written, and another mount of the snapshot may be there and be written to: what
    /// that changes meanwhile is seen or not.
    pub read_only: bool,
}

/// What an active snapshot's own directory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerForm {
    /// Its changes alone, as [`Form::OverlayUpper`] has them.
    Changes,
    /// The whole tree, the parent's files included.
    Tree,
}

impl std::fmt::Display for LayerForm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Changes => "changes on top of one another",
            Self::Tree => "whole trees",
        })
    }
}

/// What one snapshot adds to and hides from its parent.
#[derive(Debug)]
pub struct Changes {
    /// The directory that holds the changes; must not be written to.
    pub dir: OwnedFd,
    /// What is in it.
    pub form: Form,
}

/// How changes are kept.
#[derive(Debug)]
pub enum Form {
    /// An overlayfs upperdir: a whiteout is a character device 0/0, an opaque directory has the
    /// extended attribute [`kiln_layer::opaque_attribute`].
    OverlayUpper,
    /// A complete tree: the changes are what is different from the parent's, or all of it.
    Tree {
        /// The parent's tree; `None`: it stands on nothing.
        parent: Option<OwnedFd>,
    },
}
