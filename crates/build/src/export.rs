//! `kiln save`: images as one tar that other tools load.
//!
//! The docker form is a superset: an OCI layout with uncompressed layers plus docker's
//! `manifest.json`, as docker writes it since version 25. Old docker reads the one, everybody else
//! either.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Read, Write};
use std::path::Path;

use kiln_content::{ImageRecord, LayerRecord};
use kiln_layer::decoder;
use kiln_oci::image::{Descriptor, Extra, Index, Manifest, media_type, to_json};
use kiln_oci::{Digest, Platform, Reference, Sha256Writer};
use serde::Serialize;

use crate::image::{MAX_CONFIG_BYTES, manifest};
use crate::layers::write_tar;
use crate::{BuildError, Engine};

/// Which tools shall read the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArchiveFormat {
    /// `docker load`, `podman load`, and every reader of OCI layouts.
    Docker,
    /// An OCI layout alone.
    Oci,
}

/// One image to save, under the name the archive shall give it.
#[derive(Debug, Clone)]
pub struct SavedImage {
    /// The image.
    pub image: ImageRecord,
    /// `None`: the archive does not name it.
    pub name: Option<Reference>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

/// Writes `images` as one archive to `out`; `path` is for messages.
///
/// Layers are read out of their snapshots and checked against their diff IDs on the way; nothing
/// but the archive is written.
///
/// # Errors
/// [`BuildError::LayerChanged`] when a stored layer is damaged, [`BuildError::Output`] when `out`
/// does not take it. What was written then is no archive.
pub fn save(
    engine: &Engine,
    images: &[SavedImage],
    format: ArchiveFormat,
    path: &Path,
    out: &mut dyn Write,
) -> Result<(), BuildError> {
    let mut writer = ArchiveWriter { out, path, written: HashSet::new() };
    let mut index = Index {
        schema_version: 2,
        media_type: Some(media_type::OCI_INDEX.to_owned()),
        manifests: Vec::new(),
        annotations: BTreeMap::new(),
        extra: Extra::new(),
    };
    let mut docker: BTreeMap<Digest, DockerEntry> = BTreeMap::new();
    for SavedImage { image, name } in images {
        let config_json = engine.store.read_blob(&image.config, MAX_CONFIG_BYTES)?;
        let layers = layer_records(engine, image)?;
        for layer in &layers {
            writer.layer(engine, layer)?;
        }
        writer.blob(&image.config, &config_json)?;
        let manifest: Manifest = manifest(&image.config, config_json.len() as u64, &layers, false);
        let manifest_json = to_json(&manifest);
        let manifest_digest = Digest::of(&manifest_json);
        writer.blob(&manifest_digest, &manifest_json)?;

        let mut descriptor =
            Descriptor::new(media_type::OCI_MANIFEST, manifest_digest, manifest_json.len() as u64);
        descriptor.platform = Some(Platform::host());
        if let Some(name) = name {
            let mut annotate =
                |key: &str, value: String| descriptor.annotations.insert(key.to_owned(), value);
            annotate("io.containerd.image.name", name.to_string());
            annotate("org.opencontainers.image.ref.name", name.tag().unwrap_or("latest").to_owned());
        }
        index.manifests.push(descriptor);
        let entry = docker.entry(image.config).or_insert_with(|| DockerEntry {
            config: blob_name(&image.config),
            repo_tags: Vec::new(),
            layers: layers.iter().map(|layer| blob_name(&layer.diff_id.0)).collect(),
        });
        entry.repo_tags.extend(name.iter().filter(|name| name.tag().is_some()).map(Reference::familiar));
    }
    writer.file("index.json", &to_json(&index))?;
    if format == ArchiveFormat::Docker {
        let entries: Vec<DockerEntry> = docker.into_values().collect();
        writer.file("manifest.json", &to_json(&entries))?;
    }
    writer.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    writer.finish()
}

fn layer_records(engine: &Engine, image: &ImageRecord) -> Result<Vec<LayerRecord>, BuildError> {
    let Some(top) = &image.snapshot else { return Ok(Vec::new()) };
    let chain = engine.snapshots.chain(top)?;
    chain.iter().map(|id| crate::layers::describe(&engine.store, &*engine.snapshots, id)).collect()
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Writes tar entries with fixed metadata: same images, same bytes.
struct ArchiveWriter<'a> {
    out: &'a mut dyn Write,
    path: &'a Path,
    written: HashSet<Digest>,
}

impl ArchiveWriter<'_> {
    fn failed(&self, source: io::Error) -> BuildError {
        BuildError::Output { path: self.path.to_owned(), source }
    }

    fn header(&mut self, name: &str, size_bytes: u64) -> Result<(), BuildError> {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).map_err(|source| self.failed(source))?;
        header.set_size(size_bytes);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        self.out.write_all(header.as_bytes()).map_err(|source| self.failed(source))
    }

    fn pad(&mut self, size_bytes: u64) -> Result<(), BuildError> {
        let used = (size_bytes % 512) as usize;
        let padding = &[0; 512][..(512 - used) % 512];
        self.out.write_all(padding).map_err(|source| self.failed(source))
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<(), BuildError> {
        self.header(name, bytes.len() as u64)?;
        self.out.write_all(bytes).map_err(|source| self.failed(source))?;
        self.pad(bytes.len() as u64)
    }

    fn blob(&mut self, digest: &Digest, bytes: &[u8]) -> Result<(), BuildError> {
        if self.written.insert(*digest) { self.file(&blob_name(digest), bytes) } else { Ok(()) }
    }

    /// One layer as a plain tar, checked while it passes.
    fn layer(&mut self, engine: &Engine, layer: &LayerRecord) -> Result<(), BuildError> {
        if !self.written.insert(layer.diff_id.0) {
            return Ok(());
        }
        self.header(&blob_name(&layer.diff_id.0), layer.size_bytes)?;
        let changed = |actual| BuildError::LayerChanged { expected: layer.diff_id, actual };
        let actual = match &layer.blob {
            None => write_tar(&*engine.snapshots, &layer.snapshot, &mut *self.out)?.diff_id,
            Some(blob) => {
                let (file, _) = engine.store.open_blob(&blob.digest)?;
                let decoded = decoder(io::BufReader::with_capacity(256 << 10, file));
                let (_, mut plain): (_, Box<dyn Read>) = decoded.map_err(|source| self.failed(source))?;
                let mut hashed = Sha256Writer::new(&mut *self.out);
                let copied = io::copy(&mut plain, &mut hashed);
                let (_, digest, _) = hashed.finish();
                copied.map_err(|source| self.failed(source))?;
                kiln_oci::DiffId(digest)
            }
        };
        if actual != layer.diff_id {
            return Err(changed(actual));
        }
        self.pad(layer.size_bytes)
    }

    /// Two empty blocks end a tar.
    fn finish(self) -> Result<(), BuildError> {
        self.out.write_all(&[0; 1024]).and_then(|()| self.out.flush()).map_err(|source| self.failed(source))
    }
}
