//! What a build found and made is left for other machines.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;

use kiln_content::LayerRecord;
use kiln_layer::Times;
use kiln_oci::image::Descriptor;
use kiln_oci::{ChainId, Digest, SnapshotId};
use kiln_remote::{
    Existing, MAX_LAYERS, MAX_RECORD_BYTES, ObjectName, Record, RecordLayer, RemoteError, RemoteStore,
};
use kiln_solver::Cancellation;

use super::files::{Checked, at_once};
use super::pull::chains;
use super::spec::CacheTarget;
use super::{FarResult, open};
use crate::build::Progress;
use crate::cache::{BuildCache, Entry};
use crate::export::{Along, LayerContent, ReadyLayer, ready, write_layer};
use crate::layers::Layers;
use crate::registry::Registries;
use crate::{BuildCancel, BuildError, Engine};

/// Why an export ended early; never why a build fails.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// Records and blobs that are asked for in one go.
const BATCH: usize = 512;

/// A result of this build: the layers it consists of, and what it is the answer to.
struct Found<'a> {
    entry: &'a Entry,
    layers: Arc<[LayerRecord]>,
}

/// What a build found and made.
pub(crate) struct Results<'a> {
    pub(crate) cache: &'a BuildCache,
    pub(crate) layers: &'a Layers,
    /// What the build came to; `None`: no files.
    pub(crate) tops: &'a [SnapshotId],
    /// The way to registries, if there is one.
    pub(crate) registries: Option<&'a Arc<Registries>>,
}

/// Everything that is left by all `--cache-to`.
struct Gathered<'a> {
    near: BTreeMap<Digest, Found<'a>>,
    /// Results that were found and never fetched, by their keys.
    far: Vec<(Digest, Arc<FarResult>)>,
    /// The layers of the build's own result.
    top: Vec<ChainId>,
}

/// How an export ended, as far as a build has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exported {
    /// As far as the targets let it; why not further was said.
    Done,
    /// Somebody stopped it. What was built is whole all the same.
    Interrupted,
}

/// Leaves the build's results at all `targets`. What does not work is a warning.
pub(crate) async fn export(
    engine: &Engine,
    targets: &[CacheTarget],
    results: &Results<'_>,
    cancel: &BuildCancel,
    progress: &dyn Progress,
) -> Exported {
    let targets: Vec<&CacheTarget> = targets.iter().filter(|target| !target.is_inline()).collect();
    if targets.is_empty() {
        return Exported::Done;
    }
    let all = targets.iter().any(|target| target.all);
    let entries = results.cache.entries();
    let gathered = match gather(engine, results, &entries, all).await {
        Ok(gathered) => gathered,
        Err(_) if cancel.is_cancelled() => return Exported::Interrupted,
        Err(error) => {
            progress.note(&format!("the cache is not exported: {}", crate::error::in_one_line(&error)));
            return Exported::Done;
        }
    };
    for target in targets {
        let registries = results.registries;
        let sender = Sender { registries, engine, target, cancel, outdated: results.cache.outdated() };
        let sent = tokio::task::block_in_place(|| sender.send(&gathered));
        match sent {
            Ok(()) => {}
            // Whatever it ran into first: nobody waits for it any more.
            Err(_) if cancel.is_cancelled() => return Exported::Interrupted,
            Err(error) => {
                let why = crate::error::in_one_line(&error);
                progress.note(&format!("the cache is not exported to {}: {why}", target.place.label()));
            }
        }
    }
    Exported::Done
}

