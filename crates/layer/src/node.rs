//! One file, directory or device: its metadata set, its extended attributes, its removal.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    self, AtFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, Stat, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use crate::index::Timestamp;
use crate::marks::{self, Record};

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
    name.starts_with(b"trusted.overlay.")
        || name.starts_with(b"user.overlay.")
        || name == b"security.selinux"
        || (name == marks::RECORD.as_bytes() && marks::uses_user_attributes())
}

/// Gives an open file or directory to an owner: in truth, or on record where the id cannot be given.
pub(crate) fn give(fd: BorrowedFd<'_>, owner: (u32, u32)) -> Result<(), CallError> {
    if !marks::has_single_id() {
        let given = marks::givable(owner);
        let (uid, gid) = (Uid::from_raw(given.0), Gid::from_raw(given.1));
        fs::fchown(fd, Some(uid), Some(gid)).named("fchown")?;
        if given == owner {
            return Ok(());
        }
    }
    if owner != (0, 0) {
        let value = Record { owner, device: None }.to_value();
        return tolerate(fs::fsetxattr(fd, marks::RECORD, &value, XattrFlags::empty())).named("fsetxattr");
    }
    match fs::fremovexattr(fd, marks::RECORD) {
        Err(Errno::NODATA) => Ok(()),
        other => tolerate(other).named("fremovexattr"),
    }
}

/// Records whom the file or directory `name` belongs to in truth.
pub(crate) fn record_owner(parent: BorrowedFd<'_>, name: &[u8], owner: (u32, u32)) -> Result<(), CallError> {
    let value = Record { owner, device: None }.to_value();
    let set = fs::lsetxattr(magic_path(parent, name), marks::RECORD, &value, XattrFlags::empty());
    tolerate(set).named("lsetxattr")
}

/// Makes the new file `name` stand for a device that a user may not make.
pub(crate) fn record_device(
    parent: BorrowedFd<'_>,
    name: &[u8],
    owner: Option<(u32, u32)>,
    device: (bool, u32, u32),
) -> Result<(), CallError> {
    let value = Record { owner: owner.unwrap_or((0, 0)), device: Some(device) }.to_value();
    fs::lsetxattr(magic_path(parent, name), marks::RECORD, &value, XattrFlags::empty()).named("lsetxattr")
}

/// What stands for a device where a user may not make one: an empty file, to be recorded by
/// [`record_device`] once its attributes are set.
pub(crate) fn make_node(
    parent: BorrowedFd<'_>,
    name: &[u8],
    kind: FileType,
    number: fs::Dev,
) -> Result<(), Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
    if is_device && marks::uses_user_attributes() {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        return fs::openat(parent, name, flags, mode).map(drop);
    }
    fs::mknodat(parent, name, kind, mode, number)
}

