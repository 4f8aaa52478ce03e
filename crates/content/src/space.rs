//! What a file system has room for.

use std::io;
use std::path::Path;

use rustix::fs::{StatVfs, statvfs};

/// The room on a file system, used and left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// How large it is.
    pub total_bytes: u64,
    /// What is left for everybody.
    pub free_bytes: u64,
    /// What is left for root, who may use what is kept from others.
    pub root_bytes: u64,
    /// How many files everybody may make; `None`: as many as there is room for.
    pub free_inodes: Option<u64>,
    /// How many root may make.
    pub root_inodes: Option<u64>,
}

impl Space {
    /// That of the file system that `path` is on. Costs a system call.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self::from(&statvfs(path)?))
    }
}

impl From<&StatVfs> for Space {
    fn from(stat: &StatVfs) -> Self {
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        // Some file systems make inodes as they go, and say that there are none.
        let inodes = |count| (stat.f_files > 0).then_some(count);
        Self {
            total_bytes: bytes(stat.f_blocks),
            free_bytes: bytes(stat.f_bavail),
            root_bytes: bytes(stat.f_bfree),
            free_inodes: inodes(stat.f_favail),
            root_inodes: inodes(stat.f_ffree),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_in_fragments_and_inodes_where_there_is_a_number_of_them() {
        let mut stat = statvfs(Path::new("/")).unwrap();
        (stat.f_bsize, stat.f_frsize) = (4096, 1024);
        (stat.f_blocks, stat.f_bfree, stat.f_bavail) = (100, 20, 10);
        (stat.f_files, stat.f_ffree, stat.f_favail) = (9, 7, 5);
        let space = Space {
            total_bytes: 100 << 10,
            free_bytes: 10 << 10,
            root_bytes: 20 << 10,
            free_inodes: Some(5),
            root_inodes: Some(7),
        };
        assert_eq!(Space::from(&stat), space);
        (stat.f_files, stat.f_bavail) = (0, u64::MAX);
        let endless = Space { free_bytes: u64::MAX, free_inodes: None, root_inodes: None, ..space };
        assert_eq!(Space::from(&stat), endless);
    }
}
