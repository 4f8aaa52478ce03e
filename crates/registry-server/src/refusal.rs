//! No, in the specification's words ("Error Codes").

use std::io;

use hyper::header::{HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use crate::body::Body;
use crate::directory::DirectoryError;
use crate::route::BadRoute;

/// Why a request is refused. Becomes `{"errors":[{"code":…,"message":…}]}`.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Refusal {
    pub(crate) fn new(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, code, message: message.into(), headers: Vec::new() }
    }

    pub(crate) fn with(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((name, value));
        }
        self
    }

    pub(crate) fn unsupported(what: &str) -> Self {
        Self::new(405, "UNSUPPORTED", what)
    }

    pub(crate) fn no_upload() -> Self {
        Self::new(404, "BLOB_UPLOAD_UNKNOWN", "there is no such upload of yours in this repository")
    }

    pub(crate) fn no_blob() -> Self {
        Self::new(404, "BLOB_UNKNOWN", "this repository has no such blob")
    }

    pub(crate) fn no_manifest() -> Self {
        Self::new(404, "MANIFEST_UNKNOWN", "this repository has no such manifest")
    }

    pub(crate) fn no_repository() -> Self {
        Self::new(404, "NAME_UNKNOWN", "there is no such repository")
    }

    pub(crate) fn digest(message: impl Into<String>) -> Self {
        Self::new(400, "DIGEST_INVALID", message)
    }

    pub(crate) fn response(self) -> Response<Body> {
        let error = serde_json::json!({ "errors": [{ "code": self.code, "message": self.message }] });
        let mut response = Response::new(Body::from(error.to_string().into_bytes()));
        *response.status_mut() = self.status;
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(hyper::header::CONTENT_TYPE, json);
        for (name, value) in self.headers {
            response.headers_mut().append(name, value);
        }
        response
    }
}

impl From<BadRoute> for Refusal {
    fn from(problem: BadRoute) -> Self {
        match problem {
            BadRoute::Unknown => Self::new(404, "UNSUPPORTED", "there is nothing under this path"),
            BadRoute::Name => Self::new(400, "NAME_INVALID", "no repository is called so"),
            BadRoute::Reference => Self::new(400, "MANIFEST_INVALID", "this is neither a tag nor a digest"),
            BadRoute::Digest => Self::digest("digests here are sha256: and 64 lower-case digits"),
            BadRoute::Upload => Self::no_upload(),
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return Self::new(507, "UNKNOWN", "the registry's disk is full");
        }
        // What the system says names paths, which are nobody's business.
        Self::new(500, "UNKNOWN", "the registry could not read or write what it has")
    }
}

impl From<DirectoryError> for Refusal {
    fn from(error: DirectoryError) -> Self {
        match error {
            DirectoryError::Host { source, .. } => source.into(),
            _ => Self::new(500, "UNKNOWN", "what the registry has is damaged"),
        }
    }
}
