//! The overlayfs backend.
//!
//! ```text
//! active/<key>/{fs,work,meta}    committed/<id>/{fs,meta,sharers/}    shared/    trash/    empty/
//! ```

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_oci::{ActiveKey, SnapshotId};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, Mode, OFlags, RenameFlags, Stat, fchmod, fchown, fstat, mkdirat, openat, renameat,
    renameat_with, statat,
};
use rustix::io::Errno;

use crate::disk::disk_bytes_at;
use crate::error::host;
use crate::mount::{MAX_LOWER, Stack, open_dir, overlay};
use crate::sidecar::{self, Links};
use crate::{Changes, Error, Form, LayerForm, OpenOptions, Overhead, Snapshotter};

mod sharing;

/// Snapshots as overlayfs upperdirs. Needs the right to mount.
///
/// Any number of processes may have the same directory open.
#[derive(Debug)]
pub struct Overlay {
    path: PathBuf,
    root: OwnedFd,
    /// Tells apart what this process throws away.
    discarded: AtomicU64,
}

const EMPTY: &str = "empty";
const TRASH: &str = "trash";

impl Overlay {
    /// Opens the snapshots below `root`, which is made if it is not there; its parent must be.
    pub fn open(root: &Path) -> Result<Self, Error> {
        ensure_dir(rustix::fs::CWD, root, 0o700)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(rustix::fs::CWD, root, flags, Mode::empty()).map_err(host("open", root))?;
        for name in ["active", "committed", sharing::SHARED, TRASH] {
            ensure_dir(&dir, Path::new(name), 0o700)?;
        }
        ensure_dir(&dir, Path::new(EMPTY), 0o755)?;
        Ok(Self { path: root.to_owned(), root: dir, discarded: AtomicU64::new(0) })
    }

    /// What the committed snapshot `id` stands on and where its changes are.
    fn links(&self, id: &SnapshotId) -> Result<Links, Error> {
        match sidecar::read(&self.root, &committed(id).join("meta"))? {
            Some(links) => Ok(links),
            None if !self.contains(id) => Err(Error::NoSnapshot(id.clone())),
            None => Err(Error::Damaged { path: committed(id), reason: "its sidecar is missing" }),
        }
    }

    /// `top` and all it stands on, highest first.
    fn stack(&self, top: &SnapshotId) -> Result<Vec<(SnapshotId, Links)>, Error> {
        let mut stack = vec![(top.clone(), self.links(top)?)];
        let mut seen = HashSet::from([top.clone()]);
        while let Some(below) = stack.last().and_then(|(_, links)| links.parent.clone()) {
            let damaged = |reason| Error::Damaged { path: committed(&below), reason };
            if !seen.insert(below.clone()) {
                return Err(damaged("parents form a circle"));
            }
            if stack.len() == MAX_LOWER {
                return Err(Error::TooDeep { limit: MAX_LOWER });
            }
            let links = self.links(&below).map_err(|error| match error {
                Error::NoSnapshot(_) => damaged("another snapshot stands on it, but it is missing"),
                error => error,
            })?;
            stack.push((below, links));
        }
        Ok(stack)
    }

