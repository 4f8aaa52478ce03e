//! Results in the config of the image that they made: whoever has the image has the cache of its steps.
//!
//! The config lists keys, and how many of the image's layers each result consists of; the layers are the
//! image's own. Records of intermediate stages are not among them.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};

use kiln_content::LayerRecord;
use kiln_oci::image::media_type;
use kiln_oci::{Digest, Reference, SnapshotId};
use kiln_remote::{Existing, MAX_LAYERS, ObjectName, Record, RecordLayer, RemoteError, RemoteStore};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cache::Entry;
use crate::export::Assembled;
use crate::image::read_config;
use crate::{BuildError, Engine};

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

/// What the config of an image of these snapshots, lowest first, says of `entries`.
pub(crate) fn describe_inline(entries: &BTreeMap<Digest, Entry>, chain: &[SnapshotId]) -> Value {
    let place: HashMap<&SnapshotId, usize> = chain.iter().enumerate().map(|(nth, id)| (id, nth)).collect();
    let mut inline = Inline { layers: vec![None; chain.len()], results: Vec::new() };
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

/// The results in the config of an image of the store, as a store that is only read.
pub(super) struct InlineRecords {
    records: HashMap<Digest, Vec<u8>>,
}

impl InlineRecords {
    /// Reads the config.
    ///
    /// # Errors
    /// [`RemoteError::Options`] when there is no such image, or it has no cache.
    pub(super) fn open(engine: &Engine, name: Option<&Reference>) -> Result<Self, RemoteError> {
        let nothing = |what: &str| RemoteError::Options(what.to_owned());
        let name = name.ok_or_else(|| nothing("which image is not said"))?;
        let unread = |error: BuildError| nothing(&crate::error::in_one_line(&error));
        let image = engine.store.resolve(name).map_err(|error| unread(error.into()))?;
        let image = image.ok_or_else(|| nothing("the image is not in the store"))?;
        let config = read_config(engine, &image.config).map_err(unread)?;
        let inline = config.extra.get(INLINE_KEY);
        let inline = inline.ok_or_else(|| nothing("the image was not built with --cache-to type=inline"))?;
        let inline: Inline = serde_json::from_value(inline.clone())
            .map_err(|error| nothing(&format!("what the image says of its steps cannot be read: {error}")))?;
        let assembled = Assembled::stored(engine, &image).map_err(unread)?;
        Ok(Self { records: records(inline, &assembled.layers) })
    }
}

/// What is right of what a config says.
fn records(inline: Inline, layers: &[LayerRecord]) -> HashMap<Digest, Vec<u8>> {
    let describe = |(nth, layer): (usize, &LayerRecord)| {
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
    };
    let layers: Vec<RecordLayer> = layers.iter().take(MAX_LAYERS).enumerate().map(describe).collect();
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

    /// The image's layers are in the store, or nowhere.
    fn sizes(&self, names: &[ObjectName]) -> Result<Vec<Option<u64>>, RemoteError> {
        Ok(vec![None; names.len()])
    }

    fn read(
        &self,
        _name: &ObjectName,
        _out: &mut (dyn FnMut(&[u8]) -> io::Result<()> + Send),
    ) -> Result<bool, RemoteError> {
        Ok(false)
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
