//! `kiln cp CONTAINER:/PATH DESTINATION`

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kiln_build::container::open_files;
use kiln_build::toolkit::{CopyOut, CopySource};
use kiln_containers::{Config, Container, MountKind, Volumes};
use kiln_layer::beneath;
use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::args::toolkit::CpArgs;
use crate::commands::cp::write;
use crate::errors::Failure;
use crate::session::Session;

pub(super) fn run(
    session: &Session,
    args: &CpArgs,
    container: &Container,
    path: &[u8],
) -> Result<u8, Failure> {
    let (tree, path) = match container.open_root()? {
        Some(tree) => (tree, path.to_vec()),
        None => {
            let files = open_files(&session.engine, &container.id().key())?;
            match mounted(session, &container.config()?, files.as_fd(), path)? {
                Some(at) => (open_dir(&at.dir)?, at.path),
                None => (files, path.to_vec()),
            }
        }
    };
    let what = CopyOut { from: CopySource::Tree(tree.as_fd()), path: &path, follow: args.follow_link };
    write(session, args, &what)
}

/// Where the host has what is mounted in a container that does not run.
pub(super) struct Mounted {
    pub(super) dir: PathBuf,
    /// In that directory.
    pub(super) path: Vec<u8>,
    pub(super) read_only: bool,
    /// A file is mounted, the one at `path`.
    pub(super) is_file: bool,
}

/// Where the host has what is at `path` of a container that does not run, if something is mounted there.
/// `root` is the container's own tree, through whose links both the path and the mounts go.
pub(super) fn mounted(
    session: &Session,
    config: &Config,
    root: BorrowedFd<'_>,
    path: &[u8],
) -> Result<Option<Mounted>, Failure> {
    let real = |path: &[u8]| {
        let clean =
            || path.split(|&b| b == b'/').filter(|part| !part.is_empty()).collect::<Vec<_>>().join(&b'/');
        beneath::real_path(root, path).unwrap_or_else(|_| clean())
    };
    let path = real(path);
    let mut best: Option<(usize, Mounted)> = None;
    for mount in &config.mounts {
        let target = real(mount.target.as_bytes());
        let Some(rest) = path.strip_prefix(&target[..]).filter(|rest| rest.is_empty() || rest[0] == b'/')
        else {
            continue;
        };
        let source = match &mount.kind {
            MountKind::Bind(path) => path.clone(),
            MountKind::Volume { name, .. } => Volumes::open(session.containers.root()).data(name)?,
            MountKind::Tmpfs { .. } => continue,
        };
        let read_only = mount.read_only;
        let found = match (source.is_dir(), source.parent(), source.file_name()) {
            (true, ..) => {
                let path = if rest.is_empty() { b"/".to_vec() } else { rest.to_vec() };
                Mounted { dir: source, path, read_only, is_file: false }
            }
            (false, Some(dir), Some(name)) if rest.is_empty() => {
                let path = [b"/", name.as_bytes()].concat();
                Mounted { dir: dir.to_owned(), path, read_only, is_file: true }
            }
            _ => continue,
        };
        if best.as_ref().is_none_or(|(length, _)| *length < target.len()) {
            best = Some((target.len(), found));
        }
    }
    Ok(best.map(|(_, found)| found))
}

pub(super) fn open_dir(path: &Path) -> Result<OwnedFd, Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty())
        .map_err(|error| Failure::source(format!("{}: {error}", path.display())))
}
