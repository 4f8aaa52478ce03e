//! The build cache: the solver's keys on the store's records, and on those of other machines.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_content::{CacheRecord, Store};
use kiln_oci::{Digest, SnapshotId};
use kiln_snapshotter::Snapshotter;
use kiln_solver::{CacheKey, CacheStore, Cached, Claim, Places, Scope};

use crate::BuildError;
use crate::engine::now_unix;
use crate::remote_cache::{Borrowed, FarResult, Fetched, RemoteCache};
use crate::step_claim;
use crate::tree::Tree;

/// Results of earlier builds in the store.
pub(crate) struct BuildCache {
    store: Arc<Store>,
    snapshots: Arc<dyn Snapshotter>,
    seen: Mutex<Seen>,
    /// `None`: nobody else is asked.
    remote: Option<RemoteCache>,
    /// What was found and made is remembered under its keys, for others.
    is_exported: bool,
}

/// A result of this build, for others.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// The key that users of the result build theirs from.
    pub(crate) canonical: Digest,
    /// The result.
    pub(crate) snapshot: SnapshotId,
    /// When it was made; seconds since 1970.
    pub(crate) created_unix: i64,
    /// The step as the user wrote it.
    pub(crate) title: String,
    /// When it and what it stands on were made, as far as steps made them.
    pub(crate) times: HashMap<SnapshotId, i64>,
}

/// What passed through in this build.
#[derive(Default)]
struct Seen {
    /// When each snapshot was made; seconds since 1970.
    created: HashMap<SnapshotId, i64>,
    /// Results by their keys, if they are exported.
    entries: BTreeMap<Digest, CacheRecord>,
    /// Keys whose results were made in spite of earlier ones, if they are exported.
    replaced: HashSet<Digest>,
    /// Keys whose results were found on other machines, and not fetched.
    far: BTreeMap<Digest, Arc<FarResult>>,
    /// The marks of such results.
    far_marks: BTreeSet<Digest>,
    /// What is on record of results that are here, where other machines are asked as well.
    near: HashMap<SnapshotId, CacheRecord>,
}

impl BuildCache {
    pub(crate) fn new(store: Arc<Store>, snapshots: Arc<dyn Snapshotter>) -> Self {
        Self { store, snapshots, seen: Mutex::default(), remote: None, is_exported: false }
    }

    /// One that asks `remote`, too, and with `is_exported` remembers what it was asked for.
    pub(crate) fn shared(self, remote: Option<RemoteCache>, is_exported: bool) -> Self {
        Self { remote, is_exported, ..self }
    }

    /// Results that this build found here or made, by their keys.
    pub(crate) fn entries(&self) -> BTreeMap<Digest, Entry> {
        let seen = self.lock();
        let entry = |(key, record): (&Digest, &CacheRecord)| {
            let CacheRecord { canonical, snapshot, created_unix, description } = record.clone();
            let chain = self.snapshots.chain(&snapshot).unwrap_or_default();
            let time = |id: SnapshotId| seen.created.get(&id).map(|unix| (id, *unix));
            let times = chain.into_iter().filter_map(time).collect();
            (*key, Entry { canonical, snapshot, created_unix, title: description, times })
        };
        seen.entries.iter().map(entry).collect()
    }

