//! `kiln manifest`: lists of images for several platforms, made here and pushed as an index.
//!
//! A list is a file of the store's state, and names manifests of registries by their digests: a tag that moves
//! afterwards changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_oci::image::{Descriptor, Extra, Index, media_type, to_json};
use kiln_oci::{Digest, Platform, Reference, document};
use kiln_registry::{Repository, Which};
use serde::{Deserialize, Serialize};

use super::Registries;
use super::copy::{Copied, CopyRequest, Place, copy};
use crate::image::MAX_CONFIG_BYTES;
use crate::{BuildCancel, BuildError, Engine, builds};

/// Version of the files.
const VERSION: u32 = 1;

/// The lists of a store.
pub struct Lists<'a> {
    engine: &'a Engine,
    registries: &'a Arc<Registries>,
    cancel: &'a BuildCancel,
}

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    name: String,
    entries: Vec<ListEntry>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// An image of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListEntry {
    /// The name that it was added by.
    pub image: String,
    /// What it is, and for which platform.
    pub descriptor: Descriptor,
}

/// What changes about an image of a list; what is `None` or empty stays.
#[derive(Debug, Clone, Default)]
pub struct Annotate {
    /// Operating system.
    pub os: Option<String>,
    /// Processor.
    pub arch: Option<String>,
    /// Its variant.
    pub variant: Option<String>,
    /// Version of the operating system.
    pub os_version: Option<String>,
    /// Features of the operating system.
    pub os_features: Vec<String>,
    /// Free annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Why something did not become of a list.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListError {
    /// There is one of this name.
    #[error("there is a list {name} already")]
    Exists { name: String },
    /// There is none of this name.
    #[error("there is no list {name}")]
    Missing { name: String },
    /// The list does not have it, or several times.
    #[error("the list {name} has {count} entries of {image}")]
    Entries { name: String, image: String, count: usize },
    /// The list has nothing in it.
    #[error("the list {name} is empty")]
    Empty { name: String },
    /// The file cannot be read or written.
    #[error("{path}")]
    File { path: PathBuf, source: io::Error },
    /// Registries, mostly.
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl<'a> Lists<'a> {
    /// The lists of this store.
    pub fn new(engine: &'a Engine, registries: &'a Arc<Registries>, cancel: &'a BuildCancel) -> Self {
        Self { engine, registries, cancel }
    }

    fn path(&self, name: &Reference) -> PathBuf {
        let file = format!("{}.json", Digest::of(name.to_string().as_bytes()).hex());
        self.engine.store.root().join("state/manifests").join(file)
    }

    fn read(&self, name: &Reference) -> Result<Record, ListError> {
        let path = self.path(name);
        let json = match fs::read(&path) {
            Ok(json) => json,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ListError::Missing { name: name.familiar() });
            }
            Err(source) => return Err(ListError::File { path, source }),
        };
        let record = serde_json::from_slice::<Record>(&json).map_err(io::Error::other);
        let record = record.and_then(|record| match record.version {
            VERSION => Ok(record),
            other => Err(io::Error::other(format!("version {other} is of another kiln"))),
        });
        record.map_err(|source| ListError::File { path, source })
    }

    fn write(&self, name: &Reference, record: &Record) -> Result<(), ListError> {
        let path = self.path(name);
        builds::replace(&path, &to_json(record)).map_err(|source| ListError::File { path, source })
    }

    /// Begins the list `name` with `images`, or with `amend` adds them to one that is there. An image for several
    /// platforms adds one entry for each; one that is in the list is replaced.
    ///
    /// Costs two requests for each image.
    ///
    /// # Errors
    /// [`ListError::Exists`] without `amend`; those of the registries.
    pub fn create(&self, name: &Reference, images: &[Reference], amend: bool) -> Result<(), ListError> {
        let mut record = match self.read(name) {
            Ok(_) if !amend => return Err(ListError::Exists { name: name.familiar() }),
            Err(ListError::Missing { .. }) => Record {
                version: VERSION,
                name: name.to_string(),
                entries: Vec::new(),
                annotations: BTreeMap::new(),
            },
            found => found?,
        };
        for image in images {
            record.entries.retain(|known| known.image != image.to_string());
            for descriptor in self.look_up(image)? {
                record.entries.push(ListEntry { image: image.to_string(), descriptor });
            }
        }
        self.write(name, &record)
    }

    /// What `image` leads to: a manifest with its platform, or those of its index.
    fn look_up(&self, image: &Reference) -> Result<Vec<Descriptor>, BuildError> {
        let repository = self.registries.repository(image);
        let found = self.registries.wait(self.cancel, repository.manifest(Which::from(image)))?;
        let refused = |source| BuildError::Document {
            path: PathBuf::from(image.familiar()),
            member: found.digest.to_string(),
            source: Box::new(source),
        };
        if document::is_index(&found.media_type) {
            return Ok(document::read_index(&found.bytes, &found.media_type).map_err(refused)?.manifests);
        }
        let manifest = document::read_manifest(&found.bytes, &found.media_type).map_err(refused)?;
        let config = self.config(&repository, &manifest.config)?;
        let config = document::read_config(&config, manifest.layers.len()).map_err(refused)?;
        let platform =
            Platform { variant: config.variant.clone(), ..Platform::new(&config.os, &config.architecture) };
        Ok(vec![Descriptor { platform: Some(platform), ..found.descriptor() }])
    }

    fn config(&self, repository: &Repository, config: &Descriptor) -> Result<Vec<u8>, BuildError> {
        if config.size > MAX_CONFIG_BYTES {
            return Err(kiln_registry::Error::TooLarge {
                host: repository.domain().to_owned(),
                path: config.digest.to_string(),
                limit_bytes: MAX_CONFIG_BYTES,
            }
            .into());
        }
        let mut json = Vec::new();
        self.registries.wait(self.cancel, repository.fetch_blob(config, &mut json))?;
        Ok(json)
    }

    /// Changes what the list says about `image`; `None`: about itself, of which there are only annotations.
    ///
    /// # Errors
    /// [`ListError::Missing`], [`ListError::Entries`].
    pub fn annotate(
        &self,
        name: &Reference,
        image: Option<&Reference>,
        change: &Annotate,
    ) -> Result<(), ListError> {
        let mut record = self.read(name)?;
        let Some(image) = image else {
            record.annotations.extend(change.annotations.clone());
            return self.write(name, &record);
        };
        let text = image.to_string();
        let mut found: Vec<&mut ListEntry> =
            record.entries.iter_mut().filter(|entry| entry.image == text).collect();
        let [entry] = found.as_mut_slice() else {
            let (name, image, count) = (name.familiar(), image.familiar(), found.len());
            return Err(ListError::Entries { name, image, count });
        };
        let platform = entry.descriptor.platform.get_or_insert_with(Platform::host);
        let set =
            |to: &mut String, from: &Option<String>| to.clone_from(from.as_ref().unwrap_or(&to.clone()));
        set(&mut platform.os, &change.os);
        set(&mut platform.architecture, &change.arch);
        for (to, from) in
            [(&mut platform.variant, &change.variant), (&mut platform.os_version, &change.os_version)]
        {
            if from.is_some() {
                to.clone_from(from);
            }
        }
        if !change.os_features.is_empty() {
            platform.os_features.clone_from(&change.os_features);
        }
        entry.descriptor.annotations.extend(change.annotations.clone());
        self.write(name, &record)
    }

    /// The index that the list is; of a list that is not here, what the registry has under that name.
    ///
    /// # Errors
    /// Those of the registry.
    pub fn inspect(&self, name: &Reference) -> Result<Vec<u8>, ListError> {
        match self.read(name) {
            Ok(record) => Ok(index_of(&record)),
            Err(ListError::Missing { .. }) => {
                let repository = self.registries.repository(name);
                Ok(self.registries.wait(self.cancel, repository.manifest(name.into()))?.bytes)
            }
            Err(error) => Err(error),
        }
    }

    /// Forgets the list; what was pushed stays.
    ///
    /// # Errors
    /// [`ListError::Missing`].
    pub fn remove(&self, name: &Reference) -> Result<(), ListError> {
        let path = self.path(name);
        fs::remove_file(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ListError::Missing { name: name.familiar() },
            _ => ListError::File { path, source },
        })
    }

    /// Pushes the list under its name, or under `to`. Images of other repositories are copied there first, or
    /// mounted where it is one registry.
    ///
    /// # Errors
    /// [`ListError::Missing`], [`ListError::Empty`], those of [`copy`]. The name has not moved then.
    pub fn push(&self, name: &Reference, to: Option<&Reference>) -> Result<(Digest, Copied), ListError> {
        let record = self.read(name)?;
        let to = to.unwrap_or(name);
        if record.entries.is_empty() {
            return Err(ListError::Empty { name: name.familiar() });
        }
        let mut all = Copied::default();
        for entry in &record.entries {
            let from: Reference =
                entry.image.parse().map_err(|_| ListError::Missing { name: entry.image.clone() })?;
            if (from.domain(), from.path()) == (to.domain(), to.path()) {
                continue;
            }
            let digest = entry.descriptor.digest;
            let (from, to) = (by_digest(&from, &digest)?, by_digest(to, &digest)?);
            let request = CopyRequest::whole(Place::Registry(from), Place::Registry(to));
            let copied = copy(self.engine, self.registries, &request, self.cancel)?;
            all.sent = (all.sent.0 + copied.sent.0, all.sent.1 + copied.sent.1);
            all.mounted += copied.mounted;
            all.known += copied.known;
        }
        let json = index_of(&record);
        let repository = self.registries.repository(to);
        let put = repository.put_manifest(Which::from(to), media_type::OCI_INDEX, &json);
        let digest = self.registries.wait(self.cancel, put)?;
        all.digest = digest.to_string();
        Ok((digest, all))
    }
}

/// The image of `name`'s repository that has this digest.
fn by_digest(name: &Reference, digest: &Digest) -> Result<Reference, ListError> {
    let text = format!("{}/{}@{digest}", name.domain(), name.path());
    text.parse().map_err(|_| ListError::Missing { name: text })
}

fn index_of(record: &Record) -> Vec<u8> {
    to_json(&Index {
        schema_version: 2,
        media_type: Some(media_type::OCI_INDEX.to_owned()),
        manifests: record.entries.iter().map(|entry| entry.descriptor.clone()).collect(),
        annotations: record.annotations.clone(),
        extra: Extra::new(),
    })
}
