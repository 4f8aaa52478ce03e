//! Images that others push into the store.
//!
//! Whoever serves keeps what came as it came; here it becomes an image, by what loads archives: verified, unpacked once,
//! its diff IDs compared with its config. To that, what was pushed is an archive whose blobs are files beside the store:
//! where the file system can, they become the store's blobs without being copied.
//!
//! Who pushes may not be trusted with other images of the store. So nothing comes of a push but what was pushed:
//! digests of what the store has get nobody anything. And the store keeps no manifest and no index of it: it has one of
//! each for a config, and other names may lead to the same one.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_content::{Space, Store};
use kiln_layer::{ApplyError, CONTENT_BYTES, TAR_BYTES};
use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Platform, Reference};

use super::offers::{HUB, in_order, names_in, repositories, tag_of};
use crate::archive::{Archive, Blobs, Compared};
use crate::load::{Picked, load_image_alone, pick_manifest};
use crate::{BuildCancel, BuildError, Engine};

/// What stays free on the store's disk, or a twentieth of it where that is less.
const RESERVE_BYTES: u64 = 1 << 30;

/// The way into one store.
pub struct Arrivals {
    engine: Engine,
    cancel: BuildCancel,
    compared: Arc<Compared>,
}

/// What came of an image, which all stays until it is taken.
pub trait Parts: Send + Sync {
    /// A manifest or an index, whose digest was compared; `None`: it did not come.
    ///
    /// # Errors
    /// It cannot be read; so for all methods.
    fn document(&self, digest: &Digest) -> io::Result<Option<Vec<u8>>>;

    /// The file of a blob; `None`: it did not come.
    fn blob(&self, digest: &Digest) -> io::Result<Option<Part>>;
}

/// The file of a blob, durable, which nobody writes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Where it is.
    pub path: PathBuf,
    /// Its bytes were compared with its digest, and have not changed since.
    pub is_compared: bool,
}

/// Why an image does not arrive, or cannot go.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArrivalError {
    /// It is broken, hostile, or none.
    #[error("it is refused")]
    Refused(#[source] BuildError),
    /// A container was made of it, and this is its last name.
    #[error("container {container} was made of it")]
    InUse { container: String },
    /// The store cannot take it.
    #[error(transparent)]
    Failed(BuildError),
}

impl From<BuildError> for ArrivalError {
    fn from(error: BuildError) -> Self {
        if is_of_image(&error) { Self::Refused(error) } else { Self::Failed(error) }
    }
}

impl From<kiln_content::Error> for ArrivalError {
    fn from(error: kiln_content::Error) -> Self {
        BuildError::from(error).into()
    }
}

impl Arrivals {
    /// Into the store of `engine`; whoever cancels ends unpacking.
    pub fn new(engine: Engine, cancel: BuildCancel) -> Self {
        Self { engine, cancel, compared: Arc::default() }
    }

    /// Makes an image of what `root` leads to, for this machine where there is a choice and else for the first platform
    /// by name, and lets the name of `repository` and `tag` lead to it. Of an index nothing else becomes the store's.
    /// `configs` are those of the images among what it leads to: who keeps what came knows it by them.
    ///
    /// # Errors
    /// [`ArrivalError`]; no name has moved then.
    pub fn take(
        &self,
        repository: &str,
        tag: &str,
        root: &Descriptor,
        configs: &HashSet<Digest>,
        parts: Arc<dyn Parts>,
    ) -> Result<(), ArrivalError> {
        let name = name_of(repository, tag)?;
        // What this pins is free again when it ends.
        let mut job = self.engine.for_job()?;
        let room = room(job.store.root())?;
        let is_tight = room < job.limits.tar_size_bytes;
        job.limits.tar_size_bytes = job.limits.tar_size_bytes.min(room);
        let pushed = Pushed { store: job.store.clone(), parts: parts.clone(), shown: name.familiar() };
        let archive = Archive::of_blobs(Path::new(&name.familiar()), job.store.clone(), pushed);
        let archive = archive.of_stranger(self.compared.clone());
        let picked = pick(&archive, root)?;
        if !configs.contains(&picked.manifest.config.digest) {
            let message = "its manifest for this machine is no image: it has a subject, or an artifact type";
            return Err(BuildError::Change { message: message.to_owned() }.into());
        }
        for blob in [&picked.manifest.config].into_iter().chain(&picked.manifest.layers) {
            // Also of what nobody would read because the store knows it, and of layers that others may leave out.
            if parts.blob(&blob.digest).map_err(unreadable(&name.familiar()))?.is_none() {
                let (path, digest) = (PathBuf::from(name.familiar()), blob.digest);
                return Err(BuildError::ForeignLayer { path, digest }.into());
            }
        }
        let image = load_image_alone(&job, &archive, &picked, &self.cancel).map_err(|error| match error {
            error if is_tight && is_too_large(&error) => ArrivalError::Failed(full(job.store.root())),
            error => error.into(),
        })?;
        job.store.set_name(&name, &image)?;
        Ok(job.store.barrier()?)
    }