    /// Mounts the stack that ends in `top`, with `extra` directories below it.
    fn mount(
        &self,
        top: Option<&SnapshotId>,
        extra: &[PathBuf],
        upper: Option<&(PathBuf, PathBuf)>,
    ) -> Result<OwnedFd, Error> {
        // overlayfs without an upperdir wants two lowerdirs.
        let least = if upper.is_some() { 1 } else { 2 };
        let attempt = || {
            let mut lower = match top {
                Some(top) => self.lower_of(top)?,
                None => Vec::new(),
            };
            lower.extend(extra.iter().cloned());
            if lower.len() < least {
                lower.push(PathBuf::from(EMPTY));
            }
            overlay(&Stack { root: self.root.as_fd(), lower: &lower, upper: upper.cloned() })
        };
        match attempt() {
            // Somebody removed a snapshot whose changes this stack shares: they have moved, once.
            Err(Error::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => attempt(),
            result => result,
        }
    }

    /// Makes everything below `active/<key>`.
    fn fill_active(&self, dir: &Path, parent: Option<&SnapshotId>) -> Result<(), Error> {
        make_dir(&self.root, &dir.join("work"), 0o700)?;
        make_dir(&self.root, &dir.join("fs"), 0o755)?;
        if let Some(parent) = parent {
            self.root_like(&dir.join("fs"), parent)?;
        }
        sidecar::write(&self.root, &dir.join("meta"), &Links { parent: parent.cloned(), changes: None })
    }

    /// Gives the root directory `dir` the mode and owner of its parent's.
    fn root_like(&self, dir: &Path, parent: &SnapshotId) -> Result<(), Error> {
        let own = committed(parent).join("fs");
        let top = if self.exists(&own) { own } else { self.changes_of(parent, &self.links(parent)?)? };
        self.make_like(dir, &self.stat_dir(&top)?)
    }

    /// Writes the sidecar of the active snapshot in `dir` anew, in one step.
    fn replace_sidecar(&self, dir: &Path, links: &Links) -> Result<(), Error> {
        let (meta, next) = (dir.join("meta"), dir.join("meta.new"));
        sidecar::write(&self.root, &next, links)?;
        renameat(&self.root, &next, &self.root, &meta).map_err(host("rename", &meta))
    }

    /// Gives `dir` the mode and owner of another directory.
    fn make_like(&self, dir: &Path, like: &Stat) -> Result<(), Error> {
        let fd = open_readable(&self.root, dir)?;
        // Owner before mode: chown(2) clears setuid bits.
        let (uid, gid) = (rustix::fs::Uid::from_raw(like.st_uid), rustix::fs::Gid::from_raw(like.st_gid));
        fchown(&fd, Some(uid), Some(gid)).map_err(host("fchown", dir))?;
        fchmod(&fd, Mode::from_raw_mode(like.st_mode & 0o7777)).map_err(host("fchmod", dir))
    }

    fn stat_dir(&self, dir: &Path) -> Result<Stat, Error> {
        fstat(open_dir(&self.root, dir)?).map_err(host("fstat", dir))
    }

    /// Moves `dir` out of sight in one step, then unlinks it. `Ok(false)`: it was not there.
    fn discard(&self, dir: &Path) -> Result<bool, Error> {
        let name = dir.file_name().expect("snapshot directories have names").display();
        let target = loop {
            let nth = self.discarded.fetch_add(1, Ordering::Relaxed);
            let target = Path::new(TRASH).join(format!("{name}.{}.{nth}", std::process::id()));
            match renameat_with(&self.root, dir, &self.root, &target, RenameFlags::NOREPLACE) {
                Ok(()) => break target,
                Err(Errno::NOENT) => return Ok(false),
                // A process with our id died before it emptied its trash.
                Err(Errno::EXIST | Errno::NOTEMPTY) => {}
                Err(errno) => return Err(host("rename", dir)(errno)),
            }
        };
        remove_tree(&self.path.join(target))?;
        Ok(true)
    }

    /// Gives a complete active snapshot its name, in one step.
    fn publish(&self, key: &ActiveKey, id: &SnapshotId) -> Result<(), Error> {
        match renameat_with(&self.root, active(key), &self.root, committed(id), RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST | Errno::NOTEMPTY) => Err(Error::IdTaken(id.clone())),
            Err(errno) => Err(host("rename", active(key))(errno)),
        }
    }

