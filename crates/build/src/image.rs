//! Puts an image together: config, manifest, record.

use kiln_content::{ImageRecord, LayerRecord};
use kiln_oci::image::{Descriptor, Extra, ImageConfig, Manifest, media_type, to_json};
use kiln_oci::{ChainId, DiffId, Digest, SnapshotId};

use crate::engine::now_unix;
use crate::load::MAX_MANIFEST_BYTES;
use crate::{BuildError, Engine};

/// Stores an image of `layers` (lowest first) and returns its record. `config_json` are the bytes
/// of a config that came from elsewhere, or of one that [`with_layers`] completed.
///
/// Config and manifest are written only when they are not there yet, or damaged, so the same image
/// again costs one look-up, two small files read and no write. A `manifest_json` that came with the image, or that somebody asked
/// for, replaces the one that is there.
pub(crate) fn store_image(
    engine: &Engine,
    config_json: &[u8],
    layers: &[LayerRecord],
    top: Option<SnapshotId>,
    manifest_json: Option<&[u8]>,
) -> Result<ImageRecord, BuildError> {
    let config_digest = Digest::of(config_json);
    let is_whole = |known: &ImageRecord| {
        engine.store.read_blob(&known.config, MAX_CONFIG_BYTES).is_ok()
            && engine.store.read_blob(&known.manifest, MAX_MANIFEST_BYTES).is_ok()
    };
    if let Some(known) = engine.store.image(&config_digest)?.filter(is_whole) {
        let Some(json) = manifest_json.filter(|json| Digest::of(json) != known.manifest) else {
            return Ok(known);
        };
        let record = ImageRecord { manifest: engine.store.put_blob(json)?, ..known };
        engine.store.put_image(&record)?;
        return Ok(record);
    }
    engine.store.put_blob(config_json)?;
    let manifest_digest = match manifest_json {
        Some(json) => engine.store.put_blob(json)?,
        None => {
            let manifest = manifest(&config_digest, config_json.len() as u64, layers);
            engine.store.put_blob(&to_json(&manifest))?
        }
    };
    note_chains(engine, layers)?;
    let record = ImageRecord {
        config: config_digest,
        manifest: manifest_digest,
        snapshot: top,
        size_bytes: layers.iter().map(|layer| layer.size_bytes).sum(),
        created_unix: now_unix(),
    };
    engine.store.put_image(&record)?;
    Ok(record)
}

/// Records which snapshots hold these layers, lowest first.
pub(crate) fn note_chains(engine: &Engine, layers: &[LayerRecord]) -> Result<(), BuildError> {
    let mut diff_ids: Vec<DiffId> = Vec::with_capacity(layers.len());
    for layer in layers {
        diff_ids.push(layer.diff_id);
        if let Some(chain) = ChainId::of(&diff_ids) {
            engine.store.put_chain(&chain, &layer.snapshot)?;
        }
    }
    Ok(())
}

/// The bytes of `config` with the diff IDs of `layers`.
pub(crate) fn with_layers(mut config: ImageConfig, layers: &[LayerRecord]) -> Vec<u8> {
    config.rootfs.diff_ids = layers.iter().map(|layer| layer.diff_id).collect();
    to_json(&config)
}

/// The manifest of `layers`: those that came from elsewhere are listed as the blobs they came as, the
/// others uncompressed.
fn manifest(config: &Digest, config_size: u64, layers: &[LayerRecord]) -> Manifest {
    Manifest {
        schema_version: 2,
        media_type: Some(media_type::OCI_MANIFEST.to_owned()),
        config: Descriptor::new(media_type::OCI_CONFIG, *config, config_size),
        layers: layers
            .iter()
            .map(|layer| match &layer.blob {
                Some(blob) => Descriptor::new(&blob.media_type, blob.digest, blob.size_bytes),
                None => Descriptor::new(media_type::OCI_LAYER, layer.diff_id.0, layer.size_bytes),
            })
            .collect(),
        annotations: std::collections::BTreeMap::new(),
        extra: Extra::new(),
    }
}

/// Reads the config of a stored image.
pub(crate) fn read_config(engine: &Engine, digest: &Digest) -> Result<ImageConfig, BuildError> {
    let json = engine.store.read_blob(digest, MAX_CONFIG_BYTES)?;
    parse_json("image config", digest, &json)
}

/// Configs beyond this size are refused (as containerd does with manifests, twice over).
pub(crate) const MAX_CONFIG_BYTES: u64 = 8 << 20;

pub(crate) fn parse_json<T: serde::de::DeserializeOwned>(
    what: &'static str,
    digest: &Digest,
    json: &[u8],
) -> Result<T, BuildError> {
    serde_json::from_slice(json).map_err(|source| BuildError::Json { what, digest: *digest, source })
}
