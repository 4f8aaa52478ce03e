//! What a directory went through, and what a power cut may leave of it.
//!
//! A [`Disk`] is a log of changes: entries of directories, bytes of files, and the syncs between them.
//! [`Disk::crash`] cuts the log somewhere and makes up what the disk may hold then. What a sync
//! covers is there. Of all else:
//! - each entry that was made, moved or removed since may have arrived or not, in order or not; a
//!   rename arrives as a whole, and whether or not the bytes of its file do;
//! - of a file's bytes any beginning, some blocks, none, or none but the size may have arrived.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chownat, lgetxattr, llistxattr,
    lsetxattr, mknodat, utimensat,
};

use crate::random::Random;

/// What a disk writes as a whole.
const BLOCK_BYTES: usize = 4096;
/// What a torn block is torn at.
const SECTOR_BYTES: usize = 512;

type NodeId = usize;

const ROOT: NodeId = 0;

#[derive(Debug, Clone)]
enum Kind {
    Dir,
    File,
    Link(PathBuf),
    Device { raw_mode: u32, device: u64 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    modified: (i64, i64),
    extended: Vec<(OsString, Vec<u8>)>,
}

#[derive(Debug)]
struct Node {
    kind: Kind,
    /// As it was made.
    attributes: Attributes,
    /// As a program sees it now.
    content: Vec<u8>,
}

/// What a sync covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// `syncfs`
    All,
    /// `fsync` or `fdatasync` of a file: its bytes, not its name.
    File,
    /// `fsync` of a directory: its entries.
    Dir,
}

#[derive(Debug)]
enum Change {
    Attributes(NodeId, Attributes),
    Entry { dir: NodeId, name: OsString, node: Option<NodeId> },
    Move { from: (NodeId, OsString), to: (NodeId, OsString), node: NodeId },
    Write { node: NodeId, at: usize, bytes: Vec<u8> },
    Resize { node: NodeId, size: usize },
    Sync(Sync, NodeId),
}

impl Change {
    /// The file whose bytes it changes.
    fn file(&self) -> Option<NodeId> {
        match self {
            Change::Write { node, .. } | Change::Resize { node, .. } => Some(*node),
            _ => None,
        }
    }
}

/// A directory as programs see it, and how it came to be so.
#[derive(Debug, Default)]
pub struct Disk {
    nodes: Vec<Node>,
    names: HashMap<(NodeId, OsString), NodeId>,
    log: Vec<Change>,
    /// Syncs that are not believed.
    ignored: Vec<Sync>,
    /// Files that were synced before they had a name that is known here, by device and inode, with
    /// what they were like.
    nameless: HashMap<(u64, u64), (u64, i64, i64)>,
}

impl Disk {
    /// The directory at `root`, as if all of it had been synced.
    ///
    /// # Errors
    /// When something below it cannot be read.
    pub fn of(root: &Path) -> io::Result<Self> {
        let mut disk = Self::default();
        disk.adopt_node(root, &mut HashMap::new())?;
        disk.log.push(Change::Sync(Sync::All, ROOT));
        Ok(disk)
    }

    /// How many changes there have been: a place in the log.
    pub fn now(&self) -> usize {
        self.log.len()
    }

    /// From now on, crashes are made up as if the disk did nothing on these syncs.
    pub fn ignore(&mut self, sync: Sync) {
        self.ignored.push(sync);
    }

    /// Whether `path`, relative to the root, is there.
    pub fn contains(&self, path: &Path) -> bool {
        self.find(path).is_some()
    }

    fn find(&self, path: &Path) -> Option<NodeId> {
        path.iter().try_fold(ROOT, |dir, name| self.names.get(&(dir, name.to_owned())).copied())
    }

    /// The directory a path is in, and its name there.
    fn place(&self, path: &Path) -> Option<(NodeId, OsString)> {
        Some((self.find(path.parent()?)?, path.file_name()?.to_owned()))
    }

