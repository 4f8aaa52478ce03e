//! Paths as bytes: what the kernel takes, checked before it sees them.

use std::cmp::Ordering;
use std::fmt;

/// The kernel's PATH_MAX counts the closing NUL.
const PATH_MAX: usize = 4095;
/// NAME_MAX of every file system in use.
const NAME_MAX: usize = 255;

/// A path below a root, for messages: bytes as they are, odd ones escaped when shown.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryPath(pub Vec<u8>);

impl fmt::Display for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Hostile names must not fill the screen.
        let shown = &self.0[..self.0.len().min(300)];
        write!(f, "\"{}\"", shown.escape_ascii())
    }
}

impl fmt::Debug for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<&[u8]> for EntryPath {
    fn from(path: &[u8]) -> Self {
        Self(path.to_vec())
    }
}

/// Why a path cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// `..` leads above the root.
    #[error("leads above the root")]
    Above,
    /// A NUL byte, which the kernel would take for the end.
    #[error("has a NUL byte")]
    Nul,
    /// Two slashes in a row.
    #[error("has an empty component")]
    EmptyComponent,
    /// A component of more than 255 bytes.
    #[error("has a component of {0} bytes, 255 are allowed")]
    NameTooLong(usize),
    /// More than 4095 bytes.
    #[error("has {0} bytes, 4095 are allowed")]
    TooLong(usize),
    /// The root itself, or `.` or `..` as last component, where a name is needed.
    #[error("does not end in a name")]
    NoName,
}

/// Refuses what the kernel would cut or misread. `..` is left to it: it stays in the root.
pub(crate) fn check(path: &[u8]) -> Result<(), PathError> {
    if path.len() > PATH_MAX {
        return Err(PathError::TooLong(path.len()));
    }
    if path.contains(&0) {
        return Err(PathError::Nul);
    }
    let inner = path.strip_prefix(b"/").unwrap_or(path);
    let inner = inner.strip_suffix(b"/").unwrap_or(inner);
    if inner.is_empty() {
        return Ok(());
    }
    for component in inner.split(|&b| b == b'/') {
        match component.len() {
            0 => return Err(PathError::EmptyComponent),
            length if length > NAME_MAX => return Err(PathError::NameTooLong(length)),
            _ => {}
        }
    }
    Ok(())
}

/// The same for a path whose last component the kernel listed in a directory, and all in front of it was
/// checked: only lengths are left to look at.
pub(crate) fn check_listed(path: &[u8], name: &[u8]) -> Result<(), PathError> {
    match (path.len(), name.len()) {
        (length, _) if length > PATH_MAX => Err(PathError::TooLong(length)),
        (_, length) if length > NAME_MAX => Err(PathError::NameTooLong(length)),
        _ => Ok(()),
    }
}

/// A header's path relative to the root, without `.` and `..`; empty for the root itself.
pub(crate) fn normalise(path: &[u8]) -> Result<Vec<u8>, PathError> {
    let relative = &path[path.iter().take_while(|&&b| b == b'/').count()..];
    check(relative)?;
    let mut parts: Vec<&[u8]> = Vec::new();
    for component in relative.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                parts.pop().ok_or(PathError::Above)?;
            }
            name => parts.push(name),
        }
    }
    Ok(parts.join(&b'/'))
}

/// Like [`normalise`] for what `ADD` unpacks: `..` stops at the root, empty components do not count.
pub(crate) fn clip(path: &[u8]) -> Result<Vec<u8>, PathError> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for component in path.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    let clipped = parts.join(&b'/');
    check(&clipped)?;
    Ok(clipped)
}

/// The order of a walk: by component, so that what is in a directory stands behind it at once.
pub fn walk_order(one: &[u8], other: &[u8]) -> Ordering {
    one.split(|&byte| byte == b'/').cmp(other.split(|&byte| byte == b'/'))
}

/// Parent and last component; the parent of a top-level name is empty.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// `path/name`; an empty path is the root, an empty name the path itself.
pub(crate) fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    match (path, name) {
        (b"", name) => name.to_vec(),
        (path, b"") => path.to_vec(),
        (path, name) => [path, b"/", name].concat(),
    }
}

/// Whether `path` is in the directory `above` or further below it. Everything is below the root.
pub(crate) fn is_below(path: &[u8], above: &[u8]) -> bool {
    match path.strip_prefix(above) {
        Some(rest) if above.is_empty() => !rest.is_empty(),
        rest => rest.is_some_and(|rest| rest.starts_with(b"/")),
    }
}

/// `path` relative to `prefix`; empty when they are equal, whole when `prefix` is no parent.
pub(crate) fn strip<'p>(path: &'p [u8], prefix: &[u8]) -> &'p [u8] {
    match path.strip_prefix(prefix) {
        Some(rest) if prefix.is_empty() || rest.is_empty() => rest,
        Some([b'/', rest @ ..]) => rest,
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_paths_become_relative() {
        for (path, expected) in
            [("./a/b/", "a/b"), ("/abs/x", "abs/x"), ("///x", "x"), (".", ""), ("a/../b/./c", "b/c")]
        {
            assert_eq!(normalise(path.as_bytes()), Ok(expected.as_bytes().to_vec()), "{path}");
        }
    }

    #[test]
    fn clipped_paths_stay_inside() {
        for (path, expected) in [("../x", "x"), ("a/../../x//y/", "x/y"), ("/", ""), ("./..", "")] {
            assert_eq!(clip(path.as_bytes()), Ok(expected.as_bytes().to_vec()), "{path}");
        }
        assert_eq!(clip(b"a\0b"), Err(PathError::Nul));
    }

    #[test]
    fn paths_above_the_root_and_malformed_ones_are_refused() {
        assert_eq!(normalise(b"../x"), Err(PathError::Above));
        assert_eq!(normalise(b"a/../../x"), Err(PathError::Above));
        assert_eq!(normalise(b"a//b"), Err(PathError::EmptyComponent));
        assert_eq!(normalise(b"a\0b"), Err(PathError::Nul));
        assert_eq!(normalise(&[b'a'; 256]), Err(PathError::NameTooLong(256)));
        assert_eq!(normalise(&b"a/".repeat(2049)), Err(PathError::TooLong(4098)));
    }

    #[test]
    fn what_was_listed_is_checked_as_every_path_is() {
        let name = [b'n'; 256];
        for (above, name) in [(&b"a/b"[..], &b"c"[..]), (b"", &name[..255]), (b"a", &name)] {
            let path = join(above, name);
            assert_eq!(check_listed(&path, name), check(&path));
        }
        for length in [PATH_MAX, PATH_MAX + 1] {
            let path = &b"a/".repeat(PATH_MAX)[..length];
            assert_eq!(check_listed(path, b"a"), check(path), "{length}");
        }
    }

    #[test]
    fn a_prefix_is_stripped_only_at_a_slash() {
        assert_eq!(strip(b"a/b", b"a"), b"b");
        assert_eq!(strip(b"a", b"a"), b"");
        assert_eq!(strip(b"ab", b"a"), b"ab");
        assert_eq!(strip(b"ab", b""), b"ab");
    }
}
