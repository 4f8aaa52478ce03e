//! What becomes of a container's files: an image, a tar, a list of changes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;

use kiln_content::ImageRecord;
use kiln_layer::{
    DiffError, DiffOptions, Entry, EntryKind, Reading, ScanOptions, TreeForm, is_opaque, is_whiteout,
};
use kiln_oci::image::{History, ImageConfig, RunConfig};
use kiln_oci::{ActiveKey, Digest, Platform, Reference, SnapshotId};
use kiln_snapshotter::{LayerForm, OpenOptions};

use crate::engine::{now_unix, rfc3339};
use crate::image::{read_config, store_image, with_layers};
use crate::layers::describe;
use crate::stand::{prepare_layer, stand_on, unpack_layer};
use crate::{BuildCancel, BuildError, Engine};

/// A container's files: its writable layer, and what that stands on.
#[derive(Debug, Clone, Copy)]
pub struct ContainerFiles<'a> {
    /// The writable layer.
    pub key: &'a ActiveKey,
    /// What it stands on; `None`: nothing.
    pub snapshot: Option<&'a SnapshotId>,
}

/// What an image made of a container shall be.
#[derive(Debug, Clone, Default)]
pub struct CommitRequest {
    /// How to run it: the container's settings.
    pub settings: RunConfig,
    /// What the container's process was, for the history.
    pub command: String,
    /// Who made it.
    pub author: Option<String>,
    /// What the change is.
    pub message: Option<String>,
    /// Instructions that change the settings.
    pub changes: Vec<String>,
    /// Its name.
    pub name: Option<Reference>,
}

/// Makes an image of a container and of the image it was made of, which may be forgotten.
///
/// The container's writes up to now are in it; who wants them to be of one moment holds its processes.
/// Costs copying what the container has written.
///
/// # Errors
/// [`BuildError`]; no name has moved then.
pub fn commit(
    engine: &Engine,
    files: ContainerFiles<'_>,
    image: &Digest,
    request: &CommitRequest,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    let top = copy_layer(engine, files, cancel)?;
    let mut layers = Vec::new();
    let below = files.snapshot.map(|id| engine.snapshots.chain(id)).transpose()?.unwrap_or_default();
    for snapshot in below.iter().chain([&top]) {
        layers.push(describe(&engine.store, &*engine.snapshots, snapshot)?);
    }
    let mut config = match read_config(engine, image) {
        Ok(config) => config,
        Err(_) => ImageConfig::empty(&Platform::host()),
    };
    // Images that tell of other layers than they have tell nothing.
    let told = config.history.iter().filter(|entry| !entry.empty_layer).count();
    if told != below.len() {
        config.history = below.iter().map(|_| History::default()).collect();
    }
    let created = Some(rfc3339(now_unix()));
    config.config = request.settings.clone();
    config.created.clone_from(&created);
    if request.author.is_some() {
        config.author.clone_from(&request.author);
    }
    config.history.push(History {
        created,
        created_by: Some(request.command.clone()),
        author: request.author.clone(),
        comment: request.message.clone(),
        ..History::default()
    });
    kiln_frontend::apply_changes(&mut config, &request.changes, &Platform::host())
        .map_err(|error| BuildError::Change { message: error.to_string() })?;
    let image = store_image(engine, &with_layers(config, &layers), &layers, Some(top), None)?;
    if let Some(name) = &request.name {
        engine.store.set_name(name, &image)?;
    }
    engine.store.barrier()?;
    Ok(image)
}

/// A committed snapshot with the changes of a writable layer, which goes on being one.
fn copy_layer(
    engine: &Engine,
    files: ContainerFiles<'_>,
    cancel: &BuildCancel,
) -> Result<SnapshotId, BuildError> {
    let pipe =
        |source| BuildError::Store(kiln_content::Error::Host { call: "pipe2", path: "pipe".into(), source });
    let active = prepare_layer(engine, files.snapshot)?;
    let (reader, writer) = io::pipe().map_err(pipe)?;
    let (written, applied) = thread::scope(|scope| {
        let writing = thread::Builder::new().name("layer-tar".to_owned());
        let writing =
            writing.spawn_scoped(scope, || write_changes(engine, files, writer, cancel)).map_err(pipe)?;
        let applied = unpack_layer(engine, &active, reader, Reading::InPlace, cancel);
        let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok::<_, BuildError>((written, applied))
    })?;
    // When the reader gives up, the writer only says that nobody reads.
    let applied = applied?;
    written?;
    let again = || {
        let mut tar = tempfile(engine)?;
        write_changes(engine, files, &mut tar, cancel)?;
        io::Seek::rewind(&mut tar).map_err(pipe)?;
        Ok(Box::new(io::BufReader::new(tar)) as Box<dyn io::Read + Send>)
    };
    stand_on(engine, active, &applied, files.snapshot, again, cancel)?.commit()
}

/// A file without a name on the store's file system.
fn tempfile(engine: &Engine) -> Result<std::fs::File, BuildError> {
    use rustix::fs::{Mode, OFlags, open};
    let path = engine.store.root().join("ingest");
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let made = open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(io::Error::from);
    made.map(Into::into).map_err(crate::world::unreadable(&path))
}

