//! Requests to a web server: redirects counted, credentials kept at home, every wait bounded.

use std::io::Write;
use std::pin::pin;
use std::time::{Duration, Instant};

use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, ETAG, HeaderMap, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH,
    LAST_MODIFIED, LOCATION,
};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use tokio::runtime::Runtime;

use super::{Fetcher, SourceError};

const MAX_REDIRECTS: usize = 10;
/// To the first byte of an answer, and between two pieces of a body.
const STALL: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(30);
/// How soon a cancelled build is noticed.
const POLL: Duration = Duration::from_millis(100);

/// How to ask whether a known file is still the newest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Conditions {
    pub(super) etag: Option<String>,
    pub(super) last_modified: Option<String>,
}

/// A client for one URL. Blocks: not for threads that drive futures.
pub(super) struct HttpClient<'a> {
    fetcher: &'a Fetcher<'a>,
    /// The caller's runtime may have neither timers nor sockets.
    runtime: Runtime,
    client: Client,
    url: Url,
    /// The URL without credentials.
    shown: String,
    authorization: Option<HeaderValue>,
}

/// What the server said.
pub(super) enum Answer<'c> {
    /// The known file is the newest.
    NotModified,
    /// The file.
    Body(Body<'c>),
}

/// A file on its way.
pub(super) struct Body<'c> {
    client: &'c HttpClient<'c>,
    response: Response,
}

impl<'a> HttpClient<'a> {
    /// A client for `url`, with the credentials for its host.
    ///
    /// # Errors
    /// [`SourceError::Url`], [`SourceError::Secret`].
    pub(super) fn new(fetcher: &'a Fetcher<'a>, url: &str) -> Result<Self, SourceError> {
        let parsed = Url::parse(url).ok().filter(|url| is_web(url) && url.has_host());
        let parsed = parsed.ok_or_else(|| SourceError::Url { url: strip_user(url) })?;
        let shown = shown(&parsed);
        let host = parsed.host_str().unwrap_or_default();
        let names = [format!("HTTP_AUTH_HEADER_{host}"), format!("HTTP_AUTH_TOKEN_{host}")];
        let authorization = match fetcher.secret(&names)? {
            None => None,
            Some((at, text)) => {
                let text = if at == 0 { text } else { format!("Bearer {text}") };
                let failed = |error| SourceError::Secret {
                    name: names[at].clone(),
                    source: std::io::Error::other(error),
                };
                let mut value = HeaderValue::from_str(&text).map_err(failed)?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| SourceError::Host { what: "starting the HTTP client", source })?;
        let client = kiln_registry::web_client(&fetcher.options.authorities)
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            // Followed here, where credentials and schemes are looked at.
            .redirect(redirect::Policy::none())
            .build()
            .map_err(|source| SourceError::Transfer { host: host.to_owned(), source })?;
        Ok(Self { fetcher, runtime, client, url: parsed, shown, authorization })
    }

    /// The URL without credentials.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// An answer that is no file.
    pub(super) fn status(&self, status: u16) -> SourceError {
        SourceError::Status { host: host(&self.url), url: self.shown.clone(), status }
    }

    /// Waits, unless the build is cancelled.
    pub(super) fn pause(&self, how_long: Duration) -> Result<(), SourceError> {
        self.runtime.block_on(async {
            let _ = self.wait(how_long, &self.url, std::future::pending::<()>()).await;
        });
        self.fetcher.check_cancelled()
    }

    /// Asks for the file; with `conditions`, only if it is newer than the known one.
    pub(super) fn get(&self, conditions: Option<&Conditions>) -> Result<Answer<'_>, SourceError> {
        self.runtime.block_on(async {
            let mut url = self.url.clone();
            for _ in 0..=MAX_REDIRECTS {
                let response = self.request(&url, conditions).await?;
                let status = response.status();
                if status == StatusCode::NOT_MODIFIED && conditions.is_some() {
                    return Ok(Answer::NotModified);
                }
                if status.is_success() {
                    return Ok(Answer::Body(Body { client: self, response }));
                }
                let target = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
                match target {
                    Some(target) if status.is_redirection() => url = next(&url, target)?,
                    _ => {
                        let (host, url) = (host(&url), shown(&url));
                        return Err(SourceError::Status { host, url, status: status.as_u16() });
                    }
                }
            }
            Err(SourceError::Redirects { host: host(&self.url), limit: MAX_REDIRECTS })
        })
    }

