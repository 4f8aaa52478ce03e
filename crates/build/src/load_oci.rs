//! Images out of OCI layouts: indexes, platforms, manifests.

use std::collections::{BTreeSet, HashMap, HashSet};

use kiln_content::ImageRecord;
use kiln_oci::document::{self, DocumentError, is_index, is_manifest};
use kiln_oci::image::{Descriptor, ImageConfig, Index, Manifest, media_type};
use kiln_oci::{Digest, Platform, Reference};

use crate::archive::{Archive, broken};
use crate::cancel::BuildCancel;
use crate::image::MAX_CONFIG_BYTES;
use crate::load::{Config, Loaded, MAX_MANIFEST_BYTES, load_image};
use crate::load_layers::LayerSource;
use crate::platforms::serves;
use crate::reread::is_readable;
use crate::{BuildError, Engine};

/// Indexes within indexes are followed this far.
pub(crate) const MAX_INDEX_DEPTH: usize = 4;
/// A docker archive's manifests beyond this are not looked at.
const MAX_MANIFESTS_BYTES: usize = 64 << 20;

/// A manifest that was chosen, as it came.
pub(crate) struct Picked {
    pub(crate) json: Vec<u8>,
    pub(crate) manifest: Manifest,
    /// The entry of `index.json` that led to it.
    pub(crate) root: Descriptor,
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
    let (mut loaded, mut others): (Vec<Loaded>, _) = (Vec::new(), Others::default());
    // The same again is the same image again.
    let mut seen: HashMap<Digest, Digest> = HashMap::new();
    for descriptor in &index.manifests {
        let name = oci_name(descriptor);
        let known = seen.get(&descriptor.digest).map(|config| (config, &mut loaded));
        if let Some((config, loaded)) = known {
            loaded
                .iter_mut()
                .filter(|it| it.image.config == *config)
                .for_each(|it| it.names.extend(name.clone()));
            continue;
        }
        // Some tools list one manifest for each platform under the same name.
        let same = |other: &&Descriptor| oci_name(other) == name;
        let nearest = index.manifests.iter().filter(same).filter_map(|other| distance(other, wanted)).min();
        let alone = platform.is_none() && nearest.is_none();
        let own = distance(descriptor, wanted);
        let is_beaten = descriptor.platform.is_some() && own > nearest;
        if is_beaten || (own.is_none() && (!alone || is_attestation(descriptor))) {
            others.see(descriptor);
            continue;
        }
        if index.manifests.len() > 1 && refers(archive, descriptor) {
            continue;
        }
        let picked = pick_manifest(archive, descriptor, wanted, 0)?;
        if platform.is_some() && !others.is_for(&read_config(archive, &picked.manifest)?.1, platform) {
            continue;
        }
        let image = load_picked(engine, archive, &picked, platform.is_none(), cancel)?;
        seen.insert(descriptor.digest, image.config);
        // One image under several names is one image.
        match loaded.iter_mut().find(|known| known.image.config == image.config) {
            Some(known) => known.names.extend(name),
            None => loaded.push(Loaded { image, names: name.into_iter().collect() }),
        }
    }
    others.check(archive, platform, &loaded)?;
    Ok(loaded)
}

/// Platforms of the images that were passed over.
#[derive(Default)]
pub(crate) struct Others(BTreeSet<String>);

impl Others {
    fn see(&mut self, descriptor: &Descriptor) {
        if !is_attestation(descriptor) {
            self.0.extend(descriptor.platform.as_ref().map(ToString::to_string));
        }
    }

    /// Whether the image with this config is for `platform`; always, when there is none.
    pub(crate) fn is_for(&mut self, config: &ImageConfig, platform: Option<&Platform>) -> bool {
        let fits = platform.is_none_or(|wanted| serves(wanted, config));
        if !fits {
            self.0.insert(config.platform().to_string());
        }
        fits
    }

    /// Nothing loaded for a platform that was asked for is an error.
    pub(crate) fn check(
        self,
        archive: &Archive,
        platform: Option<&Platform>,
        loaded: &[Loaded],
    ) -> Result<(), BuildError> {
        match platform {
            Some(wanted) if loaded.is_empty() => Err(self.none_for(archive, wanted)),
            _ => Ok(()),
        }
    }

