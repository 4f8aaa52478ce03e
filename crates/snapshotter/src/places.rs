//! The directories that every backend keeps its snapshots in.
//!
//! ```text
//! active/<key>/{fs,meta,…}    committed/<id>/{fs,meta,…}    trash/    form
//! ```

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use kiln_oci::{ActiveKey, SnapshotId};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RenameFlags, Stat, fchmod, fchown, fstat, mkdirat, openat, renameat,
    renameat_with, statat,
};
use rustix::io::Errno;

use crate::disk::disk_bytes_at;
use crate::error::host;
use crate::mount::{MAX_LOWER, open_dir};
use crate::sidecar::{self, Links};
use crate::{Error, LayerForm, Needs, Overhead};

const TRASH: &str = "trash";
const FORM: &str = "form";
/// Far longer than any file of that name.
const MAX_FORM_BYTES: u64 = 64;

/// A directory of snapshots.
#[derive(Debug)]
pub(crate) struct Places {
    pub(crate) path: PathBuf,
    pub(crate) root: OwnedFd,
    /// Tells apart what this process throws away.
    discarded: AtomicU64,
    /// Sidecars of committed snapshots as they were read once: those do not change.
    known: Mutex<HashMap<SnapshotId, Links>>,
}

impl Places {
    /// Opens the snapshots below `root`, which is made if it is not there; its parent must be.
    pub(crate) fn open(root: &Path, form: LayerForm) -> Result<Self, Error> {
        ensure_dir(CWD, root, 0o700)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(CWD, root, flags, Mode::empty()).map_err(host("open", root))?;
        let places =
            Self { path: root.to_owned(), root: dir, discarded: AtomicU64::new(0), known: Mutex::default() };
        match form_of(root)? {
            Some(found) if found != form => return Err(Error::OtherForm { path: root.to_owned(), found }),
            Some(_) => {}
            None => places.write_form(form)?,
        }
        for name in ["active", "committed", TRASH] {
            ensure_dir(&places.root, Path::new(name), 0o700)?;
        }
        Ok(places)
    }

    fn write_form(&self, form: LayerForm) -> Result<(), Error> {
        let next = self.path.join(format!("{FORM}.{}", std::process::id()));
        // Without it nothing here can be read, so a power cut must not leave half of it.
        let written = File::create(&next).and_then(|mut file| {
            file.write_all(text(form))?;
            file.sync_data()
        });
        written.and_then(|()| fs::rename(&next, self.path.join(FORM))).map_err(host("write", &next))
    }

    /// Unlinks what a crash left in the trash; returns how many trees that were.
    pub(crate) fn empty_trash(&self) -> Result<usize, Error> {
        let names = self.names(TRASH)?;
        for name in &names {
            self.remove_tree(&Path::new(TRASH).join(name))?;
        }
        Ok(names.len())
    }

    /// Removes a tree; another process may be removing it too.
    pub(crate) fn remove_tree(&self, path: &Path) -> Result<(), Error> {
        let name = path.file_name().expect("trees of a store have names");
        let parent = open_readable(&self.root, path.parent().unwrap_or(Path::new(".")))?;
        kiln_layer::remove_tree(parent.as_fd(), name.as_encoded_bytes()).map_err(|error| match error {
            kiln_layer::TreeError::Remove { call, source } => {
                Error::Host { call, path: path.to_owned(), source }
            }
            other => Error::Tree { path: path.to_owned(), source: other },
        })
    }

    /// What the committed snapshot `id` stands on and where its changes are.
    pub(crate) fn links(&self, id: &SnapshotId) -> Result<Links, Error> {
        match sidecar::read(&self.root, &committed(id).join("meta"))? {
            Some(links) => Ok(links),
            None if !self.contains(id) => Err(Error::NoSnapshot(id.clone())),
            None => Err(Error::Damaged { path: committed(id), reason: "its sidecar is missing" }),
        }
    }

    /// As [`crate::Snapshotter::needs`].
    pub(crate) fn needs(&self, id: &SnapshotId) -> Result<Needs, Error> {
        let Links { parent, full, .. } = self.links(id)?;
        Ok(Needs { parent, full })
    }

