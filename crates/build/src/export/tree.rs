//! The files of an image as a tar, or in a directory.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_content::ImageRecord;
use kiln_layer::{
    CopyRequest, DiffOptions, Entry, EntryKind, EntryPath, Limits, RepackOptions, ScanOptions, Times,
    Timestamp, TopDir, TreeForm, beneath, repack,
};
use kiln_oci::SnapshotId;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, open, statat, unlinkat};
use rustix::io::Errno;

use super::layers::{WriteError, piped};
use super::output::LocalMode;
use crate::{BuildCancel, BuildError, Engine};

/// Writes the file system of `image` as a tar; `path` is for messages.
///
/// # Errors
/// [`BuildError::Output`] when `out` does not take it.
pub fn export_tree(
    engine: &Engine,
    image: &ImageRecord,
    path: &Path,
    out: &mut dyn Write,
    cancel: &BuildCancel,
) -> Result<(), BuildError> {
    write_tar(engine, image.snapshot.as_ref(), &TreeStyle::default(), path, out, cancel.flag())
}

/// How a tree is written.
#[derive(Debug, Clone, Default)]
pub(crate) struct TreeStyle {
    /// The time of all files; seconds since 1970. `None`: each has its own.
    pub(crate) epoch: Option<i64>,
    /// A directory below which all of it stands.
    pub(crate) below: Option<String>,
}

impl TreeStyle {
    fn time(&self) -> Option<Timestamp> {
        self.epoch.map(|secs| Timestamp { secs, nanos: 0 })
    }
}

/// Writes the files of `top` as a tar.
pub(crate) fn write_tar(
    engine: &Engine,
    top: Option<&SnapshotId>,
    style: &TreeStyle,
    path: &Path,
    mut out: &mut dyn Write,
    cancel: &AtomicBool,
) -> Result<(), BuildError> {
    let failed = |source| BuildError::Output { path: path.to_owned(), source };
    let Some(top) = top else {
        return out.write_all(&[0; 1024]).and_then(|()| out.flush()).map_err(failed);
    };
    let view = engine.snapshots.open_view(top)?;
    let plain = |out: &mut dyn Write| -> Result<(), WriteError> {
        let options = DiffOptions { form: TreeForm::Plain, root_entry: false, cancel };
        kiln_layer::diff(view.as_fd(), out, &options).map_err(BuildError::from)?;
        Ok(())
    };
    if style.epoch.is_none() && style.below.is_none() {
        return plain(out).map_err(|error| error.named(failed));
    }
    let times = style.time().map_or(Times::Keep, Times::All);
    let limits = Limits::checked();
    let below = style.below.as_deref();
    let options = RepackOptions { times, below, limits, cancel };
    piped(|mut pipe| plain(&mut pipe), |tar| repack(tar, &mut out, &options), failed).map(drop)
}

/// Puts the files of `top` into the directory `dir`, which is made when it is not there. All of them
/// belong to the caller. What is there stays unless it is replaced, or `mode` says otherwise; nothing
/// outside `dir` is touched, whatever links are in it. Returns the devices, which are left out.
pub(crate) fn write_local(
    engine: &Engine,
    top: Option<&SnapshotId>,
    style: &TreeStyle,
    dir: &Path,
    mode: LocalMode,
    cancel: &AtomicBool,
) -> Result<Vec<EntryPath>, BuildError> {
    let dir = style.below.as_ref().map_or(dir.to_owned(), |below| dir.join(below));
    let failed = |source| BuildError::Output { path: dir.clone(), source };
    fs::create_dir_all(&dir).map_err(failed)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let to = open(&dir, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let view: Option<OwnedFd> = top.map(|top| engine.snapshots.open_view(top)).transpose()?;
    let mut entries = match &view {
        Some(view) => scan(view.as_fd(), cancel).map_err(failed)?,
        None => Vec::new(),
    };
    let left_out = make_plain(&mut entries);
    if let Some(time) = style.time() {
        entries.iter_mut().for_each(|entry| entry.mtime = time);
    }
    if mode == LocalMode::Delete {
        remove_others(to.as_fd(), &entries, cancel).map_err(failed)?;
    }
    make_room(to.as_fd(), &entries, cancel).map_err(failed)?;
    let Some(view) = &view else { return Ok(left_out) };
    let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let copy = CopyRequest::tree(view.as_fd(), &entries, to.as_fd(), cancel);
    let copied = kiln_layer::copy(&CopyRequest { owner: Some(owner), top: TopDir::Contents, ..copy });
    copied.map_err(|error| match error {
        kiln_layer::CopyError::Cancelled => BuildError::Cancelled,
        kiln_layer::CopyError::Host { call, path, source } => {
            let path = dir.join(text(&path));
            BuildError::Output { path, source: io::Error::new(source.kind(), format!("{call}: {source}")) }
        }
        other => failed(io::Error::other(other)),
    })?;
    Ok(left_out)
}

fn text(path: &EntryPath) -> String {
    String::from_utf8_lossy(&path.0).into_owned()
}

fn scan(root: BorrowedFd<'_>, cancel: &AtomicBool) -> io::Result<Vec<Entry>> {
    let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel };
    kiln_layer::scan(root, b"", &options).map_err(io::Error::other)
}

