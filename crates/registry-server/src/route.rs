//! What a path asks for.

use std::fmt;
use std::str::FromStr;

use kiln_oci::{Digest, Reference};

/// A repository's name: `team/app`. Safe as a path below a directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

/// A tag. Safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(String);

/// The number of an upload: 32 hexadecimal digits that nobody guesses.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UploadId(String);

/// It is not what the specification lets one be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotOne(&'static str);

impl Name {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = NotOne;

    /// By the grammar of references, in which a host stands in front.
    fn from_str(text: &str) -> Result<Self, NotOne> {
        match format!("h.h/{text}").parse::<Reference>() {
            Ok(parsed) if parsed.path() == text => Ok(Self(text.to_owned())),
            _ => Err(NotOne("no repository is called so")),
        }
    }
}

impl Tag {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Tag {
    type Err = NotOne;

    fn from_str(text: &str) -> Result<Self, NotOne> {
        match format!("h.h/x:{text}").parse::<Reference>() {
            Ok(parsed) if parsed.tag() == Some(text) && parsed.digest().is_none() => {
                Ok(Self(text.to_owned()))
            }
            _ => Err(NotOne("no tag is called so")),
        }
    }
}

impl UploadId {
    /// One that there was never before.
    pub fn new(random: [u8; 16]) -> Self {
        Self(random.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for UploadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for UploadId {
    type Err = NotOne;

    fn from_str(text: &str) -> Result<Self, NotOne> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() == 32 && text.bytes().all(is_digit) {
            return Ok(Self(text.to_owned()));
        }
        Err(NotOne("no upload is called so"))
    }
}

/// Which manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// The one that the tag leads to.
    Tag(Tag),
    /// This one.
    Digest(Digest),
}

/// What a request is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// `/v2/`: whether this is a registry.
    Base,
    /// `/v2/_catalog`
    Catalog,
    /// `/metrics`
    Metrics,
    /// `/v2/NAME/tags/list`
    Tags(Name),
    /// `/v2/NAME/referrers/DIGEST`
    Referrers(Name, Digest),
    /// `/v2/NAME/manifests/TAG` or `DIGEST`
    Manifest(Name, Which),
    /// `/v2/NAME/blobs/DIGEST`
    Blob(Name, Digest),
    /// `/v2/NAME/blobs/uploads/`
    Uploads(Name),
    /// `/v2/NAME/blobs/uploads/ID`
    Upload(Name, UploadId),
}

/// Why a path leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadRoute {
    /// Nothing of the specification.
    Unknown,
    /// The name of the repository is none.
    Name,
    /// What stands for a tag or a digest is neither.
    Reference,
    /// The digest is none that this registry knows.
    Digest,
    /// There was never such an upload.
    Upload,
}

impl Route {
    /// Reads the path of a URL.
    ///
    /// # Errors
    /// [`BadRoute`].
    pub fn parse(path: &str) -> Result<Self, BadRoute> {
        let path = decode(path).ok_or(BadRoute::Unknown)?;
        match path.as_str() {
            "/v2" | "/v2/" => return Ok(Self::Base),
            "/v2/_catalog" => return Ok(Self::Catalog),
            "/metrics" => return Ok(Self::Metrics),
            _ => {}
        }
        let rest = path.strip_prefix("/v2/").ok_or(BadRoute::Unknown)?;
        let (front, last) = rest.rsplit_once('/').ok_or(BadRoute::Unknown)?;
        let name = |text: &str| text.parse::<Name>().map_err(|_| BadRoute::Name);
        let digest = || last.parse::<Digest>().map_err(|_| BadRoute::Digest);
        if let Some(front) = front.strip_suffix("/blobs/uploads") {
            let name = name(front)?;
            return match last {
                "" => Ok(Self::Uploads(name)),
                id => Ok(Self::Upload(name, id.parse().map_err(|_| BadRoute::Upload)?)),
            };
        }
        match front.rsplit_once('/') {
            // Without the slash at the end, as some write it.
            Some((front, "blobs")) if last == "uploads" => Ok(Self::Uploads(name(front)?)),
            Some((front, "blobs")) => Ok(Self::Blob(name(front)?, digest()?)),
            Some((front, "referrers")) => Ok(Self::Referrers(name(front)?, digest()?)),
            Some((front, "tags")) if last == "list" => Ok(Self::Tags(name(front)?)),
            Some((front, "manifests")) => {
                let name = name(front)?;
                let which = match last.contains(':') {
                    true => Which::Digest(digest()?),
                    false => Which::Tag(last.parse().map_err(|_| BadRoute::Reference)?),
                };
                Ok(Self::Manifest(name, which))
            }
            _ => Err(BadRoute::Unknown),
        }
    }

