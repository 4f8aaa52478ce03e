//! A client of registries, and one repository of one of them.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, PoisonError};

use kiln_oci::{Digest, Reference};
use reqwest::Method;

use crate::auth::{Authority, Scope};
use crate::breaker::Breakers;
use crate::exchange::{Ask, Document, Tries};
use crate::host::{self, Host, is_loopback};
use crate::{Clock, Credential, CredentialSource, Error, Settings, SystemClock};

/// A token server's answer, a list of tags, or an error that is read for its text.
pub(crate) const MAX_LIST_BYTES: u64 = 4 << 20;
/// Tries with a mirror.
const MIRROR_TRIES: u32 = 2;

/// Connections, tokens and what is known of registries. Cloned for the price of a counter; the clones share
/// all of it.
///
/// Its futures need a tokio runtime with time and I/O, and a client belongs to the runtime that it was first
/// used on. A future that is dropped ends what it was doing.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) settings: Settings,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) credentials: Arc<dyn CredentialSource>,
    pub(crate) authority: Authority,
    pub(crate) breakers: Breakers,
    hosts: tokio::sync::Mutex<HashMap<String, Arc<Host>>>,
    /// For wherever registries redirect to.
    elsewhere: std::sync::Mutex<Option<reqwest::Client>>,
}

/// One repository: `library/debian` at `docker.io`.
#[derive(Clone)]
pub struct Repository {
    pub(crate) client: Client,
    pub(crate) domain: String,
    pub(crate) path: String,
    /// It stands for another one: to be read, and soon given up.
    pub(crate) is_mirror: bool,
}

/// Which manifest of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which<'a> {
    /// The one that the tag leads to now.
    Tag(&'a str),
    /// This one.
    Digest(&'a Digest),
}

impl fmt::Display for Which<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

impl<'a> From<&'a Reference> for Which<'a> {
    /// A digest wins over a tag, as with docker.
    fn from(reference: &'a Reference) -> Self {
        match (reference.digest(), reference.tag()) {
            (Some(digest), _) => Self::Digest(digest),
            (None, tag) => Self::Tag(tag.unwrap_or("latest")),
        }
    }
}

impl Client {
    /// A client that has asked nobody yet.
    pub fn new(settings: Settings, credentials: Arc<dyn CredentialSource>) -> Self {
        Self::with_clock(settings, credentials, Arc::new(SystemClock::default()))
    }

    /// The same with another clock.
    pub fn with_clock(
        settings: Settings,
        credentials: Arc<dyn CredentialSource>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let (hosts, elsewhere, authority, breakers) = Default::default();
        let inner = Inner { settings, clock, credentials, authority, breakers, hosts, elsewhere };
        Self { inner: Arc::new(inner) }
    }

    /// The repository of `reference`.
    pub fn repository(&self, reference: &Reference) -> Repository {
        let (domain, path) = (reference.domain().to_owned(), reference.path().to_owned());
        Repository { client: self.clone(), domain, path, is_mirror: false }
    }

    /// Asks the registry `domain` whether it is one and takes the credentials that there are for it.
    ///
    /// # Errors
    /// [`Error::Denied`] when it does not.
    pub async fn check(&self, domain: &str) -> Result<(), Error> {
        let host = self.host(domain, None).await?;
        let ask = Ask::new(Method::GET, host.base.clone(), &[]);
        self.document(&host, &ask, MAX_LIST_BYTES, None).await.map(drop)
    }

    /// The same with a user's password. A token that may be kept in its place is what the token server gave, if it
    /// gives such tokens.
    ///
    /// # Errors
    /// As [`Client::check`].
    pub async fn login(&self, domain: &str) -> Result<Option<Credential>, Error> {
        self.want_refresh_token();
        let checked = self.check(domain).await;
        let token = self.take_refresh_token();
        checked.map(|()| token.map(Credential::Identity))
    }

    /// Where the registry is and how it speaks. Asks it once when it may speak plain http: https first.
    pub(crate) async fn host(&self, domain: &str, most_tries: Option<u32>) -> Result<Arc<Host>, Error> {
        let Inner { settings, hosts, .. } = &*self.inner;
        let mut hosts = hosts.lock().await;
        if let Some(host) = hosts.get(domain) {
            return Ok(host.clone());
        }
        let client = host::client(settings, Some(domain))?;
        let made = |plain| -> Result<Host, Error> {
            let (name, base) = (domain.to_owned(), host::base(domain, plain)?);
            Ok(Host { name, base, client: client.clone() })
        };
        let mut host = made(false)?;
        if is_loopback(domain) || settings.is_insecure(domain) {
            let (mut tries, mut plain) = (Tries::of_document(self, domain, host.base.path()), made(true)?);
            tries.at_most(most_tries);
            loop {
                match tries.in_time(self.greet(&host)).await {
                    Ok(_) => break,
                    // A server of TLS answers 400 to plain http: then the certificate is what is wrong.
                    Err(error) => match tries.in_time(self.greet(&plain)).await {
                        Ok(status) if status != 400 => {
                            std::mem::swap(&mut host, &mut plain);
                            break;
                        }
                        _ => tries.again(error).await?,
                    },
                }
            }
        }
        let host = Arc::new(host);
        hosts.insert(domain.to_owned(), host.clone());
        Ok(host)
    }

