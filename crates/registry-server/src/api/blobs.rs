//! Blobs: read whole, in part, or not at all because who asks has them.

use std::fs::File;
use std::sync::Arc;

use hyper::Response;
use hyper::header::{ACCEPT_RANGES, CACHE_CONTROL, CONTENT_RANGE, CONTENT_TYPE, IF_RANGE, RANGE};
use kiln_oci::Digest;

use super::{Answer, Ask, Held, Registry, empty, identify, put};
use crate::body::{Body, FileBody};
use crate::range::{Asked, asked};
use crate::refusal::Refusal;
use crate::route::Name;
use crate::verified::Verified;

impl Registry {
    pub(super) async fn get_blob(self: &Arc<Self>, ask: &Ask, name: &Name, digest: &Digest) -> Answer {
        let (at, wanted) = (name.clone(), *digest);
        let found = self.disk(move |directory| Ok(directory.open_blob(&at, &wanted)?)).await?;
        if let Some((file, size)) = found
            && (ask.has(digest) || self.is_good(&self.directory()?.verified, digest, &file).await?)
        {
            return partly(ask, digest, size, |from, to| Ok(FileBody::new(file, from, to)));
        }
        let Some(mirror) = &self.mirror else { return Err(Refusal::no_blob()) };
        let coming = mirror.blob(self.directory()?, name, digest).await?;
        self.metrics.mirrored.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        partly(ask, digest, coming.size, |from, to| {
            Ok(FileBody::growing(coming.file.try_clone()?, from, to, coming.grows.clone()))
        })
    }

    /// Whether a blob is what its digest says. One that is not is told of, and is as good as not there: who pushes it
    /// again mends it.
    pub(super) async fn is_good(
        &self,
        verified: &Arc<Verified>,
        digest: &Digest,
        file: &File,
    ) -> Result<bool, Refusal> {
        let is_good = verified.is_good_soon(digest, file).await?;
        if !is_good {
            self.reports.say(format!("blob {digest} is damaged on the disk and is not given out"));
        }
        Ok(is_good)
    }

    pub(super) async fn delete_blob(&self, name: &Name, digest: &Digest) -> Answer {
        if let Held::Pushed(_) = &self.held {
            return Err(Refusal::unsupported("blobs go with the last manifest that needs them"));
        }
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
