//! Results in the config of the image that they made: whoever has the image, or may pull it, has the cache of its
//! steps.
//!
//! The config lists keys, and how many of the image's layers each result consists of; the layers are the
//! image's own. Records of intermediate stages are not among them. Of an image of a registry only the documents are
//! asked for: its layers come as those of other caches do, when somebody reads them.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::sync::Arc;

use kiln_content::{ImageRecord, LayerRecord};
use kiln_oci::image::{Descriptor, ImageConfig, media_type};
use kiln_oci::{DiffId, Digest, Platform, Reference, SnapshotId};
use kiln_remote::{Existing, MAX_LAYERS, ObjectName, Record, RecordLayer, RemoteError, RemoteStore};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::registry::RegistryStore;
use super::registry_image::RegistryImage;
use crate::cache::Entry;
use crate::export::Assembled;
use crate::image::read_config;
use crate::registry::Registries;
use crate::{BuildCancel, BuildError, Engine};

/// Where the records stand in a config.
pub(crate) const INLINE_KEY: &str = "kiln.cache.v1";

/// More results are not read.
const MAX_RESULTS: usize = 10_000;

/// The value of [`INLINE_KEY`].
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Inline {
    /// When each of the image's layers was made, lowest first; seconds since 1970.
    layers: Vec<Option<i64>>,
    /// Sizes of their tars in bytes, which manifests do not say of packed ones.
    #[serde(default)]
    sizes: Vec<u64>,
    results: Vec<InlineResult>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct InlineResult {
    key: Digest,
    /// `None`: the key itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    canonical: Option<Digest>,
    /// So many of the image's layers.
    layers: usize,
    created_unix: i64,
    title: String,
}

/// What the config of an image of these layers, lowest first, says of `entries`.
pub(crate) fn describe_inline(entries: &BTreeMap<Digest, Entry>, layers: &[LayerRecord]) -> Value {
    let places = layers.iter().enumerate().map(|(nth, layer)| (&layer.snapshot, nth));
    let place: HashMap<&SnapshotId, usize> = places.collect();
    let sizes = layers.iter().map(|layer| layer.size_bytes).collect();
    let mut inline = Inline { layers: vec![None; layers.len()], sizes, results: Vec::new() };
    for (key, entry) in entries {
        let Some(nth) = place.get(&entry.snapshot) else { continue };
        for (snapshot, unix) in &entry.times {
            if let Some(nth) = place.get(snapshot) {
                inline.layers[*nth] = Some(*unix);
            }
        }
        inline.results.push(InlineResult {
            key: *key,
            canonical: (entry.canonical != *key).then_some(entry.canonical),
            layers: nth + 1,
            created_unix: entry.created_unix,
            title: entry.title.clone(),
        });
    }
    serde_json::to_value(inline).unwrap_or_default()
}

/// The results in the config of an image, as a store that is only read.
pub(super) struct InlineRecords {
    records: HashMap<Digest, Vec<u8>>,
    /// Where the image's layers are; `None`: in the store, or nowhere.
    repository: Option<RegistryStore>,
}

/// Where to look for an image.
pub(super) struct ImagePlaces<'a> {
    pub(super) engine: &'a Engine,
    /// Those to be asked for what is not in the store; `None`: nobody.
    pub(super) registries: Option<&'a Arc<Registries>>,
    /// What is built for: an image of a registry may be one for each.
    pub(super) platforms: &'a [Platform],
    pub(super) cancel: &'a BuildCancel,
}

impl InlineRecords {
    /// Reads the configs of the image of this name: the store's, or else those of its registry.
    ///
    /// # Errors
    /// [`RemoteError::Options`] when there is no such image, or it has no cache; [`RemoteError::Server`].
    pub(super) fn open(places: &ImagePlaces<'_>, name: Option<&Reference>) -> Result<Self, RemoteError> {
        let &ImagePlaces { engine, registries, platforms, cancel } = places;
        let name = name.ok_or_else(|| nothing("which image is not said"))?;
        if let Some(image) = engine.store.resolve(name).map_err(|error| unread(&error.into()))? {
            return Ok(Self { records: stored(engine, &image)?, repository: None });
        }
        if registries.is_none() {
            return Err(nothing("the image is not in the store"));
        }
        let repository = RegistryStore::new(engine, registries, name, cancel)?;
        let mut all = HashMap::new();
        for platform in platforms {
            let RegistryImage { config, layers } = repository.image(name, platform)?;
            let inline = inline_of(&config)?;
            let layers = layers.iter().zip(&config.rootfs.diff_ids).enumerate();
            let layers = layers.map(|(nth, (blob, diff_id))| packed(&inline, nth, blob, diff_id)).collect();
            all.extend(records(inline, layers));
        }
        Ok(Self { records: all, repository: Some(repository) })
    }
}

