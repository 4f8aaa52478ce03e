//! `kiln copy`: an image goes from one place to another as it is. No layer is unpacked, and none packed anew, so
//! that digests stay.
//!
//! What comes from a registry comes into the store first, as blobs that nothing needs: it is verified there, and
//! the next copy of the same image finds it. Garbage collection takes it.

use std::collections::HashSet;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_oci::document::DocumentError;
use kiln_oci::image::{Descriptor, media_type};
use kiln_oci::{Digest, Platform, Reference, Sha256Writer, document};
use kiln_registry::{BlobSource, Error, Pushed, Repository};
use kiln_solver::Cancellation;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::pull::{Abort, Fetch, State};
use super::{AT_ONCE, Registries};
use crate::archive::Archive;
use crate::export::{DirShelf, NewFile, SHORT_NAME, Shelf, TarShelf, WriteError, put_bytes, put_index};
use crate::layout::find_in_layout;
use crate::load::{MAX_MANIFEST_BYTES, blob_name, layout_index, pick_manifest};
use crate::load_oci::{check_depth, parse_index, parse_manifest, read_verified};
use crate::reread::Stoppable;
use crate::{BuildCancel, BuildError, Engine, LayoutImage};

/// Manifests and indexes of one image; more is no image.
const MAX_MANIFESTS: usize = 10_000;
/// Configurations and layers of all of them together.
const MAX_BLOBS: usize = 1_000_000;

/// A place outside the store that has images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A registry.
    Registry(Reference),
    /// An OCI layout: a directory, and which image of it; to write, only a tag is a name.
    Layout(PathBuf, LayoutImage),
    /// The same as a tar.
    Archive(PathBuf, LayoutImage),
}

/// Which images of several are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// Those for all platforms, with the index that lists them.
    All,
    /// The one for this platform.
    Platform(Platform),
}

/// What to copy, and where to.
#[derive(Debug, Clone)]
pub struct CopyRequest {
    /// From here.
    pub from: Place,
    /// To there.
    pub to: Place,
    /// Of an image for several platforms.
    pub which: Which,
}

/// What was copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copied {
    /// Digest of the manifest or index.
    pub digest: String,
    /// Blobs that had to go, and their bytes.
    pub sent: (usize, u64),
    /// Blobs that a registry took from another repository of its own.
    pub mounted: usize,
    /// Blobs that were there.
    pub known: usize,
}

/// Copies an image from place to place.
///
/// # Errors
/// [`BuildError::Registry`], [`BuildError::Archive`], [`BuildError::Output`]; what is damaged is not copied.
/// No name has moved then.
pub fn copy(
    engine: &Engine,
    registries: &Arc<Registries>,
    request: &CopyRequest,
    cancel: &BuildCancel,
) -> Result<Copied, BuildError> {
    let (source, _abort) = Source::open(engine, registries, request, cancel)?;
    let tree = Tree::read(&source, &request.which)?;
    let mut done = Copied { digest: tree.root()?.digest.to_string(), ..Copied::default() };
    match &request.to {
        Place::Registry(name) => {
            let repository = registries.repository(name);
            // On the same registry, what the other repository has need not travel.
            let from = source.from.as_ref().map(|from| registries.place(from));
            let near = from.filter(|from| from.domain() == repository.domain());
            let near: Vec<String> = near.map(|from| from.path().to_owned()).into_iter().collect();
            registries.wait(cancel, tree.send(&source, repository, name, near, &mut done))?;
        }
        Place::Layout(path, image) => {
            let mut shelf = DirShelf::new(path)?;
            tree.put(&source, &mut shelf, image, cancel, &mut done)?;
        }
        Place::Archive(path, image) => {
            let new = NewFile::create(path)?;
            new.write_by(&mut |target| {
                let out = &mut BufWriter::with_capacity(256 << 10, &mut *target.out);
                let inner = crate::export::Target { path: target.path, out, file: None };
                let mut shelf = TarShelf::new(inner);
                tree.put(&source, &mut shelf, image, cancel, &mut done)?;
                shelf.finish()
            })?;
            new.finish()?;
        }
    }
    Ok(done)
}

/// Where an image comes from, opened.
struct Source {
    archive: Arc<Archive>,
    /// Blobs have to be announced to it: what was not is a manifest.
    fetch: Option<Arc<Fetch>>,
    from: Option<Reference>,
    root: Descriptor,
}

impl Source {
    fn open(
        engine: &Engine,
        registries: &Arc<Registries>,
        request: &CopyRequest,
        cancel: &BuildCancel,
    ) -> Result<(Self, Option<Abort>), BuildError> {
        let of_files = |archive: Archive, image: &LayoutImage| {
            let index = layout_index(&archive)?;
            let root = find_in_layout(&archive, &index, image)?;
            Ok((Self { archive: Arc::new(archive), fetch: None, from: None, root }, None))
        };
        match &request.from {
            Place::Layout(path, image) => of_files(Archive::open_dir(path)?, image),
            Place::Archive(path, image) => {
                let unreadable = |source| BuildError::Unreadable { path: path.clone(), source };
                of_files(Archive::open(path, std::fs::File::open(path).map_err(unreadable)?)?, image)
            }
            Place::Registry(name) => {
                let repository = registries.repository(name);
                let root = registries.wait(cancel, repository.manifest(name.into()))?;
                engine.store.put_blob(&root.bytes)?;
                let fetch = Fetch::new(engine, registries, repository, cancel);
                fetch.set(root.digest, State::There);
                let shown = name.familiar();
                let archive = Archive::of_blobs(Path::new(&shown), engine.store.clone(), fetch.clone());
                let abort = Abort(fetch.clone());
                let (fetch, from, root) = (Some(fetch), Some(name.clone()), root.descriptor());
                Ok((Self { archive: Arc::new(archive), fetch, from, root }, Some(abort)))
            }
        }
    }
}

/// What an image consists of.
struct Tree {
    /// Each after what it names; the last is the image.
    manifests: Vec<(Descriptor, Vec<u8>)>,
    blobs: Vec<Descriptor>,
    seen: HashSet<Digest>,
}

impl Tree {
    fn read(source: &Source, which: &Which) -> Result<Self, BuildError> {
        let mut tree = Self { manifests: Vec::new(), blobs: Vec::new(), seen: HashSet::new() };
        let root = match which {
            Which::All => source.root.clone(),
            Which::Platform(platform) => {
                let picked = pick_manifest(&source.archive, &source.root, platform, 0)?;
                let kind = picked.manifest.media_type.as_deref().unwrap_or(media_type::OCI_MANIFEST);
                Descriptor::new(kind, Digest::of(&picked.json), picked.json.len() as u64)
            }
        };
        tree.add(source, &root, 0)?;
        Ok(tree)
    }

    fn root(&self) -> Result<&Descriptor, BuildError> {
        let last = self.manifests.last().map(|(descriptor, _)| descriptor);
        last.ok_or_else(|| BuildError::Bug { what: "an image without a manifest".to_owned() })
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

    /// Sends what the repository does not have, blobs several at once, then the manifests.
    async fn send(
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
    fn put(
        &self,
        source: &Source,
        shelf: &mut dyn Shelf,
        image: &LayoutImage,
        cancel: &BuildCancel,
        done: &mut Copied,
    ) -> Result<(), BuildError> {
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
        let mut listed = self.root()?.clone();
        listed.annotations.clear();
        if let LayoutImage::Tag(tag) = image {
            listed.annotations.insert(SHORT_NAME.to_owned(), tag.clone());
        }
        put_index(shelf, &[listed])
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