/// Finds out what there is to leave; hashes layers that nobody needed the diff ID of.
async fn gather<'a>(
    engine: &Engine,
    results: &Results<'_>,
    entries: &'a BTreeMap<Digest, Entry>,
    all: bool,
) -> Result<Gathered<'a>, BuildError> {
    let Results { cache, layers, tops, .. } = *results;
    let stacked: Vec<Vec<SnapshotId>> =
        tops.iter().map(|top| engine.snapshots.chain(top)).collect::<Result<_, _>>()?;
    let in_image: HashSet<&SnapshotId> = stacked.iter().flatten().collect();
    let mut known: HashMap<SnapshotId, LayerRecord> = HashMap::new();
    let mut stacks: HashMap<SnapshotId, Arc<[LayerRecord]>> = HashMap::new();
    let wanted: BTreeSet<&SnapshotId> = entries.values().map(|entry| &entry.snapshot).chain(tops).collect();
    for snapshot in wanted {
        // A result that was found and that nobody needed may be gone since.
        if !(all || in_image.contains(snapshot)) || !engine.snapshots.contains(snapshot) {
            continue;
        }
        let mut stack = Vec::new();
        for id in engine.snapshots.chain(snapshot)? {
            if !known.contains_key(&id) {
                known.insert(id.clone(), layers.record(&id).await?);
            }
            stack.push(known[&id].clone());
        }
        if stack.len() <= MAX_LAYERS {
            stacks.insert(snapshot.clone(), stack.into());
        }
    }
    let near = entries.iter().filter_map(|(key, entry)| {
        let layers = stacks.get(&entry.snapshot)?.clone();
        Some((*key, Found { entry, layers }))
    });
    let of_image = |chain: &Vec<SnapshotId>| {
        chains(chain.iter().filter_map(|id| known.get(id)).map(|layer| layer.diff_id))
    };
    let top = stacked.iter().flat_map(of_image).collect();
    Ok(Gathered { near: near.collect(), far: cache.far_entries(), top })
}

/// One `--cache-to`.
struct Sender<'a> {
    engine: &'a Engine,
    registries: Option<&'a Arc<Registries>>,
    target: &'a CacheTarget,
    cancel: &'a BuildCancel,
    /// Keys whose results there are replaced.
    outdated: HashSet<Digest>,
}

