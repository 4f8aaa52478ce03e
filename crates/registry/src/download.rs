//! Blobs on their way here: gone on with at the byte where they broke off, and verified.

use std::io::{self, Write};

use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Sha256Writer};
use reqwest::Method;
use reqwest::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, HeaderValue, RANGE};

use crate::exchange::{Answer, Ask, Tries, shown_host, shown_path};
use crate::host::Host;
use crate::pieces::{Ahead, Pace};
use crate::{Error, Repository};

/// Tries count anew after so many bytes: a server that gives one each time is not waited for.
pub(crate) const PROGRESS_BYTES: u64 = 256 << 10;

/// What a blob is written to: it computes the digest of what it gets, and nobody else has to.
pub trait Sink: Write + Send {
    /// So much was written.
    fn size_bytes(&self) -> u64;

    /// The digest of all that was written.
    fn digest(&self) -> Digest;
}

impl<W: Write + Send> Sink for Sha256Writer<W> {
    fn size_bytes(&self) -> u64 {
        Sha256Writer::size_bytes(self)
    }

    fn digest(&self) -> Digest {
        Sha256Writer::digest(self)
    }
}

/// What goes on with the rest of a blob.
enum Came {
    /// There is none.
    Whole,
    /// Several connections will bring it sooner.
    Slowly,
}

impl Repository {
    /// The size in bytes of a blob that the registry has; `None`: it has not.
    ///
    /// # Errors
    /// Those of every request.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, Error> {
        let host = self.host().await?;
        let scopes = self.pull();
        let mut ask = Ask::new(Method::HEAD, self.url(&host, &format!("blobs/{digest}"))?, &scopes);
        ask.also = &[404];
        let head = self.document(&host, &ask, 0).await?;
        if head.status == 404 {
            return Ok(None);
        }
        let length = head.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Some(length.unwrap_or(0)))
    }

    /// Writes the blob that `blob` names, by digest and size, to `out`, from its beginning and each byte once.
    /// Where a connection breaks, the next one goes on.
    ///
    /// `out` has bytes that nobody vouches for until this returns: use them only then.
    ///
    /// # Errors
    /// [`Error::Mismatch`], [`Error::Size`], [`Error::NotFound`] and those of every request;
    /// [`Error::Local`] when `out` takes no more.
    pub async fn fetch_blob(&self, blob: &Descriptor, out: &mut (dyn Write + Send)) -> Result<(), Error> {
        self.fetch_blob_ahead(blob, &mut Sha256Writer::new(out), None).await
    }

    /// The same into a fresh sink. With `ahead`, a large blob of a registry that is slow over one connection comes
    /// over several; `out` gets its bytes in order nevertheless.
    ///
    /// # Errors
    /// As [`Repository::fetch_blob`].
    pub async fn fetch_blob_ahead(
        &self,
        blob: &Descriptor,
        out: &mut dyn Sink,
        ahead: Option<&Ahead>,
    ) -> Result<(), Error> {
        let mirrors = self.mirrors();
        let mut fed = None;
        for mirror in mirrors.iter().chain([self]) {
            let before = out.size_bytes();
            let read = mirror.believed(mirror.read_blob(blob, out, ahead).await);
            // Another one goes on where this one broke off.
            if out.size_bytes() > before && mirror.is_mirror {
                fed = Some(mirror);
            }
            match read {
                Ok(()) => break,
                Err(Error::Local { what, source }) => return Err(Error::Local { what, source }),
                Err(error) if mirror.is_mirror => self.pass_over(&mirror.domain, &error),
                Err(error) => return Err(error),
            }
        }
        let (actual, actual_bytes) = (out.digest(), out.size_bytes());
        let (host, expected, expected_bytes) = (self.domain.clone(), blob.digest, blob.size);
        if (actual, actual_bytes) == (expected, expected_bytes) {
            return Ok(());
        }
        let host = fed.map_or(host, |mirror| mirror.domain.clone());
        let error = Error::Mismatch { host, expected, expected_bytes, actual, actual_bytes };
        match fed {
            Some(mirror) => {
                self.pass_over(&mirror.domain, &error);
                mirror.believed(Err(error))
            }
            None => Err(error),
        }
    }

    /// The blob from this very registry, as far as it is not written yet.
    async fn read_blob(
        &self,
        blob: &Descriptor,
        writer: &mut dyn Sink,
        ahead: Option<&Ahead>,
    ) -> Result<(), Error> {
        let host = self.host().await?;
        let url = self.url(&host, &format!("blobs/{}", blob.digest))?;
        let mut tries = Tries::of_blob(&self.client, &shown_host(&url), &shown_path(&url));
        tries.at_most(self.most_tries());
        let scopes = self.pull();
        let mut ask = Ask::new(Method::GET, url, &scopes);
        // 416 is what some answer to a range behind the end of a blob that they have less of.
        ask.also = &[416];
        let mut ahead = ahead;
        loop {
            let before = writer.size_bytes();
            match self.fetch_rest(&host, &mut ask, blob, writer, &tries, ahead).await {
                Ok(Came::Whole) => return self.heard(Ok(())),
                Ok(Came::Slowly) => {
                    let Some(several) = ahead.take() else { continue };
                    match self.fetch_pieces(blob, writer, several, &tries).await {
                        Ok(()) => return self.heard(Ok(())),
                        Err(Error::Local { what, source }) => return Err(Error::Local { what, source }),
                        // One connection tells whether there is anything wrong with the registry, or
                        // only with several.
                        Err(_) => tries.progress(),
                    }
                }
                Err(error) => {
                    if writer.size_bytes() - before >= PROGRESS_BYTES {
                        tries.progress();
                    }
                    if let Err(error) = tries.again(error).await {
                        return self.heard(Err(error));
                    }
                }
            }
        }
    }

    /// What is missing of the blob, over one connection.
    async fn fetch_rest(
        &self,
        host: &Host,
        ask: &mut Ask<'_>,
        blob: &Descriptor,
        writer: &mut dyn Sink,
        tries: &Tries,
        ahead: Option<&Ahead>,
    ) -> Result<Came, Error> {
        let from = writer.size_bytes();
        if from == blob.size && from > 0 {
            return Ok(Came::Whole);
        }
        if from > 0 {
            let range = HeaderValue::from_str(&format!("bytes={from}-"));
            ask.headers.insert(RANGE, range.expect("digits are fit for a header"));
        }
        let mut answer = tries.in_time(self.client.ask(host, ask)).await?;
        let mut skip = match answer.status() {
            206 if from > 0 => {
                let range = answer.header(CONTENT_RANGE).unwrap_or_default();
                if !is_range(range, from, blob.size, blob.size) {
                    return Err(answer.protocol("with another range than it was asked for"));
                }
                0
            }
            // The whole again: what is there already is read past.
            200 => from,
            status => return Err(answer.protocol(format!("with {status}, in the place of the blob"))),
        };
        let url = answer.response.url().clone();
        let size = |actual_bytes| Error::Size {
            host: shown_host(&url),
            expected: blob.digest,
            expected_bytes: blob.size,
            actual_bytes,
        };
        if let Some(length) = answer.response.content_length() {
            let whole = length + from - skip;
            if whole != blob.size {
                return Err(size(whole));
            }
        }
        let ahead = ahead.filter(|_| takes_ranges(&answer));
        let mut pace = Pace::of(&self.client.inner.settings);
        while let Some(piece) = pace.measure(tries.in_time(answer.chunk())).await? {
            tries.check()?;
            let known = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
            skip -= known as u64;
            let new = &piece[known..];
            if writer.size_bytes() + new.len() as u64 > blob.size {
                return Err(size(writer.size_bytes() + new.len() as u64));
            }
            writer.write_all(new).map_err(local)?;
            if ahead.is_some_and(|ahead| ahead.pays(&mut pace, blob.size - writer.size_bytes())) {
                return Ok(Came::Slowly);
            }
        }
        let actual = writer.size_bytes();
        if actual < blob.size {
            let (host, path) = (shown_host(&url), shown_path(&url));
            return Err(Error::CutOff { host, path, expected: blob.size, actual });
        }
        Ok(Came::Whole)
    }
}

