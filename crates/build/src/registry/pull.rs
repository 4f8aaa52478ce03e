//! `kiln pull`: an image of a registry becomes one of the store.
//!
//! Blobs come several at once, lowest layers first, and are unpacked while they come, by what unpacks
//! archives (`load_layers.rs`): to it, the registry is an archive whose files take a while. A tree becomes part
//! of the store only after the blob that it was made of has turned out to be the right one.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kiln_content::{ImageRecord, SourceRecord};
use kiln_oci::image::{Descriptor, ImageConfig};
use kiln_oci::{ChainId, Digest, Platform, Reference, document};
use kiln_registry::{Ahead, Fault, ManifestBytes, Repository, Which};
use kiln_solver::Cancellation;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::coming::{Coming, Counted, Progress};
use super::resolved::Resolved;
use super::stored::is_unpacked;
use super::{AT_ONCE, POLL, Registries};
use crate::archive::{Archive, Blobs};
use crate::engine::now_unix;
use crate::image::MAX_CONFIG_BYTES;
use crate::load::{MAX_MANIFEST_BYTES, blob_name, load_picked, pick_manifest};
use crate::platforms::serves;
use crate::source::key_of;
use crate::{BuildCancel, BuildError, Engine};

/// An image that is in the store now.
#[derive(Debug)]
pub struct Pulled {
    /// The image.
    pub image: ImageRecord,
    /// Digest of the manifest or index that the name leads to.
    pub digest: Digest,
    /// It was there already, under this name.
    pub known: bool,
}

/// Pulls the image `reference` for `platform` and gives it that name. `note` hears a line about what is
/// fetched.
///
/// Costs one request when the image is in the store.
///
/// # Errors
/// [`BuildError::Registry`], [`BuildError::NoPlatform`] and those of unpacking; no name has moved then.
pub fn pull(
    engine: &Engine,
    registries: &Arc<Registries>,
    reference: &Reference,
    platform: &Platform,
    cancel: &BuildCancel,
    note: &dyn Fn(&str),
) -> Result<Pulled, BuildError> {
    let root = Root::At(Which::from(reference));
    match look_up(engine, registries, reference, platform, Naming::Set, root, cancel)? {
        Found::Here(pulled) => Ok(pulled),
        Found::There(resolved) => pull_layers(engine, registries, &resolved, Naming::Set, cancel, note),
    }
}

/// What becomes of the name that an image is pulled by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    /// It leads to the image.
    Set,
    /// It leads where it did. The image is found by name and platform: [`pulled_for`].
    Keep,
}

impl Naming {
    /// Gives the name to `image`, or not, and notes down that it leads to `digest`, which is this image, now.
    pub(super) fn settle(
        self,
        engine: &Engine,
        reference: &Reference,
        platform: &Platform,
        image: &ImageRecord,
        digest: Digest,
    ) -> Result<(), BuildError> {
        if let Self::Set = self {
            engine.store.set_name(reference, image)?;
        }
        remember(engine, reference, platform, image, digest)
    }
}

/// What a registry has under a name.
pub(super) enum Found {
    /// What the store has under that name.
    Here(Pulled),
    /// Another one: its documents have come.
    There(Arc<Resolved>),
}

impl Found {
    /// Digest of the manifest or index that the name leads to.
    pub(super) fn root(&self) -> Digest {
        match self {
            Self::Here(pulled) => pulled.digest,
            Self::There(resolved) => resolved.root,
        }
    }
}

/// The manifest or index that a name leads to.
pub(super) enum Root<'a> {
    /// The registry has it.
    At(Which<'a>),
    /// It has come.
    Here(ManifestBytes),
}

impl<'a> Root<'a> {
    /// The one with this digest: of the store, if that has it.
    pub(super) fn of_digest(engine: &Engine, digest: &'a Digest) -> Result<Self, BuildError> {
        Ok(stored_root(engine, digest)?.map_or(Self::At(Which::Digest(digest)), Self::Here))
    }
}

/// The manifest or index of the store with this digest; `None`: the store has no such thing, or a damaged one.
pub(super) fn stored_root(engine: &Engine, digest: &Digest) -> Result<Option<ManifestBytes>, BuildError> {
    engine.store.hold_blob(digest)?;
    if !engine.store.has_blob(digest) {
        return Ok(None);
    }
    let Ok(bytes) = engine.store.read_blob(digest, MAX_MANIFEST_BYTES) else { return Ok(None) };
    let kind = document::own_media_type(&bytes).ok();
    Ok(kind.map(|media_type| ManifestBytes { media_type, digest: *digest, bytes }))
}

