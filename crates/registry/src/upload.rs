//! Blobs on their way to a registry: looked for first, mounted where another repository has them, and sent
//! otherwise.

use std::io::{self, Read};

use kiln_oci::image::Descriptor;
use reqwest::header::LOCATION;
use reqwest::{Method, Url};

use crate::auth::Scope;
use crate::client::MAX_LIST_BYTES;
use crate::exchange::Ask;
use crate::host::{Host, same_origin};
use crate::sending::Sending;
use crate::{Error, Repository};

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
        Sending::new(self).await?.run(blob, source).await
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
            self.give_back(host, url, &scopes).await;
        }
        Ok(false)
    }

    /// Tells the registry that an upload is not wanted any more. It would find out after a while.
    pub(crate) async fn give_back(&self, host: &Host, url: Url, scopes: &[Scope]) {
        let mut ask = Ask::new(Method::DELETE, url, scopes);
        ask.also = &[404, 405];
        let _ = self.client.ask(host, &ask).await;
    }
}