    /// The word that stands for it among the metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Catalog => "catalog",
            Self::Metrics => "metrics",
            Self::Tags(_) => "tags",
            Self::Referrers(..) => "referrers",
            Self::Manifest(..) => "manifest",
            Self::Blob(..) => "blob",
            Self::Uploads(_) | Self::Upload(..) => "upload",
        }
    }
}

/// The value of a parameter in a query, decoded; the first one counts.
pub fn parameter(query: &str, name: &str) -> Option<String> {
    let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(key, _)| *key == name).and_then(|(_, value)| decode(&value.replace('+', "%20")))
}

/// `%41` is `A`; `None` for what is no text then.
fn decode(text: &str) -> Option<String> {
    if !text.contains('%') {
        return Some(text.to_owned());
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |at: usize| char::from(*after.get(at)?).to_digit(16);
        bytes.push(u8::try_from(digit(0)? * 16 + digit(1)?).ok()?);
        rest = after.get(2..)?;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    #[test]
    fn paths_are_read_from_their_end() {
        let name = |text: &str| text.parse::<Name>().unwrap();
        let digest: Digest = format!("sha256:{HEX}").parse().unwrap();
        let id = "0123456789abcdef0123456789abcdef";
        for (path, route) in [
            ("/v2/".to_owned(), Route::Base),
            ("/v2/_catalog".to_owned(), Route::Catalog),
            ("/v2/a/tags/list".to_owned(), Route::Tags(name("a"))),
            ("/v2/tags/list/tags/list".to_owned(), Route::Tags(name("tags/list"))),
            ("/v2/a/b/blobs/uploads/".to_owned(), Route::Uploads(name("a/b"))),
            ("/v2/a/b/blobs/uploads".to_owned(), Route::Uploads(name("a/b"))),
            ("/v2/blobs/uploads/blobs/uploads/".to_owned(), Route::Uploads(name("blobs/uploads"))),
            (format!("/v2/a/blobs/uploads/{id}"), Route::Upload(name("a"), id.parse().unwrap())),
            (format!("/v2/a/blobs/sha256%3A{HEX}"), Route::Blob(name("a"), digest)),
            (format!("/v2/a/referrers/sha256:{HEX}"), Route::Referrers(name("a"), digest)),
            (format!("/v2/a/manifests/{digest}"), Route::Manifest(name("a"), Which::Digest(digest))),
            (
                "/v2/a/manifests/V1._-".to_owned(),
                Route::Manifest(name("a"), Which::Tag("V1._-".parse().unwrap())),
            ),
        ] {
            assert_eq!(Route::parse(&path), Ok(route), "{path}");
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_lead_nowhere() {
        for (path, problem) in [
            ("/", BadRoute::Unknown),
            ("/v1/", BadRoute::Unknown),
            ("/v2/a", BadRoute::Unknown),
            ("/v2/../../etc/passwd", BadRoute::Unknown),
            ("/v2/../x/tags/list", BadRoute::Name),
            ("/v2/%2e%2e/x/tags/list", BadRoute::Name),
            ("/v2/a%2F..%2Fb/tags/list", BadRoute::Name),
            ("/v2//tags/list", BadRoute::Name),
            ("/v2/A/tags/list", BadRoute::Name),
            ("/v2/a:b/tags/list", BadRoute::Name),
            ("/v2/_blobs/tags/list", BadRoute::Name),
            ("/v2/a/manifests/..", BadRoute::Reference),
            ("/v2/a/manifests/.hidden", BadRoute::Reference),
            ("/v2/a/manifests/a@b", BadRoute::Reference),
            ("/v2/a/manifests/sha256:../../x", BadRoute::Unknown),
            ("/v2/a/blobs/sha256:12", BadRoute::Digest),
            ("/v2/a/blobs/uploads/..", BadRoute::Upload),
            ("/v2/a/blobs/%ff", BadRoute::Unknown),
            ("/v2/a/blobs/%", BadRoute::Unknown),
        ] {
            assert_eq!(Route::parse(path), Err(problem), "{path}");
        }
        assert!(Route::parse(&format!("/v2/{}/tags/list", "a".repeat(256))).is_err());
        assert!("a\n".parse::<Tag>().is_err() && "x".repeat(129).parse::<Tag>().is_err());
    }

    #[test]
    fn parameters_are_decoded() {
        let query = "mount=sha256%3Aab&from=a%2Fb+c&n&last=";
        assert_eq!(parameter(query, "mount").unwrap(), "sha256:ab");
        assert_eq!(parameter(query, "from").unwrap(), "a/b c");
        assert_eq!(parameter(query, "n").unwrap(), "");
        assert_eq!(parameter(query, "digest"), None);
    }
}
