//! The layers of a result on another machine become snapshots.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use kiln_content::{CacheRecord, Space};
use kiln_oci::{ChainId, DiffId, Digest, SnapshotId};
use kiln_remote::{Record, RemoteError};

use super::files::{PullError, at_once, pull_blob};
use super::{FarResult, RemoteCache};
use crate::BuildError;
use crate::archive::Archive;
use crate::load_layers::{LayerSource, Promised, load_layers};

/// Blobs that are fetched at a time.
const PARALLEL: usize = 4;

/// A result that was fetched.
pub(crate) struct Fetched {
    /// All that it consists of, with the time it was made where a step made it.
    pub(crate) created: Vec<(SnapshotId, Option<i64>)>,
    /// What it was found as.
    pub(crate) record: CacheRecord,
    /// Keys that it is saved under now.
    pub(crate) keys: Vec<Digest>,
}

/// Why a result is not used.
enum Refused {
    Remote(RemoteError),
    /// It is not what it should be, or too large for this machine.
    Damaged(String),
    Cancelled,
}

impl From<PullError> for Refused {
    fn from(error: PullError) -> Self {
        match error {
            PullError::Remote(RemoteError::Stopped) => Self::Cancelled,
            PullError::Remote(error) => Self::Remote(error),
            PullError::Damaged(why) => Self::Damaged(why),
            PullError::Here(error) => Self::Damaged(format!("it cannot be kept here: {error}")),
        }
    }
}

impl From<BuildError> for Refused {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Cancelled => Self::Cancelled,
            other => Self::Damaged(crate::error::in_one_line(&other)),
        }
    }
}

impl RemoteCache {
    /// Fetches a result, as far as its layers are not here, and saves it. `None`: it cannot be had; why was
    /// said. Blocks.
    pub(crate) fn fetch(&self, result: &FarResult) -> Option<Fetched> {
        let _turn = self.pulling.lock().unwrap_or_else(PoisonError::into_inner);
        let key = *result.record.key();
        let started = Instant::now();
        match self.try_fetch(result) {
            Ok(fetched) => return Some(fetched),
            Err(Refused::Cancelled) => {}
            Err(Refused::Damaged(why)) => {
                self.is_damaged(result.source, &key, &why);
                self.wasted(&self.sources[result.source], started.elapsed());
            }
            Err(Refused::Remote(error)) => self.turn_off(&self.sources[result.source], &error),
        }
        // Nobody finds it again.
        self.lock().known.insert(key, None);
        None
    }

    fn try_fetch(&self, result: &FarResult) -> Result<Fetched, Refused> {
        let engine = &self.engine;
        let record = &result.record;
        let layers: Vec<Promised> = record
            .layers
            .iter()
            .map(|layer| Promised {
                source: LayerSource {
                    name: layer.blob.hex(),
                    expected: Some((layer.blob, layer.blob_bytes)),
                },
                diff_id: layer.diff_id,
            })
            .collect();
        let here = self.layers_here(&layers)?;
        let mut blobs: Vec<(Digest, u64)> =
            record.layers[here..].iter().map(|layer| (layer.blob, layer.blob_bytes)).collect();
        blobs.sort_unstable();
        blobs.dedup();
        let archive = self.pull_blobs(result, &blobs)?;
        let records = load_layers(engine, &archive, &layers, &self.cancel)?;
        let Some(top) = records.last() else {
            return Err(Refused::Damaged("it has no layers".to_owned()));
        };
        for (chain, layer) in chains(records.iter().map(|layer| layer.diff_id)).iter().zip(&records) {
            engine.store.put_chain(chain, &layer.snapshot).map_err(BuildError::from)?;
        }
        let snapshots: Vec<SnapshotId> = records.iter().map(|layer| layer.snapshot.clone()).collect();
        Ok(self.save(result, top.snapshot.clone(), &snapshots)?)
    }