/// Looks at what `reference` leads to now. No layer comes, and no document that the store has.
pub(super) fn look_up(
    engine: &Engine,
    registries: &Arc<Registries>,
    reference: &Reference,
    platform: &Platform,
    naming: Naming,
    root: Root<'_>,
    cancel: &BuildCancel,
) -> Result<Found, BuildError> {
    let repository = registries.repository(reference);
    // From here on it is this one, whatever the tag leads to meanwhile.
    let root = match root {
        Root::At(which) => registries.wait(cancel, repository.manifest(which))?,
        Root::Here(root) => root,
    };
    let digest = root.digest;
    if let Some(image) = known(engine, reference, platform, naming, &digest)? {
        naming.settle(engine, reference, platform, &image, digest)?;
        return Ok(Found::Here(Pulled { image, digest, known: true }));
    }
    engine.store.put_blob(&root.bytes)?;
    let fetch = Fetch::new(engine, registries, repository, cancel);
    fetch.set(digest, State::There);
    let _abort = Abort(fetch.clone());
    let shown = reference.familiar();
    let archive = Archive::of_blobs(Path::new(&shown), engine.store.clone(), fetch.clone());
    let picked = pick_manifest(&archive, &root.descriptor(), platform, 0)?;
    let (config, layers) = (&picked.manifest.config, picked.manifest.layers.len());
    fetch.set(config.digest, State::Known(config.clone()));
    let name = blob_name(&config.digest);
    let config_json = archive.read_small(&name, MAX_CONFIG_BYTES)?;
    let config = archive.parse(&name, &config_json, |json| document::read_config(json, layers))?;
    // A name that leads to one image only leads to that, wherever it is asked from; but not for who asked for
    // another platform than this machine's.
    if *platform != Platform::host() && !serves(platform, &config) {
        let (wanted, available) = (Box::new(platform.clone()), vec![config.platform().to_string()]);
        return Err(BuildError::NoPlatform { path: shown.into(), wanted, available });
    }
    Ok(Found::There(Arc::new(Resolved {
        reference: reference.clone(),
        platform: platform.clone(),
        root: digest,
        at_unix: now_unix(),
        picked,
        config_json,
        config,
    })))
}

/// Brings the layers of an image whose documents are known, and gives it its name.
pub(super) fn pull_layers(
    engine: &Engine,
    registries: &Arc<Registries>,
    resolved: &Resolved,
    naming: Naming,
    cancel: &BuildCancel,
    note: &dyn Fn(&str),
) -> Result<Pulled, BuildError> {
    let Resolved { reference, platform, root, picked, config_json, config, .. } = resolved;
    let layers = &picked.manifest.layers;
    let fetch = Fetch::new(engine, registries, registries.repository(reference), cancel);
    let _abort = Abort(fetch.clone());
    let shown = reference.familiar();
    let archive = Archive::of_blobs(Path::new(&shown), engine.store.clone(), fetch.clone());
    for layer in layers {
        fetch.set(layer.digest, State::Known(layer.clone()));
    }
    fetch.set(engine.store.put_blob(config_json)?, State::There);
    let wanted: Vec<&Descriptor> = layers[layers_there(engine, config)?..].iter().collect();
    let (missing, bytes) = fetch.start_all(&wanted)?;
    if missing > 0 {
        note(&format!("{shown}: fetching {missing} of {} layers, {bytes} bytes", layers.len()));
    }
    let image = load_picked(engine, &archive, picked, false, cancel)?;
    naming.settle(engine, reference, platform, &image, *root)?;
    engine.store.barrier()?;
    Resolved::forget(engine, reference, platform);
    Ok(Pulled { image, digest: *root, known: false })
}

/// What is remembered of a name of a registry: for this platform.
pub(super) fn key(reference: &Reference, platform: &Platform) -> Digest {
    key_of(&["registry", &reference.to_string(), &platform.to_string()])
}

/// Notes down that `reference` leads to `digest`, and that this is `image`, now.
pub(super) fn remember(
    engine: &Engine,
    reference: &Reference,
    platform: &Platform,
    image: &ImageRecord,
    digest: Digest,
) -> Result<(), BuildError> {
    // An image without files has no record; it is looked up each time.
    let Some(snapshot) = image.snapshot.clone() else { return Ok(()) };
    let record = SourceRecord {
        snapshot,
        content: Some(digest),
        etag: Some(image.config.to_string()),
        last_modified: None,
        created_unix: now_unix(),
    };
    Ok(engine.store.put_source(&key(reference, platform), &record)?)
}

