//! Images out of OCI layouts: indexes, platforms, manifests.

use std::collections::{HashMap, HashSet};

use kiln_content::ImageRecord;
use kiln_oci::image::{Descriptor, ImageConfig, Index, Manifest, media_type};
use kiln_oci::{Digest, Platform, Reference};

use crate::archive::{Archive, broken};
use crate::cancel::BuildCancel;
use crate::image::{MAX_CONFIG_BYTES, parse_json};
use crate::load::{Loaded, MAX_MANIFEST_BYTES, load_image};
use crate::load_layers::LayerSource;
use crate::{BuildError, Engine};

/// Indexes within indexes are followed this far.
const MAX_INDEX_DEPTH: usize = 4;
/// A docker archive's manifests beyond this are not looked at.
const MAX_MANIFESTS_BYTES: usize = 64 << 20;

/// A manifest that was chosen, as it came.
pub(crate) struct Picked {
    json: Vec<u8>,
    manifest: Manifest,
    /// The entry of `index.json` that led to it.
    root: Descriptor,
}

pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The name in an index's annotations. A bare tag (`latest`) says nothing about the repository.
pub(crate) fn oci_name(descriptor: &Descriptor) -> Option<Reference> {
    let full = descriptor.annotations.get("io.containerd.image.name");
    let short = descriptor.annotations.get("org.opencontainers.image.ref.name");
    let name = full.or(short.filter(|name| name.contains([':', '/', '@'])))?;
    name.parse().ok()
}

/// Loads what `index.json` lists, for `platform`.
pub(crate) fn load_oci(
    engine: &Engine,
    archive: &Archive,
    platform: Option<&Platform>,
    cancel: &BuildCancel,
) -> Result<Vec<Loaded>, BuildError> {
    let index = layout_index(archive)?;
    let host = Platform::host();
    let wanted = platform.unwrap_or(&host);
    let mut loaded: Vec<Loaded> = Vec::new();
    for descriptor in &index.manifests {
        let name = oci_name(descriptor);
        // Some tools list one manifest for each platform under the same name.
        let better = |other: &Descriptor| oci_name(other) == name && fits(other, wanted);
        let alone = platform.is_none() && !index.manifests.iter().any(better);
        if !fits(descriptor, wanted) && (!alone || is_attestation(descriptor)) {
            continue;
        }
        let picked = pick_manifest(archive, descriptor, wanted, 0)?;
        if !is_for(&read_verified(archive, &picked.manifest.config, MAX_CONFIG_BYTES)?, platform)? {
            continue;
        }
        let image = load_picked(engine, archive, &picked, platform.is_none(), cancel)?;
        // One image under several names is one image.
        match loaded.iter_mut().find(|known| known.image.config == image.config) {
            Some(known) => known.names.extend(name),
            None => loaded.push(Loaded { image, names: name.into_iter().collect() }),
        }
    }
    Ok(loaded)
}

/// The image of a layout that has one.
pub(crate) fn load_only_image(
    engine: &Engine,
    archive: &Archive,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    let index = layout_index(archive)?;
    let only = index.manifests.first().ok_or_else(|| broken(archive.path(), "lists no image"))?;
    load_manifest(engine, archive, &pick_manifest(archive, only, &Platform::host(), 0)?, cancel)
}

/// The images that a docker archive's OCI layout leads to, by the digest of their config. None when it
/// is broken: then `manifest.json` alone counts.
pub(crate) fn manifests_by_config(archive: &Archive) -> HashMap<Digest, Picked> {
    let mut found = HashMap::new();
    if !archive.contains("index.json") {
        return found;
    }
    let Ok(index) = layout_index(archive) else { return found };
    let mut left_bytes = MAX_MANIFESTS_BYTES;
    for root in &index.manifests {
        let mut listed = Listed::default();
        if listed.add(archive, root, 0).is_err() {
            continue;
        }
        for leaf in listed.blobs.iter().filter(|leaf| is_manifest(leaf)) {
            let Ok(json) = read_verified(archive, leaf, MAX_MANIFEST_BYTES) else { continue };
            let Ok(manifest) = parse_manifest(archive, leaf, &json) else { continue };
            left_bytes = left_bytes.saturating_sub(json.len());
            if left_bytes == 0 {
                return found;
            }
            let root = root.clone();
            found.entry(manifest.config.digest).or_insert(Picked { json, manifest, root });
        }
    }
    found
}

