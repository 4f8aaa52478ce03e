//! What is on its way to one repository.
//!
//! Layers are packed one after the other. The first that has to be packed sets everything in motion: it is sent
//! while it grows, and layers that are ready are sent beside it. Where none is packed, nobody is asked before it
//! is known which manifest the name shall lead to.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_content::Ingest;
use kiln_oci::image::{Descriptor, Manifest};
use kiln_oci::{Digest, Reference};
use kiln_registry::{BlobSource, Error, Pushed, Repository, Which};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};

use super::checked::StoredBlob;
use super::growth::{Growth, Trouble, growth};
use super::push::Load;
use super::resolved::known_manifests;
use super::{AT_ONCE, Aliases, PushedName, Registries};
use crate::export::{LayerContent, ReadyLayer};
use crate::image::parse_json;
use crate::load::MAX_MANIFEST_BYTES;
use crate::{BuildError, Engine};

/// So long an end waits for the registry to take uploads back; it forgets them by itself, only later.
const GIVE_BACK: Duration = Duration::from_secs(2);

/// Repositories of the same registry that may have a blob.
type Elsewhere = BTreeMap<Digest, Vec<String>>;

/// Blobs on their way to a repository, several at once.
///
/// Dropped before all have arrived, it gives back the uploads of those that grow.
pub(crate) struct Outbound {
    engine: Engine,
    repository: Repository,
    aliases: Aliases,
    runtime: Handle,
    /// Whether packing is for this registry's sake alone.
    alone: bool,
    /// `None`: nothing is on its way yet.
    elsewhere: Option<Arc<Elsewhere>>,
    /// Layers that are ready while nothing is on its way.
    waiting: Vec<Descriptor>,
    room: Arc<Semaphore>,
    /// `None`: the error is in `trouble`.
    tasks: JoinSet<Option<(Pushed, u64)>>,
    /// Those of them that have nothing to give back.
    known: Vec<AbortHandle>,
    trouble: Trouble,
    given_up: Arc<AtomicBool>,
    /// Blobs that a task takes care of.
    begun: HashSet<Digest>,
    /// The next layer that is ready is the one that was packed last.
    is_packing: bool,
}

impl fmt::Debug for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbound")
            .field("to", &(self.repository.domain(), self.repository.path()))
            .field("begun", &self.begun)
            .finish_non_exhaustive()
    }
}

impl Outbound {
    /// Nothing yet, to the repository of `name`. `alone`: what is packed is of no use when the registry
    /// refuses it.
    ///
    /// # Errors
    /// When there are no threads for it.
    pub(crate) fn new(
        engine: &Engine,
        registries: &Registries,
        name: &Reference,
        alone: bool,
    ) -> Result<Self, BuildError> {
        Ok(Self {
            engine: engine.clone(),
            repository: registries.repository(name),
            aliases: registries.aliases.clone(),
            runtime: registries.runtime()?.handle().clone(),
            alone,
            elsewhere: None,
            waiting: Vec::new(),
            room: Arc::new(Semaphore::new(AT_ONCE)),
            tasks: JoinSet::new(),
            known: Vec::new(),
            trouble: Trouble::default(),
            given_up: Arc::default(),
            begun: HashSet::new(),
            is_packing: false,
        })
    }

    /// Whether it goes to the repository of `name`.
    pub(super) fn is_to(&self, name: &Reference) -> bool {
        let place = self.aliases.place(name);
        (self.repository.domain(), self.repository.path()) == (place.domain(), place.path())
    }

