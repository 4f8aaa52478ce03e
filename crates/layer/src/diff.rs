//! A tree becomes a layer tar: the same tree always becomes the same bytes.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_oci::{DiffId, Sha256Writer};

use crate::beneath::BeneathError;
use crate::index::{Entry, EntryKind, ScanError, ScanOptions, Timestamp, open_to_read, scan};
use crate::node::{Xattrs, is_private_xattr};
use crate::path::{self, EntryPath};
use crate::tar_write::{BLOCK, Header, write_header, write_padding};

/// Large enough that hashing and writing, not calls, take the time.
const BUFFER: usize = 256 << 10;

/// What the files of a tree mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TreeForm {
    /// An overlayfs upperdir: whiteouts and opaque directories hide what is below.
    OverlayUpper,
    /// Every file is a file.
    Plain,
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

impl From<BeneathError> for DiffError {
    fn from(error: BeneathError) -> Self {
        Self::Scan(error.into())
    }
}

/// Writes the tree below `upper` as a tar: a pure function of the tree.
///
/// Members are sorted by component; of hard links the first is the file. Sockets are left out, as
/// are the attributes of overlayfs and SELinux.
pub fn diff(upper: BorrowedFd<'_>, out: impl Write, options: &DiffOptions<'_>) -> Result<Written, DiffError> {
    let scanning = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: options.cancel };
    let entries = scan(upper, b"", &scanning)?;
    let out = BufWriter::with_capacity(BUFFER, Sha256Writer::new(out));
    let mut writer =
        Writer { upper, options, out, buffer: vec![0; BUFFER], links: HashMap::new(), entries: 0 };
    for entry in &entries {
        if options.cancel.load(Ordering::Relaxed) {
            return Err(DiffError::Cancelled);
        }
        writer.write(entry)?;
    }
    writer.finish()
}

struct Writer<'a, W: Write> {
    upper: BorrowedFd<'a>,
    options: &'a DiffOptions<'a>,
    out: BufWriter<Sha256Writer<W>>,
    buffer: Vec<u8>,
    /// First path of every inode that has several.
    links: HashMap<(u64, u64), Vec<u8>>,
    entries: u64,
}

impl<W: Write> Writer<'_, W> {
    fn write(&mut self, entry: &Entry) -> Result<(), DiffError> {
        let overlay = self.options.form == TreeForm::OverlayUpper;
        if overlay && is_whiteout(entry) {
            let (parent, name) = path::split(&entry.path);
            return self.marker(path::join(parent, &[b".wh.", name].concat()));
        }
        let (_, name) = path::split(&entry.path);
        if name.starts_with(b".wh.") {
            return Err(DiffError::ReservedName { path: entry.path.as_slice().into() });
        }
        if overlay {
            refuse_redirects(entry)?;
        }
        if !entry.path.is_empty() || self.options.root_entry {
            self.member(entry)?;
        }
        if overlay && is_opaque(entry) {
            self.marker(path::join(&entry.path, b".wh..wh..opq"))?;
        }
        Ok(())
    }

    /// An empty file that stands for something missing; it has no time of its own.
    fn marker(&mut self, path: Vec<u8>) -> Result<(), DiffError> {
        self.header(&Header {
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
        })
    }

    fn member(&mut self, entry: &Entry) -> Result<(), DiffError> {
        let mut path = entry.path.clone();
        let (mut size, mut device, mut link) = (0, (0, 0), Vec::new());
        let flag = match &entry.kind {
            EntryKind::File { inode, nlink, .. } if *nlink > 1 && self.links.contains_key(inode) => {
                link.clone_from(&self.links[inode]);
                b'1'
            }
            EntryKind::File { size: bytes, inode, nlink, .. } => {
                if *nlink > 1 {
                    self.links.insert(*inode, path.clone());
                }
                size = *bytes;
                b'0'
            }
            EntryKind::Dir => {
                path.extend_from_slice(if path.is_empty() { b"./" } else { b"/" });
                b'5'
            }
            EntryKind::Symlink { target } => {
                link.clone_from(target);
                b'2'
            }
            EntryKind::Char { major, minor } => {
                device = (*major, *minor);
                b'3'
            }
            EntryKind::Block { major, minor } => {
                device = (*major, *minor);
                b'4'
            }
            EntryKind::Fifo => b'6',
            EntryKind::Socket => return Ok(()),
        };
        let shown = entry.xattrs.iter().filter(|(name, _)| !is_private_xattr(name) && flag != b'1');
        let xattrs: Xattrs = shown.map(|(name, value)| (name.clone(), value.clone())).collect();
        self.header(&Header {
            path: &path,
            flag,
            link: &link,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            size,
            mtime: entry.mtime,
            device,
            xattrs: &xattrs,
        })?;
        if flag == b'0' && size > 0 { self.content(&entry.path, size) } else { Ok(()) }
    }

    fn header(&mut self, header: &Header<'_>) -> Result<(), DiffError> {
        self.entries += 1;
        write_header(&mut self.out, header).map_err(DiffError::Output)
    }

    /// Exactly `size` bytes: the header has promised them already.
    fn content(&mut self, path: &[u8], size: u64) -> Result<(), DiffError> {
        let mut file = File::from(open_to_read(self.upper, path)?);
        let mut left = size;
        loop {
            if self.options.cancel.load(Ordering::Relaxed) {
                return Err(DiffError::Cancelled);
            }
            let length = match file.read(&mut self.buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(DiffError::Host { call: "read", path: path.into(), source }),
            };
            if length as u64 > left || (length == 0 && left > 0) {
                return Err(DiffError::ChangedWhileReading { path: path.into() });
            }
            if length == 0 {
                return write_padding(&mut self.out, size).map_err(DiffError::Output);
            }
            self.out.write_all(&self.buffer[..length]).map_err(DiffError::Output)?;
            left -= length as u64;
        }
    }

    fn finish(mut self) -> Result<Written, DiffError> {
        self.out.write_all(&[0; 2 * BLOCK]).map_err(DiffError::Output)?;
        let hashed = self.out.into_inner().map_err(|error| DiffError::Output(error.into_error()))?;
        let (mut out, digest, tar_size_bytes) = hashed.finish();
        out.flush().map_err(DiffError::Output)?;
        Ok(Written { diff_id: DiffId(digest), tar_size_bytes, entries: self.entries })
    }
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
