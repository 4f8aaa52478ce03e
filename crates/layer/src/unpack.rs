//! Makes the members of a tar below a root.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::apply::{ApplyError, Defect, Refusal, Whiteouts, is_kept_xattr};
use crate::beneath;
use crate::index::Timestamp;
use crate::marks;
use crate::node::{self, Attributes, CallError, Named};
use crate::path::{self, PathError};
use crate::tar_header::{Member, MemberKind};
use crate::tar_read::TarReader;

mod implied;
mod links;
mod whiteouts;

use implied::Implied;
pub use implied::{ImpliedDir, Inherited, inherit};
use whiteouts::set_opaque;

/// How much of a file gathers in memory before the disk is asked to begin with it.
const FLUSHED: u64 = 8 << 20;

/// How members become files.
#[derive(Clone, Copy)]
pub(crate) struct Rules<'a> {
    pub(crate) meaning: Meaning,
    pub(crate) owner: Owner,
    pub(crate) cancel: &'a AtomicBool,
}

/// What the tar is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// An image's layer.
    Layer(Whiteouts),
    /// An archive of the user's.
    Archive,
}

/// Whom files belong to.
#[derive(Clone, Copy)]
pub(crate) enum Owner {
    /// As the tar says.
    Tar,
    /// This process.
    Process,
    /// One user and group.
    Fixed(u32, u32),
}

impl Rules<'_> {
    /// `path` of the member `entry` relative to the root.
    pub(crate) fn clean(&self, path: &[u8], entry: &[u8]) -> Result<Vec<u8>, ApplyError> {
        let cleaned = match self.meaning {
            Meaning::Layer(_) => path::normalise(path),
            Meaning::Archive => path::clip(path),
        };
        cleaned.map_err(|error| match error {
            PathError::TooLong(_) if levels(path) > MAX_LEVELS => {
                let (limit, actual) = (MAX_LEVELS as u64, levels(path) as u64);
                ApplyError::Limit { what: "levels of directories in one path", limit, actual }
            }
            PathError::Above => ApplyError::Refused { entry: entry.into(), refusal: Refusal::Escapes },
            other => ApplyError::Broken { entry: entry.into(), defect: Defect::Path(other) },
        })
    }

    fn whiteouts(&self) -> Option<Whiteouts> {
        match self.meaning {
            Meaning::Layer(whiteouts) => Some(whiteouts),
            Meaning::Archive => None,
        }
    }
}

/// Directories that stay open.
const KEPT_PARENTS: usize = 8;

/// Names of directories that are kept until the end, and what it costs to keep them.
const MAX_DIR_NAMES_BYTES: u64 = 64 << 20;

/// In a tree that holds the lower files, the names of all files are.
const MAX_NAMES_BYTES: u64 = 512 << 20;

/// What a name costs beside its bytes.
const NAME_COST_BYTES: u64 = 64;

/// A path of the longest kind has fewer.
const MAX_LEVELS: usize = 2048;

fn levels(path: &[u8]) -> usize {
    path.split(|&b| b == b'/').filter(|name| !name.is_empty()).count()
}

pub(crate) struct Unpacker<'a> {
    root: BorrowedFd<'a>,
    rules: Rules<'a>,
    /// Parents of the last members, the last one first: most neighbours share theirs, links go to and
    /// fro. Forgotten when anything is removed.
    parents: VecDeque<(Vec<u8>, Rc<OwnedFd>)>,
    /// Times of directories, set when nothing is put into them any more.
    dir_mtimes: BTreeMap<Vec<u8>, Timestamp>,
    /// Copies of files that have as many links as the file system allows, by the file's inode: further
    /// links go to them.
    overflow: HashMap<(u64, u64), Vec<u8>>,
    /// What this tar made; whiteouts do not remove it. Kept only for [`Whiteouts::Remove`].
    made: BTreeSet<Vec<u8>>,
    /// What `made` costs.
    made_bytes: u64,
    /// What all other paths cost that are kept.
    kept_bytes: u64,
    /// Directories without an entry.
    implied: Implied,
}

fn host(path: &[u8]) -> impl Fn(CallError) -> ApplyError + '_ {
    move |CallError { call, errno }| match (call, errno) {
        ("fsetxattr" | "lsetxattr", Errno::INVAL) => broken(path, Defect::XattrValue),
        _ => ApplyError::Host { call, entry: path.into(), source: errno.into() },
    }
}

