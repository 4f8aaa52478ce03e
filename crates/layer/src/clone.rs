//! Whole trees: copied, removed.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicBool;

use crate::copy::{CopyError, CopyRequest, copy};
use crate::index::ScanError;
use crate::node;
use crate::scan::{ScanOptions, scan};

/// Why a tree could not be copied or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// It could not be read.
    #[error("cannot read the tree")]
    Scan(#[from] ScanError),
    /// It could not be written.
    #[error("cannot copy the tree")]
    Copy(#[from] CopyError),
    /// It could not be removed.
    #[error("{call} failed while a tree was removed")]
    Remove {
        /// The system call.
        call: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Copies everything below `from`, which nobody writes to, into the empty directory `to`: owners,
/// times, attributes, hard links, and the directory itself. Contents are shared with the original
/// where the file system can do that.
///
/// # Errors
/// [`TreeError`]; `to` is left half done.
pub fn clone_tree(from: BorrowedFd<'_>, to: BorrowedFd<'_>, cancel: &AtomicBool) -> Result<(), TreeError> {
    let entries = scan(from, b"", &ScanOptions { hash: false, filter: None, stat_cache: None, cancel })?;
    copy(&CopyRequest::tree(from, &entries, to, cancel))?;
    Ok(())
}

/// Removes `name` in `parent` with everything below it, however deep that is; nothing there is fine.
/// Costs an unlink an entry.
///
/// # Errors
/// [`TreeError::Remove`]; some of it is gone then.
pub fn remove_tree(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), TreeError> {
    node::remove(parent, name)
        .map_err(|error| TreeError::Remove { call: error.call, source: error.errno.into() })
}
