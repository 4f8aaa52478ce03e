//! Layers as they leave: reused as they came, remembered from the last time, or packed now.

use std::io::{self, BufReader, PipeReader, Read, Write};
use std::sync::atomic::AtomicBool;
use std::thread;

use kiln_content::{Ingest, LayerRecord, PackedRecord};
use kiln_layer::{
    ApplyError, Codec, CopyFault, DiffError, Limits, RepackError, RepackOptions, Times, copy_hashed, decoder,
    estargz, repack,
};
use kiln_oci::image::{Descriptor, media_type};
use kiln_oci::{DiffId, Digest, SnapshotId};

use super::archive::{Drafts, ImageWriter};
use super::packing::{Compress, Packing};
use crate::layers::write_tar;
use crate::registry::{Growth, Outbound};
use crate::streams::in_large_pieces;
use crate::{BuildError, Engine};

/// Changes whenever a packing's bytes do: what was remembered before is then another packing.
const PACKING_VERSION: u32 = 3;
/// Of an eStargz layer: where readers find the digest of its table of contents.
const TOC_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Of an eStargz layer: how much there is to unpack.
const SIZE_ANNOTATION: &str = "io.containers.estargz.uncompressed-size";

/// A layer that is ready to leave.
#[derive(Debug, Clone)]
pub(crate) struct ReadyLayer {
    /// With OCI's media types; see [`docker_type`].
    pub(crate) descriptor: Descriptor,
    /// Digest of the tar inside.
    pub(crate) diff_id: DiffId,
    /// Where its bytes are.
    pub(crate) content: LayerContent,
}

#[derive(Debug, Clone)]
pub(crate) enum LayerContent {
    /// A blob of this name.
    Blob,
    /// The layer's plain tar, written when it is asked for.
    Plain(LayerRecord),
}

/// Who gets layers as soon as they are ready, and what is packed while it is.
pub(crate) enum Along<'a, 'w> {
    Nobody,
    /// It must take drafts.
    Archive(&'a mut ImageWriter<'w>),
    Registry(&'a mut Outbound),
}

/// The media type that docker has for an OCI layer; the same where it has none.
pub(crate) fn docker_type(oci: &str) -> &str {
    match oci {
        media_type::OCI_LAYER => media_type::DOCKER_LAYER,
        media_type::OCI_LAYER_GZIP => media_type::DOCKER_LAYER_GZIP,
        other => other,
    }
}

/// OCI's media type of a layer that is packed so.
pub(crate) fn oci_type(packing: Packing) -> &'static str {
    match packing {
        Packing::Stream(Codec::Uncompressed) => media_type::OCI_LAYER,
        Packing::Stream(Codec::Zstd { .. }) => media_type::OCI_LAYER_ZSTD,
        Packing::Stream(Codec::Gzip { .. }) | Packing::Estargz { .. } => media_type::OCI_LAYER_GZIP,
    }
}

/// Makes `layer` ready to leave. Costs reading and packing all of it when it must be packed and never
/// was, and `along` gets it meanwhile; a look-up otherwise.
///
/// # Errors
/// [`BuildError::LayerChanged`] when what is stored is damaged; that of the store.
pub(crate) fn ready(
    engine: &Engine,
    layer: &LayerRecord,
    compress: &Compress,
    times: Times,
    cancel: &AtomicBool,
    along: &mut Along<'_, '_>,
) -> Result<ReadyLayer, BuildError> {
    if times == Times::Keep
        && let Some(layer) = as_it_is(layer, compress)
    {
        return Ok(layer);
    }
    let packing = compress.packing;
    let name = packing_name(packing, times);
    let record = match engine.store.packed(&layer.diff_id, &name)? {
        Some(record) => record,
        None => {
            let record = pack(engine, layer, packing, times, cancel, along)?;
            engine.store.put_packed(&name, &record)?;
            record
        }
    };
    let descriptor = packed_layer(packing, &record);
    Ok(ReadyLayer { descriptor, diff_id: record.packed_diff_id, content: LayerContent::Blob })
}

