//! An image made ready to leave: its layers packed, its config and manifest written.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use kiln_content::{ImageRecord, LayerRecord};
use kiln_layer::{Times, Timestamp};
use kiln_oci::image::{Descriptor, Extra, ImageConfig, Manifest, media_type, to_json};
use kiln_oci::{Digest, Platform, SnapshotId};

use super::layers::{Along, ReadyLayer, docker_type, ready};
use super::packing::Compress;
use crate::engine::rfc3339;
use crate::image::{MAX_CONFIG_BYTES, parse_json};
use crate::layers::describe;
use crate::load::MAX_MANIFEST_BYTES;
use crate::{BuildError, Engine};

/// An image that has all it consists of, and is not packed yet.
#[derive(Debug, Clone)]
pub(crate) struct Assembled {
    pub(crate) config_json: Vec<u8>,
    /// Lowest first.
    pub(crate) layers: Vec<LayerRecord>,
    pub(crate) top: Option<SnapshotId>,
    /// So many of the layers are those of the image that it was built on.
    pub(crate) inherited: usize,
    /// So many of the history entries, the last ones, are not.
    pub(crate) own_history: usize,
    /// The manifest that is in the store already.
    pub(crate) manifest: Option<Digest>,
}

impl Assembled {
    /// An image of the store.
    ///
    /// # Errors
    /// [`BuildError::OtherLayers`]; those of the store.
    pub(crate) fn stored(engine: &Engine, image: &ImageRecord) -> Result<Self, BuildError> {
        let chain = image.snapshot.as_ref().map_or(Ok(Vec::new()), |top| engine.snapshots.chain(top))?;
        let layers = chain.iter().map(|id| describe(&engine.store, &*engine.snapshots, id));
        let layers: Vec<LayerRecord> = layers.collect::<Result<_, _>>()?;
        let config_json = engine.store.read_blob(&image.config, MAX_CONFIG_BYTES)?;
        let config: ImageConfig = parse_json("image config", &image.config, &config_json)?;
        // The sidecars say what stands on what. One that is another's is no worse JSON.
        if !are_of(&layers, &config) {
            return Err(BuildError::OtherLayers { image: format!("image {}", image.config) });
        }
        Ok(Self {
            config_json,
            inherited: layers.len(),
            own_history: 0,
            layers,
            top: image.snapshot.clone(),
            manifest: Some(image.manifest),
        })
    }

    /// The same image, made at this time: what `SOURCE_DATE_EPOCH` would have made of the config.
    pub(crate) fn made_at(&self, epoch: i64) -> Result<Self, BuildError> {
        let digest = Digest::of(&self.config_json);
        let mut config: ImageConfig = parse_json("image config", &digest, &self.config_json)?;
        let inherited = config.history.len().saturating_sub(self.own_history);
        for entry in &mut config.history[inherited..] {
            entry.created = Some(rfc3339(epoch));
        }
        config.created = Some(rfc3339(epoch));
        Ok(Self { config_json: to_json(&config), ..self.clone() })
    }
}

/// Whether these layers are all that the config lists.
pub(crate) fn are_of(layers: &[LayerRecord], config: &ImageConfig) -> bool {
    layers.iter().map(|layer| &layer.diff_id).eq(&config.rootfs.diff_ids)
}

/// How an image shall be written.
#[derive(Debug, Clone)]
pub(crate) struct Style {
    pub(crate) compress: Compress,
    /// OCI's media types; docker's otherwise.
    pub(crate) oci: bool,
    /// Files of the image's own layers are no younger than this; seconds since 1970.
    pub(crate) newest: Option<i64>,
    /// Annotations of the manifest.
    pub(crate) annotations: BTreeMap<String, String>,
    /// Annotations of the descriptor that points to it.
    pub(crate) descriptor_annotations: BTreeMap<String, String>,
}

impl Style {
    pub(crate) fn new(compress: Compress) -> Self {
        let (annotations, descriptor_annotations) = Default::default();
        Self { compress, oci: true, newest: None, annotations, descriptor_annotations }
    }
}

/// An image that is ready to leave.
#[derive(Debug, Clone)]
pub(crate) struct ReadyImage {
    /// Digest of the config: the image ID.
    pub(crate) config: Digest,
    pub(crate) config_json: Vec<u8>,
    /// Points to the manifest, with the platform.
    pub(crate) descriptor: Descriptor,
    pub(crate) manifest_json: Vec<u8>,
    pub(crate) layers: Vec<ReadyLayer>,
}

