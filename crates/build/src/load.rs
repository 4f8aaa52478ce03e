//! `kiln load`: images out of docker archives and OCI archives.
//!
//! A docker archive names its images in `manifest.json`, an OCI archive in `index.json`; newer
//! docker writes both, and `manifest.json` then has the names.

use std::fs::File;
use std::io::{self, BufReader, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;

use kiln_content::ImageRecord;
use kiln_layer::{ApplyError, Compression, DensityError, bounded_decoder};
use kiln_oci::image::{Descriptor, ImageConfig, Index, Manifest, media_type};
use kiln_oci::{Digest, Platform, Reference};
use serde::Deserialize;

use crate::archive::{Archive, broken};
use crate::cancel::BuildCancel;
use crate::image::{MAX_CONFIG_BYTES, parse_json, store_image};
use crate::load_layers::{LayerSource, Promised, load_layers};
use crate::{BuildError, Engine};

/// One image that was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// The image.
    pub image: ImageRecord,
    /// The names the archive gave it; none for a nameless one.
    pub names: Vec<Reference>,
}

/// Manifests and indexes beyond this size are refused, as containerd does.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Indexes within indexes are followed this far.
const MAX_INDEX_DEPTH: usize = 4;

/// An entry of a docker archive's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Loads every image for this platform from the archive at `path` (`-`: standard input), which
/// may be compressed as a whole.
///
/// # Errors
/// [`BuildError`]; names of images before the broken one are set, the others are not.
pub fn load(engine: &Engine, path: &Path, cancel: &BuildCancel) -> Result<Vec<Loaded>, BuildError> {
    let archive = Archive::open(path, seekable(engine, path)?)?;
    let loaded = if archive.contains("manifest.json") {
        load_docker(engine, &archive, cancel)?
    } else if archive.contains("index.json") {
        load_oci(engine, &archive, cancel)?
    } else {
        return Err(broken(
            path,
            "neither manifest.json (docker) nor index.json (OCI) is in it: not an image archive",
        ));
    };
    for Loaded { image, names } in &loaded {
        for name in names {
            engine.store.set_name(name, &image.config)?;
        }
    }
    engine.store.barrier()?;
    Ok(loaded)
}

/// A plain file as it is; a pipe or a compressed file by way of an unnamed temporary file.
fn seekable(engine: &Engine, path: &Path) -> Result<File, BuildError> {
    let unreadable = |source| BuildError::Unreadable { path: path.to_owned(), source };
    let stdin = path == Path::new("-");
    let input: File = if stdin {
        File::from(io::stdin().as_fd().try_clone_to_owned().map_err(unreadable)?)
    } else {
        File::open(path).map_err(unreadable)?
    };
    let regular = input.metadata().map_err(unreadable)?.is_file();
    let again = input.try_clone().map_err(unreadable)?;
    let (compression, mut plain) =
        bounded_decoder(BufReader::with_capacity(256 << 10, input)).map_err(unreadable)?;
    if regular && !stdin && compression == Compression::None {
        let mut file = again;
        file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
        return Ok(file);
    }
    let mut spool = engine.store.spool()?;
    io::copy(&mut plain, &mut spool).map_err(|error| match DensityError::of(&error) {
        Some(density) => BuildError::Apply(ApplyError::Density(density)),
        None => unreadable(error),
    })?;
    spool.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    Ok(spool)
}

fn load_docker(engine: &Engine, archive: &Archive, cancel: &BuildCancel) -> Result<Vec<Loaded>, BuildError> {
    let json = archive.read_small("manifest.json", MAX_MANIFEST_BYTES)?;
    let entries: Vec<DockerEntry> = parse_json("docker manifest.json", &Digest::of(&json), &json)?;
    let mut loaded = Vec::new();
    for entry in entries {
        let config = archive.read_small(&entry.config, MAX_CONFIG_BYTES)?;
        let layers =
            entry.layers.iter().map(|name| LayerSource { name: name.clone(), expected: None }).collect();
        let image = load_image(engine, archive, &config, layers, cancel)?;
        let names = entry.repo_tags.unwrap_or_default();
        let names = names.iter().map(|name| parse_name(archive, name)).collect::<Result<_, _>>()?;
        loaded.push(Loaded { image, names });
    }
    Ok(loaded)
}

fn parse_name(archive: &Archive, name: &str) -> Result<Reference, BuildError> {
    name.parse().map_err(|error| broken(archive.path(), &format!("holds a bad image name: {error}")))
}

