//! A repository of a registry as a store: each record a manifest with a tag of its own, which lists the layers it
//! speaks of, so that the registry keeps them.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_oci::image::{Descriptor, Extra, Manifest, media_type, to_json};
use kiln_oci::{Digest, Reference};
use kiln_registry::{BlobSource, Error, Fault, Repository, Which};
use kiln_remote::{Existing, ObjectName, Record, RemoteError, RemoteStore};

use super::files::at_once;
use crate::archive::own_file;
use crate::registry::Registries;
use crate::{BuildCancel, BuildError, Engine};

/// How long a registry may take for a record or a question.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);
/// Questions at a time.
const PARALLEL: usize = 8;
/// Smaller blobs are kept in memory while they are sent.
const SMALL_BYTES: u64 = 8 << 20;
/// Where the record stands in its manifest.
const ANNOTATION: &str = "kiln.cache.record";
/// A manifest needs a config; OCI has this one for those that have none.
const EMPTY: (&str, &[u8]) = ("application/vnd.oci.empty.v1+json", b"{}");

/// A repository.
pub(super) struct RegistryStore {
    engine: Engine,
    registries: Arc<Registries>,
    cancel: BuildCancel,
    repository: Repository,
    /// The tag that was asked for: records of other tags are not seen.
    tag: String,
    /// The config of all records is there.
    has_config: Mutex<bool>,
}

impl RegistryStore {
    pub(super) fn new(
        engine: &Engine,
        registries: Option<&Arc<Registries>>,
        reference: &Reference,
        cancel: &BuildCancel,
    ) -> Result<Self, RemoteError> {
        let none = || RemoteError::Options("there is no way to registries here".to_owned());
        let registries = registries.ok_or_else(none)?.clone();
        let repository = registries.repository(reference);
        let tag = reference.tag().unwrap_or_default().to_owned();
        let (engine, cancel, has_config) = (engine.clone(), cancel.clone(), Mutex::default());
        Ok(Self { engine, registries, cancel, repository, tag, has_config })
    }

    pub(super) fn repository(&self) -> &Repository {
        &self.repository
    }

    /// `kiln-`, digits for tag and scope, the key.
    fn tag(&self, name: &ObjectName) -> Option<(String, Digest)> {
        match name {
            ObjectName::Record { scope, key } => {
                let place = Digest::of(format!("{}\n{scope}", self.tag).as_bytes()).hex();
                Some((format!("kiln-{}-{}", &place[..16], key.hex()), *key))
            }
            ObjectName::Blob(_) => None,
        }
    }

    /// The answer to what is asked, within `limit`.
    pub(super) fn ask<T>(
        &self,
        limit: Duration,
        future: impl Future<Output = Result<T, Error>>,
    ) -> Result<Result<T, Error>, RemoteError> {
        let bounded = async { Ok::<_, BuildError>(tokio::time::timeout(limit, future).await) };
        match self.registries.wait(&self.cancel, bounded) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(RemoteError::Server(format!("no answer for {} s", limit.as_secs()))),
            Err(BuildError::Cancelled) => Err(RemoteError::Stopped),
            Err(error) => Err(RemoteError::Server(crate::error::in_one_line(&error))),
        }
    }

    /// One answer for each name, side by side.
    fn each<T: Send>(
        &self,
        names: &[ObjectName],
        ask: impl Fn(&ObjectName) -> Result<Option<T>, RemoteError> + Sync,
    ) -> Result<Vec<Option<T>>, RemoteError> {
        let answers: Vec<Mutex<Option<T>>> = names.iter().map(|_| Mutex::default()).collect();
        let pairs: Vec<_> = names.iter().zip(&answers).collect();
        at_once(&pairs, PARALLEL, |(name, answer)| {
            *answer.lock().unwrap_or_else(PoisonError::into_inner) = ask(name)?;
            Ok::<_, RemoteError>(())
        })?;
        Ok(answers
            .into_iter()
            .map(|answer| answer.into_inner().unwrap_or_else(PoisonError::into_inner))
            .collect())
    }

    fn push(&self, blob: &Descriptor, source: &dyn BlobSource) -> Result<(), RemoteError> {
        // The client sees itself to a registry that stands still.
        let limit = Duration::from_secs(6 * 3600);
        let pushed = self.ask(limit, self.repository.push_blob(blob, source, &[]))?;
        pushed.map(drop).map_err(failed)
    }

    /// Sees to it that records' config is there. One at a time: docker's registry takes a blob for absent
    /// for a moment when somebody else brings it once more.
    fn put_config(&self, config: &Descriptor, content: &[u8]) -> Result<(), RemoteError> {
        let mut has_config = self.has_config.lock().unwrap_or_else(PoisonError::into_inner);
        if !*has_config {
            self.push(config, &content.to_vec())?;
            *has_config = true;
        }
        Ok(())
    }

    fn put_record(&self, tag: &str, key: &Digest, bytes: &[u8]) -> Result<(), RemoteError> {
        let wrong = |error| RemoteError::Content(io::Error::new(io::ErrorKind::InvalidData, error));
        let record = Record::decode(bytes, key).map_err(wrong)?;
        let (kind, empty) = EMPTY;
        let config = Descriptor::new(kind, Digest::of(empty), empty.len() as u64);
        self.put_config(&config, empty)?;
        let layer = |layer: &kiln_remote::RecordLayer| {
            Descriptor::new(&layer.media_type, layer.blob, layer.blob_bytes)
        };
        let text = String::from_utf8_lossy(bytes).into_owned();
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media_type::OCI_MANIFEST.to_owned()),
            config,
            layers: record.layers.iter().map(layer).collect(),
            annotations: [(ANNOTATION.to_owned(), text)].into(),
            extra: Extra::new(),
        };
        let json = to_json(&manifest);
        let put = self.repository.put_manifest(Which::Tag(tag), media_type::OCI_MANIFEST, &json);
        self.ask(PATIENCE, put)?.map(drop).map_err(failed)
    }
}

