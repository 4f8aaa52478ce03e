//! The tar of a layer, hashed while a copy still makes its files.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use rustix::fs::FileType;

use super::prefix::{Parting, Prefix};
use super::recorded::Recorded;
use super::states::{HashStates, INTERVAL_BYTES};
use super::{DiffOptions, TreeForm, Writer, Written};
use crate::beneath;
use crate::index::{Entry, EntryKind, Timestamp};
use crate::node::{self, Xattrs};
use crate::path;
use crate::walk::Found;

/// Told together: a message wakes the other thread.
const BATCH: usize = 64;
/// So much content is told together at most.
const CONTENT_BYTES: usize = 512 << 10;
/// So often, until it was hashed: files that are told of meanwhile are read.
const CONTENTS: usize = 16;

/// Follows a copy into an upperdir, and writes the layer's tar behind it.
///
/// What comes out is what [`diff()`](super::diff()) says of the finished tree, or nothing. Files are read
/// when they are made, or come as they were written: with what the kernel says of them then, and the bytes
/// that it has just taken. Directories are looked at a second time in the end: each must be as it was
/// written, and have as many entries as were written. Copies whose order is not that of a tar, or that make
/// hard links, are not followed.
///
/// # What is not read
/// A copy that links to the files of an earlier layer, whose [`HashStates`] are given, is hashed from the
/// last state in front of what differs. Nothing is believed for that but the states themselves:
///
/// - A file passes only if it is the earlier layer's own, at the same path: one inode, which nobody has
///   written to since it was hashed there. One that was made is read, and all that comes behind it.
/// - Besides, it has to be what this copy was asked for, by the content that its own scan found and by all
///   else that a tar has of a file: the chain over that is the one over what the earlier tar was made of.
/// - Directories, links and devices are looked at in this tree, as always.
///
/// So whatever was done to the source in between (content under the old times, a mode, an attribute, two
/// files that changed places) gives another file or another chain, and the tar is hashed from there.
pub struct Follower {
    told: Sender<Told>,
    next: Mutex<Next>,
    following: Following,
}

/// What will be told next.
struct Next {
    batch: Batch,
    /// Memory for content that comes back, and how often there is more.
    spare: Receiver<Vec<u8>>,
    more: usize,
}

#[derive(Default)]
struct Batch {
    made: Vec<Made>,
    /// Of files among them, one behind the other.
    content: Vec<u8>,
}

/// The hash of a layer that is complete.
pub struct Following {
    thread: JoinHandle<Option<Followed>>,
    stop: Stop,
}

/// A layer that was hashed beside the copy that made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Followed {
    /// What its tar is.
    pub written: Written,
    /// Members at its beginning that were those of the earlier layer, and were not read.
    pub same_entries: u64,
    /// For the next copy; `None`: it is empty, or nobody knew what is in its files.
    pub states: Option<HashStates>,
}

/// Ends the thread when nobody waits for it any more.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Atomic::Relaxed);
    }
}

/// Something that is as it will be.
struct Made {
    path: Vec<u8>,
    what: What,
}

pub(crate) enum What {
    /// A directory that gets this time when all else is done; `None`: it has it.
    Dir(Option<Timestamp>),
    /// A file that was made; the BLAKE3 of its content, if that is known.
    File(Option<[u8; 32]>),
    /// A file that was made, as it is now, and where among the content its own is.
    Written(Box<Entry>, Range<usize>),
    /// A file that is the earlier layer's at this path, and like this.
    Kept(Box<Entry>),
    /// A link, a device or a pipe.
    Other,
}

enum Told {
    Made(Batch),
    /// Nothing more comes, and all directories have their times.
    Complete,
}

impl Follower {
    /// Waits for what will be made below `upper`, an empty upperdir that nobody has mounted; `None`: there
    /// is no thread for it. With `earlier`, the states of the layer that files are linked to, what both have
    /// in the beginning is not read.
    pub fn start(upper: OwnedFd, earlier: Option<HashStates>) -> Option<Self> {
        Self::start_with(upper, earlier, INTERVAL_BYTES)
    }

