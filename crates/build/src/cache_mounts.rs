//! `--mount=type=cache`: directories that outlive builds.
//!
//! ```text
//! cache-mounts/<name>/record      what it is, when it was made and used
//!                     lock        held while copies are made, moved or removed
//!                     0/ 1/ …     copies: data/ and a lock that its users hold
//!                     old-… tmp-… copies on their way out and in
//! ```
//!
//! An ID comes from a Dockerfile and never becomes a path: `<name>` is a hash. Locks are on open
//! files and go with their process, so that nothing is ever locked by the dead.

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_llb::Sharing;
use kiln_oci::Digest;
use rustix::fs::{CWD, Mode, OFlags, RenameFlags, fchmod, open, renameat_with};
use serde::{Deserialize, Serialize};

use crate::OpError;
use crate::engine::now_unix;

mod transfer;

pub use transfer::{
    CacheMountImport, cache_mount_bytes, cache_mount_users, export_cache_mount, find_cache_mounts,
    import_cache_mount,
};

/// Between two looks at a lock that somebody else holds.
const PAUSE: Duration = Duration::from_millis(50);
/// Waiting is worth a line in the log after this long.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a cache mount is found by.
///
/// As in BuildKit, mode, owner and seed make different caches of one ID: a directory made for root
/// is of no use to a step of another user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Want {
    pub(crate) id: String,
    pub(crate) sharing: Sharing,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Names what a new cache starts from; `None`: it starts empty.
    pub(crate) seed: Option<String>,
}

impl Want {
    /// The directory's name.
    pub(crate) fn name(&self) -> String {
        let Self { id, sharing: _, mode, uid, gid, seed } = self;
        let seed = seed.as_deref().unwrap_or("");
        // Lengths in front: no two different wants are the same text.
        let text = format!("1 {} {id} {mode:o} {uid} {gid} {} {seed}", id.len(), seed.len());
        Digest::of(text.as_bytes()).hex()[..32].to_owned()
    }
}

/// Version of the records.
const VERSION: u32 = 1;

/// What a cache mount's directory says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheMountRecord {
    version: u32,
    /// The ID that steps know it by.
    pub id: String,
    /// When it was made; seconds since 1970.
    pub created_unix: i64,
    /// When a step last began to use it; seconds since 1970.
    pub last_used_unix: i64,
}

/// The cache mounts of a store, as one build uses them.
pub(crate) struct CacheMounts {
    root: PathBuf,
    /// `--no-cache`: each cache is replaced by an empty one when this build first uses it.
    fresh: bool,
    renewed: Mutex<HashSet<String>>,
}

/// A copy of a cache that nobody replaces or removes while this lives.
#[derive(Debug)]
pub(crate) struct CacheUse {
    data: File,
    _lock: File,
}

impl AsFd for CacheUse {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }
}

/// Somebody to tell, and to be stopped by, while a lock is waited for.
pub(crate) trait Waiting {
    /// Somebody else has held the cache mount `id` for a while.
    fn waiting(&self, id: &str);
    /// The step was given up.
    fn is_cancelled(&self) -> bool;
}

