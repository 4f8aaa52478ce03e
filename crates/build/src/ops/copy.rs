//! `COPY` and `ADD`: what was selected in one tree goes into another.

use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_layer::{
    CopyError, CopyRequest, Earlier, Entry, EntryKind, EntryPath, ExtractOptions, Follower, HashStates,
    Identity, LARGE_FILE_BYTES, Limits, LookedAt, ModeChange, Part, TopDir, beneath, bounded_decoder, is_tar,
    make_dirs_over, tell_whole,
};
use kiln_llb as llb;
use kiln_oci::SnapshotId;
use kiln_snapshotter::LayerForm;
use kiln_solver::{Scope, Stream};
use rustix::fs::OFlags;

use super::BuildOp;
use super::earlier::{FullCopy, LastCopy};
use super::file::{is_dir, make_dirs, path_error, relative, resolve_owner};
use super::kept::{Below, LayerKey};
use crate::OpError;
use crate::layers::UnderWay;
use crate::select::{Match, Selection, join};
use crate::tree::{Tree, not_here};

/// Fewer files are hashed when they are all there: a thread costs more than it saves.
const FEWEST_FOLLOWED: usize = 64;

/// Bytes of a tar header.
const HEADER: usize = 512;

/// The tree that is copied into.
pub(super) struct Root<'a> {
    to: BorrowedFd<'a>,
    /// What it stands on, when `to` is a bare upperdir.
    below: Option<BorrowedFd<'a>>,
    /// Of the source: [`CopyRequest::from_layers`].
    from_layers: &'a [OwnedFd],
    /// What was found out about the copy before it is made; `None`: nothing.
    planned: Option<&'a [(Part<'a>, Vec<Identity>)]>,
    earlier: Option<&'a Earlier>,
    delta: Option<&'a Delta>,
    follower: Option<&'a Follower>,
}

/// What is made in front of an earlier copy.
struct Delta {
    full: FullCopy,
    /// The entries of each match.
    entries: Vec<Vec<Entry>>,
}

impl<'a> Root<'a> {
    /// One that shows all there is.
    pub(super) fn seen(to: BorrowedFd<'a>) -> Self {
        Self { to, below: None, from_layers: &[], planned: None, earlier: None, delta: None, follower: None }
    }

    /// Where links lead and users are known.
    fn view(&self) -> BorrowedFd<'a> {
        self.below.unwrap_or(self.to)
    }

    fn is_dir(&self, path: &[u8]) -> Result<bool, OpError> {
        // A directory that is below is never hidden behind something else.
        Ok(is_dir(self.to, path)? || self.below.map_or(Ok(false), |below| is_dir(below, path))?)
    }

    fn make_dirs(&self, path: &[u8], mode: u32, owner: (u32, u32)) -> Result<(), OpError> {
        match self.below {
            Some(below) => make_dirs_over(self.to, below, path, mode, owner).map_err(|error| match error {
                CopyError::OntoNonDirectory { path } => {
                    CopyError::OntoNonDirectory { path: EntryPath([b"/", path.0.as_slice()].concat()) }.into()
                }
                other => other.into(),
            }),
            None => make_dirs(self.to, path, mode, owner),
        }
    }
}

/// Where a copy goes.
struct Target<'a> {
    root: &'a Root<'a>,
    /// As it stands in the instruction, without the leading slash.
    named: &'a [u8],
    /// Owner of all that is made; `None`: as in the source, and 0:0 for directories on the way.
    owner: Option<(u32, u32)>,
    /// Permission bits of directories made on the way.
    parent_mode: u32,
}

impl BuildOp {
    /// Whether `copy` only makes files, and in a directory of changes: no mount has to be written through.
    pub(super) fn is_plain(&self, copy: &llb::Copy, from: &Tree) -> Result<bool, OpError> {
        let is_unpacked = copy.unpack == llb::Unpack::Archives
            && self.selection(0, copy, from)?.matches.iter().any(|found| !found.is_dir());
        Ok(self.shared.engine.snapshots.form() == LayerForm::Changes && !is_unpacked)
    }