/// What `reference` led to, and when that was, if it is `image` that it led to.
pub(super) fn remembered(
    engine: &Engine,
    reference: &Reference,
    platform: &Platform,
    image: &ImageRecord,
) -> Result<Option<(Digest, i64)>, BuildError> {
    let record = engine.store.source(&key(reference, platform))?;
    let config = image.config.to_string();
    let record = record.filter(|record| record.etag.as_ref() == Some(&config));
    Ok(record.and_then(|record| Some((record.content?, record.created_unix))))
}

/// The image that was pulled by this name for this platform and did not get the name, if its files are there.
pub(super) fn pulled_for(
    engine: &Engine,
    reference: &Reference,
    platform: &Platform,
) -> Result<Option<ImageRecord>, BuildError> {
    let record = engine.store.source(&key(reference, platform))?;
    let config = record.and_then(|record| record.etag?.parse::<Digest>().ok());
    let image = config.map(|config| engine.store.image(&config)).transpose()?.flatten();
    Ok(image.filter(|image| is_unpacked(engine, image)))
}

/// The image of this name, if it is what the registry has under `digest`, and whole.
fn known(
    engine: &Engine,
    reference: &Reference,
    platform: &Platform,
    naming: Naming,
    digest: &Digest,
) -> Result<Option<ImageRecord>, BuildError> {
    let image = match naming {
        Naming::Set => engine.store.resolve(reference)?,
        Naming::Keep => pulled_for(engine, reference, platform)?,
    };
    let Some(image) = image else { return Ok(None) };
    let led_here =
        remembered(engine, reference, platform, &image)?.is_some_and(|(known, _)| known == *digest);
    let there = is_unpacked(engine, &image);
    let blobs = engine.store.has_blob(&image.config) && engine.store.has_blob(&image.manifest);
    Ok((led_here && there && blobs).then_some(image))
}

/// So many of the image's layers, from the lowest, are in the store, unpacked.
pub(super) fn layers_there(engine: &Engine, config: &ImageConfig) -> Result<usize, BuildError> {
    let mut chain: Option<ChainId> = None;
    for (count, diff_id) in config.rootfs.diff_ids.iter().enumerate() {
        let next = chain.map_or(ChainId(diff_id.0), |chain| chain.push(diff_id));
        let known = engine.store.snapshot_by_chain(&next)?.filter(|id| engine.snapshots.contains(id));
        let record = known.map(|snapshot| engine.store.layer(&snapshot)).transpose()?.flatten();
        let is_whole =
            record.is_some_and(|record| record.blob.is_none_or(|blob| engine.store.has_blob(&blob.digest)));
        if !is_whole {
            return Ok(count);
        }
        chain = Some(next);
    }
    Ok(config.rootfs.diff_ids.len())
}

/// Where a blob is.
pub(super) enum State {
    /// At the registry.
    Known(Descriptor),
    Coming(Arc<Progress>),
    /// In the store.
    There,
    Failed(Arc<kiln_registry::Error>),
    /// The store did not take it; told once.
    Refused(Option<kiln_content::Error>),
}

/// Blobs of one repository on their way into the store.
pub(super) struct Fetch {
    engine: Engine,
    registries: Arc<Registries>,
    repository: Repository,
    cancel: BuildCancel,
    states: Mutex<HashMap<Digest, State>>,
    arrived: Condvar,
    running: Mutex<Vec<AbortHandle>>,
    room: Arc<Semaphore>,
}

/// Ends what is still on its way when the pull has ended.
pub(super) struct Abort(pub(super) Arc<Fetch>);

impl Drop for Abort {
    fn drop(&mut self) {
        for task in self.0.running.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }
}

impl Fetch {
    pub(super) fn new(
        engine: &Engine,
        registries: &Arc<Registries>,
        repository: Repository,
        cancel: &BuildCancel,
    ) -> Arc<Self> {
        Arc::new(Self {
            engine: engine.clone(),
            registries: registries.clone(),
            repository,
            cancel: cancel.clone(),
            states: Mutex::default(),
            arrived: Condvar::new(),
            running: Mutex::default(),
            room: Arc::new(Semaphore::new(AT_ONCE)),
        })
    }

