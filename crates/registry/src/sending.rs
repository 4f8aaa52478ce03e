//! One upload of one blob, from the request that begins it to the one that ends it, gone on with where it
//! broke off.

use std::sync::Arc;

use kiln_oci::Digest;
use kiln_oci::image::Descriptor;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderName, LOCATION, RANGE};
use reqwest::{Method, Url};

use crate::auth::Scope;
use crate::client::MAX_LIST_BYTES;
use crate::error::clean;
use crate::exchange::{Ask, Tries, protocol, shown_path};
use crate::host::{Host, same_origin};
use crate::manifest::CONTENT_DIGEST;
use crate::{BlobSource, Client, Error, Repository};

/// Blobs up to this size are sent with the request that ends the upload.
const SMALL_BYTES: u64 = 256 << 10;
/// A registry that wants pieces of at least so many bytes says so here.
const CHUNK_MIN: HeaderName = HeaderName::from_static("oci-chunk-min-length");

/// An upload that the registry has begun.
struct Upload {
    url: Url,
    /// So many bytes have arrived.
    offset: u64,
    chunk_min: u64,
}

/// An upload and what was tried to get on with it.
pub(crate) struct Sending<'a> {
    repository: &'a Repository,
    host: Arc<Host>,
    scopes: [Scope; 1],
    tries: Tries,
    /// `None`: none was begun, or the registry has forgotten it.
    upload: Option<Upload>,
    begun_again: bool,
    asked_where: bool,
    /// So much had arrived when the token ran out.
    denied_at: Option<u64>,
    /// The registry takes no pieces: the request that ends the upload has all of the blob.
    in_one: bool,
}

impl<'a> Sending<'a> {
    /// An upload that is not begun yet.
    ///
    /// # Errors
    /// When the registry is not reached.
    pub(crate) async fn new(repository: &'a Repository) -> Result<Self, Error> {
        let host = repository.host().await?;
        let path = format!("/v2/{}/blobs/uploads/", repository.path);
        let tries = Tries::of_blob(&repository.client, &host.name, &path);
        let scopes = repository.push();
        let (upload, begun_again, asked_where, denied_at, in_one) = Default::default();
        Ok(Self { repository, host, scopes, tries, upload, begun_again, asked_where, denied_at, in_one })
    }

    /// Sends all of `blob` that the registry does not have, with as many tries as it takes.
    ///
    /// # Errors
    /// Those of every request; [`Error::Local`] when `source` fails.
    pub(crate) async fn run(mut self, blob: &Descriptor, source: &dyn BlobSource) -> Result<(), Error> {
        loop {
            let before = self.arrived_bytes();
            match self.finish(blob, source).await {
                Ok(()) => return Ok(()),
                // What cannot be read here comes to nothing there.
                Err(error @ Error::Local { .. }) => {
                    self.give_back().await;
                    return Err(error);
                }
                Err(error) => self.recover(before, error).await?,
            }
        }
    }

    /// So much of the blob has arrived.
    pub(crate) fn arrived_bytes(&self) -> u64 {
        self.upload.as_ref().map_or(0, |upload| upload.offset)
    }

    /// Whether the registry has begun it.
    pub(crate) fn has_begun(&self) -> bool {
        self.upload.is_some()
    }

    /// Whether the registry has turned out to take no pieces.
    pub(crate) fn is_in_one(&self) -> bool {
        self.in_one
    }

    /// The registry wants no smaller pieces, but for the last.
    pub(crate) fn least_bytes(&self) -> u64 {
        self.upload.as_ref().map_or(0, |upload| upload.chunk_min)
    }

    fn most_bytes(&self) -> u64 {
        let settings = &self.repository.client.inner.settings;
        settings.chunk_bytes.unwrap_or(u64::MAX).max(self.least_bytes())
    }

    /// Begins the upload if it is not.
    pub(crate) async fn begin(&mut self) -> Result<(), Error> {
        if self.upload.is_some() {
            return Ok(());
        }
        let url = self.repository.url(&self.host, "blobs/uploads/")?;
        let ask = Ask::new(Method::POST, url.clone(), &self.scopes);
        let answer = self.repository.document(&self.host, &ask, MAX_LIST_BYTES).await?;
        let text = |name| answer.headers.get(name).and_then(|value| value.to_str().ok());
        let target = text(LOCATION).ok_or_else(|| protocol(&url, &Method::POST, "without a Location"))?;
        let chunk_min = text(CHUNK_MIN).and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        self.upload = Some(Upload {
            url: location(&self.repository.client, &self.host, &url, target)?,
            offset: 0,
            chunk_min,
        });
        Ok(())
    }

