//! What a layer hides: marks in an upperdir, or files removed from a whole tree.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{self, FileType, Mode, XattrFlags};

use super::{Unpacker, host};
use crate::apply::{ApplyError, Whiteouts};
use crate::beneath;
use crate::marks;
use crate::node::{self, CallError, Named};
use crate::path;

impl Unpacker<'_> {
    /// Hides what the lower layers have at `parent`/`name`; what this tar made stays.
    pub(crate) fn hide(&mut self, parent: &[u8], name: &[u8]) -> Result<(), ApplyError> {
        let path = path::join(parent, name);
        if self.rules.whiteouts() == Some(Whiteouts::Remove) {
            let Some(directory) = self.existing(parent)? else { return Ok(()) };
            self.forget();
            return self.remove_lower_at(directory.as_fd(), name, &path);
        }
        let directory = self.parent(parent)?;
        match node::stat(directory.as_fd(), name).map_err(host(&path))? {
            Some(stat) if node::kind(&stat) == FileType::Directory => {
                self.make_opaque(&path)?;
                self.note_opaque(&path, true)
            }
            // A file of this layer hides the lower one already.
            Some(_) => Ok(()),
            None => {
                fs::mknodat(&directory, name, FileType::CharacterDevice, Mode::empty(), 0)
                    .named("mknodat")
                    .map_err(host(&path))?;
                // Where no lower layer has the directory, overlayfs lists its whiteouts, of which then
                // nobody finds anything; unless it may have been copied up.
                fs::fsetxattr(&directory, marks::origin_attribute(), b"", XattrFlags::empty())
                    .named("fsetxattr")
                    .map_err(host(&path))
            }
        }
    }

    /// Hides everything the lower layers have in the directory `path`.
    pub(crate) fn make_opaque(&mut self, path: &[u8]) -> Result<(), ApplyError> {
        match self.rules.whiteouts() {
            None => Ok(()),
            Some(Whiteouts::Overlay) => {
                let directory = self.parent(path)?;
                set_opaque(directory.as_fd()).map_err(host(path))?;
                self.note_opaque(path, false)
            }
            Some(Whiteouts::Remove) => match self.existing(path)? {
                Some(directory) => {
                    self.forget();
                    self.remove_lower(directory.as_fd(), path)
                }
                None => Ok(()),
            },
        }
    }

    /// The first whiteout among `path` and its parents: a lower file that this layer replaces by a
    /// directory without an entry of its own.
    fn whiteout_above(&self, path: &[u8]) -> Result<Option<usize>, ApplyError> {
        for end in (1..=path.len()).filter(|&end| end == path.len() || path[end] == b'/') {
            let Ok((parent, name)) = beneath::open_parent(self.root, &path[..end]) else { return Ok(None) };
            match node::stat(parent.as_fd(), name).map_err(host(path))? {
                Some(stat) if node::kind(&stat) == FileType::CharacterDevice && stat.st_rdev == 0 => {
                    return Ok(Some(end));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    pub(super) fn has_whiteout_above(&self, path: &[u8]) -> Result<bool, ApplyError> {
        Ok(self.rules.whiteouts() == Some(Whiteouts::Overlay) && self.whiteout_above(path)?.is_some())
    }

    /// Turns a whiteout in the way into an opaque directory.
    pub(super) fn clear_whiteouts(&mut self, path: &[u8]) -> Result<(), ApplyError> {
        if self.rules.whiteouts() != Some(Whiteouts::Overlay) {
            return Ok(());
        }
        let Some(end) = self.whiteout_above(path)? else { return Ok(()) };
        let hidden = &path[..end];
        let (parent, name) = beneath::open_parent(self.root, hidden)?;
        node::remove(parent.as_fd(), name).map_err(host(hidden))?;
        self.imply_in_place_of_whiteout(hidden)?;
        let made = node::open_dir(parent.as_fd(), name).map_err(host(hidden))?;
        set_opaque(made.as_fd()).map_err(host(hidden))?;
        self.note_opaque(hidden, true)
    }

    fn remove_lower(&mut self, directory: BorrowedFd<'_>, path: &[u8]) -> Result<(), ApplyError> {
        for name in node::names(directory).map_err(host(path))?.iter() {
            self.remove_lower_at(directory, name, &path::join(path, name))?;
        }
        Ok(())
    }

    /// Removes `name` and what is below, except for what this tar made.
    fn remove_lower_at(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<(), ApplyError> {
        let stat = node::stat(parent, name).map_err(host(path))?;
        let is = |kind| stat.as_ref().is_some_and(|stat| node::kind(stat) == kind);
        // What this tar put behind a lower link is elsewhere.
        let is_lower_link = is(FileType::Symlink) && !self.made.contains(path);
        if is_lower_link || !self.holds_ours(path) {
            return node::remove(parent, name).map_err(host(path));
        }
        if is(FileType::Directory) {
            let directory = node::open_dir(parent, name).map_err(host(path))?;
            if !self.made.contains(path) {
                self.imply_anew(path)?;
            }
            self.remove_lower(directory.as_fd(), path)?;
        }
        Ok(())
    }

    /// Whether this tar made `path` or anything below it.
    pub(super) fn holds_ours(&self, path: &[u8]) -> bool {
        let below = [path, b"/"].concat();
        let next = self.made.range(below.clone()..).next();
        self.made.contains(path) || next.is_some_and(|made| made.starts_with(&below))
    }
}

/// Hides all that lower layers have in the directory.
pub(super) fn set_opaque(directory: BorrowedFd<'_>) -> Result<(), CallError> {
    fs::fsetxattr(directory, marks::opaque_attribute(), b"y", XattrFlags::empty()).named("fsetxattr")
}
