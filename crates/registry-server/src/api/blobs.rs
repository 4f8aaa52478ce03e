//! Blobs: read whole, in part, or not at all because who asks has them.

use hyper::Response;
use hyper::header::{ACCEPT_RANGES, CACHE_CONTROL, CONTENT_RANGE, CONTENT_TYPE, IF_RANGE, RANGE};
use kiln_oci::Digest;

use super::{Answer, Ask, Registry, empty, identify, put};
use crate::body::{Body, FileBody};
use crate::range::{Asked, asked};
use crate::refusal::Refusal;
use crate::route::Name;
use std::sync::Arc;

impl Registry {
    pub(super) async fn get_blob(self: &Arc<Self>, ask: &Ask, name: &Name, digest: &Digest) -> Answer {
        let (at, wanted) = (name.clone(), *digest);
        let found = self.disk(move |directory| Ok(directory.open_blob(&at, &wanted)?)).await?;
        if let Some((file, size)) = found {
            return partly(ask, digest, size, |from, to| Ok(FileBody::new(file, from, to)));
        }
        let Some(mirror) = &self.mirror else { return Err(Refusal::no_blob()) };
        let coming = mirror.blob(self.directory()?, name, digest).await?;
        self.metrics.mirrored.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        partly(ask, digest, coming.size, |from, to| {
            Ok(FileBody::growing(coming.file.try_clone()?, from, to, coming.grows.clone()))
        })
    }

    pub(super) async fn delete_blob(&self, name: &Name, digest: &Digest) -> Answer {
        let (name, digest) = (name.clone(), *digest);
        match self.disk(move |directory| Ok(directory.remove_blob(&name, &digest)?)).await? {
            true => Ok(empty(202)),
            false => Err(Refusal::no_blob()),
        }
    }
}

/// The blob, or the part of it that is asked for.
pub(super) fn partly(
    ask: &Ask,
    digest: &Digest,
    size: u64,
    body: impl FnOnce(u64, u64) -> Result<FileBody, Refusal>,
) -> Answer {
    let mut response = Response::new(Body::Empty);
    if ask.has(digest) {
        response = empty(304);
        identify(&mut response, digest);
        return Ok(response);
    }
    let is_same = ask.header(&IF_RANGE).is_none_or(|tag| tag.trim_matches('"') == digest.to_string());
    let range = match ask.header(&RANGE).filter(|_| is_same) {
        Some(range) => asked(range, size),
        None => Asked::Whole,
    };
    let (from, to) = match range {
        Asked::Whole => (0, size),
        Asked::Part(from, to) => {
            response = empty(206);
            put(&mut response, CONTENT_RANGE, &format!("bytes {from}-{}/{size}", to - 1));
            (from, to)
        }
        Asked::Outside => {
            let refusal = Refusal::new(416, "SIZE_INVALID", "the blob has nothing in this range");
            return Err(refusal.with(CONTENT_RANGE, &format!("bytes */{size}")));
        }
    };
    identify(&mut response, digest);
    put(&mut response, ACCEPT_RANGES, "bytes");
    put(&mut response, CONTENT_TYPE, "application/octet-stream");
    // Not for caches that others share: who may read it is asked each time.
    put(&mut response, CACHE_CONTROL, "private, max-age=31536000, immutable");
    *response.body_mut() = Body::File(body(from, to)?);
    Ok(response)
}