    /// What a repository is called whatever it is called here: `app` for `library/app`. `None`: nothing of that name can
    /// be pushed.
    pub fn repository(repository: &str) -> Option<String> {
        let name = name_of(repository, "latest").ok()?;
        Some(super::offers::repository(&name).to_owned())
    }

    /// All tags of all repositories, with the configs of the images that they stand for.
    ///
    /// # Errors
    /// Those of the store.
    pub fn images(&self) -> Result<HashMap<String, HashMap<String, Digest>>, BuildError> {
        let mut names = self.engine.store.names()?;
        in_order(&mut names);
        let mut found: HashMap<String, HashMap<String, Digest>> = HashMap::new();
        for (name, image) in &names {
            let Some(tag) = tag_of(name) else { continue };
            for repository in repositories(name) {
                let tags = found.entry(repository.to_owned()).or_default();
                tags.entry(tag.to_owned()).or_insert(image.config);
            }
        }
        Ok(found)
    }

    /// The config of the image that a tag stands for.
    ///
    /// # Errors
    /// Those of the store.
    pub fn image(&self, repository: &str, tag: &str) -> Result<Option<Digest>, BuildError> {
        // Mostly it is this one, and it comes before all others.
        if let Ok(name) = name_of(repository, tag)
            && let Some(config) = self.engine.store.config_of(&name)?
        {
            return Ok(Some(config));
        }
        let names = names_in(&self.engine.store, repository)?;
        Ok(names.iter().find(|(name, _)| tag_of(name) == Some(tag)).map(|(_, image)| image.config))
    }

    /// Whether the names that these tags stand for can all be taken away.
    ///
    /// # Errors
    /// [`ArrivalError::InUse`] where one of their images would have no name and a container needs it, and those of the
    /// store.
    pub fn can_forget(&self, repository: &str, tags: &[String]) -> Result<(), ArrivalError> {
        let store = &self.engine.store;
        let mut going: HashMap<Digest, usize> = HashMap::new();
        let mut seen = HashSet::new();
        for (name, image) in names_in(store, repository)? {
            let Some(tag) = tag_of(&name) else { continue };
            // Of several with one tag the first is meant.
            if tags.iter().any(|going| going == tag) && seen.insert(tag.to_owned()) {
                *going.entry(image.config).or_default() += 1;
            }
        }
        for user in store.container_uses()? {
            let Some((config, count)) = user.image.and_then(|image| going.get_key_value(&image)) else {
                continue;
            };
            if store.names_of(config)?.len() == *count {
                return Err(ArrivalError::InUse { container: user.name });
            }
        }
        Ok(())
    }

    /// Takes away the name that a tag stands for, and the image with its last one, as `kiln rmi` does; whether there
    /// was one.
    ///
    /// # Errors
    /// [`ArrivalError::InUse`], and those of the store.
    pub fn forget(&self, repository: &str, tag: &str) -> Result<bool, ArrivalError> {
        let job = self.engine.for_job()?;
        let store = &job.store;
        loop {
            let names = names_in(store, repository)?;
            let Some((name, image)) = names.into_iter().find(|(name, _)| tag_of(name) == Some(tag)) else {
                return Ok(false);
            };
            let is_last = store.names_of(&image.config)?.len() == 1;
            let mut users = store.container_uses()?.into_iter();
            if is_last && let Some(user) = users.find(|user| user.image == Some(image.config)) {
                return Err(ArrivalError::InUse { container: user.name });
            }
            // It leads elsewhere by now.
            if !store.remove_name(&name, &image.config)? {
                continue;
            }
            if is_last {
                // Unless somebody has named it meanwhile.
                store.forget_image(&image.config)?;
            }
            store.barrier()?;
            return Ok(true);
        }
    }
}

/// How many bytes may be unpacked on the disk of `root`: others need it as well.
fn room(root: &Path) -> Result<u64, BuildError> {
    let failed = |source| BuildError::Unreadable { path: root.to_owned(), source };
    let space = Space::of(root).map_err(failed)?;
    match space.free_bytes.saturating_sub(RESERVE_BYTES.min(space.total_bytes / 20)) {
        0 => Err(full(root)),
        room => Ok(room),
    }
}

fn full(root: &Path) -> BuildError {
    BuildError::Unreadable { path: root.to_owned(), source: io::ErrorKind::StorageFull.into() }
}

