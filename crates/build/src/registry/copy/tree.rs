//! What an image consists of, and where that goes.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::sync::Arc;

use kiln_oci::document::DocumentError;
use kiln_oci::image::{Descriptor, media_type};
use kiln_oci::{Digest, Platform, Reference, Sha256Writer, document};
use kiln_registry::{BlobSource, Error, Pushed, Repository};
use kiln_solver::Cancellation;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::source::Source;
use super::{Copied, Which};
use crate::archive::Archive;
use crate::export::{DockerEntry, SHORT_NAME, Shelf, WriteError, named, put_bytes, put_index, put_list};
use crate::image::MAX_CONFIG_BYTES;
use crate::load::{MAX_MANIFEST_BYTES, Others, blob_name, pick_manifest, read_verified};
use crate::load_oci::{check_depth, parse_index, parse_manifest};
use crate::registry::AT_ONCE;
use crate::registry::pull::State;
use crate::reread::Stoppable;
use crate::{BuildCancel, BuildError, LayoutImage};

/// Manifests and indexes of one image; more is no image.
const MAX_MANIFESTS: usize = 10_000;
/// Configurations and layers of all of them together.
const MAX_BLOBS: usize = 1_000_000;

/// What an image consists of.
pub(super) struct Tree {
    /// Each after what it names; the last is the image.
    manifests: Vec<(Descriptor, Vec<u8>)>,
    pub(super) blobs: Vec<Descriptor>,
    /// Those of the manifests that refer to others, as a layout lists them.
    referrers: Vec<Descriptor>,
    seen: HashSet<Digest>,
}

