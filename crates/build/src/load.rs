//! `kiln load`: images out of docker archives and OCI archives.
//!
//! A docker archive names its images in `manifest.json`, an OCI archive in `index.json`; newer
//! docker writes both, and `manifest.json` then has the names.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_content::{ImageRecord, Space};
use kiln_layer::{ApplyError, Compression, DensityError, Limits, bounded_decoder};
use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Platform, Reference, document};
use serde::Deserialize;

use crate::archive::{Archive, broken};
use crate::cancel::BuildCancel;
use crate::image::{MAX_CONFIG_BYTES, store_image};
use crate::load_layers::{LayerSource, Promised, load_layers};
pub(crate) use crate::load_oci::{
    Others, Picked, blob_name, layout_index, load_image_alone, load_oci, load_only_image, load_picked,
    manifests_by_config, oci_name, pick_manifest, read_verified,
};
use crate::streams::InStream;
use crate::{BuildError, Engine};

/// One image that was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// The image.
    pub image: ImageRecord,
    /// The names the archive gave it; none for a nameless one.
    pub names: Vec<Reference>,
}

/// Where a docker archive lists its images.
const DOCKER_MANIFEST: &str = "manifest.json";

/// What tells a directory of skopeo's from all others; its manifest stands beside it.
const DIR_VERSION: &str = "version";

/// Manifests and indexes beyond this size are refused, as containerd does.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// An entry of a docker archive's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DockerEntry {
    pub(crate) config: String,
    #[serde(default)]
    pub(crate) repo_tags: Option<Vec<String>>,
    pub(crate) layers: Vec<String>,
}

/// The images that a docker archive lists.
pub(crate) fn docker_entries(archive: &Archive) -> Result<Vec<DockerEntry>, BuildError> {
    let json = archive.read_small(DOCKER_MANIFEST, MAX_MANIFEST_BYTES)?;
    archive.parse(DOCKER_MANIFEST, &json, document::read)
}

/// Loads every image from the archive at `path` (`-`: standard input), which may be compressed as a
/// whole, or from the OCI layout directory there, or a directory as skopeo's `dir:` makes it. Of an image for several platforms `platform` is unpacked; without a choice it is this
/// machine's, and the others are kept beside it, as they came.
///
/// Blobs that the store has already are read, and replaced where they are damaged.
///
/// # Errors
/// [`BuildError`]; no name has moved then.
pub fn load(
    engine: &Engine,
    path: &Path,
    platform: Option<&Platform>,
    cancel: &BuildCancel,
) -> Result<Vec<Loaded>, BuildError> {
    let archive = if path.is_dir() {
        Archive::open_dir(path)?
    } else {
        Archive::open(path, seekable(engine, path, cancel)?)?
    }
    .healing();
    let loaded = if archive.contains(DIR_VERSION) {
        load_dir(engine, &archive, platform, cancel)?
    } else if archive.contains(DOCKER_MANIFEST) {
        load_docker(engine, &archive, platform, cancel)?
    } else if archive.contains("index.json") {
        load_oci(engine, &archive, platform, cancel)?
    } else {
        return Err(broken(
            path,
            "neither manifest.json (docker) nor index.json (OCI) is in it: not an image archive",
        ));
    };
    for Loaded { image, names } in &loaded {
        for name in names {
            engine.store.set_name(name, image)?;
        }
    }
    engine.store.barrier()?;
    Ok(loaded)
}

