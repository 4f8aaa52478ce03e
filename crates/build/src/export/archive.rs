//! Images as one tar, or as the files of an OCI layout.
//!
//! The docker form is a superset: an OCI layout plus docker's `manifest.json`, as docker writes it
//! since version 25. Old docker reads the one, everybody else either.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use kiln_oci::image::{Descriptor, Extra, Index, media_type, to_json};
use kiln_oci::{Digest, Reference};
use serde::Serialize;

use super::image::ReadyImage;
use super::index::WholeIndex;
use super::layers::{LayerContent, WriteError, write_blob, write_layer};
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
pub(crate) struct Outgoing {
    pub(crate) image: ReadyImage,
    pub(crate) names: Vec<Reference>,
    /// Written in the place of the image's own manifest.
    pub(crate) index: Option<WholeIndex>,
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

    /// What `index.json` shall list besides.
    fn listed(&mut self) -> Result<Vec<Descriptor>, BuildError> {
        Ok(Vec::new())
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

/// Puts `images` and all that belongs to them on `shelf`.
///
/// # Errors
/// [`BuildError::LayerChanged`] when a stored layer is damaged, [`BuildError::Output`] when the shelf
/// does not take it. What was written then is no archive.
pub(crate) fn write_images(
    engine: &Engine,
    images: &[Outgoing],
    format: ArchiveFormat,
    shelf: &mut dyn Shelf,
    cancel: &AtomicBool,
) -> Result<(), BuildError> {
    let mut written: HashSet<Digest> = HashSet::new();
    let mut listed: Vec<Descriptor> = Vec::new();
    let mut docker: BTreeMap<Digest, DockerEntry> = BTreeMap::new();
    for Outgoing { image, names, index } in images {
        for layer in &image.layers {
            let Descriptor { digest, size, .. } = &layer.descriptor;
            if written.insert(*digest) {
                shelf.put(&blob_name(digest), *size, &mut |out| match &layer.content {
                    LayerContent::Blob => write_blob(engine, digest, *size, out, cancel),
                    LayerContent::Plain(layer) => write_layer(engine, layer, out, cancel),
                })?;
            }
        }
        let small = [(&image.config, &image.config_json), (&image.descriptor.digest, &image.manifest_json)];
        for (digest, bytes) in small {
            if written.insert(*digest) {
                put_bytes(shelf, &blob_name(digest), bytes)?;
            }
        }
        for (digest, size) in index.iter().flat_map(|index| &index.blobs) {
            if written.insert(*digest) {
                let mut write = |out: &mut dyn Write| write_blob(engine, digest, *size, out, cancel);
                shelf.put(&blob_name(digest), *size, &mut write)?;
            }
        }
        let descriptor = index.as_ref().map_or(&image.descriptor, |index| &index.descriptor);
        listed.extend(named(descriptor, names));
        let entry = docker.entry(image.config).or_insert_with(|| DockerEntry {
            config: blob_name(&image.config),
            repo_tags: Vec::new(),
            layers: image.layers.iter().map(|layer| blob_name(&layer.descriptor.digest)).collect(),
        });
        entry.repo_tags.extend(names.iter().filter(|name| name.tag().is_some()).map(Reference::familiar));
    }
    let earlier = shelf.listed()?.into_iter().filter(|old| !listed.iter().any(|new| replaces(new, old)));
    let manifests = earlier.collect::<Vec<_>>().into_iter().chain(listed.iter().cloned()).collect();
    let index = Index {
        schema_version: 2,
        media_type: Some(media_type::OCI_INDEX.to_owned()),
        manifests,
        annotations: BTreeMap::new(),
        extra: Extra::new(),
    };
    if format == ArchiveFormat::Docker {
        let entries: Vec<DockerEntry> = docker.into_values().collect();
        put_bytes(shelf, "manifest.json", &to_json(&entries))?;
    }
    put_bytes(shelf, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    put_bytes(shelf, "index.json", &to_json(&index))
}

/// How tools that use containerd's store name an image in an index.
const FULL_NAME: &str = "io.containerd.image.name";
/// How OCI's layout does.
const SHORT_NAME: &str = "org.opencontainers.image.ref.name";

/// An entry of `index.json` for each name, or one without.
fn named(descriptor: &Descriptor, names: &[Reference]) -> Vec<Descriptor> {
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

fn put_bytes(shelf: &mut dyn Shelf, name: &str, bytes: &[u8]) -> Result<(), BuildError> {
    shelf.put(name, bytes.len() as u64, &mut |out| out.write_all(bytes).map_err(WriteError::Out))
}

/// Writes tar entries with fixed metadata: same images, same bytes.
pub(crate) struct TarShelf<'a> {
    out: &'a mut dyn Write,
    /// For messages.
    path: &'a Path,
}

impl<'a> TarShelf<'a> {
    /// `path` is for messages.
    pub(crate) fn new(out: &'a mut dyn Write, path: &'a Path) -> Self {
        Self { out, path }
    }

    fn failed(&self, source: io::Error) -> BuildError {
        BuildError::Output { path: self.path.to_owned(), source }
    }

    /// Two empty blocks end a tar.
    pub(crate) fn finish(self) -> Result<(), BuildError> {
        self.out.write_all(&[0; 1024]).and_then(|()| self.out.flush()).map_err(|source| self.failed(source))
    }
}

impl Shelf for TarShelf<'_> {
    fn put(
        &mut self,
        name: &str,
        size_bytes: u64,
        write: &mut dyn FnMut(&mut dyn Write) -> Result<(), WriteError>,
    ) -> Result<(), BuildError> {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).map_err(|source| self.failed(source))?;
        header.set_size(size_bytes);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        self.out.write_all(header.as_bytes()).map_err(|source| self.failed(source))?;
        let written = write(self.out);
        written.map_err(|error| error.named(|source| self.failed(source)))?;
        let used = (size_bytes % 512) as usize;
        let padding = &[0; 512][..(512 - used) % 512];
        self.out.write_all(padding).map_err(|source| self.failed(source))
    }
}
