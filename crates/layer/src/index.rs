//! The layer index: every entry of a tree, in order, read in one pass.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use rustix::fs::{self, FileType, OFlags, Stat};

use crate::beneath::{self, BeneathError};
use crate::looked_at::LookedAt;
use crate::marks::{self, Record};
use crate::node::{self, CallError, Named, Xattrs};
use crate::path::{self, EntryPath, PathError};
use crate::walk::{Found, Walk};

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

/// What to do with an entry of a scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visit {
    /// The entry and, for a directory, what the filter takes below it.
    Take,
    /// Neither the entry nor anything below it.
    Skip,
    /// Look below it; the directory itself only if something there is taken.
    Descend,
}

/// Decides about a path; the second argument says whether it is a directory.
pub type Filter<'a> = dyn Fn(&[u8], bool) -> Visit + 'a;

/// How to scan.
pub struct ScanOptions<'a> {
    /// Hash file content.
    pub hash: bool,
    /// Asked for every entry but the root, with its path and whether it is a directory; `None`
    /// takes everything.
    pub filter: Option<&'a Filter<'a>>,
    /// Digests known from earlier scans.
    pub stat_cache: Option<&'a dyn StatCache>,
    /// Set by somebody else to stop.
    pub cancel: &'a AtomicBool,
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
pub trait StatCache {
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

/// Reads the tree at and below `start` (empty: the root).
///
/// Sorted by component, so a directory stands before what is in it. A link at `start` is itself an
/// entry. Costs one `stat` and one `listxattr` per entry, the latter not for bare files that the cache
/// knows; content is read only where `hash` is set and the cache does not know it.
pub fn scan(root: BorrowedFd<'_>, start: &[u8], options: &ScanOptions<'_>) -> Result<Vec<Entry>, ScanError> {
    let start = match start.strip_suffix(b"/").unwrap_or(start) {
        b"." => b"",
        start => start,
    };
    let mut scan = Scan { options, entries: Vec::new(), pending: Vec::new(), unhashed: Vec::new() };
    let mut walk = Walk::new(root, start)?;
    while let Some(found) = walk.next()? {
        if options.cancel.load(Ordering::Relaxed) {
            return Err(ScanError::Cancelled);
        }
        if scan.visit(&found)? {
            walk.enter()?;
        }
    }
    let Scan { mut entries, unhashed, .. } = scan;
    hash_files(root, &mut entries, &unhashed, options)?;
    Ok(entries)
}

struct Scan<'a> {
    options: &'a ScanOptions<'a>,
    entries: Vec<Entry>,
    /// Directories above the current entry that are taken with the first entry below them.
    pending: Vec<Entry>,
    /// Indices of files whose content is still to be hashed.
    unhashed: Vec<usize>,
}

