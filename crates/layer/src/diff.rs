//! A tree becomes a layer tar: the same tree always becomes the same bytes.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_oci::DiffId;
use rustix::fs::{self, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::hashing::HashedOut;
use crate::index::{Entry, EntryKind, ScanError, Timestamp};
use crate::member::{Links, copy_content};
use crate::node::{self, Named, Xattrs};
use crate::path::{self, EntryPath};
use crate::shape::{Shape, ShapeHasher};
use crate::tar_write::{BLOCK, Header, write_header, write_padding};
use crate::walk::{Found, Walk};

mod beside;
mod prefix;
mod recorded;
mod states;
mod trees;
mod unchanged;

pub(crate) use beside::What;
pub use beside::{Followed, Follower, Following};
pub use states::HashStates;
pub use trees::diff_trees;
pub(crate) use unchanged::has_origin;
pub use unchanged::{copied_up, drop_unchanged};

/// What the files of a tree mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TreeForm {
    /// An overlayfs upperdir: whiteouts and opaque directories hide what is below.
    OverlayUpper,
    /// Every file is a file.
    Plain,
    /// The same for a tar that is no layer: `.wh.` in front of a name means nothing.
    Archive,
}

/// How to write a layer.
pub struct DiffOptions<'a> {
    /// What the files mean.
    pub form: TreeForm,
    /// Write an entry `./` for the root itself.
    pub root_entry: bool,
    /// Set by somebody else to stop.
    pub cancel: &'a AtomicBool,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Digest of the tar.
    pub diff_id: DiffId,
    /// Its size in bytes.
    pub tar_size_bytes: u64,
    /// Number of members.
    pub entries: u64,
}