    /// Saves what was found on other machines and is here although nobody fetched it: the lower layers of
    /// what was fetched are results, too. So the next build of this store needs nobody else, as long as one of
    /// `tops` is there, the build's own results.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn adopt(&self, tops: &[SnapshotId]) -> Result<(), BuildError> {
        let Some(remote) = &self.remote else { return Ok(()) };
        for (_, far) in self.far_entries() {
            if let Some(fetched) = remote.find_here(&far)? {
                self.arrived(fetched);
            }
        }
        let (marks, result) = {
            let mut seen = self.lock();
            let result = tops.iter().find_map(|top| seen.near.get(top).cloned());
            (std::mem::take(&mut seen.far_marks), result)
        };
        // What stayed far has no record here. Without its marks the next build would take what stands on it for
        // lost, and begin with it, base image and all, before it finds that result.
        if let Some(result) = result.filter(|_| !marks.is_empty()) {
            let marks: Vec<Digest> = marks.into_iter().collect();
            self.store.cache_put(&marks, &result, false)?;
        }
        Ok(())
    }

    /// A result is here now.
    fn arrived(&self, fetched: Fetched) -> SnapshotId {
        let Fetched { created, record, keys } = fetched;
        let mut seen = self.lock();
        for (snapshot, unix) in created {
            if let Some(unix) = unix {
                seen.created.insert(snapshot, unix);
            }
        }
        let snapshot = record.snapshot.clone();
        seen.created.insert(snapshot.clone(), record.created_unix);
        seen.near.insert(snapshot.clone(), record.clone());
        for key in keys {
            seen.far.remove(&key);
            if self.is_exported {
                seen.entries.insert(key, record.clone());
            }
        }
        snapshot
    }

    /// Results that are on other machines still, by their keys.
    pub(crate) fn far_entries(&self) -> Vec<(Digest, Arc<FarResult>)> {
        self.lock().far.iter().map(|(key, far)| (*key, far.clone())).collect()
    }

    /// Keys whose results on other machines go when they have others: they are not what they should be, or were
    /// made again on purpose.
    pub(crate) fn outdated(&self) -> HashSet<Digest> {
        let mut keys = self.remote.as_ref().map(RemoteCache::damaged).unwrap_or_default();
        keys.extend(&self.lock().replaced);
        keys
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
        let Some((record, is_borrowed)) = self.record(key)? else {
            return Ok(self
                .remote
                .as_ref()
                .and_then(|remote| remote.known(&key.0))
                .map(|far| self.far(key, far)));
        };
        let mut seen = self.lock();
        seen.created.insert(record.snapshot.clone(), record.created_unix);
        if self.remote.is_some() {
            seen.near.insert(record.snapshot.clone(), record.clone());
        }
        if self.is_exported {
            seen.entries.insert(key.0, record.clone());
        }
        let (canonical, output) = (CacheKey(record.canonical), Tree::Snapshot(record.snapshot));
        Ok(Some(Cached { canonical, output, is_borrowed }))
    }

    fn may_be_far(&self, key: &CacheKey) -> bool {
        self.remote.as_ref().is_some_and(|remote| remote.may_know(&key.0))
    }

    fn ask_far(&self, keys: &[CacheKey], soon: &[CacheKey]) -> Vec<Option<Cached<Tree>>> {
        let Some(remote) = &self.remote else { return Vec::new() };
        let all: Vec<Digest> = keys.iter().chain(soon).map(|key| key.0).collect();
        remote.ask(&all);
        keys.iter().map(|key| remote.known(&key.0).map(|far| self.far(key, far))).collect()
    }

    fn is_far(&self, found: &Cached<Tree>) -> bool {
        matches!(found.output, Tree::Far(_))
    }

    fn fetch(&self, found: &Cached<Tree>, _scope: &Scope<'_>) -> Result<Option<Tree>, BuildError> {
        let (Some(remote), Tree::Far(far)) = (&self.remote, &found.output) else { return Ok(None) };
        Ok(remote.fetch(far).map(|fetched| Tree::Snapshot(self.arrived(fetched))))
    }

    fn origin(&self, found: &Cached<Tree>) -> Option<Arc<str>> {
        match (&self.remote, &found.output) {
            (Some(remote), Tree::Far(far)) => Some(remote.origin(far)),
            _ => None,
        }
    }

    fn load(&self, found: &Cached<Tree>) -> Result<bool, BuildError> {
        if self.is_far(found) {
            return Ok(false);
        }
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
    /// Where the store keeps what is borrowed.
    fn borrowed(&self) -> Option<&Borrowed> {
        self.remote.as_ref().and_then(RemoteCache::borrowed)
    }

    /// What the store has for `key`, and whether it is borrowed. One index read more if it is, or if there is
    /// nothing, in a build that borrows.
    fn record(&self, key: &CacheKey) -> Result<Option<(CacheRecord, bool)>, BuildError> {
        if let Some(record) = self.store.cache_get(&key.0)? {
            return Ok(Some((record, false)));
        }
        let Some(borrowed) = self.borrowed() else { return Ok(None) };
        Ok(self.store.cache_get(&borrowed.key(&key.0))?.map(|record| (record, true)))
    }

    /// A result on another machine that is the answer to `key`.
    fn far(&self, key: &CacheKey, far: Arc<FarResult>) -> Cached<Tree> {
        self.lock().far.insert(key.0, far.clone());
        let (canonical, is_borrowed) = (CacheKey(*far.canonical()), far.is_borrowed());
        Cached { canonical, output: Tree::Far(far), is_borrowed }
    }

    fn put(
        &self,
        places: &Places<'_>,
        result: &Cached<Tree>,
        created_unix: i64,
        title: &str,
    ) -> Result<(), BuildError> {
        if let Tree::Far(far) = &result.output {
            // Saved when it is here.
            let keys = places.keys.iter().chain(places.marks).map(|key| key.0);
            let mut seen = self.lock();
            seen.far.extend(keys.clone().map(|key| (key, far.clone())));
            seen.far_marks.extend(places.marks.iter().map(|key| key.0));
            far.link(keys, result.is_borrowed);
            return Ok(());
        }
        let Some(snapshot) = result.output.snapshot() else { return Ok(()) };
        let record = CacheRecord {
            canonical: result.canonical.0,
            snapshot: snapshot.clone(),
            created_unix,
            description: title.to_owned(),
        };
        let mut keys = places.keys.to_vec();
        let mut newest: Vec<CacheKey> = places.marks.iter().copied().chain(places.slot).collect();
        if places.replace {
            // One transaction for all.
            newest.append(&mut keys);
        }
        for (keys, replace) in [(keys, false), (newest, true)] {
            if !keys.is_empty() {
                let place = self.borrowed().filter(|_| result.is_borrowed);
                let key = |key: &CacheKey| place.map_or(key.0, |place| place.key(&key.0));
                let keys: Vec<_> = keys.iter().map(key).collect();
                self.store.cache_put(&keys, &record, replace)?;
            }
        }
        let mut seen = self.lock();
        seen.created.insert(snapshot.clone(), created_unix);
        if self.remote.is_some() {
            seen.near.insert(snapshot.clone(), record.clone());
        }
        if self.is_exported {
            // What was the last result of a step says nothing to a machine that has other results.
            let keys = places.keys.iter().chain(places.marks);
            if places.replace {
                seen.replaced.extend(places.keys.iter().map(|key| key.0));
            }
            seen.entries.extend(keys.map(|key| (key.0, record.clone())));
        }
        Ok(())
    }
}
