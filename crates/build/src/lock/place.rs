//! Where a lock file is: in the Dockerfile's directory, or in a context from elsewhere.
//!
//! A cloned project brings its own, so it is taken for what it is: a regular file of the directory, never a link, and
//! no larger than an honest one.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kiln_oci::{Digest, Reference};
use rustix::fs::{AtFlags, Mode, OFlags, open, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::text::Locked;
use super::{LockError, MAX_BYTES, NAME, shown};
use crate::remote_context::TreeContext;
use crate::{BuildError, Engine};

/// What is written before it takes the file's name. `--watch` knows the ending.
const PARTIAL: &str = "kiln.lock.partial";

/// A writer holds the directory's lock for less.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the lock file of a build is, or would be.
#[derive(Debug, Clone)]
pub(crate) enum LockPlace {
    /// In this directory of this machine.
    Directory(PathBuf),
    /// This file of a context from elsewhere. It is never written.
    Tree(TreeContext, PathBuf),
    /// Nothing is beside the Dockerfile: it did not come as a file of a directory.
    Nowhere,
}

impl LockPlace {
    /// Beside a Dockerfile of this machine.
    pub(crate) fn beside(dockerfile: &Path) -> Self {
        Self::Directory(dockerfile.parent().unwrap_or(Path::new("")).to_owned())
    }

    /// Beside a Dockerfile of a context from elsewhere.
    pub(crate) fn in_tree(tree: &TreeContext, dockerfile: &str) -> Self {
        Self::Tree(tree.clone(), Path::new(dockerfile).with_file_name(NAME))
    }

    /// What the file says; `None`: there is none.
    ///
    /// # Errors
    /// [`LockError`], and those of a context that cannot be read.
    pub(super) fn read(&self, engine: &Engine) -> Result<Option<Locked>, BuildError> {
        match self {
            Self::Nowhere => Ok(None),
            Self::Directory(path) => {
                let file = shown(&path.join(NAME));
                let dir = open_dir(path, OFlags::PATH);
                let read = dir.and_then(|dir| read_in(&dir));
                Ok(parse(
                    &file,
                    read.map_err(|source| LockError::Unreadable { file: file.clone(), source })?,
                )?)
            }
            Self::Tree(tree, path) => {
                let file = shown(path);
                let read = match tree.read_itself(engine, path) {
                    Err(BuildError::TooLarge { .. }) => Some(Err(TooLarge)),
                    Err(BuildError::Unreadable { source, .. }) => {
                        return Err(LockError::Unreadable { file, source }.into());
                    }
                    read => read?.map(Ok),
                };
                Ok(parse(&file, read)?)
            }
        }
    }

    /// Where it can be written.
    ///
    /// # Errors
    /// [`LockError::NoPlace`].
    pub(super) fn directory(&self) -> Result<&Path, LockError> {
        match self {
            Self::Directory(path) => Ok(path),
            Self::Tree(..) => {
                Err(LockError::NoPlace { what: "a context that is no directory of this machine" })
            }
            Self::Nowhere => Err(LockError::NoPlace { what: "a Dockerfile that is no file of this machine" }),
        }
    }

    /// As users would type it.
    pub(super) fn file(&self) -> Option<String> {
        match self {
            Self::Directory(path) => Some(shown(&path.join(NAME))),
            Self::Tree(_, path) => Some(shown(path)),
            Self::Nowhere => None,
        }
    }
}

/// It was not read to its end.
struct TooLarge;

fn parse(file: &str, read: Option<Result<Vec<u8>, TooLarge>>) -> Result<Option<Locked>, LockError> {
    match read {
        None => Ok(None),
        Some(Ok(bytes)) => Locked::parse(file, &bytes).map(Some),
        Some(Err(TooLarge)) => Err(LockError::TooLarge { file: file.to_owned(), limit_bytes: MAX_BYTES }),
    }
}

fn open_dir(path: &Path, flags: OFlags) -> io::Result<File> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let opened = open(path, flags | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    Ok(File::from(opened?))
}

/// The bytes of the lock file in `dir`; `None`: there is none.
fn read_in(dir: &File) -> io::Result<Option<Result<Vec<u8>, TooLarge>>> {
    // Nobody waits for a FIFO's writer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match openat(dir, NAME, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err(io::Error::other("it is a link, and might lead anywhere")),
        Err(errno) => return Err(errno.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(Some(if bytes.len() as u64 > MAX_BYTES { Err(TooLarge) } else { Ok(bytes) }))
}

/// Whether the file is another one now, and the pins that have stayed where others were asked for.
pub(super) type Merged = (bool, Vec<(Reference, Digest)>);

/// Adds `new` to the lock file in the directory `path`, which need not be there; what it pins stays unless `new`
/// `replaces` it. Of several that do so at once each finds what the others have written. A reader sees the old file
/// or the new one. `None`: somebody has cancelled the build meanwhile, and nothing is written.
///
/// # Errors
/// [`LockError`]; the file is as it was then.
pub(super) fn merge(
    path: &Path,
    new: &BTreeMap<Reference, Digest>,
    replaces: bool,
    cancel: &AtomicBool,
) -> Result<Option<Merged>, LockError> {
    let file = shown(&path.join(NAME));
    let unwritable = |source| LockError::Unwritable { file: file.clone(), source };
    let dir = open_dir(path, OFlags::RDONLY).map_err(unwritable)?;
    // Where a directory cannot be locked, as on some network file systems, one of two may lose its line; the next
    // build adds it again.
    wait_for(&dir, cancel);
    if cancel.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let read = read_in(&dir).map_err(|source| LockError::Unreadable { file: file.clone(), source })?;
    let before = parse(&file, read)?.unwrap_or_default();
    let mut locked = before.clone();
    let others = locked.take(new, replaces);
    if before == locked {
        return Ok(Some((false, others)));
    }
    let written = write_in(&dir, locked.render().as_bytes()).inspect_err(|_| {
        // What is left of it is removed by whoever comes next.
        let _ = unlinkat(&dir, PARTIAL, AtFlags::empty());
    });
    written.map_err(unwritable)?;
    Ok(Some((true, others)))
}

/// Waits for the lock of a directory, as long as a writer may take. Others may have it for reasons of their own, and
/// for ever: whoever started this build, or anybody who may read the directory.
fn wait_for(dir: &File, cancel: &AtomicBool) {
    let begun = Instant::now();
    while let Err(TryLockError::WouldBlock) = dir.try_lock() {
        if begun.elapsed() > PATIENCE || cancel.load(Ordering::Relaxed) {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn write_in(dir: &File, text: &[u8]) -> io::Result<()> {
    match unlinkat(dir, PARTIAL, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(dir, PARTIAL, flags, Mode::from_raw_mode(0o666))?);
    file.write_all(text)?;
    file.sync_all()?;
    renameat(dir, PARTIAL, dir, NAME)?;
    // It is written, and some file systems cannot do this.
    let _ = dir.sync_all();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    static GOES_ON: AtomicBool = AtomicBool::new(false);

    fn pins(of: &[(&str, &[u8])]) -> BTreeMap<Reference, Digest> {
        of.iter().map(|(name, content)| (name.parse().unwrap(), Digest::of(content))).collect()
    }

    fn read(dir: &Path) -> io::Result<Option<Result<Vec<u8>, TooLarge>>> {
        read_in(&open_dir(dir, OFlags::PATH)?)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_changes_nothing_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(merge(dir.path(), &pins(&[]), false, &GOES_ON).unwrap(), Some((false, vec![])));
        assert_eq!(names(dir.path()), [""; 0]);
        let new = pins(&[("a", b"a")]);
        assert_eq!(merge(dir.path(), &new, false, &GOES_ON).unwrap(), Some((true, vec![])));
        // Somebody's own line stays as it stands.
        let path = dir.path().join(NAME);
        let own = format!("# ours\n{}", fs::read_to_string(&path).unwrap());
        fs::write(&path, &own).unwrap();
        assert_eq!(merge(dir.path(), &new, true, &GOES_ON).unwrap(), Some((false, vec![])));
        assert_eq!(fs::read_to_string(&path).unwrap(), own);
        let others = merge(dir.path(), &pins(&[("a", b"b")]), false, &GOES_ON).unwrap();
        assert_eq!(others, Some((false, vec![("a".parse().unwrap(), Digest::of(b"a"))])));
        assert_eq!(names(dir.path()), [NAME]);
    }

    #[test]
    fn of_many_writers_at_once_none_loses_its_line() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for nth in 0..16 {
                let dir = dir.path();
                scope.spawn(move || {
                    merge(dir, &pins(&[(&format!("image-{nth}"), b"x")]), false, &GOES_ON).unwrap()
                });
            }
        });
        let bytes = fs::read(dir.path().join(NAME)).unwrap();
        let locked = Locked::parse(NAME, &bytes).unwrap();
        assert!((0..16).all(|nth| locked.get(&format!("image-{nth}").parse().unwrap()).is_some()));
        assert_eq!(names(dir.path()), [NAME]);
    }

    #[test]
    fn what_a_killed_writer_has_left_is_no_hindrance_and_is_not_followed() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let target = elsewhere.path().join("precious");
        fs::write(&target, "precious").unwrap();
        symlink(&target, dir.path().join(PARTIAL)).unwrap();
        assert!(merge(dir.path(), &pins(&[("a", b"a")]), false, &GOES_ON).unwrap().unwrap().0);
        assert_eq!(fs::read_to_string(&target).unwrap(), "precious");
        assert_eq!(names(dir.path()), [NAME]);
    }

    #[test]
    fn only_a_regular_file_of_honest_size_is_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap().is_none());
        let path = dir.path().join(NAME);
        symlink("/etc/passwd", &path).unwrap();
        assert!(read(dir.path()).is_err_and(|error| error.to_string().contains("link")));
        let refused = merge(dir.path(), &pins(&[("a", b"a")]), false, &GOES_ON);
        assert!(matches!(refused, Err(LockError::Unreadable { .. })));
        assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
        fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(read(dir.path()).is_err_and(|error| error.to_string().contains("regular")));
        fs::remove_file(&path).unwrap();
        File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        assert!(matches!(read(dir.path()), Ok(Some(Err(TooLarge)))));
        fs::write(&path, "version = 1\n").unwrap();
        assert!(matches!(read(dir.path()), Ok(Some(Ok(bytes))) if bytes == b"version = 1\n"));
    }

    #[test]
    fn whoever_holds_the_directory_for_ever_holds_nobody_up_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let held = File::open(dir.path()).unwrap();
        held.lock().unwrap();
        let cancelled = AtomicBool::new(true);
        assert_eq!(merge(dir.path(), &pins(&[("a", b"a")]), false, &cancelled).unwrap(), None);
        assert_eq!(names(dir.path()), [""; 0]);
        assert!(merge(dir.path(), &pins(&[("a", b"a")]), false, &GOES_ON).unwrap().unwrap().0);
    }
}