/// How files call the image that is in them.
pub(super) enum Names<'a> {
    /// Layouts know tags.
    Tag(&'a LayoutImage),
    /// Docker archives know whole names.
    Docker(Option<&'a Reference>),
}

impl Tree {
    /// The image of `source` that is meant.
    ///
    /// # Errors
    /// [`BuildError::NoPlatform`], for an image alone as well.
    pub(super) fn read(source: &Source, which: &Which) -> Result<Self, BuildError> {
        let picked = |platform: &Platform| {
            let picked = pick_manifest(&source.archive, &source.root, platform, 0)?;
            let kind = picked.manifest.media_type.as_deref().unwrap_or(media_type::OCI_MANIFEST);
            Ok::<_, BuildError>(Descriptor::new(kind, Digest::of(&picked.json), picked.json.len() as u64))
        };
        match (which, &source.own) {
            (Which::All, _) => Self::of(source, &source.root),
            (Which::Own, Some(own)) => Self::of(source, own),
            (Which::Own, None) => Self::of(source, &picked(&Platform::host())?),
            (Which::Platform(platform), _) => {
                let tree = Self::of(source, &picked(platform)?)?;
                tree.check_platform(source, platform)?;
                Ok(tree)
            }
        }
    }

    /// All that `root` leads to.
    pub(super) fn of(source: &Source, root: &Descriptor) -> Result<Self, BuildError> {
        let (manifests, blobs, referrers, seen) = Default::default();
        let mut tree = Self { manifests, blobs, referrers, seen };
        tree.add(source, root, 0)?;
        Ok(tree)
    }

    /// The image.
    pub(super) fn root(&self) -> Result<&Descriptor, BuildError> {
        let last = self.manifests.last().map(|(descriptor, _)| descriptor);
        last.ok_or_else(|| BuildError::Bug { what: "an image without a manifest".to_owned() })
    }

    /// How many manifests refer to others.
    pub(super) fn referrers(&self) -> usize {
        self.referrers.len()
    }

    /// What leads to an image alone says nothing of platforms: its config does.
    fn check_platform(&self, source: &Source, wanted: &Platform) -> Result<(), BuildError> {
        let Some((descriptor, json)) = self.manifests.last() else { return Ok(()) };
        let manifest = parse_manifest(&source.archive, descriptor, json)?;
        let name = blob_name(&manifest.config.digest);
        let json = read_verified(&source.archive, &name, &manifest.config, MAX_CONFIG_BYTES)?;
        let read = |json: &[u8]| document::read_config(json, manifest.layers.len());
        let config = source.archive.parse(&name, &json, read)?;
        let mut others = Others::default();
        if others.is_for(&config, Some(wanted)) {
            return Ok(());
        }
        others.check(&source.archive, Some(wanted), &[])
    }

    fn add(&mut self, source: &Source, descriptor: &Descriptor, depth: usize) -> Result<(), BuildError> {
        check_depth(&source.archive, descriptor, depth)?;
        if !self.seen.insert(descriptor.digest) {
            return Ok(());
        }
        let (name, kind) = (blob_name(&descriptor.digest), descriptor.media_type.as_str());
        let too_many = |what, limit| source.archive.refused(&name, DocumentError::TooMany { what, limit });
        if !document::is_index(kind) && !document::is_manifest(kind) {
            if depth == 0 {
                return Err(source.archive.refused(&name, document::unknown_kind(kind)));
            }
            if self.blobs.len() >= MAX_BLOBS {
                return Err(too_many("blobs", MAX_BLOBS));
            }
            if let Some(fetch) = &source.fetch {
                fetch.set(descriptor.digest, State::Known(descriptor.clone()));
            }
            self.blobs.push(descriptor.clone());
            return Ok(());
        }
        if self.manifests.len() >= MAX_MANIFESTS {
            return Err(too_many("manifests", MAX_MANIFESTS));
        }
        let json = read_verified(&source.archive, &name, descriptor, MAX_MANIFEST_BYTES)?;
        if document::is_index(kind) {
            let index = parse_index(&source.archive, descriptor, &json)?;
            index.manifests.iter().try_for_each(|below| self.add(source, below, depth + 1))?;
        } else {
            let manifest = parse_manifest(&source.archive, descriptor, &json)?;
            for blob in manifest.layers.iter().chain([&manifest.config]) {
                self.add(source, blob, depth.max(1))?;
            }
        }
        self.manifests.push((descriptor.clone(), json));
        Ok(())
    }

    /// Adds what refers to the image or to one of its parts, and what refers to that. Costs a look for each
    /// manifest: at a registry, a request or two.
    pub(super) fn add_referrers(&mut self, source: &Source) -> Result<(), BuildError> {
        let mut subjects: Vec<Digest> =
            self.manifests.iter().map(|(descriptor, _)| descriptor.digest).collect();
        let root = self.manifests.pop();
        let mut at = 0;
        while let Some(subject) = subjects.get(at) {
            for referrer in source.referrers(subject)? {
                if self.seen.contains(&referrer.digest) {
                    continue;
                }
                let known = self.manifests.len();
                self.add(source, &referrer, 0)?;
                subjects.extend(self.manifests[known..].iter().map(|(descriptor, _)| descriptor.digest));
                self.referrers.push(referrer);
            }
            at += 1;
        }
        // A name moves last, when all that refers to what it leads to is there.
        self.manifests.extend(root);
        Ok(())
    }

    /// Sends what the repository does not have, blobs several at once, then the manifests.
    pub(super) async fn send(
        &self,
        source: &Source,
        repository: Repository,
        name: &Reference,
        near: Vec<String>,
        done: &mut Copied,
    ) -> Result<(), BuildError> {
        let room = Arc::new(Semaphore::new(AT_ONCE));
        let mut tasks: JoinSet<Result<(Pushed, u64), BuildError>> = JoinSet::new();
        for blob in &self.blobs {
            let (repository, blob, room, near) =
                (repository.clone(), blob.clone(), room.clone(), near.clone());
            let part = Arc::new(Part { archive: source.archive.clone(), name: blob_name(&blob.digest) });
            tasks.spawn(async move {
                let _room = room.acquire().await;
                if let Some(there) = repository.find_blob(&blob, &near).await? {
                    return Ok((there, 0));
                }
                // It may have to come first, which takes a thread that may wait.
                let waiting = part.clone();
                let settled = tokio::task::spawn_blocking(move || waiting.archive.settle(&waiting.name));
                settled.await.map_err(joined)??;
                repository.send_blob(&blob, &*part).await?;
                Ok((Pushed::Sent, blob.size))
            });
        }
        while let Some(ended) = tasks.join_next().await {
            match ended.map_err(joined)?? {
                (Pushed::Sent, bytes) => done.sent = (done.sent.0 + 1, done.sent.1 + bytes),
                (Pushed::Mounted(_), _) => done.mounted += 1,
                (Pushed::Known, _) => done.known += 1,
            }
        }
        for (nth, (descriptor, json)) in self.manifests.iter().enumerate() {
            let is_root = nth + 1 == self.manifests.len();
            let which = match name.tag() {
                Some(tag) if is_root => kiln_registry::Which::Tag(tag),
                _ => kiln_registry::Which::Digest(&descriptor.digest),
            };
            repository.put_manifest(which, &descriptor.media_type, json).await?;
        }
        Ok(())
    }

    /// Makes a layout of `shelf` that has the image.
    pub(super) fn put(
        &self,
        source: &Source,
        shelf: &mut dyn Shelf,
        names: &Names<'_>,
        cancel: &BuildCancel,
        done: &mut Copied,
    ) -> Result<(), BuildError> {
        let list = match names {
            Names::Tag(_) => None,
            Names::Docker(name) => Some(self.docker_entry(source, *name)?),
        };
        for blob in &self.blobs {
            if cancel.is_cancelled() {
                return Err(BuildError::Cancelled);
            }
            let name = blob_name(&blob.digest);
            let mut is_written = false;
            shelf.put(&name, blob.size, &mut |out| {
                is_written = true;
                let (inner, _) = source.archive.read(&name)?;
                write_verified(&source.archive, &name, blob, Stoppable { inner, cancel }, out)
            })?;
            match is_written {
                true => done.sent = (done.sent.0 + 1, done.sent.1 + blob.size),
                false => done.known += 1,
            }
        }
        for (descriptor, json) in &self.manifests {
            put_bytes(shelf, &blob_name(&descriptor.digest), json)?;
        }
        if let Some(entry) = list {
            put_list(shelf, &[entry])?;
        }
        let mut root = self.root()?.clone();
        root.annotations.clear();
        let mut listed = match names {
            Names::Tag(LayoutImage::Tag(tag)) => {
                root.annotations.insert(SHORT_NAME.to_owned(), tag.clone());
                vec![root]
            }
            Names::Tag(_) => vec![root],
            Names::Docker(name) => named(&root, &name.cloned().into_iter().collect::<Vec<_>>()),
        };
        listed.extend(self.referrers.iter().cloned());
        put_index(shelf, &listed)
    }

    /// What docker finds in an archive of its own: one image, of several this machine's.
    fn docker_entry(&self, source: &Source, name: Option<&Reference>) -> Result<DockerEntry, BuildError> {
        let picked = pick_manifest(&source.archive, self.root()?, &Platform::host(), 0)?;
        let layers = picked.manifest.layers.iter().map(|layer| &layer.digest);
        let mut entry = DockerEntry::new(&picked.manifest.config.digest, layers);
        entry.add_names(name);
        Ok(entry)
    }
}

/// Writes what `reader` gives, if it is what `blob` says.
fn write_verified(
    archive: &Archive,
    name: &str,
    blob: &Descriptor,
    mut reader: impl Read,
    out: &mut dyn Write,
) -> Result<(), WriteError> {
    let mut writer = Sha256Writer::new(out);
    let mut buffer = vec![0; 256 << 10];
    loop {
        let unreadable =
            |error| crate::archive::broken(archive.path(), &format!("{name} cannot be read ({error})"));
        let count = match reader.read(&mut buffer) {
            Ok(0) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read.map_err(unreadable)?,
        };
        if writer.size_bytes() + count as u64 > blob.size {
            break;
        }
        writer.write_all(&buffer[..count]).map_err(WriteError::Out)?;
    }
    let (_, actual, actual_bytes) = writer.finish();
    let (expected, expected_bytes) = (blob.digest, blob.size);
    if (actual, actual_bytes) == (expected, expected_bytes) {
        return Ok(());
    }
    let source = kiln_content::Error::Mismatch { expected, expected_bytes, actual, actual_bytes };
    let (path, member) = (archive.path().to_owned(), name.to_owned());
    Err(BuildError::NotPromised { path, member, source: Box::new(source) }.into())
}

fn joined(error: tokio::task::JoinError) -> Error {
    Error::Local { what: "copying a blob", source: io::Error::other(error) }
}

/// A blob of a source.
struct Part {
    archive: Arc<Archive>,
    name: String,
}

impl BlobSource for Part {
    fn open(&self, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        let (mut reader, _) = self.archive.read(&self.name).map_err(io::Error::other)?;
        io::copy(&mut Read::by_ref(&mut reader).take(offset), &mut io::sink())?;
        Ok(Box::new(reader))
    }
}
