//! Results of other machines' builds, and this build's for them.
//!
//! Read `spec.rs` first (what users ask for), then [`RemoteCache`] (looking up), `pull.rs` (a result's layers
//! become snapshots), `export.rs` (leaving results), `inline.rs` with `registry_image.rs` (results in an image).
//!
//! # Invariants
//! - Whatever a remote does, the build's result is right and its exit code is its own: what cannot be
//!   reached, or cannot be right, is a warning and a miss.
//! - A remote that does not answer is asked once.
//! - What comes from a remote is a record that was checked and layers whose digests were: never a name, a
//!   path or a config. It never takes the place of a result that is here.
//! - What a cache with a scope says is borrowed: neither it nor what is made from it is found by builds that do
//!   not name the same scopes.
//! - Layers come when somebody reads them. A result that only another result stands on is never fetched.

mod borrowed;
mod export;
mod files;
mod inline;
mod pull;
mod registry;
mod registry_image;
mod spec;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use kiln_oci::{Digest, Platform};
use kiln_remote::{Bucket, Directory, MAX_RECORD_BYTES, ObjectName, Record, RemoteError, RemoteStore, Stop};
use kiln_solver::Cancellation;

pub(crate) use self::borrowed::Borrowed;
pub(crate) use self::export::{Exported, Results, export};
pub(crate) use self::inline::{INLINE_KEY, describe_inline};
use self::inline::{ImagePlaces, InlineRecords};
pub(crate) use self::pull::Fetched;
use self::spec::Place;
pub use self::spec::{CacheSource, CacheTarget};
use crate::build::Progress;
use crate::registry::{Bases, Registries};
use crate::{BuildCancel, BuildRequest, Engine};

/// So many damaged results are spoken of.
const TOLD: usize = 3;

/// A result on another machine.
#[derive(Debug)]
pub(crate) struct FarResult {
    /// Which source has it.
    source: usize,
    record: Record,
    /// Its source has a scope.
    is_borrowed: bool,
    /// More keys that it was found to be the answer to, and whether that is borrowed.
    links: Mutex<Vec<(Digest, bool)>>,
}

impl FarResult {
    pub(crate) fn canonical(&self) -> &Digest {
        &self.record.canonical
    }

    /// When it was made; seconds since 1970.
    pub(crate) fn created_unix(&self) -> i64 {
        self.record.created_unix
    }

    pub(crate) fn is_borrowed(&self) -> bool {
        self.is_borrowed
    }

    /// Remembers keys, to be saved when the result is near.
    pub(crate) fn link(&self, keys: impl Iterator<Item = Digest>, is_borrowed: bool) {
        let keys = keys.map(|key| (key, is_borrowed || self.is_borrowed));
        self.links.lock().unwrap_or_else(PoisonError::into_inner).extend(keys);
    }

    /// Everything that it is the answer to, and whether that is borrowed.
    fn keys(&self) -> Vec<(Digest, bool)> {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        // Not `canonical`: a hostile record may say any key there, and would be the answer to it from then on.
        std::iter::once((*self.record.key(), self.is_borrowed)).chain(links.iter().copied()).collect()
    }
}

/// One `--cache-from`.
struct Source {
    spec: CacheSource,
    label: Arc<str>,
    /// Opened by the first question; `None`: it could not be.
    store: OnceLock<Option<Box<dyn RemoteStore>>>,
    /// It did not answer, and is not asked again.
    is_off: AtomicBool,
    /// What it took to find that results are damaged.
    wasted_ms: AtomicU64,
}

/// A source that has cost so much, and given nothing for it, is not asked again.
const WASTE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct State {
    /// What the sources said; `None`: none has it.
    known: HashMap<Digest, Option<Arc<FarResult>>>,
    /// Keys whose results are damaged.
    damaged: HashSet<Digest>,
    /// Damaged results that were spoken of.
    told: usize,
}

/// All `--cache-from` of a build.
pub(crate) struct RemoteCache {
    engine: Engine,
    cancel: BuildCancel,
    progress: Arc<dyn Progress>,
    bases: Bases,
    /// What is built for.
    platforms: Vec<Platform>,
    sources: Vec<Source>,
    borrowed: Option<Borrowed>,
    state: Mutex<State>,
    /// Layers of several results are often the same: one result at a time.
    pulling: Mutex<()>,
}

fn stop(cancel: &BuildCancel) -> Stop {
    let cancel = cancel.clone();
    Arc::new(move || cancel.is_cancelled())
}