/// Whether the server has said, or shown, that it gives parts of a blob.
fn takes_ranges(answer: &Answer) -> bool {
    answer.status() == 206 || answer.header(ACCEPT_RANGES).is_some_and(|unit| unit.trim() == "bytes")
}

pub(crate) fn local(source: io::Error) -> Error {
    Error::Local { what: "writing a blob", source }
}

/// Whether `range`, as `bytes FIRST-LAST/SIZE`, is what stands from `from` up to `end` in a blob of this size.
pub(crate) fn is_range(range: &str, from: u64, end: u64, size: u64) -> bool {
    let parse = || {
        let (ends, whole) = range.trim().strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = ends.split_once('-')?;
        let first: u64 = first.trim().parse().ok()?;
        let last: u64 = last.trim().parse().ok()?;
        Some(first == from && last.checked_add(1) == Some(end) && (whole == "*" || whole.parse() == Ok(size)))
    };
    parse().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_rest_is_the_rest() {
        let is_rest = |range, from, size| is_range(range, from, size, size);
        assert!(is_rest("bytes 5-9/10", 5, 10) && is_rest("bytes 5-9/*", 5, 10));
        assert!(is_range("bytes 5-7/10", 5, 8, 10) && !is_range("bytes 5-8/10", 5, 8, 10));
        for range in [
            "bytes 0-9/10",
            "bytes 5-8/10",
            "bytes 5-9/11",
            "5-9/10",
            "",
            "bytes */10",
            "bytes 5-18446744073709551615/10",
        ] {
            assert!(!is_rest(range, 5, 10), "{range}");
        }
    }
}