fn nothing(what: &str) -> RemoteError {
    RemoteError::Options(what.to_owned())
}

fn unread(error: &BuildError) -> RemoteError {
    nothing(&crate::error::in_one_line(error))
}

/// What an image of the store says.
fn stored(engine: &Engine, image: &ImageRecord) -> Result<HashMap<Digest, Vec<u8>>, RemoteError> {
    let config = read_config(engine, &image.config).map_err(|error| unread(&error))?;
    let inline = inline_of(&config)?;
    let layers = Assembled::stored(engine, image).map_err(|error| unread(&error))?.layers;
    let layers = layers.iter().enumerate().map(|(nth, layer)| kept(&inline, nth, layer)).collect();
    Ok(records(inline, layers))
}

fn inline_of(config: &ImageConfig) -> Result<Inline, RemoteError> {
    let inline = config.extra.get(INLINE_KEY);
    let inline = inline.ok_or_else(|| nothing("the image was not built with --cache-to type=inline"))?;
    serde_json::from_value(inline.clone())
        .map_err(|error| nothing(&format!("what the image says of its steps cannot be read: {error}")))
}

/// A layer of the store.
fn kept(inline: &Inline, nth: usize, layer: &LayerRecord) -> RecordLayer {
    let (blob, blob_bytes, media_type) = match &layer.blob {
        Some(blob) => (blob.digest, blob.size_bytes, blob.media_type.as_str()),
        None => (layer.diff_id.0, layer.size_bytes, media_type::OCI_LAYER),
    };
    RecordLayer {
        diff_id: layer.diff_id,
        size_bytes: layer.size_bytes,
        blob,
        blob_bytes,
        media_type: media_type.to_owned(),
        created_unix: inline.layers.get(nth).copied().flatten(),
    }
}

/// A layer of a registry.
fn packed(inline: &Inline, nth: usize, blob: &Descriptor, diff_id: &DiffId) -> RecordLayer {
    let media_type = match blob.media_type.as_str() {
        media_type::DOCKER_LAYER => media_type::OCI_LAYER,
        media_type::DOCKER_LAYER_GZIP => media_type::OCI_LAYER_GZIP,
        other => other,
    };
    let is_plain = media_type == media_type::OCI_LAYER;
    let size_bytes = if is_plain { blob.size } else { inline.sizes.get(nth).copied().unwrap_or_default() };
    RecordLayer {
        diff_id: *diff_id,
        size_bytes,
        blob: blob.digest,
        blob_bytes: blob.size,
        media_type: media_type.to_owned(),
        created_unix: inline.layers.get(nth).copied().flatten(),
    }
}

/// What is right of what a config says; `layers` are the image's.
fn records(inline: Inline, mut layers: Vec<RecordLayer>) -> HashMap<Digest, Vec<u8>> {
    layers.truncate(MAX_LAYERS);
    let results = inline.results.into_iter().take(MAX_RESULTS);
    let record = |result: InlineResult| {
        let InlineResult { key, canonical, layers: count, created_unix, title } = result;
        let layers = layers.get(..count).filter(|layers| !layers.is_empty())?.to_vec();
        Some((key, Record::new(key, canonical.unwrap_or(key), created_unix, &title, layers).encode()))
    };
    results.filter_map(record).collect()
}

impl RemoteStore for InlineRecords {
    fn get_many(&self, names: &[ObjectName], _max_bytes: u64) -> Result<Vec<Option<Vec<u8>>>, RemoteError> {
        let find = |name: &ObjectName| match name {
            ObjectName::Record { key, .. } => self.records.get(key).cloned(),
            ObjectName::Blob(_) => None,
        };
        Ok(names.iter().map(find).collect())
    }

    fn sizes(&self, names: &[ObjectName]) -> Result<Vec<Option<u64>>, RemoteError> {
        match &self.repository {
            Some(repository) => repository.sizes(names),
            None => Ok(vec![None; names.len()]),
        }
    }

    fn read(
        &self,
        name: &ObjectName,
        out: &mut (dyn FnMut(&[u8]) -> io::Result<()> + Send),
    ) -> Result<bool, RemoteError> {
        match &self.repository {
            Some(repository) => repository.read(name, out),
            None => Ok(false),
        }
    }

    fn put(
        &self,
        _name: &ObjectName,
        _content: &mut (dyn Read + Send),
        _size_bytes: u64,
        _existing: Existing,
    ) -> Result<(), RemoteError> {
        Err(RemoteError::Options("an image is not written to".to_owned()))
    }
}
