//! Goes through a tree in order, however deep it is, with a bounded number of open directories.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, OFlags, Stat};

use crate::beneath;
use crate::index::ScanError;
use crate::node::{self, Named, Names};
use crate::path;

/// Directories that stay open: the two at the top, and the deepest ones. Paths have up to 2048
/// levels, processes often no more than 1024 descriptors.
const KEPT_OPEN: usize = 64;

/// A walk: a directory stands before what is in it, and that is sorted by name.
///
/// [`Walk::next`] goes to the next entry; a directory is only gone into after [`Walk::enter`].
pub(crate) struct Walk {
    levels: Vec<Level>,
    /// Of the current entry.
    path: Vec<u8>,
    /// Of the current entry; `None` before the first and after the last.
    stat: Option<Stat>,
}

struct Level {
    /// Length of the directory's path; its entries' paths begin with it.
    path_length: usize,
    /// Closed when the walk is far below; opened again when it comes back.
    dir: Option<OwnedFd>,
    names: Names,
    next: usize,
}

/// The directory that a walk began in.
pub(crate) struct Base {
    dir: OwnedFd,
    /// Of its path, which those of the entries begin with.
    path_length: usize,
}

/// An entry that a walk came to.
pub(crate) struct Found<'w> {
    /// The directory that it is in; of the root, the root itself.
    pub(crate) parent: BorrowedFd<'w>,
    /// Its name there; `.` for the root.
    pub(crate) name: &'w [u8],
    /// Its path below the root; empty for the root.
    pub(crate) path: &'w [u8],
    pub(crate) stat: Stat,
}

impl Walk {
    /// A walk through what is at and below `start` (empty: `root`).
    pub(crate) fn new(root: BorrowedFd<'_>, start: &[u8]) -> Result<Self, ScanError> {
        let (dir, name, above) = if start.is_empty() {
            (beneath::open_file(root, b"", OFlags::RDONLY | OFlags::DIRECTORY)?, &b"."[..], &b""[..])
        } else {
            let (dir, name) = beneath::open_parent(root, start)?;
            (dir, name, path::split(start).0)
        };
        let names = Names::one(name);
        let top = Level { path_length: above.len(), dir: Some(dir), names, next: 0 };
        Ok(Self { levels: vec![top], path: above.to_vec(), stat: None })
    }

    /// A walk through what is in the directory at `path`, below `base`, without itself. No link is followed
    /// on the way there.
    pub(crate) fn inside(base: &Base, path: &[u8]) -> Result<Self, ScanError> {
        let below = path::strip(path, &path[..base.path_length]);
        let dir = beneath::open_dir_without_links(base.dir.as_fd(), below)?;
        let names = node::names(dir.as_fd()).map_err(|error| ScanError::host(path, error))?;
        let top = Level { path_length: path.len(), dir: Some(dir), names, next: 0 };
        Ok(Self { levels: vec![top], path: path.to_vec(), stat: None })
    }

