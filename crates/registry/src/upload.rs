//! Blobs on their way to a registry: looked for first, mounted where another repository has them, gone on
//! with where they broke off.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use kiln_oci::Digest;
use kiln_oci::image::Descriptor;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderName, LOCATION, RANGE};
use reqwest::{Body, Method, Url};
use tokio::sync::mpsc;

use crate::auth::Scope;
use crate::client::MAX_LIST_BYTES;
use crate::error::clean;
use crate::exchange::{Ask, Once, Tries, protocol, shown_path};
use crate::host::{Host, same_origin};
use crate::manifest::CONTENT_DIGEST;
use crate::{Error, Repository};

/// Blobs up to this size are sent with the request that ends the upload.
const SMALL_BYTES: u64 = 256 << 10;
/// What is read and sent at a time.
const PIECE_BYTES: usize = 256 << 10;
/// A registry that wants pieces of at least so many bytes says so here.
const CHUNK_MIN: HeaderName = HeaderName::from_static("oci-chunk-min-length");

/// A blob that can be read from any byte on, as often as needed.
pub trait BlobSource: Send + Sync {
    /// The bytes from `offset` to the end. It is read on another thread.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open(&self, offset: u64) -> io::Result<Box<dyn Read + Send>>;
}

impl BlobSource for Vec<u8> {
    fn open(&self, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.len());
        Ok(Box::new(io::Cursor::new(self[from..].to_vec())))
    }
}

/// How a blob came to be in the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pushed {
    /// It was there.
    Known,
    /// The registry has it from this repository of its own.
    Mounted(String),
    /// It was sent.
    Sent,
}

/// An upload that the registry has begun.
struct Upload {
    url: Url,
    /// So many bytes have arrived.
    offset: u64,
    chunk_min: u64,
}

impl Repository {
    /// Makes sure that the repository has the blob that `blob` names; `source` gives its bytes when they are
    /// needed. `elsewhere` are repositories of the same registry that may have it.
    ///
    /// # Errors
    /// Those of every request; [`Error::Local`] when `source` fails. A `source` that gives other bytes
    /// than `blob` says is refused by the registry.
    pub async fn push_blob(
        &self,
        blob: &Descriptor,
        source: &dyn BlobSource,
        elsewhere: &[String],
    ) -> Result<Pushed, Error> {
        if let Some(there) = self.find_blob(blob, elsewhere).await? {
            return Ok(there);
        }
        self.send_blob(blob, source).await?;
        Ok(Pushed::Sent)
    }

