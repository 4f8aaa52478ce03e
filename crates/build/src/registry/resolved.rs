//! Images of registries that are known by their documents: nobody has needed a layer of them so far.
//!
//! A build learns from manifest and config all that it has to know of what it stands on: the keys of its steps, the
//! environment, the triggers. The layers come when a step reads them, and never when none does. Decided in
//! `docs/adr/0037-bases-come-when-they-are-read.md`.
//!
//! Of each there is a file in the store's state, so that the next build asks nobody either. The file is whole by
//! itself: garbage collection takes nothing from it. All of it can be asked for again, so one that is lost, damaged
//! or of another version is as if it had never been.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_content::ImageRecord;
use kiln_oci::image::{Descriptor, ImageConfig, Manifest, to_json};
use kiln_oci::{Digest, Platform, Reference, document};
use kiln_registry::Error;
use kiln_solver::Cancellation;
use serde::{Deserialize, Serialize};

use super::Registries;
use super::base::naming;
use super::pull::{key, layers_there, pull_layers};
use crate::build::Progress;
use crate::engine::now_unix;
use crate::image::MAX_CONFIG_BYTES;
use crate::load::{MAX_MANIFEST_BYTES, Picked};
use crate::why::forget_oldest;
use crate::{BuildCancel, BuildError, Engine, builds};

/// Version of the files.
const VERSION: u32 = 1;

/// Files that are kept, those written last, and what they may take together.
const FILES: usize = 200;
const FILES_BYTES: u64 = 64 << 20;

/// A file that is larger is none of ours: documents in JSON, whose quotes and line ends are escaped.
const MAX_FILE_BYTES: u64 = 2 * (MAX_MANIFEST_BYTES + MAX_CONFIG_BYTES) + (1 << 20);

/// What a name of a registry leads to.
pub(crate) struct Resolved {
    pub(super) reference: Reference,
    /// What was asked for.
    pub(super) platform: Platform,
    /// Digest of the manifest or index that the name leads to.
    pub(super) root: Digest,
    /// When it did; seconds since 1970.
    pub(super) at_unix: i64,
    pub(super) picked: Picked,
    pub(super) config_json: Vec<u8>,
    pub(super) config: ImageConfig,
}

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    reference: String,
    root: Digest,
    at_unix: i64,
    manifest: Digest,
    manifest_json: String,
    config_json: String,
}

fn dir(engine: &Engine) -> PathBuf {
    engine.store.root().join("state/bases")
}

fn path(engine: &Engine, reference: &Reference, platform: &Platform) -> PathBuf {
    dir(engine).join(format!("{}.json", key(reference, platform).hex()))
}

/// What a file says; `None`: nothing that can be relied on.
fn read(path: &Path) -> Option<(Record, Picked, ImageConfig)> {
    let is_sized = fs::symlink_metadata(path).is_ok_and(|file| file.len() <= MAX_FILE_BYTES);
    let json = is_sized.then(|| fs::read(path).ok()).flatten()?;
    let record: Record = serde_json::from_slice(&json).ok()?;
    let (manifest, config) = (record.manifest_json.as_bytes(), record.config_json.as_bytes());
    if record.version != VERSION || Digest::of(manifest) != record.manifest {
        return None;
    }
    let kind = document::own_media_type(manifest).ok()?;
    let parsed = document::read_manifest(manifest, &kind).ok()?;
    if Digest::of(config) != parsed.config.digest {
        return None;
    }
    let config = document::read_config(config, parsed.layers.len()).ok()?;
    let root = Descriptor::new(&kind, record.manifest, manifest.len() as u64);
    let picked = Picked { json: manifest.to_vec(), manifest: parsed, root };
    Some((record, picked, config))
}

impl Resolved {
    /// What was found out about `reference` before.
    pub(super) fn find(engine: &Engine, reference: &Reference, platform: &Platform) -> Option<Self> {
        let (record, picked, config) = read(&path(engine, reference, platform))?;
        Some(Self {
            reference: reference.clone(),
            platform: platform.clone(),
            root: record.root,
            at_unix: record.at_unix,
            picked,
            config_json: record.config_json.into_bytes(),
            config,
        })
    }

    /// Remembers it, as what the name leads to now. Where that does not work, the next build asks again.
    pub(super) fn keep(&self, engine: &Engine) {
        let text = |json: &[u8]| String::from_utf8(json.to_vec()).ok();
        let (Some(manifest_json), Some(config_json)) = (text(&self.picked.json), text(&self.config_json))
        else {
            return;
        };
        let record = Record {
            version: VERSION,
            reference: self.reference.to_string(),
            root: self.root,
            at_unix: now_unix(),
            manifest: Digest::of(&self.picked.json),
            manifest_json,
            config_json,
        };
        if builds::replace(&path(engine, &self.reference, &self.platform), &to_json(&record)).is_ok() {
            forget_oldest(&dir(engine), FILES, FILES_BYTES);
        }
    }

