//! `COPY`, `ADD`, `WORKDIR`, heredocs: changes of one tree's files.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_layer::{BeneathError, CopyError, EntryPath, beneath};
use kiln_llb as llb;
use kiln_oci::ActiveKey;
use kiln_snapshotter::OpenOptions;
use kiln_solver::Scope;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, StatxFlags, Timespec, Timestamps, UTIME_OMIT, Uid, fchmod, fchown,
    futimens, openat, statx,
};

use super::BuildOp;
use super::copy::Root;
use crate::OpError;
use crate::tree::Tree;

impl BuildOp {
    pub(super) fn run_file(
        &self,
        file: &llb::File,
        inputs: &[Tree],
        scope: &Scope<'_>,
    ) -> Result<Tree, OpError> {
        let base = file.base.and_then(|index| inputs[index.0].snapshot());
        if let [llb::FileAction::Copy(copy)] = file.actions.as_slice()
            && self.is_plain(copy, &inputs[copy.from.0])?
        {
            return self.run_copy(copy, &inputs[copy.from.0], base, scope);
        }
        let active = self.shared.engine.prepare(base)?;
        let root = self.open_root(active.key(), base.is_some())?;
        for (at, action) in file.actions.iter().enumerate() {
            match action {
                llb::FileAction::Mkdir(mkdir) => {
                    let owner = match &mkdir.owner {
                        Some(owner) => resolve_owner(root.as_fd(), owner)?,
                        None => (0, 0),
                    };
                    let path = relative(&mkdir.path);
                    let times =
                        mkdir.created.map(|seconds| times(root.as_fd(), path, seconds)).transpose()?;
                    make_dirs(root.as_fd(), path, mkdir.mode, owner)?;
                    set_times(root.as_fd(), times.unwrap_or_default())?;
                }
                llb::FileAction::Mkfile(mkfile) => make_file(root.as_fd(), mkfile)?,
                llb::FileAction::Copy(copy) => {
                    let from = &inputs[copy.from.0];
                    let selection = self.selection(at, copy, from)?;
                    self.copy(copy, &selection, from, &Root::seen(root.as_fd()), scope)?;
                }
            }
        }
        drop(root);
        Ok(self.commit(active)?)
    }

    /// Without a base there is nothing to see through: the changes are the tree. A mount would mark
    /// its directories opaque, and they would hide whatever `COPY --link` stacks them on.
    fn open_root(&self, key: &ActiveKey, has_base: bool) -> Result<OwnedFd, OpError> {
        let snapshots = &self.shared.engine.snapshots;
        Ok(if has_base {
            snapshots.open_active(key, &OpenOptions::default())?
        } else {
            snapshots.open_layer(key)?
        })
    }
}

/// The times that directories shall have when `path` was made: new ones `created`, the one they
/// are made in its own. Deepest first, because each changes the one above.
fn times(root: BorrowedFd<'_>, path: &[u8], created: i64) -> Result<Vec<(Vec<u8>, Timestamps)>, OpError> {
    let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    let at = |last_modification| Timestamps { last_access: omit, last_modification };
    let mut found = Vec::new();
    let ends = (1..=path.len()).filter(|&end| end == path.len() || path[end] == b'/');
    for end in ends.collect::<Vec<_>>().into_iter().rev() {
        let Ok(there) = beneath::open_file(root, &path[..end], OFlags::PATH) else {
            found.push((path[..end].to_vec(), at(Timespec { tv_sec: created, tv_nsec: 0 })));
            continue;
        };
        if !found.is_empty() {
            let stat = statx(&there, c"", AtFlags::EMPTY_PATH, StatxFlags::MTIME)
                .map_err(|errno| read_error(&path[..end], errno))?;
            let tv_nsec = stat.stx_mtime.tv_nsec.into();
            found.push((path[..end].to_vec(), at(Timespec { tv_sec: stat.stx_mtime.tv_sec, tv_nsec })));
        }
        break;
    }
    Ok(found)
}

fn set_times(root: BorrowedFd<'_>, times: Vec<(Vec<u8>, Timestamps)>) -> Result<(), OpError> {
    for (path, times) in times {
        let directory = beneath::open_file(root, &path, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(|error| path_error(&path, error))?;
        futimens(&directory, &times).map_err(|errno| read_error(&path, errno))?;
    }
    Ok(())
}

fn read_error(path: &[u8], errno: rustix::io::Errno) -> OpError {
    OpError::Read { path: format!("/{}", String::from_utf8_lossy(path)), source: errno.into() }
}

/// Writes the file, whatever stood there; behind a link, as any destination.
fn make_file(root: BorrowedFd<'_>, mkfile: &llb::Mkfile) -> Result<(), OpError> {
    let llb::Mkfile { path, mode, data } = mkfile;
    let failed = |source| OpError::Write { path: path.clone(), source };
    let real = beneath::real_path(root, relative(path)).map_err(|error| path_error(relative(path), error))?;
    make_dirs(root, parent(&real), 0o755, (0, 0))?;
    let (directory, name) =
        beneath::open_parent(root, &real).map_err(|error| path_error(relative(path), error))?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = openat(&directory, name, flags, Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
    let mut file = File::from(made);
    file.write_all(data.as_bytes()).map_err(failed)?;
    // Owner before mode: chown(2) clears setuid bits.
    fchown(&file, Some(Uid::ROOT), Some(Gid::ROOT)).map_err(|errno| failed(errno.into()))?;
    fchmod(&file, Mode::from_raw_mode(mode & 0o7777)).map_err(|errno| failed(errno.into()))
}

/// User and group of what a step makes. A number alone is its own group, whatever `/etc/passwd`
/// says of it (docker's documentation of `--chown`); a name has the group it has there.
pub(super) fn resolve_owner(root: BorrowedFd<'_>, owner: &str) -> Result<(u32, u32), OpError> {
    let ids = kiln_executor::resolve_user(root, owner)
        .map_err(|source| OpError::Owner { owner: owner.to_owned(), source })?;
    let is_number = owner.parse() == Ok(ids.uid);
    Ok((ids.uid, if is_number { ids.uid } else { ids.gid }))
}

/// Absolute path inside to bytes below the root.
pub(super) fn relative(path: &str) -> &[u8] {
    path.trim_matches('/').as_bytes()
}

fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&b| b == b'/').map_or(&b""[..], |at| &path[..at])
}

pub(super) fn make_dirs(
    root: BorrowedFd<'_>,
    path: &[u8],
    mode: u32,
    owner: (u32, u32),
) -> Result<(), OpError> {
    if path.is_empty() {
        return Ok(());
    }
    beneath::mkdir_all(root, path, mode, owner).map(drop).map_err(|source| path_error(path, source))
}

pub(super) fn path_error(path: &[u8], source: BeneathError) -> OpError {
    if source.host_kind() == Some(std::io::ErrorKind::NotADirectory) {
        return CopyError::OntoNonDirectory { path: EntryPath([b"/", path].concat()) }.into();
    }
    OpError::Mkdir { path: format!("/{}", String::from_utf8_lossy(path)), source }
}

/// Whether `path` is there as a directory, behind links too.
pub(super) fn is_dir(root: BorrowedFd<'_>, path: &[u8]) -> Result<bool, OpError> {
    if path.is_empty() {
        return Ok(true);
    }
    let Ok(found) = beneath::open_file(root, path, OFlags::PATH) else { return Ok(false) };
    let stat = statx(&found, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE).map_err(|errno| OpError::Read {
        path: String::from_utf8_lossy(path).into_owned(),
        source: errno.into(),
    })?;
    Ok(FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory)
}
