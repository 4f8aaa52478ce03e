//! Indexes that images came with, written back when all that they list is there.

use std::collections::HashSet;

use kiln_content::ImageRecord;
use kiln_oci::Digest;
use kiln_oci::image::{Descriptor, Index, Manifest, media_type};

use crate::image::parse_json;
use crate::load::MAX_MANIFEST_BYTES;
use crate::{BuildError, Engine};

/// Indexes within indexes are followed this far.
const MAX_DEPTH: usize = 4;

/// An index and everything it leads to.
pub(crate) struct WholeIndex {
    /// Points to it.
    pub(crate) descriptor: Descriptor,
    /// All blobs, the index included, in the order in which they are named.
    pub(crate) blobs: Vec<(Digest, u64)>,
}

/// The index that `image` came with, when it still lists `manifest` and all of it is in the store.
pub(crate) fn whole_index(
    engine: &Engine,
    image: &ImageRecord,
    manifest: &Digest,
) -> Result<Option<WholeIndex>, BuildError> {
    let Some(digest) = engine.store.index_of(&image.config)? else { return Ok(None) };
    let (_, size_bytes) = engine.store.open_blob(&digest)?;
    let mut descriptor = Descriptor::new(media_type::OCI_INDEX, digest, size_bytes);
    let mut blobs = Vec::new();
    let whole = walk(engine, &descriptor, &mut blobs, &mut HashSet::new(), 0)?;
    if !whole || !blobs.iter().any(|(blob, _)| blob == manifest) {
        return Ok(None);
    }
    let json = engine.store.read_blob(&digest, MAX_MANIFEST_BYTES)?;
    let index: Index = parse_json("index", &digest, &json)?;
    descriptor.media_type = index.media_type.unwrap_or(descriptor.media_type);
    Ok(Some(WholeIndex { descriptor, blobs }))
}

/// Lists what `descriptor` leads to, each once; whether all of it is there.
fn walk(
    engine: &Engine,
    descriptor: &Descriptor,
    blobs: &mut Vec<(Digest, u64)>,
    seen: &mut HashSet<Digest>,
    depth: usize,
) -> Result<bool, BuildError> {
    if !seen.insert(descriptor.digest) {
        return Ok(true);
    }
    engine.store.hold_blob(&descriptor.digest)?;
    if depth > MAX_DEPTH || !engine.store.has_blob(&descriptor.digest) {
        return Ok(false);
    }
    blobs.push((descriptor.digest, descriptor.size));
    let read = || engine.store.read_blob(&descriptor.digest, MAX_MANIFEST_BYTES);
    let below: Vec<Descriptor> = match descriptor.media_type.as_str() {
        media_type::OCI_INDEX | media_type::DOCKER_INDEX => {
            let index: Index = parse_json("index", &descriptor.digest, &read()?)?;
            index.manifests
        }
        media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST => {
            let manifest: Manifest = parse_json("manifest", &descriptor.digest, &read()?)?;
            [manifest.config].into_iter().chain(manifest.layers).collect()
        }
        _ => return Ok(true),
    };
    for descriptor in &below {
        if !walk(engine, descriptor, blobs, seen, depth + 1)? {
            return Ok(false);
        }
    }
    Ok(true)
}
