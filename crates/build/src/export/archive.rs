//! Images as one tar, or as the files of an OCI layout.
//!
//! The docker form is a superset: an OCI layout plus docker's `manifest.json`, as docker writes it
//! since version 25. Old docker reads the one, everybody else either.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

use kiln_oci::image::{Descriptor, Extra, Index, media_type, to_json};
use kiln_oci::{Digest, Reference};
use serde::Serialize;

use super::file::Target;
use super::image::ReadyImage;
use super::index::WholeIndex;
use super::layers::{LayerContent, ReadyLayer, WriteError, write_blob, write_layer};
use super::several::ReadyIndex;
use crate::load::blob_name;
use crate::{BuildError, Engine};

/// Which tools shall read the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArchiveFormat {
    /// `docker load`, `podman load`, and every reader of OCI layouts.
    Docker,
    /// An OCI layout alone.
    Oci,
}

/// An image on its way out, under the names that the archive shall give it.
pub(crate) struct Outgoing<'a> {
    pub(crate) image: ReadyImage,
    pub(crate) names: &'a [Reference],
    /// Written in the place of the image's own manifest.
    pub(crate) index: Option<WholeIndex>,
}

impl Outgoing<'_> {
    /// What `index.json` lists.
    pub(crate) fn root(&self) -> &Descriptor {
        self.index.as_ref().map_or(&self.image.descriptor, |index| &index.descriptor)
    }
}

/// Takes files by name, each once.
pub(crate) trait Shelf {
    /// A file of exactly `size_bytes`, which `write` writes.
    fn put(
        &mut self,
        name: &str,
        size_bytes: u64,
        write: &mut dyn FnMut(&mut dyn Write) -> Result<(), WriteError>,
    ) -> Result<(), BuildError>;

    /// Where a file can be written before its name and size are known, if anywhere.
    fn drafts(&mut self) -> Option<&mut dyn Drafts> {
        None
    }

    /// What `index.json` shall list besides.
    fn listed(&mut self) -> Result<Vec<Descriptor>, BuildError> {
        Ok(Vec::new())
    }
}

/// Takes a file before its name and size are known.
pub(crate) trait Drafts: Write {
    /// What follows is one file.
    fn begin(&mut self) -> io::Result<()>;

    /// The file ends here, has `size_bytes`, and this name.
    fn keep(&mut self, name: &str, size_bytes: u64) -> io::Result<()>;

    /// The file ends here and is not wanted.
    fn forget(&mut self) -> io::Result<()>;

    /// What an error of it means.
    fn failed(&self, source: io::Error) -> BuildError;
}

/// An image in docker's list.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DockerEntry {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

impl DockerEntry {
    /// One without a name, of a config and layers, the lowest first.
    pub(crate) fn new<'d>(config: &Digest, layers: impl Iterator<Item = &'d Digest>) -> Self {
        let (config, layers) = (blob_name(config), layers.map(blob_name).collect());
        Self { config, repo_tags: Vec::new(), layers }
    }

    /// Adds names; docker knows those with a tag.
    pub(crate) fn add_names<'n>(&mut self, names: impl IntoIterator<Item = &'n Reference>) {
        let tagged = names.into_iter().filter(|name| name.tag().is_some());
        self.repo_tags.extend(tagged.map(Reference::familiar));
    }
}

/// Puts images and all that belongs to them on a shelf.
///
/// Its methods fail with [`BuildError::LayerChanged`] when a stored layer is damaged, and with
/// [`BuildError::Output`] when the shelf does not take it. What was written then is no archive.
pub(crate) struct ImageWriter<'a> {
    engine: &'a Engine,
    format: ArchiveFormat,
    shelf: &'a mut dyn Shelf,
    cancel: &'a AtomicBool,
    written: HashSet<Digest>,
    listed: Vec<Descriptor>,
    docker: BTreeMap<Digest, DockerEntry>,
}

impl<'a> ImageWriter<'a> {
    pub(crate) fn new(
        engine: &'a Engine,
        format: ArchiveFormat,
        shelf: &'a mut dyn Shelf,
        cancel: &'a AtomicBool,
    ) -> Self {
        let (written, listed, docker) = Default::default();
        Self { engine, format, shelf, cancel, written, listed, docker }
    }

    /// As [`Shelf::drafts`].
    pub(crate) fn drafts(&mut self) -> Option<&mut dyn Drafts> {
        self.shelf.drafts()
    }