fn write_changes(
    engine: &Engine,
    files: ContainerFiles<'_>,
    out: impl Write,
    cancel: &BuildCancel,
) -> Result<(), BuildError> {
    let upper = engine.snapshots.open_layer(files.key)?;
    let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: cancel.flag() };
    match (engine.snapshots.form(), parent_view(engine, files)?) {
        (LayerForm::Changes, _) => kiln_layer::diff(upper.as_fd(), out, &options)?,
        (LayerForm::Tree, Some(parent)) => {
            kiln_layer::diff_trees(parent.as_fd(), upper.as_fd(), out, &options)?
        }
        (LayerForm::Tree, None) => {
            kiln_layer::diff(upper.as_fd(), out, &DiffOptions { form: TreeForm::Plain, ..options })?
        }
    };
    Ok(())
}

fn parent_view(engine: &Engine, files: ContainerFiles<'_>) -> Result<Option<OwnedFd>, BuildError> {
    Ok(files.snapshot.map(|parent| engine.snapshots.open_view(parent)).transpose()?)
}

/// The container's tree as it is on disk, without what is mounted in it, to be read.
///
/// # Errors
/// [`BuildError::Snapshots`].
pub fn open_files(engine: &Engine, key: &ActiveKey) -> Result<OwnedFd, BuildError> {
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    Ok(engine.snapshots.open_active(key, &options)?)
}

/// Writes a container's files as a tar; `path` is for messages.
///
/// # Errors
/// [`BuildError::Output`] when `out` does not take it.
pub fn export_files(
    engine: &Engine,
    key: &ActiveKey,
    path: &Path,
    out: &mut dyn Write,
    cancel: &BuildCancel,
) -> Result<(), BuildError> {
    let view = open_files(engine, key)?;
    let options = DiffOptions { form: TreeForm::Plain, root_entry: false, cancel: cancel.flag() };
    match kiln_layer::diff(view.as_fd(), &mut *out, &options) {
        Ok(_) => Ok(()),
        Err(DiffError::Output(source)) => Err(BuildError::Output { path: path.to_owned(), source }),
        Err(error) => Err(error.into()),
    }
}

/// What a container did to a path, as docker marks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// `A`
    Added,
    /// `C`
    Changed,
    /// `D`
    Deleted,
}

/// What a container has changed, sorted by path; paths begin with a slash. A directory in which
/// something has come or gone has changed.
///
/// # Errors
/// [`BuildError`] when its layer cannot be read.
pub fn changes(
    engine: &Engine,
    files: ContainerFiles<'_>,
    cancel: &BuildCancel,
) -> Result<Vec<(ChangeKind, Vec<u8>)>, BuildError> {
    let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: cancel.flag() };
    let scan = |tree: &OwnedFd| {
        let entries = kiln_layer::scan(tree.as_fd(), b"", &options);
        entries.map_err(|error| {
            crate::world::unreadable(Path::new("a container's layer"))(io::Error::other(error))
        })
    };
    let upper = scan(&engine.snapshots.open_layer(files.key)?)?;
    let lower: BTreeMap<Vec<u8>, Entry> = match parent_view(engine, files)? {
        Some(view) => scan(&view)?.into_iter().map(|entry| (entry.path.clone(), entry)).collect(),
        None => BTreeMap::new(),
    };
    let mut found: BTreeMap<Vec<u8>, ChangeKind> = BTreeMap::new();
    let whole = engine.snapshots.form() == LayerForm::Tree;
    let there: BTreeSet<&[u8]> = upper.iter().map(|entry| entry.path.as_slice()).collect();
    for entry in upper.iter().filter(|entry| !entry.path.is_empty()) {
        let before = lower.get(&entry.path);
        let kind = match before {
            _ if !whole && is_whiteout(entry) => ChangeKind::Deleted,
            None => ChangeKind::Added,
            Some(before) if whole && !differs(before, entry) => continue,
            Some(_) => ChangeKind::Changed,
        };
        found.insert(entry.path.clone(), kind);
        if !whole && is_opaque(entry) {
            hide(&lower, &there, &entry.path, &mut found);
        }
    }
    if whole {
        hide(&lower, &there, b"", &mut found);
    }
    // Of what went with its directory, the directory tells.
    let gone: BTreeSet<Vec<u8>> = found
        .iter()
        .filter(|(_, kind)| **kind == ChangeKind::Deleted)
        .map(|(path, _)| path.clone())
        .collect();
    found.retain(|path, _| !path.iter().enumerate().any(|(at, b)| *b == b'/' && gone.contains(&path[..at])));
    Ok(found.into_iter().map(|(path, kind)| (kind, [b"/", &path[..]].concat())).collect())
}

/// What was below `dir` and is not there any more.
fn hide(
    lower: &BTreeMap<Vec<u8>, Entry>,
    there: &BTreeSet<&[u8]>,
    dir: &[u8],
    found: &mut BTreeMap<Vec<u8>, ChangeKind>,
) {
    let below = |path: &[u8]| {
        !path.is_empty()
            && (dir.is_empty() || path.strip_prefix(dir).is_some_and(|rest| rest.starts_with(b"/")))
    };
    for path in lower.keys().filter(|path| below(path) && !there.contains(path.as_slice())) {
        found.insert(path.clone(), ChangeKind::Deleted);
    }
}

fn differs(before: &Entry, after: &Entry) -> bool {
    let dir = before.kind == EntryKind::Dir && after.kind == EntryKind::Dir;
    let shape = |entry: &Entry| match &entry.kind {
        EntryKind::File { size, .. } => (1, *size, Vec::new()),
        EntryKind::Symlink { target } => (2, 0, target.clone()),
        EntryKind::Dir => (3, 0, Vec::new()),
        _ => (4, 0, Vec::new()),
    };
    shape(before) != shape(after)
        || (before.mode, before.uid, before.gid) != (after.mode, after.uid, after.gid)
        || (before.mtime != after.mtime && !dir)
}
