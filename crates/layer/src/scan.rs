//! Trees are read in one pass: every entry in order, large trees by several threads.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rayon::Scope;
use rayon::prelude::*;
use rustix::fs::{self, FileType, Stat};

use crate::beneath::Opener;
use crate::index::{Entry, EntryKind, FileStat, KnownFile, ScanError, StatCache, ctime, file_kind, mtime};
use crate::marks;
use crate::node::{self, Named, Xattrs};
use crate::path;
use crate::walk::{Base, Found, Walk};

/// Entries that one thread reads before others help: starting those costs as much as some hundreds.
const ALONE: usize = 2_000;

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

/// Decides about a path; the second argument says whether it is a directory. Several threads ask, in no order.
pub type Filter<'a> = dyn Fn(&[u8], bool) -> Visit + Sync + 'a;

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

/// Reads the tree at and below `start` (empty: the root).
///
/// Sorted by component, so a directory stands before what is in it. A link at `start` is itself an
/// entry. Costs one `stat` and one `listxattr` per entry, the latter not for bare files that the cache
/// knows; content is read only where `hash` is set and the cache does not know it. Beyond some thousand entries
/// the directories are shared out among all processors.
pub fn scan(root: BorrowedFd<'_>, start: &[u8], options: &ScanOptions<'_>) -> Result<Vec<Entry>, ScanError> {
    let start = match start.strip_suffix(b"/").unwrap_or(start) {
        b"." => b"",
        start => start,
    };
    let scan = Scan { options, failed: AtomicBool::new(false) };
    let mut trunk = Branch::default();
    let mut walk = Walk::new(root, start)?;
    if scan.go(&mut walk, &mut trunk, &Help::Later)? {
        let base = walk.base()?;
        let base = &base;
        rayon::in_place_scope(|threads| scan.go(&mut walk, &mut trunk, &Help::Of { threads, base }))?;
    }
    let mut entries = Vec::new();
    trunk.into_order(&mut entries)?;
    if options.hash {
        hash_files(root, &mut entries, options)?;
    }
    Ok(entries)
}

struct Scan<'a> {
    options: &'a ScanOptions<'a>,
    /// Set by the first thread that fails: what the others find is of no use.
    failed: AtomicBool,
}

/// What one thread found, in order.
#[derive(Default)]
struct Branch {
    entries: Vec<Entry>,
    /// Directories above the current entry that are taken with the first entry below them.
    pending: Vec<Entry>,
    /// Directories that other threads went into: behind how many of the entries theirs stand.
    others: Vec<(usize, Slot)>,
}

/// Where another thread puts what it found.
type Slot = Arc<OnceLock<Result<Branch, ScanError>>>;

impl Branch {
    /// Appends what this and the other threads found to `all`.
    fn into_order(self, all: &mut Vec<Entry>) -> Result<(), ScanError> {
        let mut others = self.others.into_iter().peekable();
        all.reserve(self.entries.len());
        for (at, entry) in self.entries.into_iter().enumerate() {
            all.push(entry);
            while let Some((_, other)) = others.next_if(|(behind, _)| *behind == at + 1) {
                match Arc::into_inner(other).and_then(OnceLock::into_inner) {
                    Some(branch) => branch?.into_order(all)?,
                    // Only a thread that failed leaves something undone.
                    None => return Err(ScanError::Cancelled),
                }
            }
        }
        Ok(())
    }
}

