//! Garbage collection: what nobody can reach goes, and of the cache what the policy does not keep.
//!
//! `plan.rs` decides from a look at everything what shall go, and why; here it is done. Between the
//! two the world may change: each thing is claimed (nobody can begin to use it then), looked at once
//! more, forgotten, and only then removed.

mod plan;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File, TryLockError};
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use kiln_content::{Claim, Claims, ContainerUse, Expected, Pinnable, Space};
use kiln_oci::{Digest, SnapshotId};
use kiln_snapshotter::Needs;

use crate::cache_mounts::remove_cache_mount;
use crate::engine::now_unix;
use crate::world::{World, remove_repository, unreadable};
use crate::{BuildCancel, BuildError, Engine};

pub use plan::{Kind, Object, Verdict};

/// What garbage collection shall keep. Whatever a name, a container or a running command can reach
/// stays in any case, and what nothing can reach goes in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// Cached results, images without a name, cache mounts, repositories may go when they were not
    /// used for this long; `None`: they stay, unless there is a limit, which then may take all.
    pub keep: Option<Duration>,
    /// The cache goes, least recently used first, until the store takes no more than this.
    pub max_store_bytes: Option<u64>,
    /// The cache goes until this much of the file system is free.
    pub min_free_bytes: Option<u64>,
    /// Images go although they have names, unless somebody uses them.
    pub named_images: bool,
    /// What `kiln why` calls it.
    pub by: By,
}

/// Which command collects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum By {
    /// `kiln gc`, or a build that keeps to a limit.
    #[default]
    Gc,
    /// `kiln prune`
    Prune,
}

impl By {
    fn name(self) -> &'static str {
        match self {
            Self::Gc => "gc",
            Self::Prune => "prune",
        }
    }
}

impl Policy {
    /// All of the cache that no image with a name needs, as `docker system prune`; with
    /// `named_images`, images that no container uses as well.
    pub fn prune(named_images: bool) -> Self {
        Self { keep: Some(Duration::ZERO), named_images, by: By::Prune, ..Self::default() }
    }
}

/// What garbage collection did, or would do.
#[derive(Debug)]
pub struct Collected {
    /// Every object with what became of it, in the order they were judged.
    pub objects: Vec<Object>,
    /// What the store took before.
    pub before_bytes: u64,
    /// What the removed objects took.
    pub removed_bytes: u64,
    /// A limit could not be kept, because all that may go has gone.
    pub over_limit: bool,
}

/// Collects garbage. With `dry_run` nothing changes.
///
/// Waits for another collection to end, unless it is a dry run.
///
/// # Errors
/// [`BuildError`]; what was removed until then stays removed.
pub fn collect(
    engine: &Engine,
    policy: &Policy,
    dry_run: bool,
    cancel: &BuildCancel,
) -> Result<Collected, BuildError> {
    if dry_run {
        return run(engine, policy, true, cancel);
    }
    let _turn = turn(engine)?;
    run(engine, policy, false, cancel)
}

/// Judges what is in `world` by `policy`, and changes nothing.
///
/// # Errors
/// [`BuildError`] when it cannot be told what is in use.
pub(crate) fn judge(engine: &Engine, world: &World, policy: &Policy) -> Result<Vec<Object>, BuildError> {
    Ok(plan_for(engine, world, policy, &Claims::open(&engine.store)?)?.objects)
}

fn plan_for(
    engine: &Engine,
    world: &World,
    policy: &Policy,
    claims: &Claims,
) -> Result<plan::Plan, BuildError> {
    let in_use = |what: &Pinnable| Ok::<_, BuildError>(claims.claim(what)?.is_none());
    let free_bytes = Space::of(engine.store.root()).ok().map(|space| space.free_bytes);
    plan::plan(world, policy, now_unix(), free_bytes, &in_use)
}

/// At most this often after builds.
const AUTOMATIC_PAUSE: Duration = Duration::from_secs(60);

/// Collects garbage after a build: not while somebody else does, and at most once a minute. `None`:
/// not now.
///
/// # Errors
/// As [`collect`].
pub fn collect_sometimes(
    engine: &Engine,
    policy: &Policy,
    cancel: &BuildCancel,
) -> Result<Option<Collected>, BuildError> {
    let stamp = engine.store.root().join("locks/gc-done");
    let since = |done: SystemTime| SystemTime::now().duration_since(done).unwrap_or(AUTOMATIC_PAUSE);
    let done = fs::metadata(&stamp).and_then(|file| file.modified());
    if done.is_ok_and(|done| since(done) < AUTOMATIC_PAUSE) {
        return Ok(None);
    }
    let lock = open_turn(engine)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(unlockable(engine, error)),
    }
    let collected = run(engine, policy, false, cancel)?;
    // If this fails it only runs more often.
    let _ = fs::write(stamp, "");
    Ok(Some(collected))
}

/// Keeps others from collecting garbage.
pub(crate) fn turn(engine: &Engine) -> Result<File, BuildError> {
    let lock = open_turn(engine)?;
    lock.lock().map_err(|error| unlockable(engine, error))?;
    Ok(lock)
}