    /// The same for `whole`, which shows all that a delta and the earlier layer below it have. Files that are
    /// the earlier layer's are read in `full`, its directory: that is what is shown of them, and costs half.
    pub fn start_delta(whole: OwnedFd, full: OwnedFd, earlier: HashStates) -> Option<Self> {
        Self::spawn(whole, Some(full), Some(earlier), INTERVAL_BYTES)
    }

    pub(super) fn start_with(
        upper: OwnedFd,
        earlier: Option<HashStates>,
        interval_bytes: u64,
    ) -> Option<Self> {
        Self::spawn(upper, None, earlier, interval_bytes)
    }

    fn spawn(
        upper: OwnedFd,
        full: Option<OwnedFd>,
        earlier: Option<HashStates>,
        interval_bytes: u64,
    ) -> Option<Self> {
        let (told, incoming) = channel();
        let (used, spare) = channel();
        let cancel = Arc::new(AtomicBool::new(false));
        let stop = Stop(cancel.clone());
        let work = move || {
            let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: &cancel };
            follow(Behind::new(upper, full, earlier, interval_bytes, &options), &incoming, &used)
        };
        let thread = Builder::new().name("layer-follow".to_owned()).spawn(work).ok()?;
        let next = Mutex::new(Next { batch: Batch::default(), spare, more: CONTENTS });
        Some(Self { told, next, following: Following { thread, stop } })
    }

    /// Something at `path` will not be changed any more, but for the time of a directory.
    pub(crate) fn made(&self, path: Vec<u8>, what: What) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.add(&mut next.batch, Made { path, what });
    }

    /// The same for a file that is like `entry`, by a look at it after this was written to it.
    pub(crate) fn wrote(&self, entry: Entry, content: &[u8]) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.batch.content.len() + content.len() > CONTENT_BYTES {
            self.tell(&mut next.batch);
        }
        let path = entry.path.clone();
        let what = if next.has_room(content.len()) {
            let begin = next.batch.content.len();
            next.batch.content.extend_from_slice(content);
            What::Written(entry.into(), begin..begin + content.len())
        } else {
            What::File(entry.content().copied())
        };
        self.add(&mut next.batch, Made { path, what });
    }

    fn add(&self, batch: &mut Batch, made: Made) {
        batch.made.push(made);
        if batch.made.len() == BATCH {
            self.tell(batch);
        }
    }

    fn tell(&self, batch: &mut Batch) {
        // An error: it has given up.
        let _ = self.told.send(Told::Made(std::mem::take(batch)));
    }

    /// What is made cannot be followed.
    pub(crate) fn give_up(&self) {
        self.following.stop.0.store(true, Atomic::Relaxed);
    }

    /// All is made.
    pub fn complete(self) -> Following {
        let next = self.next.into_inner().unwrap_or_else(PoisonError::into_inner);
        let _ = self.told.send(Told::Made(next.batch));
        let _ = self.told.send(Told::Complete);
        self.following
    }
}

impl Next {
    /// Whether there is memory for so much content in the batch.
    fn has_room(&mut self, length: usize) -> bool {
        let content = &mut self.batch.content;
        if content.capacity() == 0 {
            if let Ok(spare) = self.spare.try_recv() {
                *content = spare;
            } else if let Some(more) = self.more.checked_sub(1) {
                self.more = more;
                *content = Vec::with_capacity(CONTENT_BYTES);
            }
        }
        content.capacity() - content.len() >= length && content.capacity() > 0
    }
}

impl Following {
    /// Waits for the rest of the layer; `None`: somebody has to go through it.
    pub fn wait(self) -> Option<Followed> {
        // Asked to stop only after it has ended.
        let _stop = self.stop;
        self.thread.join().ok().flatten()
    }
}

/// `None`, whatever is wrong: who goes through the finished tree says what.
fn follow(mut behind: Behind<'_>, incoming: &Receiver<Told>, used: &Sender<Vec<u8>>) -> Option<Followed> {
    loop {
        match incoming.recv().ok()? {
            Told::Made(Batch { made, mut content }) => {
                for made in made {
                    if behind.options.cancel.load(Atomic::Relaxed) {
                        return None;
                    }
                    behind.member(made, &content)?;
                }
                if content.capacity() > 0 {
                    content.clear();
                    // An error: nothing more comes.
                    let _ = used.send(content);
                }
            }
            Told::Complete => return behind.finish(),
        }
    }
}

