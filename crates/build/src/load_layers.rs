//! The layers of an archive become blobs and snapshots, several at once.
//!
//! Each is read once: what comes out of the archive goes into the blob, through the decompressor and
//! into the tree on the way. Nothing is part of the store before all of it is known to be right.
//!
//! A plain layer needs no blob when its tree gives the same bytes again, as with all that kiln saved; nor does a
//! stranger's when it gives the same tar.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use kiln_content::{Ingest, LayerBlob, LayerRecord};
use kiln_layer::{
    Applied, ApplyError, Compression, DensityError, DiffError, DiffOptions, Reading, TreeForm,
    bounded_decoder, detect,
};
use kiln_oci::image::media_type;
use kiln_oci::{ChainId, DiffId, Digest, Sha256Writer, SnapshotId};
use kiln_snapshotter::{LayerForm, MAX_LOWER};

use crate::archive::{Archive, Compared, broken};
use crate::cancel::BuildCancel;
use crate::engine::Active;
use crate::reread::{Stoppable, is_readable, side_by_side};
use crate::stand::{prepare_layer, stand_on, unpack_layer};
use crate::{BuildError, Engine};

/// Layers that are unpacked before the first of them is published.
const BATCH: usize = 32;

/// Where a layer is in the archive.
pub(crate) struct LayerSource {
    /// Name of the entry.
    pub(crate) name: String,
    /// What a manifest says of its digest and size; docker archives say nothing.
    pub(crate) expected: Option<(Digest, u64)>,
}

/// A layer and what its image's config says of it.
pub(crate) struct Promised {
    pub(crate) source: LayerSource,
    pub(crate) diff_id: DiffId,
}

/// A layer that was unpacked and is not part of the store yet.
struct Unpacked<'a> {
    active: Active,
    applied: Applied,
    /// `None`: the tree is all there is to keep.
    blob: Option<(Packed<'a>, &'static str)>,
    /// It came as a plain tar.
    is_plain: bool,
}

/// The blob of a layer.
enum Packed<'a> {
    /// On its way in.
    Coming(Ingest<'a>),
    /// Part of the store already, verified.
    There { digest: Digest, size_bytes: u64 },
}

/// Loads `layers`, lowest first, as far as the store does not have them.
///
/// # Errors
/// That of the lowest layer that has one; of it and those above nothing is kept.
/// [`kiln_snapshotter::Error::TooDeep`] before the first when there are more than can be stacked.
pub(crate) fn load_layers(
    engine: &Engine,
    archive: &Archive,
    layers: &[Promised],
    cancel: &BuildCancel,
) -> Result<Vec<LayerRecord>, BuildError> {
    // Nobody could use it, and nothing could be told about it.
    if layers.len() > MAX_LOWER && engine.snapshots.form() == LayerForm::Changes {
        return Err(kiln_snapshotter::Error::TooDeep { limit: MAX_LOWER }.into());
    }
    let mut records: Vec<LayerRecord> = Vec::with_capacity(layers.len());
    let mut chain: Option<ChainId> = None;
    for layer in layers {
        let next = chain.map_or(ChainId(layer.diff_id.0), |chain| chain.push(&layer.diff_id));
        let known = engine.store.snapshot_by_chain(&next)?.filter(|id| engine.snapshots.contains(id));
        let Some(snapshot) = known else { break };
        let Some(record) = engine.store.layer(&snapshot)? else { break };
        chain = Some(next);
        records.push(record);
    }
    let known: Vec<(&Promised, &LayerRecord)> = layers.iter().zip(&records).collect();
    if let Some(compared) = archive.stranger() {
        side_by_side(&known, cancel, |(layer, record)| {
            compare(engine, archive, compared, layer, record, cancel)
                .map_err(|error| in_layer(archive, &layer.source.name, error))
        })?;
    }
    let is_whole = side_by_side(&known, cancel, |(layer, record)| match &record.blob {
        Some(blob) => is_whole(engine, archive, layer, blob, cancel),
        None => Ok(true),
    })?;
    // Loading it again makes it whole.
    records.truncate(is_whole.iter().take_while(|is_whole| **is_whole).count());
    let missing = &layers[records.len()..];
    if engine.snapshots.form() == LayerForm::Tree {
        for layer in missing {
            let parent = records.last().map(|record| record.snapshot.clone());
            let unpacked = unpack(engine, archive, layer, parent.as_ref(), cancel)?;
            records.push(publish(engine, archive, layer, unpacked, parent.as_ref(), cancel)?);
        }
        return Ok(records);
    }
    // Each holds a file open until it is published.
    for batch in missing.chunks(BATCH) {
        for (layer, unpacked) in batch.iter().zip(unpack_all(engine, archive, batch, cancel)) {
            let parent = records.last().map(|record| record.snapshot.clone());
            records.push(publish(engine, archive, layer, unpacked?, parent.as_ref(), cancel)?);
        }
    }
    Ok(records)
}

