//! Hard links to files that the same tar has made.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};

use super::{Owner, Unpacker, broken, host};
use crate::apply::{ApplyError, Defect};
use crate::node::{self, Attributes, Named};
use crate::path;
use crate::tar_header::Member;

impl Unpacker<'_> {
    pub(super) fn hard_link(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        member: &Member,
    ) -> Result<(), ApplyError> {
        let target = self.rules.clean(&member.link, path)?;
        if target == path {
            return Err(broken(path, Defect::LinkMissing));
        }
        self.link_to(parent, name, path, &target)
    }

    fn link_to(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        target: &[u8],
    ) -> Result<(), ApplyError> {
        let (above, target_name) = path::split(target);
        let missing = || broken(path, Defect::LinkMissing);
        let target_parent = self.existing(above)?.ok_or_else(missing)?;
        if target_name.is_empty() {
            return Err(broken(path, Defect::LinkToDirectory));
        }
        let stat = node::stat(target_parent.as_fd(), target_name).map_err(host(path))?.ok_or_else(missing)?;
        match node::kind(&stat) {
            FileType::Directory => return Err(broken(path, Defect::LinkToDirectory)),
            FileType::CharacterDevice if stat.st_rdev == 0 => return Err(missing()),
            _ => {}
        }
        let here = node::stat(parent, name).map_err(host(path))?;
        let inode = (stat.st_dev, stat.st_ino);
        if here.is_some_and(|here| (here.st_dev, here.st_ino) == inode) {
            return Ok(());
        }
        // Without AT_SYMLINK_FOLLOW a link to a symbolic link is one to the link itself.
        let link = || fs::linkat(&target_parent, target_name, parent, name, AtFlags::empty());
        match self.replace(parent, name, path, "linkat", link) {
            // The target was below what had to make way.
            Err(ApplyError::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(missing())
            }
            Err(ApplyError::Host { source, .. }) if source.kind() == io::ErrorKind::TooManyLinks => {
                if let Some(copy) = self.overflow.remove(&inode) {
                    self.link_to(parent, name, path, &copy)?;
                    // Unless that one is full as well, the next link goes there too.
                    self.overflow.entry(inode).or_insert(copy);
                    return Ok(());
                }
                self.copy_beside(target_parent.as_fd(), target_name, parent, name, path)?;
                self.overflow.insert(inode, path.to_vec());
                Ok(())
            }
            other => other,
        }
    }

    /// Makes a file like another one of this tar, for want of one more link to it.
    fn copy_beside(
        &mut self,
        from: BorrowedFd<'_>,
        from_name: &[u8],
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<(), ApplyError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let source = fs::openat(from, from_name, flags, Mode::empty()).named("openat").map_err(host(path))?;
        let stat = fs::fstat(&source).named("fstat").map_err(host(path))?;
        let xattrs = node::xattrs(from, from_name).map_err(host(path))?;
        let mut copy = File::from(self.create(parent, name, path)?);
        let copied = io::copy(&mut File::from(source), &mut copy);
        copied.map_err(|source| ApplyError::Host { call: "write", entry: path.into(), source })?;
        let owner = (!matches!(self.rules.owner, Owner::Process)).then_some((stat.st_uid, stat.st_gid));
        let mtime = Some(crate::index::mtime(&stat));
        let attributes = Attributes { owner, mode: stat.st_mode, xattrs: &xattrs, mtime };
        node::set_on_fd(copy.as_fd(), &attributes).map_err(host(path))
    }
}
