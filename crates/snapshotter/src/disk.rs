//! What a tree takes on disk.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fd::AsFd;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, openat2, statat};
use rustix::io::Errno;

use crate::Error;
use crate::error::host;

/// The blocks that `path` and everything below it take, in bytes, as `du -s` counts them: a file
/// with several names counts once. What goes away meanwhile does not count. Nothing there: 0.
///
/// Costs O(files). No link is followed.
///
/// # Errors
/// [`Error::Host`] when a directory cannot be read.
pub fn disk_bytes(path: &Path) -> Result<u64, Error> {
    disk_bytes_at(CWD, path)
}

/// How long the regular files below `path` are together, in bytes: what they hold, whatever they take on
/// disk. Else as [`disk_bytes`].
///
/// # Errors
/// As there.
pub fn content_bytes(path: &Path) -> Result<u64, Error> {
    sum(CWD, path, |stat| match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
        _ => 0,
    })
}

pub(crate) fn disk_bytes_at(at: impl AsFd, path: &Path) -> Result<u64, Error> {
    sum(at, path, |stat| u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
}

/// Adds up what `measure` says of everything there is, a file with several names once.
fn sum(at: impl AsFd, path: &Path, measure: impl Fn(&Stat) -> u64) -> Result<u64, Error> {
    let mut seen = HashSet::new();
    let mut total = 0;
    let mut once = |stat: &Stat| if is_new(stat, &mut seen) { measure(stat) } else { 0 };
    match statat(&at, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => total += once(&stat),
        Err(Errno::NOENT) => return Ok(0),
        Err(errno) => return Err(host("stat", path)(errno)),
    }
    let mut pending = vec![PathBuf::new()];
    while let Some(below) = pending.pop() {
        let dir = if below.as_os_str().is_empty() { path.to_owned() } else { path.join(&below) };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_MAGICLINKS;
        let fd = match openat2(&at, &dir, flags, Mode::empty(), resolve) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            Err(errno) => return Err(host("open", dir)(errno)),
        };
        let entries = Dir::read_from(&fd).map_err(host("readdir", &dir))?;
        for entry in entries {
            let entry = entry.map_err(host("readdir", &dir))?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            total += once(&stat);
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                pending.push(below.join(std::ffi::OsStr::from_bytes(name.to_bytes())));
            }
        }
    }
    Ok(total)
}

fn is_new(stat: &Stat, seen: &mut HashSet<(u64, u64)>) -> bool {
    let several = stat.st_nlink > 1 && FileType::from_raw_mode(stat.st_mode) != FileType::Directory;
    !several || seen.insert((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    #[test]
    fn sizes_are_those_of_du() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("a/b/c")).unwrap();
        fs::write(at("a/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(at("a/file"), at("a/b/again")).unwrap();
        fs::write(at("a/b/c/small"), b"x").unwrap();
        let sparse = fs::File::create(at("sparse")).unwrap();
        sparse.set_len(10 << 20).unwrap();
        std::os::unix::fs::symlink("/usr", at("a/usr")).unwrap();
        let du = Command::new("du").args(["-s", "-B1"]).arg(dir.path()).output().unwrap();
        let du = String::from_utf8(du.stdout).unwrap();
        let expected: u64 = du.split('\t').next().unwrap().parse().unwrap();
        assert_eq!(disk_bytes(dir.path()).unwrap(), expected);
        assert_eq!(disk_bytes(&at("absent")).unwrap(), 0);
        assert_eq!(content_bytes(dir.path()).unwrap(), 100_001 + (10 << 20));
        assert!(disk_bytes(&at("a/usr")).unwrap() <= 4096, "the link itself");
    }
}