/// Who goes into directories.
enum Help<'h, 's> {
    /// This thread, until there is enough to do for others.
    Later,
    /// The others.
    Of { threads: &'h Scope<'s>, base: &'s Base },
}

impl Scan<'_> {
    /// Goes on with `walk`; whether there is more, for several.
    fn go<'s>(
        &'s self,
        walk: &mut Walk,
        branch: &mut Branch,
        help: &Help<'_, 's>,
    ) -> Result<bool, ScanError> {
        while let Some(found) = walk.next()? {
            if self.options.cancel.load(Ordering::Relaxed) {
                return Err(ScanError::Cancelled);
            }
            if !self.visit(&found, branch)? {
                continue;
            }
            match *help {
                // Of a directory that is only passed nobody knows yet whether it is taken.
                Help::Of { threads, base } if branch.pending.is_empty() => {
                    let (path, slot) = (found.path.to_vec(), Slot::default());
                    branch.others.push((branch.entries.len(), Arc::clone(&slot)));
                    threads.spawn(move |threads| self.go_into(&path, &slot, &Help::Of { threads, base }));
                }
                _ => drop(walk.enter()?),
            }
            if matches!(help, Help::Later) && branch.entries.len() >= ALONE {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Fills `slot` with what is in the directory at `path`.
    fn go_into<'s>(&'s self, path: &[u8], slot: &Slot, help: &Help<'_, 's>) {
        let Help::Of { base, .. } = help else { return };
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        let mut branch = Branch::default();
        let went = Walk::inside(base, path).and_then(|mut walk| self.go(&mut walk, &mut branch, help));
        if went.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        let _ = slot.set(went.map(|_| branch));
    }

    /// Takes the entry or not; whether to look below it.
    fn visit(&self, found: &Found<'_>, branch: &mut Branch) -> Result<bool, ScanError> {
        let is_dir = node::kind(&found.stat) == FileType::Directory;
        let visit = match self.options.filter {
            Some(filter) if !found.path.is_empty() => filter(found.path, is_dir),
            _ => Visit::Take,
        };
        branch.pending.retain(|above| path::is_below(found.path, &above.path));
        match visit {
            Visit::Skip => return Ok(false),
            Visit::Descend if !is_dir => return Ok(false),
            Visit::Descend => branch.pending.push(self.entry(found)?),
            Visit::Take => {
                let entry = self.entry(found)?;
                branch.entries.append(&mut branch.pending);
                branch.entries.push(entry);
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
            // They are listed when it is read.
            None if is_file && self.options.hash && lists_when_read() => Xattrs::new(),
            _ => {
                node::xattrs(found.parent, found.name).map_err(|error| ScanError::host(found.path, error))?
            }
        };
        Entry::new(found, known.map(|known| known.content), xattrs)
    }
}

/// Whether the attributes of files are listed when they are open, which costs a third of listing them by
/// name. Not where an attribute may say that a file is none.
fn lists_when_read() -> bool {
    !marks::uses_user_attributes()
}

/// Hashes the files whose content is not known on all processors and tells the cache.
fn hash_files(
    root: BorrowedFd<'_>,
    entries: &mut [Entry],
    options: &ScanOptions<'_>,
) -> Result<(), ScanError> {
    let cancel = options.cancel;
    let shared: &[Entry] = entries;
    let is_unknown = |entry: &Entry| matches!(entry.kind, EntryKind::File { content: None, .. });
    let indices: Vec<usize> = (0..shared.len()).filter(|&at| is_unknown(&shared[at])).collect();
    let hashed: Vec<(usize, HashedFile)> = indices
        .par_iter()
        .map_init(|| FileHasher::new(root, cancel), |hasher, &at| Ok((at, hasher.hash(&shared[at].path)?)))
        .collect::<Result<_, ScanError>>()?;
    for (at, HashedFile { stat, content, xattrs }) in hashed {
        let entry = &mut entries[at];
        let are_listed = match xattrs {
            Some(xattrs) => {
                entry.xattrs = xattrs;
                true
            }
            // They were listed before the content was read: in this state, if the times say so.
            None => entry.is_as(&stat),
        };
        let is_bare = are_listed && entry.xattrs.keys().all(|name| name == b"security.selinux");
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

/// Reads files of one tree, one after another.
struct FileHasher<'a> {
    root: BorrowedFd<'a>,
    cancel: &'a AtomicBool,
    opener: Opener,
    buffer: Vec<u8>,
}

/// A file that was read.
#[derive(Debug)]
struct HashedFile {
    /// Its state before and after: they are the same.
    stat: Stat,
    content: [u8; 32],
    /// `None`: they were listed already.
    xattrs: Option<Xattrs>,
}

impl<'a> FileHasher<'a> {
    fn new(root: BorrowedFd<'a>, cancel: &'a AtomicBool) -> Self {
        Self { root, cancel, opener: Opener::default(), buffer: vec![0; 256 << 10] }
    }

    fn hash(&mut self, path: &[u8]) -> Result<HashedFile, ScanError> {
        let failed = |error| ScanError::host(path, error);
        for _ in 0..3 {
            let file = File::from(self.opener.open(self.root, path)?);
            let before = fs::fstat(&file).named("fstat").map_err(failed)?;
            if node::kind(&before) != FileType::RegularFile {
                break;
            }
            let listed = lists_when_read().then(|| node::xattrs_of(file.as_fd()));
            let xattrs = listed.transpose().map_err(failed)?;
            let content = self.content(&file, before.st_size.unsigned_abs(), path)?;
            let after = fs::fstat(&file).named("fstat").map_err(failed)?;
            if FileStat::of(&before) == FileStat::of(&after) {
                return Ok(HashedFile { stat: after, content, xattrs });
            }
        }
        Err(ScanError::ChangedWhileReading { path: path.into() })
    }

    /// Reads as much as the file is said to have: whoever asks looks again whether it has more. Files that
    /// the kernel makes up are said to have nothing.
    fn content(&mut self, mut file: &File, size: u64, path: &[u8]) -> Result<[u8; 32], ScanError> {
        let (mut hasher, mut left) = (blake3::Hasher::new(), size);
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(ScanError::Cancelled);
            }
            let length = match file.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(ScanError::Host { call: "read", path: path.into(), source }),
            };
            hasher.update(&self.buffer[..length]);
            match left.checked_sub(length as u64) {
                Some(0) => break,
                // It has more: to its end, wherever that is.
                rest => left = rest.unwrap_or(u64::MAX),
            }
        }
        Ok(hasher.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir, create_dir_all, write};
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
    fn a_tree_that_several_threads_read_is_as_one_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        for nth in 0..3 * ALONE {
            let (above, deep) = (nth / 100, if nth % 3 == 0 { "x/y-z/" } else { "" });
            let at = dir.path().join(format!("d{}/{deep}s{above}", above % 7));
            create_dir_all(&at).unwrap();
            write(at.join(format!("f{nth}")), nth.to_string()).unwrap();
        }
        symlink("d1", dir.path().join("d1-link")).unwrap();
        let root = File::open(dir.path()).unwrap();
        let cancel = AtomicBool::new(false);
        let read = |start: &[u8], filter: Option<&Filter<'_>>| {
            let options = ScanOptions { hash: false, filter, stat_cache: None, cancel: &cancel };
            let entries = scan(root.as_fd(), start, &options).unwrap();
            // By one thread: a walk.
            let mut walk = Walk::new(root.as_fd(), start).unwrap();
            let mut expected = Branch::default();
            let alone = Scan { options: &options, failed: AtomicBool::new(false) };
            while let Some(found) = walk.next().unwrap() {
                if alone.visit(&found, &mut expected).unwrap() {
                    walk.enter().unwrap();
                }
            }
            assert!(entries == expected.entries);
            entries.len()
        };
        assert!(read(b"", None) > 3 * ALONE);
        assert!(read(b"d1", None) > ALONE / 3);
        let no_sevens = |path: &[u8], is_dir: bool| match path.ends_with(b"7") {
            true if is_dir => Visit::Descend,
            true => Visit::Skip,
            false => Visit::Take,
        };
        assert!(read(b"", Some(&no_sevens)) > 2 * ALONE);
        let only_sevens = |path: &[u8], _: bool| match path.ends_with(b"77") {
            true => Visit::Take,
            false => Visit::Descend,
        };
        assert!(read(b"", Some(&only_sevens)) > 0);
    }

    #[test]
    fn what_one_of_several_threads_fails_at_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for nth in 0..ALONE + 10 {
            write(dir.path().join(format!("a{nth:05}")), "").unwrap();
        }
        create_dir_all(dir.path().join("b/c")).unwrap();
        let root = File::open(dir.path()).unwrap();
        // Goes away between the look at it and the step into it.
        let gone = |path: &[u8], _: bool| {
            if path == b"b/c" {
                std::fs::remove_dir(dir.path().join("b/c")).unwrap();
            }
            Visit::Take
        };
        let cancel = AtomicBool::new(false);
        let options = ScanOptions { hash: true, filter: Some(&gone), stat_cache: None, cancel: &cancel };
        match scan(root.as_fd(), b"", &options) {
            Err(ScanError::Host { path, source, .. }) => {
                assert_eq!((path.0, source.kind()), (b"b/c".to_vec(), io::ErrorKind::NotFound));
            }
            other => panic!("{other:?}"),
        }
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
        let begun = AtomicBool::new(false);
        let root = File::open(dir.path()).unwrap();
        let hash = |length: usize| {
            let buffer = vec![0; length];
            FileHasher { buffer, ..FileHasher::new(root.as_fd(), &never) }.hash(b"log")
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    file.write_all_at(b"x", 0).unwrap();
                    begun.store(true, Ordering::Relaxed);
                }
            });
            while !begun.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            // Byte by byte: long enough for the other thread to have its turn, unless the machine is busy.
            let read = (0..5).map(|_| hash(1)).find(Result::is_err);
            stop.store(true, Ordering::Relaxed);
            assert!(matches!(read, Some(Err(ScanError::ChangedWhileReading { .. }))), "{read:?}");
        });
        let HashedFile { content, .. } = hash(4096).unwrap();
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
