//! Manifests and indexes.

use kiln_oci::image::{Descriptor, media_type};
use kiln_oci::{Digest, document};
use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName};

use crate::error::clean;
use crate::exchange::{Ask, protocol, shown_host, shown_path};
use crate::referrers::SUBJECT;
use crate::{Error, Repository, Which};

/// Manifests and indexes beyond this size are refused, as containerd does.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// What says the digest of what came.
pub(crate) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A manifest, an index or another document with a digest, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestBytes {
    /// What the registry says it is.
    pub media_type: String,
    /// Of the bytes.
    pub digest: Digest,
    /// At most 4 MiB.
    pub bytes: Vec<u8>,
}

impl ManifestBytes {
    /// What points to it.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(&self.media_type, self.digest, self.bytes.len() as u64)
    }
}

impl Repository {
    /// What `which` leads to, without fetching it where the registry says enough: one HEAD.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Misnamed`] and those of every request.
    pub async fn resolve(&self, which: Which<'_>) -> Result<Descriptor, Error> {
        let found = self.ask_mirrors(|mirror| async move { mirror.resolve_here(which).await }).await;
        match found {
            Some(found) => Ok(found),
            None => self.resolve_here(which).await,
        }
    }

    /// The same of this very registry.
    ///
    /// # Errors
    /// As [`Repository::resolve`].
    pub async fn resolve_here(&self, which: Which<'_>) -> Result<Descriptor, Error> {
        let host = self.host().await?;
        let url = self.url(&host, &format!("manifests/{which}"))?;
        let scopes = self.pull();
        let ask = Ask::new(Method::HEAD, url, &scopes).header(ACCEPT, &accepted());
        let head = self.document(&host, &ask, 0).await?;
        let (digest, kind) = (said_digest(&head.headers), said_type(&head.headers));
        let size =
            head.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if let (Some(digest), Some(kind), Some(size)) = (digest, kind, size)
            && (document::is_manifest(&kind) || document::is_index(&kind))
        {
            match which {
                Which::Digest(expected) if *expected != digest => {
                    let (host, path) = (shown_host(&head.url), shown_path(&head.url));
                    return Err(Error::Misnamed { host, path, said: expected.to_string(), actual: digest });
                }
                _ => return Ok(Descriptor::new(&kind, digest, size)),
            }
        }
        Ok(self.manifest_here(which).await?.descriptor())
    }

    /// Fetches a manifest or an index. Its digest is checked; what it says is not.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Mismatch`] when it was asked for by another digest,
    /// [`Error::Misnamed`], [`Error::TooLarge`], [`Error::Document`] when it is nothing of the kind.
    pub async fn manifest(&self, which: Which<'_>) -> Result<ManifestBytes, Error> {
        let found = self.ask_mirrors(|mirror| async move { mirror.manifest_here(which).await }).await;
        match found {
            Some(found) => Ok(found),
            None => self.manifest_here(which).await,
        }
    }

    /// The same of this very registry.
    pub(crate) async fn manifest_here(&self, which: Which<'_>) -> Result<ManifestBytes, Error> {
        self.believed(self.read_manifest(which).await)
    }

    async fn read_manifest(&self, which: Which<'_>) -> Result<ManifestBytes, Error> {
        let host = self.host().await?;
        let url = self.url(&host, &format!("manifests/{which}"))?;
        let scopes = self.pull();
        let ask = Ask::new(Method::GET, url.clone(), &scopes).header(ACCEPT, &accepted());
        let came = self.document(&host, &ask, MAX_MANIFEST_BYTES).await?;
        let (host, path) = (shown_host(&url), shown_path(&url));
        let digest = Digest::of(&came.body);
        if let Which::Digest(expected) = which
            && *expected != digest
        {
            let (expected_bytes, actual_bytes) = (came.body.len() as u64, came.body.len() as u64);
            return Err(Error::Mismatch {
                host,
                expected: *expected,
                expected_bytes,
                actual: digest,
                actual_bytes,
            });
        }
        if let Some(said) = said_digest(&came.headers).filter(|said| *said != digest) {
            return Err(Error::Misnamed { host, path, said: said.to_string(), actual: digest });
        }
        let media_type = match said_type(&came.headers) {
            Some(kind) if kind.starts_with("application/vnd.") => kind,
            Some(kind) if kind == "text/html" => {
                return Err(protocol(&url, &Method::GET, "with a web page: is this a registry?"));
            }
            // Old registries say that it is JSON, or nothing.
            _ => document::own_media_type(&came.body).map_err(|source| Error::Document {
                host,
                path,
                source,
            })?,
        };
        Ok(ManifestBytes { media_type, digest, bytes: came.body })
    }

    /// Puts a manifest or an index under `which`; what it names must be there. Returns its digest. One that has a
    /// `subject` is among the subject's [`Repository::referrers`] from then on, also where the registry knows nothing
    /// of them: then it costs two requests more.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when `which` is another digest, [`Error::Misnamed`] when the registry made
    /// something else of it.
    pub async fn put_manifest(
        &self,
        which: Which<'_>,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<Digest, Error> {
        let (digest, is_listed) = self.put(which, media_type, bytes).await?;
        if !is_listed
            && let Ok(referring) = document::read_referring(bytes)
            && let Some(subject) = &referring.subject
        {
            let descriptor = Descriptor::new(media_type, digest, bytes.len() as u64);
            self.keep_referrer(&subject.digest, referring.listed(&descriptor)).await?;
        }
        Ok(digest)
    }

    /// The digest, and whether the registry has noted down itself what the manifest refers to.
    pub(crate) async fn put(
        &self,
        which: Which<'_>,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(Digest, bool), Error> {
        let host = self.host().await?;
        let url = self.url(&host, &format!("manifests/{which}"))?;
        let (scopes, digest, size) = (self.push(), Digest::of(bytes), bytes.len() as u64);
        if let Which::Digest(expected) = which
            && *expected != digest
        {
            let (host, expected) = (shown_host(&url), *expected);
            return Err(Error::Mismatch {
                host,
                expected,
                expected_bytes: size,
                actual: digest,
                actual_bytes: size,
            });
        }
        let mut ask = Ask::new(Method::PUT, url.clone(), &scopes).header(CONTENT_TYPE, media_type);
        ask.body = bytes.to_vec().into();
        let answer = self.document(&host, &ask, MAX_MANIFEST_BYTES).await?;
        match said_digest(&answer.headers) {
            Some(said) if said != digest => {
                let (host, path) = (shown_host(&url), shown_path(&url));
                Err(Error::Misnamed { host, path, said: said.to_string(), actual: digest })
            }
            _ => Ok((digest, answer.headers.contains_key(SUBJECT))),
        }
    }
}

fn accepted() -> String {
    [media_type::OCI_INDEX, media_type::OCI_MANIFEST, media_type::DOCKER_INDEX, media_type::DOCKER_MANIFEST]
        .join(", ")
        + ", */*;q=0.1"
}

fn said_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get(CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

/// The media type without parameters.
fn said_type(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let kind = clean(text.split(';').next().unwrap_or_default()).to_ascii_lowercase();
    Some(kind).filter(|kind| !kind.is_empty())
}
