//! Entries of one tree are copied into another: what `COPY` and `ADD` do.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::beneath::{self, BeneathError, Opener};
use crate::diff::{Follower, What};
use crate::index::{Entry, EntryKind, Timestamp};
use crate::looked_at::LookedAt;
use crate::marks;
use crate::node::{self, Attributes, CallError, Named, Xattrs, is_private_xattr};
use crate::path::{self, EntryPath, PathError};

mod below;
mod content;
mod delta;
mod earlier;
mod identity;
mod over;

pub use below::found_below;
pub use content::LARGE_FILE_BYTES;
pub use delta::{Whole, changed, made, tell_whole};
pub use earlier::Earlier;
pub use identity::{Identity, Part};
pub use over::make_dirs_over;

use identity::{destination_of, given};

/// What to copy where.
pub struct CopyRequest<'a> {
    /// Root of the source tree.
    pub from: BorrowedFd<'a>,
    /// The directories that overlayfs shows as the source, highest first: where file systems share blocks
    /// they do it between files of theirs, not with what a mount shows of them. May be empty.
    pub from_layers: &'a [OwnedFd],
    /// When the scan of the entries began; `None`: the source cannot have changed since (a committed
    /// snapshot), and is not looked at again.
    pub looked_at: Option<LookedAt>,
    /// The selected entries, in the order of a scan.
    pub entries: &'a [Entry],
    /// Paths of directories among the entries that were not selected themselves, only something
    /// below them: one that exists at the destination keeps its owner and time. `None`: there are none.
    pub passed: Option<&'a HashSet<Vec<u8>>>,
    /// Prefix removed from the entries' paths.
    pub strip: &'a [u8],
    /// Root of the destination tree.
    pub to: BorrowedFd<'a>,
    /// The tree below, when `to` is an upperdir that nobody has mounted, and without whiteouts: what is
    /// there counts as being at the destination. `None`: all that counts is in `to`.
    ///
    /// With it, `destination` is a real path ([`beneath::real_path`]) of both together.
    pub below: Option<BorrowedFd<'a>>,
    /// Files of an earlier copy to link to where they are the same; `None`: every file is made.
    pub earlier: Option<&'a Earlier>,
    /// What each of the entries will be ([`Part::identities`]), for `earlier`; `None`: nobody has looked.
    pub identities: Option<&'a [Identity]>,
    /// The directory of an earlier copy's layer that what is made will stand in front of ([`changed`]):
    /// directories that no time is copied for have the time that they have there. `None`: that of the copy.
    /// Only with `below`.
    pub times_of: Option<BorrowedFd<'a>>,
    /// Told of all that is made, as soon as it is what it will be.
    pub follower: Option<&'a Follower>,
    /// Where the entry equal to `strip` lands; others stand below.
    pub destination: &'a [u8],
    /// Owner of everything that is made; `None` keeps the entries' owners.
    pub owner: Option<(u32, u32)>,
    /// Permission bits out of an entry's own and whether it is a directory; `None` keeps them.
    pub mode: Option<&'a ModeChange<'a>>,
    /// Permission bits of directories that are made although no entry stands for them.
    pub parent_mode: u32,
    /// What becomes of the metadata of the directory at `strip`.
    pub top: TopDir,
    /// Set by somebody else to stop.
    pub cancel: &'a AtomicBool,
}

impl<'a> CopyRequest<'a> {
    /// What makes `to` like the tree `from`, a committed snapshot's, as far as `entries` go: owners,
    /// modes and times included, the root directory's as well.
    pub fn tree(
        from: BorrowedFd<'a>,
        entries: &'a [Entry],
        to: BorrowedFd<'a>,
        cancel: &'a AtomicBool,
    ) -> Self {
        Self {
            from,
            from_layers: &[],
            looked_at: None,
            entries,
            passed: None,
            strip: b"",
            to,
            below: None,
            earlier: None,
            identities: None,
            times_of: None,
            follower: None,
            destination: b"",
            owner: None,
            mode: None,
            parent_mode: 0o755,
            top: TopDir::Itself,
            cancel,
        }
    }
}

/// New permission bits from old ones; the second argument says whether it is a directory.
pub type ModeChange<'a> = dyn Fn(u32, bool) -> u32 + Sync + 'a;