/// Points to a layer that was packed.
pub(crate) fn packed_layer(packing: Packing, record: &PackedRecord) -> Descriptor {
    let mut descriptor = Descriptor::new(oci_type(packing), record.blob, record.size_bytes);
    if let Some(toc) = record.toc {
        descriptor.annotations.insert(TOC_ANNOTATION.to_owned(), toc.to_string());
        descriptor.annotations.insert(SIZE_ANNOTATION.to_owned(), record.tar_size_bytes.to_string());
    }
    descriptor
}

/// Whether `layer` can leave without being packed first. Costs look-ups.
///
/// # Errors
/// Those of the store.
pub(crate) fn is_ready(
    engine: &Engine,
    layer: &LayerRecord,
    compress: &Compress,
) -> Result<bool, BuildError> {
    let name = packing_name(compress.packing, Times::Keep);
    Ok(as_it_is(layer, compress).is_some() || engine.store.packed(&layer.diff_id, &name)?.is_some())
}

/// The layer as it came, or as its plain tar, where that will do.
fn as_it_is(layer: &LayerRecord, compress: &Compress) -> Option<ReadyLayer> {
    let Compress { packing, level_given, force } = *compress;
    if let Some(blob) = &layer.blob {
        let same = blob.media_type == oci_type(packing);
        let asked_for_more = level_given || matches!(packing, Packing::Estargz { .. });
        if !force || (same && !asked_for_more) {
            let descriptor = Descriptor::new(&blob.media_type, blob.digest, blob.size_bytes);
            return Some(ReadyLayer { descriptor, diff_id: layer.diff_id, content: LayerContent::Blob });
        }
    }
    (packing == Packing::UNCOMPRESSED).then(|| {
        let descriptor = Descriptor::new(media_type::OCI_LAYER, layer.diff_id.0, layer.size_bytes);
        let content = LayerContent::Plain(layer.clone());
        ReadyLayer { descriptor, diff_id: layer.diff_id, content }
    })
}

/// What a packing is remembered by.
pub(crate) fn packing_name(packing: Packing, times: Times) -> String {
    match times {
        Times::Keep => format!("{packing} v{PACKING_VERSION}"),
        times => format!("{packing} v{PACKING_VERSION} {times:?}"),
    }
}

/// Packs `layer` into a blob of the store, and for `along` at the same time.
fn pack(
    engine: &Engine,
    layer: &LayerRecord,
    packing: Packing,
    times: Times,
    cancel: &AtomicBool,
    along: &mut Along<'_, '_>,
) -> Result<PackedRecord, BuildError> {
    let host_failed = |source| {
        let path = engine.store.root().join("ingest");
        BuildError::Store(kiln_content::Error::Host { call: "write", path, source })
    };
    let ingest = engine.store.ingest()?;
    let (draft, growth) = match along {
        Along::Nobody => (None, None),
        Along::Archive(writer) => (writer.drafts(), None),
        Along::Registry(outbound) => (None, Some(outbound.begin(&ingest)?)),
    };
    let mut out = Tee { ingest, draft, draft_fault: None, growth };
    if let Some(draft) = &mut out.draft {
        draft.begin().map_err(|source| draft.failed(source))?;
    }
    let packed = in_large_pieces(&mut out, host_failed, |out| {
        pack_into(engine, layer, packing, times, cancel, out, host_failed)
    });
    let Tee { ingest, draft, draft_fault, growth } = out;
    let (packed_diff_id, tar_size_bytes, toc) = match (packed, draft, draft_fault) {
        // Whatever else came of it.
        (Err(_), Some(draft), Some(fault)) => return Err(draft.failed(fault)),
        (packed, ..) => packed?,
    };
    let (blob, size_bytes) = ingest.commit(None)?;
    if let Some(growth) = growth {
        growth.end(Descriptor::new(oci_type(packing), blob, size_bytes));
    }
    if let Along::Archive(writer) = along {
        writer.keep_draft(&blob, size_bytes)?;
    }
    Ok(PackedRecord { diff_id: layer.diff_id, blob, size_bytes, packed_diff_id, tar_size_bytes, toc })
}