    /// Does an instruction that is one plain copy: takes the layer of an earlier one that made the same
    /// (`docs/adr/0038-copies-on-another-base.md`). Else it is done straight into the layer: in front of the last
    /// one, if not much has changed (`docs/adr/0028-few-changed-files-are-a-delta.md`); else with links to the files
    /// of the last one that are the same (`docs/adr/0020-copies-share-files.md`), and hashed beside
    /// (`docs/adr/0026-hashed-beside-the-copy.md`) from where it differs (`docs/adr/0029-hashes-go-on.md`).
    pub(super) fn run_copy(
        &self,
        copy: &llb::Copy,
        from: &Tree,
        base: Option<&SnapshotId>,
        scope: &Scope<'_>,
    ) -> Result<Tree, OpError> {
        let engine = &self.shared.engine;
        let selection = self.selection(0, copy, from)?;
        let active = engine.prepare(base)?;
        let upper = engine.snapshots.open_layer(active.key())?;
        let below = base.map(|base| engine.snapshots.open_view(base)).transpose()?;
        let files = selection.matches.iter().map(|found| found.entries.len()).sum();
        let bare = Root { below: below.as_ref().map(AsFd::as_fd), ..Root::seen(upper.as_fd()) };
        let last = LastCopy::of(engine, &self.op.digest(), from, files);
        let mode = mode_of(copy);
        let planned = plan(copy, &selection, &bare, copy.mode.is_some().then_some(&mode))?;
        let seen = match &below {
            Some(view) => Below::seen(view.as_fd(), &planned),
            None => Below::of(engine, None, &planned),
        };
        let key = LayerKey::of(seen, parent_mode_of(copy), &planned);
        if let Some(key) = &key
            && let Some(layer) = self.earlier_layer(key, base)
        {
            tell_skipped(&selection, scope)?;
            drop((upper, below));
            return self.keep_layer(key, &layer, base, active, scope);
        }
        let from_layers = self.layers_of(from, &selection)?;
        let full = last.as_ref().and_then(|last| last.open(engine));
        let states_file = last.as_ref().map(LastCopy::states_file);
        let states = full.as_ref().zip(states_file.as_ref());
        let mut states = states.and_then(|(full, file)| file.read(&engine.store, &full.id));
        let (delta, earlier) = match full {
            Some(full) => match full.delta(engine, base, seen, &planned) {
                Some(entries) => (Some(Delta { full, entries }), None),
                None => (None, Some(full.into_earlier())),
            },
            None => (None, None),
        };
        let mut follow = || Follower::start(upper.try_clone().ok()?, states.take());
        let follower = (files >= FEWEST_FOLLOWED && delta.is_none()).then(&mut follow).flatten();
        let root = Root {
            from_layers: &from_layers,
            planned: last.is_some().then_some(planned.as_slice()),
            earlier: earlier.as_ref(),
            delta: delta.as_ref(),
            follower: follower.as_ref(),
            ..bare
        };
        self.copy(copy, &selection, from, &root, scope)?;
        let under_way = follower.map(|follower| UnderWay { following: follower.complete(), states_file });
        drop((upper, below, earlier));
        let Some(delta) = delta else {
            let tree = self.commit_hashed(active, under_way)?;
            if let (Some(last), Some(id)) = (last, tree.snapshot()) {
                last.save(id, &planned);
            }
            self.remember(key, tree.snapshot())?;
            return Ok(tree);
        };
        let id = active.commit_delta(&delta.full.id)?;
        let under_way = states.and_then(|states| self.follow_delta(&id, &delta, &planned, states));
        self.shared.layers.start(&id, under_way);
        if let Some(last) = last {
            last.touch();
        }
        self.remember(key, Some(&id))?;
        Ok(Tree::Snapshot(id))
    }

    fn remember(&self, key: Option<LayerKey>, layer: Option<&SnapshotId>) -> Result<(), OpError> {
        let (Some(key), Some(layer)) = (key, layer) else { return Ok(()) };
        key.save(&self.shared.engine, layer, &self.title)
    }

