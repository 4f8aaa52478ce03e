//! The kernel's news of directories.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::{ReadTree, Reads, WatchError};

/// What happens to the files of a directory; reading them is no news.
const EVENTS: WatchFlags = WatchFlags::CLOSE_WRITE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::DONT_FOLLOW)
    // What has no name yet, or no more, is no file of the directory.
    .union(WatchFlags::EXCL_UNLINK);

/// Events after which there are other directories.
const MOVES: ReadFlags = ReadFlags::CREATE
    .union(ReadFlags::DELETE)
    .union(ReadFlags::MOVED_FROM)
    .union(ReadFlags::MOVED_TO)
    .union(ReadFlags::MOVE_SELF)
    .union(ReadFlags::DELETE_SELF);

/// Watches all directories that a build reads something of.
#[derive(Debug)]
pub struct Watcher {
    events: OwnedFd,
    reads: Reads,
    /// By the kernel's numbers.
    places: HashMap<i32, PathBuf>,
    /// All directories of it are watched: what becomes of them, and which there are, is told.
    is_whole: bool,
}

/// What became known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Something was done here; the first of several places.
    Changed(PathBuf),
    /// More than the kernel keeps: anything may have changed.
    Lost,
}

/// One directory's event.
struct Event {
    number: i32,
    flags: ReadFlags,
    name: Option<PathBuf>,
}

impl Watcher {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// [`WatchError::TooManyWatchers`], [`WatchError::Failed`].
    pub fn new() -> Result<Self, WatchError> {
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        let events = events.map_err(|errno| match errno {
            Errno::MFILE => WatchError::TooManyWatchers { source: errno.into() },
            errno => WatchError::Failed { path: "files".into(), source: errno.into() },
        })?;
        Ok(Self { events, reads: Reads::default(), places: HashMap::new(), is_whole: false })
    }

    /// How many directories are watched.
    pub fn directories(&self) -> usize {
        self.places.len()
    }

    /// Readable when there is something to read for [`Watcher::read`].
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// From now on these are read. Walks all directories of it; what changes meanwhile is news. Costs nothing if the
    /// same was read before and all of it is watched.
    ///
    /// # Errors
    /// [`WatchError::TooMany`], [`WatchError::Failed`]; then some are watched.
    pub fn watch(&mut self, reads: Reads) -> Result<(), WatchError> {
        if self.is_whole && self.reads.is_same(&reads) {
            return Ok(());
        }
        self.reads = reads;
        self.walk()
    }

    fn walk(&mut self) -> Result<(), WatchError> {
        let mut kept = HashSet::new();
        // What is not there, or may not be read, may be some other time.
        self.is_whole = true;
        let parents = self.reads.files.iter().filter_map(|file| file.parent().map(Path::to_owned));
        for parent in parents.collect::<HashSet<_>>() {
            self.is_whole &= self.add(&parent, &mut kept)?;
        }
        for tree in self.reads.trees.clone() {
            self.walk_tree(&tree, &mut kept)?;
        }
        let gone: Vec<i32> = self.places.keys().filter(|number| !kept.contains(*number)).copied().collect();
        for number in gone {
            self.places.remove(&number);
            // The kernel may have removed it with the directory.
            let _ = inotify::remove_watch(&self.events, number);
        }
        Ok(())
    }

    fn walk_tree(&mut self, tree: &ReadTree, kept: &mut HashSet<i32>) -> Result<(), WatchError> {
        let mut open = vec![PathBuf::new()];
        while let Some(below) = open.pop() {
            let path = tree.root.join(&below);
            // Before it is read: what is made later is news.
            if !self.add(&path, kept)? {
                self.is_whole = false;
                continue;
            }
            // What cannot be read is the build's trouble.
            let Ok(entries) = fs::read_dir(&path) else {
                self.is_whole = false;
                continue;
            };
            for entry in entries.flatten() {
                let below = below.join(entry.file_name());
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let is_read = is_dir && tree.meets(&below) && !tree.is_left_out(&below, true);
                if is_read && !self.reads.is_written(&tree.root.join(&below)) {
                    open.push(below);
                }
            }
        }
        Ok(())
    }

    /// False: there is no directory that may be read.
    fn add(&mut self, path: &Path, kept: &mut HashSet<i32>) -> Result<bool, WatchError> {
        match inotify::add_watch(&self.events, path, EVENTS) {
            Ok(number) => {
                kept.insert(number);
                self.places.insert(number, path.to_owned());
                Ok(true)
            }
            Err(Errno::NOSPC) => Err(WatchError::TooMany { watched: self.places.len() }),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS | Errno::LOOP) => Ok(false),
            Err(errno) => Err(WatchError::Failed { path: path.to_owned(), source: errno.into() }),
        }
    }

    /// All that came since the last call, without waiting; `None`: nothing of interest.
    ///
    /// # Errors
    /// As [`Watcher::watch`], for directories that are new.
    pub fn read(&mut self) -> Result<Option<News>, WatchError> {
        let (mut news, mut is_outdated) = (None, false);
        for Event { number, flags, name } in self.pending()? {
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                (news, is_outdated) = (Some(News::Lost), true);
                continue;
            }
            let Some(place) = self.places.get(&number).cloned() else { continue };
            if flags.contains(ReadFlags::IGNORED) {
                self.places.remove(&number);
                self.is_whole = false;
                continue;
            }
            let is_dir = flags.contains(ReadFlags::ISDIR) || name.is_none();
            is_outdated |= is_dir && flags.intersects(MOVES);
            let path = name.map_or_else(|| place.clone(), |name| place.join(name));
            if self.reads.concerns(&path, is_dir) {
                news.get_or_insert(News::Changed(path));
            }
        }
        if is_outdated {
            self.walk()?;
        }
        Ok(news)
    }

    fn pending(&self) -> Result<Vec<Event>, WatchError> {
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut reader = inotify::Reader::new(&self.events, &mut buffer);
        let mut events = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()).into());
                    events.push(Event { number: event.wd(), flags: event.events(), name });
                }
                Err(Errno::WOULDBLOCK) => return Ok(events),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    let source = io::Error::from(errno);
                    return Err(WatchError::Failed { path: "files".into(), source });
                }
            }
        }
    }
}