    /// Whether anybody is there; the status of the answer. Without credentials.
    async fn greet(&self, host: &Host) -> Result<u16, Error> {
        let request = host.client.get(host.base.clone()).send();
        Ok(self.wait(&host.base, &Method::GET, request, None).await?.status().as_u16())
    }

    /// Connections to where registries redirect.
    pub(crate) fn elsewhere(&self) -> Result<reqwest::Client, Error> {
        let mut elsewhere = self.inner.elsewhere.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = &*elsewhere {
            return Ok(client.clone());
        }
        Ok(elsewhere.insert(host::client(&self.inner.settings, None)?).clone())
    }
}

impl Repository {
    /// Its registry, as references write it.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Its name at the registry.
    pub fn path(&self) -> &str {
        &self.path
    }

    pub(crate) async fn host(&self) -> Result<Arc<Host>, Error> {
        self.check_breaker()?;
        match self.client.host(&self.domain, self.most_tries()).await {
            Ok(host) => Ok(host),
            Err(error) => self.heard(Err(error)),
        }
    }

    /// So often something is tried that brings nothing; `None`: as the settings say.
    pub(crate) fn most_tries(&self) -> Option<u32> {
        // There is somebody else to ask.
        self.is_mirror.then_some(MIRROR_TRIES)
    }

    /// `https://host/v2/NAME/` and what follows.
    pub(crate) fn url(&self, host: &Host, rest: &str) -> Result<reqwest::Url, Error> {
        let url = host.base.join(&format!("{}/{rest}", self.path));
        url.map_err(|_| Error::Host { host: self.domain.clone() })
    }

    pub(crate) fn pull(&self) -> [Scope; 1] {
        [Scope { path: self.path.clone(), push: false }]
    }

    pub(crate) fn push(&self) -> [Scope; 1] {
        [Scope { path: self.path.clone(), push: true }]
    }

    pub(crate) async fn document(&self, host: &Host, ask: &Ask<'_>, limit: u64) -> Result<Document, Error> {
        self.heard(self.client.document(host, ask, limit, self.most_tries()).await)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::NoCredentials;

    /// A blob that nobody makes.
    struct Never;

    impl crate::BlobSource for Never {
        fn open(&self, _: u64) -> std::io::Result<Box<dyn std::io::Read + Send>> {
            Err(std::io::ErrorKind::NotFound.into())
        }
    }

    impl crate::Growing for Never {
        fn grown(
            &self,
            _: u64,
        ) -> std::pin::Pin<Box<dyn Future<Output = std::io::Result<crate::Grown>> + Send + '_>> {
            Box::pin(std::future::pending())
        }
    }

    #[test]
    fn what_a_client_does_can_move_between_threads() {
        fn check(_: impl Send) {}
        let client = Client::new(Settings::default(), Arc::new(NoCredentials));
        let repository = client.repository(&"h.example/x".parse().unwrap());
        let blob = kiln_oci::image::Descriptor::new("x", Digest::of(b""), 0);
        let (source, mut out) = (Vec::new(), Vec::new());
        check(repository.manifest(Which::Tag("x")));
        check(repository.resolve(Which::Tag("x")));
        check(repository.put_manifest(Which::Tag("x"), "", b""));
        check(repository.push_blob(&blob, &source, &[]));
        let growing: &dyn crate::Growing = &Never;
        check(repository.push_growing(growing, &|_| Vec::new()));
        let (file, room) =
            (Arc::new(tempfile::tempfile().unwrap()), Arc::new(tokio::sync::Semaphore::new(3)));
        let mut out = kiln_oci::Sha256Writer::new(&mut out);
        check(repository.fetch_blob_ahead(&blob, &mut out, Some(&crate::Ahead { file, room })));
        check(repository.tags());
        check(client.check("h.example"));
    }

    #[test]
    fn a_digest_wins_over_a_tag() {
        let digest = Digest::of(b"x");
        let reference: Reference = format!("h.example/x:v1@{digest}").parse().unwrap();
        assert_eq!(Which::from(&reference), Which::Digest(&digest));
        assert_eq!(Which::from(&"x".parse::<Reference>().unwrap()), Which::Tag("latest"));
    }
}