/// Whether a layer was larger than it might be.
fn is_too_large(error: &BuildError) -> bool {
    match error {
        BuildError::Apply(ApplyError::Limit { what, .. }) => *what == TAR_BYTES || *what == CONTENT_BYTES,
        BuildError::Layer { source, .. } => is_too_large(source),
        _ => false,
    }
}

/// What an image is called here that is pushed to `repository`: as users write it without a host. So `kiln run team/app`
/// finds what was pushed to `HOST/team/app`, and it is given out under that path again.
fn name_of(repository: &str, tag: &str) -> Result<Reference, BuildError> {
    let name = format!("{HUB}/{repository}:{tag}");
    name.parse().map_err(|error| BuildError::Change { message: format!("{name}: {error}") })
}

/// The image for this machine, or else the first by its platform's name.
fn pick(archive: &Archive, root: &Descriptor) -> Result<Picked, BuildError> {
    match pick_manifest(archive, root, &Platform::host(), 0) {
        Err(BuildError::NoPlatform { available, path, wanted }) => {
            match available.first().and_then(|first| first.parse::<Platform>().ok()) {
                Some(first) => pick_manifest(archive, root, &first, 0),
                None => Err(BuildError::NoPlatform { available, path, wanted }),
            }
        }
        picked => picked,
    }
}

/// Whether an error is about the image, not about this machine.
fn is_of_image(error: &BuildError) -> bool {
    match error {
        BuildError::Archive { .. }
        | BuildError::Change { .. }
        | BuildError::Document { .. }
        | BuildError::LargeDocument { .. }
        | BuildError::NotPromised { .. }
        | BuildError::NoPlatform { .. }
        | BuildError::ForeignLayer { .. }
        | BuildError::WrongDiffId { .. }
        | BuildError::Json { .. }
        | BuildError::Store(kiln_content::Error::Mismatch { .. })
        | BuildError::Snapshots(kiln_snapshotter::Error::TooDeep { .. }) => true,
        BuildError::Apply(error) => !matches!(error, ApplyError::Host { .. } | ApplyError::Cancelled),
        BuildError::Layer { source, .. } => is_of_image(source),
        _ => false,
    }
}

fn unreadable(shown: &str) -> impl FnOnce(io::Error) -> BuildError {
    let path = PathBuf::from(shown);
    move |source| BuildError::Unreadable { path, source }
}

/// Blobs beside the store.
struct Pushed {
    store: Arc<Store>,
    parts: Arc<dyn Parts>,
    shown: String,
}

impl Blobs for Pushed {
    fn bring(&self, digest: &Digest) -> Result<(), BuildError> {
        // Not in the store first: what it has and nobody has pushed did not come.
        if let Some(bytes) = self.parts.document(digest).map_err(unreadable(&self.shown))? {
            self.store.put_blob(&bytes)?;
            return Ok(());
        }
        match self.parts.blob(digest).map_err(unreadable(&self.shown))? {
            Some(part) => Ok(self.store.link_blob(&part.path, digest, part.is_compared)?),
            None => Err(BuildError::ForeignLayer { path: PathBuf::from(&self.shown), digest: *digest }),
        }
    }

    fn early(&self, _digest: &Digest) -> Option<(Box<dyn Read + Send>, u64)> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pushed_is_called_as_users_write_it() {
        let check = |repository: &str, expected: &str| {
            assert_eq!(name_of(repository, "1").unwrap().familiar(), expected, "{repository}");
            let called = if repository == "library/app" { "app" } else { repository };
            assert_eq!(Arrivals::repository(repository).as_deref(), Some(called));
        };
        check("app", "app:1");
        check("library/app", "app:1");
        check("team/app", "team/app:1");
        // Elsewhere this would be a host.
        check("my.team/app", "docker.io/my.team/app:1");
        check("localhost/app", "docker.io/localhost/app:1");
        assert!(name_of(&"a".repeat(250), "1").is_err());
    }

    #[test]
    fn a_full_disk_is_not_the_images_fault() {
        let host = |kind: io::ErrorKind| BuildError::Unreadable { path: "x".into(), source: kind.into() };
        assert!(!is_of_image(&host(io::ErrorKind::StorageFull)));
        assert!(!is_of_image(&BuildError::Cancelled));
        let member = "blobs/sha256/0".to_owned();
        let source = Box::new(BuildError::WrongDiffId {
            expected: kiln_oci::DiffId(Digest::of(b"a")),
            actual: kiln_oci::DiffId(Digest::of(b"b")),
        });
        assert!(is_of_image(&BuildError::Layer { path: "x".into(), member, source }));
    }
}
