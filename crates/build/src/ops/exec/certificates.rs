//! Extra certificates in the files that an image keeps its own in, while a step runs
//! (`docs/adr/0015-extra-certificates.md`).
//!
//! A mount over such a file could not be renamed over, which is how every distribution writes its own
//! anew. So a directory between the image and what the step writes has the file with the certificates
//! added: the step sees an ordinary file. What it has written with them in it, as a copy, loses them
//! before it becomes a layer.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_executor::Authorities;
use kiln_layer::beneath;
use kiln_oci::SnapshotId;
use kiln_snapshotter::LayerForm;
use rustix::fs::{
    Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, fchmod,
    fchown, fgetxattr, flistxattr, fsetxattr, fstat, futimens, openat,
};
use rustix::io::Errno;

use crate::engine::Active;
use crate::{BuildError, Engine, OpError};

/// No list of certificates is larger.
const MAX_BYTES: u64 = 16 << 20;
/// So much of a file tells whether it is text.
const HEAD_BYTES: u64 = 1 << 10;

/// The files as a step is to see them.
pub(super) struct Covers {
    dir: OwnedFd,
    _active: Active,
}

fn failed(path: &[u8]) -> impl FnOnce(io::Error) -> OpError + use<> {
    let path = String::from_utf8_lossy(path).into_owned();
    move |source| OpError::Certificates { path, source }
}

impl Covers {
    /// For a step on `base`; `None`: nothing is to be added, the image has no such file, or this backend
    /// cannot put something in front of it.
    pub(super) fn make(
        engine: &Engine,
        authorities: &Authorities,
        base: Option<&SnapshotId>,
    ) -> Result<Option<Self>, OpError> {
        let snapshots = &engine.snapshots;
        // One id cannot give the copies their owners.
        let possible = snapshots.form() == LayerForm::Changes && !kiln_layer::has_single_id();
        let Some(base) = base.filter(|_| possible && !authorities.is_empty()) else { return Ok(None) };
        let view = snapshots.open_view(base)?;
        let mut files = Vec::new();
        let mut known = BTreeSet::new();
        for place in Authorities::places() {
            let Ok(path) = beneath::real_path(view.as_fd(), place.trim_matches('/').as_bytes()) else {
                continue;
            };
            if let Some(content) = read_text(view.as_fd(), &path)
                && known.insert(path.clone())
            {
                files.push((path, content));
            }
        }
        if files.is_empty() {
            return Ok(None);
        }
        let active = engine.prepare(None)?;
        let dir = snapshots.open_layer(active.key())?;
        let block = authorities.block();
        for (path, content) in &files {
            let written = [content, block.as_bytes()].concat();
            cover(view.as_fd(), dir.as_fd(), path, &written).map_err(failed(path))?;
        }
        Ok(Some(Self { dir, _active: active }))
    }

    /// The directory, as a path that works while this lives.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}/.", self.dir.as_raw_fd()).into()
    }
}

/// What a regular file holds; `None` for what is none, too large, or cannot be read.
fn read_text(root: BorrowedFd<'_>, path: &[u8]) -> Option<Vec<u8>> {
    let file = beneath::open_file(root, path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW).ok()?;
    let stat = fstat(&file).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return None;
    }
    let mut content = Vec::new();
    File::from(file).take(MAX_BYTES + 1).read_to_end(&mut content).ok()?;
    (content.len() as u64 <= MAX_BYTES).then_some(content)
}

/// Makes the file `path`, and the directories above it, in `dir` like those in `view`.
fn cover(view: BorrowedFd<'_>, dir: BorrowedFd<'_>, path: &[u8], content: &[u8]) -> io::Result<()> {
    let other = |error: beneath::BeneathError| io::Error::other(error);
    let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
    let mut above: Vec<&[u8]> = slashes.map(|(at, _)| &path[..at]).collect();
    if let Some(parent) = above.last() {
        beneath::mkdir_all(dir, parent, 0o755, (0, 0)).map_err(other)?;
    }
    let (parent, name) = beneath::open_parent(dir, path).map_err(other)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(parent, name, flags, Mode::from_raw_mode(0o600))?);
    file.write_all(content)?;
    let like = beneath::open_file(view, path, OFlags::RDONLY | OFlags::NONBLOCK).map_err(other)?;
    make_like(file.as_fd(), like.as_fd())?;
    // Lowest first: times are those of the last change below.
    above.reverse();
    for path in above {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let made = beneath::open_file(dir, path, flags).map_err(other)?;
        make_like(made.as_fd(), beneath::open_file(view, path, flags).map_err(other)?.as_fd())?;
    }
    Ok(())
}