    /// Sends what will be written to `ingest`, while it is.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn begin(&mut self, ingest: &Ingest<'_>) -> Result<Growth, BuildError> {
        let elsewhere = self.start()?;
        let refused = self.alone.then(|| self.trouble.clone());
        let (growth, packed) = growth(ingest.reader()?, self.given_up.clone(), refused);
        let repository = self.repository.clone();
        self.spawn(async move {
            let near = |digest: &Digest| elsewhere.get(digest).cloned().unwrap_or_default();
            let (blob, pushed) = repository.push_growing(&packed, &near).await?;
            Ok((pushed, blob.size))
        });
        self.is_packing = true;
        Ok(growth)
    }

    /// Takes a layer that is ready, after all below it.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn layer(&mut self, layer: &ReadyLayer) -> Result<(), BuildError> {
        if std::mem::take(&mut self.is_packing) {
            self.begun.insert(layer.descriptor.digest);
        } else if matches!(layer.content, LayerContent::Blob) {
            self.waiting.push(layer.descriptor.clone());
            if self.elsewhere.is_some() {
                self.start()?;
            }
        }
        Ok(())
    }

    /// Why there is no image to push after `error` has ended its packing.
    pub(super) fn cause(&self, error: BuildError) -> BuildError {
        let registry = || self.trouble.take().filter(|trouble| !matches!(trouble, Error::Local { .. }));
        match error {
            BuildError::Cancelled => error,
            error => registry().map_or(error, BuildError::from),
        }
    }

    /// Sends what waits.
    pub(super) fn start(&mut self) -> Result<Arc<Elsewhere>, BuildError> {
        let elsewhere = match &self.elsewhere {
            Some(elsewhere) => elsewhere.clone(),
            None => Arc::new(self.repositories_near()?),
        };
        self.elsewhere = Some(elsewhere.clone());
        for blob in std::mem::take(&mut self.waiting) {
            let stored = StoredBlob::new(&self.engine, &blob);
            self.add(&elsewhere, &blob, Arc::new(stored));
        }
        Ok(elsewhere)
    }

    /// Repositories of the same registry that have blobs of the store: those of images that have a name there, and
    /// of those that are only known.
    fn repositories_near(&self) -> Result<Elsewhere, BuildError> {
        let mut found = Elsewhere::new();
        let mut add = |manifest: &Manifest, paths: &[String]| {
            for part in manifest.layers.iter().chain([&manifest.config]) {
                let known = found.entry(part.digest).or_default();
                known.extend(paths.iter().filter(|path| !known.contains(path)).cloned().collect::<Vec<_>>());
            }
        };
        let (store, to) = (&self.engine.store, &self.repository);
        let near = |other: &Reference| {
            let place = self.aliases.place(other);
            let is_near = place.domain() == to.domain() && place.path() != to.path();
            is_near.then(|| place.path().to_owned())
        };
        for image in store.images()? {
            let mut paths: Vec<String> = store.names_of(&image.config)?.iter().filter_map(near).collect();
            paths.dedup();
            if paths.is_empty() {
                continue;
            }
            // A manifest that is damaged helps nobody here.
            let Ok(json) = store.read_blob(&image.manifest, MAX_MANIFEST_BYTES) else { continue };
            let Ok(manifest) = parse_json::<Manifest>("manifest", &image.manifest, &json) else { continue };
            add(&manifest, &paths);
        }
        for (other, manifest) in known_manifests(&self.engine) {
            if let Some(path) = near(&other) {
                add(&manifest, &[path]);
            }
        }
        Ok(found)
    }

    fn add(&mut self, elsewhere: &Elsewhere, blob: &Descriptor, source: Arc<dyn BlobSource>) {
        if !self.begun.insert(blob.digest) {
            return;
        }
        let near = elsewhere.get(&blob.digest).cloned().unwrap_or_default();
        let (repository, blob) = (self.repository.clone(), blob.clone());
        let task =
            self.spawn(async move { Ok((repository.push_blob(&blob, &*source, &near).await?, blob.size)) });
        self.known.push(task);
    }

    fn spawn(
        &mut self,
        send: impl Future<Output = Result<(Pushed, u64), Error>> + Send + 'static,
    ) -> AbortHandle {
        let (room, trouble) = (self.room.clone(), self.trouble.clone());
        let task = async move {
            let _room = room.acquire().await;
            send.await.map_err(|error| trouble.note(error)).ok()
        };
        self.tasks.spawn_on(task, &self.runtime)
    }

    /// Sends what the repository does not have of `load`, then the manifests, once all blobs have arrived.
    /// After [`Outbound::start`].
    pub(super) async fn send(
        &mut self,
        load: &Load,
        which: Which<'_>,
        done: &mut PushedName,
    ) -> Result<(), Error> {
        let elsewhere = self.elsewhere.clone().unwrap_or_default();
        for (blob, source) in &load.blobs {
            self.add(&elsewhere, blob, source.clone());
        }
        // The first error ends the others: dropping this value stops them.
        while let Some(ended) = self.tasks.join_next().await {
            let failed = |error| Error::Local { what: "sending a blob", source: io::Error::other(error) };
            match ended.map_err(failed)? {
                Some((Pushed::Sent, bytes)) => done.sent = (done.sent.0 + 1, done.sent.1 + bytes),
                Some((Pushed::Mounted(_), _)) => done.mounted += 1,
                Some((Pushed::Known, _)) => {}
                None => return Err(self.trouble.take().unwrap_or_else(failed_before)),
            }
        }
        for (nth, (descriptor, json)) in load.manifests.iter().enumerate() {
            let is_root = nth + 1 == load.manifests.len();
            let which = if is_root { which } else { Which::Digest(&descriptor.digest) };
            self.repository.put_manifest(which, &descriptor.media_type, json).await?;
        }
        Ok(())
    }
}

fn failed_before() -> Error {
    Error::Local { what: "sending a blob", source: io::Error::other("another one has failed") }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        self.known.iter().for_each(AbortHandle::abort);
        if self.tasks.is_empty() || std::thread::panicking() {
            return;
        }
        self.given_up.store(true, Ordering::Relaxed);
        let runtime = self.runtime.clone();
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // Whoever has not ended by then is dropped with the set.
        let _ = runtime.block_on(async { tokio::time::timeout(GIVE_BACK, ended).await });
    }
}
