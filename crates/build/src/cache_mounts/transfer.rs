//! Cache mounts as users handle them: found by ID, written as a tar, made of one.

use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_layer::{DiffError, DiffOptions, ExtractOptions, TreeForm, bounded_decoder};
use kiln_llb::Sharing;
use kiln_snapshotter::disk_bytes;

use super::{Cache, CacheMountInfo, Kind, Want, cache_mounts, directory, is_number, open_dir, try_lock};
use crate::input::open_stream;
use crate::world::unreadable;
use crate::{BuildCancel, BuildError, Engine, OpError};

/// What a mount that names neither mode nor owner gets.
const DEFAULT_MODE: u32 = 0o755;

/// A new content for a cache mount.
#[derive(Debug, Clone)]
pub struct CacheMountImport {
    /// ID, or the name of a cache mount that is there.
    pub id: String,
    /// A tar (plain, gzip, zstd or xz), or `-` for standard input.
    pub source: PathBuf,
    /// Permission bits of the directory; `None`: 0755, or as they are.
    pub mode: Option<u32>,
    /// Owner of the directory; `None`: root, or as it is.
    pub uid: Option<u32>,
    /// Its group.
    pub gid: Option<u32>,
    /// Replace what is there.
    pub force: bool,
}

/// What a cache mount takes on disk. Costs O(files).
///
/// # Errors
/// When it cannot be read.
pub fn cache_mount_bytes(store: &Path, mount: &CacheMountInfo) -> Result<u64, BuildError> {
    Ok(disk_bytes(&directory(store).join(&mount.name))?)
}

/// Those of `mounts` that `text` means: all with this ID, or the one whose name begins so.
///
/// # Errors
/// [`BuildError::NoCacheMount`]; [`BuildError::ManyCacheMounts`] when it is the beginning of several
/// names.
pub fn find_cache_mounts<'a>(
    mounts: &'a [CacheMountInfo],
    text: &str,
) -> Result<Vec<&'a CacheMountInfo>, BuildError> {
    let same: Vec<_> = mounts.iter().filter(|mount| mount.record.id == text).collect();
    if !same.is_empty() {
        return Ok(same);
    }
    let begins = |mount: &&CacheMountInfo| !text.is_empty() && mount.name.starts_with(text);
    match mounts.iter().filter(begins).collect::<Vec<_>>() {
        found if found.is_empty() => Err(BuildError::NoCacheMount { id: text.to_owned() }),
        found if found.len() > 1 => Err(many(text, &found)),
        found => Ok(found),
    }
}

/// The one that `text` means.
fn find_one<'a>(mounts: &'a [CacheMountInfo], text: &str) -> Result<&'a CacheMountInfo, BuildError> {
    match find_cache_mounts(mounts, text)?.as_slice() {
        [one] => Ok(one),
        several => Err(many(text, several)),
    }
}

fn many(text: &str, found: &[&CacheMountInfo]) -> BuildError {
    let names = found.iter().map(|mount| mount.short().to_owned()).collect();
    BuildError::ManyCacheMounts { id: text.to_owned(), names }
}

/// How many steps use each of `mounts` now, in their order: a step holds a lock on its copy.
pub fn cache_mount_users(store: &Path, mounts: &[CacheMountInfo]) -> Vec<usize> {
    // Locks of other process namespaces are not listed: then it is one at least.
    let table = fs::read_to_string("/proc/locks").unwrap_or_default();
    let users = |mount: &CacheMountInfo| {
        let cache = Cache { dir: directory(store).join(&mount.name) };
        let locks = cache.copies().unwrap_or_default();
        let locks = locks.iter().filter_map(|copy| fs::metadata(cache.dir.join(copy).join("lock")).ok());
        let held = locks.map(|lock| holders(&table, &lock)).sum();
        if mount.in_use { usize::max(held, 1) } else { 0 }
    };
    mounts.iter().map(users).collect()
}

/// Lines of a `/proc/locks` about a file: `1: FLOCK ADVISORY READ 42 fd:01:4711 0 EOF`.
fn holders(table: &str, file: &fs::Metadata) -> usize {
    let (dev, inode) = (file.dev(), file.ino());
    let place = format!("{:02x}:{:02x}:{inode}", rustix::fs::major(dev), rustix::fs::minor(dev));
    table.lines().filter(|line| line.split_whitespace().nth(5) == Some(&place)).count()
}

