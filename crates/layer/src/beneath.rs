//! Opens paths below a root directory and nowhere else.
//!
//! Symbolic links are followed as inside a container: an absolute target starts at the root, `..`
//! stops there (`openat2(2)`, `RESOLVE_IN_ROOT`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::node;
use crate::path::{self, EntryPath, PathError};

/// Linux gives up after 40 links too (path_resolution(7)).
const MAX_LINKS: u32 = 40;

/// Why a path below a root could not be opened or made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BeneathError {
    /// The path itself is unusable.
    #[error("path {path} is not usable")]
    Path {
        /// The path.
        path: EntryPath,
        /// What is wrong with it.
        source: PathError,
    },
    /// The kernel refused.
    #[error("{call} failed for {path}")]
    Host {
        /// The system call.
        call: &'static str,
        /// The path.
        path: EntryPath,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl BeneathError {
    /// The kernel's answer, when it was asked.
    pub fn host_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Host { source, .. } => Some(source.kind()),
            Self::Path { .. } => None,
        }
    }

    pub(crate) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Host { source, .. } => Errno::from_io_error(source),
            Self::Path { .. } => None,
        }
    }

    fn host(call: &'static str, path: &[u8], errno: Errno) -> Self {
        Self::Host { call, path: path.into(), source: errno.into() }
    }
}

/// Opens what is at `path` below `root` (empty: the root itself), following links inside the root.
///
/// # Errors
/// Add `OFlags::NOFOLLOW` to refuse a link in the last place.
pub fn open_file(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, BeneathError> {
    path::check(path).map_err(|source| BeneathError::Path { path: path.into(), source })?;
    resolve(root, path, flags).map_err(|errno| BeneathError::host("openat2", path, errno))
}

/// Opens the directory that holds `path` and returns it with the last component.
///
/// # Errors
/// [`PathError::NoName`] for the root, `.` and `..`; `NotFound` when the parent is missing.
pub fn open_parent<'p>(root: BorrowedFd<'_>, path: &'p [u8]) -> Result<(OwnedFd, &'p [u8]), BeneathError> {
    let fault = |source| BeneathError::Path { path: path.into(), source };
    path::check(path).map_err(fault)?;
    let (parent, name) = path::split(path.strip_suffix(b"/").unwrap_or(path));
    if matches!(name, b"" | b"." | b"..") {
        return Err(fault(PathError::NoName));
    }
    Ok((open_file(root, parent, OFlags::RDONLY | OFlags::DIRECTORY)?, name))
}