/// Compares a layer of an archive with the one of the same diff ID that the store knows. Costs reading it, and
/// decompressing it unless the store knows what is in this very blob.
///
/// # Errors
/// [`BuildError::WrongDiffId`]: it is another one.
fn compare(
    engine: &Engine,
    archive: &Archive,
    compared: &Compared,
    layer: &Promised,
    record: &LayerRecord,
    cancel: &BuildCancel,
) -> Result<(), BuildError> {
    let name = &layer.source.name;
    // Whole and verified from here on.
    let (reader, _) = archive.read(name)?;
    let blob = layer.source.expected.map(|(digest, _)| digest);
    if let Some(digest) = blob
        && (compared.has(&layer.diff_id, &digest)
            || record.blob.as_ref().is_some_and(|blob| blob.digest == digest)
            || engine.store.was_packed_into(&layer.diff_id, &digest)?)
    {
        return Ok(());
    }
    let unreadable = |error: io::Error| match DensityError::of(&error) {
        Some(density) => BuildError::Apply(ApplyError::Density(density)),
        None => broken(archive.path(), &format!("{name} cannot be read ({error})")),
    };
    let (compression, plain) =
        bounded_decoder(BufReader::new(Stoppable { inner: reader, cancel }), &engine.limits)
            .map_err(unreadable)?;
    media_type_of(archive.path(), compression)?;
    let mut hashed = Sha256Writer::new(io::sink());
    // One byte more than the layer has tells as much as all of them.
    let copied = io::copy(&mut plain.take(record.size_bytes.saturating_add(1)), &mut hashed);
    if cancel.flag().load(Ordering::Relaxed) {
        return Err(BuildError::Cancelled);
    }
    copied.map_err(unreadable)?;
    match DiffId(hashed.finish().1) {
        actual if actual == layer.diff_id => {
            blob.iter().for_each(|blob| compared.add(&layer.diff_id, blob));
            Ok(())
        }
        actual => Err(BuildError::WrongDiffId { expected: layer.diff_id, actual }),
    }
}

/// Whether the blob of a layer that the store knows is there; the archive mends it if it can.
fn is_whole(
    engine: &Engine,
    archive: &Archive,
    layer: &Promised,
    blob: &LayerBlob,
    cancel: &BuildCancel,
) -> Result<bool, BuildError> {
    let store = &engine.store;
    let there = store.open_blob(&blob.digest).is_ok_and(|(_, size_bytes)| size_bytes == blob.size_bytes);
    if there && !archive.heals() {
        return Ok(true);
    }
    if (there && is_readable(engine, &blob.digest, cancel)?)
        || mend(engine, archive, &layer.source, blob, cancel)?
    {
        return Ok(true);
    }
    // The archive has it packed otherwise, or broken itself: as it is, it may still do.
    Ok(there)
}

