//! `COPY` and `ADD`: what was selected in one tree goes into another.

use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_layer::{
    CopyError, CopyRequest, EntryKind, ExtractOptions, Limits, TopDir, beneath, bounded_decoder, is_tar,
};
use kiln_llb as llb;
use kiln_solver::{Scope, Stream};
use rustix::fs::OFlags;

use super::BuildOp;
use super::file::{is_dir, make_dirs, path_error, relative, resolve_owner};
use crate::OpError;
use crate::select::{Match, join};
use crate::tree::{Tree, not_here};

/// Bytes of a tar header.
const HEADER: usize = 512;

/// Where a copy goes.
struct Target<'a> {
    root: BorrowedFd<'a>,
    /// As it stands in the instruction, without the leading slash.
    named: &'a [u8],
    /// Owner of all that is made; `None`: as in the source, and 0:0 for directories on the way.
    owner: Option<(u32, u32)>,
    /// Permission bits of directories made on the way.
    parent_mode: u32,
}

impl BuildOp {
    /// Does `copy`, the action at `at`.
    pub(super) fn copy(
        &self,
        at: usize,
        copy: &llb::Copy,
        from: &Tree,
        to: BorrowedFd<'_>,
        scope: &Scope<'_>,
    ) -> Result<(), OpError> {
        let selection = self.selection(at, copy, from)?;
        if selection.matches.is_empty()
            && let Some(path) = selection.skipped.first()
        {
            return Err(OpError::NotCopied { path: String::from_utf8_lossy(path).into_owned() });
        }
        for path in &selection.skipped {
            let text = format!("warning: {} is no file to copy, left out\n", path.escape_ascii());
            scope.log(Stream::Stderr, text.as_bytes());
        }
        let view: OwnedFd;
        let source = match from {
            Tree::Context(context) => context.root(),
            Tree::Snapshot(id) => {
                view = self.shared.engine.snapshots.open_view(id)?;
                view.as_fd()
            }
            Tree::Empty => return Ok(()),
            Tree::Far(_) => return Err(not_here().into()),
        };
        let target = Target {
            root: to,
            named: relative(&copy.destination),
            owner: match &copy.owner {
                llb::Owner::Keep => None,
                llb::Owner::Root => Some((0, 0)),
                llb::Owner::Named(owner) => Some(resolve_owner(to, owner)?),
            },
            // An octal mode is for these too, as far as it speaks of reading, writing and searching;
            // a symbolic one changes what is there (as in BuildKit).
            parent_mode: copy.mode.as_ref().and_then(llb::Mode::octal).map_or(0o755, |bits| bits & 0o777),
        };
        let mode = |bits: u32, is_dir: bool| copy.mode.as_ref().map_or(bits, |mode| mode.apply(bits, is_dir));
        let mut one_file = false;
        for found in &selection.matches {
            if copy.unpack == llb::Unpack::Archives && self.unpack(found, from, source, &target, copy)? {
                continue;
            }
            // Looked up anew each time: the match before may have made it.
            let destination = target.real_path()?;
            if copy.destination_is_dir {
                make_dirs(to, &destination, target.parent_mode, target.owner.unwrap_or((0, 0)))?;
            }
            let place = if found.is_dir() {
                destination
            } else if is_dir(to, &destination)? {
                join(&destination, found.file_name())
            } else if one_file {
                return Err(OpError::ManyToOne { destination: copy.destination.clone() });
            } else {
                one_file = true;
                destination
            };
            kiln_layer::copy(&CopyRequest {
                from: source,
                frozen: matches!(from, Tree::Snapshot(_)),
                entries: &found.entries,
                passed: Some(&found.passed),
                strip: &found.path,
                to,
                destination: &place,
                owner: target.owner,
                mode: copy.mode.is_some().then_some(&mode),
                parent_mode: target.parent_mode,
                top: TopDir::Contents,
                cancel: self.shared.cancel.flag(),
            })?;
        }
        Ok(())
    }

    /// Unpacks `found` below the destination when its content is an archive.
    ///
    /// `--chown` is for what comes out of it as well; `--chmod` is not, and without `--chown` the
    /// archive says who owns what (as in BuildKit).
    fn unpack(
        &self,
        found: &Match,
        from: &Tree,
        source: BorrowedFd<'_>,
        target: &Target<'_>,
        copy: &llb::Copy,
    ) -> Result<bool, OpError> {
        let [entry] = found.entries.as_slice() else { return Ok(false) };
        if !matches!(entry.kind, EntryKind::File { .. }) {
            return Ok(false);
        }
        let path = || String::from_utf8_lossy(&found.named).into_owned();
        let host = |source| OpError::Read { path: path(), source };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = beneath::open_file(source, &found.path, flags)
            .map_err(|source| OpError::Mkdir { path: path(), source })?;
        // The key names the content that was scanned: only that may be unpacked.
        let check = |file: BorrowedFd<'_>| match from {
            Tree::Context(_) if !entry.is_as_scanned(file).map_err(host)? => {
                Err(CopyError::ChangedWhileReading { path: entry.path.as_slice().into() }.into())
            }
            _ => Ok::<(), OpError>(()),
        };
        let watched = file.try_clone().map_err(host)?;
        let limits = self.shared.engine.limits;
        let Some(tar) = archive(File::from(file), &limits).map_err(host)? else { return Ok(false) };
        let owner = if matches!(copy.owner, llb::Owner::Named(_)) { target.owner } else { None };
        let destination = target.real_path()?;
        make_dirs(target.root, &destination, 0o755, owner.unwrap_or((0, 0)))?;
        let below = beneath::open_file(target.root, &destination, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(|error| path_error(&destination, error))?;
        let options = ExtractOptions { owner, limits, cancel: self.shared.cancel.flag() };
        kiln_layer::extract(tar, below.as_fd(), &options)
            .map_err(|source| OpError::Unpack { path: path(), source })?;
        // Equal to the scan's at the end means the same content at every moment between.
        check(watched.as_fd())?;
        Ok(true)
    }
}

impl Target<'_> {
    /// The destination behind links, inside the root.
    fn real_path(&self) -> Result<Vec<u8>, OpError> {
        beneath::real_path(self.root, self.named).map_err(|error| path_error(self.named, error))
    }
}

/// The tar inside `file` when it is an archive that `ADD` unpacks: told by content, not by name.
fn archive(file: File, limits: &Limits) -> std::io::Result<Option<Box<dyn Read>>> {
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let Ok((_, mut plain)) = bounded_decoder(BufReader::with_capacity(64 << 10, file), limits) else {
        return Ok(None);
    };
    let mut head = Vec::with_capacity(HEADER);
    // Compressed-looking bytes that do not decompress are a plain file.
    if plain.by_ref().take(HEADER as u64).read_to_end(&mut head).is_err() {
        return Ok(None);
    }
    Ok(is_tar(&head).then(|| Box::new(Cursor::new(head).chain(plain)) as Box<dyn Read>))
}
