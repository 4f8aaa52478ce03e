//! Why a registry did not do what it should.

use std::io;
use std::time::Duration;

use kiln_oci::Digest;
use kiln_oci::document::DocumentError;

use crate::CredentialError;

/// Why a request to a registry failed. No message holds a credential.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The registry answered, but not with what was asked for.
    #[error("{host} answered {status} to {method} {path}{}", behind(said))]
    Status { host: String, method: String, path: String, status: u16, said: String },
    /// There is no such image, blob or repository.
    #[error("{host} does not have {path}{}", behind(said))]
    NotFound { host: String, path: String, said: String },
    /// The registry refuses, with the credentials that there are or for lack of some.
    #[error("{host} refuses {method} {path} ({status}){}", behind(said))]
    Denied {
        host: String,
        method: String,
        path: String,
        status: u16,
        said: String,
        /// The registry that it is about, as references name it; `host` may be its token server.
        registry: Box<str>,
        /// Whether there were credentials to show.
        known: bool,
    },
    /// The registry wants fewer requests, for longer than anybody waits.
    #[error("{host} allows no more requests for {} seconds{}", wait.as_secs(), behind(said))]
    Limited { host: String, wait: Duration, said: String },
    /// The registry was not reached, or the connection broke.
    #[error("{method} {path} at {host} failed")]
    Transfer { host: String, method: String, path: String, source: reqwest::Error },
    /// The answer ended before its end.
    #[error("{host} ended {path} after {actual} of {expected} bytes")]
    CutOff { host: String, path: String, expected: u64, actual: u64 },
    /// Nothing came, or next to nothing, for so long that waiting makes no sense.
    #[error("{host} sent or took next to nothing of {path} for {} seconds", after.as_secs())]
    Stalled { host: String, path: String, after: Duration },
    /// All tries together took too long.
    #[error("{host} was given {} seconds for {path}", after.as_secs())]
    Deadline {
        host: String,
        path: String,
        after: Duration,
        #[source]
        last: Option<Box<Error>>,
    },
    /// It has failed again and again, a moment ago.
    #[error("{host} is left alone for {} seconds after {failures} failures in a row", wait.as_secs().max(1))]
    Tripped { host: String, failures: u32, wait: Duration },
    /// The registry sends from place to place.
    #[error("{host} redirects more than {limit} times")]
    Redirects { host: String, limit: usize },
    /// The registry sends somewhere that is not asked.
    #[error("{host} leads to {target}, {reason}")]
    Refused { host: String, target: String, reason: &'static str },
    /// An answer that the specification has no room for.
    #[error("{host} answered {method} {path} {what}")]
    Protocol { host: String, method: String, path: String, what: String },
    /// Other bytes than were promised.
    #[error("{host} gave {actual} ({actual_bytes} bytes) for {expected} ({expected_bytes} bytes)")]
    Mismatch { host: String, expected: Digest, expected_bytes: u64, actual: Digest, actual_bytes: u64 },
    /// Another size than was promised.
    #[error("{host} gives {actual_bytes} bytes or more for {expected}, which has {expected_bytes}")]
    Size { host: String, expected: Digest, expected_bytes: u64, actual_bytes: u64 },
    /// The manifest is another one than the registry says it is.
    #[error("{host} calls {path} {said}, but its digest is {actual}")]
    Misnamed { host: String, path: String, said: String, actual: Digest },
    /// Larger than anything of its kind is.
    #[error("{path} of {host} is larger than {limit_bytes} bytes")]
    TooLarge { host: String, path: String, limit_bytes: u64 },
    /// A manifest that is refused.
    #[error("{path} of {host} is refused")]
    Document { host: String, path: String, source: DocumentError },
    /// Credentials that cannot be read or used.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
    /// A certificate file that cannot be used.
    #[error("the certificates in {path} cannot be used")]
    Certificates { path: String, source: io::Error },
    /// The name of the registry gives no URL.
    #[error("{host:?} is not the name of a host")]
    Host { host: String },
    /// What was to be sent could not be read, or what came could not be written.
    #[error("{what} failed")]
    Local { what: &'static str, source: io::Error },
}

/// What a user can do about an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The network or the registry.
    Network,
    /// Not what was promised.
    Integrity,
    /// Refused as dangerous.
    Refused,
    /// Too much of something.
    Limit,
    /// The configuration of this machine.
    Configuration,
    /// The disk or the store of this machine.
    Store,
}

