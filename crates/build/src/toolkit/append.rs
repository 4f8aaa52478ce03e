//! A tar of the user's becomes a layer, checked as those of archives are.

use std::io::{self, BufReader};
use std::path::Path;

use kiln_content::{LayerBlob, LayerRecord};
use kiln_layer::bounded_decoder;
use kiln_oci::SnapshotId;

use crate::archive::broken;
use crate::input::open_stream;
use crate::load_layers::{Tee, media_type_of, not_written};
use crate::stand::{prepare_layer, stand_on, unpack_layer};
use crate::{BuildCancel, BuildError, Engine};

/// Stores the tar at `path` (`-`: standard input), plain or compressed as layers may be, as a layer
/// on top of `parent`. It is read once, and its bytes are kept as they came.
///
/// # Errors
/// [`BuildError::Unreadable`], [`BuildError::Archive`], [`BuildError::Apply`]; nothing is left in the
/// store then.
pub(crate) fn append(
    engine: &Engine,
    path: &Path,
    parent: Option<&SnapshotId>,
    cancel: &BuildCancel,
) -> Result<LayerRecord, BuildError> {
    let unreadable = |source| BuildError::Unreadable { path: path.to_owned(), source };
    let (input, reading) = open_stream(path, cancel).map_err(unreadable)?;
    let mut ingest = engine.store.ingest()?;
    let reader = BufReader::with_capacity(256 << 10, input);
    let mut tee = Tee { reader, out: Some(&mut ingest), failed: None };
    let active = prepare_layer(engine, parent)?;
    let applied = bounded_decoder(BufReader::with_capacity(256 << 10, &mut tee), &engine.limits)
        .map_err(|error| broken(path, &format!("cannot be read ({error})")))
        .and_then(|(compression, plain)| {
            let media_type = media_type_of(path, compression)?;
            Ok((media_type, unpack_layer(engine, &active, plain, reading, cancel)?))
        });
    // The decompressor may have stopped at its own end; the blob goes on to the file's.
    let rest = applied.is_ok().then(|| io::copy(&mut tee, &mut io::sink())).transpose();
    if let Some(error) = tee.failure(&applied) {
        return Err(not_written(engine, error));
    }
    rest.map_err(unreadable)?;
    let (media_type, applied) = applied?;
    let (digest, size_bytes) = ingest.commit(None)?;
    let again = || {
        let (blob, _) = engine.store.open_blob(&digest)?;
        Ok(bounded_decoder(BufReader::with_capacity(256 << 10, blob), &engine.limits).map_err(unreadable)?.1)
    };
    let active = stand_on(engine, active, &applied, parent, again, cancel)?;
    let record = LayerRecord {
        snapshot: active.commit()?,
        diff_id: applied.diff_id,
        size_bytes: applied.tar_size_bytes,
        blob: Some(LayerBlob { digest, media_type: media_type.to_owned(), size_bytes }),
    };
    engine.store.put_layer(&record)?;
    Ok(record)
}
