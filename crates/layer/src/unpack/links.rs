//! Hard links to files that the same tar has made.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::{Owner, Unpacker, broken, host};
use crate::apply::{ApplyError, Defect};
use crate::node::{self, Attributes, CallError, Named, Xattrs};
use crate::path;
use crate::tar_header::Member;
use crate::tar_read::TarReader;

impl Unpacker<'_> {
    pub(super) fn hard_link(
        &mut self,
        reader: &mut TarReader<'_>,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        member: &Member,
    ) -> Result<(), ApplyError> {
        let target = self.rules.clean(&member.link, path)?;
        if target == path {
            return Err(broken(path, Defect::LinkMissing));
        }
        self.link_to(reader, parent, name, path, &target)
    }

    fn link_to(
        &mut self,
        reader: &mut TarReader<'_>,
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
                    self.link_to(reader, parent, name, path, &copy)?;
                    // Unless that one is full as well, the next link goes there too.
                    self.overflow.entry(inode).or_insert(copy);
                    return Ok(());
                }
                self.make_like(reader, &stat, (target_parent.as_fd(), target_name), (parent, name), path)?;
                self.overflow.insert(inode, path.to_vec());
                Ok(())
            }
            other => other,
        }
    }

    /// Makes a node like another one of this tar, for want of one more link to it.
    fn make_like(
        &mut self,
        reader: &mut TarReader<'_>,
        stat: &Stat,
        (from, from_name): (BorrowedFd<'_>, &[u8]),
        (parent, name): (BorrowedFd<'_>, &[u8]),
        path: &[u8],
    ) -> Result<(), ApplyError> {
        let xattrs = node::xattrs(from, from_name).map_err(host(path))?;
        let kind = node::kind(stat);
        match kind {
            FileType::RegularFile => {
                // As much is written as if the tar had the file twice.
                reader.count_copy(stat.st_size.try_into().unwrap_or(0))?;
                return self.copy_file(stat, (from, from_name), (parent, name), path, &xattrs);
            }
            FileType::Symlink => {
                let target = fs::readlinkat(from, from_name, Vec::new()).named("readlinkat");
                let target = target.map_err(host(path))?;
                let make = || fs::symlinkat(target.as_c_str(), parent, name);
                self.replace(parent, name, path, "symlinkat", make)?;
            }
            // Never opened: what is behind a device is the host's.
            kind => {
                let make = || node::make_node(parent, name, kind, stat.st_rdev);
                self.replace(parent, name, path, "mknodat", make)?;
            }
        }
        let attributes = self.attributes_of(stat, &xattrs);
        node::set_on_name(parent, name, kind == FileType::Symlink, &attributes).map_err(host(path))
    }

    fn copy_file(
        &mut self,
        stat: &Stat,
        (from, from_name): (BorrowedFd<'_>, &[u8]),
        (parent, name): (BorrowedFd<'_>, &[u8]),
        path: &[u8],
        xattrs: &Xattrs,
    ) -> Result<(), ApplyError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let source = fs::openat(from, from_name, flags, Mode::empty()).named("openat").map_err(host(path))?;
        let opened = fs::fstat(&source).named("fstat").map_err(host(path))?;
        if (opened.st_dev, opened.st_ino) != (stat.st_dev, stat.st_ino) {
            return Err(host(path)(CallError { call: "openat", errno: Errno::STALE }));
        }
        let mut copy = File::from(self.create(parent, name, path)?);
        let failed = |source| ApplyError::Host { call: "write", entry: path.into(), source };
        let mut source = File::from(source);
        let mut piece = vec![0; 256 << 10];
        loop {
            if self.rules.cancel.load(Ordering::Relaxed) {
                return Err(ApplyError::Cancelled);
            }
            match source.read(&mut piece) {
                Ok(0) => break,
                Ok(length) => copy.write_all(&piece[..length]).map_err(failed)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        node::set_on_fd(copy.as_fd(), &self.attributes_of(stat, xattrs)).map_err(host(path))
    }

    fn attributes_of<'x>(&self, stat: &Stat, xattrs: &'x Xattrs) -> Attributes<'x> {
        let owner = (!matches!(self.rules.owner, Owner::Process)).then_some((stat.st_uid, stat.st_gid));
        Attributes { owner, mode: stat.st_mode, xattrs, mtime: Some(crate::index::mtime(stat)) }
    }
}