/// What is wrong with the registry, or with what it gave.
pub(super) fn failed(error: Error) -> RemoteError {
    match (error.fault(), error) {
        (_, Error::Local { source, .. }) => RemoteError::Content(source),
        (Fault::Integrity, error) => RemoteError::Content(io::Error::new(io::ErrorKind::InvalidData, error)),
        (_, error) => RemoteError::Server(crate::error::in_one_line(&error)),
    }
}

impl RemoteStore for RegistryStore {
    fn get_many(&self, names: &[ObjectName], _max_bytes: u64) -> Result<Vec<Option<Vec<u8>>>, RemoteError> {
        self.each(names, |name| {
            let Some((tag, _)) = self.tag(name) else { return Ok(None) };
            let manifest = match self.ask(PATIENCE, self.repository.manifest(Which::Tag(&tag)))? {
                Ok(manifest) => manifest,
                Err(Error::NotFound { .. }) => return Ok(None),
                // Something is there, and no record.
                Err(error) if error.fault() != Fault::Network => return Ok(Some(Vec::new())),
                Err(error) => return Err(failed(error)),
            };
            let manifest: Option<Manifest> = serde_json::from_slice(&manifest.bytes).ok();
            let record = manifest.and_then(|mut manifest| manifest.annotations.remove(ANNOTATION));
            Ok(Some(record.unwrap_or_default().into_bytes()))
        })
    }

    fn sizes(&self, names: &[ObjectName]) -> Result<Vec<Option<u64>>, RemoteError> {
        self.each(names, |name| match name {
            ObjectName::Blob(digest) => {
                self.ask(PATIENCE, self.repository.blob_size(digest))?.map_err(failed)
            }
            ObjectName::Record { .. } => Ok(None),
        })
    }

    fn read(
        &self,
        name: &ObjectName,
        out: &mut (dyn FnMut(&[u8]) -> io::Result<()> + Send),
    ) -> Result<bool, RemoteError> {
        let ObjectName::Blob(digest) = name else { return Ok(false) };
        let size = self.ask(PATIENCE, self.repository.blob_size(digest))?.map_err(failed)?;
        let Some(size_bytes) = size else { return Ok(false) };
        let blob = Descriptor::new("application/octet-stream", *digest, size_bytes);
        let mut out = Pieces(out);
        let limit = PATIENCE + Duration::from_secs(size_bytes / (8 << 10));
        match self.ask(limit, self.repository.fetch_blob(&blob, &mut out))? {
            Ok(()) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    fn put(
        &self,
        name: &ObjectName,
        content: &mut (dyn Read + Send),
        size_bytes: u64,
        _existing: Existing,
    ) -> Result<(), RemoteError> {
        if let Some((tag, key)) = self.tag(name) {
            let mut bytes = Vec::new();
            content.read_to_end(&mut bytes).map_err(RemoteError::Content)?;
            return self.put_record(&tag, &key, &bytes);
        }
        let ObjectName::Blob(digest) = name else { return Ok(()) };
        let blob = Descriptor::new("application/octet-stream", *digest, size_bytes);
        // The client reads from any byte on, as often as it has to.
        if size_bytes <= SMALL_BYTES {
            let mut bytes = Vec::new();
            content.read_to_end(&mut bytes).map_err(RemoteError::Content)?;
            return self.push(&blob, &bytes);
        }
        let mut file =
            self.engine.store.spool().map_err(|error| RemoteError::Content(io::Error::other(error)))?;
        io::copy(content, &mut file).map_err(RemoteError::Content)?;
        self.push(&blob, &Spooled(file))
    }
}

/// A closure that takes bytes.
struct Pieces<'a>(&'a mut (dyn FnMut(&[u8]) -> io::Result<()> + Send));

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.0)(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file without a name.
struct Spooled(File);

impl BlobSource for Spooled {
    fn open(&self, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        let mut file = own_file(&self.0)?;
        file.seek(SeekFrom::Start(offset))?;
        Ok(Box::new(file))
    }
}