/// Writes what is in a cache mount as a tar; `path` is for messages. No step has an exclusive use of
/// it meanwhile; one that shares it may begin.
///
/// # Errors
/// [`BuildError::NoCacheMount`], [`BuildError::ManyCacheMounts`], [`BuildError::CacheMountInUse`];
/// [`BuildError::Output`] when `out` does not take it.
pub fn export_cache_mount(
    engine: &Engine,
    id: &str,
    path: &Path,
    out: &mut dyn Write,
    cancel: &BuildCancel,
) -> Result<(), BuildError> {
    let root = engine.store.root();
    let mounts = cache_mounts(root).map_err(unreadable(root))?;
    let mount = find_one(&mounts, id)?;
    let failed = |source| BuildError::CacheMount { id: mount.record.id.clone(), source };
    let cache = Cache { dir: directory(root).join(&mount.name) };
    let (data, _lock) = cache.hold_first().map_err(failed)?.ok_or_else(|| in_use(mount))?;
    let options = DiffOptions { form: TreeForm::Archive, root_entry: false, cancel: cancel.flag() };
    match kiln_layer::diff(data.as_fd(), &mut *out, &options) {
        Ok(_) => Ok(()),
        Err(DiffError::Output(source)) => Err(BuildError::Output { path: path.to_owned(), source }),
        Err(error) => Err(failed(io::Error::other(error))),
    }
}

/// Makes a cache mount of a tar, as `ADD` unpacks one, within the engine's limits.
///
/// # Errors
/// [`BuildError::CacheMountExists`] without `force`, [`BuildError::CacheMountInUse`] with it;
/// [`BuildError::ManyCacheMounts`]; [`BuildError::CacheTar`] for what is wrong with the tar. What was
/// there is there still.
pub fn import_cache_mount(
    engine: &Engine,
    import: &CacheMountImport,
    cancel: &BuildCancel,
) -> Result<CacheMountInfo, BuildError> {
    let root = engine.store.root();
    let mounts = cache_mounts(root).map_err(unreadable(root))?;
    let mut want = Want {
        id: import.id.clone(),
        sharing: Sharing::Shared,
        mode: import.mode.unwrap_or(DEFAULT_MODE),
        uid: import.uid.unwrap_or(0),
        gid: import.gid.unwrap_or(0),
        seed: None,
    };
    let chosen = import.mode.is_some() || import.uid.is_some() || import.gid.is_some();
    let found = if chosen {
        mounts.iter().find(|mount| mount.name == want.name())
    } else {
        match find_one(&mounts, &import.id) {
            Err(BuildError::NoCacheMount { .. }) => None,
            other => Some(other?),
        }
    };
    let name = found.map_or_else(|| want.name(), |mount| mount.name.clone());
    let cache = Cache { dir: directory(root).join(&name) };
    if let Some(mount) = found {
        want.id.clone_from(&mount.record.id);
        if !import.force {
            return Err(BuildError::CacheMountExists { id: want.id });
        }
        if let Ok(data) = fs::metadata(cache.dir.join("0/data")) {
            (want.mode, want.uid, want.gid) = (data.mode() & 0o7777, data.uid(), data.gid());
        }
    }
    let failed = |source| BuildError::CacheMount { id: want.id.clone(), source };
    let busy = || BuildError::CacheMountInUse { id: want.id.clone() };
    let guard = cache.try_lock().map_err(failed)?.ok_or_else(busy)?;
    cache.check_version().map_err(failed)?;
    if cache.in_use().map_err(failed)? {
        return Err(busy());
    }
    let fill = |dir: BorrowedFd<'_>| Ok(unpack(engine, import, &want.id, dir, cancel)?);
    let made = cache.replace(&want, &fill);
    if made.is_err() && cache.record().is_none() {
        // Nothing has come of it.
        let _ = super::remove_tree(&cache.dir);
    }
    drop(guard);
    made.map_err(|error| match error {
        OpError::Build(inner) => *inner,
        OpError::CacheMount { id, source } => BuildError::CacheMount { id, source },
        other => BuildError::CacheMount { id: want.id.clone(), source: io::Error::other(other) },
    })?;
    let record = cache.record().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    Ok(CacheMountInfo { name, record, in_use: false })
}

