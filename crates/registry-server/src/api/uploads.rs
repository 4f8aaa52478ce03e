//! Blobs on their way here: at once, in pieces, or from another repository.

use std::time::Duration;

use bytes::Bytes;
use hyper::Response;
use hyper::header::{CONTENT_LENGTH, CONTENT_RANGE, HeaderName, LOCATION, RANGE, RETRY_AFTER};
use kiln_oci::Digest;
use tokio::sync::OwnedMutexGuard;

use super::{Answer, Ask, Held, Registry, created, empty, put};
use crate::body::Body;
use crate::directory::{NotEnded, Writing};
use crate::range::piece;
use crate::refusal::Refusal;
use crate::rights::Right;
use crate::route::{Name, UploadId, parameter};
use crate::transfer::Arriving;

const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");

/// Written at once.
const BATCH_BYTES: usize = 256 << 10;

/// So long a request waits for the one before it on the same upload, which may hang on a dead connection.
const TURN: Duration = Duration::from_secs(5);

impl Registry {
    pub(super) async fn begin_upload(&self, ask: &Ask, name: &Name, body: &mut Arriving) -> Answer {
        if let Some(mount) = parameter(&ask.query, "mount") {
            let digest = mount.parse().map_err(|_| bad_digest())?;
            if self.mount(ask, name, &digest).await? && self.has_good(name, &digest).await? {
                return Ok(created(&format!("/v2/{name}/blobs/{digest}"), &digest));
            }
        }
        let expected = wanted(ask)?;
        let (at, who) = (name.clone(), ask.who.clone());
        let begun = self.disk(move |directory| Ok(directory.uploads.begin(&at, &who)?)).await?;
        let too_many = || {
            let refusal =
                Refusal::new(429, "TOOMANYREQUESTS", "there are too many uploads that are not ended");
            refusal.with(RETRY_AFTER, "10")
        };
        let id = begun.ok_or_else(too_many)?;
        let Some(expected) = expected else {
            return Ok(going_on(202, name, &id, 0));
        };
        let writing = self.enter(ask, name, &id).await?;
        match self.append(writing, body, None).await {
            Ok(writing) => self.finish(name, &id, writing, expected).await,
            Err(refusal) => {
                // Nobody knows its number.
                let _ = self.cancel_upload(ask, name, &id).await;
                Err(refusal)
            }
        }
    }

    /// Whether the blob of a repository is what it should be. One that is damaged has to be sent: that mends it.
    async fn has_good(&self, name: &Name, digest: &Digest) -> Result<bool, Refusal> {
        let (name, wanted) = (name.clone(), *digest);
        match self.disk(move |directory| Ok(directory.open_blob(&name, &wanted)?)).await? {
            Some((file, _)) => self.is_good(&self.directory()?.verified, digest, &file).await,
            None => Ok(false),
        }
    }

    /// Takes a blob from another repository, if who asks may read it there.
    async fn mount(&self, ask: &Ask, name: &Name, digest: &Digest) -> Result<bool, Refusal> {
        let Some(from) = parameter(&ask.query, "from") else { return Ok(false) };
        let Ok(from) = from.parse::<Name>() else { return Ok(false) };
        if !self.lets(&ask.who, &from, Right::Pull) {
            return Ok(false);
        }
        if let Held::Pushed(pushing) = &self.held {
            if !self.lets(&ask.who, &pushing.images.called(&from), Right::Pull) {
                return Ok(false);
            }
            return self.mount_image_blob(pushing, name, &from, digest).await;
        }
        let (name, digest) = (name.clone(), *digest);
        self.disk(move |directory| Ok(directory.mount(&name, &from, &digest)?)).await
    }

    pub(super) async fn upload_status(&self, ask: &Ask, name: &Name, id: &UploadId) -> Answer {
        let writing = self.enter(ask, name, id).await?;
        Ok(going_on(204, name, id, writing.size()))
    }