    /// The next entry; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Found<'_>>, ScanError> {
        while self.levels.last().is_some_and(|level| level.next == level.names.len()) {
            self.levels.pop();
        }
        self.stat = None;
        let depth = self.levels.len();
        let Some(level) = self.levels.last_mut() else { return Ok(None) };
        self.path.truncate(level.path_length);
        let name = level.names.get(level.next);
        level.next += 1;
        if name != b"." {
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name);
        }
        path::check_listed(&self.path, name)
            .map_err(|source| ScanError::Path { path: self.path.as_slice().into(), source })?;
        self.open_again(depth - 1)?;
        let (parent, name) = self.place();
        let stat = fs::statat(parent, name, fs::AtFlags::SYMLINK_NOFOLLOW)
            .named("fstatat")
            .map_err(|error| ScanError::host(&self.path, error))?;
        self.stat = Some(stat);
        Ok(self.current())
    }

    /// What the last [`Walk::next`] came to.
    pub(crate) fn current(&self) -> Option<Found<'_>> {
        let stat = self.stat?;
        let (parent, name) = self.place();
        Some(Found { parent, name, path: &self.path, stat })
    }

    /// Lets the walk go on in the directory that the last [`Walk::next`] came to, and returns it.
    pub(crate) fn enter(&mut self) -> Result<BorrowedFd<'_>, ScanError> {
        let host = |error| ScanError::host(&self.path, error);
        let (parent, name) = self.place();
        let dir = node::open_dir(parent, name).map_err(host)?;
        let names = node::names(dir.as_fd()).map_err(host)?;
        self.levels.push(Level { path_length: self.path.len(), dir: Some(dir), names, next: 0 });
        if let Some(far) = self.levels.len().checked_sub(KEPT_OPEN).filter(|&far| far > 1) {
            self.levels[far].dir = None;
        }
        Ok(self.levels[self.levels.len() - 1].dir())
    }

    /// Where it began.
    pub(crate) fn base(&self) -> Result<Base, ScanError> {
        let top = &self.levels[0];
        let dir = rustix::io::fcntl_dupfd_cloexec(top.dir(), 0).named("fcntl");
        let path_length = top.path_length;
        let at = |error| ScanError::host(&self.path[..path_length], error);
        Ok(Base { dir: dir.map_err(at)?, path_length })
    }

    /// Where the current entry is.
    fn place(&self) -> (BorrowedFd<'_>, &[u8]) {
        let level = self.levels.last().expect("the walk has come to an entry and not gone on");
        (level.dir(), level.names.get(level.next - 1))
    }

    fn open_again(&mut self, nth: usize) -> Result<(), ScanError> {
        if self.levels[nth].dir.is_some() {
            return Ok(());
        }
        let top = &self.levels[0];
        let whole = &self.path[..self.levels[nth].path_length];
        let below = path::strip(whole, &whole[..top.path_length]);
        let dir = beneath::open_dir_without_links(top.dir(), below)?;
        self.levels[nth].dir = Some(dir);
        Ok(())
    }
}

impl Level {
    fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_ref().expect("opened again before it is the last level").as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{CWD, Mode};

    use super::*;

    /// Makes `depth` directories in one another, with a file in each.
    fn deep(depth: usize) -> tempfile::TempDir {
        let temp = tempfile::tempdir().unwrap();
        let mut dir: OwnedFd = File::open(temp.path()).unwrap().into();
        for _ in 0..depth {
            fs::mkdirat(&dir, "d", Mode::RWXU).unwrap();
            fs::openat(&dir, "e", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
            dir = node::open_dir(dir.as_fd(), b"d").unwrap();
        }
        temp
    }

    #[test]
    fn deep_trees_are_walked_with_few_open_directories_and_removed() {
        let temp = deep(1500);
        let root = File::open(temp.path()).unwrap();
        let mut walk = Walk::new(root.as_fd(), b"d").unwrap();
        let (mut files, mut dirs) = (0, 0);
        while let Some(found) = walk.next().unwrap() {
            assert!(found.path.starts_with(b"d"));
            if node::kind(&found.stat) == fs::FileType::Directory {
                dirs += 1;
                walk.enter().unwrap();
                assert!(walk.levels.iter().filter(|level| level.dir.is_some()).count() <= KEPT_OPEN + 2);
            } else {
                files += 1;
            }
        }
        assert_eq!((files, dirs), (1499, 1500));
        node::remove(root.as_fd(), b"d").unwrap();
        assert!(fs::statat(CWD, temp.path().join("d"), fs::AtFlags::empty()).is_err());
    }

    #[test]
    fn trees_deeper_than_paths_go_are_an_error_and_can_be_removed() {
        let temp = deep(5000);
        let root = File::open(temp.path()).unwrap();
        let mut walk = Walk::new(root.as_fd(), b"").unwrap();
        let error = loop {
            match walk.next() {
                Ok(Some(found)) if node::kind(&found.stat) == fs::FileType::Directory => {
                    walk.enter().unwrap();
                }
                Ok(found) => assert!(found.is_some()),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, ScanError::Path { .. }), "{error}");
        node::remove(root.as_fd(), b"d").unwrap();
    }

    #[test]
    fn several_may_remove_the_same_tree() {
        let temp = deep(700);
        for wide in 0..40 {
            let dir = temp.path().join(format!("d/wide-{wide}"));
            std::fs::create_dir_all(&dir).unwrap();
            (0..20).for_each(|file| std::fs::write(dir.join(file.to_string()), b"x").unwrap());
        }
        let root = File::open(temp.path()).unwrap();
        std::thread::scope(|scope| {
            (0..6).for_each(|_| drop(scope.spawn(|| node::remove(root.as_fd(), b"d").unwrap())));
        });
        assert!(fs::statat(CWD, temp.path().join("d"), fs::AtFlags::empty()).is_err());
    }
}