impl Error {
    /// Which kind of fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Status { .. }
            | Self::NotFound { .. }
            | Self::Denied { .. }
            | Self::Limited { .. }
            | Self::Transfer { .. }
            | Self::CutOff { .. }
            | Self::Stalled { .. }
            | Self::Deadline { .. }
            | Self::Tripped { .. }
            | Self::Redirects { .. }
            | Self::Protocol { .. } => Fault::Network,
            Self::Document { source: DocumentError::Schema1, .. } => Fault::Network,
            Self::Document { source, .. } if source.is_limit() => Fault::Limit,
            Self::Mismatch { .. } | Self::Size { .. } | Self::Misnamed { .. } | Self::Document { .. } => {
                Fault::Integrity
            }
            Self::Refused { .. } => Fault::Refused,
            Self::TooLarge { .. } => Fault::Limit,
            Self::Credentials(_) | Self::Certificates { .. } | Self::Host { .. } => Fault::Configuration,
            Self::Local { .. } => Fault::Store,
        }
    }

    /// Whether the same again may come out better.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Status { status, .. } => is_passing(*status),
            Self::Transfer { source, .. } => !is_certificate(source),
            Self::CutOff { .. } | Self::Stalled { .. } => true,
            _ => false,
        }
    }

    /// Whether this, after all tries, says that the host itself is not well.
    pub(crate) fn is_host_ill(&self) -> bool {
        match self {
            Self::Deadline { .. } => true,
            // It is there, and wants something else.
            Self::Status { status: 408 | 429, .. } => false,
            error => error.is_passing(),
        }
    }

    /// Whether the registry does not take this piece of an upload, and not because something passing is wrong.
    pub(crate) fn is_piece_refused(&self) -> bool {
        match self {
            Self::Status { method, status, .. } => method == "PATCH" && !is_passing(*status),
            Self::Protocol { method, .. } => method == "PATCH",
            Self::NotFound { .. } => true,
            _ => false,
        }
    }

    /// Whether the registry could not be reached at all.
    pub(crate) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Transfer { source, .. } if source.is_connect())
    }
}

/// Statuses that servers answer while something is wrong that passes.
pub(crate) fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502 | 503 | 504)
}

/// Whether it is a certificate that is wrong, or missing. rustls's own words: no type of its errors leaves
/// reqwest.
pub(crate) fn is_certificate(error: &reqwest::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if error.to_string().contains("ertificate") {
            return true;
        }
        cause = error.source();
    }
    false
}

fn behind(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(": {said}") }
}

/// As much of a hostile text as a message has room for, without what could move a cursor.
pub(crate) fn clean(text: &str) -> String {
    let spaced = text.chars().map(|c| if c.is_control() || is_invisible(c) { ' ' } else { c });
    let spaced: String = spaced.take(4000).collect();
    let words: Vec<&str> = spaced.split_whitespace().collect();
    words.join(" ").chars().take(300).collect()
}

/// Marks that reorder or hide what stands around them.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// What the body of an error says, without `secrets`: OCI's list of errors, or the beginning of a text.
pub(crate) fn said(body: &[u8], is_page: bool, secrets: &[String]) -> String {
    #[derive(serde::Deserialize)]
    struct Body {
        #[serde(default)]
        errors: Vec<One>,
        /// Token servers of some registries.
        #[serde(default)]
        details: String,
        #[serde(default)]
        message: String,
    }
    #[derive(serde::Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Body>(body) {
        Ok(body) => {
            let one = |one: &One| match (one.code.as_str(), one.message.as_str()) {
                (code, "") => code.to_owned(),
                ("", message) => message.to_owned(),
                (code, message) => format!("{code}: {message}"),
            };
            let list: Vec<String> = body.errors.iter().take(5).map(one).collect();
            [list.join("; "), body.details, body.message].into_iter().find(|text| !text.is_empty())
        }
        Err(_) if is_page => None,
        Err(_) => Some(String::from_utf8_lossy(body).into_owned()),
    };
    let mut text = text.unwrap_or_default();
    for secret in secrets.iter().filter(|secret| secret.len() >= 4) {
        text = text.replace(secret.as_str(), "***");
    }
    clean(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_says_is_bounded_and_harmless() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no\u001b[31m hunter22 here","detail":1},{"code":"X"}]}"#;
        assert_eq!(said(body, false, &["hunter22".to_owned()]), "DENIED: no [31m *** here; X");
        assert_eq!(said(b"<html>login</html>", true, &[]), "");
        assert_eq!(said(b"plain \r\n\x1b]52;c;x\x07 text", false, &[]), "plain ]52;c;x text");
        assert_eq!(said(&[b'a'; 1 << 20], false, &[]).len(), 300);
        assert_eq!(
            said(br#"{"details":"incorrect username or password"}"#, false, &[]),
            "incorrect username or password"
        );
    }
}
