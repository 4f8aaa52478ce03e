//! One file, directory or device: its metadata set, its extended attributes, its removal.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    self, AtFlags, FileType, Gid, Mode, OFlags, RawDir, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::index::Timestamp;

/// A system call that failed, for the caller to add the path.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallError {
    pub(crate) call: &'static str,
    pub(crate) errno: Errno,
}

pub(crate) type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// Adds the call's name to its errno.
pub(crate) trait Named<T> {
    fn named(self, call: &'static str) -> Result<T, CallError>;
}

impl<T> Named<T> for Result<T, Errno> {
    fn named(self, call: &'static str) -> Result<T, CallError> {
        self.map_err(|errno| CallError { call, errno })
    }
}

/// What a node gets after it was made.
pub(crate) struct Attributes<'a> {
    /// `None`: whoever made it.
    pub(crate) owner: Option<(u32, u32)>,
    pub(crate) mode: u32,
    pub(crate) xattrs: &'a Xattrs,
    /// `None`: set later, when a directory's children are in place.
    pub(crate) mtime: Option<Timestamp>,
}

/// Names that describe the overlay or this host, not the file.
pub fn is_private_xattr(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") || name == b"security.selinux"
}

/// Sets everything on an open file or directory.
pub(crate) fn set_on_fd(fd: BorrowedFd<'_>, attributes: &Attributes<'_>) -> Result<(), CallError> {
    // Owner before mode: chown(2) clears setuid bits and security.capability.
    if let Some((uid, gid)) = attributes.owner {
        fs::fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).named("fchown")?;
    }
    fs::fchmod(fd, Mode::from_raw_mode(attributes.mode & 0o7777)).named("fchmod")?;
    for (name, value) in attributes.xattrs {
        tolerate(fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty())).named("fsetxattr")?;
    }
    match attributes.mtime {
        Some(mtime) => fs::futimens(fd, &times(mtime)).named("futimens"),
        None => Ok(()),
    }
}

/// Sets everything on a link, device or fifo: these are never opened.
pub(crate) fn set_on_name(
    parent: BorrowedFd<'_>,
    name: &[u8],
    is_symlink: bool,
    attributes: &Attributes<'_>,
) -> Result<(), CallError> {
    if let Some((uid, gid)) = attributes.owner {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).named("fchownat")?;
    }
    if !is_symlink {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let node = fs::openat(parent, name, flags, Mode::empty()).named("openat")?;
        // fchmod(2) refuses O_PATH; the magic link leads to exactly this node.
        fs::chmod(magic_path(node.as_fd(), b""), Mode::from_raw_mode(attributes.mode & 0o7777))
            .named("chmod")?;
    }
    for (key, value) in attributes.xattrs {
        let set = fs::lsetxattr(magic_path(parent, name), key.as_slice(), value, XattrFlags::empty());
        tolerate(set).named("lsetxattr")?;
    }
    match attributes.mtime {
        Some(mtime) => set_mtime(parent, name, mtime),
        None => Ok(()),
    }
}

/// Sets the modification time of `name` itself, not of what it links to.
pub(crate) fn set_mtime(parent: BorrowedFd<'_>, name: &[u8], mtime: Timestamp) -> Result<(), CallError> {
    fs::utimensat(parent, name, &times(mtime), AtFlags::SYMLINK_NOFOLLOW).named("utimensat")
}

/// A file system without extended attributes keeps the rest of the file all the same.
fn tolerate(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::NOTSUP) => Ok(()),
        other => other,
    }
}

fn times(mtime: Timestamp) -> Timestamps {
    let time = Timespec { tv_sec: mtime.secs, tv_nsec: mtime.nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// Leads to `name` in the open directory without walking any path again; the kernel has no
/// `*xattrat` calls before 6.13.
fn magic_path(directory: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    let mut path = format!("/proc/self/fd/{}", directory.as_raw_fd()).into_bytes();
    if !name.is_empty() {
        path.push(b'/');
        path.extend_from_slice(name);
    }
    path
}

/// All extended attributes of `name` itself; `.` for the directory.
pub(crate) fn xattrs(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Xattrs, CallError> {
    let path = magic_path(parent, name);
    let mut found = Xattrs::new();
    // Most files have none: one call with a small buffer settles it.
    let mut names = vec![0; 1024];
    let length = loop {
        match fs::llistxattr(path.as_slice(), names.as_mut_slice()) {
            Ok(length) => break length,
            Err(Errno::RANGE) if names.len() < 1 << 20 => names.resize(names.len() * 8, 0),
            Err(Errno::NOTSUP) => return Ok(found),
            Err(errno) => return Err(CallError { call: "llistxattr", errno }),
        }
    };
    for key in names[..length].split(|&b| b == 0).filter(|key| !key.is_empty()) {
        let mut value = vec![0; 256];
        let length = loop {
            match fs::lgetxattr(path.as_slice(), key, value.as_mut_slice()) {
                Ok(length) => break Some(length),
                Err(Errno::RANGE) if value.len() < 1 << 20 => value.resize(value.len() * 8, 0),
                // Gone since it was listed, or not for us to read.
                Err(Errno::NODATA | Errno::NOTSUP) => break None,
                Err(errno) => return Err(CallError { call: "lgetxattr", errno }),
            }
        };
        if let Some(length) = length {
            value.truncate(length);
            found.insert(key.to_vec(), value);
        }
    }
    Ok(found)
}

/// Names in an open directory, sorted as bytes.
pub(crate) fn names(directory: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, CallError> {
    let mut buffer = Vec::with_capacity(32 << 10);
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.named("getdents64")?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// What stands at `name`, links not followed; `None` for nothing.
pub(crate) fn stat(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>, CallError> {
    match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(CallError { call: "fstatat", errno }),
    }
}

pub(crate) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Opens the directory `name`, never through a link.
pub(crate) fn open_dir(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, CallError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(parent, name, flags, Mode::empty()).named("openat")
}

/// Removes `name` with everything below it; nothing there is fine.
pub(crate) fn remove(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), CallError> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(CallError { call: "unlinkat", errno }),
    }
    let directory = open_dir(parent, name)?;
    for child in names(directory.as_fd())? {
        remove(directory.as_fd(), &child)?;
    }
    fs::unlinkat(parent, name, AtFlags::REMOVEDIR).named("unlinkat")
}
