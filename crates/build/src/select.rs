//! Which files a `COPY` means: patterns against a tree, with everything below what they match.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;

use kiln_frontend::ignore::{Patterns, glob};
use kiln_frontend::nearest;
use kiln_layer::{Entry, EntryKind, ScanOptions, StatCache, Visit, scan, tree_digest};
use kiln_oci::Digest;
use rustix::fs::{Dir, Mode, OFlags, ResolveFlags, openat2, readlinkat};
use rustix::io::Errno;

use crate::OpError;

/// A tree to select from.
pub(crate) struct Place<'a> {
    pub(crate) root: BorrowedFd<'a>,
    /// Rules of `.dockerignore`; `None` for snapshots.
    pub(crate) ignore: Option<&'a Patterns>,
    pub(crate) digests: Option<&'a dyn StatCache>,
    pub(crate) cancel: &'a AtomicBool,
}

/// What the sources of one `COPY` matched.
#[derive(Debug)]
pub(crate) struct Selection {
    pub(crate) matches: Vec<Match>,
}

/// One matched file or directory.
#[derive(Debug)]
pub(crate) struct Match {
    /// Path as it matched: its last component names a copied file.
    pub(crate) named: Vec<u8>,
    /// Path behind symbolic links; entries stand at and below it.
    pub(crate) path: Vec<u8>,
    pub(crate) entries: Vec<Entry>,
}

impl Match {
    /// A directory is copied by its contents, a file under its name.
    pub(crate) fn is_dir(&self) -> bool {
        matches!(self.entries.first().map(|entry| &entry.kind), Some(EntryKind::Dir))
    }

    pub(crate) fn file_name(&self) -> &[u8] {
        self.named.rsplit(|&b| b == b'/').next().unwrap_or_default()
    }
}

impl Selection {
    /// Digest of what was selected: content, modes, links, xattrs, file names; no times.
    pub(crate) fn digest(&self, ignore_owner: bool) -> Digest {
        let mut text = String::new();
        for found in &self.matches {
            // The length in front keeps names with odd characters from meeting the next field.
            let name = if found.is_dir() { &b""[..] } else { found.file_name() };
            text.push_str(&format!("{} {name:?} ", name.len()));
            text.push_str(&tree_digest(&found.entries, &found.path, ignore_owner).to_string());
            text.push('\n');
        }
        Digest::of(text.as_bytes())
    }
}

/// Finds `sources` in `place` and scans what they match, hashing file content.
///
/// A pattern without a match is tolerated only when another source matches (as BuildKit does).
pub(crate) fn select(place: &Place<'_>, sources: &[String]) -> Result<Selection, OpError> {
    let mut found = Vec::new();
    let mut empty = None;
    for source in sources {
        let paths = expand(place, source)?;
        if paths.is_empty() {
            if !has_meta(source.as_bytes()) {
                return Err(missing(place, source));
            }
            empty.get_or_insert(source);
        }
        for path in paths {
            found.push(scan_match(place, path)?);
        }
    }
    match empty {
        Some(source) if found.is_empty() => Err(missing(place, source)),
        _ => Ok(Selection { matches: found }),
    }
}

fn scan_match(place: &Place<'_>, named: Vec<u8>) -> Result<Match, OpError> {
    let path = follow(place.root, &named)?;
    let filter = |path: &[u8], is_dir: bool| -> Visit {
        let Some(ignore) = place.ignore else { return Visit::Take };
        let text = String::from_utf8_lossy(path);
        match ignore.is_ignored(&text) {
            false => Visit::Take,
            true if is_dir && ignore.may_contain_included(&text) => Visit::Descend,
            true => Visit::Skip,
        }
    };
    let options = ScanOptions {
        hash: true,
        filter: place.ignore.is_some().then_some(&filter),
        stat_cache: place.digests,
        cancel: place.cancel,
    };
    let entries = scan(place.root, &path, &options)?;
    Ok(Match { named, path, entries })
}

