//! What the store has that was said of an image.

use kiln_content::ImageRecord;
use kiln_oci::image::{Descriptor, Index, Manifest};
use kiln_oci::{Digest, Platform};

use crate::export::{PREDICATE_TYPE, is_attestation_of};
use crate::image::parse_json;
use crate::load::MAX_MANIFEST_BYTES;
use crate::{BuildError, Engine};

/// A statement about an image of an index.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredAttestation {
    /// What the image is for; `None`: the index does not say.
    pub platform: Option<Platform>,
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// What is said, a URI.
    pub predicate_type: String,
    /// Points to the statement.
    pub statement: Descriptor,
}

/// The index that is kept beside `image`, and the statements that it lists.
///
/// # Errors
/// Those of the store; [`BuildError::Json`] for what is no index or manifest.
pub fn attestations(
    engine: &Engine,
    image: &ImageRecord,
) -> Result<Option<(Digest, Vec<StoredAttestation>)>, BuildError> {
    let Some(root) = engine.store.index_of(&image.config)? else { return Ok(None) };
    let json = engine.store.read_blob(&root, MAX_MANIFEST_BYTES)?;
    let index: Index = parse_json("index", &root, &json)?;
    let mut found = Vec::new();
    for listed in &index.manifests {
        let Some(manifest) = is_attestation_of(listed) else { continue };
        let of = index.manifests.iter().find(|other| other.digest == manifest);
        let platform = of.and_then(|of| of.platform.clone());
        let json = engine.store.read_blob(&listed.digest, MAX_MANIFEST_BYTES)?;
        let parsed: Manifest = parse_json("manifest", &listed.digest, &json)?;
        for statement in parsed.layers {
            let Some(predicate_type) = statement.annotations.get(PREDICATE_TYPE).cloned() else { continue };
            found.push(StoredAttestation { platform: platform.clone(), manifest, predicate_type, statement });
        }
    }
    Ok(Some((root, found)))
}

/// Whether `index` is that of one image and of what is said of it.
pub(crate) fn is_of_one_image(index: &Index) -> bool {
    let (said, images): (Vec<&Descriptor>, Vec<&Descriptor>) =
        index.manifests.iter().partition(|listed| is_attestation_of(listed).is_some());
    images.len() == 1
        && !said.is_empty()
        && said.iter().all(|listed| is_attestation_of(listed) == Some(images[0].digest))
}