/// The path that `path` stands for: links followed inside the root, the last one too.
///
/// What does not exist stays as it is written. Relative to the root, without `.` and `..`; empty
/// for the root itself. Costs two calls a component.
///
/// # Errors
/// More links than Linux follows; a directory that may not be searched.
pub fn real_path(root: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<u8>, BeneathError> {
    path::check(path).map_err(|source| BeneathError::Path { path: path.into(), source })?;
    let components = |path: &[u8]| -> Vec<Vec<u8>> {
        path.rsplit(|&b| b == b'/').filter(|c| !matches!(*c, b"" | b".")).map(<[u8]>::to_vec).collect()
    };
    // The last one first.
    let mut left = components(path);
    let mut real: Vec<u8> = Vec::new();
    let mut links = MAX_LINKS;
    while let Some(component) = left.pop() {
        if component == b".." {
            real.truncate(path::split(&real).0.len());
            continue;
        }
        let next = path::join(&real, &component);
        let found = match resolve(root, &next, OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(found) => found,
            Err(Errno::NOENT | Errno::NOTDIR) => {
                real = next;
                continue;
            }
            Err(errno) => return Err(BeneathError::host("openat2", path, errno)),
        };
        match fs::readlinkat(&found, c"", Vec::new()) {
            Ok(target) => {
                links =
                    links.checked_sub(1).ok_or_else(|| BeneathError::host("openat2", path, Errno::LOOP))?;
                if target.as_bytes().starts_with(b"/") {
                    real.clear();
                }
                left.append(&mut components(target.as_bytes()));
            }
            // No link: ENOENT for an empty path, EINVAL on some file systems.
            Err(Errno::NOENT | Errno::INVAL) => real = next,
            Err(errno) => return Err(BeneathError::host("readlinkat", path, errno)),
        }
    }
    Ok(real)
}

/// Makes the directory `path` and its missing parents; returns how many were made.
///
/// Only new directories get `mode` and `owner`. A dangling link on the way gets its target made.
pub fn mkdir_all(
    root: BorrowedFd<'_>,
    path: &[u8],
    mode: u32,
    owner: (u32, u32),
) -> Result<usize, BeneathError> {
    path::check(path).map_err(|source| BeneathError::Path { path: path.into(), source })?;
    make_dirs(root, path, mode, owner, MAX_LINKS)
}

fn make_dirs(
    root: BorrowedFd<'_>,
    path: &[u8],
    mode: u32,
    owner: (u32, u32),
    links: u32,
) -> Result<usize, BeneathError> {
    let path: Vec<u8> = path.iter().copied().skip_while(|&b| b == b'/').collect();
    let directory = OFlags::PATH | OFlags::DIRECTORY;
    match resolve(root, &path, directory) {
        Ok(_) => return Ok(0),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(BeneathError::host("openat2", &path, errno)),
    }
    let mut made = 0;
    let ends = (1..=path.len()).filter(|&end| end == path.len() || path[end] == b'/');
    for end in ends {
        let prefix = &path[..end];
        match resolve(root, prefix, directory) {
            Ok(_) => continue,
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(BeneathError::host("openat2", prefix, errno)),
        }
        let (above, name) = path::split(prefix);
        let parent = resolve(root, above, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(|errno| BeneathError::host("openat2", above, errno))?;
        match fs::mkdirat(&parent, name, Mode::RWXU) {
            Ok(()) => {
                own(&parent, name, mode, owner)
                    .map_err(|(call, errno)| BeneathError::host(call, prefix, errno))?;
                made += 1;
            }
            // There, and yet not: a link to nothing.
            Err(Errno::EXIST) => {
                let target = fs::readlinkat(&parent, name, Vec::new())
                    .map_err(|errno| BeneathError::host("readlinkat", prefix, errno))?;
                let target = match target.as_bytes() {
                    absolute @ [b'/', ..] => absolute.to_vec(),
                    relative => path::join(above, relative),
                };
                let links =
                    links.checked_sub(1).ok_or_else(|| BeneathError::host("openat2", prefix, Errno::LOOP))?;
                made += make_dirs(root, &target, mode, owner, links)?;
            }
            Err(errno) => return Err(BeneathError::host("mkdirat", prefix, errno)),
        }
    }
    Ok(made)
}

fn own(parent: &OwnedFd, name: &[u8], mode: u32, owner: (u32, u32)) -> Result<(), (&'static str, Errno)> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = fs::openat(parent, name, flags, Mode::empty()).map_err(|errno| ("openat", errno))?;
    let stat = fs::fstat(&made).map_err(|errno| ("fstat", errno))?;
    if (stat.st_uid, stat.st_gid) != owner {
        // Owner before mode: chown(2) clears setuid bits.
        node::give(made.as_fd(), owner).map_err(|error| (error.call, error.errno))?;
    }
    // The umask has no say.
    fs::fchmod(&made, Mode::from_raw_mode(mode & 0o7777)).map_err(|errno| ("fchmod", errno))
}

/// Opens the directory `path` (empty: the root) where no link is on the way, the last name included.
///
/// # Errors
/// `FilesystemLoop` when there is one.
pub fn open_dir_without_links(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, BeneathError> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    resolve_how(root, path, OFlags::RDONLY | OFlags::DIRECTORY, how)
        .map_err(|errno| BeneathError::host("openat2", path, errno))
}

/// `openat2` within `root`; the empty path is the root.
fn resolve(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    resolve_how(root, path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

fn resolve_how(
    root: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
    how: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { &b"."[..] } else { path };
    // Bounded: somebody renaming without end must not hold us here.
    for _ in 0..1000 {
        // EAGAIN: a rename raced with `..` on the way; the kernel asks to try again.
        match fs::openat2(root.as_fd(), path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

/// A file that turned into a fifo or a link meanwhile does not hang or lead away.
const TO_READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

/// Opens a file to read.
pub(crate) fn open_to_read(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, BeneathError> {
    open_file(root, path, TO_READ)
}

/// Opens files of one tree to read, as [`open_to_read`] does. Keeps the last directory open: most neighbours
/// share it, and the way there is what opening a file costs most.
#[derive(Default)]
pub(crate) struct Opener {
    dir: Option<(Vec<u8>, OwnedFd)>,
}

impl Opener {
    /// Always of the same `root`.
    pub(crate) fn open(&mut self, root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, BeneathError> {
        let (above, name) = path::split(path);
        if matches!(name, b"" | b"." | b"..") {
            return Err(BeneathError::Path { path: path.into(), source: PathError::NoName });
        }
        if let Some((known, dir)) = &self.dir
            && known == above
        {
            match fs::openat(dir, name, TO_READ, Mode::empty()) {
                // There may be another directory in its place now.
                Err(Errno::NOENT) => {}
                other => return other.map_err(|errno| BeneathError::host("openat", path, errno)),
            }
        }
        let dir = open_file(root, above, OFlags::PATH | OFlags::DIRECTORY)?;
        let file = fs::openat(&dir, name, TO_READ, Mode::empty());
        self.dir = Some((above.to_vec(), dir));
        file.map_err(|errno| BeneathError::host("openat", path, errno))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir, metadata, read_dir, write};
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn root(dir: &tempfile::TempDir) -> OwnedFd {
        std::fs::File::open(dir.path()).unwrap().into()
    }

    #[test]
    fn links_resolve_inside_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        create_dir(dir.path().join("etc")).unwrap();
        write(dir.path().join("etc/x"), "inside").unwrap();
        symlink("/etc", dir.path().join("absolute")).unwrap();
        symlink("../../../etc", dir.path().join("above")).unwrap();
        symlink(outside.path(), dir.path().join("outside")).unwrap();
        let fd = root(&dir);
        for path in [&b"absolute/x"[..], b"above/x", b"/etc/x", b"../../etc/x"] {
            open_file(fd.as_fd(), path, OFlags::RDONLY).unwrap();
        }
        assert!(open_parent(fd.as_fd(), b"outside/x").is_err());
    }

    #[test]
    fn real_paths_have_no_links_and_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        create_dir(dir.path().join("etc")).unwrap();
        for (target, link) in [
            ("/etc", "absolute"),
            ("../../../etc", "above"),
            ("absolute/../link", "by-two"),
            ("etc", "link"),
            ("/new/place", "dangling"),
            ("loop", "loop"),
        ] {
            symlink(target, dir.path().join(link)).unwrap();
        }
        let fd = root(&dir);
        for (path, expected) in [
            ("", ""),
            ("/", ""),
            ("/etc/./x/", "etc/x"),
            ("../etc", "etc"),
            ("absolute", "etc"),
            ("above/x", "etc/x"),
            ("absolute/../above", "etc"),
            ("by-two/y", "etc/y"),
            ("dangling/x", "new/place/x"),
            ("no/such/../file", "no/file"),
        ] {
            let real = real_path(fd.as_fd(), path.as_bytes()).unwrap();
            assert_eq!(String::from_utf8(real).unwrap(), expected, "{path}");
        }
        assert!(real_path(fd.as_fd(), b"loop/x").is_err());
    }

    #[test]
    fn missing_directories_are_made_with_mode_and_owner() {
        let dir = tempfile::tempdir().unwrap();
        let fd = root(&dir);
        assert_eq!(mkdir_all(fd.as_fd(), b"a/b/c", 0o2750, (7, 8)).unwrap(), 3);
        assert_eq!(mkdir_all(fd.as_fd(), b"/a/b/c/", 0o755, (0, 0)).unwrap(), 0);
        let made = metadata(dir.path().join("a/b")).unwrap();
        assert_eq!((made.mode() & 0o7777, made.uid(), made.gid()), (0o2750, 7, 8));
    }

    #[test]
    fn a_dangling_link_gets_its_target_made_inside() {
        let dir = tempfile::tempdir().unwrap();
        let fd = root(&dir);
        symlink("/run", dir.path().join("var-run")).unwrap();
        assert_eq!(mkdir_all(fd.as_fd(), b"var-run/app", 0o755, (0, 0)).unwrap(), 2);
        assert!(dir.path().join("run/app").is_dir());
        symlink("loop", dir.path().join("loop")).unwrap();
        assert!(mkdir_all(fd.as_fd(), b"loop/x", 0o755, (0, 0)).is_err());
        assert_eq!(read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn files_are_opened_one_after_another_and_none_outside() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["a", "a/b", "c"] {
            create_dir(dir.path().join(name)).unwrap();
        }
        for name in ["x", "a/x", "a/y", "a/b/x", "c/x"] {
            write(dir.path().join(name), name).unwrap();
        }
        write(outside.path().join("x"), "outside").unwrap();
        symlink(outside.path(), dir.path().join("out")).unwrap();
        symlink("/a", dir.path().join("in")).unwrap();
        symlink("x", dir.path().join("a/link")).unwrap();
        let (fd, mut opener) = (root(&dir), Opener::default());
        let mut read = |path: &str| {
            let file = opener.open(fd.as_fd(), path.as_bytes())?;
            Ok::<_, BeneathError>(std::io::read_to_string(std::fs::File::from(file)).unwrap())
        };
        for path in ["a/x", "a/y", "x", "a/b/x", "c/x", "a/x"] {
            assert_eq!(read(path).unwrap(), path);
        }
        assert_eq!(read("in/y").unwrap(), "a/y");
        for path in ["out/x", "a/link", "a/..", "a/nothing", "nothing/x", "", "."] {
            assert!(read(path).is_err(), "{path}");
        }
        // A directory that another one took the place of.
        assert_eq!(read("a/x").unwrap(), "a/x");
        std::fs::remove_dir_all(dir.path().join("a")).unwrap();
        create_dir(dir.path().join("a")).unwrap();
        write(dir.path().join("a/x"), "another one").unwrap();
        assert_eq!(read("a/x").unwrap(), "another one");
    }

    #[test]
    fn a_path_without_a_name_has_no_parent() {
        let dir = tempfile::tempdir().unwrap();
        for path in [&b""[..], b"/", b".", b"a/.."] {
            let error = open_parent(root(&dir).as_fd(), path).unwrap_err();
            assert!(matches!(error, BeneathError::Path { source: PathError::NoName, .. }), "{error}");
        }
    }
}
