//! What is said of an image, as a manifest beside the image's in an index.
//!
//! ```text
//! index ─┬─▶ manifest of the image, as it is without attestations
//!        └─▶ manifest for unknown/unknown, annotated with the digest of the one above
//!              └─▶ a layer for each statement, annotated with what it says
//! ```

use kiln_oci::image::{Descriptor, Extra, ImageConfig, Index, Manifest, media_type, to_json};
use kiln_oci::{DiffId, Digest, Platform, Reference};
use serde_json::json;

use super::image::ReadyImage;
use crate::attest::{Predicate, Subject, statement};

/// A layer that is a statement.
const STATEMENT: &str = "application/vnd.in-toto+json";
/// Annotation of such a layer: what is said.
pub(crate) const PREDICATE_TYPE: &str = "in-toto.io/predicate-type";
/// Annotations of an index's entry: what it is to which of the others.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
pub(crate) const REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";
const ATTESTATION: &str = "attestation-manifest";
/// What the manifest is as an artifact (`oci-artifact=true`).
const ARTIFACT: &str = "application/vnd.docker.attestation.manifest.v1+json";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";

/// The image's manifest that an index's entry says something of; `None`: it is no attestation.
pub(crate) fn is_attestation_of(descriptor: &Descriptor) -> Option<Digest> {
    let kind = descriptor.annotations.get(REFERENCE_TYPE)?;
    let of = descriptor.annotations.get(REFERENCE_DIGEST)?;
    of.parse().ok().filter(|_| kind == ATTESTATION)
}

/// Whether `index` is that of one image and of what is said of it.
pub(super) fn is_of_one_image(index: &Index) -> bool {
    let (said, images): (Vec<&Descriptor>, Vec<&Descriptor>) =
        index.manifests.iter().partition(|listed| is_attestation_of(listed).is_some());
    images.len() == 1
        && !said.is_empty()
        && said.iter().all(|listed| is_attestation_of(listed) == Some(images[0].digest))
}

/// What is said of an image, ready to leave.
pub(crate) struct ReadyAttestation {
    /// Points to the manifest, for the index.
    pub(crate) descriptor: Descriptor,
    /// Manifest, config and statements; what a manifest names stands before it.
    pub(crate) blobs: Vec<(Digest, Vec<u8>)>,
}

impl ReadyAttestation {
    /// Makes statements of `predicates`, about `image` under these names; `None`: nothing is said.
    pub(crate) fn new(
        image: &ReadyImage,
        platform: &Platform,
        predicates: &[Predicate],
        names: &[Reference],
        as_artifact: bool,
    ) -> Option<Self> {
        if predicates.is_empty() {
            return None;
        }
        let subjects = Subject::image(names, platform, &image.descriptor.digest);
        let (mut blobs, mut layers) = (Vec::new(), Vec::new());
        for predicate in predicates {
            let json = statement(predicate, &subjects);
            let mut layer = Descriptor::new(STATEMENT, Digest::of(&json), json.len() as u64);
            layer.annotations.insert(PREDICATE_TYPE.to_owned(), predicate.kind.to_owned());
            blobs.push((layer.digest, json));
            layers.push(layer);
        }
        let unknown = Platform::new("unknown", "unknown");
        let (config_kind, config) = if as_artifact {
            (EMPTY, b"{}".to_vec())
        } else {
            let mut config = ImageConfig::empty(&unknown);
            config.rootfs.diff_ids = layers.iter().map(|layer| DiffId(layer.digest)).collect();
            (media_type::OCI_CONFIG, to_json(&config))
        };
        let mut extra = Extra::new();
        if as_artifact {
            let Descriptor { media_type, digest, size, .. } = &image.descriptor;
            extra.insert("artifactType".to_owned(), json!(ARTIFACT));
            let subject = json!({ "mediaType": media_type, "digest": digest, "size": size });
            extra.insert("subject".to_owned(), subject);
        }
        let manifest = to_json(&Manifest {
            schema_version: 2,
            media_type: Some(media_type::OCI_MANIFEST.to_owned()),
            config: Descriptor::new(config_kind, Digest::of(&config), config.len() as u64),
            layers,
            annotations: Default::default(),
            extra,
        });
        let digest = Digest::of(&manifest);
        let mut descriptor = Descriptor::new(media_type::OCI_MANIFEST, digest, manifest.len() as u64);
        descriptor.platform = Some(unknown);
        descriptor.annotations = [
            (REFERENCE_DIGEST.to_owned(), image.descriptor.digest.to_string()),
            (REFERENCE_TYPE.to_owned(), ATTESTATION.to_owned()),
        ]
        .into();
        if as_artifact {
            descriptor.extra.insert("artifactType".to_owned(), json!(ARTIFACT));
        }
        blobs.push((Digest::of(&config), config));
        blobs.push((digest, manifest));
        Some(Self { descriptor, blobs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attest::{Body, Place};

    fn made(as_artifact: bool) -> (ReadyImage, ReadyAttestation, Manifest) {
        let image = ReadyImage {
            config: Digest::of(b"{}"),
            config_json: b"{}".to_vec(),
            descriptor: Descriptor::new(media_type::OCI_MANIFEST, Digest::of(b"m"), 1),
            manifest_json: b"m".to_vec(),
            layers: Vec::new(),
        };
        let body = Body::Provenance(json!({ "said": true }));
        let predicate = Predicate { kind: "https://example/p", body, place: Place::default() };
        let platform = "linux/amd64".parse().unwrap();
        let ready = ReadyAttestation::new(&image, &platform, &[predicate], &[], as_artifact).unwrap();
        let manifest = serde_json::from_slice(&ready.blobs.last().unwrap().1).unwrap();
        (image, ready, manifest)
    }

    #[test]
    fn it_is_for_no_platform_and_says_whose_it_is() {
        let (image, ready, manifest) = made(false);
        assert_eq!(ready.descriptor.platform.as_ref().unwrap().to_string(), "unknown/unknown");
        assert_eq!(is_attestation_of(&ready.descriptor), Some(image.descriptor.digest));
        assert_eq!(is_attestation_of(&image.descriptor), None);
        assert_eq!(manifest.layers[0].media_type, STATEMENT);
        assert_eq!(manifest.layers[0].annotations[PREDICATE_TYPE], "https://example/p");
        let config: ImageConfig = serde_json::from_slice(&ready.blobs[1].1).unwrap();
        assert_eq!(config.rootfs.diff_ids, [DiffId(ready.blobs[0].0)]);
        assert!(ready.blobs.iter().all(|(digest, bytes)| Digest::of(bytes) == *digest));
        assert!(manifest.extra.is_empty());
    }

    #[test]
    fn as_an_artifact_it_points_to_its_subject() {
        let (image, ready, manifest) = made(true);
        assert_eq!(manifest.extra["artifactType"], ARTIFACT);
        assert_eq!(manifest.extra["subject"]["digest"], image.descriptor.digest.to_string());
        assert_eq!((manifest.config.media_type.as_str(), manifest.config.size), (EMPTY, 2));
        assert_eq!(ready.descriptor.extra["artifactType"], ARTIFACT);
    }

    #[test]
    fn without_anything_to_say_there_is_none() {
        let (image, _, _) = made(false);
        let platform = "linux/amd64".parse().unwrap();
        assert!(ReadyAttestation::new(&image, &platform, &[], &[], false).is_none());
    }
}