/// Sets everything on an open file or directory.
pub(crate) fn set_on_fd(fd: BorrowedFd<'_>, attributes: &Attributes<'_>) -> Result<(), CallError> {
    // Owner before mode: chown(2) clears setuid bits and security.capability.
    if let Some(owner) = attributes.owner {
        give(fd, owner)?;
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

/// As [`set_on_fd`], on a file that was just made: what it has already costs a look, not a change.
pub(crate) fn set_on_new(fd: BorrowedFd<'_>, attributes: &Attributes<'_>) -> Result<(), CallError> {
    let stat = fs::fstat(fd).named("fstat")?;
    let is_owned = !marks::uses_user_attributes() && attributes.owner == Some((stat.st_uid, stat.st_gid));
    let is_alike = is_owned && attributes.mode & 0o7777 == stat.st_mode & 0o7777;
    match attributes.mtime.filter(|_| is_alike && attributes.xattrs.is_empty()) {
        Some(mtime) => fs::futimens(fd, &times(mtime)).named("futimens"),
        None => set_on_fd(fd, attributes),
    }
}

/// Sets everything on a link, device or fifo: these are never opened.
pub(crate) fn set_on_name(
    parent: BorrowedFd<'_>,
    name: &[u8],
    is_symlink: bool,
    attributes: &Attributes<'_>,
) -> Result<(), CallError> {
    // What stands for a device is a file and will have a record. The others cannot have an attribute of
    // a user's, so what cannot be given is lost.
    if let Some(owner) = attributes.owner.filter(|_| !marks::has_single_id()) {
        let mut given = marks::givable(owner);
        if given != owner && stat(parent, name)?.is_none_or(|stat| kind(&stat) != FileType::RegularFile) {
            given =
                (if given.0 == owner.0 { given.0 } else { 0 }, if given.1 == owner.1 { given.1 } else { 0 });
        }
        let (uid, gid) = (Uid::from_raw(given.0), Gid::from_raw(given.1));
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
    read_xattrs(
        |names| fs::llistxattr(path.as_slice(), names).named("llistxattr"),
        |key, value| fs::lgetxattr(path.as_slice(), key, value).named("lgetxattr"),
    )
}

/// All extended attributes of an open file or directory.
pub(crate) fn xattrs_of(fd: BorrowedFd<'_>) -> Result<Xattrs, CallError> {
    read_xattrs(
        |names| fs::flistxattr(fd, names).named("flistxattr"),
        |key, value| fs::fgetxattr(fd, key, value).named("fgetxattr"),
    )
}

/// Removes the attributes of an open directory that are `gone`.
pub(crate) fn remove_xattrs(fd: BorrowedFd<'_>, gone: impl Fn(&[u8]) -> bool) -> Result<(), CallError> {
    for name in xattrs_of(fd)?.into_keys().filter(|name| gone(name)) {
        fs::fremovexattr(fd, name.as_slice()).named("fremovexattr")?;
    }
    Ok(())
}

fn read_xattrs(
    list: impl Fn(&mut [u8]) -> Result<usize, CallError>,
    get: impl Fn(&[u8], &mut [u8]) -> Result<usize, CallError>,
) -> Result<Xattrs, CallError> {
    let mut found = Xattrs::new();
    // Most files have none: one call with a small buffer settles it.
    let mut short = [0; 512];
    let mut long = Vec::new();
    let names = loop {
        let buffer = if long.is_empty() { &mut short[..] } else { &mut long[..] };
        match list(buffer) {
            Ok(length) => break if long.is_empty() { &short[..length] } else { &long[..length] },
            Err(CallError { errno: Errno::RANGE, .. }) if long.len() < 1 << 20 => {
                long.resize(4096.max(long.len() * 8), 0);
            }
            Err(CallError { errno: Errno::NOTSUP, .. }) => return Ok(found),
            Err(error) => return Err(error),
        }
    };
    for key in names.split(|&b| b == 0).filter(|key| !key.is_empty()) {
        let mut value = vec![0; 256];
        let length = loop {
            match get(key, &mut value) {
                Ok(length) => break Some(length),
                Err(CallError { errno: Errno::RANGE, .. }) if value.len() < 1 << 20 => {
                    value.resize(value.len() * 8, 0);
                }
                // Gone since it was listed, or not for us to read.
                Err(CallError { errno: Errno::NODATA | Errno::NOTSUP, .. }) => break None,
                Err(error) => return Err(error),
            }
        };
        if let Some(length) = length {
            value.truncate(length);
            found.insert(key.to_vec(), value);
        }
    }
    Ok(found)
}

/// Names in a directory, sorted as bytes. One piece of memory for all of them.
#[derive(Default)]
pub(crate) struct Names {
    bytes: Vec<u8>,
    /// Begin and end of each.
    spans: Vec<(usize, usize)>,
}

impl Names {
    pub(crate) fn one(name: &[u8]) -> Self {
        Self { bytes: name.to_vec(), spans: vec![(0, name.len())] }
    }

    pub(crate) fn len(&self) -> usize {
        self.spans.len()
    }

    pub(crate) fn get(&self, nth: usize) -> &[u8] {
        let (begin, end) = self.spans[nth];
        &self.bytes[begin..end]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.spans.iter().map(|&(begin, end)| &self.bytes[begin..end])
    }
}

/// Lists an open directory.
pub(crate) fn names(directory: BorrowedFd<'_>) -> Result<Names, CallError> {
    let mut buffer = Vec::with_capacity(32 << 10);
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    let mut names = Names::default();
    while let Some(entry) = entries.next() {
        let entry = entry.named("getdents64")?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            let begin = names.bytes.len();
            names.bytes.extend_from_slice(name);
            names.spans.push((begin, names.bytes.len()));
        }
    }
    let bytes = &names.bytes;
    names.spans.sort_unstable_by(|a, b| bytes[a.0..a.1].cmp(&bytes[b.0..b.1]));
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

/// Removes `name` with everything below it; nothing there is fine, and so is another process that
/// removes the same.
///
/// Costs an unlink an entry. Trees deeper than [`REMOVED_AT_ONCE`] are taken apart: what is below is
/// moved up, so that neither the stack nor the number of open files depends on the tree.
pub(crate) fn remove(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), CallError> {
    if unlink(parent, name)? {
        return Ok(());
    }
    loop {
        // Opened anew each time: what was listed once is at its end.
        let Some(top) = there(open_dir(parent, name))? else { return Ok(()) };
        let mut moved = 0;
        let Some(children) = there(names(top.as_fd()))? else { return Ok(()) };
        for child in children.iter() {
            remove_below(top.as_fd(), child, top.as_fd(), &mut moved, REMOVED_AT_ONCE)?;
        }
        if moved == 0 {
            match there(remove_dir(parent, name)) {
                // The other process has moved something up.
                Err(CallError { errno: Errno::NOTEMPTY, .. }) => {}
                result => return result.map(drop),
            }
        }
    }
}

fn remove_dir(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), CallError> {
    fs::unlinkat(parent, name, AtFlags::REMOVEDIR).named("unlinkat")
}

/// `None` for what is not there any more.
fn there<T>(result: Result<T, CallError>) -> Result<Option<T>, CallError> {
    match result {
        Err(CallError { errno: Errno::NOENT, .. }) => Ok(None),
        result => result.map(Some),
    }
}

/// Levels of directories that are open at the same time.
const REMOVED_AT_ONCE: u32 = 64;

fn remove_below(
    parent: BorrowedFd<'_>,
    name: &[u8],
    top: BorrowedFd<'_>,
    moved: &mut u32,
    levels: u32,
) -> Result<(), CallError> {
    if unlink(parent, name)? {
        return Ok(());
    }
    if levels == 0 {
        loop {
            *moved += 1;
            let target = format!(".deep-{moved}");
            match fs::renameat_with(parent, name, top, target.as_str(), RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {}
                result => return there(result.named("renameat2")).map(drop),
            }
        }
    }
    let Some(directory) = there(open_dir(parent, name))? else { return Ok(()) };
    let Some(children) = there(names(directory.as_fd()))? else { return Ok(()) };
    for child in children.iter() {
        remove_below(directory.as_fd(), child, top, moved, levels - 1)?;
    }
    match there(remove_dir(parent, name)) {
        // The other process has moved something to this name: another round finds it.
        Err(CallError { errno: Errno::NOTEMPTY, .. }) => *moved += 1,
        result => drop(result?),
    }
    Ok(())
}

/// Unlinks what is no directory; whether it is gone.
fn unlink(parent: BorrowedFd<'_>, name: &[u8]) -> Result<bool, CallError> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::ISDIR | Errno::PERM) => Ok(false),
        Err(errno) => Err(CallError { call: "unlinkat", errno }),
    }
}