struct Behind<'o> {
    options: &'o DiffOptions<'o>,
    /// While the tar may be that of the earlier layer; nothing is written then.
    prefix: Option<Prefix<'o>>,
    same_entries: u64,
    writer: Writer<'o, Recorded>,
    interval_bytes: u64,
    upper: Files,
    /// Where files are that were not made; `None`: in `upper`, too.
    full: Option<Files>,
    /// What was told last.
    last: Vec<u8>,
    /// All directories that were told or stand above what was, and the root.
    dirs: HashMap<Vec<u8>, Seen>,
}

/// Files of one tree.
struct Files {
    root: OwnedFd,
    /// The last directory that one was read in.
    parent: Option<(Vec<u8>, OwnedFd)>,
}

impl Files {
    fn dir(&mut self, path: &[u8]) -> Option<BorrowedFd<'_>> {
        if self.parent.as_ref().is_none_or(|(known, _)| known != path) {
            let dir = beneath::open_dir_without_links(self.root.as_fd(), path).ok()?;
            self.parent = Some((path.to_vec(), dir));
        }
        self.parent.as_ref().map(|(_, dir)| dir.as_fd())
    }
}

/// A directory as it was written.
struct Seen {
    /// `None`: the root, which is not in the tar.
    entry: Option<Entry>,
    /// Members that are in it.
    entries: usize,
}

impl<'o> Behind<'o> {
    fn new(
        upper: OwnedFd,
        full: Option<OwnedFd>,
        earlier: Option<HashStates>,
        interval_bytes: u64,
        options: &'o DiffOptions<'o>,
    ) -> Self {
        let files = |root| Files { root, parent: None };
        Self {
            options,
            prefix: earlier.map(|earlier| Prefix::new(earlier, options)),
            same_entries: 0,
            writer: Writer::new(Recorded::new(interval_bytes), options),
            interval_bytes,
            upper: files(upper),
            full: full.map(files),
            last: Vec::new(),
            dirs: HashMap::from([(Vec::new(), Seen { entry: None, entries: 0 })]),
        }
    }