    /// Sends at most `length` bytes, which `source` has, from where the upload stands.
    pub(crate) async fn piece(&mut self, source: &dyn BlobSource, length: u64) -> Result<(), Error> {
        let length = length.min(self.most_bytes());
        let Some(upload) = &mut self.upload else { return Ok(()) };
        let last = upload.offset + length - 1;
        let ask = Ask::new(Method::PATCH, upload.url.clone(), &self.scopes)
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_RANGE, &format!("{}-{last}", upload.offset));
        let sent = self.repository.send_body(&self.host, &ask, source, upload.offset, length);
        let answer = self.tries.in_time(sent).await?;
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
            upload.url = location(&self.repository.client, &self.host, &upload.url, target)?;
        }
        Ok(())
    }

    /// Sends what the registry does not have of `blob`, and says what it is.
    pub(crate) async fn finish(&mut self, blob: &Descriptor, source: &dyn BlobSource) -> Result<(), Error> {
        self.begin().await?;
        let is_small = self.in_one || blob.size <= SMALL_BYTES.min(self.most_bytes());
        // What a growing blob has sent already does not come once more.
        let in_one = is_small && self.arrived_bytes() == 0;
        while !in_one && self.arrived_bytes() < blob.size {
            self.piece(source, blob.size - self.arrived_bytes()).await?;
        }
        let Some(upload) = &self.upload else { return Ok(()) };
        let mut url = upload.url.clone();
        url.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        let ask = Ask::new(Method::PUT, url, &self.scopes).header(CONTENT_TYPE, "application/octet-stream");
        let (from, length) = if in_one { (0, blob.size) } else { (blob.size, 0) };
        let sent = self.repository.send_body(&self.host, &ask, source, from, length);
        let answer = self.tries.in_time(sent).await?;
        match answer.header(CONTENT_DIGEST).and_then(|said| said.parse::<Digest>().ok()) {
            Some(actual) if actual != blob.digest => {
                let (host, path) = (self.host.name.clone(), shown_path(answer.response.url()));
                Err(Error::Misnamed { host, path, said: actual.to_string(), actual: blob.digest })
            }
            _ => Ok(()),
        }
    }

    /// Does what has to be done before the upload can go on after `error`. `before`: so much had arrived when
    /// the try began that ended with it.
    ///
    /// # Errors
    /// `error` when it makes no sense to go on; [`Error::Deadline`].
    pub(crate) async fn recover(&mut self, before: u64, error: Error) -> Result<(), Error> {
        self.tries.check()?;
        let now = self.arrived_bytes();
        if now > before + SMALL_BYTES {
            self.tries.progress();
        }
        match error {
            // A blob in one request is what every registry takes.
            error if self.takes_no_pieces(&error) => {
                self.in_one = true;
                // One that says so at once has nothing against the upload.
                if !matches!(error, Error::Status { status: 405 | 411 | 501, .. }) {
                    self.upload = None;
                }
                Ok(())
            }
            // The registry has more or less than was thought: it knows where to go on.
            Error::Status { status: 416, .. } if !self.asked_where => {
                self.asked_where = true;
                self.find_offset().await
            }
            // What arrived is not what was sent: from the beginning, once.
            Error::Status { status: 400 | 416, .. } if now > 0 && !self.begun_again => {
                (self.upload, self.begun_again) = (None, true);
                Ok(())
            }
            // It has forgotten what it began.
            Error::NotFound { .. } if self.upload.is_some() && !self.begun_again => {
                (self.upload, self.begun_again) = (None, true);
                Ok(())
            }
            // The registry takes the token no more, which may happen more than once while a blob grows: the next
            // request gets another.
            Error::Denied { status: 401, known: true, .. }
                if self.denied_at.is_none_or(|at| at + SMALL_BYTES < now) =>
            {
                self.denied_at = Some(now);
                self.find_offset().await
            }
            error => {
                self.tries.again(error).await?;
                match self.in_one {
                    true => {
                        self.upload = None;
                        Ok(())
                    }
                    false => self.find_offset().await,
                }
            }
        }
    }

    /// Whether `error` says that the registry knows only blobs in one request. Some say so at once, others call
    /// each upload unknown, or each range wrong.
    fn takes_no_pieces(&self, error: &Error) -> bool {
        if self.in_one || self.arrived_bytes() > 0 || self.upload.is_none() {
            return false;
        }
        match error {
            Error::Status { method, status: 405 | 411 | 501, .. } => method == "PATCH",
            Error::Status { method, status: 416, .. } => method == "PATCH" && self.asked_where,
            Error::NotFound { .. } => self.begun_again,
            _ => false,
        }
    }

    /// Asks how much has arrived; an upload that the registry has forgotten is begun anew.
    async fn find_offset(&mut self) -> Result<(), Error> {
        let Some(known) = &mut self.upload else { return Ok(()) };
        let mut ask = Ask::new(Method::GET, known.url.clone(), &self.scopes);
        ask.also = &[400, 404, 405, 410];
        let answer = match self.repository.document(&self.host, &ask, MAX_LIST_BYTES).await {
            Ok(answer) => answer,
            // It says soon enough what is wrong.
            Err(_) => return Ok(()),
        };
        let text = |name| answer.headers.get(name).and_then(|value| value.to_str().ok());
        if !matches!(answer.status, 200 | 202 | 204) {
            self.upload = None;
            return Ok(());
        }
        known.offset = text(RANGE).and_then(arrived).unwrap_or(0);
        if let Some(target) = text(LOCATION) {
            known.url = location(&self.repository.client, &self.host, &known.url, target)?;
        }
        Ok(())
    }

    /// Gives the upload back, if there is one: the blob will not come, or in another way.
    pub(crate) async fn give_back(self) {
        if let Some(upload) = self.upload {
            self.repository.give_back(&self.host, upload.url, &self.scopes).await;
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

/// Where an upload goes on. Not from https to http, whatever the registry says, but to hosts that may speak it.
fn location(client: &Client, host: &Host, from: &Url, target: &str) -> Result<Url, Error> {
    let refused = |reason| Error::Refused {
        host: host.name.clone(),
        target: clean(target.split('?').next().unwrap_or_default()),
        reason,
    };
    let mut url = from.join(target).map_err(|_| refused("which is no URL"))?;
    match (from.scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") if client.may_be_plain(&url) => {}
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