fn broken(path: &[u8], defect: Defect) -> ApplyError {
    ApplyError::Broken { entry: path.into(), defect }
}

fn count_name(sum: &mut u64, name: &[u8], what: &'static str, limit: u64) -> Result<(), ApplyError> {
    *sum += name.len() as u64 + NAME_COST_BYTES;
    if *sum > limit {
        return Err(ApplyError::Limit { what, limit, actual: *sum });
    }
    Ok(())
}

impl<'a> Unpacker<'a> {
    pub(crate) fn new(root: BorrowedFd<'a>, rules: Rules<'a>) -> Self {
        Self {
            root,
            rules,
            parents: VecDeque::new(),
            dir_mtimes: BTreeMap::new(),
            overflow: HashMap::new(),
            made: BTreeSet::new(),
            made_bytes: 0,
            kept_bytes: 0,
            implied: Implied::default(),
        }
    }

    pub(crate) fn rules(&self) -> Rules<'a> {
        self.rules
    }

    /// Makes one member at the cleaned `path`, in place of whatever is there.
    pub(crate) fn unpack(
        &mut self,
        reader: &mut TarReader<'_>,
        path: &[u8],
        member: &Member,
    ) -> Result<(), ApplyError> {
        if path.is_empty() {
            return self.unpack_root(member);
        }
        let (above, name) = path::split(path);
        let parent = self.parent(above)?;
        let parent = parent.as_fd();
        match member.kind {
            MemberKind::File => self.file(reader, parent, name, path, member)?,
            MemberKind::Dir => self.dir(parent, name, path, member)?,
            MemberKind::HardLink => self.hard_link(reader, parent, name, path, member)?,
            MemberKind::Symlink => {
                let target = member.link.as_slice();
                if target.is_empty() || target.len() > 4095 || target.contains(&0) {
                    return Err(broken(path, Defect::LinkTarget));
                }
                self.replace(parent, name, path, "symlinkat", || fs::symlinkat(target, parent, name))?;
                self.implied.has_links = true;
                node::set_on_name(parent, name, true, &self.attributes(member)).map_err(host(path))?;
            }
            MemberKind::Char | MemberKind::Block | MemberKind::Fifo => {
                self.special(parent, name, path, member)?
            }
        }
        self.remember(path)
    }

    /// Sets the directories' times, now that nothing is put into them any more. Returns those that
    /// were made without an entry.
    pub(crate) fn finish(&mut self) -> Result<Vec<ImpliedDir>, ApplyError> {
        self.set_implied_times()?;
        let implied = self.implied_dirs(self.dir_mtimes.keys().map(Vec::as_slice))?;
        for (path, mtime) in std::mem::take(&mut self.dir_mtimes) {
            if path.is_empty() {
                node::set_mtime(self.root, b".", mtime).map_err(host(&path))?;
                continue;
            }
            let (above, name) = path::split(&path);
            let Some(parent) = self.existing(above)? else { continue };
            let stat = node::stat(parent.as_fd(), name).map_err(host(&path))?;
            if stat.is_some_and(|stat| node::kind(&stat) == FileType::Directory) {
                node::set_mtime(parent.as_fd(), name, mtime).map_err(host(&path))?;
            }
        }
        Ok(implied)
    }

    fn unpack_root(&mut self, member: &Member) -> Result<(), ApplyError> {
        if self.rules.meaning == Meaning::Archive {
            return Ok(());
        }
        if member.kind != MemberKind::Dir {
            let entry = member.path.as_slice().into();
            return Err(ApplyError::Refused { entry, refusal: Refusal::ReplacesRoot });
        }
        let root = beneath::open_file(self.root, b"", OFlags::RDONLY | OFlags::DIRECTORY)?;
        let attributes = Attributes { mtime: None, ..self.attributes(member) };
        node::set_on_fd(root.as_fd(), &attributes).map_err(host(b""))?;
        self.dir_mtimes.insert(Vec::new(), member.mtime);
        Ok(())
    }

    fn file(
        &mut self,
        reader: &mut TarReader<'_>,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        member: &Member,
    ) -> Result<(), ApplyError> {
        let mut file = File::from(self.create(parent, name, path)?);
        match &member.sparse {
            None => self.content(reader, &mut file, path, u64::MAX)?,
            Some(map) => {
                for segment in &map.segments {
                    fs::seek(&file, SeekFrom::Start(segment.offset)).named("lseek").map_err(host(path))?;
                    self.content(reader, &mut file, path, segment.length)?;
                }
                // The last hole has nothing behind it that would make the file long enough.
                fs::ftruncate(&file, map.size).named("ftruncate").map_err(host(path))?;
            }
        }
        node::set_on_fd(file.as_fd(), &self.attributes(member)).map_err(host(path))
    }

    /// Writes `left` bytes of the member's content, or what there is.
    fn content(
        &self,
        reader: &mut TarReader<'_>,
        file: &mut File,
        path: &[u8],
        mut left: u64,
    ) -> Result<(), ApplyError> {
        let mut fresh = 0;
        while left > 0 {
            if self.rules.cancel.load(Ordering::Relaxed) {
                return Err(ApplyError::Cancelled);
            }
            let chunk = reader.chunk(path, usize::try_from(left).unwrap_or(usize::MAX))?;
            if chunk.is_empty() {
                break;
            }
            let written = |source: io::Error| ApplyError::Host { call: "write", entry: path.into(), source };
            file.write_all(chunk).map_err(written)?;
            let length = chunk.len();
            reader.consume(length);
            left -= length as u64;
            fresh += length as u64;
            if fresh >= FLUSHED && matches!(self.rules.meaning, Meaning::Layer(_)) {
                begin_writing(file, fresh);
                fresh = 0;
            }
        }
        Ok(())
    }

    fn dir(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        member: &Member,
    ) -> Result<(), ApplyError> {
        let there = node::stat(parent, name).map_err(host(path))?;
        if self.rules.meaning == Meaning::Archive
            && there.as_ref().is_some_and(|stat| node::kind(stat) == FileType::Symlink)
        {
            let real = beneath::real_path(self.root, path)?;
            let (above, name) = path::split(&real);
            if name.is_empty() {
                return Ok(());
            }
            let parent = self.parent(above)?;
            // Real paths have no links left: this comes here once.
            return self.dir(parent.as_fd(), name, &real, member);
        }
        let is_dir = there.as_ref().is_some_and(|stat| node::kind(stat) == FileType::Directory);
        if !is_dir {
            let was_whiteout =
                there.is_some_and(|stat| node::kind(&stat) == FileType::CharacterDevice && stat.st_rdev == 0);
            self.replace(parent, name, path, "mkdirat", || fs::mkdirat(parent, name, Mode::RWXU))?;
            if was_whiteout && self.rules.whiteouts() == Some(Whiteouts::Overlay) {
                // The lower directory stays hidden: whiteouts reach lower layers only, but those fully.
                let made = node::open_dir(parent, name).map_err(host(path))?;
                set_opaque(made.as_fd()).map_err(host(path))?;
                self.note_opaque(path, true)?;
            }
        }
        let made = node::open_dir(parent, name).map_err(host(path))?;
        if is_dir && self.rules.whiteouts().is_some() {
            // As an upper directory has it: what the entry does not say, the directory has not.
            let gone = |name: &[u8]| is_kept_xattr(name) && !member.xattrs.contains_key(name);
            node::remove_xattrs(made.as_fd(), gone).map_err(host(path))?;
        }
        let attributes = Attributes { mtime: None, ..self.attributes(member) };
        node::set_on_fd(made.as_fd(), &attributes).map_err(host(path))?;
        if self.dir_mtimes.insert(path.to_vec(), member.mtime).is_none() {
            self.count_kept(path)?;
        }
        Ok(())
    }

    /// Opens a new file to write.
    fn create(&mut self, parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<OwnedFd, ApplyError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        self.replace(parent, name, path, "openat", || fs::openat(parent, name, flags, mode))
    }

    fn special(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        member: &Member,
    ) -> Result<(), ApplyError> {
        let (kind, device) = match member.kind {
            MemberKind::Char if member.device == (0, 0) => {
                return Err(ApplyError::Refused { entry: path.into(), refusal: Refusal::OverlayDevice });
            }
            MemberKind::Char => (FileType::CharacterDevice, member.device),
            MemberKind::Block => (FileType::BlockDevice, member.device),
            _ => (FileType::Fifo, (0, 0)),
        };
        let number = fs::makedev(device.0, device.1);
        // The kernel packs 12 and 20 bits; more would come out as another device, perhaps 0:0.
        if device.0 > 0xfff || device.1 > 0xf_ffff {
            return Err(broken(path, Defect::Number("device")));
        }
        let make = || node::make_node(parent, name, kind, number);
        self.replace(parent, name, path, "mknodat", make)?;
        let attributes = self.attributes(member);
        node::set_on_name(parent, name, false, &attributes).map_err(host(path))?;
        if kind != FileType::Fifo && marks::uses_user_attributes() {
            let device = (kind == FileType::BlockDevice, device.0, device.1);
            node::record_device(parent, name, attributes.owner, device).map_err(host(path))?;
        }
        Ok(())
    }

    /// Runs `make`, which refuses to overwrite; what is in the way is removed first, then.
    fn replace<T>(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        call: &'static str,
        make: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, ApplyError> {
        match make() {
            Err(Errno::EXIST) => {}
            other => return other.named(call).map_err(host(path)),
        }
        self.forget();
        node::remove(parent, name).map_err(host(path))?;
        make().named(call).map_err(host(path))
    }

    fn attributes<'m>(&self, member: &'m Member) -> Attributes<'m> {
        Attributes {
            owner: match self.rules.owner {
                Owner::Tar => Some((member.uid, member.gid)),
                Owner::Process => None,
                Owner::Fixed(uid, gid) => Some((uid, gid)),
            },
            mode: member.mode,
            xattrs: &member.xattrs,
            mtime: Some(member.mtime),
        }
    }

    /// The directory `path`, made if missing.
    fn parent(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>, ApplyError> {
        if let Some(directory) = self.existing(path)? {
            return Ok(directory);
        }
        self.clear_whiteouts(path)?;
        self.clear_lower_file(path)?;
        self.imply(path)?;
        let error = || ApplyError::Host {
            call: "openat2",
            entry: path.into(),
            source: io::ErrorKind::NotFound.into(),
        };
        self.existing(path)?.ok_or_else(error)
    }

    /// The directory `path`; `None` when it, or something above it, is not there.
    fn existing(&mut self, path: &[u8]) -> Result<Option<Rc<OwnedFd>>, ApplyError> {
        if let Some(at) = self.parents.iter().position(|(known, _)| known == path) {
            self.parents.swap(0, at);
            return Ok(Some(self.parents[0].1.clone()));
        }
        match beneath::open_file(self.root, path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(directory) => {
                self.keep_times(path)?;
                let directory = Rc::new(directory);
                self.parents.truncate(KEPT_PARENTS - 1);
                self.parents.push_front((path.to_vec(), directory.clone()));
                Ok(Some(directory))
            }
            Err(error) if error.host_kind() == Some(io::ErrorKind::NotFound) => Ok(None),
            Err(error)
                if error.host_kind() == Some(io::ErrorKind::NotADirectory)
                    && (self.has_whiteout_above(path)? || self.lower_file_above(path)?.is_some()) =>
            {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn remember(&mut self, path: &[u8]) -> Result<(), ApplyError> {
        if self.rules.whiteouts() == Some(Whiteouts::Remove) && self.made.insert(path.to_vec()) {
            count_name(&mut self.made_bytes, path, "bytes of names", MAX_NAMES_BYTES)?;
        }
        Ok(())
    }

    /// Counts one more path of a directory that is kept until the end.
    fn count_kept(&mut self, path: &[u8]) -> Result<(), ApplyError> {
        count_name(&mut self.kept_bytes, path, "bytes of directory names", MAX_DIR_NAMES_BYTES)
    }

    fn forget(&mut self) {
        self.parents.clear();
    }
}

/// Lets the disk begin with the last `fresh` bytes before the position of `file`: a layer that comes from
/// outside is synced when it is whole, and there is little left to wait for then. `posix_fadvise(2)`:
/// Linux starts to write the range, and pages stay while they are written.
fn begin_writing(file: &File, fresh: u64) {
    // Advice: the sync meets whatever is wrong.
    if let Ok(end) = fs::tell(file) {
        let _ = fs::fadvise(file, end.saturating_sub(fresh), NonZeroU64::new(fresh), fs::Advice::DontNeed);
    }
}