    /// As [`Places::links`], for who opens the snapshot next and sees then whether it is there still.
    fn links_once(&self, id: &SnapshotId) -> Result<Links, Error> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(links) = known().get(id) {
            return Ok(links.clone());
        }
        let links = self.links(id)?;
        known().insert(id.clone(), links.clone());
        Ok(links)
    }

    /// `top` and all it stands on, highest first, to be opened at once: what this process read before is
    /// not read again. A step far up would cost as many reads as there are layers below it.
    pub(crate) fn stack(&self, top: &SnapshotId) -> Result<Vec<(SnapshotId, Links)>, Error> {
        self.walk(top, |id| self.links_once(id))
    }

    fn walk(
        &self,
        top: &SnapshotId,
        links: impl Fn(&SnapshotId) -> Result<Links, Error>,
    ) -> Result<Vec<(SnapshotId, Links)>, Error> {
        let mut stack = vec![(top.clone(), links(top)?)];
        let mut seen = HashSet::from([top.clone()]);
        while let Some(below) = stack.last().and_then(|(_, links)| links.parent.clone()) {
            let damaged = |reason| Error::Damaged { path: committed(&below), reason };
            if !seen.insert(below.clone()) {
                return Err(damaged("parents form a circle"));
            }
            if stack.len() == MAX_LOWER {
                return Err(Error::TooDeep { limit: MAX_LOWER });
            }
            let links = links(&below).map_err(|error| match error {
                Error::NoSnapshot(_) => damaged("another snapshot stands on it, but it is missing"),
                error => error,
            })?;
            stack.push((below, links));
        }
        Ok(stack)
    }

    /// A committed snapshot and all it stands on, lowest first.
    pub(crate) fn chain(&self, id: &SnapshotId) -> Result<Vec<SnapshotId>, Error> {
        Ok(self.walk(id, |id| self.links(id))?.into_iter().rev().map(|(id, _)| id).collect())
    }

    pub(crate) fn contains(&self, id: &SnapshotId) -> bool {
        self.exists(&committed(id))
    }

    /// The names of all committed snapshots, sorted.
    pub(crate) fn committed(&self) -> Result<Vec<SnapshotId>, Error> {
        // Names that are none of ours were put there by hand; they are nobody's to touch.
        Ok(self.names("committed")?.into_iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// The names of all active snapshots, sorted.
    pub(crate) fn active(&self) -> Result<Vec<ActiveKey>, Error> {
        Ok(self.names("active")?.into_iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// As [`crate::Snapshotter::disk_bytes`].
    pub(crate) fn disk_bytes(&self, id: &SnapshotId) -> Result<u64, Error> {
        match disk_bytes_at(&self.root, &committed(id))? {
            0 if !self.contains(id) => Err(Error::NoSnapshot(id.clone())),
            bytes => Ok(bytes),
        }
    }

    /// As [`crate::Snapshotter::overhead`], with what else the backend keeps here.
    pub(crate) fn overhead(&self, others: &[&str]) -> Result<Overhead, Error> {
        let bytes = |path: &Path| disk_bytes_at(&self.root, path);
        let mut active_bytes = Vec::new();
        for key in self.active()? {
            let bytes = bytes(&active(&key))?;
            active_bytes.push((key, bytes));
        }
        let mut rest_bytes = 0;
        for path in others.iter().chain(&[TRASH, FORM]) {
            rest_bytes += bytes(Path::new(path))?;
        }
        for path in [".", "active", "committed"] {
            let stat = statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW).map_err(host("stat", path))?;
            rest_bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        }
        Ok(Overhead { active: active_bytes, rest_bytes })
    }

    /// Makes the active snapshot `key`, with what `fill` puts into its directory.
    pub(crate) fn prepare(
        &self,
        key: &ActiveKey,
        parent: Option<&SnapshotId>,
        fill: impl FnOnce(&Path) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if let Some(parent) = parent.filter(|parent| !self.contains(parent)) {
            return Err(Error::NoParent(parent.clone()));
        }
        let dir = active(key);
        match mkdirat(&self.root, &dir, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(Error::KeyTaken(key.clone())),
            Err(errno) => return Err(host("mkdir", dir)(errno)),
        }
        let links = Links { parent: parent.cloned(), ..Links::default() };
        let filled = fill(&dir).and_then(|()| sidecar::write(&self.root, &dir.join("meta"), &links));
        filled.inspect_err(|_| {
            // The first error is the one to tell; what stays is swept as any dead active snapshot.
            let _ = self.discard(&dir);
        })
    }

    /// Writes the sidecar of the active snapshot in `dir` anew, in one step.
    pub(crate) fn replace_sidecar(&self, dir: &Path, links: &Links) -> Result<(), Error> {
        let (meta, next) = (dir.join("meta"), dir.join("meta.new"));
        sidecar::write(&self.root, &next, links)?;
        renameat(&self.root, &next, &self.root, &meta).map_err(host("rename", &meta))
    }

    /// Gives `dir` the mode and owner of another directory.
    pub(crate) fn make_like(&self, dir: &Path, like: &Stat) -> Result<(), Error> {
        let fd = open_readable(&self.root, dir)?;
        // Owner before mode: chown(2) clears setuid bits.
        let (uid, gid) = (rustix::fs::Uid::from_raw(like.st_uid), rustix::fs::Gid::from_raw(like.st_gid));
        fchown(&fd, Some(uid), Some(gid)).map_err(host("fchown", dir))?;
        fchmod(&fd, Mode::from_raw_mode(like.st_mode & 0o7777)).map_err(host("fchmod", dir))
    }

    /// Where owners are on record only, [`Places::make_like`] does not see them.
    pub(crate) fn copy_record(&self, from: &Path, to: &Path) -> Result<(), Error> {
        if !kiln_layer::has_single_id() {
            return Ok(());
        }
        let (from_fd, to_fd) = (open_readable(&self.root, from)?, open_readable(&self.root, to)?);
        kiln_layer::copy_record(from_fd.as_fd(), to_fd.as_fd()).map_err(|source| Error::Host {
            call: "fsetxattr",
            path: to.to_owned(),
            source,
        })
    }

    pub(crate) fn stat_dir(&self, dir: &Path) -> Result<Stat, Error> {
        fstat(open_dir(&self.root, dir)?).map_err(host("fstat", dir))
    }

    /// Moves `dir` out of sight in one step, then unlinks it. `Ok(false)`: it was not there.
    pub(crate) fn discard(&self, dir: &Path) -> Result<bool, Error> {
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
        self.remove_tree(&target)?;
        Ok(true)
    }

    /// Gives a complete active snapshot its name, in one step.
    pub(crate) fn publish(&self, key: &ActiveKey, id: &SnapshotId) -> Result<(), Error> {
        match renameat_with(&self.root, active(key), &self.root, committed(id), RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST | Errno::NOTEMPTY) => Err(Error::IdTaken(id.clone())),
            Err(errno) => Err(host("rename", active(key))(errno)),
        }
    }

    pub(crate) fn names(&self, dir: impl AsRef<Path>) -> Result<Vec<String>, Error> {
        let path = self.path.join(dir);
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).map_err(host("readdir", &path))? {
            let name = entry.map_err(host("readdir", &path))?.file_name();
            names.extend(name.into_string());
        }
        names.sort();
        Ok(names)
    }

    pub(crate) fn exists(&self, dir: &Path) -> bool {
        statat(&self.root, dir, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// The parent of an active snapshot.
    pub(crate) fn active_parent(&self, key: &ActiveKey) -> Result<Option<SnapshotId>, Error> {
        match sidecar::read(&self.root, &active(key).join("meta"))? {
            Some(links) => Ok(links.parent),
            None if !self.exists(&active(key)) => Err(Error::NoActive(key.clone())),
            None => Err(Error::Damaged { path: active(key), reason: "its sidecar is missing" }),
        }
    }
}

/// What the snapshots below `root` are; `None`: there are none yet.
///
/// # Errors
/// [`Error::Damaged`] when it is of a kind that is not known here.
pub(crate) fn form_of(root: &Path) -> Result<Option<LayerForm>, Error> {
    let path = root.join(FORM);
    let mut found = Vec::new();
    match File::open(&path).and_then(|file| file.take(MAX_FORM_BYTES).read_to_end(&mut found)) {
        Ok(_) => {}
        // Stores were all of one form before there was a file that says so.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(root.join("committed").exists().then_some(LayerForm::Changes));
        }
        Err(error) => return Err(host("read", path)(error)),
    }
    let known = [LayerForm::Changes, LayerForm::Tree].into_iter().find(|&form| text(form) == found);
    known
        .map(Some)
        .ok_or(Error::Damaged { path, reason: "its snapshots are of a form not known to this kiln" })
}

fn text(form: LayerForm) -> &'static [u8] {
    match form {
        LayerForm::Changes => b"1 changes\n",
        LayerForm::Tree => b"1 trees\n",
    }
}

pub(crate) fn active(key: &ActiveKey) -> PathBuf {
    Path::new("active").join(key.as_str())
}

pub(crate) fn committed(id: &SnapshotId) -> PathBuf {
    Path::new("committed").join(id.as_str())
}

pub(crate) fn open_readable(root: impl AsFd, path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(root, path, flags, Mode::empty()).map_err(host("openat", path))
}

/// Makes a directory with exactly `mode`, whatever the umask is.
pub(crate) fn make_dir(at: impl AsFd, path: &Path, mode: u32) -> Result<(), Error> {
    mkdirat(&at, path, Mode::RWXU).map_err(host("mkdir", path))?;
    if mode != 0o700 {
        fchmod(open_readable(&at, path)?, Mode::from_raw_mode(mode)).map_err(host("fchmod", path))?;
    }
    Ok(())
}

/// Makes a directory unless it is there.
pub(crate) fn ensure_dir(at: impl AsFd, path: &Path, mode: u32) -> Result<(), Error> {
    match make_dir(at, path, mode) {
        Err(Error::Host { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}
