//! Owners on record, of trees that a process changed who had one id only.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FileType, OFlags};

use crate::beneath;
use crate::diff::{DiffError, TreeForm, has_origin};
use crate::index::ScanError;
use crate::marks;
use crate::node::{self, Xattrs};
use crate::walk::Walk;

/// fuse-overlayfs has names of its own for its marks, until a layer is committed.
const FUSE_ORIGIN: &[u8] = b"user.fuseoverlayfs.origin";
const FUSE_OPAQUE: &[u8] = b"user.fuseoverlayfs.opaque";

fn is_opaque(xattrs: &Xattrs) -> bool {
    [marks::opaque_attribute().as_bytes(), FUSE_OPAQUE].iter().any(|name| xattrs.contains_key(*name))
}

/// Records the files and directories in the tree or upperdir `upper` that are new, and have no owner on record,
/// as `owner`'s: on disk they belong to the only id there is, whoever made them. What was copied up keeps
/// whom it had. Nobody may have `upper` mounted. Costs a few system calls an entry.
///
/// `before` is the view of what the tree stood on, or was; `None`: on nothing.
///
/// # Errors
/// [`DiffError::Scan`], [`DiffError::Cancelled`].
pub fn record_owner(
    upper: BorrowedFd<'_>,
    form: TreeForm,
    before: Option<BorrowedFd<'_>>,
    owner: (u32, u32),
    cancel: &AtomicBool,
) -> Result<(), DiffError> {
    let mut walk = Walk::new(upper, b"")?;
    while let Some(found) = walk.next()? {
        if cancel.load(Ordering::Relaxed) {
            return Err(DiffError::Cancelled);
        }
        let failed = |error| DiffError::Scan(ScanError::host(found.path, error));
        let kind = node::kind(&found.stat);
        if !found.path.is_empty() && matches!(kind, FileType::Directory | FileType::RegularFile) {
            let xattrs = node::xattrs(found.parent, found.name).map_err(failed)?;
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            let stood = |before| beneath::open_file(before, found.path, flags).is_ok();
            let was_there = match (form, kind) {
                (TreeForm::Plain, _) => before.is_some_and(stood),
                // Not every file system notes where a directory was copied from.
                (TreeForm::OverlayUpper, FileType::Directory) => {
                    has_origin(&xattrs) || !is_opaque(&xattrs) && before.is_some_and(stood)
                }
                (TreeForm::OverlayUpper, _) => has_origin(&xattrs) || xattrs.contains_key(FUSE_ORIGIN),
            };
            if !was_there && !xattrs.contains_key(marks::RECORD.as_bytes()) {
                node::record_owner(found.parent, found.name, owner).map_err(failed)?;
            }
        }
        if kind == FileType::Directory {
            walk.enter()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;

    use rustix::fs::XattrFlags;

    use super::*;

    #[test]
    fn only_what_is_new_and_nobodys_gets_the_owner() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name);
        fs::create_dir(at("dir")).unwrap();
        for name in ["dir/new", "copied", "known"] {
            fs::write(at(name), name).unwrap();
        }
        std::os::unix::fs::symlink("x", at("link")).unwrap();
        let set = |name: &str, key: &str, value: &[u8]| {
            rustix::fs::lsetxattr(at(name), key, value, XattrFlags::empty()).unwrap();
        };
        set("copied", "user.overlay.origin", b"x");
        set("known", marks::RECORD, b"5:6");
        let root = fs::File::open(temp.path()).unwrap();
        record_owner(root.as_fd(), TreeForm::OverlayUpper, None, (1000, 7), &AtomicBool::new(false)).unwrap();
        let recorded = |name: &str| {
            let mut value = [0; 64];
            let length = rustix::fs::lgetxattr(at(name), marks::RECORD, &mut value[..]).ok()?;
            Some(String::from_utf8_lossy(&value[..length]).into_owned())
        };
        for (name, owner) in [
            ("dir", Some("1000:7")),
            ("dir/new", Some("1000:7")),
            ("known", Some("5:6")),
            ("copied", None),
            ("link", None),
        ] {
            assert_eq!(recorded(name).as_deref(), owner, "{name}");
        }
    }
}
