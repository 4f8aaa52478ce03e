//! Manifests.

use std::sync::Arc;

use hyper::Response;
use hyper::header::{CONTENT_TYPE, HeaderName};
use kiln_oci::Digest;
use kiln_oci::document;

use super::{Answer, Ask, Held, Registry, created, empty, identify, put};
use crate::body::Body;
use crate::directory::{Manifest, NotPut, Reads};
use crate::refusal::Refusal;
use crate::route::{Name, Which};
use crate::transfer::Arriving;

/// As registries and clients agree.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;

const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");

impl Registry {
    pub(super) async fn get_manifest(self: &Arc<Self>, ask: &Ask, name: &Name, which: &Which) -> Answer {
        if let Some(mirror) = &self.mirror
            && mirror.manifest(self.directory()?, name, which).await?
        {
            self.metrics.mirrored.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        let (name, which) = (name.clone(), which.clone());
        let found = self.disk(move |directory| Ok(directory.manifest(&name, &which)?)).await?;
        let manifest = found.ok_or_else(Refusal::no_manifest)?;
        shown(ask, &manifest.media_type, &manifest.digest, manifest.bytes)
    }

    pub(super) async fn put_manifest(
        &self,
        ask: &Ask,
        name: &Name,
        which: &Which,
        body: &mut Arriving,
    ) -> Answer {
        let bytes = body.whole(MAX_MANIFEST_BYTES, "manifests").await?;
        let digest = Digest::of(&bytes);
        if let Which::Digest(expected) = which
            && *expected != digest
        {
            return Err(Refusal::digest(format!("the manifest is {digest}")));
        }
        let said = ask.header(&CONTENT_TYPE).map(|kind| kind.split(';').next().unwrap_or(kind).trim());
        let (media_type, reads) = read(&bytes, said)?;
        let manifest = Manifest { media_type, digest, bytes };
        let subject = reads.subject.as_ref().map(|subject| subject.digest);
        let tag = match which {
            Which::Tag(tag) => Some(tag.clone()),
            Which::Digest(_) => None,
        };
        if let Held::Pushed(pushing) = &self.held {
            self.put_pushed(pushing, name, tag, manifest, reads).await?;
        } else {
            let at = name.clone();
            self.disk(move |directory| Ok(directory.put_manifest(&at, tag.as_ref(), &manifest, &reads)?))
                .await?;
        }
        let mut response = created(&format!("/v2/{name}/manifests/{digest}"), &digest);
        if let Some(subject) = subject {
            put(&mut response, SUBJECT, &subject.to_string());
        }
        Ok(response)
    }

    pub(super) async fn delete_manifest(&self, name: &Name, which: &Which) -> Answer {
        if let Held::Pushed(pushing) = &self.held {
            return self.delete_pushed(pushing, name, which).await;
        }
        let (name, which) = (name.clone(), which.clone());
        match self.disk(move |directory| Ok(directory.remove_manifest(&name, &which)?)).await? {
            true => Ok(empty(202)),
            false => Err(Refusal::no_manifest()),
        }
    }
}

impl From<NotPut> for Refusal {
    fn from(error: NotPut) -> Self {
        let lacks = |what: &str, digest: Digest| {
            Self::new(400, "MANIFEST_BLOB_UNKNOWN", format!("the repository has no {what} {digest}"))
        };
        match error {
            NotPut::Lacks { digest, is_manifest: false } => lacks("blob", digest),
            NotPut::Lacks { digest, is_manifest: true } => lacks("manifest", digest),
            NotPut::Directory(error) => error.into(),
        }
    }
}

/// A manifest, unless the client has it.
pub(super) fn shown(ask: &Ask, media_type: &str, digest: &Digest, bytes: Vec<u8>) -> Answer {
    if ask.has(digest) {
        let mut response = empty(304);
        identify(&mut response, digest);
        return Ok(response);
    }
    let mut response = Response::new(Body::from(bytes));
    identify(&mut response, digest);
    put(&mut response, CONTENT_TYPE, media_type);
    Ok(response)
}

/// What it is and what it needs.
fn read(bytes: &[u8], said: Option<&str>) -> Result<(String, Reads), Refusal> {
    let invalid = |message: String| Refusal::new(400, "MANIFEST_INVALID", message);
    let reads = Reads::new(bytes).map_err(|error| invalid(error.to_string()))?;
    let own = reads.media_type.as_deref().filter(|kind| !kind.is_empty());
    let kind = match (said, own) {
        (Some(said), Some(own)) if said != own && said.starts_with("application/vnd.") => {
            return Err(invalid(format!("it says {own:?}, its Content-Type {said:?}")));
        }
        (_, Some(own)) => own.to_owned(),
        (Some(said), None) if document::is_manifest(said) || document::is_index(said) => said.to_owned(),
        _ => document::own_media_type(bytes).map_err(|error| invalid(error.to_string()))?,
    };
    if reads.schema_version != Some(2) {
        return Err(invalid("schemaVersion is not 2".to_owned()));
    }
    // What the one takes for an image would be a list for the other.
    let is_both = !reads.manifests.is_empty() && (reads.config.is_some() || !reads.layers.is_empty());
    if is_both {
        return Err(invalid("it is a manifest and an index at once".to_owned()));
    }
    if document::is_manifest(&kind) && reads.config.is_none() {
        return Err(invalid("there is no config".to_owned()));
    }
    if !document::is_manifest(&kind) && !document::is_index(&kind) {
        return Err(invalid(format!("{kind:?} is neither a manifest nor an index")));
    }
    Ok((kind, reads))
}