fn layout_index(archive: &Archive) -> Result<Index, BuildError> {
    let json = archive.read_small("index.json", MAX_MANIFEST_BYTES)?;
    parse_json("index.json", &Digest::of(&json), &json)
}

/// Whether the image with this config is for `platform`; always, when there is none.
pub(crate) fn is_for(config_json: &[u8], platform: Option<&Platform>) -> Result<bool, BuildError> {
    let Some(wanted) = platform else { return Ok(true) };
    let config: ImageConfig = parse_json("image config", &Digest::of(config_json), config_json)?;
    Ok(matches(&config.os, &config.architecture, config.variant.as_deref(), wanted))
}

fn matches(os: &str, architecture: &str, variant: Option<&str>, wanted: &Platform) -> bool {
    let variants = (variant, wanted.variant.as_deref());
    os == wanted.os
        && architecture == wanted.architecture
        && !matches!(variants, (Some(has), Some(wants)) if has != wants)
}

/// Whether what `descriptor` points to may be, or hold, an image for `wanted`.
fn fits(descriptor: &Descriptor, wanted: &Platform) -> bool {
    descriptor
        .platform
        .as_ref()
        .is_none_or(|has| matches(&has.os, &has.architecture, has.variant.as_deref(), wanted))
}

/// What BuildKit says about an image stands beside it, as a manifest for no platform.
fn is_attestation(descriptor: &Descriptor) -> bool {
    descriptor.platform.as_ref().is_some_and(|platform| platform.os == "unknown")
}

fn is_manifest(descriptor: &Descriptor) -> bool {
    matches!(descriptor.media_type.as_str(), media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST)
}

fn is_index(descriptor: &Descriptor) -> bool {
    matches!(descriptor.media_type.as_str(), media_type::OCI_INDEX | media_type::DOCKER_INDEX)
}

/// Loads the image of a manifest. With `keep`, the index that led to it stays beside the image, with
/// all that it lists, if all of that is in the archive.
pub(crate) fn load_picked(
    engine: &Engine,
    archive: &Archive,
    picked: &Picked,
    keep: bool,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    let image = load_manifest(engine, archive, picked, cancel)?;
    if keep && is_index(&picked.root) {
        let mut listed = Listed::default();
        listed.add(archive, &picked.root, 0)?;
        let there = |blob: &Descriptor| {
            engine.store.has_blob(&blob.digest) || archive.contains(&blob_name(&blob.digest))
        };
        if listed.blobs.iter().all(there) {
            keep_index(engine, archive, &image, &picked.root.digest, &listed.blobs, cancel)?;
        }
    }
    Ok(image)
}

fn keep_index(
    engine: &Engine,
    archive: &Archive,
    image: &ImageRecord,
    index: &Digest,
    listed: &[Descriptor],
    cancel: &BuildCancel,
) -> Result<(), BuildError> {
    let mut blobs = Vec::with_capacity(listed.len());
    for blob in listed {
        if kiln_solver::Cancellation::is_cancelled(cancel) {
            return Err(BuildError::Cancelled);
        }
        engine.store.hold_blob(&blob.digest)?;
        if !engine.store.has_blob(&blob.digest) {
            let (mut reader, _) = archive.read(&blob_name(&blob.digest))?;
            let mut ingest = engine.store.ingest()?;
            std::io::copy(&mut reader, &mut ingest).map_err(|error| {
                broken(archive.path(), &format!("{} cannot be copied ({error})", blob.digest))
            })?;
            ingest.commit(Some((blob.digest, blob.size)))?;
        }
        blobs.push(blob.digest);
    }
    Ok(engine.store.keep_index(&image.config, index, &blobs)?)
}

