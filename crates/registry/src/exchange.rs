//! One request: with credentials, past redirects, and again when something passing was wrong.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use reqwest::{Body, Method, Response, Url};

use crate::auth::Scope;
use crate::challenge;
use crate::error::{clean, said};
use crate::host::{Host, bare, is_link_local, same_origin};
use crate::settings::within;
use crate::{Client, Clock, Error};

const MAX_REDIRECTS: usize = 10;
/// Tries to reach a host that is not there.
const UNREACHABLE_TRIES: u32 = 3;
/// As much of an error is read.
const MAX_ERROR_BYTES: u64 = 64 << 10;

/// A request that can be sent any number of times.
pub(crate) struct Ask<'a> {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) scopes: &'a [Scope],
    /// Statuses that the caller knows what to do about, beside those of success.
    pub(crate) also: &'a [u16],
}

impl<'a> Ask<'a> {
    pub(crate) fn new(method: Method, url: Url, scopes: &'a [Scope]) -> Self {
        let mut headers = HeaderMap::new();
        // What a digest names is not what a server makes of it for transport.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        Self { method, url, headers, body: Bytes::new(), scopes, also: &[] }
    }

    pub(crate) fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }
}

/// A body that can be sent once, and how much of it is gone.
pub(crate) struct Once<'a> {
    pub(crate) body: Body,
    pub(crate) sent_bytes: &'a AtomicU64,
}

/// An answer whose body is still to come.
pub(crate) struct Answer {
    pub(crate) response: Response,
    method: Method,
    clock: Arc<dyn Clock>,
    stall: Duration,
    stall_bytes: u64,
    waited: Duration,
    came_bytes: u64,
}

/// An answer as a whole.
pub(crate) struct Document {
    pub(crate) status: u16,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

/// The host of a URL as messages name it.
pub(crate) fn shown_host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The path of a URL as messages show it: without the query, which may hold a signature.
pub(crate) fn shown_path(url: &Url) -> String {
    url.path().chars().take(300).collect()
}

fn failed(url: &Url, method: &Method, error: reqwest::Error) -> Error {
    Error::Transfer {
        host: shown_host(url),
        method: method.to_string(),
        path: shown_path(url),
        // It may hold a signature.
        source: error.without_url(),
    }
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub(crate) fn header(&self, name: HeaderName) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// An answer that the specification has no room for.
    pub(crate) fn protocol(&self, what: impl Into<String>) -> Error {
        protocol(self.response.url(), &self.method, what)
    }

    /// The next piece of the body.
    ///
    /// # Errors
    /// [`Error::Stalled`] when nothing comes, or too little; the time that the caller takes does not count.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        let stalled =
            |url: &Url, after| Error::Stalled { host: shown_host(url), path: shown_path(url), after };
        let start = self.clock.now();
        let piece = match within(&*self.clock, self.stall, self.response.chunk()).await {
            None => return Err(stalled(self.response.url(), self.stall)),
            Some(Err(error)) => return Err(failed(self.response.url(), &self.method, error)),
            Some(Ok(piece)) => piece,
        };
        self.waited += self.clock.now().saturating_sub(start);
        self.came_bytes += piece.as_ref().map_or(0, Bytes::len) as u64;
        if self.waited >= self.stall && piece.is_some() {
            if self.came_bytes < self.stall_bytes {
                return Err(stalled(self.response.url(), self.waited));
            }
            (self.waited, self.came_bytes) = (Duration::ZERO, 0);
        }
        Ok(piece)
    }