/// Puts a blob into the store once more, if it is in the archive just so.
fn mend(
    engine: &Engine,
    archive: &Archive,
    source: &LayerSource,
    blob: &LayerBlob,
    cancel: &BuildCancel,
) -> Result<bool, BuildError> {
    let wanted = (blob.digest, blob.size_bytes);
    let promised = source.expected.is_none_or(|expected| expected == wanted);
    // It need not be there: so far nothing was read of a layer that is known.
    let Some((inner, size_bytes)) = promised.then(|| archive.read(&source.name).ok()).flatten() else {
        return Ok(false);
    };
    if size_bytes != blob.size_bytes {
        return Ok(false);
    }
    let mut ingest = engine.store.ingest()?;
    let reader = BufReader::with_capacity(256 << 10, Stoppable { inner, cancel });
    let mut tee = Tee { reader, out: Some(&mut ingest), failed: None };
    let copied = io::copy(&mut tee, &mut io::sink());
    if cancel.flag().load(Ordering::Relaxed) {
        return Err(BuildError::Cancelled);
    }
    if let Some(error) = tee.failed.take() {
        return Err(not_written(engine, error));
    }
    match copied.is_ok().then(|| ingest.commit(Some(wanted))).transpose() {
        Ok(committed) => Ok(committed.is_some()),
        Err(kiln_content::Error::Mismatch { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

type Outcome<'a> = Result<Unpacked<'a>, BuildError>;

/// Unpacks the layers side by side, each on nothing. Ends with the first that failed.
fn unpack_all<'a>(
    engine: &'a Engine,
    archive: &Archive,
    layers: &[Promised],
    cancel: &BuildCancel,
) -> Vec<Outcome<'a>> {
    let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
    let outcomes: Vec<Mutex<Option<Outcome<'a>>>> = layers.iter().map(|_| Mutex::default()).collect();
    let work = || {
        while !stopped.load(Ordering::Relaxed) {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            let Some(layer) = layers.get(nth) else { break };
            let outcome = unpack(engine, archive, layer, None, cancel);
            stopped.fetch_or(outcome.is_err(), Ordering::Relaxed);
            *outcomes[nth].lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(layers.len());
    thread::scope(|scope| {
        for _ in 1..threads {
            // Without another thread it takes longer.
            let _ = thread::Builder::new().name("load-layer".to_owned()).spawn_scoped(scope, work);
        }
        work();
    });
    let outcomes = outcomes.into_iter().map(|o| o.into_inner().unwrap_or_else(PoisonError::into_inner));
    // Layers are begun in order, so whatever was not begun stands behind one that failed.
    outcomes.map_while(|outcome| outcome).collect()
}

/// Says which layer it is that something is wrong with.
pub(crate) fn in_layer(archive: &Archive, member: &str, error: BuildError) -> BuildError {
    match error {
        BuildError::Apply(ApplyError::Cancelled) => BuildError::Cancelled,
        BuildError::Apply(_)
        | BuildError::WrongDiffId { .. }
        | BuildError::Store(kiln_content::Error::Mismatch { .. }) => BuildError::Layer {
            path: archive.path().to_owned(),
            member: member.to_owned(),
            source: Box::new(error),
        },
        other => other,
    }
}

fn unpack<'a>(
    engine: &'a Engine,
    archive: &Archive,
    layer: &Promised,
    parent: Option<&SnapshotId>,
    cancel: &BuildCancel,
) -> Outcome<'a> {
    read_layer(engine, archive, layer, parent, cancel).map_err(|error| {
        if cancel.flag().load(Ordering::Relaxed) {
            return BuildError::Cancelled;
        }
        // Bytes that are none of the layer's are the registry's fault, whatever they made of the tree.
        match archive.settle(&layer.source.name) {
            Ok(()) => in_layer(archive, &layer.source.name, error),
            Err(cause) => cause,
        }
    })
}

/// Reads one layer once: into a blob that is not committed, and into an active snapshot.
fn read_layer<'a>(
    engine: &'a Engine,
    archive: &Archive,
    layer: &Promised,
    parent: Option<&SnapshotId>,
    cancel: &BuildCancel,
) -> Outcome<'a> {
    let name = &layer.source.name;
    let (mut reader, size_bytes) = archive.read_early(name)?;
    // What was pulled is not written a second time.
    let there = layer.source.expected.filter(|_| archive.is_in_store());
    let there = there.map(|(digest, _)| Packed::There { digest, size_bytes });
    let unreadable = |error| broken(archive.path(), &format!("{name} cannot be read ({error})"));
    let is_plain = detect(reader.fill_buf().map_err(unreadable)?) == Compression::None;
    // Of a whole tree nobody can tell what the layer added to it.
    let tree_is_enough = is_plain || archive.stranger().is_some();
    let tree_may_do = tree_is_enough && engine.snapshots.form() == LayerForm::Changes;
    let mut ingest = if tree_may_do || there.is_some() { None } else { Some(engine.store.ingest()?) };
    let mut tee = Tee { reader, out: ingest.as_mut(), failed: None };
    let active = prepare_layer(engine, parent)?;
    let applied = bounded_decoder(BufReader::with_capacity(256 << 10, &mut tee), &engine.limits)
        .map_err(|error| broken(archive.path(), &format!("{name}: {error}")))
        .and_then(|(compression, plain)| {
            Ok((
                media_type_of(archive.path(), compression)?,
                unpack_layer(engine, &active, plain, Reading::Ahead, cancel)?,
            ))
        });
    // The decompressor may have stopped at its own end; the blob goes on to the entry's.
    let rest = applied.is_ok().then(|| io::copy(&mut tee, &mut io::sink())).transpose();
    if let Some(error) = tee.failure(&applied) {
        return Err(not_written(engine, error));
    }
    rest.map_err(unreadable)?;
    let (media_type, applied) = applied?;
    if applied.diff_id != layer.diff_id {
        return Err(BuildError::WrongDiffId { expected: layer.diff_id, actual: applied.diff_id });
    }
    // Where directories are only implied, the tree gives more.
    let tree_does = tree_may_do && applied.implied.is_empty() && {
        let root = engine.snapshots.open_layer(active.key())?;
        tree_gives(root.as_fd(), &applied, cancel)?
    };
    if tree_does {
        return Ok(Unpacked { active, applied, blob: None, is_plain });
    }
    if let Some(there) = there {
        return Ok(Unpacked { active, applied, blob: Some((there, media_type)), is_plain });
    }
    if tree_may_do {
        let mut copy = engine.store.ingest()?;
        let (mut reader, _) = archive.read(name)?;
        io::copy(&mut reader, &mut copy).map_err(|error| not_written(engine, error))?;
        ingest = Some(copy);
    }
    let blob = ingest.map(|ingest| (Packed::Coming(ingest), media_type));
    Ok(Unpacked { active, applied, blob, is_plain })
}

