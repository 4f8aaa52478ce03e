//! `kiln build --watch`: what a build reads, and the news of it.
//!
//! Directories are watched, not files, so that it does not matter how an editor replaces a file.

mod inotify;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kiln_frontend::Lowered;
use kiln_frontend::ignore::Patterns;
use kiln_llb::{Exec, File, FileAction, MountKind, Op, Source};

pub use self::inotify::{News, Watcher};
use crate::dockerfile::{IGNORE_NAMES, NAMES};
use crate::input::{DockerfileSource, Reader};
use crate::lock::{self, LockMode, Pins};
use crate::lowering::{Purpose, lower_all};
use crate::remote_context::ContextSource;
use crate::{BuildCancel, BuildError, BuildRequest, Engine, NamedSource};

/// Why a build cannot be watched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// What is read does not stay, or is not here.
    #[error("{what} cannot be watched")]
    Elsewhere {
        /// The context, or the Dockerfile.
        what: &'static str,
    },
    /// A limit of the user: the kernel watches no more directories.
    #[error("the kernel watches no more directories: {watched} of this build are watched")]
    TooMany {
        /// How many are.
        watched: usize,
    },
    /// A limit of the user: no more programs may watch.
    #[error("too many programs watch files already")]
    TooManyWatchers {
        /// `EMFILE`.
        source: io::Error,
    },
    /// Something else.
    #[error("cannot watch {}", path.display())]
    Failed {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What a build reads of this machine's files.
#[derive(Debug, Clone, Default)]
pub struct Reads {
    trees: Vec<ReadTree>,
    /// The Dockerfile and its ignore files, whether they are there or would count if they were.
    files: BTreeSet<PathBuf>,
    /// What the build itself writes.
    written: Vec<PathBuf>,
}

/// Parts of a directory.
#[derive(Debug, Clone)]
struct ReadTree {
    /// Without links.
    root: PathBuf,
    ignore: Patterns,
    /// Below the root; an empty path is all of it.
    parts: Vec<PathBuf>,
}

/// What the build that `request` asks for would read now; `written` is what it writes itself. Of a Dockerfile that
/// cannot be understood, all that it could read.
///
/// Reads the Dockerfile and the ignore files, and what named contexts are; no file of a context.
///
/// # Errors
/// [`WatchError::Elsewhere`]; a context that is not there.
pub fn reads(
    engine: &Engine,
    request: &BuildRequest,
    written: &[PathBuf],
    cancel: &BuildCancel,
) -> Result<Reads, BuildError> {
    let ContextSource::Directory(context) = &request.context else {
        return Err(WatchError::Elsewhere { what: "a context that is not a directory" }.into());
    };
    if request.dockerfile == DockerfileSource::Stdin {
        return Err(WatchError::Elsewhere { what: "a Dockerfile on standard input" }.into());
    }
    let resolved = |path: &Path| {
        let unreadable = |source| BuildError::Unreadable { path: path.to_owned(), source };
        path.canonicalize().map_err(unreadable)
    };
    let mut reads = Reads::default();
    let root = resolved(context)?;
    match &request.dockerfile {
        DockerfileSource::File(path) => {
            reads.add_dockerfile(path);
            reads.add_lock(&path.with_file_name(lock::NAME), request.lock);
        }
        DockerfileSource::Usual => {
            NAMES.iter().for_each(|name| reads.add_dockerfile(&root.join(name)));
            reads.add_lock(&root.join(lock::NAME), request.lock);
        }
        DockerfileSource::Stdin | DockerfileSource::Url(_) => {}
    }
    reads.add_ignore_files(&root);
    for named in &request.contexts {
        if let NamedSource::Files(ContextSource::Directory(path)) = &named.source {
            reads.add_ignore_files(&resolved(path)?);
        }
    }
    reads.written.extend(written.iter().filter_map(|path| whole(path)));
    let reader = Reader { engine, request, cancel };
    let understood = reader.read().and_then(|input| {
        let mut pins = Pins::seen(engine, &input.lock, request.lock);
        Ok((lower_all(&reader, &input, Purpose::Look, &mut pins)?.lowered, input))
    });
    let Ok((lowered, input)) = understood else {
        reads.trees.push(ReadTree { root, ignore: Patterns::default(), parts: vec![PathBuf::new()] });
        return Ok(reads);
    };
    for (name, path, ignore) in input.directories() {
        let root = resolved(path)?;
        let parts = parts(&lowered, name).into_iter().map(|part| without_links(&root, part));
        let parts: BTreeSet<PathBuf> = parts.collect();
        if !parts.is_empty() {
            let (ignore, parts) = (ignore.clone(), parts.into_iter().collect());
            reads.trees.push(ReadTree { root, ignore, parts });
        }
    }
    Ok(reads)
}

/// An absolute path without links but for the last name.
fn whole(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    let parent = path.parent()?.canonicalize().ok()?;
    Some(parent.join(path.file_name()?))
}

/// What is read of the local source `name`: paths up to their first pattern.
fn parts(lowered: &Lowered, name: &str) -> Vec<PathBuf> {
    let vertices = lowered.definition.vertices();
    let mut out = Vec::new();
    for vertex in vertices {
        let is_it = |position: usize| {
            let input = vertex.inputs.get(position).map(|id| &vertices[id.0].op);
            matches!(input, Some(Op::Source(Source::Local(local))) if local.name == name)
        };
        match &vertex.op {
            Op::File(File { actions, .. }) => {
                for action in actions {
                    if let FileAction::Copy(copy) = action
                        && is_it(copy.from.0)
                    {
                        out.extend(copy.sources.iter().map(|source| literal(source)));
                    }
                }
            }
            Op::Exec(Exec { mounts, .. }) => {
                for mount in mounts {
                    let (from, source) = match &mount.kind {
                        MountKind::Bind(bind) => (bind.from, &bind.source),
                        MountKind::Cache(cache) => (cache.from, &cache.source),
                        MountKind::Tmpfs { .. } | MountKind::Secret(_) | MountKind::Ssh(_) => continue,
                    };
                    if from.is_some_and(|from| is_it(from.0)) {
                        out.push(source.split('/').collect());
                    }
                }
            }
            Op::Source(_) | Op::Merge(_) => {}
        }
    }
    out
}

fn literal(pattern: &str) -> PathBuf {
    let components = pattern.split('/').filter(|component| !matches!(*component, "" | "."));
    components.take_while(|component| !component.contains(['*', '?', '[', '\\'])).collect()
}

/// `part` up to the first component that is a link: that may lead anywhere in the tree.
fn without_links(root: &Path, part: PathBuf) -> PathBuf {
    let mut at = root.to_owned();
    for component in part.components() {
        at.push(component);
        if fs::symlink_metadata(&at).is_ok_and(|found| found.is_symlink()) {
            return PathBuf::new();
        }
    }
    part
}

impl Reads {
    fn add_dockerfile(&mut self, path: &Path) {
        let mut ignore = path.as_os_str().to_owned();
        ignore.push(".dockerignore");
        for path in [path, Path::new(&ignore)] {
            // The link may change, and what it leads to.
            self.files.extend(whole(path));
            self.files.extend(path.canonicalize());
        }
    }

    /// A lock file that the build writes itself is no news to it.
    fn add_lock(&mut self, path: &Path, mode: LockMode) {
        match mode {
            LockMode::Off => {}
            mode if mode.writes() => self.written.extend(whole(path)),
            _ => self.files.extend(whole(path)),
        }
    }

    fn add_ignore_files(&mut self, root: &Path) {
        for name in IGNORE_NAMES {
            self.files.insert(root.join(name));
            self.files.extend(root.join(name).canonicalize());
        }
    }

    /// Whether the same is read, so that the same directories are to be watched.
    fn is_same(&self, other: &Self) -> bool {
        let Self { trees, files, written } = self;
        let are_alike = |(one, other): (&ReadTree, &ReadTree)| one.is_same(other);
        (files, written, trees.len()) == (&other.files, &other.written, other.trees.len())
            && trees.iter().zip(&other.trees).all(are_alike)
    }

    /// Whether a change at `path` may change the build; `is_dir`: there is, or was, a directory.
    fn concerns(&self, path: &Path, is_dir: bool) -> bool {
        if self.files.contains(path) {
            return true;
        }
        !self.is_written(path) && self.trees.iter().any(|tree| tree.concerns(path, is_dir))
    }

    /// The build's own files, also while they are not whole.
    fn is_written(&self, path: &Path) -> bool {
        let is_below = |written: &PathBuf| path.starts_with(written);
        let is_temporary = |written: &PathBuf| {
            let (Some(name), Some(at)) = (written.file_name(), path.file_name()) else { return false };
            let rest = at.as_bytes().strip_prefix(name.as_bytes());
            path.parent() == written.parent() && rest.is_some_and(|rest| rest.ends_with(b".partial"))
        };
        self.written.iter().any(|written| is_below(written) || is_temporary(written))
    }
}

impl ReadTree {
    fn is_same(&self, other: &Self) -> bool {
        let Self { root, ignore, parts } = self;
        (root, ignore.lines(), parts) == (&other.root, other.ignore.lines(), &other.parts)
    }

    fn concerns(&self, path: &Path, is_dir: bool) -> bool {
        let Ok(below) = path.strip_prefix(&self.root) else { return false };
        self.meets(below) && !self.is_left_out(below, is_dir)
    }

    /// On the way to a part, or in it.
    fn meets(&self, below: &Path) -> bool {
        self.parts.iter().any(|part| below.starts_with(part) || part.starts_with(below))
    }

    fn is_left_out(&self, below: &Path, is_dir: bool) -> bool {
        let text = String::from_utf8_lossy(below.as_os_str().as_bytes());
        self.ignore.is_ignored(&text) && !(is_dir && self.ignore.may_contain_included(&text))
    }
}

#[cfg(test)]
mod tests;
