//! Requests and their answers.

mod blobs;
mod images;
mod lists;
mod manifests;
mod pushed;
mod uploads;

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use hyper::body::Incoming;
use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, ETAG, EXPECT, HeaderMap, HeaderName,
    HeaderValue, IF_NONE_MATCH, LOCATION, WWW_AUTHENTICATE,
};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};
use kiln_oci::Digest;
use tokio::sync::Semaphore;

use crate::accounts::{Accounts, Shown};
use crate::body::Body;
use crate::directory::Directory;
use crate::images::Images;
use crate::metrics::Metrics;
use crate::mirror::{Mirror, disk};
use crate::pushed::Pushing;
use crate::refusal::Refusal;
use crate::reports::Reports;
use crate::rights::{Right, Rule, Who, allows};
use crate::route::{Name, Route};
use crate::settings::Limits;
use crate::transfer::Arriving;
use crate::verified::Verified;

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// So much of a refused request's body is read, so that who sends it gets to read why.
const DRAIN_BYTES: usize = 1 << 20;

/// All that a request needs.
pub(crate) struct Registry {
    pub(crate) held: Held,
    pub(crate) accounts: Option<Accounts>,
    pub(crate) rights: RwLock<Arc<[Rule]>>,
    pub(crate) read_only: bool,
    pub(crate) mirror: Option<Arc<Mirror>>,
    pub(crate) limits: Limits,
    pub(crate) metrics: Arc<Metrics>,
    /// Images are made ready one at a time: each takes all processors for itself.
    pub(crate) packing: Arc<Semaphore>,
    /// Blobs of images that others keep which were compared with their digests.
    pub(crate) verified: Arc<Verified>,
    pub(crate) reports: Arc<Reports>,
}

/// What there is to give out.
pub(crate) enum Held {
    /// What was pushed, or fetched from the registry behind.
    Directory(Arc<Directory>),
    /// Images that others keep.
    Images(Arc<dyn Images>),
    /// The same, which are pushed to.
    Pushed(Arc<Pushing>),
}

/// What a client asks, without the body.
pub(crate) struct Ask {
    pub(crate) method: Method,
    pub(crate) query: String,
    pub(crate) headers: HeaderMap,
    pub(crate) who: Who,
}

type Answer = Result<Response<Body>, Refusal>;

