//! The tar of a layer, hashed while a copy still makes its files.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
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

/// Follows a copy into an upperdir, and writes the layer's tar behind it.
///
/// What comes out is what [`diff()`](super::diff()) says of the finished tree, or nothing. Files are read
/// when they are made; directories are looked at a second time in the end: each must be as it was written,
/// and have as many entries as were written. Copies whose order is not that of a tar, or that make hard
/// links, are not followed.
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
    batch: Mutex<Vec<Made>>,
    following: Following,
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
    /// A file that is the earlier layer's at this path, and like this.
    Kept(Box<Entry>),
    /// A link, a device or a pipe.
    Other,
}

enum Told {
    Made(Vec<Made>),
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

    pub(super) fn start_with(
        upper: OwnedFd,
        earlier: Option<HashStates>,
        interval_bytes: u64,
    ) -> Option<Self> {
        let (told, incoming) = channel();
        let cancel = Arc::new(AtomicBool::new(false));
        let stop = Stop(cancel.clone());
        let work = move || {
            let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: &cancel };
            follow(Behind::new(upper, earlier, interval_bytes, &options), &incoming)
        };
        let thread = Builder::new().name("layer-follow".to_owned()).spawn(work).ok()?;
        Some(Self { told, batch: Mutex::default(), following: Following { thread, stop } })
    }

    /// Something at `path` will not be changed any more, but for the time of a directory.
    pub(crate) fn made(&self, path: Vec<u8>, what: What) {
        let mut batch = self.batch.lock().unwrap_or_else(PoisonError::into_inner);
        batch.push(Made { path, what });
        if batch.len() == BATCH {
            // An error: it has given up.
            let _ = self.told.send(Told::Made(std::mem::take(&mut batch)));
        }
    }

    /// What is made cannot be followed.
    pub(crate) fn give_up(&self) {
        self.following.stop.0.store(true, Atomic::Relaxed);
    }

    /// All is made.
    pub fn complete(self) -> Following {
        let batch = self.batch.into_inner().unwrap_or_else(PoisonError::into_inner);
        let _ = self.told.send(Told::Made(batch));
        let _ = self.told.send(Told::Complete);
        self.following
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
fn follow(mut behind: Behind<'_>, incoming: &Receiver<Told>) -> Option<Followed> {
    loop {
        match incoming.recv().ok()? {
            Told::Made(batch) => {
                for made in batch {
                    if behind.options.cancel.load(Atomic::Relaxed) {
                        return None;
                    }
                    behind.member(made)?;
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
    upper: OwnedFd,
    /// The last directory that something was made in.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// What was told last.
    last: Vec<u8>,
    /// All directories that were told or stand above what was, and the root.
    dirs: HashMap<Vec<u8>, Seen>,
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
        earlier: Option<HashStates>,
        interval_bytes: u64,
        options: &'o DiffOptions<'o>,
    ) -> Self {
        Self {
            options,
            prefix: earlier.map(|earlier| Prefix::new(earlier, options)),
            same_entries: 0,
            writer: Writer::new(Recorded::new(interval_bytes), options),
            interval_bytes,
            upper,
            parent: None,
            last: Vec::new(),
            dirs: HashMap::from([(Vec::new(), Seen { entry: None, entries: 0 })]),
        }
    }

    fn member(&mut self, made: Made) -> Option<()> {
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
            What::Kept(entry) => self.made_file(&path, entry.content().copied())?,
            What::File(content) => {
                self.part()?;
                self.made_file(&path, content)?;
            }
            What::Other => {
                let (entry, _) = self.read(&path)?;
                if let EntryKind::File { .. } = entry.kind {
                    return None;
                }
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

    fn made_file(&mut self, path: &[u8], content: Option<[u8; 32]>) -> Option<()> {
        self.dirs.get_mut(path::split(path).0)?.entries += 1;
        self.file(path, content)
    }

    /// Writes a file, whose content is known to be `content`, if it is known.
    fn file(&mut self, path: &[u8], content: Option<[u8; 32]>) -> Option<()> {
        let (mut entry, file) = self.read(path)?;
        if let EntryKind::File { content: unknown, .. } = &mut entry.kind {
            *unknown = content;
        }
        self.write(&entry, file)
    }

    /// What is no directory, as it is in the tree.
    fn read(&mut self, path: &[u8]) -> Option<(Entry, Option<File>)> {
        let (above, name) = path::split(path);
        if self.parent.as_ref().is_none_or(|(known, _)| known != above) {
            let dir = beneath::open_dir_without_links(self.upper.as_fd(), above).ok()?;
            self.parent = Some((above.to_vec(), dir));
        }
        let (_, parent) = self.parent.as_ref()?;
        let stat = node::stat(parent.as_fd(), name).ok()??;
        if node::kind(&stat) == FileType::Directory {
            return None;
        }
        self.writer.read_non_dir(&Found { parent: parent.as_fd(), name, path, stat }).ok()
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
                EntryKind::File { content, .. } => self.file(&entry.path, *content)?,
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
        let parent = beneath::open_dir_without_links(self.upper.as_fd(), above).ok()?;
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
                    let root = beneath::open_dir_without_links(self.upper.as_fd(), path).ok()?;
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

#[cfg(test)]
mod tests;
