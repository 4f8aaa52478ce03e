//! Layers that are packed anew on their way, and what names them with them: manifests and indexes get other digests.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::sync::Arc;

use kiln_content::PackedRecord;
use kiln_layer::{
    ApplyError, CopyFault, DensityError, RepackError, RepackOptions, TAR_BYTES, Times, bounded_decoder,
    copy_hashed, estargz,
};
use kiln_oci::image::{Descriptor, Index, media_type, to_json};
use kiln_oci::{DiffId, Digest, document};
use kiln_solver::Cancellation;

use super::docker::spooled;
use super::source::Source;
use crate::archive::{Added, Archive, broken};
use crate::export::{Compress, Packing, REFERENCE_DIGEST, oci_type, packed_layer, packing_name};
use crate::image::MAX_CONFIG_BYTES;
use crate::load::{MAX_MANIFEST_BYTES, blob_name, read_verified};
use crate::load_layers::in_layer;
use crate::load_oci::{check_depth, parse_index, parse_manifest};
use crate::reread::Stoppable;
use crate::{BuildCancel, BuildError, Engine};

/// What `root` becomes when its plain layers are packed as `compress` says, with `force` all layers, and how many
/// layers stay as they are although they are packed in another way. `source` has what is new afterwards.
///
/// What was packed is remembered by the store as for a push, and what was packed before is not packed again.
///
/// # Errors
/// [`BuildError::Layer`] for one that is not what its config says; those of reading and of the store.
pub(super) fn pack_anew(
    engine: &Engine,
    source: &mut Source,
    root: &Descriptor,
    compress: &Compress,
    cancel: &BuildCancel,
) -> Result<(Descriptor, usize), BuildError> {
    let archive = &*source.archive;
    let (added, made) = Default::default();
    let mut turn = Turn { engine, archive, compress, cancel, added, made, kept: 0 };
    let root = turn.document(root, 0)?;
    let Turn { added, kept, .. } = turn;
    let archive = Arc::get_mut(&mut source.archive)
        .ok_or_else(|| BuildError::Bug { what: "a place that is being read already".to_owned() })?;
    for (digest, file) in added {
        archive.add(&blob_name(&digest), Added::File(file));
    }
    Ok((root, kept))
}

struct Turn<'a> {
    engine: &'a Engine,
    archive: &'a Archive,
    compress: &'a Compress,
    cancel: &'a BuildCancel,
    /// What was made.
    added: HashMap<Digest, File>,
    /// What documents and layers have become, by what they were.
    made: HashMap<Digest, Descriptor>,
    kept: usize,
}

