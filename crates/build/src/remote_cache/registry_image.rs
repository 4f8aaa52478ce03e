//! An image of a registry by what its documents say.

use kiln_oci::document::{self, DocumentError, is_index};
use kiln_oci::image::{Descriptor, ImageConfig};
use kiln_oci::{Platform, Reference};
use kiln_registry::{ManifestBytes, Which};
use kiln_remote::RemoteError;

use super::registry::{PATIENCE, RegistryStore, failed};
use crate::image::MAX_CONFIG_BYTES;
use crate::load_oci::{MAX_INDEX_DEPTH, nearest};

/// An image, of which no layer has come.
pub(super) struct RegistryImage {
    pub(super) config: ImageConfig,
    /// The blobs of its layers, lowest first; as many as the config lists.
    pub(super) layers: Vec<Descriptor>,
}

impl RegistryStore {
    /// What `name` leads to now for `platform`. Two requests, one more for each index; nothing is kept.
    ///
    /// # Errors
    /// [`RemoteError::Server`]; [`RemoteError::Options`] when there is no image for the platform, or nothing that
    /// is one.
    pub(super) fn image(&self, name: &Reference, platform: &Platform) -> Result<RegistryImage, RemoteError> {
        let refused = |error: DocumentError| RemoteError::Options(error.to_string());
        let mut found = self.manifest(Which::from(name))?;
        for depth in 0.. {
            if !is_index(&found.media_type) {
                break;
            }
            if depth == MAX_INDEX_DEPTH {
                return Err(refused(DocumentError::Nested { limit: MAX_INDEX_DEPTH }));
            }
            let index = document::read_index(&found.bytes, &found.media_type).map_err(refused)?;
            let chosen = nearest(&index, platform)
                .ok_or_else(|| RemoteError::Options(format!("it has no image for {platform}")))?;
            found = self.manifest(Which::Digest(&chosen.digest))?;
        }
        let manifest = document::read_manifest(&found.bytes, &found.media_type).map_err(refused)?;
        if manifest.config.size > MAX_CONFIG_BYTES {
            return Err(RemoteError::Options(format!("its config has more than {MAX_CONFIG_BYTES} bytes")));
        }
        let mut json = Vec::new();
        let fetched = self.ask(PATIENCE, self.repository().fetch_blob(&manifest.config, &mut json))?;
        fetched.map_err(failed)?;
        let config = document::read_config(&json, manifest.layers.len()).map_err(refused)?;
        Ok(RegistryImage { config, layers: manifest.layers })
    }

    fn manifest(&self, which: Which<'_>) -> Result<ManifestBytes, RemoteError> {
        self.ask(PATIENCE, self.repository().manifest(which))?.map_err(failed)
    }
}