    fn none_for(self, archive: &Archive, wanted: &Platform) -> BuildError {
        let mut available: Vec<String> = self.0.into_iter().take(20).collect();
        if available.is_empty() {
            available.push("what is for none".to_owned());
        }
        BuildError::NoPlatform {
            path: archive.path().to_owned(),
            wanted: Box::new(wanted.clone()),
            available,
        }
    }
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
        for leaf in listed.blobs.iter().filter(|leaf| is_manifest(&leaf.media_type)) {
            let Ok(json) = read_blob(archive, leaf, MAX_MANIFEST_BYTES) else { continue };
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

/// The index of an OCI layout.
pub(crate) fn layout_index(archive: &Archive) -> Result<Index, BuildError> {
    let json = archive.read_small("index.json", MAX_MANIFEST_BYTES)?;
    archive.parse("index.json", &json, |json| document::read_index(json, media_type::OCI_INDEX))
}

/// How far what `descriptor` points to is from an image for `wanted`; `None`: it is none. What does not say
/// may be one, or hold one, and comes last.
fn distance(descriptor: &Descriptor, wanted: &Platform) -> Option<usize> {
    match &descriptor.platform {
        Some(has) => wanted.distance(has),
        None => Some(usize::MAX),
    }
}

/// The entry of `index` that is nearest to `wanted`; of equals the first.
pub(crate) fn nearest<'a>(index: &'a Index, wanted: &Platform) -> Option<&'a Descriptor> {
    let reached = index.manifests.iter().filter_map(|below| Some((distance(below, wanted)?, below)));
    reached.min_by_key(|(distance, _)| *distance).map(|(_, below)| below)
}

/// What BuildKit says about an image stands beside it, as a manifest for no platform.
fn is_attestation(descriptor: &Descriptor) -> bool {
    descriptor.platform.as_ref().is_some_and(|platform| platform.os == "unknown")
}