    /// Keeps the draft under way as the blob `digest`, unless that is there already.
    pub(crate) fn keep_draft(&mut self, digest: &Digest, size_bytes: u64) -> Result<(), BuildError> {
        let is_new = self.written.insert(*digest);
        let Some(drafts) = self.shelf.drafts() else { return Ok(()) };
        let ended = if is_new { drafts.keep(&blob_name(digest), size_bytes) } else { drafts.forget() };
        ended.map_err(|source| drafts.failed(source))
    }

    /// Puts `layer` there, unless it is.
    pub(crate) fn layer(&mut self, layer: &ReadyLayer) -> Result<(), BuildError> {
        let (engine, cancel) = (self.engine, self.cancel);
        let Descriptor { digest, size, .. } = &layer.descriptor;
        self.blob(digest, *size, &mut |out| match &layer.content {
            LayerContent::Blob => write_blob(engine, digest, *size, out, cancel),
            LayerContent::Plain(layer) => write_layer(engine, layer, out, cancel),
        })
    }

    /// Puts all that an index lists there, and lists the index.
    pub(crate) fn index(&mut self, ready: &ReadyIndex, names: &[Reference]) -> Result<(), BuildError> {
        ready.images.iter().try_for_each(|image| self.parts(image))?;
        for (digest, bytes) in ready.attestations.iter().flat_map(|said| &said.blobs) {
            let mut write = |out: &mut dyn Write| out.write_all(bytes).map_err(WriteError::Out);
            self.blob(digest, bytes.len() as u64, &mut write)?;
        }
        let ReadyIndex { descriptor, json, .. } = ready;
        let mut write = |out: &mut dyn Write| out.write_all(json).map_err(WriteError::Out);
        self.blob(&descriptor.digest, descriptor.size, &mut write)?;
        self.listed.extend(named(descriptor, names));
        Ok(())
    }

    /// Puts layers, config and manifest there.
    fn parts(&mut self, image: &ReadyImage) -> Result<(), BuildError> {
        for layer in &image.layers {
            self.layer(layer)?;
        }
        for bytes in [&image.config_json, &image.manifest_json] {
            let mut write = |out: &mut dyn Write| out.write_all(bytes).map_err(WriteError::Out);
            self.blob(&Digest::of(bytes), bytes.len() as u64, &mut write)?;
        }
        Ok(())
    }

    /// Puts all of an image there that is not.
    pub(crate) fn image(&mut self, outgoing: &Outgoing<'_>) -> Result<(), BuildError> {
        let Outgoing { image, names, index } = outgoing;
        self.parts(image)?;
        let (engine, cancel) = (self.engine, self.cancel);
        for (digest, size) in index.iter().flat_map(|index| &index.blobs) {
            self.blob(digest, *size, &mut |out| write_blob(engine, digest, *size, out, cancel))?;
        }
        self.listed.extend(named(outgoing.root(), names));
        let layers = image.layers.iter().map(|layer| &layer.descriptor.digest);
        let entry = self.docker.entry(image.config);
        entry.or_insert_with(|| DockerEntry::new(&image.config, layers)).add_names(*names);
        Ok(())
    }

    fn blob(
        &mut self,
        digest: &Digest,
        size_bytes: u64,
        write: &mut dyn FnMut(&mut dyn Write) -> Result<(), WriteError>,
    ) -> Result<(), BuildError> {
        if !self.written.insert(*digest) {
            return Ok(());
        }
        self.shelf.put(&blob_name(digest), size_bytes, write)
    }

    /// Puts there what lists the images.
    pub(crate) fn finish(self) -> Result<(), BuildError> {
        let Self { format, shelf, listed, docker, .. } = self;
        if format == ArchiveFormat::Docker {
            let entries: Vec<DockerEntry> = docker.into_values().collect();
            put_list(shelf, &entries)?;
        }
        put_index(shelf, &listed)
    }
}

/// Puts docker's list of images there.
pub(crate) fn put_list(shelf: &mut dyn Shelf, entries: &[DockerEntry]) -> Result<(), BuildError> {
    put_bytes(shelf, "manifest.json", &to_json(&entries))
}

