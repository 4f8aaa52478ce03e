//! What is said of an image, for users to see: the statements that the index beside it lists.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::sync::Arc;

use kiln_content::ImageRecord;
use kiln_oci::document::{DocumentError, JsonText};
use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Platform, document};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Place;
use super::source::Source;
use crate::archive::Archive;
use crate::export::{PREDICATE_TYPE, is_attestation_of};
use crate::load::{MAX_MANIFEST_BYTES, blob_name, read_verified};
use crate::load_oci::{parse_index, parse_manifest};
use crate::registry::Registries;
use crate::registry::pull::{Abort, Fetch, State};
use crate::registry::stored::in_store;
use crate::{BuildCancel, BuildError, Engine};

/// Statements of one image; nobody has more.
const MAX_STATEMENTS: usize = 1000;
/// The packages of the largest images are some ten megabytes.
const MAX_STATEMENT_BYTES: u64 = 128 << 20;
/// The name of a statement's form, without its version.
const STATEMENT: &str = "https://in-toto.io/Statement/";

/// A statement about an image of an index.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredAttestation {
    /// What the image is for; `None`: the index does not say.
    pub platform: Option<Platform>,
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// What is said, a URI; whoever wrote the manifest says so.
    pub predicate_type: String,
    /// Points to the statement.
    pub statement: Descriptor,
}

/// What is said of the images of an index.
pub struct Said {
    /// Digest of the index, or of an image alone, of which nothing is said.
    pub root: Digest,
    /// In the order of the index.
    pub all: Vec<StoredAttestation>,
    archive: Arc<Archive>,
    fetch: Option<Arc<Fetch>>,
    _abort: Option<Abort>,
}