    fn names(&self, dir: impl AsRef<Path>) -> Result<Vec<String>, Error> {
        let path = self.path.join(dir);
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).map_err(host("readdir", &path))? {
            let name = entry.map_err(host("readdir", &path))?.file_name();
            names.extend(name.into_string());
        }
        names.sort();
        Ok(names)
    }

    fn exists(&self, dir: &Path) -> bool {
        statat(&self.root, dir, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// The parent of an active snapshot.
    fn active_parent(&self, key: &ActiveKey) -> Result<Option<SnapshotId>, Error> {
        match sidecar::read(&self.root, &active(key).join("meta"))? {
            Some(links) => Ok(links.parent),
            None if !self.exists(&active(key)) => Err(Error::NoActive(key.clone())),
            None => Err(Error::Damaged { path: active(key), reason: "its sidecar is missing" }),
        }
    }
}

impl Snapshotter for Overlay {
    fn prepare(&self, key: &ActiveKey, parent: Option<&SnapshotId>) -> Result<(), Error> {
        if let Some(parent) = parent.filter(|parent| !self.contains(parent)) {
            return Err(Error::NoParent(parent.clone()));
        }
        let dir = active(key);
        match mkdirat(&self.root, &dir, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(Error::KeyTaken(key.clone())),
            Err(errno) => return Err(host("mkdir", dir)(errno)),
        }
        self.fill_active(&dir, parent).inspect_err(|_| {
            // The first error is the one to tell; what stays is swept as any dead active snapshot.
            let _ = self.discard(&dir);
        })
    }

    fn form(&self) -> LayerForm {
        LayerForm::Changes
    }

    fn set_parent(&self, key: &ActiveKey, parent: &SnapshotId, inherit_root: bool) -> Result<(), Error> {
        self.active_parent(key)?;
        if !self.contains(parent) {
            return Err(Error::NoParent(parent.clone()));
        }
        let dir = active(key);
        if inherit_root {
            self.root_like(&dir.join("fs"), parent)?;
        }
        self.replace_sidecar(&dir, &Links { parent: Some(parent.clone()), changes: None })
    }

    fn open_active(&self, key: &ActiveKey, options: &OpenOptions) -> Result<OwnedFd, Error> {
        let parent = self.active_parent(key)?;
        // A former volatile mount left `incompat/volatile` behind, and the kernel refuses the
        // workdir from then on. It means lost writes after a crash, but keys do not outlive theirs.
        let (dir, work) = (active(key), active(key).join("work"));
        remove_work(&self.path.join(&work))?;
        make_dir(&self.root, &work, 0o700)?;
        self.mount(parent.as_ref(), &options.extra_lower, Some(&(dir.join("fs"), work)))
    }

    fn open_layer(&self, key: &ActiveKey) -> Result<OwnedFd, Error> {
        self.active_parent(key)?;
        open_readable(&self.root, &active(key).join("fs"))
    }

    fn open_view(&self, id: &SnapshotId) -> Result<OwnedFd, Error> {
        self.mount(Some(id), &[], None)
    }

    fn open_changes(&self, id: &SnapshotId) -> Result<Changes, Error> {
        let place = || self.changes_of(id, &self.links(id)?);
        let dir = match open_readable(&self.root, &place()?) {
            // As in `mount`.
            Err(Error::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                open_readable(&self.root, &place()?)?
            }
            result => result?,
        };
        Ok(Changes { dir, form: Form::OverlayUpper })
    }

    fn commit(&self, key: &ActiveKey, id: &SnapshotId) -> Result<(), Error> {
        // Complete or not at all: a snapshot that names no parent must not become one.
        self.active_parent(key)?;
        if self.is_taken(id) {
            return Err(Error::IdTaken(id.clone()));
        }
        remove_work(&self.path.join(active(key)).join("work"))?;
        self.publish(key, id)
    }

    fn commit_layer(&self, key: &ActiveKey, id: &SnapshotId, layer: &SnapshotId) -> Result<(), Error> {
        self.share(key, id, layer)
    }

    fn remove_active(&self, key: &ActiveKey) -> Result<(), Error> {
        if self.discard(&active(key))? { Ok(()) } else { Err(Error::NoActive(key.clone())) }
    }

    fn remove(&self, id: &SnapshotId) -> Result<(), Error> {
        self.release(id)
    }

    fn parent(&self, id: &SnapshotId) -> Result<Option<SnapshotId>, Error> {
        Ok(self.links(id)?.parent)
    }

    fn chain(&self, id: &SnapshotId) -> Result<Vec<SnapshotId>, Error> {
        Ok(self.stack(id)?.into_iter().rev().map(|(id, _)| id).collect())
    }

    fn contains(&self, id: &SnapshotId) -> bool {
        self.exists(&committed(id))
    }

    fn list(&self) -> Result<(Vec<SnapshotId>, Vec<ActiveKey>), Error> {
        // Names that are none of ours were put there by hand; they are nobody's to touch.
        let ids = self.names("committed")?.into_iter().filter_map(|name| name.parse().ok());
        let keys = self.names("active")?.into_iter().filter_map(|name| name.parse().ok());
        Ok((ids.collect(), keys.collect()))
    }

    fn disk_bytes(&self, id: &SnapshotId) -> Result<u64, Error> {
        match disk_bytes_at(&self.root, &committed(id))? {
            0 if !self.contains(id) => Err(Error::NoSnapshot(id.clone())),
            bytes => Ok(bytes),
        }
    }

    fn overhead(&self) -> Result<Overhead, Error> {
        let bytes = |path: &Path| disk_bytes_at(&self.root, path);
        let mut active_bytes = Vec::new();
        for key in self.list()?.1 {
            let bytes = bytes(&active(&key))?;
            active_bytes.push((key, bytes));
        }
        let mut rest_bytes = 0;
        for path in [sharing::SHARED, TRASH, EMPTY] {
            rest_bytes += bytes(Path::new(path))?;
        }
        for path in [".", "active", "committed"] {
            let stat = statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW).map_err(host("stat", path))?;
            rest_bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        }
        Ok(Overhead { active: active_bytes, rest_bytes })
    }

    fn empty_trash(&self) -> Result<usize, Error> {
        self.sweep_shared()?;
        let names = self.names(TRASH)?;
        for name in &names {
            remove_tree(&self.path.join(TRASH).join(name))?;
        }
        Ok(names.len())
    }
}

fn active(key: &ActiveKey) -> PathBuf {
    Path::new("active").join(key.as_str())
}

fn committed(id: &SnapshotId) -> PathBuf {
    Path::new("committed").join(id.as_str())
}

fn open_readable(root: impl AsFd, path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(root, path, flags, Mode::empty()).map_err(host("openat", path))
}

/// Makes a directory with exactly `mode`, whatever the umask is.
fn make_dir(at: impl AsFd, path: &Path, mode: u32) -> Result<(), Error> {
    mkdirat(&at, path, Mode::RWXU).map_err(host("mkdir", path))?;
    if mode != 0o700 {
        fchmod(open_readable(&at, path)?, Mode::from_raw_mode(mode)).map_err(host("fchmod", path))?;
    }
    Ok(())
}

/// Makes a directory unless it is there.
fn ensure_dir(at: impl AsFd, path: &Path, mode: u32) -> Result<(), Error> {
    match make_dir(at, path, mode) {
        Err(Error::Host { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// Removes a workdir. The kernel makes `work/work` with mode 000, which only root can list.
fn remove_work(work: &Path) -> Result<(), Error> {
    // Not there before the first mount; if it cannot be changed, the removal will say why.
    let _ = fs::set_permissions(work.join("work"), fs::Permissions::from_mode(0o700));
    remove_tree(work)
}

/// Removes a tree; another process may be removing it too.
fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(host("unlink", path)),
    }
}