    /// Takes in what is at `real`, with all below it, as new at `path`. `false`: its directory is not
    /// known.
    pub(crate) fn adopt(&mut self, path: &Path, real: &Path) -> io::Result<bool> {
        let Some((dir, name)) = self.place(path) else { return Ok(false) };
        let node = self.adopt_node(real, &mut HashMap::new())?;
        self.names.insert((dir, name.clone()), node);
        self.log.push(Change::Entry { dir, name, node: Some(node) });
        Ok(true)
    }

    fn adopt_node(&mut self, real: &Path, seen: &mut HashMap<(u64, u64), NodeId>) -> io::Result<NodeId> {
        let metadata = fs::symlink_metadata(real)?;
        if let Some(known) = seen.get(&(metadata.dev(), metadata.ino())) {
            return Ok(*known);
        }
        let kind = match metadata.file_type() {
            kind if kind.is_dir() => Kind::Dir,
            kind if kind.is_file() => Kind::File,
            kind if kind.is_symlink() => Kind::Link(fs::read_link(real)?),
            _ => Kind::Device { raw_mode: metadata.mode(), device: metadata.rdev() },
        };
        let is_file = matches!(kind, Kind::File);
        let is_dir = matches!(kind, Kind::Dir);
        let id = self.nodes.len();
        let attributes = attributes(real, &metadata)?;
        self.nodes.push(Node { kind, attributes, content: Vec::new() });
        seen.insert((metadata.dev(), metadata.ino()), id);
        if is_file {
            let content = fs::read(real)?;
            self.observe_node(id, content);
            let like = (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
            if self.nameless.get(&(metadata.dev(), metadata.ino())) == Some(&like) {
                self.log.push(Change::Sync(Sync::File, id));
            }
        }
        if is_dir {
            for entry in fs::read_dir(real)? {
                let entry = entry?;
                let node = self.adopt_node(&entry.path(), seen)?;
                self.names.insert((id, entry.file_name()), node);
                self.log.push(Change::Entry { dir: id, name: entry.file_name(), node: Some(node) });
            }
        }
        Ok(id)
    }

    /// Notes what a file holds now.
    pub(crate) fn observe(&mut self, path: &Path, content: Vec<u8>) {
        if let Some(node) = self.find(path) {
            self.observe_node(node, content);
        }
    }

    fn observe_node(&mut self, node: NodeId, content: Vec<u8>) {
        let old = std::mem::take(&mut self.nodes[node].content);
        if content.len() < old.len() {
            self.log.push(Change::Resize { node, size: content.len() });
        }
        let same = old.iter().zip(&content).take_while(|(old, new)| old == new).count();
        let mut end = content.len();
        if content.len() <= old.len() {
            // Only what differs was written, as far as one can tell.
            let rest = same..end;
            end -= rest.rev().take_while(|&at| old[at] == content[at]).count();
        }
        if same < end {
            self.log.push(Change::Write { node, at: same, bytes: content[same..end].to_vec() });
        }
        self.nodes[node].content = content;
    }

    /// Notes the attributes that the thing at `path` has now.
    pub(crate) fn observe_attributes(&mut self, path: &Path, real: &Path) -> io::Result<()> {
        if let Some(node) = self.find(path) {
            let now = attributes(real, &fs::symlink_metadata(real)?)?;
            self.log.push(Change::Attributes(node, now));
        }
        Ok(())
    }

    pub(crate) fn rename(&mut self, from: &Path, to: &Path) -> bool {
        let (Some(node), Some(from), Some(to)) = (self.find(from), self.place(from), self.place(to)) else {
            return false;
        };
        self.names.remove(&from);
        self.names.insert(to.clone(), node);
        self.log.push(Change::Move { from, to, node });
        true
    }

    pub(crate) fn link(&mut self, from: &Path, to: &Path) -> bool {
        let (Some(node), Some((dir, name))) = (self.find(from), self.place(to)) else { return false };
        self.names.insert((dir, name.clone()), node);
        self.log.push(Change::Entry { dir, name, node: Some(node) });
        true
    }

    pub(crate) fn remove(&mut self, path: &Path) {
        let Some((dir, name)) = self.place(path) else { return };
        if self.names.remove(&(dir, name.clone())).is_some() {
            self.log.push(Change::Entry { dir, name, node: None });
        }
    }

    pub(crate) fn sync(&mut self, path: &Path) {
        let Some(node) = self.find(path) else { return };
        let sync = if matches!(self.nodes[node].kind, Kind::Dir) { Sync::Dir } else { Sync::File };
        self.log.push(Change::Sync(sync, node));
    }

    /// A file without a name that is known here was synced.
    pub(crate) fn sync_nameless(&mut self, file: &fs::Metadata) {
        let like = (file.len(), file.mtime(), file.mtime_nsec());
        self.nameless.insert((file.dev(), file.ino()), like);
    }

    pub(crate) fn sync_all(&mut self) {
        self.log.push(Change::Sync(Sync::All, ROOT));
    }

    /// Which of the first `at` changes the disk has promised to keep.
    fn promised(&self, at: usize) -> Vec<bool> {
        let mut all = false;
        let mut nodes: HashMap<NodeId, ()> = HashMap::new();
        let mut promised = vec![false; at];
        for (number, change) in self.log[..at].iter().enumerate().rev() {
            let synced = |node: &NodeId| nodes.contains_key(node);
            promised[number] = all
                || match change {
                    Change::Attributes(node, _)
                    | Change::Write { node, .. }
                    | Change::Resize { node, .. } => synced(node),
                    Change::Entry { dir, .. } => synced(dir),
                    Change::Move { from, to, .. } => synced(&from.0) || synced(&to.0),
                    Change::Sync(..) => true,
                };
            match change {
                // What was there before all this is there.
                Change::Sync(Sync::All, _) if number == self.first_sync() => all = true,
                Change::Sync(sync, _) if self.ignored.contains(sync) => {}
                Change::Sync(Sync::All, _) => all = true,
                Change::Sync(_, node) => drop(nodes.insert(*node, ())),
                _ => {}
            }
        }
        promised
    }

    fn first_sync(&self) -> usize {
        self.log.iter().position(|change| matches!(change, Change::Sync(..))).unwrap_or(0)
    }

    /// What the disk may hold when the power goes after the first `at` changes.
    ///
    /// # Panics
    /// When there have not been so many.
    pub fn crash(&self, at: usize, random: &mut Random) -> Image<'_> {
        let promised = self.promised(at);
        let loose = |change: &Change| !matches!(change, Change::Sync(..)) && change.file().is_none();
        let open = (0..at).filter(|&n| !promised[n] && loose(&self.log[n])).count();
        let fate = Fate::any(open, random);
        let mut image = Image {
            disk: self,
            names: HashMap::new(),
            attributes: HashMap::new(),
            contents: HashMap::new(),
            story: String::new(),
        };
        let mut nth = 0;
        for (change, promised) in self.log[..at].iter().zip(&promised) {
            if !loose(change) {
                continue;
            }
            if !promised {
                nth += 1;
                if !fate.keeps(nth - 1, random) {
                    continue;
                }
            }
            image.apply(change);
        }
        let data = *[Data::Lost, Data::Sized, Data::Kept, Data::Any, Data::Any]
            .get(random.below(5))
            .expect("less than 5");
        image.contents = self.contents(at, &promised, data, random);
        image.story = format!("cut at {at} of {}, of {open} entries {fate:?}, data {data:?}", self.log.len());
        image
    }

