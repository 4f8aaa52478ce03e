//! `kiln push`: an image of the store becomes one of a registry.
//!
//! The registry is asked first what it has: a push of what is there sends nothing. What has to be packed is sent
//! while it is (`outbound.rs`), and what leaves as a plain tar while that is written (`plain.rs`). What the store has
//! is compared with its digest on its way out (`checked.rs`).

use std::collections::HashSet;
use std::sync::Arc;

use kiln_content::ImageRecord;
use kiln_oci::image::{Descriptor, Index, Manifest, media_type};
use kiln_oci::{Digest, Reference, document};
use kiln_registry::{BlobSource, Error, Which};

use super::Registries;
use super::checked::StoredBlob;
use super::outbound::Outbound;
use super::plain::{self, Plain};
use crate::export::{Along, Assembled, Compress, LayerContent, ReadyImage, Style, make_ready, whole_index};
use crate::image::parse_json;
use crate::load::MAX_MANIFEST_BYTES;
use crate::{BuildCancel, BuildError, Engine};

/// What to push.
#[derive(Debug, Clone)]
pub struct PushRequest {
    /// The image.
    pub image: ImageRecord,
    /// Under which names.
    pub names: Vec<Reference>,
    /// How layers that were made here are packed.
    pub compress: Compress,
    /// Without the other platforms that it came with.
    pub alone: bool,
}

/// A name that a registry has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushedName {
    /// The name.
    pub name: Reference,
    /// What it leads to.
    pub digest: Digest,
    /// Blobs that were sent, and their bytes.
    pub sent: (usize, u64),
    /// Blobs that the registry took from another repository of its own.
    pub mounted: usize,
}

/// Pushes an image under its names; unless it goes alone, with the other platforms that it came with, if they are all
/// in the store.
///
/// # Errors
/// [`BuildError::Registry`]; those of packing. Names that were pushed before stay.
pub fn push(
    engine: &Engine,
    registries: &Registries,
    request: &PushRequest,
    cancel: &BuildCancel,
) -> Result<Vec<PushedName>, BuildError> {
    let style = Style::new(request.compress);
    let assembled = Assembled::stored(engine, &request.image)?;
    let first = request.names.first();
    let mut outbound = first.map(|name| Outbound::new(engine, registries, name, true)).transpose()?;
    let mut along = outbound.as_mut().map_or(Along::Nobody, Along::Registry);
    let made = make_ready(engine, &assembled, &style, cancel.flag(), &mut along);
    let ready = match (made, &outbound) {
        (Err(error), Some(outbound)) => return Err(outbound.cause(error)),
        (made, _) => made?,
    };
    let index = match request.alone {
        true => None,
        false => whole_index(engine, &request.image, &ready.descriptor.digest)?,
    };
    let root = index.map(|index| index.descriptor);
    push_ready(engine, registries, &ready, root.as_ref(), &request.names, outbound, cancel)
}

/// Pushes `ready`, or the index `root` that it is part of, under `names`. `outbound` has what is on its way to the
/// first of them already.
pub(crate) fn push_ready(
    engine: &Engine,
    registries: &Registries,
    ready: &ReadyImage,
    root: Option<&Descriptor>,
    names: &[Reference],
    outbound: Option<Outbound>,
    cancel: &BuildCancel,
) -> Result<Vec<PushedName>, BuildError> {
    let load = Load::of(engine, ready, root, cancel)?;
    push_load(engine, registries, &load, names, outbound, cancel)
}

/// Pushes the index `root`, with all that it leads to in the store, under `names`.
pub(crate) fn push_index(
    engine: &Engine,
    registries: &Registries,
    root: &Descriptor,
    names: &[Reference],
    cancel: &BuildCancel,
) -> Result<Vec<PushedName>, BuildError> {
    let mut load = Load { blobs: Vec::new(), manifests: Vec::new() };
    load.add_tree(engine, root, &mut HashSet::new())?;
    push_load(engine, registries, &load, names, None, cancel)
}