/// Leaves out what would be the caller's power in somebody else's hands once it belongs to the caller:
/// devices, setuid and setgid bits, capabilities. Returns the devices.
fn make_plain(entries: &mut Vec<Entry>) -> Vec<EntryPath> {
    let is_device =
        |entry: &mut Entry| matches!(entry.kind, EntryKind::Char { .. } | EntryKind::Block { .. });
    let devices = entries.extract_if(.., is_device).map(|device| EntryPath(device.path)).collect();
    for entry in entries {
        entry.mode &= !0o6000;
        entry.xattrs.retain(|name, _| !name.starts_with(b"security."));
    }
    devices
}

/// What to say of devices that [`write_local`] left out; `None`: there were none.
pub(crate) fn left_out_note(dir: &Path, devices: &[EntryPath]) -> Option<String> {
    const NAMED: usize = 3;
    let named: Vec<String> = devices.iter().take(NAMED).map(ToString::to_string).collect();
    let (named, dir) = (named.join(", "), dir.display());
    match devices.len() {
        0 => None,
        1 => Some(format!("{dir}: the device {named} is left out; `type=tar` has it")),
        count if count <= NAMED => {
            Some(format!("{dir}: {count} devices are left out: {named}; `type=tar` has them"))
        }
        count => {
            let more = count - NAMED;
            Some(format!("{dir}: {count} devices are left out: {named} and {more} more; `type=tar` has them"))
        }
    }
}

/// Removes from `root` what is not among `entries`, or is of another kind.
fn remove_others(root: BorrowedFd<'_>, entries: &[Entry], cancel: &AtomicBool) -> io::Result<()> {
    let wanted: HashMap<&[u8], bool> =
        entries.iter().map(|entry| (entry.path.as_slice(), entry.kind == EntryKind::Dir)).collect();
    // Backwards, a directory comes after what is in it.
    for entry in scan(root, cancel)?.iter().rev().filter(|entry| !entry.path.is_empty()) {
        let is_dir = entry.kind == EntryKind::Dir;
        if wanted.get(entry.path.as_slice()) == Some(&is_dir) {
            continue;
        }
        let (parent, name) = beneath::open_parent(root, &entry.path).map_err(io::Error::other)?;
        let flags = if is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        unlinkat(parent, name, flags)?;
    }
    Ok(())
}

/// Removes what stands in the place of a directory and is none: links are not followed, they go.
fn make_room(root: BorrowedFd<'_>, entries: &[Entry], cancel: &AtomicBool) -> io::Result<()> {
    // Below a directory that is not there is nothing to look at.
    let mut absent: Option<&[u8]> = None;
    let dirs = entries.iter().filter(|entry| entry.kind == EntryKind::Dir && !entry.path.is_empty());
    for Entry { path, .. } in dirs {
        if cancel.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let below = |dir: &[u8]| path.strip_prefix(dir).is_some_and(|rest| rest.starts_with(b"/"));
        if absent.is_some_and(below) {
            continue;
        }
        let (parent, name) = beneath::open_parent(root, path).map_err(io::Error::other)?;
        match statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Directory => continue,
            Ok(_) => unlinkat(&parent, name, AtFlags::empty())?,
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
        absent = Some(path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_for_the_caller_have_no_setuid_bits() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("su"), "").unwrap();
        fs::set_permissions(dir.path().join("su"), fs::Permissions::from_mode(0o6755)).unwrap();
        let mut entries = scan(fs::File::open(dir.path()).unwrap().as_fd(), &AtomicBool::new(false)).unwrap();
        make_plain(&mut entries);
        assert!(entries.iter().any(|entry| entry.path == b"su" && entry.mode & 0o7777 == 0o755));
    }

    #[test]
    fn devices_that_are_left_out_are_counted_and_the_first_are_named() {
        let devices: Vec<EntryPath> =
            ["dev/a", "dev/b\n", "c", "d", "e"].map(|name| EntryPath(name.into())).into();
        let note = |count| left_out_note(Path::new("out"), &devices[..count]);
        assert_eq!(note(0), None);
        assert_eq!(note(1).unwrap(), "out: the device \"dev/a\" is left out; `type=tar` has it");
        let said = note(3).unwrap();
        let named = r#"devices are left out: "dev/a", "dev/b\n", "c""#;
        assert_eq!(said, format!("out: 3 {named}; `type=tar` has them"));
        assert_eq!(note(5).unwrap(), format!("out: 5 {named} and 2 more; `type=tar` has them"));
    }
}
