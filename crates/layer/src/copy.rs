//! Entries of one tree are copied into another: what `COPY` and `ADD` do.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::beneath::{self, BeneathError};
use crate::index::{Entry, EntryKind, Timestamp, ctime, mtime, open_to_read};
use crate::node::{self, Attributes, CallError, Named, Xattrs, is_private_xattr};
use crate::path::{self, EntryPath, PathError};

/// Between two looks at the cancellation flag.
const RANGE: usize = 64 << 20;

/// What to copy where.
pub struct CopyRequest<'a> {
    /// Root of the source tree.
    pub from: BorrowedFd<'a>,
    /// The selected entries, in the order of a scan.
    pub entries: &'a [Entry],
    /// Prefix removed from the entries' paths.
    pub strip: &'a [u8],
    /// Root of the destination tree.
    pub to: BorrowedFd<'a>,
    /// Where the entry equal to `strip` lands; others stand below.
    pub destination: &'a [u8],
    /// Owner of everything that is made; `None` keeps the entries' owners.
    pub owner: Option<(u32, u32)>,
    /// An existing destination directory keeps its mode, owner and time.
    pub keep_destination_dir_metadata: bool,
    /// Set by somebody else to stop.
    pub cancel: &'a AtomicBool,
}

/// What was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Copied {
    /// Bytes of file content.
    pub bytes: u64,
    /// Entries made or updated.
    pub entries: u64,
}

/// Why a copy failed. The destination is left half done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A directory stands where something else is to be.
    #[error("cannot copy non-directory onto directory {path}")]
    OntoDirectory {
        /// The destination.
        path: EntryPath,
    },
    /// Something else stands where a directory is to be.
    #[error("cannot copy directory onto non-directory {path}")]
    OntoNonDirectory {
        /// The destination.
        path: EntryPath,
    },
    /// The source is not what the scan saw, so the step's cache key would lie.
    #[error("{path} changed while it was read")]
    ChangedWhileReading {
        /// The source.
        path: EntryPath,
    },
    /// A path cannot be used.
    #[error("path {path} is not usable")]
    Path {
        /// The path.
        path: EntryPath,
        /// What is wrong with it.
        source: PathError,
    },
    /// The kernel refused.
    #[error("{call} failed for {path}")]
    Host {
        /// The system call.
        call: &'static str,
        /// The source or destination.
        path: EntryPath,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl From<BeneathError> for CopyError {
    fn from(error: BeneathError) -> Self {
        match error {
            BeneathError::Path { path, source } => Self::Path { path, source },
            BeneathError::Host { call, path, source } => Self::Host { call, path, source },
        }
    }
}

fn host(path: &[u8]) -> impl Fn(CallError) -> CopyError + '_ {
    move |CallError { call, errno }| CopyError::Host { call, path: path.into(), source: errno.into() }
}

/// Copies the entries of `request`.
///
/// Parents that are missing are made 0755 and belong to `owner` or 0:0; links among the
/// destination's parents are followed inside its root. Files replace files and links. Modes, times
/// and extended attributes are kept, hard links among the entries too; sockets are skipped.
pub fn copy(request: &CopyRequest<'_>) -> Result<Copied, CopyError> {
    let mut copier = Copier {
        request,
        parent: None,
        links: HashMap::new(),
        dir_mtimes: Vec::new(),
        clones: true,
        ranges: true,
        buffer: Vec::new(),
        copied: Copied::default(),
    };
    for entry in request.entries {
        if request.cancel.load(Ordering::Relaxed) {
            return Err(CopyError::Cancelled);
        }
        copier.entry(entry)?;
    }
    copier.finish()
}

struct Copier<'a> {
    request: &'a CopyRequest<'a>,
    /// The last destination directory: most neighbours share it.
    parent: Option<(Vec<u8>, Rc<OwnedFd>)>,
    /// Destination of the first entry of every inode that has several links.
    links: HashMap<(u64, u64), Vec<u8>>,
    /// Directories whose time is set at the end; as paths, as there may be more than fds allowed.
    dir_mtimes: Vec<(Vec<u8>, Timestamp)>,
    /// Whether reflinks and in-kernel copies work between the two trees, until they fail.
    clones: bool,
    ranges: bool,
    buffer: Vec<u8>,
    copied: Copied,
}