pub(crate) fn not_written(engine: &Engine, source: io::Error) -> BuildError {
    let path = engine.store.root().join("ingest");
    BuildError::Store(kiln_content::Error::Host { call: "write", path, source })
}

/// Whether the tree at `root` gives the very tar that was unpacked there.
fn tree_gives(root: BorrowedFd<'_>, tar: &Applied, cancel: &BuildCancel) -> Result<bool, BuildError> {
    let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: cancel.flag() };
    match kiln_layer::shape(root, &options) {
        Ok(shape) => Ok(shape == tar.shape),
        Err(DiffError::Cancelled) => Err(BuildError::Cancelled),
        // A tree that has no tar of its own: the blob is kept then.
        Err(_) => Ok(false),
    }
}

pub(crate) fn media_type_of(path: &Path, compression: Compression) -> Result<&'static str, BuildError> {
    match compression {
        Compression::Gzip => Ok(media_type::OCI_LAYER_GZIP),
        Compression::Zstd => Ok(media_type::OCI_LAYER_ZSTD),
        Compression::None => Ok(media_type::OCI_LAYER),
        Compression::Xz | Compression::Bzip2 => {
            Err(broken(path, "a layer compressed with xz or bzip2 is not part of the OCI specification"))
        }
    }
}

/// What a layer's blob has to be. A plain one is what was unpacked, also when the archive was read a
/// second time for it and had changed by then.
///
/// # Errors
/// [`kiln_content::Error::Mismatch`] when a plain layer is not what its manifest says.
fn promised(
    layer: &Promised,
    applied: &Applied,
    is_plain: bool,
) -> Result<Option<(Digest, u64)>, BuildError> {
    let (actual, actual_bytes) = (applied.diff_id.0, applied.tar_size_bytes);
    match layer.source.expected {
        expected if !is_plain => Ok(expected),
        Some((expected, expected_bytes)) if (expected, expected_bytes) != (actual, actual_bytes) => {
            Err(kiln_content::Error::Mismatch { expected, expected_bytes, actual, actual_bytes }.into())
        }
        _ => Ok(Some((actual, actual_bytes))),
    }
}