    /// The whole body.
    pub(crate) async fn bytes(&mut self, limit_bytes: u64) -> Result<Vec<u8>, Error> {
        let url = self.response.url();
        let too_large = Error::TooLarge { host: shown_host(url), path: shown_path(url), limit_bytes };
        if self.method != Method::HEAD
            && self.response.content_length().is_some_and(|length| length > limit_bytes)
        {
            return Err(too_large);
        }
        let mut body = Vec::new();
        while let Some(piece) = self.chunk().await? {
            if (body.len() + piece.len()) as u64 > limit_bytes {
                return Err(too_large);
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }
}

/// An answer that the specification has no room for.
pub(crate) fn protocol(url: &Url, method: &Method, what: impl Into<String>) -> Error {
    Error::Protocol {
        host: shown_host(url),
        method: method.to_string(),
        path: shown_path(url),
        what: what.into(),
    }
}

/// How often and how long something was tried.
pub(crate) struct Tries {
    client: Client,
    host: String,
    path: String,
    start: Duration,
    limit: Duration,
    count: u32,
    most: u32,
}

impl Tries {
    pub(crate) fn of_document(client: &Client, host: &str, path: &str) -> Self {
        Self::new(client, host, path, client.inner.settings.document_deadline)
    }

    pub(crate) fn of_blob(client: &Client, host: &str, path: &str) -> Self {
        Self::new(client, host, path, client.inner.settings.blob_deadline)
    }

    fn new(client: &Client, host: &str, path: &str, limit: Duration) -> Self {
        let (host, path) = (host.to_owned(), path.to_owned());
        let (start, most) = (client.inner.clock.now(), client.inner.settings.tries);
        Self { client: client.clone(), host, path, start, limit, count: 0, most }
    }

    /// No more tries than that.
    pub(crate) fn at_most(&mut self, most: Option<u32>) {
        self.most = most.map_or(self.most, |most| most.min(self.most));
    }

    /// The last try has brought something: it does not count.
    pub(crate) fn progress(&mut self) {
        self.count = 0;
    }

    /// Waits until it makes sense to try again.
    ///
    /// # Errors
    /// `error` itself when it does not; [`Error::Deadline`].
    pub(crate) async fn again(&mut self, error: Error) -> Result<(), Error> {
        let (settings, clock) = (&self.client.inner.settings, &*self.client.inner.clock);
        self.count += 1;
        let most = if error.is_unreachable() { self.most.min(UNREACHABLE_TRIES) } else { self.most };
        let asked = match &error {
            Error::Limited { wait, .. } if *wait <= settings.longest_pause => Some(*wait),
            error if error.is_passing() => None,
            _ => return Err(error),
        };
        if self.count >= most {
            return Err(error);
        }
        let doubled = settings.first_pause.saturating_mul(1 << (self.count - 1).min(16));
        let pause = doubled.min(settings.longest_pause).mul_f64(0.5 + clock.chance() / 2.0);
        // Others were asked to come back at the same moment.
        let pause = asked.map_or(pause, |asked| asked + pause / 4);
        if (clock.now() + pause).saturating_sub(self.start) > self.limit {
            let (host, path) = (self.host.clone(), self.path.clone());
            return Err(Error::Deadline { host, path, after: self.limit, last: Some(Box::new(error)) });
        }
        clock.pause(pause).await;
        Ok(())
    }

    /// How long something may still take.
    ///
    /// # Errors
    /// [`Error::Deadline`] when that is nothing.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.taken() <= self.limit { Ok(()) } else { Err(self.late()) }
    }

    /// What `work` comes to, if that is in time. What trickles is no standstill, and may take for ever.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Deadline`].
    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let left = self.limit.saturating_sub(self.taken());
        within(&*self.client.inner.clock, left, work).await.unwrap_or_else(|| Err(self.late()))
    }

    fn taken(&self) -> Duration {
        self.client.inner.clock.now().saturating_sub(self.start)
    }

    fn late(&self) -> Error {
        let (host, path) = (self.host.clone(), self.path.clone());
        Error::Deadline { host, path, after: self.limit, last: None }
    }
}

impl Client {
    /// The whole answer to `ask`, which is sent again when something passing is wrong.
    pub(crate) async fn document(
        &self,
        host: &Host,
        ask: &Ask<'_>,
        limit_bytes: u64,
        most_tries: Option<u32>,
    ) -> Result<Document, Error> {
        let mut tries = Tries::of_document(self, &shown_host(&ask.url), &shown_path(&ask.url));
        tries.at_most(most_tries);
        loop {
            let came = async {
                let mut answer = self.ask(host, ask).await?;
                let body = answer.bytes(limit_bytes).await?;
                let (status, response) = (answer.status(), answer.response);
                let (url, headers) = (response.url().clone(), response.headers().clone());
                Ok(Document { status, url, headers, body })
            };
            match tries.in_time(came).await {
                Ok(document) => return Ok(document),
                Err(error) => tries.again(error).await?,
            }
        }
    }

