//! Why a command of the toolkit ended without a result.

use std::io;
use std::path::PathBuf;

use kiln_layer::{BeneathError, CopyError, DiffError, EntryPath, ScanError};

use crate::BuildError;

/// Why a command of the toolkit ended without a result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ToolkitError {
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// No layer ever had anything at this path.
    #[error("there is nothing at {path} in the image")]
    NoPath { path: EntryPath },
    /// A slash behind the path of something that is no directory.
    #[error("{path} is not a directory in the image")]
    NotDirectory { path: EntryPath },
    /// A directory can only go into a directory.
    #[error("{path} is a directory in the image, but {} is a file here", destination.display())]
    OntoFile { path: EntryPath, destination: PathBuf },
    /// The place to copy to is not there.
    #[error("cannot copy to {}", destination.display())]
    Destination { destination: PathBuf, source: io::Error },
    /// No image in the store is the beginning of this one.
    #[error("no other image with a name is the base of this one")]
    NoBase,
    /// The image named as the base is not the beginning of this one.
    #[error("the image named as base is not what this one stands on")]
    NotBase,
    /// A value for the config makes no sense.
    #[error("{what} {value:?} {problem}")]
    Setting { what: &'static str, value: String, problem: &'static str },
    /// The tar or the copy cannot be written.
    #[error("cannot write {}", path.display())]
    Output { path: PathBuf, source: io::Error },
    /// A layer's files cannot be read.
    #[error("cannot read the image's files")]
    Scan(#[source] ScanError),
    /// A path cannot be followed inside the image.
    #[error("cannot follow {path} in the image")]
    Follow { path: EntryPath, source: BeneathError },
    /// A file of a layer cannot be opened.
    #[error("cannot open {path} in the image")]
    Open { path: EntryPath, source: BeneathError },
    /// A path cannot be removed from the new layer.
    #[error("cannot remove {path} from the new layer")]
    Remove { path: EntryPath, source: io::Error },
    /// A file cannot be copied.
    #[error("cannot copy out of the image")]
    Copy(#[source] CopyError),
    /// A tar cannot be made of the image's files.
    #[error("cannot read the image's files")]
    Tar(#[source] DiffError),
    /// All else.
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl From<ScanError> for ToolkitError {
    fn from(error: ScanError) -> Self {
        match error {
            ScanError::Cancelled => Self::Cancelled,
            other => Self::Scan(other),
        }
    }
}

impl From<CopyError> for ToolkitError {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Cancelled => Self::Cancelled,
            other => Self::Copy(other),
        }
    }
}

impl From<kiln_snapshotter::Error> for ToolkitError {
    fn from(error: kiln_snapshotter::Error) -> Self {
        Self::Build(error.into())
    }
}

impl From<kiln_content::Error> for ToolkitError {
    fn from(error: kiln_content::Error) -> Self {
        Self::Build(error.into())
    }
}
