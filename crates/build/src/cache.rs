//! The build cache: the solver's keys on the store's records.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_content::{CacheRecord, Store};
use kiln_oci::SnapshotId;
use kiln_snapshotter::Snapshotter;
use kiln_solver::{CacheKey, CacheStore, Cached, Claim, Places, Scope};

use crate::BuildError;
use crate::engine::now_unix;
use crate::step_claim;
use crate::tree::Tree;

/// Results of earlier builds in the store.
pub(crate) struct BuildCache {
    store: Arc<Store>,
    snapshots: Arc<dyn Snapshotter>,
    seen: Mutex<Seen>,
}

/// What passed through in this build.
#[derive(Default)]
struct Seen {
    /// When each snapshot was made; seconds since 1970.
    created: HashMap<SnapshotId, i64>,
}

impl BuildCache {
    pub(crate) fn new(store: Arc<Store>, snapshots: Arc<dyn Snapshotter>) -> Self {
        Self { store, snapshots, seen: Mutex::default() }
    }

    /// When `snapshot` was made, for one that this build found or made.
    pub(crate) fn created_unix(&self, snapshot: &SnapshotId) -> Option<i64> {
        self.lock().created.get(snapshot).copied()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        // Plain data: a panic elsewhere leaves nothing half-done in it.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CacheStore<Tree> for BuildCache {
    type Error = BuildError;

    fn lookup(&self, key: &CacheKey) -> Result<Option<Cached<Tree>>, BuildError> {
        let Some(record) = self.store.cache_get(&key.0)? else { return Ok(None) };
        self.lock().created.insert(record.snapshot.clone(), record.created_unix);
        Ok(Some(Cached { canonical: CacheKey(record.canonical), output: Tree::Snapshot(record.snapshot) }))
    }

    fn load(&self, found: &Cached<Tree>) -> Result<bool, BuildError> {
        let Some(snapshot) = found.output.snapshot() else { return Ok(true) };
        // Pinned since it was found: what is there stays.
        let is_there = self.snapshots.contains(snapshot);
        if !is_there {
            self.store.cache_forget_snapshot(snapshot)?;
        }
        Ok(is_there)
    }

    fn save(&self, places: &Places<'_>, result: &Cached<Tree>, title: &str) -> Result<(), BuildError> {
        self.put(places, result, now_unix(), title)
    }

    fn link(&self, places: &Places<'_>, result: &Cached<Tree>, title: &str) -> Result<(), BuildError> {
        let found = result.output.snapshot().and_then(|snapshot| self.created_unix(snapshot));
        self.put(places, result, found.unwrap_or_else(now_unix), title)
    }

    fn claim(&self, key: &CacheKey, scope: &Scope<'_>) -> Result<Option<Claim>, BuildError> {
        step_claim::claim(self.store.root(), key, scope)
    }
}

impl BuildCache {
    fn put(
        &self,
        places: &Places<'_>,
        result: &Cached<Tree>,
        created_unix: i64,
        title: &str,
    ) -> Result<(), BuildError> {
        let Some(snapshot) = result.output.snapshot() else { return Ok(()) };
        let record = CacheRecord {
            canonical: result.canonical.0,
            snapshot: snapshot.clone(),
            created_unix,
            description: title.to_owned(),
        };
        let (mut keys, mut newest): (Vec<_>, Vec<_>) = (places.keys.to_vec(), places.newest.to_vec());
        if places.replace {
            // One transaction for all.
            newest.append(&mut keys);
        }
        for (keys, replace) in [(keys, false), (newest, true)] {
            if !keys.is_empty() {
                let keys: Vec<_> = keys.iter().map(|key| key.0).collect();
                self.store.cache_put(&keys, &record, replace)?;
            }
        }
        self.lock().created.insert(snapshot.clone(), created_unix);
        Ok(())
    }
}
