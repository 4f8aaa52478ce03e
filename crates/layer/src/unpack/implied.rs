//! Directories that a tar's paths go through without an entry of their own.
//!
//! Where there is one already it stays as it is, its time included; what is missing is made 0755 0:0
//! with the time 0. Over the layers below it should be as theirs: an upperdir is unpacked before it is
//! known what it stands on, so that comes after, by [`inherit`].

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{self, FileType, OFlags};
use rustix::io::Errno;

use super::{Owner, Unpacker, host};
use crate::apply::{ApplyError, Whiteouts, is_kept_xattr};
use crate::beneath::{self, BeneathError};
use crate::index::{Timestamp, mtime};
use crate::marks::{self, Record};
use crate::node::{self, Attributes, Named, Xattrs, is_private_xattr};
use crate::path::{self, EntryPath};

/// Mode of those that were made.
const MODE: u32 = 0o755;

#[derive(Default)]
pub(super) struct Implied {
    /// Those that were made, by their paths without links, and whether they may have covered something
    /// of the lower layers then. Some may have been given an entry or given way to one since.
    made: BTreeMap<Vec<u8>, bool>,
    /// Those among them that stand in the place of something this layer hides.
    anew: BTreeSet<Vec<u8>>,
    /// All directories below which nothing of the lower layers shows.
    opaque: BTreeSet<Vec<u8>>,
    /// Times of directories that were there before, by inode: a link may be another path to one.
    kept: HashMap<(u64, u64), (Vec<u8>, Timestamp)>,
    /// Paths of directories whose time was kept.
    seen: HashSet<Vec<u8>>,
    /// This tar made a link: paths are not what they seem.
    pub(super) has_links: bool,
}

/// A directory that a layer's paths went through when it had no entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImpliedDir {
    /// Where it was made.
    pub path: EntryPath,
    /// It is there and has got no entry: mode, owner, attributes and time are nobody's yet.
    pub stays: bool,
}

/// What became of directories that a layer implied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inherited {
    /// They are as those of the layers below.
    Done,
    /// The layers below have a link in the place of one. What the tar puts there belongs to where the
    /// link leads: the layer is to be unpacked anew, on the whole tree below.
    Link,
}

/// Gives the directories that a layer implied ([`Applied::implied`](crate::Applied::implied)) mode,
/// owner, attributes and time of those of the same path in `lower`, the whole tree below; `upper` is
/// what it was unpacked into. Costs some calls for each.
///
/// # Errors
/// [`ApplyError::Host`]; the upper tree is then to be thrown away, as it is with [`Inherited::Link`].
pub fn inherit(
    lower: BorrowedFd<'_>,
    upper: BorrowedFd<'_>,
    implied: &[ImpliedDir],
) -> Result<Inherited, ApplyError> {
    for ImpliedDir { path: EntryPath(path), stays } in implied {
        let like = match beneath::open_dir_without_links(lower, path) {
            Ok(like) => like,
            Err(error) if is_link(&error) => return Ok(Inherited::Link),
            Err(error) if is_absent(&error) => continue,
            Err(error) => return Err(error.into()),
        };
        if !stays {
            continue;
        }
        let stat = fs::fstat(&like).named("fstat").map_err(host(path))?;
        let mut xattrs = node::xattrs_of(like.as_fd()).map_err(host(path))?;
        let record = xattrs.get(marks::RECORD.as_bytes()).filter(|_| marks::uses_user_attributes());
        let record = record.and_then(|value| Record::parse(value));
        xattrs.retain(|name, _| !is_private_xattr(name));
        let made = beneath::open_dir_without_links(upper, path)?;
        let known = (stat.st_uid, stat.st_gid);
        let owner = Some(record.map_or(known, |record| marks::true_owner(known, record)));
        let attributes = Attributes { owner, mode: stat.st_mode, xattrs: &xattrs, mtime: Some(mtime(&stat)) };
        node::set_on_fd(made.as_fd(), &attributes).map_err(host(path))?;
    }
    Ok(Inherited::Done)
}

fn is_link(error: &BeneathError) -> bool {
    error.errno() == Some(Errno::LOOP)
}

