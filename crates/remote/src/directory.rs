//! A directory as a store: for a disk that several builds share, or that a CI system keeps.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{
    AtFlags, Dir, Mode, OFlags, ResolveFlags, linkat, mkdirat, openat2, renameat, statat, unlinkat,
};
use rustix::io::Errno;

use crate::store::Exactly;
use crate::{Existing, ObjectName, RemoteError, RemoteStore, Stop};

/// Files on their way in stand here; whoever finds one that is older than a day removes it.
const INCOMING: &str = "incoming";
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// A directory.
///
/// Writers do not wait for each other: a file is written under a name of its own, and moved. Nothing is
/// synced: what a power cut tears has another size or digest, and is written again.
pub struct Directory {
    path: PathBuf,
    root: OwnedFd,
    stop: Stop,
}

/// No link is followed: what stands in the directory may come from anywhere.
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

impl Directory {
    /// The store in the directory `path`, made when it is not there and `create` is set.
    ///
    /// # Errors
    /// [`RemoteError::Host`].
    pub fn open(path: &Path, create: bool, stop: Stop) -> Result<Self, RemoteError> {
        let host = |call, source| RemoteError::Host { call, path: path.to_owned(), source };
        if create {
            fs::create_dir_all(path).map_err(|error| host("mkdir", error))?;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| host("open", errno.into()))?;
        let store = Self { path: path.to_owned(), root, stop };
        if create {
            store.sweep();
        }
        Ok(store)
    }

    fn host(&self, call: &'static str, name: &ObjectName, errno: Errno) -> RemoteError {
        RemoteError::Host { call, path: self.path.join(name.to_string()), source: errno.into() }
    }

    fn go_on(&self) -> Result<(), RemoteError> {
        if (self.stop)() { Err(RemoteError::Stopped) } else { Ok(()) }
    }

    /// An object's file; `None`: there is none, or something else stands in its place.
    fn file(&self, name: &ObjectName) -> Result<Option<(File, u64)>, RemoteError> {
        // NONBLOCK: a named pipe must not hold us here.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = openat2(&self.root, name.to_string(), flags, Mode::empty(), RESOLVE);
        let file = match opened {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => return Ok(None),
            Err(errno) => return Err(self.host("openat2", name, errno)),
        };
        let stat = file.metadata().map_err(|source| RemoteError::Host {
            call: "fstat",
            path: self.path.join(name.to_string()),
            source,
        })?;
        Ok(stat.is_file().then_some((file, stat.len())))
    }

    /// A directory below the root, made when it is not there.
    fn directory(&self, parts: &[String]) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut at: Option<OwnedFd> = None;
        for part in parts {
            let dir = at.as_ref().unwrap_or(&self.root).as_fd();
            let next = match openat2(dir, part.as_str(), flags, Mode::empty(), RESOLVE) {
                Err(Errno::NOENT) => {
                    match mkdirat(dir, part.as_str(), Mode::from_raw_mode(0o777)) {
                        // Another writer.
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(errno),
                    }
                    openat2(dir, part.as_str(), flags, Mode::empty(), RESOLVE)?
                }
                other => other?,
            };
            at = Some(next);
        }
        at.ok_or(Errno::INVAL)
    }

    fn incoming(&self) -> Result<OwnedFd, Errno> {
        self.directory(&[INCOMING.to_owned()])
    }

    /// Removes what writers that were killed left behind, as far as that is possible.
    fn sweep(&self) {
        let Ok(incoming) = self.incoming() else { return };
        let Ok(entries) = Dir::read_from(&incoming) else { return };
        for entry in entries.flatten() {
            let Ok(stat) = statat(&incoming, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let written = Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
            if age.saturating_sub(written) > STALE {
                let _ = unlinkat(&incoming, entry.file_name(), AtFlags::empty());
            }
        }
    }

    fn put_file(
        &self,
        name: &ObjectName,
        incoming: &OwnedFd,
        own: &str,
        content: &mut (dyn Read + Send),
        size_bytes: u64,
        existing: Existing,
    ) -> Result<(), RemoteError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = openat2(incoming, own, flags, Mode::from_raw_mode(0o666), RESOLVE);
        let mut file = File::from(file.map_err(|errno| self.host("openat2", name, errno))?);
        let mut content = Exactly::new(content, size_bytes);
        let mut piece = vec![0; 256 << 10];
        loop {
            self.go_on()?;
            let length = content.read(&mut piece).map_err(RemoteError::Content)?;
            if length == 0 {
                break;
            }
            file.write_all(&piece[..length]).map_err(|source| RemoteError::Host {
                call: "write",
                path: self.path.join(name.to_string()),
                source,
            })?;
        }
        let parts = name.parts();
        let (last, parents) = parts.split_last().expect("a name has parts");
        let parent = self.directory(parents).map_err(|errno| self.host("mkdirat", name, errno))?;
        if existing == Existing::Keep {
            match linkat(incoming, own, &parent, last.as_str(), AtFlags::empty()) {
                Ok(()) | Err(Errno::EXIST) => return Ok(()),
                // Not every file system has hard links: two writers of one name then replace each other.
                Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK) => {}
                Err(errno) => return Err(self.host("linkat", name, errno)),
            }
        }
        renameat(incoming, own, &parent, last.as_str()).map_err(|errno| self.host("renameat", name, errno))
    }
}