    pub(super) async fn upload_piece(
        &self,
        ask: &Ask,
        name: &Name,
        id: &UploadId,
        body: &mut Arriving,
    ) -> Answer {
        let writing = self.add_piece(ask, name, id, body).await?;
        Ok(going_on(202, name, id, writing.size()))
    }

    pub(super) async fn end_upload(
        &self,
        ask: &Ask,
        name: &Name,
        id: &UploadId,
        body: &mut Arriving,
    ) -> Answer {
        let expected = wanted(ask)?.ok_or_else(bad_digest)?;
        let writing = self.add_piece(ask, name, id, body).await?;
        self.finish(name, id, writing, expected).await
    }

    /// Adds a piece where it belongs: behind what is there.
    async fn add_piece(
        &self,
        ask: &Ask,
        name: &Name,
        id: &UploadId,
        body: &mut Arriving,
    ) -> Result<OwnedMutexGuard<Writing>, Refusal> {
        let writing = self.enter(ask, name, id).await?;
        let length = expected_piece(ask, name, id, &writing, body)?;
        self.append(writing, body, length).await
    }

    pub(super) async fn cancel_upload(&self, ask: &Ask, name: &Name, id: &UploadId) -> Answer {
        let mut writing = self.enter(ask, name, id).await?;
        let id = id.clone();
        self.disk(move |directory| Ok(directory.uploads.end(&id, &mut writing)?)).await?;
        Ok(empty(204))
    }

    async fn enter(
        &self,
        ask: &Ask,
        name: &Name,
        id: &UploadId,
    ) -> Result<OwnedMutexGuard<Writing>, Refusal> {
        let entered = tokio::time::timeout(TURN, self.directory()?.uploads.enter(name, id, &ask.who)).await;
        let busy = |_| {
            let refusal = Refusal::new(429, "TOOMANYREQUESTS", "another request writes to this upload");
            refusal.with(RETRY_AFTER, "2")
        };
        entered.map_err(busy)?.ok_or_else(Refusal::no_upload)
    }

    /// Adds the body to what is there; `length`: it has to be so long. What came before a connection broke
    /// stays, so that the client can go on behind it.
    async fn append(
        &self,
        mut writing: OwnedMutexGuard<Writing>,
        body: &mut Arriving,
        length: Option<u64>,
    ) -> Result<OwnedMutexGuard<Writing>, Refusal> {
        let start = writing.size();
        let mut came = 0u64;
        loop {
            let (batch, end) = gather(body).await;
            let batch_bytes: u64 = batch.iter().map(|piece| piece.len() as u64).sum();
            came += batch_bytes;
            let too_long = length.is_some_and(|length| came > length);
            let too_large = start.saturating_add(came) > self.limits.blob_bytes;
            let too_short = matches!(end, Some(Ok(()))) && length.is_some_and(|length| came < length);
            if too_long || too_short || too_large {
                self.disk(move |_| Ok(writing.cut(start)?)).await?;
                return Err(match too_large {
                    true => Refusal::new(413, "SIZE_INVALID", "the blob is larger than this registry takes"),
                    false => Refusal::new(400, "SIZE_INVALID", "the piece is not as long as its range"),
                });
            }
            if batch_bytes > 0
                && let Some(limit) = self.lacks_room(batch_bytes).await?
            {
                // What came stays for who comes again, unless it can never be enough.
                return Err(match writing.size() + batch_bytes > limit {
                    true => Refusal::new(413, "SIZE_INVALID", "the blob is larger than what may wait here"),
                    false => {
                        let text = "too much waits here for the manifests that need it";
                        Refusal::new(429, "TOOMANYREQUESTS", text).with(RETRY_AFTER, "60")
                    }
                });
            }
            if !batch.is_empty() {
                // With the turn: whoever drops this future leaves the upload whole.
                writing = self
                    .disk(move |_| {
                        writing.add(&batch)?;
                        Ok(writing)
                    })
                    .await?;
            }
            match end {
                None => {}
                Some(Ok(())) => return Ok(writing),
                Some(Err(refusal)) => return Err(refusal),
            }
        }
    }