fn is_absent(error: &BeneathError) -> bool {
    matches!(error.host_kind(), Some(io::ErrorKind::NotFound | io::ErrorKind::NotADirectory))
}

impl Implied {
    /// Whether nothing of what lower layers have at `path` shows there.
    fn is_hidden(&self, path: &[u8]) -> bool {
        let mut above = prefixes(path::split(path).0);
        self.opaque.contains(&b""[..]) || above.any(|above| self.opaque.contains(above))
    }
}

/// `path` and all above it, the highest first.
fn prefixes(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    (1..=path.len()).filter(|&end| end == path.len() || path[end] == b'/').map(|end| &path[..end])
}

impl Unpacker<'_> {
    /// Makes the directory `path` and what is missing above it.
    pub(super) fn imply(&mut self, path: &[u8]) -> Result<(), ApplyError> {
        let real = beneath::real_path(self.root, path)?;
        for prefix in prefixes(&real) {
            match beneath::open_file(self.root, prefix, OFlags::PATH | OFlags::DIRECTORY) {
                Ok(_) => {}
                Err(error) if error.host_kind() == Some(io::ErrorKind::NotFound) => {
                    let parent = path::split(prefix).0;
                    if !self.implied.made.contains_key(parent) {
                        self.keep_times(parent)?;
                    }
                    self.remember(prefix)?;
                    let covers = !self.implied.is_hidden(prefix);
                    self.note_made(prefix, covers)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        beneath::mkdir_all(self.root, &real, MODE, (0, 0))?;
        Ok(())
    }

    /// Makes the directory `path` in the place of a whiteout that was there.
    pub(super) fn imply_in_place_of_whiteout(&mut self, path: &[u8]) -> Result<(), ApplyError> {
        self.imply(path)?;
        let real = beneath::real_path(self.root, path)?;
        self.note_made(&real, false)
    }

    /// Notes that `path` shows nothing of what lower layers have there; `anew`: nor is it itself what
    /// they have there.
    pub(super) fn note_opaque(&mut self, path: &[u8], anew: bool) -> Result<(), ApplyError> {
        let real = beneath::real_path(self.root, path)?;
        if anew && self.implied.anew.insert(real.clone()) {
            self.count_kept(&real)?;
        }
        if self.implied.opaque.insert(real.clone()) {
            self.count_kept(&real)?;
        }
        Ok(())
    }

    fn note_made(&mut self, real: &[u8], covers: bool) -> Result<(), ApplyError> {
        match self.implied.made.insert(real.to_vec(), covers) {
            None => self.count_kept(real),
            Some(_) => Ok(()),
        }
    }

    /// As if `path` had just been made: it is there only for what this tar put below it.
    pub(super) fn imply_anew(&mut self, path: &[u8]) -> Result<(), ApplyError> {
        let real = beneath::real_path(self.root, path)?;
        let dir = beneath::open_file(self.root, &real, OFlags::RDONLY | OFlags::DIRECTORY)?;
        node::remove_xattrs(dir.as_fd(), is_kept_xattr).map_err(host(path))?;
        let owner = (!matches!(self.rules.owner, Owner::Process)).then_some((0, 0));
        let attributes = Attributes { owner, mode: MODE, xattrs: &Xattrs::new(), mtime: None };
        node::set_on_fd(dir.as_fd(), &attributes).map_err(host(path))?;
        self.note_made(&real, false)
    }

    /// Keeps the times of a directory that is there and of those above it, before anything is put into
    /// it. Even of those above: fuse-overlayfs, unlike overlayfs, forgets them when it copies up.
    pub(super) fn keep_times(&mut self, path: &[u8]) -> Result<(), ApplyError> {
        if self.rules.whiteouts() == Some(Whiteouts::Overlay) || self.implied.seen.contains(path) {
            return Ok(());
        }
        let real = beneath::real_path(self.root, path)?;
        self.implied.seen.insert(path.to_vec());
        self.count_kept(path)?;
        for prefix in std::iter::once(&b""[..]).chain(prefixes(&real)) {
            if self.implied.seen.insert(prefix.to_vec()) {
                self.count_kept(prefix)?;
            } else if prefix != path {
                continue;
            }
            let dir = beneath::open_file(self.root, prefix, OFlags::PATH | OFlags::DIRECTORY)?;
            let stat = fs::fstat(dir).named("fstat").map_err(host(path))?;
            let inode = (stat.st_dev, stat.st_ino);
            if let Entry::Vacant(vacant) = self.implied.kept.entry(inode) {
                vacant.insert((prefix.to_vec(), mtime(&stat)));
                self.count_kept(prefix)?;
            }
        }
        Ok(())
    }

    /// Sets the times of all directories that have no entry, or had none when they were made.
    pub(super) fn set_implied_times(&mut self) -> Result<(), ApplyError> {
        for (inode, (path, time)) in std::mem::take(&mut self.implied.kept) {
            match beneath::open_file(self.root, &path, OFlags::RDONLY | OFlags::DIRECTORY) {
                Ok(dir) => {
                    let stat = fs::fstat(&dir).named("fstat").map_err(host(&path))?;
                    if (stat.st_dev, stat.st_ino) == inode {
                        node::set_mtime(dir.as_fd(), b".", time).map_err(host(&path))?;
                    }
                }
                Err(error) if is_absent(&error) || is_link(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        for path in self.implied.made.keys() {
            match beneath::open_dir_without_links(self.root, path) {
                Ok(dir) => node::set_mtime(dir.as_fd(), b".", Timestamp::default()).map_err(host(path))?,
                // It has given way to another entry.
                Err(error) if is_absent(&error) || is_link(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// What [`inherit`] is for, parents first; `explicit` have entries.
    pub(super) fn implied_dirs<'p>(
        &self,
        explicit: impl Iterator<Item = &'p [u8]>,
    ) -> Result<Vec<ImpliedDir>, ApplyError> {
        let implied = &self.implied;
        if implied.made.is_empty() || self.rules.whiteouts() != Some(Whiteouts::Overlay) {
            return Ok(Vec::new());
        }
        let mut have_entries = BTreeSet::new();
        for entry in explicit {
            let (above, name) = path::split(entry);
            let real = match implied.has_links {
                true => path::join(&beneath::real_path(self.root, above)?, name),
                false => entry.to_vec(),
            };
            have_entries.insert(real);
        }
        let covering = implied.made.iter().filter(|(_, covers)| **covers).map(|(path, _)| path.as_slice());
        let dir = |path: &[u8]| {
            let is_theirs = have_entries.contains(path) || implied.anew.contains(path);
            let stays = !is_theirs
                && !implied.is_hidden(path)
                && beneath::open_dir_without_links(self.root, path).is_ok();
            ImpliedDir { path: path.into(), stays }
        };
        Ok(covering.map(dir).collect())
    }

    /// Removes a lower layer's file that this layer goes through as a directory, as an upperdir would
    /// hide it.
    pub(super) fn clear_lower_file(&mut self, path: &[u8]) -> Result<(), ApplyError> {
        let Some(lower) = self.lower_file_above(path)? else { return Ok(()) };
        let (parent, name) = beneath::open_parent(self.root, &lower)?;
        self.keep_times(path::split(&lower).0)?;
        node::remove(parent.as_fd(), name).map_err(host(path))
    }

    /// The real path of a file among `path` and what is above it that this tar did not make.
    pub(super) fn lower_file_above(&self, path: &[u8]) -> Result<Option<Vec<u8>>, ApplyError> {
        if self.rules.whiteouts() != Some(Whiteouts::Remove) {
            return Ok(None);
        }
        let real = beneath::real_path(self.root, path)?;
        for prefix in prefixes(&real) {
            let Ok((parent, name)) = beneath::open_parent(self.root, prefix) else { return Ok(None) };
            match node::stat(parent.as_fd(), name).map_err(host(path))? {
                Some(stat) if node::kind(&stat) == FileType::Directory => {}
                Some(_) if !self.holds_ours(prefix) => return Ok(Some(prefix.to_vec())),
                _ => return Ok(None),
            }
        }
        Ok(None)
    }
}
