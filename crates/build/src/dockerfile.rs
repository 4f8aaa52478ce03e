//! The Dockerfile and the ignore file: where they are, and their text.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_frontend::ignore::Patterns;
use kiln_frontend::{Diagnostic, Severity, Span};

use crate::BuildError;

/// A Dockerfile as read: for messages.
#[derive(Debug)]
pub struct Dockerfile {
    /// Its name as the user would type it.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// Names that are looked for in a context, the first one that exists counts.
pub(crate) const NAMES: [&str; 3] = ["Dockerfile", "dockerfile", "Containerfile"];

/// Ignore files at a context's root, the first one that exists counts.
pub(crate) const IGNORE_NAMES: [&str; 2] = [".dockerignore", ".containerignore"];

/// A Dockerfile or ignore file beyond this size is refused before it is read.
pub(crate) const MAX_BYTES: u64 = 1 << 20;

/// `-f`, or the first of [`NAMES`] in `context`.
pub(crate) fn find(context: &Path, chosen: Option<&Path>) -> Result<PathBuf, BuildError> {
    let missing = |path: PathBuf| BuildError::NoDockerfile { path };
    // Not to be allowed to look is another trouble than its not being there.
    let is_there = |path: &Path| match path.try_exists() {
        Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
            Err(BuildError::Unreadable { path: path.to_owned(), source })
        }
        there => Ok(there.unwrap_or(false)),
    };
    if let Some(path) = chosen {
        return if is_there(path)? { Ok(path.to_owned()) } else { Err(missing(path.to_owned())) };
    }
    for path in NAMES.iter().map(|name| context.join(name)) {
        if is_there(&path)? {
            return Ok(path);
        }
    }
    Err(missing(context.join(NAMES[0])))
}

/// Reads the Dockerfile at `path`.
pub(crate) fn read(path: &Path) -> Result<Dockerfile, BuildError> {
    let name = path.strip_prefix("./").unwrap_or(path).display().to_string();
    match read_bounded(path).map_err(|source| BuildError::Unreadable { path: path.to_owned(), source })? {
        Ok(bytes) => from_bytes(name, &bytes),
        Err(size) => Err(too_large(name, size)),
    }
}

/// Text that came from somewhere else than a file: standard input, a URL.
pub(crate) fn from_bytes(name: String, bytes: &[u8]) -> Result<Dockerfile, BuildError> {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(too_large(name, bytes.len() as u64));
    }
    match kiln_frontend::decode(bytes) {
        Ok(text) => Ok(Dockerfile { name, text: text.to_owned() }),
        Err(diagnostic) => Err(wrong(name, String::from_utf8_lossy(bytes).into_owned(), diagnostic)),
    }
}

fn too_large(name: String, size: u64) -> BuildError {
    let message = format!("the Dockerfile has {size} bytes, 1 MiB is the limit");
    let span = Span { start: 0, end: 0 };
    let diagnostic = Diagnostic { severity: Severity::Error, span, message, hint: None, rule: None };
    wrong(name, String::new(), diagnostic)
}

fn wrong(name: String, text: String, diagnostic: Diagnostic) -> BuildError {
    BuildError::Dockerfile { dockerfile: Arc::new(Dockerfile { name, text }), diagnostics: vec![diagnostic] }
}

/// The bytes of a regular file; the inner error is the size of one that is too large.
fn read_bounded(path: &Path) -> io::Result<Result<Vec<u8>, u64>> {
    // Never waits for a FIFO's writer: what is no regular file is refused before it is opened.
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.len() > MAX_BYTES {
        return Ok(Err(metadata.len()));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize + 1);
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(if bytes.len() as u64 > MAX_BYTES { Err(bytes.len() as u64) } else { Ok(bytes) })
}

/// The rules for a context, with the name of the file they come from.
///
/// `<Dockerfile>.dockerignore` beside the Dockerfile, else `.dockerignore` or `.containerignore`
/// at the context's root.
pub(crate) fn read_ignore(context: &Path, dockerfile: Option<&Path>) -> Result<Patterns, BuildError> {
    let beside = dockerfile.map(|path| {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".dockerignore");
        PathBuf::from(beside)
    });
    let beside = beside.map(|path| (path.display().to_string(), path));
    let at_root = IGNORE_NAMES.iter().map(|&name| (name.to_owned(), context.join(name)));
    for (name, path) in beside.into_iter().chain(at_root) {
        let bytes = match read_bounded(&path) {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(size)) => {
                let source = io::Error::other(format!("it has {size} bytes, 1 MiB is the limit"));
                return Err(BuildError::Unreadable { path, source });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(BuildError::Unreadable { path, source }),
        };
        // Paths are bytes, rules are text: what is no UTF-8 matches nothing.
        let text = String::from_utf8_lossy(&bytes);
        return match Patterns::parse(&text) {
            Ok(rules) => Ok(rules.named(name)),
            Err(error) => Err(BuildError::Ignore {
                file: path.display().to_string(),
                line: error.line,
                message: error.message,
            }),
        };
    }
    Ok(no_rules())
}

/// Rules that ignore nothing.
pub(crate) fn no_rules() -> Patterns {
    Patterns::from_lines(&[]).unwrap_or_else(|_| unreachable!("no lines, no bad line"))
}