/// The existing paths that `source` means, sorted.
fn expand(place: &Place<'_>, source: &str) -> Result<Vec<Vec<u8>>, OpError> {
    let mut paths: Vec<Vec<u8>> = vec![Vec::new()];
    for component in source.as_bytes().split(|&b| b == b'/').filter(|c| !c.is_empty() && *c != b".") {
        let mut next = Vec::new();
        for path in &paths {
            if has_meta(component) {
                for name in list(place.root, path)? {
                    let hit = glob(component, &name)
                        .ok_or_else(|| OpError::Pattern { pattern: source.to_owned() })?;
                    if hit {
                        next.push(join(path, &name));
                    }
                }
            } else {
                next.push(join(path, component));
            }
        }
        paths = next;
    }
    let mut existing = Vec::new();
    for path in paths {
        let ignored = place.ignore.is_some_and(|ignore| {
            let text = String::from_utf8_lossy(&path);
            ignore.is_ignored(&text) && !ignore.may_contain_included(&text)
        });
        if !ignored && exists(place.root, &path)? {
            existing.push(path);
        }
    }
    existing.sort();
    Ok(existing)
}

pub(crate) fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() { name.to_vec() } else { [path, b"/", name].concat() }
}

fn beneath(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { &b"."[..] } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        // EAGAIN: a rename raced with the walk; the kernel asks to try again.
        match openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
}

fn exists(root: BorrowedFd<'_>, path: &[u8]) -> Result<bool, OpError> {
    match beneath(root, path, OFlags::PATH | OFlags::NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(errno) => Err(read_error(path, errno)),
    }
}

fn read_error(path: &[u8], errno: Errno) -> OpError {
    OpError::Read { path: String::from_utf8_lossy(path).into_owned(), source: errno.into() }
}

fn list(root: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<Vec<u8>>, OpError> {
    let directory = match beneath(root, path, OFlags::RDONLY | OFlags::DIRECTORY) {
        Ok(directory) => directory,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new()),
        Err(errno) => return Err(read_error(path, errno)),
    };
    let entries = Dir::read_from(directory.as_fd()).map_err(|errno| read_error(path, errno))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|errno| read_error(path, errno))?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort();
    Ok(names)
}

/// A source that is a symbolic link stands for what it points to, inside the root.
fn follow(root: BorrowedFd<'_>, named: &[u8]) -> Result<Vec<u8>, OpError> {
    let mut path = named.to_vec();
    // Linux gives up after 40 links too (path_resolution(7)).
    for _ in 0..40 {
        let fd = beneath(root, &path, OFlags::PATH | OFlags::NOFOLLOW)
            .map_err(|errno| read_error(&path, errno))?;
        let target = match readlinkat(&fd, c"", Vec::new()) {
            Ok(target) => target.into_bytes(),
            // Not a link: ENOENT for an empty path on other kinds, EINVAL on some file systems.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(path),
            Err(errno) => return Err(read_error(&path, errno)),
        };
        path = if target.starts_with(b"/") {
            target.iter().copied().skip_while(|&b| b == b'/').collect()
        } else {
            let parent = path.iter().rposition(|&b| b == b'/').map_or(&b""[..], |at| &path[..at]);
            join(parent, &target)
        };
    }
    Err(read_error(named, Errno::LOOP))
}

fn missing(place: &Place<'_>, source: &str) -> OpError {
    let clean = source.trim_end_matches('/');
    let ignored_by = place
        .ignore
        .filter(|ignore| ignore.is_ignored(clean) && exists(place.root, clean.as_bytes()).unwrap_or(false))
        .and_then(|ignore| ignore.deciding_line(clean));
    let what = if place.ignore.is_some() { "the build context" } else { "the source stage" };
    OpError::NoSource {
        path: source.to_owned(),
        place: what.to_owned(),
        ignored_by,
        similar: similar(place, clean),
    }
}

/// The name beside the missing one that is close to it.
fn similar(place: &Place<'_>, source: &str) -> Option<String> {
    let (parent, name) = source.rsplit_once('/').unwrap_or(("", source));
    let names = list(place.root, parent.as_bytes()).ok()?;
    let names: Vec<String> = names.into_iter().filter_map(|name| String::from_utf8(name).ok()).collect();
    let best = nearest(name, names.iter().map(String::as_str))?;
    Some(if parent.is_empty() { best.to_owned() } else { format!("{parent}/{best}") })
}

/// Whether a component is a pattern, not a name.
fn has_meta(component: &[u8]) -> bool {
    component.iter().any(|b| matches!(b, b'*' | b'?' | b'[' | b'\\'))
}