    /// Looks whether the registry has the blob, here or in one of the repositories `elsewhere`, from which it is
    /// mounted then. `None`: it has to be sent.
    ///
    /// # Errors
    /// Those of every request.
    pub async fn find_blob(&self, blob: &Descriptor, elsewhere: &[String]) -> Result<Option<Pushed>, Error> {
        if self.blob_size(&blob.digest).await?.is_some() {
            return Ok(Some(Pushed::Known));
        }
        let host = self.host().await?;
        for from in elsewhere.iter().filter(|from| **from != self.path).take(3) {
            match self.mount(&host, blob, from).await {
                Ok(true) => return Ok(Some(Pushed::Mounted(from.clone()))),
                // Without the right to read there it is sent.
                Ok(false) | Err(Error::Denied { .. } | Error::NotFound { .. } | Error::Status { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Sends the blob, whether the repository has it or not.
    ///
    /// # Errors
    /// As [`Repository::push_blob`].
    pub async fn send_blob(&self, blob: &Descriptor, source: &dyn BlobSource) -> Result<(), Error> {
        let host = self.host().await?;
        let path = format!("/v2/{}/blobs/uploads/", self.path);
        let mut tries = Tries::of_blob(&self.client, &host.name, &path);
        let mut upload: Option<Upload> = None;
        let (mut begun_again, mut asked_where) = (false, false);
        loop {
            let before = upload.as_ref().map_or(0, |upload| upload.offset);
            let error = match self.send_rest(&host, blob, source, &mut upload).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            tries.check()?;
            let now = upload.as_ref().map_or(0, |upload| upload.offset);
            if now > before + SMALL_BYTES {
                tries.progress();
            }
            match error {
                // The registry has more or less than was thought: it knows where to go on.
                Error::Status { status: 416, .. } if !asked_where => {
                    asked_where = true;
                    self.find_offset(&host, &mut upload).await?;
                }
                // What arrived is not what was sent: from the beginning, once.
                Error::Status { status: 400 | 416, .. } if now > 0 && !begun_again => {
                    (upload, begun_again) = (None, true);
                }
                // It has forgotten what it began.
                Error::NotFound { .. } if upload.is_some() && !begun_again => {
                    (upload, begun_again) = (None, true);
                }
                // The token has run out on the way: the next request gets another.
                Error::Denied { status: 401, known: true, .. } if now > 0 && !begun_again => {
                    begun_again = true;
                    self.find_offset(&host, &mut upload).await?;
                }
                error => {
                    tries.again(error).await?;
                    self.find_offset(&host, &mut upload).await?;
                }
            }
        }
    }

    /// Asks for the blob of another repository; false: the registry would rather have it sent.
    async fn mount(&self, host: &Host, blob: &Descriptor, from: &str) -> Result<bool, Error> {
        let mut url = self.url(host, "blobs/uploads/")?;
        url.query_pairs_mut().append_pair("mount", &blob.digest.to_string()).append_pair("from", from);
        let [push] = self.push();
        let scopes = [push, Scope { path: from.to_owned(), push: false }];
        let ask = Ask::new(Method::POST, url, &scopes);
        let answer = self.document(host, &ask, MAX_LIST_BYTES).await?;
        if answer.status == 201 {
            return Ok(true);
        }
        // The upload that it has begun instead is given back.
        if let Some(target) = answer.headers.get(LOCATION).and_then(|value| value.to_str().ok())
            && let Ok(url) = answer.url.join(target)
            && same_origin(&url, &host.base)
        {
            let mut ask = Ask::new(Method::DELETE, url, &scopes);
            ask.also = &[404, 405];
            let _ = self.client.ask(host, &ask).await;
        }
        Ok(false)
    }

    /// Begins an upload if there is none, and sends what the registry does not have.
    async fn send_rest(
        &self,
        host: &Host,
        blob: &Descriptor,
        source: &dyn BlobSource,
        upload: &mut Option<Upload>,
    ) -> Result<(), Error> {
        let scopes = self.push();
        let upload = match upload {
            Some(upload) => upload,
            None => upload.insert(self.begin(host, &scopes).await?),
        };
        let most = self.client.inner.settings.chunk_bytes.unwrap_or(u64::MAX).max(upload.chunk_min);
        let is_small = blob.size <= SMALL_BYTES.min(most);
        while !is_small && upload.offset < blob.size {
            let length = (blob.size - upload.offset).min(most);
            let last = upload.offset + length - 1;
            let ask = Ask::new(Method::PATCH, upload.url.clone(), &scopes)
                .header(CONTENT_TYPE, "application/octet-stream")
                .header(CONTENT_RANGE, &format!("{}-{last}", upload.offset));
            let answer = self.send_body(host, &ask, source, upload.offset, length).await?;
            if answer.status() != 202 {
                return Err(answer.protocol(format!("with {}, not 202", answer.status())));
            }
            let expected = upload.offset + length;
            let arrived = answer.header(RANGE).and_then(arrived).unwrap_or(expected);
            if arrived > expected || arrived <= upload.offset {
                return Err(answer.protocol("with a range that was never sent"));
            }
            upload.offset = arrived;
            if let Some(target) = answer.header(LOCATION) {
                upload.url = location(host, &upload.url, target)?;
            }
        }
        let mut url = upload.url.clone();
        url.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        let ask = Ask::new(Method::PUT, url, &scopes).header(CONTENT_TYPE, "application/octet-stream");
        let (from, length) = if is_small { (0, blob.size) } else { (blob.size, 0) };
        let answer = self.send_body(host, &ask, source, from, length).await?;
        match answer.header(CONTENT_DIGEST).and_then(|said| said.parse::<Digest>().ok()) {
            Some(actual) if actual != blob.digest => {
                let (host, path) = (host.name.clone(), shown_path(answer.response.url()));
                Err(Error::Misnamed { host, path, said: actual.to_string(), actual: blob.digest })
            }
            _ => Ok(()),
        }
    }

    async fn begin(&self, host: &Host, scopes: &[Scope]) -> Result<Upload, Error> {
        let url = self.url(host, "blobs/uploads/")?;
        let answer =
            self.document(host, &Ask::new(Method::POST, url.clone(), scopes), MAX_LIST_BYTES).await?;
        let text = |name| answer.headers.get(name).and_then(|value| value.to_str().ok());
        let target = text(LOCATION).ok_or_else(|| protocol(&url, &Method::POST, "without a Location"))?;
        let chunk_min = text(CHUNK_MIN).and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        Ok(Upload { url: location(host, &url, target)?, offset: 0, chunk_min })
    }

    /// Asks how much has arrived; an upload that the registry has forgotten is begun anew.
    async fn find_offset(&self, host: &Host, upload: &mut Option<Upload>) -> Result<(), Error> {
        let Some(known) = upload else { return Ok(()) };
        let scopes = self.push();
        let mut ask = Ask::new(Method::GET, known.url.clone(), &scopes);
        ask.also = &[400, 404, 405, 410];
        let answer = match self.document(host, &ask, MAX_LIST_BYTES).await {
            Ok(answer) => answer,
            // It says soon enough what is wrong.
            Err(_) => return Ok(()),
        };
        let text = |name| answer.headers.get(name).and_then(|value| value.to_str().ok());
        if !matches!(answer.status, 200 | 202 | 204) {
            *upload = None;
            return Ok(());
        }
        known.offset = text(RANGE).and_then(arrived).unwrap_or(0);
        if let Some(target) = text(LOCATION) {
            known.url = location(host, &known.url, target)?;
        }
        Ok(())
    }

    /// Sends `length` bytes of `source` from `offset` on.
    async fn send_body(
        &self,
        host: &Host,
        ask: &Ask<'_>,
        source: &dyn BlobSource,
        offset: u64,
        length: u64,
    ) -> Result<crate::exchange::Answer, Error> {
        let sent_bytes = Arc::new(AtomicU64::new(0));
        if length == 0 {
            return self
                .client
                .ask_once(host, ask, Once { body: Body::from(Bytes::new()), sent_bytes: &sent_bytes })
                .await;
        }
        let failed = |source| Error::Local { what: "reading a blob", source };
        let reader = source.open(offset).map_err(failed)?.take(length);
        let (pieces, failure) = read_aside(reader, length);
        let body = Body::wrap(Pieces { pieces, left: length, sent_bytes: sent_bytes.clone() });
        let sent = self.client.ask_once(host, ask, Once { body, sent_bytes: &sent_bytes }).await;
        // The reader is gone with the body, and has said why.
        match failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
            Some(error) if sent.is_err() => Err(failed(error)),
            _ => sent,
        }
    }
}

/// `Range: 0-N`: so many bytes have arrived. Registries write `0-0` for none, too.
fn arrived(range: &str) -> Option<u64> {
    let range = range.trim();
    let (first, last) = range.strip_prefix("bytes=").unwrap_or(range).split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    match (first, last) {
        (0, 0) => Some(0),
        (0, last) => last.checked_add(1),
        _ => None,
    }
}

/// Where an upload goes on. Never from https to http, whatever the registry says.
fn location(host: &Host, from: &Url, target: &str) -> Result<Url, Error> {
    let refused = |reason| Error::Refused {
        host: host.name.clone(),
        target: clean(target.split('?').next().unwrap_or_default()),
        reason,
    };
    let mut url = from.join(target).map_err(|_| refused("which is no URL"))?;
    match (from.scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return Err(refused("which would be without encryption")),
        _ => return Err(refused("where only https is followed")),
    }
    if crate::host::is_link_local(&url) && !same_origin(&url, &host.base) {
        return Err(refused("an address that only this machine's neighbours have"));
    }
    let _ = url.set_username("");
    let _ = url.set_password(None);
    Ok(url)
}

type Failure = Arc<std::sync::Mutex<Option<io::Error>>>;

/// Reads on a thread that may wait, as far ahead as there is room for.
fn read_aside(
    mut reader: impl Read + Send + 'static,
    length: u64,
) -> (mpsc::Receiver<Option<Bytes>>, Failure) {
    let (sender, pieces) = mpsc::channel(4);
    let failure = Failure::default();
    let note = failure.clone();
    tokio::task::spawn_blocking(move || {
        let mut left = length;
        while left > 0 {
            let mut piece = vec![0; PIECE_BYTES.min(usize::try_from(left).unwrap_or(PIECE_BYTES))];
            let read = match reader.read(&mut piece) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read,
            };
            match read {
                Ok(count) => {
                    piece.truncate(count);
                    left -= count as u64;
                    // Nobody wants it any more.
                    if sender.blocking_send(Some(piece.into())).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    *note.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                    let _ = sender.blocking_send(None);
                    return;
                }
            }
        }
    });
    (pieces, failure)
}

/// A body of known length, in pieces that another thread reads.
struct Pieces {
    /// `None`: reading failed.
    pieces: mpsc::Receiver<Option<Bytes>>,
    left: u64,
    sent_bytes: Arc<AtomicU64>,
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        match std::task::ready!(self.pieces.poll_recv(context)) {
            Some(Some(piece)) => {
                self.left = self.left.saturating_sub(piece.len() as u64);
                self.sent_bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
            _ => Poll::Ready(Some(Err(io::Error::other("the blob cannot be read")))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_arrived_is_read_in_both_spellings() {
        assert_eq!(arrived("0-99"), Some(100));
        assert_eq!(arrived("bytes=0-99"), Some(100));
        assert_eq!(arrived("0-0"), Some(0));
        for range in ["", "5-9", "0-", "x", "0-18446744073709551615"] {
            assert_eq!(arrived(range), None, "{range}");
        }
    }
}
