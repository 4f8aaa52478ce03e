//! The tar of a layer, hashed while a copy still makes its files.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::io::{self, Sink};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use rustix::fs::FileType;

use super::{DiffOptions, TreeForm, Writer, Written};
use crate::beneath;
use crate::hashing::HashedOut;
use crate::index::{Entry, Timestamp};
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
pub struct Follower {
    told: Sender<Told>,
    batch: Mutex<Vec<Made>>,
    following: Following,
}

/// The hash of a layer that is complete.
pub struct Following {
    thread: JoinHandle<Option<Written>>,
    stop: Stop,
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
    /// Of a directory: the time that it gets when all else is done.
    mtime: Option<Timestamp>,
}

enum Told {
    Made(Vec<Made>),
    /// Nothing more comes, and all directories have their times.
    Complete,
}

impl Follower {
    /// Waits for what will be made below `upper`, an empty upperdir that nobody has mounted; `None`: there
    /// is no thread for it.
    pub fn start(upper: OwnedFd) -> Option<Self> {
        let (told, incoming) = channel();
        let cancel = Arc::new(AtomicBool::new(false));
        let stop = Stop(cancel.clone());
        let work = move || follow(upper, &incoming, &cancel);
        let thread = Builder::new().name("layer-follow".to_owned()).spawn(work).ok()?;
        Some(Self { told, batch: Mutex::default(), following: Following { thread, stop } })
    }

    /// Something at `path` will not be changed any more, but for the time of a directory.
    pub(crate) fn made(&self, path: Vec<u8>, mtime: Option<Timestamp>) {
        let mut batch = self.batch.lock().unwrap_or_else(PoisonError::into_inner);
        batch.push(Made { path, mtime });
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
    pub fn wait(self) -> Option<Written> {
        // Asked to stop only after it has ended.
        let _stop = self.stop;
        self.thread.join().ok().flatten()
    }
}

/// `None`, whatever is wrong: who goes through the finished tree says what.
fn follow(upper: OwnedFd, incoming: &Receiver<Told>, cancel: &AtomicBool) -> Option<Written> {
    let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel };
    let mut following = Behind::new(upper, &options);
    loop {
        match incoming.recv().ok()? {
            Told::Made(batch) => {
                for made in batch {
                    if cancel.load(Atomic::Relaxed) {
                        return None;
                    }
                    following.member(&made)?;
                }
            }
            Told::Complete => return following.finish(),
        }
    }
}

struct Behind<'o> {
    writer: Writer<'o, HashedOut<Sink>>,
    upper: OwnedFd,
    /// The last directory that something was made in.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// What was written last.
    last: Vec<u8>,
    /// All directories that were written, and the root.
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
    fn new(upper: OwnedFd, options: &'o DiffOptions<'o>) -> Self {
        Self {
            writer: Writer::new(HashedOut::new(io::sink()), options),
            upper,
            parent: None,
            last: Vec::new(),
            dirs: HashMap::from([(Vec::new(), Seen { entry: None, entries: 0 })]),
        }
    }

    fn member(&mut self, made: &Made) -> Option<()> {
        let path = made.path.as_slice();
        if in_tar_order(&self.last, path) != Ordering::Less {
            return None;
        }
        for end in path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at) {
            let above = &path[..end];
            if self.last != above && !path::is_below(&self.last, above) {
                self.dir(above, None)?;
            }
        }
        let (above, name) = path::split(path);
        if self.parent.as_ref().is_none_or(|(known, _)| known != above) {
            let dir = beneath::open_dir_without_links(self.upper.as_fd(), above).ok()?;
            self.parent = Some((above.to_vec(), dir));
        }
        let (_, parent) = self.parent.as_ref()?;
        let stat = node::stat(parent.as_fd(), name).ok()??;
        if node::kind(&stat) == FileType::Directory {
            self.dir(path, made.mtime)?;
        } else {
            let found = Found { parent: parent.as_fd(), name, path, stat };
            let (entry, file) = self.writer.read_non_dir(&found).ok()?;
            self.writer.write(&entry, file).ok()?;
            self.dirs.get_mut(above)?.entries += 1;
        }
        path.clone_into(&mut self.last);
        Some(())
    }

    fn dir(&mut self, path: &[u8], mtime: Option<Timestamp>) -> Option<()> {
        let (mut entry, _) = self.look_at(path)?;
        entry.mtime = mtime.unwrap_or(entry.mtime);
        self.writer.write(&entry, None).ok()?;
        self.dirs.get_mut(path::split(path).0)?.entries += 1;
        self.dirs.insert(path.to_vec(), Seen { entry: Some(entry), entries: 0 });
        Some(())
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

    fn finish(self) -> Option<Written> {
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
        self.writer.finish().ok()
    }
}

/// The order of a walk: by component, so that what is in a directory stands behind it at once.
fn in_tar_order(one: &[u8], other: &[u8]) -> Ordering {
    one.split(|&byte| byte == b'/').cmp(other.split(|&byte| byte == b'/'))
}

#[cfg(test)]
mod tests;