impl Sender<'_> {
    /// Blobs first, then the records that lead to them.
    fn send(&self, results: &Gathered<'_>) -> Result<(), ExportError> {
        let store = open(self.engine, self.registries, &self.target.place, self.cancel, true)?;
        let records = self.records(results)?;
        let existing = self.existing(&*store, records.near.iter().chain(&records.far))?;
        let is_new = |record: &&Record| existing.get(record.key()) != Some(&Kept::Stays);
        let near: Vec<&Record> = records.near.iter().filter(is_new).collect();
        let missing = missing_blobs(&*store, near.iter().flat_map(|record| record.blobs()).collect())?;
        let missing: Vec<&ReadyLayer> =
            missing.iter().filter_map(|(digest, _)| records.layers.get(digest)).collect();
        at_once(&missing, self.target.parallel, |layer| self.send_blob(&*store, layer))?;
        // Results that are only elsewhere: if all that they consist of is here, too.
        let far: Vec<&Record> = records.far.iter().filter(is_new).collect();
        let absent = missing_blobs(&*store, far.iter().flat_map(|record| record.blobs()).collect())?;
        let far = far.into_iter().filter(|record| record.blobs().is_disjoint(&absent));
        let all: Vec<&Record> = near.into_iter().chain(far).collect();
        at_once(&all, self.target.parallel, |record| {
            let replaces = existing.get(record.key()) == Some(&Kept::Goes);
            let bytes = record.encode();
            let existing = if replaces { Existing::Replace } else { Existing::Keep };
            let name = self.name(record.key());
            store.put(&name, &mut &bytes[..], bytes.len() as u64, existing).map_err(ExportError::from)
        })
    }

    fn name(&self, key: &Digest) -> ObjectName {
        ObjectName::Record { scope: self.target.scope.clone(), key: *key }
    }

    /// The records to leave, with the layers that they speak of packed.
    fn records(&self, results: &Gathered<'_>) -> Result<Records, ExportError> {
        let in_image = |layers: &[ChainId]| layers.last().is_some_and(|top| results.top.contains(top));
        let is_wanted = |result: &&Found<'_>| {
            self.target.all || in_image(&chains(result.layers.iter().map(|layer| layer.diff_id)))
        };
        let wanted: BTreeMap<&Digest, &Found<'_>> =
            results.near.iter().filter(|(_, result)| is_wanted(result)).collect();
        let mut packed: HashMap<SnapshotId, Descriptor> = HashMap::new();
        let mut layers: HashMap<Digest, ReadyLayer> = HashMap::new();
        for layer in wanted.values().flat_map(|result| &*result.layers) {
            if packed.contains_key(&layer.snapshot) {
                continue;
            }
            let (compress, cancel) = (&self.target.compress, self.cancel.flag());
            let made = ready(self.engine, layer, compress, Times::Keep, cancel, &mut Along::Nobody)?;
            packed.insert(layer.snapshot.clone(), made.descriptor.clone());
            layers.insert(made.descriptor.digest, made);
        }
        let near = wanted.iter().map(|(key, result)| {
            let layers = result.layers.iter().map(|layer| {
                let blob = &packed[&layer.snapshot];
                RecordLayer {
                    diff_id: layer.diff_id,
                    size_bytes: layer.size_bytes,
                    blob: blob.digest,
                    blob_bytes: blob.size,
                    media_type: blob.media_type.clone(),
                    created_unix: result.entry.times.get(&layer.snapshot).copied(),
                }
            });
            let Entry { canonical, created_unix, title, .. } = result.entry;
            Record::new(**key, *canonical, *created_unix, title, layers.collect())
        });
        let near: Vec<Record> = near.collect();
        let far = results.far.iter().filter(|(key, far)| {
            let layers = far.record.layers.iter().map(|layer| layer.diff_id);
            !results.near.contains_key(key) && (self.target.all || in_image(&chains(layers)))
        });
        let far = far.map(|(key, far)| {
            let Record { canonical, created_unix, title, layers, .. } = &far.record;
            Record::new(*key, *canonical, *created_unix, title, layers.clone())
        });
        Ok(Records { far: far.collect(), near, layers })
    }

    /// What becomes of the records that are there already, by their keys.
    ///
    /// The first answer stays, so that all machines agree, unless it is none: damaged, or of blobs that were
    /// removed behind its back.
    fn existing<'r>(
        &self,
        store: &dyn RemoteStore,
        records: impl Iterator<Item = &'r Record>,
    ) -> Result<HashMap<Digest, Kept>, ExportError> {
        let mut kept = HashMap::new();
        let mut others: Vec<Record> = Vec::new();
        let records: Vec<&Record> = records.collect();
        for batch in records.chunks(BATCH) {
            let names: Vec<ObjectName> = batch.iter().map(|record| self.name(record.key())).collect();
            for (record, there) in batch.iter().zip(store.get_many(&names, MAX_RECORD_BYTES)?) {
                let Some(there) = there else { continue };
                let key = *record.key();
                match Record::decode(&there, &key) {
                    Ok(_) if self.outdated.contains(&key) => {
                        kept.insert(key, Kept::Goes);
                    }
                    Ok(other) => others.push(other),
                    Err(_) => {
                        kept.insert(key, Kept::Goes);
                    }
                }
            }
        }
        let absent = missing_blobs(store, others.iter().flat_map(Record::blobs).collect())?;
        for other in others {
            let is_whole = other.blobs().is_disjoint(&absent);
            kept.insert(*other.key(), if is_whole { Kept::Stays } else { Kept::Goes });
        }
        Ok(kept)
    }

    fn send_blob(&self, store: &dyn RemoteStore, layer: &ReadyLayer) -> Result<(), ExportError> {
        let Descriptor { digest, size, .. } = layer.descriptor;
        let file = match &layer.content {
            LayerContent::Blob => self.engine.store.open_blob(&digest).map_err(BuildError::from)?.0,
            LayerContent::Plain(record) => {
                let mut spool = self.engine.store.spool().map_err(BuildError::from)?;
                let unwritten = |error| crate::load_layers::not_written(self.engine, error);
                write_layer(self.engine, record, &mut spool, self.cancel.flag())
                    .map_err(|error| error.named(unwritten))?;
                spool.seek(SeekFrom::Start(0)).map_err(unwritten)?;
                spool
            }
        };
        let name = ObjectName::Blob(digest);
        let mut content = Checked::new(file.take(size), digest);
        // One that is there has another size.
        Ok(store.put(&name, &mut content, size, Existing::Replace)?)
    }
}

/// What becomes of a record that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Stays,
    Goes,
}

struct Records {
    near: Vec<Record>,
    far: Vec<Record>,
    /// By the digests of their blobs.
    layers: HashMap<Digest, ReadyLayer>,
}

/// Those of `blobs` that are not in the store, or have another size there.
fn missing_blobs(
    store: &dyn RemoteStore,
    blobs: BTreeSet<(Digest, u64)>,
) -> Result<BTreeSet<(Digest, u64)>, RemoteError> {
    let blobs: Vec<(Digest, u64)> = blobs.into_iter().collect();
    let mut missing = BTreeSet::new();
    for batch in blobs.chunks(BATCH) {
        let names: Vec<ObjectName> = batch.iter().map(|(digest, _)| ObjectName::Blob(*digest)).collect();
        for (blob, there) in batch.iter().zip(store.sizes(&names)?) {
            if there != Some(blob.1) {
                missing.insert(*blob);
            }
        }
    }
    Ok(missing)
}
