//! A tar of the user's becomes a layer, checked as those of archives are.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::AsFd;
use std::path::Path;

use kiln_content::{LayerBlob, LayerRecord};
use kiln_layer::{ApplyOptions, Compression, Limits, Whiteouts, decoder};
use kiln_oci::SnapshotId;
use kiln_oci::image::media_type;

use crate::archive::broken;
use crate::{BuildCancel, BuildError, Engine};

/// Stores the tar at `path` (`-`: standard input), plain or compressed as layers may be, as a layer
/// on top of `parent`. The bytes are kept as they came.
///
/// # Errors
/// [`BuildError::Unreadable`], [`BuildError::Archive`], [`BuildError::Apply`]; nothing but garbage is
/// left in the store then.
pub(crate) fn append(
    engine: &Engine,
    path: &Path,
    parent: Option<&SnapshotId>,
    cancel: &BuildCancel,
) -> Result<LayerRecord, BuildError> {
    let unreadable = |source| BuildError::Unreadable { path: path.to_owned(), source };
    let mut input: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(path).map_err(unreadable)?)
    };
    let mut ingest = engine.store.ingest()?;
    io::copy(&mut input, &mut ingest).map_err(unreadable)?;
    let (digest, size_bytes) = ingest.commit(None)?;

    let (file, _) = engine.store.open_blob(&digest)?;
    let decoded = decoder(BufReader::with_capacity(256 << 10, file));
    let (compression, plain) = decoded.map_err(|error| broken(path, &error.to_string()))?;
    let media_type = match compression {
        Compression::Gzip => media_type::OCI_LAYER_GZIP,
        Compression::Zstd => media_type::OCI_LAYER_ZSTD,
        Compression::None => media_type::OCI_LAYER,
        Compression::Xz | Compression::Bzip2 => {
            let reason = "a layer compressed with xz or bzip2 is not part of the OCI specification";
            return Err(broken(path, reason));
        }
    };
    let active = engine.prepare(parent)?;
    let root = engine.snapshots.open_layer(active.key())?;
    let options = ApplyOptions {
        whiteouts: Whiteouts::Overlay,
        keep_owner: true,
        limits: Limits::default(),
        cancel: cancel.flag(),
    };
    let applied = kiln_layer::apply(plain, root.as_fd(), &options)?;
    drop(root);
    let record = LayerRecord {
        snapshot: active.commit()?,
        diff_id: applied.diff_id,
        size_bytes: applied.tar_size_bytes,
        blob: Some(LayerBlob { digest, media_type: media_type.to_owned(), size_bytes }),
    };
    engine.store.put_layer(&record)?;
    Ok(record)
}
