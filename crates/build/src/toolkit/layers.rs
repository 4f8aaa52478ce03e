//! `kiln layer ls`: the layers of an image.

use kiln_content::ImageRecord;
use kiln_oci::image::ImageConfig;
use kiln_oci::{DiffId, SnapshotId};

use super::ToolkitError;
use crate::Engine;
use crate::image::read_config;
use crate::layers::describe;

/// One layer of an image.
#[derive(Debug, Clone)]
pub struct LayerInfo {
    /// Counted from 1, which is the lowest.
    pub number: usize,
    /// The snapshot that has its files.
    pub snapshot: SnapshotId,
    /// Digest of its uncompressed tar.
    pub diff_id: DiffId,
    /// Size of that tar.
    pub tar_bytes: u64,
    /// Blocks that its files take on disk.
    pub disk_bytes: u64,
    /// The blob it came as, with its size; `None` for one made here.
    pub blob: Option<(kiln_oci::Digest, u64)>,
    /// The instruction that made it, as the config's history says; `None`: it does not.
    pub created_by: Option<String>,
    /// RFC 3339 time, from the history too.
    pub created: Option<String>,
}

/// The layers of `image`, lowest first.
///
/// Costs a few look-ups a layer; sizes on disk that were never measured are, in O(files), and a diff
/// ID that is pending is computed.
///
/// # Errors
/// [`ToolkitError::Build`] when the store cannot be read.
pub fn layers(engine: &Engine, image: &ImageRecord) -> Result<Vec<LayerInfo>, ToolkitError> {
    let config = read_config(engine, &image.config)?;
    let chain = chain(engine, image)?;
    let usage = engine.store.survey()?.usage;
    let made = made_by(&config, chain.len());
    let mut measured = Vec::new();
    let mut infos = Vec::with_capacity(chain.len());
    for (nth, snapshot) in chain.into_iter().enumerate() {
        let record = describe(&engine.store, &*engine.snapshots, &snapshot)?;
        let disk_bytes = match usage.get(&snapshot).and_then(|usage| usage.disk_bytes) {
            Some(bytes) => bytes,
            None => {
                let bytes = engine.snapshots.disk_bytes(&snapshot)?;
                measured.push((snapshot.clone(), bytes));
                bytes
            }
        };
        let history = made.get(nth).and_then(|&at| config.history.get(at));
        infos.push(LayerInfo {
            number: nth + 1,
            snapshot,
            diff_id: record.diff_id,
            tar_bytes: record.size_bytes,
            disk_bytes,
            blob: record.blob.map(|blob| (blob.digest, blob.size_bytes)),
            created_by: history.and_then(|entry| entry.created_by.clone()),
            created: history.and_then(|entry| entry.created.clone()),
        });
    }
    engine.store.put_disk_bytes(&measured)?;
    Ok(infos)
}

/// The snapshots of an image, lowest first.
pub(crate) fn chain(engine: &Engine, image: &ImageRecord) -> Result<Vec<SnapshotId>, ToolkitError> {
    Ok(image.snapshot.as_ref().map_or(Ok(Vec::new()), |top| engine.snapshots.chain(top))?)
}

/// Positions of the history entries that made the layers; empty when the history tells of another
/// number of layers, so that nobody can say which is which.
pub(crate) fn made_by(config: &ImageConfig, layers: usize) -> Vec<usize> {
    let made = config.history.iter().enumerate().filter(|(_, entry)| !entry.empty_layer);
    let made: Vec<usize> = made.map(|(at, _)| at).collect();
    if made.len() == layers { made } else { Vec::new() }
}
