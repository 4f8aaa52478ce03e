//! `kiln cp`: files out of an image, as a tar or into a directory here.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kiln_content::ImageRecord;
use kiln_layer::{
    CopyRequest, DiffError, Entry, EntryKind, LookedAt, ScanError, ScanOptions, TopDir, beneath,
};
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::ToolkitError;
use super::show::real_parent;
use crate::{BuildCancel, Engine};

/// Whose files are copied.
#[derive(Debug, Clone, Copy)]
pub enum CopySource<'a> {
    /// An image's.
    Image(&'a ImageRecord),
    /// Those below an open directory, which somebody may be changing.
    Tree(BorrowedFd<'a>),
}

/// What to copy out of an image or a container.
#[derive(Debug, Clone, Copy)]
pub struct CopyOut<'a> {
    /// Whose.
    pub from: CopySource<'a>,
    /// Path in it; `/.` at the end means what is in that directory.
    pub path: &'a [u8],
    /// A link at the path stands for what it leads to, inside the image.
    pub follow: bool,
}

/// What was copied.
#[derive(Debug, Clone, Default)]
pub struct CopiedOut {
    /// Files, directories and links that were made.
    pub entries: u64,
    /// Bytes of their content.
    pub bytes: u64,
    /// Devices that were left out, as paths in the image.
    pub left_out: Vec<Vec<u8>>,
}

/// The selected part of an image's tree.
struct Source {
    view: OwnedFd,
    /// Where it is in the tree.
    path: Vec<u8>,
    /// What it is called outside; empty: it has no name, only contents.
    name: Vec<u8>,
    /// Sorted; the first is what was asked for.
    entries: Vec<Entry>,
}

impl Source {
    fn open(engine: &Engine, what: &CopyOut<'_>, cancel: &BuildCancel) -> Result<Self, ToolkitError> {
        let missing = || ToolkitError::NoPath { path: what.path.into() };
        let open = |source| ToolkitError::Follow { path: what.path.into(), source };
        let view = match what.from {
            CopySource::Image(image) => {
                engine.snapshots.open_view(image.snapshot.as_ref().ok_or_else(missing)?)?
            }
            CopySource::Tree(tree) => {
                let copy = rustix::io::fcntl_dupfd_cloexec(tree, 3).map_err(io::Error::from);
                copy.map_err(|source| ToolkitError::Destination { destination: PathBuf::from("."), source })?
            }
        };
        let contents = what.path.ends_with(b"/.") || what.path.iter().all(|&b| b == b'/');
        let as_dir = contents || what.path.ends_with(b"/");
        let path = if as_dir || what.follow {
            beneath::real_path(view.as_fd(), what.path).map_err(open)?
        } else {
            real_parent(view.as_fd(), what.path)?
        };
        let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: cancel.flag() };
        let entries = kiln_layer::scan(view.as_fd(), &path, &options).map_err(|error| match &error {
            ScanError::Host { source, .. }
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                missing()
            }
            _ => error.into(),
        })?;
        let first = entries.first().ok_or_else(missing)?;
        if as_dir && first.kind != EntryKind::Dir {
            return Err(ToolkitError::NotDirectory { path: what.path.into() });
        }
        // Called as it was asked for, not as the link's target is.
        let asked = what.path.split(|&b| b == b'/').rfind(|part| !matches!(*part, b"" | b"."));
        let name = match asked {
            _ if contents => Vec::new(),
            Some(b"..") | None => path.rsplit(|&b| b == b'/').next().unwrap_or_default().to_vec(),
            Some(name) => name.to_vec(),
        };
        Ok(Self { view, path, name, entries })
    }

    fn is_dir(&self) -> bool {
        self.entries.first().is_some_and(|first| first.kind == EntryKind::Dir)
    }
}

