//! Owners on record, of trees that a process changed who had one id only.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FileType, OFlags, fstat};

use crate::beneath;
use crate::diff::{DiffError, TreeForm, has_origin};
use crate::index::ScanError;
use crate::marks::{self, Record};
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
/// A file that stands in the place of one with an owner on record, and has none itself, gets that one:
/// programs that write a file anew and rename it (`useradd`, `sed -i`) give it the owner that they see the
/// old one have, and see the wrong one.
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
                (TreeForm::Plain | TreeForm::Archive, _) => before.is_some_and(stood),
                // Not every file system notes where a directory was copied from.
                (TreeForm::OverlayUpper, FileType::Directory) => {
                    has_origin(&xattrs) || !is_opaque(&xattrs) && before.is_some_and(stood)
                }
                (TreeForm::OverlayUpper, _) => has_origin(&xattrs) || xattrs.contains_key(FUSE_ORIGIN),
            };
            let recorded = match kind {
                _ if xattrs.contains_key(marks::RECORD.as_bytes()) => None,
                FileType::RegularFile => before.and_then(|before| recorded_at(before, found.path)),
                _ => None,
            };
            let is_new = !was_there && !xattrs.contains_key(marks::RECORD.as_bytes());
            // What has no record is root's.
            if let Some(owner) = recorded.or(Some(owner).filter(|owner| is_new && *owner != (0, 0))) {
                node::record_owner(found.parent, found.name, owner).map_err(failed)?;
            }
        }
        if kind == FileType::Directory {
            walk.enter()?;
        }
    }
    Ok(())
}

/// The owner on record of the file at `path`; `None`, too, where there is no file, or a device.
fn recorded_at(before: BorrowedFd<'_>, path: &[u8]) -> Option<(u32, u32)> {
    let stat = fstat(beneath::open_file(before, path, OFlags::PATH | OFlags::NOFOLLOW).ok()?).ok()?;
    if node::kind(&stat) != FileType::RegularFile {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = beneath::open_file(before, path, flags).ok()?;
    let record = Record::parse(node::xattrs_of(file.as_fd()).ok()?.get(marks::RECORD.as_bytes())?)?;
    record.device.is_none().then_some(record.owner)
}

#[cfg(test)]
mod tests {
    use std::fs;

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
        // One that was replaced, and one that was nobody's before.
        let before = tempfile::tempdir().unwrap();
        for name in ["replaced", "plain"] {
            fs::write(at(name), "new").unwrap();
            fs::write(before.path().join(name), "old").unwrap();
        }
        let old = before.path().join("replaced");
        rustix::fs::lsetxattr(old, marks::RECORD, b"0:42", XattrFlags::empty()).unwrap();
        let before = fs::File::open(before.path()).unwrap();
        let root = fs::File::open(temp.path()).unwrap();
        record_owner(
            root.as_fd(),
            TreeForm::OverlayUpper,
            Some(before.as_fd()),
            (1000, 7),
            &AtomicBool::new(false),
        )
        .unwrap();
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
            ("replaced", Some("0:42")),
            ("plain", Some("1000:7")),
            ("link", None),
        ] {
            assert_eq!(recorded(name).as_deref(), owner, "{name}");
        }
    }
}