impl Turn<'_> {
    fn document(&mut self, descriptor: &Descriptor, depth: usize) -> Result<Descriptor, BuildError> {
        check_depth(self.archive, descriptor, depth)?;
        if let Some(made) = self.made.get(&descriptor.digest) {
            return Ok(made.clone());
        }
        let name = blob_name(&descriptor.digest);
        let kind = descriptor.media_type.as_str();
        let made = if document::is_index(kind) {
            let json = read_verified(self.archive, &name, descriptor, MAX_MANIFEST_BYTES)?;
            self.index(parse_index(self.archive, descriptor, &json)?, depth)?
        } else if document::is_manifest(kind) {
            let json = read_verified(self.archive, &name, descriptor, MAX_MANIFEST_BYTES)?;
            self.manifest(descriptor, &json)?
        } else {
            None
        };
        let made = made.unwrap_or_else(|| descriptor.clone());
        self.made.insert(descriptor.digest, made.clone());
        Ok(made)
    }

    /// `None`: it stays as it is.
    fn index(&mut self, mut index: Index, depth: usize) -> Result<Option<Descriptor>, BuildError> {
        let mut changed: HashMap<String, String> = HashMap::new();
        for entry in &mut index.manifests {
            let made = self.document(entry, depth + 1)?;
            if made.digest != entry.digest {
                changed.insert(entry.digest.to_string(), made.digest.to_string());
                (entry.media_type, entry.digest, entry.size) = (made.media_type, made.digest, made.size);
            }
        }
        if changed.is_empty() {
            return Ok(None);
        }
        for entry in &mut index.manifests {
            if let Some(about) = entry.annotations.get_mut(REFERENCE_DIGEST)
                && let Some(now) = changed.get(about)
            {
                about.clone_from(now);
            }
        }
        index.media_type = Some(media_type::OCI_INDEX.to_owned());
        self.add(media_type::OCI_INDEX, &to_json(&index)).map(Some)
    }

    fn manifest(&mut self, descriptor: &Descriptor, json: &[u8]) -> Result<Option<Descriptor>, BuildError> {
        let mut manifest = parse_manifest(self.archive, descriptor, json)?;
        let is_wanted: Vec<bool> = manifest.layers.iter().map(|layer| self.is_wanted(layer)).collect();
        if !is_wanted.contains(&true) {
            return Ok(None);
        }
        let name = blob_name(&manifest.config.digest);
        let config_json = read_verified(self.archive, &name, &manifest.config, MAX_CONFIG_BYTES)?;
        let read = |json: &[u8]| document::read_config(json, manifest.layers.len());
        let mut config = self.archive.parse(&name, &config_json, read)?;
        let mut is_same_tar = true;
        let parts = manifest.layers.iter_mut().zip(&mut config.rootfs.diff_ids).zip(is_wanted);
        for ((layer, diff_id), is_wanted) in parts {
            if is_wanted {
                let record = self.packed(layer, diff_id)?;
                is_same_tar &= record.packed_diff_id == *diff_id;
                *diff_id = record.packed_diff_id;
                *layer = packed_layer(self.compress.packing, &record);
            } else {
                layer.media_type = oci_layer(&layer.media_type).to_owned();
            }
        }
        manifest.config.media_type = media_type::OCI_CONFIG.to_owned();
        if !is_same_tar {
            manifest.config = self.add(media_type::OCI_CONFIG, &to_json(&config))?;
        }
        manifest.media_type = Some(media_type::OCI_MANIFEST.to_owned());
        self.add(media_type::OCI_MANIFEST, &to_json(&manifest)).map(Some)
    }

    /// Whether a layer is packed anew. What is no tar is not.
    fn is_wanted(&mut self, layer: &Descriptor) -> bool {
        let kind = oci_layer(&layer.media_type);
        let is_tar =
            [media_type::OCI_LAYER, media_type::OCI_LAYER_GZIP, media_type::OCI_LAYER_ZSTD].contains(&kind);
        let Compress { packing, level_given, force } = *self.compress;
        let asked_for_more = level_given || matches!(packing, Packing::Estargz { .. });
        let is_so = kind == oci_type(packing);
        let is_plain = kind == media_type::OCI_LAYER;
        if !is_tar || (is_so && (is_plain || !asked_for_more)) {
            return false;
        }
        if !is_plain && !force {
            self.kept += 1;
            return false;
        }
        true
    }

    /// The layer as it is packed now, there to be read.
    fn packed(&mut self, layer: &Descriptor, diff_id: &DiffId) -> Result<PackedRecord, BuildError> {
        let store = &self.engine.store;
        let name = packing_name(self.compress.packing, Times::Keep);
        let record = match store.packed(diff_id, &name)? {
            Some(record) => record,
            None => {
                let member = blob_name(&layer.digest);
                let packed = self.pack(&member, diff_id);
                let record = packed.map_err(|error| in_layer(self.archive, &member, error))?;
                store.put_packed(&name, &record)?;
                record
            }
        };
        if let std::collections::hash_map::Entry::Vacant(vacant) = self.added.entry(record.blob) {
            vacant.insert(store.open_blob(&record.blob)?.0);
        }
        Ok(record)
    }

    fn pack(&self, member: &str, diff_id: &DiffId) -> Result<PackedRecord, BuildError> {
        let Self { engine, archive, cancel, .. } = *self;
        let unreadable = |error: io::Error| match DensityError::of(&error) {
            _ if cancel.is_cancelled() => BuildError::Cancelled,
            Some(density) => BuildError::Apply(ApplyError::Density(density)),
            None => broken(archive.path(), &format!("{member} cannot be read ({error})")),
        };
        let unwritable = |source| {
            let path = engine.store.root().join("ingest");
            BuildError::Store(kiln_content::Error::Host { call: "write", path, source })
        };
        let (inner, _) = archive.read(member)?;
        let packed = BufReader::with_capacity(256 << 10, Stoppable { inner, cancel });
        let (_, plain) = bounded_decoder(packed, &engine.limits).map_err(unreadable)?;
        let limit = engine.limits.tar_size_bytes;
        // One byte more than allowed is enough to see that there are too many.
        let plain = plain.take(limit.saturating_add(1));
        let mut ingest = engine.store.ingest()?;
        let mut out = BufWriter::with_capacity(256 << 10, &mut ingest);
        let (actual, packed_diff_id, tar_size_bytes, toc) = match self.compress.packing {
            Packing::Stream(codec) => {
                let mut encoder = codec.encoder(&mut out).map_err(unwritable)?;
                let copied = copy_hashed(plain, &mut encoder).map_err(|fault| match fault {
                    CopyFault::Read(error) => unreadable(error),
                    CopyFault::Write(error) => unwritable(error),
                });
                let (digest, size_bytes) = copied?;
                encoder.finish().map_err(unwritable)?;
                (DiffId(digest), DiffId(digest), size_bytes, None)
            }
            Packing::Estargz { level } => {
                let (times, limits, cancel) = (Times::Keep, engine.limits, cancel.flag());
                let options = RepackOptions { times, below: None, limits, cancel };
                let (actual, made) =
                    estargz(plain, &mut out, level, &options).map_err(|error| match error {
                        RepackError::Output(error) => unwritable(error),
                        RepackError::Input(error) => BuildError::Apply(error),
                        error => BuildError::Bug { what: error.to_string() },
                    })?;
                (actual, made.diff_id, made.tar_size_bytes, Some(made.toc))
            }
        };
        if tar_size_bytes > limit {
            let (what, actual) = (TAR_BYTES, tar_size_bytes);
            return Err(BuildError::Apply(ApplyError::Limit { what, limit, actual }));
        }
        if actual != *diff_id {
            return Err(BuildError::WrongDiffId { expected: *diff_id, actual });
        }
        out.flush().map_err(unwritable)?;
        drop(out);
        let (blob, size_bytes) = ingest.commit(None)?;
        Ok(PackedRecord { diff_id: *diff_id, blob, size_bytes, packed_diff_id, tar_size_bytes, toc })
    }

    /// Keeps a document that was made, to be read by its digest.
    fn add(&mut self, kind: &str, json: &[u8]) -> Result<Descriptor, BuildError> {
        let descriptor = Descriptor::new(kind, Digest::of(json), json.len() as u64);
        self.added.insert(descriptor.digest, spooled(self.engine, json)?);
        Ok(descriptor)
    }
}

/// OCI's media type for a layer of docker's.
fn oci_layer(kind: &str) -> &str {
    match kind {
        media_type::DOCKER_LAYER => media_type::OCI_LAYER,
        media_type::DOCKER_LAYER_GZIP => media_type::OCI_LAYER_GZIP,
        other => other,
    }
}