/// What becomes of the metadata of a directory whose contents are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopDir {
    /// Only its time is copied: an existing destination keeps mode and owner, a new one gets those
    /// of any directory made on the way (as `COPY` does, whatever the source is like).
    Contents,
    /// The destination becomes like it.
    Itself,
}

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Copied {
    /// Bytes of file content.
    pub bytes: u64,
    /// Entries made or updated.
    pub entries: u64,
    /// Files among them that were not made but linked to those of an earlier copy.
    pub linked: u64,
}

/// Why a copy failed. The destination is left half done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A directory stands where something else is to be.
    #[error("cannot replace directory {path} with a file")]
    OntoDirectory {
        /// The destination.
        path: EntryPath,
    },
    /// Something else stands where a directory is to be.
    #[error("cannot copy to non-directory {path}")]
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
/// Parents that are missing belong to `owner` or 0:0; links among the destination's parents are
/// followed inside its root. Files replace files and links. Times and extended attributes are kept,
/// hard links among the entries too; sockets are skipped.
pub fn copy(request: &CopyRequest<'_>) -> Result<Copied, CopyError> {
    let mut copier = Copier {
        request,
        parent: None,
        new_below: None,
        earlier_dir: None,
        kept: None,
        written: None,
        held: None,
        opener: Opener::default(),
        links: HashMap::new(),
        dir_mtimes: Vec::new(),
        untimed: Vec::new(),
        clones: true,
        ranges: true,
        buffer: Vec::new(),
        copied: Copied::default(),
    };
    for (nth, entry) in request.entries.iter().enumerate() {
        if request.cancel.load(Ordering::Relaxed) {
            return Err(CopyError::Cancelled);
        }
        let identity = request.identities.map_or(Identity::Unknown, |identities| identities[nth]);
        copier.entry(entry, identity)?;
        copier.tell(entry);
    }
    copier.finish()
}

/// A directory of the destination.
struct Place {
    dir: OwnedFd,
    /// The same directory of the tree below.
    below: Option<OwnedFd>,
}

struct Copier<'a> {
    request: &'a CopyRequest<'a>,
    /// The last destination directory: most neighbours share it.
    parent: Option<(Vec<u8>, Rc<Place>)>,
    /// The last directory that was made and has no like in the tree below: nothing in it has one.
    new_below: Option<Vec<u8>>,
    /// The last directory of the earlier copy.
    earlier_dir: Option<(Vec<u8>, OwnedFd)>,
    /// The last file, if it is that of the earlier copy, for who follows.
    kept: Option<Entry>,
    /// The last file as it was made, for who follows, if its content is in `buffer`.
    written: Option<Entry>,
    /// How much of `buffer` is the content of the last file, if all of it is there.
    held: Option<usize>,
    /// Opens the source's files.
    opener: Opener,
    /// Destination of the first entry of every inode that has several links.
    links: HashMap<(u64, u64), Vec<u8>>,
    /// Directories whose time is set at the end; as paths, as there may be more than fds allowed.
    dir_mtimes: Vec<(Vec<u8>, Timestamp)>,
    /// Directories among the entries whose time is not theirs.
    untimed: Vec<Vec<u8>>,
    /// Whether reflinks and in-kernel copies work between the two trees, until they fail.
    clones: bool,
    ranges: bool,
    buffer: Vec<u8>,
    copied: Copied,
}