/// What a descriptor leads to, itself included, each once: indexes may name each other's parts as often as
/// they like.
#[derive(Default)]
struct Listed {
    blobs: Vec<Descriptor>,
    seen: HashSet<Digest>,
}

impl Listed {
    fn add(&mut self, archive: &Archive, descriptor: &Descriptor, depth: usize) -> Result<(), BuildError> {
        if depth > MAX_INDEX_DEPTH {
            return Err(broken(archive.path(), "indexes are nested too deeply"));
        }
        if !self.seen.insert(descriptor.digest) {
            return Ok(());
        }
        self.blobs.push(descriptor.clone());
        let there = archive.contains(&blob_name(&descriptor.digest));
        if is_index(descriptor) && there {
            let json = read_verified(archive, descriptor, MAX_MANIFEST_BYTES)?;
            let index: Index = parse_json("index", &descriptor.digest, &json)?;
            return index.manifests.iter().try_for_each(|below| self.add(archive, below, depth + 1));
        }
        if is_manifest(descriptor) && there {
            let json = read_verified(archive, descriptor, MAX_MANIFEST_BYTES)?;
            let manifest = parse_manifest(archive, descriptor, &json)?;
            let parts = [manifest.config].into_iter().chain(manifest.layers);
            self.blobs.extend(parts.filter(|part| self.seen.insert(part.digest)));
        }
        Ok(())
    }
}

/// Loads the image of a manifest.
pub(crate) fn load_manifest(
    engine: &Engine,
    archive: &Archive,
    picked: &Picked,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    let config = read_verified(archive, &picked.manifest.config, MAX_CONFIG_BYTES)?;
    let layers = picked.manifest.layers.iter().map(|layer| LayerSource {
        name: blob_name(&layer.digest),
        expected: Some((layer.digest, layer.size)),
    });
    load_image(engine, archive, &config, layers.collect(), Some(&picked.json), cancel)
}

/// The manifest for `platform` behind `descriptor`, through nested indexes.
pub(crate) fn pick_manifest(
    archive: &Archive,
    descriptor: &Descriptor,
    platform: &Platform,
    depth: usize,
) -> Result<Picked, BuildError> {
    if depth > MAX_INDEX_DEPTH {
        return Err(broken(archive.path(), "indexes are nested too deeply"));
    }
    let json = read_verified(archive, descriptor, MAX_MANIFEST_BYTES)?;
    if is_manifest(descriptor) {
        let manifest = parse_manifest(archive, descriptor, &json)?;
        return Ok(Picked { json, manifest, root: descriptor.clone() });
    }
    if !is_index(descriptor) {
        let kind = &descriptor.media_type;
        return Err(broken(archive.path(), &format!("media type {kind:?} is no image manifest")));
    }
    let index: Index = parse_json("index", &descriptor.digest, &json)?;
    let found = index.manifests.iter().find(|below| fits(below, platform));
    let found = found.ok_or_else(|| broken(archive.path(), &format!("holds no image for {platform}")))?;
    let picked = pick_manifest(archive, found, platform, depth + 1)?;
    Ok(Picked { root: descriptor.clone(), ..picked })
}

fn parse_manifest(archive: &Archive, descriptor: &Descriptor, json: &[u8]) -> Result<Manifest, BuildError> {
    let value: serde_json::Value = parse_json("manifest", &descriptor.digest, json)?;
    // A document that is both is read differently by different tools (CVE-2021-41190).
    if value.get("manifests").is_some() {
        return Err(broken(archive.path(), "a manifest that is also an index is refused"));
    }
    parse_json("manifest", &descriptor.digest, json)
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
