//! Paths that a source means, and what to say when it means none.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_frontend::ignore::glob;
use kiln_frontend::nearest;
use kiln_layer::{BeneathError, beneath};
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, fstat, openat2, readlinkat};
use rustix::io::Errno;

use super::{Place, has_meta, join};
use crate::OpError;

/// What a source means.
pub(super) struct Found {
    /// Path as it matched, and path behind symbolic links; in the order of a walk.
    pub(super) paths: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether the source is a pattern.
    pub(super) wildcard: bool,
    /// The first path that `.dockerignore` left out.
    pub(super) ignored: Option<Vec<u8>>,
}

/// Finds the existing paths that `source` means.
///
/// Links are followed in front of the first wildcard and in the last place, inside the root; a
/// wildcard does not look behind links (as BuildKit's walk does not).
pub(super) fn find(place: &Place<'_>, source: &str) -> Result<Found, OpError> {
    let components: Vec<&[u8]> =
        source.as_bytes().split(|&b| b == b'/').filter(|c| !matches!(*c, b"" | b".")).collect();
    let fixed = components.iter().position(|component| has_meta(component)).unwrap_or(components.len());
    let (fixed, pattern) = components.split_at(fixed);
    for component in pattern {
        glob(component, b"").ok_or_else(|| OpError::Pattern { pattern: source.to_owned() })?;
    }
    let mut found = Found { paths: Vec::new(), wildcard: !pattern.is_empty(), ignored: None };
    let named = fixed.join(&b'/');
    // Named, and where it stands without links above it.
    let mut candidates: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    match fixed.split_last() {
        Some((name, above)) if pattern.is_empty() => {
            let above = real_path(place.root, &above.join(&b'/'))?;
            let path = join(&above, name);
            if exists(place.root, &path)? {
                candidates.push((named, path));
            }
        }
        _ => {
            let base = real_path(place.root, &named)?;
            candidates.push((named, base));
        }
    }
    for component in pattern {
        let mut next = Vec::new();
        for (named, path) in &candidates {
            for name in list(place.root, path)? {
                if glob(component, &name).unwrap_or(false) {
                    next.push((join(named, &name), join(path, &name)));
                }
            }
        }
        candidates = next;
    }
    for (named, path) in candidates {
        let text = String::from_utf8_lossy(&path);
        let out =
            place.ignore.is_some_and(|rules| rules.is_ignored(&text) && !rules.may_contain_included(&text));
        if out {
            found.ignored.get_or_insert(path);
        } else {
            let real = real_path(place.root, &path)?;
            if real != path && !exists(place.root, &real)? {
                return Err(dangling(place, &named, &path));
            }
            found.paths.push((named, real));
        }
    }
    Ok(found)
}

fn real_path(root: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<u8>, OpError> {
    beneath::real_path(root, path).map_err(|error| match error {
        BeneathError::Host { source, .. } => {
            OpError::Read { path: String::from_utf8_lossy(path).into_owned(), source }
        }
        other => OpError::Mkdir { path: String::from_utf8_lossy(path).into_owned(), source: other },
    })
}

/// Opens a path without links.
fn open(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { &b"."[..] } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    loop {
        // EAGAIN: a rename raced with the walk; the kernel asks to try again.
        match openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
}

fn exists(root: BorrowedFd<'_>, path: &[u8]) -> Result<bool, OpError> {
    match open(root, path, OFlags::PATH | OFlags::NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(errno) => Err(read_error(path, errno)),
    }
}

/// Whether a directory stands at the real path `path`.
pub(super) fn is_dir(root: BorrowedFd<'_>, path: &[u8]) -> Result<bool, OpError> {
    let found = open(root, path, OFlags::PATH | OFlags::NOFOLLOW);
    let stat = found.and_then(|found| fstat(&found)).map_err(|errno| read_error(path, errno))?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

fn read_error(path: &[u8], errno: Errno) -> OpError {
    OpError::Read { path: String::from_utf8_lossy(path).into_owned(), source: errno.into() }
}

/// Names in the directory at `path`, sorted; none when it is no directory.
fn list(root: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<Vec<u8>>, OpError> {
    let directory = match open(root, path, OFlags::RDONLY | OFlags::DIRECTORY) {
        Ok(directory) => directory,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Vec::new()),
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

/// The error for the link at `path` that leads to nothing inside the root.
fn dangling(place: &Place<'_>, named: &[u8], path: &[u8]) -> OpError {
    let (above, name) = match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&b""[..], path),
    };
    let link = open(place.root, above, OFlags::PATH | OFlags::DIRECTORY)
        .and_then(|above| readlinkat(above, name, Vec::new()));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match link {
        Ok(target) => OpError::Dangling {
            path: text(named),
            target: text(target.as_bytes()),
            place: what(place).to_owned(),
        },
        Err(errno) => read_error(path, errno),
    }
}

fn what(place: &Place<'_>) -> &'static str {
    if place.ignore.is_some() { "the build context" } else { "the source stage" }
}

/// The error for a source that means nothing, with what may help.
pub(super) fn missing(place: &Place<'_>, source: &str, ignored: Option<Vec<u8>>) -> OpError {
    let ignored = ignored.map(|path| String::from_utf8_lossy(&path).into_owned());
    let ignored_by = ignored.and_then(|path| place.ignore?.deciding_rule(&path));
    let similar = if ignored_by.is_none() { similar(place, source) } else { None };
    OpError::NoSource { path: source.to_owned(), place: what(place).to_owned(), ignored_by, similar }
}

/// What `source` would be with its first missing component named like one that is there.
fn similar(place: &Place<'_>, source: &str) -> Option<String> {
    let mut components = source.split('/').filter(|component| !matches!(*component, "" | "."));
    let mut above = Vec::new();
    while let Some(component) = components.next() {
        if has_meta(component.as_bytes()) {
            return None;
        }
        let path = join(&above, component.as_bytes());
        if exists(place.root, &real_path(place.root, &path).ok()?).ok()? {
            above = path;
            continue;
        }
        let names = list(place.root, &real_path(place.root, &above).ok()?).ok()?;
        let names: Vec<String> = names.into_iter().filter_map(|name| String::from_utf8(name).ok()).collect();
        let shown = names.iter().map(String::as_str).filter(|name| {
            let path = join(&above, name.as_bytes());
            !place.ignore.is_some_and(|rules| rules.is_ignored(&String::from_utf8_lossy(&path)))
        });
        let best = join(&above, nearest(component, shown)?.as_bytes());
        let whole = components.fold(best.clone(), |path, component| join(&path, component.as_bytes()));
        let there = exists(place.root, &real_path(place.root, &whole).ok()?).ok()?;
        return String::from_utf8(if there { whole } else { best }).ok();
    }
    None
}
