//! Whether a file is another one than it was.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

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

    /// Whether it is the same but for when something about it changed last, as when it got another name.
    pub(crate) fn is_same_content(&self, other: &Self) -> bool {
        Self { times: [self.times[0], other.times[1]], ..*self } == *other
    }

    /// Whether somebody had to do with it so lately that the clock of the file system may say the same again.
    pub(crate) fn is_racy(&self) -> bool {
        self.is_racy_at(SystemTime::now())
    }

    fn is_racy_at(&self, now: SystemTime) -> bool {
        /// Kernels count in steps of at most ten milliseconds here.
        const STEP: Duration = Duration::from_millis(20);
        let (seconds, nanoseconds) = self.times[1];
        let (Ok(seconds), Ok(nanoseconds)) = (u64::try_from(seconds), u32::try_from(nanoseconds)) else {
            return false;
        };
        let changed = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds);
        match now.duration_since(changed) {
            Ok(age) => age < STEP,
            Err(ahead) => ahead.duration() < STEP,
        }
    }

    fn new(stat: &Metadata) -> Self {
        let times = [(stat.mtime(), stat.mtime_nsec()), (stat.ctime(), stat.ctime_nsec())];
        Self { device: stat.dev(), inode: stat.ino(), size: stat.size(), times }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_a_moment_ago_may_change_again_unseen() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let version = Version::of(file.path()).unwrap();
        let (seconds, nanoseconds) = version.times[1];
        let age = Duration::new(seconds.try_into().unwrap(), nanoseconds.try_into().unwrap());
        let changed = SystemTime::UNIX_EPOCH + age;
        let after = |milliseconds| version.is_racy_at(changed + Duration::from_millis(milliseconds));
        assert!(after(0) && after(10) && !after(40));
        // A clock that was set back.
        assert!(version.is_racy_at(changed - Duration::from_millis(10)));
        assert!(!version.is_racy_at(changed - Duration::from_secs(1)));
    }
}
