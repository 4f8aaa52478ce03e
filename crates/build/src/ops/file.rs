//! `COPY`, `ADD`, `WORKDIR`: files of one tree into another.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_layer::{ApplyOptions, CopyRequest, Limits, Whiteouts, beneath, decoder};
use kiln_llb as llb;
use kiln_snapshotter::OpenOptions;
use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags, statx};

use super::BuildOp;
use crate::select::{Match, join};
use crate::tree::Tree;
use crate::{BuildError, OpError};

impl BuildOp {
    pub(super) fn run_file(&self, file: &llb::File, inputs: &[Tree]) -> Result<Tree, OpError> {
        let engine = &self.shared.engine;
        let base = file.base.and_then(|index| inputs[index.0].snapshot());
        let active = engine.prepare(base)?;
        let root = engine.snapshots.open_active(active.key(), &OpenOptions::default())?;
        for action in &file.actions {
            match action {
                llb::FileAction::Mkdir(mkdir) => {
                    let owner = match &mkdir.owner {
                        Some(owner) => resolve_owner(root.as_fd(), owner, GroupDefault::Primary)?,
                        None => (0, 0),
                    };
                    make_dirs(root.as_fd(), relative(&mkdir.path), mkdir.mode, owner)?;
                }
                llb::FileAction::Mkfile(_) => {
                    return Err(BuildError::Bug { what: "an op without an implementation".to_owned() }.into());
                }
                llb::FileAction::Copy(copy) => self.copy(copy, &inputs[copy.from.0], root.as_fd())?,
            }
        }
        drop(root);
        Ok(self.commit(active)?)
    }

    fn copy(&self, copy: &llb::Copy, from: &Tree, to: BorrowedFd<'_>) -> Result<(), OpError> {
        let selection = self.selection(copy.from.0, from)?;
        let view: OwnedFd;
        let source = match from {
            Tree::Context(context) => context.root(),
            Tree::Snapshot(id) => {
                view = self.shared.engine.snapshots.open_view(id)?;
                view.as_fd()
            }
            Tree::Empty => return Ok(()),
        };
        let owner = match &copy.owner {
            llb::Owner::Keep => None,
            llb::Owner::Root => Some((0, 0)),
            llb::Owner::Named(owner) => Some(resolve_owner(to, owner, GroupDefault::SameAsUser)?),
        };
        let destination = relative(&copy.destination);
        let into_dir = copy.destination_is_dir || is_dir(to, destination)?;
        // A wildcard may match several files: they cannot all become one.
        let into_dir = into_dir || selection.matches.iter().filter(|found| !found.is_dir()).count() > 1;
        let parents = if into_dir { destination } else { parent(destination) };
        make_dirs(to, parents, 0o755, owner.unwrap_or((0, 0)))?;
        for found in &selection.matches {
            if copy.unpack == llb::Unpack::Archives && self.unpack(found, source, to, destination, owner)? {
                continue;
            }
            let target = match found.is_dir() {
                false if into_dir => join(destination, found.file_name()),
                _ => destination.to_vec(),
            };
            kiln_layer::copy(&CopyRequest {
                from: source,
                entries: &found.entries,
                strip: &found.path,
                to,
                destination: &target,
                owner,
                keep_destination_dir_metadata: true,
                cancel: self.shared.cancel.flag(),
            })?;
        }
        Ok(())
    }

    /// Unpacks `found` below `destination` when its content is an archive.
    fn unpack(
        &self,
        found: &Match,
        source: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        destination: &[u8],
        owner: Option<(u32, u32)>,
    ) -> Result<bool, OpError> {
        if found.is_dir() {
            return Ok(false);
        }
        let path = || String::from_utf8_lossy(&found.named).into_owned();
        let host = |source| OpError::Read { path: path(), source };
        let file = beneath::open_file(source, &found.path, OFlags::RDONLY | OFlags::NOFOLLOW)
            .map_err(|source| OpError::Mkdir { path: path(), source })?;
        let Some(tar) = archive(File::from(file)).map_err(host)? else { return Ok(false) };
        make_dirs(to, destination, 0o755, owner.unwrap_or((0, 0)))?;
        let below = open_dir(to, destination)?;
        let options = ApplyOptions {
            whiteouts: Whiteouts::Remove,
            keep_owner: true,
            limits: Limits::default(),
            cancel: self.shared.cancel.flag(),
        };
        kiln_layer::apply(tar, below.as_fd(), &options)
            .map_err(|source| OpError::Unpack { path: path(), source })?;
        Ok(true)
    }
}

/// The tar inside `file` when it is an archive that `ADD` unpacks: told by content, not by name.
fn archive(file: File) -> std::io::Result<Option<Box<dyn Read>>> {
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let Ok((_, plain)) = decoder(BufReader::with_capacity(64 << 10, file)) else { return Ok(None) };
    let mut plain = BufReader::with_capacity(64 << 10, plain);
    let is_tar = match plain.fill_buf() {
        Ok(head) => head.len() >= 512 && tar_checksum_holds(&head[..512]),
        // Compressed-looking bytes that do not decompress are a plain file.
        Err(_) => false,
    };
    Ok(is_tar.then(|| Box::new(plain) as Box<dyn Read>))
}

/// The sum of a tar header's bytes, its own field counted as blanks, stands at offset 148 (POSIX ustar).
fn tar_checksum_holds(header: &[u8]) -> bool {
    let field = &header[148..156];
    let digits: String = field.iter().map(|&b| b as char).filter(|c| ('0'..='7').contains(c)).collect();
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    let own: u32 = field.iter().map(|&b| u32::from(b)).sum();
    u32::from_str_radix(&digits, 8).is_ok_and(|expected| expected == sum - own + 8 * 32)
}

/// What a user without a group means for the group.
enum GroupDefault {
    /// The user's own group in `/etc/passwd` (a process's identity).
    Primary,
    /// For a number, the same number (`--chown=1000` in BuildKit).
    SameAsUser,
}

fn resolve_owner(root: BorrowedFd<'_>, owner: &str, default: GroupDefault) -> Result<(u32, u32), OpError> {
    let ids = kiln_executor::resolve_user(root, owner)
        .map_err(|source| OpError::Owner { owner: owner.to_owned(), source })?;
    match default {
        GroupDefault::SameAsUser if owner.parse() == Ok(ids.uid) => Ok((ids.uid, ids.uid)),
        _ => Ok((ids.uid, ids.gid)),
    }
}

/// Absolute path inside to bytes below the root.
fn relative(path: &str) -> &[u8] {
    path.trim_matches('/').as_bytes()
}

fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&b| b == b'/').map_or(&b""[..], |at| &path[..at])
}

fn make_dirs(root: BorrowedFd<'_>, path: &[u8], mode: u32, owner: (u32, u32)) -> Result<(), OpError> {
    if path.is_empty() {
        return Ok(());
    }
    beneath::mkdir_all(root, path, mode, owner).map(drop).map_err(|source| mkdir_error(path, source))
}

fn mkdir_error(path: &[u8], source: kiln_layer::BeneathError) -> OpError {
    OpError::Mkdir { path: format!("/{}", String::from_utf8_lossy(path)), source }
}

fn open_dir(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, OpError> {
    let path = if path.is_empty() { &b"."[..] } else { path };
    beneath::open_file(root, path, OFlags::RDONLY | OFlags::DIRECTORY)
        .map_err(|source| mkdir_error(path, source))
}

/// Whether `path` is there as a directory, behind links too.
fn is_dir(root: BorrowedFd<'_>, path: &[u8]) -> Result<bool, OpError> {
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