fn load_oci(engine: &Engine, archive: &Archive, cancel: &BuildCancel) -> Result<Vec<Loaded>, BuildError> {
    let json = archive.read_small("index.json", MAX_MANIFEST_BYTES)?;
    let index: Index = parse_json("index.json", &Digest::of(&json), &json)?;
    let mut loaded = Vec::new();
    for descriptor in &index.manifests {
        let manifest = pick_manifest(archive, descriptor, 0)?;
        let image = load_manifest(engine, archive, &manifest, cancel)?;
        loaded.push(Loaded { image, names: oci_name(descriptor).into_iter().collect() });
    }
    Ok(loaded)
}

pub(crate) fn load_manifest(
    engine: &Engine,
    archive: &Archive,
    manifest: &Manifest,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    let config = read_verified(archive, &manifest.config, MAX_CONFIG_BYTES)?;
    let layers = manifest.layers.iter().map(|layer| LayerSource {
        name: blob_name(&layer.digest),
        expected: Some((layer.digest, layer.size)),
    });
    load_image(engine, archive, &config, layers.collect(), cancel)
}

/// The name in an index's annotations. A bare tag (`latest`) says nothing about the repository.
pub(crate) fn oci_name(descriptor: &Descriptor) -> Option<Reference> {
    let full = descriptor.annotations.get("io.containerd.image.name");
    let short = descriptor.annotations.get("org.opencontainers.image.ref.name");
    let name = full.or(short.filter(|name| name.contains([':', '/', '@'])))?;
    name.parse().ok()
}

pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The manifest for this platform behind `descriptor`, through nested indexes.
pub(crate) fn pick_manifest(
    archive: &Archive,
    descriptor: &Descriptor,
    depth: usize,
) -> Result<Manifest, BuildError> {
    if depth > MAX_INDEX_DEPTH {
        return Err(broken(archive.path(), "indexes are nested too deeply"));
    }
    let json = read_verified(archive, descriptor, MAX_MANIFEST_BYTES)?;
    match descriptor.media_type.as_str() {
        media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST => {
            let value: serde_json::Value = parse_json("manifest", &descriptor.digest, &json)?;
            // A document that is both is read differently by different tools (CVE-2021-41190).
            if value.get("manifests").is_some() {
                return Err(broken(archive.path(), "a manifest that is also an index is refused"));
            }
            parse_json("manifest", &descriptor.digest, &json)
        }
        media_type::OCI_INDEX | media_type::DOCKER_INDEX => {
            let index: Index = parse_json("index", &descriptor.digest, &json)?;
            let host = Platform::host();
            let fits = |d: &&Descriptor| {
                d.platform.as_ref().is_none_or(|p| p.os == host.os && p.architecture == host.architecture)
            };
            let found = index.manifests.iter().find(fits);
            let found = found.ok_or_else(|| broken(archive.path(), &format!("holds no image for {host}")))?;
            pick_manifest(archive, found, depth + 1)
        }
        other => Err(broken(archive.path(), &format!("media type {other:?} is no image manifest"))),
    }
}

fn read_verified(archive: &Archive, descriptor: &Descriptor, max_bytes: u64) -> Result<Vec<u8>, BuildError> {
    let bytes = archive.read_small(&blob_name(&descriptor.digest), max_bytes)?;
    let actual = Digest::of(&bytes);
    if actual != descriptor.digest || bytes.len() as u64 != descriptor.size {
        let reason = format!("blob {} is not what its descriptor says", descriptor.digest);
        return Err(broken(archive.path(), &reason));
    }
    Ok(bytes)
}

fn load_image(
    engine: &Engine,
    archive: &Archive,
    config_json: &[u8],
    layers: Vec<LayerSource>,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    let digest = Digest::of(config_json);
    let config: ImageConfig = parse_json("image config", &digest, config_json)?;
    if config.rootfs.diff_ids.len() != layers.len() {
        let (promised, present) = (config.rootfs.diff_ids.len(), layers.len());
        return Err(broken(
            archive.path(),
            &format!("image {digest} lists {promised} layers, the archive has {present}"),
        ));
    }
    let promised: Vec<Promised> = layers
        .into_iter()
        .zip(&config.rootfs.diff_ids)
        .map(|(source, &diff_id)| Promised { source, diff_id })
        .collect();
    let records = load_layers(engine, archive, &promised, cancel)?;
    // The config's own bytes are kept: their digest is the image's name everywhere else.
    let top = records.last().map(|record| record.snapshot.clone());
    store_image(engine, config_json, &records, top)
}