fn unpack(
    engine: &Engine,
    import: &CacheMountImport,
    id: &str,
    dir: BorrowedFd<'_>,
    cancel: &BuildCancel,
) -> Result<(), BuildError> {
    let source = &import.source;
    let unreadable = |error| BuildError::Unreadable { path: source.clone(), source: error };
    let (input, _) = open_stream(source, cancel).map_err(unreadable)?;
    let (_, plain) =
        bounded_decoder(BufReader::with_capacity(256 << 10, input), &engine.limits).map_err(unreadable)?;
    let options = ExtractOptions { owner: None, limits: engine.limits, cancel: cancel.flag() };
    kiln_layer::extract(plain, dir, &options)
        .map_err(|source| BuildError::CacheTar { id: id.to_owned(), source })?;
    Ok(())
}

fn in_use(mount: &CacheMountInfo) -> BuildError {
    BuildError::CacheMountInUse { id: mount.record.id.clone() }
}

impl CacheMountInfo {
    /// The beginning of its name, as users see it.
    pub fn short(&self) -> &str {
        self.name.get(..12).unwrap_or(&self.name)
    }
}

impl Cache {
    /// The copy that the next step would get, held against exclusive use; `None`: somebody uses it.
    fn hold_first(&self) -> io::Result<Option<(File, File)>> {
        let Some(_guard) = self.try_lock()? else { return Ok(None) };
        self.check_version()?;
        if self.in_use()? {
            return Ok(None);
        }
        let names = self.copies()?;
        let first = names.iter().filter(|name| is_number(name)).min_by_key(|name| name.parse::<u32>().ok());
        let Some(name) = first else { return Ok(None) };
        let copy = self.dir.join(name);
        let Some(lock) = try_lock(&copy.join("lock"), Kind::Shared)? else { return Ok(None) };
        Ok(Some((open_dir(&copy.join("data"))?, lock)))
    }

    /// Lets a new copy, filled by `fill`, stand in the place of all there are. Needs the lock.
    fn replace(&self, want: &Want, fill: super::Fill<'_>) -> Result<(), OpError> {
        let failed = |source| OpError::CacheMount { id: want.id.clone(), source };
        // Under a name that is no copy's, so that a failure leaves what was there.
        let new = self.dir.join("new");
        super::remove_tree(&new).map_err(failed)?;
        let made = self.make(want, fill, &new);
        if made.is_err() {
            let _ = super::remove_tree(&self.dir.join("tmp"));
        }
        made?;
        self.retire().map_err(failed)?;
        fs::rename(&new, self.dir.join("0")).map_err(failed)?;
        self.sweep().map_err(failed)?;
        self.touch(&want.id).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_of_a_lock_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let open = || File::options().write(true).create(true).truncate(false).open(&path).unwrap();
        let (one, two) = (open(), open());
        let count = || holders(&fs::read_to_string("/proc/locks").unwrap(), &fs::metadata(&path).unwrap());
        // The kernel gives the list out in pieces, between which others lock and unlock: a line may be missed, or come
        // twice.
        let becomes = |expected: usize| {
            let begun = std::time::Instant::now();
            while count() != expected {
                assert!(begun.elapsed().as_secs() < 10, "{} and not {expected}", count());
            }
        };
        becomes(0);
        one.lock_shared().unwrap();
        two.lock_shared().unwrap();
        becomes(2);
        drop(two);
        becomes(1);
    }

    #[test]
    fn ids_go_before_names() {
        let mount = |name: &str, id: &str| {
            let record = serde_json::json!({"version": 1, "id": id, "created_unix": 1, "last_used_unix": 1});
            CacheMountInfo {
                name: name.to_owned(),
                record: serde_json::from_value(record).unwrap(),
                in_use: false,
            }
        };
        let all = [mount("aa11", "npm"), mount("aa22", "npm"), mount("bb33", "aa")];
        let names = |text| {
            let found = find_cache_mounts(&all, text);
            found.map(|found| found.iter().map(|mount| mount.name.clone()).collect::<Vec<_>>())
        };
        assert_eq!(names("npm").unwrap(), ["aa11", "aa22"]);
        assert_eq!(names("aa").unwrap(), ["bb33"]);
        assert_eq!(names("aa2").unwrap(), ["aa22"]);
        assert!(matches!(names("a"), Err(BuildError::ManyCacheMounts { .. })));
        for absent in ["", "c", "aa222"] {
            assert!(matches!(names(absent), Err(BuildError::NoCacheMount { .. })), "{absent}");
        }
        assert!(matches!(find_one(&all, "npm"), Err(BuildError::ManyCacheMounts { .. })));
    }
}
