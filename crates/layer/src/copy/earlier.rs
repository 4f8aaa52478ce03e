//! What an earlier copy to the same place made, to be linked to where it is the same.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags};
use rustix::io::Errno;

use super::{Copier, CopyError, host};
use crate::beneath;
use crate::index::{Entry, EntryKind, Timestamp};
use crate::node::{Attributes, CallError};
use crate::path;

/// The files of an earlier copy, in a committed layer: nobody writes to them any more.
///
/// A file is known by the digest of all that it is: path, content, mode, owner, time, attributes. Files that
/// were hard links of one another are not among them: two names in one layer that lead to one file are hard
/// links there, and nothing else may look like them.
pub struct Earlier {
    /// The layer's directory.
    dir: OwnedFd,
    known: HashSet<[u8; 32]>,
}

impl Earlier {
    /// The files in `dir` that [`Copied::made`](super::Copied::made) named when they were made.
    pub fn new(dir: OwnedFd, known: impl IntoIterator<Item = [u8; 32]>) -> Self {
        Self { dir, known: known.into_iter().collect() }
    }
}

impl Copier<'_> {
    /// Links the file to that of the earlier copy if it is the same; whether it was.
    pub(super) fn link_earlier(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        entry: &Entry,
        attributes: &Attributes<'_>,
    ) -> Result<bool, CopyError> {
        if !self.request.note_made {
            return Ok(false);
        }
        let Some(identity) = identity(path, entry, attributes) else { return Ok(false) };
        self.copied.made.push(identity);
        let Some(earlier) = self.request.earlier.filter(|earlier| earlier.known.contains(&identity)) else {
            return Ok(false);
        };
        let (above, last) = path::split(path);
        if self.earlier_dir.as_ref().is_none_or(|(known, _)| known != above) {
            let Ok(dir) = beneath::open_dir_without_links(earlier.dir.as_fd(), above) else {
                return Ok(false);
            };
            self.earlier_dir = Some((above.to_vec(), dir));
        }
        let Some((_, dir)) = &self.earlier_dir else { return Ok(false) };
        let link = || fs::linkat(dir, last, parent, name, AtFlags::empty());
        let linked = match link() {
            Err(Errno::EXIST) => match fs::unlinkat(parent, name, AtFlags::empty()) {
                Ok(()) => link(),
                // A directory is there, say: whoever makes the file says so.
                Err(_) => return Ok(false),
            },
            other => other,
        };
        match linked {
            Ok(()) => {
                self.copied.linked += 1;
                self.kept = self.request.follower.and_then(|_| kept(path, entry, attributes));
                Ok(true)
            }
            Err(errno @ (Errno::NOSPC | Errno::DQUOT)) => {
                Err(host(path)(CallError { call: "linkat", errno }))
            }
            // The layer was removed meanwhile, or the file has as many names as it can have.
            Err(_) => Ok(false),
        }
    }
}

/// A file that was linked, as whoever hashes its layer finds it.
fn kept(path: &[u8], entry: &Entry, attributes: &Attributes<'_>) -> Option<Box<Entry>> {
    let (uid, gid) = attributes.owner?;
    Some(Box::new(Entry {
        path: path.to_vec(),
        kind: entry.kind.clone(),
        mode: attributes.mode & 0o7777,
        uid,
        gid,
        mtime: attributes.mtime?,
        ctime: Timestamp::default(),
        xattrs: attributes.xattrs.clone(),
    }))
}

/// Digest of all that a file will be; `None`: it is one of several hard links, or nobody knows its content.
fn identity(path: &[u8], entry: &Entry, attributes: &Attributes<'_>) -> Option<[u8; 32]> {
    let EntryKind::File { size, content: Some(content), nlink: 1, .. } = &entry.kind else { return None };
    let mut hasher = blake3::Hasher::new();
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(path);
    field(content);
    field(&size.to_le_bytes());
    field(&attributes.mode.to_le_bytes());
    let (uid, gid) = attributes.owner?;
    field(&uid.to_le_bytes());
    field(&gid.to_le_bytes());
    let mtime = attributes.mtime?;
    field(&mtime.secs.to_le_bytes());
    field(&mtime.nanos.to_le_bytes());
    for (name, value) in attributes.xattrs {
        field(name);
        field(value);
    }
    Some(hasher.finalize().into())
}
