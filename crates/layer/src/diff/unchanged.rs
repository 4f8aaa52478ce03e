//! What overlayfs copied up and nobody changed.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, FileType, OFlags, Timespec, Timestamps, UTIME_OMIT};

use super::DiffError;
use super::trees::{is_same, may_be_same};
use crate::beneath;
use crate::index::{Entry, ScanError};
use crate::marks;
use crate::node::{self, Named, Xattrs};
use crate::path;
use crate::walk::{Found, Walk};

/// Written by overlayfs to what it copied up, whoever mounted it (overlayfs.rst, "Non-directories").
const ORIGIN: [&[u8]; 2] = [b"trusted.overlay.origin", b"user.overlay.origin"];

/// Whether overlayfs copied up what has these attributes.
pub(crate) fn has_origin(xattrs: &Xattrs) -> bool {
    ORIGIN.iter().any(|name| xattrs.contains_key(*name))
}

/// The files in the upperdir `upper` that were copied up, whole: `chown -R` and `chmod -R` do that even
/// where they change nothing. Costs a few system calls for every entry of a directory that was copied
/// up, and nothing for what is below new directories. Files with several links are left out.
///
/// # Errors
/// [`DiffError::Scan`], [`DiffError::Cancelled`].
pub fn copied_up(upper: BorrowedFd<'_>, cancel: &AtomicBool) -> Result<Vec<Vec<u8>>, DiffError> {
    let mut copied = Vec::new();
    let mut walk = Walk::new(upper, b"")?;
    while let Some(found) = walk.next()? {
        if cancel.load(Ordering::Relaxed) {
            return Err(DiffError::Cancelled);
        }
        let is_dir = node::kind(&found.stat) == FileType::Directory;
        if !is_dir && found.stat.st_nlink > 1 {
            continue;
        }
        // In a user namespace these cannot have the attribute. What has no like below stays anyway.
        let is_bare = marks::uses_user_attributes()
            && matches!(node::kind(&found.stat), FileType::Symlink | FileType::Fifo);
        let has_origin = found.path.is_empty() || is_bare || {
            let xattrs = node::xattrs(found.parent, found.name);
            let xattrs = xattrs.map_err(|error| DiffError::Scan(ScanError::host(found.path, error)))?;
            self::has_origin(&xattrs)
        };
        match (has_origin, is_dir) {
            (true, true) => drop(walk.enter()?),
            (true, false) => copied.push(found.path.to_vec()),
            (false, _) => {}
        }
    }
    Ok(copied)
}

/// Removes from the upperdir `upper` those of the files in `copied` that are the same in the view
/// `lower` of what it stands on, in all that a layer keeps; content is read where all else is equal.
/// Nobody may have `upper` mounted. Returns how many were removed; directories keep their times.
///
/// # Errors
/// Those of [`diff`](super::diff()).
pub fn drop_unchanged(
    upper: BorrowedFd<'_>,
    lower: BorrowedFd<'_>,
    copied: &[Vec<u8>],
    cancel: &AtomicBool,
) -> Result<usize, DiffError> {
    let mut dropped = 0;
    for path in copied {
        if cancel.load(Ordering::Relaxed) {
            return Err(DiffError::Cancelled);
        }
        let (parent, name) = path::split(path);
        let scan = |error: beneath::BeneathError| DiffError::Scan(error.into());
        let failed = |error| DiffError::Scan(ScanError::host(path, error));
        let above = beneath::open_dir_without_links(upper, parent).map_err(scan)?;
        let below = match beneath::open_dir_without_links(lower, parent) {
            Ok(below) => below,
            // It was moved here together with its directory.
            Err(_) => continue,
        };
        let (Some(new), Some(old)) = (
            node::stat(above.as_fd(), name).map_err(failed)?,
            node::stat(below.as_fd(), name).map_err(failed)?,
        ) else {
            continue;
        };
        let new = Found { parent: above.as_fd(), name, path, stat: new };
        let old = Found { parent: below.as_fd(), name, path, stat: old };
        if !may_be_same(&old, &new) || !is_same_file(&old, &new)? {
            continue;
        }
        let times = node::stat(above.as_fd(), b".").map_err(failed)?;
        node::remove(above.as_fd(), name).map_err(failed)?;
        if let Some(stat) = times {
            let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
            let mtime = crate::index::mtime(&stat);
            let kept = Timespec { tv_sec: mtime.secs, tv_nsec: mtime.nanos.into() };
            let times = Timestamps { last_access: omit, last_modification: kept };
            fs::futimens(&above, &times).named("futimens").map_err(failed)?;
        }
        dropped += 1;
    }
    Ok(dropped)
}

fn is_same_file(old: &Found<'_>, new: &Found<'_>) -> Result<bool, DiffError> {
    let read = |found: &Found<'_>| -> Result<(Entry, Option<File>), DiffError> {
        let failed = |error| DiffError::Scan(ScanError::host(found.path, error));
        let xattrs: Xattrs = node::xattrs(found.parent, found.name).map_err(failed)?;
        let entry = Entry::new(found, None, xattrs)?;
        if node::kind(&found.stat) != FileType::RegularFile {
            return Ok((entry, None));
        }
        let file = beneath::open_file(found.parent, found.name, OFlags::RDONLY | OFlags::NOFOLLOW);
        Ok((entry, Some(file.map_err(|error| DiffError::Scan(error.into()))?.into())))
    };
    let ((before, old_content), (after, new_content)) = (read(old)?, read(new)?);
    is_same(&before, old_content, &after, new_content.as_ref())
}

#[cfg(test)]
mod tests;