impl RemoteCache {
    /// Opens nothing yet.
    pub(crate) fn new(
        engine: &Engine,
        request: &BuildRequest,
        cancel: &BuildCancel,
        progress: Arc<dyn Progress>,
    ) -> Self {
        let source = |spec: &CacheSource| Source {
            spec: spec.clone(),
            label: spec.place.label().into(),
            store: OnceLock::new(),
            is_off: AtomicBool::new(spec.is_silent),
            wasted_ms: AtomicU64::new(0),
        };
        Self {
            engine: engine.clone(),
            cancel: cancel.clone(),
            progress,
            bases: request.bases.clone(),
            platforms: request.targets(),
            sources: request.cache_from.iter().map(source).collect(),
            borrowed: Borrowed::of(&request.cache_from),
            state: Mutex::default(),
            pulling: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain data: a panic elsewhere leaves nothing half-done in it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is somebody to ask for `key` who was not asked.
    pub(crate) fn may_know(&self, key: &Digest) -> bool {
        let is_on = |source: &Source| !source.is_off.load(Ordering::Relaxed);
        self.sources.iter().any(is_on) && !self.lock().known.contains_key(key)
    }

    /// What was said of `key`.
    pub(crate) fn known(&self, key: &Digest) -> Option<Arc<FarResult>> {
        self.lock().known.get(key).cloned().flatten()
    }

    /// Where the store keeps what is borrowed; `None`: nothing is.
    pub(crate) fn borrowed(&self) -> Option<&Borrowed> {
        self.borrowed.as_ref()
    }

    /// Where a result is.
    pub(crate) fn origin(&self, result: &FarResult) -> Arc<str> {
        self.sources[result.source].label.clone()
    }

    /// Keys whose results, on remotes, are not what they should be.
    pub(crate) fn damaged(&self) -> HashSet<Digest> {
        self.lock().damaged.clone()
    }

    /// Asks for all keys at once, the first source that knows one wins. Blocks.
    pub(crate) fn ask(&self, keys: &[Digest]) {
        let mut missing: Vec<Digest> = {
            let state = self.lock();
            keys.iter().filter(|key| !state.known.contains_key(*key)).copied().collect()
        };
        missing.sort_unstable();
        missing.dedup();
        for (nth, source) in self.sources.iter().enumerate() {
            if missing.is_empty() {
                return;
            }
            let Some(store) = self.store(source) else { continue };
            let name = |key: &Digest| ObjectName::Record { scope: source.spec.scope.clone(), key: *key };
            let names: Vec<ObjectName> = missing.iter().map(name).collect();
            let answers = match store.get_many(&names, MAX_RECORD_BYTES) {
                Ok(answers) => answers,
                Err(error) => {
                    self.turn_off(source, &error);
                    continue;
                }
            };
            for (key, answer) in missing.iter().zip(answers) {
                let Some(bytes) = answer else { continue };
                match Record::decode(&bytes, key) {
                    Ok(record) => {
                        let is_borrowed = source.spec.is_scoped();
                        let found = FarResult { source: nth, record, is_borrowed, links: Mutex::default() };
                        self.lock().known.insert(*key, Some(Arc::new(found)));
                    }
                    Err(error) => self.is_damaged(nth, key, &error.to_string()),
                }
            }
            missing.retain(|key| !self.lock().known.contains_key(key));
        }
        let mut state = self.lock();
        for key in missing {
            state.known.entry(key).or_insert(None);
        }
    }

    fn store<'a>(&self, source: &'a Source) -> Option<&'a dyn RemoteStore> {
        if source.is_off.load(Ordering::Relaxed) {
            return None;
        }
        let open = || match self.open(&source.spec.place) {
            Ok(store) => Some(store),
            Err(error) => {
                self.turn_off(source, &error);
                None
            }
        };
        source.store.get_or_init(open).as_deref()
    }

    fn open(&self, place: &Place) -> Result<Box<dyn RemoteStore>, RemoteError> {
        let Place::Image(name) = place else {
            return open(&self.engine, self.bases.registries.as_ref(), place, &self.cancel, false);
        };
        // What is not pulled by this build is not asked for either.
        let (registries, platforms) = (self.bases.asked(), &self.platforms);
        let places = ImagePlaces { engine: &self.engine, registries, platforms, cancel: &self.cancel };
        Ok(Box::new(InlineRecords::open(&places, name.as_ref())?))
    }

    /// Asks a source no more in this build, and says so once.
    fn turn_off(&self, source: &Source, error: &RemoteError) {
        if source.is_off.swap(true, Ordering::Relaxed) || matches!(error, RemoteError::Stopped) {
            return;
        }
        let why = crate::error::in_one_line(error);
        self.progress.note(&format!("the build goes on without the cache of {}: {why}", source.label));
    }

    /// So much time went into a result that is none.
    fn wasted(&self, source: &Source, time: Duration) {
        let more = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let all = source.wasted_ms.fetch_add(more, Ordering::Relaxed).saturating_add(more);
        if Duration::from_millis(all) > WASTE {
            let why = "it is slow, and what it gives is of no use".to_owned();
            self.turn_off(source, &RemoteError::Server(why));
        }
    }

    /// A result of a source is not what it should be: it is as if there were none.
    fn is_damaged(&self, source: usize, key: &Digest, why: &str) {
        let told = {
            let mut state = self.lock();
            state.known.insert(*key, None);
            state.damaged.insert(*key);
            state.told += 1;
            state.told
        };
        let label = &self.sources[source].label;
        match told {
            1..=TOLD => {
                let record = &key.hex()[..16];
                self.progress
                    .note(&format!("a result in the cache of {label} is not used: {why} (record {record})"));
            }
            more if more == TOLD + 1 => self.progress.note("more results in caches are not used"),
            _ => {}
        }
    }
}

/// Opens what a spec names, unless that is an image; `create`: makes a directory.
fn open(
    engine: &Engine,
    registries: Option<&Arc<Registries>>,
    place: &Place,
    cancel: &BuildCancel,
    create: bool,
) -> Result<Box<dyn RemoteStore>, RemoteError> {
    Ok(match place {
        Place::Directory(path) => Box::new(Directory::open(path, create, stop(cancel))?),
        Place::Bucket(config, _) => Box::new(Bucket::new(config, stop(cancel))?),
        Place::Registry(name) => Box::new(registry::RegistryStore::new(engine, registries, name, cancel)?),
        Place::Image(_) => return Err(RemoteError::Options("an image is not written to".to_owned())),
    })
}