/// Makes a layout of `shelf` that lists these beside what it listed before.
pub(crate) fn put_index(shelf: &mut dyn Shelf, listed: &[Descriptor]) -> Result<(), BuildError> {
    let mut manifests = shelf.listed()?;
    manifests.retain(|old| !listed.iter().any(|new| replaces(new, old)));
    manifests.extend(listed.iter().cloned());
    let index = Index {
        schema_version: 2,
        media_type: Some(media_type::OCI_INDEX.to_owned()),
        manifests,
        annotations: BTreeMap::new(),
        extra: Extra::new(),
    };
    put_bytes(shelf, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    put_bytes(shelf, "index.json", &to_json(&index))
}

/// How tools that use containerd's store name an image in an index.
const FULL_NAME: &str = "io.containerd.image.name";
/// How OCI's layout does.
pub(crate) const SHORT_NAME: &str = "org.opencontainers.image.ref.name";

/// An entry of `index.json` for each name, or one without.
pub(crate) fn named(descriptor: &Descriptor, names: &[Reference]) -> Vec<Descriptor> {
    let with = |name: &Reference| {
        let mut descriptor = descriptor.clone();
        let mut annotate = |key: &str, value: String| {
            descriptor.annotations.entry(key.to_owned()).or_insert(value);
        };
        annotate(FULL_NAME, name.to_string());
        annotate(SHORT_NAME, name.tag().unwrap_or("latest").to_owned());
        descriptor
    };
    if names.is_empty() { vec![descriptor.clone()] } else { names.iter().map(with).collect() }
}

/// Whether a layout that gets `new` loses `old`: it is the same image, or has the same name.
fn replaces(new: &Descriptor, old: &Descriptor) -> bool {
    let name =
        |descriptor: &Descriptor| [FULL_NAME, SHORT_NAME].map(|key| descriptor.annotations.get(key).cloned());
    name(new) == name(old) && (new.digest == old.digest || name(new).iter().any(Option::is_some))
}

pub(crate) fn put_bytes(shelf: &mut dyn Shelf, name: &str, bytes: &[u8]) -> Result<(), BuildError> {
    shelf.put(name, bytes.len() as u64, &mut |out| out.write_all(bytes).map_err(WriteError::Out))
}

/// Writes tar entries with fixed metadata: same images, same bytes.
pub(crate) struct TarShelf<'a> {
    target: Target<'a>,
    /// Where the header of the draft under way goes.
    draft_at: u64,
}

impl<'a> TarShelf<'a> {
    pub(crate) fn new(target: Target<'a>) -> Self {
        Self { target, draft_at: 0 }
    }

    fn failed(&self, source: io::Error) -> BuildError {
        BuildError::Output { path: self.target.path.to_owned(), source }
    }

    /// Two empty blocks end a tar.
    pub(crate) fn finish(self) -> Result<(), BuildError> {
        let out = &mut *self.target.out;
        out.write_all(&[0; 1024]).and_then(|()| out.flush()).map_err(|source| self.failed(source))
    }

    fn pad(&mut self, size_bytes: u64) -> io::Result<()> {
        let used = (size_bytes % BLOCK_BYTES as u64) as usize;
        self.target.out.write_all(&[0; BLOCK_BYTES][..(BLOCK_BYTES - used) % BLOCK_BYTES])
    }

    /// What is under `out`, with all that was written.
    fn flushed(&mut self) -> io::Result<&'a File> {
        self.target.out.flush()?;
        self.target.file.ok_or_else(|| io::ErrorKind::NotSeekable.into())
    }
}

const BLOCK_BYTES: usize = 512;

fn header(name: &str, size_bytes: u64) -> io::Result<tar::Header> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name)?;
    header.set_size(size_bytes);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    Ok(header)
}

impl Shelf for TarShelf<'_> {
    fn put(
        &mut self,
        name: &str,
        size_bytes: u64,
        write: &mut dyn FnMut(&mut dyn Write) -> Result<(), WriteError>,
    ) -> Result<(), BuildError> {
        let header = header(name, size_bytes).map_err(|source| self.failed(source))?;
        self.target.out.write_all(header.as_bytes()).map_err(|source| self.failed(source))?;
        let written = write(self.target.out);
        written.map_err(|error| error.named(|source| self.failed(source)))?;
        self.pad(size_bytes).map_err(|source| self.failed(source))
    }

    fn drafts(&mut self) -> Option<&mut dyn Drafts> {
        self.target.file.is_some().then_some(self)
    }
}

impl Write for TarShelf<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.target.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.target.out.flush()
    }
}

impl Drafts for TarShelf<'_> {
    fn begin(&mut self) -> io::Result<()> {
        self.draft_at = self.flushed()?.stream_position()?;
        self.target.out.write_all(&[0; BLOCK_BYTES])
    }

    fn keep(&mut self, name: &str, size_bytes: u64) -> io::Result<()> {
        self.pad(size_bytes)?;
        self.flushed()?.write_all_at(header(name, size_bytes)?.as_bytes(), self.draft_at)
    }

    fn forget(&mut self) -> io::Result<()> {
        let mut file = self.flushed()?;
        file.set_len(self.draft_at)?;
        file.seek(SeekFrom::Start(self.draft_at)).map(drop)
    }

    fn failed(&self, source: io::Error) -> BuildError {
        TarShelf::failed(self, source)
    }
}