    /// A result that is here although nobody fetched it: as the lower part of another one. Saves it, too.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn find_here(&self, result: &FarResult) -> Result<Option<Fetched>, BuildError> {
        let Some(chain) = chains(result.record.layers.iter().map(|layer| layer.diff_id)).pop() else {
            return Ok(None);
        };
        let found = self.engine.store.snapshot_by_chain(&chain)?;
        let Some(snapshot) = found.filter(|id| self.engine.snapshots.contains(id)) else { return Ok(None) };
        let snapshots = self.engine.snapshots.chain(&snapshot)?;
        self.save(result, snapshot, &snapshots).map(Some)
    }

    fn save(
        &self,
        result: &FarResult,
        snapshot: SnapshotId,
        chain: &[SnapshotId],
    ) -> Result<Fetched, BuildError> {
        let Record { canonical, created_unix, title, layers, .. } = &result.record;
        let record = CacheRecord {
            canonical: *canonical,
            snapshot,
            created_unix: *created_unix,
            description: title.clone(),
        };
        let keys = result.keys();
        let place = |(key, is_borrowed): &(Digest, bool)| match self.borrowed() {
            Some(borrowed) if *is_borrowed => borrowed.key(key),
            _ => *key,
        };
        // What is here stays.
        self.engine.store.cache_put(&keys.iter().map(place).collect::<Vec<_>>(), &record, false)?;
        let keys = keys.into_iter().map(|(key, _)| key).collect();
        let times = layers.iter().map(|layer| layer.created_unix);
        Ok(Fetched { created: chain.iter().cloned().zip(times).collect(), record, keys })
    }

    /// How many of the layers, from the lowest, are snapshots of this store; they stay.
    fn layers_here(&self, layers: &[Promised]) -> Result<usize, BuildError> {
        let engine = &self.engine;
        for (nth, chain) in chains(layers.iter().map(|layer| layer.diff_id)).iter().enumerate() {
            let found = engine.store.snapshot_by_chain(chain)?;
            let Some(snapshot) = found.filter(|id| engine.snapshots.contains(id)) else { return Ok(nth) };
            let Some(record) = engine.store.layer(&snapshot)? else { return Ok(nth) };
            if record.blob.is_some_and(|blob| !engine.store.has_blob(&blob.digest)) {
                return Ok(nth);
            }
        }
        Ok(layers.len())
    }

    /// Blobs in files without a name, each checked.
    fn pull_blobs(&self, result: &FarResult, blobs: &[(Digest, u64)]) -> Result<Archive, Refused> {
        let source = &self.sources[result.source];
        let engine = &self.engine;
        let path = std::path::Path::new(&*source.label);
        if blobs.is_empty() {
            return Ok(Archive::of_files(path, HashMap::new()));
        }
        let Some(store) = self.store(source) else { return Err(Refused::Cancelled) };
        self.check_room(blobs)?;
        let files: Mutex<HashMap<String, File>> = Mutex::default();
        at_once(blobs, PARALLEL, |(digest, size_bytes)| {
            if self.cancel.flag().load(Ordering::Relaxed) {
                return Err(Refused::Cancelled);
            }
            let spool = engine.store.spool().map_err(BuildError::from)?;
            pull_blob(store, digest, *size_bytes, &spool)?;
            files.lock().unwrap_or_else(PoisonError::into_inner).insert(digest.hex(), spool);
            Ok(())
        })?;
        Ok(Archive::of_files(path, files.into_inner().unwrap_or_else(PoisonError::into_inner)))
    }

    /// A record may say any size: a sixteenth of the disk stays free.
    fn check_room(&self, blobs: &[(Digest, u64)]) -> Result<(), Refused> {
        let wanted: u64 = blobs.iter().map(|(_, size_bytes)| *size_bytes).fold(0, u64::saturating_add);
        let free = Space::of(self.engine.store.root()).map_or(u64::MAX, |space| space.free_bytes);
        if wanted > free - free / 16 {
            return Err(Refused::Damaged(format!("it has {wanted} bytes, and {free} are free")));
        }
        Ok(())
    }
}

/// The chain IDs of a stack of layers, from the lowest.
pub(super) fn chains(layers: impl Iterator<Item = DiffId>) -> Vec<ChainId> {
    let mut chains: Vec<ChainId> = Vec::new();
    for layer in layers {
        chains.push(chains.last().map_or(ChainId(layer.0), |chain| chain.push(&layer)));
    }
    chains
}
