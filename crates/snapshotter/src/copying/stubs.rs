//! What mounts need to find in a tree: made for them, and removed again.
//!
//! Where trees are stacked, stubs are a layer of their own below all others. Here they are in the tree
//! itself, so everything that was made is remembered with its inode: what a process put in its place,
//! or wrote to, is the process's and stays.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use kiln_layer::{EntryKind, ScanOptions, beneath};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, fchmod, fstat, futimens, mkdirat, openat, statat,
    unlinkat,
};
use rustix::io::Errno;

use crate::Error;
use crate::error::host;
use crate::places::open_readable;

/// Something that was made in a tree.
#[derive(Debug)]
pub(super) struct Stub {
    path: Vec<u8>,
    inode: (u64, u64),
    /// Of the directory it is in, before and after it was made.
    parent_times: (Time, Time),
}

type Time = (i64, i64);

/// Makes what is in `dir` and not in `tree`. What stands there stays, links too.
pub(super) fn add(tree: BorrowedFd<'_>, dir: &Path) -> Result<Vec<Stub>, Error> {
    let never = AtomicBool::new(false);
    let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: &never };
    let source = open_readable(rustix::fs::CWD, dir)?;
    let entries = kiln_layer::scan(source.as_fd(), b"", &options)
        .map_err(|error| Error::Tree { path: dir.to_owned(), source: error.into() })?;
    let mut made = Vec::new();
    for entry in entries.iter().filter(|entry| !entry.path.is_empty()) {
        let (above, name) = split(&entry.path);
        // Through a link it would be somewhere else than where a lower layer has it.
        let Ok(parent) = beneath::open_dir_without_links(tree, above) else { continue };
        let before = time_of(&parent, dir)?;
        let mode = Mode::from_raw_mode(entry.mode);
        let node = match &entry.kind {
            EntryKind::Dir => match mkdirat(&parent, name, Mode::RWXU) {
                Ok(()) => openat(
                    &parent,
                    name,
                    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW,
                    Mode::empty(),
                ),
                Err(errno) => Err(errno),
            },
            EntryKind::File { .. } => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                openat(&parent, name, flags, Mode::RUSR | Mode::WUSR)
            }
            _ => continue,
        };
        let node = match node {
            Ok(node) => node,
            Err(Errno::EXIST) => continue,
            Err(errno) => return Err(host("make a stub", dir)(errno)),
        };
        fchmod(&node, mode).map_err(host("fchmod", dir))?;
        let stat = fstat(&node).map_err(host("fstat", dir))?;
        made.push(Stub {
            path: entry.path.clone(),
            inode: (stat.st_dev, stat.st_ino),
            parent_times: (before, time_of(&parent, dir)?),
        });
    }
    Ok(made)
}

/// Removes what is still as it was made, the last first.
pub(super) fn remove(tree: BorrowedFd<'_>, stubs: &[Stub]) -> Result<(), Error> {
    let shown = Path::new("stubs");
    for stub in stubs.iter().rev() {
        let (above, name) = split(&stub.path);
        let Ok(parent) = beneath::open_dir_without_links(tree, above) else { continue };
        let Ok(stat) = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        if (stat.st_dev, stat.st_ino) != stub.inode {
            continue;
        }
        let untouched = time_of(&parent, shown)? == stub.parent_times.1;
        let removed = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            unlinkat(&parent, name, AtFlags::REMOVEDIR)
        } else if stat.st_size == 0 {
            unlinkat(&parent, name, AtFlags::empty())
        } else {
            continue;
        };
        match removed {
            Ok(()) if untouched => {
                let (secs, nanos) = stub.parent_times.0;
                let time = Timespec { tv_sec: secs, tv_nsec: nanos };
                let times = Timestamps { last_access: time, last_modification: time };
                futimens(&parent, &times).map_err(host("futimens", shown))?;
            }
            Ok(()) | Err(Errno::NOTEMPTY) => {}
            Err(errno) => return Err(host("unlink", shown)(errno)),
        }
    }
    Ok(())
}

fn time_of(dir: &OwnedFd, shown: &Path) -> Result<Time, Error> {
    let stat = fstat(dir).map_err(host("fstat", shown))?;
    Ok((stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or_default()))
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}