/// Diff ID and size in bytes of the tar inside, and the digest of its table of contents.
fn pack_into(
    engine: &Engine,
    layer: &LayerRecord,
    packing: Packing,
    times: Times,
    cancel: &AtomicBool,
    out: &mut dyn Write,
    failed: impl Fn(io::Error) -> BuildError,
) -> Result<(DiffId, u64, Option<Digest>), BuildError> {
    let options = RepackOptions { times, below: None, limits: Limits::checked(), cancel };
    match packing {
        Packing::Stream(codec) => {
            let mut encoder = codec.encoder(&mut *out).map_err(&failed)?;
            let tar = if times == Times::Keep {
                write_layer(engine, layer, &mut encoder, cancel).map_err(|error| error.named(&failed))?;
                (layer.diff_id, layer.size_bytes, None)
            } else {
                let repacked = piped(
                    |tar| write_layer(engine, layer, tar, cancel),
                    |tar| repack(tar, &mut encoder, &options),
                    &failed,
                )?;
                (repacked.diff_id, repacked.tar_size_bytes, None)
            };
            encoder.finish().map_err(&failed)?;
            Ok(tar)
        }
        Packing::Estargz { level } => {
            let made = piped(
                |tar| write_layer(engine, layer, tar, cancel),
                |tar| estargz(tar, &mut *out, level, &options),
                &failed,
            )?;
            Ok((made.diff_id, made.tar_size_bytes, Some(made.toc)))
        }
    }
}

/// A blob on its way into the store, and into an archive or to a registry.
struct Tee<'a, 'd> {
    ingest: Ingest<'a>,
    draft: Option<&'d mut dyn Drafts>,
    draft_fault: Option<io::Error>,
    growth: Option<Growth>,
}

impl Write for Tee<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = self.ingest.write(bytes)?;
        if let Some(draft) = &mut self.draft
            && let Err(fault) = draft.write_all(&bytes[..length])
        {
            self.draft_fault = Some(fault);
            return Err(io::Error::other("the archive does not take it"));
        }
        if let Some(growth) = &self.growth {
            growth.add(length)?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.ingest.flush()
    }
}

/// Why something could not be written, before anybody knows what it was written to.
pub(crate) enum WriteError {
    /// The receiving side.
    Out(io::Error),
    /// Anything else.
    Other(BuildError),
}

impl WriteError {
    /// With `name` telling what was written to.
    pub(crate) fn named(self, name: impl FnOnce(io::Error) -> BuildError) -> BuildError {
        match self {
            WriteError::Out(error) => name(error),
            WriteError::Other(error) => error,
        }
    }
}

impl<E: Into<BuildError>> From<E> for WriteError {
    fn from(error: E) -> Self {
        match error.into() {
            BuildError::Diff(DiffError::Output(error)) => WriteError::Out(error),
            BuildError::Diff(DiffError::Cancelled) => WriteError::Other(BuildError::Cancelled),
            other => WriteError::Other(other),
        }
    }
}

/// Writes the plain tar of `layer`, and checks on the way that it is what its diff ID says.
pub(crate) fn write_layer(
    engine: &Engine,
    layer: &LayerRecord,
    out: impl Write,
    cancel: &AtomicBool,
) -> Result<(), WriteError> {
    let actual = match &layer.blob {
        Some(blob) => {
            let (file, _) = engine.store.open_blob(&blob.digest)?;
            let unreadable = |source| {
                let path = engine.store.root().join("blobs");
                WriteError::Other(kiln_content::Error::Host { call: "read", path, source }.into())
            };
            let decoded = decoder(BufReader::with_capacity(256 << 10, file));
            let (_, plain): (_, Box<dyn Read + Send>) = decoded.map_err(unreadable)?;
            match copy_hashed(Stoppable { inner: plain, cancel }, out) {
                Ok((digest, _)) => DiffId(digest),
                Err(CopyFault::Write(error)) => return Err(WriteError::Out(error)),
                Err(CopyFault::Read(_)) if is_set(cancel) => return Err(BuildError::Cancelled.into()),
                Err(CopyFault::Read(error)) => return Err(unreadable(error)),
            }
        }
        None => write_changes(engine, &layer.snapshot, out, cancel)?,
    };
    if actual != layer.diff_id {
        return Err(BuildError::LayerChanged { expected: layer.diff_id, actual }.into());
    }
    Ok(())
}

