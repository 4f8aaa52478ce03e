//! The build context: a directory of the client, read only where a copy asks.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kiln_frontend::ignore::Patterns;
use kiln_layer::FileStatCache;
use kiln_oci::Digest;
use rustix::fs::{Mode, OFlags, open};

use crate::BuildError;

/// An open context directory with its ignore rules and what is known of its files' digests.
pub(crate) struct Context {
    path: PathBuf,
    root: OwnedFd,
    ignore: Patterns,
    digests: FileStatCache,
    digests_file: PathBuf,
}

impl Context {
    /// Opens `path`; nothing below it is read yet.
    pub(crate) fn open(path: &Path, ignore: Patterns, state: &Path) -> Result<Self, BuildError> {
        let unreadable = |source| BuildError::Unreadable { path: path.to_owned(), source };
        let absolute = path.canonicalize().map_err(unreadable)?;
        if !absolute.is_dir() {
            return Err(BuildError::ContextKind { path: path.to_owned() });
        }
        let root = open(&absolute, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| unreadable(errno.into()))?;
        let name = Digest::of(absolute.as_os_str().as_encoded_bytes()).hex();
        let digests_file = state.join("stat").join(&name[..32]);
        let digests = FileStatCache::load(&digests_file);
        Ok(Self { path: absolute, root, ignore, digests, digests_file })
    }

    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// What stands for its path in names of files.
    pub(crate) fn name(&self) -> &str {
        self.digests_file.file_name().and_then(|name| name.to_str()).expect("it was made of hex digits")
    }

    pub(crate) fn ignore(&self) -> &Patterns {
        &self.ignore
    }

    pub(crate) fn digests(&self) -> &FileStatCache {
        &self.digests
    }

    /// Keeps the files' digests for the next build. They only save time, so a full disk is no error.
    pub(crate) fn save_digests(&self) {
        let _ = self.digests.save(&self.digests_file);
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("path", &self.path).finish_non_exhaustive()
    }
}