    /// Forgets it: the image is in the store, or what it consists of is not to be had any more.
    pub(super) fn forget(engine: &Engine, reference: &Reference, platform: &Platform) {
        // One that stays is as good as it was: an image of the store goes before it.
        let _ = fs::remove_file(path(engine, reference, platform));
    }

    /// Digest of the config: the image's ID.
    pub(crate) fn config_digest(&self) -> Digest {
        self.picked.manifest.config.digest
    }

    /// The config.
    pub(crate) fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// Whether all layers are in the store, unpacked: then there is nothing to wait with.
    pub(super) fn is_here(&self, engine: &Engine) -> Result<bool, BuildError> {
        Ok(layers_there(engine, &self.config)? == self.config.rootfs.diff_ids.len())
    }
}

/// Repositories and manifests of all images that are only known. Costs O(files).
pub(super) fn known_manifests(engine: &Engine) -> Vec<(Reference, Manifest)> {
    let files = fs::read_dir(dir(engine)).into_iter().flatten().flatten();
    let known = files.filter_map(|entry| {
        let (record, picked, _) = read(&entry.path())?;
        Some((record.reference.parse().ok()?, picked.manifest))
    });
    known.collect()
}

/// The images that a build stands on and of which no layer has come. Pulled when a step reads them.
#[derive(Default)]
pub(crate) struct Unpulled {
    /// By the digests of their configs.
    bases: BTreeMap<Digest, Base>,
    /// `None`: nobody is to be asked.
    registries: Option<Arc<Registries>>,
    /// Hears what deserves a look; `None`: nobody does.
    progress: Option<Arc<dyn Progress>>,
}

/// An image, under all names that the build has for it.
#[derive(Default)]
struct Base {
    names: Vec<Arc<Resolved>>,
    /// `Some`: pulled. Stages that stand on one image ask at once; the first one pulls.
    image: Mutex<Option<ImageRecord>>,
}

impl Unpulled {
    pub(crate) fn new(
        resolved: Vec<Arc<Resolved>>,
        registries: Option<Arc<Registries>>,
        progress: Arc<dyn Progress>,
    ) -> Self {
        let mut bases: BTreeMap<Digest, Base> = BTreeMap::new();
        for image in resolved {
            bases.entry(image.config_digest()).or_default().names.push(image);
        }
        Self { bases, registries, progress: Some(progress) }
    }

    /// The image with this config, pulled by now; `None`: it was in the store from the start. `note` hears a line
    /// about what is fetched. Blocks.
    ///
    /// # Errors
    /// [`BuildError::Pull`]; [`BuildError::NoImage`] where nobody is to be asked.
    pub(crate) fn pull(
        &self,
        engine: &Engine,
        config: &Digest,
        cancel: &BuildCancel,
        note: &dyn Fn(&str),
    ) -> Result<Option<ImageRecord>, BuildError> {
        let Some(base) = self.bases.get(config) else { return Ok(None) };
        let mut image = base.image.lock().unwrap_or_else(PoisonError::into_inner);
        if image.is_none() {
            let mut pulled = None;
            // The first one brings the layers, the others find them there and get their names.
            for resolved in &base.names {
                pulled = Some(self.pull_one(engine, resolved, cancel, note)?);
            }
            *image = pulled;
        }
        Ok(image.clone())
    }

    fn pull_one(
        &self,
        engine: &Engine,
        resolved: &Resolved,
        cancel: &BuildCancel,
        note: &dyn Fn(&str),
    ) -> Result<ImageRecord, BuildError> {
        if cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }
        let reference = Box::new(resolved.reference.clone());
        let Some(registries) = &self.registries else {
            return Err(BuildError::NoImage { reference, at: None, stages: None, similar: None });
        };
        let pulled = naming(engine, &resolved.reference, &resolved.platform)
            .and_then(|naming| pull_layers(engine, registries, resolved, naming, cancel, note));
        for text in registries.client().take_notes() {
            self.progress.iter().for_each(|progress| progress.note(&text));
        }
        pulled.map(|pulled| pulled.image).map_err(|source| {
            if is_gone(&source) {
                // The name may lead to another one by now: the next build asks.
                Resolved::forget(engine, &resolved.reference, &resolved.platform);
            }
            match source {
                BuildError::Cancelled => source,
                _ => {
                    let (at, similar, locked, source) = (None, None, None, Box::new(source));
                    BuildError::Pull { reference, at, similar, locked, source }
                }
            }
        })
    }
}

/// Whether the registry does not have what its manifest lists.
fn is_gone(error: &BuildError) -> bool {
    matches!(error, BuildError::Registry(error) if matches!(**error, Error::NotFound { .. }))
}
