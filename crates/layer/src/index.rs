//! The layer index: what a tree's entries are.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use rustix::fs::{self, FileType, Stat};

use crate::beneath::BeneathError;
use crate::looked_at::LookedAt;
use crate::marks::{self, Record};
use crate::node::{self, CallError, Named, Xattrs};
use crate::path::{EntryPath, PathError};
use crate::walk::Found;

/// A time of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds since 1970; negative before.
    pub secs: i64,
    /// Nanoseconds after `secs`, below 10⁹.
    pub nanos: u32,
}

/// One file, directory, link or device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path below the root without a leading slash; empty for the root itself.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission, setuid, setgid and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Change time: tells a file that changed since the scan. Part of no digest.
    pub ctime: Timestamp,
    /// All extended attributes, those of overlayfs too.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What an [`Entry`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File {
        /// Size in bytes.
        size: u64,
        /// BLAKE3 of the content; `None` when the scan did not hash.
        content: Option<[u8; 32]>,
        /// Device and inode: equal for hard links of one file.
        inode: (u64, u64),
        /// Number of hard links.
        nlink: u32,
    },
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink {
        /// Where it points, as stored.
        target: Vec<u8>,
    },
    /// A character device; 0:0 is overlayfs's whiteout.
    Char {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket; layers have none.
    Socket,
}

/// What tells one state of a file's content from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStat {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Modification time in nanoseconds since 1970.
    pub mtime_ns: i128,
    /// Change time in nanoseconds since 1970.
    pub ctime_ns: i128,
    /// Type and permissions, as `stat(2)` has them.
    pub mode: u32,
}

/// What is known of a file besides what `stat(2)` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownFile {
    /// BLAKE3 of its content.
    pub content: [u8; 32],
    /// It has no extended attributes but SELinux's, which describe the host.
    pub is_bare: bool,
}

/// Remembers files by what `stat(2)` says of them: who changes content or attributes changes that.
///
/// Several threads ask at once.
pub trait StatCache: Sync {
    /// A file in exactly this state, if it is known for certain.
    fn get(&self, stat: &FileStat) -> Option<KnownFile>;

    /// Learns of a file that had this state before and after it was read.
    fn put(&self, stat: &FileStat, known: KnownFile);
}

/// Why a tree could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScanError {
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A path cannot be used.
    #[error("path {path} is not usable")]
    Path {
        /// The path.
        path: EntryPath,
        /// What is wrong with it.
        source: PathError,
    },
    /// A file kept changing while it was hashed.
    #[error("{path} changed while it was read")]
    ChangedWhileReading {
        /// The file.
        path: EntryPath,
    },
    /// The kernel refused.
    #[error("{call} failed for {path}")]
    Host {
        /// The system call.
        call: &'static str,
        /// The entry.
        path: EntryPath,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl From<BeneathError> for ScanError {
    fn from(error: BeneathError) -> Self {
        match error {
            BeneathError::Path { path, source } => Self::Path { path, source },
            BeneathError::Host { call, path, source } => Self::Host { call, path, source },
        }
    }
}

impl ScanError {
    pub(crate) fn host(path: &[u8], CallError { call, errno }: CallError) -> Self {
        Self::Host { call, path: path.into(), source: errno.into() }
    }
}

impl Entry {
    /// What a walk found, with what its `stat(2)` does not say.
    pub(crate) fn new(
        found: &Found<'_>,
        content: Option<[u8; 32]>,
        xattrs: Xattrs,
    ) -> Result<Self, ScanError> {
        let Found { parent, name, path, stat } = found;
        let (major, minor) = (fs::major(stat.st_rdev), fs::minor(stat.st_rdev));
        let kind = match node::kind(stat) {
            FileType::RegularFile => file_kind(stat, content),
            FileType::Directory => EntryKind::Dir,
            FileType::Symlink => {
                let target = fs::readlinkat(parent, *name, Vec::new()).named("readlinkat");
                let target = target.map_err(|error| ScanError::host(path, error))?;
                EntryKind::Symlink { target: target.into_bytes() }
            }
            FileType::CharacterDevice => EntryKind::Char { major, minor },
            FileType::BlockDevice => EntryKind::Block { major, minor },
            FileType::Fifo => EntryKind::Fifo,
            _ => EntryKind::Socket,
        };
        let mut entry = Self {
            path: path.to_vec(),
            kind,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: mtime(stat),
            ctime: ctime(stat),
            xattrs,
        };
        entry.apply_record();
        Ok(entry)
    }

    /// Takes what the attributes have on record about a user's file for what it is.
    pub(crate) fn apply_record(&mut self) {
        if !marks::uses_user_attributes() {
            return;
        }
        let record = self.xattrs.remove(marks::RECORD.as_bytes());
        let Some(record) = record.and_then(|value| Record::parse(&value)) else { return };
        (self.uid, self.gid) = marks::true_owner((self.uid, self.gid), record);
        match (record.device, &self.kind) {
            // 0:0 would be a whiteout.
            (Some((_, 0, 0)) | None, _) => {}
            (Some((false, major, minor)), EntryKind::File { .. }) => {
                self.kind = EntryKind::Char { major, minor };
            }
            (Some((true, major, minor)), EntryKind::File { .. }) => {
                self.kind = EntryKind::Block { major, minor };
            }
            _ => {}
        }
    }

    /// Whether `file`, open to be read, still has the content that a scan found which began at
    /// `looked_at`. The scan must have been of the same mount: overlayfs gives each its own device
    /// number. Costs an `fstat(2)`, or a read of the whole file where that says nothing.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn is_as_scanned(&self, mut file: &File, looked_at: LookedAt) -> io::Result<bool> {
        if looked_at.is_settled(self.mtime.unix_ns(), self.ctime.unix_ns()) && self.is_as(&fs::fstat(file)?) {
            return Ok(true);
        }
        let EntryKind::File { content: Some(expected), .. } = &self.kind else { return Ok(false) };
        file.seek(SeekFrom::Start(0))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file)?;
        Ok(hasher.finalize() == *expected)
    }

    /// BLAKE3 of a file's content, if it is known.
    pub(crate) fn content(&self) -> Option<&[u8; 32]> {
        match &self.kind {
            EntryKind::File { content, .. } => content.as_ref(),
            _ => None,
        }
    }

    pub(crate) fn is_as(&self, stat: &Stat) -> bool {
        let EntryKind::File { size, inode, .. } = &self.kind else { return false };
        *size == stat.st_size.unsigned_abs()
            && *inode == (stat.st_dev, stat.st_ino)
            && (self.mtime, self.ctime) == (mtime(stat), ctime(stat))
    }
}

pub(crate) fn file_kind(stat: &Stat, content: Option<[u8; 32]>) -> EntryKind {
    EntryKind::File {
        size: stat.st_size.unsigned_abs(),
        content,
        inode: (stat.st_dev, stat.st_ino),
        nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
    }
}

impl FileStat {
    pub(crate) fn of(stat: &Stat) -> Self {
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
            size: stat.st_size.unsigned_abs(),
            mtime_ns: mtime(stat).unix_ns(),
            ctime_ns: ctime(stat).unix_ns(),
            mode: stat.st_mode,
        }
    }
}

pub(crate) fn mtime(stat: &Stat) -> Timestamp {
    Timestamp { secs: stat.st_mtime, nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or(0) }
}

pub(crate) fn ctime(stat: &Stat) -> Timestamp {
    Timestamp { secs: stat.st_ctime, nanos: u32::try_from(stat.st_ctime_nsec).unwrap_or(0) }
}
