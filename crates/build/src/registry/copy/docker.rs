//! Docker archives as places that images are copied from.
//!
//! Those of docker since version 25, and kiln's, have an OCI layout in them, and with it a manifest whose digest can
//! stay. In older ones, and in those of other tools, there are a config and plain layers: a manifest is made for
//! them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, Write};

use kiln_layer::{Compression, detect};
use kiln_oci::image::{Descriptor, Extra, Manifest, media_type, to_json};
use kiln_oci::{Digest, Reference, Sha256Writer, document};

use crate::archive::{Added, Archive, broken};
use crate::image::MAX_CONFIG_BYTES;
use crate::load::{DockerEntry, blob_name, docker_entries, manifests_by_config};
use crate::{BuildError, Engine};

/// An image of a docker archive.
pub(super) struct Found {
    /// What the layout in it lists, maybe with other platforms; or the image alone.
    pub(super) root: Descriptor,
    /// The image that `manifest.json` names.
    pub(super) own: Descriptor,
    /// Its manifest was made here.
    pub(super) is_bare: bool,
}

/// The image with this name, or the only one. What belongs to it can be read by its digests afterwards.
///
/// # Errors
/// [`BuildError::Archive`] when there is none or a choice; for what is damaged.
pub(super) fn find_in_docker(
    engine: &Engine,
    archive: &mut Archive,
    name: Option<&Reference>,
) -> Result<Found, BuildError> {
    let entry = pick(archive, name)?;
    let json = archive.read_small(&entry.config, MAX_CONFIG_BYTES)?;
    let config = Descriptor::new(media_type::OCI_CONFIG, Digest::of(&json), json.len() as u64);
    if let Some(found) = manifests_by_config(archive).remove(&config.digest) {
        let digest = Digest::of(&found.json);
        let kind = archive.parse(&blob_name(&digest), &found.json, document::own_media_type)?;
        let own = Descriptor::new(&kind, digest, found.json.len() as u64);
        return Ok(Found { root: found.root, own, is_bare: false });
    }
    let parsed =
        archive.parse(&entry.config, &json, |json| document::read_config(json, entry.layers.len()))?;
    archive.add(&blob_name(&config.digest), Added::Link(entry.config.clone()));
    let mut layers = Vec::with_capacity(entry.layers.len());
    for (member, diff_id) in entry.layers.iter().zip(&parsed.rootfs.diff_ids) {
        let layer = describe(archive, member, diff_id.0)?;
        archive.add(&blob_name(&layer.digest), Added::Link(member.clone()));
        layers.push(layer);
    }
    let manifest = to_json(&Manifest {
        schema_version: 2,
        media_type: Some(media_type::OCI_MANIFEST.to_owned()),
        config,
        layers,
        annotations: BTreeMap::new(),
        extra: Extra::new(),
    });
    let own = Descriptor::new(media_type::OCI_MANIFEST, Digest::of(&manifest), manifest.len() as u64);
    archive.add(&blob_name(&own.digest), Added::File(spooled(engine, &manifest)?));
    Ok(Found { root: own.clone(), own, is_bare: true })
}

/// A file with a document that was made here.
pub(super) fn spooled(engine: &Engine, json: &[u8]) -> Result<File, BuildError> {
    let failed = |source| {
        let path = engine.store.root().join("ingest");
        BuildError::Store(kiln_content::Error::Host { call: "write", path, source })
    };
    let mut file = engine.store.spool()?;
    file.write_all(json).map_err(failed)?;
    Ok(file)
}

fn pick(archive: &Archive, name: Option<&Reference>) -> Result<DockerEntry, BuildError> {
    let mut entries = docker_entries(archive)?;
    if let Some(name) = name {
        let is_it = |tag: &String| tag.parse::<Reference>().is_ok_and(|tag| tag == *name);
        entries.retain(|entry| entry.repo_tags.iter().flatten().any(is_it));
    }
    let count = entries.len();
    let mut entries = entries.into_iter();
    match (entries.next(), count, name) {
        (Some(only), 1, _) => Ok(only),
        (_, 0, Some(name)) => {
            Err(broken(archive.path(), &format!("manifest.json has no image {}", name.familiar())))
        }
        _ => Err(broken(archive.path(), &format!("manifest.json lists {count} images: add `:NAME`"))),
    }
}

/// What a layer is. A plain one is what the config says, which whoever reads it compares; of others the digest is
/// taken.
fn describe(archive: &Archive, member: &str, diff_id: Digest) -> Result<Descriptor, BuildError> {
    let unreadable = |error| broken(archive.path(), &format!("{member} cannot be read ({error})"));
    let (mut reader, size_bytes) = archive.read(member)?;
    let kind = match detect(reader.fill_buf().map_err(unreadable)?) {
        Compression::None => return Ok(Descriptor::new(media_type::OCI_LAYER, diff_id, size_bytes)),
        Compression::Gzip => media_type::OCI_LAYER_GZIP,
        Compression::Zstd => media_type::OCI_LAYER_ZSTD,
        Compression::Xz | Compression::Bzip2 => {
            let why = format!("{member} is packed in a way that images have no word for");
            return Err(broken(archive.path(), &why));
        }
    };
    let mut hashed = Sha256Writer::new(std::io::sink());
    std::io::copy(&mut reader, &mut hashed).map_err(unreadable)?;
    let (_, digest, size_bytes) = hashed.finish();
    Ok(Descriptor::new(kind, digest, size_bytes))
}