    fn contents(
        &self,
        at: usize,
        promised: &[bool],
        data: Data,
        random: &mut Random,
    ) -> HashMap<NodeId, Vec<u8>> {
        let mut changes: BTreeMap<NodeId, Vec<usize>> = BTreeMap::new();
        for (number, change) in self.log[..at].iter().enumerate() {
            if let Some(node) = change.file() {
                changes.entry(node).or_default().push(number);
            }
        }
        let mut contents = HashMap::new();
        for (node, numbers) in changes {
            let sure = numbers.iter().take_while(|&&number| promised[number]).count();
            let mut content = Vec::new();
            numbers[..sure].iter().for_each(|&number| write(&mut content, &self.log[number]));
            let open: Vec<&Change> = numbers[sure..].iter().map(|&number| &self.log[number]).collect();
            if !open.is_empty() {
                content = data.of_file(content, &open, random);
            }
            contents.insert(node, content);
        }
        contents
    }
}

/// What becomes of entries that no sync covers, counted in the order they were made.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Lost,
    Kept,
    First(usize),
    AllBut(usize),
    /// Each with this probability.
    Some(f64),
}

impl Fate {
    fn any(count: usize, random: &mut Random) -> Self {
        match random.below(5) {
            0 => Self::Lost,
            1 => Self::Kept,
            2 => Self::First(random.below(count + 1)),
            3 => Self::AllBut(random.below(count + 1)),
            _ => Self::Some(random.fraction()),
        }
    }