/// Whether an entry of a layout's index is about another one: a signature, say. What cannot be read says nothing.
pub(crate) fn refers(archive: &Archive, descriptor: &Descriptor) -> bool {
    let kind = descriptor.media_type.as_str();
    let is_read = (is_manifest(kind) || is_index(kind)) && archive.contains(&blob_name(&descriptor.digest));
    let json = is_read.then(|| read_blob(archive, descriptor, MAX_MANIFEST_BYTES).ok()).flatten();
    let referring = json.and_then(|json| document::read_referring(&json).ok());
    referring.is_some_and(|referring| referring.subject.is_some())
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
    if keep && is_index(&picked.root.media_type) {
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
    let read = if archive.heals() { layer_blobs(engine, image)? } else { HashSet::new() };
    let mut blobs = Vec::with_capacity(listed.len());
    for blob in listed {
        if kiln_solver::Cancellation::is_cancelled(cancel) {
            return Err(BuildError::Cancelled);
        }
        engine.store.hold_blob(&blob.digest)?;
        let name = blob_name(&blob.digest);
        let is_whole = match engine.store.has_blob(&blob.digest) {
            true if archive.heals() && !read.contains(&blob.digest) && archive.contains(&name) => {
                is_readable(engine, &blob.digest, cancel)?
            }
            there => there,
        };
        if !is_whole && archive.is_in_store() {
            // It has come there, verified, once it is there.
            archive.settle(&name)?;
        } else if !is_whole {
            let (mut reader, _) = archive.read(&name)?;
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

/// The blobs that an image's layers came as, which loading it has read.
fn layer_blobs(engine: &Engine, image: &ImageRecord) -> Result<HashSet<Digest>, BuildError> {
    let chain = image.snapshot.as_ref().and_then(|top| engine.snapshots.chain(top).ok());
    let mut blobs = HashSet::new();
    for id in chain.unwrap_or_default() {
        let layer = engine.store.layer(&id)?;
        blobs.extend(layer.and_then(|layer| layer.blob).map(|blob| blob.digest));
    }
    Ok(blobs)
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
        check_depth(archive, descriptor, depth)?;
        if !self.seen.insert(descriptor.digest) {
            return Ok(());
        }
        self.blobs.push(descriptor.clone());
        let there = archive.contains(&blob_name(&descriptor.digest));
        if is_index(&descriptor.media_type) && there {
            let json = read_blob(archive, descriptor, MAX_MANIFEST_BYTES)?;
            let index = parse_index(archive, descriptor, &json)?;
            return index.manifests.iter().try_for_each(|below| self.add(archive, below, depth + 1));
        }
        if is_manifest(&descriptor.media_type) && there {
            let json = read_blob(archive, descriptor, MAX_MANIFEST_BYTES)?;
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
    load_parts(engine, archive, &picked.manifest, Some(&picked.json), cancel)
}

/// The same without the manifest. What the store keeps of one is kept for the image, whatever names it has: not
/// everybody who brings an image may say what the others with the same config are.
pub(crate) fn load_image_alone(
    engine: &Engine,
    archive: &Archive,
    picked: &Picked,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    load_parts(engine, archive, &picked.manifest, None, cancel)
}

fn load_parts(
    engine: &Engine,
    archive: &Archive,
    manifest: &Manifest,
    manifest_json: Option<&[u8]>,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    let (config, _) = read_config(archive, manifest)?;
    let mut layers = Vec::with_capacity(manifest.layers.len());
    for layer in &manifest.layers {
        let name = blob_name(&layer.digest);
        // Whoever wrote the image would choose what this machine asks whom for.
        if layer.extra.contains_key("urls") && !archive.contains(&name) {
            let (path, digest) = (archive.path().to_owned(), layer.digest);
            return Err(BuildError::ForeignLayer { path, digest });
        }
        layers.push(LayerSource { name, expected: Some((layer.digest, layer.size)) });
    }
    load_image(engine, archive, &config, layers, manifest_json, cancel)
}

fn read_config(archive: &Archive, manifest: &Manifest) -> Result<(Config, ImageConfig), BuildError> {
    let member = blob_name(&manifest.config.digest);
    let json = read_blob(archive, &manifest.config, MAX_CONFIG_BYTES)?;
    let layers = manifest.layers.len();
    let parsed = archive.parse(&member, &json, |json| document::read_config(json, layers))?;
    Ok((Config { member, json }, parsed))
}

/// The manifest for `platform` behind `descriptor`, through nested indexes.
pub(crate) fn pick_manifest(
    archive: &Archive,
    descriptor: &Descriptor,
    platform: &Platform,
    depth: usize,
) -> Result<Picked, BuildError> {
    check_depth(archive, descriptor, depth)?;
    let kind = &descriptor.media_type;
    if !is_manifest(kind) && !is_index(kind) {
        return Err(archive.refused(&blob_name(&descriptor.digest), document::unknown_kind(kind)));
    }
    let json = read_blob(archive, descriptor, MAX_MANIFEST_BYTES)?;
    if is_manifest(kind) {
        let manifest = parse_manifest(archive, descriptor, &json)?;
        return Ok(Picked { json, manifest, root: descriptor.clone() });
    }
    let index = parse_index(archive, descriptor, &json)?;
    let Some(found) = nearest(&index, platform) else {
        let mut others = Others::default();
        index.manifests.iter().for_each(|below| others.see(below));
        return Err(others.none_for(archive, platform));
    };
    let picked = pick_manifest(archive, found, platform, depth + 1)?;
    Ok(Picked { root: descriptor.clone(), ..picked })
}

pub(crate) fn check_depth(
    archive: &Archive,
    descriptor: &Descriptor,
    depth: usize,
) -> Result<(), BuildError> {
    if depth > MAX_INDEX_DEPTH {
        let nested = DocumentError::Nested { limit: MAX_INDEX_DEPTH };
        return Err(archive.refused(&blob_name(&descriptor.digest), nested));
    }
    Ok(())
}

pub(crate) fn parse_manifest(
    archive: &Archive,
    descriptor: &Descriptor,
    json: &[u8],
) -> Result<Manifest, BuildError> {
    let read = |json: &[u8]| document::read_manifest(json, &descriptor.media_type);
    archive.parse(&blob_name(&descriptor.digest), json, read)
}

pub(crate) fn parse_index(
    archive: &Archive,
    descriptor: &Descriptor,
    json: &[u8],
) -> Result<Index, BuildError> {
    let read = |json: &[u8]| document::read_index(json, &descriptor.media_type);
    archive.parse(&blob_name(&descriptor.digest), json, read)
}

fn read_blob(archive: &Archive, descriptor: &Descriptor, max_bytes: u64) -> Result<Vec<u8>, BuildError> {
    read_verified(archive, &blob_name(&descriptor.digest), descriptor, max_bytes)
}

/// The document `member`, if it is what its descriptor says.
pub(crate) fn read_verified(
    archive: &Archive,
    member: &str,
    descriptor: &Descriptor,
    max_bytes: u64,
) -> Result<Vec<u8>, BuildError> {
    let bytes = archive.read_small(member, max_bytes)?;
    let (actual, actual_bytes) = (Digest::of(&bytes), bytes.len() as u64);
    let (expected, expected_bytes) = (descriptor.digest, descriptor.size);
    if (actual, actual_bytes) != (expected, expected_bytes) {
        let source = kiln_content::Error::Mismatch { expected, expected_bytes, actual, actual_bytes };
        let (path, member) = (archive.path().to_owned(), member.to_owned());
        let source = Box::new(source);
        return Err(BuildError::NotPromised { path, member, source });
    }
    Ok(bytes)
}
