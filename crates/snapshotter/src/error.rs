//! What can go wrong with a snapshot.

use std::io;
use std::path::{Path, PathBuf};

use kiln_oci::{ActiveKey, SnapshotId};

use crate::LayerForm;

/// Why a snapshot operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Somebody already writes under this key.
    #[error("active snapshot {0} exists already")]
    KeyTaken(ActiveKey),
    /// No active snapshot has this key.
    #[error("there is no active snapshot {0}")]
    NoActive(ActiveKey),
    /// No committed snapshot has this name.
    #[error("there is no snapshot {0}")]
    NoSnapshot(SnapshotId),
    /// The snapshot to build on is not there.
    #[error("there is no snapshot {0} to build on")]
    NoParent(SnapshotId),
    /// A committed snapshot has this name already; it stays as it is.
    #[error("snapshot {0} exists already")]
    IdTaken(SnapshotId),
    /// The backend keeps whole trees: a layer cannot be made before what it stands on.
    #[error("snapshots here are whole trees and cannot be put on another one")]
    WholeTrees,
    /// The snapshot that a delta was to stand on is one.
    #[error("snapshot {0} is a delta itself")]
    IsDelta(SnapshotId),
    /// The snapshots were made by a backend that keeps them in another form.
    #[error("the snapshots at {path} are {found}, which this snapshotter does not keep")]
    OtherForm {
        /// The directory of snapshots.
        path: PathBuf,
        /// What they are.
        found: LayerForm,
    },
    /// A whole tree could not be copied, compared or changed.
    #[error("the tree at {path} could not be copied or changed")]
    Tree {
        /// The tree.
        path: PathBuf,
        /// Why.
        source: kiln_layer::TreeError,
    },
    /// The changes of one snapshot could not be taken over by another.
    #[error("the changes at {path} could not be taken over")]
    Changes {
        /// The tree that was to change.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// fuse-overlayfs did not do its part.
    #[error("fuse-overlayfs failed: {reason}")]
    Fuse {
        /// What it says, or what did not happen.
        reason: String,
    },
    /// More layers than overlayfs stacks.
    #[error("the tree has more than {limit} layers, the most that overlayfs stacks")]
    TooDeep {
        /// The kernel's limit.
        limit: usize,
    },
    /// The kernel cannot mount this many layers.
    #[error("mounting {layers} layers needs kernel {needed} or newer")]
    KernelTooOld {
        /// Lowerdirs asked for.
        layers: usize,
        /// The first kernel that can.
        needed: &'static str,
    },
    /// The store was changed by somebody else, or lost data in a power cut.
    #[error("snapshot store is damaged at {path}: {reason}")]
    Damaged {
        /// The file or directory that is wrong.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A newer kiln wrote it.
    #[error("{path} has version {found}; this kiln knows versions up to {known}")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The host said no.
    #[error("{call} failed for {path}")]
    Host {
        /// The system call or operation.
        call: &'static str,
        /// What it was for.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

impl Error {
    /// Whether the disk or the quota is full: freeing space and trying again may help.
    pub fn is_no_space(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Host { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }
}

/// Wraps the answer to `call` for `path`.
pub(crate) fn host<E: Into<io::Error>>(
    call: &'static str,
    path: impl AsRef<Path>,
) -> impl FnOnce(E) -> Error {
    move |source| Error::Host { call, path: path.as_ref().to_owned(), source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_recognised() {
        let full = host("mkdir", "/x")(rustix::io::Errno::NOSPC);
        let denied = host("mkdir", "/x")(rustix::io::Errno::ACCESS);
        assert!(full.is_no_space() && !denied.is_no_space());
    }
}