fn push_load(
    engine: &Engine,
    registries: &Registries,
    load: &Load,
    names: &[Reference],
    mut outbound: Option<Outbound>,
    cancel: &BuildCancel,
) -> Result<Vec<PushedName>, BuildError> {
    let mut pushed = Vec::with_capacity(names.len());
    for name in names {
        let repository = registries.repository(name);
        let root =
            &load.manifests.last().ok_or_else(|| BuildError::Bug { what: "no manifest".to_owned() })?.0;
        // A digest behind the name would be another image's, or this one's.
        let which = name.tag().map_or(Which::Digest(&root.digest), Which::Tag);
        let there = async {
            match repository.resolve_here(which).await {
                Ok(there) => Ok(Some(there.digest)),
                Err(Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let mut done = PushedName { name: name.clone(), digest: root.digest, sent: (0, 0), mounted: 0 };
        let begun = outbound.take().filter(|outbound| outbound.is_to(name));
        if registries.wait(cancel, there)? != Some(root.digest) {
            let mut outbound = begun.map_or_else(|| Outbound::new(engine, registries, name, false), Ok)?;
            outbound.start()?;
            let sent = async { outbound.send(load, which, &mut done).await.map_err(plain::cause) };
            registries.wait(cancel, sent)?;
        }
        pushed.push(done);
    }
    Ok(pushed)
}

/// Everything that a push consists of.
pub(super) struct Load {
    pub(super) blobs: Vec<(Descriptor, Arc<dyn BlobSource>)>,
    /// Each after what it names; the last is what the name leads to.
    pub(super) manifests: Vec<(Descriptor, Vec<u8>)>,
}

impl Load {
    pub(super) fn of(
        engine: &Engine,
        ready: &ReadyImage,
        root: Option<&Descriptor>,
        cancel: &BuildCancel,
    ) -> Result<Self, BuildError> {
        let mut load = Self { blobs: Vec::new(), manifests: Vec::new() };
        for layer in &ready.layers {
            let source: Arc<dyn BlobSource> = match &layer.content {
                LayerContent::Blob => Arc::new(StoredBlob::new(engine, &layer.descriptor)),
                LayerContent::Plain(layer) => {
                    let (engine, layer, cancel) = (engine.clone(), layer.clone(), cancel.clone());
                    Arc::new(Plain { engine, layer, cancel })
                }
            };
            load.add_blob(layer.descriptor.clone(), source);
        }
        let size = ready.config_json.len() as u64;
        let config = Descriptor::new(media_type::OCI_CONFIG, ready.config, size);
        load.add_blob(config, Arc::new(ready.config_json.clone()));
        load.manifests.push((ready.descriptor.clone(), ready.manifest_json.clone()));
        if let Some(root) = root {
            load.add_tree(engine, root, &mut HashSet::from([ready.descriptor.digest]))?;
        }
        Ok(load)
    }

    fn add_blob(&mut self, blob: Descriptor, source: Arc<dyn BlobSource>) {
        if self.blobs.iter().all(|(known, _)| known.digest != blob.digest) {
            self.blobs.push((blob, source));
        }
    }

    /// Adds what `descriptor` leads to, all of which is in the store.
    fn add_tree(
        &mut self,
        engine: &Engine,
        descriptor: &Descriptor,
        seen: &mut HashSet<Digest>,
    ) -> Result<(), BuildError> {
        if !seen.insert(descriptor.digest) {
            return Ok(());
        }
        let (digest, kind) = (descriptor.digest, descriptor.media_type.as_str());
        let read = || engine.store.read_blob(&digest, MAX_MANIFEST_BYTES);
        if document::is_index(kind) {
            let json = read()?;
            let index: Index = parse_json("index", &digest, &json)?;
            index.manifests.iter().try_for_each(|below| self.add_tree(engine, below, seen))?;
            self.manifests.push((descriptor.clone(), json));
        } else if document::is_manifest(kind) {
            let json = read()?;
            let manifest: Manifest = parse_json("manifest", &digest, &json)?;
            for blob in manifest.layers.into_iter().chain([manifest.config]) {
                self.add_tree(engine, &blob, seen)?;
            }
            self.manifests.push((descriptor.clone(), json));
        } else {
            self.add_blob(descriptor.clone(), Arc::new(StoredBlob::new(engine, descriptor)));
        }
        Ok(())
    }
}
