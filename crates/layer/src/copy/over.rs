//! Copies straight into an upperdir: what the tree below has there counts, and is not touched.
//!
//! overlayfs does the same for every file that is made through a mount, at several times the cost.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags, FileType, Mode, Timespec, Timestamps, UTIME_OMIT, XattrFlags};
use rustix::io::Errno;

use super::{Copier, CopyError, Place, host};
use crate::beneath::{self, BeneathError};
use crate::marks;
use crate::node::{self, Attributes, CallError, Named, Xattrs, is_private_xattr};
use crate::path;

/// Makes the directory `path` and its missing parents in the upperdir `upper`, which stands on `below`:
/// those that are there already are copied up, only new ones get `mode` and `owner`.
///
/// `path` has no links on the way ([`beneath::real_path`]), and `upper` no whiteouts.
///
/// # Errors
/// [`CopyError::OntoNonDirectory`], [`CopyError::Path`], [`CopyError::Host`].
pub fn make_dirs_over(
    upper: BorrowedFd<'_>,
    below: BorrowedFd<'_>,
    path: &[u8],
    mode: u32,
    owner: (u32, u32),
) -> Result<(), CopyError> {
    if !copy_up(upper, below, path)? {
        beneath::mkdir_all(upper, path, mode, owner).map_err(|error| onto(path, error))?;
    }
    Ok(())
}

/// Makes the directories on the way to `path`, and that itself, as far as the tree below has them, and like
/// there. Whether it has all of them.
pub(super) fn copy_up(upper: BorrowedFd<'_>, below: BorrowedFd<'_>, path: &[u8]) -> Result<bool, CopyError> {
    let ends = (1..=path.len()).filter(|&end| end == path.len() || path[end] == b'/');
    for end in ends {
        let prefix = &path[..end];
        let Some(like) = open_below(below, prefix)? else { return Ok(false) };
        let (above, name) = path::split(prefix);
        let parent = beneath::open_dir_without_links(upper, above).map_err(|error| onto(above, error))?;
        let failed = host(prefix);
        let before = fs::fstat(&parent).named("fstat").map_err(&failed)?;
        match fs::mkdirat(&parent, name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => continue,
            Err(errno) => return Err(failed(CallError { call: "mkdirat", errno })),
        }
        let made = node::open_dir(parent.as_fd(), name).map_err(&failed)?;
        make_like(made.as_fd(), like.as_fd()).map_err(&failed)?;
        // Nothing was added there, as far as anybody can see.
        let time = |secs, nanos| Timespec { tv_sec: secs, tv_nsec: nanos };
        let last_modification =
            time(before.st_mtime, i64::try_from(before.st_mtime_nsec).unwrap_or_default());
        let times = Timestamps { last_access: time(0, UTIME_OMIT), last_modification };
        fs::futimens(&parent, &times).named("futimens").map_err(&failed)?;
    }
    Ok(true)
}

/// The directory of the tree below; `None`: nothing is there.
pub(super) fn open_below(below: BorrowedFd<'_>, path: &[u8]) -> Result<Option<OwnedFd>, CopyError> {
    match beneath::open_dir_without_links(below, path) {
        Ok(dir) => Ok(Some(dir)),
        Err(error) if error.host_kind() == Some(io::ErrorKind::NotFound) => Ok(None),
        Err(error) => Err(onto(path, error)),
    }
}

fn onto(path: &[u8], error: BeneathError) -> CopyError {
    match error.errno() {
        Some(Errno::NOTDIR | Errno::LOOP) => CopyError::OntoNonDirectory { path: path.into() },
        _ => error.into(),
    }
}

/// Gives a new directory owner, mode, attributes and time of another one, as overlayfs does when it copies
/// one up.
pub(super) fn make_like(made: BorrowedFd<'_>, like: BorrowedFd<'_>) -> Result<(), CallError> {
    let stat = fs::fstat(like).named("fstat")?;
    let mut xattrs = self::like(like)?;
    let record = xattrs.remove(marks::RECORD.as_bytes());
    if !marks::has_single_id() {
        let (uid, gid) = (fs::Uid::from_raw(stat.st_uid), fs::Gid::from_raw(stat.st_gid));
        fs::fchown(made, Some(uid), Some(gid)).named("fchown")?;
    }
    if let Some(record) = record {
        fs::fsetxattr(made, marks::RECORD, &record, XattrFlags::empty()).named("fsetxattr")?;
    }
    let mtime = Some(crate::index::mtime(&stat));
    node::set_on_fd(made, &Attributes { owner: None, mode: stat.st_mode, xattrs: &xattrs, mtime })
}

/// The attributes that a directory gives to one that is made like it.
pub(super) fn like(dir: BorrowedFd<'_>) -> Result<Xattrs, CallError> {
    let is_record = |name: &[u8]| name == marks::RECORD.as_bytes() && marks::uses_user_attributes();
    let mut xattrs = node::xattrs_of(dir)?;
    xattrs.retain(|name, _| is_record(name) || !is_private_xattr(name));
    Ok(xattrs)
}

impl Copier<'_> {
    /// The directory `path` of the tree below; `None`: it has none there, or nobody asks.
    pub(super) fn below(&self, path: &[u8]) -> Result<Option<OwnedFd>, CopyError> {
        let is_new = |new: &Vec<u8>| new == path || path::is_below(path, new);
        match self.request.below {
            Some(below) if !self.new_below.as_ref().is_some_and(is_new) => open_below(below, path),
            _ => Ok(None),
        }
    }

    /// Remembers that a directory has no like in the tree below.
    pub(super) fn note_new(&mut self, path: &[u8]) {
        let is_below = |new: &Vec<u8>| path::is_below(path, new);
        if self.request.below.is_some() && !self.new_below.as_ref().is_some_and(is_below) {
            self.new_below = Some(path.to_vec());
        }
    }
}

impl Place {
    /// The directory `name` of the tree below; `None`: nothing is there.
    pub(super) fn dir_below(&self, name: &[u8], path: &[u8]) -> Result<Option<OwnedFd>, CopyError> {
        let Some(below) = &self.below else { return Ok(None) };
        match node::open_dir(below.as_fd(), name) {
            Ok(dir) => Ok(Some(dir)),
            Err(CallError { errno: Errno::NOENT, .. }) => Ok(None),
            Err(CallError { errno: Errno::NOTDIR | Errno::LOOP, .. }) => {
                Err(CopyError::OntoNonDirectory { path: path.into() })
            }
            Err(error) => Err(host(path)(error)),
        }
    }

    /// Refuses to hide a directory of the tree below behind what is none.
    pub(super) fn refuse_dir_below(&self, name: &[u8], path: &[u8]) -> Result<(), CopyError> {
        let Some(below) = &self.below else { return Ok(()) };
        match fs::statat(below, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if node::kind(&stat) == FileType::Directory => {
                Err(CopyError::OntoDirectory { path: path.into() })
            }
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(host(path)(CallError { call: "fstatat", errno })),
        }
    }
}
