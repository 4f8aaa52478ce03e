//! `kiln cp CONTAINER:/PATH DESTINATION`

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use kiln_build::container::open_files;
use kiln_build::toolkit::{CopyOut, CopySource};
use kiln_containers::{Config, Container, MountKind, Volumes};
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
        None => match mounted(session, &container.config()?, path)? {
            Some((dir, rest)) => (open_dir(&dir)?, rest),
            None => (open_files(&session.engine, &container.id().key())?, path.to_vec()),
        },
    };
    let what = CopyOut { from: CopySource::Tree(tree.as_fd()), path: &path, follow: args.follow_link };
    write(session, args, &what)
}

/// Where the host has what is mounted at a path of a container that does not run, and the path in it.
pub(super) fn mounted(
    session: &Session,
    config: &Config,
    path: &[u8],
) -> Result<Option<(PathBuf, Vec<u8>)>, Failure> {
    let mut best: Option<(usize, PathBuf, Vec<u8>)> = None;
    for mount in &config.mounts {
        let target = mount.target.trim_end_matches('/').as_bytes();
        let Some(rest) = path.strip_prefix(target).filter(|rest| rest.is_empty() || rest[0] == b'/') else {
            continue;
        };
        let source = match &mount.kind {
            MountKind::Bind(path) => path.clone(),
            MountKind::Volume { name, .. } => Volumes::open(session.containers.root()).data(name)?,
            MountKind::Tmpfs { .. } => continue,
        };
        if source.is_dir() && best.as_ref().is_none_or(|(length, ..)| *length < target.len()) {
            let rest = if rest.is_empty() { b"/".to_vec() } else { rest.to_vec() };
            best = Some((target.len(), source, rest));
        }
    }
    Ok(best.map(|(_, source, rest)| (source, rest)))
}

pub(super) fn open_dir(path: &Path) -> Result<OwnedFd, Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty())
        .map_err(|error| Failure::source(format!("{}: {error}", path.display())))
}
