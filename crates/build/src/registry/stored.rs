//! Images of the store for a platform: one name may stand for several.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use kiln_content::ImageRecord;
use kiln_oci::image::{Descriptor, ImageConfig};
use kiln_oci::{Digest, Platform, Reference, document};

use super::base::naming;
use super::pull::{pulled_for, stored_root};
use crate::archive::{Archive, Blobs};
use crate::image::read_config;
use crate::load::{MAX_MANIFEST_BYTES, blob_name, load_picked, pick_manifest};
use crate::platforms::serves;
use crate::{BuildCancel, BuildError, Engine};

/// An image of the store, with its config where that was read.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) image: ImageRecord,
    config: Option<Arc<ImageConfig>>,
}

impl Stored {
    /// Of which nothing has been read.
    pub(crate) fn unread(image: ImageRecord) -> Self {
        Self { image, config: None }
    }

    /// With its config.
    pub(super) fn read(image: ImageRecord, config: ImageConfig) -> Self {
        Self { image, config: Some(Arc::new(config)) }
    }

    /// The image's config, read unless somebody has.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn into_config(self, engine: &Engine) -> Result<ImageConfig, BuildError> {
        match self.config {
            Some(config) => Ok(Arc::unwrap_or_clone(config)),
            None => read_config(engine, &self.image.config),
        }
    }
}

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
    Ok(stored(engine, reference, platform, cancel)?.map(|stored| stored.image))
}

/// The same, with the config if it had to be read.
///
/// # Errors
/// As [`stored_image`].
pub(super) fn stored(
    engine: &Engine,
    reference: &Reference,
    platform: &Platform,
    cancel: &BuildCancel,
) -> Result<Option<Stored>, BuildError> {
    match engine.store.resolve(reference)? {
        Some(named) => {
            let config = read_config(engine, &named.config)?;
            if serves(platform, &config) {
                return Ok(Some(Stored::read(named, config)));
            }
            if let Some(beside) = beside(engine, &named, reference, platform, cancel)? {
                return Ok(Some(Stored::unread(beside)));
            }
        }
        // What had the name and lost it was removed.
        None if *platform == Platform::host() => return Ok(None),
        None => {}
    }
    Ok(pulled_for(engine, reference, platform)?.map(Stored::unread))
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
    let archive = in_store(engine, &shown);
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

/// The image for `platform` behind the manifest or index that `reference` names by its digest, under whatever name it
/// came. It gets this one as well, as if it had been pulled by it.
///
/// Costs reading three documents, once.
///
/// # Errors
/// Those of the store.
pub(super) fn behind_digest(
    engine: &Engine,
    reference: &Reference,
    platform: &Platform,
) -> Result<Option<Stored>, BuildError> {
    let Some(digest) = reference.digest() else { return Ok(None) };
    let Some(root) = stored_root(engine, digest)? else { return Ok(None) };
    let shown = reference.familiar();
    let archive = in_store(engine, &shown);
    // What of it is not here, or is damaged, is the registry's to give.
    let Ok(picked) = pick_manifest(&archive, &root.descriptor(), platform, 0) else { return Ok(None) };
    let image = engine.store.image(&picked.manifest.config.digest)?;
    let Some(image) = image.filter(|image| is_unpacked(engine, image)) else { return Ok(None) };
    let Ok(config) = read_config(engine, &image.config) else { return Ok(None) };
    if !serves(platform, &config) {
        return Ok(None);
    }
    naming(engine, reference, platform)?.settle(engine, reference, platform, &image, *digest)?;
    Ok(Some(Stored::read(image, config)))
}

/// Whether the files of `image` are there.
pub(super) fn is_unpacked(engine: &Engine, image: &ImageRecord) -> bool {
    image.snapshot.as_ref().is_none_or(|snapshot| engine.snapshots.contains(snapshot))
}

/// An image whose blobs are all in the store, as an archive of this name.
pub(super) fn in_store(engine: &Engine, name: &str) -> Archive {
    Archive::of_blobs(Path::new(name), engine.store.clone(), InStore)
}

struct InStore;

impl Blobs for InStore {
    fn bring(&self, _digest: &Digest) -> Result<(), BuildError> {
        Ok(())
    }

    fn early(&self, _digest: &Digest) -> Option<(Box<dyn Read + Send>, u64)> {
        None
    }
}

#[cfg(test)]
mod tests {
    use kiln_content::ImageRecord;

    use super::*;
    use crate::image::store_image;
    use crate::source::tests::Bench;

    fn named(bench: &Bench, name: &str, platform: &Platform) -> (Reference, ImageRecord) {
        let reference: Reference = name.parse().unwrap();
        let json = kiln_oci::image::to_json(&ImageConfig::empty(platform));
        let image = store_image(&bench.engine, &json, &[], None, None).unwrap();
        bench.engine.store.set_name(&reference, &image).unwrap();
        (reference, image)
    }

    #[test]
    fn a_config_that_was_read_is_handed_on() {
        let bench = Bench::new();
        let host = Platform::host();
        let (reference, image) = named(&bench, "app:v1", &host);
        let found = stored(&bench.engine, &reference, &host, &bench.cancel).unwrap().unwrap();
        assert_eq!(found.image, image);
        // Nobody reads it again: it could not be.
        let blob = bench.engine.store.root().join("blobs/sha256");
        std::fs::remove_dir_all(blob).unwrap();
        assert_eq!(found.into_config(&bench.engine).unwrap(), ImageConfig::empty(&host));
        assert!(Stored::unread(image).into_config(&bench.engine).is_err());
    }

    #[test]
    fn the_image_of_a_name_that_is_for_another_platform_is_not_taken() {
        let bench = Bench::new();
        let (reference, _) = named(&bench, "app:v1", &Platform::new("linux", "s390x"));
        let wanted = Platform::new("linux", "riscv64");
        assert!(stored(&bench.engine, &reference, &wanted, &bench.cancel).unwrap().is_none());
    }
}
