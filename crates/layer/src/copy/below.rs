//! What a copy straight into an upperdir finds in the tree below: all that its layer depends on, but for what is
//! copied. [`super::over`] is who looks there while it copies.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Dir, FileType, fstat};

use super::over::{like, open_below};
use super::{CopyError, Part, host};
use crate::index::{Entry, EntryKind};
use crate::node::{self, CallError, Named};
use crate::path;

/// Directories of more names are not listed: what is looked for in them is looked for by name.
const MOST_NAMES: usize = 4096;

/// Digest of what a copy of `parts` finds below ([`super::CopyRequest::below`]): which of the directories that it
/// makes or passes on its way are there, and the owner, mode and attributes of these. On two trees in which that
/// is the same, what it makes is the same, but for times. `None`: it would fail, or nobody can tell.
///
/// Costs a look at each directory that is in both, and at what goes into these.
///
/// # Errors
/// [`CopyError::Host`], [`CopyError::Path`].
pub fn found_below<'p>(
    below: BorrowedFd<'_>,
    parts: impl Iterator<Item = &'p Part<'p>>,
) -> Result<Option<[u8; 32]>, CopyError> {
    let mut looking = Looking { below, hasher: blake3::Hasher::new(), last: None };
    for part in parts {
        match looking.part(part) {
            Ok(true) => {}
            Ok(false) | Err(CopyError::OntoNonDirectory { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(Some(looking.hasher.finalize().into()))
}

/// A directory of the tree below.
struct There {
    dir: OwnedFd,
    /// The names in it; `None`: too many.
    names: Option<HashSet<Vec<u8>>>,
}

struct Looking<'a> {
    below: BorrowedFd<'a>,
    hasher: blake3::Hasher,
    /// Where the last part went that was a file: most go to one directory.
    last: Option<(Vec<u8>, Option<There>)>,
}

impl Looking<'_> {
    /// Whether a copy of this part would work, as far as the tree below is concerned, and is understood.
    fn part(&mut self, part: &Part<'_>) -> Result<bool, CopyError> {
        let Some(first) = part.entries.first() else { return Ok(true) };
        let top = part.destination_of(first);
        if first.kind != EntryKind::Dir {
            let (above, name) = path::split(&top);
            if self.last.as_ref().is_none_or(|(last, _)| last != above) {
                self.last = Some((above.to_vec(), self.way(above)?));
            }
            let there = self.last.as_ref().and_then(|(_, there)| there.as_ref());
            // More than the one file stands below a directory.
            return Ok(part.entries.len() == 1 && !is_dir(there, name, &top)?.unwrap_or(false));
        }
        // The directories that an entry is in, with what is there in their places.
        let mut above: Vec<(Vec<u8>, Option<There>)> = vec![(top.clone(), self.way(&top)?)];
        for entry in part.entries.iter().skip(1).filter(|entry| entry.kind != EntryKind::Socket) {
            if !self.entry(&mut above, entry, part.destination_of(entry))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn entry(
        &mut self,
        above: &mut Vec<(Vec<u8>, Option<There>)>,
        entry: &Entry,
        path: Vec<u8>,
    ) -> Result<bool, CopyError> {
        let (parent, name) = path::split(&path);
        while above.last().is_some_and(|(last, _)| last != parent) {
            above.pop();
        }
        // Its directory is no entry: scans do not do that.
        let Some((_, there)) = above.last() else { return Ok(false) };
        let (is_dir, becomes_dir) = (is_dir(there.as_ref(), name, &path)?, entry.kind == EntryKind::Dir);
        match (is_dir, there) {
            // The copy fails: neither takes the other's place.
            (Some(is_dir), _) if is_dir != becomes_dir && (is_dir || becomes_dir) => return Ok(false),
            (Some(true), Some(there)) => {
                let dir = node::open_dir(there.dir.as_fd(), name).map_err(host(&path))?;
                self.note(&path, dir.as_fd())?;
                let there = list(dir).map_err(host(&path))?;
                above.push((path, Some(there)));
            }
            _ if becomes_dir => above.push((path, None)),
            _ => {}
        }
        Ok(true)
    }

    /// The directory `path`, noted with all on the way to it, as far as these are there.
    fn way(&mut self, path: &[u8]) -> Result<Option<There>, CopyError> {
        let ends = (1..=path.len()).filter(|&end| end == path.len() || path[end] == b'/');
        // The root is in no layer, so it is not noted.
        let mut last = open_below(self.below, b"")?;
        for end in ends {
            let Some(dir) = open_below(self.below, &path[..end])? else { return Ok(None) };
            self.note(&path[..end], dir.as_fd())?;
            last = Some(dir);
        }
        last.map(list).transpose().map_err(host(path))
    }

    /// Notes what a directory is like.
    fn note(&mut self, path: &[u8], dir: BorrowedFd<'_>) -> Result<(), CopyError> {
        let stat = fstat(dir).named("fstat").map_err(host(path))?;
        let xattrs = like(dir).map_err(host(path))?;
        let mut field = |bytes: &[u8]| {
            self.hasher.update(&(bytes.len() as u64).to_le_bytes());
            self.hasher.update(bytes);
        };
        field(path);
        for number in [stat.st_mode & 0o7777, stat.st_uid, stat.st_gid] {
            field(&number.to_le_bytes());
        }
        field(&(xattrs.len() as u64).to_le_bytes());
        for (name, value) in &xattrs {
            field(name);
            field(value);
        }
        Ok(())
    }
}

fn list(dir: OwnedFd) -> Result<There, CallError> {
    let mut names = HashSet::new();
    for entry in Dir::read_from(&dir).named("openat")? {
        if names.len() == MOST_NAMES {
            return Ok(There { dir, names: None });
        }
        names.insert(entry.named("getdents64")?.file_name().to_bytes().to_vec());
    }
    Ok(There { dir, names: Some(names) })
}

/// Whether a directory has this name in `there`; `None`: nothing has.
fn is_dir(there: Option<&There>, name: &[u8], path: &[u8]) -> Result<Option<bool>, CopyError> {
    let Some(There { dir, names }) = there else { return Ok(None) };
    if names.as_ref().is_some_and(|names| !names.contains(name)) {
        return Ok(None);
    }
    let stat = node::stat(dir.as_fd(), name).map_err(host(path))?;
    Ok(stat.map(|stat| node::kind(&stat) == FileType::Directory))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    use super::*;
    use crate::index::Timestamp;

    fn entry(path: &str) -> Entry {
        let kind = match path.strip_suffix('/') {
            Some(_) => EntryKind::Dir,
            None => EntryKind::File { size: 0, content: Some([0; 32]), inode: (0, 0), nlink: 1 },
        };
        let (mtime, ctime) = (Timestamp::default(), Timestamp::default());
        let path = path.trim_end_matches('/').into();
        Entry { path, kind, mode: 0o644, uid: 0, gid: 0, mtime, ctime, xattrs: [].into() }
    }

    /// What a copy of a directory of these finds that goes to `destination`.
    fn found(below: &Path, destination: &str, paths: &[&str]) -> Option<[u8; 32]> {
        let entries: Vec<Entry> = ["src/"].iter().chain(paths).map(|path| entry(path)).collect();
        let destination = destination.as_bytes().to_vec();
        let part =
            Part { entries: &entries, passed: None, strip: b"src", destination, owner: None, mode: None };
        found_below(File::open(below).unwrap().as_fd(), [&part].into_iter()).unwrap()
    }

    /// What it finds after `change` where `/app` and `/app/lib` are.
    #[track_caller]
    fn check(change: impl Fn(&Path), is_seen: bool) {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join("app/lib")).unwrap();
        let found =
            || found(temp.path(), "app", &["src/f", "src/lib/", "src/lib/g", "src/new/", "src/new/h"]);
        let before = found();
        assert!(before.is_some());
        change(temp.path());
        assert_eq!(found() != before, is_seen);
    }

    #[test]
    fn directories_that_are_there_count_with_their_metadata() {
        let mode = |path: &'static str| {
            move |root: &Path| fs::set_permissions(root.join(path), Permissions::from_mode(0o700)).unwrap()
        };
        check(mode("app"), true);
        check(mode("app/lib"), true);
        check(|root| fs::remove_dir(root.join("app/lib")).unwrap(), true);
        check(|root| fs::create_dir(root.join("app/new")).unwrap(), true);
        check(
            |root| {
                let lib = File::open(root.join("app/lib")).unwrap();
                rustix::fs::fsetxattr(&lib, "user.a", b"1", rustix::fs::XattrFlags::empty()).unwrap();
            },
            true,
        );
    }

    #[test]
    fn what_is_replaced_and_what_is_beside_does_not_count() {
        check(|root| fs::write(root.join("app/f"), "other").unwrap(), false);
        check(|root| symlink("nowhere", root.join("app/lib/g")).unwrap(), false);
        check(|root| fs::create_dir(root.join("app/other")).unwrap(), false);
        check(|root| fs::create_dir_all(root.join("etc/deep")).unwrap(), false);
        check(|root| fs::write(root.join("app/lib/more"), "more").unwrap(), false);
    }

    #[test]
    fn of_what_cannot_be_copied_nothing_is_known() {
        let temp = tempfile::tempdir().unwrap();
        let at = |path: &str| temp.path().join(path);
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("file"), "").unwrap();
        symlink("dir", at("link")).unwrap();
        assert!(found(temp.path(), "", &["src/new"]).is_some());
        assert!(found(temp.path(), "", &["src/dir/", "src/dir/f"]).is_some());
        for paths in [["src/dir"], ["src/file/"], ["src/link/"]] {
            assert_eq!(found(temp.path(), "", &paths), None, "{paths:?}");
        }
        for destination in ["file", "file/deep", "link/deep"] {
            assert_eq!(found(temp.path(), destination, &["src/f"]), None, "{destination}");
        }
        // No directory for it among the entries.
        assert_eq!(found(temp.path(), "dir", &["src/deep/f"]), None);
    }

    #[test]
    fn a_directory_of_many_names_is_asked_for_each() {
        let temp = tempfile::tempdir().unwrap();
        let before = found(temp.path(), "", &["src/lib/"]);
        for nth in 0..=MOST_NAMES {
            File::create(temp.path().join(nth.to_string())).unwrap();
        }
        assert_eq!(found(temp.path(), "", &["src/lib/"]), before);
        fs::create_dir(temp.path().join("lib")).unwrap();
        assert_ne!(found(temp.path(), "", &["src/lib/"]), before);
        assert_eq!(found(temp.path(), "", &["src/lib"]), None);
    }
}