/// Fills a new cache's directory; told by its position which one of those wanted it is.
pub(crate) type Seed<'a> = &'a dyn Fn(usize, BorrowedFd<'_>) -> Result<(), OpError>;

type Fill<'a> = &'a dyn Fn(BorrowedFd<'_>) -> Result<(), OpError>;

impl CacheMounts {
    /// The cache mounts below `store`'s directory.
    pub(crate) fn new(store: &Path, fresh: bool) -> Self {
        Self { root: directory(store), fresh, renewed: Mutex::default() }
    }

    /// Takes a step's cache mounts, in whatever order they were asked for; the same cache twice is
    /// one use. New ones are filled by `seed`.
    ///
    /// # Errors
    /// [`OpError::CacheMount`]; [`ExecError::Cancelled`](kiln_executor::ExecError::Cancelled) when
    /// the step was given up while it waited.
    pub(crate) fn acquire(
        &self,
        wanted: &[Want],
        seed: Seed<'_>,
        waiting: &dyn Waiting,
    ) -> Result<Vec<Arc<CacheUse>>, OpError> {
        // Two steps that want the same caches take them in the same order, so that neither waits
        // for the other for ever.
        let mut order: Vec<(String, usize)> =
            wanted.iter().enumerate().map(|(position, want)| (want.name(), position)).collect();
        order.sort();
        let mut held: HashMap<String, Arc<CacheUse>> = HashMap::new();
        for (name, position) in &order {
            if !held.contains_key(name) {
                let fill = |dir: BorrowedFd<'_>| seed(*position, dir);
                let cache = self.acquire_one(name, &wanted[*position], &fill, waiting)?;
                held.insert(name.clone(), Arc::new(cache));
            }
        }
        Ok(wanted.iter().map(|want| held[&want.name()].clone()).collect())
    }

    fn acquire_one(
        &self,
        name: &str,
        want: &Want,
        fill: Fill<'_>,
        waiting: &dyn Waiting,
    ) -> Result<CacheUse, OpError> {
        let failed = |source| OpError::CacheMount { id: want.id.clone(), source };
        let cache = Cache { dir: self.root.join(name) };
        let started = Instant::now();
        let mut told = false;
        loop {
            if let Some(guard) = cache.try_lock().map_err(failed)? {
                cache.check_version().map_err(failed)?;
                cache.sweep().map_err(failed)?;
                let renew = self.fresh && !self.renewed().contains(name);
                if renew {
                    cache.retire().map_err(failed)?;
                }
                let found = cache.take(want, fill)?;
                if renew {
                    self.renewed().insert(name.to_owned());
                }
                drop(guard);
                if let Some(found) = found {
                    return Ok(found);
                }
            }
            if waiting.is_cancelled() {
                return Err(kiln_executor::ExecError::Cancelled.into());
            }
            if !told && started.elapsed() >= PATIENCE {
                told = true;
                waiting.waiting(&want.id);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn renewed(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        // Plain data: a panic elsewhere leaves nothing half-done in it.
        self.renewed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn directory(store: &Path) -> PathBuf {
    store.join("cache-mounts")
}

/// A cache mount as it is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheMountInfo {
    /// Its directory's name, for [`remove_cache_mount`].
    pub name: String,
    /// What it says of itself.
    pub record: CacheMountRecord,
    /// A step is using it.
    pub in_use: bool,
}

/// The cache mounts of the store at `store`, sorted by name. Reads a small file each; sizes are not
/// counted.
///
/// # Errors
/// When the directory cannot be read.
pub fn cache_mounts(store: &Path) -> io::Result<Vec<CacheMountInfo>> {
    let entries = match fs::read_dir(directory(store)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let cache = Cache { dir: directory(store).join(&name) };
        if let Some(record) = cache.record() {
            // Looked at under the lock: a step that takes a copy meanwhile would find it locked by us.
            let in_use = match cache.try_lock()? {
                Some(_guard) => cache.in_use()?,
                None => true,
            };
            found.push(CacheMountInfo { name, record, in_use });
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

/// Removes a cache mount unless a step uses it; whether it is gone. Costs O(files).
///
/// # Errors
/// When something of it cannot be removed.
pub fn remove_cache_mount(store: &Path, name: &str) -> io::Result<bool> {
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let cache = Cache { dir: directory(store).join(name) };
    if cache.record().is_none() {
        return Ok(true);
    }
    let Some(_guard) = cache.try_lock()? else { return Ok(false) };
    cache.check_version()?;
    if cache.in_use()? {
        return Ok(false);
    }
    remove_tree(&cache.dir)?;
    Ok(true)
}

struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// Makes the directory if it is missing and locks it; `None`: somebody else has it.
    fn try_lock(&self) -> io::Result<Option<File>> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        match try_lock(&self.dir.join("lock"), Kind::Exclusive) {
            // Pruned between the two calls: the next look makes it anew.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other,
        }
    }

    fn record(&self) -> Option<CacheMountRecord> {
        serde_json::from_slice(&fs::read(self.dir.join("record")).ok()?).ok()
    }

    /// Refuses what a newer kiln made.
    fn check_version(&self) -> io::Result<()> {
        match self.record() {
            Some(record) if record.version > VERSION => Err(io::Error::other(format!(
                "it has version {}; this kiln knows versions up to {VERSION}",
                record.version
            ))),
            _ => Ok(()),
        }
    }

    /// Notes that a step uses it now. Written whole under another name first: a reader needs no lock.
    fn touch(&self, id: &str) -> io::Result<()> {
        let now = now_unix();
        let created_unix = self.record().map_or(now, |record| record.created_unix);
        let record =
            CacheMountRecord { version: VERSION, id: id.to_owned(), created_unix, last_used_unix: now };
        let new = self.dir.join("record.new");
        fs::write(&new, serde_json::to_vec(&record)?)?;
        fs::rename(new, self.dir.join("record"))
    }

    /// Names of copies, on their way out and in too.
    fn copies(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.extend(entry.file_name().into_string());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether a step uses a copy. Needs the lock.
    fn in_use(&self) -> io::Result<bool> {
        for name in self.copies()? {
            let path = self.dir.join(name).join("lock");
            if path.exists() && try_lock(&path, Kind::Exclusive)?.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes every copy out of use; steps that have one go on with it. Needs the lock.
    fn retire(&self) -> io::Result<()> {
        let names = self.copies()?;
        let current: Vec<&String> = names.iter().filter(|name| is_number(name)).collect();
        for name in current {
            let free = |nth: &u32| !self.dir.join(format!("old-{nth}")).exists();
            let nth = (0..).find(free).unwrap_or(0);
            fs::rename(self.dir.join(name), self.dir.join(format!("old-{nth}")))?;
        }
        Ok(())
    }

    /// Removes copies that are out of use or were never finished. Needs the lock.
    fn sweep(&self) -> io::Result<()> {
        for name in self.copies()?.iter().filter(|name| !is_number(name)) {
            let copy = self.dir.join(name);
            // Without a lock file it was left half-made by a process that died.
            let lock = copy.join("lock");
            if !lock.exists() || try_lock(&lock, Kind::Exclusive)?.is_some() {
                remove_tree(&copy)?;
            }
        }
        Ok(())
    }

    /// The first copy that `want` may use, made if need be; `None`: wait. Needs the lock.
    fn take(&self, want: &Want, fill: Fill<'_>) -> Result<Option<CacheUse>, OpError> {
        let failed = |source| OpError::CacheMount { id: want.id.clone(), source };
        let kind = match want.sharing {
            Sharing::Shared => Kind::Shared,
            Sharing::Private | Sharing::Locked => Kind::Exclusive,
        };
        for nth in 0u32.. {
            let copy = self.dir.join(nth.to_string());
            if !copy.exists() {
                self.make(want, fill, &copy)?;
            }
            if let Some(lock) = try_lock(&copy.join("lock"), kind).map_err(failed)? {
                self.touch(&want.id).map_err(failed)?;
                let data = open_dir(&copy.join("data")).map_err(failed)?;
                return Ok(Some(CacheUse { data, _lock: lock }));
            }
            if want.sharing == Sharing::Locked {
                return Ok(None);
            }
        }
        Ok(None)
    }

    /// Makes a copy, complete before it has its name.
    fn make(&self, want: &Want, fill: Fill<'_>, copy: &Path) -> Result<(), OpError> {
        let failed = |source| OpError::CacheMount { id: want.id.clone(), source };
        let new = self.dir.join("tmp");
        let data = || -> io::Result<File> {
            // Left by a process that died: the lock on the cache says that nobody else makes one.
            remove_tree(&new)?;
            DirBuilder::new().mode(0o700).create(&new)?;
            File::create(new.join("lock"))?;
            DirBuilder::new().mode(0o700).create(new.join("data"))?;
            open_dir(&new.join("data"))
        };
        let data = data().map_err(failed)?;
        let owned = || -> io::Result<()> {
            // Owner before mode: chown(2) clears setuid bits. The umask has no say.
            kiln_layer::give(data.as_fd(), (want.uid, want.gid))?;
            Ok(fchmod(&data, Mode::from_raw_mode(want.mode & 0o7777))?)
        };
        owned().map_err(failed)?;
        fill(data.as_fd())?;
        renameat_with(CWD, &new, CWD, copy, RenameFlags::NOREPLACE).map_err(|errno| failed(errno.into()))
    }
}

fn is_number(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_digit())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Shared,
    Exclusive,
}

/// Locks the file at `path`, made if it is missing; `None`: somebody else has it, or it is not the
/// file at `path` any more.
fn try_lock(path: &Path, kind: Kind) -> io::Result<Option<File>> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    let locked = match kind {
        Kind::Shared => file.try_lock_shared(),
        Kind::Exclusive => file.try_lock(),
    };
    match locked {
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
        Ok(()) => {}
    }
    let (ours, there) = (file.metadata()?, fs::metadata(path));
    let same = there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()));
    Ok(same.then_some(file))
}

fn open_dir(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(open(path, flags, Mode::empty())?))
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests;