/// A plain file as it is; a pipe or a compressed file by way of an unnamed temporary file.
///
/// That may have the bytes of [`SPOOLED_LAYERS`] layers, and a sixteenth of the free space stays free:
/// a pipe may have no end.
pub(crate) fn seekable(engine: &Engine, path: &Path, cancel: &BuildCancel) -> Result<File, BuildError> {
    let unreadable = |source| BuildError::Unreadable { path: path.to_owned(), source };
    let (input, again): (Box<dyn Read + Send>, _) = if path == Path::new("-") {
        (Box::new(InStream::standard(cancel).map_err(unreadable)?), None)
    } else {
        let file = File::open(path).map_err(unreadable)?;
        if file.metadata().map_err(unreadable)?.is_file() {
            let again = file.try_clone().map_err(unreadable)?;
            (Box::new(file), Some(again))
        } else {
            (Box::new(InStream::of(file.into(), cancel)), None)
        }
    };
    let (compression, mut plain) =
        bounded_decoder(BufReader::with_capacity(256 << 10, input), &engine.limits).map_err(unreadable)?;
    if let (Some(mut file), Compression::None) = (again, compression) {
        file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
        return Ok(file);
    }
    let mut spool = engine.store.spool()?;
    let free_bytes = Space::of(engine.store.root()).map_or(u64::MAX, |space| space.free_bytes);
    let allowed = spool_limit(&engine.limits, free_bytes);
    copy_limited(&mut plain, &mut spool, allowed, cancel.flag(), unreadable)?;
    spool.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    Ok(spool)
}

/// An archive that is spooled may be as large as so many layers of the largest size.
const SPOOLED_LAYERS: u64 = 4;

/// What [`Limits::tar_size_bytes`] is the limit of, too: four times as many are allowed in an archive that
/// is unpacked as a whole before it is read.
pub const ARCHIVE_BYTES: &str = "bytes of archive";
/// What an archive may have too many of for the space that is free.
const ARCHIVE_ROOM: &str = "bytes of archive, too many for the space that is free";

/// How many bytes may be spooled, and what there would be too many of beyond.
fn spool_limit(limits: &Limits, free_bytes: u64) -> (u64, &'static str) {
    let room = free_bytes - free_bytes / 16;
    match limits.tar_size_bytes.saturating_mul(SPOOLED_LAYERS) {
        allowed if allowed <= room => (allowed, ARCHIVE_BYTES),
        _ => (room, ARCHIVE_ROOM),
    }
}

fn copy_limited(
    from: &mut dyn Read,
    to: &mut dyn Write,
    (limit, what): (u64, &'static str),
    cancel: &AtomicBool,
    unreadable: impl Fn(io::Error) -> BuildError,
) -> Result<(), BuildError> {
    let mut piece = vec![0; 256 << 10];
    let mut actual = 0;
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(BuildError::Cancelled);
        }
        let length = match from.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(match DensityError::of(&error) {
                    Some(density) => BuildError::Apply(ApplyError::Density(density)),
                    None => unreadable(error),
                });
            }
        };
        actual += length as u64;
        if actual > limit {
            return Err(BuildError::Apply(ApplyError::Limit { what, limit, actual }));
        }
        to.write_all(&piece[..length]).map_err(&unreadable)?;
    }
}

fn load_docker(
    engine: &Engine,
    archive: &Archive,
    platform: Option<&Platform>,
    cancel: &BuildCancel,
) -> Result<Vec<Loaded>, BuildError> {
    let entries = docker_entries(archive)?;
    // Newer docker writes an OCI layout around it, which knows the manifests too.
    let manifests = manifests_by_config(archive);
    let (mut loaded, mut others) = (Vec::new(), Others::default());
    for entry in entries {
        let json = archive.read_small(&entry.config, MAX_CONFIG_BYTES)?;
        let config = Config { member: entry.config, json };
        let parsed = archive
            .parse(&config.member, &config.json, |json| document::read_config(json, entry.layers.len()))?;
        if !others.is_for(&parsed, platform) {
            continue;
        }
        let image = match manifests.get(&Digest::of(&config.json)) {
            Some(found) => load_picked(engine, archive, found, platform.is_none(), cancel)?,
            None => {
                let layers = entry.layers.iter();
                let layers = layers.map(|name| LayerSource { name: name.clone(), expected: None }).collect();
                load_image(engine, archive, &config, layers, None, cancel)?
            }
        };
        let names = entry.repo_tags.unwrap_or_default();
        let names = names.iter().map(|name| parse_name(archive, name)).collect::<Result<_, _>>()?;
        loaded.push(Loaded { image, names });
    }
    others.check(archive, platform, &loaded)?;
    Ok(loaded)
}