    /// The beginning of the answer to `ask`, sent once, and once more for a challenge.
    pub(crate) async fn ask(&self, host: &Host, ask: &Ask<'_>) -> Result<Answer, Error> {
        let (mut url, mut hops, mut is_new) = (ask.url.clone(), 0, false);
        loop {
            let at_home = same_origin(&url, &host.base);
            let shown = if at_home { self.authorization(host, ask.scopes) } else { None };
            let response = self.send(host, ask, &url, shown.as_ref(), None).await?;
            let status = response.status();
            if status == 401 && at_home && !is_new {
                is_new = true;
                let challenges = challenges(&response);
                drop(response);
                if self.authenticate(host, &challenges, ask.scopes, shown.as_ref()).await? {
                    continue;
                }
                return Err(self.denied(host, ask, &url, 401, String::new(), shown.is_some()));
            }
            let follows = status.is_redirection() && matches!(ask.method, Method::GET | Method::HEAD);
            if follows && let Some(target) = response.headers().get(LOCATION) {
                hops += 1;
                if hops > MAX_REDIRECTS {
                    return Err(Error::Redirects { host: host.name.clone(), limit: MAX_REDIRECTS });
                }
                url = self.next(host, &url, target)?;
                continue;
            }
            return self.judge(host, ask, response, shown.is_some()).await;
        }
    }

    /// Sends `ask` with another body, which cannot be sent again.
    pub(crate) async fn ask_once(&self, host: &Host, ask: &Ask<'_>, once: Once<'_>) -> Result<Answer, Error> {
        let at_home = same_origin(&ask.url, &host.base);
        let shown = if at_home { self.fresh_authorization(host, ask.scopes).await? } else { None };
        let response = self.send(host, ask, &ask.url, shown.as_ref(), Some(once)).await?;
        self.judge(host, ask, response, shown.is_some()).await
    }

    async fn send(
        &self,
        host: &Host,
        ask: &Ask<'_>,
        url: &Url,
        shown: Option<&HeaderValue>,
        once: Option<Once<'_>>,
    ) -> Result<Response, Error> {
        let client = if same_origin(url, &host.base) { host.client.clone() } else { self.elsewhere()? };
        let mut request = client.request(ask.method.clone(), url.clone()).headers(ask.headers.clone());
        if let Some(value) = shown {
            request = request.header(AUTHORIZATION, value.clone());
        }
        let sent_bytes = once.as_ref().map(|once| once.sent_bytes);
        request = match once {
            Some(once) => request.body(once.body),
            // Without a length, some servers wait for a body.
            None if ask.method != Method::GET && ask.method != Method::HEAD => request.body(ask.body.clone()),
            None => request,
        };
        self.wait(url, &ask.method, request.send(), sent_bytes).await
    }

    /// `sending`, as long as it gets on.
    pub(crate) async fn wait(
        &self,
        url: &Url,
        method: &Method,
        sending: impl Future<Output = Result<Response, reqwest::Error>>,
        sent_bytes: Option<&AtomicU64>,
    ) -> Result<Response, Error> {
        let settings = &self.inner.settings;
        let mut sending = pin!(sending);
        let mut seen = 0;
        loop {
            match within(&*self.inner.clock, settings.stall, sending.as_mut()).await {
                Some(sent) => return sent.map_err(|error| failed(url, method, error)),
                None => {
                    let now = sent_bytes.map_or(0, |sent| sent.load(Ordering::Relaxed));
                    if now < seen + settings.stall_bytes {
                        let (host, path) = (shown_host(url), shown_path(url));
                        return Err(Error::Stalled { host, path, after: settings.stall });
                    }
                    seen = now;
                }
            }
        }
    }