    async fn request(&self, url: &Url, conditions: Option<&Conditions>) -> Result<Response, SourceError> {
        let mut headers = HeaderMap::new();
        // The file is what the server has, not what it makes of it for transport.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(value) = self.authorization.as_ref().filter(|_| same_origin(url, &self.url)) {
            headers.insert(AUTHORIZATION, value.clone());
        }
        if let Some(Conditions { etag, last_modified }) = conditions {
            for (name, value) in [(IF_NONE_MATCH, etag), (IF_MODIFIED_SINCE, last_modified)] {
                if let Some(value) = value.as_ref().and_then(|value| HeaderValue::from_str(value).ok()) {
                    headers.insert(name, value);
                }
            }
        }
        let request = self.client.get(url.clone()).headers(headers).send();
        self.wait(STALL, url, request).await?.map_err(|error| failed(url, error))
    }

    /// `future`, if it is ready within `limit` and nobody cancels.
    async fn wait<T>(
        &self,
        limit: Duration,
        url: &Url,
        future: impl Future<Output = T>,
    ) -> Result<T, SourceError> {
        let mut future = pin!(future);
        let started = Instant::now();
        loop {
            let left = limit.saturating_sub(started.elapsed());
            if let Ok(value) = tokio::time::timeout(POLL.min(left), future.as_mut()).await {
                return Ok(value);
            }
            self.fetcher.check_cancelled()?;
            if started.elapsed() >= limit {
                return Err(SourceError::Stalled { host: host(url), seconds: limit.as_secs() });
            }
        }
    }
}

impl Body<'_> {
    /// How to ask for this file the next time.
    pub(super) fn conditions(&self) -> Conditions {
        let text = |name| {
            let value = self.response.headers().get(name)?;
            value.to_str().ok().map(str::to_owned)
        };
        Conditions { etag: text(ETAG), last_modified: text(LAST_MODIFIED) }
    }

    /// Writes the whole file to `out`.
    ///
    /// # Errors
    /// [`SourceError::TooLarge`] as soon as it is known; [`SourceError::Transfer`] when it breaks
    /// off.
    pub(super) fn copy_to(&mut self, out: &mut impl Write, max_bytes: u64) -> Result<(), SourceError> {
        let client = self.client;
        let too_large = || SourceError::TooLarge { what: client.shown.clone(), limit_bytes: max_bytes };
        if self.response.content_length().is_some_and(|length| length > max_bytes) {
            return Err(too_large());
        }
        let url = self.response.url().clone();
        let mut left = max_bytes;
        client.runtime.block_on(async {
            while let Some(piece) =
                client.wait(STALL, &url, self.response.chunk()).await?.map_err(|error| failed(&url, error))?
            {
                left = left.checked_sub(piece.len() as u64).ok_or_else(too_large)?;
                let written = out.write_all(&piece);
                written.map_err(|source| SourceError::Host { what: "writing the download", source })?;
            }
            Ok(())
        })
    }
}

fn is_web(url: &Url) -> bool {
    matches!(url.scheme(), "http" | "https")
}

fn same_origin(one: &Url, other: &Url) -> bool {
    one.scheme() == other.scheme()
        && one.host_str() == other.host_str()
        && one.port_or_known_default() == other.port_or_known_default()
}

/// Where `target` leads, seen from `url`.
fn next(url: &Url, target: &str) -> Result<Url, SourceError> {
    let found = url.join(target).ok().filter(is_web);
    found.ok_or_else(|| SourceError::RefusedRedirect { host: host(url), target: strip_user(target) })
}

fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // These fail only for URLs that cannot have credentials.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

/// Text that should have been a URL, without what may be a password.
pub(crate) fn strip_user(text: &str) -> String {
    let start = text.find("://").map_or(0, |at| at + 3);
    let authority = text[start..].find(['/', '?', '#']).map_or(text.len(), |at| start + at);
    match text[start..authority].rfind('@') {
        Some(at) => format!("{}{}", &text[..start], &text[start + at + 1..]),
        None => text.to_owned(),
    }
}

fn failed(url: &Url, error: reqwest::Error) -> SourceError {
    SourceError::Transfer { host: host(url), source: error.without_url() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn credentials_are_never_shown() {
        assert_eq!(shown(&url("https://me:word@host:8443/a?b")), "https://host:8443/a?b");
        assert_eq!(strip_user("ftp://me:word@host/x@y"), "ftp://host/x@y");
        assert_eq!(strip_user("me:word@host"), "host");
        assert_eq!(strip_user("https://host/a@b"), "https://host/a@b");
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        assert!(same_origin(&url("https://h/a"), &url("https://h:443/b")));
        for other in ["http://h/a", "https://h:444/a", "https://i/a"] {
            assert!(!same_origin(&url("https://h/a"), &url(other)), "{other}");
        }
    }

    #[test]
    fn only_the_web_is_followed() {
        let from = url("https://h/a/b");
        assert_eq!(next(&from, "c?d").unwrap().as_str(), "https://h/a/c?d");
        assert_eq!(next(&from, "//i/c").unwrap().as_str(), "https://i/c");
        for target in ["file:///etc/passwd", "gopher://h/x", "javascript:0"] {
            assert!(matches!(next(&from, target), Err(SourceError::RefusedRedirect { .. })), "{target}");
        }
    }
}