impl Scan<'_> {
    /// Takes the entry or not; whether to look below it.
    fn visit(&mut self, found: &Found<'_>) -> Result<bool, ScanError> {
        let is_dir = node::kind(&found.stat) == FileType::Directory;
        let visit = match self.options.filter {
            Some(filter) if !found.path.is_empty() => filter(found.path, is_dir),
            _ => Visit::Take,
        };
        self.pending.retain(|above| path::is_below(found.path, &above.path));
        match visit {
            Visit::Skip => return Ok(false),
            Visit::Descend if !is_dir => return Ok(false),
            Visit::Descend => {
                let entry = self.entry(found)?;
                self.pending.push(entry);
            }
            Visit::Take => {
                let entry = self.entry(found)?;
                self.entries.append(&mut self.pending);
                if self.options.hash && matches!(entry.kind, EntryKind::File { content: None, .. }) {
                    self.unhashed.push(self.entries.len());
                }
                self.entries.push(entry);
            }
        }
        Ok(is_dir)
    }

    fn entry(&self, found: &Found<'_>) -> Result<Entry, ScanError> {
        let is_file = node::kind(&found.stat) == FileType::RegularFile;
        let known = self.options.stat_cache.filter(|_| self.options.hash && is_file);
        let known = known.and_then(|cache| cache.get(&FileStat::of(&found.stat)));
        let xattrs = match known {
            Some(KnownFile { is_bare: true, .. }) => Xattrs::new(),
            _ => {
                node::xattrs(found.parent, found.name).map_err(|error| ScanError::host(found.path, error))?
            }
        };
        Entry::new(found, known.map(|known| known.content), xattrs)
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

fn file_kind(stat: &Stat, content: Option<[u8; 32]>) -> EntryKind {
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

/// Hashes the files at `indices` on all processors and tells the cache.
fn hash_files(
    root: BorrowedFd<'_>,
    entries: &mut [Entry],
    indices: &[usize],
    options: &ScanOptions<'_>,
) -> Result<(), ScanError> {
    let cancel = options.cancel;
    let shared: &[Entry] = entries;
    let hashed: Vec<(usize, Stat, [u8; 32])> = indices
        .par_iter()
        .map_init(
            || vec![0; 256 << 10],
            |buffer, &at| {
                let (stat, content) = hash_file(root, &shared[at].path, buffer, cancel)?;
                Ok((at, stat, content))
            },
        )
        .collect::<Result<_, ScanError>>()?;
    for (at, stat, content) in hashed {
        let entry = &mut entries[at];
        // The attributes were listed before the content was read: in this state, if the times say so.
        let is_bare = entry.is_as(&stat) && entry.xattrs.keys().all(|name| name == b"security.selinux");
        entry.kind = file_kind(&stat, Some(content));
        entry.mode = stat.st_mode & 0o7777;
        if !marks::uses_user_attributes() {
            // Else it may be on record only.
            (entry.uid, entry.gid) = (stat.st_uid, stat.st_gid);
        }
        (entry.mtime, entry.ctime) = (mtime(&stat), ctime(&stat));
        if let Some(cache) = options.stat_cache {
            cache.put(&FileStat::of(&stat), KnownFile { content, is_bare });
        }
    }
    Ok(())
}

/// The state of the file before and after its content was read: they are the same.
fn hash_file(
    root: BorrowedFd<'_>,
    path: &[u8],
    buffer: &mut [u8],
    cancel: &AtomicBool,
) -> Result<(Stat, [u8; 32]), ScanError> {
    for _ in 0..3 {
        let fd = open_to_read(root, path)?;
        let stat_of =
            |fd: &OwnedFd| fs::fstat(fd).named("fstat").map_err(|error| ScanError::host(path, error));
        let before = stat_of(&fd)?;
        if node::kind(&before) != FileType::RegularFile {
            break;
        }
        let mut hasher = blake3::Hasher::new();
        let mut file = File::from(fd);
        loop {
            if cancel.load(Ordering::Relaxed) {
                return Err(ScanError::Cancelled);
            }
            match file.read(buffer) {
                Ok(0) => break,
                Ok(length) => hasher.update(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(ScanError::Host { call: "read", path: path.into(), source }),
            };
        }
        let after = stat_of(&OwnedFd::from(file))?;
        if FileStat::of(&before) == FileStat::of(&after) {
            return Ok((after, hasher.finalize().into()));
        }
    }
    Err(ScanError::ChangedWhileReading { path: path.into() })
}

/// Opens a file to read; one that turned into a fifo or a link meanwhile does not hang or lead away.
pub(crate) fn open_to_read(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, BeneathError> {
    beneath::open_file(root, path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY)
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir, write};
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    use super::*;

    fn check(start: &str, filter: Option<&Filter<'_>>, expected: &[&str]) {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "a/x", "a-b"] {
            create_dir(dir.path().join(name)).unwrap();
        }
        write(dir.path().join("a/x/file"), "text").unwrap();
        symlink("/nowhere", dir.path().join("link")).unwrap();
        let root = File::open(dir.path()).unwrap();
        let cancel = AtomicBool::new(false);
        let options = ScanOptions { hash: true, filter, stat_cache: None, cancel: &cancel };
        let entries = scan(root.as_fd(), start.as_bytes(), &options).unwrap();
        let paths: Vec<String> =
            entries.iter().map(|entry| String::from_utf8_lossy(&entry.path).into_owned()).collect();
        assert_eq!(paths, expected);
        for entry in &entries {
            if let EntryKind::File { content, .. } = &entry.kind {
                assert_eq!(*content, Some(*blake3::hash(b"text").as_bytes()));
            }
        }
    }

    #[test]
    fn a_directory_stands_before_its_children_and_those_before_its_neighbours() {
        check("", None, &["", "a", "a/x", "a/x/file", "a-b", "link"]);
        check("a/x", None, &["a/x", "a/x/file"]);
        check("link", None, &["link"]);
    }

    #[test]
    fn a_filter_skips_or_looks_below() {
        let filter = |path: &[u8], _: bool| match path {
            b"a-b" => Visit::Skip,
            _ => Visit::Take,
        };
        check("", Some(&filter), &["", "a", "a/x", "a/x/file", "link"]);
    }

    #[test]
    fn a_directory_that_is_only_passed_stands_before_what_is_taken_below_it() {
        let filter = |path: &[u8], _: bool| match path {
            b"a/x/file" => Visit::Take,
            _ => Visit::Descend,
        };
        check("", Some(&filter), &["", "a", "a/x", "a/x/file"]);
        check("a", Some(&filter), &["a", "a/x", "a/x/file"]);
        check("", Some(&|_, _| Visit::Descend), &[""]);
        let upper = |path: &[u8], _: bool| match path {
            b"a" => Visit::Take,
            _ => Visit::Descend,
        };
        check("", Some(&upper), &["", "a"]);
    }

    #[test]
    fn a_file_that_is_written_to_all_the_time_is_not_read() {
        use std::os::unix::fs::FileExt;

        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("log")).unwrap();
        file.write_all_at(&[0; 100_000], 0).unwrap();
        let (stop, never) = (AtomicBool::new(false), AtomicBool::new(false));
        let root = File::open(dir.path()).unwrap();
        let hash = |buffer: &mut [u8]| hash_file(root.as_fd(), b"log", buffer, &never);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    file.write_all_at(b"x", 0).unwrap();
                }
            });
            // Byte by byte: long enough for the other thread to have its turn.
            let read = hash(&mut [0]);
            stop.store(true, Ordering::Relaxed);
            assert!(matches!(read, Err(ScanError::ChangedWhileReading { .. })), "{read:?}");
        });
        let (_, content) = hash(&mut [0; 4096]).unwrap();
        assert_eq!(content, *blake3::hash(&std::fs::read(dir.path().join("log")).unwrap()).as_bytes());
    }

    #[test]
    fn attributes_of_a_file_that_the_cache_knows_are_seen_when_they_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        write(&path, "text").unwrap();
        // Coarse clocks may not tell the changes of this test apart.
        let touch = |seconds: u64| {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        };
        /// Believes that no time is too young, as a cache of another day may.
        #[derive(Default)]
        struct Trusting(std::sync::Mutex<std::collections::HashMap<u64, (FileStat, KnownFile)>>);
        impl StatCache for Trusting {
            fn get(&self, stat: &FileStat) -> Option<KnownFile> {
                let known = self.0.lock().unwrap().get(&stat.ino).copied();
                known.filter(|(then, _)| then == stat).map(|(_, known)| known)
            }
            fn put(&self, stat: &FileStat, known: KnownFile) {
                self.0.lock().unwrap().insert(stat.ino, (*stat, known));
            }
        }
        let (cache, cancel) = (Trusting::default(), AtomicBool::new(false));
        let root = File::open(dir.path()).unwrap();
        let xattrs = || {
            let options = ScanOptions { hash: true, filter: None, stat_cache: Some(&cache), cancel: &cancel };
            scan(root.as_fd(), b"x", &options).unwrap().remove(0).xattrs
        };
        assert_eq!((xattrs().len(), xattrs().len()), (0, 0));
        let bare = |cache: &Trusting| cache.0.lock().unwrap().values().all(|(_, known)| known.is_bare);
        assert!(bare(&cache));
        let none = fs::XattrFlags::empty();
        fs::setxattr(&path, "user.a", b"1", none).unwrap();
        touch(1);
        assert_eq!((xattrs().len(), xattrs().len()), (1, 1));
        assert!(!bare(&cache));
        fs::removexattr(&path, "user.a").unwrap();
        touch(2);
        assert_eq!(xattrs().len(), 0);
    }

    #[test]
    fn a_cancelled_scan_stops() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = AtomicBool::new(true);
        let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &cancel };
        let root = File::open(dir.path()).unwrap();
        assert!(matches!(scan(root.as_fd(), b"", &options), Err(ScanError::Cancelled)));
    }
}
