//! The store's images, in the words of the registry.

use std::fs::File;

use kiln_build::registry::{Asked, Offered, Offers};
use kiln_build::{BuildCancel, BuildError, Engine};
use kiln_oci::Digest;
use kiln_registry_server::route::{Name, Tag, Which};
use kiln_registry_server::{Found, FoundManifest, Images, ImagesError};

/// Images of the store, for a registry to give out.
pub(super) struct StoreImages(Offers);

impl StoreImages {
    /// Those of the store of `engine`; packing ends when somebody cancels.
    pub(super) fn new(engine: Engine, cancel: BuildCancel) -> Self {
        Self(Offers::new(engine, cancel))
    }
}

impl Images for StoreImages {
    fn repositories(&self) -> Result<Vec<Name>, ImagesError> {
        let names = self.0.repositories().map_err(unavailable)?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn tags(&self, name: &Name) -> Result<Vec<Tag>, ImagesError> {
        let tags = self.0.tags(name.as_str()).map_err(unavailable)?;
        Ok(tags.iter().filter_map(|tag| tag.parse().ok()).collect())
    }

    fn manifest(&self, name: &Name, which: &Which) -> Result<Found, ImagesError> {
        let asked = match which {
            Which::Tag(tag) => self.0.by_tag(name.as_str(), tag.as_str()),
            Which::Digest(digest) => self.0.by_digest(name.as_str(), digest),
        };
        asked.map(found).map_err(unavailable)
    }

    fn make_ready(&self, name: &Name, tag: &Tag) -> Result<Found, ImagesError> {
        self.0.make_ready(name.as_str(), tag.as_str()).map(found).map_err(unavailable)
    }

    fn blob(&self, name: &Name, digest: &Digest) -> Result<Option<(File, u64)>, ImagesError> {
        self.0.blob(name.as_str(), digest).map_err(unavailable)
    }

    fn tidy(&self) {
        self.0.tidy();
    }
}

fn unavailable(error: BuildError) -> ImagesError {
    ImagesError(Box::new(error))
}

fn found(asked: Asked) -> Found {
    match asked {
        Asked::Ready(Offered { media_type, digest, bytes }) => {
            Found::Manifest(FoundManifest { media_type, digest, bytes })
        }
        Asked::Unready => Found::Unready,
        Asked::Missing => Found::Missing,
    }
}
