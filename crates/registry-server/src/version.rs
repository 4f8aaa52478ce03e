//! Whether a file is another one than it was.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What tells that a file is another one, or was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Version {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds: of its content, then of anything about it, which nobody can set back.
    times: [(i64, i64); 2],
}

impl Version {
    /// Of the file at `path`; `None`: there is none, or nobody may look.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().map(|stat| Self::new(&stat))
    }

    /// Of an open file.
    pub(crate) fn of_open(file: &File) -> io::Result<Self> {
        file.metadata().map(|stat| Self::new(&stat))
    }

    fn new(stat: &Metadata) -> Self {
        let times = [(stat.mtime(), stat.mtime_nsec()), (stat.ctime(), stat.ctime_nsec())];
        Self { device: stat.dev(), inode: stat.ino(), size: stat.size(), times }
    }
}