    /// Whether what encrypted answers lead to may be without encryption: somebody has named it as insecure. Being
    /// on loopback is not enough.
    pub(crate) fn may_be_plain(&self, url: &Url) -> bool {
        self.inner.settings.is_insecure(&shown_host(url))
    }

    /// Where a redirect leads.
    fn next(&self, host: &Host, from: &Url, target: &HeaderValue) -> Result<Url, Error> {
        let text = String::from_utf8_lossy(target.as_bytes());
        let refused = |reason| Error::Refused {
            host: host.name.clone(),
            target: clean(text.split('?').next().unwrap_or_default()),
            reason,
        };
        let mut url = from.join(&text).map_err(|_| refused("which is no URL"))?;
        if !matches!(url.scheme(), "https" | "http") {
            return Err(refused("where only https is followed"));
        }
        if from.scheme() == "https" && url.scheme() == "http" && !self.may_be_plain(&url) {
            return Err(refused("which would be without encryption"));
        }
        if is_link_local(&url) && bare(&host.name) != url.host_str().unwrap_or_default() {
            return Err(refused("an address that only this machine's neighbours have"));
        }
        // Nobody's credentials come out of a redirect.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        Ok(url)
    }

    /// The answer, if it is one that `ask` knows what to do about.
    async fn judge(
        &self,
        host: &Host,
        ask: &Ask<'_>,
        response: Response,
        known: bool,
    ) -> Result<Answer, Error> {
        let settings = &self.inner.settings;
        let status = response.status();
        let mut answer = Answer {
            response,
            method: ask.method.clone(),
            clock: self.inner.clock.clone(),
            stall: settings.stall,
            stall_bytes: settings.stall_bytes,
            waited: Duration::ZERO,
            came_bytes: 0,
        };
        if status.is_success() || ask.also.contains(&status.as_u16()) {
            return Ok(answer);
        }
        let url = answer.response.url().clone();
        let wait = answer.header(RETRY_AFTER).and_then(|text| self.retry_after(text));
        let kind = answer.header(CONTENT_TYPE).unwrap_or_default();
        let is_page = kind.starts_with("text/html");
        let mut body = Vec::new();
        // The status is what counts: a text that does not come is none.
        while let Ok(Some(piece)) = answer.chunk().await {
            body.extend_from_slice(&piece);
            if body.len() as u64 > MAX_ERROR_BYTES {
                break;
            }
        }
        let said = said(&body, is_page, &self.inner.authority.secrets());
        let at = || (shown_host(&url), shown_path(&url));
        Err(match (status.as_u16(), wait) {
            (429 | 503, Some(wait)) => Error::Limited { host: at().0, wait, said },
            (status @ (401 | 403), _) => self.denied(host, ask, &url, status, said, known),
            (404, _) => Error::NotFound { host: at().0, path: at().1, said },
            (status, _) => {
                let ((host, path), method) = (at(), ask.method.to_string());
                Error::Status { host, method, path, status, said }
            }
        })
    }

    fn denied(&self, host: &Host, ask: &Ask<'_>, url: &Url, status: u16, said: String, known: bool) -> Error {
        let (known, registry) = (known && self.has_credential(host), host.name.as_str().into());
        let (host, method, path) = (shown_host(url), ask.method.to_string(), shown_path(url));
        Error::Denied { host, method, path, status, said, registry, known }
    }

    /// Seconds, or a date (RFC 9110, section 10.2.3).
    fn retry_after(&self, text: &str) -> Option<Duration> {
        if let Ok(seconds) = text.trim().parse::<u64>() {
            return Some(Duration::from_secs(seconds));
        }
        let date = jiff::fmt::rfc2822::parse(text.trim()).ok()?;
        let seconds = date.timestamp().as_second().saturating_sub(self.inner.clock.unix());
        Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
    }
}

fn challenges(response: &Response) -> Vec<challenge::Challenge> {
    let headers = response.headers().get_all(WWW_AUTHENTICATE);
    let texts = headers.iter().filter_map(|value| value.to_str().ok());
    texts.flat_map(challenge::parse).collect()
}