    fn keeps(self, nth: usize, random: &mut Random) -> bool {
        match self {
            Self::Lost => false,
            Self::Kept => true,
            Self::First(most) => nth < most,
            Self::AllBut(lost) => nth != lost,
            Self::Some(part) => random.fraction() < part,
        }
    }
}

/// What becomes of bytes that no sync covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Data {
    Lost,
    /// The size has arrived, the bytes have not.
    Sized,
    Kept,
    /// Each file fares on its own.
    Any,
}

impl Data {
    fn of_file(self, sure: Vec<u8>, open: &[&Change], random: &mut Random) -> Vec<u8> {
        let after = |count: usize| {
            let mut content = sure.clone();
            open[..count].iter().for_each(|change| write(&mut content, change));
            content
        };
        match self {
            Data::Lost => sure,
            Data::Kept => after(open.len()),
            Data::Sized => {
                let mut content = sure.clone();
                content.resize(after(open.len()).len(), 0);
                content
            }
            Data::Any => match random.below(6) {
                0 => Data::Lost.of_file(sure, open, random),
                1 => Data::Sized.of_file(sure, open, random),
                2 => Data::Kept.of_file(sure, open, random),
                3 => after(random.below(open.len() + 1)),
                4 => {
                    // Some of the next write, up to the end of a sector.
                    let count = random.below(open.len());
                    let (mut content, next) = (after(count), after(count + 1));
                    let cut = random.below(next.len() / SECTOR_BYTES + 2) * SECTOR_BYTES;
                    let cut = cut.min(next.len());
                    content.resize(content.len().max(cut), 0);
                    content[..cut].copy_from_slice(&next[..cut]);
                    content
                }
                _ => {
                    // Each block as it was at some time or other.
                    let mut content = after(random.below(open.len() + 1));
                    let most = open.len().min(12);
                    let versions: Vec<Vec<u8>> =
                        (0..most).map(|_| after(random.below(open.len() + 1))).collect();
                    for block in content.chunks_mut(BLOCK_BYTES).enumerate() {
                        let (number, bytes) = block;
                        let version = &versions[random.below(versions.len())];
                        let start = (number * BLOCK_BYTES).min(version.len());
                        let end = (start + bytes.len()).min(version.len());
                        bytes.fill(0);
                        bytes[..end - start].copy_from_slice(&version[start..end]);
                    }
                    content
                }
            },
        }
    }
}

fn write(content: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write { at, bytes, .. } => {
            let end = at + bytes.len();
            content.resize(content.len().max(end), 0);
            content[*at..end].copy_from_slice(bytes);
        }
        Change::Resize { size, .. } => content.resize(*size, 0),
        _ => {}
    }
}

/// What a power cut left.
#[derive(Debug)]
pub struct Image<'d> {
    disk: &'d Disk,
    names: HashMap<(NodeId, OsString), NodeId>,
    attributes: HashMap<NodeId, &'d Attributes>,
    contents: HashMap<NodeId, Vec<u8>>,
    /// What was lost, in a few words.
    pub story: String,
}