fn open_turn(engine: &Engine) -> Result<File, BuildError> {
    File::create(turn_path(engine)).map_err(|error| unlockable(engine, error))
}

fn turn_path(engine: &Engine) -> std::path::PathBuf {
    engine.store.root().join("locks/gc")
}

fn unlockable(engine: &Engine, source: std::io::Error) -> BuildError {
    unreadable(&turn_path(engine))(source)
}

fn run(
    engine: &Engine,
    policy: &Policy,
    dry_run: bool,
    cancel: &BuildCancel,
) -> Result<Collected, BuildError> {
    let stop = || match cancel.flag().load(Ordering::Relaxed) {
        true => Err(BuildError::Cancelled),
        false => Ok(()),
    };
    let _released = (!dry_run).then(|| engine.store.release_reserve());
    if !dry_run {
        sweep_leftovers(engine)?;
    }
    stop()?;
    let world = World::look(engine)?;
    stop()?;
    let claims = Claims::open(&engine.store)?;
    let plan = plan_for(engine, &world, policy, &claims)?;
    let before_bytes = world.total_bytes();
    let mut objects = plan.objects;
    if !dry_run {
        let mut collection = Collection::new(engine, &claims, &world);
        let mut doomed: Vec<&mut Object> =
            objects.iter_mut().filter(|object| object.verdict == Verdict::Remove).collect();
        for batch in doomed.chunks_mut(BATCH) {
            stop()?;
            collection.remove(batch)?;
        }
        stop()?;
        engine.snapshots.empty_trash()?;
    }
    let removed = objects.iter().filter(|object| object.verdict == Verdict::Remove);
    if !dry_run {
        let by = policy.by.name();
        let snapshots = removed.clone().filter_map(|object| match &object.kind {
            Kind::Snapshot { id, .. } => Some(id),
            _ => None,
        });
        crate::builds::taken::note(engine.store.root(), by, snapshots);
    }
    let removed_bytes = removed.map(|object| object.disk_bytes).sum();
    Ok(Collected { objects, before_bytes, removed_bytes, over_limit: plan.over_limit })
}

/// Files of digests of contexts that were not built for this long are of no use to anybody.
const STAT_CACHE_AGE: Duration = Duration::from_secs(60 * 86_400);