impl RemoteStore for Directory {
    fn get_many(&self, names: &[ObjectName], max_bytes: u64) -> Result<Vec<Option<Vec<u8>>>, RemoteError> {
        names
            .iter()
            .map(|name| {
                self.go_on()?;
                let Some((file, _)) = self.file(name)? else { return Ok(None) };
                let mut bytes = Vec::new();
                let path = || self.path.join(name.to_string());
                let read = file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes);
                read.map_err(|source| RemoteError::Host { call: "read", path: path(), source })?;
                Ok(Some(bytes))
            })
            .collect()
    }

    fn sizes(&self, names: &[ObjectName]) -> Result<Vec<Option<u64>>, RemoteError> {
        names.iter().map(|name| Ok(self.file(name)?.map(|(_, size_bytes)| size_bytes))).collect()
    }

    fn read(
        &self,
        name: &ObjectName,
        out: &mut (dyn FnMut(&[u8]) -> io::Result<()> + Send),
    ) -> Result<bool, RemoteError> {
        let Some((mut file, _)) = self.file(name)? else { return Ok(false) };
        let mut piece = vec![0; 256 << 10];
        loop {
            self.go_on()?;
            let length = match file.read(&mut piece) {
                Ok(0) => return Ok(true),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    let path = self.path.join(name.to_string());
                    return Err(RemoteError::Host { call: "read", path, source });
                }
            };
            out(&piece[..length]).map_err(RemoteError::Content)?;
        }
    }

    fn put(
        &self,
        name: &ObjectName,
        content: &mut (dyn Read + Send),
        size_bytes: u64,
        existing: Existing,
    ) -> Result<(), RemoteError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let incoming = self.incoming().map_err(|errno| self.host("mkdirat", name, errno))?;
        // Machines that share a disk may have processes of one number.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let own = format!("{}-{:x}-{count}", std::process::id(), since.as_nanos());
        let put = self.put_file(name, &incoming, &own, content, size_bytes, existing);
        // Gone when it was moved; a link to it stays.
        let _ = unlinkat(&incoming, own.as_str(), AtFlags::empty());
        put
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::Arc;
    use std::thread;

    use kiln_oci::Digest;

    use super::*;
    use crate::Scope;

    fn open(path: &Path) -> Directory {
        Directory::open(path, true, Arc::new(|| false)).unwrap()
    }

    fn record(key: &str) -> ObjectName {
        ObjectName::Record { scope: Scope::default(), key: Digest::of(key.as_bytes()) }
    }

    fn put(
        store: &Directory,
        name: &ObjectName,
        bytes: &[u8],
        existing: Existing,
    ) -> Result<(), RemoteError> {
        store.put(name, &mut &bytes[..], bytes.len() as u64, existing)
    }

    fn get(store: &Directory, name: &ObjectName) -> Option<Vec<u8>> {
        store.get_many(std::slice::from_ref(name), 100).unwrap().remove(0)
    }

    #[test]
    fn the_first_stays_unless_it_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let name = record("a");
        assert_eq!(get(&store, &name), None);
        put(&store, &name, b"first", Existing::Keep).unwrap();
        put(&store, &name, b"second", Existing::Keep).unwrap();
        assert_eq!(get(&store, &name).as_deref(), Some(&b"first"[..]));
        put(&store, &name, b"third", Existing::Replace).unwrap();
        assert_eq!(get(&store, &name).as_deref(), Some(&b"third"[..]));
        assert_eq!(store.sizes(&[name, record("b")]).unwrap(), [Some(5), None]);
        assert_eq!(fs::read_dir(dir.path().join(INCOMING)).unwrap().count(), 0);
    }

    #[test]
    fn what_cannot_be_read_whole_is_not_put() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let name = record("a");
        for size_bytes in [4, 6] {
            let error = store.put(&name, &mut &b"bytes"[..], size_bytes, Existing::Keep).unwrap_err();
            assert!(matches!(error, RemoteError::Content(_)), "{error}");
        }
        assert_eq!(get(&store, &name), None);
        assert_eq!(fs::read_dir(dir.path().join(INCOMING)).unwrap().count(), 0);
    }

    #[test]
    fn many_writers_of_one_name_leave_one_whole_object() {
        let dir = tempfile::tempdir().unwrap();
        let name = record("a");
        thread::scope(|scope| {
            for nth in 0..8_u8 {
                let (path, name) = (dir.path(), &name);
                scope.spawn(move || {
                    let store = open(path);
                    for existing in [Existing::Keep, Existing::Replace] {
                        put(&store, name, &vec![nth; 50_000], existing).unwrap();
                        let found =
                            store.get_many(std::slice::from_ref(name), 100_000).unwrap().remove(0).unwrap();
                        assert_eq!(found, vec![found[0]; 50_000]);
                    }
                });
            }
        });
    }

    #[test]
    fn links_and_pipes_in_the_directory_lead_nowhere() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = open(dir.path());
        let name = record("a");
        put(&store, &name, b"bytes", Existing::Keep).unwrap();
        let path = dir.path().join(name.to_string());
        fs::remove_file(&path).unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        symlink(outside.path().join("secret"), &path).unwrap();
        assert_eq!(get(&store, &name), None);
        // It is replaced, not followed.
        put(&store, &name, b"bytes", Existing::Replace).unwrap();
        assert_eq!(fs::read_to_string(outside.path().join("secret")).unwrap(), "secret");
        fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert_eq!(get(&store, &name), None);
        fs::remove_dir_all(dir.path().join("kiln-cache-1")).unwrap();
        symlink(outside.path(), dir.path().join("kiln-cache-1")).unwrap();
        assert!(put(&store, &name, b"bytes", Existing::Replace).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    #[test]
    fn whoever_gives_up_gets_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        put(&open(dir.path()), &record("a"), b"bytes", Existing::Keep).unwrap();
        let store = Directory::open(dir.path(), false, Arc::new(|| true)).unwrap();
        assert!(matches!(store.get_many(&[record("a")], 10), Err(RemoteError::Stopped)));
        assert!(matches!(put(&store, &record("b"), b"x", Existing::Keep), Err(RemoteError::Stopped)));
    }
}