    fn states(&self) -> MutexGuard<'_, HashMap<Digest, State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, digest: Digest, state: State) {
        self.states().insert(digest, state);
        self.arrived.notify_all();
    }

    /// Fetches those of `blobs` that the store does not have: how many, and their bytes.
    pub(super) fn start_all(self: &Arc<Self>, blobs: &[&Descriptor]) -> Result<(usize, u64), BuildError> {
        let mut missing: Vec<&Descriptor> = Vec::new();
        let mut seen = HashSet::new();
        for blob in blobs {
            self.engine.store.hold_blob(&blob.digest)?;
            if seen.insert(blob.digest) && !self.engine.store.has_blob(&blob.digest) {
                missing.push(blob);
            }
        }
        for blob in &missing {
            self.start(blob)?;
        }
        Ok((missing.len(), missing.iter().fold(0, |sum, blob| sum.saturating_add(blob.size))))
    }

    /// What refers to a manifest of the repository.
    pub(super) fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, BuildError> {
        self.registries.wait(&self.cancel, self.repository.referrers(subject))
    }

    /// Fetches `blob` on threads of its own.
    fn start(self: &Arc<Self>, blob: &Descriptor) -> Result<(), BuildError> {
        let progress = Arc::new(Progress::new(blob.size));
        self.set(blob.digest, State::Coming(progress.clone()));
        let (fetch, blob) = (self.clone(), blob.clone());
        let task = self.registries.runtime()?.spawn(async move {
            let _room = fetch.room.acquire().await;
            let state = fetch.download(&blob, &progress).await;
            let is_there = matches!(state, State::There);
            fetch.set(blob.digest, state);
            // After the state: whoever hears of the end looks there.
            progress.end(is_there);
        });
        self.running.lock().unwrap_or_else(PoisonError::into_inner).push(task.abort_handle());
        Ok(())
    }

    /// Brings `blob` into the store: verified, and only then part of it.
    async fn download(&self, blob: &Descriptor, progress: &Progress) -> State {
        // A mirror that was found out to lie is not asked again, and nobody has read what it gave.
        for may_lie in [self.repository.has_mirrors(), false] {
            let mut ingest = match self.engine.store.ingest() {
                Ok(ingest) => ingest,
                Err(error) => return State::Refused(Some(error)),
            };
            if !self.repository.has_mirrors() {
                match ingest.reader() {
                    Ok(file) => progress.begin(file),
                    Err(error) => return State::Refused(Some(error)),
                }
            }
            let ahead = match ingest.ahead() {
                Ok(file) => Ahead { file: Arc::new(file), room: self.room.clone() },
                Err(error) => return State::Refused(Some(error)),
            };
            let mut out = Counted { ingest: &mut ingest, progress };
            match self.repository.fetch_blob_ahead(blob, &mut out, Some(&ahead)).await {
                Err(error) if may_lie && error.fault() == Fault::Integrity => continue,
                Err(error) => return State::Failed(Arc::new(error)),
                Ok(()) => {}
            }
            return match tokio::task::block_in_place(|| ingest.commit(Some((blob.digest, blob.size)))) {
                Ok(_) => State::There,
                Err(error) => State::Refused(Some(error)),
            };
        }
        State::Refused(None)
    }
}

impl Blobs for Arc<Fetch> {
    fn early(&self, digest: &Digest) -> Option<(Box<dyn Read + Send>, u64)> {
        if self.repository.has_mirrors() {
            return None;
        }
        let states = self.states();
        let Some(State::Coming(progress)) = states.get(digest) else { return None };
        let coming = Coming { progress: progress.clone(), at: 0, cancel: self.cancel.clone() };
        Some((Box::new(coming), progress.size_bytes))
    }

    fn bring(&self, digest: &Digest) -> Result<(), BuildError> {
        loop {
            let mut states = self.states();
            let blob = match states.get_mut(digest) {
                Some(State::There) => return Ok(()),
                Some(State::Failed(error)) => return Err(BuildError::Registry(error.clone())),
                Some(State::Refused(error)) => {
                    let again = || BuildError::Bug { what: format!("{digest} was refused by the store") };
                    return Err(error.take().map_or_else(again, BuildError::from));
                }
                Some(State::Coming(_)) => {
                    drop(self.arrived.wait_timeout(states, POLL));
                    if self.cancel.is_cancelled() {
                        return Err(BuildError::Cancelled);
                    }
                    continue;
                }
                Some(State::Known(blob)) => Some(blob.clone()),
                None => None,
            };
            drop(states);
            match blob {
                Some(blob) => {
                    self.engine.store.hold_blob(digest)?;
                    match self.engine.store.has_blob(digest) {
                        true => self.set(*digest, State::There),
                        false => self.start(&blob)?,
                    }
                }
                // Only manifests are asked for before anybody has named them as blobs.
                None => {
                    if stored_root(&self.engine, digest)?.is_none() {
                        let manifest = self.repository.manifest(Which::Digest(digest));
                        let manifest = self.registries.wait(&self.cancel, manifest)?;
                        self.engine.store.put_blob(&manifest.bytes)?;
                    }
                    self.set(*digest, State::There);
                }
            }
        }
    }
}