    /// `content` is that of the files of its batch.
    fn member(&mut self, made: Made, content: &[u8]) -> Option<()> {
        let Made { path, what } = made;
        if path::walk_order(&self.last, &path) != Ordering::Less {
            return None;
        }
        for end in path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at) {
            let above = &path[..end];
            if self.last != above && !path::is_below(&self.last, above) {
                self.dir(above, None)?;
            }
        }
        match what {
            What::Dir(mtime) => self.dir(&path, mtime)?,
            What::Kept(entry) if self.prefix.is_some() => {
                self.dirs.get_mut(path::split(&path).0)?.entries += 1;
                self.add(*entry)?;
            }
            What::Kept(entry) => {
                self.dirs.get_mut(path::split(&path).0)?.entries += 1;
                self.kept_file(&path, entry.content().copied())?;
            }
            What::File(content) => {
                self.part()?;
                self.dirs.get_mut(path::split(&path).0)?.entries += 1;
                let (entry, file) = read_file(&mut self.upper, &path, content)?;
                self.write(&entry, Some(file))?;
            }
            What::Written(entry, place) => {
                self.part()?;
                self.dirs.get_mut(path::split(&path).0)?.entries += 1;
                self.writer.write_held(&entry, content.get(place)?).ok()?;
                self.writer.out.between(self.writer.entries).ok()?;
            }
            What::Other => {
                let entry = self.read(&path)?;
                self.dirs.get_mut(path::split(&path).0)?.entries += 1;
                self.add(entry)?;
            }
        }
        self.last = path;
        Some(())
    }

    fn dir(&mut self, path: &[u8], mtime: Option<Timestamp>) -> Option<()> {
        let (mut entry, _) = self.look_at(path)?;
        entry.mtime = mtime.unwrap_or(entry.mtime);
        self.dirs.get_mut(path::split(path).0)?.entries += 1;
        self.dirs.insert(path.to_vec(), Seen { entry: Some(entry.clone()), entries: 0 });
        self.add(entry)
    }

    /// Writes a file of the earlier layer, whose content is known to be `content`, if it is known.
    fn kept_file(&mut self, path: &[u8], content: Option<[u8; 32]>) -> Option<()> {
        let (entry, file) = read_file(self.full.as_mut().unwrap_or(&mut self.upper), path, content)?;
        self.write(&entry, Some(file))
    }

    /// What is neither a directory nor a file, as it is in the tree.
    fn read(&mut self, path: &[u8]) -> Option<Entry> {
        let (above, name) = path::split(path);
        let parent = self.upper.dir(above)?;
        let stat = node::stat(parent, name).ok()??;
        if node::kind(&stat) == FileType::Directory {
            return None;
        }
        let (entry, _) = self.writer.read_non_dir(&Found { parent, name, path, stat }).ok()?;
        (!matches!(entry.kind, EntryKind::File { .. })).then_some(entry)
    }

    /// Takes an entry of which all that is in the tar is known, or that is the earlier layer's.
    fn add(&mut self, entry: Entry) -> Option<()> {
        let Some(prefix) = &mut self.prefix else { return self.write(&entry, None) };
        if prefix.take(entry)? { Some(()) } else { self.part() }
    }

    /// From here on the tar is not the earlier one any more: writes what is behind their last common state.
    fn part(&mut self) -> Option<()> {
        let Some(prefix) = self.prefix.take() else { return Some(()) };
        let Parting { earlier, reached, chain, pending } = prefix.part();
        let states = earlier.into_first(reached);
        self.same_entries = states.last().map_or(0, |state| state.entries);
        self.writer = Writer::new(Recorded::resume(states, chain, self.interval_bytes), self.options);
        self.writer.entries = self.same_entries;
        for entry in pending {
            match &entry.kind {
                EntryKind::File { content, .. } => self.kept_file(&entry.path, *content)?,
                _ => self.write(&entry, None)?,
            }
        }
        Some(())
    }

    fn write(&mut self, entry: &Entry, file: Option<File>) -> Option<()> {
        self.writer.write(entry, file).ok()?;
        self.writer.out.between(self.writer.entries).ok()
    }

    /// A directory as it is now, without the time that says when that was.
    fn look_at(&self, path: &[u8]) -> Option<(Entry, OwnedFd)> {
        let (above, name) = path::split(path);
        let parent = beneath::open_dir_without_links(self.upper.root.as_fd(), above).ok()?;
        let stat = node::stat(parent.as_fd(), name).ok()??;
        let dir = node::open_dir(parent.as_fd(), name).ok()?;
        let found = Found { parent: parent.as_fd(), name, path, stat };
        let mut entry = Entry::new(&found, None, Xattrs::new()).ok()?;
        entry.xattrs = node::xattrs_of(dir.as_fd()).ok()?;
        entry.apply_record();
        entry.ctime = Timestamp::default();
        Some((entry, dir))
    }

    fn finish(mut self) -> Option<Followed> {
        for (path, seen) in &self.dirs {
            let is_as_written = match &seen.entry {
                Some(written) => {
                    let (entry, dir) = self.look_at(path)?;
                    entry == *written && node::names(dir.as_fd()).ok()?.len() == seen.entries
                }
                None => {
                    let root = beneath::open_dir_without_links(self.upper.root.as_fd(), path).ok()?;
                    node::names(root.as_fd()).ok()?.len() == seen.entries
                }
            };
            if !is_as_written {
                return None;
            }
        }
        self.part()?;
        let (written, states) = self.writer.finish_recorded().ok()?;
        Some(Followed { written, same_entries: self.same_entries, states })
    }
}

/// A file as it is in its tree, whose content is known to be `content`, if it is known.
fn read_file(files: &mut Files, path: &[u8], content: Option<[u8; 32]>) -> Option<(Entry, File)> {
    let (above, name) = path::split(path);
    let parent = files.dir(above)?;
    let file = super::open_content(parent, name).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    if node::kind(&stat) != FileType::RegularFile {
        return None;
    }
    let xattrs = node::xattrs_of(file.as_fd()).ok()?;
    let entry = Entry::new(&Found { parent, name, path, stat }, content, xattrs).ok()?;
    Some((entry, file.into()))
}

#[cfg(test)]
mod tests;
