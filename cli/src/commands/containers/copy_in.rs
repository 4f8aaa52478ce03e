//! `kiln cp SOURCE CONTAINER:/PATH`

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_build::streams::InStream;
use kiln_containers::{Container, Error};
use kiln_layer::{CopyRequest, EntryKind, ExtractOptions, LookedAt, ScanOptions, TopDir, beneath};
use kiln_snapshotter::OpenOptions;
use rustix::fs::{FileType, OFlags, fstat};

use super::copy_out::{mounted, open_dir};
use crate::args::toolkit::CpArgs;
use crate::errors::Failure;
use crate::escape;
use crate::session::Session;

/// How long a container may be between two runs.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn run(
    session: &Session,
    args: &CpArgs,
    container: &Container,
    path: &[u8],
) -> Result<u8, Failure> {
    // Two mounts that write to one layer are undefined: either it runs, and its own mount is used, or nobody
    // can mount it meanwhile. Between two runs of its process neither is so for a moment.
    let begun = Instant::now();
    let _held = loop {
        if let Some(root) = container.open_root()? {
            copy(session, args, root.as_fd(), path)?;
            return Ok(0);
        }
        match container.hold()? {
            Some(held) => break held,
            None if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(2)),
            None => {
                let name = container.config()?.name;
                return Err(Error::WrongState { name, problem: "is neither running nor at rest" }.into());
            }
        }
    };
    let config = container.config()?;
    let options = OpenOptions { durable: true, ..OpenOptions::default() };
    let root = session.engine.snapshots.open_active(&container.id().key(), &options)?;
    let refused = |what: &str| Failure::source(format!("{} in the container {what}", escape::path(path)));
    match mounted(session, &config, root.as_fd(), path)? {
        Some(at) if at.read_only => return Err(refused("is mounted read-only")),
        Some(at) if at.is_file => return Err(refused("is a file of the host, mounted there")),
        Some(at) => copy(session, args, open_dir(&at.dir)?.as_fd(), &at.path)?,
        None if config.process.read_only => return Err(refused("is in a root that is read-only")),
        None => copy(session, args, root.as_fd(), path)?,
    }
    Ok(0)
}

/// Where something in a tree is, and whether it is a directory; `None`: nothing is there.
fn kind(root: BorrowedFd<'_>, path: &[u8]) -> Option<bool> {
    let file = beneath::open_file(root, path, OFlags::PATH | OFlags::CLOEXEC).ok()?;
    let stat = fstat(&file).ok()?;
    Some(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

fn copy(session: &Session, args: &CpArgs, root: BorrowedFd<'_>, path: &[u8]) -> Result<(), Failure> {
    let shown = || escape::path(path).to_string();
    let cancel = session.cancel.flag();
    let target = beneath::real_path(root, path)
        .map_err(|error| Failure::source(format!("{} in the container: {error}", shown())))?;
    let there = if target.is_empty() { Some(true) } else { kind(root, &target) };
    if args.source == OsStr::new("-") {
        if there != Some(true) {
            return Err(Failure::source(format!("{} in the container is no directory", shown())));
        }
        let dir = beneath::open_file(root, &target, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC)
            .map_err(|error| Failure::source(error.to_string()))?;
        let options = ExtractOptions { owner: None, limits: session.engine.limits, cancel };
        let input = InStream::standard(&session.cancel)
            .map_err(|error| Failure::source(format!("standard input: {error}")))?;
        let input = std::io::BufReader::new(input);
        kiln_layer::extract(input, dir.as_fd(), &options)
            .map_err(|error| Failure::from(kiln_build::BuildError::from(error)))?;
        return Ok(());
    }
    let (parent, name, contents) = source(args)?;
    let from = open_dir(&parent)?;
    let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel };
    let missing = |error: &dyn std::error::Error| {
        Failure::source(format!("{}: {error}", Path::new(&args.source).display()))
    };
    let entries = kiln_layer::scan(from.as_fd(), &name, &options).map_err(|error| missing(&error))?;
    let is_dir = entries.first().is_some_and(|first| first.kind == EntryKind::Dir);
    let destination = match there {
        Some(true) if contents => target,
        Some(true) => join(&target, name.rsplit(|&b| b == b'/').next().unwrap_or_default()),
        Some(false) if is_dir => {
            return Err(Failure::source(format!("{} in the container is a file", shown())));
        }
        Some(false) => target,
        None if path.ends_with(b"/") && !is_dir => {
            return Err(Failure::source(format!("there is no directory {} in the container", shown())));
        }
        None => {
            let above = target.rsplitn(2, |&b| b == b'/').nth(1).unwrap_or_default();
            if !above.is_empty() && kind(root, above) != Some(true) {
                return Err(Failure::source(format!("there is nothing to put {} into", shown())));
            }
            target
        }
    };
    let request = CopyRequest {
        looked_at: Some(LookedAt::now()),
        strip: &name,
        destination: &destination,
        owner: (!args.archive).then_some((0, 0)),
        top: if contents { TopDir::Contents } else { TopDir::Itself },
        ..CopyRequest::tree(from.as_fd(), &entries, root, cancel)
    };
    kiln_layer::copy(&request).map(drop).map_err(|error| missing(&error))
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}

/// The directory that the source is in, its name there, and whether only what is in it is meant.
fn source(args: &CpArgs) -> Result<(PathBuf, Vec<u8>, bool), Failure> {
    let bytes = args.source.as_bytes();
    let contents = bytes.ends_with(b"/.") || bytes == b"." || bytes == b"/";
    let path = Path::new(&args.source);
    let failed = |error: std::io::Error| Failure::source(format!("{}: {error}", path.display()));
    // A link in the last place is copied as one, unless it is to be followed.
    let real = match path.file_name() {
        Some(name) if !args.follow_link && !contents && !bytes.ends_with(b"/") => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            parent.unwrap_or(Path::new(".")).canonicalize().map_err(failed)?.join(name)
        }
        _ => path.canonicalize().map_err(failed)?,
    };
    match (real.parent(), real.file_name()) {
        (Some(parent), Some(name)) => Ok((parent.to_owned(), name.as_bytes().to_vec(), contents)),
        _ => Ok((real.clone(), Vec::new(), true)),
    }
}