/// Writes the plain tar of `layer` to a file of the store.
pub(crate) fn write_plain(
    engine: &Engine,
    layer: &LayerRecord,
    out: &mut dyn Write,
    cancel: &AtomicBool,
) -> Result<(), BuildError> {
    let failed = |source| {
        let path = engine.store.root().join("ingest");
        BuildError::Store(kiln_content::Error::Host { call: "write", path, source })
    };
    write_layer(engine, layer, out, cancel).map_err(|error| error.named(failed))
}

fn write_changes(
    engine: &Engine,
    snapshot: &SnapshotId,
    out: impl Write,
    cancel: &AtomicBool,
) -> Result<DiffId, WriteError> {
    let written = write_tar(&*engine.snapshots, snapshot, Stoppable { inner: out, cancel });
    if written.is_err() && is_set(cancel) {
        return Err(BuildError::Cancelled.into());
    }
    Ok(written?.diff_id)
}

/// Writes the blob `digest` as it is, and checks on the way that it is what its name says.
pub(crate) fn write_blob(
    engine: &Engine,
    digest: &Digest,
    size_bytes: u64,
    out: impl Write,
    cancel: &AtomicBool,
) -> Result<(), WriteError> {
    let (file, _) = engine.store.open_blob(digest)?;
    // One byte more than promised is enough to see that it is another blob.
    let reader = Stoppable { inner: file.take(size_bytes + 1), cancel };
    let (actual, actual_bytes) = copy_hashed(reader, out).map_err(|fault| match fault {
        CopyFault::Write(error) => WriteError::Out(error),
        CopyFault::Read(_) if is_set(cancel) => BuildError::Cancelled.into(),
        CopyFault::Read(source) => {
            let path = engine.store.root().join("blobs");
            kiln_content::Error::Host { call: "read", path, source }.into()
        }
    })?;
    if (actual, actual_bytes) != (*digest, size_bytes) {
        let expected_bytes = size_bytes;
        return Err(kiln_content::Error::Mismatch {
            expected: *digest,
            expected_bytes,
            actual,
            actual_bytes,
        }
        .into());
    }
    Ok(())
}

fn is_set(cancel: &AtomicBool) -> bool {
    cancel.load(std::sync::atomic::Ordering::Relaxed)
}

/// A reader or writer that fails once somebody asks to stop.
struct Stoppable<'a, R> {
    inner: R,
    cancel: &'a AtomicBool,
}

impl<R: Read> Read for Stoppable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if is_set(self.cancel) { Err(io::Error::other("cancelled")) } else { self.inner.read(buffer) }
    }
}

impl<W: Write> Write for Stoppable<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if is_set(self.cancel) { Err(io::Error::other("cancelled")) } else { self.inner.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Connects what writes a tar with what reads one; `failed` names what the latter writes to.
pub(crate) fn piped<T: Send>(
    produce: impl FnOnce(io::PipeWriter) -> Result<(), WriteError> + Send,
    consume: impl FnOnce(PipeReader) -> Result<(DiffId, T), RepackError>,
    failed: impl FnOnce(io::Error) -> BuildError,
) -> Result<T, BuildError> {
    let pipe = |source| {
        let path = "pipe".into();
        BuildError::Store(kiln_content::Error::Host { call: "pipe2", path, source })
    };
    let (reader, writer) = io::pipe().map_err(pipe)?;
    let (produced, consumed) = thread::scope(|scope| {
        let producer = thread::Builder::new().name("layer-tar".to_owned());
        let producer = producer.spawn_scoped(scope, move || produce(writer)).map_err(pipe)?;
        // The reader is gone when this returns, and a writer that is left alone ends with EPIPE.
        let consumed = consume(reader);
        let produced = producer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok::<_, BuildError>((produced, consumed))
    })?;
    match (produced, consumed) {
        (Err(WriteError::Other(error)), _) => Err(error),
        (_, Err(RepackError::Output(error))) => Err(failed(error)),
        (_, Err(RepackError::Input(ApplyError::Cancelled))) => Err(BuildError::Cancelled),
        (_, Err(RepackError::Input(error))) => Err(BuildError::Apply(error)),
        (Err(WriteError::Out(error)), Ok(_)) => Err(pipe(error)),
        (_, Err(error)) => Err(BuildError::Bug { what: error.to_string() }),
        (Ok(()), Ok((_, made))) => Ok(made),
    }
}