/// Why a tree could not be written as a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A file changed while it was read; its tar member would be torn.
    #[error("{path} changed while it was read")]
    ChangedWhileReading {
        /// The file.
        path: EntryPath,
    },
    /// A file has a name that means a whiteout in a layer.
    #[error("{path} cannot be part of a layer: names with .wh. in front are whiteouts there")]
    ReservedName {
        /// The file.
        path: EntryPath,
    },
    /// The upperdir refers to a lower layer's content, so its files are not the whole story.
    #[error("{path} takes its content from a lower layer ({xattr})")]
    Redirected {
        /// The file or directory.
        path: EntryPath,
        /// The attribute that says so.
        xattr: EntryPath,
    },
    /// The tree could not be read.
    #[error("cannot read the tree")]
    Scan(#[source] ScanError),
    /// The kernel refused.
    #[error("{call} failed for {path}")]
    Host {
        /// The system call.
        call: &'static str,
        /// The entry.
        path: EntryPath,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The output could not be written.
    #[error("cannot write the layer tar")]
    Output(#[source] io::Error),
}

impl From<ScanError> for DiffError {
    fn from(error: ScanError) -> Self {
        match error {
            ScanError::Cancelled => Self::Cancelled,
            ScanError::ChangedWhileReading { path } => Self::ChangedWhileReading { path },
            other => Self::Scan(other),
        }
    }
}

/// Writes the tree below `upper` as a tar: a pure function of the tree.
///
/// Members are sorted by component; of hard links the first is the file. Sockets are left out, as
/// are the attributes of overlayfs and SELinux. Memory does not grow with the tree, but for the names
/// of the directories on the way and the files with several links.
pub fn diff(upper: BorrowedFd<'_>, out: impl Write, options: &DiffOptions<'_>) -> Result<Written, DiffError> {
    let mut writer = Writer::new(HashedOut::new(out), options);
    writer.tree(upper)?;
    writer.finish()
}

/// The shape of the tar that [`diff()`] writes. Reads no content: a few system calls a file.
///
/// # Errors
/// Those of [`diff()`], but for those of reading content.
pub fn shape(upper: BorrowedFd<'_>, options: &DiffOptions<'_>) -> Result<Shape, DiffError> {
    let mut writer = Writer::new(ShapeHasher::new(), options);
    writer.tree(upper)?;
    writer.end()?;
    Ok(writer.out.finish())
}

/// What a tar ends with.
const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// Where members go.
trait Output: Write {
    /// Takes a member's header; `content` is the BLAKE3 of the file that it is of, if that is known.
    fn header(&mut self, header: &Header<'_>, content: Option<&[u8; 32]>) -> io::Result<()>
    where
        Self: Sized,
    {
        let _ = content;
        write_header(self, header)
    }

    /// Takes exactly `size_bytes` of content: the header has promised them already.
    fn content(
        &mut self,
        path: &[u8],
        file: File,
        size_bytes: u64,
        cancel: &AtomicBool,
    ) -> Result<(), DiffError>;
}

impl<W: Write> Output for HashedOut<W> {
    fn content(
        &mut self,
        path: &[u8],
        file: File,
        size_bytes: u64,
        cancel: &AtomicBool,
    ) -> Result<(), DiffError> {
        copy_content(self, path, file, size_bytes, cancel)
    }
}

impl Output for ShapeHasher {
    fn content(&mut self, _: &[u8], _: File, _: u64, _: &AtomicBool) -> Result<(), DiffError> {
        Ok(())
    }
}

struct Writer<'a, O: Output> {
    options: &'a DiffOptions<'a>,
    out: O,
    links: Links,
    entries: u64,
}

impl<'a, O: Output> Writer<'a, O> {
    fn new(out: O, options: &'a DiffOptions<'a>) -> Self {
        Self { options, out, links: Links::default(), entries: 0 }
    }

    /// Writes all that is below `upper`.
    fn tree(&mut self, upper: BorrowedFd<'_>) -> Result<(), DiffError> {
        let mut walk = Walk::new(upper, b"")?;
        while walk.next()?.is_some() {
            if self.options.cancel.load(Ordering::Relaxed) {
                return Err(DiffError::Cancelled);
            }
            let (entry, file) = self.read(&mut walk)?;
            self.write(&entry, file)?;
        }
        Ok(())
    }

    /// The entry that the walk came to and, unless it was written already, the content of a file.
    /// Goes into a directory.
    fn read(&self, walk: &mut Walk) -> Result<(Entry, Option<File>), DiffError> {
        let found = walk.current().expect("called after the walk came to an entry");
        if node::kind(&found.stat) != FileType::Directory {
            return self.read_non_dir(&found);
        }
        let mut entry = Entry::new(&found, None, Xattrs::new())?;
        let dir = walk.enter()?;
        let failed = |error| DiffError::Scan(ScanError::host(&entry.path, error));
        entry.xattrs = node::xattrs_of(dir).map_err(failed)?;
        entry.apply_record();
        Ok((entry, None))
    }

    /// The same for what is no directory.
    fn read_non_dir(&self, found: &Found<'_>) -> Result<(Entry, Option<File>), DiffError> {
        let failed = |error| DiffError::Scan(ScanError::host(found.path, error));
        match node::kind(&found.stat) {
            FileType::RegularFile if self.links.contains((found.stat.st_dev, found.stat.st_ino)) => {
                Ok((Entry::new(found, None, Xattrs::new())?, None))
            }
            FileType::RegularFile => {
                let file = open_content(found.parent, found.name).named("openat").map_err(failed)?;
                let xattrs = node::xattrs_of(file.as_fd()).map_err(failed)?;
                Ok((Entry::new(found, None, xattrs)?, Some(file.into())))
            }
            _ => {
                let xattrs = node::xattrs(found.parent, found.name).map_err(failed)?;
                Ok((Entry::new(found, None, xattrs)?, None))
            }
        }
    }

    /// Writes an entry; `file` has the content.
    fn write(&mut self, entry: &Entry, file: Option<File>) -> Result<(), DiffError> {
        let overlay = self.options.form == TreeForm::OverlayUpper;
        if overlay && is_whiteout(entry) {
            let (parent, name) = path::split(&entry.path);
            return self.marker(hiding(parent, name));
        }
        let (_, name) = path::split(&entry.path);
        if name.starts_with(b".wh.") && self.options.form != TreeForm::Archive {
            return Err(DiffError::ReservedName { path: entry.path.as_slice().into() });
        }
        if overlay {
            refuse_redirects(entry)?;
        }
        if !entry.path.is_empty() || self.options.root_entry {
            self.member(entry, file)?;
        }
        if overlay && is_opaque(entry) {
            self.marker(path::join(&entry.path, b".wh..wh..opq"))?;
        }
        Ok(())
    }

    /// Writes a file whose content is at hand.
    fn write_held(&mut self, entry: &Entry, content: &[u8]) -> Result<(), DiffError> {
        if !matches!(entry.kind, EntryKind::File { size, .. } if size == content.len() as u64) {
            return Err(DiffError::ChangedWhileReading { path: entry.path.as_slice().into() });
        }
        self.write(entry, None)?;
        let written = self.out.write_all(content);
        written.and_then(|()| write_padding(&mut self.out, content.len() as u64)).map_err(DiffError::Output)
    }

    /// An empty file that stands for something missing; it has no time of its own.
    fn marker(&mut self, path: Vec<u8>) -> Result<(), DiffError> {
        self.entries += 1;
        let header = Header {
            path: &path,
            flag: b'0',
            link: b"",
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Timestamp::default(),
            device: (0, 0),
            xattrs: &Xattrs::new(),
        };
        self.out.header(&header, None).map_err(DiffError::Output)
    }

    fn member(&mut self, entry: &Entry, file: Option<File>) -> Result<(), DiffError> {
        let write = |header: &Header<'_>| self.out.header(header, entry.content());
        let size = self.links.write_header(entry, &entry.path, write).map_err(DiffError::Output)?;
        self.entries += u64::from(size.is_some());
        match (file, size) {
            (Some(file), Some(size)) if size > 0 => {
                self.out.content(&entry.path, file, size, self.options.cancel)?;
                write_padding(&mut self.out, size).map_err(DiffError::Output)
            }
            _ => Ok(()),
        }
    }

    /// Two blocks of zeros.
    fn end(&mut self) -> Result<(), DiffError> {
        self.out.write_all(&END).map_err(DiffError::Output)
    }
}

impl<W: Write> Writer<'_, HashedOut<W>> {
    fn finish(mut self) -> Result<Written, DiffError> {
        self.end()?;
        let (digest, tar_size_bytes) = self.out.finish().map_err(DiffError::Output)?;
        Ok(Written { diff_id: DiffId(digest), tar_size_bytes, entries: self.entries })
    }
}

/// Opens a file to read it; one that turned into a fifo or a link meanwhile does not hang or lead away.
fn open_content(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let open = |flags| fs::openat(parent, name, flags, Mode::empty());
    // Else each inode of the layer would be written for the time of this look at it. Only who owns a file may
    // ask for that.
    match open(flags | OFlags::NOATIME) {
        Err(Errno::PERM) => open(flags),
        other => other,
    }
}

/// The path of the marker that hides `name`.
fn hiding(parent: &[u8], name: &[u8]) -> Vec<u8> {
    path::join(parent, &[b".wh.", name].concat())
}

/// The value of an overlay attribute, whether it was mounted with `userxattr` or not.
fn overlay_xattr<'e>(entry: &'e Entry, name: &str) -> Option<&'e [u8]> {
    let get = |space: &str| entry.xattrs.get(format!("{space}.overlay.{name}").as_bytes());
    get("trusted").or_else(|| get("user")).map(Vec::as_slice)
}

/// A 0:0 device, or an empty file with an attribute (overlayfs.rst, "whiteouts and opaque
/// directories").
pub fn is_whiteout(entry: &Entry) -> bool {
    match entry.kind {
        EntryKind::Char { major: 0, minor: 0 } => true,
        EntryKind::File { size: 0, .. } => overlay_xattr(entry, "whiteout").is_some(),
        _ => false,
    }
}

/// Whether an overlayfs upperdir has nothing to show of a lower directory here.
pub fn is_opaque(entry: &Entry) -> bool {
    entry.kind == EntryKind::Dir && overlay_xattr(entry, "opaque") == Some(b"y")
}

/// Mounts are made without `redirect_dir` and `metacopy`; a tree that has them was not ours.
fn refuse_redirects(entry: &Entry) -> Result<(), DiffError> {
    for name in ["redirect", "metacopy"] {
        if overlay_xattr(entry, name).is_some() {
            let xattr = EntryPath(format!("overlay.{name}").into_bytes());
            return Err(DiffError::Redirected { path: entry.path.as_slice().into(), xattr });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