/// Gives `to` owner, mode, attributes and times of `from`.
fn make_like(to: BorrowedFd<'_>, from: BorrowedFd<'_>) -> io::Result<()> {
    let stat = fstat(from)?;
    fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let mut names = vec![0; 64 << 10];
    let length = match flistxattr(from, &mut names) {
        Err(Errno::OPNOTSUPP) => 0,
        other => other?,
    };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        // The file system's own, as is where a file was copied up from.
        if name.starts_with(b"trusted.") || name.starts_with(b"user.overlay.") {
            continue;
        }
        let mut value = vec![0; 64 << 10];
        let length = fgetxattr(from, name, &mut value)?;
        fsetxattr(to, name, &value[..length], XattrFlags::empty())?;
    }
    set_mtime(to, &stat)
}

fn set_mtime(file: BorrowedFd<'_>, like: &Stat) -> io::Result<()> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: like.st_mtime, tv_nsec: like.st_mtime_nsec.cast_signed() },
    };
    Ok(futimens(file, &times)?)
}

/// Takes the certificates out of every list of certificates that a step has written, so that its layer is
/// what it would be without them. Nobody may have `active` mounted. Costs a look at every file in it.
pub(super) fn take_out(
    engine: &Engine,
    authorities: &Authorities,
    active: &Active,
    cancel: &AtomicBool,
) -> Result<(), OpError> {
    if authorities.is_empty() {
        return Ok(());
    }
    let layer = engine.snapshots.open_layer(active.key())?;
    let block = authorities.block();
    let mut dirs = vec![Vec::new()];
    while let Some(path) = dirs.pop() {
        if cancel.load(Ordering::Relaxed) {
            return Err(BuildError::Cancelled.into());
        }
        let dir = beneath::open_dir_without_links(layer.as_fd(), &path);
        let dir = dir.map_err(|error| failed(&path)(io::Error::other(error)))?;
        let entries = Dir::read_from(&dir).map_err(|errno| failed(&path)(errno.into()))?;
        for entry in entries {
            let entry = entry.map_err(|errno| failed(&path)(errno.into()))?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let below = if path.is_empty() { name.to_vec() } else { [&path[..], b"/", name].concat() };
            match entry.file_type() {
                FileType::Directory => dirs.push(below),
                FileType::RegularFile => {
                    clean(dir.as_fd(), entry.file_name(), block.as_bytes()).map_err(failed(&below))?;
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Removes `block` from a file that is text and has it.
fn clean(dir: BorrowedFd<'_>, name: &std::ffi::CStr, block: &[u8]) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = File::from(openat(dir, name, flags, Mode::empty())?);
    let stat = fstat(&file)?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if !(block.len() as u64..=2 * MAX_BYTES).contains(&size) {
        return Ok(());
    }
    let mut content = Vec::new();
    (&mut file).take(HEAD_BYTES).read_to_end(&mut content)?;
    if content.contains(&0) {
        return Ok(());
    }
    file.read_to_end(&mut content)?;
    let mut rest = &content[..];
    let mut kept = Vec::new();
    while let Some(at) = rest.windows(block.len()).position(|part| part == block) {
        kept.extend_from_slice(&rest[..at]);
        rest = &rest[at + block.len()..];
    }
    if rest.len() == content.len() {
        return Ok(());
    }
    kept.extend_from_slice(rest);
    // The owner may have taken away his own right to write.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let file = File::options().write(true).open(path)?;
    file.write_all_at(&kept, 0)?;
    file.set_len(kept.len() as u64)?;
    // Writing clears setuid bits, and a list of certificates that has one keeps it all the same.
    fchmod(&file, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    set_mtime(file.as_fd(), &stat)
}