impl Registry {
    /// Answers a request, whatever it is.
    pub(crate) async fn handle(self: &Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let began = Instant::now();
        let (head, body) = request.into_parts();
        let mut body = Arriving::new(body, self.limits.clone());
        let route = Route::parse(head.uri.path());
        let kind = route.as_ref().map_or("none", Route::kind);
        let method = head.method.clone();
        let expects = head.headers.contains_key(EXPECT);
        let answered = match route {
            Ok(route) => self.answer(head, &route, &mut body).await,
            Err(problem) => Err(problem.into()),
        };
        let mut response = answered.unwrap_or_else(Refusal::response);
        let is_late = response.status() == StatusCode::REQUEST_TIMEOUT;
        let is_read = response.status().is_success() || (!expects && !is_late && drain(&mut body).await);
        let headers = response.headers_mut();
        if !is_read {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
        if method == Method::HEAD {
            let length = http_body::Body::size_hint(response.body()).exact().unwrap_or(0);
            headers_of_length(&mut response, length);
            *response.body_mut() = Body::Empty;
        }
        self.metrics.answered(&method, kind, response.status().as_u16(), began.elapsed());
        response
    }

    async fn answer(self: &Arc<Self>, head: Parts, route: &Route, body: &mut Arriving) -> Answer {
        let who = self.who(&head.headers).await?;
        let query = head.uri.query().unwrap_or_default().to_owned();
        let ask = Ask { method: head.method, query, headers: head.headers, who };
        let reads = matches!(ask.method, Method::GET | Method::HEAD);
        if !reads && !matches!(ask.method, Method::PUT | Method::POST | Method::PATCH | Method::DELETE) {
            return Err(Refusal::unsupported("nothing here has this method"));
        }
        let right = match (route, &ask.method) {
            (Route::Uploads(_) | Route::Upload(..), _) => Right::Push,
            _ if reads => Right::Pull,
            (_, &Method::DELETE) => Right::Delete,
            _ => Right::Push,
        };
        match route {
            Route::Base | Route::Catalog | Route::Metrics => self.known(&ask.who)?,
            Route::Tags(name)
            | Route::Referrers(name, _)
            | Route::Manifest(name, _)
            | Route::Blob(name, _)
            | Route::Uploads(name)
            | Route::Upload(name, _) => {
                self.may(&ask.who, name, right)?;
                // It is what it is called whatever it is called here, and counts as that, too.
                if let Held::Pushed(pushing) = &self.held {
                    self.may(&ask.who, &pushing.images.called(name), right)?;
                }
            }
        }
        if self.read_only && right != Right::Pull {
            return Err(Refusal::unsupported("this registry is for pulling only"));
        }
        if reads && !matches!(route, Route::Base | Route::Metrics) {
            match &self.held {
                Held::Directory(_) => {}
                Held::Images(images) => return self.answer_with(images, ask, route).await,
                Held::Pushed(pushing) => return self.answer_pushed(pushing, ask, route).await,
            }
        }
        match (route, ask.method.as_str()) {
            (Route::Base, "GET" | "HEAD") => json(200, b"{}".to_vec()),
            (Route::Metrics, "GET" | "HEAD") => {
                let uploads = match &self.held {
                    Held::Directory(directory) => directory.uploads.count(),
                    Held::Pushed(pushing) => pushing.directory.uploads.count(),
                    Held::Images(_) => 0,
                };
                let text = self.metrics.text(uploads);
                let mut response = Response::new(Body::from(text.into_bytes()));
                let kind = HeaderValue::from_static("text/plain; version=0.0.4");
                response.headers_mut().insert(CONTENT_TYPE, kind);
                Ok(response)
            }
            (Route::Catalog, "GET" | "HEAD") => self.catalog(ask).await,
            (Route::Tags(name), "GET" | "HEAD") => self.tags(&ask, name).await,
            (Route::Referrers(name, subject), "GET" | "HEAD") => self.referrers(&ask, name, subject).await,
            (Route::Manifest(name, which), "GET" | "HEAD") => self.get_manifest(&ask, name, which).await,
            (Route::Manifest(name, which), "PUT") => self.put_manifest(&ask, name, which, body).await,
            (Route::Manifest(name, which), "DELETE") => self.delete_manifest(name, which).await,
            (Route::Blob(name, digest), "GET" | "HEAD") => self.get_blob(&ask, name, digest).await,
            (Route::Blob(name, digest), "DELETE") => self.delete_blob(name, digest).await,
            (Route::Uploads(name), "POST") => self.begin_upload(&ask, name, body).await,
            (Route::Upload(name, id), "GET" | "HEAD") => self.upload_status(&ask, name, id).await,
            (Route::Upload(name, id), "PATCH") => self.upload_piece(&ask, name, id, body).await,
            (Route::Upload(name, id), "PUT") => self.end_upload(&ask, name, id, body).await,
            (Route::Upload(name, id), "DELETE") => self.cancel_upload(&ask, name, id).await,
            _ => Err(Refusal::unsupported("this cannot be done here")),
        }
    }

    /// Who asks: wrong credentials are an error also where none are needed.
    async fn who(&self, headers: &HeaderMap) -> Result<Who, Refusal> {
        let Some(accounts) = &self.accounts else { return Ok(Who::Anonymous) };
        let shown = headers.get(AUTHORIZATION).map(|value| value.to_str().unwrap_or("?"));
        match accounts.check(shown).await {
            Shown::Right(who) => Ok(who),
            Shown::Wrong => {
                self.metrics.refused_accounts.fetch_add(1, Ordering::Relaxed);
                Err(unauthorized("the user or the password is wrong"))
            }
        }
    }

    /// Those whom everything asks for who they are.
    fn known(&self, who: &Who) -> Result<(), Refusal> {
        match (&self.accounts, who) {
            (Some(_), Who::Anonymous) => Err(unauthorized("this registry asks for a login")),
            _ => Ok(()),
        }
    }

    fn may(&self, who: &Who, name: &Name, right: Right) -> Result<(), Refusal> {
        if self.lets(who, name, right) {
            return Ok(());
        }
        Err(match who {
            Who::Anonymous => unauthorized("this needs a login"),
            Who::Account(_) => Refusal::new(403, "DENIED", "this account may not do that here"),
        })
    }

    fn lets(&self, who: &Who, name: &Name, right: Right) -> bool {
        self.accounts.is_none() || allows(&self.rights(), who, name, right)
    }

    fn rights(&self) -> Arc<[Rule]> {
        self.rights.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The directory; images that others keep have none, and whatever needs one cannot be done with them.
    fn directory(&self) -> Result<&Arc<Directory>, Refusal> {
        match &self.held {
            Held::Directory(directory) => Ok(directory),
            Held::Pushed(pushing) => Ok(&pushing.directory),
            Held::Images(_) => Err(Refusal::unsupported("this registry is for pulling only")),
        }
    }

    async fn disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Directory) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        disk(self.directory()?, work).await
    }
}

impl Ask {
    fn header(&self, name: &HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Whether the client has what it asks for: what a digest names never changes.
    fn has(&self, digest: &Digest) -> bool {
        let tags = self.headers.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
        let mut tags = tags.flat_map(|line| line.split(',')).map(str::trim);
        tags.any(|tag| tag == "*" || tag.trim_start_matches("W/").trim_matches('"') == digest.to_string())
    }
}

/// Whether that was all of it.
async fn drain(body: &mut Arriving) -> bool {
    let mut read = 0;
    while read < DRAIN_BYTES {
        match body.next().await {
            Ok(Some(piece)) => read += piece.len(),
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
    false
}

fn unauthorized(why: &str) -> Refusal {
    Refusal::new(401, "UNAUTHORIZED", why).with(WWW_AUTHENTICATE, "Basic realm=\"kiln\"")
}

fn headers_of_length(response: &mut Response<Body>, length: u64) {
    if response.status() != StatusCode::NO_CONTENT && response.status() != StatusCode::NOT_MODIFIED {
        response.headers_mut().insert(CONTENT_LENGTH, length.into());
    }
}

fn empty(status: u16) -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}

fn json(status: u16, bytes: Vec<u8>) -> Answer {
    let mut response = empty(status);
    *response.body_mut() = bytes.into();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// 201 with where it is.
fn created(location: &str, digest: &Digest) -> Response<Body> {
    let mut response = empty(201);
    put(&mut response, LOCATION, location);
    put(&mut response, CONTENT_DIGEST, &digest.to_string());
    response
}

/// What is the same for everything with a digest; it is the one that nothing replaces.
fn identify(response: &mut Response<Body>, digest: &Digest) {
    put(response, CONTENT_DIGEST, &digest.to_string());
    put(response, ETAG, &format!("\"{digest}\""));
}

fn put(response: &mut Response<Body>, name: HeaderName, value: &str) {
    // Everything that is put here was parsed or made of digits.
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}