/// The image of a directory as skopeo's `dir:` makes it: `manifest.json` is the manifest, and blobs are
/// named by the digits of their digest.
fn load_dir(
    engine: &Engine,
    archive: &Archive,
    platform: Option<&Platform>,
    cancel: &BuildCancel,
) -> Result<Vec<Loaded>, BuildError> {
    let json = archive.read_small(DOCKER_MANIFEST, MAX_MANIFEST_BYTES)?;
    let kind = archive.parse(DOCKER_MANIFEST, &json, document::own_media_type)?;
    let manifest = archive.parse(DOCKER_MANIFEST, &json, |json| document::read_manifest(json, &kind))?;
    let member = manifest.config.digest.hex();
    let config =
        Config { json: read_verified(archive, &member, &manifest.config, MAX_CONFIG_BYTES)?, member };
    let mut others = Others::default();
    let parsed = archive
        .parse(&config.member, &config.json, |json| document::read_config(json, manifest.layers.len()))?;
    let mut loaded = Vec::new();
    if others.is_for(&parsed, platform) {
        let source = |layer: &Descriptor| LayerSource {
            name: layer.digest.hex(),
            expected: Some((layer.digest, layer.size)),
        };
        let layers = manifest.layers.iter().map(source).collect();
        let image = load_image(engine, archive, &config, layers, Some(&json), cancel)?;
        loaded.push(Loaded { image, names: Vec::new() });
    }
    others.check(archive, platform, &loaded)?;
    Ok(loaded)
}

fn parse_name(archive: &Archive, name: &str) -> Result<Reference, BuildError> {
    name.parse().map_err(|error| broken(archive.path(), &format!("holds a bad image name: {error}")))
}

/// The config of an image, and the archive's name for it.
pub(crate) struct Config {
    pub(crate) member: String,
    pub(crate) json: Vec<u8>,
}

/// Loads the layers of a config that `layers` hold, lowest first, and stores the image.
pub(crate) fn load_image(
    engine: &Engine,
    archive: &Archive,
    config: &Config,
    layers: Vec<LayerSource>,
    manifest_json: Option<&[u8]>,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    let count = layers.len();
    let parsed = archive.parse(&config.member, &config.json, |json| document::read_config(json, count))?;
    let promised: Vec<Promised> = layers
        .into_iter()
        .zip(&parsed.rootfs.diff_ids)
        .map(|(source, &diff_id)| Promised { source, diff_id })
        .collect();
    let records = load_layers(engine, archive, &promised, cancel)?;
    // The documents' own bytes are kept: their digests are the image's names everywhere else.
    let top = records.last().map(|record| record.snapshot.clone());
    store_image(engine, &config.json, &records, top, manifest_json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_without_end_is_not_spooled() {
        let copy = |cancelled| {
            let mut to = Vec::new();
            let other = |source| BuildError::Unreadable { path: "-".into(), source };
            let cancel = AtomicBool::new(cancelled);
            let result = copy_limited(&mut io::repeat(0), &mut to, (1 << 20, "bytes"), &cancel, other);
            assert!(to.len() <= 1 << 20);
            result.unwrap_err()
        };
        assert!(matches!(copy(false), BuildError::Apply(ApplyError::Limit { .. })));
        assert!(matches!(copy(true), BuildError::Cancelled));
    }

    #[test]
    fn what_stops_an_archive_is_its_limit_or_the_room() {
        let limits = Limits::vouched(1000);
        assert_eq!(spool_limit(&limits, 1 << 30), (4000, ARCHIVE_BYTES));
        assert_eq!(spool_limit(&limits, 1600), (1500, ARCHIVE_ROOM));
        assert_eq!(spool_limit(&Limits::checked(), u64::MAX).1, ARCHIVE_ROOM);
    }
}