/// Writes what `what` selects as a tar whose members stand below the last name of the path; `out_path`
/// is for messages. Owners, times, attributes, links and devices are those of the image.
///
/// # Errors
/// [`ToolkitError::NoPath`]; [`ToolkitError::Output`] when `out` does not take it.
pub fn copy_out_tar(
    engine: &Engine,
    what: &CopyOut<'_>,
    out_path: &Path,
    out: &mut dyn Write,
    cancel: &BuildCancel,
) -> Result<(), ToolkitError> {
    let source = Source::open(engine, what, cancel)?;
    let name = |path: &[u8]| {
        let rest = path.strip_prefix(&source.path[..]).unwrap_or(path);
        let rest = rest.strip_prefix(b"/").unwrap_or(rest);
        match (&source.name[..], rest) {
            (b"", rest) => rest.to_vec(),
            (name, b"") => name.to_vec(),
            (name, rest) => [name, b"/", rest].concat(),
        }
    };
    let written = kiln_layer::archive(source.view.as_fd(), &source.entries, &name, out, cancel.flag());
    written.map_err(|error| match error {
        DiffError::Cancelled => ToolkitError::Cancelled,
        DiffError::Output(source) => ToolkitError::Output { path: out_path.to_owned(), source },
        other => ToolkitError::Tar(other),
    })
}

/// Copies what `what` selects to `destination`: into it, if that is a directory; else under that
/// name, whose parent has to be there. Nothing outside that directory is written to, whatever links
/// are in it, and no link is made to lead anywhere but as the image has it.
///
/// Without `keep_owner` all belongs to the caller, setuid and setgid bits and the attributes of
/// `security.*` go, and devices are left out: what an image says must not give rights here.
///
/// # Errors
/// [`ToolkitError::NoPath`], [`ToolkitError::OntoFile`], [`ToolkitError::Destination`]; a copy that
/// failed half-way leaves what it made.
pub fn copy_out(
    engine: &Engine,
    what: &CopyOut<'_>,
    destination: &Path,
    keep_owner: bool,
    cancel: &BuildCancel,
) -> Result<CopiedOut, ToolkitError> {
    let mut source = Source::open(engine, what, cancel)?;
    let (directory, name) = place(&source, what.path, destination)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let to = openat(CWD, &directory, flags, Mode::empty()).map_err(|errno| ToolkitError::Destination {
        destination: destination.to_owned(),
        source: errno.into(),
    })?;
    let mut left_out = Vec::new();
    if !keep_owner {
        source.entries.retain(|entry| {
            let is_device = matches!(entry.kind, EntryKind::Char { .. } | EntryKind::Block { .. });
            if is_device {
                left_out.push(entry.path.clone());
            }
            !is_device
        });
        for entry in &mut source.entries {
            entry.xattrs.retain(|name, _| !name.starts_with(b"security."));
        }
    }
    let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let plain = |mode: u32, _: bool| mode & 0o1777;
    let copied = kiln_layer::copy(&CopyRequest {
        // A committed snapshot does not change.
        looked_at: (!matches!(what.from, CopySource::Image(_))).then(LookedAt::now),
        strip: &source.path,
        destination: &name,
        owner: (!keep_owner).then_some(owner),
        mode: if keep_owner { None } else { Some(&plain) },
        top: if name.is_empty() { TopDir::Contents } else { TopDir::Itself },
        ..CopyRequest::tree(source.view.as_fd(), &source.entries, to.as_fd(), cancel.flag())
    })?;
    Ok(CopiedOut { entries: copied.entries, bytes: copied.bytes, left_out })
}

/// The directory to copy into, and what the source is called there; empty: its contents stand there
/// themselves.
fn place(source: &Source, asked: &[u8], destination: &Path) -> Result<(PathBuf, Vec<u8>), ToolkitError> {
    let failed = |source| ToolkitError::Destination { destination: destination.to_owned(), source };
    // A slash behind it: a directory is meant.
    let as_dir = destination.as_os_str().as_bytes().ends_with(b"/");
    match fs::metadata(destination) {
        Ok(there) if there.is_dir() => return Ok((destination.to_owned(), source.name.clone())),
        Ok(_) if source.is_dir() => {
            let destination = destination.to_owned();
            return Err(ToolkitError::OntoFile { path: asked.into(), destination });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound && (source.is_dir() || !as_dir) => {}
        Err(error) => return Err(failed(error)),
    }
    let invalid = || failed(io::ErrorKind::InvalidInput.into());
    let name = destination.file_name().ok_or_else(invalid)?.as_bytes().to_vec();
    let parent = match destination.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((parent, name))
}