impl<'d> Image<'d> {
    fn apply(&mut self, change: &'d Change) {
        match change {
            Change::Attributes(node, attributes) => drop(self.attributes.insert(*node, attributes)),
            Change::Entry { dir, name, node: Some(node) } => {
                self.names.insert((*dir, name.clone()), *node);
            }
            Change::Entry { dir, name, node: None } => {
                self.names.remove(&(*dir, name.clone()));
            }
            Change::Move { from, to, node } => {
                if self.names.get(from) == Some(node) {
                    self.names.remove(from);
                }
                self.names.insert(to.clone(), *node);
            }
            Change::Write { .. } | Change::Resize { .. } | Change::Sync(..) => {}
        }
    }

    /// Makes the directory `dir`, which must not be there, with all that is left.
    ///
    /// # Errors
    /// When something cannot be made; owners and devices need root.
    pub fn write_to(&self, dir: &Path) -> io::Result<()> {
        let mut below: HashMap<NodeId, Vec<(&OsStr, NodeId)>> = HashMap::new();
        for ((dir, name), node) in &self.names {
            below.entry(*dir).or_default().push((name, *node));
        }
        self.write_node(ROOT, dir, &below, &mut HashMap::new())
    }

    fn write_node(
        &self,
        id: NodeId,
        at: &Path,
        below: &HashMap<NodeId, Vec<(&OsStr, NodeId)>>,
        made: &mut HashMap<NodeId, PathBuf>,
    ) -> io::Result<()> {
        let node = &self.disk.nodes[id];
        match &node.kind {
            Kind::Dir => {
                fs::create_dir(at)?;
                for (name, child) in below.get(&id).into_iter().flatten() {
                    self.write_node(*child, &at.join(name), below, made)?;
                }
            }
            _ if made.contains_key(&id) => return fs::hard_link(&made[&id], at),
            Kind::File => fs::write(at, self.contents.get(&id).map_or(&[][..], Vec::as_slice))?,
            Kind::Link(target) => symlink(target, at)?,
            Kind::Device { raw_mode, device } => {
                let kind = FileType::from_raw_mode(*raw_mode);
                mknodat(CWD, at, kind, Mode::from_raw_mode(raw_mode & 0o7777), *device)?;
            }
        }
        made.insert(id, at.to_owned());
        let attributes = self.attributes.get(&id).copied().unwrap_or(&node.attributes);
        let Attributes { mode, uid, gid, modified, extended } = attributes;
        chownat(CWD, at, Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid)), AtFlags::SYMLINK_NOFOLLOW)?;
        for (name, value) in extended {
            lsetxattr(at, name, value, XattrFlags::empty())?;
        }
        if !matches!(node.kind, Kind::Link(_)) {
            fs::set_permissions(at, fs::Permissions::from_mode(*mode & 0o7777))?;
        }
        let time = Timespec { tv_sec: modified.0, tv_nsec: modified.1 };
        let times = Timestamps { last_access: time, last_modification: time };
        Ok(utimensat(CWD, at, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

fn attributes(real: &Path, metadata: &fs::Metadata) -> io::Result<Attributes> {
    let mut extended = Vec::new();
    let mut names = vec![0; 64 << 10];
    let size = llistxattr(real, &mut names).or_else(|errno| match errno {
        rustix::io::Errno::OPNOTSUPP => Ok(0),
        errno => Err(errno),
    })?;
    for name in names[..size].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = std::os::unix::ffi::OsStrExt::from_bytes(name);
        let name: &OsStr = name;
        let mut value = vec![0; 64 << 10];
        let size = lgetxattr(real, name, &mut value)?;
        value.truncate(size);
        extended.push((name.to_owned(), value));
    }
    Ok(Attributes {
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        extended,
    })
}

#[cfg(test)]
mod tests;
