//! Images that are copied into the store: they are unpacked there.

use std::sync::Arc;

use kiln_content::ImageRecord;
use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Platform, Reference, document};

use super::source::Source;
use super::tree::Tree;
use super::{Place, Which};
use crate::image::MAX_CONFIG_BYTES;
use crate::load::{blob_name, load_picked, pick_manifest, read_verified};
use crate::registry::Registries;
use crate::registry::pull::layers_there;
use crate::{BuildCancel, BuildError, Engine};

/// Copies an image into the store, under `name` and no other; its digest, and what it is there. With [`Which::All`]
/// this machine's is unpacked, and the others stay beside it as they come. `note` hears a line about what is fetched.
///
/// # Errors
/// As [`copy`](super::copy()), and those of unpacking. No name has moved then.
pub fn copy_in(
    engine: &Engine,
    registries: &Arc<Registries>,
    (from, which): (&Place, &Which),
    name: &Reference,
    cancel: &BuildCancel,
    note: &dyn Fn(&str),
) -> Result<(Digest, ImageRecord), BuildError> {
    let (source, _abort) = Source::open(engine, registries, from, cancel)?;
    let tree = Tree::read(&source, which)?;
    let root = tree.root()?.clone();
    let mut picked = match (which, &source.own) {
        (Which::All, Some(own)) => pick_manifest(&source.archive, own, &Platform::host(), 0)?,
        _ => pick_manifest(&source.archive, &root, &Platform::host(), 0)?,
    };
    picked.root = root.clone();
    if let Some(fetch) = &source.fetch {
        let config = &picked.manifest.config;
        let member = blob_name(&config.digest);
        let json = read_verified(&source.archive, &member, config, MAX_CONFIG_BYTES)?;
        let layers = &picked.manifest.layers;
        let config =
            source.archive.parse(&member, &json, |json| document::read_config(json, layers.len()))?;
        let known = layers_there(engine, &config)?;
        // Layers of the image first, the lowest first; what the store has unpacked need not come.
        let others = tree.blobs.iter().filter(|blob| !layers.contains(blob) && *which == Which::All);
        let wanted: Vec<&Descriptor> = layers[known..].iter().chain(others).collect();
        let (missing, bytes) = fetch.start_all(&wanted)?;
        if missing > 0 {
            let shown = source.archive.path().display();
            note(&format!("{shown}: fetching {missing} of {} blobs, {bytes} bytes", tree.blobs.len()));
        }
    }
    let image = load_picked(engine, &source.archive, &picked, *which == Which::All, cancel)?;
    engine.store.set_name(name, &image)?;
    engine.store.barrier()?;
    Ok((root.digest, image))
}