impl Copier<'_> {
    fn entry(&mut self, entry: &Entry, identity: Identity) -> Result<(), CopyError> {
        if entry.kind == EntryKind::Socket {
            return Ok(());
        }
        let path = self.destination_of(entry);
        self.copied.entries += 1;
        if entry.kind == EntryKind::Dir && path::strip(&entry.path, self.request.strip).is_empty() {
            return self.top_dir(entry, &path);
        }
        if path.is_empty() {
            return Err(CopyError::OntoDirectory { path: EntryPath(b"/".to_vec()) });
        }
        let (above, name) = path::split(&path);
        let place = self.parent(above)?;
        let parent = place.dir.as_fd();
        match &entry.kind {
            EntryKind::Dir => return self.dir(&place, name, &path, entry),
            EntryKind::Socket => return Ok(()),
            _ => place.refuse_dir_below(name, &path)?,
        }
        let xattrs = shown_xattrs(entry);
        let attributes = self.attributes(entry, &xattrs);
        let make_node = |kind, major, minor| {
            let number = fs::makedev(major, minor);
            make(parent, name, &path, "mknodat", || node::make_node(parent, name, kind, number))
        };
        match &entry.kind {
            EntryKind::File { inode, nlink, .. } => {
                if *nlink > 1 {
                    if let Some(first) = self.links.get(inode) {
                        return self.hard_link(first, parent, name, &path);
                    }
                    self.links.insert(*inode, path.clone());
                }
                if self.link_earlier(parent, name, &path, identity)? {
                    let kept = |_| identity::made_of(entry, &path, self.request.owner, self.request.mode);
                    self.kept = self.request.follower.map(kept);
                    return Ok(());
                }
                return self.file(parent, name, &path, entry, &attributes);
            }
            EntryKind::Symlink { target } => {
                make(parent, name, &path, "symlinkat", || fs::symlinkat(target.as_slice(), parent, name))?
            }
            EntryKind::Char { major, minor } => make_node(FileType::CharacterDevice, *major, *minor)?,
            EntryKind::Block { major, minor } => make_node(FileType::BlockDevice, *major, *minor)?,
            EntryKind::Fifo => make_node(FileType::Fifo, 0, 0)?,
            EntryKind::Dir | EntryKind::Socket => {}
        }
        let is_symlink = matches!(entry.kind, EntryKind::Symlink { .. });
        node::set_on_name(parent, name, is_symlink, &attributes).map_err(host(&path))?;
        let device = match entry.kind {
            EntryKind::Char { major, minor } => (false, major, minor),
            EntryKind::Block { major, minor } => (true, major, minor),
            _ => return Ok(()),
        };
        if marks::uses_user_attributes() {
            node::record_device(parent, name, attributes.owner, device).map_err(host(&path))?;
        }
        Ok(())
    }

    fn destination_of(&self, entry: &Entry) -> Vec<u8> {
        destination_of(self.request.destination, self.request.strip, entry)
    }

    /// Tells who follows that an entry was made.
    fn tell(&mut self, entry: &Entry) {
        let Some(follower) = self.request.follower else { return };
        let path = self.destination_of(entry);
        let (kept, written) = (self.kept.take(), self.written.take());
        let what = match (&entry.kind, kept) {
            (EntryKind::Socket, _) => return,
            // The first name was read before the second was there.
            (EntryKind::File { nlink, .. }, _) if *nlink > 1 => return follower.give_up(),
            (EntryKind::File { .. }, Some(kept)) => What::Kept(kept.into()),
            (EntryKind::File { content, .. }, None) => match (written, self.held) {
                (Some(written), Some(length)) => {
                    return follower.wrote(written, &self.buffer[..length]);
                }
                _ => What::File(*content),
            },
            (EntryKind::Dir, _) => {
                let last = self.dir_mtimes.last().filter(|(last, _)| *last == path);
                What::Dir(last.map(|(_, mtime)| *mtime))
            }
            _ => What::Other,
        };
        // The root is in no layer.
        if !path.is_empty() {
            follower.made(path, what);
        }
    }

    /// The directory that is itself the destination: a link there is followed.
    fn top_dir(&mut self, entry: &Entry, path: &[u8]) -> Result<(), CopyError> {
        if let Some(below) = self.request.below {
            over::copy_up(self.request.to, below, path)?;
        }
        match beneath::open_file(self.request.to, path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(existing) => {
                if self.request.top == TopDir::Itself {
                    self.set_dir(existing.as_fd(), entry, path)?;
                }
                self.dir_mtimes.push((path.to_vec(), entry.mtime));
                return Ok(());
            }
            Err(error) if error.host_kind() == Some(io::ErrorKind::NotFound) => {}
            Err(error) if error.host_kind() == Some(io::ErrorKind::NotADirectory) => {
                return Err(CopyError::OntoNonDirectory { path: path.into() });
            }
            Err(error) => return Err(error.into()),
        }
        self.make_parents(path)?;
        if self.request.top == TopDir::Itself {
            let made = beneath::open_file(self.request.to, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            self.set_dir(made.as_fd(), entry, path)?;
        }
        self.dir_mtimes.push((path.to_vec(), entry.mtime));
        Ok(())
    }

    fn dir(&mut self, place: &Place, name: &[u8], path: &[u8], entry: &Entry) -> Result<(), CopyError> {
        let parent = place.dir.as_fd();
        let mut made = match fs::mkdirat(parent, name, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(host(path)(CallError { call: "mkdirat", errno })),
        };
        let directory = match node::open_dir(parent, name) {
            // A link at a directory's place is not followed: NOFOLLOW, so not a directory.
            Err(CallError { errno: Errno::NOTDIR | Errno::LOOP, .. }) => {
                return Err(CopyError::OntoNonDirectory { path: path.into() });
            }
            other => other.map_err(host(path))?,
        };
        if made {
            match place.dir_below(name, path)? {
                Some(below) => {
                    over::make_like(directory.as_fd(), below.as_fd()).map_err(host(path))?;
                    made = false;
                }
                None => self.note_new(path),
            }
        }
        if !made && self.request.passed.is_some_and(|passed| passed.contains(&entry.path)) {
            self.untimed.push(path.to_vec());
            return fs::fchmod(&directory, Mode::from_raw_mode(entry.mode & 0o7777))
                .named("fchmod")
                .map_err(host(path));
        }
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
        make(parent, name, path, "linkat", || {
            fs::linkat(&first_parent, first_name, parent, name, AtFlags::empty())
        })
    }

    fn attributes<'e>(&self, entry: &Entry, xattrs: &'e Xattrs) -> Attributes<'e> {
        let (owner, mode) = given(entry, self.request.owner, self.request.mode);
        Attributes { owner: Some(owner), mode, xattrs, mtime: Some(entry.mtime) }
    }

    /// The destination directory `path`, made if missing.
    fn parent(&mut self, path: &[u8]) -> Result<Rc<Place>, CopyError> {
        if let Some((cached, directory)) = &self.parent
            && cached == path
        {
            return Ok(directory.clone());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let directory = match beneath::open_file(self.request.to, path, flags) {
            Err(error) if error.host_kind() == Some(io::ErrorKind::NotFound) => {
                self.make_parents(path)?;
                beneath::open_file(self.request.to, path, flags)?
            }
            Err(error) if error.host_kind() == Some(io::ErrorKind::NotADirectory) => {
                return Err(CopyError::OntoNonDirectory { path: path.into() });
            }
            other => other?,
        };
        let below = self.below(path)?;
        let directory = Rc::new(Place { dir: directory, below });
        self.parent = Some((path.to_vec(), directory.clone()));
        Ok(directory)
    }

    fn make_parents(&self, path: &[u8]) -> Result<(), CopyError> {
        let (request, owner) = (self.request, self.request.owner.unwrap_or((0, 0)));
        match request.below {
            Some(below) => make_dirs_over(request.to, below, path, request.parent_mode, owner),
            None => Ok(beneath::mkdir_all(request.to, path, request.parent_mode, owner).map(drop)?),
        }
    }

    /// Sets the directories' times, the deepest first.
    fn finish(self) -> Result<Copied, CopyError> {
        self.take_times()?;
        for (path, mtime) in self.dir_mtimes.iter().rev() {
            let directory = beneath::open_file(self.request.to, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            node::set_mtime(directory.as_fd(), b".", *mtime).map_err(host(path))?;
        }
        Ok(self.copied)
    }
}

fn shown_xattrs(entry: &Entry) -> Xattrs {
    let shown = entry.xattrs.iter().filter(|(name, _)| !is_private_xattr(name));
    shown.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// Runs `call`, which refuses to overwrite; a file or link in the way is removed first, then.
fn make<T>(
    parent: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
    called: &'static str,
    call: impl Fn() -> Result<T, Errno>,
) -> Result<T, CopyError> {
    match call() {
        Err(Errno::EXIST) => {}
        other => return other.named(called).map_err(host(path)),
    }
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        // POSIX says EPERM for a directory.
        Err(Errno::ISDIR | Errno::PERM)
            if node::stat(parent, name)
                .map_err(host(path))?
                .is_some_and(|stat| node::kind(&stat) == FileType::Directory) =>
        {
            return Err(CopyError::OntoDirectory { path: path.into() });
        }
        Err(errno) => return Err(host(path)(CallError { call: "unlinkat", errno })),
    }
    call().named(called).map_err(host(path))
}

#[cfg(test)]
mod tests;