/// Removes what killed commands left: locks, half-written blobs, trash, old digests of contexts.
fn sweep_leftovers(engine: &Engine) -> Result<(), BuildError> {
    engine.store.sweep_leases()?;
    engine.store.sweep_ingest()?;
    engine.snapshots.empty_trash()?;
    let digests = engine.store.root().join("state/stat");
    for entry in fs::read_dir(digests).into_iter().flatten().flatten() {
        let changed = entry.metadata().and_then(|file| file.modified());
        let age = changed.ok().and_then(|changed| SystemTime::now().duration_since(changed).ok());
        if age.is_some_and(|age| age > STAT_CACHE_AGE) {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// So many objects are claimed at once: those who wait for one wait for all of them.
const BATCH: usize = 64;

/// A collection while it removes.
struct Collection<'a> {
    engine: &'a Engine,
    claims: &'a Claims,
    /// What each snapshot stands on and is a delta on, as far as it has been looked at.
    needs: HashMap<SnapshotId, Vec<SnapshotId>>,
    /// How many snapshots that are still there need each.
    children: HashMap<SnapshotId, usize>,
}

impl<'a> Collection<'a> {
    fn new(engine: &'a Engine, claims: &'a Claims, world: &World) -> Self {
        let mut new = Self { engine, claims, needs: HashMap::new(), children: HashMap::new() };
        for (id, node) in &world.nodes {
            new.add(id.clone(), Needs { parent: node.parent.clone(), full: node.full.clone() });
        }
        new
    }

    fn add(&mut self, id: SnapshotId, needs: Needs) {
        let needs: Vec<SnapshotId> = needs.parent.into_iter().chain(needs.full).collect();
        for need in &needs {
            *self.children.entry(need.clone()).or_default() += 1;
        }
        self.needs.insert(id, needs);
    }

    /// Removes objects, each unless it came into use since it was judged.
    fn remove(&mut self, batch: &mut [&mut Object]) -> Result<(), BuildError> {
        let claims: Vec<Option<Vec<Claim<'a>>>> =
            batch.iter().map(|object| self.claim(&object.kind)).collect::<Result<_, _>>()?;
        // From here on nobody new can stand on what is claimed, and who does by now is there to see.
        self.look_again()?;
        let containers = self.engine.store.container_uses()?;
        let mut forgotten = Vec::new();
        for (object, claims) in batch.iter_mut().zip(claims) {
            if claims.is_some() && !is_used(&containers, &object.kind) && self.forget(&object.kind)? {
                forgotten.push((object, claims));
            } else {
                object.verdict = Verdict::Keep;
                "came into use meanwhile".clone_into(&mut object.reason);
            }
        }
        if forgotten.is_empty() {
            return Ok(());
        }
        // Records that come back after a power cut must find their data.
        self.engine.store.settle()?;
        for (object, claims) in forgotten {
            if !self.remove_data(object)? {
                object.verdict = Verdict::Keep;
                "came into use meanwhile".clone_into(&mut object.reason);
            }
            drop(claims);
        }
        Ok(())
    }

    /// Keeps everybody from using an object; `None`: somebody does.
    fn claim(&self, kind: &Kind) -> Result<Option<Vec<Claim<'a>>>, BuildError> {
        let names = match kind {
            Kind::Image { config, snapshot, .. } => {
                let files = snapshot.clone().map(Pinnable::Snapshot);
                files.into_iter().chain([Pinnable::Blob(*config)]).collect()
            }
            Kind::Snapshot { id, .. } => vec![Pinnable::Snapshot(id.clone())],
            Kind::Blob(digest) => vec![Pinnable::Blob(*digest)],
            Kind::CacheMount | Kind::Repository => Vec::new(),
        };
        let mut claims = Vec::new();
        for name in &names {
            match self.claims.claim(name)? {
                Some(claim) => claims.push(claim),
                None => return Ok(None),
            }
        }
        Ok(Some(claims))
    }

    /// Sees snapshots that were committed since the last look.
    fn look_again(&mut self) -> Result<(), BuildError> {
        for id in self.engine.snapshots.committed()? {
            if self.needs.contains_key(&id) {
                continue;
            }
            match self.engine.snapshots.needs(&id) {
                Ok(needs) => self.add(id, needs),
                Err(kiln_snapshotter::Error::NoSnapshot(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Removes the records of a claimed object; `false`: something needs it by now.
    fn forget(&mut self, kind: &Kind) -> Result<bool, BuildError> {
        let store = &self.engine.store;
        match kind {
            Kind::Image { config, named: true, .. } => {
                store.disown_image(config)?;
                Ok(true)
            }
            Kind::Image { config, .. } => Ok(store.forget_image(config)?),
            Kind::Snapshot { id, cache, source } => {
                let expected = Expected { cache: *cache, source: *source, images: Vec::new() };
                if self.children.get(id).is_some_and(|count| *count > 0)
                    || !store.forget_snapshot(id, &expected)?
                {
                    return Ok(false);
                }
                for need in self.needs.insert(id.clone(), Vec::new()).unwrap_or_default() {
                    if let Some(count) = self.children.get_mut(&need) {
                        *count -= 1;
                    }
                }
                Ok(true)
            }
            Kind::Blob(digest) => Ok(!store.is_blob_needed(digest)?),
            Kind::CacheMount | Kind::Repository => Ok(true),
        }
    }

    /// Removes what nothing refers to any more; `false`: somebody uses it.
    fn remove_data(&self, object: &Object) -> Result<bool, BuildError> {
        let root = self.engine.store.root();
        let cannot = unreadable(&root.join(object.kind.name().replace(' ', "-") + "s").join(&object.id));
        match &object.kind {
            Kind::Image { .. } => Ok(true),
            Kind::Snapshot { id, .. } => match self.engine.snapshots.remove(id) {
                Ok(()) | Err(kiln_snapshotter::Error::NoSnapshot(_)) => Ok(true),
                Err(error) => Err(error.into()),
            },
            Kind::Blob(digest) => Ok(self.engine.store.remove_blob(digest).map(|_| true)?),
            Kind::CacheMount => remove_cache_mount(root, &object.id).map_err(cannot),
            Kind::Repository => remove_repository(root, &object.id).map_err(cannot),
        }
    }
}

/// Whether a container was made of an image, or stands on a snapshot.
fn is_used(containers: &[ContainerUse], kind: &Kind) -> bool {
    containers.iter().any(|container| match kind {
        Kind::Image { config, .. } => container.image.as_ref() == Some(config),
        Kind::Snapshot { id, .. } => container.snapshot.as_ref() == Some(id),
        Kind::Blob(_) | Kind::CacheMount | Kind::Repository => false,
    })
}

/// Blobs that the images and layers which stay refer to, or that were made of them.
fn needed_blobs(
    world: &World,
    images: &HashSet<Digest>,
    snapshots: &HashSet<&SnapshotId>,
) -> BTreeSet<Digest> {
    let survey = &world.survey;
    let images: Vec<_> = survey.images.iter().filter(|image| !images.contains(&image.config)).collect();
    let layers: Vec<_> = survey.layers.iter().filter(|layer| !snapshots.contains(&layer.snapshot)).collect();
    let configs: HashSet<Digest> = images.iter().map(|image| image.config).collect();
    let diff_ids: HashSet<_> = layers.iter().map(|layer| layer.diff_id).collect();
    let packed = survey.packed.iter().filter(|packed| diff_ids.contains(&packed.diff_id));
    let kept = survey.kept.iter().filter(|kept| configs.contains(&kept.config));
    images
        .iter()
        .flat_map(|image| [image.config, image.manifest])
        .chain(layers.iter().filter_map(|layer| layer.blob.as_ref().map(|blob| blob.digest)))
        .chain(packed.map(|packed| packed.blob))
        .chain(kept.map(|kept| kept.blob))
        .collect()
}