/// Makes a layer part of the store: its blob, its snapshot, its record.
fn publish(
    engine: &Engine,
    archive: &Archive,
    layer: &Promised,
    unpacked: Unpacked<'_>,
    parent: Option<&SnapshotId>,
    cancel: &BuildCancel,
) -> Result<LayerRecord, BuildError> {
    let Unpacked { active, applied, blob, is_plain } = unpacked;
    let expected =
        promised(layer, &applied, is_plain).map_err(|error| in_layer(archive, &layer.source.name, error))?;
    let blob = match blob {
        Some((Packed::There { digest, size_bytes }, media_type)) => {
            Some(LayerBlob { digest, media_type: media_type.to_owned(), size_bytes })
        }
        Some((Packed::Coming(ingest), media_type)) => {
            let committed = ingest.commit(expected);
            let (digest, size_bytes) =
                committed.map_err(|error| in_layer(archive, &layer.source.name, error.into()))?;
            Some(LayerBlob { digest, media_type: media_type.to_owned(), size_bytes })
        }
        None => None,
    };
    let again = || {
        let (reader, _) = archive.read(&layer.source.name)?;
        let unreadable = |error| broken(archive.path(), &format!("{}: {error}", layer.source.name));
        Ok(bounded_decoder(reader, &engine.limits).map_err(unreadable)?.1)
    };
    let active = stand_on(engine, active, &applied, parent, again, cancel)?;
    let record = LayerRecord {
        snapshot: active.commit()?,
        diff_id: layer.diff_id,
        size_bytes: applied.tar_size_bytes,
        blob,
    };
    engine.store.put_layer(&record)?;
    if let (Some(compared), Some((blob, _))) = (archive.stranger(), layer.source.expected) {
        compared.add(&layer.diff_id, &blob);
    }
    Ok(record)
}

/// A reader that writes what it reads, if there is somewhere to write to.
pub(crate) struct Tee<'a, 's, R> {
    pub(crate) reader: R,
    pub(crate) out: Option<&'a mut Ingest<'s>>,
    /// Why it could not be written: told apart from what is wrong with the archive.
    pub(crate) failed: Option<io::Error>,
}

impl<R> Tee<'_, '_, R> {
    /// Why it could not be written, unless the tar was refused for what came before.
    pub(crate) fn failure<T>(&mut self, applied: &Result<T, BuildError>) -> Option<io::Error> {
        let is_of_tar =
            matches!(applied, Err(BuildError::Apply(error)) if !matches!(error, ApplyError::Input(_)));
        self.failed.take().filter(|_| !is_of_tar)
    }
}

impl<R: BufRead> Read for Tee<'_, '_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.reader.read(buffer)?;
        if let Some(out) = &mut self.out
            && let Err(error) = out.write_all(&buffer[..length])
        {
            let kind = error.kind();
            self.failed = Some(error);
            return Err(kind.into());
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_layer_has_the_blob_of_what_was_unpacked() {
        let root = tempfile::tempdir().unwrap();
        let options = kiln_layer::ApplyOptions {
            whiteouts: kiln_layer::Whiteouts::Remove,
            keep_owner: false,
            limits: kiln_layer::Limits::default(),
            reading: Reading::InPlace,
            cancel: &AtomicBool::new(false),
        };
        let tar = [0_u8; 1024];
        let dir = std::fs::File::open(root.path()).unwrap();
        let applied = kiln_layer::apply(&tar[..], dir.as_fd(), &options).unwrap();
        let read = (Digest::of(&tar), 1024);
        let other = (Digest::of(b"other"), 5);
        let layer = |expected| Promised {
            source: LayerSource { name: "layer.tar".to_owned(), expected },
            diff_id: applied.diff_id,
        };
        // Also where nothing was promised: what a second read gives has to be this.
        assert_eq!(promised(&layer(None), &applied, true).unwrap(), Some(read));
        assert_eq!(promised(&layer(Some(read)), &applied, true).unwrap(), Some(read));
        assert!(promised(&layer(Some(other)), &applied, true).is_err());
        assert_eq!(promised(&layer(Some(other)), &applied, false).unwrap(), Some(other));
        assert_eq!(promised(&layer(None), &applied, false).unwrap(), None);
    }
}
