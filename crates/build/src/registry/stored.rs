//! Images of the store for a platform: one name may stand for several.

use std::io::Read;
use std::path::Path;

use kiln_content::ImageRecord;
use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Platform, Reference, document};

use super::pull::pulled_for;
use crate::archive::{Archive, Blobs};
use crate::load::{MAX_MANIFEST_BYTES, blob_name, load_picked, pick_manifest};
use crate::platforms::stored_platform;
use crate::{BuildCancel, BuildError, Engine};

/// The image of the store that `reference` means for `platform`: the one that has the name, one that is in an
/// index beside it, or one that was pulled for that platform. `None`: there is none.
///
/// Costs a look-up and reading a config; an image in an index is unpacked the first time.
///
/// # Errors
/// Those of the store, and of unpacking.
pub fn stored_image(
    engine: &Engine,
    reference: &Reference,
    platform: &Platform,
    cancel: &BuildCancel,
) -> Result<Option<ImageRecord>, BuildError> {
    match engine.store.resolve(reference)? {
        Some(named) => {
            if stored_platform(engine, &named, platform)?.1 {
                return Ok(Some(named));
            }
            if let Some(beside) = beside(engine, &named, reference, platform, cancel)? {
                return Ok(Some(beside));
            }
        }
        // What had the name and lost it was removed.
        None if *platform == Platform::host() => return Ok(None),
        None => {}
    }
    pulled_for(engine, reference, platform)
}

/// The image for `platform` in the index that `named` is kept with.
fn beside(
    engine: &Engine,
    named: &ImageRecord,
    reference: &Reference,
    platform: &Platform,
    cancel: &BuildCancel,
) -> Result<Option<ImageRecord>, BuildError> {
    let Some(index) = engine.store.index_of(&named.config)? else { return Ok(None) };
    let shown = reference.familiar();
    let archive = Archive::of_blobs(Path::new(&shown), engine.store.clone(), InStore);
    let name = blob_name(&index);
    let json = archive.read_small(&name, MAX_MANIFEST_BYTES)?;
    let kind = archive.parse(&name, &json, document::own_media_type)?;
    let root = Descriptor::new(&kind, index, json.len() as u64);
    let picked = match pick_manifest(&archive, &root, platform, 0) {
        Err(BuildError::NoPlatform { .. }) => return Ok(None),
        picked => picked?,
    };
    let there = engine.store.image(&picked.manifest.config.digest)?;
    if let Some(there) = there.filter(|image| is_unpacked(engine, image)) {
        return Ok(Some(there));
    }
    load_picked(engine, &archive, &picked, false, cancel).map(Some)
}

/// Whether the files of `image` are there.
pub(super) fn is_unpacked(engine: &Engine, image: &ImageRecord) -> bool {
    image.snapshot.as_ref().is_none_or(|snapshot| engine.snapshots.contains(snapshot))
}

/// Blobs that are all in the store.
struct InStore;

impl Blobs for InStore {
    fn bring(&self, _digest: &Digest) -> Result<(), BuildError> {
        Ok(())
    }

    fn early(&self, _digest: &Digest) -> Option<(Box<dyn Read + Send>, u64)> {
        None
    }
}