    /// The limit, if there is no room for so much more, not even where others have given up.
    async fn lacks_room(&self, more_bytes: u64) -> Result<Option<u64>, Refusal> {
        let directory = self.directory()?;
        // Asked for each batch, and mostly there is room.
        if directory.lacks_room(more_bytes).is_none() {
            return Ok(None);
        }
        self.disk(|directory| Ok(directory.uploads.expire_idle()?)).await?;
        Ok(directory.lacks_room(more_bytes))
    }

    async fn finish(
        &self,
        name: &Name,
        id: &UploadId,
        mut writing: OwnedMutexGuard<Writing>,
        expected: Digest,
    ) -> Answer {
        let (at, id) = (name.clone(), id.clone());
        self.disk(move |directory| {
            directory.end_upload(&at, &id, &mut writing, &expected).map_err(|error| match error {
                NotEnded::Digest { actual } => Refusal::digest(format!("what came is {actual}")),
                NotEnded::Directory(error) => error.into(),
            })
        })
        .await?;
        Ok(created(&format!("/v2/{name}/blobs/{expected}"), &expected))
    }
}

/// A batch of the body, and how it ended if it did.
async fn gather(body: &mut Arriving) -> (Vec<Bytes>, Option<Result<(), Refusal>>) {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while bytes < BATCH_BYTES {
        match body.next().await {
            Ok(Some(piece)) => {
                bytes += piece.len();
                batch.push(piece);
            }
            Ok(None) => return (batch, Some(Ok(()))),
            Err(refusal) => return (batch, Some(Err(refusal))),
        }
    }
    (batch, None)
}

/// How long the piece has to be, if the request says which one it is; 416 unless it is the next one.
fn expected_piece(
    ask: &Ask,
    name: &Name,
    id: &UploadId,
    writing: &Writing,
    body: &Arriving,
) -> Result<Option<u64>, Refusal> {
    let Some(header) = ask.header(&CONTENT_RANGE) else { return Ok(None) };
    let invalid = |text: &str| Refusal::new(400, "BLOB_UPLOAD_INVALID", text);
    let (from, length) = piece(header).ok_or_else(|| invalid("Content-Range is no range"))?;
    if from != writing.size() {
        let refusal = Refusal::new(416, "BLOB_UPLOAD_INVALID", "this is not the next piece");
        return Err(refusal
            .with(LOCATION, &location(name, id))
            .with(RANGE, &range(writing.size()))
            .with(UPLOAD_ID, id.as_str()));
    }
    if body.announced().is_some_and(|announced| announced != length) {
        return Err(Refusal::new(400, "SIZE_INVALID", "Content-Length is not the length of Content-Range"));
    }
    Ok(Some(length))
}

/// `digest` of the query.
fn wanted(ask: &Ask) -> Result<Option<Digest>, Refusal> {
    parameter(&ask.query, "digest").map(|text| text.parse().map_err(|_| bad_digest())).transpose()
}

fn bad_digest() -> Refusal {
    Refusal::digest("digest= is not sha256: and 64 lower-case digits")
}

fn location(name: &Name, id: &UploadId) -> String {
    format!("/v2/{name}/blobs/uploads/{id}")
}

/// What is there, both ends included: clients know `0-0` for nothing, too.
fn range(size: u64) -> String {
    format!("0-{}", size.saturating_sub(1))
}

fn going_on(status: u16, name: &Name, id: &UploadId, size: u64) -> Response<Body> {
    let mut response = empty(status);
    put(&mut response, LOCATION, &location(name, id));
    put(&mut response, RANGE, &range(size));
    put(&mut response, UPLOAD_ID, id.as_str());
    if status != 204 {
        put(&mut response, CONTENT_LENGTH, "0");
    }
    response
}