/// Packs what must be packed, and writes config and manifest. `along` gets layers at once.
///
/// # Errors
/// As [`ready`].
pub(crate) fn make_ready(
    engine: &Engine,
    image: &Assembled,
    style: &Style,
    cancel: &AtomicBool,
    along: &mut Along<'_, '_>,
) -> Result<ReadyImage, BuildError> {
    let mut layers = Vec::with_capacity(image.layers.len());
    for (nth, layer) in image.layers.iter().enumerate() {
        // Layers of the image below are never written anew for the sake of time.
        let times = match style.newest {
            Some(secs) if nth >= image.inherited => Times::NotAfter(Timestamp { secs, nanos: 0 }),
            _ => Times::Keep,
        };
        let layer = ready(engine, layer, &style.compress, times, cancel, along)?;
        match along {
            Along::Nobody => {}
            Along::Archive(writer) => writer.layer(&layer)?,
            Along::Registry(outbound) => outbound.layer(&layer)?,
        }
        layers.push(layer);
    }
    let digest = Digest::of(&image.config_json);
    let mut config: ImageConfig = parse_json("image config", &digest, &image.config_json)?;
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
    let config_json = if config.rootfs.diff_ids == diff_ids {
        image.config_json.clone()
    } else {
        config.rootfs.diff_ids = diff_ids;
        to_json(&config)
    };
    let config_digest = Digest::of(&config_json);
    let manifest_json = match kept_manifest(engine, image, style, &config_digest, &layers)? {
        Some(json) => json,
        None => to_json(&manifest(style, config_digest, config_json.len() as u64, &layers)),
    };
    let kind = if style.oci { media_type::OCI_MANIFEST } else { media_type::DOCKER_MANIFEST };
    let parsed: Manifest = parse_json("manifest", &Digest::of(&manifest_json), &manifest_json)?;
    let kind = parsed.media_type.as_deref().unwrap_or(kind);
    let mut descriptor = Descriptor::new(kind, Digest::of(&manifest_json), manifest_json.len() as u64);
    descriptor.platform = Some(Platform {
        architecture: config.architecture,
        os: config.os,
        os_version: None,
        os_features: Vec::new(),
        variant: config.variant,
    });
    descriptor.annotations.clone_from(&style.descriptor_annotations);
    Ok(ReadyImage { config: config_digest, config_json, descriptor, manifest_json, layers })
}

/// The manifest that the image came with, when it says exactly what a new one would.
fn kept_manifest(
    engine: &Engine,
    image: &Assembled,
    style: &Style,
    config: &Digest,
    layers: &[ReadyLayer],
) -> Result<Option<Vec<u8>>, BuildError> {
    let Some(digest) = image.manifest.filter(|_| style.annotations.is_empty() && style.oci) else {
        return Ok(None);
    };
    if !engine.store.has_blob(&digest) {
        return Ok(None);
    }
    let json = engine.store.read_blob(&digest, MAX_MANIFEST_BYTES)?;
    let known: Manifest = parse_json("manifest", &digest, &json)?;
    let same = known.config.digest == *config
        && known.layers.len() == layers.len()
        && known.layers.iter().zip(layers).all(|(known, layer)| known.digest == layer.descriptor.digest);
    Ok(same.then_some(json))
}

fn manifest(style: &Style, config: Digest, config_bytes: u64, layers: &[ReadyLayer]) -> Manifest {
    let (kind, config_kind) = if style.oci {
        (media_type::OCI_MANIFEST, media_type::OCI_CONFIG)
    } else {
        (media_type::DOCKER_MANIFEST, media_type::DOCKER_CONFIG)
    };
    let layer = |layer: &ReadyLayer| {
        let mut descriptor = layer.descriptor.clone();
        if !style.oci {
            descriptor.media_type = docker_type(&descriptor.media_type).to_owned();
        }
        descriptor
    };
    Manifest {
        schema_version: 2,
        media_type: Some(kind.to_owned()),
        config: Descriptor::new(config_kind, config, config_bytes),
        layers: layers.iter().map(layer).collect(),
        annotations: style.annotations.clone(),
        extra: Extra::new(),
    }
}