impl Copier<'_> {
    fn entry(&mut self, entry: &Entry) -> Result<(), CopyError> {
        if entry.kind == EntryKind::Socket {
            return Ok(());
        }
        let relative = path::strip(&entry.path, self.request.strip);
        let destination: Vec<u8> =
            self.request.destination.iter().copied().skip_while(|&b| b == b'/').collect();
        let destination = destination.strip_suffix(b"/").unwrap_or(&destination);
        let path = path::join(destination, relative);
        self.copied.entries += 1;
        if entry.kind == EntryKind::Dir && relative.is_empty() {
            return self.top_dir(entry, &path);
        }
        if path.is_empty() {
            return Err(CopyError::OntoDirectory { path: EntryPath(b"/".to_vec()) });
        }
        let (above, name) = path::split(&path);
        let parent = self.parent(above)?;
        let parent = parent.as_fd();
        match &entry.kind {
            EntryKind::Dir => return self.dir(parent, name, &path, entry),
            EntryKind::Socket => return Ok(()),
            _ => {}
        }
        if node::stat(parent, name)
            .map_err(host(&path))?
            .is_some_and(|stat| node::kind(&stat) == FileType::Directory)
        {
            return Err(CopyError::OntoDirectory { path: path.as_slice().into() });
        }
        match fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(host(&path)(CallError { call: "unlinkat", errno })),
        }
        let xattrs = shown_xattrs(entry);
        let attributes = self.attributes(entry, &xattrs);
        let make_node = |kind, major, minor| {
            let number = fs::makedev(major, minor);
            fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, number).named("mknodat")
        };
        let made = match &entry.kind {
            EntryKind::File { inode, nlink, .. } => {
                if *nlink > 1 {
                    if let Some(first) = self.links.get(inode) {
                        return self.hard_link(first, parent, name, &path);
                    }
                    self.links.insert(*inode, path.clone());
                }
                return self.file(parent, name, &path, entry, &attributes);
            }
            EntryKind::Symlink { target } => {
                fs::symlinkat(target.as_slice(), parent, name).named("symlinkat")
            }
            EntryKind::Char { major, minor } => make_node(FileType::CharacterDevice, *major, *minor),
            EntryKind::Block { major, minor } => make_node(FileType::BlockDevice, *major, *minor),
            EntryKind::Fifo => make_node(FileType::Fifo, 0, 0),
            EntryKind::Dir | EntryKind::Socket => Ok(()),
        };
        made.map_err(host(&path))?;
        let is_symlink = matches!(entry.kind, EntryKind::Symlink { .. });
        node::set_on_name(parent, name, is_symlink, &attributes).map_err(host(&path))
    }

    /// The directory that is itself the destination: a link there is followed.
    fn top_dir(&mut self, entry: &Entry, path: &[u8]) -> Result<(), CopyError> {
        match beneath::open_file(self.request.to, path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(existing) => {
                let keep = self.request.keep_destination_dir_metadata;
                let time = if keep {
                    mtime(&fs::fstat(&existing).named("fstat").map_err(host(path))?)
                } else {
                    self.set_dir(existing.as_fd(), entry, path)?;
                    entry.mtime
                };
                self.dir_mtimes.push((path.to_vec(), time));
                return Ok(());
            }
            Err(error) if error.host_kind() == Some(io::ErrorKind::NotFound) => {}
            Err(error) if error.host_kind() == Some(io::ErrorKind::NotADirectory) => {
                return Err(CopyError::OntoNonDirectory { path: path.into() });
            }
            Err(error) => return Err(error.into()),
        }
        let owner = self.request.owner.unwrap_or((0, 0));
        beneath::mkdir_all(self.request.to, path, 0o755, owner)?;
        let made = beneath::open_file(self.request.to, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        self.set_dir(made.as_fd(), entry, path)?;
        self.dir_mtimes.push((path.to_vec(), entry.mtime));
        Ok(())
    }

    fn dir(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        entry: &Entry,
    ) -> Result<(), CopyError> {
        match node::stat(parent, name).map_err(host(path))? {
            None => fs::mkdirat(parent, name, Mode::RWXU).named("mkdirat").map_err(host(path))?,
            Some(stat) if node::kind(&stat) == FileType::Directory => {}
            Some(_) => return Err(CopyError::OntoNonDirectory { path: path.into() }),
        }
        let directory = node::open_dir(parent, name).map_err(host(path))?;
        self.set_dir(directory.as_fd(), entry, path)?;
        self.dir_mtimes.push((path.to_vec(), entry.mtime));
        Ok(())
    }

    fn set_dir(&self, directory: BorrowedFd<'_>, entry: &Entry, path: &[u8]) -> Result<(), CopyError> {
        let xattrs = shown_xattrs(entry);
        let attributes = Attributes { mtime: None, ..self.attributes(entry, &xattrs) };
        node::set_on_fd(directory, &attributes).map_err(host(path))
    }

    fn hard_link(
        &self,
        first: &[u8],
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<(), CopyError> {
        let (first_parent, first_name) = beneath::open_parent(self.request.to, first)?;
        fs::linkat(&first_parent, first_name, parent, name, AtFlags::empty())
            .named("linkat")
            .map_err(host(path))
    }

    fn file(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        entry: &Entry,
        attributes: &Attributes<'_>,
    ) -> Result<(), CopyError> {
        let changed = || CopyError::ChangedWhileReading { path: entry.path.as_slice().into() };
        let source = open_to_read(self.request.from, &entry.path)?;
        let stat = |fd: BorrowedFd<'_>| fs::fstat(fd).named("fstat").map_err(host(&entry.path));
        if node::kind(&stat(source.as_fd())?) != FileType::RegularFile {
            return Err(changed());
        }
        // Read too: the copy is what gets hashed when the source has changed.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made =
            fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR).named("openat").map_err(host(path))?;
        let (mut source, mut made) = (File::from(source), File::from(made));
        let size = match entry.kind {
            EntryKind::File { size, .. } => size,
            _ => 0,
        };
        self.copied.bytes += self.content(&mut source, &mut made, size, entry, path)?;
        // Looked at after the copy: equal to the scan's means the same content at every moment between.
        if let EntryKind::File { content: Some(expected), .. } = &entry.kind
            && !is_as_scanned(&stat(source.as_fd())?, entry)
            && self.hash(&mut made, path)? != *expected
        {
            return Err(changed());
        }
        node::set_on_fd(made.as_fd(), attributes).map_err(host(path))
    }

    /// Copies everything, by the cheapest way that works.
    fn content(
        &mut self,
        source: &mut File,
        made: &mut File,
        size: u64,
        entry: &Entry,
        path: &[u8],
    ) -> Result<u64, CopyError> {
        if self.clones && size > 0 {
            match fs::ioctl_ficlone(&*made, &*source) {
                Ok(()) => return Ok(size),
                // Another file system, or one that cannot: so it stays for this copy.
                Err(_) => self.clones = false,
            }
        }
        let mut bytes = 0;
        while self.ranges && bytes < size {
            self.check_cancel()?;
            match fs::copy_file_range(&*source, None, &*made, None, RANGE) {
                Ok(0) => break,
                Ok(length) => bytes += length as u64,
                Err(Errno::INTR) => {}
                Err(Errno::NOSPC) => {
                    return Err(host(path)(CallError { call: "copy_file_range", errno: Errno::NOSPC }));
                }
                // Reading and writing says what is really wrong, if anything is.
                Err(_) => self.ranges = false,
            }
        }
        self.buffer.resize(256 << 10, 0);
        loop {
            self.check_cancel()?;
            let fault = |call, path: &[u8], source| CopyError::Host { call, path: path.into(), source };
            let length = match source.read(&mut self.buffer) {
                Ok(0) => return Ok(bytes),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(fault("read", &entry.path, error)),
            };
            made.write_all(&self.buffer[..length]).map_err(|error| fault("write", path, error))?;
            bytes += length as u64;
        }
    }

    fn hash(&mut self, made: &mut File, path: &[u8]) -> Result<[u8; 32], CopyError> {
        let fault = |call| move |source| CopyError::Host { call, path: path.into(), source };
        made.seek(SeekFrom::Start(0)).map_err(fault("lseek"))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(made).map_err(fault("read"))?;
        Ok(hasher.finalize().into())
    }

    fn check_cancel(&self) -> Result<(), CopyError> {
        if self.request.cancel.load(Ordering::Relaxed) { Err(CopyError::Cancelled) } else { Ok(()) }
    }

    fn attributes<'e>(&self, entry: &Entry, xattrs: &'e Xattrs) -> Attributes<'e> {
        let owner = Some(self.request.owner.unwrap_or((entry.uid, entry.gid)));
        Attributes { owner, mode: entry.mode, xattrs, mtime: Some(entry.mtime) }
    }

    /// The destination directory `path`, made if missing.
    fn parent(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>, CopyError> {
        if let Some((cached, directory)) = &self.parent
            && cached == path
        {
            return Ok(directory.clone());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let directory = match beneath::open_file(self.request.to, path, flags) {
            Err(error) if error.host_kind() == Some(io::ErrorKind::NotFound) => {
                beneath::mkdir_all(self.request.to, path, 0o755, self.request.owner.unwrap_or((0, 0)))?;
                beneath::open_file(self.request.to, path, flags)?
            }
            Err(error) if error.host_kind() == Some(io::ErrorKind::NotADirectory) => {
                return Err(CopyError::OntoNonDirectory { path: path.into() });
            }
            other => other?,
        };
        let directory = Rc::new(directory);
        self.parent = Some((path.to_vec(), directory.clone()));
        Ok(directory)
    }

    /// Sets the directories' times, the deepest first.
    fn finish(self) -> Result<Copied, CopyError> {
        for (path, mtime) in self.dir_mtimes.iter().rev() {
            let directory = beneath::open_file(self.request.to, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            node::set_mtime(directory.as_fd(), b".", *mtime).map_err(host(path))?;
        }
        Ok(self.copied)
    }
}

fn is_as_scanned(stat: &Stat, entry: &Entry) -> bool {
    let EntryKind::File { size, inode, .. } = &entry.kind else { return false };
    *size == stat.st_size.unsigned_abs()
        && *inode == (stat.st_dev, stat.st_ino)
        && (entry.mtime, entry.ctime) == (mtime(stat), ctime(stat))
}

fn shown_xattrs(entry: &Entry) -> Xattrs {
    let shown = entry.xattrs.iter().filter(|(name, _)| !is_private_xattr(name));
    shown.map(|(name, value)| (name.clone(), value.clone())).collect()
}

#[cfg(test)]
mod tests;
