//! The build cache: the solver's keys on the store's records.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_content::{CacheRecord, Store};
use kiln_oci::SnapshotId;
use kiln_snapshotter::Snapshotter;
use kiln_solver::{CacheKey, CacheStore, Cached};

use crate::BuildError;
use crate::engine::now_unix;
use crate::tree::Tree;

/// Results of earlier builds in the store.
pub(crate) struct BuildCache {
    store: Arc<Store>,
    snapshots: Arc<dyn Snapshotter>,
    /// `--no-cache`: what is saved replaces what was there.
    replace: bool,
    seen: Mutex<Seen>,
}

/// What passed through in this build.
#[derive(Default)]
struct Seen {
    /// When each snapshot was made; seconds since 1970.
    created: HashMap<SnapshotId, i64>,
    saved: usize,
}

impl BuildCache {
    pub(crate) fn new(store: Arc<Store>, snapshots: Arc<dyn Snapshotter>, replace: bool) -> Self {
        Self { store, snapshots, replace, seen: Mutex::default() }
    }

    /// When `snapshot` was made, for one that this build found or made.
    pub(crate) fn created_unix(&self, snapshot: &SnapshotId) -> Option<i64> {
        self.lock().created.get(snapshot).copied()
    }

    /// How many results this build added.
    pub(crate) fn saved(&self) -> usize {
        self.lock().saved
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        // Plain data: a panic elsewhere leaves nothing half-done in it.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CacheStore<Tree> for BuildCache {
    type Error = BuildError;

    fn lookup(&self, key: &CacheKey) -> Result<Option<Cached<Tree>>, BuildError> {
        // Pinned by now: a snapshot that is there stays.
        let Some(record) = self.store.cache_get(&key.0)? else { return Ok(None) };
        if !self.snapshots.contains(&record.snapshot) {
            self.store.cache_forget_snapshot(&record.snapshot)?;
            return Ok(None);
        }
        self.lock().created.insert(record.snapshot.clone(), record.created_unix);
        Ok(Some(Cached { canonical: CacheKey(record.canonical), output: Tree::Snapshot(record.snapshot) }))
    }

    fn save(&self, keys: &[CacheKey], result: &Cached<Tree>, title: &str) -> Result<(), BuildError> {
        let Some(snapshot) = result.output.snapshot() else { return Ok(()) };
        let created_unix = now_unix();
        let record = CacheRecord {
            canonical: result.canonical.0,
            snapshot: snapshot.clone(),
            created_unix,
            description: title.to_owned(),
        };
        let keys: Vec<_> = keys.iter().map(|key| key.0).collect();
        self.store.cache_put(&keys, &record, self.replace)?;
        let mut seen = self.lock();
        seen.created.insert(snapshot.clone(), created_unix);
        seen.saved += 1;
        Ok(())
    }
}