/// A statement that was read, and is about the image that it stands beside.
pub struct Statement {
    json: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Parts {
    #[serde(rename = "_type")]
    kind: String,
    predicate_type: String,
    subject: Vec<PartSubject>,
    #[serde(rename = "predicate")]
    _predicate: IgnoredAny,
}

#[derive(Deserialize)]
struct PartSubject {
    #[serde(default)]
    digest: BTreeMap<String, String>,
}

/// What is said of an image of the store; `None`: no index is kept beside it.
///
/// # Errors
/// Those of the store; [`BuildError::Document`] for what is no index or manifest.
pub fn said_of(engine: &Engine, image: &ImageRecord) -> Result<Option<Said>, BuildError> {
    let Some(root) = engine.store.index_of(&image.config)? else { return Ok(None) };
    let archive = in_store(engine, &image.config.to_string());
    let name = blob_name(&root);
    let json = archive.read_small(&name, MAX_MANIFEST_BYTES)?;
    let kind = archive.parse(&name, &json, document::own_media_type)?;
    let descriptor = Descriptor::new(&kind, root, json.len() as u64);
    Said::read(Arc::new(archive), &descriptor).map(Some)
}

/// What is said of an image outside the store. Costs a request for each manifest of statements that a registry has.
///
/// # Errors
/// [`BuildError::Registry`], [`BuildError::Archive`], [`BuildError::Document`].
pub fn said_at(
    engine: &Engine,
    registries: &Arc<Registries>,
    place: &Place,
    cancel: &BuildCancel,
) -> Result<Said, BuildError> {
    let (source, abort) = Source::open(engine, registries, place, cancel)?;
    let Source { archive, fetch, root, .. } = source;
    Ok(Said { fetch, _abort: abort, ..Said::read(archive, &root)? })
}

impl Said {
    fn read(archive: Arc<Archive>, root: &Descriptor) -> Result<Self, BuildError> {
        let mut said = Self { root: root.digest, all: Vec::new(), archive, fetch: None, _abort: None };
        if !document::is_index(&root.media_type) {
            return Ok(said);
        }
        let json = said.document(root)?;
        let index = parse_index(&said.archive, root, &json)?;
        let mut seen = HashSet::new();
        for listed in &index.manifests {
            let Some(manifest) = is_attestation_of(listed) else { continue };
            if !seen.insert((listed.digest, manifest)) {
                continue;
            }
            let of = index.manifests.iter().find(|other| other.digest == manifest);
            let platform = of.and_then(|of| of.platform.clone());
            let json = said.document(listed)?;
            for statement in parse_manifest(&said.archive, listed, &json)?.layers {
                let Some(predicate_type) = statement.annotations.get(PREDICATE_TYPE).cloned() else {
                    continue;
                };
                let platform = platform.clone();
                said.all.push(StoredAttestation { platform, manifest, predicate_type, statement });
            }
            if said.all.len() > MAX_STATEMENTS || seen.len() > MAX_STATEMENTS {
                let too_many = DocumentError::TooMany { what: "statements", limit: MAX_STATEMENTS };
                return Err(said.archive.refused(&blob_name(&root.digest), too_many));
            }
        }
        Ok(said)
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, BuildError> {
        read_verified(&self.archive, &blob_name(&descriptor.digest), descriptor, MAX_MANIFEST_BYTES)
    }

    /// Reads a statement, and checks that it is what it is listed as.
    ///
    /// # Errors
    /// [`BuildError::LargeDocument`]; [`BuildError::Document`] for what is no statement, or one of another kind or
    /// about something else.
    pub fn statement(&self, of: &StoredAttestation) -> Result<Statement, BuildError> {
        let name = blob_name(&of.statement.digest);
        let json = self.blob(&name, &of.statement)?;
        let wrong = |at: &str, message: &str| {
            let form = DocumentError::Form { at: at.to_owned(), message: message.to_owned() };
            Err(self.archive.refused(&name, form))
        };
        let text = JsonText::new(&json).map_err(|error| self.archive.refused(&name, error))?;
        let parts: Parts = match serde_json::from_str(text.as_str()) {
            Ok(parts) => parts,
            Err(error) => {
                let message: String = error.to_string().chars().take(100).collect();
                return wrong("the statement", &message);
            }
        };
        if !parts.kind.starts_with(STATEMENT) {
            return wrong("_type", "it is no in-toto statement");
        }
        if parts.predicate_type != of.predicate_type {
            return wrong("predicateType", "it is not what the manifest says");
        }
        let hex = of.manifest.hex();
        if !parts.subject.iter().any(|subject| subject.digest.get("sha256") == Some(&hex)) {
            return wrong("subject", "it is not about the image that it stands beside");
        }
        Ok(Statement { json })
    }

    fn blob(&self, name: &str, descriptor: &Descriptor) -> Result<Vec<u8>, BuildError> {
        let too_large = |size_bytes| BuildError::LargeDocument {
            path: self.archive.path().to_owned(),
            member: name.to_owned(),
            size_bytes,
            limit_bytes: MAX_STATEMENT_BYTES,
        };
        // Before anything is fetched.
        if descriptor.size > MAX_STATEMENT_BYTES {
            return Err(too_large(descriptor.size));
        }
        if let Some(fetch) = &self.fetch {
            fetch.set(descriptor.digest, State::Known(descriptor.clone()));
        }
        let (reader, size_bytes) = self.archive.read(name)?;
        if size_bytes > MAX_STATEMENT_BYTES {
            return Err(too_large(size_bytes));
        }
        let mut json = Vec::new();
        reader
            .take(MAX_STATEMENT_BYTES)
            .read_to_end(&mut json)
            .map_err(|source| BuildError::Unreadable { path: self.archive.path().join(name), source })?;
        let (actual, actual_bytes) = (Digest::of(&json), json.len() as u64);
        let (expected, expected_bytes) = (descriptor.digest, descriptor.size);
        if (actual, actual_bytes) != (expected, expected_bytes) {
            let source = kiln_content::Error::Mismatch { expected, expected_bytes, actual, actual_bytes };
            let (path, member) = (self.archive.path().to_owned(), name.to_owned());
            return Err(BuildError::NotPromised { path, member, source: Box::new(source) });
        }
        Ok(json)
    }
}

impl Statement {
    /// The statement, or only what it says.
    pub fn json(&self, is_whole: bool) -> Option<JsonText<'_>> {
        let whole = JsonText::new(&self.json).ok()?;
        if is_whole { Some(whole) } else { whole.member("predicate") }
    }
}