    /// Hashes the layer of a delta and what it stands in front of from where that differs from the earlier copy's.
    fn follow_delta(
        &self,
        id: &SnapshotId,
        delta: &Delta,
        planned: &[(Part<'_>, Vec<Identity>)],
        states: HashStates,
    ) -> Option<UnderWay> {
        let whole = self.shared.engine.snapshots.open_changes(id).ok()?.dir;
        let follower = Follower::start_delta(whole, delta.full.dir().try_clone().ok()?, states)?;
        for ((part, _), made) in planned.iter().zip(&delta.entries) {
            tell_whole(&follower, part, made);
        }
        // The states on record stay the earlier copy's, which the next delta is compared with, too.
        Some(UnderWay { following: follower.complete(), states_file: None })
    }

    /// The directories of a stage's layers, highest first, if some file is large enough to be looked for.
    fn layers_of(&self, from: &Tree, selection: &Selection) -> Result<Vec<OwnedFd>, OpError> {
        let is_large =
            |entry: &Entry| matches!(entry.kind, EntryKind::File { size, .. } if size >= LARGE_FILE_BYTES);
        let is_worth_it = selection.matches.iter().any(|found| found.entries.iter().any(is_large));
        let Some(top) = from.snapshot().filter(|_| is_worth_it) else { return Ok(Vec::new()) };
        let snapshots = &self.shared.engine.snapshots;
        let mut dirs = Vec::new();
        for id in snapshots.chain(top)?.into_iter().rev() {
            dirs.extend(snapshots.open_dirs(&id)?);
        }
        Ok(dirs)
    }

    /// Does `copy`.
    pub(super) fn copy(
        &self,
        copy: &llb::Copy,
        selection: &Selection,
        from: &Tree,
        root: &Root<'_>,
        scope: &Scope<'_>,
    ) -> Result<(), OpError> {
        tell_skipped(selection, scope)?;
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
        let target = Target::of(copy, root)?;
        let mode = mode_of(copy);
        let mut one_file = false;
        for (nth, found) in selection.matches.iter().enumerate() {
            if copy.unpack == llb::Unpack::Archives
                && self.unpack(found, selection.looked_at, source, &target, copy)?
            {
                continue;
            }
            // Looked up anew each time: the match before may have made it. In front of a bare upperdir its
            // path is the same still: what a copy makes on the way there are directories.
            let destination = target.real_path()?;
            if copy.destination_is_dir {
                root.make_dirs(&destination, target.parent_mode, target.owner.unwrap_or((0, 0)))?;
            }
            let place = if found.is_dir() {
                destination
            } else if root.is_dir(&destination)? {
                join(&destination, found.file_name())
            } else if one_file {
                return Err(OpError::ManyToOne { destination: copy.destination.clone() });
            } else {
                one_file = true;
                destination
            };
            let planned = root.planned.map(|planned| &planned[nth]);
            debug_assert!(planned.is_none_or(|(part, _)| part.destination == place), "as it was planned");
            kiln_layer::copy(&CopyRequest {
                from: source,
                from_layers: root.from_layers,
                looked_at: selection.looked_at,
                entries: root.delta.map_or(&found.entries, |delta| &delta.entries[nth]),
                passed: Some(&found.passed),
                strip: &found.path,
                to: root.to,
                below: root.below,
                earlier: root.earlier,
                // These are of all entries.
                identities: root.earlier.and(planned).map(|(_, identities)| identities.as_slice()),
                times_of: root.delta.map(|delta| delta.full.dir().as_fd()),
                follower: root.follower,
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
        looked_at: Option<LookedAt>,
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
        let check = |file: &File| match looked_at {
            Some(looked_at) if !entry.is_as_scanned(file, looked_at).map_err(host)? => {
                Err(CopyError::ChangedWhileReading { path: entry.path.as_slice().into() }.into())
            }
            _ => Ok::<(), OpError>(()),
        };
        let file = File::from(file);
        let watched = file.try_clone().map_err(host)?;
        let limits = self.shared.engine.limits;
        let Some(tar) = archive(file, &limits).map_err(host)? else { return Ok(false) };
        let owner = if matches!(copy.owner, llb::Owner::Named(_)) { target.owner } else { None };
        let destination = target.real_path()?;
        target.root.make_dirs(&destination, 0o755, owner.unwrap_or((0, 0)))?;
        let below = beneath::open_file(target.root.to, &destination, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(|error| path_error(&destination, error))?;
        let options = ExtractOptions { owner, limits, cancel: self.shared.cancel.flag() };
        let extracted = kiln_layer::extract(tar, below.as_fd(), &options);
        // Whatever came of it: one that changed under the reader may be anything.
        check(&watched)?;
        extracted.map_err(|source| OpError::Unpack { path: path(), source })?;
        Ok(true)
    }
}

/// Says what is not copied.
fn tell_skipped(selection: &Selection, scope: &Scope<'_>) -> Result<(), OpError> {
    if selection.matches.is_empty()
        && let Some(path) = selection.skipped.first()
    {
        return Err(OpError::NotCopied { path: String::from_utf8_lossy(path).into_owned() });
    }
    for path in &selection.skipped {
        let text = format!("warning: {} is no file to copy, left out\n", path.escape_ascii());
        scope.log(Stream::Stderr, text.as_bytes());
    }
    Ok(())
}

/// What `copy` makes of permission bits; the second argument says whether it is a directory.
fn mode_of(copy: &llb::Copy) -> impl Fn(u32, bool) -> u32 {
    move |bits: u32, is_dir: bool| copy.mode.as_ref().map_or(bits, |mode| mode.apply(bits, is_dir))
}

/// Permission bits of directories that are made on the way. An octal mode is for these too, as far as it speaks of
/// reading, writing and searching; a symbolic one changes what is there (as in BuildKit).
fn parent_mode_of(copy: &llb::Copy) -> u32 {
    copy.mode.as_ref().and_then(llb::Mode::octal).map_or(0o755, |bits| bits & 0o777)
}

/// Where each match of a plain copy goes, as [`BuildOp::copy`] has it when it comes there, and what becomes of
/// it. Nothing is made yet.
fn plan<'s>(
    copy: &llb::Copy,
    selection: &'s Selection,
    root: &Root<'_>,
    mode: Option<&'s ModeChange<'s>>,
) -> Result<Vec<(Part<'s>, Vec<Identity>)>, OpError> {
    let target = Target::of(copy, root)?;
    let destination = target.real_path()?;
    let mut is_dir = copy.destination_is_dir || root.is_dir(&destination)?;
    let part = |found: &'s Match| {
        is_dir |= found.is_dir();
        let destination = match found.is_dir() {
            false if is_dir => join(&destination, found.file_name()),
            _ => destination.clone(),
        };
        let (entries, passed, strip) = (&found.entries, Some(&found.passed), &found.path);
        let part = Part { entries, passed, strip, destination, owner: target.owner, mode };
        let identities = part.identities();
        (part, identities)
    };
    Ok(selection.matches.iter().map(part).collect())
}

impl<'a> Target<'a> {
    fn of(copy: &'a llb::Copy, root: &'a Root<'a>) -> Result<Self, OpError> {
        Ok(Self {
            root,
            named: relative(&copy.destination),
            owner: match &copy.owner {
                llb::Owner::Keep => None,
                llb::Owner::Root => Some((0, 0)),
                llb::Owner::Named(owner) => Some(resolve_owner(root.view(), owner)?),
            },
            parent_mode: parent_mode_of(copy),
        })
    }

    /// The destination behind links, inside the root.
    fn real_path(&self) -> Result<Vec<u8>, OpError> {
        beneath::real_path(self.root.view(), self.named).map_err(|error| path_error(self.named, error))
    }
}

/// The tar inside `file` when it is an archive that `ADD` unpacks: told by content, not by name.
fn archive(file: File, limits: &Limits) -> std::io::Result<Option<Box<dyn Read + Send>>> {
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
    Ok(is_tar(&head).then(|| Box::new(Cursor::new(head).chain(plain)) as Box<dyn Read + Send>))
}
